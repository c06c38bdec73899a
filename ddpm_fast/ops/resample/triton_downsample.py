"""The Triton kernel of a 2×2 convolution of stride 2: a product of rows as in ops/common/triton_rows.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot_of_many
from ddpm_fast.ops.common.triton_rows import (
    ANY_SIZE,
    choose_tile,
    is_exact,
    load_tile,
    product_gradients,
    row,
    rows_of_window,
    store_tile,
)
from ddpm_fast.runtime import triton_launch


@triton.jit(do_not_specialize=ANY_SIZE)
def downsample_conv_fwd_kernel(
    x_ptr,  # (2·N, width), width being two pixels' channels
    weight_ptr,  # (K, 2·width)
    bias_ptr,  # (K,) or None
    out_ptr,  # (N, K)
    N, K, width, R, tiles_k, tiles_c,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (pixels / BLOCK_N · tiles_k,): programs of the same pixels follow each other, and read x from the cache."""
    i_k, start = tl.program_id(0) % tiles_k, tl.program_id(0) // tiles_k * BLOCK_N
    o_n, o_k = tl.arange(0, BLOCK_N), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = N - start
    base, o_row = rows_of_window(start, o_n, R, 2)
    x_ptr = row(x_ptr, base, width)
    b_out = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in range(2 * tiles_c):
        i_r, o_c = i // tiles_c, i % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
        o_x = (o_row + i_r * R)[:, None] * width + o_c[None, :]
        b_x = tl.load(x_ptr + o_x, mask=(o_n < rows)[:, None] & (o_c < width)[None, :], other=0.0)
        b_weight = cast(load_tile(weight_ptr + i_r * width, o_k, o_c, K, width, 2 * width), b_x.dtype)
        b_out = dot_of_many(b_x, tl.trans(b_weight), b_out, PRECISION)
    if bias_ptr is not None:
        b_out += tl.load(bias_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    store_tile(row(out_ptr, start, K), b_out, o_n, o_k, rows, K, K)


def downsample_conv(
    x: torch.Tensor,  # (B, C, H, W), channels-last, H and W even
    weight: torch.Tensor,  # (K, C, 2, 2)
    bias: torch.Tensor | None,  # (K,)
) -> torch.Tensor:
    """(B, K, H/2, W/2), channels-last."""
    (B, C, H, W), K = x.shape, weight.shape[0]
    H, W, width = H // 2, W // 2, 2 * C
    N, precision = B * H * W, triton_launch.convolution_precision()
    out = torch.empty((B, K, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tile = choose_tile(H * W, K, width, is_exact(x, precision), names="NKC")
    tiles_k, tiles_c = triton_launch.ceil_div(K, tile["BLOCK_K"]), triton_launch.ceil_div(width, tile["BLOCK_C"])
    with torch.cuda.device_of(x):
        downsample_conv_fwd_kernel[(triton_launch.ceil_div(N, tile["BLOCK_N"]) * tiles_k,)](
            x, _rows(weight).contiguous(), None if bias is None else bias.contiguous(), out, N, K, width, W, tiles_k,
            tiles_c, PRECISION=precision, **tile,
        )  # fmt: skip
    return out


def downsample_conv_gradients(
    grad: torch.Tensor,  # (B, K, H, W)
    grad2: torch.Tensor | None,
    grad3: torch.Tensor | None,
    weight: torch.Tensor,  # (K, C, 2, 2)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `product_gradients`."""
    return product_gradients(grad, grad2, grad3, _rows(weight), 2)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """(K, C, 2, 2) → (K, 4·C), its columns ordered (row, column, channel); no copy of a channels-last weight."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


triton_launch.hash_functions(globals())
