"""Softmax attention over the positions of a map, with memory, alone and as a whole block: public functions,
registration, eligibility.

    out = softmax(q·kᵀ / √D)·v   (Vaswani et al. 2017, eq. 1)

per sample and head, where M learned keys and values, the same for every sample, stand before the N keys and values of
the map. Backward keeps qkv, out and one float per head and position, and computes the softmax again. The block makes
qkv of a normed map and ends with a 1×1 convolution and a residual; its backward keeps the map alone.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import check_tensors, why_not_on_cpu
from ddpm_fast.ops.attention import reference
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

_library = torch.library.Library("ddpm_fast", "FRAGMENT")
for _schema in (
    # lse: (B, heads, N) float32, log2 of the sum of 2^(scores·log2 e).
    "attention(Tensor qkv, Tensor mem_kv, int heads) -> (Tensor out, Tensor lse)",
    "attention_backward(Tensor grad, Tensor qkv, Tensor mem_kv, Tensor out, Tensor lse, int heads)"
    " -> (Tensor dqkv, Tensor dmem_kv)",
    # Implemented in csrc/cpu/attention_cpu.cpp, where the softmax is made again from qkv, and that from x.
    "native_attention(Tensor qkv, Tensor mem_kv, int heads) -> Tensor",
    "native_attention_backward(Tensor grad, Tensor qkv, Tensor mem_kv, int heads) -> (Tensor dqkv, Tensor dmem_kv)",
    "native_attention_block(Tensor x, Tensor g_in, Tensor weight_qkv, Tensor mem_kv, Tensor weight, Tensor bias,"
    " Tensor? residual, int heads) -> Tensor",
    "native_attention_block_backward(Tensor grad, Tensor x, Tensor g_in, Tensor weight_qkv, Tensor mem_kv,"
    " Tensor weight, Tensor bias, int heads)"
    " -> (Tensor dx, Tensor dg_in, Tensor dweight_qkv, Tensor dmem_kv, Tensor dweight, Tensor dbias)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_library, "attention", "CPU")
@torch.library.impl(_library, "attention", "CUDA")
def _attention(qkv, mem_kv, heads):
    from ddpm_fast.ops.attention import triton as kernel

    out = reference.empty_map(qkv)
    return out, kernel.forward(qkv, mem_kv, heads, out)


@torch.library.impl(_library, "attention_backward", "CPU")
@torch.library.impl(_library, "attention_backward", "CUDA")
def _attention_backward(grad, qkv, mem_kv, out, lse, heads):
    from ddpm_fast.ops.attention import triton as kernel

    dqkv, dmem_kv = kernel.backward(grad, qkv, mem_kv, out, lse, heads)
    return dqkv, dmem_kv.to(mem_kv.dtype)


@torch.library.register_fake("ddpm_fast::attention", lib=_library)
def _attention_fake(qkv, mem_kv, heads):
    B, _, h, w = qkv.shape
    return reference.empty_map(qkv), qkv.new_empty((B, heads, h * w), dtype=torch.float32)


@torch.library.register_fake("ddpm_fast::attention_backward", lib=_library)
def _attention_backward_fake(grad, qkv, mem_kv, out, lse, heads):
    return torch.empty_like(qkv), mem_kv.new_empty(mem_kv.shape)


def _setup_context(ctx, inputs, output) -> None:
    qkv, mem_kv, heads = inputs
    out, lse = output
    ctx.save_for_backward(qkv, mem_kv, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.heads = heads


def _backward(ctx, grad, _):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention: the Triton kernel's gradient cannot be differentiated again (create_graph=True); "
            'use ddpm_fast.use_backend("reference") for second derivatives'
        )
    return *torch.ops.ddpm_fast.attention_backward(grad, *ctx.saved_tensors, ctx.heads), None


torch.library.register_autograd("ddpm_fast::attention", _backward, setup_context=_setup_context, lib=_library)


@torch.library.register_fake("ddpm_fast::native_attention", lib=_library)
def _native_fake(qkv, mem_kv, heads):
    B, channels, h, w = qkv.shape
    return qkv.new_empty((B, channels // 3, h, w)).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("ddpm_fast::native_attention_backward", lib=_library)
def _native_backward_fake(grad, qkv, mem_kv, heads):
    return torch.empty_like(qkv), mem_kv.new_empty(mem_kv.shape)


@torch.library.register_fake("ddpm_fast::native_attention_block", lib=_library)
def _native_block_fake(x, g_in, weight_qkv, mem_kv, weight, bias, residual, heads):
    return torch.empty_like(x)


@torch.library.register_fake("ddpm_fast::native_attention_block_backward", lib=_library)
def _native_block_backward_fake(grad, x, g_in, weight_qkv, mem_kv, weight, bias, heads):
    return torch.empty_like(x), *(t.new_empty(t.shape) for t in (g_in, weight_qkv, mem_kv, weight, bias))


def _setup_native_context(ctx, inputs, output) -> None:
    *tensors, heads = inputs
    ctx.save_for_backward(*tensors)
    ctx.heads = heads


def _native_backward(ctx, grad):
    _refuse_second_derivatives("attention")
    return *torch.ops.ddpm_fast.native_attention_backward(grad, *ctx.saved_tensors, ctx.heads), None


def _setup_native_block_context(ctx, inputs, output) -> None:
    *tensors, residual, heads = inputs
    ctx.save_for_backward(*tensors)
    ctx.heads = heads
    ctx.residual_dtype = None if residual is None else residual.dtype


def _native_block_backward(ctx, grad):
    _refuse_second_derivatives("attention_block")
    gradients = torch.ops.ddpm_fast.native_attention_block_backward(grad, *ctx.saved_tensors, ctx.heads)
    return *gradients, None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype), None


def _refuse_second_derivatives(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name}: the native kernel's gradient cannot be differentiated again (create_graph=True)")


for _name, _gradients, _setup in (
    ("native_attention", _native_backward, _setup_native_context),
    ("native_attention_block", _native_block_backward, _setup_native_block_context),
):
    torch.library.register_autograd(f"ddpm_fast::{_name}", _gradients, setup_context=_setup, lib=_library)


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
        TypeError, ValueError: an argument is not what is said here.
    """
    _check(qkv, mem_kv, heads)
    return _attention_op(qkv, mem_kv, heads=heads)


