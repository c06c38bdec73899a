"""The kernels of the 2×2 convolution of stride 2 as the compiler sees them, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, Machine, compile_kernel

from ddpm_fast.ops.common import triton_rows
from ddpm_fast.ops.resample import triton_downsample

pytestmark = pytest.mark.slow

# Kernel: the letters of its tile's edges, and its constants.
KERNELS = {
    "downsample_conv_fwd_kernel": (triton_downsample.downsample_conv_fwd_kernel, "NKC", {}),
    "product_bwd_x_kernel": (triton_rows.product_bwd_x_kernel, "NCK", {"WINDOW": 2, "grad3_ptr": None}),
}
PRODUCTS = [("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee")]


def compile_stage(name: str, dtype: str, precision: str, capability: int, tmp_path, **given) -> Machine:
    """A kernel as a launch compiles it for 64 channels and more."""
    function, names, constants = KERNELS[name]
    tile = triton_rows.choose_tile(64**2, 64, 64, (dtype, precision) == ("fp32", "ieee"), names=names)
    constants = {n: v for n, v in tile.items() if n.startswith("BLOCK")} | constants | given | {"PRECISION": precision}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    return compile_kernel(
        function, signature, constants, capability, tmp_path, num_warps=tile["num_warps"],
        num_stages=tile["num_stages"], unaligned=tuple(n for n in triton_rows.ANY_SIZE if n in signature),
    )  # fmt: skip


def type_of(name: str, dtype: str) -> str:
    return "*fp32" if name == "sums_ptr" else f"*{dtype}" if name.endswith("_ptr") else "i32"


# On sm_80 and sm_100 one of the two; `make release-tests` compiles the others.
@pytest.mark.release(but=lambda name, capability: capability == 90 or name == "product_bwd_x_kernel")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_registers_and_accesses(name, capability, tmp_path, gate):
    machines = [compile_stage(name, *product, capability, tmp_path) for product in PRODUCTS]
    for product, machine in zip(PRODUCTS, machines, strict=True):
        assert not machine.spills, (product, machine.stack, machine.local)
        # Two programs fit beside each other on every architecture, whose multiprocessors have 164 KiB or more.
        assert machine.shared <= 80 * 1024, machine.shared
        copies = sum(".128" in line for line in machine.sass.splitlines() if "LDGSTS" in line)
        assert copies + machine.widths("LDG").get(128, 0) >= 4, (copies, machine.accesses)
        assert machine.widths("STG").get(128, 0) >= 4, machine.accesses
    gate("registers", f"{name}, sm_{capability}", max(machine.registers for machine in machines))


@pytest.mark.parametrize("dtype, precision", PRODUCTS)
def test_the_gradient_of_one_reader_and_of_a_1x1_convolution(dtype, precision, tmp_path):
    one = {"grad2_ptr": None, "grad3_ptr": None, "total_ptr": None}
    for given in (one, {"WINDOW": 1}):
        machine = compile_stage("product_bwd_x_kernel", dtype, precision, 90, tmp_path, **given)
        assert not machine.spills and machine.registers <= 128


def test_the_bias_gradient(tmp_path):
    function, blocks = triton_rows.row_sums_kernel, triton_rows.row_sums_blocks()
    signature = {"sums_ptr": "*fp32", "out_ptr": "*bf16", "rows": "i32", "columns": "i32"}
    machine = compile_kernel(function, signature, blocks, 90, tmp_path, num_warps=4, unaligned=("rows",))
    assert not machine.spills and machine.widths("LDG").get(128, 0) >= 4


@pytest.mark.parametrize("name", KERNELS)
def test_sizes_of_one_compile(name, tmp_path):
    """A launch makes integers that are 1 constants of the kernel."""
    machine = compile_stage(name, "bf16", "ieee", 90, tmp_path, N=1, K=1)
    assert machine.stack <= 24  # maps of one channel, which nothing but this test makes
