"""Timing calls fairly: interleaved rounds in one process, medians with their spread, caches flushed between.

A shared machine slows down and speeds up by the minute. Calls timed in the same rounds see the same load, so the
ratio of their medians is worth more than either median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# A block of calls shorter than this is mostly the clock's own noise on a CPU.
_SHORTEST_BLOCK = 1e-3
_CPU_FLUSH_BYTES = 64 * 2**20
_LEAST_CUDA_FLUSH_BYTES = 128 * 2**20
_SLEEP_CYCLES = 4_000_000  # about 2 ms on an H100


@dataclass
class Timing:
    """Seconds per call, one number per round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile; both the median where there is one round."""
        if len(self.seconds) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def as_dict(self) -> dict:
        """Median, quartiles (seconds) and rounds, for JSON."""
        low, high = self.quartiles
        return {"median": self.median, "low": low, "high": high, "rounds": len(self.seconds)}


class Stopwatch:
    """Times single calls on a device: CUDA events there, the host's clock on a CPU.

    Args:
        device: where the calls do their work.
        flush: overwrite a buffer larger than the last-level cache before each call, so that no call finds its inputs
            there because the one before left them. On CUDA the calls are then also enqueued ahead, and the host is not
            timed; without it, as for whole networks, a device that waits for its host is timed waiting.
    """

    def __init__(self, device: torch.device, flush: bool = False):
        self.device = torch.device(device)
        self._buffer = None
        if flush:
            self._buffer = torch.empty(self._flush_bytes(), dtype=torch.uint8, device=self.device)

    def _flush_bytes(self) -> int:
        if self.device.type != "cuda":
            return _CPU_FLUSH_BYTES
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(_LEAST_CUDA_FLUSH_BYTES, 2 * cache)

    def time(self, call: Callable[[], object], repeat: int = 1) -> float:
        """Seconds per call of `repeat` calls in a row."""
        if self._buffer is not None:
            self._buffer.fill_(1)
            if self.device.type == "cuda":
                # The device sleeps while the host enqueues the call, so the events measure the device's time alone.
                torch.cuda._sleep(_SLEEP_CYCLES)
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeat):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeat
        began = time.perf_counter()
        for _ in range(repeat):
            call()
        return (time.perf_counter() - began) / repeat

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Interleaved:
    """Rounds in which every call is timed once, each round beginning with the next one.

    Args:
        calls: name → call without arguments.
        device: where the calls do their work.
        flush: see `Stopwatch`.
        warmup: runs of each call before the first round.
    """

    def __init__(
        self, calls: dict[str, Callable[[], object]], device: torch.device, *, flush: bool = False, warmup: int = 1
    ):
        if not calls:
            raise ValueError("calls must hold at least one call, got none")
        self.calls = calls
        self.stopwatch = Stopwatch(device, flush)
        self.timings = {name: Timing() for name in calls}
        self._repeat = {}
        for name, call in calls.items():
            for _ in range(warmup):
                call()
            self.stopwatch.synchronize()
            self._repeat[name] = self._calls_per_block(call)
        self._round = 0

    def _calls_per_block(self, call: Callable[[], object]) -> int:
        if self.stopwatch.device.type == "cuda":
            return 1  # events resolve half a microsecond, and a second call would find the cache warm
        once = self.stopwatch.time(call)
        return 1 if once >= _SHORTEST_BLOCK else min(1000, int(_SHORTEST_BLOCK / max(once, 1e-7)) + 1)

    def measure(self, name: str) -> None:
        """Time one call once."""
        seconds = self.stopwatch.time(self.calls[name], self._repeat[name])
        self.timings[name].seconds.append(seconds)

    def round(self) -> None:
        """Time every call once."""
        names = list(self.calls)
        first = self._round % len(names)
        for name in names[first:] + names[:first]:
            self.measure(name)
        self._round += 1

    def run(self, seconds: float, *, least: int = 5, most: int = 200) -> dict[str, Timing]:
        """Rounds for about this long, but at least `least` and at most `most` of them."""
        began = time.perf_counter()
        while self._round < most and (self._round < least or time.perf_counter() - began < seconds):
            self.round()
        return self.timings


def ratio(of: Timing, to: Timing) -> float:
    """How many times as long as `to` the call `of` takes, by medians."""
    return of.median / to.median
