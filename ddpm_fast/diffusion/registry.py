"""The processes by name, and which of their methods are as this package defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_Class = TypeVar("_Class", bound=type)

# Name of a process, as checkpoints and the command line have it → its class.
PROCESSES: dict[str, Any] = {}

# The methods of this package's processes by name, as their modules define them: a class may be patched, too.
_ORIGINALS: dict[str, list[Any]] = {}


def process(name: str) -> Callable[[_Class], _Class]:
    """Register a class as the process `name`.

    Raises:
        ValueError: the name is taken.
    """

    def register(cls: _Class) -> _Class:
        if name in PROCESSES:
            raise ValueError(f"a process of the name {name!r} is registered already")
        PROCESSES[name] = cls
        cls.process_name = name  # type: ignore[attr-defined]
        if cls.__module__.startswith(f"{__package__}."):
            for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
                for attribute, value in vars(base).items():
                    _ORIGINALS.setdefault(attribute, []).append(value)
        return cls

    return register


def has_own(owner: object, name: str) -> bool:
    """True if a subclass, this object, or whoever patched the class has a method of its own."""
    found = getattr(type(owner), name)
    return name in owner.__dict__ or not any(found is original for original in _ORIGINALS[name])
