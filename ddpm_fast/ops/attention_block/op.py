"""Softmax attention as a whole block: public functions, registration, eligibility.

    out = weight·attention(weight_qkv·RMSNorm(x)) + bias + residual   (upstream's, with memory), or
    out = (weight·attention(weight_qkv·GroupNorm(x) + bias_qkv) + bias + x)·output_scale   (Ho et al. 2020)

The native block keeps x alone for backward and computes qkv and the softmax again.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu, why_steps_come_first
from ddpm_fast.ops.attention.op import check_kinds
from ddpm_fast.ops.attention_block import composite
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime.dispatch import COMPOSITE, Implementation, Op

ORDERS = ("3hd", "h3d", "hd3")  # of the rows of a qkv product


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


def _kept_row(channels: int) -> int:
    """The floats between two rows of the maps that native forward keeps, as attention.h has it."""
    return (channels + 15) // 16 * 16 | 16


def _group_norm_fake(
    x: torch.Tensor, weight: torch.Tensor, groups: int, folded: bool, keep: bool, **_: object
) -> tuple[torch.Tensor, ...]:
    (B, C, h, w), hidden = x.shape, weight.shape[1]
    shapes: list[tuple[int, ...]] = [(B, groups, 2), (B, h * w, _kept_row(3 * hidden))]
    shapes.append((2, C, C) if folded else (B, h * w, _kept_row(hidden)))
    return torch.empty_like(x), *(x.new_empty(shape if keep else (0,), dtype=torch.float32) for shape in shapes)


_group_norm_attention_block = Operator(
    "group_norm_attention_block",
    # Without `keep` only out is returned, and empty tensors in place of the others. `folded`: see `_folds`.
    "Tensor x, Tensor? gain, Tensor? offset, Tensor weight_qkv, Tensor? bias_qkv, Tensor weight, Tensor? bias, "
    "int groups, float eps, int heads, bool by_head, bool folded, bool residual, float output_scale, bool keep",
    returns="out, statistics, qkv, attended",
    fake=_group_norm_fake,
    backward="grad, x, gain, offset, weight_qkv, bias_qkv, weight, statistics, qkv, attended, groups, heads, by_head, "
    "folded, residual, output_scale, wants_weights",
    gradients="x, gain, offset, weight_qkv, bias_qkv, weight, bias",
    rows={"bias": "weight"},
    wanted={"wants_weights": "weight_qkv, bias_qkv, weight, bias"},
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


def group_norm_attention_block(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    offset: torch.Tensor | None,
    weight_qkv: torch.Tensor,
    bias_qkv: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    groups: int,
    heads: int,
    eps: float = 1e-5,
    order: str = "3hd",
    residual: bool = True,
    output_scale: float = 1.0,
) -> torch.Tensor:
    """GroupNorm, the qkv product, `attention` without memory, a 1×1 convolution and the residual.

    Args:
        x: (B, C, h, w) float32, float16, bfloat16 (float64: not native). The native code takes channels-last.
        gain, offset: (C,), the norm's own affine map; None where groups is 0.
        weight_qkv: (3·heads·D, C), or with one or two dimensions of 1 more: a linear layer's or a convolution's.
        bias_qkv: (3·heads·D,).
        weight: (C, heads·D), or with dimensions of 1 more, the layer after attention.
        bias: (C,), that layer's.
        groups: of the norm; 0 is none.
        heads: number of heads.
        eps: added to the variance.
        order: of the rows of weight_qkv and bias_qkv: "3hd", "h3d" or "hd3" for (3, heads, D), (heads, 3, D) and
            (heads, D, 3).
        residual: whether x is added last.
        output_scale: of the sum.

    Returns:
        (B, C, h, w) in the dtype and memory format of x. Gradients flow to every tensor, once.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check_group_norm_block(x, gain, offset, weight_qkv, bias_qkv, weight, bias, groups, heads, order)
    return unchecked_group_norm_attention_block(
        x, gain, offset, weight_qkv, bias_qkv, weight, bias, groups=groups, heads=heads, eps=eps, order=order,
        residual=residual, output_scale=output_scale,
    )  # fmt: skip


