"""The native, compile and interpreter tests on another release of torch: `make test-torch TORCH=2.11.0`, or

    python tests/build/torch_release.py RELEASE [--folder F] [--workers N] [--quick | --prepare] [pytest's options ...]

RELEASE is a number; `newest`, the newest that pip installs; or `by-turns`, the next of `OLDER` and the newest after
every commit, without the newest while the Makefile pins it, since `make test` has then run all of these tests on it.
torch is installed with the Triton that it names into an environment of its own, .venv-torch-RELEASE, and a copy of the
package is built there, so that the usual environment and the extension beside the sources stay as they are.
`--prepare` ends there. `--quick` runs those that a release can change, each once: what the interpreter and nvcc show,
`make test` has shown, and cases that `make test` leaves to `make release-tests` are left out here, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from sanitize import ROOT, TESTS, copy_sources

# The oldest minor release that pyproject.toml allows, and the release of the GPU machines.
OLDER = ("2.9.1", "2.11.0")
TOOLS = ("setuptools>=77", "wheel", "ninja", "pybind11")
NATIVE = (*TESTS, "runtime/test_memory_pool.py", "models/test_cpu_accuracy.py")
# torch.compile's, nvcc's, and Triton's without a GPU.
COMPILED = (
    "runtime/test_autocast.py", "test_facilities.py", "models/test_inference_weights.py", "build/test_cuda_on_host.py",
    "benchmarks/test_cuda_model.py", "ops/*/test_aot.py",
)  # fmt: skip
# Cases that the quick tests leave out, by the beginnings of their names: make test has judged the kernels in all
# networks, and a few networks show what a release makes of their operators.
JUDGED = (
    "models/test_cpu_accuracy.py::test_output_and_gradients[dim",
    "models/test_cpu_accuracy.py::test_under_bfloat16_autocast[dim 32",
)
# nvcc's alone: what it makes of sources that include nothing of torch, the same on every release.
WITHOUT_TORCH = ("build/test_cuda_compile.py",)
# In Triton's interpreter, in a separate run.
INTERPRETED = ("ops/*/test_triton*.py",)


class NotInstalled(Exception):
    """pip failed to install a release or a package of its tests; the text names it."""


def requirement(release: str) -> str:
    """The requirement for pip: 2.11.0 and torch==2.11.0 name the same release."""
    return "torch" if release == "newest" else f"torch=={release.removeprefix('torch==')}"


def takes_turns(newest: str, pinned: str) -> tuple[str, ...]:
    """The releases to test beside the pinned one."""
    return OLDER if newest == pinned else (*OLDER, newest)


def whose_turn(releases: tuple[str, ...], commits: int) -> str:
    """The release that a history of so many commits is tested on."""
    return releases[commits % len(releases)]


def pinned_release() -> str:
    """The release that the Makefile pins."""
    return re.search(r"^TORCH \?= torch==([\d.]+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]


def newest_release() -> str:
    """The release that pip installs if none is named; it downloads no package.

    Raises:
        NotInstalled: pip finds none.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    result = subprocess.run([*command, "--report", "-", "torch"], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise NotInstalled("pip does not say which torch is the newest; its reason is above")
    return json.loads(result.stdout)["install"][0]["metadata"]["version"].partition("+")[0]


def commits() -> int:
    """How many the history has."""
    command = ["git", "rev-list", "--count", "HEAD"]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def pip_install(folder: Path, *arguments: str, what: str) -> None:
    """Install into an environment.

    Raises:
        NotInstalled: pip did not.
    """
    command = [python_of(folder), "-m", "pip", "install", "--quiet", *arguments]
    if subprocess.run(command, env=environment(), check=False).returncode:
        raise NotInstalled(f"{what} could not be installed; pip's reason is above")


def environment() -> dict[str, str]:
    """This process's variables without those that would lead to another copy of the package."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def make(folder: Path, release: str) -> None:
    """Make the environment: torch, a built copy of the package, and the tests' packages.

    Raises:
        NotInstalled: pip could not install something.
    """
    torch = requirement(release)
    start = time.monotonic()
    if not python_of(folder).exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip_install(folder, "--upgrade", *TOOLS, torch, what=torch)
    installed = time.monotonic()
    tree = folder / "tree"
    copy_sources(tree)
    if is_stale(tree):
        # torch once more, or a test's dependency could bring another.
        package = ("--no-build-isolation", "--editable", f"{tree}[test]", torch)
        pip_install(folder, *package, what=f"ddpm_fast on {torch}")
    print(f"{torch}: installed in {installed - start:.0f} s, the package in {time.monotonic() - installed:.0f} s")


def is_stale(tree: Path) -> bool:
    """True if a copy was never built, or one of its sources is newer than its build."""
    built = tree / "ddpm_fast" / "_build_info.json"
    sources = [*(tree / "csrc").rglob("*.*"), tree / "setup.py", tree / "pyproject.toml"]
    return not built.exists() or any(source.stat().st_mtime > built.stat().st_mtime for source in sources)


PROBE = """
import torch, triton
from ddpm_fast.runtime import extension
assert extension.load() is not None, extension.reason()
left_out = extension.info()["cuda_left_out"]
assert left_out is None or "did not compile" not in left_out, left_out
cuda = "and CUDA's part" if left_out is None else f"without CUDA's part: {left_out}"
print(f"torch {torch.__version__}, triton {triton.__version__}, the extension {cuda}")
"""


def test(folder: Path, options: list[str], workers: int, quick: bool) -> int:
    """Run tests in the environment; returns pytest's exit status, or 1 if the extension does not load as expected."""
    tree = folder / "tree"
    if subprocess.run([python_of(folder), "-c", PROBE], cwd=tree, env=environment(), check=False).returncode:
        return 1
    command = [python_of(folder), "-m", "pytest", "-q", "--numprocesses", str(workers), "--dist", "worksteal", *options]

    def run(*files: str, **variables: str) -> int:
        return subprocess.run([*command, *files], cwd=tree, env=environment() | variables, check=False).returncode

    if any(".py" in option for option in options):
        return run()
    if quick:
        left_out = [f"--deselect=tests/{case}" for case in JUDGED]
        return run("-m", "not release", *left_out, *tests(tree, NATIVE + COMPILED))
    whole = {"DDPM_FAST_RELEASE": "1"}
    interpreted = run(*tests(tree, INTERPRETED), TRITON_INTERPRET="1", **whole)
    return run(*tests(tree, NATIVE + COMPILED + WITHOUT_TORCH), **whole) or interpreted


def tests(tree: Path, patterns: tuple[str, ...]) -> list[str]:
    """Files of tests, relative to the tree."""
    return [str(file.relative_to(tree)) for pattern in patterns for file in sorted((tree / "tests").glob(pattern))]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("release", help="a number, newest or by-turns")
    parser.add_argument("--folder", type=Path, help="of the environment (default: .venv-torch-RELEASE)")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the tests")
    parser.add_argument("--quick", action="store_true", help="without the tests that take minutes")
    parser.add_argument("--prepare", action="store_true", help="make the environment and test nothing")
    options, pytest_options = parser.parse_known_args()
    release = options.release.removeprefix("torch==")
    try:
        if release == "by-turns":
            count, releases = commits(), takes_turns(newest_release(), pinned_release())
            release = whose_turn(releases, count)
            print(f"torch {release} has its turn after {count} commits, of {', '.join(releases)}", flush=True)
        folder = (options.folder or ROOT / f".venv-torch-{release}").resolve()
        make(folder, release)
    except NotInstalled as reason:
        raise SystemExit(str(reason)) from None
    raise SystemExit(0 if options.prepare else test(folder, pytest_options, options.workers, options.quick))


if __name__ == "__main__":
    main()
