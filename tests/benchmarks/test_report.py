"""The report: dry runs of the whole script, stopped runs, and the pages from its results. See also test_triage.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import bench_first_step
import pytest
import render
import report
import steps
import tools
import torch

from ddpm_fast.testing.isolation import alone

ROOT = Path(__file__).parents[2]
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
@pytest.mark.release(but=lambda only: only == "training,ncu")
@pytest.mark.parametrize("only", ["training,ncu", "training,training compiled,ops bf16,ncu"])
def test_dry_run_of_the_gpu_report(only, tmp_path, monkeypatch):
    """The kinds of its steps on the CPU; steps that need a GPU or compile elsewhere are skipped with a reason."""
    chosen = only.split(",")
    minutes = "4" if "compiled" in only else "60"  # of 9 or more the ops have compiled baselines, too
    process = start(tmp_path / "out", "--minutes", minutes, "--plan", "cuda", "--only", only)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"results.json", "report.md", "log.txt"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["steps"]
    ran = ["machine", "training", "extension", *(name for name in ("training compiled", "ops bf16") if name in chosen)]
    assert [name for name in found if found[name]["status"] == "ok"] == ran, printed
    assert found["kernels"]["why"] == "the CPU runs no Triton kernels" and "ncu" in found["ncu"]["why"]
    assert re.fullmatch(r"ours [\d.]+ ms(, [\w-]+ [\d.]+ times as long){3}", found["training"]["summary"])
    networks = [record for record in results["records"] if record["bench"] == "network"]
    assert [record["phase"] for record in networks] == ["training step"] * (1 + ("training compiled" in chosen))
    assert list(networks[0]["timings"]) == ["ours", "ours-step-by-step", "upstream", "upstream-channels-last"]
    assert all("make bench-compiled" in record["left_out"]["upstream-compiled"] for record in networks[1:])
    op_dtypes = {record["dtype"] for record in results["records"] if record["bench"] == "op"}
    assert op_dtypes == ({"bf16"} if "ops bf16" in chosen else set())
    assert "| upstream-channels-last |" in (tmp_path / "out" / "report.md").read_text() and "upstream / ours" in printed
    monkeypatch.setattr(sys, "argv", ["render.py", "--draw", str(tmp_path / "out")])
    render.main()
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {
        "training.png", *(["ops.png"] if "ops bf16" in chosen else [])
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.release
def test_dry_run(tmp_path):
    """All steps on the CPU; those that need a GPU are skipped with a reason."""
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
    assert "| ours " in text and "| upstream " in text and "| diffusers " in text
    assert "(target 1.0)" in text and "Both sides have 1 thread." in text and "Adam" in text
    assert "Resident memory of training" in text and "(target 0.50)" in text
    assert "upstream / ours" in printed and "less gradients" in printed
    for picture in ("training.png", "sampling.png", "ops.png", "first-step.png", "samples.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 500, picture
    assert str(ROOT) not in (tmp_path / "out" / "log.txt").read_text()
    with pytest.raises(SystemExit, match="dry run"):
        render.keep(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize("only", ["memory,training run,first step"])
def test_dry_run_of_the_other_steps(only, tmp_path):
    """The steps of the CPU's report that the dry run of the GPU's has no counterpart of."""
    process = start(tmp_path / "out", "--minutes", "8", "--only", only)
    printed, _ = process.communicate(timeout=600)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert process.returncode == 0, printed
    assert all(results["steps"][name]["status"] == "ok" for name in only.split(",")), printed
    assert {record["bench"] for record in results["records"]} == {"memory", "first step"} & set(only.split(","))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Resident memory of training" in text and "(target 0.50)" in text
    assert "less gradients" in printed and str(ROOT) not in (tmp_path / "out" / "log.txt").read_text()
    for picture in ("first-step.png", "samples.png") if "first step" in only else ():
        assert (tmp_path / "out" / picture).stat().st_size > 500, picture


def test_a_stopped_run_keeps_what_it_has(tmp_path):
    process = start(tmp_path / "out", "--minutes", "90")
    for line in process.stdout:
        if line.startswith("extension"):  # the machine is known by now
            break
    process.send_signal(signal.SIGTERM)
    printed = process.stdout.read()
    assert process.wait(timeout=600) == 0, printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["stopped"] and results["machine"]["cores"] == os.cpu_count()
    assert "Not complete" in (tmp_path / "out" / "report.md").read_text()


def test_the_record_of_the_most_baselines_counts():
    def record(median, *names):
        timings = {name: {"median": median} for name in names}
        return {"bench": "network", "case": "c", "phase": "training step", "timings": timings}

    records = [record(1, "ours"), record(2, "ours", "upstream"), record(3, "ours", "upstream"), record(4, "ours")]
    (found,) = render.select({"records": records}, "network")
    assert found["timings"]["ours"]["median"] == 3


def test_steps_that_fail_or_overrun_do_not_end_the_run(tmp_path):
    run = report.Report(tmp_path / "out", "cpu", quick=True, minutes=60.0)

    def fails(limit):
        run.call([sys.executable, "-c", "print('before'); raise SystemExit(3)"], limit)

    def hangs(limit):
        run.call([sys.executable, "-c", "import time; time.sleep(600)"], 1.0)

    def skips(limit):
        raise report.Skipped("there is none")

    def breaks(limit):
        return {}["a fault of the script"]

    names = {
        "fails": fails,
        "hangs": hangs,
        "skips": skips,
        "breaks": breaks,
        "works": lambda limit: {"summary": "fine"},
    }
    run.steps = lambda: [report.Step(name, function, 60) for name, function in names.items()]
    run.run()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    assert found["fails"]["why"] == "exit status 3: before" and found["skips"]["why"] == "there is none"
    assert found["hangs"]["status"] == "failed" and found["hangs"]["why"].startswith("stopped after ")
    assert found["breaks"]["why"] == "KeyError: 'a fault of the script'"
    assert found["works"]["summary"] == "fine"


def test_plans_put_the_most_wanted_first_and_fit():
    for minutes in (4, 6, 9):
        shares = report.PLANS["cuda"].shares(minutes)
        wanted = [name for name, seconds in shares.items() if seconds]
        assert wanted[:7] == [
            "machine", "kernels", "training", "extension", "sampling", "training compiled", "sampling compiled",
        ]  # fmt: skip
        assert wanted.index("ops bf16") < wanted.index("ncu")
        # The six most important steps fit, even if each takes its full share.
        assert sum(shares[name] for name in wanted[:6]) < 60 * minutes
    assert report.PLANS["cuda"].shares(9)["sampling max-autotune"] >= 60
    assert report.PLANS["cuda"].shares(2) == {name: s / 2 for name, s in report.PLANS["cuda"].shares(4).items()}
    triage = report.PLANS["triage"].shares(2.5)
    assert sum(triage.values()) <= 150 - report.PLANS["triage"].reserve
    for name, plan in report.PLANS.items():
        assert set(plan.seconds) == set(steps.STEPS[name])


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The report's, which only tests move."""
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now)
    monkeypatch.setattr(report, "time", clock)
    return clock


