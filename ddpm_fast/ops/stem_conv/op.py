"""A large odd kernel on few channels, stride 1, zeros around: declaration, public function, eligibility.

On the CPU a matrix product per row of the padded map, where the inputs of one kernel row are contiguous
(csrc/cpu/kernels/stem_conv-inl.h). In half types on CUDA, Triton kernels that gather few channels from where they are:
cuDNN's fast kernels take rows of 8 channels. Elsewhere torch's convolution, the gradients of whose readers Triton adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.grad import conv2d_input

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.branches import MOST_BRANCHES, and_branches, number_of_branches, several, with_branches
from ddpm_fast.ops.operator import Operator
from ddpm_fast.ops.stem_conv import reference
from ddpm_fast.runtime import extension, triton_launch
from ddpm_fast.runtime.dispatch import Implementation, Op, forced_backend, once_differentiable

_MOST_MAPS = 3  # that native code reads side by side: the estimate of x0, x, and a condition's image
_MOST_CHANNELS = 16  # with more, a direct convolution's own blocks of channels are filled
_LARGEST_ROWS = 2**31 - 2**16  # pixels that the kernels' 32-bit indices count


def _native_fake(x: torch.Tensor, weight: torch.Tensor, **_: object) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _image_gradients(
    needs: Sequence[bool],
    grad: torch.Tensor,
    x: torch.Tensor,
    x2: torch.Tensor | None,
    x3: torch.Tensor | None,
    weight: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Of the maps by torch, where they are wanted: training needs no gradient of an image."""
    gradients: list[torch.Tensor | None] = []
    first = 0
    for needed, map in zip(needs, (x, x2, x3), strict=True):
        gradient = None
        if map is not None:
            part, first = weight[:, first : first + map.shape[1]], first + map.shape[1]
            if needed:
                gradient = conv2d_input(map.shape, part.to(grad.dtype), grad, padding=weight.shape[2] // 2)
                gradient = gradient.to(map.dtype)
        gradients.append(gradient)
    return gradients


_stem_conv = Operator(
    "stem_conv",
    "Tensor x, Tensor? x2, Tensor? x3, Tensor weight, Tensor? bias",
    returns="out",
    fake=_native_fake,
    backward="grad, x, x2, x3, weight, want_bias",
    gradients="weight, bias",
    by_torch=("x, x2, x3", _image_gradients),
    rows={"bias": "weight"},
    wanted={"want_bias": "bias"},
    triton=f"{__package__}.triton",
    native=True,
)


# Of an output with branches.
_gradients_of_readers = Operator(
    "stem_conv_backward_of_readers",
    "Tensor grad, Tensor? grad2, Tensor? grad3, Tensor x, Tensor? x2, Tensor? x3, Tensor weight",
    returns="dweight, dbias",
    fake=lambda weight, **_: (torch.empty_like(weight), weight.new_empty(weight.shape[:1])),
    triton=f"{__package__}.triton",
)

_sum_of_gradients = Operator(
    "stem_conv_sum_of_gradients",
    "Tensor grad, Tensor grad2, Tensor? grad3",  # of the output's readers
    returns="total, dbias",
    fake=lambda grad, **_: (
        torch.empty_like(grad, memory_format=torch.channels_last),
        grad.new_empty(grad.shape[1]),
    ),
    triton=f"{__package__}.triton",
)


def stem_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, beside: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """A convolution of stride 1 whose output is as large as its input.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only), in any layout. On the CPU half types are
            computed in float32 and rounded once.
        weight: (K, C, side, side), side odd; its channels are those of x and then those of `beside`.
        bias: (K,).
        beside: up to two maps (B, C', H, W), as if concatenated after x; native code reads them where they are.

    Returns:
        (B, K, H, W) of the dtype of x, natively channels-last. Gradients flow to every tensor, once.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check(x, weight, bias, beside)
    if bias is not None and number_of_branches() > 0 and forced_backend() in (None, "triton"):
        if _stem_conv_op.choose(x, weight, bias, tuple(beside)).name == "triton":
            return with_branches(*_TritonWithBranches.apply(*_three(x, beside), weight, bias))
        if not beside and _may_sum(x):
            return with_branches(*_ConvWithBranches.apply(x, weight.to(x.dtype), bias.to(x.dtype)))
    return _stem_conv_op(x, weight, bias, tuple(beside))


def reads_in_place(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, beside: Sequence[torch.Tensor] = ()
) -> bool:
    """True if the implementation that would run takes maps in any layout and side by side."""
    return _stem_conv_op.choose(x, weight, bias, tuple(beside)).name != "reference"


def _may_sum(x: torch.Tensor) -> bool:
    """True if Triton adds the gradients of torch's convolution of x, in a network with branches."""
    return x.dtype != torch.float64 and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


class _TritonWithBranches(torch.autograd.Function):
    """The convolution, and branches of its output: the kernel of the weight's gradient adds their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        x2: torch.Tensor | None,
        x3: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, x2, x3, weight)
        ctx.dtype_bias = bias.dtype
        ctx.set_materialize_grads(False)
        return and_branches(_stem_conv.triton(x, x2, x3, weight, bias), MOST_BRANCHES)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad, grad2, grad3 = several(gradients)
        if grad is None:
            return (None,) * 5
        x, x2, x3, weight = ctx.saved_tensors
        images: list[torch.Tensor | None] = [None] * 3
        if any(ctx.needs_input_grad[:3]):
            total = grad if grad2 is None else _sum_of_gradients.triton(grad, grad2, grad3)[0]
            images = _image_gradients(ctx.needs_input_grad[:3], total, x, x2, x3, weight)
        dweight, dbias = None, None
        if any(ctx.needs_input_grad[3:]):
            dweight, dbias = _gradients_of_readers.triton(grad, grad2, grad3, x, x2, x3, weight)
            dbias = dbias.to(ctx.dtype_bias)
        return *images, dweight, dbias


class _ConvWithBranches(torch.autograd.Function):
    """torch's convolution, and branches of its output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return and_branches(reference.stem_conv(x, weight, bias), MOST_BRANCHES)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad, grad2, grad3 = several(gradients)
        if grad is None:
            return None, None, None
        dbias, (x, weight) = None, ctx.saved_tensors
        if grad2 is not None:
            grad, dbias = _sum_of_gradients.triton(grad, grad2, grad3)
        padding = (weight.shape[2] // 2,) * 2
        dx_wanted, dweight_wanted, dbias_wanted = ctx.needs_input_grad
        wanted = (dx_wanted, dweight_wanted, dbias_wanted and dbias is None)
        dx, dweight, dbias_alone = torch.ops.aten.convolution_backward(
            grad, x, weight, (weight.shape[0],), (1, 1), padding, (1, 1), False, (0, 0), 1, wanted
        )
        return dx, dweight, dbias_alone if dbias is None else dbias


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, beside: Sequence[torch.Tensor]) -> None:
    """The checks of every implementation."""
    check_tensors({"x": x, "weight": weight, "bias": bias}, optional=("bias",))
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    if len(beside) > _MOST_MAPS - 1:
        raise ValueError(f"beside must have at most {_MOST_MAPS - 1} maps, got {len(beside)}")
    C = x.shape[1]
    for i, other in enumerate(beside):
        check_tensors({"x": x, f"beside[{i}]": other})
        if other.dim() != 4 or (other.shape[0], *other.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"beside[{i}] must have x's batch, height and width {tuple(x.shape)}, got {tuple(other.shape)}"
            )
        if other.dtype != x.dtype:
            raise TypeError(f"beside[{i}] must have x's dtype {x.dtype}, got {other.dtype}")
        C += other.shape[1]
    shape = tuple(weight.shape)
    if len(shape) != 4 or shape[1] != C or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"weight must have shape (K, {C}, side, side) with an odd side, got {shape}")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias must have shape ({shape[0]},), got {tuple(bias.shape)}")


