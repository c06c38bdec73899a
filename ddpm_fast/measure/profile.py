"""Profile of a step: the least time that this machine allows, the measured time, and the slowest operators.

The floor of an operator is the larger of two times: its convolution and matrix operations at the measured matrix peak,
and its bytes at the measured copy bandwidth. On a CPU the calls of the operators are another floor; on a GPU
the step is recorded, and the host launches nothing. measure/traffic.py counts, from operator dispatch.
"""

from __future__ import annotations

import contextlib
import statistics
import time

import torch

from ddpm_fast.measure import baselines, machine, traffic
from ddpm_fast.measure.baselines import Configuration
from ddpm_fast.measure.charts import columns
from ddpm_fast.measure.compare import OURS, PHASES, phase_call
from ddpm_fast.measure.timing import Stopwatch

_LAUNCHES = 1000
_ROWS = 8


def profile(configuration: Configuration, device: torch.device, *, seconds: float = 20.0, quick: bool = False) -> dict:
    """Count, time and break down our training step and sampling step.

    Args:
        seconds: of timing and profiling in all.
        quick: small ceilings, to try the code out.

    Returns:
        JSON-ready: configuration, machine, ceilings, launch_seconds, and per phase: seconds, floor_seconds,
        matrix_seconds, byte_seconds, launch_total_seconds, operators, bytes, flops, floor_by_operator,
        measured_by_operator.
    """
    device = torch.device(device)
    ceilings = machine.measure_ceilings(device, quick=quick, seconds=min(2.0, seconds / 5))
    launch = _launch_seconds(device)
    ours = baselines.make(OURS, configuration, device)
    counted = _count(configuration, device)
    phases = {}
    for phase in PHASES:
        call = phase_call(ours, phase)
        steps = 1 if phase == PHASES[0] else configuration.steps
        measured, by_operator = _measure(call, device, steps, seconds / 3)
        phases[phase] = {
            "seconds": measured,
            **_floor(counted[phase], configuration, ceilings, launch, recorded=device.type == "cuda"),
            "measured_by_operator": by_operator,
        }
    return {
        "configuration": configuration.as_dict(), "machine": machine.describe(device), "ceilings": ceilings.as_dict(),
        "launch_seconds": launch, "phases": phases,
    }  # fmt: skip


def report(result: dict) -> str:
    """The result of `profile` as Markdown."""
    ceilings, dtype = result["ceilings"], result["configuration"]["dtype"]
    peak = _peak(ceilings["matmul"], dtype)
    parts = [
        f"Measured on {machine.name(result['machine'])}: copy {ceilings['copy'] / 1e9:.0f} GB/s, matrix product "
        f"{peak / 1e12:.3g} TFLOP/s ({dtype}), one operator {result['launch_seconds'] * 1e6:.1f} µs of host time."
    ]
    for phase, p in result["phases"].items():
        at_least = p["floor_seconds"]
        parts.append(f"\n{phase}: {p['seconds'] * 1e3:.4g} ms, {p['seconds'] / at_least:.1f} times the floor")
        rows = [
            ["matrix operations", f"{p['flops'] / 1e9:.3g} GFLOP", _ms(p["matrix_seconds"])],
            ["bytes moved", f"{p['bytes'] / 1e9:.3g} GB", _ms(p["byte_seconds"])],
            ["operators", str(p["operators"]), _ms(p["launch_total_seconds"])],
            ["floor (operators at the larger of their two times)", "", _ms(at_least)],
        ]
        parts.append(columns(["", "counted", "ms at the measured ceiling"], rows))
        most = p["floor_by_operator"]
        parts.append("\nlargest parts of the floor: " + ", ".join(f"{n} {100 * s:.0f}%" for n, s in most[:5]))
        taken = p["measured_by_operator"]
        parts.append("largest parts of the time: " + ", ".join(f"{n} {100 * s:.0f}%" for n, s in taken[:5]))
    return "\n".join(parts)


def _count(configuration: Configuration, device: torch.device) -> dict[str, traffic.Traffic]:
    """Counts for one batch, with the implementations that run on this type of device."""
    diffusion = baselines.make(OURS, configuration, torch.device("cpu")).diffusion
    with traffic.kernels_take_meta_tensors() if device.type == "cuda" else contextlib.nullcontext():
        return {
            PHASES[0]: traffic.measure_training(diffusion, batch=configuration.batch),
            PHASES[1]: traffic.measure_sampling(diffusion, batch=configuration.batch),
        }


def _floor(
    counted: traffic.Traffic, configuration: Configuration, ceilings: machine.Ceilings, launch: float, recorded: bool
) -> dict:
    # Counted in float32; autocast halves the maps, which are nearly all of the bytes.
    width = 1.0 if configuration.dtype == "fp32" else 0.5
    peak = _peak(ceilings.matmul, configuration.dtype)
    parts = {
        name: max(operator.flops / peak, width * operator.bytes_moved / ceilings.copy)
        for name, operator in counted.by_operator.items()
    }
    launches = counted.operators * launch
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])[:_ROWS]
    return {
        "floor_seconds": total if recorded else max(total, launches),
        "matrix_seconds": counted.total_flops / peak,
        "byte_seconds": width * counted.bytes_moved / ceilings.copy,
        "launch_total_seconds": launches,
        "operators": counted.operators,
        "bytes": width * counted.bytes_moved,
        "flops": counted.total_flops,
        "floor_by_operator": [(name, seconds / total) for name, seconds in largest],
    }


def _peak(matmul: dict[str, float], dtype: str) -> float:
    """The matrix peak of a dtype; of float32 where a CPU was measured in that alone."""
    return matmul.get(dtype, matmul["fp32"])


def _launch_seconds(device: torch.device) -> float:
    """Host time per operator, of the smallest there is: the median of ten runs of many."""
    x = torch.zeros(1, device=device)
    watch = Stopwatch(device)
    runs = []
    with torch.inference_mode():
        for _ in range(10):
            watch.synchronize()
            began = time.perf_counter()
            for _ in range(_LAUNCHES):
                x.add_(1)
            runs.append((time.perf_counter() - began) / _LAUNCHES)
            watch.synchronize()
    return statistics.median(runs)


def _measure(call, device: torch.device, steps: int, seconds: float) -> tuple[float, list[tuple[str, float]]]:
    """Median seconds per step, and each operator's share of the time under torch's profiler."""
    watch = Stopwatch(device)
    call()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < seconds and len(times) < 50):
        times.append(watch.time(call) / steps)
    found = kernels(call, device)
    total = sum(t for _, t, _ in found) or 1.0
    return statistics.median(times), [(name, t / total) for name, t, _ in found[:_ROWS]]


def kernels(call, device: torch.device) -> list[tuple[str, float, int]]:
    """Name, seconds and launches of every kernel of one call by torch's profiler, of every operator on the CPU; the
    longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        Stopwatch(device).synchronize()
    averages = profiler.key_averages()
    if device.type == "cuda":  # kernels alone: the operators' rows hold the same time once more
        kinds = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        found = [e for e in averages if e.device_type == kinds and not getattr(e, "is_user_annotation", False)]
        events = [(event.key, event.self_device_time_total / 1e6, event.count) for event in found]
    else:
        events = [(event.key, event.self_cpu_time_total / 1e6, event.count) for event in averages]
    return sorted(events, key=lambda event: -event[1])


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"
