"""Launches of linear_attention's kernels and the sizes that they accept; no Triton here.

Tiles, and so results, depend on sizes alone, never on the batch or the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddpm_fast.runtime import triton_launch

_LARGEST_HEAD = {2: 128, 4: 64}  # channels that registers and shared memory hold, by bytes of each
_LARGEST_PROJECTION = 2**16  # bytes of P that a forward program has in shared memory, which is 99 KB or more


def has_channels_last_output(qkv: torch.Tensor) -> bool:
    """Whether the output is channels-last, as qkv is; a map that has both formats counts as contiguous."""
    return not qkv.is_contiguous() and qkv.is_contiguous(memory_format=torch.channels_last)


def output_format(qkv: torch.Tensor) -> torch.memory_format:
    """The output's memory format."""
    return torch.channels_last if has_channels_last_output(qkv) else torch.contiguous_format


def empty_output(qkv: torch.Tensor, C: int) -> torch.Tensor:
    """An output with C channels, and device, dtype and memory format of qkv."""
    B, _, H, W = qkv.shape
    return torch.empty((B, C, H, W), dtype=qkv.dtype, device=qkv.device, memory_format=output_format(qkv))


@dataclass(frozen=True)
class Tile:
    """How one kernel's launch is cut up.

    Args:
        rows: positions of a tile.
        num_warps: warps per program.
        tiles: tiles that one program walks over, a power of two.
        group: heads that a program has side by side, a power of two.
        registers: see `triton_launch.register_bound`.
    """

    rows: int
    num_warps: int
    tiles: int = 1
    group: int = 1
    registers: int | None = None

    def programs(self, N: int) -> int:
        """How many cover N positions."""
        return -(-N // (self.rows * self.tiles))

    def groups(self, heads: int) -> int:
        """How many cover the heads."""
        return -(-heads // self.group)

    @property
    def constants(self) -> dict[str, int]:
        """Keyword arguments of every launch."""
        # Two stages: the next tile is loaded while this one is computed.
        sizes = {"BLOCK_N": self.rows, "num_warps": self.num_warps, "num_stages": 2 if self.tiles > 1 else 1}
        return sizes | triton_launch.register_bound(self.registers)


@dataclass(frozen=True)
class Launch:
    """How the launches of a call are cut up.

    Args:
        block_d, block_c: columns of a head and of the output, powers of two; what does not exist is masked.
        forward_columns, backward_columns, small_columns: columns of the output in a tile of the forward kernel of rows,
            of those of the backward, and of the two kernels of small matrices.
        context, forward, backward, sums, kv: tiles of the kernels that walk over positions.
        small_warps: warps per program of the small matrices' gradient.
    """

    block_d: int
    block_c: int
    forward_columns: int
    backward_columns: int
    small_columns: int
    context: Tile
    forward: Tile
    backward: Tile
    sums: Tile
    kv: Tile
    small_warps: int

    @property
    def small_rows(self) -> int:
        """Rows of a context in a tile of the kernel of the small matrices' gradient."""
        return min(self.block_d, 64)

    @property
    def merged_at_once(self) -> int:
        """Most chunks that a program of the merge adds at a time, a power of two."""
        return max(1, 256 // self.block_d)

    def merge_constants(self, chunks: int) -> dict[str, int]:
        """How the merge walks over chunks; the two multiply to a power of two, for their maxima are one tile."""
        padded = triton_launch.next_power_of_2(chunks)
        at_once = min(self.merged_at_once, padded)
        return {"BLOCK_K": at_once, "BLOCKS_K": padded // at_once}


def why_too_large(D: int, dtype: torch.dtype) -> str | None:
    """Why no program holds heads of D channels, in one clause; None where it does."""
    largest = _LARGEST_HEAD[dtype.itemsize]
    return None if D <= largest else f"a head has {D} channels, and the kernels hold at most {largest} of {dtype}"


def choose_launch(N: int, heads: int, D: int, C: int, *, half: bool, interpreted: bool = False) -> Launch:
    """The launches for N positions.

    Args:
        heads, D, C: sizes that `why_too_large` accepts.
        half: the maps' dtype has two bytes; float32 tiles take more registers and get fewer rows and heads.
        interpreted: large tiles, since the interpreter's time is per operation.
    """
    block_d, block_c = (max(16, triton_launch.next_power_of_2(n)) for n in (D, C))  # tl.dot needs 16 or more
    all_heads = triton_launch.next_power_of_2(heads)
    columns = min(64, block_c)

    def tile(
        rows: int, num_warps: int, width: int | None = None, chunks: bool = False, registers: int | None = None
    ) -> Tile:
        """A tile of so many rows where there are as many, and of heads of `width` columns in sum."""
        rows = max(16, min(rows, triton_launch.next_power_of_2(N)))
        # Each chunk costs partial sums: it has 256 positions or more, and there are at most 32, or more than 64 tiles.
        tiles = max(1, 256 // rows, min(64, -(-N // (32 * rows)))) if chunks else 1
        if interpreted:
            rows, tiles = max(16, min(256, triton_launch.next_power_of_2(-(-N // 3)))), 2 if chunks else 1
        group = 1 if width is None else max(1, min(all_heads, width // block_d))
        return Tile(rows, num_warps, triton_launch.next_power_of_2(tiles), group, registers)

    if not half:
        context = tile(1024 // block_d, 8, chunks=True)
    elif block_d > 32:
        context = tile(4096 // block_d, 4, chunks=True)
    else:  # 96 registers: five programs per multiprocessor, and no spills under Triton 3.5 to 3.8
        context = tile(2048 // block_d, 4, chunks=True, registers=96)
    # Whole rows of the output if P of one head or more fits: then y is computed once.
    width = min(128 if half else 64, _LARGEST_PROJECTION // (block_c * (2 if half else 4)))
    forward_columns = block_c if width >= max(block_d, 32) else columns
    # Two programs of the backward kernel of rows per multiprocessor; Triton 3.6 takes 164 registers by itself.
    registers = 128 if half and columns < block_c and block_d <= 32 else None
    return Launch(
        block_d,
        block_c,
        forward_columns,
        backward_columns=columns,
        small_columns=min(columns, max(16, 1024 // block_d)),
        context=context,
        forward=tile(min(64 if half else 32, 8192 // forward_columns), 4 if half and columns == block_c else 8, width),
        backward=tile(32 if half else 16, 8, 128 if half else 64, chunks=columns == block_c, registers=registers),
        sums=tile(32 if half else 16, 8, 128 if half else 32, chunks=True),
        kv=tile((4096 if half else 2048) // block_d, 4 if block_d <= (64 if half else 32) else 8),
        small_warps=4 if block_d <= 32 else 8,
    )
