"""Counts operators, bytes and operations of a training step and a sampling step: ours against upstream.

    python benchmarks/traffic.py [--dim 64] [--dim-mults 1 2 4 8] [--image-size 128] [--memory fast] [--json FILE]
    python benchmarks/traffic.py --keep             the seed configuration, for the README

ddpm_fast/measure/traffic.py counts and says what is counted. The floor is the time that an H100's copy bandwidth, 3.0
TB/s as measured, needs for the bytes alone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from ddpm_fast.measure.traffic import Traffic, kernels_take_meta_tensors, measure

KEPT = Path(__file__).parent / "results" / "traffic.json"
SEED_CONFIG = {"dim": 64, "dim_mults": (1, 2, 4, 8), "image_size": 128}


def table(upstream: dict[str, Traffic], ours: dict[str, Traffic]) -> str:
    """Markdown: each quantity of upstream and ours, and their ratio."""
    lines = ["| per image | | upstream | ours | upstream / ours |", "|---|---|---|---|---|"]
    rows = [
        ("operators", "operators", "{:.0f}", 1),
        ("GB moved", "bytes_moved", "{:.2f}", 1e9),
        ("MB kept for backward", "bytes_kept", "{:.0f}", 1e6),
        ("GFLOP", "total_flops", "{:.0f}", 1e9),
        ("ms at 3.0 TB/s", "floor_seconds", "{:.2f}", 1e-3),
    ]
    for what in upstream:
        for label, name, form, unit in rows:
            a, b = getattr(upstream[what], name), getattr(ours[what], name)
            if a:
                lines.append(f"| {what} | {label} | {form.format(a / unit)} | {form.format(b / unit)} | {a / b:.2f} |")
    return "\n".join(lines)


def for_the_readme(**sides: dict[str, Traffic]) -> dict:
    """The totals for benchmarks/render.py, from {"upstream": ..., "fast": ..., "low": ...}, and torch's version."""
    names = ("operators", "bytes_moved", "bytes_kept", "total_flops")
    totals = {
        side: {step: {name: getattr(found, name) for name in names} for step, found in steps.items()}
        for side, steps in sides.items()
    }
    return {"config": SEED_CONFIG, "torch": torch.__version__.split("+")[0], **totals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dim-mults", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--memory", choices=["fast", "low"], default="fast", help="of our Unet")
    parser.add_argument("--json", type=Path, help="also write the numbers here, by operator too")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/traffic.json")
    options = parser.parse_args()

    import denoising_diffusion_pytorch

    import ddpm_fast

    if options.keep:
        with kernels_take_meta_tensors():
            ours = {memory: measure(ddpm_fast, **SEED_CONFIG, memory=memory) for memory in ("fast", "low")}
        kept = for_the_readme(upstream=measure(denoising_diffusion_pytorch, **SEED_CONFIG), **ours)
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        return
    config = {"dim": options.dim, "dim_mults": tuple(options.dim_mults), "image_size": options.image_size}
    upstream = measure(denoising_diffusion_pytorch, **config)
    with kernels_take_meta_tensors():
        ours = measure(ddpm_fast, **config, memory=options.memory)
    print(table(upstream, ours))
    if options.json:
        numbers = {
            name: {k: asdict(v) for k, v in side.items()} for name, side in (("upstream", upstream), ("ours", ours))
        }
        options.json.write_text(json.dumps({"config": config, **numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
