"""A residual block's 3×3 convolutions with RMSNorm and SiLU in the kernels that make them: operators and autograd.

Two computations have two forms each, chosen by runtime/measured.py for the loops of this package. "fused" is a kernel
of triton_conv_norm.py, "separate" torch's convolution and a pass of the norm, as in a block without these:

    a convolution and the norm after it                       the norm does not read the convolution's output
    the gradient of a convolution's input and of the norm     the gradient between them is not in memory
    before it

Both forms take and give the same tensors, so that forward and backward choose each by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from ddpm_fast.ops.branches import and_branches, number_of_branches, several, with_branches
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.norm_silu.operators import (
    conv_gradients,
    gradients_of_both,
    gradients_of_last,
    norm_silu,
    norm_silu_conv,
)
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime import measured, triton_launch
from ddpm_fast.runtime.dispatch import forced_backend, in_forward_mode, once_differentiable

_MOST_CHANNELS = 128  # of the output, all of which a program holds
_LARGEST_SAMPLE = 2**31 - 2**16  # elements that the kernels' 32-bit offsets reach within one sample
_GEOMETRY: tuple[Any, ...] = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)  # of torch's convolution_backward


def _fake(x: torch.Tensor, weight: torch.Tensor, keeps: bool, **others: object) -> tuple[torch.Tensor, ...]:
    B, _, H, W = x.shape
    out = x.new_empty((B, weight.shape[0], H, W)).contiguous(memory_format=torch.channels_last)
    if not keeps:
        return x.new_empty(0), out, x.new_empty(0, dtype=torch.float32)
    return torch.empty_like(out), out, x.new_empty((B, H * W), dtype=torch.float32)


def _fake_gradients(
    y: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    **others: object,
) -> tuple[torch.Tensor, ...]:
    rows = (gain, bias, scale, shift, gain, bias)
    return torch.empty_like(y), *(
        y.new_empty(0) if row is None else torch.empty(row.shape, dtype=row.dtype, device=y.device) for row in rows
    )


_conv_norm = Operator(
    "conv_norm",
    "Tensor x, Tensor weight, Tensor gain, Tensor bias, Tensor? scale, Tensor? shift, Tensor? residual, Tensor? seed, "
    "float dropout_p, bool keeps",
    returns="y, out, factors",  # y: the convolution's output; y and factors are empty without `keeps`
    fake=_fake,
    triton=f"{__package__}.triton_conv_norm",
)
_conv_norm_gradients = Operator(
    "conv_norm_gradients",
    # grad: at the output of a convolution of `out`, weight: of that convolution.
    "Tensor grad, Tensor weight, Tensor y, Tensor factors, Tensor gain, Tensor bias, Tensor? scale, Tensor? shift, "
    "Tensor? seed, Tensor last_sums, float dropout_p",
    # Empty where there is no such argument.
    returns="dy, dgain, dbias, dscale, dshift, last_dgain, last_dbias",
    fake=_fake_gradients,
    triton=f"{__package__}.triton_conv_norm",
)

_Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # gain, bias, scale, shift
_Forms = dict[str, Callable[[], Any]]


def conv_and_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    rows: _Rows,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    keeps: bool,
    how: str,
) -> tuple[torch.Tensor, ...]:
    """y = conv3x3(x, weight), out = dropout(SiLU(norm(y + bias)·gain·(1 + scale) + shift)) + residual, factors."""

    def separate() -> tuple[torch.Tensor, ...]:
        y = conv3x3(x, weight)
        gain, *others = rows
        return y, *norm_silu.triton(y, gain, None, *others, residual, seed, 0, 0.0, True, dropout_p)

    forms: _Forms = {
        measured.FUSED: partial(_conv_norm.triton, x, weight, *rows, residual, seed, dropout_p, keeps),
        measured.SEPARATE: separate,
    }
    return measured.run("conv_norm", _key(x, weight, rows[2], residual, seed, keeps), forms, how, x)


def gradients_of_conv_and_norm(
    grad: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    factors: torch.Tensor,
    rows: _Rows,
    seed: torch.Tensor | None,
    last_sums: torch.Tensor,
    dropout_p: float,
    how: str,
) -> tuple[torch.Tensor, ...]:
    """Of the convolution, with this weight, of a norm's output: gradients of y, gain, bias, scale and shift of the
    norm, and of gain and bias of another norm, whose partial sums are `last_sums`."""

    def separate() -> tuple[torch.Tensor, ...]:
        # Of the convolution's input only size and layout count here.
        da = torch.ops.aten.convolution_backward(grad, y, weight, *_GEOMETRY, (True, False, False))[0]
        gain, *others = rows
        made = gradients_of_both.triton(da, y, factors, gain, None, *others, seed, last_sums, 0, dropout_p)
        dy, dgain, _, dbias, dscale, dshift, last_dgain, _, last_dbias = made
        return dy, dgain, dbias, dscale, dshift, last_dgain, last_dbias

    fused = partial(_conv_norm_gradients.triton, grad, weight, y, factors, *rows, seed, last_sums, dropout_p)
    forms: _Forms = {measured.FUSED: fused, measured.SEPARATE: separate}
    return measured.run("conv_norm_gradients", _key(grad, weight, rows[2], None, seed, True), forms, how, grad)


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _key(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None,
    keeps: bool,
) -> tuple:
    """What the time depends on, for `measured.run` and for whoever reads `explain`."""
    given = {"scaled": scale is not None, "residual": residual is not None, "dropout": seed is not None, "kept": keeps}
    names = [name for name, is_given in given.items() if is_given]
    return _card(x.device), str(x.dtype), tuple(x.shape), tuple(weight.shape[:2]), " ".join(names)


class _Conv(torch.autograd.Function):
    """A 3×3 convolution whose output `convolve` makes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, convolve: ConvBeforeNorm) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return convolve(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = (*ctx.needs_input_grad[:2], False)
        dx, dweight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *_GEOMETRY, wanted)
        return dx, dweight, None


