"""What the kernels do with tiles: the columns of heads, rows of maps and matrices, the norm of x."""

from __future__ import annotations

import triton
import triton.language as tl

from ddpm_fast.ops.linear_attention.triton_tile import SMALLEST_NORM, load, load_matrix
from ddpm_fast.runtime import triton_launch

# Sizes for which nothing is compiled again.
ANY_SIZE = ["N", "chunks", "tiles", "programs"]


@triton.jit
def columns_of_heads(i_group, HEADS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """GROUP heads side by side, BLOCK_D columns each: row of a (HD, …) matrix, whether it exists, is below D."""
    o_j = tl.arange(0, GROUP * BLOCK_D)
    o_head, o_d = i_group * GROUP + o_j // BLOCK_D, o_j % BLOCK_D
    return o_head * D + o_d, (o_head < HEADS) & (o_d < D), o_d < D


@triton.jit
def load_folded(weight_ptr, gain_ptr, o_j, m_j, o_c, m_c, C):
    """Some rows of weight_qkv·gain_in, float32."""
    return load_matrix(weight_ptr, o_j, m_j, o_c, m_c, C).to(tl.float32) * load(gain_ptr, o_c, m_c)[None, :]


@triton.jit
def load_rows(x_ptr, o_n, m_n, o_c, m_c, C):
    """Rows of a map, in its dtype."""
    return tl.load(x_ptr + o_n[:, None] * C + o_c[None, :], mask=m_n[:, None] & m_c[None, :], other=0.0)


@triton.jit
def normed(b_x, root_c):
    """x̂ in float32, and √C / max(‖x‖₂, 1e-12), of rows of x."""
    b_x = b_x.to(tl.float32)
    # Both correctly rounded, as in norm_linear.
    b_factor = tl.div_rn(root_c, tl.maximum(tl.sqrt_rn(tl.sum(b_x * b_x, axis=1)), SMALLEST_NORM))
    return b_x * b_factor[:, None], b_factor


triton_launch.hash_functions(globals())
