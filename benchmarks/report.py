"""One command that turns a machine into a report; `benchmarks/gpu_report.sh` calls it.

Every step runs in processes of its own, within its share of the time, and its results are on the disk before the next
one begins: a run that is stopped, or a step that fails, leaves what was measured. Nothing is installed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools import NCU_METRICS, OUR_KERNELS, read_ncu, read_sanitizer

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
# Seconds that each step may take of a run of nine minutes, in order; a device has the steps that stand here. A CPU
# compiles slowly, before anything is timed since the cores are needed, and has no GPU to look at. A limit is no plan:
# on a CPU they add up to more than there is, and what comes last makes do.
SHARES = {
    "cuda": {
        "machine": 50, "extension": 100, "gpu tests": 100, "sanitizer": 45, "networks": 130, "ops": 40, "ncu": 25,
        "training run": 75, "first step": 60,
    },
    "cpu": {
        "machine": 15, "extension": 60, "gpu tests": 20, "sanitizer": 15, "compile": 150, "networks": 310, "memory": 70,
        "ops": 50, "ncu": 5, "training run": 50, "first step": 100,
    },
}  # fmt: skip
# Kept back from every step, for pictures and the last writing.
RESERVE = 8.0


class Stopped(BaseException):
    """The run was told to end; no step may take that for a fault of its own."""


class Skipped(Exception):
    """A step that cannot run here; the text is the reason."""


class Failed(Exception):
    """A step that ran and did not succeed; the text says how."""


@dataclass
class Step:
    """One part of the report.

    Args:
        run: takes the seconds that it may take; returns what goes under its name in results.json.
        seconds: its share of a nine-minute run.
    """

    name: str
    run: Callable[[float], dict]
    seconds: float


class Report:
    """Runs the steps and keeps OUT up to date.

    Args:
        out: the folder to fill.
        device: "cpu" or "cuda".
        quick: smallest sizes, to try the whole logic out; the numbers are then worth nothing.
        minutes: for everything.
        revision: the commit that is measured; None asks git.
        cache: a folder that keeps what torch.compile makes for the next run; None keeps nothing.
    """

    def __init__(
        self, out: Path, device: str, quick: bool, minutes: float, revision: str | None = None,
        cache: Path | None = None,
    ):  # fmt: skip
        self.cache = cache.resolve() if cache else None
        self.out, self.device, self.quick = out.resolve(), device, quick
        self.end = time.time() + 60 * minutes
        self.scale = minutes / 9
        self.size = "quick" if quick else "full" if device == "cuda" else "cpu"
        self.work = Path(tempfile.mkdtemp(prefix="ddpm-fast-report-"))
        self.records = self.work / "records.jsonl"
        self.records.touch()
        self.process: subprocess.Popen | None = None
        self.background: subprocess.Popen | None = None
        self.environment = self._environment()
        self.results = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": revision or commit(), "device": device, "quick": quick, "steps": {}, "records": [],
        }  # fmt: skip

    def _environment(self) -> dict[str, str]:
        """The package from this checkout, missing packages from wheels, compile caches of this run's own."""
        wheels = ROOT / ".whl"
        packages = self.work / "packages"
        for wheel in sorted(wheels.glob("*.whl")) if wheels.is_dir() else []:
            zipfile.ZipFile(wheel).extractall(packages)
        path = [str(ROOT), str(packages), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in path if p),
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache or self.work / "inductor"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
        }

    def run(self) -> None:
        """All steps; results.json and report.md are whole after each."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").write_text("")
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._stop)
        try:
            for step in self.steps():
                self._one(step)
        except Stopped:
            self.results["stopped"] = "the run was told to end"
        finally:
            for process in (self.process, self.background):
                end(process)
            self._write(last=True)
            shutil.rmtree(self.work, ignore_errors=True)
        import render

        print("\n" + render.overview(self.results) + "\n")
        print(f"report: {self.out / 'report.md'}")

    def steps(self) -> list[Step]:
        """In order; what is right comes before what is fast, and what takes any time that is left comes last."""
        runs = {
            "machine": self.machine, "extension": self.extension, "gpu tests": self.gpu_tests,
            "sanitizer": self.sanitizer, "compile": self.compile, "networks": self.networks, "memory": self.memory,
            "ops": self.ops, "ncu": self.ncu, "training run": self.training_run, "first step": self.first_step,
        }  # fmt: skip
        return [Step(name, runs[name], seconds) for name, seconds in SHARES[self.device].items()]

    def _one(self, step: Step) -> None:
        left = self.end - RESERVE - time.time()
        limit = min(step.seconds * self.scale, left)
        outcome: dict = {"status": "ok"}
        began = time.time()
        if limit < 3:
            outcome = {"status": "skipped", "why": "out of time"}
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
                self._log([step.name], traceback.format_exc())
        outcome["seconds"] = round(time.time() - began, 1)
        why = f": {outcome['why']}" if "why" in outcome else ""
        print(f"  {outcome['status']} after {outcome['seconds']} s{why}", flush=True)
        self.results["steps"][step.name] = outcome
        self._write(last=False)

    # The steps -----------------------------------------------------------------------------------------------------

    def machine(self, limit: float) -> dict:
        """What it is, and its ceilings."""
        code = (
            "import json, torch; from ddpm_fast.bench import machine\n"
            f"device = torch.device({self.device!r})\n"
            f"ceilings = machine.measure_ceilings(device, quick={self.quick})\n"
            "print(json.dumps([machine.describe(device), ceilings.as_dict()]))"
        )
        facts, ceilings = json.loads(self.call([sys.executable, "-c", code], limit).splitlines()[-1])
        self.results["machine"] = facts | self.results.get("machine", {})
        self.results["ceilings"] = ceilings
        (self.work / "ceilings.json").write_text(json.dumps(ceilings))
        if self.device == "cuda":
            self._compile_beside()
        return {}

    def _compile_beside(self) -> None:
        """Have warm.py compile the peer, most wanted first."""
        self.background = self._start([sys.executable, str(BENCHMARKS / "warm.py"), self.device, self.size], "warm.txt")

    def compile(self, limit: float) -> dict:
        """The peer's compiled form, as far as there is time; it waits in the cache for the networks or the next run."""
        self._compile_beside()
        ended = self._wait_for_background(limit)
        lines = (self.work / "warm.txt").read_text().splitlines()
        forms = [json.loads(line) for line in lines if line.startswith("{")]
        return {"summary": f"{ended}; {len(forms)} networks", "forms": forms}

    def extension(self, limit: float) -> dict:
        """Build it in place unless it loads already."""
        reason, info = self._extension(limit)
        built = "before"
        if reason or (self.device == "cuda" and "cuda" not in info["built"]):
            began = time.time()
            self.call([sys.executable, "setup.py", "build_ext", "--inplace"], limit)
            reason, info = self._extension(limit - (time.time() - began))
            built = "now"
        if reason:
            raise Failed(reason)
        if self.device == "cuda" and "cuda" not in info["built"]:
            raise Failed(f"the extension has no CUDA: {info['cuda_left_out']}")
        self.results.setdefault("machine", {})["extension"] = info
        return {"built": built, "info": info}

    def _extension(self, limit: float) -> tuple[str | None, dict]:
        """Why the extension does not load, if so, and what setup.py recorded."""
        code = "import json; from ddpm_fast import _extension as e; print(json.dumps([e.reason(), e.info()]))"
        reason, info = json.loads(self.call([sys.executable, "-c", code], limit).splitlines()[-1])
        return reason, info

    def gpu_tests(self, limit: float) -> dict:
        """`pytest -m gpu`, the kernels first and the files side by side; without a GPU they are found and skipped."""
        files = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").glob("test_*gpu*.py"))]
        files += ["tests/test_native_cuda.py", "tests/test_benchmarks.py"]
        if self.quick:  # reading all test files takes longer than the dry run of one
            files = ["tests/test_graphs_gpu.py"]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--durations=5"]
        command += ["--continue-on-collection-errors", *files]
        if self.device == "cuda" and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(8, len(files))), "--dist", "worksteal"]
        try:
            output = self.call(command, limit, codes=(0, 1))
        except Failed as reason:
            text = (self.work / "output.txt").read_text(errors="replace")
            passed, failed = (len(re.findall(rf"\b{word}\b", text)) for word in ("PASSED", "FAILED"))
            raise Failed(f"{reason}; until then {passed} passed and {failed} failed") from None
        summary = output.strip().splitlines()[-1].strip("= ")
        if " failed" in summary or " error" in summary:
            raise Failed(f"{summary}; see log.txt")
        return {"summary": summary}

    def ops(self, limit: float) -> dict:
        return self._bench("bench_ops.py", limit, seconds=0.05 if self.quick else 0.3 if self.device == "cuda" else 1.0)

    def networks(self, limit: float) -> dict:
        began = time.time()
        compiled, options = {}, []
        if self.background is not None:
            ended = self._wait_for_background(limit / 3)
            lines = (self.work / "warm.txt").read_text().splitlines()
            compiled = {"compiled_beside": [json.loads(line) for line in lines if line.startswith("{")]}
            compiled["compiling_ended"] = ended
        if (self.work / "warm.txt").exists():
            options = ["--warmed", str(self.work / "warm.txt")]
        limit -= time.time() - began
        seconds = 0.2 if self.quick else 4.0 if self.device == "cuda" else 20.0
        return self._bench("bench_networks.py", limit, seconds, *options) | compiled

    def memory(self, limit: float) -> dict:
        return self._bench("bench_memory.py", limit, seconds=1.0)

    def first_step(self, limit: float) -> dict:
        return self._bench("bench_first_step.py", limit, seconds=1.0)

    def training_run(self, limit: float) -> dict:
        """A minute of `ddpm-fast train digits`, ended as by Ctrl-C, and samples of what it has learnt."""
        folder = self.work / "run"
        train = [sys.executable, "-m", "ddpm_fast", "train", "digits", "--seed", "0", "--results-folder", str(folder)]
        train += ["--steps", "1000000", "--save-every", "1000000", "--workers", "0"]
        seconds = 6.0 if self.quick else min(60.0, limit - 15)
        began = time.time()
        self._interrupted(train, seconds, limit - 10, until=folder / "loss.csv")
        took = time.time() - began
        sample = [sys.executable, "-m", "ddpm_fast", "sample", str(folder), "--seed", "0", "--scale", "4"]
        sample += ["--num-samples", "4" if self.quick else "100", "--out", str(self.out / "samples.png")]
        sample += ["--sampling-timesteps", "2"] if self.quick else []
        self.call(sample, limit - took)
        (self.out / "samples-strip.png").unlink(missing_ok=True)
        rows = list(csv.DictReader((folder / "loss.csv").read_text().splitlines()))
        return {"train_seconds": round(took, 1), "last_logged": rows[-1]} if rows else {"train_seconds": round(took, 1)}

    def sanitizer(self, limit: float) -> dict:
        """compute-sanitizer, memcheck and racecheck, on the small shapes of every op."""
        run = [sys.executable, str(BENCHMARKS / "kernel_run.py"), self.device, "quick"]
        tool = shutil.which("compute-sanitizer")
        if self.device != "cuda" or tool is None:
            self.call(run, limit)
            raise Skipped("compute-sanitizer needs a GPU" if tool else "compute-sanitizer is not on the PATH")
        found = {}
        # Out of torch's caching allocator every tensor is an allocation of its own, whose end memcheck can see.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for name in ("memcheck", "racecheck"):
            options = ["--tool", name, "--error-exitcode", "86", "--report-api-errors", "no"]
            output = self.call([tool, *options, *run], limit / 2, codes=(0, 86), environment=environment)
            found[name] = read_sanitizer(output)
            if not found[name]["clean"]:
                raise Failed(f"{name}: {found[name]['summary']}; see log.txt")
        return {"summary": "; ".join(f"{name}: {result['summary']}" for name, result in found.items())} | found

    def ncu(self, limit: float) -> dict:
        """Achieved bandwidth of our kernels on the large shapes, as the hardware counts it."""
        tool = shutil.which("ncu")
        if self.device != "cuda" or tool is None:
            raise Skipped("ncu needs a GPU" if tool else "ncu is not on the PATH")
        run = [sys.executable, str(BENCHMARKS / "kernel_run.py"), "cuda", self.size]
        options = ["--csv", "--clock-control", "none", "--kernel-name", f"regex:{OUR_KERNELS}"]
        options += ["--kernel-name-base", "function", "--print-kernel-base", "function", "--print-units", "base"]
        options += ["--launch-count", "40", "--metrics", ",".join(NCU_METRICS)]
        output = self.call([tool, *options, *run], limit, codes=tuple(range(256)))
        if "ERR_NVGPUCTRPERM" in output or "LibraryNotLoaded" in output:
            raise Skipped("the driver does not let this user read the counters")
        kernels = read_ncu(output)
        if not kernels:
            raise Failed("ncu gave no numbers; see log.txt")
        return {"kernels": kernels}

    # Processes -----------------------------------------------------------------------------------------------------

    def _bench(self, file: str, limit: float, seconds: float, *options: str) -> dict:
        # The deadline comes before the limit: a contest under way may end.
        command = [
            sys.executable, "-m", "pytest", str(BENCHMARKS / file), "-q", "-p", "no:cacheprovider",
            "--device", self.device, "--size", self.size, "--seconds", str(seconds), "--records", str(self.records),
            "--deadline", str(time.time() + 0.85 * limit), "--benchmark-columns=median,iqr,rounds",
            "--show-capture=no", *options,
        ]  # fmt: skip
        if (self.work / "ceilings.json").exists():
            command += ["--ceilings", str(self.work / "ceilings.json")]
        output = self.call(command, limit, codes=(0, 1))
        summary = output.strip().splitlines()[-1].strip("= ")
        if " failed" in summary or " error" in summary:
            raise Failed(f"{summary}; see log.txt")
        return {"summary": summary}

    def call(
        self, command: list[str], limit: float, codes: tuple[int, ...] = (0,), environment: dict[str, str] | None = None
    ) -> str:
        """What a command prints, which also goes to the log.

        Args:
            codes: exit statuses that are no failure.
            environment: variables to add.

        Raises:
            Failed: another exit status, or out of time.
        """
        output = self.work / "output.txt"
        self.process = self._start(command, output.name, environment)
        until = time.time() + max(limit, 1)
        code = None
        try:
            while code is None and time.time() < until:
                try:
                    code = self.process.wait(timeout=min(5.0, max(0.1, until - time.time())))
                except subprocess.TimeoutExpired:
                    self._write_results()  # whatever ends this process without warning leaves what there is
            if code is None:
                end(self.process)
        finally:
            text = output.read_text(errors="replace")
            self._log(command, text)
        self.process = None
        if code is None:
            raise Failed(f"stopped after {limit:.0f} s")
        if code not in codes:
            tail = text.strip().splitlines()[-1] if text.strip() else "no output"
            raise Failed(f"exit status {code}: {tail}")
        return text

    def _start(self, command: list[str], output: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        env = self.environment | (environment or {})
        with open(self.work / output, "w") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _interrupted(self, command: list[str], seconds: float, limit: float, until: Path) -> None:
        """Run a command and end it with Ctrl-C after so many seconds, or up to `limit` if a file is not there yet."""
        self.process = self._start(command, "output.txt")
        began = time.time()
        while self.process.poll() is None and (time.time() - began < seconds or not until.exists()):
            if time.time() - began > limit:
                break
            time.sleep(0.1)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            end(self.process)
        text = (self.work / "output.txt").read_text(errors="replace")
        self._log(command, text)
        self.process = None
        if not list(until.parent.glob("model-*.pt")):
            raise Failed("training left no checkpoint; see log.txt")

    def _wait_for_background(self, limit: float) -> str:
        """How warm.py ended, in a few words."""
        try:
            code = self.background.wait(timeout=max(limit, 1))
            ended = "all of it" if code == 0 else f"exit status {code}; see log.txt"
        except subprocess.TimeoutExpired:
            end(self.background)
            ended = "not all: stopped, out of time"
        self._log(["warm.py"], (self.work / "warm.txt").read_text(errors="replace"))
        self.background = None
        return ended

    def _stop(self, signum: int, frame) -> None:
        signal.signal(signum, signal.SIG_IGN)
        raise Stopped

    # What stays ----------------------------------------------------------------------------------------------------

    def _log(self, command: list[str], text: str) -> None:
        with open(self.out / "log.txt", "a") as log:
            shown = text.replace("\r", "\n").replace(str(ROOT), ".").replace(str(self.work), "WORK")
            log.write(f"$ {' '.join(command)}\n{shown}\n".replace(str(ROOT), "."))

    def _write_results(self) -> None:
        lines = self.records.read_text().splitlines(keepends=True)
        self.results["records"] = [json.loads(line) for line in lines if line.endswith("\n")]
        write(self.out / "results.json", json.dumps(self.results, indent=1) + "\n")

    def _write(self, last: bool) -> None:
        """results.json and report.md; pictures at the end."""
        import render

        self._write_results()
        write(self.out / "report.md", render.report(self.results))
        if last:
            render.charts(self.results, self.out)


def end(process: subprocess.Popen | None) -> None:
    """End a process and all that it has started."""
    if process is None or process.poll() is not None:
        return
    for signum, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            continue


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for results.json, report.md, log.txt and pictures")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to try the logic out")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--cache", type=Path, help="folder that keeps what torch.compile makes for the next run")
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    Report(options.out, options.device, options.quick, options.minutes, options.commit, options.cache).run()


if __name__ == "__main__":
    main()
