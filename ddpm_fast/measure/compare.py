"""One configuration, ours against others: training step, sampling step, peak memory, and who computed each op."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ddpm_fast.measure import baselines, machine
from ddpm_fast.measure.baselines import Baseline, Configuration, Unavailable
from ddpm_fast.measure.charts import columns
from ddpm_fast.measure.timing import Interleaved
from ddpm_fast.runtime.dispatch import watch_choices

PHASES = ("training step", "sampling step")
OURS = "ours"


def prepare(
    names: Iterable[str],
    configuration: Configuration,
    device: torch.device,
    say: Callable[[str], None] = lambda _: None,
    *,
    gradients: bool = True,
    leave_unequal_out: bool = False,
) -> tuple[dict[str, Baseline], dict[str, str], dict[str, dict]]:
    """Baselines found equal to ours; one that cannot run, or raises, is left out with its reason.

    Args:
        gradients: False compares outputs alone, where only those are wanted.
        leave_unequal_out: leave out one that is not equal as well, so that the others can be timed.

    Returns:
        (baselines by name, ours first; reasons of those left out by name; relative errors by name).

    Raises:
        AssertionError: one is not equal, unless it is to be left out: nothing is timed then.
    """
    ours = baselines.make(OURS, configuration, device)
    made, left_out, errors = {OURS: ours}, {}, {}
    for name in names:
        if name == OURS:
            continue
        say(f"checking {name}")
        try:
            other = baselines.make(name, configuration, device)
            errors[name] = baselines.check(ours, other, configuration, gradients=gradients)
        except Unavailable as reason:
            left_out[name] = str(reason)
            continue
        except AssertionError as unequal:
            if not leave_unequal_out:
                raise
            left_out[name] = f"not timed: {unequal}"
            continue
        except Exception as error:  # of a baseline's own, such as its compiler or its memory; its row says so
            if name.startswith(OURS) and not leave_unequal_out:
                raise
            left_out[name] = f"failed: {type(error).__name__}: {(str(error) or ' ').splitlines()[0][:200]}"
            continue
        made[name] = other
    return made, left_out, errors


def compare(
    configuration: Configuration,
    device: torch.device,
    names: Iterable[str] = ("upstream", "upstream-channels-last"),
    *,
    seconds: float = 40.0,
    phases: Iterable[str] = PHASES,
    say: Callable[[str], None] = lambda _: None,
) -> dict:
    """Time ours and others on one configuration.

    Args:
        names: of `baselines.NEEDS`.
        seconds: of timing, without checks and compilation.
        say: told in a few words what is going on.

    Returns:
        JSON-ready: configuration, machine, errors, left_out, phases (name → baseline → timing in seconds per step, and
        peak_bytes on CUDA), choices (op, implementation, reasons, calls).
    """
    device = torch.device(device)
    began = time.time()
    made, left_out, errors = prepare(names, configuration, device, say)
    result: dict[str, Any] = {
        "configuration": configuration.as_dict(), "machine": machine.describe(device), "errors": errors,
        "left_out": left_out, "phases": {}, "choices": [],
    }  # fmt: skip
    phases = list(phases)
    for phase in phases:
        say(f"timing the {phase}")
        calls = {name: phase_call(baseline, phase) for name, baseline in made.items()}
        per_call = 1 if phase == PHASES[0] else configuration.steps
        with watch_choices() as choices:
            calls[OURS]()
        result["choices"] += [
            {"phase": phase, "op": op, "implementation": taken, "why": why, "calls": n}
            for (op, taken, why), n in sorted(choices.items())
        ]
        timings = Interleaved(calls, device).run(seconds / len(phases), least=3)
        result["phases"][phase] = {
            name: {k: v / per_call if k != "rounds" else v for k, v in timing.as_dict().items()}
            for name, timing in timings.items()
        }
        for name, call in calls.items():
            result["phases"][phase][name] |= peak_memory(name, phase, call, device)
    result["took"] = time.time() - began
    return result


def phase_call(baseline: Baseline, phase: str) -> Callable[[], object]:
    """The call that a phase times: one training step, or one whole `sample`."""
    return baseline.training_step if phase == PHASES[0] else baseline.sample


def peak_memory(name: str, phase: str, call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Memory that a training step allocates at its peak, above what is kept between steps, as {"peak_bytes": ...}.

    Empty for calls that replay CUDA graphs (sampling, `ours`, `upstream-max-autotune`): their maps are in a pool that
    recording allocated. Empty on the CPU, where benchmarks/first_step.py measures processes.
    """
    if device.type != "cuda" or phase != PHASES[0] or name in (OURS, "upstream-max-autotune"):
        return {}
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}


def table(result: dict) -> str:
    """Markdown: each phase and baseline, milliseconds per step, their spread, and ours over it."""
    rows = []
    for phase, timings in result["phases"].items():
        ours = timings[OURS]["median"]
        for name, numbers in timings.items():
            spread = f"{numbers['low'] * 1e3:.4g} – {numbers['high'] * 1e3:.4g}"
            memory = f"{numbers['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in numbers else "–"
            over = "" if name == OURS else f"{numbers['median'] / ours:.2f}"
            rows.append([phase, name, f"{numbers['median'] * 1e3:.4g}", spread, over, memory])
        rows += [[phase, name, "–", "–", reason, "–"] for name, reason in result["left_out"].items()]
    return columns(["", "", "ms per step (median)", "middle half", "time over ours", "peak MiB"], rows)


def choices_table(result: dict) -> str:
    """Markdown: which implementation each op took, and why not one before it."""
    rows = [[c["phase"], f"`{c['op']}`", c["implementation"], str(c["calls"]), c["why"]] for c in result["choices"]]
    return columns(["", "op", "took", "calls", "why"], rows)