def attention_block(
    x: torch.Tensor,
    g_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm, the qkv product, `attention`, a 1×1 convolution and a residual in one op, which keeps x for backward.

    Args:
        x: (B, C, h, w) float32, float16, bfloat16 (float64: not native). The native code takes channels-last.
        g_in: the norm's gain, C elements in any shape: x / max(‖x‖₂, 1e-12)·√C·g_in is what qkv is made of.
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
        TypeError, ValueError: an argument is not what is said here.
    """
    given = {"x": x, "g_in": g_in, "weight_qkv": weight_qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias}
    _check_block(given, heads, residual)
    return _attention_block_op(*given.values(), heads=heads, residual=residual)


def attention_block_natively(
    x, g_in, weight_qkv, mem_kv, weight, bias, *, heads: int, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`attention_block` without its checks, for callers that know that it runs natively."""
    _attention_block_op.count("native")
    return _native_block(x, g_in, weight_qkv, mem_kv, weight, bias, heads=heads, residual=residual)


def _check(qkv, mem_kv, heads) -> None:
    """The checks of every implementation."""
    _check_kinds({"qkv": qkv, "mem_kv": mem_kv}, heads)
    if qkv.dim() != 4 or qkv.shape[1] == 0 or qkv.shape[1] % (3 * heads):
        raise ValueError(f"qkv must have shape (B, 3·{heads}·D, h, w), got {tuple(qkv.shape)}")
    D = qkv.shape[1] // (3 * heads)
    if mem_kv.dim() != 4 or mem_kv.shape[:2] != (2, heads) or mem_kv.shape[3] != D:
        raise ValueError(f"mem_kv must have shape (2, {heads}, M, {D}), got {tuple(mem_kv.shape)}")


def _check_block(given: dict[str, torch.Tensor], heads: int, residual: torch.Tensor | None) -> None:
    """The checks of the block's implementations."""
    _check_kinds(given if residual is None else given | {"residual": residual}, heads)
    x, g_in, weight_qkv, mem_kv, weight, bias = given.values()
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, h, w), got {tuple(x.shape)}")
    if mem_kv.dim() != 4 or mem_kv.shape[:2] != (2, heads) or mem_kv.shape[3] == 0:
        raise ValueError(f"mem_kv must have shape (2, {heads}, M, D), got {tuple(mem_kv.shape)}")
    C, hidden = x.shape[1], heads * mem_kv.shape[3]
    for name, tensor, shape in (("weight_qkv", weight_qkv, (3 * hidden, C)), ("weight", weight, (C, hidden))):
        if tensor.shape not in (shape, (*shape, 1, 1)):
            raise ValueError(f"{name} must have shape {shape} or {(*shape, 1, 1)}, got {tuple(tensor.shape)}")
    if g_in.numel() != C:
        raise ValueError(f"g_in must have {C} elements, one per channel of x, got shape {tuple(g_in.shape)}")
    if bias.shape != (C,):
        raise ValueError(f"bias must have shape ({C},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have shape {tuple(x.shape)}, got {tuple(residual.shape)}")


