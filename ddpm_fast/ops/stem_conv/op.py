"""A large odd kernel on few channels, stride 1, zeros around: public function, registration, eligibility.

On the CPU, products of rows of the padded map, in which what a row of the kernel sees of a pixel lies side by side
(csrc/cpu/simd/stem.h). Elsewhere torch's convolution.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.stem_conv import reference
from ddpm_fast.runtime.dispatch import Implementation, Op

_MOST_CHANNELS = 16  # with more, a direct convolution's own blocks of channels are filled

_library = torch.library.Library("ddpm_fast", "FRAGMENT")
for _schema in (
    "native_stem_conv(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "native_stem_conv_backward(Tensor grad, Tensor x, Tensor weight, bool want_bias) -> (Tensor dweight, Tensor dbias)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("ddpm_fast::native_stem_conv", lib=_library)
def _native_fake(x, weight, bias):
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("ddpm_fast::native_stem_conv_backward", lib=_library)
def _native_backward_fake(grad, x, weight, want_bias):
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0] if want_bias else 0, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "stem_conv: the native kernel's gradient cannot be differentiated again (create_graph=True); "
            'use ddpm_fast.use_backend("reference") for second derivatives'
        )
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    dx = dweight = dbias = None
    if needs_x:  # the gradient of an image, which training has no use for: torch's own
        padding = weight.shape[2] // 2
        taps = weight.to(grad.dtype)
        dx = torch.nn.grad.conv2d_input(x.shape, taps, grad, padding=padding).to(x.dtype)
    if needs_weight or needs_bias:
        dweight, dbias = torch.ops.ddpm_fast.native_stem_conv_backward(grad, x, weight, needs_bias)
    return dx, dweight if needs_weight else None, dbias.to(ctx.bias_dtype) if needs_bias else None


torch.library.register_autograd("ddpm_fast::native_stem_conv", _backward, setup_context=_setup_context, lib=_library)


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
        TypeError, ValueError: an argument is not what is said here.
    """
    _check(x, weight, bias)
    return _stem_conv_op(x, weight, bias)


def _check(x, weight, bias) -> None:
    """The checks of every implementation."""
    check_tensors({"x": x, "weight": weight, "bias": bias}, optional=("bias",))
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    shape, C = tuple(weight.shape), x.shape[1]
    if len(shape) != 4 or shape[1] != C or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"weight must have shape (K, {C}, side, side) with an odd side, got {shape}")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias must have shape ({shape[0]},), got {tuple(bias.shape)}")


def _native(x, weight, bias) -> torch.Tensor:
    return torch.ops.ddpm_fast.native_stem_conv.default(x, weight, bias)


def _native_refuses(x, weight, bias) -> str | None:
    return why_not_on_cpu({"x": x, "weight": weight, "bias": bias})


def _native_yields(x, weight, bias) -> str | None:
    if x.shape[1] > _MOST_CHANNELS:
        return f"x has {x.shape[1]} channels, more than {_MOST_CHANNELS}: torch's convolution has blocks of them"
    return None


def _example(channels: int):
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
