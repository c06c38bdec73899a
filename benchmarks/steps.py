"""The steps of a report and of triage, by name: each is a function of the report and a time limit in seconds.

A step starts processes and reads their output; it computes nothing itself, so a crash of a process does not end the
report. results.json keeps the returned dict under the step's name; a step raises Failed or Skipped with a reason.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import time
from functools import partial
from typing import TYPE_CHECKING

from preparation import BENCHMARKS, PYTHON, ROOT, extension, kernels, machine
from processes import Failed, Skipped
from tools import NCU_KERNELS, NCU_METRICS, SANITIZED_OPS, read_ncu, read_sanitizer

if TYPE_CHECKING:
    from report import Report

# The ops of triage: those of Triton, which need no extension, and those of the extension.
TRITON_OPS = (
    "rms_norm_silu", "linear_attention_block", "norm_linear", "linear_attention", "attention", "q_sample",
    "diffusion_loss", "group_norm_silu", "variational_bound", "resnet_block",
)  # fmt: skip
NATIVE_OPS = ("fill_normal_", "sampler_step_")
# Baselines of a network case, step by step: each step times those of the previous step again, in the rounds of one
# process. Where a step is cut short, the record of the previous step remains.
EAGER = ("ours-step-by-step", "upstream", "upstream-channels-last")
COMPILED = (*EAGER, "upstream-compiled")
AUTOTUNED = (*COMPILED, "upstream-max-autotune")


# Triage --------------------------------------------------------------------------------------------------------------


def part(report: Report, limit: float, name: str) -> dict:
    """A part of triage.py in its own process; its lines are printed at once."""
    lines = report.call(part_command(report, name), limit, echo=True).strip().splitlines()
    return {"summary": lines[-1]}


def part_command(report: Report, name: str, *options: str) -> list[str]:
    return [
        PYTHON, str(BENCHMARKS / "triage.py"), name, "--device", report.device, "--size", report.size,
        "--records", str(report.records), *options,
    ]  # fmt: skip


def triage_ops(report: Report, limit: float, ops: tuple[str, ...]) -> dict:
    """Every op against its reference; on a GPU in a process each, all at a time, since nothing is timed."""
    groups = [(op,) for op in ops] if report.device == "cuda" else [ops]
    commands = {"+".join(group): part_command(report, "ops", "--ops", *group) for group in groups}
    texts, failures = report.processes.call_all(commands, limit, len(ops), cores=report.cores(), echo=True)
    if failures:
        raise Failed("; ".join(f"{name} {reason}" for name, reason in failures.items()))
    return {"summary": "; ".join(f"{name}: {text.splitlines()[-1]}" for name, text in texts.items())}


# Measuring -----------------------------------------------------------------------------------------------------------


def bench(report: Report, limit: float, file: str, seconds: float, *options: str) -> dict:
    """A file of benchmarks/ under pytest-benchmark; its records come line by line."""
    # The deadline is at 85% of the limit: a contest that has begun may end.
    command = [
        PYTHON, "-m", "pytest", str(BENCHMARKS / file), "-q", "-p", "no:cacheprovider", "--device", report.device,
        "--size", report.size, "--seconds", str(seconds), "--records", str(report.records),
        "--deadline", str(time.time() + 0.85 * limit), "--benchmark-columns=median,iqr,rounds", "--show-capture=no",
        *options,
    ]  # fmt: skip
    if (report.work / "ceilings.json").exists():
        command += ["--ceilings", str(report.work / "ceilings.json")]
    output = report.call(command, limit, codes=(0, 1))
    summary = output.strip().splitlines()[-1].strip("= ")
    if " failed" in summary or " error" in summary:
        raise Failed(f"{summary}; see log.txt")
    return {"summary": summary}


def network(report: Report, limit: float, case: str, baselines: tuple[str, ...] = ()) -> dict:
    """One case of network_cases.py in its own process: ours against `baselines`, by default all that the case lists."""
    from network_cases import network_cases

    if case not in [found.name for found in network_cases(report.size)]:
        raise Skipped(f"there is no case {case!r} of the size {report.size!r}")
    options = ["--case", case, *(["--baselines", ",".join(baselines)] if baselines else [])]
    if report.size == "full" and case == "sampling":  # fewer where time is short
        options += ["--steps", "250" if report.minutes >= 9 else "150" if report.minutes >= 6 else "100"]
    before = len(report.records.read_text().splitlines())
    found = bench(report, limit, "bench_networks.py", 0.2 if report.quick else 3.0, *options)
    new = [json.loads(line) for line in report.records.read_text().splitlines()[before:]]
    return {"summary": "; ".join(ratios(record) for record in new) or found["summary"]}


def ratios(record: dict) -> str:
    """Our time in milliseconds, and each baseline's time divided by ours."""
    medians = {name: t["median"] for name, t in record["timings"].items()}
    ours = medians.pop("ours")
    others = [f", {name} {median / ours:.2f} times as long" for name, median in medians.items()]
    return f"ours {1e3 * ours:.4g} ms" + "".join(others)


