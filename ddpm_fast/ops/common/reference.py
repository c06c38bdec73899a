"""In plain torch: RMSNorm and a 1×1 convolution, specification and oracle of norm_linear and of the attention blocks;
images as a model sees them.

Backward recomputes the normed map, one elementwise pass, instead of keeping it; autograd keeps x anyway. The norm
computes in float32 or float64 and ignores autocast, so half types round once, before the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ddpm_fast.runtime.autocast import no_autocast


def norm_linear(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `ddpm_fast.ops.norm_linear.op.norm_linear`."""
    return _NormLinear.apply(x, gain, weight)


def linear_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """See `ddpm_fast.ops.norm_linear.op.linear_residual`."""
    with no_autocast(x.device.type):
        out = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype)) + residual
        return (out if scale == 1.0 else out * scale).to(x.dtype)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, gain, weight)
        with no_autocast(x.device.type):
            return _product(_matrix(weight, x), _times_gain(_normed(x)[0], gain).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With create_graph=True the gradients are functions of all tensors and can be differentiated again."""
        with no_autocast(grad.device.type):
            x, gain, weight = ctx.saved_tensors
            return _gradients(x, gain, weight, grad, ctx.needs_input_grad)


def _gradients(
    x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """Of x, gain and weight, those that are needed."""
    needs_x, needs_g, needs_weight = needs
    normed, factor, clamped = _normed(x)
    dx = dgain = dweight = None
    if needs_weight:
        h = _times_gain(normed, gain).to(x.dtype)
        dweight = torch.bmm(grad.flatten(2), h.flatten(2).transpose(1, 2)).sum(0)
        dweight = dweight.reshape(weight.shape).to(weight.dtype)
    if needs_x or needs_g:
        dh = _product(_matrix(weight, x).t(), grad)
    if needs_g:
        dgain = (dh * normed).sum((0, 2, 3)).reshape(gain.shape).to(gain.dtype)
    if needs_x:
        z = _times_gain(dh, gain)
        projection = (z * normed).mean(1, keepdim=True)
        # A clamped norm is a constant: nothing flows through it.
        dx = (torch.addcmul(z, normed, projection.masked_fill(clamped, 0), value=-1) * factor).to(x.dtype)
    return dx, dgain, dweight


def _matrix(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # (K, C, 1, 1) -> (K, C) in the dtype of x
    return weight.reshape(weight.shape[:2]).to(x.dtype)


def _product(matrix: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:  # (K, C), (B, C, H, W) -> (B, K, H, W)
    """The matrix times every pixel; the result has the layout of the maps."""
    B, _, H, W = maps.shape
    columns = maps.flatten(2)  # (B, C, N)
    matrix = matrix.expand(B, -1, -1)
    if maps.is_contiguous(memory_format=torch.channels_last):
        out = torch.bmm(columns.transpose(1, 2), matrix.transpose(1, 2)).transpose(1, 2)
    else:
        out = torch.bmm(matrix, columns)
    return out.unflatten(2, (H, W))


def _normed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x̂ = x·√C / n of every pixel, √C / n, and where n = max(‖x‖₂, 1e-12) is that bound; float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    factor = x.shape[1] ** 0.5 / norm.clamp_min(1e-12)
    return x * factor, factor, norm <= 1e-12


def _times_gain(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * gain.reshape(1, -1, 1, 1).to(torch.promote_types(x.dtype, torch.float32))


def prepared_images(
    x_start: torch.Tensor, normalize: bool, flip: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """x0 as the model sees it: 8-bit images divided by 255, mapped from [0, 1] to [−1, 1], flipped, each where asked.

    Args:
        x_start: (B, ...) uint8 or floating point.
        dtype: of the result where x_start is uint8 or `normalize` computes; else x_start stays as it is.
    """
    x = x_start
    if x.dtype == torch.uint8:
        x = x.to(dtype) / 255
    if normalize:
        x = x.to(dtype) * 2 - 1
    if flip is not None:
        x = torch.where((flip != 0).reshape(-1, *(1,) * (x.ndim - 1)), x.flip(-1), x)
    return x
