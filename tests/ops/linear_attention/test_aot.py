"""The kernels of linear_attention as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import CAPABILITIES, compile_kernel

from ddpm_fast.ops.linear_attention import triton as kernel
from ddpm_fast.ops.linear_attention.launch import choose_launch

pytestmark = pytest.mark.slow

HEADS, D = 4, 32  # upstream's
BITS = {"bf16": 16, "fp32": 32}
SHARED = 99 * 1024  # bytes that a program may have on every GPU since sm_80

# Linear attention in Unet(64, (1, 2, 4, 8)) at 128×128: channels and positions.
STAGES = {64: 128**2, 128: 64**2, 256: 32**2}
MAPS = ("qkv_ptr", "out_ptr", "residual_ptr", "grad_ptr", "dqkv_ptr", "projection_ptr")

# Kernel, dtype and channels that every architecture compiles; the rest is compiled for one.
EVERYWHERE = [
    ("context", "fp32", 64),
    ("context", "bf16", 64),
    ("context", "bf16", 128),
    ("rows_fwd", "fp32", 256),
    ("rows_bwd", "bf16", 64),
    ("rows_bwd", "fp32", 64),
    ("rows_bwd", "fp32", 256),
    ("sums_bwd", "bf16", 256),
    ("sums_bwd", "fp32", 256),
    ("small_bwd", "fp32", 256),
]
ON_SM_90 = [
    ("rows_fwd", "bf16", 64),
    ("rows_fwd", "bf16", 128),
    ("rows_fwd", "bf16", 256),
    ("rows_fwd", "fp32", 128),
    ("rows_bwd", "bf16", 256),
    ("kv_bwd", "bf16", 64),
    ("kv_bwd", "fp32", 64),
    ("merge", "bf16", 64),
]


def compile_stage(name: str, dtype: str, C: int, capability: int, tmp_path, chunks: int = 32):
    """Compile a kernel as `forward` and `backward` launch it on channels-last maps; also returns the launch."""
    function = getattr(kernel, f"linear_attention_{name}_kernel")
    launch = choose_launch(STAGES[C], HEADS, D, C, half=dtype == "bf16")
    tiles = {"context": launch.context, "rows_fwd": launch.forward, "rows_bwd": launch.backward}
    tile = (tiles | {"sums_bwd": launch.sums, "kv_bwd": launch.kv}).get(name)
    columns = {"rows_fwd": launch.forward_columns, "merge": launch.small_columns, "small_bwd": launch.small_columns}
    columns = columns.get(name, launch.backward_columns)
    constants = {"HEADS": HEADS, "D": D, "M": 4, "BLOCK_D": launch.block_d, "PRECISION": "tf32x3"}
    constants |= {"BLOCK_C": columns, "BLOCKS_C": launch.block_c // columns, "stride_c": 1, "stride_out_c": 1}
    constants |= {"BLOCK_R": 16 if name == "merge" else launch.small_rows, "BLOCKS_R": 1}
    constants |= launch.merge_constants(chunks)
    options = {"num_warps": launch.small_warps if name == "small_bwd" else 4, "num_stages": 1}
    if tile is not None:
        options = tile.constants
        constants |= {"BLOCK_N": options.pop("BLOCK_N"), "TILES": tile.tiles}
        constants |= {"GROUP": tile.group, "GROUPS": tile.groups(HEADS)}
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in ("tiles", "chunks") if n in signature)
    machine = compile_kernel(function, signature, constants, capability, tmp_path, **options, unaligned=unaligned)
    return machine, constants, options["num_warps"]


def type_of(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return f"*{dtype}" if name in MAPS else "*fp32"
    return "fp32" if name in ("root_c", "scale") else "i32"


def accesses(name: str, constants: dict, num_warps: int, bits: int) -> tuple[int, int]:
    """16-byte loads and stores that the maps in a tile take of each thread."""

    def of(columns: int) -> int:
        return max(1, constants["BLOCK_N"] * columns * bits // (32 * num_warps * 128))

    if name in ("context", "kv_bwd"):
        return 2 * of(D), 2 * of(D) if name == "kv_bwd" else 0
    if name in ("merge", "small_bwd"):
        return 0, 0
    heads, rows = of(constants["GROUP"] * D), of(constants["BLOCK_C"])
    return {"rows_fwd": (heads + rows, rows), "rows_bwd": (heads + rows, heads), "sums_bwd": (heads + rows, 0)}[name]


def assert_fit(name: str, dtype: str, C: int, capability: int, tmp_path, gate) -> None:
    machine, constants, num_warps = compile_stage(name, dtype, C, capability, tmp_path)
    assert not machine.spills, (name, C, machine.stack, machine.local)
    gate("registers", f"linear_attention_{name}_kernel, {dtype}, C = {C}, sm_{capability}", machine.registers)
    assert machine.shared <= SHARED, (name, C, machine.shared)
    loads, stores = accesses(name, constants, num_warps, BITS[dtype])
    copies = len(re.findall(r"\bLDGSTS(?:\.\w+)*\.128\b", machine.sass))  # loads ahead, straight into shared memory
    assert machine.widths("LDG").get(128, 0) + copies >= loads, (name, C, machine.accesses)
    assert machine.widths("STG").get(128, 0) >= stores, (name, C, machine.accesses)
    assert not set(machine.widths("LDG")) & {8, 16}, (name, C, machine.accesses)


# On sm_80 and sm_100 one kernel of either kind of product; `make release-tests` compiles the others.
@pytest.mark.release(
    but=lambda capability, name, dtype, C: (
        capability == 90 or (name, dtype, C) in (("context", "bf16", 64), ("rows_bwd", "fp32", 64))
    )
)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name, dtype, C", EVERYWHERE)
def test_registers_and_accesses(name, dtype, C, capability, tmp_path, gate):
    assert_fit(name, dtype, C, capability, tmp_path, gate)


@pytest.mark.parametrize("name, dtype, C", ON_SM_90)
def test_registers_and_accesses_on_sm_90(name, dtype, C, tmp_path, gate):
    assert_fit(name, dtype, C, 90, tmp_path, gate)


@pytest.mark.parametrize("chunks", [1, 3, 18])
def test_a_merge_of_any_number_of_chunks_compiles(chunks, tmp_path):
    assert not compile_stage("merge", "bf16", 64, 90, tmp_path, chunks)[0].spills


@pytest.mark.parametrize("name", ["context", "rows_fwd", "rows_bwd", "kv_bwd"])
def test_sizes_of_one_compile(name, tmp_path):
    """A launch makes integers that are 1 constants of the kernel: one position, one channel."""
    function = getattr(kernel, f"linear_attention_{name}_kernel")
    ones = ["N", "C", "tiles", "chunks", "stride_b", "stride_c", "stride_n", "stride_out_c", "stride_out_n"]
    constants = {n: 1 for n in [*ones, "HEADS", "D", "GROUP", "GROUPS", "BLOCKS_C", "TILES"]}
    constants |= {"BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_D": 16, "PRECISION": "ieee", "residual_ptr": None}
    constants |= {"numbers_ptr": None} if name == "rows_bwd" else {}
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n, "bf16") for n in function.arg_names if n not in constants}
    assert not compile_kernel(function, signature, constants, 90, tmp_path, num_warps=1).spills


@pytest.mark.release(but=lambda name, capability, **_: capability == 90 or name == "rows_fwd")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name, C", [("context", 64), ("rows_fwd", 64), ("rows_bwd", 64), ("sums_bwd", 256)])
def test_products_of_float32_are_added_outside_the_matrix_unit(name, C, capability, tmp_path):
    """The unit's accumulator truncates, so a loop would lose digits at every step.

    Each tile's product starts at zero and is added by an instruction that rounds; see docs/arithmetic.md.
    """
    machine, *_ = compile_stage(name, "fp32", C, capability, tmp_path)
    assert machine.accumulators() and set(machine.accumulators()) == {"zero"}, machine.accumulators()
    assert "add.f32" in machine.arithmetic() or "add.rn.f32" in machine.arithmetic()
    halves, *_ = compile_stage(name, "bf16", C, capability, tmp_path)
    assert "context" != name or set(halves.accumulators()) != {"zero"}, "the test sees accumulators that go on"
