"""The kernels of stem_conv as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from ddpm_fast.ops.stem_conv import triton as kernel
from ddpm_fast.testing.aot import CAPABILITIES, compile_kernel

pytestmark = pytest.mark.slow
on_sm_90 = pytest.mark.release(but=lambda capability, **_: capability == 90)  # the others: `make release-tests`


def compile_stage(name: str, dtype: str, capability: int, tmp_path, **ones: int):
    """A kernel as the network's first convolution launches it."""
    function = getattr(kernel, f"stem_conv_bwd_{name}_kernel")
    blocks = kernel.blocks_of_sums(64) if name == "sum" else kernel.BIAS_BLOCKS
    constants = {n: value for n, value in (blocks | ones).items() if n in function.arg_names}
    types = {"sums_ptr": "*fp32", "N": "i32", "C": "i32", "chunks": "i32"}
    signature = {n: types.get(n, f"*{dtype}") for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in ("N", "chunks") if n in signature)
    options = {"num_warps": blocks["num_warps"], "unaligned": unaligned}
    return compile_kernel(function, signature, constants, capability, tmp_path, **options)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_and_accesses_of_the_sum(capability, tmp_path, gate):
    """Three maps are read and one is written, by 16 bytes a thread."""
    registers, blocks = [], kernel.blocks_of_sums(64)
    for dtype, bits in (("bf16", 16), ("fp32", 32)):
        machine = compile_stage("sum", dtype, capability, tmp_path)
        per_map = blocks["BLOCK_N"] * blocks["BLOCK_C"] // (32 * blocks["num_warps"]) * bits // 128
        wide = machine.widths("LDG").get(128, 0) + machine.widths("LDGSTS").get(128, 0)
        assert not machine.spills and wide >= 3 * per_map, machine.accesses
        assert machine.widths("STG").get(128, 0) >= per_map, machine.accesses
        registers.append(machine.registers)
    gate("registers", f"stem_conv_bwd_sum_kernel, sm_{capability}", max(registers))


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_registers_of_the_bias(capability, tmp_path, gate):
    machine = compile_stage("bias", "bf16", capability, tmp_path)
    assert not machine.spills and machine.widths("LDG").get(128, 0) > 0, machine.accesses
    gate("registers", f"stem_conv_bwd_bias_kernel, sm_{capability}", machine.registers)


@pytest.mark.parametrize("name", ["sum", "bias"])
def test_sizes_of_one_compile(name, tmp_path):
    """A launch makes integers that are 1 constants of the kernel."""
    ones = {"C": 1, "BLOCK_C": 1}
    assert not compile_stage(name, "bf16", 90, tmp_path, **ones).spills
