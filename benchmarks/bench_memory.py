"""Resident memory of training on the CPU, one process per baseline: `pytest benchmarks/bench_memory.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from network_cases import MEMORY_TARGET, network_cases
from op_cases import size_of

from ddpm_fast.measure import baselines

SCRIPT = Path(__file__).parent / "memory_run.py"
SIDES = ("upstream", "ours", "ours-low-memory")


def pytest_generate_tests(metafunc) -> None:
    cases = [case for case in network_cases(size_of(metafunc.config)) if case.memory]
    metafunc.parametrize("case", cases, ids=str)


def memory_of(name: str, configuration) -> dict[str, int]:
    """Run memory_run.py; the parsed output."""
    command = [sys.executable, str(SCRIPT), name, json.dumps(configuration.as_dict())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_memory(benchmark, record, device, case):
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory is measured on the CPU, on Linux")
    left_out = {name: baselines.why_not(name) for name in SIDES if baselines.why_not(name) is not None}
    found = {name: memory_of(name, case.configuration) for name in SIDES if name not in left_out and name != "ours"}
    found["ours"] = benchmark.pedantic(lambda: memory_of("ours", case.configuration), rounds=1, iterations=1)
    record(
        bench="memory", case=str(case), configuration=case.configuration.as_dict(), left_out=left_out,
        target=MEMORY_TARGET, bytes={name: found[name] for name in SIDES if name in found},
    )  # fmt: skip
