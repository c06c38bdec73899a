"""Runs one baseline: times to import, time to the first training step and peak memory, as JSON.

python benchmarks/first_step.py BASELINE CONFIGURATION-AS-JSON DEVICE STARTED
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time

# The package of each baseline except ours.
PACKAGES = {"upstream": "denoising_diffusion_pytorch", "diffusers": "diffusers"}


def main(name: str, configuration: str, device_name: str, started: str) -> None:
    """STARTED is time.time() just before the process was started."""
    importing_torch = time.perf_counter()
    import torch

    importing_torch = time.perf_counter() - importing_torch
    importing = time.perf_counter()
    package = importlib.import_module(PACKAGES.get(name.split("-")[0], "ddpm_fast"))
    # Ours and diffusers import lazily: access the names that a user needs.
    wanted = ("UNet2DModel", "DDPMScheduler") if name == "diffusers" else ("Unet", "GaussianDiffusion", "Trainer")
    for attribute in wanted:
        getattr(package, attribute)
    importing = time.perf_counter() - importing

    from ddpm_fast.measure import baselines

    began = float(started)
    options = json.loads(configuration)
    options["dim_mults"] = tuple(options["dim_mults"])
    config, device = baselines.Configuration(**options), torch.device(device_name)
    if device.type == "cuda":
        torch.zeros(1, device=device)
    before = _resident()
    baseline = baselines.make(name, config, device)
    baseline.training_step().item()
    first = time.time() - began
    for _ in range(2):
        baseline.training_step().item()
    on_cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else _resident() - before
    print(
        json.dumps(
            {
                "torch_import_seconds": importing_torch,
                "import_seconds": importing,
                "first_step": first,
                "peak_bytes": peak,
            }
        )
    )


def _resident() -> int:
    """Bytes: the most that this process has had in memory so far."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
