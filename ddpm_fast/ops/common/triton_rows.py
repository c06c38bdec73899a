"""Tiles of matrices in Triton, and the gradients of convolutions whose outputs are products of rows of their map.

An output pixel p, of rows of R pixels, reads `window` rows of `width` numbers: of a 1×1 convolution its channels, of a
2×2 one of stride 2 the channels of two neighbours in each of two rows of the map. With the map as a matrix of such rows

    out_p = Σ_r weight_r·x_ρ(p, r) + bias      ρ(p, r) = p + R·((window − 1)·⌊p / R⌋ + r)

and, for an output with up to three readers, backward

    total = grad + grad2 + grad3      dx_ρ(p, r) = total_p·weight_r      dbias = Σ total over all pixels

in one pass, which writes `total` for the weight's gradient. Sums over pixels have two stages, tiles of pixels and then
the sum over tiles, without atomics. Maps are channels-last: rows of channels, one per pixel of the batch.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot_of_many
from ddpm_fast.runtime import triton_launch

# Numbers for which nothing is compiled again.
ANY_SIZE = ["R", "tiles_k", "tiles_c", "rows"]


@triton.jit
def row(pointer, i_row, stride):
    """Where a row of a matrix begins: a scalar of 64 bits, so that offsets from there have 32."""
    return pointer + i_row.to(tl.int64) * stride


@triton.jit
def load_tile(pointer, o_row, o_column, rows, columns, stride, FAR: tl.constexpr = False):
    """Some rows and columns of a matrix, 0 outside; rows that are FAR from the pointer have offsets of 64 bits."""
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    if FAR:
        return tl.load(pointer + o_row.to(tl.int64)[:, None] * stride + o_column[None, :], mask=mask, other=0.0)
    else:
        return tl.load(pointer + (o_row[:, None] * stride + o_column[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, value, o_row, o_column, rows, columns, stride):
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    tl.store(pointer + (o_row[:, None] * stride + o_column[None, :]), cast(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def sum_of_rows(pointer, o, rows, columns, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """Some columns of a matrix, added up over its rows."""
    b_sum = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    for start in range(0, rows, BLOCK_R):
        b_sum += load_tile(pointer, start + tl.arange(0, BLOCK_R), o, rows, columns, columns, FAR=True)
    return tl.sum(b_sum, axis=0)


@triton.jit
def rows_of_window(start, o_n, R, WINDOW: tl.constexpr):
    """ρ of pixels start + o_n at r = 0: that of the first one, and the others' from there."""
    if WINDOW == 1:
        return start, o_n
    else:
        i_row = start // R
        return start + R * i_row, o_n + R * ((start + o_n) // R - i_row)


@triton.jit
def _total_gradient(grad_ptr, grad2_ptr, grad3_ptr, o_n, o_k, rows, K):
    """The sum of the readers' gradients, rounded once."""
    b_total = load_tile(grad_ptr, o_n, o_k, rows, K, K)
    if grad2_ptr is not None:
        b_sum = b_total.to(tl.float32) + load_tile(grad2_ptr, o_n, o_k, rows, K, K).to(tl.float32)
        if grad3_ptr is not None:
            b_sum += load_tile(grad3_ptr, o_n, o_k, rows, K, K).to(tl.float32)
        b_total = cast(b_sum, grad_ptr.dtype.element_ty)
    return b_total


@triton.jit(do_not_specialize=ANY_SIZE)
def product_bwd_x_kernel(
    grad_ptr,  # (N, K); so are the others and total
    grad2_ptr,  # or None
    grad3_ptr,  # or None
    weight_ptr,  # (K, WINDOW·width)
    dx_ptr,  # (WINDOW·N, width)
    total_ptr,  # or None: without grad2
    sums_ptr,  # (pixels / BLOCK_N, K) float32: Σ total over a tile's pixels
    N, K, width, R, tiles_k, tiles_c,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pixels / BLOCK_N · WINDOW · tiles_c,): the programs of the same pixels follow each other.

    The first of them writes total and the sums.
    """
    i_part, i_n = tl.program_id(0) % (WINDOW * tiles_c), tl.program_id(0) // (WINDOW * tiles_c)
    i_r, start = i_part // tiles_c, i_n * BLOCK_N
    o_n, o_c = tl.arange(0, BLOCK_N), i_part % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    rows, summed = N - start, tl.where(i_part == 0, K, 0)
    grad_ptr = row(grad_ptr, start, K)
    if grad2_ptr is not None:
        grad2_ptr, total_ptr = row(grad2_ptr, start, K), row(total_ptr, start, K)
    if grad3_ptr is not None:
        grad3_ptr = row(grad3_ptr, start, K)
    b_dx = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for i_k in range(tiles_k):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        b_total = _total_gradient(grad_ptr, grad2_ptr, grad3_ptr, o_n, o_k, rows, K)
        b_weight = cast(load_tile(weight_ptr + i_r * width, o_k, o_c, K, width, WINDOW * width), b_total.dtype)
        b_dx = dot_of_many(b_total, b_weight, b_dx, PRECISION)
        if total_ptr is not None:
            store_tile(total_ptr, b_total, o_n, o_k, rows, summed, K)
        tl.store(row(sums_ptr, i_n, K) + o_k, tl.sum(b_total.to(tl.float32), axis=0), mask=o_k < summed)
    base, o_row = rows_of_window(start, o_n, R, WINDOW)
    dx_ptr = row(dx_ptr, base + i_r * R, width)
    mask = (o_n < rows)[:, None] & (o_c < width)[None, :]
    tl.store(dx_ptr + (o_row[:, None] * width + o_c[None, :]), cast(b_dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=ANY_SIZE)
def row_sums_kernel(sums_ptr, out_ptr, rows, columns, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the rows of (rows, columns) float32. Grid (columns / BLOCK,)."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_sum = sum_of_rows(sums_ptr, o, rows, columns, BLOCK_R, BLOCK)
    tl.store(out_ptr + o, cast(b_sum, out_ptr.dtype.element_ty), mask=o < columns)


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


def row_sums_blocks(interpreted: bool = False) -> dict[str, int]:
    """The blocks of row_sums_kernel, a constant on a GPU: few columns of a program, to read many rows at once."""
    return {"BLOCK_R": 16, "BLOCK": 512} if interpreted else {"BLOCK_R": 512, "BLOCK": 4}


def is_exact(x: torch.Tensor, precision: str) -> bool:
    """Whether products of a map are float32 ones."""
    return x.dtype == torch.float32 and precision == "ieee"


def product_gradients(
    grad: torch.Tensor,  # (B, K, H, W)
    grad2: torch.Tensor | None,  # of further readers of the output
    grad3: torch.Tensor | None,
    weight: torch.Tensor,  # (K, window·width): of each row of a pixel, its numbers
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, channels-last, the gradients' sum, empty where there is one, and its sum over all pixels, in grad's dtype."""
    (B, K, H, W), width = grad.shape, weight.shape[1] // window
    N, precision = B * H * W, triton_launch.convolution_precision()
    grads = [None if g is None else g.contiguous(memory_format=torch.channels_last) for g in (grad, grad2, grad3)]
    shape = (B, width // window, window * H, window * W)
    dx = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    total = grad.new_empty(0) if grad2 is None else torch.empty_like(grad, memory_format=torch.channels_last)
    dbias = grad.new_empty(K)
    tile = choose_tile(H * W, width, K, is_exact(grad, precision), names="NCK")
    tiles_n, tiles_c = triton_launch.ceil_div(N, tile["BLOCK_N"]), triton_launch.ceil_div(width, tile["BLOCK_C"])
    sums, blocks = grad.new_empty((tiles_n, K), dtype=torch.float32), row_sums_blocks(triton_launch.interpreted())
    with torch.cuda.device_of(grad):
        product_bwd_x_kernel[(tiles_n * window * tiles_c,)](
            *grads, weight.contiguous(), dx, None if grad2 is None else total, sums, N, K, width, W,
            triton_launch.ceil_div(K, tile["BLOCK_K"]), tiles_c, WINDOW=window, PRECISION=precision, **tile,
        )  # fmt: skip
        row_sums_kernel[(triton_launch.ceil_div(K, blocks["BLOCK"]),)](sums, dbias, tiles_n, K, **blocks)
    return dx, total, dbias


triton_launch.hash_functions(globals())
