"""The first steps of a report: the machine's description, the build of the extension, and the kernels' compilation.

On a GPU machine the build begins first, on half of the cores, and the kernels beside it on the others; `extension` and
`kernels` are the steps that wait for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from processes import Failed, Skipped

if TYPE_CHECKING:
    from report import Report

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
PYTHON = sys.executable
# The hash of the sources of the last build; it stays on a machine that is kept between two calls.
BUILT_FROM = ROOT / "build" / "built-from"


def halves() -> tuple[set[int], set[int]] | tuple[None, None]:
    """The cores of the build, and those of everything beside it; (None, None) where processes cannot be told theirs."""
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    cores = sorted(os.sched_getaffinity(0))
    half = (len(cores) + 1) // 2
    return set(cores[:half]), set(cores[half:] or cores)


def machine(report: Report, limit: float) -> dict:
    """Describe the machine, and for a report measure its ceilings; on a GPU machine start build and kernels first.

    Without the device that the report is about it fails, and leaves the reason in `report.absent`.
    """
    until = time.time() + limit
    if report.device == "cuda":
        if not list((ROOT / "ddpm_fast").glob("_C.*")):
            start_build(report)
        start_kernels(report)
        if shutil.which("nvidia-smi"):
            report.processes.start("nvidia-smi", ["nvidia-smi"])  # for the log; nothing waits for it
    code = (
        f"import json, torch; from ddpm_fast.measure import machine; device = torch.device({report.device!r})\n"
        "absent = machine.why_absent(device)\n"
        f"measures = absent is None and {report.plan != 'triage'}\n"
        f"ceilings = measures and machine.measure_ceilings(device, quick={report.quick}).as_dict()\n"
        "print(json.dumps([machine.describe('cpu' if absent else device), absent, ceilings]))"
    )
    facts, report.absent, ceilings = json.loads(report.call([PYTHON, "-c", code], until - time.time()).splitlines()[-1])
    report.results["machine"] = facts
    if ceilings:
        report.results["ceilings"] = ceilings
        (report.work / "ceilings.json").write_text(json.dumps(ceilings))
    if "build" not in report.background and why_build(report, facts["extension"]):
        start_build(report)
    summary = f"{facts.get('gpu', facts['processor'])}, torch {facts['torch']}, triton {facts['triton']}"
    if report.absent:
        raise Failed(f"{report.absent}; {summary}")
    return {"summary": summary}


def why_build(report: Report, found: dict | str) -> str | None:
    """Why the installed extension must be built again, from `machine.describe`; None if it need not."""
    if isinstance(found, str):
        return found
    if report.device == "cuda" and "cuda" not in found["built"]:
        return f"the extension has no CUDA: {found['cuda_left_out']}"
    if report.device == "cuda" and BUILT_FROM.exists() and BUILT_FROM.read_text() != sources():
        return "the extension was built from other sources"
    return None


def sources() -> str:
    """A hash of the extension's sources."""
    files = [ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def start_build(report: Report) -> None:
    """Build the extension in place, in the background on cores of its own, for this processor and the visible GPU."""
    cores, _ = halves()
    environment = {"DDPM_FAST_MARCH": "native"} | ({"MAX_JOBS": str(len(cores))} if cores else {})
    if report.device == "cuda":
        environment["DDPM_FAST_BUILD"] = "cuda"  # which fails at once, and not after a second build without CUDA
    if report.device == "cuda" and "TORCH_CUDA_ARCH_LIST" not in os.environ and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        with contextlib.suppress(Failed):  # setup.py then asks torch
            environment["TORCH_CUDA_ARCH_LIST"] = report.call(query, 5.0).split()[0]
    command = [PYTHON, "setup.py", "build_ext", "--inplace"]
    report.background["build"] = report.processes.start("build", command, environment=environment, cores=cores)


def extension(report: Report, limit: float) -> dict:
    """Wait for the build, where there is one, and see that the extension loads."""
    until = time.time() + limit
    if "build" not in report.background:
        info = report.results.get("machine", {}).get("extension", "not known: the machine was not described")
        if why_build(report, info):
            raise Failed(why_build(report, info))
        return {"built": "before", "info": info}
    build = report.background["build"]
    report.processes.finish(build, limit)
    took = time.time() - build.began
    code = "import json; from ddpm_fast.runtime import extension as e; print(json.dumps([e.reason(), e.info()]))"
    reason, info = json.loads(report.call([PYTHON, "-c", code], until - time.time()).splitlines()[-1])
    BUILT_FROM.parent.mkdir(exist_ok=True)
    BUILT_FROM.write_text(sources())  # before it is judged, which compares them
    wrong = why_build(report, reason or info)
    if wrong:
        raise Failed(wrong)
    report.results.setdefault("machine", {})["extension"] = info
    return {"built": "now", "summary": f"built in {took:.0f} s", "info": info}


def start_kernels(report: Report) -> None:
    """Compile all Triton kernels of production in the background, into the cache that every later step reads."""
    cores = report.cores() or os.sched_getaffinity(0)
    command = [PYTHON, str(BENCHMARKS / "precompile.py"), "--processes", str(len(cores))]
    report.background["kernels"] = report.processes.start("kernels", command, cores=cores)


def kernels(report: Report, limit: float) -> dict:
    """Wait for the kernels' compilation. Each variant's registers and spills, or its error, go to results.json."""
    process = report.background.get("kernels")
    if process is None:
        raise Skipped("the CPU runs no Triton kernels")
    failure = None
    try:
        report.processes.finish(process, limit)
    except Failed as reason:
        failure = str(reason)
    found = [json.loads(line) for line in process.lines if line.startswith("{")]
    variants = report.results["kernels"] = [line for line in found if "kernel" in line]
    broken = [f"{line['kernel']}: {line['error']}" for line in variants if line.get("error")]
    if failure or broken:
        raise Failed("; ".join([*([failure] if failure else []), f"{len(variants)} variants", *broken[:3]]))
    spills = sum(bool(line.get("spills")) for line in variants)
    return {"summary": f"{len(variants)} variants in {time.time() - process.began:.0f} s, {spills} with spills"}
