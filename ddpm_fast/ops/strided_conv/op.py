"""3×3 convolutions of stride 2: declaration, public function, eligibility.

On the CPU a matrix product of each output pixel's 3×3 inputs (csrc/cpu/kernels/strided_conv-inl.h). torch's convolution
multiplies as fast, but copies the weight into blocks of its own in every call, to memory that is fresh in every call:
natively few pixels with many channels are faster, forward and backward. Gradients that are differentiated again are
torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.operator import Operator
from ddpm_fast.ops.strided_conv import reference
from ddpm_fast.runtime.dispatch import Implementation, Op

# Output pixels up to which the native product is faster. Two threads of a Zen 4 against torch, times as fast: 128
# pixels of 256 channels 1.9, 512 of 256 1.2, 2,048 of 128 1.0, 4,096 of 64 channels 0.95.
_MOST_PIXELS = 2048


def _side(size: int, padding: int) -> int:
    """Of the output."""
    return (size + 2 * padding - 3) // 2 + 1


def _native_fake(x: torch.Tensor, weight: torch.Tensor, padding: int, **_: object) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[0], _side(x.shape[2], padding), _side(x.shape[3], padding))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_strided_conv_gradients = Operator(
    "strided_conv_gradients",
    "Tensor grad, Tensor x, Tensor weight, int padding, bool[3] needs",
    returns="dx, dweight, dbias",  # empty where they are not needed
    fake=lambda x, weight, needs, **_: (
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=torch.float32),
    ),
    native=True,
)


def _gradients(
    needs: Sequence[bool], grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, padding: int
) -> tuple[torch.Tensor | None, ...]:
    if not torch.is_grad_enabled() and _native_yields(x, weight, None, padding=padding) is None:
        grad = grad.contiguous(memory_format=torch.channels_last)
        made = _strided_conv_gradients.native(grad, x, weight, padding, list(needs))
        return tuple(gradient if needed else None for gradient, needed in zip(made, needs, strict=True))
    w, biases = weight.to(x.dtype), [weight.shape[0]]
    made = torch.ops.aten.convolution_backward(
        grad, x, w, biases, [2, 2], [padding, padding], [1, 1], False, [0, 0], 1, list(needs)
    )
    return tuple(gradient if needed else None for gradient, needed in zip(made, needs, strict=True))


_strided_conv = Operator(
    "strided_conv",
    "Tensor x, Tensor weight, Tensor? bias, int padding",
    returns="out",
    fake=_native_fake,
    backward="grad, x, weight, padding",
    by_torch=("x, weight, bias", _gradients),
    native=True,
)


def strided_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, padding: int = 1
) -> torch.Tensor:
    """A 3×3 convolution at every second pixel of every second row.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16, float64. Channels-last runs natively on the CPU, in float32.
        weight: (K, C, 3, 3).
        bias: (K,).
        padding: zeros on each side, 0 or 1.

    Returns:
        (B, K, (H + 2·padding - 3) // 2 + 1, the same of W) of the dtype of x. Gradients flow to every tensor, and can
        be differentiated again.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check(x, weight, bias, padding)
    return _strided_conv_op(x, weight, bias, padding=padding)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: int) -> None:
    """The checks of every implementation."""
    check_tensors({"x": x, "weight": weight, "bias": bias}, optional=("bias",))
    if padding not in (0, 1):
        raise ValueError(f"padding must be 0 or 1, got {padding}")
    if x.dim() != 4 or min(x.shape[2:]) + 2 * padding < 3:
        raise ValueError(f"x must have shape (B, C, H, W), H and W at least {3 - 2 * padding}, got {tuple(x.shape)}")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"weight must have shape (K, {x.shape[1]}, 3, 3), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, padding: int) -> torch.Tensor:
    return _strided_conv.native(x, weight, bias, padding)


def _native_refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, padding: int) -> str | None:
    return why_not_on_cpu({"x": x, "weight": weight, "bias": bias}, maps=("x",))


def _native_yields(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, padding: int) -> str | None:
    if x.dtype != torch.float32:
        return f"x is {x.dtype}, in which torch multiplies"
    pixels = x.shape[0] * _side(x.shape[2], padding) * _side(x.shape[3], padding)
    if pixels > _MOST_PIXELS:
        return f"the output has {pixels} pixels, and up to {_MOST_PIXELS} the native product is faster"
    return None


def _example(device: torch.device) -> tuple[tuple, dict]:
    x = torch.zeros(1, 8, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    return (x, torch.zeros(8, 8, 3, 3, device=device), None), {"padding": 1}


_strided_conv_op = Op(
    "strided_conv",
    [
        Implementation("native", _native, _native_refuses, _native_yields),
        Implementation("reference", reference.strided_conv),
    ],
    _example,
)
