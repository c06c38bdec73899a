"""Triton's interpreter gives the same bits with `faster_interpreter` as without, by a quarter of the calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Sums, products and noise, in types that are stored as others and in one that is not, masked at their ends.
KERNELS = """
import json
import sys

import torch
from triton.runtime import interpreter

import faster_interpreter
from ddpm_fast import ops
from ddpm_fast.runtime.dispatch import use_backend


def run():
    calls = [0]

    def count(frame, event, argument):
        calls[0] += event == "call"

    torch.manual_seed(0)
    x = torch.randn(1, 24, 3, 3).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    gain, offset, weight = torch.randn(24), torch.randn(24), torch.randn(8, 24, 1, 1)
    sys.setprofile(count)
    with use_backend("triton"):
        y = ops.group_norm_silu(x, gain, offset, groups=2, dropout_p=0.3, seed=torch.tensor(2**40 + 1))
        z = ops.norm_linear(y, gain, weight)
        z.sum().backward()
    sys.setprofile(None)
    return [y, z, x.grad], calls[0]


run()
before, calls_before = run()
faster_interpreter.install(interpreter)
after, calls_after = run()
equal = [torch.equal(one, other) and bool(one.isfinite().all()) for one, other in zip(before, after, strict=True)]
print(json.dumps([equal, calls_before, calls_after]))
"""


def test_it_gives_the_same_bits_by_fewer_calls():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", KERNELS]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    equal, before, after = json.loads(finished.stdout)
    assert equal == [True] * 3
    assert after < 0.4 * before, (before, after)
