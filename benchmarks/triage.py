"""Runs one part of triage: is it correct and is it fast? One line per result.

python benchmarks/triage.py ops|training|sampling|upstream --device cuda --size full [--records FILE] [--ops NAME ...]

Each result is printed and recorded at once, so a process that crashes or is stopped keeps its results. The exit status
is 1 if a check fails; the last line is the summary.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from network_cases import network_cases
from op_cases import DTYPES, Inputs, OpCase, op_cases

from ddpm_fast.measure import baselines, compare, machine, profile
from ddpm_fast.measure.baselines import Configuration
from ddpm_fast.measure.timing import Interleaved, Timing
from ddpm_fast.runtime import dispatch

UPSTREAM = ("upstream", "upstream-channels-last")
# Timesteps of a sampling run on a GPU, and rows of a profile.
STEPS, ROWS = 100, 25
# Recorded and step by step are the same operators on the same numbers: more than this is another result, not rounding.
DIFFERENCE = 1e-3


@dataclass
class Part:
    """The arguments of a part.

    Args:
        size: of op_cases and network_cases.
        ops: names; None: all.
        seconds: of timing for each contest.
    """

    device: torch.device
    size: str
    records: Path | None = None
    ops: list[str] | None = None
    seconds: float = 2.0

    def record(self, **fields) -> None:
        """Append a line of JSON to the records."""
        if self.records is not None:
            with open(self.records, "a") as lines:
                lines.write(json.dumps(fields) + "\n")

    def configuration(self, name: str) -> Configuration:
        """Of the network case of this name, or of the first where the size has none."""
        cases = {case.name: case.configuration for case in network_cases(self.size)}
        found = cases.get(name, next(iter(cases.values())))
        return replace(found, steps=STEPS) if self.device.type == "cuda" and name == "sampling" else found


def say(line: str) -> None:
    print(line, flush=True)


# Ops -----------------------------------------------------------------------------------------------------------------


def ops(part: Part) -> bool:
    """Forward and every gradient of each op against float64, beside the reference in the same dtype."""
    cases = [case for case in op_cases(part.size) if part.ops is None or case.op in part.ops]
    wrong, taken = [], set()
    for case in cases:
        for dtype in sorted(case.dtypes):  # bf16 before fp32
            try:
                found = check_op(case, DTYPES[dtype], part.device)
            except torch.AcceleratorError:  # the device's context is lost, and with it every later case
                raise
            except Exception as error:
                first = (str(error) or " ").splitlines()[0][:200]
                found = {"right": False, "why": f"{type(error).__name__}: {first}"}
            part.record(bench="triage op", case=case.name, dtype=dtype, **found)
            say(f"{'ok   ' if found['right'] else 'WRONG'} {case.name} {dtype}: {errors_in_words(found)}")
            wrong += [] if found["right"] else [f"{case.name} {dtype}"]
            taken.add(found.get("implementation", "nobody"))
    say(f"{len(cases)} cases by {', '.join(sorted(taken))}; wrong: {', '.join(wrong) or 'none'}")
    return not wrong


def check_op(case: OpCase, dtype: torch.dtype, device: torch.device) -> dict:
    """Relative errors of the op and of its reference, the output first, then the gradients in the order of the leaves.

    An error is allowed twice the reference's, and 16 units in the last place; NaN never passes.
    """
    inputs = case.make(case.shape, device, dtype, dtype)
    with dispatch.watch_choices() as choices:
        ours = results(inputs)
    with dispatch.use_backend("reference"):
        reference = results(inputs)
        del inputs
        truth = results(case.make(case.shape, device, dtype, torch.float64))
    errors = [[relative(a, t) for a, t in zip(found, truth, strict=True)] for found in (ours, reference)]
    floors = [16 * torch.finfo(a.dtype).eps for a in ours]
    right = all(e <= 2 * r + floor for e, r, floor in zip(*errors, floors, strict=True))
    taken = "+".join(sorted({implementation for _, implementation, _ in choices})) or "?"
    return {"right": right, "implementation": taken, "errors": errors[0], "reference": errors[1]}


def results(inputs: Inputs) -> list[torch.Tensor]:
    """Copies of the output and of the gradients, for a random gradient of the output that every dtype can hold."""
    inputs.fresh()
    out = inputs.call()
    generator = torch.Generator(out.device).manual_seed(7)
    grad = torch.randn(out.shape, generator=generator, device=out.device).to(torch.bfloat16)
    grad = torch.empty_like(out).copy_(grad)
    gradients = torch.autograd.grad(out, inputs.leaves, grad) if inputs.leaves else ()
    return [result.detach().clone() for result in (out, *gradients)]


def relative(a: torch.Tensor, truth: torch.Tensor) -> float:
    """‖a − truth‖ / ‖truth‖."""
    return ((a.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30)).item()


def errors_in_words(found: dict) -> str:
    if "why" in found:
        return found["why"]
    pairs = [f"{e:.1e} ({r:.1e})" for e, r in zip(found["errors"], found["reference"], strict=True)]
    gradients = f", gradients {' '.join(pairs[1:])}" if pairs[1:] else ""
    return f"{found['implementation']} {pairs[0]}{gradients}"


# Networks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def same_algorithms() -> Iterator[None]:
    """Deterministic cuDNN inside: two runs give the same bits."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def training(part: Part) -> bool:
    """Three losses of the recorded step and of the same step by step, both timed, and the kernels of one replay."""
    configuration = part.configuration("training")
    say(f"{configuration}")
    made = {}
    losses = {}
    for name in ("ours", "ours-step-by-step"):
        with same_algorithms():
            made[name] = baselines.make(name, configuration, part.device)
            torch.manual_seed(1)
            losses[name] = [made[name].training_step().item() for _ in range(3)]
        say(f"{name}: losses {' '.join(f'{loss:.7g}' for loss in losses[name])}")
    a, b = (torch.tensor(losses[name], dtype=torch.float64) for name in made)
    difference = relative(a, b)
    part.record(bench="triage training", configuration=configuration.as_dict(), losses=losses, difference=difference)
    timings = race(part, {name: baseline.training_step for name, baseline in made.items()}, configuration, 1)
    part.record(bench="triage training time", configuration=configuration.as_dict(), timings=timings)
    found = profile.kernels(made["ours"].training_step, part.device)
    part.record(bench="triage kernels", kernels=found[:ROWS], total=sum(t for _, t, _ in found))
    say(f"one replay: {sum(n for _, _, n in found)} launches, {1e3 * sum(t for _, t, _ in found):.4g} ms in kernels")
    for name, seconds, launches in found[:ROWS]:
        say(f"{1e3 * seconds:9.4f} ms {launches:5} × {name[:90]}")
    say(f"losses of recorded and step by step: {same_in_words(difference)}; {ratio(timings)}")
    return math.isfinite(difference) and difference <= DIFFERENCE


