"""The benchmarks' cases: all implementations of each op agree, without timing; the records that timing writes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import bench_blocks
import pytest
import torch
import warm
from forks import run_code
from torchcfm.models.unet.unet import UNetModel

from ddpm_fast.measure import foreign

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def pytest_in_a_process(*options: str, **environment: str) -> subprocess.CompletedProcess:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options)
    code = f"import sys, pytest; sys.exit(pytest.main({list(options)}))"
    return run_code(code, BENCHMARKS.parent, check=False, OMP_NUM_THREADS="1", **environment)


def run(file: str, *options: str, **environment: str) -> str:
    finished = pytest_in_a_process(*options, str(BENCHMARKS / file), **environment)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
    return finished.stdout


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="torch and C++"),
        pytest.param(
            {"TRITON_INTERPRET": "1"},
            id="Triton's interpreter",
            marks=pytest.mark.release,  # tests/ops interprets the same kernels
        ),
    ],
)
def test_op_cases_agree(environment):
    run("bench_ops.py", "--benchmark-disable", "--size", "quick", "--device", "cpu", **environment)


def test_blocks_agree_and_are_timed():
    network = UNetModel(8, 3, 32, 1, 1, (), channel_mult=(1,))
    case = foreign.ForeignNetwork("tiny", network, (3, 8, 8), lambda network, x, t: network(t / 1000, x))
    blocks = bench_blocks.compare_blocks(case, torch.device("cpu"), batch=2, seconds=0.0)
    by_class = {block.cls: block for block in blocks}
    assert by_class["ResBlock"].runs == "preactivation_block" and by_class["ResBlock"].shapes[0][2:] == [8, 8]
    assert all(block.phases.keys() == set(foreign.PHASES) for block in blocks)
    assert bench_blocks.failures("tiny", blocks, least=0.0, dtype="fp32") == []
    first, *_, last = bench_blocks.rows("tiny", blocks)
    assert min(map(float, first[5:7])) <= min(map(float, last[5:7]))
    slow = dataclasses.replace(blocks[0], phases={"forward": 0.5, "training step": 1.5})
    wrong = dataclasses.replace(blocks[0], error=0.1, phases={"forward": 1.0, "training step": 1.0})
    texts = bench_blocks.failures("tiny", [slow, wrong], least=0.4, dtype="fp32")
    assert len(texts) == 1 and texts[0].endswith("differs by 1.0e-01")
    assert "0.50 times" in bench_blocks.failures("tiny", [slow], least=0.95, dtype="fp32")[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_op_cases_agree_on_cuda():
    """Small ones: full ones are checked before they are timed, kernels in tests/ops/production."""
    run("bench_ops.py", "--benchmark-disable", "--size", "quick", "--device", "cuda")


def test_records(tmp_path):
    options = ["--size", "quick", "--device", "cpu", "--seconds", "0.01", "--records", str(tmp_path / "records.jsonl")]
    run("bench_ops.py", *options, "-k", "rms_norm_silu and fp32")
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["direction"] for record in records] == ["forward", "forward+backward"]
    for record in records:
        for numbers in record["timings"].values():
            assert numbers["rounds"] >= 5 and numbers["low"] <= numbers["median"] <= numbers["high"]
            assert numbers["bytes_per_second"] == pytest.approx(record["bytes"] / numbers["median"])


def test_after_the_deadline_nothing_is_timed():
    options = ["--size", "quick", "--deadline", "1", "-k", "fill", str(BENCHMARKS / "bench_ops.py")]
    finished = pytest_in_a_process(*options)
    assert "passed" not in finished.stdout and "4 skipped" in finished.stdout, finished.stdout


def test_what_a_stopped_compiler_left_is_removed(tmp_path):
    """torch loads an empty library as if it were finished: one network was not compiled again for days."""
    (tmp_path / "sy").mkdir()
    empty, finished, source = (tmp_path / "sy" / name for name in ("a.main.so", "b.main.so", "a.main.cpp"))
    empty.touch()
    finished.write_bytes(b"\x7fELF")
    source.touch()
    warm.remove_unfinished(tmp_path)
    assert not empty.exists() and finished.exists() and source.exists()
