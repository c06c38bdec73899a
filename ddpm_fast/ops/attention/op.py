"""Softmax attention over the positions of a map, with memory: declarations, public function, eligibility.

    out = softmax(q·kᵀ / √D)·v   (Vaswani et al. 2017, eq. 1)

per sample and head, where M learned keys and values, the same for every sample, precede the N keys and values of
the map. Backward keeps qkv, out and one float per head and position, and computes the softmax again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.attention import reference
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import Implementation, Op, never_refuses

_LARGEST_HEAD = 128  # dimensions of a head that a program of the kernels holds
_LARGEST_SAMPLE = 2**31 - 2**16  # elements that the kernels' 32-bit offsets reach within one sample

# Positions up to which our kernels are preferred to torch's. An ESTIMATE, to be replaced by a measurement: no GPU has
# timed either (benchmarks/bench_ops.py does). torch's needs the memory concatenated and the gradients of q, k and v
# stacked: about 10·N·H·D numbers more to move per image in a training step and 8 operators more to launch. It is taken
# to be faster per product: for half types by a tenth (N² outgrows the bytes near 1000), and for float32, where torch
# uses tensor cores (three products of TF32 for one) and ours the FMA units, by three (the launches pay up to a few
# hundred positions and a small batch). Wider heads leave float32 tiles of 16 × 16, which is too little work per number
# read at any N.
_OURS_UP_TO = {torch.float16: 1024, torch.bfloat16: 1024, torch.float32: 256}
_WIDEST_HEAD_OF_OURS = {torch.float16: _LARGEST_HEAD, torch.bfloat16: _LARGEST_HEAD, torch.float32: 64}


def _empty_map(qkv: torch.Tensor) -> torch.Tensor:
    B, channels, h, w = qkv.shape
    channels_last = qkv.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((B, channels // 3, h, w), dtype=qkv.dtype, device=qkv.device, memory_format=memory_format)


def _triton_fake(qkv: torch.Tensor, heads: int, **others: object) -> tuple[torch.Tensor, torch.Tensor]:
    B, _, h, w = qkv.shape
    return _empty_map(qkv), qkv.new_empty((B, heads, h * w), dtype=torch.float32)


def _native_fake(qkv: torch.Tensor, **_: object) -> torch.Tensor:
    B, channels, h, w = qkv.shape
    return qkv.new_empty((B, channels // 3, h, w)).contiguous(memory_format=torch.channels_last)


_triton_attention = Operator(
    "attention",
    "Tensor qkv, Tensor mem_kv, int heads",
    returns="out, lse",  # lse: (B, heads, N) float32, log2 of the sum of 2^(scores·log2 e)
    fake=_triton_fake,
    backward="grad, qkv, mem_kv, out, lse, heads",
    gradients="qkv, mem_kv",
    maps="qkv",
    triton=f"{__package__}.triton",
)
_native_attention = Operator(
    "attention",
    "Tensor qkv, Tensor mem_kv, int heads",
    returns="out",
    fake=_native_fake,
    backward="grad, qkv, mem_kv, heads",  # the softmax is computed again from qkv
    gradients="qkv, mem_kv",
    maps="qkv",
    native=True,
)


def attention(qkv: torch.Tensor, mem_kv: torch.Tensor, *, heads: int) -> torch.Tensor:
    """Attention of all positions of a map to each other and to the memory.

    Args:
        qkv: (B, 3·heads·D, h, w) float32, float16, bfloat16 (float64: not in Triton), the channels ordered (3, heads,
            D): q, k, v as one 1×1 convolution gives them. Channels-last is the fast layout, contiguous runs as well;
            the Triton kernels leave others to torch, and heads of more than 128 dimensions.
        mem_kv: (2, heads, M, D) with any M ≥ 0 and any of these dtypes: keys and values of the memory.
        heads: number of heads.

    Returns:
        (B, heads·D, h, w) in the dtype and memory format of qkv, computed in that dtype under autocast too; softmax and
        sums are float32. Gradients flow to qkv and mem_kv, and do not vary between runs where
        `torch.use_deterministic_algorithms` is on: the Triton kernels, where they run, then run at every size.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    _check(qkv, mem_kv, heads)
    return _attention_op(qkv, mem_kv, heads=heads)