def sampling(part: Part) -> bool:
    """The same images recorded and step by step, and the time of a step of each."""
    configuration = part.configuration("sampling")
    say(f"{configuration}, {configuration.steps} steps")
    made = {name: baselines.make(name, configuration, part.device) for name in ("ours", "ours-step-by-step")}
    images = {}
    with same_algorithms(), baselines.autocast(configuration, part.device):
        for name, graph in (("ours", None), ("ours-step-by-step", False)):
            with dispatch.watch_choices() as choices:
                images[name] = made["ours"].diffusion.sample(configuration.batch, seed=3, progress=False, graph=graph)
    taken = sorted({(op, implementation) for op, implementation, _ in choices})
    difference = relative(images["ours"], images["ours-step-by-step"])
    part.record(bench="triage sampling", configuration=configuration.as_dict(), difference=difference, choices=taken)
    say(f"images: {same_in_words(difference)}; " + ", ".join(f"{op} by {by}" for op, by in taken))
    calls = {name: baseline.sample for name, baseline in made.items()}
    timings = race(part, calls, configuration, configuration.steps)
    part.record(bench="triage sampling time", configuration=configuration.as_dict(), timings=timings)
    say(f"images of recorded and step by step: {same_in_words(difference)}; {ratio(timings)}")
    return math.isfinite(difference) and difference <= DIFFERENCE


def upstream(part: Part) -> bool:
    """Time upstream, eager and channels-last, after a check that it computes the same as ours."""
    summary, wrong = [], []
    for phase, name, per_call in ((compare.PHASES[0], "training", 1), (compare.PHASES[1], "sampling", None)):
        configuration = part.configuration(name)
        made, left_out, errors = compare.prepare(
            UPSTREAM, configuration, part.device, gradients=name == "training", leave_unequal_out=True
        )
        for baseline, reason in left_out.items():
            say(f"{baseline}: {reason}")
            wrong.append(baseline)
        calls = {baseline: compare.phase_call(made[baseline], phase) for baseline in UPSTREAM if baseline in made}
        part.record(bench="triage upstream", phase=phase, errors=errors, left_out=left_out)
        if calls:
            say(f"{phase}: {configuration}")
            timings = race(part, calls, configuration, per_call or configuration.steps)
            part.record(
                bench="triage upstream time", phase=phase, configuration=configuration.as_dict(), timings=timings
            )  # fmt: skip
            summary += [f"{phase} {baseline} {1e3 * t['median']:.4g} ms" for baseline, t in timings.items()]
    say("; ".join(summary) or "nothing to time")
    return not wrong


def race(part: Part, calls: dict[str, Callable], configuration: Configuration, per_call: int) -> dict[str, dict]:
    """Seconds per step of some calls, interleaved; a line for each."""
    timings = Interleaved(calls, part.device).run(part.seconds, least=3, most=50)
    found = {name: Timing([s / per_call for s in timing.seconds]).as_dict() for name, timing in timings.items()}
    for name, t in found.items():
        rate = configuration.batch / t["median"] / (1 if per_call == 1 else 1000)
        spread = f"{1e3 * t['low']:.4g} – {1e3 * t['high']:.4g}"
        of = "" if per_call == 1 else " at 1,000 steps"
        say(f"{name}: {1e3 * t['median']:.4g} ms per step ({spread}), {rate:.4g} images/s{of}")
    return found


def same_in_words(difference: float) -> str:
    return "the same bits" if difference == 0 else f"they differ by {difference:.1e}"


def ratio(timings: dict[str, dict]) -> str:
    recorded, stepped = (timings[name]["median"] for name in ("ours", "ours-step-by-step"))
    return f"{1e3 * recorded:.4g} ms recorded, {1e3 * stepped:.4g} ms step by step"


PARTS = {"ops": ops, "training": training, "sampling": sampling, "upstream": upstream}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="full", help="of op_cases: quick, cpu or full")
    parser.add_argument("--records", type=Path, help="append lines of JSON to this file")
    parser.add_argument("--ops", nargs="+", help="names of ops; default: all")
    options = parser.parse_args(arguments)
    absent = machine.why_absent(options.device)
    if absent:
        sys.exit(absent)
    seconds = 0.2 if options.size == "quick" else 2.0
    part = Part(torch.device(options.device), options.size, options.records, options.ops, seconds)
    # Whoever stops a part that hangs asks it first: it then says where it is.
    faulthandler.register(signal.SIGTERM, chain=True)
    sys.exit(0 if PARTS[options.part](part) else 1)


if __name__ == "__main__":
    main()
