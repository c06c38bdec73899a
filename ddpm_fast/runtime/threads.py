"""Values that one thread has while a block runs, such as what its running network has made for the modules inside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TypeVar

Value = TypeVar("Value")


@contextlib.contextmanager
def of_this_thread(values: dict[int, Value], value: Value | None) -> Iterator[None]:
    """Inside, `values` has this value for the thread's `threading.get_ident()`, or none if it is None."""
    thread = threading.get_ident()
    before = values.pop(thread, None)
    if value is not None:
        values[thread] = value
    try:
        yield
    finally:
        values.pop(thread, None)
        if before is not None:
            values[thread] = before
