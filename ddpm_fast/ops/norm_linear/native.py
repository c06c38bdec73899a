"""The CPU's 1×1 convolutions: the operators of csrc/cpu/norm_linear_cpu.cpp, their registration and eligibility."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddpm_fast.ops.arguments import why_not_on_cpu

_library = torch.library.Library("ddpm_fast", "FRAGMENT")
for _schema in (
    "native_norm_linear(Tensor x, Tensor g, Tensor weight) -> (Tensor out, Tensor norms)",
    "native_norm_linear_backward(Tensor grad, Tensor x, Tensor norms, Tensor g, Tensor weight, bool want_x_or_g, "
    "bool want_weight) -> (Tensor dx, Tensor dg, Tensor dweight)",
    # One map, or two side by side, times the weight; what is not wanted of backward comes back empty.
    "native_linear(Tensor x, Tensor? second, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor",
    "native_linear_backward(Tensor grad, Tensor x, Tensor? second, Tensor weight, Tensor? bias, bool want_x, "
    "bool want_second, bool want_weight, bool want_bias) -> (Tensor dx, Tensor dsecond, Tensor dweight, Tensor dbias)",
    # (B, K) times each of (N, K), plus its bias, side by side. No gradients: `op.linears` has them.
    "native_linears(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _empty_output(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    B, _, H, W = x.shape
    shape = (B, weight.shape[0], H, W)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sums_like(tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    return tensor.new_empty(tensor.shape if wanted else 0)


def _map_like(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    return torch.empty_like(x) if wanted else x.new_empty(0)


def _refuse_second_derivative(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: the native kernel's gradient cannot be differentiated again (create_graph=True); "
            'use ddpm_fast.use_backend("reference") for second derivatives'
        )


@torch.library.register_fake("ddpm_fast::native_norm_linear", lib=_library)
def _norm_linear_fake(x, g, weight):
    B, _, H, W = x.shape
    return _empty_output(x, weight), x.new_empty((B, H * W), dtype=torch.float32)


@torch.library.register_fake("ddpm_fast::native_norm_linear_backward", lib=_library)
def _norm_linear_backward_fake(grad, x, norms, g, weight, want_x_or_g, want_weight):
    return _map_like(x, want_x_or_g), _sums_like(g, want_x_or_g), _sums_like(weight, want_weight)


def _norm_linear_context(ctx, inputs, output) -> None:
    x, g, weight = inputs
    ctx.save_for_backward(x, output[1], g, weight)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_linear_backward(ctx, grad, _):
    _refuse_second_derivative("norm_linear")
    if grad is None:
        return None, None, None
    needs_x, needs_g, needs_weight = ctx.needs_input_grad
    dx, dg, dweight = torch.ops.ddpm_fast.native_norm_linear_backward(
        grad, *ctx.saved_tensors, needs_x or needs_g, needs_weight
    )
    return dx if needs_x else None, dg if needs_g else None, dweight if needs_weight else None


torch.library.register_autograd(
    "ddpm_fast::native_norm_linear", _norm_linear_backward, setup_context=_norm_linear_context, lib=_library
)


@torch.library.register_fake("ddpm_fast::native_linear", lib=_library)
def _linear_fake(x, second, weight, bias, residual):
    return _empty_output(x, weight)


@torch.library.register_fake("ddpm_fast::native_linear_backward", lib=_library)
def _linear_backward_fake(grad, x, second, weight, bias, want_x, want_second, want_weight, want_bias):
    dsecond = _map_like(x, False) if second is None else _map_like(second, want_second)
    dbias = _sums_like(weight, False) if bias is None else _sums_like(bias, want_bias)
    return _map_like(x, want_x), dsecond, _sums_like(weight, want_weight), dbias


def _linear_context(ctx, inputs, output) -> None:
    x, second, weight, bias, residual = inputs
    ctx.save_for_backward(x, second, weight, bias)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _linear_backward(ctx, grad):
    _refuse_second_derivative("linear")
    *wanted, needs_residual = ctx.needs_input_grad
    gradients = torch.ops.ddpm_fast.native_linear_backward(grad, *ctx.saved_tensors, *wanted)
    gradients = [made if want else None for made, want in zip(gradients, wanted, strict=True)]
    return *gradients, grad.to(ctx.residual_dtype) if needs_residual else None


torch.library.register_autograd(
    "ddpm_fast::native_linear", _linear_backward, setup_context=_linear_context, lib=_library
)


@torch.library.register_fake("ddpm_fast::native_linears", lib=_library)
def _linears_fake(x, weights, biases):
    return x.new_empty((x.shape[0], sum(weight.shape[0] for weight in weights)))


def norm_linear(x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.ddpm_fast.native_norm_linear(x, g, weight)[0]


def linear_residual(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return torch.ops.ddpm_fast.native_linear(x, None, weight, bias, residual)


def linear(maps: tuple[torch.Tensor, ...], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.ddpm_fast.native_linear(maps[0], maps[1] if len(maps) == 2 else None, weight, bias, None)


def linears(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.ops.ddpm_fast.native_linears(x, weights, biases)


def linears_refuses(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> str | None:
    for tensor in (x, *weights, *biases):
        if tensor.dtype != torch.float32:
            return f"an argument is {tensor.dtype}, and the kernel is for torch.float32"
    return why_not_on_cpu({"x": x})


def norm_linear_refuses(x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> str | None:
    return why_not_on_cpu({"x": x, "g": g, "weight": weight}, maps=("x",))


def linear_residual_refuses(x, weight, bias, residual) -> str | None:
    return why_not_on_cpu({"x": x, "weight": weight, "bias": bias, "residual": residual}, maps=("x",))


def linear_refuses(maps: tuple[torch.Tensor, ...], weight: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    named = {f"x[{i}]" if len(maps) > 1 else "x": tensor for i, tensor in enumerate(maps)}
    if any(tensor.dtype != maps[0].dtype for tensor in maps):
        return f"the maps are {' and '.join(str(tensor.dtype) for tensor in maps)}, and native code takes one dtype"
    return why_not_on_cpu({**named, "weight": weight, "bias": bias}, maps=tuple(named))
