"""Linear attention as a whole block: public function, registration, eligibility.

    qkv = weight_qkv·(x / max(‖x‖₂, 1e-12)·√C·g_in)
    out = linear_attention(qkv) + residual

Backward keeps x alone of the maps and computes the others again.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import why_not_on_cpu
from ddpm_fast.ops.linear_attention.op import check_kinds, check_output
from ddpm_fast.ops.linear_attention_block import reference
from ddpm_fast.runtime.dispatch import Implementation, Op

_ARGUMENTS = "Tensor x, Tensor g_in, Tensor weight_qkv, Tensor mem_kv, Tensor weight, Tensor bias, Tensor g"
# Implemented in csrc/cpu/linear_attention_cpu.cpp. statistics: (B, 2, heads·D) float32, of k over positions and memory
# the largest and 1 / Σ exp(k − largest); sums: softmax(k)ᵀ·(normed rows of x).
_KEPT = "Tensor statistics, Tensor sums"
_library = torch.library.Library("ddpm_fast", "FRAGMENT")
for _schema in (
    f"native_linear_attention_block({_ARGUMENTS}, Tensor? residual, int heads) -> (Tensor out, {_KEPT})",
    f"native_linear_attention_block_backward(Tensor grad, {_ARGUMENTS}, {_KEPT}, int heads) "
    "-> (Tensor dx, Tensor dg_in, Tensor dweight_qkv, Tensor dmem_kv, Tensor dweight, Tensor dbias, Tensor dg)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _native_kept_fake(map, mem_kv, values) -> tuple[torch.Tensor, torch.Tensor]:
    B, hidden = map.shape[0], mem_kv.shape[1] * mem_kv.shape[2]
    statistics = map.new_empty((B, 2, hidden), dtype=torch.float32)
    return statistics, map.new_empty((B, hidden, values), dtype=torch.float32)


@torch.library.register_fake("ddpm_fast::native_linear_attention_block", lib=_library)
def _native_fake(x, g_in, weight_qkv, mem_kv, weight, bias, g, residual, heads):
    return torch.empty_like(x), *_native_kept_fake(x, mem_kv, x.shape[1])


@torch.library.register_fake("ddpm_fast::native_linear_attention_block_backward", lib=_library)
def _native_backward_fake(grad, x, g_in, weight_qkv, mem_kv, weight, bias, g, statistics, sums, heads):
    parameters = (g_in, weight_qkv, mem_kv, weight, bias, g)
    return torch.empty_like(x), *(t.new_empty(t.shape) for t in parameters)


def _setup_native_context(ctx, inputs, output) -> None:
    *tensors, residual, heads = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.heads = heads
    ctx.residual_dtype = None if residual is None else residual.dtype


def _native_backward(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_attention_block: the native kernel's gradient cannot be differentiated again (create_graph=True)"
        )
    if grad is None:
        return (None,) * 9
    gradients = torch.ops.ddpm_fast.native_linear_attention_block_backward(grad, *ctx.saved_tensors, ctx.heads)
    return *gradients, None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype), None


torch.library.register_autograd(
    "ddpm_fast::native_linear_attention_block", _native_backward, setup_context=_setup_native_context, lib=_library
)


def linear_attention_block(
    x: torch.Tensor,
    g_in: torch.Tensor,
    weight_qkv: torch.Tensor,
    mem_kv: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    g: torch.Tensor,
    *,
    heads: int,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMSNorm, the qkv product and `linear_attention` in one op, which keeps no map but x for backward.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). The native code takes channels-last.
        g_in: the first norm's gain, C elements in any shape.
        weight_qkv: (3·heads·D, C) or (3·heads·D, C, 1, 1), its rows ordered (3, heads, D).
        others: see `linear_attention`; weight, bias and g have the C of x.

    Returns:
        (B, C, H, W), dtype and memory format of x. Gradients flow to every tensor, once: a second derivative is
        refused.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    _check(x, g_in, weight_qkv, mem_kv, weight, bias, g, heads, residual)
    return _linear_attention_block_op(x, g_in, weight_qkv, mem_kv, weight, bias, g, heads=heads, residual=residual)


def linear_attention_block_natively(
    x, g_in, weight_qkv, mem_kv, weight, bias, g, *, heads: int, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear_attention_block` without its checks, for callers that know that it runs natively."""
    _linear_attention_block_op.count("native")
    return _native(x, g_in, weight_qkv, mem_kv, weight, bias, g, heads=heads, residual=residual)


def _check(x, g_in, weight_qkv, mem_kv, weight, bias, g, heads, residual) -> None:
    """The checks of the block's implementations."""
    given = {"x": x, "g_in": g_in, "weight_qkv": weight_qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias, "g": g}
    check_kinds(given | {"residual": residual}, heads)
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    B, C, H, W = x.shape
    if mem_kv.dim() != 4 or mem_kv.shape[:2] != (2, heads) or mem_kv.shape[2] == 0:
        raise ValueError(f"mem_kv must have shape (2, {heads}, D, M), got {tuple(mem_kv.shape)}")
    hidden = heads * mem_kv.shape[2]
    if weight_qkv.shape not in ((3 * hidden, C), (3 * hidden, C, 1, 1)):
        expected = f"({3 * hidden}, {C}) or ({3 * hidden}, {C}, 1, 1)"
        raise ValueError(f"weight_qkv must have shape {expected}, got {tuple(weight_qkv.shape)}")
    if g_in.numel() != C:
        raise ValueError(f"g_in must have {C} elements, one per channel of x, got shape {tuple(g_in.shape)}")
    if weight.dim() > 0 and weight.shape[0] != C:
        raise ValueError(f"weight must have the {C} channels of x as its first dimension, got {tuple(weight.shape)}")
    check_output(weight, bias, g, residual, hidden, (B, H, W))


def _native(x, g_in, weight_qkv, mem_kv, weight, bias, g, *, heads, residual) -> torch.Tensor:
    arguments = (x, g_in, weight_qkv, mem_kv, weight, bias, g, residual, heads)
    return torch.ops.ddpm_fast.native_linear_attention_block.default(*arguments)[0]


def _native_refuses(x, g_in, weight_qkv, mem_kv, weight, bias, g, *, heads, residual) -> str | None:
    given = {"x": x, "g_in": g_in, "weight_qkv": weight_qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias, "g": g}
    return _why_not_native(given | {"residual": residual})


def _why_not_native(given: dict[str, torch.Tensor | None]) -> str | None:
    """Of the arguments by name, the map first."""
    return why_not_on_cpu(given, maps=[next(iter(given))], may_be_empty=("mem_kv",))


def _example(device: torch.device) -> tuple[tuple, dict]:
    x, row = torch.zeros(2, 4, 4, 16, device=device).permute(0, 3, 1, 2), torch.zeros(16, device=device)
    mem_kv, weight = torch.zeros(2, 1, 8, 4, device=device), torch.zeros(16, 8, device=device)
    return (x, row, torch.zeros(24, 16, device=device), mem_kv, weight, row, row), {"heads": 1, "residual": None}


_linear_attention_block_op = Op(
    "linear_attention_block",
    [
        Implementation("native", _native, _native_refuses),
        Implementation("reference", reference.linear_attention_block),
    ],
    _example,
)
