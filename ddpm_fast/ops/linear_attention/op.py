"""Linear attention after the qkv product: declarations, public function, eligibility.

    q̂ = softmax(q) over the D channels of a head      k̂ = softmax(k) over positions and memory entries
    context = k̂ᵀ·v      y = D^−½·q̂·context·weightᵀ + bias      (Shen et al. 2021, "Efficient Attention", section 3.3)
    out = y / max(‖y‖₂, 1e-12)·√C·gain + residual      (Zhang & Sennrich 2019, in upstream's form)

Backward keeps the arguments except residual, and a context and its projection per sample and head; it recomputes the
maps.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.linear_attention import reference
from ddpm_fast.ops.linear_attention.launch import empty_output, why_too_large
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import Implementation, Op

_LARGEST_SAMPLE = 2**31 - 2**16  # elements that the kernels' 32-bit offsets reach within one sample

_ARGUMENTS = "Tensor qkv, Tensor mem_kv, Tensor weight, Tensor bias, Tensor gain, Tensor? residual, int heads"


def _triton_fake(
    qkv: torch.Tensor, mem_kv: torch.Tensor, weight: torch.Tensor, heads: int, **_: object
) -> tuple[torch.Tensor, ...]:
    B, C, D = qkv.shape[0], weight.shape[0], mem_kv.shape[2]
    context = qkv.new_empty((B, heads, D, D), dtype=torch.float32)
    statistics = qkv.new_empty((B, heads, 2, D), dtype=torch.float32)
    return empty_output(qkv, C), context, statistics, qkv.new_empty((B, heads * D, C))


def _native_fake(
    qkv: torch.Tensor, mem_kv: torch.Tensor, weight: torch.Tensor, **_: object
) -> tuple[torch.Tensor, ...]:
    B, heads, D = qkv.shape[0], *mem_kv.shape[1:3]
    statistics = qkv.new_empty((B, 2, heads * D), dtype=torch.float32)
    return empty_output(qkv, weight.shape[0]), statistics, qkv.new_empty((B, heads * D, D), dtype=torch.float32)


_triton_linear_attention = Operator(
    "linear_attention",
    _ARGUMENTS,
    returns="out, context, statistics, projection",
    fake=_triton_fake,
    backward="grad, qkv, mem_kv, weight, bias, gain, context, statistics, projection, heads",
    gradients="qkv, mem_kv, weight, bias, gain",
    maps="qkv",
    passes="residual",
    triton=f"{__package__}.triton",
)
_native_linear_attention = Operator(
    "linear_attention",
    _ARGUMENTS,
    # statistics: (B, 2, heads·D) float32, of k over positions and memory the largest and 1 / Σ exp(k − largest).
    # sums: softmax(k)ᵀ·v of the positions.
    returns="out, statistics, sums",
    fake=_native_fake,
    backward="grad, qkv, mem_kv, weight, bias, gain, statistics, sums, heads",
    gradients="qkv, mem_kv, weight, bias, gain",
    maps="qkv",
    passes="residual",
    native=True,
)


def linear_attention(
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Linear attention of q, k, v with learned memory keys and values, the output projection and its norm.

    Args:
        qkv: (B, 3·heads·D, H, W) float32, float16, bfloat16 (float64: reference only), channels ordered
            (3, heads, D). Statistics and sums are float32. Channels-last is the fast layout, contiguous runs as well;
            others run the reference.
        mem_kv: (2, heads, D, M), keys and values that precede those of the H·W positions; M may be 0.
        weight: (C, heads·D) or (C, heads·D, 1, 1), the 1×1 convolution after attention.
        bias: (C,), that convolution's.
        gain: the norm's gain, C elements in any shape; upstream's is (1, C, 1, 1).
        heads: of D channels each; the kernels take D up to 64 in float32 and 128 in half types.
        residual: (B, C, H, W), added last.

    Returns:
        (B, C, H, W), dtype and memory format of qkv. Gradients flow to every tensor.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check(qkv, mem_kv, weight, bias, gain, heads, residual)
    return _linear_attention_op(qkv, mem_kv, weight, bias, gain, heads=heads, residual=residual)


def _check(
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    heads: int,
    residual: torch.Tensor | None,
) -> None:
    """The checks of every implementation."""
    check_kinds(
        {"qkv": qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias, "gain": gain, "residual": residual}, heads
    )
    if qkv.dim() != 4:
        raise ValueError(f"qkv must have shape (B, 3·heads·D, H, W), got {tuple(qkv.shape)}")
    B, channels, H, W = qkv.shape
    if channels == 0 or channels % (3 * heads):
        raise ValueError(f"heads must divide a third of the {channels} channels of qkv, got {heads}")
    hidden = channels // 3
    D = hidden // heads
    if mem_kv.dim() != 4 or mem_kv.shape[:3] != (2, heads, D):
        raise ValueError(f"mem_kv must have shape (2, {heads}, {D}, M), got {tuple(mem_kv.shape)}")
    check_output(weight, bias, gain, residual, hidden, (B, H, W))


def check_kinds(given: dict[str, torch.Tensor | None], heads: int) -> None:
    """Types, dtypes and devices; the first is the map, and residual may be None."""
    check_tensors(given, optional=("residual",))
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive integer, got {heads!r}")


def check_output(
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    residual: torch.Tensor | None,
    hidden: int,
    sizes: tuple[int, int, int],
) -> None:
    """The arguments of the output projection, for maps of B, H, W."""
    if weight.dim() not in (2, 4) or weight.shape[1:].numel() != hidden or weight.shape[1] != hidden:
        raise ValueError(f"weight must have shape (C, {hidden}) or (C, {hidden}, 1, 1), got {tuple(weight.shape)}")
    C, (B, H, W) = weight.shape[0], sizes
    if bias.shape != (C,):
        raise ValueError(f"bias must have shape ({C},), got {tuple(bias.shape)}")
    if gain.numel() != C:
        raise ValueError(f"gain must have {C} elements, one per channel of the output, got shape {tuple(gain.shape)}")
    if residual is not None and residual.shape != (B, C, H, W):
        raise ValueError(f"residual must have shape {(B, C, H, W)}, got {tuple(residual.shape)}")


def _triton(
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return _triton_linear_attention.triton(qkv, mem_kv, weight, bias, gain, residual, heads)[0]


def _triton_refuses(
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
) -> str | None:
    reason = triton_launch.why_not_triton(qkv.device)
    if reason is not None:
        return reason
    given = {"qkv": qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias, "gain": gain, "residual": residual}
    for name, tensor in given.items():
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is torch.float64, and the kernels compute in float32"
    if qkv.numel() == 0 or weight.numel() == 0:
        return f"{'qkv' if qkv.numel() == 0 else 'weight'} is empty"
    if not (qkv.is_contiguous() or qkv.is_contiguous(memory_format=torch.channels_last)):
        return f"qkv is neither contiguous nor channels-last, its strides are {qkv.stride()}"
    C, N = weight.shape[0], qkv.shape[2] * qkv.shape[3]
    largest = max(qkv.shape[1], C) * N
    if largest > _LARGEST_SAMPLE:
        return f"a sample has {largest} elements, and the kernels take at most {_LARGEST_SAMPLE}"
    return why_too_large(mem_kv.shape[2], qkv.dtype)


def _native(
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return _native_linear_attention.native(qkv, mem_kv, weight, bias, gain, residual, heads)[0]


def _native_refuses(
    qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    gain: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None,
) -> str | None:
    given = {"qkv": qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias, "gain": gain, "residual": residual}
    return why_not_on_cpu(given, maps=("qkv",), may_be_empty=("mem_kv",))


def _example(device: torch.device) -> tuple[tuple, dict]:
    qkv, mem_kv = torch.zeros(2, 4, 4, 24, device=device).permute(0, 3, 1, 2), torch.zeros(2, 1, 8, 4, device=device)
    row = torch.zeros(16, device=device)
    return (qkv, mem_kv, torch.zeros(16, 8, device=device), row, row), {"heads": 1, "residual": None}


_linear_attention_op = Op(
    "linear_attention",
    [
        Implementation("triton", _triton, _triton_refuses),
        Implementation("native", _native, _native_refuses),
        Implementation("reference", reference.linear_attention),
    ],
    _example,
)
