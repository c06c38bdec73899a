"""The portable kernels outside torch: built by this machine's compiler, and for aarch64 by a cross compiler.

The latter needs Debian's packages g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ddpm_fast import noise

SOURCE = Path(__file__).parent / "portable_check.cpp"
CSRC = Path(__file__).parents[2] / "csrc"
# gcc takes some sums that are cleared before the first use for uninitialised.
WARNINGS = ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
FLAGS = [f"-I{CSRC}", "-std=c++20", "-O1", *WARNINGS, "-fno-math-errno", "-fno-trapping-math"]
# Compiler, its further flags, and what runs its programs.
TARGETS = {
    "this machine": ("c++", [], []),
    "this machine, native": ("c++", ["-march=native", "-O2"], []),
    "aarch64": ("aarch64-linux-gnu-g++", ["-static"], ["qemu-aarch64"]),
}


# On this machine the tests of the native operators run the portable kernels, too.
CROSS = all(shutil.which(tool) for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"))


@pytest.mark.release(but=lambda target: target == ("aarch64" if CROSS else "this machine"))
@pytest.mark.parametrize("target", TARGETS)
def test_products_functions_and_noise(tmp_path, target):
    compiler, flags, runner = TARGETS[target]
    for tool in (compiler, *runner):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = tmp_path / "check"
    built = subprocess.run([compiler, *FLAGS, *flags, str(SOURCE), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    actual = torch.tensor([float(line) for line in ran.stdout.split()], dtype=torch.float64)[None]
    truth = noise.normal((1, 256), seed=5, stream=3, step=2, start_index=7, dtype=torch.float64)
    error = (actual - truth).abs() / truth.abs().clamp(min=1)
    assert actual.shape == truth.shape and error.max() <= 5 * 2**-24, "5 units: not every target fuses multiply-adds"
