"""Stand-ins for numpy in files whose settings were numpy's scalars and arrays: they read the bytes and run no numpy.

`torch.load(weights_only=True)` refuses numpy's functions. The stand-ins take their names, know plain numbers and text
alone, and give Python's values.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any

_FORMATS = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip


class _Dtype:
    """numpy.dtype of numbers and text: a code such as f8, and a byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def values(self, data: bytes) -> list:
        """The numbers or texts in these bytes."""
        if self.code in _FORMATS:
            return [value for (value,) in struct.iter_unpack(self.order + _FORMATS[self.code], data)]
        if self.code[:1] == "U" and self.code[1:].isdigit() and int(self.code[1:]):
            size = 4 * int(self.code[1:])
            encoding = "utf-32-be" if self.order == ">" else "utf-32-le"
            pieces = [data[start : start + size] for start in range(0, len(data), size)]
            return [piece.decode(encoding).rstrip("\0") for piece in pieces]
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype({self.code!r})")


class _Array:
    """numpy.ndarray, whose state arrives after it was made; `without_arrays` takes the list out."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        if is_fortran and len(shape) > 1:
            raise pickle.UnpicklingError("Unsupported global: GLOBAL numpy.ndarray(order='F')")
        self.values = _nested(dtype.values(data), shape)


def _nested(values: list, shape: tuple[int, ...]) -> Any:
    """The values as lists of lists of this shape; the one value itself for the shape ()."""
    if not shape:
        return values[0]
    size = len(values) // shape[0] if shape[0] else 0
    return [_nested(values[index * size : (index + 1) * size], shape[1:]) for index in range(shape[0])]


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return dtype.values(data)[0]


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
    return _Array()


# (stand-in, name) for `torch.serialization.safe_globals`; numpy 1 and 2 name their module differently.
STAND_INS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def without_arrays(value: Any) -> Any:
    """The contents of a file with the arrays' lists in the arrays' place."""
    if isinstance(value, _Array):
        return value.values
    if type(value) is dict:
        return {key: without_arrays(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_arrays(entry) for entry in value)
    return value
