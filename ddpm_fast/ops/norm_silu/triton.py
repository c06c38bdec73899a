"""Triton's side of norm_silu: the launches of its kernels.

A tile is BLOCK_N pixels of one sample times BLOCK_C channels. Feature maps are read through strides: channels-last is
the fast layout, contiguous works as well. Statistics and arithmetic are float32.

Everything per channel after the norm folds into one multiplication and one addition with

    slope = gain·(1 + scale)      intercept = offset·(1 + scale) + shift
    y = x̂·slope + intercept      out = dropout(SiLU(y)) + residual

so that all parameter gradients follow from sums over the pixels of each sample and channel, Σ dy, Σ dy·x̂ and, of the
bias, Σ dx. Sums are made in two stages, per chunk of pixels and then over chunks (norm_silu_bwd_rows_kernel), without
atomics. The second stage of both norms of a residual block is one launch, in the backward of the first.

GroupNorm reads a map once where the registers of a program hold all pixels of a group (`choose_groups`), as on maps of
32×32 and less: statistics and output, or sums and gradient, are one launch. On larger maps they are several.

The kernels are in files of their own: triton_rms.py, triton_group.py (groups of any size), triton_whole_group.py
(groups that a program holds), triton_rows.py (the second stage); triton_tile.py is what they share, launch.py chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from ddpm_fast.ops.norm_silu.launch import (
    group_blocks,
    most_registers,
    plan_of,
    rows_blocks,
    sizes_of,
    sums_shape,
    whole_plan_of,
)
from ddpm_fast.ops.norm_silu.triton_group import (
    group_means_kernel,
    group_merge_kernel,
    group_moments_kernel,
    group_norm_silu_bwd_kernel,
    group_norm_silu_fwd_kernel,
    group_norm_silu_sums_kernel,
)
from ddpm_fast.ops.norm_silu.triton_rms import rms_norm_silu_bwd_kernel, rms_norm_silu_fwd_kernel
from ddpm_fast.ops.norm_silu.triton_rows import norm_silu_bwd_rows_kernel
from ddpm_fast.ops.norm_silu.triton_whole_group import (
    whole_group_norm_silu_bwd_kernel,
    whole_group_norm_silu_fwd_kernel,
)
from ddpm_fast.runtime import triton_launch


def norm_silu(
    x: torch.Tensor,  # (B, C, H, W), channels-last or contiguous
    gain: torch.Tensor,  # C elements
    offset: torch.Tensor | None,  # (C,)
    bias: torch.Tensor | None,  # (C,), or (B, C) for GroupNorm
    scale: torch.Tensor | None,  # (B, C)
    shift: torch.Tensor | None,  # (B, C)
    residual: torch.Tensor | None,  # (B, C, H, W)
    seed: torch.Tensor | None,  # (1,) int64
    groups: int,
    eps: float,
    activation: bool,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the statistics for `norm_silu_backward`: factors (B, HW) for RMSNorm (groups = 0), else (B, G, 2)."""
    B, C, HW = sizes_of(x)
    out = torch.empty_like(x)
    rows = Rows(gain, offset, bias, scale, shift)
    residual = None if residual is None else _laid_out_like(x, residual)
    plan = plan_of(x, seed, activation, whole_rows=groups == 0, sums=False)
    tile, constants = plan.tile, plan.constants
    tiles = triton_launch.ceil_div(HW, tile.block_n)
    numbers = (*plan.strides, *rows.strides, *dropout_numbers(dropout_p))
    with torch.cuda.device_of(x):
        if groups == 0:
            statistics = x.new_empty(B, HW, dtype=torch.float32)
            rms_norm_silu_fwd_kernel[(B * tiles,)](
                x, out, statistics, rows.gain, rows.bias, rows.scale, rows.shift, residual, seed, HW, C, tiles,
                C**0.5, *numbers, **constants,
            )  # fmt: skip
            return out, statistics
        whole = whole_plan_of(x, groups, activation)
        if whole is not None:
            statistics = x.new_empty(B, groups, 2, dtype=torch.float32)
            whole_group_norm_silu_fwd_kernel[(whole.programs(B),)](
                x, out, statistics, rows.gain, rows.offset, rows.bias, rows.scale, rows.shift, residual, seed, HW, C,
                groups, eps, *whole.strides, *rows.strides, *dropout_numbers(dropout_p), **whole.constants,
                **rows.constants,
            )  # fmt: skip
            return out, statistics
        statistics = _group_statistics_of(x, rows, groups, eps)
        group_norm_silu_fwd_kernel[(B * tiles, triton_launch.ceil_div(C, tile.block_c))](
            x, out, statistics, rows.gain, rows.offset, rows.bias, rows.scale, rows.shift, residual, seed, HW, C,
            groups, tiles, *numbers, **constants, **rows.constants,
        )  # fmt: skip
        return out, statistics