def networks(report: Report, limit: float) -> dict:
    """Every case in its own process, on the CPU; `compile_ahead` has compiled the baselines."""
    from network_cases import network_cases

    until = time.time() + limit
    options = ["--warmed", str(report.work / "warm.txt")] if (report.work / "warm.txt").exists() else []
    summaries, failures = [], []
    for case in network_cases(report.size):
        if until - time.time() < 3:
            failures.append(f"{case.name}: out of time")
            continue
        try:
            found = bench(
                report, until - time.time(), "bench_networks.py", 0.2 if report.quick else 20.0, "--case", case.name,
                *options,
            )  # fmt: skip
            summaries.append(f"{case.name}: {found['summary']}")
        except Failed as reason:
            failures.append(f"{case.name}: {reason}")
    if failures:
        raise Failed("; ".join(failures + summaries))
    return {"summary": "; ".join(summaries)}


def compile_ahead(report: Report, limit: float) -> dict:
    """Compile upstream's networks into the cache until the limit; later steps and the next run load them."""
    process = report.processes.start("compile", [PYTHON, str(BENCHMARKS / "warm.py"), report.device, report.size])
    try:
        report.processes.finish(process, limit)
        ended = "all of it"
    except Failed as reason:
        ended = f"not all: {reason}"
    (report.work / "warm.txt").write_text(process.text + "\n")
    forms = [json.loads(line) for line in process.lines if line.startswith("{")]
    return {"summary": f"{ended}; {len(forms)} networks", "forms": forms}


def ops(report: Report, limit: float, dtype: str | None = None) -> dict:
    """Every implementation of every op; on a GPU, compiled ones only in a report of 9 minutes or more."""
    seconds = 0.05 if report.quick else 1.0 if report.device == "cpu" else 0.1 if report.minutes < 6 else 0.3
    options = ["--dtypes", dtype] if dtype else []
    if report.plan == "cuda" and report.minutes < 9:
        options.append("--without-compiled")
    return bench(report, limit, "bench_ops.py", seconds, *options)


def training_run(report: Report, limit: float) -> dict:
    """One minute of `ddpm-fast train digits`, ended by SIGINT, then samples of the trained model."""
    folder = report.work / "run"
    train = [PYTHON, "-m", "ddpm_fast", "train", "digits", "--seed", "0", "--results-folder", str(folder)]
    train += ["--steps", "1000000", "--save-every", "1000000", "--workers", "0"]
    seconds = 6.0 if report.quick else min(60.0, limit - 15)
    process = report.processes.start("training run", train)
    while process.popen.poll() is None and time.time() - process.began < limit - 15:
        if time.time() - process.began > seconds and (folder / "loss.csv").exists():
            break
        time.sleep(0.1)
    process.signal(signal.SIGINT)
    report.processes.finish(process, 10, codes=(0, 130, -signal.SIGINT))
    took = time.time() - process.began
    if not list(folder.glob("model-*.pt")):
        raise Failed("training left no checkpoint; see log.txt")
    sample = [PYTHON, "-m", "ddpm_fast", "sample", str(folder), "--seed", "0", "--scale", "4"]
    sample += ["--num-samples", "4" if report.quick else "100", "--out", str(report.out / "samples.png")]
    sample += ["--sampling-timesteps", "2"] if report.quick else []
    report.call(sample, limit - took)
    (report.out / "samples-strip.png").unlink(missing_ok=True)
    rows = list(csv.DictReader((folder / "loss.csv").read_text().splitlines()))
    return {"train_seconds": round(took, 1)} | ({"last_logged": rows[-1]} if rows else {})


# Tests and tools of the GPU ------------------------------------------------------------------------------------------


def tests(report: Report, limit: float) -> dict:
    """The tests of the kernels, then all other tests that need a GPU; without a GPU pytest skips the latter."""
    until = time.time() + limit
    gpu = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").rglob("test_*.py"))
           if "mark.gpu" in file.read_text()]  # fmt: skip
    runs = {"gpu": ["-m", "gpu", *(gpu[:1] if report.quick else gpu)]}
    if report.device == "cuda":
        kernel_tests = sorted((ROOT / "tests" / "ops").glob("*/test_triton*.py"))
        runs = {"kernels": [str(file.relative_to(ROOT)) for file in kernel_tests]} | runs
    command = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if report.device == "cuda" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(14, len(os.sched_getaffinity(0)) - 2))), "--dist", "worksteal"]
    # The tests need cuBLAS's deterministic algorithms: they need this variable set before cuBLAS starts.
    environment = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    found, bad = {}, False
    for name, options in runs.items():
        process = report.processes.start(f"tests {name}", [*command, *options], environment=environment)
        try:
            output = report.processes.finish(process, until - time.time(), codes=(0, 1))
            found[name] = output.splitlines()[-1].strip("= ")
            bad |= " failed" in found[name] or " error" in found[name]
        except Failed as reason:
            passed, failed = (len(re.findall(rf"\b{word}\b", process.text)) for word in ("PASSED", "FAILED"))
            found[name], bad = f"{reason}; until then {passed} passed and {failed} failed", True
    summary = "; ".join(f"{name}: {how}" for name, how in found.items())
    if bad:
        raise Failed(f"{summary}; see log.txt")
    return {"summary": summary}


