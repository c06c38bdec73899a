"""What is recorded: a training step, a sampling step, and every op of the benchmarks at the sizes of production."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from network_cases import SEED
from op_cases import DTYPES, op_cases
from triton.backends.compiler import GPUTarget

from cuda_model.driver import Variant
from cuda_model.pretend import META, undrawn
from cuda_model.recorder import Step, recording
from ddpm_fast import GaussianDiffusion, Unet, graphs, noise
from ddpm_fast.frozen import frozen_weights
from ddpm_fast.samplers import SamplingState
from ddpm_fast.training_step import TrainingStep

IMAGE_SIZE = 128
AUTOCAST = {"bf16": torch.bfloat16, "fp32": None}

# Batches of a training and of a sampling step, those of the benchmarks' networks.
TRAINING_BATCH, SAMPLING_BATCH, FP32_BATCH = 32, 4, 8


def make_diffusion(image_size: int = IMAGE_SIZE, **unet) -> GaussianDiffusion:
    """The network that everything is measured with, on meta tensors; `unet` changes it."""
    model = Unet(**{**SEED, "flash_attn": True, **unet})
    return GaussianDiffusion(model, image_size=image_size).to(META)


def make_training_step(diffusion: GaussianDiffusion, batch: int, dtype: str) -> tuple[Callable[[], None], TrainingStep]:
    """A function that does what one replay of a recorded training step does, and the step; made ready by one call."""
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4, fused=True, capturable=True)
    shape = (batch, diffusion.channels, *diffusion.image_size)
    options = {"ema": None, "max_grad_norm": 1.0, "autocast": AUTOCAST[dtype], "any_module": False}
    step = TrainingStep(diffusion, optimizer, shape, recorder=graphs.EagerRecorder, **options)
    step(torch.zeros(shape, device=diffusion.device))
    return lambda: step._body(None), step


def record_training(
    target: GPUTarget,
    batch: int = TRAINING_BATCH,
    dtype: str = "bf16",
    found: Callable[[Variant], None] = lambda variant: None,
    diffusion: GaussianDiffusion | None = None,
) -> Step:
    """Loss, backward, clipping and Adam on a batch."""
    with recording(target, found) as block:
        run, _ = make_training_step(diffusion or make_diffusion(), batch, dtype)
        with block() as step:
            run()
    return step


def make_sampling_step(diffusion: GaussianDiffusion, batch: int, dtype: str) -> Callable[[], None]:
    """A function that does what one replay of a recorded sampling step does; call it in `sampling_mode`."""
    plan = diffusion._plan("ddpm", diffusion.num_timesteps)
    with torch.no_grad():
        x = torch.zeros((batch, diffusion.channels, *diffusion.image_size), device=diffusion.device)
        options = {"keeps_x_start": plan.uses_x_start_previous, "self_condition": False, "start_index": 0}
        state = SamplingState(diffusion.model, x, len(plan.times), **options)
        state.load(plan, noise.seed_tensor(0, x.device), 0)

    def run() -> None:
        with graphs.uncached_autocast(x.device, AUTOCAST[dtype]):
            state.advance(None)

    return run


@contextlib.contextmanager
def sampling_mode(diffusion: GaussianDiffusion):
    """As the loop of a sampler has it."""
    with frozen_weights(diffusion.model, diffusion.num_timesteps), torch.inference_mode():
        yield


def record_sampling(
    target: GPUTarget,
    batch: int = SAMPLING_BATCH,
    dtype: str = "bf16",
    found: Callable[[Variant], None] = lambda variant: None,
    diffusion: GaussianDiffusion | None = None,
) -> Step:
    """The network and the sampler's update, with frozen weights."""
    diffusion = diffusion or make_diffusion()
    with recording(target, found) as block:
        run = make_sampling_step(diffusion, batch, dtype)
        with sampling_mode(diffusion), block() as step:
            run()
    return step


def record_ops(target: GPUTarget, found: Callable[[Variant], None] = lambda variant: None, size: str = "full") -> Step:
    """Every op of the benchmarks, forward and backward, in bf16 and fp32."""
    with recording(target, found) as block, undrawn():
        with block() as step:
            for case in op_cases(size):
                for dtype in ("bf16", "fp32"):
                    inputs = case.make(case.shape, META, DTYPES[dtype], DTYPES[dtype])
                    out = inputs.call()
                    if inputs.leaves:
                        torch.autograd.grad(out, inputs.leaves, torch.ones_like(out))
    return step


# What precompile.py takes by name: the steps whose kernels are compiled.
CASES: dict[str, list[Callable[[GPUTarget, Callable[[Variant], None]], Step]]] = {
    "training": [
        lambda target, found: record_training(target, TRAINING_BATCH, "bf16", found),
        lambda target, found: record_training(target, TRAINING_BATCH, "fp32", found),
        lambda target, found: record_training(target, FP32_BATCH, "fp32", found),
    ],
    "sampling": [
        lambda target, found: record_sampling(target, SAMPLING_BATCH, "bf16", found),
        lambda target, found: record_sampling(target, FP32_BATCH, "fp32", found),
    ],
    "ops": [record_ops],
}