def _group_statistics_of(x: torch.Tensor, rows: Rows, groups: int, eps: float) -> torch.Tensor:
    """(B, G, 2): mean and 1/√(variance + eps) of every group."""
    B, C, HW = sizes_of(x)
    plan = plan_of(x, None, False, whole_rows=False, sums=True)
    tile = plan.tile
    chunks = triton_launch.ceil_div(HW, tile.chunk)
    moments = x.new_empty(B, chunks, 2, C, dtype=torch.float32)
    group_moments_kernel[(B * chunks, triton_launch.ceil_div(C, tile.block_c))](
        x, moments, rows.bias, HW, C, chunks, *plan.strides,
        BLOCK_N=tile.block_n, BLOCK_C=tile.block_c, TILES=tile.tiles, num_warps=tile.num_warps, **rows.constants,
    )  # fmt: skip
    statistics = x.new_empty(B, groups, 2, dtype=torch.float32)
    group_merge_kernel[(B * groups,)](
        moments, statistics, HW, C, groups, chunks, eps, CHUNK=tile.chunk, **group_blocks(C // groups, chunks)
    )
    return statistics


def norm_silu_backward(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    statistics: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    groups: int,
    activation: bool,
    dropout_p: float,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, gain, offset, bias, scale, shift, each with its argument's dtype: None where that is None."""
    rows = Rows(gain, offset, bias, scale, shift)
    dx, sums = _gradient_of_map(grad, x, statistics, rows, seed, groups, activation, dropout_p)
    return dx, *gradients_of_rows(x, sums, rows)[:5]


def norm_silu_backward_beside(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    statistics: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    added: torch.Tensor,  # (B, C, H, W)
    groups: int,
    activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of GroupNorm: the gradient of x with `added` added to it, and those of gain and offset."""
    rows = Rows(gain, offset, None, None, None)
    dx, sums = _gradient_of_map(grad, x, statistics, rows, None, groups, activation, 0.0, added)
    dgain, doffset, *_ = gradients_of_rows(x, sums, rows)
    return dx, dgain, doffset  # type: ignore[return-value]


def norm_silu_backward_of_last(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    statistics: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    grad2: torch.Tensor | None,  # (B, C, H, W), as grad: of branches of the output
    grad3: torch.Tensor | None,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a norm with SiLU: the gradient of x, the sums that `norm_silu_backward_of_both` takes as `last_sums`, and the
    sum of the gradients of the output, empty where there is one."""
    rows, total = Rows(gain, offset, bias, None, None), x.new_empty(0)
    several: dict[str, torch.Tensor] = {}
    if grad2 is not None:
        total = torch.empty_like(x)
        several = {"grad2_ptr": _laid_out_like(x, grad2), "total_ptr": total}
        several |= {} if grad3 is None else {"grad3_ptr": _laid_out_like(x, grad3)}
    return *_gradient_of_map(grad, x, statistics, rows, None, groups, True, 0.0, several=several), total


def norm_silu_backward_of_both(
    grad: torch.Tensor,  # (B, C, H, W)
    x: torch.Tensor,
    statistics: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    seed: torch.Tensor | None,
    last_sums: torch.Tensor,  # (B, chunks, 2 or, with bias, 3, C) float32
    groups: int,
    dropout_p: float,
) -> tuple[torch.Tensor, ...]:
    """As `norm_silu_backward` with SiLU, then gradients of gain, offset and bias of a last norm, alike in shape and
    dtype; empty where there is no such argument."""
    rows = Rows(gain, offset, bias, scale, shift)
    dx, sums = _gradient_of_map(grad, x, statistics, rows, seed, groups, True, dropout_p)
    gradients = gradients_of_rows(x, sums, rows, last_sums)
    return dx, *(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _gradient_of_map(
    grad: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    rows: Rows,
    seed: torch.Tensor | None,
    groups: int,
    activation: bool,
    dropout_p: float,
    added: torch.Tensor | None = None,  # of GroupNorm alone: added to the gradient of x
    several: Mapping[str, torch.Tensor] = MappingProxyType({}),  # of branches of the output, see `load_gradient`
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of x, and (B, chunks, 2 or, with bias, 3, C) float32: Σ dy, Σ dy·x̂, Σ dx of chunks of pixels."""
    B, C, HW = sizes_of(x)
    dx = torch.empty_like(x)
    grad = _laid_out_like(x, grad)
    plan = plan_of(x, seed, activation, whole_rows=groups == 0, sums=True)
    tile, constants = plan.tile, plan.constants
    sums = x.new_empty(sums_shape(x, rows.bias, groups, dropout=seed is not None), dtype=torch.float32)
    chunks = sums.shape[1]
    numbers = (*plan.strides, *rows.strides, *dropout_numbers(dropout_p))
    with torch.cuda.device_of(x):
        if groups == 0:
            bound = triton_launch.register_bound(most_registers(seed is not None, branches=bool(several)))
            rms_norm_silu_bwd_kernel[(B * chunks,)](
                grad, x, dx, sums, statistics, rows.gain, rows.bias, *rows.scale_and_shift(x), seed, HW, C, chunks,
                C**0.5, *numbers, int(rows.scaled), **(constants | bound), **several,
            )  # fmt: skip
            return dx, sums
        added = None if added is None else _laid_out_like(x, added)
        whole = whole_plan_of(x, groups, activation)
        if whole is not None:
            # A group of one number has no gradient: its dy must be rounded as the mean is.
            fusion = {"enable_fp_fusion": False} if HW * C == groups else {}
            whole_group_norm_silu_bwd_kernel[(whole.programs(B),)](
                grad, x, dx, sums, statistics, rows.gain, rows.offset, rows.bias, rows.scale, rows.shift, seed, HW, C,
                groups, *whole.strides, *rows.strides, *dropout_numbers(dropout_p), **whole.constants,
                **rows.constants, **fusion, added_ptr=added, **several,
            )  # fmt: skip
            return dx, sums
        grid = (B * chunks, triton_launch.ceil_div(C, tile.block_c))
        inputs = (rows.gain, rows.offset, rows.bias, rows.scale, rows.shift, seed, HW, C, groups, chunks, *numbers)
        bound = triton_launch.register_bound(most_registers(seed is not None, writes_dx=False))
        constants = constants | rows.constants
        group_norm_silu_sums_kernel[grid](grad, x, sums, statistics, *inputs, **(constants | bound), **several)
        grad = several.get("total_ptr", grad)
        means = x.new_empty((B, 2, groups), dtype=torch.float32)
        group_means_kernel[(B * groups,)](
            sums, means, rows.gain, rows.bias, rows.scale, HW, C, groups, chunks, rows.strides[0],
            **group_blocks(C // groups, chunks),
        )  # fmt: skip
        constants |= triton_launch.register_bound(most_registers(seed is not None, added=added is not None))
        group_norm_silu_bwd_kernel[grid](
            grad, x, dx, sums, statistics, means, *inputs, **constants, added_ptr=added
        )  # fmt: skip
    return dx, sums


def gradients_of_rows(
    x: torch.Tensor, sums: torch.Tensor, rows: Rows, last_sums: torch.Tensor | None = None
) -> list[torch.Tensor | None]:
    """Of gain, offset, bias, scale, shift, then of gain, offset and bias of a last norm, None without `last_sums`."""
    B, chunks, _, C = sums.shape
    given = (rows.gain, rows.offset, rows.bias)
    *gradients, dscale, dshift = map(_empty_row, (*given, rows.scale, rows.shift))
    of_last = [None if last_sums is None else _empty_row(row) for row in given]
    blocks = rows_blocks(C, triton_launch.interpreted())
    programs = triton_launch.ceil_div(C, blocks["BLOCK_C"])
    scale, _ = rows.scale_and_shift(x)
    rest = (dscale, dshift) if rows.scaled else (scale, scale)
    norms, last_chunks = (1, 0) if last_sums is None else (2, last_sums.shape[1])
    with torch.cuda.device_of(sums):
        norm_silu_bwd_rows_kernel[(programs, norms)](
            sums, rows.gain, rows.offset, scale, *gradients, *rest, last_sums, *of_last, B, C, chunks,
            rows.strides[0], last_chunks, scaled=B if rows.scaled else 0, **blocks,
            BIAS_ROWS="BIAS_ROWS" in rows.constants,
        )  # fmt: skip
    return [*gradients, dscale, dshift, *of_last]


def _empty_row(row: torch.Tensor | None) -> torch.Tensor | None:
    return None if row is None else torch.empty_like(row, memory_format=torch.contiguous_format)


class Rows:
    """The arguments per channel as the kernels read them: channels side by side, rows of scale and shift anywhere."""

    def __init__(self, gain, offset, bias, scale, shift):
        self.gain = gain.contiguous()
        self.offset = None if offset is None else offset.contiguous()
        self.bias, self.constants = bias, {}  # what forward and backward take for rows of a bias: their stride
        if bias is not None and bias.dim() == 2:
            self.bias, self.constants["BIAS_ROWS"] = _side_by_side(bias)
        elif bias is not None:
            self.bias = bias.contiguous()
        self.scale, scale_stride = _side_by_side(scale)
        self.shift, shift_stride = _side_by_side(shift)
        self.strides = (scale_stride, shift_stride)
        self.scaled = scale is not None or shift is not None

    def scale_and_shift(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """For kernels that serve both norms of a block: where neither is there, a tensor of no elements for both."""
        if self.scaled:
            return self.scale, self.shift
        absent = x.new_empty(0)
        return absent, absent


def _side_by_side(rows: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """Rows with channels side by side, and their stride."""
    if rows is None:
        return None, 0
    stride, spacing = rows.stride()
    return (rows, stride) if spacing == 1 else (rows.contiguous(), rows.shape[1])


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """The smallest random word that keeps an element, and the factor of kept elements."""
    return round(dropout_p * 2**32), 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def _laid_out_like(x: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it has the strides of x, a copy that has them elsewhere."""
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)
