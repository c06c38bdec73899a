"""3×3 convolutions of stride 1 and padding 1: declaration, public function, eligibility.

On the CPU, Winograd's F(4×4, 3×3) (Lavin & Gray 2016) with the interpolation points 0, ±1/√2, ±√2, ∞: a quarter of the
products of a direct convolution, at 1.5 to 2 times its rounding error. Elsewhere torch's convolution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.conv3x3 import reference
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime.dispatch import Implementation, Op

_SMALLEST_SIDE = 3  # of maps for which a tile of 4×4 outputs pays


def _native_fake(x: torch.Tensor, weight: torch.Tensor, upsampled: bool, **others: object) -> torch.Tensor:
    B, _, H, W = x.shape
    factor = 2 if upsampled else 1
    shape = (B, weight.shape[0], factor * H, factor * W)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_conv3x3 = Operator(
    "conv3x3",
    "Tensor x, Tensor? skip, Tensor weight, Tensor? bias, Tensor? residual, bool upsampled",
    returns="out",
    fake=_native_fake,
    backward="grad, x, skip, weight, upsampled, wanted",
    gradients="x, skip, weight, bias",
    maps="x, skip",
    rows={"bias": "weight"},
    passes="residual",
    wanted={"wanted": ("x, skip", "weight", "bias")},
    native=True,
)


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    skip: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    upsampled: bool = False,
) -> torch.Tensor:
    """A 3×3 convolution of stride 1 with zeros around the map.

    Winograd's transforms, on the CPU, mix the pixels of a tile of 4×4 outputs (8×8 where upsampled): a NaN or an
    infinity in x makes outputs in up to four tiles NaN, where in torch 3×3 (4×4) are not finite. Finite numbers beyond
    1e36 in x, weight or the output may overflow, for transforms multiply them by up to 20.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). Channels-last runs natively on the CPU,
            where half types are computed in float32 and rounded once.
        weight: (K, C + C', 3, 3).
        bias: (K,).
        skip: (B, C', H, W), channels that follow those of x, as if the two were concatenated.
        residual: shape of the output, added to it.
        upsampled: every pixel of the input becomes 2×2 (nearest upsampling before the convolution); the large map is
            never built natively.

    Returns:
        (B, K, H, W), or (B, K, 2H, 2W) where upsampled, of the dtype and memory format of x. Gradients flow to every
        tensor.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check(x, weight, bias, skip, residual, upsampled)
    return _conv3x3_op(x, weight, bias, skip=skip, residual=residual, upsampled=upsampled)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    residual: torch.Tensor | None,
    upsampled: bool,
) -> None:
    """The checks of every implementation."""
    given = {"x": x, "weight": weight, "bias": bias, "skip": skip, "residual": residual}
    check_tensors(given, optional=("bias", "skip", "residual"))
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    B, C, H, W = x.shape
    if skip is not None and (skip.dim() != 4 or (skip.shape[0], *skip.shape[2:]) != (B, H, W)):
        raise ValueError(f"skip must have shape ({B}, C, {H}, {W}), got {tuple(skip.shape)}")
    channels = C if skip is None else C + skip.shape[1]
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3):
        raise ValueError(f"weight must have shape (K, {channels}, 3, 3), got {tuple(weight.shape)}")
    K = weight.shape[0]
    if bias is not None and bias.shape != (K,):
        raise ValueError(f"bias must have shape ({K},), got {tuple(bias.shape)}")
    factor = 2 if upsampled else 1
    if residual is not None and residual.shape != (B, K, factor * H, factor * W):
        raise ValueError(f"residual must have shape {(B, K, factor * H, factor * W)}, got {tuple(residual.shape)}")


def _native(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    skip: torch.Tensor | None,
    residual: torch.Tensor | None,
    upsampled: bool,
) -> torch.Tensor:
    return _conv3x3.native(x, skip, weight, bias, residual, upsampled)


def _native_refuses(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    skip: torch.Tensor | None,
    residual: torch.Tensor | None,
    upsampled: bool,
) -> str | None:
    given = {"x": x, "weight": weight, "bias": bias, "skip": skip, "residual": residual}
    return why_not_on_cpu(given, maps=("x",))


def _native_yields(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    skip: torch.Tensor | None,
    residual: torch.Tensor | None,
    upsampled: bool,
) -> str | None:
    factor = 2 if upsampled else 1
    for name, size in (("H", factor * x.shape[2]), ("W", factor * x.shape[3])):
        if size < _SMALLEST_SIDE:
            return f"{name} = {size}: most of a 4×4 tile would be outside, and torch's convolution is more accurate"
    return None


def _example(side: int) -> Callable[[torch.device], tuple[tuple, dict]]:
    def example(device: torch.device) -> tuple[tuple, dict]:
        x = torch.zeros(1, 8, side, side, device=device).contiguous(memory_format=torch.channels_last)
        options = {"skip": None, "residual": None, "upsampled": False}
        return (x, torch.zeros(8, 8, 3, 3, device=device), None), options

    return example


_conv3x3_op = Op(
    "conv3x3",
    [
        Implementation("native", _native, _native_refuses, _native_yields),
        Implementation("reference", reference.conv3x3),
    ],
    _example(8),
    {"conv3x3, 2 × 2 map": _example(2)},
)
