"""Linear attention as a whole block: public function, registration, eligibility.

    qkv = weight_qkv·(x / max(‖x‖₂, 1e-12)·√C·gain_in)
    out = linear_attention(qkv) + residual

The Triton and the native block keep no map but x for backward; they make q, k and v from it, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch

from ddpm_fast.ops.arguments import why_not_on_cpu, why_steps_come_first
from ddpm_fast.ops.branches import and_branches, number_of_branches, several, with_branches
from ddpm_fast.ops.linear_attention.op import check_kinds, check_output
from ddpm_fast.ops.linear_attention_block import composite
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import COMPOSITE, Implementation, Op, once_differentiable

_LARGEST_HIDDEN = 128  # columns of all heads side by side, of which a program holds every one
_LARGEST_ROW = 128  # channels of x that a program holds beside two sums of (hidden, C)
_LARGEST_SAMPLE = 2**31 - 2**16  # elements that the kernels' 32-bit offsets reach within one sample

_ARGUMENTS = (
    "Tensor x, Tensor gain_in, Tensor weight_qkv, Tensor mem_kv, Tensor weight, Tensor bias, Tensor gain, "
    "Tensor? residual, int heads"
)


def _triton_fake(x: torch.Tensor, mem_kv: torch.Tensor, **_: object) -> tuple[torch.Tensor, ...]:
    B, C, (heads, D) = x.shape[0], x.shape[1], mem_kv.shape[1:3]

    def small(*sizes: int) -> torch.Tensor:
        return x.new_empty((B, *sizes), dtype=torch.float32)

    hidden = heads * D
    context = small(heads, D, D)
    return torch.empty_like(x), small(2, hidden), small(hidden, C), context, x.new_empty((B, hidden, C))


def _native_fake(x: torch.Tensor, mem_kv: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B, hidden = x.shape[0], mem_kv.shape[1] * mem_kv.shape[2]
    statistics = x.new_empty((B, 2, hidden), dtype=torch.float32)
    return torch.empty_like(x), statistics, x.new_empty((B, hidden, x.shape[1]), dtype=torch.float32)


_triton_linear_attention_block = Operator(
    "linear_attention_block",
    f"{_ARGUMENTS}, bool adds_x",  # adds_x: x is the residual, and its gradient takes both ways in the kernels
    returns="out, statistics, sums, context, projection",
    fake=_triton_fake,
    backward="grad, x, gain_in, weight_qkv, mem_kv, weight, bias, gain, statistics, sums, context, projection, "
    "heads, adds_x",
    gradients="x, gain_in, weight_qkv, mem_kv, weight, bias, gain",
    passes="residual",
    triton=f"{__package__}.triton",
)
# Of an output with branches, where x is the residual.
_gradients_of_readers = Operator(
    "linear_attention_block_backward_of_readers",
    "Tensor grad, Tensor? grad2, Tensor x, Tensor gain_in, Tensor weight_qkv, Tensor mem_kv, Tensor weight, "
    "Tensor bias, Tensor gain, Tensor statistics, Tensor sums, Tensor context, Tensor projection, int heads",
    returns="dx, dgain_in, dweight_qkv, dmem_kv, dweight, dbias, dgain",
    fake=lambda x, gain_in, weight_qkv, mem_kv, weight, bias, gain, **_: (
        torch.empty_like(x),
        *(
            torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t in (gain_in, weight_qkv, mem_kv, weight, bias, gain)
        ),
    ),
    triton=f"{__package__}.triton",
)
_native_linear_attention_block = Operator(
    "linear_attention_block",
    _ARGUMENTS,
    # statistics: (B, 2, heads·D) float32, the maximum of k over positions and memory, and 1 / Σ exp(k − maximum);
    # sums: (B, heads·D, C) float32, softmax(k)ᵀ·(normed rows of x).
    returns="out, statistics, sums",
    fake=_native_fake,
    backward="grad, x, gain_in, weight_qkv, mem_kv, weight, bias, gain, statistics, sums, heads",
    gradients="x, gain_in, weight_qkv, mem_kv, weight, bias, gain",
    passes="residual",
    native=True,
)


def linear_attention_block(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None = None,
    recompute: bool = False,
) -> torch.Tensor:
    """RMSNorm, the qkv product and `linear_attention`.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). The kernels take channels-last,
            Triton's half types and 128 channels at most: the others run the steps.
        gain_in: the first norm's gain, C elements in any shape.
        weight_qkv: (3·heads·D, C) or (3·heads·D, C, 1, 1), its rows ordered (3, heads, D).
        mem_kv, weight, bias, gain, heads, residual: see `linear_attention`; weight, bias and gain have the C of x.
        recompute: backward keeps the arguments alone and runs the block again. The Triton and the native block always
            do, but for matrices of the size of weights.

    Returns:
        (B, C, H, W), dtype and memory format of x. Gradients flow to every tensor, once: a second derivative is
        refused.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check(x, gain_in, weight_qkv, mem_kv, weight, bias, gain, heads, residual)
    return unchecked_linear_attention_block(
        x, gain_in, weight_qkv, mem_kv, weight, bias, gain, heads=heads, residual=residual, recompute=recompute
    )


