"""Captures that fail on a CUDA device, then captures that work; test_recording_gpu.py runs this script.

A capture that fails may leave torch's generator and allocator unusable for the rest of the process.
"""

from __future__ import annotations

import torch

from ddpm_fast import GaussianDiffusion, Unet, capture_training_step
from ddpm_fast.testing.recorders import Waits, WaitsInBackward, bytes_in_pools

STEPS = 3


def make() -> GaussianDiffusion:
    torch.manual_seed(0)
    return GaussianDiffusion(Unet(16, dim_mults=(1, 2)), image_size=16, timesteps=12).cuda()


def both(diffusion) -> torch.Tensor:
    replayed, stepped = (diffusion.sample(2, seed=3, progress=False, graph=graph) for graph in (True, False))
    assert torch.isfinite(replayed).all() and torch.equal(replayed, stepped)
    return replayed


def fail(call, line: str) -> None:
    """The call raises the sentence of a capture that failed; after it, memory is as before and numbers are drawn."""
    stream, device = torch.cuda.current_stream(), torch.cuda.current_device()
    try:
        call()
    except RuntimeError as error:
        sentence = str(error)
    else:
        raise AssertionError("the capture did not fail")
    assert line in sentence and "recorders.py" in sentence, sentence
    assert "cannot be captured into a CUDA graph" in sentence and "graph=False runs without one" in sentence, sentence
    assert torch.cuda.current_stream() == stream and torch.cuda.current_device() == device
    assert torch.isfinite(torch.randn(8, device="cuda")).all()


def sampling() -> None:
    diffusion = make()
    before = both(diffusion)

    def sample_what_fails() -> None:
        diffusion.model.final_conv.__class__ = Waits
        fail(lambda: diffusion.sample(2, progress=False, graph=True), "x.sum().item()")
        diffusion.sample(2, progress=False, graph=False)
        diffusion.model.final_conv.__class__ = torch.nn.Conv2d
        diffusion.clear_graphs()

    for _ in range(STEPS):
        sample_what_fails()
        assert bytes_in_pools() == 0, "a pool that failed keeps its memory"
    assert torch.equal(both(diffusion), before) and len(diffusion.graphs) == 1


def training() -> None:
    diffusion = make()
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-3, capturable=True, fused=True)
    step = capture_training_step(diffusion, optimizer, (2, 3, 16, 16), any_module=True)
    images = torch.rand(2, 3, 16, 16, device="cuda")
    first = step(images).item()
    for culprit, line in ((Waits, "x.sum().item()"), (WaitsInBackward, "grad.sum().item()")):
        before = [p.detach().clone() for p in diffusion.parameters()]
        diffusion.model.final_conv.__class__ = culprit
        fail(lambda: step(images), line)
        assert all(p.grad is None for p in diffusion.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, diffusion.parameters(), strict=True))
        diffusion.model.final_conv.__class__ = torch.nn.Conv2d
        losses = [step(images).item() for _ in range(STEPS)]
        assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] != first


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    sampling()
    training()
    print("all as before")
