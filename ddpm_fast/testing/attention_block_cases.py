"""Shared by the tests of the attention block with GroupNorm: cases, and runs that give all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.ops.attention_block.op import ORDERS
from ddpm_fast.testing.attention_cases import weights_like

__all__ = ["ORDERS", "make", "run"]


def make(
    shape: tuple[int, ...],
    *,
    order: str = "3hd",
    groups: int = 0,
    biases: bool = True,
    residual: bool = True,
    output_scale: float = 1.0,
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Random float32 tensors and the options of a block; absent tensors are None among the options.

    Args:
        shape: B, heads, D, C, h, w.
    """
    B, heads, D, C, h, w = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    hidden = heads * D
    given = {
        "x": normal(B, C, h, w).contiguous(memory_format=torch.channels_last),
        "gain": 1 + 0.3 * normal(C) if groups else None,
        "offset": 0.3 * normal(C) if groups else None,
        "weight_qkv": 2 * normal(3 * hidden, C) / C**0.5,
        "bias_qkv": 0.5 * normal(3 * hidden) if biases else None,
        "weight": normal(C, hidden, 1, 1) / hidden**0.5,
        "bias": 0.5 * normal(C) if biases else None,
    }
    options = {"groups": groups, "heads": heads, "order": order, "residual": residual, "output_scale": output_scale}
    absent = {name: None for name, tensor in given.items() if tensor is None}
    return {name: tensor for name, tensor in given.items() if tensor is not None}, options | absent


def run(function: Callable[..., torch.Tensor], tensors: dict, options: dict) -> dict[str, torch.Tensor]:
    """The output and the gradient of every tensor."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), weights_like(out))
    return {"out": out.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
