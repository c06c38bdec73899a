"""The kernels of a convolution with its norm as the compiler sees them, at production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, Machine, compile_kernel

from ddpm_fast.ops.resnet_block import launch
from ddpm_fast.ops.resnet_block import triton_conv_norm as kernel

pytestmark = pytest.mark.slow
on_sm_90 = pytest.mark.release(but=lambda capability, **_: capability == 90)  # the others: `make release-tests`

STAGES = {64: 128**2, 128: 64**2}  # channels and pixels
OPTIONAL = ("scale_ptr", "shift_ptr", "residual_ptr", "seed_ptr", "y_ptr", "factors_ptr")
# What is given besides, by the part of the network: training's first norm, its last one, sampling's first, dropout.
SCALED = ("scale_ptr", "shift_ptr")
FORWARD = {
    "first": (*SCALED, "y_ptr", "factors_ptr"),
    "last": ("residual_ptr", "y_ptr", "factors_ptr"),
    "without gradients": SCALED,
    "dropout": (*SCALED, "y_ptr", "factors_ptr", "seed_ptr"),
}
BACKWARD = {
    "first": (*SCALED, "y_ptr", "factors_ptr"),
    "unscaled": ("y_ptr", "factors_ptr"),
    "dropout": (*SCALED, "y_ptr", "factors_ptr", "seed_ptr"),
}
REGISTERS, SHARED = 65536, {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of a multiprocessor


def type_of(name: str) -> str:
    if name in ("gain_ptr", "bias_ptr", "factors_ptr", "sums_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return "*i64" if name == "seed_ptr" else "*bf16"
    return {"root_k": "fp32", "kept_scale": "fp32", "threshold": "i64"}.get(name, "i32")


def compile_stage(name: str, K: int, given: tuple[str, ...], capability: int, tmp_path) -> tuple[Machine, dict]:
    function = getattr(kernel, name)
    tile = launch.conv_norm_tile(STAGES[K], 64, K)
    constants = {n: value for n, value in tile.items() if n.startswith("BLOCK")}
    constants |= {"QUADS": True, "PRECISION": "ieee"}
    constants |= {n: None for n in OPTIONAL if n not in given and n in function.arg_names}
    signature = {n: type_of(n) for n in function.arg_names if n not in constants}
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path,
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        unaligned=tuple(n for n in (*kernel._ANY_SIZE, "threshold") if n in signature),
        maxnreg=launch.BWD_REGISTERS if "bwd" in name else None,
    )  # fmt: skip
    return machine, tile


@on_sm_90
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("stage", ["fwd", "bwd"])
def test_registers_and_accesses(stage, capability, tmp_path, gate):
    cases = [(K, *more) for K in STAGES for more in (FORWARD if stage == "fwd" else BACKWARD).items()]
    compiled = [compile_stage(f"conv_norm_{stage}_kernel", K, given, capability, tmp_path) for K, _, given in cases]
    for (K, what, given), (machine, tile) in zip(cases, compiled, strict=True):
        # Backward with dropout needs a few registers more than two programs have on sm_100.
        most = 32 if (stage, what, capability) == ("bwd", "dropout", 100) else 0
        assert machine.stack + machine.local <= most, (K, what, machine.stack, machine.local)
        # Two programs of 8 warps on every architecture, and products by the fastest matrix unit.
        programs = REGISTERS // (32 * tile["num_warps"] * machine.registers)
        assert min(programs, SHARED[capability] // (machine.shared + 1024)) >= 2, (
            machine.registers,
            machine.shared,
        )
        if capability == 90:
            assert "HGMMA" in machine.sass
        # The map's tile and the weight's come as asynchronous copies of 16 bytes, before the loop and in it.
        edges = tile["BLOCK_N"] + tile["BLOCK_K"]
        copies = sum(".128" in line for line in machine.sass.splitlines() if "LDGSTS" in line)
        assert copies >= 2 * edges * tile["BLOCK_C"] // (8 * 32 * tile["num_warps"]), machine.accesses
        maps = 1 + (stage == "fwd" and "y_ptr" in given)
        per_map = tile["BLOCK_N"] * tile["BLOCK_K"] // (8 * 32 * tile["num_warps"])
        assert machine.widths("STG").get(128, 0) == maps * per_map, machine.accesses
    gate("registers", f"conv_norm_{stage}_kernel, sm_{capability}", max(machine.registers for machine, _ in compiled))


@pytest.mark.parametrize("stage", ["fwd", "bwd"])
def test_sizes_of_one_compile(stage, tmp_path):
    """A launch makes integers that are 1 constants of the kernel."""
    function = getattr(kernel, f"conv_norm_{stage}_kernel")
    tile = launch.conv_norm_tile(1, 1, 1)
    constants = {n: value for n, value in tile.items() if n.startswith("BLOCK")}
    constants |= {"QUADS": False, "PRECISION": "ieee", "C": 1, "K": 1, "stride_scale": 1, "stride_shift": 1}
    constants |= {n: None for n in ("seed_ptr", "residual_ptr") if n in function.arg_names}
    signature = {n: type_of(n) for n in function.arg_names if n not in constants}
    machine = compile_kernel(
        function, signature, constants, 90, tmp_path, num_warps=tile["num_warps"], num_stages=tile["num_stages"],
        unaligned=tuple(n for n in (*kernel._ANY_SIZE, "threshold") if n in signature),
    )  # fmt: skip
    assert not machine.spills
