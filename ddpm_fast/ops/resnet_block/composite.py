"""A residual block made of the ops of its steps, each with its own backend; it runs if no native block does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F

from ddpm_fast.ops.branches import branch
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.layout import weights_format
from ddpm_fast.ops.norm_linear.op import linear
from ddpm_fast.ops.norm_silu.op import (
    first_norm_silu,
    fits_conv,
    group_norm_silu,
    last_norm_silu,
    last_norm_silu_conv,
    rms_norm_silu,
)
from ddpm_fast.ops.norm_silu.operators import stand_in_for_products
from ddpm_fast.ops.operator import Operator
from ddpm_fast.ops.resnet_block.conv_norm import ConvBeforeNorm, conv_before_norm, rest_of_block
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.autocast import no_autocast
from ddpm_fast.runtime.dispatch import COMPOSITE, Implementation, Op, in_forward_mode, once_differentiable

_LARGEST_ROWS = 2**31 - 2**16  # pixels that the kernels' 32-bit indices count


def resnet_block(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    gain1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    gain2: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    offset1: torch.Tensor | None = None,
    offset2: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    res_weight: torch.Tensor | None = None,
    res_bias: torch.Tensor | None = None,
    out_weight: torch.Tensor | None = None,
    out_bias: torch.Tensor | None = None,
    groups: int = 0,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """See `ddpm_fast.ops.resnet_block.op.resnet_block`.

    With `recompute` backward computes two maps again: the second convolution's input, and the block's output if a 1×1
    convolution reads it.
    """
    recompute = recompute and torch.is_grad_enabled() and not in_forward_mode()
    kind: dict[str, Any] = {"groups": groups, "eps": eps}
    norm1, norm2 = partial(_norm, **kind, dropout_p=dropout_p), partial(_norm, **kind)
    with no_autocast(x.device.type):
        if recompute or skip is None or res_weight is None:  # nothing else would read x with its bias
            x, x_bias = _with_bias(x, x_bias), None
        output_weights, joined = None, None
        if groups == 0 and not recompute:
            rows, last_rows = (gain1, bias1, scale, shift), (gain2, bias2)
            joined = conv_before_norm(x, weight1, rows, last_rows, seed, dropout_p)
        if skip is not None and res_weight is not None:
            if not recompute and groups == 0:
                outer = (out_weight, out_bias, res_weight, res_bias)
                output_weights = _joined_with_output(x, skip, weight1, (gain1, bias1), (gain2, bias2), outer)
            if output_weights is None:
                parts = (x, branch(skip), weight1, res_weight, res_bias, x_bias, not recompute)
                y1, residual = skip_convs(*parts, joined)
                joined = joined if joined is not None and joined.has_run else None
            else:
                whole, whole_bias, products = output_weights
                parts = (x, branch(skip), weight1, whole, whole_bias, x_bias, True)
                y1, residual = _skip_convs_in_place(*parts, joined)
        else:
            if skip is not None:
                x, skip = torch.cat((x, skip.to(x.dtype)), dim=1), None
            y1 = conv3x3(x, weight1) if joined is None else joined.conv(x, weight1)
            residual = branch(x)
            residual = residual if res_weight is None else linear(residual, res_weight, res_bias)
        if joined is not None:
            of_output = (None, None) if output_weights is None else (out_weight, products)
            out = rest_of_block(y1, joined, weight2, *last_rows, residual, *of_output)
            return out if out_weight is None or output_weights is not None else linear(out, out_weight, out_bias)
        first, last = (y1, gain1, offset1, bias1, scale, shift), (gain2, offset2, bias2)
        h, sums = first_norm_silu(
            *first, seed, last, **kind, dropout_p=dropout_p, last_weight=out_weight if output_weights else None
        )
        y2 = conv_of_recomputed(h, norm1, (*first, None, seed), weight2) if recompute else conv3x3(h, weight2)
        if output_weights is not None and out_weight is not None:
            return last_norm_silu_conv(y2, gain2, bias2, residual, out_weight, products, sums)
        out = last_norm_silu(y2, *last, residual, sums, **kind)
        if out_weight is None:
            return out
        if not recompute:
            return linear(out, out_weight, out_bias)
        sources = (y2, *last, x, skip, res_weight, res_bias)
        return conv_of_recomputed(out, partial(_output, norm2), sources, out_weight, out_bias)


def _norm(
    y: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor | None,
    bias: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    seed: torch.Tensor | None = None,
    *,
    groups: int,
    eps: float,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """dropout(SiLU(norm(y + bias)·(1 + scale) + shift)) + residual."""
    if groups == 0:
        return rms_norm_silu(
            y, gain, bias=bias, scale=scale, shift=shift, residual=residual, dropout_p=dropout_p, seed=seed
        )
    offset = cast("torch.Tensor", offset)  # GroupNorm has one
    return group_norm_silu(
        y, gain, offset, groups=groups, eps=eps, bias=bias, scale=scale, shift=shift, residual=residual,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


def _output(
    norm: Callable[..., torch.Tensor],
    y2: torch.Tensor,
    gain2: torch.Tensor,
    offset2: torch.Tensor | None,
    bias2: torch.Tensor,
    x: torch.Tensor,
    skip: torch.Tensor | None,
    res_weight: torch.Tensor | None,
    res_bias: torch.Tensor | None,
) -> torch.Tensor:
    """The block's output from the second convolution's output y2 and the block's inputs."""
    if res_weight is None:
        residual = x
    elif skip is None:
        residual = linear(x, res_weight, res_bias)
    else:
        (residual,) = convs_of_parts((x, skip), (res_weight, res_bias))
    return norm(y2, gain2, offset2, bias2, None, None, residual)


