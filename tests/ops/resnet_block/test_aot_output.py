"""The kernels of a block's output as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, Machine, compile_kernel

from ddpm_fast.ops.norm_silu import launch, triton_rms_conv
from ddpm_fast.ops.resnet_block import triton_output
from ddpm_fast.runtime.triton_launch import is_triton_before

pytestmark = pytest.mark.slow
on_sm_90 = pytest.mark.release(but=lambda capability, **_: capability == 90)  # the others: `make release-tests`

PRODUCTS = [("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee")]
REGISTERS = 65536  # of a multiprocessor
# Tensors that are float32 whatever the maps are.
FLOAT32 = {"factors_ptr", "sums_ptr", "products_ptr", "gain_ptr", "bias_ptr", "whole_ptr", "whole_bias_ptr"}
FLOAT32 |= {"dwhole_ptr", "dwhole_bias_ptr"}


def type_of(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return "*fp32" if name in FLOAT32 else f"*{dtype}"
    return "fp32" if name == "root_c" else "i32"


def compile_norm(stage: str, dtype: str, precision: str, C: int, capability: int, tmp_path) -> tuple[Machine, int]:
    """A kernel as a launch compiles it for a map of 128 × 128 and three outputs; also its warps."""
    function = getattr(triton_rms_conv, f"rms_norm_silu_conv_{stage}_kernel")
    tile = launch.conv_tile(128**2, C, sums=stage == "bwd", half=dtype == "bf16")
    constants = {n: value for n, value in tile.items() if n.startswith("BLOCK")} | {"PRECISION": precision}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    options = {"num_warps": tile["num_warps"], "maxnreg": tile.get("maxnreg"), "unaligned": ("J", "chunks", "tiles")}
    unaligned = tuple(n for n in options.pop("unaligned") if n in signature)
    machine = compile_kernel(function, signature, constants, capability, tmp_path, **options, unaligned=unaligned)
    return machine, tile["num_warps"]


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("stage", ["fwd", "bwd"])
@pytest.mark.parametrize("C", [64, 128])
def test_norm_and_convolution(C, stage, capability, tmp_path, gate):
    compiled = [compile_norm(stage, *product, C, capability, tmp_path) for product in PRODUCTS]
    for (dtype, precision), (machine, num_warps) in zip(PRODUCTS, compiled, strict=True):
        exact = (dtype, precision) == ("fp32", "ieee")
        assert machine.stack <= (32 if is_triton_before(3, 8) else 16 if exact else 0), (
            dtype,
            precision,
            machine.stack,
        )
        # Two programs and 16 warps beside each other, of products without tensor cores one program.
        programs = REGISTERS // (32 * num_warps * machine.registers)
        assert programs * num_warps >= (8 if exact else 16), (dtype, precision, machine.registers)
        assert programs >= 1 and machine.shared <= 32 * 1024, machine.shared
        wide = machine.widths("LDG").get(128, 0) + machine.widths("LDGSTS").get(128, 0)
        assert wide >= 1, machine.accesses
        assert stage == "fwd" or machine.widths("STG").get(128, 0) >= 1, machine.accesses
    registers = max(machine.registers for machine, _ in compiled)
    gate("registers", f"rms_norm_silu_conv_{stage}_kernel, C = {C}, sm_{capability}", registers)


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("stage", ["fwd", "bwd"])
def test_weights_of_both_convolutions(stage, capability, tmp_path, gate):
    function = getattr(triton_output, f"output_weights_{stage}_kernel")
    blocks = triton_output.blocks(stage == "bwd")
    constants = {n: value for n, value in blocks.items() if n.startswith("BLOCK")}
    signature = {n: type_of(n, "bf16") for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in ("J", "chunks") if n in signature)
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path, num_warps=blocks["num_warps"], unaligned=unaligned
    )
    assert not machine.spills
    gate("registers", f"output_weights_{stage}_kernel, sm_{capability}", machine.registers)
