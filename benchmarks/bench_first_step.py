"""From a cold process to the first training step, and peak memory in training: `pytest benchmarks/bench_first_step.py`.

Every contender runs in processes of its own, in turns, with empty compile caches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from network_cases import COMPILE_SECONDS, network_cases
from op_cases import size_of

from ddpm_fast.bench import contenders
from ddpm_fast.bench.timing import Timing

ROUNDS = {"quick": 1, "cpu": 2, "full": 3}
SCRIPT = Path(__file__).parent / "first_step.py"


def first_step(name: str, configuration, device) -> dict:
    """What first_step.py prints."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [
            sys.executable,
            str(SCRIPT),
            name,
            json.dumps(configuration.as_dict()),
            str(device),
            str(time.time()),
        ]
        result = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def case(request):
    return network_cases(size_of(request.config))[0]


def test_first_step(benchmark, record, device, size, case, deadline):
    """In rounds, ours first, for as long as there is time; what was found is recorded after every process."""
    configuration = case.configuration
    left_out, found = {}, {}
    rivals = sorted(case.rivals, key=lambda name: (name in COMPILE_SECONDS, name != "peer"))
    longest = 0.0

    def keep() -> None:
        timings = {}
        for name, runs in found.items():
            timings[name] = Timing([run["first_step"] for run in runs]).as_dict()
            timings[name] |= {
                key: Timing([run[key] for run in runs]).median for key in ("import_seconds", "peak_bytes")
            }
        record(
            bench="first step", case=str(configuration), configuration=configuration.as_dict(), left_out=left_out,
            timings=timings,
        )  # fmt: skip

    def run(name: str) -> None:
        nonlocal longest
        began = time.time()
        found.setdefault(name, []).append(first_step(name, configuration, device))
        if name not in COMPILE_SECONDS:
            longest = max(longest, time.time() - began)
        keep()

    def run_rivals() -> None:
        for name in rivals:
            if name in COMPILE_SECONDS and found.get(name):
                continue  # one compilation is telling enough, and long
            reason = contenders.why_not(name)
            if reason is None and time.time() + COMPILE_SECONDS.get(name, longest) > deadline:
                reason = "not run: out of time"
            if reason is None:
                run(name)
                left_out.pop(name, None)
            elif name not in found:
                left_out[name] = reason

    def ours() -> None:
        if not found.get("ours") or time.time() + longest < deadline:
            run("ours")

    benchmark.pedantic(ours, rounds=1, iterations=1)
    for i in range(ROUNDS[size]):
        if i:
            ours()
        run_rivals()
    keep()
