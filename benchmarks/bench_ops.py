"""Each op × implementation × shape × dtype, forward and forward with backward: `pytest benchmarks/bench_ops.py`.

Nothing is timed that has not just been found as accurate as the reference. `--benchmark-disable` only checks.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_cases import DTYPES, Inputs, OpCase, op_cases, size_of

from ddpm_fast.runtime import dispatch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import assert_close_to_truth

# ‖a − truth‖ / ‖truth‖ of implementations that are not ours. Eager torch in half precision sums gradients of rows in
# half precision, too.
_BASELINE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}

PASSES = ("forward", "forward+backward")


def pytest_generate_tests(metafunc) -> None:
    cases = op_cases(size_of(metafunc.config))
    wanted = (metafunc.config.getoption("--dtypes") or ",".join(DTYPES)).split(",")
    grid = [
        pytest.param(case, dtype, direction, id=f"{case.name}-{dtype}-{direction}")
        for case in cases
        for dtype in case.dtypes
        for direction in PASSES
        if dtype in wanted
    ]
    metafunc.parametrize("case, dtype, direction", grid)


# Inputs of the case that is timed now, in its dtype and in float64: both its passes use them.
_held: dict = {}


@pytest.fixture
def prepared(device, case, dtype) -> tuple[Inputs, Inputs]:
    """The inputs of a case, and the same numbers in float64."""
    if (case.name, dtype) not in _held:
        _held.clear()  # before there are others: these may take gigabytes
        _held[case.name, dtype] = tuple(
            case.make(case.shape, device, DTYPES[dtype], compute) for compute in (DTYPES[dtype], torch.float64)
        )
    return _held[case.name, dtype]


def with_gradients(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], tuple]:
    """The call and its backward, for a gradient of ones scaled to the output."""
    grad = torch.ones_like(call())

    def both() -> tuple:
        out = call()
        return out, *torch.autograd.grad(out, leaves, grad)

    return both


def forced(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call with one implementation forced."""

    def run() -> object:
        with use_backend(name):
            return call()

    return run


def implementations(case: OpCase, inputs: Inputs) -> list[str]:
    """Names of the implementations that accept these inputs, in order of preference."""
    found = []
    for implementation in dispatch.ops()[case.op].implementations:
        # A block made of its steps is forced with them.
        name = "reference" if implementation.name == dispatch.COMPOSITE else implementation.name
        try:
            forced(name, inputs.call)()
        except dispatch.BackendRefused:
            continue
        finally:
            inputs.fresh()
        found.append(name)
    return found


def calls_of(case: OpCase, inputs: Inputs, direction: str, compiled: bool) -> dict[str, Callable]:
    """Every implementation of the case, by name; ours first."""
    calls = {name: (forced(name, inputs.call), inputs.leaves) for name in implementations(case, inputs)}
    calls |= {"eager": (inputs.eager, inputs.leaves), **inputs.others}
    if case.compiled and compiled:
        calls["compiled"] = (torch.compile(inputs.eager, dynamic=False), inputs.leaves)
    if direction == PASSES[1]:
        return {name: with_gradients(call, leaves) for name, (call, leaves) in calls.items()}
    return {name: without_graph(call) for name, (call, _) in calls.items()}


def without_graph(call: Callable) -> Callable:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def check(case: OpCase, dtype, inputs: Inputs, exact: Inputs, calls: dict[str, Callable], direction: str) -> None:
    """Our implementations are as accurate as the reference, by the tests' rule; the others compute the same numbers.

    Raises:
        AssertionError: one is not, or does not.
    """
    exact.fresh()
    with use_backend("reference"):
        truth = as_tuple(calls_of_reference(exact, direction)())
    inputs.fresh()
    expected = as_tuple(calls["reference"]())
    for name, call in calls.items():
        ours = name in dispatch.BACKENDS
        if not ours and not inputs.comparable:
            continue
        inputs.fresh()
        for i, (a, e, t) in enumerate(zip(as_tuple(call()), expected, truth, strict=True)):
            label = f"{case.name} {name} result {i}"
            if ours:
                assert_close_to_truth(a, e, t.double(), floor=16, name=label)
            else:
                error = ((a.double() - t).norm() / t.norm().clamp_min(1e-30)).item()
                assert error <= _BASELINE_TOLERANCE[dtype], f"{label} differs by {error:.1e} from the truth"
    inputs.fresh()


def calls_of_reference(inputs: Inputs, direction: str) -> Callable:
    return with_gradients(inputs.call, inputs.leaves) if direction == PASSES[1] else without_graph(inputs.call)


def as_tuple(result) -> tuple:
    """Copies of a result: the next call may overwrite it."""
    return tuple(r.detach().clone() for r in (result if isinstance(result, tuple) else (result,)))


def bytes_moved(inputs: Inputs, out: torch.Tensor, direction: str) -> int:
    """The least: each input read once, each output written once; backward reads them and a gradient again."""
    reads, writes = _bytes(inputs.reads), _bytes([out])
    if direction == PASSES[0]:
        return reads + writes
    again = reads if inputs.read_again is None else _bytes(inputs.read_again)
    gradients = _bytes(inputs.leaves if inputs.written is None else inputs.written)
    return reads + again + 2 * writes + gradients


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_op(contest, record, request, prepared, size, ceilings, case, dtype, direction):
    inputs, exact = prepared
    if direction == PASSES[1] and not inputs.leaves:
        pytest.skip("the op has no gradient")
    compiled = size != "quick" and not request.config.getoption("--without-compiled")
    calls = calls_of(case, inputs, direction, compiled)
    check(case, DTYPES[dtype], inputs, exact, calls, direction)
    ours = next(iter(calls))
    timings = contest(calls, ours)
    if not timings:
        return
    moved = bytes_moved(inputs, as_tuple(calls[ours]())[0], direction)
    for numbers in timings.values():
        numbers["bytes_per_second"] = moved / numbers["median"]
        numbers["share_of_copy"] = moved / numbers["median"] / ceilings.copy
        if inputs.flops:
            numbers["flops_per_second"] = inputs.flops / numbers["median"]
            peak = ceilings.matmul.get(dtype, ceilings.matmul["fp32"])
            numbers["share_of_matmul"] = numbers["flops_per_second"] / peak
    record(
        bench="op", case=case.name, dtype=dtype, direction=direction, ours=ours, bytes=moved, flops=inputs.flops,
        timings=timings,
    )  # fmt: skip
