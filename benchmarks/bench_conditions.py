"""Class-conditional training and guided sampling beside upstream's, in interleaved rounds.

    OMP_NUM_THREADS=2 python benchmarks/bench_conditions.py --seconds 120

Upstream is `denoising_diffusion_pytorch.classifier_free_guidance`; the same weights, DDIM, cond_scale 6. A guided step
of ours stands beside an unguided one at the same number of images: it runs the network on twice as many. Upstream
trains with torch's default Adam, as its users do, and with the fused one (`ddpm_fast.measure.baselines`); ours in
upstream's loop with the fused one, and by `capture_training_step`, as the Trainer does.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
from bench_processes import silent
from denoising_diffusion_pytorch import classifier_free_guidance as upstream
from torch import nn
from tqdm import std as tqdm_std

from ddpm_fast import capture_training_step, classifier_free_guidance
from ddpm_fast.measure.machine import describe
from ddpm_fast.measure.machine import name as name_of
from ddpm_fast.measure.timing import Interleaved, Timing, ratio

UNET = {"dim": 64, "dim_mults": (1, 2, 4, 8), "num_classes": 10}
PROCESS = {"timesteps": 1000, "sampling_timesteps": 4}


def pair(size: int) -> tuple[nn.Module, nn.Module]:
    """Upstream's process and ours, with the same weights."""
    theirs = upstream.GaussianDiffusion(upstream.Unet(**UNET), image_size=size, **PROCESS)
    unet = classifier_free_guidance.Unet(**UNET)
    ours = classifier_free_guidance.GaussianDiffusion(unet, image_size=size, **PROCESS)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def training(
    diffusion: nn.Module, images: torch.Tensor, classes: torch.Tensor, fused: bool | None = None
) -> Callable[[], object]:
    """A training step: gradients, Adam."""
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-5, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        diffusion(images, classes=classes).backward()
        optimizer.step()

    return step


def recorded(diffusion: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> Callable[[], object]:
    """A training step of the same work, replayed."""
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-5, fused=True)
    step = capture_training_step(diffusion, optimizer, images.shape, max_grad_norm=None)
    return lambda: step((images, None, {"classes": classes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="rounds for about this long")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--out", help="a JSON file for the numbers")
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.rand(options.batch_size, 3, options.size, options.size)
    classes = torch.randint(10, (options.batch_size,))
    tqdm_std.tqdm.__init__ = silent(tqdm_std.tqdm.__init__)  # upstream has no way to say so

    theirs, ours = pair(options.size)
    recorded_ours = pair(options.size)[1]
    calls: dict[str, Callable[[], object]] = {
        "training upstream": training(theirs, images, classes),
        "training upstream fused": training(theirs, images, classes, fused=True),
        "training ours": training(ours, images, classes, fused=True),
        "training ours recorded": recorded(recorded_ours, images, classes),
        "guided upstream": lambda: theirs.sample(classes, cond_scale=6.0),
        "guided ours": lambda: ours.sample(classes, cond_scale=6.0, progress=False),
        "unguided ours": lambda: ours.sample(classes, cond_scale=1.0, progress=False),
    }
    timings = Interleaved(calls, torch.device("cpu")).run(options.seconds)
    machine = name_of(describe(torch.device("cpu")))
    print(f"{machine}, batch {options.batch_size}, {options.size}x{options.size}\n")
    print("| | s | of ours, s | ratio | median of the rounds' ratios |\n| --- | --: | --: | --: | --: |")
    rows = (
        ("training, upstream / ours recorded", "training upstream", "training ours recorded"),
        ("training, upstream with fused Adam / ours recorded", "training upstream fused", "training ours recorded"),
        ("training, upstream / ours", "training upstream", "training ours"),
        ("training, upstream with fused Adam / ours", "training upstream fused", "training ours"),
        ("guided sampling, upstream / ours", "guided upstream", "guided ours"),
        ("ours, guided / unguided", "guided ours", "unguided ours"),
    )
    for name, first, second in rows:
        a, b = timings[first], timings[second]
        print(f"| {name} | {a.median:.3f} | {b.median:.3f} | {ratio(a, b):.2f} | {_by_rounds(a, b):.3f} |")
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump({name: timing.as_dict() for name, timing in timings.items()}, file, indent=1)


def _by_rounds(a: Timing, b: Timing) -> float:
    """The median of the rounds' ratios, out of which a shared machine's drift falls."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


if __name__ == "__main__":
    main()
