"""Triton kernels of a large odd convolution on few channels.

With T = side²·C taps, the patch of a pixel being the T numbers around it, zeros outside of the map:

    out = weight·patch + bias      dweight = totalᵀ·patches      dbias = Σ total      total = grad + grad2 + grad3

Patches are gathered number by number: rows of 3 channels are too narrow for wide loads. A tile of pixels is a part of a
row of one map, or a few whole rows. All maps are channels-last. The output is read by several ops, whose gradients are
added as they are read.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot, dot_of_many
from ddpm_fast.runtime import triton_launch

_PROGRAMS = 512  # of the weight's gradient, at least where there are as many tiles: some for every multiprocessor
_MOST_TAPS = 160  # of which a program holds the gradients of 64 outputs in registers
_REGISTERS = 128  # two programs of 8 warps per multiprocessor; without a bound Triton 3.6 takes 167 and more
# Numbers for which nothing is compiled again.
_ANY_SIZE = ["H", "W", "tiles", "tiles_n", "tiles_k", "tiles_t", "width"]


@triton.jit
def load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _place_of_tile(i_tile, H, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sample, first row and first column of a tile of pixels."""
    tiles_x, tiles_y = tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS)
    return i_tile // (tiles_x * tiles_y), i_tile // tiles_x % tiles_y * ROWS, i_tile % tiles_x * COLUMNS


