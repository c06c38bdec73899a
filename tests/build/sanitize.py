"""Native tests under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`, or

    python tests/build/sanitize.py [--folder build/sanitize] [--every N] [--seconds S] [pytest's options and files ...]

The script builds a copy of the package with -O1 -g and both sanitizers, and leaves the usual build alone. The native
tests run in one process, and the first finding ends the run. Python is not instrumented, and leaks are not checked.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "ddpm_fast", "tests", "benchmarks", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TESTS = (
    "ops/*/test_native.py", "ops/test_bfloat16_products.py", "ops/adam_step/test_op.py", "ops/sampler_step/test_*.py",
    "runtime/test_tape.py",
)  # fmt: skip
# The run's exit status where a sanitizer found something; pytest's own are below 6.
FOUND = 86


class SanitizerUnavailable(Exception):
    """The compiler has no sanitizers to load; the text says which."""


def copy_sources(folder: Path) -> None:
    """Copy sources and tests with their times: only changed files are compiled again."""
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__", "results")
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            kept = {target / file.relative_to(source) for file in source.rglob("*")}
            shutil.copytree(source, target, ignore=built, dirs_exist_ok=True)
            for file in target.rglob("*"):
                if file.is_file() and file not in kept and file.suffix in (".py", ".h", ".cpp", ".cu"):
                    file.unlink()
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def libraries() -> list[str]:
    """The libraries to preload: the sanitizers, and the C++ library whose exceptions they intercept.

    Raises:
        SanitizerUnavailable: the compiler does not have them.
    """
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        command = [*shlex.split(os.environ.get("CXX", "c++")), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            raise SanitizerUnavailable(f"{command[0]} has no {name}")
        found.append(path)
    return found


def build(folder: Path) -> None:
    """The copy and its instrumented extension."""
    copy_sources(folder)
    environment = {**os.environ, "DDPM_FAST_SANITIZE": "1", "DDPM_FAST_BUILD": "cpu", "DDPM_FAST_MARCH": "portable"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)


def environment(folder: Path) -> dict[str, str]:
    """Variables of the process that runs the tests."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests" / "build")]),
        "LD_PRELOAD": " ".join(libraries()),
        # torch's own libraries check in globals of the same name, which is not for us to judge.
        "ASAN_OPTIONS": f"detect_leaks=0:detect_odr_violation=0:halt_on_error=1:exitcode={FOUND}",
        "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:exitcode={FOUND}",
    }


def run(folder: Path, pytest_options: list[str], every: int = 1, seconds: float | None = None) -> int:
    """Run the native tests of a built copy; returns 0 where all passed and nothing was found."""
    files = [] if any(".py" in option for option in pytest_options) else native_tests(folder)
    # -p sanitize: this file is a pytest plugin that runs every n-th test, within the time limit.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "sanitize"]
    # faulthandler would take the sanitizer's signals; output must reach the terminal before the process is ended.
    command += ["-p", "no:faulthandler", "-s", f"--every={every}", *pytest_options, *files]
    command += [] if seconds is None else [f"--seconds={seconds}"]
    return subprocess.run(command, cwd=folder, env=environment(folder), check=False).returncode


def native_tests(folder: Path) -> list[str]:
    """Files of tests, relative to the copy."""
    files = [file for pattern in TESTS for file in sorted((folder / "tests").glob(pattern))]
    return [str(file.relative_to(folder)) for file in files]


# As a plugin of pytest ------------------------------------------------------------------------------------------------


def pytest_addoption(parser) -> None:
    parser.addoption("--every", type=int, default=1, help="run each so many-th test")
    parser.addoption("--seconds", type=float, default=None, help="from the first test on: later ones are left out")


def pytest_configure(config) -> None:
    from ddpm_fast.runtime import extension

    assert extension.load() is not None, extension.reason()
    assert extension.info()["sanitized"], "the extension was not built with sanitizers"


def pytest_collection_modifyitems(config, items) -> None:
    every = config.getoption("--every")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % every])
    items[:] = items[::every]


_started: list[float] = []


def pytest_runtest_setup(item) -> None:
    import pytest

    if not _started:  # not before: on a busy machine it takes longer to start than the tests have
        _started.append(time.monotonic())
    seconds = item.config.getoption("--seconds")
    if seconds is not None and time.monotonic() - _started[0] > seconds:
        pytest.skip("out of time")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sanitize", help="for the instrumented copy")
    parser.add_argument("--every", type=int, default=1, help="run each so many-th test (default: all)")
    parser.add_argument("--seconds", type=float, help="of testing; what is left then is skipped")
    options, pytest_options = parser.parse_known_args()
    folder = options.folder.resolve()
    try:
        libraries()
    except SanitizerUnavailable as reason:
        raise SystemExit(str(reason)) from None
    build(folder)
    raise SystemExit(run(folder, pytest_options, options.every, options.seconds))


if __name__ == "__main__":
    main()
