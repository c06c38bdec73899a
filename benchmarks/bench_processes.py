"""Every process beside upstream's class: a training step and a few steps of sampling, in interleaved rounds.

    OMP_NUM_THREADS=2 python benchmarks/bench_processes.py --seconds 120

What a process gains over upstream should be what GaussianDiffusion gains, for all of them run the same network.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import denoising_diffusion_pytorch as upstream
import torch
from torch import nn
from tqdm import std as tqdm_std

import ddpm_fast
from ddpm_fast.measure.machine import describe
from ddpm_fast.measure.machine import name as name_of
from ddpm_fast.measure.timing import Interleaved, ratio

CLASSES = {
    "GaussianDiffusion": {"timesteps": 1000, "sampling_timesteps": 4},
    "ElucidatedDiffusion": {"num_sample_steps": 3},
    "ContinuousTimeGaussianDiffusion": {"num_sample_steps": 4},
}
# Calls of the network by one `sample`.
CALLS = {"GaussianDiffusion": 4, "ElucidatedDiffusion": 5, "ContinuousTimeGaussianDiffusion": 4}
UNET = {"dim": 64, "dim_mults": (1, 2, 4, 8)}


def pair(name: str, size: int) -> tuple[nn.Module, nn.Module]:
    """Upstream's process and ours, with the same weights."""
    unet = {**UNET, "learned_sinusoidal_cond": name != "GaussianDiffusion"}
    theirs = getattr(upstream, name)(upstream.Unet(**unet), image_size=size, **CLASSES[name])
    ours = getattr(ddpm_fast, name)(ddpm_fast.Unet(**unet), image_size=size, **CLASSES[name])
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def training(diffusion: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        diffusion(images).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="rounds for about this long")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--out", help="a JSON file for the numbers")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(options.batch_size, 3, options.size, options.size)
    tqdm_std.tqdm.__init__ = silent(tqdm_std.tqdm.__init__)  # upstream has no way to say so

    calls: dict[str, Callable[[], object]] = {}
    for name in CLASSES:
        for side, diffusion in zip(("upstream", "ours"), pair(name, options.size), strict=True):
            calls[f"{name} training {side}"] = training(diffusion, images)
            quiet = {"progress": False} if side == "ours" else {}
            calls[f"{name} sampling {side}"] = lambda d=diffusion, q=quiet: d.sample(options.batch_size, **q)
    timings = Interleaved(calls, torch.device("cpu")).run(options.seconds)
    gains = {}
    machine = name_of(describe(torch.device("cpu")))
    print(f"{machine}, {torch.get_num_threads()} threads, batch {options.batch_size}, {options.size}x{options.size}\n")
    print(
        "| process | | upstream, s | ours, s | ratio | of GaussianDiffusion's |\n| --- | --- | --: | --: | --: | --: |"
    )
    for name in CLASSES:
        for what in ("training", "sampling"):
            theirs, ours = (timings[f"{name} {what} {side}"] for side in ("upstream", "ours"))
            # Of each round, so that the minutes' drift of a shared machine falls out.
            per_round = [a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)]
            gains[name, what] = statistics.median(per_round)
            relative = gains[name, what] / gains["GaussianDiffusion", what]
            numbers = f"{theirs.median:.3f} | {ours.median:.3f} | {ratio(theirs, ours):.2f} | {relative:.3f}"
            print(f"| {name} | {what} | {numbers} |")
    print("\n| process | ours, ms per network call of sampling | of GaussianDiffusion's |\n| --- | --: | --: |")
    discrete = timings["GaussianDiffusion sampling ours"]
    for name, count in CALLS.items():
        ours = timings[f"{name} sampling ours"]
        per_round = [
            (a / count) / (b / CALLS["GaussianDiffusion"]) for a, b in zip(ours.seconds, discrete.seconds, strict=True)
        ]
        print(f"| {name} | {1e3 * ours.median / count:.1f} | {statistics.median(per_round):.3f} |")
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump({name: timing.as_dict() for name, timing in timings.items()}, file, indent=1)


def silent(original: Callable) -> Callable:
    """The constructor of a progress bar that is not shown."""

    def init(self: object, *args: object, **kwargs: object) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    return init


if __name__ == "__main__":
    main()
