"""The kernels of attention as the compiler sees them, at their production configurations, without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not there", allow_module_level=True)

from aot import Machine, compile_kernel

from ddpm_fast.ops.attention import triton as kernel
from ddpm_fast.runtime import triton_launch

pytestmark = pytest.mark.slow

FLOATS = ("lse_ptr", "delta_ptr", "memory_ptr", "dmemory_ptr")
BITS = {"bf16": 16, "fp32": 32}

# The attention of Unet(64, (1, 2, 4, 8)) at 128×128: 16×16 positions, 4 memory keys.
N, M = 16 * 16, 4
# Tiles of queries and of keys read from maps, tiles of queries and of keys written.
TILES = {"fwd": (1, 2, 1, 0), "dq": (3, 2, 1, 0), "dkv": (2, 2, 0, 2)}
# Bounds of registers are in benchmarks/bounds.json. A multiprocessor has 65,536: two programs of four warps fit with
# 255 registers, three with 168, four with 128; one of eight warps with 255, two with 128.
# FMA units do not differ between the three, tensor cores do: each architecture gets one case of either.
CASES = [("bf16", 32, 80), ("fp32", 64, 80), ("bf16", 32, 100), ("fp32", 64, 100)]
CASES += [(dtype, D, 90) for dtype in BITS for D in (32, 64)]


def compile_case(name: str, dtype: str, D: int, capability: int, tmp_path, **sizes) -> tuple[Machine, kernel.Tile]:
    """A kernel as `forward` and `backward` launch it on channels-last maps."""
    function = getattr(kernel, f"attention_{name}_kernel")
    sizes = {"N": N, "M": M, "D": D} | sizes
    tile = kernel.choose_tile(name, "ieee" if dtype == "fp32" else "half", sizes["N"], D)
    constants = {"stride_d": 1, "PRECISION": "ieee", "BLOCK_D": max(16, triton_launch.next_power_of_2(D))} | sizes
    constants |= {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys, "BLOCK_M": kernel.block_of_memory(sizes["M"])}
    constants = {n: value for n, value in constants.items() if n in function.arg_names}
    signature = {n: type_of(n, dtype) for n in function.arg_names if n not in constants}
    unaligned = ("H",) if D % 16 == 0 else ("H", "stride_n", "out_stride_n")
    machine = compile_kernel(
        function, signature, constants, capability, tmp_path,
        num_warps=tile.num_warps, num_stages=tile.num_stages, unaligned=tuple(n for n in unaligned if n in signature),
        **triton_launch.register_bound(tile.registers),
    )  # fmt: skip
    return machine, tile


def type_of(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return "*fp32" if name in FLOATS else f"*{dtype}"
    return "fp32" if name == "scale" else "i32"


# Elsewhere than on sm_90 forward alone, which has both products; `make release-tests` compiles the others.
@pytest.mark.release(
    but=lambda name, dtype, D, capability: (
        (dtype, D) in (("bf16", 32), ("fp32", 64)) and (capability == 90 or (name, dtype) == ("fwd", "bf16"))
    )
)
@pytest.mark.parametrize("dtype, D, capability", CASES)
@pytest.mark.parametrize("name", TILES)
def test_registers_and_accesses(name, dtype, D, capability, tmp_path, gate):
    machine, tile = compile_case(name, dtype, D, capability, tmp_path)
    assert not machine.spills, machine.accesses
    gate("registers", f"attention_{name}_kernel, {dtype}, D = {D}, sm_{capability}", machine.registers)
    read_q, read_k, written_q, written_k = TILES[name]
    per_row = D * BITS[dtype] / 128 / (32 * tile.num_warps)  # 16-byte accesses of a thread
    loads = machine.widths("LDG").get(128, 0) + machine.widths("LDGSTS").get(128, 0)
    assert loads >= (read_q * tile.queries + read_k * tile.keys) * per_row, machine.accesses
    # Narrow loads are of lse and delta, float32; narrow stores as well.
    assert not {8, 16} & (set(machine.widths("LDG")) | set(machine.widths("LDGSTS"))), machine.accesses
    assert machine.widths("STG").get(128, 0) >= (written_q * tile.queries + written_k * tile.keys) * per_row
    assert sum(n for width, n in machine.widths("STG").items() if width < 128) <= 2, machine.accesses
    # The oldest of these cards leaves a program 163 KiB of shared memory, consumers' cards 99 KiB.
    assert machine.shared <= 99 * 1024
    if (dtype, capability) == ("bf16", 90):
        assert "HGMMA" in machine.sass, "products run on tensor cores"


@pytest.mark.parametrize("name", TILES)
def test_sizes_of_one_compile(name, tmp_path):
    """A launch makes integers that are 1 constants of the kernel; no memory is an empty loop."""
    ones = {"H": 1, "stride_n": 1, "out_stride_n": 1, "N": 1, "M": 0}
    assert not compile_case(name, "bf16", 1, 90, tmp_path, **ones)[0].spills
