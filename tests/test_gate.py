"""The regression gate's rules, and what importing costs; the other numbers are held where they are measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import gate as regression_gate
import pytest

# The processor's time, so that waiting for others does not count.
IMPORT = """
import json, sys, time
start = time.process_time()
import torch
middle, before = time.process_time(), len(sys.modules)
import ddpm_fast
ratio = (time.process_time() - middle) / (middle - start)
print(json.dumps([ratio, len(sys.modules) - before]))
"""


def test_import(tmp_path, gate):
    """The peer takes about 2 s over torch. The first run writes bytecode and is not counted."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(4):
        command = [sys.executable, "-c", IMPORT]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
        runs.append(json.loads(result.stdout))
    ratios, modules = zip(*runs[1:], strict=True)
    assert len(set(modules)) == 1
    gate("import modules", "beyond torch's", modules[0])
    gate("import time", "over torch's own", statistics.median(ratios))


FILE = {
    "measured with": {"torch": regression_gate.version("torch"), "triton": "1.0", "compiler": "1.0"},
    "traffic": {"operators": 100},
    "import time": {"ours": 0.03},
    "registers": {"kernel": 40},
    "wheel bytes": {"wheel": 1000},
}


@pytest.mark.parametrize(
    "kind, name, measured, sentence",
    [
        ("traffic", "operators", 100, None),
        ("traffic", "operators", 90, None),
        ("traffic", "operators", 101, "traffic, operators: measured 101, bound 100 in bounds.json"),
        ("traffic", "operators", 89, "tighten: traffic, operators: measured 89 is over 10% below its bound 100"),
        ("traffic", "views", 1, "traffic, views: measured 1, and bounds.json has no bound for it"),
        ("import time", "ours", 0.03, None),
        ("import time", "ours", 0.01, None),
        ("import time", "ours", 0.031, "import time, ours: measured 0.031, bound 0.03"),
        ("wheel bytes", "wheel", 1300, None),
        ("wheel bytes", "wheel", 1, None),
        ("wheel bytes", "wheel", 1301, "wheel bytes, wheel: measured 1301, bound 1000 under compiler 1.0 and 1300"),
        ("registers", "kernel", 255, None),
        ("registers", "kernel", 1, None),
        ("registers", "kernel", 256, "registers, kernel: measured 256, bound 40 under triton 1.0 and 255 under"),
    ],
)
def test_verdicts(kind, name, measured, sentence):
    found = regression_gate.verdict(kind, name, measured, FILE)
    assert found is None if sentence is None else found.startswith(sentence)


def test_a_bound_is_at_most_five_percent_above_what_was_measured():
    for kind, rule in regression_gate.KINDS.items():
        for measured in (1, 17, 40, 41, 708, 3_071_731_408) if rule.exact else (0.03,):
            bound = regression_gate.new_bound(kind, measured)
            assert measured <= bound <= measured * (1.05 if rule.exact else 1.5)
            assert rule.step is None or bound <= -(-measured // rule.step) * rule.step
    assert regression_gate.new_bound("registers", 56) == 56
    assert regression_gate.new_bound("registers", 60) == 63


def test_tightening_lowers_and_adds_and_never_raises():
    measured = {("traffic", "operators"): 50, ("registers", "kernel"): 90, ("registers", "other"): 20}
    file = regression_gate.tightened(FILE, measured)
    assert file["traffic"] == {"operators": 52}
    assert file["registers"] == {"kernel": 40, "other": 21}
    assert file["import time"] == FILE["import time"]
    assert file["measured with"]["torch"] == regression_gate.version("torch")


def test_what_is_recorded_is_not_judged(tmp_path):
    for measured in (1, 10**9):
        regression_gate.check("traffic", "operators", measured, record=tmp_path / "record")
    rows = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert rows == [["traffic", "operators", 1], ["traffic", "operators", 10**9]]


def test_the_file_of_bounds():
    file = regression_gate.bounds()
    versions = file.pop("measured with")
    assert set(file) == set(regression_gate.KINDS)
    assert all(names and all(bound > 0 for bound in names.values()) for names in file.values())
    assert {rule.tool for rule in regression_gate.KINDS.values() if rule.tool} == set(versions)
