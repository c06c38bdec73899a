"""The benchmarks run: each once, without timing, so that their equality checks hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_op_benchmarks_run():
    script = Path(__file__).parents[1] / "benchmarks" / "bench_ops.py"
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider", str(script)]
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
