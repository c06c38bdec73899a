"""The rules by which a kind of block keeps its own forward at a shape, because the fused one is not faster there.

One list, read by every accelerated module before it runs and quoted by `explain`. A rule says where, with the number
that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


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


RULES: list[Rule] = [
    Rule(
        None,
        "no kernel computes in float64, for which the ops run their plain references",
        lambda module, x: x.dtype == torch.float64,
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
