"""The recorded workloads: a training step, a sampling step, and every op of the benchmarks at production sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from network_cases import SEED, network_cases
from op_cases import DTYPES, op_cases
from triton.backends.compiler import GPUTarget

from cuda_model.driver import Variant
from cuda_model.pretend import META, Undrawn
from cuda_model.recorder import Step, recording
from ddpm_fast import GaussianDiffusion, Unet, noise
from ddpm_fast.diffusion.sampling import SamplingState
from ddpm_fast.measure.compare import PHASES
from ddpm_fast.models.derived_weights import inference_weights
from ddpm_fast.runtime import measured
from ddpm_fast.runtime.autocast import uncached_autocast
from ddpm_fast.runtime.recording import EagerRecorder
from ddpm_fast.training.captured_step import TrainingStep

IMAGE_SIZE = 128
AUTOCAST = {"bf16": torch.bfloat16, "fp32": None}

# Batches of the steps that have bounds and a roofline.
TRAINING_BATCH, SAMPLING_BATCH = 32, 4

Found = Callable[[Variant], None]
_Record = Callable[[GPUTarget, Found], Step]


def nothing(variant: Variant) -> None:
    """The default callback for a found variant: ignore it."""


def make_diffusion(image_size: int = IMAGE_SIZE, **unet) -> GaussianDiffusion:
    """The benchmarks' network on meta tensors; `unet` overrides its arguments."""
    model = Unet(**{**SEED, "flash_attn": True, **unet})
    return GaussianDiffusion(model, image_size=image_size).to(META)


def make_training_step(diffusion: GaussianDiffusion, batch: int, dtype: str) -> tuple[Callable[[], None], TrainingStep]:
    """A function that does the work of one replay of a training step, and the step, after one warm-up call."""
    optimizer = torch.optim.Adam(diffusion.parameters(), fused=True, capturable=True)
    optimizer.param_groups[0]["lr"] = torch.empty((), device=diffusion.device)  # as a recording holds it
    shape = (batch, diffusion.channels, *diffusion.image_size)
    options = {"ema": None, "max_grad_norm": 1.0, "autocast": AUTOCAST[dtype], "keep_copies": True}
    step = TrainingStep(diffusion, optimizer, shape, recorder=EagerRecorder, **options)
    step(torch.zeros(shape, device=diffusion.device))
    return lambda: step._whole_step((torch.float32, False, ()), None), step


def record_training(
    target: GPUTarget,
    batch: int = TRAINING_BATCH,
    dtype: str = "bf16",
    found: Found = nothing,
    diffusion: GaussianDiffusion | None = None,
    form: str = measured.FUSED,
) -> Step:
    """Loss, backward, clipping and Adam on a batch.

    Args:
        form: of convolutions with norms, of which a card takes the faster one.
    """
    with recording(target, found) as block, measured.use_form(form):
        run, _ = make_training_step(diffusion or make_diffusion(), batch, dtype)
        with block() as step:
            run()
    return step


def make_sampling_step(diffusion: GaussianDiffusion, batch: int, dtype: str) -> Callable[[], None]:
    """A function that does the work of one replay of a sampling step; call it in `sampling_mode` of that dtype."""
    plan = diffusion._plan("ddpm", diffusion.num_timesteps, "own")
    with torch.no_grad():
        x = torch.zeros((batch, diffusion.channels, *diffusion.image_size), device=diffusion.device)
        shape = {"columns": plan.table.shape[1], "num_previous": plan.num_previous}
        state = SamplingState(diffusion.model, x, len(plan.times), **shape, self_condition=False, start_index=0)
        state.load(plan, noise.seed_tensor(0, x.device), 0)

    def run() -> None:
        with uncached_autocast(x.device, AUTOCAST[dtype]):
            state.advance(None)

    return run


@contextlib.contextmanager
def sampling_mode(diffusion: GaussianDiffusion, dtype: str):
    """The context that the sampling loop runs in; inference weights are made under the caller's autocast."""
    autocast = uncached_autocast(diffusion.device, AUTOCAST[dtype])
    with autocast, inference_weights(diffusion.model, diffusion.num_timesteps), torch.inference_mode():
        yield


def record_sampling(
    target: GPUTarget,
    batch: int = SAMPLING_BATCH,
    dtype: str = "bf16",
    found: Found = nothing,
    diffusion: GaussianDiffusion | None = None,
    form: str = measured.FUSED,
) -> Step:
    """The network and the sampler's update, with inference weights. `form` as in `record_training`."""
    diffusion = diffusion or make_diffusion()
    with recording(target, found) as block, measured.use_form(form):
        run = make_sampling_step(diffusion, batch, dtype)
        with sampling_mode(diffusion, dtype), block() as step:
            run()
    return step


def record_ops(target: GPUTarget, found: Found = nothing, size: str = "full") -> Step:
    """Every op of the benchmarks, forward and backward, in bf16 and fp32."""
    with recording(target, found) as block, Undrawn():
        with block() as step:
            for case in op_cases(size):
                for dtype in ("bf16", "fp32"):
                    inputs = case.make(case.shape, META, DTYPES[dtype], DTYPES[dtype])
                    out = inputs.call()
                    if inputs.leaves:
                        torch.autograd.grad(out, inputs.leaves, torch.ones_like(out))
    return step


def _networks(phase: str, record: Callable[..., Step], *more: tuple[int, str]) -> list[_Record]:
    """`record` for every batch and dtype that a GPU's report times in this phase, and for `more`, in both forms."""
    timed = [case.configuration for case in network_cases("full") if phase in case.phases]
    wanted = dict.fromkeys([*((network.batch, network.dtype) for network in timed), *more])
    forms = (measured.FUSED, measured.SEPARATE)
    return [partial(_record, record, batch, dtype, form) for batch, dtype in wanted for form in forms]


def _record(record: Callable[..., Step], batch: int, dtype: str, form: str, target: GPUTarget, found: Found) -> Step:
    return record(target, batch, dtype, found, form=form)


# Names that precompile.py accepts, with the steps whose kernels it compiles.
CASES: dict[str, list[_Record]] = {
    "training": _networks(PHASES[0], record_training, (TRAINING_BATCH, "bf16"), (TRAINING_BATCH, "fp32")),
    "sampling": _networks(PHASES[1], record_sampling, (SAMPLING_BATCH, "bf16")),
    "ops": [record_ops],
}
