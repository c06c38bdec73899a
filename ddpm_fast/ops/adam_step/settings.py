"""What an optimizer's group of parameters is updated with, and how tensors are laid out."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AdamSettings:
    """Of consecutive parameters.

    Args:
        count: how many parameters.
        lr: the learning rate; a tensor is read on the device, so that a recording follows it.
        beta1, beta2, eps, weight_decay: of Adam.
        decoupled: AdamW's weight decay (Loshchilov & Hutter 2019) instead of a term of the gradient.
    """

    count: int
    lr: float | torch.Tensor
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False


def have_same_layout(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order of memory."""
    if tensor.stride() == other.stride():
        return True
    alike = zip(other.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or one == another for size, one, another in alike)
