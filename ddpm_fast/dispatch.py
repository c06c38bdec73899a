"""Which implementation of an op runs, and why.

An op lists its implementations in order of preference. Each can refuse a call with a reason; the first that accepts
runs, and the last (the torch reference) never refuses. Nothing here catches an exception to choose, and nothing reads
the environment: the same call is answered the same way every time, and `explain` prints the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BACKENDS = ("triton", "native", "reference")

# A plain module global, not a ContextVar: dynamo guards on the one and cannot trace the other.
_forced: str | None = None
_ops: dict[str, Op] = {}


def never_refuses(*args, **kwargs) -> str | None:
    """The `refuses` of a reference implementation."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        name: one of `BACKENDS`.
        function: computes the op.
        refuses: takes the op's arguments; returns None to accept them or one clause that says why not.
    """

    name: str
    function: Callable[..., Any]
    refuses: Callable[..., str | None] = never_refuses


class Op:
    """A public operation with several implementations; calling it chooses one and runs it.

    Args:
        name: the op's name, unique in the package.
        implementations: in order of preference; the last must accept everything.
        example: makes small (args, kwargs) on a device; `explain` shows what would run for them.
    """

    def __init__(
        self,
        name: str,
        implementations: list[Implementation],
        example: Callable[[torch.device], tuple[tuple, dict]],
    ):
        if implementations[-1].refuses is not never_refuses:
            raise ValueError(f"{name}: the last implementation must accept every call")
        if name in _ops:
            raise ValueError(f"{name}: an op of this name is registered already")
        self.name = name
        self.implementations = implementations
        self.example = example
        _ops[name] = self

    def choose(self, *args, **kwargs) -> Implementation:
        """The implementation that runs for these arguments.

        Raises:
            RuntimeError: `use_backend` forces one that this op has and that refuses the call.
        """
        if _forced is not None:
            for implementation in self.implementations:
                if implementation.name == _forced:
                    reason = implementation.refuses(*args, **kwargs)
                    if reason is not None:
                        raise RuntimeError(f"{self.name}: backend {_forced!r} was forced and refuses: {reason}")
                    return implementation
        for implementation in self.implementations:
            if implementation.refuses(*args, **kwargs) is None:
                return implementation
        raise AssertionError(f"{self.name}: no implementation accepted, not even the last")

    def __call__(self, *args, **kwargs):
        return self.choose(*args, **kwargs).function(*args, **kwargs)


class use_backend:
    """Force every op that has an implementation `name` to run it, and to raise with its reason where it refuses.

    Ops without an implementation of that name choose as always. Works at once, as a plain call or as a context manager
    that restores what was forced before:

        ddpm_fast.use_backend("reference")
        with ddpm_fast.use_backend("native"): ...

    Args:
        name: "triton", "native", "reference", or None to choose freely again.

    Raises:
        ValueError: `name` is none of these.
    """

    def __init__(self, name: str | None):
        if name is not None and name not in BACKENDS:
            raise ValueError(f"name must be one of {', '.join(BACKENDS)} or None, got {name!r}")
        global _forced
        self._previous = _forced
        _forced = name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc_info) -> None:
        global _forced
        _forced = self._previous


def present_devices() -> list[torch.device]:
    """The devices that `explain` speaks of: the CPU, and the current CUDA device if there is one."""
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def explain(devices: list[torch.device] | None = None) -> str:
    """A table of op × device × implementation: which runs, which would refuse, and why.

    Returns:
        Text, one line each; the implementation that runs is marked with `*`.
    """
    rows = []
    for op in sorted(_ops.values(), key=lambda op: op.name):
        for device in devices or present_devices():
            args, kwargs = op.example(device)
            reasons = {i.name: i.refuses(*args, **kwargs) for i in op.implementations}
            forced_and_refuses = _forced in reasons and reasons[_forced] is not None
            chosen = None if forced_and_refuses else op.choose(*args, **kwargs).name
            for name, reason in reasons.items():
                rows.append((op.name, device.type, ("* " if name == chosen else "  ") + name, reason or "accepts"))
    header = ("op", "device", "  implementation", "why")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
    lines = [
        "  ".join([cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)] + [row[3]])
        for row in [header, *rows]
    ]
    lines.append(f"* runs; forced by use_backend: {_forced or 'nothing'}")
    return "\n".join(lines)
