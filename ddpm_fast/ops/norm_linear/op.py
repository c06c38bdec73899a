"""1×1 convolutions as matrix products: of an RMSNorm, with a residual, of two maps side by side. Public functions,
declarations, eligibility; native.py declares the CPU's operators.

    out = weight · (x / max(‖x‖₂, 1e-12) · gain · √C)   per pixel (Zhang & Sennrich 2019, in upstream's form)

Backward keeps x and one float per pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ddpm_fast.ops.arguments import check_tensors
from ddpm_fast.ops.branches import MOST_BRANCHES, and_branches, number_of_branches, several, with_branches
from ddpm_fast.ops.norm_linear import native, reference
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import Implementation, Op, once_differentiable

_LARGEST_ROW = 1024  # channels that the kernel of dx keeps in one program's registers
_LARGEST_EXACT_ROW = 512  # the same where float32 products use no tensor cores and take more registers
_LARGEST_ROWS = 2**31 - 2**16  # pixels that the kernels' 32-bit indices count


def _norm_linear_fake(x: torch.Tensor, weight: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
    from ddpm_fast.ops.norm_linear import triton as kernel

    return kernel.empty_outputs(x, weight.shape[0])


def _convolution_gradients(
    needs: Sequence[bool], grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of a convolution's input, weight and bias, those that are needed."""
    geometry = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1, needs)
    return torch.ops.aten.convolution_backward(grad, x, weight.to(x.dtype), (weight.shape[0],), *geometry)


def _linear_residual_gradients(
    needs: Sequence[bool], grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor | None, ...]:
    """Those of x, weight, bias and residual, those that are needed."""
    grad = grad if scale == 1.0 else grad * scale
    return *_convolution_gradients(needs[:3], grad, x, weight), grad


_norm_linear = Operator(
    "norm_linear",
    "Tensor x, Tensor gain, Tensor weight",
    returns="out, factors",
    fake=_norm_linear_fake,
    backward="grad, x, factors, gain, weight",
    gradients="x, gain, weight",
    triton=f"{__package__}.triton",
)
_norm_linear_beside_backward = Operator(
    "norm_linear_beside_backward",
    "Tensor grad, Tensor x, Tensor factors, Tensor gain, Tensor weight, Tensor added",
    returns="dx, dgain, dweight",
    fake=lambda x, gain, weight, **_: (torch.empty_like(x), gain.new_empty(gain.shape), weight.new_empty(weight.shape)),
    triton=f"{__package__}.triton",
)
_linear_residual = Operator(
    "linear_residual",
    "Tensor x, Tensor weight, Tensor bias, Tensor residual, float scale",
    returns="out",
    fake=lambda x, weight, **_: _norm_linear_fake(x, weight)[0],
    backward="grad, x, weight, scale",
    by_torch=("x, weight, bias, residual", _linear_residual_gradients),
    triton=f"{__package__}.triton",
)
# Of an output with branches.
_gradients_of_readers = Operator(
    "linear_residual_gradients",
    "Tensor grad, Tensor? grad2, Tensor? grad3, Tensor weight",
    returns="dx, total, dbias",  # total: the gradients' sum, empty without grad2
    fake=lambda grad, grad2, weight, **_: (
        _norm_linear_fake(grad.contiguous(memory_format=torch.channels_last), weight.transpose(0, 1))[0],
        grad.new_empty(0) if grad2 is None else torch.empty_like(grad, memory_format=torch.channels_last),
        grad.new_empty(grad.shape[1]),
    ),
    triton=f"{__package__}.triton",
)


def norm_linear(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A 1×1 convolution without bias of RMSNorm(x) over the channels.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). Channels-last is the fast layout,
            on CUDA contiguous runs as well; others run the reference.
        gain: the norm's gain, C elements in any shape; upstream's is (1, C, 1, 1).
        weight: (K, C, 1, 1). gain and weight may be float32 where x is a half type: their product is rounded once, to
            the dtype of x. Products of float32 are TF32 where torch's convolutions may use it
            (`torch.backends.cudnn.conv.fp32_precision`).

    Returns:
        (B, K, H, W) of the dtype and memory format of x. Gradients flow to everything, once: a second derivative is
        refused.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check({"x": x, "gain": gain, "weight": weight})
    C = x.shape[1]
    if gain.numel() != C:
        raise ValueError(f"gain must have {C} elements, one per channel of x, got shape {tuple(gain.shape)}")
    return _norm_linear_op(x, gain, weight)