def _check(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    heads: int,
    residual: torch.Tensor | None,
) -> None:
    """The checks of the block's implementations."""
    given = {
        "x": x,
        "gain_in": gain_in,
        "weight_qkv": weight_qkv,
        "mem_kv": mem_kv,
        "weight": weight,
        "bias": bias,
        "gain": gain,
        "residual": residual,
    }
    check_kinds(given, heads)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    B, C, H, W = x.shape
    if mem_kv.dim() != 4 or mem_kv.shape[:2] != (2, heads) or mem_kv.shape[2] == 0:
        raise ValueError(f"mem_kv must have shape (2, {heads}, D, M), got {tuple(mem_kv.shape)}")
    hidden = heads * mem_kv.shape[2]
    if weight_qkv.shape not in ((3 * hidden, C), (3 * hidden, C, 1, 1)):
        expected = f"({3 * hidden}, {C}) or ({3 * hidden}, {C}, 1, 1)"
        raise ValueError(f"weight_qkv must have shape {expected}, got {tuple(weight_qkv.shape)}")
    if gain_in.numel() != C:
        raise ValueError(f"gain_in must have {C} elements, one per channel of x, got shape {tuple(gain_in.shape)}")
    if weight.dim() > 0 and weight.shape[0] != C:
        raise ValueError(f"weight must have the {C} channels of x as its first dimension, got {tuple(weight.shape)}")
    check_output(weight, bias, gain, residual, hidden, (B, H, W))


def _triton(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
    recompute: bool,
) -> torch.Tensor:
    adds_x = residual is x
    if adds_x and number_of_branches() > 0:
        arguments = (x, gain_in, weight_qkv, mem_kv, weight, bias, gain)
        return with_branches(*_BlockWithBranch.apply(*arguments, heads))
    residual = None if adds_x else residual
    return _triton_linear_attention_block.triton(
        x, gain_in, weight_qkv, mem_kv, weight, bias, gain, residual, heads, adds_x
    )[0]


class _BlockWithBranch(torch.autograd.Function):
    """The block of x plus x, and a branch of its output."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
        *tensors, ctx.heads = arguments
        out, *kept = _triton_linear_attention_block.triton(*tensors, None, ctx.heads, True)
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return and_branches(out, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad, grad2, _ = several(gradients)
        if grad is None:
            return (None,) * 8
        return *_gradients_of_readers.triton(grad, grad2, *ctx.saved_tensors, ctx.heads), None


def _triton_refuses(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
    recompute: bool,
) -> str | None:
    reason = triton_launch.why_not_triton(x.device)
    if reason is not None:
        return reason
    for tensor in (x, gain_in, weight_qkv, mem_kv, weight, bias, gain, residual):
        if tensor is not None and tensor.dtype == torch.float64:
            return "an argument is torch.float64, and the kernels compute in float32"
    if x.dtype == torch.float32:
        return "x is torch.float32, and tiles of it are too large for a program's registers"
    if x.numel() == 0:
        return "x is empty"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return f"x is not channels-last, its strides are {x.stride()}"
    if x[0].numel() > _LARGEST_SAMPLE:
        return f"a sample has {x[0].numel()} elements, and the kernels take at most {_LARGEST_SAMPLE}"
    return _why_too_large(heads, mem_kv.shape[2], x.shape[1])


def _why_too_large(heads: int, D: int, C: int) -> str | None:
    """Why no program holds a row of x and all heads, in one clause; None where it does.

    The block moves 10 maps of x per training step. The steps move about 10 + 6·qkv/x of them: at 128 hidden channels
    46 with 64 channels, 30 with 128, and 20 with 256, where two sums of (hidden, C) would fill all registers.
    """
    hidden = triton_launch.next_power_of_2(heads) * max(16, triton_launch.next_power_of_2(D))
    if hidden > _LARGEST_HIDDEN:
        return f"{heads} heads of {D} channels take {hidden} columns, and a program holds at most {_LARGEST_HIDDEN}"
    return None if C <= _LARGEST_ROW else f"x has {C} channels, and a program holds at most {_LARGEST_ROW}"


def _native(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
    recompute: bool,
) -> torch.Tensor:
    return _native_linear_attention_block.native(x, gain_in, weight_qkv, mem_kv, weight, bias, gain, residual, heads)[0]


def _native_refuses(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
    recompute: bool,
) -> str | None:
    given = {
        "x": x, "gain_in": gain_in, "weight_qkv": weight_qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias,
        "gain": gain, "residual": residual,
    }  # fmt: skip
    return why_not_on_cpu(given, maps=("x",), may_be_empty=("mem_kv",))


def _example(device: torch.device) -> tuple[tuple, dict]:
    x, row = torch.zeros(2, 4, 4, 16, device=device).permute(0, 3, 1, 2), torch.zeros(16, device=device)
    mem_kv, weight = torch.zeros(2, 1, 8, 4, device=device), torch.zeros(16, 8, device=device)
    options = {"heads": 1, "residual": None, "recompute": False}
    return (x, row, torch.zeros(24, 16, device=device), mem_kv, weight, row, row), options


# Without the checks, for callers whose arguments fit by construction: a network's modules.
unchecked_linear_attention_block = Op(
    "linear_attention_block",
    [
        Implementation("triton", _triton, _triton_refuses, or_steps=True),
        Implementation("native", _native, _native_refuses, why_steps_come_first),
        Implementation(COMPOSITE, composite.linear_attention_block),
    ],
    _example,
)
