"""Settings as plain Python values, whichever library they come from: numpy, torch, OmegaConf, enums, paths.

`torch.load(weights_only=True)` reads a file of plain values and refuses one with numpy's scalars.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any


def plain(name: str, value: Any) -> Any:
    """The value made of int, float, bool, str, None, list, tuple and dict alone; an array or tensor becomes a list.

    Raises:
        TypeError: there is something else in it.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Enum):
        return plain(name, value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return plain(name, value.tolist())
    if isinstance(value, Mapping):
        return {plain(name, key): plain(name, entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        entries = [plain(name, entry) for entry in value]
        return tuple(entries) if isinstance(value, tuple) else entries
    if hasattr(value, "__float__"):
        return float(value)
    raise TypeError(f"{name} must be made of numbers, text, lists and dictionaries; got a {type(value).__name__}")


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """An int from an integer of any library, a float without a fraction such as 1e5, or a tensor or array of one.

    Raises:
        ValueError: another value, a bool, or an integer below `least`.
    """
    number = _number(value)
    is_integer = type(number) is int or (type(number) is float and number.is_integer())
    if not is_integer or (least is not None and number < least):
        kind = {None: "an integer", 0: "a non-negative integer", 1: "a positive integer"}[least]
        raise ValueError(f"{name} must be {kind}; got {shown(value)}")
    return int(number)


def as_flag(name: str, value: Any) -> bool:
    """A bool from one of any library, or from the integers 0 and 1.

    Raises:
        ValueError: another value; text and lists are no flags, though Python takes them for true.
    """
    number = _number(value)
    if number not in (0, 1):
        raise ValueError(f"{name} must be True or False; got {shown(value)}")
    return bool(number)


def as_ints(name: str, value: Any, least: int | None = None) -> tuple[int, ...]:
    """A tuple of ints from a sequence, array or tensor of them.

    Raises:
        ValueError: another value, or an entry that `as_int` refuses.
    """
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ValueError(f"{name} must be a sequence of integers; got {shown(value)}")
    return tuple(as_int(f"each entry of {name}", entry, least) for entry in values)


def as_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """An int or float from a number of any library, or a tensor or array of one.

    Raises:
        ValueError: another value, NaN, or a number outside [least, most].
    """
    number = _number(value)
    if number is None or not least <= number <= most:
        limits = "" if (least, most) == (-math.inf, math.inf) else f" in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be a number{limits}; got {shown(value)}")
    return number


def as_size(name: str, value: Any) -> tuple[int, int]:
    """(height, width) from one positive integer, an array or tensor of one, or a pair of them.

    Raises:
        ValueError: another value.
    """
    number = _number(value)
    entries = value.tolist() if hasattr(value, "tolist") else value
    is_sequence = isinstance(entries, Sequence) and not isinstance(entries, (str, bytes))
    sizes = entries if number is None and is_sequence else [number, number]
    try:
        height, width = (as_int(name, size, 1) for size in sizes)
    except ValueError:
        raise ValueError(f"{name} must be a positive int or two of them (height, width), got {shown(value)}") from None
    return height, width


def shown(value: object) -> str:
    """The value's repr in one line, cut to 100 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _number(value: Any) -> Any:
    """A bool, int or float from a scalar or an array or tensor of one element; None for anything else."""
    if hasattr(value, "tolist"):
        value = value.tolist()
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else None
