"""Triton kernels of norm_linear, and their launches.

RMSNorm is a scale per pixel, so that it commutes with the product over channels: with n = max(‖x‖₂, 1e-12) of a pixel

    out = (√C / n) · x·(weight·gain)ᵀ

The forward kernel adds up the squares while it reads x for the product and scales in the epilogue; the normed map never
exists. (Without the norm, and with bias, residual and a factor in the epilogue, it is linear_residual.)
Backward, for z the gradient at x̂ = x·√C / n:

    z = grad·(weight·gain)     dx = (z − x̂·⟨x̂, z⟩ / C) · √C / n     d(weight·gain) = gradᵀ·x̂

The first two are one kernel over pixels, whose programs hold whole rows of z. The last one is a sum over pixels in two
stages, chunks of pixels and then the sum over chunks, without atomics; the second writes both parameters' gradients.

Rows are the pixels of one sample, or of the whole batch where maps are channels-last: then all of them form one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot, dot_of_many
from ddpm_fast.ops.common.triton_rows import product_gradients
from ddpm_fast.runtime import triton_launch

_SMALLEST_NORM = tl.constexpr(1e-12)


@triton.jit
def _folded_weight(weight_ptr, gain_ptr, o_o, o_c, K, C, dtype: tl.constexpr):
    """weight·gain (weight without gain) of some outputs and channels, rounded to the maps' dtype; 0 outside."""
    m_c = o_c < C
    b_weight = tl.load(weight_ptr + o_o[:, None] * C + o_c[None, :], mask=(o_o < K)[:, None] & m_c[None, :], other=0.0)
    b_weight = b_weight.to(tl.float32)
    if gain_ptr is not None:
        b_weight *= tl.load(gain_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return cast(b_weight, dtype)


@triton.jit
def norm_linear_fwd_kernel(
    x_ptr,  # (B, C, N) through stride_b, stride_c, stride_n
    gain_ptr,  # (C,) or None
    weight_ptr,  # (K, C)
    bias_ptr,  # (K,) or None
    residual_ptr,  # as out, or None
    out_ptr,  # (B, K, N) through out_b, out_c, out_n
    factors_ptr,  # (B, N) float32: √C / max(‖x‖₂, 1e-12); or None: x is not normed
    N, C, K, tiles_n, tiles_o, root_c, scale, stride_b, stride_c, stride_n, out_b, out_c, out_n,
    PRECISION: tl.constexpr, TILES_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Programs of one tile of pixels follow each other: x comes from memory once, then from the cache.
    i_o, i_n = tl.program_id(0) % tiles_o, tl.program_id(0) // tiles_o
    i_b, i_n = (i_n // tiles_n).to(tl.int64), i_n % tiles_n
    o_n, o_o = i_n * BLOCK_N + tl.arange(0, BLOCK_N), i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_n = o_n < N
    x_row = x_ptr + i_b * stride_b + o_n.to(tl.int64)[:, None] * stride_n
    b_squares = tl.zeros((BLOCK_N,), tl.float32)
    b_out = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for i_c in range(TILES_C):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        o_x = o_c.to(tl.int64)[None, :] * stride_c
        b_x = tl.load(x_row + o_x, mask=m_n[:, None] & (o_c < C)[None, :], other=0.0)
        b_weight = _folded_weight(weight_ptr, gain_ptr, o_o, o_c, K, C, x_ptr.dtype.element_ty)
        if factors_ptr is not None:
            b_squares += tl.sum(b_x.to(tl.float32) * b_x.to(tl.float32), axis=1)
        b_out = dot(b_x, tl.trans(b_weight), b_out, PRECISION)
    if factors_ptr is not None:
        # Both correctly rounded: gradients of few channels cancel, and 2 units in the last place would show in them.
        b_factor = tl.div_rn(root_c, tl.maximum(tl.sqrt_rn(b_squares), _SMALLEST_NORM))
        if i_o == 0:
            tl.store(factors_ptr + i_b * N + o_n, b_factor, mask=m_n)
        b_out *= b_factor[:, None]
    if bias_ptr is not None:
        b_out += tl.load(bias_ptr + o_o, mask=o_o < K, other=0.0).to(tl.float32)[None, :]
    o_tile = i_b * out_b + o_n.to(tl.int64)[:, None] * out_n + o_o.to(tl.int64)[None, :] * out_c
    m_tile = m_n[:, None] & (o_o < K)[None, :]
    if residual_ptr is not None:
        b_out = (b_out + tl.load(residual_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)) * scale
    tl.store(out_ptr + o_tile, cast(b_out, out_ptr.dtype.element_ty), mask=m_tile)


@triton.jit
def norm_linear_bwd_x_kernel(
    grad_ptr,  # (B, K, N) through out_b, out_c, out_n
    x_ptr,  # (B, C, N) through stride_b, stride_c, stride_n; so is dx
    dx_ptr,
    factors_ptr,  # (B, N)
    gain_ptr,  # (C,)
    weight_ptr,  # (K, C)
    added_ptr,  # added to dx, laid out as dx; or None
    N, C, K, tiles_n, root_c, stride_b, stride_c, stride_n, out_b, out_c, out_n,
    PRECISION: tl.constexpr, TILES_O: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_b, i_n = (tl.program_id(0) // tiles_n).to(tl.int64), tl.program_id(0) % tiles_n
    o_n, o_c = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    m_n = o_n < N
    grad_row = grad_ptr + i_b * out_b + o_n.to(tl.int64)[:, None] * out_n
    b_z = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_o in range(TILES_O):
        o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
        o_grad = o_o.to(tl.int64)[None, :] * out_c
        b_grad = tl.load(grad_row + o_grad, mask=m_n[:, None] & (o_o < K)[None, :], other=0.0)
        b_weight = _folded_weight(weight_ptr, gain_ptr, o_o, o_c, K, C, grad_ptr.dtype.element_ty)
        b_z = dot_of_many(b_grad, b_weight, b_z, PRECISION)
    o_tile = i_b * stride_b + o_n.to(tl.int64)[:, None] * stride_n + o_c.to(tl.int64)[None, :] * stride_c
    m_tile = m_n[:, None] & (o_c < C)[None, :]
    b_factor = tl.load(factors_ptr + i_b * N + o_n, mask=m_n, other=0.0)
    b_normed = tl.load(x_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32) * b_factor[:, None]
    # A clamped norm is a constant: nothing flows through it.
    unclamped = b_factor < tl.div_rn(root_c, _SMALLEST_NORM)
    b_projection = tl.where(unclamped, tl.sum(b_z * b_normed, axis=1) * tl.div_rn(1.0, root_c * root_c), 0.0)
    b_dx = (b_z - b_normed * b_projection[:, None]) * b_factor[:, None]
    if added_ptr is not None:
        b_dx += tl.load(added_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(dx_ptr + o_tile, cast(b_dx, dx_ptr.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["chunks", "tiles", "tiles_o", "tiles_c"])
def norm_linear_bwd_weight_kernel(
    grad_ptr,  # (B, K, N) through out_b, out_c, out_n
    x_ptr,  # (B, C, N) through stride_b, stride_c, stride_n
    factors_ptr,  # (B, N)
    sums_ptr,  # (B·chunks, K, C) float32: gradᵀ·x̂ of a chunk's pixels
    N, C, K, chunks, tiles, tiles_o, tiles_c, stride_b, stride_c, stride_n, out_b, out_c, out_n,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Programs of one chunk of pixels follow each other, see the forward kernel.
    i_tile, i_chunk = tl.program_id(0) % (tiles_o * tiles_c), tl.program_id(0) // (tiles_o * tiles_c)
    i_b, i_n = (i_chunk // chunks).to(tl.int64), i_chunk % chunks
    o_o, o_c = i_tile // tiles_c * BLOCK_O + tl.arange(0, BLOCK_O), i_tile % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_o, m_c = o_o < K, o_c < C
    grad_ptr += i_b * out_b
    x_ptr += i_b * stride_b
    o_grad, o_x = o_o.to(tl.int64)[None, :] * out_c, o_c.to(tl.int64)[None, :] * stride_c
    b_sum = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    for i_row in range(tiles):
        o_n = (i_n * tiles + i_row) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_row = o_n.to(tl.int64)[:, None]
        b_grad = tl.load(grad_ptr + o_row * out_n + o_grad, mask=m_n[:, None] & m_o[None, :], other=0.0)
        b_x = tl.load(x_ptr + o_row * stride_n + o_x, mask=m_n[:, None] & m_c[None, :], other=0.0)
        b_factor = tl.load(factors_ptr + i_b * N + o_n, mask=m_n, other=0.0)
        b_normed = cast(b_x.to(tl.float32) * b_factor[:, None], grad_ptr.dtype.element_ty)
        b_sum = dot_of_many(tl.trans(b_grad), b_normed, b_sum, PRECISION)
    o_sums = i_chunk.to(tl.int64) * K * C + o_o[:, None] * C + o_c[None, :]
    tl.store(sums_ptr + o_sums, b_sum, mask=m_o[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["K", "chunks"])
def norm_linear_bwd_parameters_kernel(
    sums_ptr,  # (chunks, K, C) float32: of all samples, the gradient of weight·gain
    gain_ptr,  # (C,)
    weight_ptr,  # (K, C)
    dgain_ptr,  # (C,)
    dweight_ptr,  # (K, C)
    K, C, chunks,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dweight = sum·gain and dgain = Σ sum·weight over the outputs, each written once.

    One program has a few channels of all outputs and chunks. It loops by `while`, since the interpreters of Triton 3.5
    and 3.6 cannot count up to an argument.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_gain = tl.load(gain_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dgain = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    o_start = 0
    while o_start < K:
        o_o = o_start + tl.arange(0, BLOCK_O)
        m_tile = (o_o < K)[:, None] & m_c[None, :]
        o_tile = o_o[:, None] * C + o_c[None, :]
        b_sum = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
        k_start = 0
        while k_start < chunks:
            o_k = k_start + tl.arange(0, BLOCK_K)
            o_sums = (o_k.to(tl.int64) * K * C)[:, None, None] + o_tile[None, :, :]
            mask = (o_k < chunks)[:, None, None] & m_tile[None, :, :]
            b_sum += tl.sum(tl.load(sums_ptr + o_sums, mask=mask, other=0.0), axis=0)
            k_start += BLOCK_K
        b_dgain += b_sum * tl.load(weight_ptr + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        tl.store(dweight_ptr + o_tile, cast(b_sum * b_gain[None, :], dweight_ptr.dtype.element_ty), mask=m_tile)
        o_start += BLOCK_O
    tl.store(dgain_ptr + o_c, cast(tl.sum(b_dgain, axis=0), dgain_ptr.dtype.element_ty), mask=m_c)


@dataclass(frozen=True)
class Tile:
    """How a launch is cut up: pixels, outputs and channels of a tile, warps and pipeline stages."""

    block_n: int
    block_o: int
    block_c: int
    num_warps: int
    num_stages: int

    @cached_property
    def constants(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_O": self.block_o,
            "BLOCK_C": self.block_c,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def _block(size: int, largest: int) -> int:
    """A tile's edge: the size to the next power of two, at least the 16 that tl.dot needs and at most `largest`."""
    return min(largest, max(16, triton_launch.next_power_of_2(size)))


def exact_products(dtype: torch.dtype, precision: str) -> bool:
    """Whether products are float32 ones, made without tensor cores and out of registers: tiles must be smaller then."""
    return dtype == torch.float32 and precision == "ieee"


@cache
def forward_tile(N: int, C: int, K: int, exact: bool) -> Tile:
    """The launch of the forward kernel: 64 × 64 products, few enough that maps of 16 × 16 pixels fill a GPU."""
    block_n, block_o = _block(N, 64), _block(K, 64)
    if exact:
        return Tile(block_n, block_o, 16, _exact_warps(block_n * block_o), num_stages=2)
    return Tile(block_n, block_o, _block(C, 32), num_warps=4, num_stages=3)


@cache
def backward_x_tile(N: int, C: int, K: int, exact: bool) -> Tile:
    """The launch of the kernel of dx, which holds whole rows of z: 32 float32 per thread, 64 at 1024 channels."""
    block_c = _block(C, 1024)
    block_n = _block(N, max(16, min(32 if exact else 64, 8192 // block_c)))
    if exact:
        return Tile(block_n, 16, block_c, _exact_warps(block_n * block_c), num_stages=2)
    num_warps = 8 if block_n * block_c > 4096 else 4
    # Tiles of the weight are in shared memory, of which some GPUs give a program 99 KiB: 16 outputs of wide rows.
    return Tile(block_n, _block(K, 16 if block_c > 512 else 32), block_c, num_warps, num_stages=2)


@cache
def backward_weight_tile(N: int, C: int, K: int, exact: bool) -> Tile:
    """The launch of the kernel of the weight's gradient."""
    block_o, block_c = _block(K, 64), _block(C, 64)
    if exact:
        return Tile(16, block_o, block_c, _exact_warps(block_o * block_c), num_stages=2)
    return Tile(_block(N, 32), block_o, block_c, num_warps=4, num_stages=3)


def parameters_blocks(C: int, interpreted: bool = False) -> dict[str, int]:
    """The blocks of norm_linear_bwd_parameters_kernel, a constant on a GPU: no size compiles it again.

    64 KB of sums are on their way at a time. Eight channels are the 32 bytes that memory hands out at once.
    """
    if interpreted:
        return {"BLOCK_K": 16, "BLOCK_O": 64, "BLOCK_C": min(1024, triton_launch.next_power_of_2(C)), "num_warps": 1}
    return {"BLOCK_K": 16, "BLOCK_O": 128, "BLOCK_C": 8, "num_warps": 8}


def _exact_warps(elements: int) -> int:
    """Warps for a tile of float32 sums without tensor cores: 16 of them per thread."""
    return max(1, min(16, elements // 512))


@cache
def tiles_per_chunk(N: int, C: int, K: int, tile: Tile) -> int:
    """Tiles of pixels that one program of the weight's gradient adds up, at least two.

    With the tiles of (K, C) these are up to 512 programs, which an H100 with four per multiprocessor runs at once. If
    that left a program fewer than 16 tiles, whose sums are a fifth of what it reads, there are half as many.
    """
    columns = triton_launch.ceil_div(K, tile.block_o) * triton_launch.ceil_div(C, tile.block_c)
    rows = triton_launch.ceil_div(N, tile.block_n)
    tiles = triton_launch.ceil_div(rows, max(1, 512 // columns))
    if tiles < 16:
        tiles = min(16, triton_launch.next_power_of_2(triton_launch.ceil_div(rows, max(1, 256 // columns))))
    return max(2, tiles)


def norm_linear(
    x: torch.Tensor,  # (B, C, H, W), channels-last or contiguous
    gain: torch.Tensor,  # C elements
    weight: torch.Tensor,  # (K, C, 1, 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, K, H, W) in the memory format of x, and √C / max(‖x‖₂, 1e-12) of every pixel, (B, H·W) float32."""
    out, factors = empty_outputs(x, weight.shape[0])
    _launch_forward(x, gain.contiguous(), weight, None, None, out, factors)
    return out, factors


def linear_residual(
    x: torch.Tensor,  # (B, C, H, W), channels-last or contiguous
    weight: torch.Tensor,  # (K, C, 1, 1)
    bias: torch.Tensor,  # (K,)
    residual: torch.Tensor,  # (B, K, H, W)
    scale: float,
) -> torch.Tensor:
    """The same product without the norm, plus bias and residual, times scale: (B, K, H, W), laid out as x."""
    out = empty_outputs(x, weight.shape[0])[0]
    _launch_forward(x, None, weight, bias.contiguous(), _laid_out_for(x, residual), out, None, scale)
    return out


def linear_residual_gradients(
    grad: torch.Tensor,  # (B, K, H, W)
    grad2: torch.Tensor | None,
    grad3: torch.Tensor | None,
    weight: torch.Tensor,  # (K, C, 1, 1)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `product_gradients`."""
    return product_gradients(grad, grad2, grad3, weight.reshape(weight.shape[:2]), 1)


def _launch_forward(x, gain, weight, bias, residual, out, factors, scale=1.0) -> None:
    K, C = weight.shape[:2]
    B, N = _rows(x)
    precision = triton_launch.convolution_precision()
    tile = forward_tile(_pixels(x), C, K, exact_products(x.dtype, precision))
    tiles_n, tiles_o = triton_launch.ceil_div(N, tile.block_n), triton_launch.ceil_div(K, tile.block_o)
    with torch.cuda.device_of(x):
        norm_linear_fwd_kernel[(B * tiles_n * tiles_o,)](
            x, gain, weight.reshape(K, C).contiguous(), bias, residual, out, factors, N, C, K, tiles_n, tiles_o, C**0.5,
            scale, *_strides(x, N), *_strides(out, N), PRECISION=precision,
            TILES_C=triton_launch.ceil_div(C, tile.block_c), **tile.constants,
        )  # fmt: skip


def norm_linear_backward(
    grad: torch.Tensor,  # (B, K, H, W)
    x: torch.Tensor,
    factors: torch.Tensor,  # (B, H·W) float32
    gain: torch.Tensor,
    weight: torch.Tensor,
    added: torch.Tensor | None = None,  # (B, C, H, W)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, to which `added` is added, gain and weight, each of its argument's shape and dtype."""
    K, C = weight.shape[:2]
    grad, added = _laid_out_for(x, grad), None if added is None else _laid_out_for(x, added)
    dx = torch.empty_like(x)
    B, N = _rows(x)
    gain_row, weight_rows = gain.contiguous(), weight.reshape(K, C).contiguous()
    strides = (*_strides(x, N), *_strides(grad, N))
    precision = triton_launch.convolution_precision()
    exact = exact_products(x.dtype, precision)
    tile, sum_tile = backward_x_tile(_pixels(x), C, K, exact), backward_weight_tile(N, C, K, exact)
    tiles_n = triton_launch.ceil_div(N, tile.block_n)
    tiles = tiles_per_chunk(N, C, K, sum_tile)
    chunks = triton_launch.ceil_div(N, sum_tile.block_n * tiles)
    tiles_o, tiles_c = triton_launch.ceil_div(K, sum_tile.block_o), triton_launch.ceil_div(C, sum_tile.block_c)
    sums = x.new_empty((B * chunks, K, C), dtype=torch.float32)
    dgain, dweight = gain.new_empty(gain.shape), weight.new_empty(weight.shape)
    with torch.cuda.device_of(x):
        norm_linear_bwd_x_kernel[(B * tiles_n,)](
            grad, x, dx, factors, gain_row, weight_rows, added, N, C, K, tiles_n, C**0.5, *strides,
            PRECISION=precision, TILES_O=triton_launch.ceil_div(K, tile.block_o), **tile.constants,
        )  # fmt: skip
        norm_linear_bwd_weight_kernel[(B * chunks * tiles_o * tiles_c,)](
            grad, x, factors, sums, N, C, K, chunks, tiles, tiles_o, tiles_c, *strides,
            PRECISION=precision, **sum_tile.constants,
        )  # fmt: skip
        blocks = parameters_blocks(C, triton_launch.interpreted())
        norm_linear_bwd_parameters_kernel[(triton_launch.ceil_div(C, blocks["BLOCK_C"]),)](
            sums, gain_row, weight_rows, dgain, dweight, K, C, B * chunks, **blocks
        )
    return dx, dgain, dweight


norm_linear_beside_backward = norm_linear_backward  # with `added`


def empty_outputs(x: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of `norm_linear`, not yet written."""
    B, _, H, W = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((B, K, H, W), dtype=x.dtype, device=x.device, memory_format=memory_format)
    return out, x.new_empty(B, H * W, dtype=torch.float32)


def _rows(x: torch.Tensor) -> tuple[int, int]:
    """Samples, and rows of each: channels-last maps are one sample with the pixels of all."""
    B, _, H, W = x.shape
    return (1, B * H * W) if x.is_contiguous(memory_format=torch.channels_last) else (B, H * W)


def _pixels(x: torch.Tensor) -> int:
    """Pixels of one sample. They choose the tiles of rows, so a sample's results do not depend on the batch."""
    return x.shape[2] * x.shape[3]


def _strides(x: torch.Tensor, N: int) -> tuple[int, int, int]:
    """Strides of sample, channel and row for what `_rows` says."""
    C = x.shape[1]
    return (C * N, 1, C) if x.is_contiguous(memory_format=torch.channels_last) else (C * N, N, 1)


def _laid_out_for(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Maps in the memory format of x: themselves, or a copy."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return maps.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


triton_launch.hash_functions(globals())
