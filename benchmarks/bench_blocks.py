"""Every block of other packages' networks, accelerated against its own forward, at every shape of its call.

    python benchmarks/bench_blocks.py [--networks NAME ...] [--batch N] [--dtype bf16] [--seconds 1] [--least 0.95]

Medians of interleaved rounds in one process. It fails where a block does not compute what its own forward does, and
where it is not `--least` times as fast: there a rule belongs in ddpm_fast/integrations/rules.py, or its op yields.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bench_foreign import CASES
from torch import nn

import ddpm_fast
from ddpm_fast.integrations.accelerate import is_accelerated, table
from ddpm_fast.measure import foreign, machine
from ddpm_fast.measure.charts import columns
from ddpm_fast.measure.foreign import ACCELERATED, EAGER, PHASES, ForeignNetwork, autocast, inputs
from ddpm_fast.measure.timing import Interleaved, ratio
from ddpm_fast.testing.foreign_packages import import_edm


@dataclass
class BlockTiming:
    """A block of a network at one shape.

    Args:
        name: of the first module of this class and shape.
        cls: its class.
        runs: the op that computes it.
        shapes: of the tensors in its call.
        error: the largest difference of output and gradients, relative to the norm of each, and at least 1/1000 of the
            largest's: those of keys' biases are 0 but for rounding.
        phases: name → how many times as long its own forward takes; with gradients and without.
    """

    name: str
    cls: str
    runs: str
    shapes: list[list[int]]
    error: float
    phases: dict[str, float]


def compare_blocks(
    network: ForeignNetwork, device: torch.device, *, batch: int, dtype: str = "fp32", seconds: float = 1.0
) -> list[BlockTiming]:
    """Time every accelerated block against its own forward, once for each shape of its call.

    Args:
        seconds: of timing per block and phase.
    """
    eager, calls = network.network.to(device).eval(), {}
    fast = ddpm_fast.accelerate(copy.deepcopy(eager))
    runs_of = {line.path: line.runs for line in table(fast) if line.runs and line.path}
    accelerated = {path: runs for path, runs in runs_of.items() if is_accelerated(fast.get_submodule(path))}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            detached = {key: _detached(value) for key, value in kwargs.items()}
            calls.setdefault(name, (tuple(map(_detached, args)), detached))

        return hook

    hooks = [
        eager.get_submodule(name).register_forward_pre_hook(remember(name), with_kwargs=True) for name in accelerated
    ]
    x, t, _ = inputs(network, batch, device)
    with autocast(dtype, device):  # with gradients: an image takes none, and neither does its convolution's input
        network.call(eager, x, t)
    for hook in hooks:
        hook.remove()
    found: dict[tuple, BlockTiming] = {}
    for name, (args, kwargs) in calls.items():
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        module = eager.get_submodule(name)
        parameters = tuple(tuple(parameter.shape) for parameter in module.parameters())
        key = (type(module).__name__, tuple(tuple(value.shape) for value in tensors), parameters)
        if key in found or not tensors:
            continue
        pair = {EAGER: module, ACCELERATED: fast.get_submodule(name)}
        results, phases = {}, {}
        for phase in PHASES:
            runs: dict[str, Callable[[], object]] = {}
            for side, of in pair.items():
                layout = torch.channels_last if side == ACCELERATED else torch.preserve_format
                runs[side] = _block_call(of, args, kwargs, dtype, phase == PHASES[0], layout)
                results[side, phase] = runs[side]()
            timings = Interleaved(runs, device).run(seconds, least=3)
            phases[phase] = ratio(timings[EAGER], timings[ACCELERATED])
        shapes = [list(value.shape) for value in tensors]
        error = max(_largest_difference(results[ACCELERATED, phase], results[EAGER, phase]) for phase in PHASES)
        found[key] = BlockTiming(name, key[0], accelerated[name], shapes, error, phases)
    return list(found.values())


def _gradient_like(out: torch.Tensor) -> torch.Tensor:
    """Something that depends on the place in the output alone, in its layout."""
    values = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
    return torch.empty_like(out).copy_(values)


def _largest_difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    largest = max(tensor.double().norm().item() for tensor in expected)
    return max(
        ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-3 * largest)).item()
        for a, b in zip(actual, expected, strict=True)
    )


def _detached(value: Any) -> Any:
    """A tensor without its history, which takes a gradient if it did."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _block_call(
    module: nn.Module, args: tuple, kwargs: dict, dtype: str, trains: bool, layout: torch.memory_format
) -> Callable[[], list]:
    """A call of one block, its maps in a layout; with `trains` its backward, too.

    Gives the output, or the gradients of its tensors and parameters.
    """

    def leaf(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        of_it = layout if value.dim() == 4 else torch.preserve_format
        return value.detach().clone(memory_format=of_it).requires_grad_(trains and value.requires_grad)

    args, kwargs = tuple(map(leaf, args)), {name: leaf(value) for name, value in kwargs.items()}
    leaves = [v for v in (*args, *kwargs.values(), *module.parameters()) if getattr(v, "requires_grad", False)]
    device = next(v.device for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))

    def run() -> list[torch.Tensor]:
        with torch.set_grad_enabled(trains), autocast(dtype, device):
            out = module(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        if not trains:
            return [out]
        grad = _gradient_like(out)
        return [g for g in torch.autograd.grad(out, leaves, grad, allow_unused=True) if g is not None]

    return run


def rows(name: str, blocks: list[BlockTiming]) -> list[list[str]]:
    """Table rows of a network's blocks, the slowest first."""
    ordered = sorted(blocks, key=lambda block: min(block.phases.values()))
    return [
        [name, block.cls, block.runs, block.name, ", ".join("×".join(map(str, shape)) for shape in block.shapes),
         *(f"{block.phases[phase]:.2f}" for phase in PHASES), f"{block.error:.0e}"]
        for block in ordered
    ]  # fmt: skip


def failures(name: str, blocks: list[BlockTiming], least: float, dtype: str) -> list[str]:
    """Which blocks are slower than asked for, and which are not equal, in one clause each."""
    found = []
    for block in blocks:
        if block.error > 3 * foreign.TOLERANCE[dtype][1]:
            found.append(f"{name}, {block.name} differs by {block.error:.1e}")
        slowest = min(block.phases.values())
        if slowest < least:
            found.append(f"{name}, {block.name} is {slowest:.2f} times as fast")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=["diffusers", "torchcfm", "upstream"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help="instead of each network's own")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--seconds", type=float, default=1.0, help="of rounds for each block and phase")
    parser.add_argument("--least", type=float, default=0.95, help="how many times as fast every block must be")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if "edm" in options.networks:
        import_edm()
    lines: list[list[str]] = []
    failed: list[str] = []
    for name in options.networks:
        print(f"  {name} ...", file=sys.stderr, flush=True)
        blocks = compare_blocks(
            foreign.make(name), device, batch=options.batch or CASES[name][0], dtype=options.dtype,
            seconds=options.seconds,
        )  # fmt: skip
        lines += rows(name, blocks)
        failed += failures(name, blocks, options.least, options.dtype)
    print(f"{machine.name(machine.describe(device))}, {options.dtype}: times as fast as the block's own forward\n")
    print(columns(["network", "block", "runs", "first", "its tensors", *PHASES, "difference"], lines))
    if failed:
        print("; ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
