"""Time from process start to the first training step, and peak memory: `pytest benchmarks/bench_first_step.py`.

Every run is a new process with empty compile caches; the baselines' runs are interleaved. Packages are imported from
bytecode, as pip installs them. `ours-precompiled` first compiles the kernels with benchmarks/precompile.py on all
cores, and its time includes that.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
from network_cases import COMPILE_SECONDS, network_cases
from op_cases import size_of
from processes import Failed, Log, Processes

import ddpm_fast
from ddpm_fast.measure import baselines
from ddpm_fast.measure.timing import Timing

ROUNDS = {"quick": 1, "cpu": 2, "full": 3}
FOLDER = Path(__file__).parent
PRECOMPILED = "ours-precompiled"


def first_step(name: str, configuration, device, deadline: float) -> dict:
    """Run first_step.py; the parsed output, with the time to the first step "beside_torch", torch's import.

    Raises:
        Failed: a process failed, or was stopped at the deadline (epoch seconds).
    """
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        started = time.time()
        if name == PRECOMPILED:
            options = ["--processes", str(os.cpu_count()), "--case", "training"]
            run([str(FOLDER / "precompile.py"), *options], deadline, caches)
        baseline = "ours" if name == PRECOMPILED else name
        arguments = [baseline, json.dumps(configuration.as_dict()), str(device), str(started)]
        output = run([str(FOLDER / "first_step.py"), *arguments], deadline, caches)
    # Warnings stand among its lines.
    found = json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))
    return found | {"beside_torch": found["first_step"] - found["torch_import_seconds"]}


def run(command: list[str], deadline: float, variables: dict[str, str] | None = None) -> str:
    """What Python prints; it and its compilers end at the deadline."""
    processes = Processes({**os.environ, **(variables or {})}, Path.cwd(), Log(Path(os.devnull), {}))
    limit = 3600.0 if math.isinf(deadline) else deadline - time.time()
    try:
        return processes.call("first step", [sys.executable, *command], limit)
    finally:
        processes.end()


def order(baselines: tuple[str, ...], device) -> list[str]:
    """Upstream first, then ours, whose compilation may exceed the time left; the slowest to compile last."""
    others = [name for name in baselines if name != "upstream"]
    names = [
        *[name for name in baselines if name == "upstream"],
        *([PRECOMPILED] if device.type == "cuda" else []),
        "ours",
    ]
    return names + sorted(others, key=lambda name: COMPILE_SECONDS.get(name, 0))


@pytest.fixture
def case(request):
    return network_cases(size_of(request.config))[0]


def test_first_step(benchmark, record, device, size, case, deadline):
    """Rounds of all baselines until the deadline; each process is recorded when it ends."""
    configuration = case.configuration
    left_out, found, took = {}, {}, {}

    def keep() -> None:
        timings = {}
        for name, runs in found.items():
            timings[name] = Timing([run["first_step"] for run in runs]).as_dict()
            timings[name] |= {
                key: Timing([run[key] for run in runs]).median
                for key in ("torch_import_seconds", "import_seconds", "beside_torch", "peak_bytes")
            }
        record(
            bench="first step", case=str(configuration), configuration=configuration.as_dict(), left_out=left_out,
            timings=timings,
        )  # fmt: skip

    def why_not(name: str) -> str | None:
        reason = None if name == PRECOMPILED else baselines.why_not(name)
        expected = took.get(name, COMPILE_SECONDS.get(name, max(took.values(), default=0.0)))
        return reason or ("not run: out of time" if time.time() + expected > deadline else None)

    def rounds() -> None:
        for _ in range(ROUNDS[size]):
            for name in order(case.baselines, device):
                if name in COMPILE_SECONDS and name in found:
                    continue  # one compilation is telling enough, and long
                reason = why_not(name)
                if reason is None:
                    began = time.time()
                    try:
                        one = first_step(name, configuration, device, deadline)
                    except Failed:
                        if time.time() < deadline:
                            raise
                        if name not in found:
                            left_out[name] = f"stopped after {time.time() - began:.0f} s: out of time"
                        continue
                    found.setdefault(name, []).append(one)
                    took[name] = time.time() - began
                    left_out.pop(name, None)
                    keep()
                elif name not in found:
                    left_out[name] = reason
        keep()

    run(["-m", "compileall", "-q", str(Path(ddpm_fast.__file__).parent)], deadline)
    benchmark.pedantic(rounds, rounds=1, iterations=1)
