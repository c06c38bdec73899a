"""Training step and forward pass of other packages' networks, accelerated against as they are.

    python benchmarks/bench_foreign.py [--networks NAME ...] [--threads 2] [--seconds 60] [--keep FILE]

Medians of interleaved rounds in one process, after outputs and all gradients were found equal. Upstream's network is
timed beside this package's own of the same weights: accelerated it is meant to gain as much.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ddpm_fast.measure import foreign, machine
from ddpm_fast.measure.charts import columns
from ddpm_fast.models.unet import Unet
from ddpm_fast.testing.foreign_packages import import_edm

# Network → (batch, how many times as fast accelerated it is meant to be: training step, forward).
CASES: dict[str, tuple[int, tuple[float, float] | None]] = {
    "diffusers": (8, (2.2, 2.5)),
    "torchcfm": (8, (2.2, 2.5)),
    "upstream": (8, None),
    "rectified-flow": (8, None),
    "edm": (4, None),
}
OURS = "ours"
_SHORT_OF_OURS = 0.05  # upstream's network may gain so much less than ours does


def compare(name: str, batch: int, seconds: float, dtype: str, device: torch.device) -> dict:
    """See `foreign.compare`; upstream's network with ours beside it."""
    network = foreign.make(name)
    others = {}
    if name == "upstream":
        others[OURS] = Unet(64, dim_mults=(1, 2, 4, 8), flash_attn=True)
        others[OURS].load_state_dict(network.network.state_dict())

    def say(text: str) -> None:
        print(f"  {name}: {text} ...", file=sys.stderr, flush=True)

    return foreign.compare(network, device, batch=batch, dtype=dtype, seconds=seconds, say=say, others=others)


def rows(name: str, result: dict, targets: tuple[float, float] | None) -> list[list[str]]:
    """Table rows of a result: what it is, ms as it is and accelerated, their ratio, and the target."""
    made = []
    for i, (phase, timings) in enumerate(result["phases"].items()):
        eager, fast = (timings[side]["median"] for side in (foreign.EAGER, foreign.ACCELERATED))
        target = "" if targets is None else f"{targets[i]}"
        if OURS in timings:
            target = f"{(1 - _SHORT_OF_OURS) * eager / timings[OURS]['median']:.2f}"
        made.append(
            [f"{name}, batch {result['batch']}", phase, f"{eager * 1e3:.4g}", f"{fast * 1e3:.4g}",
             f"{eager / fast:.2f}", target]
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing per network; three rounds at least")
    parser.add_argument("--batch", type=int, help="instead of each network's own")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="write every number there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if "edm" in options.networks:
        import_edm()
    table, results = [], {}
    for name in options.networks:
        batch, targets = CASES[name]
        results[name] = compare(name, options.batch or batch, options.seconds, options.dtype, device)
        table += rows(name, results[name], targets)
        if options.keep:
            options.keep.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{machine.name(machine.describe(device))}, {options.dtype}\n")
    print(columns(["network", "", "eager, ms", "accelerated, ms", "times as fast", "target"], table))
    for name, result in results.items():
        print(f"{name} accelerated equals eager: " + ", ".join(f"{k} to {v:.0e}" for k, v in result["errors"].items()))


if __name__ == "__main__":
    main()