def norm_linear_beside(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_linear` of arguments that fit, and x for its other reader, whose gradient the kernel of dx adds to its own.

    On channels-last maps where Triton runs; elsewhere autograd adds the gradients.
    """
    if x.requires_grad and torch.is_grad_enabled() and x.is_contiguous(memory_format=torch.channels_last):
        if _norm_linear_op.choose(x, gain, weight).name == "triton":
            return _NormLinearBeside.apply(x, gain, weight)
    return _norm_linear_op(x, gain, weight), x


class _NormLinearBeside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, factors = _norm_linear.triton(x, gain, weight)
        ctx.save_for_backward(x, factors, gain, weight)
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _norm_linear_beside_backward.triton(grad, *ctx.saved_tensors, added)


def linear_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, *, scale: float = 1.0
) -> torch.Tensor:
    """A 1×1 convolution of x plus a residual, times a number, in one pass.

    Args:
        x: (B, C, H, W), see `norm_linear`.
        weight: (K, C, 1, 1).
        bias: (K,).
        residual: (B, K, H, W), best laid out as x.
        scale: a factor of the whole sum; native code takes another pass for one that is not 1.

    Returns:
        (B, K, H, W) of the dtype and memory format of x. Gradients flow to everything but scale.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check({"x": x, "weight": weight, "bias": bias, "residual": residual})
    K = weight.shape[0]
    if bias.shape != (K,):
        raise ValueError(f"bias must have shape ({K},), got {tuple(bias.shape)}")
    expected = (x.shape[0], K, *x.shape[2:])
    if residual.shape != expected:
        raise ValueError(f"residual must have shape {expected}, got {tuple(residual.shape)}")
    if scale == 1.0 and number_of_branches() > 0 and x.dtype is weight.dtype is bias.dtype:
        if x.is_contiguous(memory_format=torch.channels_last):
            if _linear_residual_op.choose(x, weight, bias, residual, scale).name == "triton":
                return with_branches(*_ResidualWithBranches.apply(x, weight, bias, residual))
    return _linear_residual_op(x, weight, bias, residual, scale)


class _ResidualWithBranches(torch.autograd.Function):
    """The convolution plus the residual, and branches of the output, whose gradients the kernel of dx adds."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return and_branches(_linear_residual.triton(x, weight, bias, residual, 1.0), MOST_BRANCHES)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad, grad2, grad3 = several(gradients)
        if grad is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        dx, total, dbias = _gradients_of_readers.triton(grad, grad2, grad3, weight)
        total = grad if grad2 is None else total
        dweight = _convolution_gradients((False, True, False), total, x, weight)[1]
        return dx, dweight, dbias, total


def linear(
    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A 1×1 convolution of one map, or of two maps side by side that are never put together.

    Args:
        x: (B, C, H, W), see `norm_linear`, or two maps (B, C0, H, W) and (B, C1, H, W) with C = C0 + C1.
        weight: (K, C, 1, 1).
        bias: (K,).

    Returns:
        (B, K, H, W), of the dtype of x (of the wider one of two) and, where maps are all channels-last, channels-last.
        Gradients flow to everything; on the CPU once.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    maps = (x,) if isinstance(x, torch.Tensor) else tuple(x)
    if not 1 <= len(maps) <= 2:
        raise ValueError(f"x must be one map or two, got {len(maps)}")
    names = ("x",) if len(maps) == 1 else ("x[0]", "x[1]")
    given = dict(zip(names, maps, strict=True)) | {"weight": weight} | ({} if bias is None else {"bias": bias})
    _check_tensors(given)
    if len(maps) == 2 and (maps[0].shape[0], *maps[0].shape[2:]) != (maps[1].shape[0], *maps[1].shape[2:]):
        shapes = " and ".join(str(tuple(m.shape)) for m in maps)
        raise ValueError(f"the maps of x must agree in all but their channels, got {shapes}")
    _check_weight(weight, sum(m.shape[1] for m in maps))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    return _linear_op(maps, weight, bias)


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Several linear layers of one input, their outputs side by side.

    Args:
        x: (B, K), of a floating dtype.
        weights: (N_i, K) each, at least one.
        biases: (N_i,) each.

    Returns:
        (B, Σ N_i) of the dtype of x. Gradients flow to everything, once.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check_linears(x, weights, biases)
    return _Linears.apply(x, len(weights), *weights, *biases)


class _Linears(torch.autograd.Function):
    """The gradients of every implementation, made of torch's operators: they can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, count: int, *parameters: torch.Tensor) -> torch.Tensor:
        weights, biases = parameters[:count], parameters[count:]
        native.keep_linears(ctx, x, weights, biases)
        return _linears_op(x, weights, biases)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_x, _, *needs = ctx.needs_input_grad
        count = len(needs) // 2
        dx, dweights, dbiases = native.linears_gradients(ctx, grad, needs_x, needs[:count], needs[count:])
        return dx, None, *dweights, *dbiases


def _check_linears(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
    if len(weights) == 0 or len(weights) != len(biases):
        raise ValueError(f"weights and biases must be as many, at least one, got {len(weights)} and {len(biases)}")
    numbered = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    numbered |= {f"biases[{i}]": bias for i, bias in enumerate(biases)}
    check_tensors({"x": x, **numbered})
    if x.dim() != 2:
        raise ValueError(f"x must have shape (B, K), got {tuple(x.shape)}")
    for weight, bias in zip(weights, biases, strict=True):
        if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"weights must have shape (N, {x.shape[1]}), got {tuple(weight.shape)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"a bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check(given: dict[str, torch.Tensor]) -> None:
    """The checks of every implementation."""
    _check_tensors(given)
    _check_weight(given["weight"], given["x"].shape[1])


def _check_tensors(given: dict[str, torch.Tensor]) -> None:
    """Types, devices, and the dimensions of maps, whose names begin with x."""
    check_tensors(given)
    for name, tensor in given.items():
        if name.startswith("x") and tensor.dim() != 4:
            raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(tensor.shape)}")


def _check_weight(weight: torch.Tensor, C: int) -> None:
    if weight.dim() != 4 or weight.shape[1:] != (C, 1, 1):
        raise ValueError(f"weight must have shape (K, {C}, 1, 1), got {tuple(weight.shape)}")


def _triton(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _norm_linear.triton(x, gain, weight)[0]


def _triton_residual_refuses(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, scale: float
) -> str | None:
    return _triton_refuses(x, weight, bias, residual)


def _triton_refuses(x: torch.Tensor, *others: torch.Tensor) -> str | None:
    reason = triton_launch.why_not_triton(x.device)
    if reason is not None:
        return reason
    if any(tensor.dtype == torch.float64 for tensor in (x, *others)):
        return "an argument is torch.float64, and the kernels compute in float32"
    if any(tensor.numel() == 0 for tensor in (x, *others)):
        return "an argument is empty"
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return f"x is neither contiguous nor channels-last, its strides are {x.stride()}"
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if pixels > _LARGEST_ROWS:
        return f"x has {pixels} pixels, and the kernels count at most {_LARGEST_ROWS}"
    return None


def _triton_norm_refuses(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> str | None:
    largest = (
        _LARGEST_EXACT_ROW
        if x.dtype == torch.float32 and triton_launch.convolution_precision() == "ieee"
        else _LARGEST_ROW
    )
    reason = _triton_refuses(x, gain, weight)
    if reason is None and x.shape[1] > largest:
        return f"x has {x.shape[1]} channels, and a program of the kernels holds at most {largest} of {x.dtype}"
    return reason


def _map(device: torch.device, channels: int = 8) -> torch.Tensor:
    return torch.zeros(2, channels, 4, 4, device=device).contiguous(memory_format=torch.channels_last)


def _example(device: torch.device) -> tuple[tuple, dict]:
    gain = torch.zeros(8, device=device)
    return (_map(device), gain, torch.zeros(24, 8, 1, 1, device=device)), {}


def _residual_example(device: torch.device) -> tuple[tuple, dict]:
    x, bias = _map(device), torch.zeros(8, device=device)
    return (x, torch.zeros(8, 8, 1, 1, device=device), bias, x, 1.0), {}


def _linear_example(device: torch.device) -> tuple[tuple, dict]:
    weight, bias = torch.zeros(8, 12, 1, 1, device=device), torch.zeros(8, device=device)
    return ((_map(device), _map(device, 4)), weight, bias), {}


def _linears_example(device: torch.device) -> tuple[tuple, dict]:
    weights = (torch.zeros(8, 16, device=device), torch.zeros(12, 16, device=device))
    return (torch.zeros(2, 16, device=device), weights, tuple(weight[:, 0] for weight in weights)), {}


_norm_linear_op = Op(
    "norm_linear",
    [
        Implementation("triton", _triton, _triton_norm_refuses),
        Implementation("native", native.norm_linear, native.norm_linear_refuses),
        Implementation("reference", reference.norm_linear),
    ],
    _example,
)
_linear_residual_op = Op(
    "linear_residual",
    [
        Implementation("triton", _linear_residual.triton, _triton_residual_refuses),
        Implementation("native", native.linear_residual, native.linear_residual_refuses),
        Implementation("reference", reference.linear_residual),
    ],
    _residual_example,
)
_linear_op = Op(
    "linear",
    [
        Implementation("native", native.linear, native.linear_refuses),
        Implementation("reference", reference.linear),
    ],
    _linear_example,
)
_linears_op = Op(
    "linears",
    [
        Implementation("native", native.linears, native.linears_refuses),
        Implementation("reference", reference.linears),
    ],
    _linears_example,
)
