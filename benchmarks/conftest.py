"""Shared by the benchmarks: options, the machine's ceilings, and a contest that checks, times and records."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from op_cases import size_of  # noqa: E402

from ddpm_fast.measure import machine  # noqa: E402
from ddpm_fast.measure.timing import Interleaved  # noqa: E402


def pytest_addoption(parser) -> None:
    group = parser.getgroup("ddpm_fast")
    group.addoption("--device", default=None, help="cpu or cuda; by default cuda where there is one")
    group.addoption("--size", default=None, choices=["full", "cpu", "quick"], help="of the cases")
    group.addoption("--seconds", type=float, default=1.0, help="of timing per contest")
    group.addoption("--records", type=Path, default=None, help="append one JSON line per contest to this file")
    group.addoption("--deadline", type=float, default=None, help="epoch seconds after which contests are skipped")
    group.addoption(
        "--warmed", type=Path, default=None, help="what warm.py printed: compilations that are in the cache"
    )
    group.addoption("--case", default=None, help="the network case of this name alone")
    group.addoption("--baselines", default=None, help="whom ours meets there, with commas between them; all are tried")
    group.addoption("--steps", type=int, default=None, help="of a sampling run")
    group.addoption("--dtypes", default=None, help="of ops, with commas between them: fp32, bf16")
    group.addoption("--without-compiled", action="store_true", help="leave out compiled implementations of an op")
    group.addoption("--ceilings", type=Path, default=None, help="JSON with the ceilings; measured where not given")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    name = request.config.getoption("--device")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def size(request) -> str:
    return size_of(request.config)


@pytest.fixture(scope="session")
def ceilings(request, device, size) -> machine.Ceilings:
    file = request.config.getoption("--ceilings")
    if file is not None:
        return machine.Ceilings(**json.loads(file.read_text()))
    return machine.measure_ceilings(device, quick=size == "quick")


@pytest.fixture(autouse=True)
def _in_time(request) -> None:
    deadline = request.config.getoption("--deadline")
    if deadline is not None and time.time() > deadline:
        pytest.skip("out of time")


@pytest.fixture
def deadline(request) -> float:
    """Epoch seconds; infinite where none was given."""
    given = request.config.getoption("--deadline")
    return float("inf") if given is None else given


@pytest.fixture
def record(request):
    """Append a dict to the records as one line at once: a stopped run keeps its records."""
    file = request.config.getoption("--records")

    def append(**fields) -> None:
        if file is not None:
            with open(file, "a") as lines:
                lines.write(json.dumps(fields) + "\n")

    return append


@pytest.fixture
def contest(benchmark, request, device):
    """Time calls interleaved, `ours` under pytest-benchmark's clock; returns timings by name.

    pytest-benchmark's own table shows ours; the others run between its rounds and are in extra_info.
    """

    def run(
        calls: dict[str, Callable[[], object]], ours: str, *, flush: bool = True, least: int = 5, warm: bool = False
    ) -> dict[str, dict]:
        """`warm`: every call has been made before; none is made just to warm up."""
        if benchmark.disabled:
            benchmark(calls[ours])
            return {}
        began = time.perf_counter()
        interleaved = Interleaved(calls, device, flush=flush and device.type == "cuda", warmup=0 if warm else 1)
        if not warm or device.type == "cuda":  # else each call has just been made once, to choose its repetitions
            began = time.perf_counter()
            interleaved.round()  # a rehearsal: how long is a round?
        each = max(time.perf_counter() - began, 1e-6)
        for timing in interleaved.timings.values():
            timing.seconds.clear()
        rounds = max(least, min(100, int(request.config.getoption("--seconds") / each)))
        others = [name for name in calls if name != ours]

        def time_others() -> None:
            shift = len(interleaved.timings[ours].seconds) % max(1, len(others))
            for name in others[shift:] + others[:shift]:
                interleaved.measure(name)

        benchmark.pedantic(lambda: interleaved.measure(ours), setup=time_others, rounds=rounds, iterations=1)
        timings = {name: timing.as_dict() for name, timing in interleaved.timings.items()}
        benchmark.extra_info.update(timings)
        return timings

    return run
