"""The operators of norm_silu, and autograd of two norms that share a backward.

Backward keeps x and one (RMSNorm, per pixel) or two (GroupNorm, per group) floats, and computes the rest again.
"""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.ops.branches import and_branches, several
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import once_differentiable


def _fake(x: torch.Tensor, groups: int, **others: object) -> tuple[torch.Tensor, torch.Tensor]:
    B, _, H, W = x.shape
    return torch.empty_like(x), x.new_empty((B, groups, 2) if groups else (B, H * W), dtype=torch.float32)


norm_silu = Operator(
    "norm_silu",
    # groups = 0 is RMSNorm.
    "Tensor x, Tensor gain, Tensor? offset, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "Tensor? seed, int groups, float eps, bool activation, float dropout_p",
    returns="out, statistics",
    fake=_fake,
    backward="grad, x, statistics, gain, offset, bias, scale, shift, seed, groups, activation, dropout_p",
    gradients="x, gain, offset, bias, scale, shift",
    passes="residual",
    triton=f"{__package__}.triton",
    native=True,
    shapes={
        "x": "BCHW",
        "gain": "#C",
        "offset": "C",
        "bias": "C",
        "scale": "BC",
        "shift": "BC",
        "residual": "BCHW",
    },
)


def _sums_shape(x: torch.Tensor, bias: torch.Tensor | None, groups: int) -> tuple[int, ...]:
    from ddpm_fast.ops.norm_silu import launch  # not part of importing the package

    return launch.sums_shape(x, bias, groups)


