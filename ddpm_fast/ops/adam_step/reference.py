"""The step in plain torch: the specification and the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ddpm_fast.ops.adam_step.settings import AdamSettings


@torch.no_grad()
def adam_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    settings: Sequence[AdamSettings],
    *,
    max_grad_norm: float | None = None,
    grad_scale: torch.Tensor | None = None,
    averages: Sequence[torch.Tensor | None] | None = None,
    average_weight: torch.Tensor | None = None,
    copies: Sequence[torch.Tensor | None] | None = None,
    tables: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ddpm_fast.ops.adam_step.op.adam_step`."""
    grads = [grad.to(p.dtype) for grad, p in zip(grads, params, strict=True)]
    if grad_scale is not None:
        grads = [grad / grad_scale for grad in grads]
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    skips = ~torch.isfinite(norm) if grad_scale is not None else torch.zeros_like(norm, dtype=torch.bool)
    factor = torch.ones_like(norm) if max_grad_norm is None else (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    states = iter(zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True))
    for group in settings:
        for _ in range(group.count):
            p, grad, m, v, step = next(states)
            grad = grad * factor
            t = step + 1
            new = p
            if group.weight_decay and group.decoupled:
                new = p - group.lr * group.weight_decay * p
            elif group.weight_decay:
                grad = grad + group.weight_decay * p
            new_m = group.beta1 * m + (1 - group.beta1) * grad
            new_v = group.beta2 * v + (1 - group.beta2) * grad * grad
            # In float64: 1 − β^t cancels for small t.
            correction1, correction2 = (1 - beta ** t.double() for beta in (group.beta1, group.beta2))
            denominator = new_v.sqrt() / correction2.sqrt().to(p.dtype) + group.eps
            new = new - (group.lr / correction1).to(p.dtype) * new_m / denominator
            for old, made in ((step, t), (m, new_m), (v, new_v), (p, new)):
                old.copy_(torch.where(skips, old, made))
    if averages is not None:
        weight = average_weight if average_weight is not None else torch.ones_like(norm)
        for average, p in zip(averages, params, strict=True):
            if average is not None:
                average.lerp_(p, weight.to(p.dtype))
    if copies is not None:
        for copy, p in zip(copies, params, strict=True):
            if copy is not None:
                copy.copy_(p)
    return norm, skips.to(norm.dtype)
