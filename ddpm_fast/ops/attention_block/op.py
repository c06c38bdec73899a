"""Softmax attention as a whole block: public function, registration, eligibility.

    out = weight·attention(weight_qkv·RMSNorm(x)) + bias + residual

The native block keeps x alone for backward and computes qkv and the softmax again.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import why_not_on_cpu, why_steps_come_first
from ddpm_fast.ops.attention.op import check_kinds
from ddpm_fast.ops.attention_block import composite
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime.dispatch import COMPOSITE, Implementation, Op


def _fake(x: torch.Tensor, **_: object) -> torch.Tensor:
    return torch.empty_like(x)


_attention_block = Operator(
    "attention_block",
    "Tensor x, Tensor gain_in, Tensor weight_qkv, Tensor mem_kv, Tensor weight, Tensor bias, Tensor? residual, "
    "int heads",
    returns="out",
    fake=_fake,
    backward="grad, x, gain_in, weight_qkv, mem_kv, weight, bias, heads",
    gradients="x, gain_in, weight_qkv, mem_kv, weight, bias",
    passes="residual",
    native=True,
)


def attention_block(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm, the qkv product, `attention`, a 1×1 convolution and a residual.

    Args:
        x: (B, C, h, w) float32, float16, bfloat16 (float64: not native). The native code takes channels-last.
        gain_in: the norm's gain, C elements in any shape: qkv is the product of x / max(‖x‖₂, 1e-12)·√C·gain_in.
        weight_qkv: (3·heads·D, C) or (3·heads·D, C, 1, 1), its rows ordered (3, heads, D).
        mem_kv: (2, heads, M, D), see `attention`.
        weight: (C, heads·D) or (C, heads·D, 1, 1), the convolution after attention.
        bias: (C,), that convolution's.
        heads: number of heads.
        residual: (B, C, h, w), added last.

    Returns:
        (B, C, h, w) in the dtype and memory format of x. Gradients flow to every tensor, once: a second derivative is
        refused.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    given = {"x": x, "gain_in": gain_in, "weight_qkv": weight_qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias}
    _check(given, heads, residual)
    return unchecked_attention_block(*given.values(), heads=heads, residual=residual)


def _check(given: dict[str, torch.Tensor], heads: int, residual: torch.Tensor | None) -> None:
    """The checks of the block's implementations."""
    check_kinds(given if residual is None else given | {"residual": residual}, heads)
    x, gain_in, weight_qkv, mem_kv, weight, bias = given.values()
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, h, w), got {tuple(x.shape)}")
    if mem_kv.dim() != 4 or mem_kv.shape[:2] != (2, heads) or mem_kv.shape[3] == 0:
        raise ValueError(f"mem_kv must have shape (2, {heads}, M, D), got {tuple(mem_kv.shape)}")
    C, hidden = x.shape[1], heads * mem_kv.shape[3]
    for name, tensor, shape in (("weight_qkv", weight_qkv, (3 * hidden, C)), ("weight", weight, (C, hidden))):
        if tensor.shape not in (shape, (*shape, 1, 1)):
            raise ValueError(f"{name} must have shape {shape} or {(*shape, 1, 1)}, got {tuple(tensor.shape)}")
    if gain_in.numel() != C:
        raise ValueError(f"gain_in must have {C} elements, one per channel of x, got shape {tuple(gain_in.shape)}")
    if bias.shape != (C,):
        raise ValueError(f"bias must have shape ({C},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have shape {tuple(x.shape)}, got {tuple(residual.shape)}")


def _native(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return _attention_block.native(x, gain_in, weight_qkv, mem_kv, weight, bias, residual, heads)


def _native_refuses(
    x: torch.Tensor,
    gain_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
) -> str | None:
    given = {
        "x": x, "gain_in": gain_in, "weight_qkv": weight_qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias,
        "residual": residual,
    }  # fmt: skip
    return why_not_on_cpu(given, maps=("x",), may_be_empty=("mem_kv",))


def _example(device: torch.device) -> tuple[tuple, dict]:
    x, row = torch.zeros(1, 4, 4, 8, device=device).permute(0, 3, 1, 2), torch.zeros(8, device=device)
    mem_kv, weight = torch.zeros(2, 2, 4, 16, device=device), torch.zeros(8, 32, device=device)
    return (x, row, torch.zeros(96, 8, device=device), mem_kv, weight, row), {"heads": 2, "residual": None}


# Without the checks, for callers whose arguments fit by construction: a network's modules.
unchecked_attention_block = Op(
    "attention_block",
    [
        Implementation("native", _native, _native_refuses, why_steps_come_first),
        Implementation(COMPOSITE, composite.attention_block),
    ],
    _example,
)
