"""The kernels of stem_conv as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, Machine, compile_kernel

from ddpm_fast.ops.stem_conv import triton as kernel
from ddpm_fast.ops.stem_conv import triton_conv
from ddpm_fast.runtime import triton_launch

pytestmark = pytest.mark.slow
on_sm_90 = pytest.mark.release(but=lambda capability, **_: capability == 90)  # the others: `make release-tests`


def compile_stage(name: str, dtype: str, capability: int, tmp_path, **ones: int | None):
    """A kernel of sums as the network's first convolution launches it."""
    function = getattr(kernel, f"stem_conv_bwd_{name}_kernel")
    blocks = kernel.blocks_of_sums(64) if name == "sum" else kernel.parameters_blocks()
    constants = {n: value for n, value in (blocks | ones).items() if n in function.arg_names}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    ints = ("N",) if name == "sum" else ("taps", "C", "chunks", "stride_t", "stride_c")
    unaligned = tuple(n for n in ints if n in signature)
    options = {"num_warps": blocks["num_warps"], "unaligned": unaligned}
    return compile_kernel(function, signature, constants, capability, tmp_path, **options)


def type_of(name: str, dtype: str) -> str:
    if name == "sums_ptr":
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"


def compile_convolution(name: str, dtype: str, channels: int, capability: int, tmp_path) -> Machine:
    """A kernel of the convolution as the network's first one launches it."""
    function, taps = getattr(triton_conv, f"stem_conv_{name}_kernel"), 49 * channels
    if name == "fwd":
        tile = triton_conv.forward_tile(128, 128, 64, taps, exact=False)
        tile = tile | {"TILES_T": -(-taps // tile["BLOCK_T"])}
    else:
        tile, _ = triton_conv.weight_tile(128, 128, 64, taps, exact=False)
    constants = tile | {"SIDE": 7, "C": channels}
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages", "maxnreg") if n in constants}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    options["unaligned"] = tuple(n for n in triton_conv._ANY_SIZE if n in signature)
    return compile_kernel(function, signature, constants, capability, tmp_path, **options)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["fwd", "bwd_weight"])
def test_registers_of_the_convolution(name, capability, tmp_path, gate):
    """Two programs of 8 warps fit beside each other; gradients are read and outputs written by 16 bytes a thread."""
    cases = (("bf16", 3), ("fp16", 3), ("bf16", 6))
    machines = [compile_convolution(name, *case, capability, tmp_path) for case in cases]
    for machine in machines:
        # An Ampere's products take both operands from registers, of which two programs have too few, and so have those
        # of the gradient as Triton 3.6 cuts up its loop.
        may_spill = capability == 80 or (name == "bwd_weight" and triton_launch.is_triton_before(3, 8))
        assert not machine.spills or may_spill, (machine.stack, machine.local)
        assert machine.shared <= 80 * 1024, machine.shared
        if name == "fwd":
            assert machine.widths("STG").get(128, 0) >= 4, machine.accesses
        else:
            assert machine.widths("LDG").get(128, 0) + machine.widths("LDGSTS").get(128, 0) >= 3, machine.accesses
    registers = max(machine.registers for machine in machines)
    assert registers <= 128
    gate("registers", f"stem_conv_{name}_kernel, sm_{capability}", registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_and_accesses_of_the_sum(capability, tmp_path, gate):
    """Three maps are read and one is written, by 16 bytes a thread."""
    blocks = kernel.blocks_of_sums(64)
    machines = [compile_stage("sum", dtype, capability, tmp_path) for dtype in ("bf16", "fp32")]
    for bits, machine in zip((16, 32), machines, strict=True):
        per_map = blocks["BLOCK_N"] * blocks["BLOCK_C"] // (32 * blocks["num_warps"]) * bits // 128
        wide = machine.widths("LDG").get(128, 0) + machine.widths("LDGSTS").get(128, 0)
        assert not machine.spills and wide >= 3 * per_map, machine.accesses
        assert machine.widths("STG").get(128, 0) >= per_map, machine.accesses
    gate("registers", f"stem_conv_bwd_sum_kernel, sm_{capability}", max(machine.registers for machine in machines))


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_of_the_parameters(capability, tmp_path, gate):
    machines = [
        compile_stage("parameters", "bf16", capability, tmp_path, **given)
        for given in ({}, {"dweight_ptr": None, "taps": 0})
    ]
    for machine in machines:
        assert not machine.spills and machine.widths("LDG").get(128, 0) > 0, machine.accesses
    registers = max(machine.registers for machine in machines)
    gate("registers", f"stem_conv_bwd_parameters_kernel, sm_{capability}", registers)


@pytest.mark.parametrize(("name", "ones"), [("sum", {"C": 1, "BLOCK_C": 1}), ("parameters", {"K": 1})])
def test_sizes_of_one_compile(name, ones, tmp_path):
    """A launch makes integers that are 1 constants of the kernel."""
    assert not compile_stage(name, "bf16", 90, tmp_path, **ones).spills