def _check_kinds(given: dict[str, torch.Tensor], heads: int) -> None:
    """Types, dtypes and devices; the first is the map."""
    check_tensors(given)
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive integer, got {heads!r}")


def _triton(qkv, mem_kv, *, heads) -> torch.Tensor:
    return torch.ops.ddpm_fast.attention(qkv, mem_kv, heads)[0]


def _triton_refuses(qkv, mem_kv, *, heads) -> str | None:
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


def _triton_yields(qkv, mem_kv, *, heads) -> str | None:
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


def _native(qkv, mem_kv, *, heads) -> torch.Tensor:
    return torch.ops.ddpm_fast.native_attention(qkv, mem_kv, heads)


def _native_refuses(qkv, mem_kv, *, heads) -> str | None:
    return _why_not_native({"qkv": qkv, "mem_kv": mem_kv})


def _native_block(x, g_in, weight_qkv, mem_kv, weight, bias, *, heads, residual) -> torch.Tensor:
    arguments = (x, g_in, weight_qkv, mem_kv, weight, bias, residual, heads)
    return torch.ops.ddpm_fast.native_attention_block.default(*arguments)


def _native_block_refuses(x, g_in, weight_qkv, mem_kv, weight, bias, *, heads, residual) -> str | None:
    given = {"x": x, "g_in": g_in, "weight_qkv": weight_qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias}
    return _why_not_native(given if residual is None else given | {"residual": residual})


def _why_not_native(given: dict[str, torch.Tensor]) -> str | None:
    """Of the arguments by name, the map first."""
    return why_not_on_cpu(given, maps=[next(iter(given))], may_be_empty=("mem_kv",))


def _example(side: int, D: int = 16, dtype: torch.dtype = torch.float32):
    def example(device: torch.device) -> tuple[tuple, dict]:
        qkv = torch.zeros(1, 3 * 2 * D, side, side, device=device, dtype=dtype)
        qkv = qkv.contiguous(memory_format=torch.channels_last)
        return (qkv, torch.zeros(2, 2, 4, D, device=device)), {"heads": 2}

    return example


def _block_example(device: torch.device) -> tuple[tuple, dict]:
    x, row = torch.zeros(1, 4, 4, 8, device=device).permute(0, 3, 1, 2), torch.zeros(8, device=device)
    mem_kv, weight = torch.zeros(2, 2, 4, 16, device=device), torch.zeros(8, 32, device=device)
    return (x, row, torch.zeros(96, 8, device=device), mem_kv, weight, row), {"heads": 2, "residual": None}


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
_attention_block_op = Op(
    "attention_block",
    [
        Implementation("native", _native_block, _native_block_refuses),
        Implementation("sdpa", reference.sdpa_attention_block, never_refuses),
        Implementation("reference", reference.attention_block),
    ],
    _block_example,
)
