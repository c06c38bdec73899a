"""Launches of a convolution with its norm; no Triton here. Tiles depend on sizes alone, never on the batch."""

from __future__ import annotations

from functools import cache

from ddpm_fast.runtime import triton_launch

BWD_REGISTERS = 128  # the bound of the backward kernel, with which two programs of 8 warps run and none spills
_ELEMENTS = 8192  # of a tile: 32 sums in each thread


@cache
def conv_norm_tile(HW: int, C: int, K: int, *, exact: bool = False) -> dict[str, int]:
    """Edges and options of a launch that makes tiles (pixels, K) from C channels.

    Args:
        exact: products are float32 ones, without tensor cores.
    """
    block_k, block_c = (max(16, triton_launch.next_power_of_2(size)) for size in (K, C))
    most = min(128, _ELEMENTS // block_k) // (4 if exact else 1)
    edges = {"BLOCK_N": max(16, min(most, triton_launch.next_power_of_2(HW))), "BLOCK_K": block_k}
    edges["BLOCK_C"] = min(32 if exact else 64, block_c)
    return edges | {"num_warps": max(1, edges["BLOCK_N"] * block_k // 1024), "num_stages": 1 if exact else 3}