def _check(qkv: torch.Tensor, mem_kv: torch.Tensor, heads: int) -> None:
    """The checks of every implementation."""
    check_kinds({"qkv": qkv, "mem_kv": mem_kv}, heads)
    if qkv.dim() != 4 or qkv.shape[1] == 0 or qkv.shape[1] % (3 * heads):
        raise ValueError(f"qkv must have shape (B, 3·{heads}·D, h, w), got {tuple(qkv.shape)}")
    D = qkv.shape[1] // (3 * heads)
    if mem_kv.dim() != 4 or mem_kv.shape[:2] != (2, heads) or mem_kv.shape[3] != D:
        raise ValueError(f"mem_kv must have shape (2, {heads}, M, {D}), got {tuple(mem_kv.shape)}")


def check_kinds(given: dict[str, torch.Tensor], heads: int) -> None:
    """Types, dtypes and devices; the first is the map."""
    check_tensors(given)
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive integer, got {heads!r}")


def _triton(qkv: torch.Tensor, mem_kv: torch.Tensor, *, heads: int) -> torch.Tensor:
    return _triton_attention.triton(qkv, mem_kv, heads)[0]


def _triton_refuses(qkv: torch.Tensor, mem_kv: torch.Tensor, *, heads: int) -> str | None:
    reason = triton_launch.why_not_triton(qkv.device)
    if reason is not None:
        return reason
    for name, tensor in {"qkv": qkv, "mem_kv": mem_kv}.items():
        if tensor.dtype == torch.float64:
            return f"{name} is torch.float64, and the kernels compute in float32"
    if qkv.numel() == 0:
        return "qkv is empty"
    if not (qkv.is_contiguous() or qkv.is_contiguous(memory_format=torch.channels_last)):
        return f"qkv is neither contiguous nor channels-last, its strides are {qkv.stride()}"
    if mem_kv.shape[3] > _LARGEST_HEAD:
        return f"heads have {mem_kv.shape[3]} dimensions, and a program of the kernels holds at most {_LARGEST_HEAD}"
    if qkv.shape[1:].numel() > _LARGEST_SAMPLE:
        return f"a sample has {qkv.shape[1:].numel()} elements, and the kernels take at most {_LARGEST_SAMPLE}"
    return None


def _triton_yields(qkv: torch.Tensor, mem_kv: torch.Tensor, *, heads: int) -> str | None:
    """The rule between our kernels and torch's; see the tables above.

    Where deterministic algorithms are asked for ours stay: the backward of torch's adds with atomics.
    """
    if torch.are_deterministic_algorithms_enabled():
        return None
    N, D = qkv.shape[2] * qkv.shape[3], mem_kv.shape[3]
    for name, size, largest in (("N", N, _OURS_UP_TO[qkv.dtype]), ("D", D, _WIDEST_HEAD_OF_OURS[qkv.dtype])):
        if size > largest:
            return f"{name} = {size} is past the {largest} up to which ours is assumed faster than sdpa in {qkv.dtype}"
    return None


def _native(qkv: torch.Tensor, mem_kv: torch.Tensor, *, heads: int) -> torch.Tensor:
    return _native_attention.native(qkv, mem_kv, heads)


def _native_refuses(qkv: torch.Tensor, mem_kv: torch.Tensor, *, heads: int) -> str | None:
    return why_not_on_cpu({"qkv": qkv, "mem_kv": mem_kv}, maps=("qkv",), may_be_empty=("mem_kv",))


def _example(
    side: int, D: int = 16, dtype: torch.dtype = torch.float32
) -> Callable[[torch.device], tuple[tuple, dict]]:
    def example(device: torch.device) -> tuple[tuple, dict]:
        qkv = torch.zeros(1, 3 * 2 * D, side, side, device=device, dtype=dtype)
        qkv = qkv.contiguous(memory_format=torch.channels_last)
        return (qkv, torch.zeros(2, 2, 4, D, device=device)), {"heads": 2}

    return example


_attention_op = Op(
    "attention",
    [
        Implementation("triton", _triton, _triton_refuses, _triton_yields),
        Implementation("native", _native, _native_refuses),
        Implementation("sdpa", reference.sdpa_attention, never_refuses),
        Implementation("reference", reference.attention),
    ],
    _example(16),
    {
        "attention, N = 4096": _example(64),
        "attention, bfloat16, N = 4096": _example(64, dtype=torch.bfloat16),
        "attention, D = 128": _example(4, D=128),
    },
)
