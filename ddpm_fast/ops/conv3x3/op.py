"""3×3 convolutions of stride 1 and padding 1: public function, registration, eligibility.

On the CPU, Winograd's F(4×4, 3×3) (Lavin & Gray 2016) with the interpolation points 0, ±1/√2, ±√2, ∞: a quarter of the
products of a direct convolution, at 1.5 to 2 times its rounding error. Elsewhere torch's convolution.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.conv3x3 import reference
from ddpm_fast.runtime.dispatch import Implementation, Op

_SMALLEST_SIDE = 3  # of maps for which a tile of 4×4 outputs pays

_library = torch.library.Library("ddpm_fast", "FRAGMENT")
for _schema in (
    "native_conv3x3(Tensor x, Tensor? beside, Tensor weight, Tensor? bias, Tensor? residual, bool upsampled) -> Tensor",
    # wanted: the gradients of the inputs, of weight, of bias; an empty tensor stands for one that is not.
    "native_conv3x3_backward(Tensor grad, Tensor x, Tensor? beside, Tensor weight, bool upsampled, bool[3] wanted)"
    " -> (Tensor dx, Tensor dbeside, Tensor dweight, Tensor dbias)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("ddpm_fast::native_conv3x3", lib=_library)
def _native_fake(x, beside, weight, bias, residual, upsampled):
    B, _, H, W = x.shape
    factor = 2 if upsampled else 1
    shape = (B, weight.shape[0], factor * H, factor * W)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("ddpm_fast::native_conv3x3_backward", lib=_library)
def _native_backward_fake(grad, x, beside, weight, upsampled, wanted):
    def map_like(t):
        return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)

    return (
        map_like(x) if wanted[0] else x.new_empty(0),
        map_like(beside) if wanted[0] and beside is not None else x.new_empty(0),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(weight.shape[0] if wanted[2] else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, beside, weight, bias, residual, upsampled = inputs
    ctx.save_for_backward(x, beside, weight)
    ctx.upsampled = upsampled
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "conv3x3: the native kernel's gradient cannot be differentiated again (create_graph=True); "
            'use ddpm_fast.use_backend("reference") for second derivatives'
        )
    x, beside, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = (needs[0] or needs[1], needs[2], needs[3])
    dx, dbeside, dweight, dbias = torch.ops.ddpm_fast.native_conv3x3_backward(
        grad, x, beside, weight, ctx.upsampled, wanted
    )
    return (
        dx if wanted[0] else None,
        dbeside if wanted[0] and beside is not None else None,
        dweight if wanted[1] else None,
        dbias.to(ctx.bias_dtype) if wanted[2] else None,
        grad.to(ctx.residual_dtype) if ctx.residual_dtype is not None else None,
        None,
    )


torch.library.register_autograd("ddpm_fast::native_conv3x3", _backward, setup_context=_setup_context, lib=_library)


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    beside: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    upsampled: bool = False,
) -> torch.Tensor:
    """A 3×3 convolution of stride 1 with zeros around the map.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). Channels-last runs natively on the CPU,
            where half types are computed in float32 and rounded once.
        weight: (K, C + C', 3, 3).
        bias: (K,).
        beside: (B, C', H, W), channels that follow those of x, as if the two were concatenated.
        residual: shape of the output, added to it.
        upsampled: every pixel of the input stands for 2×2 (nearest upsampling before the convolution); the large map is
            never built natively.

    Returns:
        (B, K, H, W), or (B, K, 2H, 2W) where upsampled, of the dtype and memory format of x. Gradients flow to every
        tensor.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    _check(x, weight, bias, beside, residual, upsampled)
    return _conv3x3_op(x, weight, bias, beside=beside, residual=residual, upsampled=upsampled)


def _check(x, weight, bias, beside, residual, upsampled) -> None:
    """The checks of every implementation."""
    given = {"x": x, "weight": weight, "bias": bias, "beside": beside, "residual": residual}
    check_tensors(given, optional=("bias", "beside", "residual"))
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    B, C, H, W = x.shape
    if beside is not None and (beside.dim() != 4 or (beside.shape[0], *beside.shape[2:]) != (B, H, W)):
        raise ValueError(f"beside must have shape ({B}, C, {H}, {W}), got {tuple(beside.shape)}")
    channels = C if beside is None else C + beside.shape[1]
    if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3):
        raise ValueError(f"weight must have shape (K, {channels}, 3, 3), got {tuple(weight.shape)}")
    K = weight.shape[0]
    if bias is not None and bias.shape != (K,):
        raise ValueError(f"bias must have shape ({K},), got {tuple(bias.shape)}")
    factor = 2 if upsampled else 1
    if residual is not None and residual.shape != (B, K, factor * H, factor * W):
        raise ValueError(f"residual must have shape {(B, K, factor * H, factor * W)}, got {tuple(residual.shape)}")


def _native(x, weight, bias, *, beside, residual, upsampled) -> torch.Tensor:
    return torch.ops.ddpm_fast.native_conv3x3.default(x, beside, weight, bias, residual, upsampled)


def _native_refuses(x, weight, bias, *, beside, residual, upsampled) -> str | None:
    given = {"x": x, "weight": weight, "bias": bias, "beside": beside, "residual": residual}
    return why_not_on_cpu(given, maps=("x",))


def _native_yields(x, weight, bias, *, beside, residual, upsampled) -> str | None:
    factor = 2 if upsampled else 1
    for name, size in (("H", factor * x.shape[2]), ("W", factor * x.shape[3])):
        if size < _SMALLEST_SIDE:
            return f"{name} = {size}: most of a 4×4 tile would lie outside, and torch's convolution is more accurate"
    return None


def _example(side: int):
    def example(device: torch.device) -> tuple[tuple, dict]:
        x = torch.zeros(1, 8, side, side, device=device).contiguous(memory_format=torch.channels_last)
        options = {"beside": None, "residual": None, "upsampled": False}
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
