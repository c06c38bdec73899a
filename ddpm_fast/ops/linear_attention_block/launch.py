"""Launches of linear_attention_block's kernels; no Triton here.

Tiles, and so a sample's results, depend on sizes alone, never on the batch or the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from ddpm_fast.runtime import triton_launch

_POSITIONS = 1024  # of a chunk, where there are as many: each chunk costs sums of (hidden, C)
_CHUNKS = 32  # of a sample, at most


@dataclass(frozen=True)
class Tile:
    """How a kernel that walks over positions is cut up.

    Args:
        rows: positions of a tile, a power of two.
        num_warps: warps per program.
        group: heads that a program has side by side, a power of two.
        registers: see `triton_launch.register_bound`.
    """

    rows: int
    num_warps: int
    group: int
    registers: int | None = None

    @property
    def constants(self) -> dict[str, int]:
        """Keyword arguments of every launch."""
        # Two stages: the next tile is loaded while this one is computed.
        sizes = {"BLOCK_N": self.rows, "GROUP": self.group, "num_warps": self.num_warps, "num_stages": 2}
        return sizes | triton_launch.register_bound(self.registers)

    def groups(self, heads: int) -> int:
        """Programs that cover the heads."""
        return -(-heads // self.group)

    def tiles(self, positions: int) -> int:
        """How many cover so many positions."""
        return -(-positions // self.rows)


@dataclass(frozen=True)
class Launch:
    """How the launches of a call are cut up.

    Args:
        block_d, block_c: columns of a head and channels, powers of two; what does not exist is masked.
        chunk: positions whose sums one program makes, whole tiles.
        span: positions of one program of the forward kernel of rows, whole tiles.
        context, rows, queries, keys: tiles.
    """

    block_d: int
    block_c: int
    chunk: int
    span: int
    context: Tile
    rows: Tile
    queries: Tile
    keys: Tile

    def chunks(self, N: int) -> int:
        """How many cover N positions."""
        return -(-N // self.chunk)

    @property
    def sizes(self) -> dict[str, int]:
        """Constants of every launch."""
        return {"BLOCK_D": self.block_d, "BLOCK_C": self.block_c}


def choose_launch(N: int, heads: int, D: int, C: int, *, interpreted: bool = False) -> Launch:
    """The launches for N positions.

    Args:
        heads, D, C: sizes that the op does not refuse.
        interpreted: large tiles, since the interpreter's time is per operation.
    """
    block_d, block_c = (max(16, triton_launch.next_power_of_2(n)) for n in (D, C))  # tl.dot needs 16 or more
    all_heads = triton_launch.next_power_of_2(heads)

    def tile(rows: int, num_warps: int, group: int = all_heads) -> Tile:
        return Tile(128 if interpreted else rows, num_warps, group)

    # Sums of (hidden, C) of a context are 64 registers of a thread: more heads than that are another program's.
    context = tile(32, 4, min(all_heads, max(1, 8192 // (block_c * block_d))))
    wide = block_c > 64
    chunk = max(256 if interpreted else _POSITIONS, triton_launch.next_power_of_2(-(-N // _CHUNKS)))
    span = 256 if interpreted else 64 * max(1, min(8, N // 2048))
    return Launch(
        block_d,
        block_c,
        chunk,
        span,
        context=context,
        rows=tile(64, 4),
        queries=tile(16 if wide else 32, 8),
        keys=tile(32, 8),
    )
