"""Triton kernels of a residual's 1×1 convolution and the 1×1 convolution of a block's output as one.

With W (J, K) and b of the output's convolution, R (K, C) and r of the residual's, and a for the rest of the block:

    W·(a + R·h + r) + b = W·a + (W·R)·h + (W·r + b)

so that the residual's map of K channels is never made. Of the gradients M of W·R and m of W·r + b, and the sum P of the
gradient of W in W·a over chunks of pixels:

    dW = P + M·Rᵀ + m·rᵀ      dR = Wᵀ·M      dr = Wᵀ·m      db = m
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import cast, dot
from ddpm_fast.runtime import triton_launch


def blocks(sums: bool) -> dict[str, int]:
    """The blocks of a launch, 32 KB of whose sums are on their way at a time: no size compiles it again."""
    sizes = {"BLOCK_J": 16, "BLOCK_K": 16, "BLOCK_C": 64, "num_warps": 4}
    return sizes | ({"BLOCK_R": 512, "num_warps": 8} if sums else {})


@triton.jit
def _load(pointer, o_row, o_column, rows, columns):
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    return tl.load(pointer + o_row[:, None] * columns + o_column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, o_row, o_column, rows, columns):
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    value = cast(value, pointer.dtype.element_ty)
    tl.store(pointer + o_row[:, None] * columns + o_column[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["J"])
def output_weights_fwd_kernel(
    weight_ptr, bias_ptr,  # (J, K), (J,)
    res_weight_ptr, res_bias_ptr,  # (K, C), (K,)
    whole_ptr, whole_bias_ptr,  # (J, C), (J,) float32
    J, K, C,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (C / BLOCK_C,)."""
    o_j, o_c = tl.arange(0, BLOCK_J), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_whole = tl.zeros((BLOCK_J, BLOCK_C), tl.float32)
    b_bias = tl.load(bias_ptr + o_j, mask=o_j < J, other=0.0).to(tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_weight = _load(weight_ptr, o_j, o_k, J, K)
        b_whole = dot(b_weight, _load(res_weight_ptr, o_k, o_c, K, C), b_whole, "ieee")
        b_res_bias = tl.load(res_bias_ptr + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_bias += tl.sum(b_weight * b_res_bias[None, :], axis=1)
    _store(whole_ptr, b_whole, o_j, o_c, J, C)
    if tl.program_id(0) == 0:
        tl.store(whole_bias_ptr + o_j, b_bias, mask=o_j < J)


@triton.jit(do_not_specialize=["J", "chunks"])
def output_weights_bwd_kernel(
    products_ptr,  # (chunks, J, K) float32: P of chunks of pixels
    dwhole_ptr, dwhole_bias_ptr,  # (J, C), (J,) float32: M and m
    weight_ptr, res_weight_ptr, res_bias_ptr,  # as forward
    dweight_ptr, dbias_ptr, dres_weight_ptr, dres_bias_ptr,
    J, K, C, chunks,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (K / BLOCK_K,). It loops by `while`, since older interpreters cannot count up to an argument."""
    o_j, o_k = tl.arange(0, BLOCK_J), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_j, m_k = o_j < J, o_k < K
    b_weight = _load(weight_ptr, o_j, o_k, J, K)
    b_m = tl.load(dwhole_bias_ptr + o_j, mask=m_j, other=0.0)
    b_res_bias = tl.load(res_bias_ptr + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_dweight = b_m[:, None] * b_res_bias[None, :]
    i_j = 0
    while i_j < J:
        b_sum, start = tl.zeros((BLOCK_R, BLOCK_K), tl.float32), 0
        while start < chunks:
            o_r = start + tl.arange(0, BLOCK_R)
            o_products = (o_r.to(tl.int64) * J + i_j)[:, None] * K + o_k[None, :]
            b_sum += tl.load(products_ptr + o_products, mask=(o_r < chunks)[:, None] & m_k[None, :], other=0.0)
            start += BLOCK_R
        b_dweight += tl.where(o_j == i_j, 1.0, 0.0)[:, None] * tl.sum(b_sum, axis=0)[None, :]
        i_j += 1
    c_start = 0
    while c_start < C:
        o_c = c_start + tl.arange(0, BLOCK_C)
        b_dwhole = _load(dwhole_ptr, o_j, o_c, J, C)
        b_res_weight = _load(res_weight_ptr, o_k, o_c, K, C)
        b_dweight = dot(b_dwhole, tl.trans(b_res_weight), b_dweight, "ieee")
        _store(dres_weight_ptr, dot(tl.trans(b_weight), b_dwhole, None, "ieee"), o_k, o_c, K, C)
        c_start += BLOCK_C
    _store(dweight_ptr, b_dweight, o_j, o_k, J, K)
    b_dres_bias = tl.sum(b_weight * b_m[:, None], axis=0)
    tl.store(dres_bias_ptr + o_k, cast(b_dres_bias, dres_bias_ptr.dtype.element_ty), mask=m_k)
    if tl.program_id(0) == 0:
        tl.store(dbias_ptr + o_j, cast(b_m, dbias_ptr.dtype.element_ty), mask=m_j)


def output_weights(
    weight: torch.Tensor,  # (J, K, 1, 1), so are the others
    bias: torch.Tensor,  # (J,)
    res_weight: torch.Tensor,  # (K, C, 1, 1)
    res_bias: torch.Tensor,  # (K,)
) -> tuple[torch.Tensor, torch.Tensor]:
    """W·R (J, C, 1, 1) and W·r + b (J,), float32."""
    (J, K), C, constants = weight.shape[:2], res_weight.shape[1], blocks(sums=False)
    whole = weight.new_empty((J, C, 1, 1), dtype=torch.float32)
    whole_bias = weight.new_empty(J, dtype=torch.float32)
    with torch.cuda.device_of(weight):
        output_weights_fwd_kernel[(triton_launch.ceil_div(C, constants["BLOCK_C"]),)](
            *_rows(weight, bias, res_weight, res_bias), whole, whole_bias, J, K, C, **constants
        )
    return whole, whole_bias


def output_weights_gradients(
    products: torch.Tensor,  # (B, chunks, J, K) float32
    dwhole: torch.Tensor,  # (J, C, 1, 1) float32
    dwhole_bias: torch.Tensor,  # (J,) float32
    weight: torch.Tensor,
    bias: torch.Tensor,
    res_weight: torch.Tensor,
    res_bias: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of weight, bias, res_weight and res_bias, each laid out as its argument."""
    (J, K), C, constants = weight.shape[:2], res_weight.shape[1], blocks(sums=True)
    made = [torch.empty_like(tensor) for tensor in (weight, bias, res_weight, res_bias)]
    chunks = products.shape[0] * products.shape[1]
    with torch.cuda.device_of(weight):
        output_weights_bwd_kernel[(triton_launch.ceil_div(K, constants["BLOCK_K"]),)](
            products, *_rows(dwhole, dwhole_bias), *_rows(weight, res_weight, res_bias), *made, J, K, C, chunks,
            **constants,
        )  # fmt: skip
    return tuple(made)


def _rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Weights as matrices; a (K, C, 1, 1) tensor is one in either layout."""
    return [(tensor.reshape(tensor.shape[:2]) if tensor.dim() == 4 else tensor).contiguous() for tensor in tensors]


triton_launch.hash_functions(globals())
