"""Resampling by 2 joined with its convolution: public functions, eligibility.

upsample_conv: nearest upsampling, then a 3×3 convolution
downsample_conv: pixel-unshuffle, then a 1×1 convolution, which is a 2×2 convolution of stride 2
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu, why_steps_come_first
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.norm_linear.op import linear
from ddpm_fast.ops.resample import composite
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import COMPOSITE, Implementation, Op

_LARGEST_ROWS = 2**31 - 2**16  # pixels that the kernels' 32-bit indices count


def upsample_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, taps: torch.Tensor | None = None
) -> torch.Tensor:
    """Nearest upsampling by 2 and a 3×3 convolution with zeros around, without the large map between them.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: not native). The native code takes channels-last.
        weight: (K, C, 3, 3).
        bias: (K,).
        taps: (C, K, 4, 4), `composite.upsampling_taps(weight)` where the caller keeps it; read without gradients only.

    Returns:
        (B, K, 2H, 2W) of the dtype and memory format of x. Gradients flow to x, weight and bias.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    _check(x, weight, bias, taps, (3, 3))
    if taps is not None and taps.shape != (weight.shape[1], weight.shape[0], 4, 4):
        raise ValueError(f"taps must have shape {(weight.shape[1], weight.shape[0], 4, 4)}, got {tuple(taps.shape)}")
    return unchecked_upsample_conv(x, weight, bias, taps=taps)


def downsample_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A 2×2 convolution of stride 2.

    Args:
        x: (B, C, H, W), see `upsample_conv`.
        weight: (K, C, 2, 2), best channels-last.
        bias: (K,).

    Returns:
        (B, K, H/2, W/2), rounded down, of the dtype and memory format of x. Gradients flow to every tensor.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    _check(x, weight, bias, None, (2, 2))
    return unchecked_downsample_conv(x, weight, bias)


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, taps: torch.Tensor | None, window: tuple[int, int]
) -> None:
    check_tensors({"x": x, "weight": weight, "bias": bias, "taps": taps}, optional=("bias", "taps"))
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    C = x.shape[1]
    if weight.dim() != 4 or weight.shape[1:] != (C, *window):
        raise ValueError(f"weight must have shape (K, {C}, {window[0]}, {window[1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _native_upsample(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, taps: torch.Tensor | None
) -> torch.Tensor:
    return conv3x3(x, weight, bias, upsampled=True)


def _native_upsample_refuses(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, taps: torch.Tensor | None
) -> str | None:
    return why_not_on_cpu({"x": x, "weight": weight, "bias": bias}, maps=("x",))


def _triton_downsample_refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    reason = triton_launch.why_not_triton(x.device)
    if reason is not None:
        return reason
    if torch.float64 in (x.dtype, weight.dtype):
        return "an argument is torch.float64, and the kernels compute in float32"
    if x.numel() == 0 or weight.numel() == 0:
        return "an argument is empty"
    if x.shape[2] % 2 or x.shape[3] % 2:
        return f"x is {x.shape[2]} × {x.shape[3]}, and the kernels take even sizes"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return f"x is not channels-last, its strides are {x.stride()}"
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return None if pixels <= _LARGEST_ROWS else f"x has {pixels} pixels, and the kernels count at most {_LARGEST_ROWS}"


def _native_downsample(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A matrix product of the four pixels' channels side by side."""
    K, C, _, _ = weight.shape
    return linear(_pixels_side_by_side(x), weight.permute(0, 2, 3, 1).reshape(K, 4 * C, 1, 1), bias)


def _native_downsample_refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    if x.shape[2] % 2 or x.shape[3] % 2:
        return f"x is {x.shape[2]} × {x.shape[3]}, and native code takes even sizes"
    return why_not_on_cpu({"x": x, "weight": weight, "bias": bias}, maps=("x",))


def _pixels_side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Channels of 2×2 pixels side by side, (row, column, channel): channels-last (B, C, H, W) → (B, 4·C, H/2, W/2)."""
    B, C, H, W = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2 * C)
    return rows.transpose(2, 3).reshape(B, H // 2, W // 2, 4 * C).permute(0, 3, 1, 2)


def _example(window: int) -> Callable[[torch.device], tuple[tuple, dict]]:
    def example(device: torch.device) -> tuple[tuple, dict]:
        x = torch.zeros(1, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
        return (x, torch.zeros(8, 8, window, window, device=device), None), {"taps": None} if window == 3 else {}

    return example


# Without the checks, for callers whose arguments fit by construction: a network's modules.
unchecked_upsample_conv = Op(
    "upsample_conv",
    [
        Implementation("native", _native_upsample, _native_upsample_refuses, why_steps_come_first),
        Implementation(COMPOSITE, composite.upsample_conv),
    ],
    _example(3),
)
unchecked_downsample_conv = Op(
    "downsample_conv",
    [
        Implementation("triton", composite.downsample_conv_by_triton, _triton_downsample_refuses, or_steps=True),
        Implementation("native", _native_downsample, _native_downsample_refuses, why_steps_come_first),
        Implementation(COMPOSITE, composite.downsample_conv),
    ],
    _example(2),
)
