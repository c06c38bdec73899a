"""Ctrl-C and SIGTERM, noted while a run goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignals:
    """Lets Ctrl-C and SIGTERM end a run after the current step; a second Ctrl-C ends it at once.

    Attributes:
        noted: the number of the signal that came; None before, and after the run.
    """

    def __init__(self) -> None:
        self.noted: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note signals in this block; of the main thread alone, as Python has it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self.noted = None
            for number, handler in earlier.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
