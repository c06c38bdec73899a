"""Shared fixtures: the real upstream packages, the regression gate, and a clean dispatch state."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import gate as regression_gate
import pytest
import torch

from ddpm_fast.runtime import dispatch, extension
from ddpm_fast.testing import gpu_arithmetic

# cuBLAS has deterministic algorithms, which the tests ask for, only with a workspace set up before it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The suite's tensors are tiny: a second thread only adds waiting, most of all on a busy machine.
torch.set_num_threads(1)

# The same examples in every run, whatever time they take: a slow one says that the machine is busy.
if importlib.util.find_spec("hypothesis"):
    importlib.import_module("hypothesis").settings.load_profile("ci")

# Tests of Triton kernels: they run on CUDA, or in Triton's interpreter, which needs a separate process.
KERNEL_TESTS = "test_triton*.py"
UPSTREAM_1X = Path(sys.prefix) / "upstream-1x"


def pytest_addoption(parser):
    parser.addoption("--gate-record", help="a file: note the numbers of tests marked gate there instead of judging")
    parser.addoption(
        "--arithmetic", choices=gpu_arithmetic.UNITS, help="Triton's interpreter computes as this GPU does"
    )


def pytest_configure(config):
    """Without a GPU, kernel tests alone run in the interpreter. Triton reads the variable at its import."""
    files = [Path(argument.partition("::")[0]).name for argument in config.args]
    alone = bool(files) and all(fnmatch(file, KERNEL_TESTS) for file in files)
    if alone and not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_ignore_collect(collection_path):
    """The interpreter runs kernel tests and nothing else; without it they need a GPU."""
    if collection_path.suffix != ".py":
        return None
    is_kernel_test = fnmatch(collection_path.name, KERNEL_TESTS)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if is_kernel_test else True
    return True if is_kernel_test and not torch.cuda.is_available() else None


@pytest.fixture
def gate(request) -> Callable[[str, str, float], None]:
    """`check(kind, name, measured)` of benchmarks/gate.py. A test that takes it is marked `gate`; each name once."""
    record = request.config.getoption("--gate-record")
    return partial(regression_gate.check, record=record and Path(record))


@pytest.hookimpl(tryfirst=True)  # before `-m gate` chooses
def pytest_collection_modifyitems(config, items):
    for item in items:
        if "gate" in item.fixturenames:
            item.add_marker("gate")
    if "DDPM_FAST_RELEASE" not in os.environ:
        config.hook.pytest_deselected(items=[item for item in items if is_left_to_release_tests(item)])
        items[:] = [item for item in items if not is_left_to_release_tests(item)]


def pytest_collection_finish(session):
    """What is imported by now stays: collections of garbage, which recordings and the trainer ask for, leave it out.

    Tracing by dynamo and Triton's interpreter make millions of small objects, and spend time looking
    for cycles among them at Python's threshold of 700.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def is_left_to_release_tests(item) -> bool:
    """Tests marked release, without the cases that `but` is true for, and without kernels' tests on a GPU."""
    marker = item.get_closest_marker("release")
    if marker is None or (fnmatch(item.path.name, KERNEL_TESTS) and torch.cuda.is_available()):
        return False
    but = marker.kwargs.get("but")
    return but is None or not but(**item.callspec.params)


@pytest.fixture(autouse=True)
def _no_forced_backend_leaks():
    yield
    assert dispatch._forced is None, "a test left a backend forced"


@pytest.fixture(autouse=True)
def _arithmetic(request):
    name = getattr(request, "param", None) or request.config.getoption("--arithmetic")
    with contextlib.nullcontext() if name is None else gpu_arithmetic.emulated(name):
        yield


@pytest.fixture(autouse=True)
def _loss_is_not_drawn(request, monkeypatch):
    """Drawing loss.png takes half a second, more than most of these training runs; see the mark `draws`."""
    history = sys.modules.get("ddpm_fast.training.history")
    if history and not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(history.LossHistory, "plot", lambda self: None)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_stays_compiled():
    """dynamo keeps 8 versions of a function, and tests of one process compile the networks' forward more often."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def upstream():
    """Upstream's main module, 2.3."""
    return importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")


@pytest.fixture
def without_native(monkeypatch):
    """The package as it runs where the extension is not built: blocks are composed of their steps, in plain torch."""
    monkeypatch.setattr(extension, "why_not", lambda device: "a test leaves it out")


@pytest.fixture(scope="session")
def upstream_1x(upstream):
    """The main module of upstream's last 1.x release, which `make test` installs next to the 2.3 one."""
    if not UPSTREAM_1X.is_dir():
        pytest.fail("the 1.x upstream is not installed; `make test` does it, see the Makefile")
    name = "denoising_diffusion_pytorch"
    current = {k: sys.modules.pop(k) for k in list(sys.modules) if k == name or k.startswith(name + ".")}
    sys.path.insert(0, str(UPSTREAM_1X))
    try:
        module = importlib.import_module(f"{name}.{name}")
    finally:
        sys.path.remove(str(UPSTREAM_1X))
        for k in [k for k in sys.modules if k == name or k.startswith(name + ".")]:
            del sys.modules[k]
        sys.modules.update(current)
    assert module.__file__.startswith(str(UPSTREAM_1X))
    return module
