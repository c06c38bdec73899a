"""Triton kernels of the residual's convolution where a block reads a map and its skip connection, and their launches.

With h for the C = C0 + C1 channels of x + x_bias and skip side by side, per pixel:

    out = weight·h + bias
    (dx, dskip) = gradᵀ·weight + added      dweight = gradᵀ·h      dbias = Σ grad      dx_bias = Σ dx

x_bias is that of the convolution that made x, or nothing. The kernel of `out` writes h for the other reader, the 3×3
convolution. `added` is what flows through that reader: both maps' gradients are written once, whole, and h is not made
again. The sums over pixels have two stages, chunks of pixels and then the sum over chunks, without atomics. Maps are
channels-last: rows of channels, one per pixel of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot_of_many
from ddpm_fast.ops.common.triton_rows import choose_tile, is_exact, load_tile, row, store_tile, sum_of_rows
from ddpm_fast.runtime import triton_launch

# Numbers for which nothing is compiled again.
_ANY_SIZE = ["tiles", "tiles_k", "tiles_c", "tiles_c0", "tiles_c1", "tiles_n", "chunks", "biased"]
# Bounds of the forward kernel: half types' with five programs on a multiprocessor of sm_90, TF32's with four.
HALF_FWD_REGISTERS, TF32_FWD_REGISTERS = 96, 104
EXACT_FWD_REGISTERS = None if triton_launch.is_triton_before(3, 7) else 112  # with it Triton 3.6's spill
MAPS_REGISTERS = 128  # the bound of the kernel of maps' gradients, with which none spills
WEIGHT_REGISTERS = 128 if triton_launch.is_triton_before(3, 6) else None  # with bf16 on sm_100 some spill without it
_PROGRAMS = 512  # of the sums over pixels, at least where there are as many tiles: some for every multiprocessor


@triton.jit
def _product_of_map(
    b_out, map_ptr, h_ptr, bias_ptr, weight_ptr, o_n, o_k, rows, written, K, width, C, tiles, biased,
    PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """b_out + weight·(map + bias); the first `written` rows of map + bias go to h."""
    for i_c in range(tiles):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        b_map = load_tile(map_ptr, o_n, o_c, rows, width, width)
        if bias_ptr is not None:
            b_bias = tl.load(bias_ptr + o_c, mask=o_c < width * biased, other=0.0).to(tl.float32)
            b_map = cast(b_map.to(tl.float32) + b_bias[None, :], map_ptr.dtype.element_ty)
        store_tile(h_ptr, b_map, o_n, o_c, written, width, C)
        b_weight = cast(load_tile(weight_ptr, o_k, o_c, K, width, C), b_map.dtype)
        b_out = dot_of_many(b_map, tl.trans(b_weight), b_out, PRECISION)
    return b_out


@triton.jit(do_not_specialize=_ANY_SIZE)
def residual_conv_fwd_kernel(
    x_ptr,  # (N, C0)
    skip_ptr,  # (N, C1)
    weight_ptr,  # (K, C0 + C1)
    bias_ptr,  # (K,)
    x_bias_ptr,  # (C0,); any pointer where `biased` is 0
    out_ptr,  # (N, K)
    h_ptr,  # (N, C0 + C1)
    N, C0, C1, K, tiles_k, tiles_c0, tiles_c1, biased,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pixels / BLOCK_N · tiles_k,): programs of the same pixels follow each other, and read them from the cache.

    The first of them writes h.
    """
    i_k, start = tl.program_id(0) % tiles_k, tl.program_id(0) // tiles_k * BLOCK_N
    o_n, o_k = tl.arange(0, BLOCK_N), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    rows, C = N - start, C0 + C1
    written = tl.where(i_k == 0, rows, 0)
    h_ptr = row(h_ptr, start, C)
    b_out = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    b_out = _product_of_map(
        b_out, row(x_ptr, start, C0), h_ptr, x_bias_ptr, weight_ptr, o_n, o_k, rows, written, K, C0, C, tiles_c0,
        biased, PRECISION, BLOCK_C,
    )  # fmt: skip
    b_out = _product_of_map(
        b_out, row(skip_ptr, start, C1), h_ptr + C0, None, weight_ptr + C0, o_n, o_k, rows, written, K, C1, C,
        tiles_c1, 0, PRECISION, BLOCK_C,
    )  # fmt: skip
    b_out += tl.load(bias_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    store_tile(row(out_ptr, start, K), b_out, o_n, o_k, rows, K, K)


@triton.jit(do_not_specialize=_ANY_SIZE)
def residual_conv_bwd_maps_kernel(
    grad_ptr,  # (N, K)
    weight_ptr,  # (K, C0 + C1)
    added_ptr,  # (N, C0 + C1)
    dx_ptr,  # (N, C0)
    dskip_ptr,  # (N, C1)
    x_sums_ptr,  # (pixels / BLOCK_N, C0) float32: Σ dx over a tile's pixels; any pointer where `biased` is 0
    N, K, C0, C1, tiles_k, tiles_c0, tiles_c, biased,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pixels / BLOCK_N · tiles_c,): the first tiles_c0 tiles of channels are those of x."""
    i_c, i_n = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    out_ptr, width, first, summed = dx_ptr, C0, 0, C0 * biased
    if i_c >= tiles_c0:
        i_c -= tiles_c0
        out_ptr, width, first, summed = dskip_ptr, C1, C0, 0
    start = i_n * BLOCK_N
    o_n, o_c = tl.arange(0, BLOCK_N), i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    rows, C = N - start, C0 + C1
    grad_ptr = row(grad_ptr, start, K)
    b_out = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_k in range(tiles_k):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_grad = load_tile(grad_ptr, o_n, o_k, rows, K, K)
        b_weight = cast(load_tile(weight_ptr + first, o_k, o_c, K, width, C), b_grad.dtype)
        b_out = dot_of_many(b_grad, b_weight, b_out, PRECISION)
    b_out += load_tile(row(added_ptr, start, C) + first, o_n, o_c, rows, width, C).to(tl.float32)
    store_tile(row(out_ptr, start, width), b_out, o_n, o_c, rows, width, width)
    tl.store(row(x_sums_ptr, i_n, C0) + o_c, tl.sum(b_out, axis=0), mask=o_c < summed)


@triton.jit(do_not_specialize=_ANY_SIZE)
def residual_conv_bwd_weight_kernel(
    grad_ptr,  # (N, K)
    x_ptr,  # (N, C0), its rows stride_x apart
    skip_ptr,  # (N, C1), its rows stride_skip apart
    sums_ptr,  # (chunks, K·(C0 + C1) + K) float32: dweight and dbias over a chunk's pixels
    N, K, C0, C1, stride_x, stride_skip, tiles, tiles_k, tiles_c0, tiles_c,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (chunks · tiles_k · tiles_c,), the programs of a chunk side by side."""
    i_chunk, i_tile = tl.program_id(0) // (tiles_k * tiles_c), tl.program_id(0) % (tiles_k * tiles_c)
    i_k, i_c = i_tile // tiles_c, i_tile % tiles_c
    C = C0 + C1
    sums_ptr += i_chunk.to(tl.int64) * (K * C + K)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    is_first = i_c == 0
    map_ptr, width, first, stride = x_ptr, C0, 0, stride_x
    if i_c >= tiles_c0:
        i_c -= tiles_c0
        map_ptr, width, first, stride = skip_ptr, C1, C0, stride_skip
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_dweight = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    b_dbias = tl.zeros((BLOCK_K,), tl.float32)
    for i_row in range(tiles):
        o_n = (i_chunk * tiles + i_row) * BLOCK_N + tl.arange(0, BLOCK_N)
        b_grad = load_tile(grad_ptr, o_n, o_k, N, K, K, FAR=True)
        b_map = load_tile(map_ptr, o_n, o_c, N, width, stride, FAR=True)
        b_dweight = dot_of_many(tl.trans(b_grad), b_map, b_dweight, PRECISION)
        b_dbias += tl.sum(b_grad.to(tl.float32), axis=0)
    store_tile(sums_ptr + first, b_dweight, o_k, o_c, K, width, C)
    if is_first:
        tl.store(sums_ptr + K * C + o_k, b_dbias, mask=o_k < K)


@triton.jit(do_not_specialize=_ANY_SIZE)
def residual_conv_bwd_parameters_kernel(
    sums_ptr,  # (chunks, K·C + K) float32
    x_sums_ptr,  # (tiles_n, C0) float32, or any pointer where x has no bias
    dweight_ptr,  # (K, C)
    dbias_ptr,  # (K,)
    dx_bias_ptr,  # (C0,), or any pointer
    K, C, C0, chunks, tiles_n,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over chunks. Grid ((K·C + K) / BLOCK,), and C0 / BLOCK_C programs more where x has a bias."""
    size = K * C
    i_x = tl.program_id(0) - tl.cdiv(size + K, BLOCK)
    if i_x < 0:
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        b_sum = sum_of_rows(sums_ptr, o, chunks, size + K, BLOCK_R, BLOCK)
        tl.store(dweight_ptr + o, cast(b_sum, dweight_ptr.dtype.element_ty), mask=o < size)
        tl.store(dbias_ptr + o - size, cast(b_sum, dbias_ptr.dtype.element_ty), mask=(o >= size) & (o < size + K))
    else:
        o_c = i_x * BLOCK_C + tl.arange(0, BLOCK_C)
        b_dx_bias = sum_of_rows(x_sums_ptr, o_c, tiles_n, C0, BLOCK_X, BLOCK_C)
        tl.store(dx_bias_ptr + o_c, cast(b_dx_bias, dx_bias_ptr.dtype.element_ty), mask=o_c < C0)


def forward_registers(is_float32: bool, precision: str) -> int | None:
    """The bound of the forward kernel's registers."""
    if not is_float32:
        return HALF_FWD_REGISTERS
    return EXACT_FWD_REGISTERS if precision == "ieee" else TF32_FWD_REGISTERS


def residual_conv(
    x: torch.Tensor,  # (B, C0, H, W)
    skip: torch.Tensor,  # (B, C1, H, W)
    weight: torch.Tensor,  # (K, C0 + C1, 1, 1)
    bias: torch.Tensor,  # (K,)
    x_bias: torch.Tensor | None,  # (C0,)
) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution's output (B, K, H, W) and h (B, C0 + C1, H, W)."""
    (B, C0, H, W), C1, K = x.shape, skip.shape[1], weight.shape[0]
    N, precision = B * H * W, triton_launch.convolution_precision()
    out, h = (
        torch.empty((B, width, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for width in (K, C0 + C1)
    )
    tile = choose_tile(H * W, K, C0 + C1, is_exact(x, precision), names="NKC")
    tiles_k = triton_launch.ceil_div(K, tile["BLOCK_K"])
    tiles_c = (triton_launch.ceil_div(width, tile["BLOCK_C"]) for width in (C0, C1))
    with torch.cuda.device_of(x):
        residual_conv_fwd_kernel[(triton_launch.ceil_div(N, tile["BLOCK_N"]) * tiles_k,)](
            x, skip, _matrix(weight), bias.contiguous(), x.new_empty(0) if x_bias is None else x_bias.contiguous(), out,
            h, N, C0, C1, K, tiles_k, *tiles_c, int(x_bias is not None), PRECISION=precision, **tile,
            **triton_launch.register_bound(forward_registers(x.dtype == torch.float32, precision)),
        )  # fmt: skip
    return out, h


def residual_conv_gradients(
    grad: torch.Tensor,  # (B, K, H, W)
    x: torch.Tensor,  # (B, C0, H, W)
    skip: torch.Tensor,  # (B, C1, H, W)
    weight: torch.Tensor,  # (K, C0 + C1, 1, 1)
    bias: torch.Tensor,  # (K,)
    x_bias: torch.Tensor | None,  # (C0,), which x has
    added: torch.Tensor,  # (B, C0 + C1, H, W)
) -> tuple[torch.Tensor, ...]:
    """Gradients of x and skip, to which `added` is added, of weight, bias and x_bias, each laid out as its argument."""
    (B, C0, H, W), C1, K = x.shape, skip.shape[1], weight.shape[0]
    C, N, precision = C0 + C1, B * H * W, triton_launch.convolution_precision()
    exact = is_exact(x, precision)
    grad, added = (t.contiguous(memory_format=torch.channels_last) for t in (grad, added))
    dx, dskip = torch.empty_like(x), torch.empty_like(skip)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    dx_bias = x.new_empty(0) if x_bias is None else torch.empty_like(x_bias)
    biased = int(x_bias is not None)
    tile = choose_tile(H * W, min(C0, C1), K, exact, names="NCK")
    sums_tile = choose_tile(K, min(C0, C1), N, exact, names="KCN")
    tiles_n = triton_launch.ceil_div(N, tile["BLOCK_N"])
    x_sums = x.new_empty((tiles_n, C0) if biased else 0, dtype=torch.float32)
    with torch.cuda.device_of(x):
        tiles_c0, tiles_c1 = (triton_launch.ceil_div(width, tile["BLOCK_C"]) for width in (C0, C1))
        residual_conv_bwd_maps_kernel[(tiles_n * (tiles_c0 + tiles_c1),)](
            grad, _matrix(weight), added, dx, dskip, x_sums, N, K, C0, C1, triton_launch.ceil_div(K, tile["BLOCK_K"]),
            tiles_c0, tiles_c0 + tiles_c1, biased, PRECISION=precision, **tile,
            **triton_launch.register_bound(MAPS_REGISTERS),
        )  # fmt: skip
        tiles_k = triton_launch.ceil_div(K, sums_tile["BLOCK_K"])
        tiles_c0, tiles_c1 = (triton_launch.ceil_div(width, sums_tile["BLOCK_C"]) for width in (C0, C1))
        tiles, chunks = chunks_of_pixels(N, K, C0, C1, sums_tile)
        sums = x.new_empty((chunks, K * C + K), dtype=torch.float32)
        residual_conv_bwd_weight_kernel[(chunks * tiles_k * (tiles_c0 + tiles_c1),)](
            grad, x, skip, sums, N, K, C0, C1, _row_stride(x), _row_stride(skip), tiles, tiles_k, tiles_c0,
            tiles_c0 + tiles_c1, PRECISION=precision, **sums_tile, **triton_launch.register_bound(WEIGHT_REGISTERS),
        )  # fmt: skip
        blocks = parameters_blocks(triton_launch.interpreted())
        programs = triton_launch.ceil_div(K * C + K, blocks["BLOCK"])
        programs += biased * triton_launch.ceil_div(C0, blocks["BLOCK_C"])
        residual_conv_bwd_parameters_kernel[(programs,)](
            sums, x_sums, dweight, dbias, dx_bias, K, C, C0, chunks, tiles_n, **blocks
        )
    return dx, dskip, dweight, dbias, dx_bias


def chunks_of_pixels(N: int, K: int, C0: int, C1: int, sums_tile: dict[str, int]) -> tuple[int, int]:
    """Tiles of pixels per chunk of the weight's gradient, and chunks."""
    columns = sum(triton_launch.ceil_div(width, sums_tile["BLOCK_C"]) for width in (C0, C1))
    of_weight = triton_launch.ceil_div(K, sums_tile["BLOCK_K"]) * columns
    tiles_n = triton_launch.ceil_div(N, sums_tile["BLOCK_N"])
    tiles = triton_launch.ceil_div(tiles_n, max(1, _PROGRAMS // of_weight))
    return tiles, triton_launch.ceil_div(tiles_n, tiles)


def parameters_blocks(interpreted: bool = False) -> dict[str, int]:
    """The blocks of residual_conv_bwd_parameters_kernel, a constant on a GPU: no size compiles it again.

    Of the bias of x there are as many sums as tiles of pixels: a program has few channels, to read many at once.
    """
    if interpreted:
        return {"BLOCK_R": 16, "BLOCK": 4096, "BLOCK_X": 16, "BLOCK_C": 512, "num_warps": 4}
    return {"BLOCK_R": 16, "BLOCK": 128, "BLOCK_X": 512, "BLOCK_C": 4, "num_warps": 4}


def _row_stride(x: torch.Tensor) -> int:
    """Between the pixels of a channels-last map, or of some channels of one."""
    return x.shape[1] if x.is_contiguous(memory_format=torch.channels_last) else x.stride(3)


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(weight.shape[:2]).contiguous()


triton_launch.hash_functions(globals())
