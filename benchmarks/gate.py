"""The regression gate: costs that no other test bounds, each with its bound in bounds.json.

    python benchmarks/gate.py            measures everything, prints each number beside its bound
    python benchmarks/gate.py --write    also lowers bounds to the measured numbers; never raises one
    python benchmarks/gate.py --write tests/ops/*/test_aot.py    the same for the numbers of these files

Tests marked `gate` measure and pass each number to `check`: operators, bytes moved and bytes kept per image
(test_traffic.py), registers of every kernel (test_aot.py, test_cuda_compile.py; spills are always zero), modules that
the import loads and calls that it makes (test_gate.py), bytes of a wheel (test_extension_build.py),
launches of a step on CUDA and their bytes, kernels of its cold start, the host's calls of an op and, before a release,
their time (test_cuda_model.py), what accelerated networks need of what they needed before (test_foreign.py).

A bound is at most 5% above the measured number (times: 50%). A number above its bound fails. A number more than 10%
below its bound fails, too, until `--write` has lowered the bound. A bound is raised by hand only.

bounds.json names the version of each tool that decides a number. Under another version a number may be 30% above its
bound, and no bound has to be lowered. Registers have a table per version of Triton, which `--write` adds; under a
version without a table a kernel may use all 255 registers of a thread, still without spills.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

BOUNDS = Path(__file__).with_name("bounds.json")
ROOT = BOUNDS.parent.parent
VERSIONS = "measured with"

SLACK = 1.05
STALE = 0.9
OTHER_VERSION = 1.3


@dataclass(frozen=True)
class Kind:
    """A kind of number: the tool whose version decides it, and the most that its bound may be above it."""

    tool: str | None
    slack: float = SLACK
    exact: bool = True
    step: int | None = None  # a bound stays below the next multiple of this
    untabled: float | None = None  # each version of the tool has its table; the most under one that has none
    is_ratio: bool = False  # a bound has two decimals

    @property
    def by_version(self) -> bool:
        return self.untabled is not None


KINDS = {
    "traffic": Kind("torch"),
    # The hardware gives out registers in eights: a bound in the next eight could cost a program per multiprocessor.
    "registers": Kind("triton", step=8, untabled=255),
    "cuda registers": Kind("nvcc", step=8),
    # Operators and bytes of an accelerated network over those of the network as it is.
    "accelerated": Kind("torch", is_ratio=True),
    # Counts of cuda_model, exact: one launch or one compiled kernel more is a failure.
    "launches": Kind("torch", slack=1.0),
    "cold start": Kind("triton", slack=1.0),
    # Calls of and in the package's functions, which the host makes for an op: the same beside any other process.
    "host calls": Kind("torch"),
    # The processor's time of an op, as a multiple of an empty operator's.
    "host time": Kind(None, slack=1.5, exact=False),
    "import modules": Kind("torch"),
    # Calls of functions, in Python and in C: exact, as no time of an import is beside another process.
    "import calls": Kind("python"),
    "wheel bytes": Kind("compiler"),
}


@cache
def version(tool: str | None) -> str | None:
    """The installed version of a tool; None if it is not installed."""
    if tool == "python":
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    if tool in ("torch", "triton"):
        try:
            return metadata.version(tool).partition("+")[0]
        except metadata.PackageNotFoundError:
            return None
    command = {"nvcc": ["nvcc"], "compiler": shlex.split(os.environ.get("CXX", "c++"))}.get(tool)
    if command is None or shutil.which(command[0]) is None:
        return None
    printed = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", printed)[1] if tool == "nvcc" else printed.partition("\n")[0]


def bounds() -> dict[str, dict]:
    """bounds.json: kind → name → bound, or kind → version → name → bound, and the versions of the tools."""
    return json.loads(BOUNDS.read_text())


def table(kind: str, file: dict[str, dict]) -> dict[str, float]:
    """Name → bound for the numbers of a kind, under the installed tools."""
    rule, found = KINDS[kind], file.get(kind, {})
    return found.get(version(rule.tool), {}) if rule.by_version else found


def new_bound(kind: str, measured: float) -> float:
    """The bound that a measured number gets."""
    rule = KINDS[kind]
    if not rule.exact:
        return round(measured * rule.slack, 4)
    if rule.is_ratio:
        return math.ceil(100 * measured) / 100
    bound = math.floor(measured * rule.slack)
    return bound if rule.step is None else min(bound, math.ceil(measured / rule.step) * rule.step)


def verdict(kind: str, name: str, measured: float, file: dict[str, dict]) -> str | None:
    """Why a measured number fails, in one sentence; None if it passes."""
    rule = KINDS[kind]
    here = version(rule.tool)
    what = f"{kind}, {name}: measured {measured:g}"
    if rule.by_version and here not in file.get(kind, {}):
        if measured <= rule.untabled:
            return None
        return f"{what}, bound {rule.untabled:g} under {rule.tool} {here}, which has no table"
    bound = table(kind, file).get(name)
    if bound is None:
        return f"{what}, and {BOUNDS.name} has no bound for it; python benchmarks/gate.py --write adds one"
    recorded = here if rule.by_version else file[VERSIONS].get(rule.tool)
    if here != recorded:
        most = bound * OTHER_VERSION
        if measured <= most:
            return None
        return f"{what}, bound {bound:g} under {rule.tool} {recorded} and {most:g} under {here}"
    if measured > bound:
        return f"{what}, bound {bound:g} in {BOUNDS.name}"
    if rule.exact and measured < STALE * bound:
        return f"tighten: {what} is over 10% below its bound {bound:g}; python benchmarks/gate.py --write lowers it"
    return None


def check(kind: str, name: str, measured: float, record: Path | None = None) -> None:
    """Hold a number to its bound, or only note it in a file, a line of JSON each.

    Raises:
        AssertionError: the text of `verdict`.
    """
    if record is not None:
        with record.open("a") as file:
            file.write(json.dumps([kind, name, measured]) + "\n")
        return
    sentence = verdict(kind, name, measured, bounds())
    assert sentence is None, sentence


def tightened(file: dict[str, dict], measured: dict[tuple[str, str], float]) -> dict[str, dict]:
    """The bounds with lower measured numbers and new ones; none is raised.

    Numbers that were not measured and tables of other versions do not change.
    """
    tables = {kind: dict(table(kind, file)) for kind in KINDS}
    for (kind, name), number in measured.items():
        tables[kind][name] = min(tables[kind].get(name, math.inf), new_bound(kind, number))
    result = {VERSIONS: dict(file.get(VERSIONS, {}))}
    for kind, rule in KINDS.items():
        names = dict(sorted(tables[kind].items()))
        here = version(rule.tool)
        if rule.by_version:
            versions = dict(file.get(kind, {})) | ({here: names} if names else {})
            result[kind] = dict(sorted(versions.items()))
            continue
        result[kind] = names
        if here and any(kind == of for of, _ in measured):
            result[VERSIONS][rule.tool] = here
    result[VERSIONS] = dict(sorted(result[VERSIONS].items()))
    return result


def measure(tests: list[str]) -> dict[tuple[str, str], float]:
    """Run the tests that measure, in these files or folders."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "measured"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gate", "--gate-record", str(record), *tests]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(result.stdout + result.stderr)
        rows = [json.loads(line) for line in record.read_text().splitlines()]
    measured = {(kind, name): number for kind, name, number in rows}
    assert len(measured) == len(rows), "a number was measured twice"
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="lower the bounds to what is measured")
    parser.add_argument("tests", nargs="*", help="files of tests that measure (default: all)")
    options = parser.parse_args()
    measured = measure(options.tests or ["tests"])
    file = bounds() if BOUNDS.exists() else {VERSIONS: {}}
    if options.write:
        file = tightened(file, measured)
        BOUNDS.write_text(json.dumps(file, indent=2) + "\n")
    sentences = []
    for (kind, name), number in sorted(measured.items()):
        print(f"{kind:15} {number:>12g} {table(kind, file).get(name, math.nan):>12g}  {name}")
        sentences.append(verdict(kind, name, number, file))
    for kind in () if options.tests else KINDS:
        unmeasured = [name for name in table(kind, file) if (kind, name) not in measured]
        sentences += [f"{kind}, {name}: has a bound, and nothing measures it" for name in unmeasured]
    failures = [sentence for sentence in sentences if sentence]
    print("\n".join(failures) or "Every number is within its bound.")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