def test_time_that_is_left_over_goes_to_the_next_step(tmp_path, clock):
    run = report.Report(tmp_path, "cpu", quick=True, minutes=1.0, plan="triage")
    limits = []

    def takes_four_seconds(limit):
        limits.append(limit)
        clock.now += 4
        return {}

    run.steps = lambda: [report.Step(name, takes_four_seconds, 10) for name in "abc"]
    run.run()
    left = 60 - report.PLANS["triage"].reserve
    assert limits == [left - 20, left - 4 - 10, left - 8]


def test_a_step_that_cannot_fit_is_skipped(tmp_path, clock):
    run = report.Report(tmp_path, "cpu", quick=True, minutes=0.5, plan="triage")
    seconds = {"long": 90, "short": 5, "other": 0}
    run.steps = lambda: [report.Step(name, lambda limit: {}, s, least=s / 2) for name, s in seconds.items()]
    run.run()
    assert run.results["steps"]["long"]["why"] == "takes up to 90 s, and 27 s are left"
    assert run.results["steps"]["short"]["status"] == "ok"
    assert run.results["steps"]["other"]["why"] == "not in a run of 0.5 minutes"


def test_only_some_steps(tmp_path, monkeypatch):
    ran = []
    for name in report.PLANS["triage"].seconds:
        monkeypatch.setitem(steps.STEPS["triage"], name, lambda run, limit, name=name: ran.append(name) or {})
    report.main([str(tmp_path), "--triage", "--device", "cpu", "--only", "sampling,native ops"])
    assert ran == ["machine", "kernels", "extension", "native ops", "sampling"]
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--triage", "--only", "none such"])


