"""Branches: tensors of the same numbers as a map, one for each further op that reads it.

autograd adds the gradients of a map with several readers in passes of their own. With a branch for each reader the op
that made the map is given all gradients, and its kernel adds them as it reads them.

Gradients are the same whether a reader takes a branch or the map itself. But whoever looks at the gradient of the map
alone would see a part of it: only a network in which no code but this package's sees its maps has branches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

MOST_BRANCHES = 2  # of a residual block's output: the next block's residual, and a skip connection

# Threads whose running network has branches.
_threads: set[int] = set()


@contextlib.contextmanager
def branching() -> Iterator[None]:
    """Inside, ops that this thread runs make branches of their outputs."""
    thread = threading.get_ident()
    is_outermost = thread not in _threads
    _threads.add(thread)
    try:
        yield
    finally:
        if is_outermost:
            _threads.discard(thread)


def number_of_branches() -> int:
    """How many branches an op makes of its output."""
    if torch.compiler.is_compiling() or threading.get_ident() not in _threads:
        return 0
    return MOST_BRANCHES if torch.is_grad_enabled() else 0


def and_branches(out: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    """The outputs of an autograd function: a map and its branches.

    They are no views: a view keeps its base, which keeps its branches, and no garbage collector sees that circle.
    """
    return out, *(out.detach() for _ in range(number))


def with_branches(out: torch.Tensor, *branches: torch.Tensor) -> torch.Tensor:
    """The map, from which `branch` takes its branches."""
    if branches:
        out._ddpm_fast_branches = list(branches)  # type: ignore[attr-defined]
    return out


def branch(x: torch.Tensor) -> torch.Tensor:
    """A branch of a map that nobody has taken, or the map itself where there is none."""
    if torch.compiler.is_compiling():
        return x
    branches = getattr(x, "_ddpm_fast_branches", None)
    return branches.pop(0) if branches else x


def several(gradients: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    """1 + MOST_BRANCHES gradients of a map and its branches, those that there are first."""
    found = [gradient for gradient in gradients if gradient is not None]
    return [*found, *[None] * (1 + MOST_BRANCHES - len(found))]
