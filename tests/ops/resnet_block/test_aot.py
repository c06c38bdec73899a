"""The residual block's kernels as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, ON_SM_90, Machine, compile_kernel

from ddpm_fast.ops.resnet_block import triton as kernel

pytestmark = pytest.mark.slow

# Kernel: the letters of its tile's edges, the edges of the maps' tiles that an iteration reads, and of the stored one.
KERNELS = {
    "residual_conv_fwd_kernel": ("NKC", ["NC"], "NK"),
    "residual_conv_bwd_maps_kernel": ("NCK", ["NK"], "NC"),
    "residual_conv_bwd_weight_kernel": ("KCN", ["NK", "NC"], "KC"),
}
PRODUCTS = [("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee")]
# The bounds of launches of the kernels of gradients.
REGISTERS = {
    "residual_conv_bwd_maps_kernel": kernel.MAPS_REGISTERS,
    "residual_conv_bwd_weight_kernel": kernel.WEIGHT_REGISTERS,
}
BITS = {"bf16": 16, "fp32": 32}


def compile_stage(name: str, dtype: str, precision: str, capability: int, tmp_path, **sizes) -> tuple[Machine, dict]:
    """A kernel as a launch compiles it for a block of 64 channels and more."""
    function = getattr(kernel, name)
    exact = (dtype, precision) == ("fp32", "ieee")
    tile = kernel.choose_tile(128**2, 64, 64, exact, names=KERNELS[name][0])
    constants = {n: value for n, value in tile.items() if n.startswith("BLOCK")} | {"PRECISION": precision} | sizes
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in kernel._ANY_SIZE if n in signature)
    bound = REGISTERS.get(name, kernel.forward_registers(dtype == "fp32", precision))
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path,
        num_warps=tile["num_warps"], num_stages=tile["num_stages"], unaligned=unaligned,
        maxnreg=bound,
    )  # fmt: skip
    return machine, tile


def type_of(name: str, dtype: str) -> str:
    if name.endswith("sums_ptr"):
        return "*fp32"
    return f"*{dtype}" if name.endswith("_ptr") else "i32"


# On sm_80 and sm_100 one of the three products; `make release-tests` compiles the others.
@pytest.mark.release(but=lambda name, capability: capability == 90 or name == "residual_conv_fwd_kernel")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_registers_and_accesses(name, capability, tmp_path, gate):
    _, reads, written = KERNELS[name]
    compiled = [compile_stage(name, *product, capability, tmp_path) for product in PRODUCTS]
    for (dtype, precision), (machine, tile) in zip(PRODUCTS, compiled, strict=True):
        assert not machine.spills, (dtype, precision, machine.stack, machine.local)
        # Two programs fit beside each other on every architecture, whose multiprocessors have 164 KiB or more.
        assert machine.shared <= 80 * 1024, machine.shared

        def accesses(edges: str, bits: int, tile=tile) -> int:
            """16-byte accesses per thread of a tile."""
            elements = tile[f"BLOCK_{edges[0]}"] * tile[f"BLOCK_{edges[1]}"]
            return max(1, elements * bits // 128 // (32 * tile["num_warps"]))

        # A pipeline's loads are asynchronous copies into shared memory (LDGSTS), others fill registers (LDG).
        copies = sum(".128" in line for line in machine.sass.splitlines() if "LDGSTS" in line)
        wide = copies + machine.widths("LDG").get(128, 0)
        # Float32 factors that a product reads transposed are copied four bytes at a time.
        if dtype == "bf16" or name != "residual_conv_bwd_weight_kernel":
            assert wide >= sum(accesses(edges, BITS[dtype]) for edges in reads), (copies, machine.accesses)
        bits = 32 if name == "residual_conv_bwd_weight_kernel" else BITS[dtype]
        assert machine.widths("STG").get(128, 0) >= accesses(written, bits), machine.accesses
    gate("registers", f"{name}, sm_{capability}", max(machine.registers for machine, _ in compiled))


@pytest.mark.parametrize("capability", ON_SM_90)
def test_gradients_of_parameters(capability, tmp_path, gate):
    function, blocks = kernel.residual_conv_bwd_parameters_kernel, kernel.parameters_blocks()
    constants = {n: value for n, value in blocks.items() if n.startswith("BLOCK")}
    signature = {n: type_of(n, "bf16") for n in function.arg_names if n not in constants}
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path, num_warps=blocks["num_warps"],
        unaligned=("chunks", "tiles_n"),
    )  # fmt: skip
    assert not machine.spills
    assert machine.widths("LDG").get(128, 0) >= blocks["BLOCK_R"] * blocks["BLOCK"] // (4 * 32 * blocks["num_warps"])
    gate("registers", f"residual_conv_bwd_parameters_kernel, sm_{capability}", machine.registers)


@pytest.mark.parametrize("name", KERNELS)
def test_sizes_of_one_compile(name, tmp_path):
    """A launch makes integers that are 1 constants of the kernel."""
    ones = dict.fromkeys(("N", "C", "K", "C0", "C1", "stride_x", "stride_skip"), 1)
    machine, _ = compile_stage(name, "bf16", "ieee", 90, tmp_path, **ones)
    assert machine.stack <= 24  # maps of one channel, which nothing but this test makes