class ConvBeforeNorm:
    """A block's first convolution, which makes the norm of its output, too, and holds it for `rest_of_block`."""

    def __init__(self, rows: _Rows, seed: torch.Tensor | None, dropout_p: float, how: str):
        self.rows, self.how, self.dropout_p = rows, how, dropout_p
        self.seed = seed if dropout_p > 0 else None
        # Another implementation of the block's first convolutions may run instead.
        self.has_run = False
        self._keeps = torch.is_grad_enabled()  # an autograd function's forward is called without

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The convolution's output; empty where no backward needs it and the norm is made already."""
        self.has_run = True
        y, self.normed, self.factors = conv_and_norm(
            x, weight, self.rows, None, self.seed, self.dropout_p, self._keeps, self.how
        )
        return y

    def conv(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same with gradients."""
        return _Conv.apply(x, weight.to(x.dtype), self)


class _RestOfBlock(torch.autograd.Function):
    """The block from its first convolution's output on: the first norm, which is made already, the second convolution
    and its norm with the residual. With out_weight and products the last norm is `last_norm_silu_conv`."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        convolve: ConvBeforeNorm,
        gain: torch.Tensor,
        bias: torch.Tensor,
        scale: torch.Tensor | None,
        shift: torch.Tensor | None,
        weight: torch.Tensor,
        last_gain: torch.Tensor,
        last_bias: torch.Tensor,
        residual: torch.Tensor,
        out_weight: torch.Tensor | None,
        products: torch.Tensor | None,
        keeps: bool,
        branches: int,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        normed, last = convolve.normed, (last_gain, last_bias, None, None)
        if out_weight is None:
            y2, out, factors = conv_and_norm(normed, weight, last, residual, None, 0.0, keeps, convolve.how)
        else:
            y2 = conv3x3(normed, weight)
            out, factors = norm_silu_conv.triton(y2, last_gain, last_bias, residual, out_weight)
        if keeps:
            first = (y, normed, convolve.factors, gain, bias, scale, shift, convolve.seed)
            ctx.save_for_backward(*first, weight, y2, factors, last_gain, last_bias, out_weight)
        ctx.dropout_p, ctx.how, ctx.residual_dtype = convolve.dropout_p, convolve.how, residual.dtype
        ctx.set_materialize_grads(False)
        return and_branches(out, branches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad, grad2, grad3 = several(gradients)
        if grad is None:
            return (None,) * 14
        y, normed, factors, gain, bias, scale, shift, seed, weight, y2, factors2, *last = ctx.saved_tensors
        last_gain, last_bias, out_weight = last
        products = None
        if out_weight is None:
            dy2, last_sums, total = gradients_of_last.triton(
                grad, y2, factors2, last_gain, None, last_bias, grad2, grad3, 0
            )
            grad = grad if grad2 is None else total
        else:
            dy2, last_sums, products = conv_gradients.triton(grad, y2, factors2, last_gain, last_bias, out_weight)
        rows = (gain, bias, scale, shift)
        dy, dgain, dbias, dscale, dshift, last_dgain, last_dbias = gradients_of_conv_and_norm(
            dy2, weight, y, factors, rows, seed, last_sums, ctx.dropout_p, ctx.how
        )
        dweight = None
        if ctx.needs_input_grad[6]:
            wanted = (False, True, False)
            dweight = torch.ops.aten.convolution_backward(dy2, normed, weight, *_GEOMETRY, wanted)[1]
        return (
            dy, None, dgain, dbias, None if scale is None else dscale, None if shift is None else dshift, dweight,
            last_dgain.reshape(last_gain.shape), last_dbias, grad.to(ctx.residual_dtype), None, products, None, None,
        )  # fmt: skip


def rest_of_block(
    y: torch.Tensor,
    convolve: ConvBeforeNorm,
    weight: torch.Tensor,
    last_gain: torch.Tensor,
    last_bias: torch.Tensor,
    residual: torch.Tensor,
    out_weight: torch.Tensor | None,
    products: torch.Tensor | None,
) -> torch.Tensor:
    """The block's output of the first convolution's.

    Args:
        weight: (K, K, 3, 3), of the second convolution.
        residual: (B, K, H, W), or (B, J, H, W) with `out_weight`.
        out_weight, products: of `last_norm_silu_conv`, in place of the last norm.
    """
    keeps, branches = torch.is_grad_enabled(), number_of_branches() if out_weight is None else 0
    last = (weight.to(convolve.normed.dtype), last_gain, last_bias, residual, out_weight, products)
    return with_branches(*_RestOfBlock.apply(y, convolve, *convolve.rows, *last, keeps, branches))


def conv_before_norm(
    x: torch.Tensor,
    weight1: torch.Tensor,
    rows: _Rows,
    last: tuple[torch.Tensor, torch.Tensor],
    seed: torch.Tensor | None,
    dropout_p: float,
) -> ConvBeforeNorm | None:
    """The first convolution of a block by these kernels; None where the steps run one by one.

    Args:
        x: the block's input, or a map of its size and layout.
        rows: gain, bias, scale and shift of the first norm; last: gain and bias of the last one.
    """
    if torch.compiler.is_compiling():  # dynamo cannot trace the question for the thread
        return None
    how = measured.way(x)
    if how == measured.SEPARATE or why_not(x, weight1, rows, last) is not None:
        return None
    return ConvBeforeNorm(rows, seed, dropout_p, how)


def why_not(x: torch.Tensor, weight1: torch.Tensor, rows: _Rows, last: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    """Why no kernel makes a block's norms with its convolutions, in one clause; None where one can."""
    reason = triton_launch.why_not_triton(x.device)
    if reason is not None:
        return reason
    if forced_backend() not in (None, "triton"):
        return f"backend {forced_backend()!r} is forced"
    if torch.jit.is_tracing() or in_forward_mode():  # type: ignore[attr-defined]
        return "tracing and forward-mode differentiation see the steps"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype}, and the kernels are for tensor cores of half types"
    if x.numel() == 0:
        return "x is empty"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return f"x is not channels-last, its strides are {x.stride()}"
    K = weight1.shape[0]
    if K > _MOST_CHANNELS:
        return f"the block has {K} channels, and a program holds at most {_MOST_CHANNELS}"
    if max(K, weight1.shape[1]) * x[0, 0].numel() > _LARGEST_SAMPLE:
        return f"a sample has more than {_LARGEST_SAMPLE} elements"
    if any((a.dtype, a.numel()) != (b.dtype, b.numel()) for a, b in zip(rows[:2], last, strict=True)):
        return "the norms' gains or biases differ in dtype"
    return None
