"""Resampling by 2 as one convolution of torch; it runs if no native code does."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ddpm_fast.ops.branches import and_branches, number_of_branches, several, with_branches
from ddpm_fast.ops.layout import weights_format
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.autocast import no_autocast
from ddpm_fast.runtime.dispatch import forced_backend, in_forward_mode, once_differentiable


def _window_sums_fake(x: torch.Tensor) -> torch.Tensor:
    A, B, side, _ = x.shape
    return x.new_empty((B, A, 7 - side, 7 - side)).contiguous(memory_format=torch.channels_last)


def _gradient_of_window_sums(_needs: Any, grad: torch.Tensor, _x: torch.Tensor) -> tuple[torch.Tensor]:
    return (_window_sums_by_triton.triton(grad),)  # the transposed sums are the sums of windows of the other size


_window_sums_by_triton = Operator(
    "window_sums",
    "Tensor x",
    returns="out",
    fake=_window_sums_fake,
    backward="grad, x",
    by_torch=("x", _gradient_of_window_sums),
    triton=f"{__package__}.triton",
)


def _runs_triton(weight: torch.Tensor) -> bool:
    return (
        triton_launch.why_not_triton(weight.device) is None
        and forced_backend() in (None, "triton")
        and weight.dtype != torch.float64
        and weight.numel() > 0
        and not in_forward_mode()
    )


_downsample_conv = Operator(
    "downsample_conv",
    "Tensor x, Tensor weight, Tensor? bias",
    returns="out",
    fake=lambda x, weight, **_: x.new_empty((x.shape[0], weight.shape[0], x.shape[2] // 2, x.shape[3] // 2)).contiguous(
        memory_format=torch.channels_last
    ),
    triton=f"{__package__}.triton_downsample",
)
_downsample_conv_gradients = Operator(
    "downsample_conv_gradients",
    "Tensor grad, Tensor? grad2, Tensor? grad3, Tensor weight",  # of the output's readers
    returns="dx, total, dbias",  # total: the gradients' sum, empty without grad2
    fake=lambda grad, grad2, weight, **_: (
        grad.new_empty((grad.shape[0], weight.shape[1], 2 * grad.shape[2], 2 * grad.shape[3])).contiguous(
            memory_format=torch.channels_last
        ),
        grad.new_empty(0) if grad2 is None else torch.empty_like(grad, memory_format=torch.channels_last),
        grad.new_empty(grad.shape[1]),
    ),
    triton=f"{__package__}.triton_downsample",
)


def downsample_conv_by_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A product of the pixels' channels by Triton; its backward adds the gradients of the output's branches."""
    bias = None if bias is None else bias.to(x.dtype)
    return with_branches(*_DownsampleConv.apply(x, weight.to(x.dtype), bias, number_of_branches()))


class _DownsampleConv(torch.autograd.Function):
    """Output, gradients of x and of bias by Triton, that of weight by torch's convolution."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, branches: int
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return and_branches(_downsample_conv.triton(x, weight, bias), branches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad, grad2, grad3 = several(gradients)
        if grad is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        dx, total, dbias = _downsample_conv_gradients.triton(grad, grad2, grad3, weight)
        dweight = None
        if ctx.needs_input_grad[1]:
            geometry = (None, (2, 2), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False))
            total = grad if grad2 is None else total
            dweight = torch.ops.aten.convolution_backward(total, x, weight, *geometry)[1]
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, None


def upsample_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, taps: torch.Tensor | None = None
) -> torch.Tensor:
    """See `ddpm_fast.ops.resample.op.upsample_conv`.

    Every output pixel sees 2×2 pixels of the small map, with taps that are sums of the 3×3 ones: along an axis, w0 and
    w1 + w2 at even positions, w0 + w1 and w2 at odd ones. A transposed 4×4 convolution of stride 2 is exactly that: 16
    taps instead of 36 per pixel of the small map, and no large map before the convolution. On one CPU thread it takes
    a third of the plain form's time, too.
    """
    with no_autocast(x.device.type):
        bias = None if bias is None else bias.to(x.dtype)
        if torch.is_grad_enabled() and not in_forward_mode():
            return _UpsampleConv.apply(x, weight.to(x.dtype), bias)
        taps = upsampling_taps(weight) if taps is None else taps
        return F.conv_transpose2d(x, taps.to(x.dtype), bias, stride=2, padding=1)


def downsample_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `ddpm_fast.ops.resample.op.downsample_conv`."""
    with no_autocast(x.device.type):
        return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride=2)


def upsampling_taps(weight: torch.Tensor) -> torch.Tensor:  # (K, C, 3, 3) -> (C, K, 4, 4)
    """Sums over the 2×2 windows of the zero-padded, mirrored weight: along an axis (w2, w1 + w2, w0 + w1, w0)."""
    if _runs_triton(weight):
        return _window_sums_by_triton.triton(weight)
    if weight.device.type == "cpu":
        # Sums as a product: torch pools planes as small as these one by one, thirty times slower.
        sums = weight.reshape(-1, 9) @ _window_sums(weight)
        return sums.reshape(*weight.shape[:2], 4, 4).transpose(0, 1)
    mirrored = weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=weights_format(weight.device))
    return F.avg_pool2d(mirrored, 2, stride=1, padding=1, divisor_override=1)


def _window_sums(weight: torch.Tensor) -> torch.Tensor:
    """(9, 16) zeros and ones: which of the 3×3 taps are summed into each of the 4×4."""
    axis = weight.new_tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
    return torch.kron(axis, axis)


class _UpsampleConv(torch.autograd.Function):
    """The transposed convolution. Backward computes the taps again: to keep them would take 1.8 weights.

    It is made of torch's operators and can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, upsampling_taps(weight), bias, stride=2, padding=1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        geometry = ((2, 2), (1, 1), (1, 1), True, (0, 0), 1)
        with no_autocast(grad.device.type):  # backward may run inside the caller's autocast
            dx, dtaps, dbias = torch.ops.aten.convolution_backward(
                grad, x, upsampling_taps(weight), (weight.shape[0],), *geometry, wanted
            )
            return dx, _gradient_of_taps(dtaps) if wanted[1] else None, dbias


def _gradient_of_taps(dtaps: torch.Tensor) -> torch.Tensor:  # (C, K, 4, 4) -> (K, C, 3, 3)
    """Each tap of the weight went into 2×2 sums."""
    if _runs_triton(dtaps):
        return _window_sums_by_triton.triton(dtaps)
    if dtaps.device.type == "cpu":
        sums = dtaps.reshape(-1, 16) @ _window_sums(dtaps).t()
        return sums.reshape(*dtaps.shape[:2], 3, 3).transpose(0, 1)
    return F.avg_pool2d(dtaps, 2, stride=1, divisor_override=1).flip(2, 3).transpose(0, 1)
