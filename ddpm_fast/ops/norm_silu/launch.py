"""Launches of norm_silu's kernels: tiles, groups of a program, blocks, bounds of registers; no Triton here.

Tiles, and so results, depend on sizes alone, never on the batch or the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ddpm_fast.runtime import triton_launch

# Tiles that a program of sums walks over: a constant, since another number is another kernel to compile. A program has
# 8192 numbers of a map, and its partial sums are at most a quarter of the bytes of that at 512 channels.
_TILES = 8


@dataclass(frozen=True)
class Tile:
    """How a launch is cut up.

    Args:
        block_n, block_c: pixels and channels of a tile.
        tiles: tiles that one program walks over.
        num_warps: warps per program.
    """

    block_n: int
    block_c: int
    tiles: int
    num_warps: int

    @property
    def chunk(self) -> int:
        """Pixels of one program."""
        return self.block_n * self.tiles


@cache
def choose_tile(HW: int, C: int, *, whole_rows: bool, sums: bool, dropout: bool, interpreted: bool = False) -> Tile:
    """The launch for a map of HW pixels and C channels. It depends on these arguments alone, and so do results.

    Args:
        whole_rows: a program must see all channels of its pixels, as RMSNorm does.
        sums: the kernel adds up over pixels: fewer elements per thread, since the sums take registers too, and programs
            that walk over several tiles, so that there are few partial sums.
        dropout: whole Philox blocks of four pixels are wanted.
        interpreted: large tiles, since the interpreter's time is per operation.
    """
    per_thread = 8 if sums else 16
    elements = 8192 if interpreted else 128 * per_thread
    block_c = triton_launch.next_power_of_2(C) if whole_rows else min(64, triton_launch.next_power_of_2(C))
    block_n = max(4 if dropout and block_c <= 1024 else 1, min(elements // block_c, triton_launch.next_power_of_2(HW)))
    tiles = 1
    if sums:
        tiles = min(16, triton_launch.next_power_of_2(-(-HW // (2 * block_n)))) if interpreted else _TILES
    num_warps = min(32, max(1, block_n * block_c // (32 * per_thread)))
    return Tile(block_n, block_c, tiles, num_warps)


_LARGEST_WHOLE = 8192  # numbers of a map that the registers of a program hold, twice in backward


@dataclass(frozen=True)
class Groups:
    """The launch of a kernel whose program has all pixels of some groups: `block_n` pixels, `block_c` channels."""

    groups: int
    block_n: int
    block_c: int
    num_warps: int


@cache
def choose_groups(HW: int, C: int, G: int) -> Groups | None:
    """The launch for a map of HW pixels and C channels in G groups; None where a group is too large for a program.

    Several groups of few numbers are one program: eight channels are the 32 bytes that memory hands out at once.
    """
    D = C // G
    block_n, block_d, groups = triton_launch.next_power_of_2(HW), triton_launch.next_power_of_2(D), 1
    if block_n * block_d > _LARGEST_WHOLE:
        return None
    while block_d == D and G % (2 * groups) == 0 and block_n * D * groups < (4096 if D * groups < 8 else 512):
        groups *= 2
    elements = block_n * block_d * groups
    return Groups(groups, block_n, block_d * groups, num_warps=min(16, max(1, elements // 512)))


def most_registers(dropout: bool, writes_dx: bool = True, added: bool = False, branches: bool = False) -> int:
    """The bound of a backward kernel of maps, with which none spills; with 96 a multiprocessor runs five programs."""
    if branches and writes_dx and not dropout:
        return 104
    return 120 if writes_dx and (dropout or (added and triton_launch.is_triton_before(3, 6))) else 96


def sums_shape(x: torch.Tensor, bias: torch.Tensor | None, groups: int, *, dropout: bool = False) -> tuple[int, ...]:
    """(B, chunks, 2 or, with bias, 3, C): the partial sums over pixels that backward makes of a map."""
    B, C, H, W = x.shape
    HW = int(H * W)  # a symbolic size is fixed
    if groups > 0 and choose_groups(HW, int(C), groups) is not None:
        return B, 1, 2 if bias is None else 3, C
    tile = choose_tile(
        HW,
        int(C),
        whole_rows=groups == 0,
        sums=True,
        dropout=dropout and HW % 4 == 0,
        interpreted=triton_launch.interpreted(),
    )
    return B, triton_launch.ceil_div(HW, tile.chunk), 2 if bias is None else 3, C


@dataclass(frozen=True)
class Plan:
    """What a launch takes besides tensors: its tile, the strides of sample, channel and pixel, and constants."""

    tile: Tile
    strides: tuple[int, int, int]
    constants: dict[str, int]


def plan_of(x: torch.Tensor, seed: torch.Tensor | None, activation: bool, *, whole_rows: bool, sums: bool) -> Plan:
    """For a map; whole_rows and sums as in `choose_tile`."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return _plan(*sizes_of(x)[1:], channels_last, seed is not None, activation, whole_rows, sums)


