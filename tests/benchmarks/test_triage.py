"""Triage and the steps of a GPU report: a dry run on the CPU, and the effect of a crash, a hang or a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import op_cases
import preparation
import processes
import pytest
import report
import steps
import tools
from processes import Failed, Skipped
from report import PREPARATION, Step

from ddpm_fast.testing.isolation import alone

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PATIENCE = 600.0  # seconds: a machine with other work may need many


def make(out: Path, device: str = "cpu") -> report.Report:
    """A report on the CPU whose steps see the type of device `device`."""
    run = report.Report(out, "cpu", quick=True, minutes=60.0, plan="triage")
    run.device = device
    return run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def tool(folder: Path, name: str, code: str) -> None:
    """A program of this name in a folder."""
    file = folder / name
    file.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def wait_for(condition) -> None:
    until = time.time() + PATIENCE
    while not condition():
        assert time.time() < until
        time.sleep(0.05)


def results_of(out: Path) -> dict:
    return json.loads((out / "triage.json").read_text())


# The dry form --------------------------------------------------------------------------------------------------------


@pytest.mark.release(but=lambda only: only)
@pytest.mark.parametrize("only", ["training,native ops", ""])
def test_dry_run(only, tmp_path):
    """Everything but the GPU, or two steps of it: two files, and every part's lines and records in them."""
    out = tmp_path / "out"
    command = ["bash", str(BENCHMARKS / "gpu_report.sh"), str(out), "--triage", "--device", "cpu", "--quick"]
    command += ["--minutes", "60"]
    command += ["--only", only] if only else []
    environment = {**alone(), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    printed = finished.stdout
    assert finished.returncode == 0, printed + finished.stderr
    assert {file.name for file in out.iterdir()} == {"triage.json", "triage.log"}
    results, log = results_of(out), (out / "triage.log").read_text()
    status = {name: step["status"] for name, step in results["steps"].items()}
    chosen = [name for name in report.PLANS["triage"].seconds if not only or name in (*only.split(","), *PREPARATION)]
    assert status == dict.fromkeys(chosen, "ok") | {"kernels": "skipped"}, printed
    found = {record["bench"]: record for record in results["records"]}
    # The recorded step moves weights by the package's kernel, the other by torch's Adam.
    assert 0 <= found["triage training"]["difference"] < 1e-6 and len(found["triage training"]["losses"]["ours"]) == 3
    assert re.fullmatch(r".+: 3 cases by \w+; wrong: none", results["steps"]["native ops"]["summary"])
    assert str(ROOT) not in log and results["machine"]["torch"] in printed
    assert "ours-step-by-step" in found["triage training time"]["timings"]
    if only:
        return
    assert found["triage sampling"]["difference"] == 0
    assert 0 < len(found["triage kernels"]["kernels"]) <= 25
    times = [found[f"triage {name} time"]["timings"] for name in ("training", "sampling", "upstream")]
    assert [list(timings) for timings in times] == [["ours", "ours-step-by-step"]] * 2 + [
        ["upstream", "upstream-channels-last"]
    ]
    checked = {(record["case"], record["dtype"]) for record in results["records"] if record["bench"] == "triage op"}
    assert checked == {(case.name, dtype) for case in op_cases.op_cases("quick") for dtype in ("bf16", "fp32")}
    for text in (printed, log):
        assert (
            "ok    rms_norm_silu-2x24x5x7 bf16: " in text
            and "the same bits" in text
            and "upstream-channels-last:" in text
        )


def test_every_op_and_kernel_that_is_named_exists():
    assert {*steps.TRITON_OPS, *steps.NATIVE_OPS} == {case.op for case in op_cases.op_cases("full")}
    sources = "".join(file.read_text() for file in (ROOT / "ddpm_fast" / "ops").glob("*/triton*.py"))
    assert all(f"def {kernel}(" in sources for kernel, _ in tools.NCU_KERNELS)
    assert {*tools.SANITIZED_OPS, *dict(tools.NCU_KERNELS).values()} <= set(steps.TRITON_OPS)


# Faults --------------------------------------------------------------------------------------------------------------

DEAF = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(os.getpid(), child.pid, flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether there is such a process that is more than its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_fault_costs_its_own_step(tmp_path):
    """An abort, a segmentation fault, a hang that does not listen, and a kill from outside, each after a record."""
    run = make(tmp_path)
    record = "open({!r}, 'a').write('{{\"bench\": \"{}\"}}\\n'); print('got this far', flush=True); "

    def command(name: str, code: str) -> list[str]:
        return [sys.executable, "-c", record.format(str(run.records), name) + textwrap.dedent(code)]

    def step(name: str, code: str) -> Step:
        return Step(name, lambda _: {"summary": run.call(command(name, code), PATIENCE)}, 30.0)

    def kill_from_outside(_) -> dict:
        process = run.processes.start(
            "killed", python("import time; print('got this far', flush=True); time.sleep(600)")
        )
        wait_for(lambda: process.lines)
        os.kill(process.popen.pid, signal.SIGKILL)
        return {"summary": run.processes.finish(process, PATIENCE)}

    def hang(_) -> dict:
        process = run.processes.start("hangs", command("hangs", DEAF))
        wait_for(lambda: len(process.lines) == 2)
        return {"summary": run.processes.finish(process, 0.1)}

    run.steps = lambda: [
        step("aborts", "import os; os.abort()"),
        step("crashes", "import ctypes; ctypes.string_at(0)"),
        Step("killed", kill_from_outside, 30.0),
        Step("hangs", hang, 30.0),
        step("works", ""),
    ]
    run.run()
    found, log = results_of(tmp_path)["steps"], (tmp_path / "triage.log").read_text()
    assert found["aborts"]["why"].startswith("killed by SIGABRT") and "Fatal Python error: Aborted" in log
    assert found["crashes"]["why"].startswith("killed by SIGSEGV") and "Fatal Python error: Segmentation fault" in log
    assert found["killed"]["why"] == "killed by SIGKILL: got this far"
    assert found["hangs"]["why"].startswith("stopped after ")
    wait_for(lambda: not any(is_running(int(pid)) for pid in found["hangs"]["why"].split(": ")[1].split()))
    assert found["works"] == {"status": "ok", "summary": "got this far", "seconds": found["works"]["seconds"]}
    assert [r["bench"] for r in results_of(tmp_path)["records"]] == ["aborts", "crashes", "hangs", "works"]


def test_a_crash_in_an_op_keeps_the_ops_before_it(tmp_path, monkeypatch):
    """triage.py itself, whose attention reads where nothing is; the processes of the other ops go on."""
    code = """
        import ctypes, sys
        sys.path.insert(0, "benchmarks")
        import triage
        check = triage.check_op
        triage.check_op = lambda case, *more: ctypes.string_at(0) if case.op == "attention" else check(case, *more)
        triage.main()
    """
    command = steps.part_command

    def crashing(run, name, *options):
        return [*python(code), *command(run, name, *options)[2:]]

    run = make(tmp_path)
    monkeypatch.setattr(steps, "part_command", crashing)
    run.steps = lambda: [
        Step("ops", lambda limit: steps.triage_ops(run, limit, ("q_sample", "attention")), 60.0),
        Step("native ops", lambda limit: steps.triage_ops(run, limit, ("fill_normal_",)), 60.0),
    ]
    run.run()
    found = results_of(tmp_path)
    assert found["steps"]["ops"]["why"].startswith("q_sample+attention killed by SIGSEGV")
    assert found["steps"]["native ops"]["status"] == "ok"
    assert [(r["case"].split("-")[0], r["right"]) for r in found["records"]] == [
        *[("q_sample", True)] * 2, *[("fill_normal_", True)] * 2,
    ]  # fmt: skip
    assert "check_op" not in found["steps"]["ops"]["why"] and "triage.py" in (tmp_path / "triage.log").read_text()


@pytest.mark.release(but=lambda hang: hang == "pretended")
@pytest.mark.parametrize("hang", ["pretended", "real"])
def test_triage_ends_in_time_if_everything_hangs(hang, tmp_path, monkeypatch):
    """Every process ignores being asked to end; the last ones are not begun any more."""
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now)

    def pretended(run, limit):
        clock.now += limit + processes._ASKED
        raise Failed(f"stopped after {limit:.0f} s")

    if hang == "pretended":
        monkeypatch.setattr(report, "time", clock)
    step = pretended if hang == "pretended" else lambda run, limit: run.call(python(DEAF), limit)
    for name in report.PLANS["triage"].seconds:
        monkeypatch.setitem(steps.STEPS["triage"], name, step)
    began = report.time.time()
    report.main([str(tmp_path), "--triage", "--device", "cpu", "--minutes", "0.3"])
    assert report.time.time() - began < 0.3 * 60 + 8
    found = results_of(tmp_path)["steps"]
    assert list(found) == list(report.PLANS["triage"].seconds)
    assert found["machine"]["why"].startswith("stopped after ") and all(
        step["status"] != "ok" for step in found.values()
    )


def test_processes_at_a_time_share_a_limit(tmp_path, monkeypatch):
    """It is over when the two that end have ended."""
    run, ended = make(tmp_path), []
    finish = run.processes.finish
    run.processes.finish = lambda process, limit: ended.append(process.name) or finish(process, limit)
    late = SimpleNamespace(time=lambda: time.time() + 2 * PATIENCE * ({"a", "d"} <= {*ended}), sleep=time.sleep)
    monkeypatch.setattr(processes, "time", late)
    commands = {name: python(code) for name, code in (("a", "print(1)"), ("b", DEAF), ("c", DEAF), ("d", "print(4)"))}
    texts, failures = run.processes.call_all(commands, PATIENCE, 3)
    assert texts == {"a": "1", "d": "4"}
    assert list(failures) == ["b", "c"] and all(why.startswith("stopped after ") for why in failures.values())
    assert run.processes.call_all({"e": python("print(5)")}, -1.0, 1) == ({}, {"e": "out of time"})
    run.processes.end()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_run_leaves_what_there_is(tmp_path, signum):
    code = f"""
        import os, sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        from pathlib import Path
        from report import Report, Step
        run = Report(Path({str(tmp_path)!r}), "cpu", quick=True, minutes=60.0, plan="triage")
        record = "open({{!r}}, 'a').write('{{{{}}}}\\\\n'); print('begun', flush=True)"
        hang = "import os, time\\nwhile os.getppid() == {{}}: time.sleep(0.05)"  # as long as the report is there
        command = [sys.executable, "-c", record.format(str(run.records)) + "\\n" + hang.format(os.getpid())]
        run.steps = lambda: [Step("before", lambda limit: {{"summary": "done"}}, 5.0),
                             Step("long", lambda limit: run.call(command, limit, echo=True), 60.0)]
        run.run()
    """
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "begun":
            break
    if signum == signal.SIGKILL:
        wait_for(lambda: results_of(tmp_path)["records"])  # on the disk two seconds after they were made
    process.send_signal(signum)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (-signum if signum == signal.SIGKILL else 0)
    results = results_of(tmp_path)
    assert results["steps"]["before"]["summary"] == "done" and results["records"] == [{}]
    assert ("stopped" in results) == (signum != signal.SIGKILL)
    assert "long| begun" in (tmp_path / "triage.log").read_text()


# The steps of a GPU, with stand-ins for its tools ---------------------------------------------------------------


@pytest.fixture
def bin_folder(tmp_path, monkeypatch) -> Path:
    """A folder that comes first on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_build_and_kernels_begin_first_on_cores_of_their_own(tmp_path, monkeypatch, bin_folder):
    (bin_folder / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\n")
    (bin_folder / "nvidia-smi").chmod(0o755)
    # A process is told its cores after its start.
    wait = "import os, sys, time\nparent = os.getppid()\n"
    wait += "while os.getppid() == parent and not os.path.exists('go'): time.sleep(0.01)\n"
    show = "print(sorted(os.sched_getaffinity(0)), sys.argv[1:], flush=True)\n"
    wanted = "DDPM_FAST_BUILD DDPM_FAST_MARCH MAX_JOBS TORCH_CUDA_ARCH_LIST"
    settings = f"print({{name: os.environ.get(name) for name in {wanted!r}.split()}})"
    (tmp_path / "setup.py").write_text(f"{wait}{show}{settings}")
    (tmp_path / "precompile.py").write_text(f'{wait}{show}print(\'{{"kernel": "k", "spills": 8}}\')')
    monkeypatch.setattr(preparation, "BENCHMARKS", tmp_path)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    run = make(tmp_path / "out", device="cuda")
    run.processes.directory = tmp_path
    preparation.start_build(run)
    preparation.start_kernels(run)
    building, beside = preparation.halves()
    assert run.cores() == beside and (len(building | beside) == 1 or not building & beside)
    (tmp_path / "go").touch()
    found = preparation.kernels(run, PATIENCE)
    assert run.results["kernels"] == [{"kernel": "k", "spills": 8}] and "1 with spills" in found["summary"]
    assert run.background["kernels"].lines[0] == f"{sorted(beside)} ['--processes', '{len(beside)}']"
    build = run.background["build"]
    run.processes.finish(build, PATIENCE)
    assert build.lines[0] == f"{sorted(building)} ['build_ext', '--inplace']"
    settings = ["cuda", "native", str(len(building)), "9.0"]
    assert build.lines[1] == str(dict(zip(wanted.split(), settings, strict=True)))
    assert run.cores() is None


def test_without_a_gpu_what_needs_none_still_runs(tmp_path, monkeypatch):
    """The reason is said once by each step, in a line and not in a traceback."""
    for name in ("start_build", "start_kernels"):
        monkeypatch.setattr(preparation, name, lambda report: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = make(tmp_path, device="cuda")
    finished = subprocess.run(
        steps.part_command(run, "training"), env=run.processes.environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1 and finished.stdout == "" and len(finished.stderr.splitlines()) == 1
    run.steps = lambda: [
        Step("machine", lambda limit: preparation.machine(run, limit), 60.0),
        Step("extension", lambda limit: {"summary": "built"}, 5.0),
        Step("training", lambda limit: {"summary": "trained"}, 5.0),
    ]
    run.run()
    found, reason = results_of(tmp_path), finished.stderr.strip()
    assert found["steps"]["machine"]["why"].startswith(f"{reason}; ") and found["machine"]["torch"] in str(found)
    assert found["steps"]["extension"]["summary"] == "built"
    assert (found["steps"]["training"]["status"], found["steps"]["training"]["why"]) == ("skipped", reason)


def test_when_the_extension_is_built(tmp_path, monkeypatch):
    """Where it does not load, lacks CUDA, or was built from other sources on a machine that was kept."""
    monkeypatch.setattr(preparation, "BUILT_FROM", tmp_path / "built-from")
    gpu, cpu = make(tmp_path / "gpu", device="cuda"), make(tmp_path / "cpu")
    whole, without = {"built": ["cpu", "cuda"]}, {"built": ["cpu"], "cuda_left_out": "no nvcc"}
    assert preparation.why_build(gpu, "not loaded: why") == "not loaded: why"
    assert preparation.why_build(gpu, without) == "the extension has no CUDA: no nvcc"
    assert preparation.why_build(cpu, without) is None and preparation.why_build(gpu, whole) is None
    (tmp_path / "built-from").write_text(preparation.sources())
    assert preparation.why_build(gpu, whole) is None
    (tmp_path / "built-from").write_text("others")
    assert "other sources" in preparation.why_build(gpu, whole)


@pytest.mark.parametrize(
    "code, why",
    [
        ('print(\'{"kernel": "a", "error": "ptxas"}\', flush=True); raise SystemExit(1)', "a: ptxas"),
        ('print(\'{"kernel": "a"}\', flush=True); import os; os.kill(os.getpid(), 9)', "killed by SIGKILL"),
        ('print(\'{"kernel": "a"}\', flush=True); import time; time.sleep(600)', "stopped after"),
    ],
)
def test_kernels_that_do_not_compile(tmp_path, monkeypatch, code, why):
    (tmp_path / "precompile.py").write_text(code)
    monkeypatch.setattr(preparation, "BENCHMARKS", tmp_path)
    run = make(tmp_path / "out", device="cuda")
    preparation.start_kernels(run)
    wait_for(lambda: run.background["kernels"].lines)
    with pytest.raises(Failed, match=why) as failure:
        preparation.kernels(run, 0.1 if why == "stopped after" else PATIENCE)
    assert "1 variants" in str(failure.value) and run.results["kernels"][0]["kernel"] == "a"


def test_ncu_takes_one_kernel_at_a_time(tmp_path, bin_folder):
    """One kernel crashes and one prints no numbers; those of the others stay."""
    tool(
        bin_folder,
        "ncu",
        """
        import os, sys
        kernel = sys.argv[sys.argv.index("--kernel-name") + 1].removeprefix("regex:^").removesuffix("$")
        assert sys.argv[-5:] == ["--dtypes", "bf16", "--first", "--repeat", "6"]
        if kernel == "attention_fwd_kernel":
            os.abort()
        if kernel != "norm_linear_fwd_kernel":
            print('"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"')
            print(f'"0","{kernel}","gpu__time_duration.sum","ns","2000"')
        """,
    )
    run = make(tmp_path / "out", device="cuda")
    found = steps.ncu(run, PATIENCE)
    expected = [
        kernel for kernel, _ in tools.NCU_KERNELS if kernel not in ("attention_fwd_kernel", "norm_linear_fwd_kernel")
    ]
    assert [kernel["kernel"] for kernel in found["kernels"]] == expected
    assert "attention_fwd_kernel: killed by SIGABRT" in found["summary"]
    assert "norm_linear_fwd_kernel: no numbers" in found["summary"]


def test_the_sanitizer_runs_racecheck_where_there_is_time(tmp_path, monkeypatch, bin_folder):
    tool(
        bin_folder,
        "compute-sanitizer",
        """
        import sys
        name = sys.argv[2]
        print("========= ERROR SUMMARY: 0 errors" if name == "memcheck" else
              "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)")
        """,
    )
    (tmp_path / "kernel_run.py").write_text("")
    monkeypatch.setattr(steps, "BENCHMARKS", tmp_path)
    with pytest.raises(Failed, match="racecheck: RACECHECK SUMMARY: 2 hazards"):
        steps.sanitizer(make(tmp_path / "long", device="cuda"), PATIENCE)
    with pytest.raises(Skipped, match="needs a GPU"):
        steps.sanitizer(make(tmp_path / "cpu"), 30.0)


def test_tests_that_are_cut_short_are_counted(tmp_path, monkeypatch):
    """The kernels' tests are killed after some; the others run."""
    (tmp_path / "tests" / "ops" / "some").mkdir(parents=True)
    (tmp_path / "tests" / "ops" / "some" / "test_triton.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test_op(n):\n    assert n != 1\n    n != 3 or os.kill(os.getpid(), 9)\n"
    )
    marked = "import pytest\n@pytest.mark.{}\ndef test_a():\n    pass\n"
    (tmp_path / "tests" / "test_a.py").write_text(marked.format("gpu"))
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)  # without xdist
    run = make(tmp_path / "out", device="cuda")
    run.processes.directory = tmp_path
    with pytest.raises(Failed, match="kernels: killed by SIGKILL.*; until then 2 passed and 1 failed; gpu: 1 passed"):
        steps.tests(run, PATIENCE)
