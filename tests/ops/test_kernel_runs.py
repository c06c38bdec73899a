"""The order of the kernels' tests: production shapes first and on every worker; interpreted tests run alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from forks import run_code

CONFTESTS = [Path(__file__).parents[1] / "conftest.py", Path(__file__).parent / "conftest.py"]
IMPORTED = f"{Path(__file__).parents[2] / 'benchmarks'} {Path(__file__).parent}"
TESTS = """
import pytest

@pytest.mark.parametrize("number", range(9))
def test_small(number):
    pass

@pytest.mark.production
@pytest.mark.parametrize("number", range(3))
def test_large(number):
    pass

def test_skips():
    pytest.skip("no reason")
"""


@pytest.fixture
def run(tmp_path):
    """Runs pytest over some tests under the conftests, interpreted; returns status and output."""
    tests = tmp_path / "ops" / "some"
    tests.mkdir(parents=True)
    for conftest, folder in zip(CONFTESTS, (tmp_path, tmp_path / "ops"), strict=True):
        shutil.copy(conftest, folder)
    (tests / "test_triton.py").write_text(TESTS)
    (tests / "test_triton_more.py").write_text("def test_more():\n    pass\n")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers = production\n gate\npythonpath = {IMPORTED}\n")
    (tmp_path / "test_other.py").write_text("def test_other():\n    pass\n")

    def run(*options: str) -> tuple[int, str]:
        code = f"import sys, pytest; sys.exit(pytest.main({['-v', '-p', 'no:cacheprovider', *options]}))"
        finished = run_code(code, tmp_path, check=False, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        return finished.returncode, finished.stdout + finished.stderr

    return run


def test_production_shapes_come_first_and_a_skipped_test_fails(run):
    code, output = run(".")
    assert code == 1 and "13 passed" in output and "1 failed" in output
    assert "a test of a kernel was skipped: " in output and "no reason" in output
    order = re.findall(r"::test_(\w+)", output)
    assert order[:3] == ["large"] * 3 and "large" not in order[3:]
    assert {"small", "more"} < set(order) and "test_other" not in output, "interpreted tests are alone"


@pytest.mark.release
def test_every_worker_begins_with_a_production_shape(run):
    _, output = run("ops", "-n", "2", "--dist", "worksteal")
    started = re.findall(r"\[gw(\d)\].*PASSED.*::test_(\w+)", output)
    first = {worker: name for worker, name in reversed(started)}
    assert set(first.values()) == {"large"} and len(started) == 13
