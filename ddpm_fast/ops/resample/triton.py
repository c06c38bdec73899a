"""The Triton kernel of the taps of an upsampling convolution, and of their gradient: the same sums.

Along an axis of a 3×3 window the taps are (w2, w1 + w2, w0 + w1, w0), and the gradient of w_r is the sum over those
taps of which it is a term. Both are

    out_s = in_(2 − s) + in_(3 − s)      without the terms that do not exist
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast
from ddpm_fast.runtime import triton_launch


@triton.jit(do_not_specialize=["SIDE", "OUT_SIDE", "tiles_b"])
def window_sums_kernel(
    x_ptr,  # (A, SIDE, SIDE, B)
    out_ptr,  # (B, OUT_SIDE, OUT_SIDE, A)
    A, B, SIDE, OUT_SIDE, tiles_b,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (A / BLOCK · tiles_b, OUT_SIDE²)."""
    i_a, i_b = tl.program_id(0) // tiles_b, tl.program_id(0) % tiles_b
    row, column = tl.program_id(1) // OUT_SIDE, tl.program_id(1) % OUT_SIDE
    o_a, o_b = i_a * BLOCK + tl.arange(0, BLOCK), i_b * BLOCK + tl.arange(0, BLOCK)
    m_tile = (o_a < A)[:, None] & (o_b < B)[None, :]
    b_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in tl.static_range(4):
        in_row, in_column = 2 + i // 2 - row, 2 + i % 2 - column
        exists = (in_row >= 0) & (in_row < SIDE) & (in_column >= 0) & (in_column < SIDE)
        o_x = ((o_a[:, None] * SIDE + in_row) * SIDE + in_column) * B + o_b[None, :]
        b_sum += tl.load(x_ptr + o_x, mask=m_tile & exists, other=0.0).to(tl.float32)
    o_out = ((o_b[:, None] * OUT_SIDE + row) * OUT_SIDE + column) * A + o_a[None, :]
    # Triton 3.5 stores two bytes at a time where a mask was transposed.
    m_out = (o_b < B)[:, None] & (o_a < A)[None, :]
    tl.store(out_ptr + o_out, tl.trans(cast(b_sum, out_ptr.dtype.element_ty)), mask=m_out)


def window_sums(x: torch.Tensor) -> torch.Tensor:
    """(A, B, 3, 3) → (B, A, 4, 4), or (A, B, 4, 4) → (B, A, 3, 3), channels-last."""
    A, B, side, _ = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    shape = (B, A, 7 - side, 7 - side)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    block = 64
    tiles_b = triton_launch.ceil_div(B, block)
    with torch.cuda.device_of(x):
        window_sums_kernel[(triton_launch.ceil_div(A, block) * tiles_b, (7 - side) ** 2)](
            x, out, A, B, side, 7 - side, tiles_b, BLOCK=block, num_warps=4
        )
    return out


triton_launch.hash_functions(globals())
