"""One baseline's training in a process of its own, and the memory that it takes on the CPU; prints JSON, in bytes.

python benchmarks/memory_run.py BASELINE CONFIGURATION-AS-JSON

`before`: resident when everything is imported, the network and the optimizer are built, and no step is taken.
`peak`: the most that is resident during a few steps. `kept`: what every side holds from its first step on, gradients
and Adam's two averages.
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
    """Bytes by /proc/self/status: VmRSS now, VmHWM at most since the mark was set back."""
    kilobytes = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]
    return 1024 * int(kilobytes)


def main(name: str, configuration: str) -> None:
    options = json.loads(configuration)
    options["dim_mults"] = tuple(options["dim_mults"])
    baseline = baselines.make(name, baselines.Configuration(**options), torch.device("cpu"))
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    for _ in range(STEPS):
        baseline.training_step().item()
    parameters = sum(p.numel() * p.element_size() for p in baseline.diffusion.parameters())
    print(json.dumps({"before": before, "peak": resident("VmHWM"), "kept": 3 * parameters}))


if __name__ == "__main__":
    main(*sys.argv[1:])
