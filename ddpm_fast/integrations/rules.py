"""The rules by which a kind of block keeps its own forward: where the fused one is not faster, or torch raises.

One list, read by every accelerated module before it runs and quoted by `explain`. A rule says where, with the number
that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddpm_fast.runtime.autocast import autocast_dtype


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        runs: the kind of block, `family.Fast.runs`; None is all kinds.
        clause: where, and how much slower the fused forward is there.
        applies: takes the module and the first tensor of the call.
    """

    runs: str | None
    clause: str
    applies: Callable[[Any, torch.Tensor], bool]


def _is_of_another_dtype(module: Any, x: torch.Tensor) -> bool:
    declared = getattr(type(module), "_ddpm_fast", None)
    if not x.is_floating_point() or (declared is not None and declared.casts_weights):
        return False
    weight = _first_weight(module)
    return weight is not None and weight.dtype is not x.dtype and autocast_dtype(x.device.type) is None


def _first_weight(module: nn.Module) -> torch.Tensor | None:
    """The first floating point parameter of two or more dimensions: norms may be kept in float32."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dim() > 1 and parameter.is_floating_point():
            return parameter
    for inner in module._modules.values():
        found = None if inner is None else _first_weight(inner)
        if found is not None:
            return found
    return None


# Two threads of an Ice Lake, to 64 and 128 channels: 256 pixels with the copy of the result to channels-last, which
# follows, 57 and 106 µs, in training 248 and 372; fused 77 and 121, 297 and 419. From 512 pixels on fused is faster.
_MOST_PIXELS_OF_OWN_STEM = 256


def _is_small_image(module: Any, x: torch.Tensor) -> bool:
    if x.device.type != "cpu" or x.dim() != 4:
        return False
    B, _, H, W = x.shape
    if B * H * W > _MOST_PIXELS_OF_OWN_STEM:
        return False
    weight = _first_weight(module)
    return weight is not None and weight.shape[-1] == 3


RULES: list[Rule] = [
    Rule(
        None,
        "no kernel computes in float64, for which the ops run their plain references",
        lambda module, x: x.dtype == torch.float64,
    ),
    Rule(
        None,
        "its input is of another dtype than its weights without autocast, which is an error of torch's operators",
        _is_of_another_dtype,
    ),
    Rule(
        "stem_conv",
        f"on the CPU it is 3×3, of up to {_MOST_PIXELS_OF_OWN_STEM} pixels, which take 0.74 to 0.88 of the fused time",
        _is_small_image,
    ),
]


def rules_for(runs: str) -> list[Rule]:
    """The rules of a kind of block."""
    return [rule for rule in RULES if rule.runs in (None, runs)]


def why_slower(runs: str, module: nn.Module, args: Sequence[Any]) -> str | None:
    """Why a block's own forward is the faster one for a call, in one clause; None where the fused one is."""
    if not args or not isinstance(args[0], torch.Tensor):
        return None
    for rule in RULES:
        if rule.runs in (None, runs) and rule.applies(module, args[0]):
            return rule.clause
    return None
