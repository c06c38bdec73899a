"""Runs the report or triage on a machine; `benchmarks/gpu_report.sh` calls it.

    report.py OUT --triage                 is it right and is it fast, on a GPU, in 90 seconds: triage.json, triage.log
    report.py OUT --minutes 4|6|9          the report, as much of it as fits: results.json, report.md, log.txt
    report.py OUT --device cpu ...         the same on the CPU; --quick: on the smallest sizes, to try the logic out

A plan is a list of steps (steps.py) with their shares of the time, the most wanted first. Every step runs in processes
of its own (processes.py), and what it measures is on the disk before the next one begins: a step that crashes, hangs or
is killed costs that step alone, and a run that is stopped leaves what was measured. Nothing is installed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import preparation
import steps
from processes import Failed, Log, Process, Processes, Skipped, Stopped

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """One part of the report.

    Args:
        run: takes the seconds that it may take; returns what goes under its name in results.json.
        seconds: its share of the time; more where those before it left some over.
        least: seconds without which it does not begin.
    """

    name: str
    run: Callable[[float], dict]
    seconds: float
    least: float = 3.0


@dataclass(frozen=True)
class Plan:
    """The steps of a kind of run, in order, and the seconds that each may take.

    Args:
        minutes: of whole runs, one for each column of `seconds`; a run of other minutes scales the nearest one below.
        seconds: step → its share in each of those runs; 0: not in that one. A share is a limit, and most steps take
            less: they may add up to more than there is, and what comes last makes do.
        needed: the part of its share without which a step does not begin.
        reserve: seconds kept back from all steps, for the last writing.
    """

    minutes: tuple[float, ...]
    seconds: dict[str, tuple[float, ...]]
    needed: float
    reserve: float

    def shares(self, minutes: float) -> dict[str, float]:
        """Seconds by step."""
        column = max((i for i, m in enumerate(self.minutes) if m <= minutes), default=0)
        return {name: row[column] * minutes / self.minutes[column] for name, row in self.seconds.items()}


PLANS = {
    # "machine" starts build and kernels in the background; "kernels" and "extension" wait for their end. Even if all
    # processes hang, each step ends after its share, and the build after the shares of the steps up to "extension".
    "triage": Plan(
        minutes=(2.5,),
        seconds={
            "machine": (25,),
            "kernels": (25,),
            "ops": (22,),
            "training": (28,),
            "extension": (3,),
            "native ops": (10,),
            "sampling": (15,),
            "upstream": (18,),
        },
        needed=0.3,
        reserve=3.0,
    ),
    # 4 minutes: times of the networks. 6: also correctness. 9: everything. max-autotune does not fit into 6: the steps
    # before it may take 330 of 352 seconds, and its compilation is expected to take over 60.
    "cuda": Plan(
        minutes=(4, 6, 9),
        seconds={
            "machine": (30, 30, 30),
            "kernels": (30, 30, 30),
            "training": (40, 45, 50),
            "extension": (40, 40, 40),
            "sampling": (35, 45, 55),
            "training compiled": (60, 80, 90),
            "sampling compiled": (45, 60, 70),
            "sampling max-autotune": (0, 0, 90),
            "training max-autotune": (0, 0, 110),
            "ops bf16": (25, 35, 40),
            "ncu": (25, 35, 45),
            "sanitizer": (0, 45, 60),
            "tests": (0, 60, 90),
            "ops fp32": (20, 30, 35),
            "first step": (0, 60, 70),
            "networks fp32": (0, 45, 50),
            "other networks": (0, 45, 50),
        },
        needed=0.5,
        reserve=8.0,
    ),
    # A CPU compiles slowly, before anything is timed since the cores are needed, and has no GPU to look at.
    "cpu": Plan(
        minutes=(9,),
        seconds={
            "machine": (15,),
            "extension": (60,),
            "gpu tests": (20,),
            "sanitizer": (15,),
            "compile": (150,),
            "networks": (310,),
            "memory": (70,),
            "ops": (50,),
            "ncu": (5,),
            "training run": (50,),
            "first step": (100,),
        },
        needed=0.0,
        reserve=8.0,
    ),
}


# Steps that always run and need no GPU.
PREPARATION = ("machine", "kernels", "extension")


class Report:
    """Runs the steps of a plan and keeps OUT up to date.

    Args:
        out: the folder to fill.
        device: "cpu" or "cuda".
        quick: smallest sizes, to try the whole logic out; the numbers are then worth nothing.
        minutes: for everything.
        revision: the commit that is measured; None asks git.
        cache: a folder that keeps what torch.compile and Triton compile for the next run; None: build/gpu-cache on a
            GPU, nothing on the CPU.
        plan: of PLANS; None: the device's report.
        only: names of steps; the others are left out, but for those that say what the machine is and build.
    """

    def __init__(
        self, out: Path, device: str, quick: bool, minutes: float, revision: str | None = None,
        cache: Path | None = None, plan: str | None = None, only: Sequence[str] = (),
    ):  # fmt: skip
        self.out, self.device, self.quick, self.minutes = out.resolve(), device, quick, minutes
        self.plan = plan or device
        self.only = set(only)
        self.end = time.time() + 60 * minutes
        self.size = "quick" if quick else "full" if device == "cuda" else "cpu"
        self.work = Path(tempfile.mkdtemp(prefix="ddpm-fast-report-"))
        self.records = self.work / "records.jsonl"
        self.records.touch()
        if cache is None and device == "cuda":
            cache = ROOT / "build" / "gpu-cache"
        self.cache = cache.resolve() if cache else None
        self.background: dict[str, Process] = {}
        self.absent: str | None = None  # why there is no such device, where that is known
        self.out.mkdir(parents=True, exist_ok=True)
        file, log = ("triage.json", "triage.log") if self.plan == "triage" else ("results.json", "log.txt")
        self.file = self.out / file
        self.log = Log(self.out / log, {str(self.work): "WORK", str(ROOT): "."})
        self.processes = Processes(self._environment(), ROOT, self.log, self._write_results)
        self.current = ""
        self.results = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": revision or commit(), "device": device, "quick": quick, "steps": {}, "records": [],
        }  # fmt: skip

    def _environment(self) -> dict[str, str]:
        """The package from this checkout, missing packages from wheels, compile caches that all steps share."""
        packages = self.work / "packages"
        unpack_missing(ROOT / ".whl", packages)
        path = [str(ROOT), str(packages), os.environ.get("PYTHONPATH", "")]
        return {
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "PYTHONPATH": os.pathsep.join(p for p in path if p),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",  # a crash leaves its stack in the log
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache or self.work / "inductor"),
            "TRITON_CACHE_DIR": str((self.cache or self.work) / "triton"),
        }

    def run(self) -> None:
        """Run all steps; after each, the files in OUT are complete."""
        handlers = {signum: signal.signal(signum, self._stop) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            chosen = self.steps()
            for i, step in enumerate(chosen):
                self._one(step, sum(later.seconds for later in chosen[i + 1 :]))
        except Stopped:
            self.results["stopped"] = "the run was told to end"
        finally:
            for signum in handlers:
                signal.signal(signum, signal.SIG_IGN)
            self.processes.end()
            self._write(last=True)
            self.log.close()
            shutil.rmtree(self.work, ignore_errors=True)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        self._say_all()

    def steps(self) -> list[Step]:
        """The plan's steps, in order."""
        plan = PLANS[self.plan]
        return [
            Step(name, partial(steps.STEPS[self.plan][name], self), seconds, seconds * plan.needed)
            for name, seconds in plan.shares(self.minutes).items()
            if not self.only or name in self.only or name in PREPARATION
        ]

    def left(self) -> float:
        """Seconds until the last step has to be over."""
        return self.end - PLANS[self.plan].reserve - time.time()

    def _one(self, step: Step, later: float) -> None:
        left = self.left()
        limit = min(left, max(step.seconds, left - later))
        self.current = step.name
        outcome: dict = {"status": "ok"}
        began = time.time()
        if step.seconds == 0 and not self.only:
            outcome = {"status": "skipped", "why": f"not in a run of {self.minutes:g} minutes"}
        elif self.absent and step.name not in PREPARATION:
            outcome = {"status": "skipped", "why": self.absent}
        elif left < 3:
            outcome = {"status": "skipped", "why": "out of time"}
        elif left < step.least:
            outcome = {"status": "skipped", "why": f"takes up to {step.seconds:.0f} s, and {left:.0f} s are left"}
        else:
            print(f"{step.name} (at most {limit:.0f} s, {left:.0f} s left)", flush=True)
            try:
                outcome |= step.run(limit)
            except Skipped as reason:
                outcome = {"status": "skipped", "why": str(reason)}
            except Failed as reason:
                outcome = {"status": "failed", "why": str(reason)}
            except Exception as error:  # a fault of this script: told in the report, and the next step runs
                outcome = {"status": "failed", "why": f"{type(error).__name__}: {error}"}
                self.log.write(traceback.format_exc())
        outcome["seconds"] = round(time.time() - began, 1)
        self.results["steps"][step.name] = outcome
        print(f"  {in_words(outcome)}", flush=True)
        self._write(last=False)

    def call(self, command: list[str], limit: float, **options) -> str:
        """`Processes.call` under the name of the step that runs, beside the build and not on its cores."""
        return self.processes.call(self.current, command, limit, cores=self.cores(), **options)

    def cores(self) -> set[int] | None:
        """Those that processes may use now: not the build's, while it runs. None: all, or this system cannot tell."""
        building = "build" in self.background and self.background["build"].running
        return preparation.halves()[1] if building else None

    def _stop(self, signum: int, frame) -> None:
        raise Stopped

    # What stays ----------------------------------------------------------------------------------------------------

    def _write_results(self) -> None:
        lines = self.records.read_text().splitlines(keepends=True)
        self.results["records"] = [json.loads(line) for line in lines if line.endswith("\n")]
        write(self.file, json.dumps(self.results, indent=1) + "\n")

    def _write(self, last: bool) -> None:
        """Write results.json; for a report also report.md, and on the CPU the pictures after the last step."""
        self._write_results()
        if self.plan == "triage":
            return
        try:
            import render

            write(self.out / "report.md", render.report(self.results))
            if last and self.plan == "cpu":
                render.charts(self.results, self.out)
        except Exception:  # render.py can be mended and run again on results.json; a lost machine cannot
            self.log.write(traceback.format_exc())
            print("  report.md could not be written; see log.txt", flush=True)

    def _say_all(self) -> None:
        """The end of the output, which is all that some machines send back."""
        print("\n" + "\n".join(f"{name}: {in_words(outcome)}" for name, outcome in self.results["steps"].items()))
        if self.plan != "triage":
            import render

            print("\n" + render.overview(self.results))
        print(f"\nin {self.out}: {', '.join(sorted(file.name for file in self.out.iterdir()))}", flush=True)


