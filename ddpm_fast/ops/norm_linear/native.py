"""The CPU's 1×1 convolutions: declarations of the operators of csrc/cpu/ops/norm_linear.cpp, and eligibility."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ddpm_fast.ops.arguments import why_not_on_cpu
from ddpm_fast.ops.operator import Operator


def _empty_output(x: torch.Tensor, weight: torch.Tensor, **others: object) -> torch.Tensor:
    B, _, H, W = x.shape
    shape = (B, weight.shape[0], H, W)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _norm_linear_fake(x: torch.Tensor, weight: torch.Tensor, **others: object) -> tuple[torch.Tensor, torch.Tensor]:
    B, _, H, W = x.shape
    return _empty_output(x, weight), x.new_empty((B, H * W), dtype=torch.float32)


def _linears_fake(x: torch.Tensor, weights: Sequence[torch.Tensor], **_: object) -> torch.Tensor:
    return x.new_empty((x.shape[0], sum(weight.shape[0] for weight in weights)))


_norm_linear = Operator(
    "norm_linear",
    "Tensor x, Tensor gain, Tensor weight",
    returns="out, norms",
    fake=_norm_linear_fake,
    backward="grad, x, norms, gain, weight, want_x_or_gain, want_weight",
    gradients="x, gain, weight",
    wanted={"want_x_or_gain": "x, gain", "want_weight": "weight"},
    native=True,
)
_linear = Operator(
    "linear",
    # One map, or two side by side, times the weight.
    "Tensor x, Tensor? second, Tensor weight, Tensor? bias, Tensor? residual",
    returns="out",
    fake=_empty_output,
    backward="grad, x, second, weight, bias, want_x, want_second, want_weight, want_bias",
    gradients="x, second, weight, bias",
    maps="x, second",
    none_like={"bias": "weight"},
    passes="residual",
    wanted={"want_x": "x", "want_second": "second", "want_weight": "weight", "want_bias": "bias"},
    native=True,
)


def keep_linears(ctx: Any, x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
    """Keep x and the weights as they are; side by side they would take as much memory again."""
    ctx.save_for_backward(x, *weights)
    ctx.bias_dtypes = [bias.dtype for bias in biases]


def linears_gradients(
    ctx: Any, grad: torch.Tensor, needs_x: bool, needs_weights: Sequence[bool], needs_biases: Sequence[bool]
) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | None], Sequence[torch.Tensor | None]]:
    """dx, dweights, dbiases."""
    x, *weights = ctx.saved_tensors
    sizes = [weight.shape[0] for weight in weights]
    dx = _linears_data_gradient(grad, weights) if needs_x else None
    dweights: list[torch.Tensor | None] = [None] * len(weights)
    dbiases: list[torch.Tensor | None] = [None] * len(weights)
    if any(needs_weights):
        made = (grad.t() @ x).split(sizes)
        dweights = [part.to(weight.dtype) for part, weight in zip(made, weights, strict=True)]
    if any(needs_biases):
        dbiases = [part.to(dtype) for part, dtype in zip(grad.sum(0).split(sizes), ctx.bias_dtypes, strict=True)]
    return dx, dweights, dbiases


def _linears_data_gradient(grad: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """grad (B, Σ N_i) through the layers' weights (N_i, K), (B, K).

    On the CPU the copy of all weights side by side takes longer than products one by one. In half types their sum would
    be rounded after each.
    """
    if grad.device.type != "cpu" or grad.dtype != torch.float32:
        return grad @ torch.cat(tuple(weights)).to(grad.dtype)
    first, *others = zip(grad.split([weight.shape[0] for weight in weights], dim=1), weights, strict=True)
    dx = first[0] @ first[1].float()
    for part, weight in others:
        dx = torch.addmm(dx, part, weight.float())
    return dx


_linears = Operator(
    "linears",
    # (B, K) times each of (N, K), plus its bias, side by side.
    "Tensor x, Tensor[] weights, Tensor[] biases",
    returns="out",
    fake=_linears_fake,
    autograd=(
        lambda ctx, inputs, output: keep_linears(ctx, *inputs),
        lambda ctx, grad: linears_gradients(ctx, grad, *ctx.needs_input_grad),
    ),
    native=True,
)


def norm_linear(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _norm_linear.native(x, gain, weight)[0]


def linear_residual(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, scale: float
) -> torch.Tensor:
    out = _linear.native(x, None, weight, bias, residual)
    return out if scale == 1.0 else out * scale


def linear(maps: tuple[torch.Tensor, ...], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _linear.native(maps[0], maps[1] if len(maps) == 2 else None, weight, bias, None)


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    return _linears.native(x, weights, biases)


def linears_refuses(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> str | None:
    for tensor in (x, *weights, *biases):
        if tensor.dtype != torch.float32:
            return f"an argument is {tensor.dtype}, and the kernel is for torch.float32"
    return why_not_on_cpu({"x": x})


def norm_linear_refuses(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> str | None:
    return why_not_on_cpu({"x": x, "gain": gain, "weight": weight}, maps=("x",))


def linear_residual_refuses(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, scale: float
) -> str | None:
    return why_not_on_cpu({"x": x, "weight": weight, "bias": bias, "residual": residual}, maps=("x",))


def linear_refuses(maps: tuple[torch.Tensor, ...], weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    named = {f"x[{i}]" if len(maps) > 1 else "x": tensor for i, tensor in enumerate(maps)}
    if any(tensor.dtype != maps[0].dtype for tensor in maps):
        return f"the maps are {' and '.join(str(tensor.dtype) for tensor in maps)}, and native code takes one dtype"
    return why_not_on_cpu({**named, "weight": weight, "bias": bias}, maps=tuple(named))