def sanitizer(report: Report, limit: float) -> dict:
    """compute-sanitizer on the small shapes of some ops: memcheck, and racecheck where there is time for it."""
    until = time.time() + limit
    run = [PYTHON, str(BENCHMARKS / "kernel_run.py"), report.device, "quick", "--dtypes", "bf16"]
    run += ["--ops", *SANITIZED_OPS]
    report.call(run, limit)  # without a tool first: that compiles the kernels
    tool = shutil.which("compute-sanitizer")
    if report.device != "cuda" or tool is None:
        raise Skipped("compute-sanitizer needs a GPU" if tool else "compute-sanitizer is not on the PATH")
    found, took = {}, 0.0
    # Without torch's caching allocator every tensor is one cudaMalloc, so memcheck sees reads past its end.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("memcheck", "racecheck"):
        if until - time.time() < 1.5 * took:
            break
        began = time.time()
        options = ["--tool", name, "--error-exitcode", "86", "--report-api-errors", "no"]
        output = report.call([tool, *options, *run], until - began, codes=(0, 86), environment=environment)
        found[name], took = read_sanitizer(output), time.time() - began
        if not found[name]["clean"]:
            raise Failed(f"{name}: {found[name]['summary']}; see log.txt")
    return {"summary": "; ".join(f"{name}: {result['summary']}" for name, result in found.items())} | found


def ncu(report: Report, limit: float) -> dict:
    """Achieved bandwidth of the kernels that take most of a step, one after another, from hardware counters."""
    tool = shutil.which("ncu")
    if report.device != "cuda" or tool is None:
        raise Skipped("ncu needs a GPU" if tool else "ncu is not on the PATH")
    until, kernels, failures = time.time() + limit, [], []
    for kernel, op in NCU_KERNELS:
        if until - time.time() < 5:
            failures.append(f"{kernel}: out of time")
            continue
        run = [PYTHON, str(BENCHMARKS / "kernel_run.py"), "cuda", report.size, "--ops", op, "--dtypes", "bf16"]
        options = ["--csv", "--clock-control", "none", "--kernel-name", f"regex:^{kernel}$", "--launch-skip", "2"]
        options += ["--kernel-name-base", "function", "--print-kernel-base", "function", "--print-units", "base"]
        options += ["--launch-count", "4", "--metrics", ",".join(NCU_METRICS)]
        try:
            command = [tool, *options, *run, "--first", "--repeat", "6"]
            output = report.call(command, min(20.0, until - time.time()), codes=tuple(range(256)))
        except Failed as reason:
            failures.append(f"{kernel}: {reason}")
            continue
        if "ERR_NVGPUCTRPERM" in output or "LibraryNotLoaded" in output:
            raise Skipped("the driver does not let this user read the counters")
        found = read_ncu(output)
        kernels += found
        failures += [] if found else [f"{kernel}: no numbers"]
    if not kernels:
        raise Failed(f"ncu gave no numbers; see log.txt; {'; '.join(failures)}")
    return {"kernels": kernels, "summary": "; ".join([f"{len(kernels)} launches", *failures])}


STEPS = {
    "triage": {
        "machine": machine, "kernels": kernels, "ops": partial(triage_ops, ops=TRITON_OPS), "extension": extension,
        "native ops": partial(triage_ops, ops=NATIVE_OPS), "training": partial(part, name="training"),
        "sampling": partial(part, name="sampling"), "upstream": partial(part, name="upstream"),
    },
    "cuda": {
        "machine": machine, "kernels": kernels, "extension": extension, "ncu": ncu, "sanitizer": sanitizer,
        "training": partial(network, case="training", baselines=EAGER),
        "sampling": partial(network, case="sampling", baselines=EAGER),
        "training compiled": partial(network, case="training", baselines=COMPILED),
        "sampling compiled": partial(network, case="sampling", baselines=COMPILED),
        "training max-autotune": partial(network, case="training", baselines=AUTOTUNED),
        "sampling max-autotune": partial(network, case="sampling", baselines=AUTOTUNED),
        "networks fp32": partial(network, case="fp32"), "other networks": partial(network, case="others"),
        "ops bf16": partial(ops, dtype="bf16"), "ops fp32": partial(ops, dtype="fp32"), "tests": tests,
        "first step": partial(bench, file="bench_first_step.py", seconds=1.0),
    },
    "cpu": {
        "machine": machine, "extension": extension, "gpu tests": tests, "sanitizer": sanitizer,
        "compile": compile_ahead, "networks": networks, "memory": partial(bench, file="bench_memory.py", seconds=1.0),
        "ops": ops, "ncu": ncu, "training run": training_run,
        "first step": partial(bench, file="bench_first_step.py", seconds=1.0),
    },
}  # fmt: skip
