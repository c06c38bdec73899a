"""How tests of Triton kernels run: `TRITON_INTERPRET=1 pytest tests/ops`; on a GPU
`pytest tests/ops/*/test_triton.py -n 14 --dist worksteal`.

Production shapes run first, on every worker. A kernel test that is skipped has failed.
"""

from __future__ import annotations

import pytest

KERNEL_TESTS = "test_triton.py"


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items):
    if all(item.path.name == KERNEL_TESTS for item in items):
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
    if report.skipped and item.path.name == KERNEL_TESTS:
        report.outcome, report.longrepr = "failed", f"a test of a kernel was skipped: {report.longrepr}"
