"""A large odd kernel on few channels, stride 1, zeros around: declaration, public function, eligibility.

On the CPU a matrix product per row of the padded map, where the inputs of one kernel row are contiguous
(csrc/cpu/kernels/stem_conv-inl.h). Elsewhere torch's convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.grad import conv2d_input

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.operator import Operator
from ddpm_fast.ops.stem_conv import reference
from ddpm_fast.runtime.dispatch import Implementation, Op

_MOST_CHANNELS = 16  # with more, a direct convolution's own blocks of channels are filled


def _native_fake(x: torch.Tensor, weight: torch.Tensor, **_: object) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _image_gradient(
    needs: Sequence[bool], grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor]:
    """Of x by torch: training needs no gradient of an image."""
    dx = conv2d_input(x.shape, weight.to(grad.dtype), grad, padding=weight.shape[2] // 2)
    return (dx.to(x.dtype),)


_stem_conv = Operator(
    "stem_conv",
    "Tensor x, Tensor weight, Tensor? bias",
    returns="out",
    fake=_native_fake,
    backward="grad, x, weight, want_bias",
    gradients="weight, bias",
    by_torch=("x", _image_gradient),
    rows={"bias": "weight"},
    wanted={"want_bias": "bias"},
    native=True,
)


def stem_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A convolution of stride 1 whose output is as large as its input.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). On the CPU half types are computed in
            float32 and rounded once.
        weight: (K, C, side, side), side odd.
        bias: (K,).

    Returns:
        (B, K, H, W) of the dtype of x, natively channels-last. Gradients flow to every tensor, once.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check(x, weight, bias)
    return _stem_conv_op(x, weight, bias)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """The checks of every implementation."""
    check_tensors({"x": x, "weight": weight, "bias": bias}, optional=("bias",))
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    shape, C = tuple(weight.shape), x.shape[1]
    if len(shape) != 4 or shape[1] != C or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"weight must have shape (K, {C}, side, side) with an odd side, got {shape}")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias must have shape ({shape[0]},), got {tuple(bias.shape)}")


def _native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _stem_conv.native(x, weight, bias)


def _native_refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    return why_not_on_cpu({"x": x, "weight": weight, "bias": bias})


def _native_yields(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    if x.shape[1] > _MOST_CHANNELS:
        return f"x has {x.shape[1]} channels, more than {_MOST_CHANNELS}: torch's convolution has blocks of them"
    return None


def _example(channels: int) -> Callable[[torch.device], tuple[tuple, dict]]:
    def example(device: torch.device) -> tuple[tuple, dict]:
        x = torch.zeros(1, channels, 8, 8, device=device)
        return (x, torch.zeros(8, channels, 7, 7, device=device), None), {}

    return example


_stem_conv_op = Op(
    "stem_conv",
    [
        Implementation("native", _native, _native_refuses, _native_yields),
        Implementation("reference", reference.stem_conv),
    ],
    _example(3),
    {"stem_conv, 32 channels": _example(32)},
)
