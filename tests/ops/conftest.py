"""How tests of Triton kernels run: `TRITON_INTERPRET=1 pytest tests/ops`; on a GPU
`pytest tests/ops/*/test_triton*.py -n 14 --dist worksteal`.

Production shapes run first, on every worker. A kernel test that is skipped has failed. Tests marked `arithmetic` run
twice in the interpreter, the second time in the arithmetic of sm_80 (testing/gpu_arithmetic.py): its matrix unit keeps
the fewest bits and adds the fewest products at once.
"""

from __future__ import annotations

import importlib.util
import os
from fnmatch import fnmatch

import faster_interpreter
import pytest

from ddpm_fast.runtime import extension

KERNEL_TESTS = "test_triton*.py"


def pytest_configure(config):
    """Loops over a number of tiles that a launch gives run in the interpreters of older Tritons, too.

    Before 3.8 a number is read as int(array of one element), which recent numpy refuses.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    triton = importlib.import_module("triton")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    faster_interpreter.install(interpreter)
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch_tensor(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda number: int(number.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("arithmetic") and os.environ.get("TRITON_INTERPRET") == "1":
        metafunc.parametrize("_arithmetic", [None, "sm_80"], ids=["exact", "sm_80"], indirect=True)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def instruction_set(request):
    """Each that this processor has; the one before is restored."""
    module = extension.load()
    try:
        before = module.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    module.use_instruction_set(before)


def is_wanted(item) -> bool:
    """False for the sm_80 form of cases that a mark arithmetic(only=ID) leaves out."""
    marker = item.get_closest_marker("arithmetic")
    only = marker and marker.kwargs.get("only")
    return only is None or item.callspec.params.get("_arithmetic") is None or only in item.callspec.params.values()


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if is_wanted(item)]
    if all(fnmatch(item.path.name, KERNEL_TESTS) for item in items):
        items.sort(key=lambda item: item.get_closest_marker("production") is None)
        items[:] = deal(items, getattr(config, "workerinput", {}).get("workercount", 1))


def deal(items: list, workers: int) -> list:
    """An order in which every worker begins with the first items: worksteal cuts it into one part for each, the longer
    parts last."""
    return [item for worker in reversed(range(workers)) for item in items[worker::workers]]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and fnmatch(item.path.name, KERNEL_TESTS):
        report.outcome, report.longrepr = "failed", f"a test of a kernel was skipped: {report.longrepr}"
