"""The range of values that becomes [0, 1] in images of more than 8 bits and of floats, one for a whole folder."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.training.images_in import DamagedImageError, is_deep, read_image

with needed_for("reading and writing images"):
    import numpy as np

ValueRange = tuple[float, float]

# Evenly spaced files whose headers are read, and of the deep ones among them those that are read whole.
_MAX_HEADERS = 1024
_MAX_FILES = 64
_BITS = (1, 2, 4, 8, 10, 12, 14, 16)


class _Found(NamedTuple):
    """Least and largest value of one file, and whether its values are floats."""

    low: float
    high: float
    is_float: bool


def find_value_range(paths: Sequence[Path]) -> ValueRange | None:
    """The range of the deep images among the files, from a sample; None where the sample holds none.

    Integers of at least 0 and at most 16 bits: [0, 2ᵇ − 1] with the least b of 1, 2, 4, 8, 10, 12, 14, 16 that holds
    all. Floats in [0, 1]: [0, 1]. All others: the least and the largest value found. Files that cannot be read are left
    to whoever reads them next.

    Raises:
        ValueError: the sample mixes integers and floats.
    """
    deep = [path for path in _spread(paths, _MAX_HEADERS) if _is_readable_and_deep(path)]
    found = list(_measure(_spread(deep, _MAX_FILES)))
    if not found:
        return None
    if len({one.is_float for one in found}) == 2:
        raise ValueError(
            "folder holds float images and integer images of more than 8 bits, which have no range in common; give "
            "value_range=(low, high) or keep them in two folders"
        )
    low, high = min(one.low for one in found), max(one.high for one in found)
    if found[0].is_float:
        return (0.0, 1.0) if low >= 0 and high <= 1 else _not_empty(low, high)
    if low >= 0 and high < 2**16:
        return 0, next(2**bits - 1 for bits in _BITS if high < 2**bits)
    return _not_empty(low, high)


def has_deep_images(paths: Sequence[Path]) -> bool:
    """True if a sample of the files holds images of more than 8 bits or of floats, by their headers."""
    return any(_is_readable_and_deep(path) for path in _spread(paths, _MAX_HEADERS))


def check_value_range(value_range: Sequence[float]) -> ValueRange:
    """The pair (low, high); ValueError unless it holds two finite numbers, the first below the second."""
    is_pair = isinstance(value_range, (tuple, list)) and len(value_range) == 2
    is_numbers = is_pair and all(isinstance(value, numbers.Real) and math.isfinite(value) for value in value_range)
    if not is_numbers or not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be two finite numbers (low, high), low < high; got {value_range!r}")
    low, high = (value if isinstance(value, int) else float(value) for value in value_range)  # numpy's too
    return low, high


def to_unit(values: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    """An array (h, w, C) as float32 in [0, 1]: (x − low)/(high − low), clipped; uint8 is over 255 always.

    Without a range that of the dtype is taken: 16 bits for integers, [0, 1] for floats.
    """
    low, high = (0, 255) if values.dtype == np.uint8 else value_range or default_range(values)
    scaled = (values.astype(np.promote_types(values.dtype, np.float32)) - low) / (high - low)
    return scaled.clip(0, 1).astype(np.float32)


def default_range(values: np.ndarray) -> ValueRange:
    """The range of a deep image in a folder whose sample held none."""
    return (0, 1) if values.dtype.kind == "f" else (0, 2**16 - 1)


def _spread(paths: Sequence[Path], count: int) -> Iterable[Path]:
    """Up to `count` paths, evenly spaced, the first and the last included."""
    if len(paths) <= count:
        return paths
    return (paths[round(index * (len(paths) - 1) / (count - 1))] for index in range(count))


def _is_readable_and_deep(path: Path) -> bool:
    try:
        return is_deep(path)
    except DamagedImageError:
        return False


def _measure(paths: Iterable[Path]) -> Iterable[_Found]:
    for path in paths:
        try:
            values = read_image(path)
        except DamagedImageError:
            continue
        if isinstance(values, np.ndarray):
            yield _Found(values.min().item(), values.max().item(), values.dtype.kind == "f")


def _not_empty(low: float, high: float) -> ValueRange:
    return (low, high) if low < high else (low, low + 1)
