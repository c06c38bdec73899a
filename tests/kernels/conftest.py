"""Tests of the Triton kernels, to be run as they are: `pytest tests/kernels`, on a GPU `-n 14 --dist worksteal`.

They run on CUDA, or where there is none in Triton's interpreter. A process either interprets or compiles, for Triton
decides when it is imported: the interpreter's tests are alone in theirs, which helpers.run_kernel_tests starts.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items):
    others = [item for item in items if HERE not in item.path.parents]
    if INTERPRETED and others:
        raise pytest.UsageError(f"tests/kernels runs in Triton's interpreter and so alone, without {others[0].nodeid}")
    if not INTERPRETED and not torch.cuda.is_available():
        raise pytest.UsageError("tests/kernels needs Triton's interpreter, and Triton was imported without it")
    items.sort(key=lambda item: item.get_closest_marker("production") is None)
    items[:] = deal(items, getattr(config, "workerinput", {}).get("workercount", 1))


def deal(items: list, workers: int) -> list:
    """An order in which every worker begins with the first items: worksteal cuts it into one part for each, the longer
    parts last."""
    return [item for worker in reversed(range(workers)) for item in items[worker::workers]]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"a test of a kernel was skipped: {report.longrepr}"
