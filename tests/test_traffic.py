"""Bounds on operators, bytes moved and bytes kept, which no clock can blur (seed configuration, per image)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "traffic.py"


@pytest.fixture(scope="module", params=["fast", "low"])
def numbers(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("traffic") / "traffic.json"
    command = [sys.executable, str(SCRIPT), "--memory", request.param, "--json", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return request.param, json.loads(path.read_text())


def test_the_peer_is_counted_as_it_was_measured(numbers):
    training = numbers[1]["peer"]["training step"]
    assert training["operators"] == pytest.approx(2000, rel=0.02)
    assert training["bytes_kept"] == pytest.approx(527e6, rel=0.02)


def test_bounds(numbers):
    memory, found = numbers
    peer, ours = found["peer"]["training step"], found["ours"]["training step"]
    assert peer["bytes_kept"] / ours["bytes_kept"] >= {"fast": 1.8, "low": 2.4}[memory]
    assert ours["bytes_moved"] <= 0.6 * peer["bytes_moved"]
    assert ours["operators"] <= 1100
