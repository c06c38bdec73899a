"""Tests that need a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def alone() -> dict[str, str]:
    """The environment for a pytest of its own: under xdist, plugins of the child would take it for a worker."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def run_kernel_tests(name: str) -> None:
    """Run tests/ops/<name>/test_triton.py in Triton's interpreter, in a process of its own, and print what it prints.

    Triton decides at import whether it interprets, so that one process cannot do both. On CUDA the file is run as it
    is: tests/ops/conftest.py.
    """
    file = Path("tests", "ops", name, "test_triton.py").resolve()
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    environment = {**alone(), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=file.parents[3], env=environment, check=False).returncode
    assert code == 0, f"pytest ended with {code}; its output is above, or below as captured"