@cache
def _plan(C: int, HW: int, channels_last: bool, dropout: bool, activation: bool, whole_rows: bool, sums: bool) -> Plan:
    tile = choose_tile(
        HW,
        C,
        whole_rows=whole_rows,
        sums=sums,
        dropout=dropout and HW % 4 == 0,
        interpreted=triton_launch.interpreted(),
    )
    constants = {
        "ACTIVATION": activation,
        "QUADS": HW % 4 == 0 and tile.block_n % 4 == 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_C": tile.block_c,
        "num_warps": tile.num_warps,
    }
    if sums:
        constants |= {"TILES": tile.tiles, **triton_launch.register_bound(most_registers(dropout))}
    return Plan(tile, (C * HW, 1, C) if channels_last else (C * HW, HW, 1), constants)


@dataclass(frozen=True)
class WholePlan:
    """The same for a kernel whose program has all pixels of some groups, and its programs per sample."""

    programs_per_sample: int
    strides: tuple[int, int, int]
    constants: dict[str, int]

    def programs(self, B: int) -> int:
        return B * self.programs_per_sample


def whole_plan_of(x: torch.Tensor, groups: int, activation: bool) -> WholePlan | None:
    """For a map in groups; None where `choose_groups` has none."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return _whole_plan(*sizes_of(x)[1:], groups, channels_last, activation)


@cache
def _whole_plan(C: int, HW: int, groups: int, channels_last: bool, activation: bool) -> WholePlan | None:
    chosen = choose_groups(HW, C, groups)
    if chosen is None:
        return None
    constants = {
        "ACTIVATION": activation,
        "QUADS": HW % 4 == 0 and chosen.block_n % 4 == 0,
        "D": C // groups,
        "BLOCK_N": chosen.block_n,
        "BLOCK_C": chosen.block_c,
        "BLOCK_G": chosen.groups,
        "num_warps": chosen.num_warps,
    }
    strides = (C * HW, 1, C) if channels_last else (C * HW, HW, 1)
    return WholePlan(groups // chosen.groups, strides, constants)


_CONV_CHUNK = 512  # pixels of a program, of whose weight's gradient there are partial sums; a sample has 32 or more
_CONV_REGISTERS = 128  # the bound of the backward kernel of half types, with which it does not spill
_CONV_OUTPUTS = 16  # the outputs that tl.dot takes at least


def conv_chunk(HW: int, C: int, interpreted: bool = False) -> int:
    """Pixels of a program of rms_norm_silu_conv_bwd_kernel: whole tiles."""
    tile = conv_tile(HW, C, sums=True, half=True, interpreted=interpreted)["BLOCK_N"]
    return max(tile, min(_CONV_CHUNK, max(8 * tile, triton_launch.next_power_of_2(HW) // 32)))


@cache
def conv_tile(HW: int, C: int, *, sums: bool, half: bool, interpreted: bool = False) -> dict[str, int]:
    """The launch of RMSNorm with SiLU and a 1×1 convolution; sums and interpreted as in `choose_tile`.

    Products of float32 take more registers than those of half types: a thread has half as many elements.
    """
    elements = 1024 if sums else 2048
    block_c = max(16, triton_launch.next_power_of_2(C))
    block_n = max(16, min((8192 if interpreted else elements) // block_c, triton_launch.next_power_of_2(HW)))
    num_warps = min(32, max(1, block_n * block_c * (4 if half else 8) // elements))
    sizes = {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_J": _CONV_OUTPUTS, "num_warps": num_warps}
    return sizes | (triton_launch.register_bound(_CONV_REGISTERS) if sums and half and block_c <= 128 else {})


def rows_blocks(C: int, interpreted: bool = False) -> dict[str, int]:
    """The blocks of norm_silu_bwd_rows_kernel, a constant on a GPU: no size compiles it again.

    48 KB of sums are on their way at a time. Four channels are one load of 16 bytes; two norms of 64 channels then are
    32 programs and not 16, and each waits half as often.
    """
    if interpreted:
        return {"BLOCK_B": 4, "BLOCK_K": 4, "BLOCK_C": min(1024, triton_launch.next_power_of_2(C)), "num_warps": 1}
    sizes = {"BLOCK_B": 16, "BLOCK_K": 64, "BLOCK_C": 4, "num_warps": 8}
    return sizes | triton_launch.register_bound(168)  # one program per multiprocessor has more


def group_blocks(D: int, chunks: int) -> dict[str, int]:
    """The blocks of the kernels with one program per group: of a group's channels, and of chunks."""
    block_d = min(64, triton_launch.next_power_of_2(D))
    block_k = min(1024 // block_d, triton_launch.next_power_of_2(chunks))
    return {
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "BLOCKS_K": triton_launch.ceil_div(chunks, block_k),
        "BLOCKS_D": triton_launch.ceil_div(D, block_d),
        "num_warps": 1,
    }


def sizes_of(x: torch.Tensor) -> tuple[int, int, int]:  # (B, C, H, W) -> B, C, HW
    B, C, H, W = x.shape
    return B, C, H * W
