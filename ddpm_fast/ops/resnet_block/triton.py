"""Triton kernels of the residual's convolution where a block reads a map and its skip connection, and their launches.

With h for the C = C0 + C1 channels of x and skip side by side, per pixel:

    out = weight·h + bias
    (dx, dskip) = gradᵀ·weight + added      dweight = gradᵀ·h      dbias = Σ grad

`added` is what flows through the other reader of h, the 3×3 convolution: both maps' gradients are written once, whole,
and h is not made again. The sums over pixels have two stages, chunks of pixels and then the sum over chunks, without
atomics. Maps are channels-last: rows of channels, one per pixel of the batch.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot_of_many
from ddpm_fast.runtime import triton_launch

# Numbers of tiles, for which nothing is compiled again.
_ANY_SIZE = ["tiles", "tiles_k", "tiles_c", "tiles_c0", "chunks"]
MAPS_REGISTERS = 128  # the bound of the kernel of maps, with which none spills
WEIGHT_REGISTERS = 128 if triton_launch.is_triton_before(3, 6) else None  # with bf16 on sm_100 some spill without it
_PROGRAMS = 512  # of the sums over pixels, at least where there are as many tiles: some for every multiprocessor


@triton.jit
def _load(pointer, o_row, o_column, rows, columns, stride):
    """Some rows and columns of a matrix, 0 outside."""
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    return tl.load(pointer + o_row.to(tl.int64)[:, None] * stride + o_column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, value, o_row, o_column, rows, columns, stride):
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    value = cast(value, pointer.dtype.element_ty)
    tl.store(pointer + o_row.to(tl.int64)[:, None] * stride + o_column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=_ANY_SIZE)
def residual_conv_fwd_kernel(
    h_ptr,  # (N, C)
    weight_ptr,  # (K, C)
    bias_ptr,  # (K,)
    out_ptr,  # (N, K)
    N, C, K, tiles_k, tiles_c,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pixels / BLOCK_N · tiles_k,): programs of the same pixels follow each other, and read h from the cache."""
    i_k, i_n = tl.program_id(0) % tiles_k, tl.program_id(0) // tiles_k
    o_n, o_k = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    b_out = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i_c in range(tiles_c):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        b_h = _load(h_ptr, o_n, o_c, N, C, C)
        b_weight = cast(_load(weight_ptr, o_k, o_c, K, C, C), b_h.dtype)
        b_out = dot_of_many(b_h, tl.trans(b_weight), b_out, PRECISION)
    b_out += tl.load(bias_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    _store(out_ptr, b_out, o_n, o_k, N, K, K)


@triton.jit(do_not_specialize=_ANY_SIZE)
def residual_conv_bwd_maps_kernel(
    grad_ptr,  # (N, K)
    weight_ptr,  # (K, C0 + C1)
    added_ptr,  # (N, C0 + C1)
    dx_ptr,  # (N, C0)
    dskip_ptr,  # (N, C1)
    N, K, C0, C1, tiles_k, tiles_c0, tiles_c,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pixels / BLOCK_N · tiles_c,): the first tiles_c0 tiles of channels are those of x."""
    i_c, i_n = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    out_ptr, width, first = dx_ptr, C0, 0
    if i_c >= tiles_c0:
        i_c -= tiles_c0
        out_ptr, width, first = dskip_ptr, C1, C0
    o_n, o_c = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    C = C0 + C1
    b_out = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_k in range(tiles_k):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_grad = _load(grad_ptr, o_n, o_k, N, K, K)
        b_weight = cast(_load(weight_ptr + first, o_k, o_c, K, width, C), b_grad.dtype)
        b_out = dot_of_many(b_grad, b_weight, b_out, PRECISION)
    b_out += _load(added_ptr + first, o_n, o_c, N, width, C).to(tl.float32)
    _store(out_ptr, b_out, o_n, o_c, N, width, width)


@triton.jit(do_not_specialize=_ANY_SIZE)
def residual_conv_bwd_weight_kernel(
    grad_ptr,  # (N, K)
    x_ptr,  # (N, C0)
    skip_ptr,  # (N, C1)
    sums_ptr,  # (chunks, K·(C0 + C1) + K) float32: dweight and dbias over a chunk's pixels
    N, K, C0, C1, tiles, tiles_k, tiles_c0, tiles_c,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (chunks · tiles_k · tiles_c,), the programs of a chunk side by side."""
    i_chunk, i_tile = tl.program_id(0) // (tiles_k * tiles_c), tl.program_id(0) % (tiles_k * tiles_c)
    i_k, i_c = i_tile // tiles_c, i_tile % tiles_c
    C = C0 + C1
    sums_ptr += i_chunk.to(tl.int64) * (K * C + K)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    is_first = i_c == 0
    map_ptr, width, first = x_ptr, C0, 0
    if i_c >= tiles_c0:
        i_c -= tiles_c0
        map_ptr, width, first = skip_ptr, C1, C0
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_dweight = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    b_dbias = tl.zeros((BLOCK_K,), tl.float32)
    for i_row in range(tiles):
        o_n = (i_chunk * tiles + i_row) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_grad = _load(grad_ptr, o_n, o_k, N, K, K)
        b_dweight = dot_of_many(tl.trans(b_grad), _load(map_ptr, o_n, o_c, N, width, width), b_dweight, PRECISION)
        b_dbias += tl.sum(b_grad.to(tl.float32), axis=0)
    _store(sums_ptr + first, b_dweight, o_k, o_c, K, width, C)
    if is_first:
        tl.store(sums_ptr + K * C + o_k, b_dbias, mask=o_k < K)


@triton.jit(do_not_specialize=_ANY_SIZE)
def residual_conv_bwd_parameters_kernel(
    sums_ptr,  # (chunks, K·C + K) float32
    dweight_ptr,  # (K, C)
    dbias_ptr,  # (K,)
    K, C, chunks,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over chunks. Grid ((K·C + K) / BLOCK,)."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = K * C
    b_sum = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    for start in range(0, chunks, BLOCK_R):
        b_sum += _load(sums_ptr, start + tl.arange(0, BLOCK_R), o, chunks, size + K, size + K)
    b_sum = tl.sum(b_sum, axis=0)
    tl.store(dweight_ptr + o, cast(b_sum, dweight_ptr.dtype.element_ty), mask=o < size)
    tl.store(dbias_ptr + o - size, cast(b_sum, dbias_ptr.dtype.element_ty), mask=(o >= size) & (o < size + K))


@cache
def choose_tile(rows: int, columns: int, depth: int, exact: bool, *, names: str) -> dict[str, int]:
    """Edges and options of a launch that makes tiles (rows, columns), summing over `depth`.

    Args:
        rows, columns, depth: the sizes that are cut up.
        exact: products are float32 ones, without tensor cores and out of registers.
        names: a letter of the BLOCK of each.
    """

    def block(size: int, largest: int) -> int:
        return min(largest, max(16, triton_launch.next_power_of_2(size)))

    edges = (block(rows, 64), block(columns, 64), 16 if exact else block(depth, 32))
    num_warps = max(1, min(16, edges[0] * edges[1] // 512)) if exact else 4
    blocks = {f"BLOCK_{letter}": edge for letter, edge in zip(names, edges, strict=True)}
    return blocks | {"num_warps": num_warps, "num_stages": 2 if exact else 3}


def residual_conv(
    h: torch.Tensor,  # (B, C, H, W)
    weight: torch.Tensor,  # (K, C, 1, 1)
    bias: torch.Tensor,  # (K,)
) -> torch.Tensor:
    """The convolution's output (B, K, H, W)."""
    (B, C, H, W), K = h.shape, weight.shape[0]
    N, precision = B * H * W, triton_launch.convolution_precision()
    out = torch.empty((B, K, H, W), dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
    tile = choose_tile(H * W, K, C, _exact(h, precision), names="NKC")
    tiles_k = triton_launch.ceil_div(K, tile["BLOCK_K"])
    with torch.cuda.device_of(h):
        residual_conv_fwd_kernel[(triton_launch.ceil_div(N, tile["BLOCK_N"]) * tiles_k,)](
            h, _matrix(weight), bias.contiguous(), out, N, C, K, tiles_k, triton_launch.ceil_div(C, tile["BLOCK_C"]),
            PRECISION=precision, **tile,
        )  # fmt: skip
    return out


def residual_conv_gradients(
    grad: torch.Tensor,  # (B, K, H, W)
    x: torch.Tensor,  # (B, C0, H, W)
    skip: torch.Tensor,  # (B, C1, H, W)
    weight: torch.Tensor,  # (K, C0 + C1, 1, 1)
    bias: torch.Tensor,  # (K,)
    added: torch.Tensor,  # (B, C0 + C1, H, W)
) -> tuple[torch.Tensor, ...]:
    """Gradients of x and skip, to which `added` is added, of weight and of bias, each laid out as its argument."""
    (B, C0, H, W), C1, K = x.shape, skip.shape[1], weight.shape[0]
    C, N, precision = C0 + C1, B * H * W, triton_launch.convolution_precision()
    exact = _exact(x, precision)
    grad, added = (t.contiguous(memory_format=torch.channels_last) for t in (grad, added))
    dx, dskip = torch.empty_like(x), torch.empty_like(skip)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    tile = choose_tile(H * W, min(C0, C1), K, exact, names="NCK")
    sums_tile = choose_tile(K, min(C0, C1), N, exact, names="KCN")
    with torch.cuda.device_of(x):
        tiles_c0, tiles_c1 = (triton_launch.ceil_div(width, tile["BLOCK_C"]) for width in (C0, C1))
        residual_conv_bwd_maps_kernel[(triton_launch.ceil_div(N, tile["BLOCK_N"]) * (tiles_c0 + tiles_c1),)](
            grad, _matrix(weight), added, dx, dskip, N, K, C0, C1, triton_launch.ceil_div(K, tile["BLOCK_K"]),
            tiles_c0, tiles_c0 + tiles_c1, PRECISION=precision, **tile, **triton_launch.register_bound(MAPS_REGISTERS),
        )  # fmt: skip
        tiles_k = triton_launch.ceil_div(K, sums_tile["BLOCK_K"])
        tiles_c0, tiles_c1 = (triton_launch.ceil_div(width, sums_tile["BLOCK_C"]) for width in (C0, C1))
        tiles, chunks = chunks_of_pixels(N, K, C0, C1, sums_tile)
        sums = x.new_empty((chunks, K * C + K), dtype=torch.float32)
        residual_conv_bwd_weight_kernel[(chunks * tiles_k * (tiles_c0 + tiles_c1),)](
            grad, x, skip, sums, N, K, C0, C1, tiles, tiles_k, tiles_c0, tiles_c0 + tiles_c1, PRECISION=precision,
            **sums_tile, **triton_launch.register_bound(WEIGHT_REGISTERS),
        )  # fmt: skip
        blocks = parameters_blocks(triton_launch.interpreted())
        residual_conv_bwd_parameters_kernel[(triton_launch.ceil_div(K * C + K, blocks["BLOCK"]),)](
            sums, dweight, dbias, K, C, chunks, **blocks
        )
    return dx, dskip, dweight, dbias


def chunks_of_pixels(N: int, K: int, C0: int, C1: int, sums_tile: dict[str, int]) -> tuple[int, int]:
    """Tiles of pixels per chunk of the weight's gradient, and chunks."""
    columns = sum(triton_launch.ceil_div(width, sums_tile["BLOCK_C"]) for width in (C0, C1))
    of_weight = triton_launch.ceil_div(K, sums_tile["BLOCK_K"]) * columns
    tiles_n = triton_launch.ceil_div(N, sums_tile["BLOCK_N"])
    tiles = triton_launch.ceil_div(tiles_n, max(1, _PROGRAMS // of_weight))
    return tiles, triton_launch.ceil_div(tiles_n, tiles)


def parameters_blocks(interpreted: bool = False) -> dict[str, int]:
    """The blocks of residual_conv_bwd_parameters_kernel, a constant on a GPU: no size compiles it again."""
    return {"BLOCK_R": 16, "BLOCK": 4096 if interpreted else 128, "num_warps": 4}


def _exact(x: torch.Tensor, precision: str) -> bool:
    return x.dtype == torch.float32 and precision == "ieee"


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(weight.shape[:2]).contiguous()


triton_launch.hash_functions(globals())