def conv_of_recomputed(
    h: torch.Tensor,
    remake: Callable[..., torch.Tensor],
    sources: Sequence[torch.Tensor | None],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The convolution of h = remake(*sources), stride 1, same size; backward keeps the sources and computes h again.

    The sources are smaller than h, or autograd keeps them anyway: one more elementwise pass saves one map.
    """
    bias = None if bias is None else bias.to(h.dtype)
    return _ConvOfRecomputed.apply(remake, h, weight.to(h.dtype), bias, *sources)


class _ConvOfRecomputed(torch.autograd.Function):
    """Gradients flow to h, weight and bias; those of the sources flow through h."""

    @staticmethod
    def forward(
        ctx: Any,
        remake: Callable[..., torch.Tensor],
        h: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *sources: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.remake = remake
        ctx.save_for_backward(weight, *sources)
        return _same_conv(h, weight, bias)

    @staticmethod
    @once_differentiable  # h is computed again without a graph: a second derivative through it would be wrong
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, *sources = ctx.saved_tensors
        with torch.no_grad(), no_autocast(grad.device.type):
            h = ctx.remake(*sources).to(weight.dtype)
        geometry = ((1, 1), (weight.shape[2] // 2,) * 2, (1, 1), False, (0, 0), 1)
        wanted = ctx.needs_input_grad[1:4]
        bias_size = (weight.shape[0],) if wanted[2] else None
        gradients = torch.ops.aten.convolution_backward(grad, h, weight, bias_size, *geometry, wanted)
        return None, *gradients, *(None for _ in sources)


def convs_of_parts(
    parts: tuple[torch.Tensor, ...], *parameters: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """Convolutions of several maps side by side, one output for each weight (K, ΣC, k, k), k odd, and bias.

    A skip connection is read by two convolutions and is kept already; the concatenated map is kept for neither.
    Backward handles each map separately: gradients are whole maps, not slices to copy.

    Forward concatenates. For two maps of n bytes and two convolutions with outputs of n bytes this moves 10n: 4n to
    concatenate, 3n per convolution. One convolution per map and a sum would move 14n, or 10n with the sums inside the
    following norm. Producers cannot write into halves of one map: cuDNN's convolutions, which are half of them, do not,
    and a skip has earlier readers of the whole. `_SkipConvs` moves 8n: the 1×1 convolution's kernel concatenates.
    """
    dtype = parts[0].dtype
    parts = tuple([part.to(dtype) for part in parts])
    pairs = [(weight.to(dtype), None if bias is None else bias.to(dtype)) for weight, bias in parameters]
    if torch.is_grad_enabled() and not in_forward_mode():
        flat = [tensor for pair in pairs for tensor in pair]
        return _ConvsOfParts.apply(len(parts), *parts, *flat)
    h = torch.cat(parts, dim=1)
    return tuple([_same_conv(h, weight, bias) for weight, bias in pairs])


class _ConvsOfParts(torch.autograd.Function):
    """See `convs_of_parts`. Backward is made of torch's operators and can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, num_parts: int, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        parts, rest = cast("tuple[torch.Tensor, ...]", tensors[:num_parts]), tensors[num_parts:]
        weights, biases = cast("tuple[torch.Tensor, ...]", rest[::2]), rest[1::2]  # a bias may be None
        ctx.save_for_backward(*parts, *weights)
        ctx.num_parts = num_parts
        h = torch.cat(parts, dim=1)
        return tuple(_same_conv(h, *parameters) for parameters in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under torch's checkpoint a second read is an error
        parts, weights = saved[: ctx.num_parts], saved[ctx.num_parts :]
        needs = ctx.needs_input_grad[1:]
        needs_parts, needs = needs[: len(parts)], needs[len(parts) :]
        dparts: list[torch.Tensor | None] = [None] * len(parts)
        gradients: list[torch.Tensor | None] = []
        for grad, weight, needs_weight, needs_bias in zip(grads, weights, needs[::2], needs[1::2], strict=True):
            geometry = ((1, 1), (weight.shape[2] // 2,) * 2, (1, 1), False, (0, 0), 1)
            dweights: list[torch.Tensor] = []
            dbias, channel = None, 0
            for i, part in enumerate(parts):
                taps = weight[:, channel : channel + part.shape[1]]
                taps = taps.contiguous(memory_format=weights_format(weight.device))
                channel += part.shape[1]
                wanted = (needs_parts[i], needs_weight, needs_bias and i == 0)
                dpart, dweight, dbias_once = torch.ops.aten.convolution_backward(
                    grad, part, taps, (weight.shape[0],), *geometry, wanted
                )
                dweights.append(dweight)
                dbias = dbias_once if i == 0 else dbias
                if needs_parts[i]:
                    dparts[i] = dpart if dparts[i] is None else dparts[i] + dpart
            gradients += [torch.cat(dweights, dim=1) if needs_weight else None, dbias]
        return None, *dparts, *gradients


def _same_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def _residual_conv_fake(x: torch.Tensor, weight: torch.Tensor, **others: object) -> tuple[torch.Tensor, ...]:
    B, _, H, W = x.shape
    return tuple([x.new_empty((B, c, H, W)).contiguous(memory_format=torch.channels_last) for c in weight.shape[:2]])


_residual_conv = Operator(
    "residual_conv",
    "Tensor x, Tensor skip, Tensor weight, Tensor bias, Tensor? x_bias",
    returns="out, h",  # h: the two maps side by side, x with x_bias
    fake=_residual_conv_fake,
    triton=f"{__package__}.triton",
)
_residual_conv_gradients = Operator(
    "residual_conv_gradients",
    # x and skip may be parts of one map.
    "Tensor grad, Tensor x, Tensor skip, Tensor weight, Tensor bias, Tensor? x_bias, Tensor added",
    returns="dx, dskip, dweight, dbias, dx_bias",
    fake=lambda x, skip, weight, bias, x_bias, **_: tuple(
        [x.new_empty(0) if t is None else torch.empty_like(t) for t in (x, skip, weight, bias, x_bias)]
    ),
    triton=f"{__package__}.triton",
)


class _SkipConvs(torch.autograd.Function):
    """The 3×3 convolution of x and skip side by side by cuDNN, the 1×1 one by Triton, which puts them side by side.

    Backward makes the 3×3 convolution's gradient of both maps at once, and the 1×1 one's kernel adds to it and cuts it.
    It keeps the maps side by side: the skip connection's is kept elsewhere, too, but the 3×3 weight's gradient is one
    pass and its parts need no concatenation. Without `keeps_whole`, and x_bias, it keeps the maps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        skip: torch.Tensor,
        weight: torch.Tensor,
        res_weight: torch.Tensor,
        res_bias: torch.Tensor,
        x_bias: torch.Tensor | None,
        keeps_whole: bool,
        joined: ConvBeforeNorm | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, h = _residual_conv.triton(x, skip, res_weight, res_bias, x_bias)
        maps = (h, None) if keeps_whole or x_bias is not None else (x, skip)
        ctx.save_for_backward(*maps, weight, res_weight, res_bias, x_bias)
        ctx.sizes = [x.shape[1], skip.shape[1]]
        return _same_conv(h, weight, None) if joined is None else joined(h, weight), out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, res_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, skip, weight, res_weight, res_bias, x_bias = ctx.saved_tensors
        sizes, h = ctx.sizes, None
        if skip is None:
            h, (x, skip) = x, x.split(sizes, dim=1)
        convolution_backward = partial(torch.ops.aten.convolution_backward, grad)
        geometry = (None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        # Of a map only size and layout count here, and of the taps below.
        whole = x.new_empty((1,)).expand(x.shape[0], sum(sizes), *x.shape[2:])
        dwhole = convolution_backward(whole, weight, *geometry, (True, False, False))[0]
        dx, dskip, dres_weight, dres_bias, dx_bias = _residual_conv_gradients.triton(
            res_grad, x, skip, res_weight, res_bias, x_bias, dwhole
        )
        dweight = None
        if ctx.needs_input_grad[2] and h is not None:
            dweight = convolution_backward(h, weight, *geometry, (False, True, False))[1]
        elif ctx.needs_input_grad[2]:
            parts = zip((x, skip), weight.split(sizes, dim=1), strict=True)
            dweights = [convolution_backward(*part, *geometry, (False, True, False))[1] for part in parts]
            dweight = torch.cat(dweights, dim=1)
        return dx, dskip, dweight, dres_weight, dres_bias, None if x_bias is None else dx_bias, None, None


def _skip_convs_in_place(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    res_weight: torch.Tensor,
    res_bias: torch.Tensor,
    x_bias: torch.Tensor | None,
    keeps_whole: bool,
    joined: ConvBeforeNorm | None,
) -> tuple[torch.Tensor, ...]:
    """By Triton; res_weight and res_bias may have another dtype than the maps, and their gradients have it."""
    x_bias = None if x_bias is None else x_bias.to(x.dtype)
    maps = (x, skip.to(x.dtype))
    return _SkipConvs.apply(*maps, weight.to(x.dtype), res_weight, res_bias, x_bias, keeps_whole, joined)


def _triton_skip_convs(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    res_weight: torch.Tensor,
    res_bias: torch.Tensor,
    x_bias: torch.Tensor | None = None,
    keeps_whole: bool = True,
    joined: ConvBeforeNorm | None = None,
) -> tuple[torch.Tensor, ...]:
    res_weight, res_bias = res_weight.to(x.dtype), res_bias.to(x.dtype)
    return _skip_convs_in_place(x, skip, weight, res_weight, res_bias, x_bias, keeps_whole, joined)


def _joined_with_output(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor],
    last: tuple[torch.Tensor, torch.Tensor],
    outer: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor, ...] | None:
    """The residual's 1×1 convolution and that of the block's output as one, see triton_output.py, where they run so.

    Args:
        first, last: gain and bias of the norms.
        outer: weight and bias of the output's convolution, and of the residual's.

    Returns:
        Weight and bias, float32, and a tensor that takes the gradient of the output's weight from the last norm.
    """
    if any(tensor is None or tensor.dtype == torch.float64 for tensor in outer):
        return None
    out_weight, _, res_weight, res_bias = cast("tuple[torch.Tensor, ...]", outer)
    takes_gradient = any(tensor.requires_grad for tensor in (x, skip, weight))
    if not fits_conv(x, out_weight, takes_gradient, first, last):
        return None
    if skip_convs.choose(x, skip, weight, res_weight, res_bias).name != "triton":
        return None
    return _OutputWeights.apply(x, *outer)


_output_weights = Operator(
    "output_weights",
    "Tensor weight, Tensor bias, Tensor res_weight, Tensor res_bias",
    returns="whole, whole_bias",
    fake=lambda weight, res_weight, **_: (
        weight.new_empty((weight.shape[0], res_weight.shape[1], 1, 1), dtype=torch.float32),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    ),
    triton=f"{__package__}.triton_output",
)
_output_weights_gradients = Operator(
    "output_weights_gradients",
    "Tensor products, Tensor dwhole, Tensor dwhole_bias, Tensor weight, Tensor bias, Tensor res_weight, "
    "Tensor res_bias",
    returns="dweight, dbias, dres_weight, dres_bias",
    fake=lambda weight, bias, res_weight, res_bias, **_: tuple(
        [torch.empty_like(tensor) for tensor in (weight, bias, res_weight, res_bias)]
    ),
    triton=f"{__package__}.triton_output",
)


class _OutputWeights(torch.autograd.Function):
    """The weight and bias of both convolutions as one, in float32, and what takes the gradient of the output's weight
    from the last norm's kernel."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*weights)
        return *_output_weights.triton(*weights), stand_in_for_products(x, weights[0])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dwhole: torch.Tensor, dwhole_bias: torch.Tensor, products: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return None, *_output_weights_gradients.triton(products, dwhole, dwhole_bias, *ctx.saved_tensors)


def _triton_refuses(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    res_weight: torch.Tensor,
    res_bias: torch.Tensor | None,
    x_bias: torch.Tensor | None = None,
    keeps_whole: bool = True,
    joined: ConvBeforeNorm | None = None,
) -> str | None:
    reason = triton_launch.why_not_triton(x.device)
    if reason is not None:
        return reason
    if res_bias is None:
        return "res_bias is None"
    if x.dtype == torch.float64:
        return "x is torch.float64, and the kernels compute in float32"
    if x.numel() == 0 or skip.numel() == 0:
        return "a map is empty"
    for name, tensor in (("x", x), ("skip", skip)):
        if not tensor.is_contiguous(memory_format=torch.channels_last):
            return f"{name} is not channels-last, its strides are {tensor.stride()}"
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return None if pixels <= _LARGEST_ROWS else f"x has {pixels} pixels, and the kernels count at most {_LARGEST_ROWS}"


def _composite_skip_convs(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    res_weight: torch.Tensor,
    res_bias: torch.Tensor | None,
    x_bias: torch.Tensor | None = None,
    keeps_whole: bool = True,
    joined: ConvBeforeNorm | None = None,
) -> tuple[torch.Tensor, ...]:
    return convs_of_parts((_with_bias(x, x_bias), skip), (weight, None), (res_weight, res_bias))


def _with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias.to(x.dtype)[:, None, None]


def _skip_convs_example(device: torch.device) -> tuple[tuple, dict]:
    x = torch.zeros(1, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 16, 3, 3, device=device)
    return (x, x, weight, weight[:, :, :1, :1], torch.zeros(8, device=device)), {}


# The convolutions of a residual block that read a map and its skip connection: 3×3 without a bias, and the residual's.
skip_convs = Op(
    "skip_convs",
    [
        Implementation("triton", _triton_skip_convs, _triton_refuses, or_steps=True),
        Implementation(COMPOSITE, _composite_skip_convs),
    ],
    _skip_convs_example,
)