_Maps = tuple[torch.Tensor, ...]


def _three(x: torch.Tensor, beside: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """x, x2, x3."""
    return (x, *beside, None, None)[:_MOST_MAPS]


def _triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, beside: _Maps) -> torch.Tensor:
    return _stem_conv.triton(*_three(x, beside), weight, bias)


def _triton_refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, beside: _Maps) -> str | None:
    reason = triton_launch.why_not_triton(x.device)
    if reason is not None:
        return reason
    if x.dtype == torch.float64:
        return "x is torch.float64, and the kernels compute in float32"
    if x.numel() == 0 or weight.numel() == 0:
        return "a tensor is empty"
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return None if pixels <= _LARGEST_ROWS else f"x has {pixels} pixels, and the kernels count at most {_LARGEST_ROWS}"


def _triton_yields(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, beside: _Maps) -> str | None:
    if x.dtype == torch.float32:
        return "x is torch.float32, and the kernels are for tensor cores of half types"
    return _why_wide(weight)


def _why_wide(weight: torch.Tensor) -> str | None:
    if weight.shape[1] <= _MOST_CHANNELS:
        return None
    return f"x has {weight.shape[1]} channels, more than {_MOST_CHANNELS}: torch's convolution has blocks of them"


def _native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, beside: _Maps) -> torch.Tensor:
    return _stem_conv.native(*_three(x, beside), weight, bias)


def _native_refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, beside: _Maps) -> str | None:
    given = {"x": x, "weight": weight, "bias": bias}
    return why_not_on_cpu(given | {f"beside[{i}]": other for i, other in enumerate(beside)} if beside else given)


def _native_yields(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, beside: _Maps) -> str | None:
    # torch.compile cannot ask for the processor, and takes native code.
    asks = x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    if asks and extension.instruction_set() == "avx512_bf16":
        return "x is bfloat16, and this processor multiplies it by pairs, in torch's convolution and not in native code"
    return _why_wide(weight)


def _example(channels: int) -> Callable[[torch.device], tuple[tuple, dict]]:
    def example(device: torch.device) -> tuple[tuple, dict]:
        x = torch.zeros(1, channels, 8, 8, device=device)
        return (x, torch.zeros(8, channels, 7, 7, device=device), None, ()), {}

    return example


_stem_conv_op = Op(
    "stem_conv",
    [
        Implementation("triton", _triton, _triton_refuses, _triton_yields),
        Implementation("native", _native, _native_refuses, _native_yields),
        Implementation("reference", reference.stem_conv),
    ],
    _example(3),
    {"stem_conv, 32 channels": _example(32)},
)
