"""The kernels of norm_linear as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

import torch
import triton
from aot import CAPABILITIES, ON_SM_90, Machine, compile_kernel

from ddpm_fast.ops.norm_linear import triton as kernel

pytestmark = pytest.mark.slow

MAPS = ("x_ptr", "out_ptr", "grad_ptr", "dx_ptr", "residual_ptr", "added_ptr")
BITS = {"bf16": 16, "fp32": 32}

# The stages of Unet(64, (1, 2, 4, 8)) at 128×128: channels and pixels; q, k, v of 4 heads of 32 channels come out.
STAGES = {64: 128**2, 128: 64**2, 256: 32**2, 512: 16**2}
OUTPUTS = 384
# Kernel: its tile, tiles read per iteration by (edge, edge), tile written, dtype written.
KERNELS = {
    "norm_linear_fwd_kernel": (kernel.forward_tile, [("n", "c")], ("n", "o"), None),
    "norm_linear_bwd_x_kernel": (kernel.backward_x_tile, [("n", "o")], ("n", "c"), None),
    "norm_linear_bwd_weight_kernel": (kernel.backward_weight_tile, [("n", "o"), ("n", "c")], ("o", "c"), "fp32"),
}
PRODUCTS = [("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee")]


NOT_GIVEN = {
    "norm": ("bias_ptr", "residual_ptr", "added_ptr"),
    "residual": ("gain_ptr", "factors_ptr"),
    "beside": ("bias_ptr", "residual_ptr"),
}


def compile_stage(name: str, dtype: str, precision: str, C: int, capability: int, tmp_path, op: str = "norm"):
    """A kernel as `forward`, `forward_residual` and `backward` launch it on channels-last maps, float32 parameters."""
    function, N = getattr(kernel, name), STAGES.get(C, 16**2)
    exact = kernel.exact_products({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], precision)
    tile = KERNELS[name][0](N, C, OUTPUTS, exact)
    constants = {"stride_c": 1, "out_c": 1, "PRECISION": precision, "TILES_C": triton.cdiv(C, tile.block_c)}
    constants |= {"TILES_O": triton.cdiv(OUTPUTS, tile.block_o)}
    constants |= {name: value for name, value in tile.constants.items() if name.isupper()}
    constants |= {n: None for n in NOT_GIVEN[op]} if name != "norm_linear_bwd_weight_kernel" else {}
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in signature if n.startswith("tiles") or n == "chunks")
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path,
        num_warps=tile.num_warps, num_stages=tile.num_stages, unaligned=unaligned,
    )  # fmt: skip
    return machine, tile


def type_of(name: str, dtype: str) -> str:
    if name in MAPS:
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name == "root_c" else "i32"


def assert_fit(machine: Machine, tile: kernel.Tile, name: str, dtype: str) -> None:
    _, reads, written, written_dtype = KERNELS[name]
    edges = {"n": tile.block_n, "o": tile.block_o, "c": tile.block_c}
    assert not machine.spills, name
    # Two programs fit beside each other on every architecture, whose multiprocessors have 164 KiB or more.
    assert machine.shared <= 80 * 1024, (name, machine.shared)

    def accesses(a: str, b: str, bits: int) -> int:
        """16-byte accesses per thread of a tile."""
        return max(1, edges[a] * edges[b] * bits // 128 // (32 * tile.num_warps))

    # A pipeline's loads are asynchronous copies into shared memory (LDGSTS), others fill registers (LDG).
    copies = sum(".128" in line for line in machine.sass.splitlines() if "LDGSTS" in line)
    wide = copies + machine.widths("LDG").get(128, 0)
    assert wide >= sum(accesses(*edge, BITS[dtype]) for edge in reads), (name, copies, machine.accesses)
    stored = accesses(*written, BITS[written_dtype or dtype])
    assert machine.widths("STG").get(128, 0) >= stored, (name, machine.accesses)
    # What is stored besides are the pixels' factors.
    assert sum(n for width, n in machine.widths("STG").items() if width < 128) <= 1, (name, machine.accesses)


def check_products(name: str, channels, capability: int, tmp_path, gate, what: str, op: str = "norm") -> None:
    cases = [(*product, C) for C in channels for product in PRODUCTS]
    compiled = [compile_stage(name, *case, capability, tmp_path, op) for case in cases]
    for (dtype, *_), (machine, tile) in zip(cases, compiled, strict=True):
        assert_fit(machine, tile, name, dtype)
    gate("registers", f"{what}, sm_{capability}", max(machine.registers for machine, _ in compiled))


# sm_80 multiplies by other instructions than sm_90, and sm_100 reads its tiles elsewhere: forward on all of them.
@pytest.mark.release(but=lambda name, capability: capability == 90 or name == "norm_linear_fwd_kernel")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_registers_and_accesses(name, capability, tmp_path, gate):
    # Only the kernel of dx has tiles that grow with the channels.
    channels = (64, 512) if name == "norm_linear_bwd_x_kernel" else (64,)
    check_products(name, channels, capability, tmp_path, gate, name)


def test_registers_and_accesses_with_a_residual(tmp_path, gate):
    name = "norm_linear_fwd_kernel"
    check_products(name, (128,), 90, tmp_path, gate, f"{name} with bias and residual", op="residual")


def test_registers_and_accesses_with_a_gradient_to_add(tmp_path, gate):
    name = "norm_linear_bwd_x_kernel"
    check_products(name, (256, 512), 90, tmp_path, gate, f"{name} with a gradient to add", op="beside")


@pytest.mark.parametrize("capability", ON_SM_90)
def test_gradients_of_parameters(capability, tmp_path, gate):
    """Every thread has its 16-byte loads of a block of sums on their way at once."""
    function, blocks = kernel.norm_linear_bwd_parameters_kernel, kernel.parameters_blocks(64)
    constants = {name: value for name, value in blocks.items() if name.isupper()}
    signature = {n: type_of(n, "fp32") for n in function.arg_names if n not in constants}
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path,
        num_warps=blocks["num_warps"], unaligned=("K", "chunks"),
    )  # fmt: skip
    assert not machine.spills
    per_block = blocks["BLOCK_K"] * blocks["BLOCK_O"] * blocks["BLOCK_C"] // (4 * 32 * blocks["num_warps"])
    assert machine.widths("LDG").get(128, 0) >= per_block, machine.accesses
    gate("registers", f"norm_linear_bwd_parameters_kernel, sm_{capability}", machine.registers)


@pytest.mark.parametrize("name", KERNELS)
def test_the_widest_rows_fit(name, tmp_path):
    machine, _ = compile_stage(name, "fp32", "tf32", 1024, 90, tmp_path)
    assert not machine.spills and machine.shared <= 99 * 1024  # what a program may have on every GPU since sm_80


@pytest.mark.parametrize("name", [*KERNELS, "norm_linear_bwd_parameters_kernel"])
def test_sizes_of_one_compile(name, tmp_path):
    """A launch makes integers that are 1 constants of the kernel."""
    function = getattr(kernel, name)
    ones = ["N", "C", "K", "chunks", "TILES_C", "TILES_O"]
    ones += [n for n in function.arg_names if n.startswith(("tiles", "stride_", "out_")) and not n.endswith("_ptr")]
    constants = {n: 1 for n in ones} | {
        "PRECISION": "ieee",
        "BLOCK_N": 16,
        "BLOCK_O": 16,
        "BLOCK_C": 16,
        "BLOCK_K": 1,
    }
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n, "bf16") for n in function.arg_names if n not in constants}
    assert not compile_kernel(function, signature, constants, 90, tmp_path, num_warps=1).spills
