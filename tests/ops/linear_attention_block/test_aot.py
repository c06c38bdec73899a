"""The kernels of linear_attention_block as the compiler sees them, as a network launches them, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import Machine, compile_kernel

from ddpm_fast.ops.linear_attention_block import triton as kernel
from ddpm_fast.ops.linear_attention_block.launch import choose_launch
from ddpm_fast.ops.linear_attention_block.triton_tile import ANY_SIZE
from ddpm_fast.runtime import triton_launch

pytestmark = pytest.mark.slow

HEADS, D = 4, 32  # upstream's
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have
REGISTERS = 65536  # of a multiprocessor

# The block in Unet(64, (1, 2, 4, 8)) at 128×128: channels and positions.
STAGES = {64: 128**2, 128: 64**2}
MAPS = ("x_ptr", "out_ptr", "grad_ptr", "grad2_ptr", "dx_ptr", "projection_ptr", "dsums_ptr")

# Kernel and channels, with the programs that a multiprocessor holds at least.
KERNELS = {
    ("context", 64): 2,
    ("context", 128): 2,
    ("rows_fwd", 64): 2,
    ("rows_fwd", 128): 1,
    ("queries_bwd", 64): 1,
    ("queries_bwd", 128): 1,
    ("keys_bwd", 64): 1,
    ("keys_bwd", 128): 1,
    ("merge", 64): 2,
    ("small_bwd", 64): 2,
    ("sums_bwd", 64): 8,
    ("finish_bwd", 64): 8,
}

# Bytes of the stack that registers spill to, the more of Triton 3.6 and 3.8; none where it is not listed.
SPILLED = {
    ("queries_bwd", 64, 80): 40,
    ("queries_bwd", 64, 90): 56,
    ("queries_bwd", 128, 80): 136,
    ("queries_bwd", 128, 90): 96,
    ("keys_bwd", 128, 80): 40,
    ("keys_bwd", 128, 90): 8,
    ("rows_fwd", 128, 80): 48,
    ("context", 128, 80): 16,
}


# The same of queries_bwd with the gradient of a second reader, by Triton 3.8 and by releases before.
SPILLED_OF_TWO = {(64, 80): (48, 32), (64, 90): (16, 48), (128, 80): (104, 144), (128, 90): (64, 96)}


def compile_stage(name: str, C: int, capability: int, tmp_path, readers: int = 1) -> tuple[Machine, int]:
    """Compile a kernel as a launch does; also returns its warps."""
    function = getattr(kernel, f"linear_attention_block_{name}_kernel")
    launch = choose_launch(STAGES[C], HEADS, D, C)
    tiles = {"context": launch.context, "rows_fwd": launch.rows}
    tile = (tiles | {"queries_bwd": launch.queries, "keys_bwd": launch.keys}).get(name)
    constants = {"HEADS": HEADS, "D": D, "M": 4, "PRECISION": "tf32x3", "BLOCK_R": 16, "BLOCK_K": 4}
    constants |= {"ADDS_X": True, "residual_ptr": None} | launch.sizes | ({"grad2_ptr": None} if readers == 1 else {})
    finishing = dict(zip(("sums_bwd", "finish_bwd"), kernel.parameters_blocks(C), strict=True))
    constants |= finishing.get(name, {})
    options = {"num_warps": 4, "num_stages": 1, "maxnreg": None}
    if tile is not None:
        constants |= tile.constants | {"GROUPS": tile.groups(HEADS)}
        options = {option: constants.get(option) for option in options}
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n) for n in function.arg_names if n not in constants}
    unaligned = tuple(n for n in (*ANY_SIZE, "B") if n in signature)
    machine = compile_kernel(function, signature, constants, capability, tmp_path, **options, unaligned=unaligned)
    return machine, options["num_warps"]


def type_of(name: str) -> str:
    if name.endswith("_ptr"):
        return "*bf16" if name in MAPS else "*fp32"
    return "fp32" if name in ("root_c", "scale") else "i32"


@pytest.mark.release(but=lambda name, C, capability: capability == 90 or (name, C) == ("rows_fwd", 128))
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name, C", KERNELS)
def test_registers_and_accesses(name, C, capability, tmp_path, gate):
    machine, num_warps = compile_stage(name, C, capability, tmp_path)
    assert machine.stack <= SPILLED.get((name, C, capability), 0), (name, C, machine.stack, machine.local)
    gate("registers", f"linear_attention_block_{name}_kernel, bf16, C = {C}, sm_{capability}", machine.registers)
    programs = min(REGISTERS // (32 * num_warps * machine.registers), SHARED[capability] // (machine.shared + 1024))
    assert programs >= KERNELS[name, C], (name, C, machine.registers, machine.shared)
    assert not set(machine.widths("LDG")) & {8, 16}, (name, C, machine.accesses)
    if name == "sums_bwd":
        assert machine.widths("LDG").get(128, 0) >= 4, machine.accesses
    elif name not in ("merge", "small_bwd", "finish_bwd"):  # rows of maps move in pieces of 16 bytes
        assert machine.widths("LDG").get(128, 0) + machine.widths("LDGSTS").get(128, 0) > 0, (name, machine.accesses)
        assert name == "context" or machine.widths("STG").get(128, 0) > 0, (name, C, machine.accesses)


@pytest.mark.release(but=lambda C, capability: capability == 90)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("C", STAGES)
def test_registers_of_queries_with_two_readers(C, capability, tmp_path, gate):
    machine, _ = compile_stage("queries_bwd", C, capability, tmp_path, readers=2)
    most = SPILLED_OF_TWO[C, capability][triton_launch.is_triton_before(3, 8)]
    assert machine.stack <= most, (machine.stack, machine.local)
    name = "linear_attention_block_queries_bwd_kernel of two readers"
    gate("registers", f"{name}, bf16, C = {C}, sm_{capability}", machine.registers)
    assert machine.shared == compile_stage("queries_bwd", C, capability, tmp_path)[0].shared


@pytest.mark.parametrize("name", ["context", "rows_fwd", "queries_bwd", "keys_bwd"])
def test_sizes_of_one_compile(name, tmp_path):
    """A launch makes a channel that is 1 a constant of the kernel; positions and chunks stay arguments."""
    function = getattr(kernel, f"linear_attention_block_{name}_kernel")
    ones = {n: 1 for n in ("C", "HEADS", "D", "GROUP", "GROUPS")}
    constants = ones | {"BLOCK_N": 16, "BLOCK_C": 16, "BLOCK_D": 16, "PRECISION": "tf32", "ADDS_X": False}
    constants |= {"residual_ptr": None}
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n) for n in function.arg_names if n not in constants}
    assert not compile_kernel(function, signature, constants, 90, tmp_path, num_warps=4).spills
