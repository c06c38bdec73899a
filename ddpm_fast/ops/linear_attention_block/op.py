"""Linear attention as a whole block: public function, registration, eligibility.

    qkv = weight_qkv·(x / max(‖x‖₂, 1e-12)·√C·g_in)
    out = linear_attention(qkv) + residual

The native block keeps no map but x for backward and computes the others again.
"""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import why_not_on_cpu, why_steps_come_first
from ddpm_fast.ops.linear_attention.op import check_kinds, check_output
from ddpm_fast.ops.linear_attention_block import composite
from ddpm_fast.runtime.dispatch import COMPOSITE, Implementation, Op

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
    recompute: bool = False,
) -> torch.Tensor:
    """RMSNorm, the qkv product and `linear_attention`.

    Args:
        x: (B, C, H, W) float32, float16, bfloat16 (float64: reference only). The native code takes channels-last.
        g_in: the first norm's gain, C elements in any shape.
        weight_qkv: (3·heads·D, C) or (3·heads·D, C, 1, 1), its rows ordered (3, heads, D).
        mem_kv, weight, bias, g, heads, residual: see `linear_attention`; weight, bias and g have the C of x.
        recompute: backward keeps the arguments alone and runs the block again. The native block always does.

    Returns:
        (B, C, H, W), dtype and memory format of x. Gradients flow to every tensor, once: a second derivative is
        refused.

    Raises:
        TypeError, ValueError: an argument is not what is said here.
    """
    _check(x, g_in, weight_qkv, mem_kv, weight, bias, g, heads, residual)
    return unchecked_linear_attention_block(
        x, g_in, weight_qkv, mem_kv, weight, bias, g, heads=heads, residual=residual, recompute=recompute
    )


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


def _native(x, g_in, weight_qkv, mem_kv, weight, bias, g, *, heads, residual, recompute) -> torch.Tensor:
    arguments = (x, g_in, weight_qkv, mem_kv, weight, bias, g, residual, heads)
    return torch.ops.ddpm_fast.native_linear_attention_block.default(*arguments)[0]


def _native_refuses(x, g_in, weight_qkv, mem_kv, weight, bias, g, *, heads, residual, recompute) -> str | None:
    given = {
        "x": x, "g_in": g_in, "weight_qkv": weight_qkv, "mem_kv": mem_kv, "weight": weight, "bias": bias, "g": g,
        "residual": residual,
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
        Implementation("native", _native, _native_refuses, why_steps_come_first),
        Implementation(COMPOSITE, composite.linear_attention_block),
    ],
    _example,
)
