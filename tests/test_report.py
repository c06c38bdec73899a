"""The report on its own: a dry run of the whole script, a run that is stopped, and what is made of the results."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import render
import report
import tools
from helpers import alone

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_report.sh"
STEPS = [
    "machine", "extension", "gpu tests", "sanitizer", "compile", "networks", "memory", "ops", "ncu", "training run",
    "first step",
]  # fmt: skip


def start(out: Path, *options: str) -> subprocess.Popen:
    environment = {**alone(), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), str(out), "--device", "cpu", "--quick", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_dry_run(tmp_path):
    """The whole logic on the CPU; what needs a GPU says so."""
    process = start(tmp_path / "out", "--minutes", "8")
    printed, _ = process.communicate(timeout=600)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert process.returncode == 0, printed
    assert list(results["steps"]) == STEPS
    status = {name: step["status"] for name, step in results["steps"].items()}
    assert all(status[name] == "ok" for name in STEPS if name not in ("sanitizer", "ncu")), (status, printed)
    assert results["steps"]["sanitizer"]["status"] == results["steps"]["ncu"]["status"] == "skipped"
    kinds = {record["bench"] for record in results["records"]}
    assert kinds == {"op", "network", "memory", "first step"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "A dry run on the smallest sizes: the numbers mean nothing." in text
    assert "| ours " in text and "| peer " in text and "| diffusers " in text
    assert "(target 1.0)" in text and "Both sides have 1 thread." in text and "Adam" in text
    assert "Resident memory of training" in text and "(target 0.50)" in text
    assert "peer / ours" in printed and "less gradients" in printed
    for picture in ("training.png", "sampling.png", "ops.png", "first-step.png", "samples.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 500, picture
    assert str(ROOT) not in (tmp_path / "out" / "log.txt").read_text()
    with pytest.raises(SystemExit, match="dry run"):
        render.keep(tmp_path / "out")


def test_a_stopped_run_keeps_what_it_has(tmp_path):
    process = start(tmp_path / "out", "--minutes", "8")
    for line in process.stdout:
        if line.startswith("extension"):  # the machine is known by now
            break
    process.send_signal(signal.SIGTERM)
    printed = process.stdout.read()
    assert process.wait(timeout=30) == 0, printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["stopped"] and results["machine"]["cores"] == os.cpu_count()
    assert "Not complete" in (tmp_path / "out" / "report.md").read_text()


def test_steps_that_fail_or_overrun_do_not_end_the_run(tmp_path):
    run = report.Report(tmp_path / "out", "cpu", quick=True, minutes=1.0)

    def fails(limit):
        run.call([sys.executable, "-c", "print('before'); raise SystemExit(3)"], limit)

    def hangs(limit):
        run.call([sys.executable, "-c", "import time; time.sleep(60)"], 1.0)

    def skips(limit):
        raise report.Skipped("there is none")

    def breaks(limit):
        return {}["a fault of the script"]

    started = time.time()
    names = {
        "fails": fails,
        "hangs": hangs,
        "skips": skips,
        "breaks": breaks,
        "works": lambda limit: {"summary": "fine"},
    }
    run.steps = lambda: [report.Step(name, function, 60) for name, function in names.items()]
    run.run()
    steps = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    assert steps["fails"]["why"] == "exit status 3: before" and steps["skips"]["why"] == "there is none"
    assert steps["hangs"]["status"] == "failed" and "stopped after 1 s" in steps["hangs"]["why"]
    assert steps["breaks"]["why"] == "KeyError: 'a fault of the script'"
    assert steps["works"]["summary"] == "fine" and time.time() - started < 30


def test_no_step_begins_without_time(tmp_path):
    run = report.Report(tmp_path / "out", "cpu", quick=True, minutes=0.05)
    run.run()
    steps = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    assert {step["why"] for step in steps.values()} == {"out of time"}


def test_ncu_output_is_read():
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    rows = [
        ("0", "gpu__time_duration.sum", "usecond", "12.5"),
        ("0", "dram__bytes.sum", "Mbyte", "25.0"),
        ("0", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "61.2"),
        ("1", "gpu__time_duration.sum", "ns", "2,000"),
        ("1", "dram__bytes.sum", "byte", "n/a"),
    ]
    names = ["norm_kernel(float*)", "void ddpm_fast::<unnamed>::step_kernel<float, (Access)0>(Args)"]
    lines = "".join(f'"{i}","7","{names[int(i)]}","{m}","{u}","{v}"\n' for i, m, u, v in rows)
    first, second = tools.read_ncu("==PROF== Connected\n" + head + lines)
    assert first["kernel"] == "norm_kernel" and first["bytes_per_second"] == pytest.approx(2e12)
    assert first["percent_of_peak"] == 61.2
    assert second == {"kernel": "void ddpm_fast::::step_kernel", "nanoseconds": 2000.0}
    with pytest.raises(ValueError, match="unknown unit, 'furlong'"):
        tools.read_ncu(head + '"0","7","k","dram__bytes.sum","furlong","1"\n')


@pytest.mark.parametrize(
    "line, clean",
    [
        ("========= ERROR SUMMARY: 0 errors", True),
        ("========= ERROR SUMMARY: 2 errors", False),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)", False),
        ("nothing of the kind", False),
    ],
)
def test_sanitizer_output_is_read(line, clean):
    assert tools.read_sanitizer(f"a line\n{line}\nanother\n")["clean"] is clean


def test_the_readme_is_what_the_script_renders():
    text = render.README.read_text()
    assert render.with_measured(text) == text, "run benchmarks/render.py"


def test_kept_results_are_whole_and_their_pictures_are_there():
    assert render.kept(), "no results are committed"
    for stem, results in render.kept().items():
        assert not results["quick"] and "machine" in results and list(render.select(results, "network"))
        assert (render.RESULTS / f"{stem}.md").read_text() == render.report(results)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", render.README.read_text()):
        assert (ROOT / picture).exists(), picture


def test_no_number_outside_the_rendered_part_is_a_measurement():
    before, rest = render.README.read_text().split(render.BEGIN)
    typed = before + rest.split(render.END)[1]
    assert not re.findall(r"\d[\d.,]* ?(?:(?:ms|µs|us|s|[GM]B|[GM]iB|GB/s|TFLOP|x faster|times)\b|×(?!\d)|%)", typed)
