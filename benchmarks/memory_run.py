"""Measures the resident memory of one baseline's training on the CPU; prints JSON, in bytes.

python benchmarks/memory_run.py BASELINE CONFIGURATION-AS-JSON

`before`: resident after the imports and the construction of network and optimizer, before the first step.
`peak`: the maximum during three steps. `kept`: gradients and Adam's two averages, which every baseline holds from its
first step on.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path

import torch

from ddpm_fast.measure import baselines

STEPS = 3


def resident(name: str) -> int:
    """Bytes from /proc/self/status: VmRSS is the current size, VmHWM the maximum since the last reset."""
    kilobytes = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]
    return 1024 * int(kilobytes)


def main(name: str, configuration: str) -> None:
    options = json.loads(configuration)
    options["dim_mults"] = tuple(options["dim_mults"])
    baseline = baselines.make(name, baselines.Configuration(**options), torch.device("cpu"))
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    for _ in range(STEPS):
        baseline.training_step().item()
    parameters = sum(p.numel() * p.element_size() for p in baseline.diffusion.parameters())
    print(json.dumps({"before": before, "peak": resident("VmHWM"), "kept": 3 * parameters}))


if __name__ == "__main__":
    main(*sys.argv[1:])