def in_words(outcome: dict) -> str:
    """How a step ended."""
    more = outcome.get("why") or outcome.get("summary")
    return f"{outcome['status']} after {outcome['seconds']} s" + (f": {more}" if more else "")


def unpack_missing(wheels: Path, folder: Path) -> None:
    """Unpack those wheels of a folder whose packages are not installed."""
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            zipfile.ZipFile(wheel).extractall(folder)


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def commit() -> str:
    """The commit that is measured, with "+" where files differ from it; "unknown" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    if shutil.which("git") is None:
        return "unknown"
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    if found.returncode:
        return "unknown"
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for what comes out")
    parser.add_argument("--triage", action="store_true", help="the first look at a GPU, in about 90 seconds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to try the logic out")
    parser.add_argument("--minutes", type=float, help="for everything (default: 9; with --triage 2.5, at the most)")
    parser.add_argument("--only", default="", help="names of steps with commas between them, such as tests,ncu")
    parser.add_argument("--cache", type=Path, help="folder that keeps what is compiled for the next run")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    parser.add_argument("--plan", choices=["cuda", "cpu"], help="the report of another device than --device's")
    options = parser.parse_args(arguments)
    plan = "triage" if options.triage else options.plan or options.device
    minutes = options.minutes or (2.5 if options.triage else 9.0)
    only = [name for name in options.only.split(",") if name]
    unknown = [name for name in only if name not in PLANS[plan].seconds]
    if unknown:
        parser.error(f"--only: no step {', '.join(unknown)}; there are {', '.join(PLANS[plan].seconds)}")
    sys.path.insert(0, str(ROOT))
    Report(
        options.out, options.device, options.quick, minutes, options.commit, options.cache, plan, only
    ).run()  # fmt: skip


if __name__ == "__main__":
    main()