def test_upstream_takes_its_first_step_first():
    baselines = ("ours-step-by-step", "upstream-max-autotune", "upstream", "upstream-compiled")
    on_cuda = bench_first_step.order(baselines, torch.device("cuda"))
    assert on_cuda == [
        "upstream",
        bench_first_step.PRECOMPILED,
        "ours",
        "ours-step-by-step",
        "upstream-compiled",
        baselines[1],
    ]
    on_cpu = bench_first_step.order(("upstream", "diffusers"), torch.device("cpu"))
    assert on_cpu == ["upstream", "ours", "diffusers"]


def test_only_missing_packages_come_from_wheels(tmp_path):
    for name in ("numpy-1.0-py3-none-any.whl", "not_installed_here-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    report.unpack_missing(tmp_path, tmp_path / "packages")
    assert [folder.name for folder in (tmp_path / "packages").iterdir()] == ["not_installed_here"]


def test_no_step_begins_without_time(tmp_path):
    run = report.Report(tmp_path / "out", "cpu", quick=True, minutes=0.05)
    run.run()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["steps"]
    assert {step["why"] for step in found.values()} == {"out of time"}


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


def test_the_pages_are_what_the_script_renders():
    for file, text in render.pages().items():
        assert text == file.read_text(), f"{file.name}: run benchmarks/render.py"


def test_each_kind_of_processor_keeps_its_newest_results(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    for stem, device, vector, processor in [
        ("2026-01-01-cpu", "cpu", "AVX512", "AMD EPYC"),
        ("2026-01-02-cpu", "cpu", "AVX2", "AMD EPYC"),
        ("2026-01-03-cuda", "cuda", "AVX2", "AMD EPYC"),
        ("2026-01-04-cpu-avx512", "cpu", "AVX512", "AMD EPYC"),
        ("2026-01-05-cpu", "cpu", None, None),
        ("2026-01-06-cpu-avx512-intel", "cpu", "AVX512", "Intel(R) Xeon(R) Processor"),
    ]:
        machine = {"vector": vector, "processor": processor}
        (tmp_path / f"{stem}.json").write_text(json.dumps({"device": device, "machine": machine}))
    kept = render.kept()
    names = ["03-cuda", "06-cpu-avx512-intel", "04-cpu-avx512", "02-cpu", "05-cpu"]
    assert list(kept) == [f"2026-01-{name}" for name in names]
    assert [render.label(results) for results in kept.values()] == [
        "cuda",
        "Intel AVX512",
        "AMD AVX512",
        "AMD AVX2",
        "cpu",
    ]


def test_what_no_time_was_left_for_has_no_picture(tmp_path):
    """A step of a slow machine that ran out of time gives a record without timings."""
    timing = {"median": 2.0, "low": 1.0, "high": 3.0}
    step = {"bench": "network", "case": "a network", "phase": render.PHASES[0]}
    records = [
        {**step, "timings": {"ours": timing, "upstream": timing}},
        {"bench": "first step", "case": "a network", "timings": {}},
    ]
    made = render.charts({"device": "cpu", "records": records}, tmp_path)
    assert [file.name for file in made] == ["training.png"]


def test_kept_results_are_whole_and_their_pictures_are_there():
    assert render.kept(), "no results are committed"
    for stem, results in render.kept().items():
        assert not results["quick"] and "machine" in results and list(render.select(results, "network"))
        assert (render.RESULTS / f"{stem}.md").read_text() == render.report(results)
    for file in render.pages():
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", file.read_text()):
            assert (file.parent / picture).exists(), f"{file.name}: {picture}"


def test_no_number_outside_the_rendered_part_is_a_measurement():
    typed_only = [ROOT / "docs" / name for name in ("migrating.md", "performance.md", "training.md")]
    for file in (*render.pages(), *typed_only):
        typed = re.sub(f"{render.BEGIN}.*{render.END}", "", file.read_text(), flags=re.DOTALL)
        units = r"(?:ms|µs|us|s|[GM]B|[GM]iB|GB/s|TFLOP|x faster|times)\b|×(?!\d)|%"
        assert not re.findall(rf"\d[\d.,]* ?(?:{units})", typed), file.name
