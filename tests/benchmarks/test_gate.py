"""The regression gate's rules, and the bound of the import; other tests hold the other numbers."""

from __future__ import annotations

import json
import subprocess
import sys

import gate as regression_gate
import pytest

# Calls of functions, in Python and in C, which are the same in every run; how long they take is not. A line for each of
# three processes that have torch already.
IMPORT = """
import json, os, sys
import torch
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
before = len(sys.modules)
for _ in range(3):
    child = os.fork()
    if not child:
        sys.setprofile(count)
        import ddpm_fast
        sys.setprofile(None)
        print(json.dumps([calls, len(sys.modules) - before]))
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
"""


def test_import(tmp_path, gate):
    """The import of torch makes 1.3 million calls, that of upstream over torch takes about 2 s. The first run writes
    bytecode and is not counted."""
    command = [sys.executable, "-c", IMPORT, str(tmp_path / "bytecode")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    _, (calls, modules), again = map(json.loads, result.stdout.splitlines())
    assert [calls, modules] == again
    gate("import modules", "beyond torch's", modules)
    gate("import calls", "beyond torch's", calls)


HERE = {"torch": "2.0", "triton": "3.0", "compiler": "1.5"}
FILE = {
    "measured with": {"torch": "2.0", "compiler": "1.0"},
    "traffic": {"operators": 100},
    "host time": {"ours": 0.03},
    "registers": {"1.0": {"kernel": 40}, "3.0": {"kernel": 80}},
    "wheel bytes": {"wheel": 1000},
}


@pytest.fixture
def here(monkeypatch):
    """Tools of known versions."""
    monkeypatch.setattr(regression_gate, "version", HERE.get)


@pytest.mark.parametrize(
    "kind, name, measured, sentence",
    [
        ("traffic", "operators", 100, None),
        ("traffic", "operators", 90, None),
        ("traffic", "operators", 101, "traffic, operators: measured 101, bound 100 in bounds.json"),
        ("traffic", "operators", 89, "tighten: traffic, operators: measured 89 is over 10% below its bound 100"),
        ("traffic", "views", 1, "traffic, views: measured 1, and bounds.json has no bound for it"),
        ("host time", "ours", 0.03, None),
        ("host time", "ours", 0.01, None),
        ("host time", "ours", 0.031, "host time, ours: measured 0.031, bound 0.03"),
        ("wheel bytes", "wheel", 1300, None),
        ("wheel bytes", "wheel", 1, None),
        ("wheel bytes", "wheel", 1301, "wheel bytes, wheel: measured 1301, bound 1000 under compiler 1.0 and 1300"),
        ("registers", "kernel", 80, None),
        ("registers", "kernel", 81, "registers, kernel: measured 81, bound 80 in bounds.json"),
        ("registers", "kernel", 71, "tighten: registers, kernel: measured 71 is over 10% below its bound 80"),
        ("registers", "other", 1, "registers, other: measured 1, and bounds.json has no bound for it"),
    ],
)
def test_verdicts(here, kind, name, measured, sentence):
    found = regression_gate.verdict(kind, name, measured, FILE)
    assert found is None if sentence is None else found.startswith(sentence)


def test_a_triton_without_a_table_may_use_every_register(here):
    file = {**FILE, "registers": {"1.0": {"kernel": 40}}}
    assert regression_gate.verdict("registers", "kernel", 255, file) is None
    sentence = "registers, kernel: measured 256, bound 255 under triton 3.0, which has no table"
    assert regression_gate.verdict("registers", "kernel", 256, file) == sentence


def test_a_bound_is_at_most_five_percent_above_what_was_measured():
    for kind, rule in regression_gate.KINDS.items():
        for measured in (1, 17, 40, 41, 708, 3_071_731_408) if rule.exact else (0.03,):
            bound = regression_gate.new_bound(kind, measured)
            assert measured <= bound <= measured * (1.05 if rule.exact else 1.5)
            assert rule.step is None or bound <= -(-measured // rule.step) * rule.step
    assert regression_gate.new_bound("registers", 56) == 56
    assert regression_gate.new_bound("registers", 60) == 63
    assert regression_gate.new_bound("accelerated", 0.4924) == 0.5


def test_tightening_lowers_and_adds_and_never_raises(here):
    measured = {("traffic", "operators"): 50, ("registers", "kernel"): 90, ("registers", "other"): 20}
    file = regression_gate.tightened(FILE, measured)
    assert file["traffic"] == {"operators": 52}
    assert file["registers"] == {"1.0": {"kernel": 40}, "3.0": {"kernel": 80, "other": 21}}
    assert file["host time"] == FILE["host time"]
    assert file["measured with"] == FILE["measured with"]


def test_the_version_of_a_tool_is_recorded_with_what_it_decides(here):
    file = {**FILE, "measured with": {"torch": "1.0", "compiler": "1.0"}, "registers": {"1.0": {"kernel": 40}}}
    measured = {("traffic", "operators"): 90, ("registers", "kernel"): 17}
    tightened = regression_gate.tightened(file, measured)
    assert tightened["measured with"] == {"torch": "2.0", "compiler": "1.0"}
    assert tightened["registers"] == {"1.0": {"kernel": 40}, "3.0": {"kernel": 17}}
    assert regression_gate.tightened(file, {})["registers"] == file["registers"]


def test_what_is_recorded_is_not_judged(tmp_path):
    for measured in (1, 10**9):
        regression_gate.check("traffic", "operators", measured, record=tmp_path / "record")
    rows = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
    assert rows == [["traffic", "operators", 1], ["traffic", "operators", 10**9]]


def test_the_file_of_bounds():
    file = regression_gate.bounds()
    versions = file.pop("measured with")
    assert set(file) == set(regression_gate.KINDS)
    tables = [
        table
        for kind, names in file.items()
        for table in (names.values() if regression_gate.KINDS[kind].by_version else [names])
    ]
    assert all(names and all(bound > 0 for bound in names.values()) for names in tables)
    assert {rule.tool for rule in regression_gate.KINDS.values() if rule.tool and not rule.by_version} == set(versions)
    assert {"3.6.0", "3.8.0"} <= set(file["registers"]), "the Tritons of torch 2.11 and of the pinned release"
