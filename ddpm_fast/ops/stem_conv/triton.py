"""Launches of stem_conv's Triton kernels, and those of the sums of gradients where torch makes the convolution:

    total = grad + grad2 + grad3      dbias = Σ total over all pixels

in one pass over the maps. Sums over pixels have two stages, chunks of pixels and then the sum over chunks, without
atomics. Maps are channels-last: rows of channels, one per pixel of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast
from ddpm_fast.ops.stem_conv.triton_conv import (
    chunks_of_tiles,
    forward_tile,
    load,
    stem_conv_bwd_weight_kernel,
    stem_conv_fwd_kernel,
    tiles_of_pixels,
    total_gradient,
    weight_tile,
)
from ddpm_fast.runtime import triton_launch


@triton.jit(do_not_specialize=["N"])
def stem_conv_bwd_sum_kernel(
    grad_ptr,  # (N, C); so are the others and total
    grad2_ptr,
    grad3_ptr,  # or None
    total_ptr,
    sums_ptr,  # (chunks, C) float32
    N, C,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, C / BLOCK_C)."""
    i_chunk = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_tile in range(TILES):
        o_n = (i_chunk * TILES + i_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        o_tile, m_tile = o_n[:, None] * C + o_c[None, :], (o_n < N)[:, None] & (o_c < C)[None, :]
        b_total = total_gradient(grad_ptr, grad2_ptr, grad3_ptr, 0, o_tile, m_tile)
        tl.store(total_ptr + o_tile, b_total, mask=m_tile)
        b_sums += b_total.to(tl.float32)
    tl.store(sums_ptr + i_chunk * C + o_c, tl.sum(b_sums, axis=0), mask=o_c < C)


@triton.jit(do_not_specialize=["C", "chunks", "stride_t", "stride_c"])
def stem_conv_bwd_parameters_kernel(
    sums_ptr,  # (chunks, K, taps + 1) float32
    dweight_ptr,  # (K, taps) through stride_t of the side² places and stride_c, or None: there are no taps
    dbias_ptr,  # (K,)
    K, taps, C, chunks, stride_t, stride_c,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over chunks. Grid (K·(taps + 1) / BLOCK,)."""
    o, size = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), K * (taps + 1)
    b_sum = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    for start in range(0, chunks, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        mask = (o_r < chunks)[:, None] & (o < size)[None, :]
        b_sum += load(sums_ptr, o_r.to(tl.int64)[:, None] * size + o[None, :], mask)
    b_sum = tl.sum(b_sum, axis=0)
    o_k, o_t = o // (taps + 1), o % (taps + 1)
    if dweight_ptr is not None:
        o_weight = o_k * taps + o_t // C * stride_t + o_t % C * stride_c
        b_dweight = cast(b_sum, dweight_ptr.dtype.element_ty)
        tl.store(dweight_ptr + o_weight, b_dweight, mask=(o_t < taps) & (o < size))
    tl.store(dbias_ptr + o_k, cast(b_sum, dbias_ptr.dtype.element_ty), mask=(o_t == taps) & (o < size))


def blocks_of_sums(C: int) -> dict[str, int]:
    """The blocks of stem_conv_bwd_sum_kernel."""
    return {"BLOCK_N": 32, "BLOCK_C": min(64, triton_launch.next_power_of_2(C)), "TILES": 8, "num_warps": 4}


def parameters_blocks(interpreted: bool = False) -> dict[str, int]:
    """The blocks of stem_conv_bwd_parameters_kernel, a constant on a GPU: no size compiles it again.

    Eight numbers are the 32 bytes that memory hands out at once.
    """
    blocks = {"BLOCK_R": 16, "BLOCK": 1024} if interpreted else {"BLOCK_R": 128, "BLOCK": 8}
    return {**blocks, "num_warps": 4}


def stem_conv(
    x: torch.Tensor,  # (B, C, H, W)
    x2: torch.Tensor | None,  # further channels
    x3: torch.Tensor | None,
    weight: torch.Tensor,  # (K, C, side, side)
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The output (B, K, H, W), channels-last."""
    (B, _, H, W), (K, C, side, _) = x.shape, weight.shape
    taps = side**2 * C
    out = torch.empty((B, K, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tile = forward_tile(H, W, K, taps, x.dtype == torch.float32)
    tiles_n, tiles_k = tiles_of_pixels(B, H, W, *_edges(tile)), triton_launch.ceil_div(K, tile["BLOCK_K"])
    x = _side_by_side(x, x2, x3)
    rows = weight.permute(0, 2, 3, 1).reshape(K, taps).contiguous()
    with torch.cuda.device_of(x):
        stem_conv_fwd_kernel[(tiles_n * tiles_k,)](
            x, rows, None if bias is None else bias.contiguous(), out, H, W, K, tiles_k,
            SIDE=side, C=C,
            TILES_T=triton_launch.ceil_div(taps, tile["BLOCK_T"]), **tile,
        )  # fmt: skip
    return out


def stem_conv_backward(
    grad: torch.Tensor,  # (B, K, H, W)
    x: torch.Tensor,
    x2: torch.Tensor | None,
    x3: torch.Tensor | None,
    weight: torch.Tensor,
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of weight and bias."""
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = weight.new_empty(weight.shape[:1], dtype=torch.float32)
    _launch_backward((grad, None, None), (x, x2, x3), dweight, dbias)
    return dweight, dbias if want_bias else None


def stem_conv_backward_of_readers(
    grad: torch.Tensor,  # (B, K, H, W); so are the others
    grad2: torch.Tensor | None,
    grad3: torch.Tensor | None,
    x: torch.Tensor,
    x2: torch.Tensor | None,
    x3: torch.Tensor | None,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of weight, laid out as it is, and bias, both of weight's dtype, of an output with several readers."""
    dweight, dbias = torch.empty_like(weight), weight.new_empty(weight.shape[:1])
    _launch_backward((grad, grad2, grad3), (x, x2, x3), dweight, dbias)
    return dweight, dbias


def _launch_backward(gradients: tuple, maps: tuple, dweight: torch.Tensor, dbias: torch.Tensor) -> None:
    x = _side_by_side(*maps)
    (B, _, H, W), (K, C, side, _) = x.shape, dweight.shape
    taps = side**2 * C
    tile, width = weight_tile(H, W, K, taps, x.dtype == torch.float32)
    tiles_k, tiles_t = triton_launch.ceil_div(K, tile["BLOCK_K"]), triton_launch.ceil_div(taps + 1, width)
    tiles_n = tiles_of_pixels(B, H, W, *_edges(tile))
    tiles, chunks = chunks_of_tiles(tiles_n, tiles_k * tiles_t)
    sums = x.new_empty((chunks, K, taps + 1), dtype=torch.float32)
    with torch.cuda.device_of(x):
        stem_conv_bwd_weight_kernel[(chunks * tiles_k * tiles_t,)](
            *_channels_last(gradients), x, sums, H, W, K, tiles, tiles_n, tiles_k, tiles_t, width,
            SIDE=side, C=C, **tile,
        )  # fmt: skip
        _launch_sums(sums, dweight, dbias)


def _launch_sums(sums: torch.Tensor, dweight: torch.Tensor | None, dbias: torch.Tensor) -> None:
    """Add up the chunks."""
    blocks, (K,), C, taps = parameters_blocks(triton_launch.interpreted()), dbias.shape, 1, 0
    if dweight is not None:
        C, taps = dweight.shape[1], dweight[0].numel()
    is_last = dweight is not None and dweight.is_contiguous(memory_format=torch.channels_last)
    strides = (C, 1) if is_last else (1, taps // C)
    stem_conv_bwd_parameters_kernel[(triton_launch.ceil_div(K * (taps + 1), blocks["BLOCK"]),)](
        sums, dweight, dbias, K, taps, C, sums.shape[0], *strides, **blocks
    )


def stem_conv_sum_of_gradients(
    grad: torch.Tensor,  # (B, C, H, W), so are the others
    grad2: torch.Tensor,
    grad3: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the gradients, channels-last, and its sum over all pixels (C,), both of grad's dtype."""
    B, C, H, W = grad.shape
    N, blocks = B * H * W, blocks_of_sums(C)
    chunks = triton_launch.ceil_div(N, blocks["BLOCK_N"] * blocks["TILES"])
    total, dbias = torch.empty_like(grad, memory_format=torch.channels_last), grad.new_empty(C)
    sums = grad.new_empty((chunks, C), dtype=torch.float32)
    with torch.cuda.device_of(grad):
        stem_conv_bwd_sum_kernel[(chunks, triton_launch.ceil_div(C, blocks["BLOCK_C"]))](
            *_channels_last((grad, grad2, grad3)), total, sums, N, C, **blocks
        )
        _launch_sums(sums, None, dbias)
    return total, dbias


def _channels_last(maps: tuple) -> list[torch.Tensor | None]:
    return [None if map is None else map.contiguous(memory_format=torch.channels_last) for map in maps]


def _side_by_side(*maps: torch.Tensor | None) -> torch.Tensor:
    """Maps as one, channels-last."""
    given = [map for map in maps if map is not None]
    x = given[0] if len(given) == 1 else torch.cat(given, dim=1)
    return x.contiguous(memory_format=torch.channels_last)


def _edges(tile: dict[str, int]) -> tuple[int, int]:
    return tile["ROWS"], tile["COLUMNS"]


triton_launch.hash_functions(globals())
