"""Compile upstream ahead of the benchmarks, into torch's compile cache, and print how long each form took as JSON.

python benchmarks/warm.py DEVICE SIZE
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from network_cases import COMPILE_SECONDS, network_cases

from ddpm_fast.measure import baselines, compare


def remove_unfinished(cache: Path) -> None:
    """Remove the empty libraries of a compiler that was stopped: torch takes them for finished, and fails each time."""
    for library in cache.rglob("*.so"):
        if library.stat().st_size == 0:
            library.unlink()


def main(device: str, size: str) -> None:
    """Run the calls that compile: the equality check, then a step of each phase."""
    if cache := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        remove_unfinished(Path(cache))
    for name in COMPILE_SECONDS:
        for case in network_cases(size):
            if name not in case.baselines or baselines.why_not(name) is not None:
                continue
            began = time.perf_counter()
            training = compare.PHASES[0] in case.phases
            ours = baselines.make(compare.OURS, case.configuration, torch.device(device))
            baseline = baselines.make(name, case.configuration, torch.device(device))
            baselines.check(ours, baseline, case.configuration, gradients=training)
            for phase in case.phases:
                compare.phase_call(baseline, phase)()
            torch._dynamo.reset()
            took = time.perf_counter() - began
            print(json.dumps({"baseline": name, "case": str(case), "seconds": took}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