def _check_group_norm_block(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    offset: torch.Tensor | None,
    weight_qkv: torch.Tensor,
    bias_qkv: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    heads: int,
    order: str,
) -> None:
    """The checks of the block's implementations."""
    given = {"x": x, "gain": gain, "offset": offset, "weight_qkv": weight_qkv, "bias_qkv": bias_qkv, "weight": weight}
    check_tensors(given | {"bias": bias}, optional=("gain", "offset", "bias_qkv", "bias"))
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive integer, got {heads!r}")
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, h, w), got {tuple(x.shape)}")
    C = x.shape[1]
    if not isinstance(groups, int) or groups < 0 or (groups > 0 and C % groups):
        raise ValueError(f"groups must divide the {C} channels of x, or be 0, got {groups!r}")
    for name, row in (("gain", gain), ("offset", offset)):
        if (row is None) != (groups == 0):
            raise ValueError(f"{name} must be None where groups is 0, and only there, got groups = {groups}")
    hidden = weight.shape[1] if weight.dim() > 1 else 0
    if hidden == 0 or hidden % heads or not _is_matrix(weight, C, hidden):
        raise ValueError(f"weight must have shape ({C}, {heads}·D), 1s may follow, got {tuple(weight.shape)}")
    if not _is_matrix(weight_qkv, 3 * hidden, C):
        raise ValueError(f"weight_qkv must have shape {(3 * hidden, C)}, 1s may follow, got {tuple(weight_qkv.shape)}")
    rows = (("gain", gain, C), ("offset", offset, C), ("bias_qkv", bias_qkv, 3 * hidden), ("bias", bias, C))
    for name, row, size in rows:
        if row is not None and row.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(row.shape)}")


def _is_matrix(weight: torch.Tensor, rows: int, columns: int) -> bool:
    return 2 <= weight.dim() <= 4 and weight.shape == (rows, columns, *(1,) * (weight.dim() - 2))


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


def _native_group_norm(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    offset: torch.Tensor | None,
    weight_qkv: torch.Tensor,
    bias_qkv: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    groups: int,
    heads: int,
    eps: float,
    order: str,
    residual: bool,
    output_scale: float,
) -> torch.Tensor:
    if order == "hd3":
        D = weight.shape[1] // heads
        weight_qkv = composite.as_3hd(weight_qkv, heads, D, order)
        bias_qkv = None if bias_qkv is None else composite.as_3hd(bias_qkv, heads, D, order)
    tensors = (x, gain, offset, weight_qkv, bias_qkv, weight, bias)
    options = (groups, eps, heads, order == "h3d", _folds(x, weight, heads), residual, output_scale)
    return _group_norm_attention_block.native(*tensors, *options, torch.is_grad_enabled())[0]


def _folds(x: torch.Tensor, weight: torch.Tensor, heads: int) -> bool:
    """Whether the native block multiplies weights beforehand: for one head, and where it saves more than that costs."""
    B, C, h, w = x.shape
    return heads == 1 and weight.shape[1] == C and B * h * w >= 2 * C


def _native_group_norm_refuses(
    x: torch.Tensor,
    gain: torch.Tensor | None,
    offset: torch.Tensor | None,
    weight_qkv: torch.Tensor,
    bias_qkv: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    **_: object,
) -> str | None:
    given = {
        "x": x, "gain": gain, "offset": offset, "weight_qkv": weight_qkv, "bias_qkv": bias_qkv, "weight": weight,
        "bias": bias,
    }  # fmt: skip
    return why_not_on_cpu(given, maps=("x",))


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


def _group_norm_example(device: torch.device) -> tuple[tuple, dict]:
    x, row = torch.zeros(1, 4, 4, 8, device=device).permute(0, 3, 1, 2), torch.zeros(8, device=device)
    weight = torch.zeros(8, 32, device=device)
    tensors = (x, row, row, torch.zeros(96, 8, device=device), torch.zeros(96, device=device), weight, row)
    options = {"eps": 1e-5, "order": "3hd", "residual": True, "output_scale": 1.0}
    return tensors, {"groups": 2, "heads": 2, **options}


unchecked_group_norm_attention_block = Op(
    "group_norm_attention_block",
    [
        Implementation("native", _native_group_norm, _native_group_norm_refuses, why_steps_come_first),
        Implementation(COMPOSITE, composite.group_norm_attention_block),
    ],
    _group_norm_example,
)