def _fake_gradients_of_last(
    x: torch.Tensor, bias: torch.Tensor | None, grad2: torch.Tensor | None, groups: int, **others: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = x.new_empty(_sums_shape(x, bias, groups), dtype=torch.float32)
    return torch.empty_like(x), sums, x.new_empty(0) if grad2 is None else torch.empty_like(x)


def _fake_gradients_of_both(
    x: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    **others: object,
) -> tuple[torch.Tensor, ...]:
    rows = (gain, offset, bias, scale, shift, gain, offset, bias)
    made = [x.new_empty(0) if row is None else torch.empty(row.shape, dtype=row.dtype, device=x.device) for row in rows]
    return torch.empty_like(x), *made


# The two halves of the backward of two norms with SiLU, the last of which has no scale, shift and dropout: the first
# norm's half finishes the gradients of the parameters of both. See `first_norm_silu`.
gradients_of_last = Operator(
    "norm_silu_backward_of_last",
    # grad2, grad3: of branches of the output; total, the sum of all, is empty without them.
    "Tensor grad, Tensor x, Tensor statistics, Tensor gain, Tensor? offset, Tensor? bias, Tensor? grad2, "
    "Tensor? grad3, int groups",
    returns="dx, sums, total",
    fake=_fake_gradients_of_last,
    triton=f"{__package__}.triton",
)
gradients_of_both = Operator(
    "norm_silu_backward_of_both",
    "Tensor grad, Tensor x, Tensor statistics, Tensor gain, Tensor? offset, Tensor? bias, Tensor? scale, "
    "Tensor? shift, Tensor? seed, Tensor last_sums, int groups, float dropout_p",
    # Empty where there is no such argument.
    returns="dx, dgain, doffset, dbias, dscale, dshift, last_dgain, last_doffset, last_dbias",
    fake=_fake_gradients_of_both,
    triton=f"{__package__}.triton",
)
# The backward of GroupNorm whose input is also read beside it, see `group_norm_silu_beside`.
gradients_beside = Operator(
    "norm_silu_backward_beside",
    "Tensor grad, Tensor x, Tensor statistics, Tensor gain, Tensor offset, Tensor added, int groups, bool activation",
    returns="dx, dgain, doffset",
    fake=lambda x, gain, offset, **_: tuple(
        [torch.empty_like(x), *(torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (gain, offset))]
    ),
    triton=f"{__package__}.triton",
)


def _conv_sums_shapes(x: torch.Tensor, weight: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the partial sums over pixels that `norm_silu_conv_gradients` makes: of the norm, of the weight."""
    from ddpm_fast.ops.norm_silu import launch  # not part of importing the package

    (B, _, H, W), (J, C), interpreted = x.shape, weight.shape[:2], triton_launch.interpreted()
    chunks = triton_launch.ceil_div(int(H * W), launch.conv_chunk(int(H * W), int(C), interpreted))
    return (B, chunks, 3, C), (B, chunks, J, C)


# RMSNorm with SiLU and a 1×1 convolution to few channels, see `last_norm_silu_conv`.
norm_silu_conv = Operator(
    "norm_silu_conv",
    "Tensor x, Tensor gain, Tensor bias, Tensor residual, Tensor weight",
    returns="out, factors",
    fake=lambda x, residual, **_: (
        torch.empty_like(residual, memory_format=torch.channels_last),
        x.new_empty((x.shape[0], x.shape[2] * x.shape[3]), dtype=torch.float32),
    ),
    triton=f"{__package__}.triton_rms_conv",
)
conv_gradients = Operator(
    "norm_silu_conv_gradients",
    "Tensor grad, Tensor x, Tensor factors, Tensor gain, Tensor bias, Tensor weight",
    returns="dx, sums, products",
    fake=lambda x, weight, **_: (
        torch.empty_like(x),
        *(x.new_empty(shape, dtype=torch.float32) for shape in _conv_sums_shapes(x, weight)),
    ),
    triton=f"{__package__}.triton_rms_conv",
)


class FirstNorm(torch.autograd.Function):
    """See `first_norm_silu`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gain: torch.Tensor,
        offset: torch.Tensor | None,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        seed: torch.Tensor | None,
        last_gain: torch.Tensor,
        last_offset: torch.Tensor | None,
        last_bias: torch.Tensor | None,
        groups: int,
        eps: float,
        dropout_p: float,
        last_weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (gain, offset, bias, scale, shift)
        out, statistics = norm_silu.triton(x, *rows, None, seed, groups, eps, True, dropout_p)
        ctx.save_for_backward(x, statistics, *rows, seed)
        ctx.groups, ctx.dropout_p, ctx.last_shape = groups, dropout_p, last_gain.shape
        shape = _sums_shape(x, bias, groups) if last_weight is None else _conv_sums_shapes(x, last_weight)[0]
        # Of the shape that its gradient has; nothing reads it.
        return out, statistics.as_strided(shape, (0, 0, 0, 0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, last_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, statistics, gain, offset, bias, scale, shift, seed = ctx.saved_tensors
        rows = (gain, offset, bias, scale, shift)
        dx, *made = gradients_of_both.triton(
            grad, x, statistics, *rows, seed, last_sums, ctx.groups, ctx.dropout_p
        )  # fmt: skip
        given = (*rows, gain, offset, bias)
        gradients = [None if row is None else gradient for row, gradient in zip(given, made, strict=True)]
        gradients[5] = made[5].reshape(ctx.last_shape)
        return dx, *gradients[:5], None, *gradients[5:], None, None, None, None


class NormBeside(torch.autograd.Function):
    """See `group_norm_silu_beside`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor, groups: int, eps: float, activation: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (gain, offset, None, None, None)
        out, statistics = norm_silu.triton(x, *rows, None, None, groups, eps, activation, 0.0)
        ctx.save_for_backward(x, statistics, gain, offset)
        ctx.groups, ctx.activation = groups, activation
        ctx.set_materialize_grads(False)
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, added: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return added, None, None, None, None, None
        x, statistics, gain, offset = ctx.saved_tensors
        added = torch.zeros_like(x) if added is None else added
        kept = (x, statistics, gain, offset)
        return *gradients_beside.triton(grad, *kept, added, ctx.groups, ctx.activation), None, None, None


class LastNorm(torch.autograd.Function):
    """See `last_norm_silu`; the gradients of gain, offset and bias are given by the first norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gain: torch.Tensor,
        offset: torch.Tensor | None,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        sums: torch.Tensor,
        groups: int,
        eps: float,
        branches: int,
    ) -> tuple[torch.Tensor, ...]:
        rows = (gain, offset, bias)
        out, statistics = norm_silu.triton(x, *rows, None, None, residual, None, groups, eps, True, 0.0)
        ctx.save_for_backward(x, statistics, *rows)
        ctx.groups, ctx.residual_dtype = groups, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return and_branches(out, branches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad, grad2, grad3 = several(gradients)
        if grad is None:
            return (None,) * 9
        dx, sums, total = gradients_of_last.triton(grad, *ctx.saved_tensors, grad2, grad3, ctx.groups)
        total = grad if grad2 is None else total
        dresidual = None if ctx.residual_dtype is None else total.to(ctx.residual_dtype)
        return dx, None, None, None, dresidual, sums, None, None, None


class LastNormConv(torch.autograd.Function):
    """See `last_norm_silu_conv`; the gradients of gain and bias are given by the first norm, that of weight by
    whoever made `products`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gain: torch.Tensor,
        bias: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        sums: torch.Tensor,
        products: torch.Tensor,
    ) -> torch.Tensor:
        out, factors = norm_silu_conv.triton(x, gain, bias, residual, weight)
        ctx.save_for_backward(x, factors, gain, bias, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, sums, products = conv_gradients.triton(grad, *ctx.saved_tensors)
        return dx, None, None, grad, None, sums, products


def stand_in_for_products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A tensor whose gradient are the weight's partial sums of `LastNormConv` of a map as large as x."""
    return x.new_empty(1, dtype=torch.float32).as_strided(_conv_sums_shapes(x, weight)[1], (0, 0, 0, 0))
