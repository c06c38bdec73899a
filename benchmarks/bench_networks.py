"""A training step and a sampling run, ours against upstream in every form, and diffusers.

    pytest benchmarks/bench_networks.py

Same weights, images and precision, interleaved in one process, after output, loss and gradients were found equal.
"""

from __future__ import annotations

import gc
import itertools
import json
import time
from dataclasses import replace

import pytest
import torch
from network_cases import COMPILE_SECONDS, TRAINING_ONLY, network_cases
from op_cases import size_of

from ddpm_fast.measure import compare

# A compilation that waits in torch's cache still takes this long to load and check.
_LOADING_SECONDS = 25


def pytest_generate_tests(metafunc) -> None:
    option = metafunc.config.getoption
    cases = [case for case in network_cases(size_of(metafunc.config)) if option("--case") in (None, case.name)]
    if option("--steps"):
        cases = [replace(case, configuration=replace(case.configuration, steps=option("--steps"))) for case in cases]
    pairs = [pytest.param(case, phase, id=f"{case}, {phase}") for case in cases for phase in case.phases]
    metafunc.parametrize("case, phase", pairs)


# The baselines of the case that is timed now: both its phases use them.
_held: dict = {}


@pytest.fixture
def prepared(request, case):
    """Baselines found equal, reasons of those left out, errors, and how long each took to be found equal, its
    compilation included; made once for the phases of one case."""
    if case not in _held:
        _drop_compiled()
        _held[case] = _prepare(request.config, case)
    return _held[case]


@pytest.fixture(scope="module", autouse=True)
def _clean():
    yield
    _drop_compiled()


def _drop_compiled() -> None:
    _held.clear()
    torch._dynamo.reset()  # the next case's shapes are its own
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _prepare(config, case) -> tuple[dict, dict, dict, dict]:
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    deadline = config.getoption("--deadline")
    left = float("inf") if deadline is None else deadline - time.time()
    warmed = _warmed(config.getoption("--warmed"))
    names, left_out = [], {}
    asked = config.getoption("--baselines")
    for baseline in case.baselines if asked is None else asked.split(","):
        if baseline in TRAINING_ONLY and compare.PHASES[0] not in case.phases:
            continue
        if device == "cpu" and baseline in COMPILE_SECONDS and (baseline, str(case)) not in warmed:
            left_out[baseline] = "not compiled ahead; make bench-compiled does that once"
            continue
        needed = COMPILE_SECONDS.get(baseline, 0) * len(case.phases)
        if (baseline, str(case)) in warmed:
            needed = _LOADING_SECONDS
        if needed > left and asked is None:
            left_out[baseline] = f"not run: compiling may take {needed} s, and {left:.0f} s were left"
        else:
            names.append(baseline)
            left -= needed
    gradients = compare.PHASES[0] in case.phases
    told = []
    made, unavailable, errors = compare.prepare(
        names, case.configuration, torch.device(device), lambda text: told.append((text.split()[-1], time.time())),
        gradients=gradients, leave_unequal_out=True,
    )  # fmt: skip
    told.append(("", time.time()))
    seconds = {name: round(after - began, 1) for (name, began), (_, after) in itertools.pairwise(told)}
    return made, left_out | unavailable, errors, seconds


def _warmed(file) -> set[tuple[str, str]]:
    """Baselines and cases that warm.py has compiled."""
    if file is None:
        return set()
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{")]
    return {(line["baseline"], line["case"]) for line in lines}


def test_network(contest, record, device, prepared, case, phase):
    made, left_out, errors, seconds = prepared
    configuration = case.configuration
    if phase != compare.PHASES[0]:
        made = {name: baseline for name, baseline in made.items() if name not in TRAINING_ONLY}
    calls = {name: compare.phase_call(baseline, phase) for name, baseline in made.items()}
    left_out = left_out | first_calls(calls)
    timings = contest(calls, compare.OURS, flush=False, least=3, warm=True)
    per_call = 1 if phase == compare.PHASES[0] else configuration.steps
    for name, numbers in timings.items():
        numbers.update({key: numbers[key] / per_call for key in ("median", "low", "high")})
        numbers["images_per_second"] = configuration.batch / numbers["median"]
        if phase == compare.PHASES[1]:
            numbers["seconds_per_1000_steps"] = 1000 * numbers["median"]
            numbers["images_per_second"] = configuration.batch / (1000 * numbers["median"])
        numbers |= compare.peak_memory(name, phase, calls[name], device)
    record(
        bench="network", phase=phase, case=str(configuration), configuration=configuration.as_dict(), errors=errors,
        left_out=left_out, timings=timings, targets=case.targets.get(phase, {}), threads=torch.get_num_threads(),
        optimizers={name: baseline.optimizer for name, baseline in made.items()}, check_seconds=seconds,
    )  # fmt: skip
    wrong = {n: reason for n, reason in left_out.items() if reason.startswith("not timed") or n.startswith("ours")}
    assert not wrong, wrong


def first_calls(calls: dict) -> dict[str, str]:
    """Call each once; one of the others that fails, by its compiler or for memory, is taken out with its reason."""
    failed = {}
    calls[compare.OURS]()
    for name in [name for name in calls if name != compare.OURS]:
        try:
            calls[name]()
        except Exception as error:
            failed[name] = f"failed: {type(error).__name__}: {(str(error) or ' ').splitlines()[0][:200]}"
            del calls[name]
    return failed