@triton.jit
def _pixels_of_tile(i_b, y, x, H, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Place in the batch (int64) of the tile's first pixel, those of all from there, and whether they are inside."""
    o = tl.arange(0, ROWS * COLUMNS)
    o_y, o_x = o // COLUMNS, o % COLUMNS
    return (i_b.to(tl.int64) * H + y) * W + x, o_y * W + o_x, (y + o_y < H) & (x + o_x < W)


@triton.jit
def _patches(
    x_ptr, i_b, y, x, o_t, H, W,
    SIDE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some taps, counted in the order row, column, channel, of a tile's pixels: (pixels, taps), 0 outside.

    The tap after the last is 1, whose products are sums. Of pixels outside of the map, too, parts are inside.
    """
    o = tl.arange(0, ROWS * COLUMNS)
    o_y, o_x = o // COLUMNS, o % COLUMNS
    c, dy, dx = o_t % C, o_t // (SIDE * C) - SIDE // 2, o_t // C % SIDE - SIDE // 2
    # Seen as unsigned numbers, negative ones are too large.
    mask = ((x + o_x)[:, None] + dx[None, :]).to(tl.uint32, bitcast=True) < W.to(tl.uint32)
    if ROWS == 1:
        m_y = (y + dy).to(tl.uint32, bitcast=True) < H.to(tl.uint32)
        mask = mask & (m_y & (o_t < SIDE * SIDE * C))[None, :]
    else:
        mask = mask & (((y + o_y)[:, None] + dy[None, :]).to(tl.uint32, bitcast=True) < H.to(tl.uint32))
        mask = mask & (o_t < SIDE * SIDE * C)[None, :]
    # The tile's place is a scalar, the rest of the address 32 bits.
    x_ptr += ((i_b.to(tl.int64) * H + y) * W + x) * C
    pixels, taps = (o_y * W + o_x) * C, (dy * W + dx) * C + c
    other = cast((o_t == SIDE * SIDE * C).to(tl.float32), x_ptr.dtype.element_ty)[None, :]
    return tl.load(x_ptr + pixels[:, None] + taps[None, :], mask=mask, other=other)


@triton.jit(do_not_specialize=_ANY_SIZE)
def stem_conv_fwd_kernel(
    x_ptr,  # (B, H, W, C)
    weight_ptr,  # (K, side, side, C)
    bias_ptr,  # (K,) or None
    out_ptr,  # (B, H, W, K)
    H, W, K, tiles_k,
    SIDE: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, TILES_T: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of pixels · tiles_k,): programs of the same pixels follow each other."""
    i_b, y, x = _place_of_tile(tl.program_id(0) // tiles_k, H, W, ROWS, COLUMNS)
    o_k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    taps: tl.constexpr = SIDE * SIDE * C
    b_out = tl.zeros((ROWS * COLUMNS, BLOCK_K), tl.float32)
    for i_t in range(TILES_T):
        o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
        b_x = _patches(x_ptr, i_b, y, x, o_t, H, W, SIDE, C, ROWS, COLUMNS)
        m_weight = m_k[:, None] & (o_t < taps)[None, :]
        b_weight = tl.load(weight_ptr + o_k[:, None] * taps + o_t[None, :], mask=m_weight, other=0.0)
        b_out = dot(b_x, tl.trans(cast(b_weight, b_x.dtype)), b_out, "ieee")
    if bias_ptr is not None:
        b_out += load(bias_ptr, o_k, m_k)[None, :]
    first, o_n, m_n = _pixels_of_tile(i_b, y, x, H, W, ROWS, COLUMNS)
    b_out = cast(b_out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + first * K + (o_n[:, None] * K + o_k[None, :]), b_out, mask=m_n[:, None] & m_k[None, :])


@triton.jit
def total_gradient(grad_ptr, grad2_ptr, grad3_ptr, first, offsets, mask):
    """The sum of the readers' gradients, rounded once."""
    b_total = load(grad_ptr + first, offsets, mask)
    if grad2_ptr is not None:
        b_total += load(grad2_ptr + first, offsets, mask)
    if grad3_ptr is not None:
        b_total += load(grad3_ptr + first, offsets, mask)
    return cast(b_total, grad_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=_ANY_SIZE)
def stem_conv_bwd_weight_kernel(
    grad_ptr,  # (B, H, W, K); so are the others
    grad2_ptr,  # or None
    grad3_ptr,  # or None
    x_ptr,  # (B, H, W, C)
    sums_ptr,  # (chunks, K, side²·C + 1) float32: dweight and dbias over a chunk's pixels
    H, W, K, tiles, tiles_n, tiles_k, tiles_t, width,
    SIDE: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Grid (chunks · tiles_k · tiles_t,): a program has `width` taps, in a block and, unless 0, a smaller one."""
    i_chunk, i_part = tl.program_id(0) // (tiles_k * tiles_t), tl.program_id(0) % (tiles_k * tiles_t)
    i_k, i_t = i_part // tiles_t, i_part % tiles_t
    o_k, o_t = i_k * BLOCK_K + tl.arange(0, BLOCK_K), i_t * width + tl.arange(0, BLOCK_T)
    m_k = o_k < K
    taps: tl.constexpr = SIDE * SIDE * C + 1  # and the bias's
    b_dweight = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
    if BLOCK_REST > 0:
        o_rest = i_t * width + BLOCK_T + tl.arange(0, BLOCK_REST)
        b_rest = tl.zeros((BLOCK_K, BLOCK_REST), tl.float32)
    for i_tile in range(i_chunk * tiles, tl.minimum(i_chunk * tiles + tiles, tiles_n)):
        i_b, y, x = _place_of_tile(i_tile, H, W, ROWS, COLUMNS)
        first, o_n, m_n = _pixels_of_tile(i_b, y, x, H, W, ROWS, COLUMNS)
        o_grad, m_grad = o_n[:, None] * K + o_k[None, :], m_n[:, None] & m_k[None, :]
        b_total = total_gradient(grad_ptr, grad2_ptr, grad3_ptr, first * K, o_grad, m_grad)
        b_total = tl.trans(b_total)
        b_x = _patches(x_ptr, i_b, y, x, o_t, H, W, SIDE, C, ROWS, COLUMNS)
        b_dweight = dot_of_many(b_total, b_x, b_dweight, "ieee")
        if BLOCK_REST > 0:
            b_x = _patches(x_ptr, i_b, y, x, o_rest, H, W, SIDE, C, ROWS, COLUMNS)
            b_rest = dot_of_many(b_total, b_x, b_rest, "ieee")
    sums_ptr += i_chunk.to(tl.int64) * (K * taps)
    end = tl.minimum(i_t * width + width, taps)
    tl.store(sums_ptr + o_k[:, None] * taps + o_t[None, :], b_dweight, mask=m_k[:, None] & (o_t < end)[None, :])
    if BLOCK_REST > 0:
        m_rest = m_k[:, None] & (o_rest < end)[None, :]
        tl.store(sums_ptr + o_k[:, None] * taps + o_rest[None, :], b_rest, mask=m_rest)


@cache
def forward_tile(H: int, W: int, K: int, taps: int, exact: bool) -> dict[str, int]:
    """The launch of the forward kernel."""
    if exact:
        return {**_pixels(H, W, 32), "BLOCK_K": _block(K, 32), "BLOCK_T": 16, "num_warps": 2, "num_stages": 1}
    blocks = {"BLOCK_K": _block(K, 64), "BLOCK_T": _block(taps, 32)}
    return {**_pixels(H, W, 128), **blocks, **_options()}


@cache
def weight_tile(H: int, W: int, K: int, taps: int, exact: bool) -> tuple[dict[str, int], int]:
    """The launch of the weight's gradient, and taps per program, of which there is one more for the bias."""
    taps += 1
    width = triton_launch.ceil_div(taps, triton_launch.ceil_div(taps, 32 if exact else _MOST_TAPS))
    block = max(16, triton_launch.next_power_of_2(width + 1) // 2)
    rest = _block(width - block, block) if width > block else 0
    if rest == block:
        block, rest = 2 * block, 0
    blocks = {"BLOCK_T": block, "BLOCK_REST": rest}
    if exact:
        return {**_pixels(H, W, 16), "BLOCK_K": _block(K, 32), **blocks, "num_warps": 2, "num_stages": 1}, width
    return {**_pixels(H, W, 32), "BLOCK_K": _block(K, 64), **blocks, **_options()}, width


@cache
def tiles_of_pixels(B: int, H: int, W: int, rows: int, columns: int) -> int:
    """Tiles of pixels of a batch."""
    return B * triton_launch.ceil_div(H, rows) * triton_launch.ceil_div(W, columns)


@cache
def chunks_of_tiles(tiles_n: int, others: int) -> tuple[int, int]:
    """Tiles of pixels per chunk of the weight's gradient, of which `others` programs read each, and chunks."""
    tiles = triton_launch.ceil_div(tiles_n, max(1, _PROGRAMS // others))
    return tiles, triton_launch.ceil_div(tiles_n, tiles)


def _options() -> dict[str, int]:
    return {"num_warps": 8, "num_stages": 2, **triton_launch.register_bound(_REGISTERS)}


def _block(size: int, largest: int) -> int:
    """A tile's edge: the size to the next power of two, at least the 16 that tl.dot needs and at most `largest`."""
    return min(largest, max(16, triton_launch.next_power_of_2(size)))


def _pixels(H: int, W: int, most: int) -> dict[str, int]:
    """Edges of a tile of at least 16 pixels, whole rows where these are short."""
    columns = min(most, triton_launch.next_power_of_2(W))
    rows = min(most // columns, max(triton_launch.next_power_of_2(H), 16 // columns))
    return {"ROWS": rows, "COLUMNS": columns}


triton_launch.hash_functions(globals())
