"""Networks that are timed against each other: ours, upstream in the forms its users run it, diffusers.

Each baseline takes one training step or draws images from the same inputs, in the same precision. Upstream's forms
hold our weights, and `check_equal` finds their output, loss and gradients equal to ours before anything is timed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Baseline → the package that it needs.
NEEDS = {
    "ours": None,  # both steps recorded, as the Trainer and `sample` do
    "ours-low-memory": None,
    "ours-step-by-step": None,  # the same without a recording
    "upstream": "denoising_diffusion_pytorch",
    "upstream-channels-last": "denoising_diffusion_pytorch",
    "upstream-compiled": "denoising_diffusion_pytorch",
    "upstream-max-autotune": "denoising_diffusion_pytorch",
    "diffusers": "diffusers",
}

# Relative error allowed between ours and upstream: of outputs and losses, and of gradients, as ‖a − b‖ / ‖b‖.
# TF32 and half precision round to 11 and 8 bits, and the two sides round at different places.
_TOLERANCE = {"fp32": (1e-4, 1e-3), "tf32": (1e-2, 3e-2), "fp16": (2e-2, 5e-2), "bf16": (5e-2, 1.5e-1)}


@dataclass(frozen=True)
class Configuration:
    """A network, its images, and how it is run.

    Args:
        dtype: "fp32", or "fp16" / "bf16" for torch's autocast.
        steps: timesteps of the process, all of which one call of `sample` takes.
        network: further arguments of `Unet`, such as {"full_attn": True}.
    """

    dim: int = 64
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    channels: int = 3
    image_size: int | tuple[int, int] = 128
    batch: int = 4
    dtype: str = "fp32"
    steps: int = 10
    network: dict = field(default_factory=dict)

    def __str__(self) -> str:
        mults = ",".join(str(m) for m in self.dim_mults)
        more = "".join(f", {name}={value}" for name, value in self.network.items())
        size = "×".join(str(n) for n in self.size)
        return f"Unet({self.dim}, ({mults}){more}), {size}, batch {self.batch}, {self.dtype}"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        n = self.image_size
        return (n, n) if isinstance(n, int) else (n[0], n[1])

    def as_dict(self) -> dict:
        return asdict(self)


class Unavailable(Exception):
    """A baseline that cannot run here; its text is the reason."""


@dataclass
class Baseline:
    """A network ready to run.

    Args:
        training_step: one step of Adam on one batch; returns the loss (a tensor, not waited for).
        sample: draws `batch` images in `steps` steps.
        optimizer: whose Adam the training step takes.
    """

    name: str
    diffusion: Any
    training_step: Callable[[], torch.Tensor]
    sample: Callable[[], torch.Tensor]
    optimizer: str


def why_not(name: str) -> str | None:
    """Why a baseline cannot run in this environment, in one clause; None where it can. Imports its package."""
    needed = NEEDS[name]
    if needed is None:
        return None
    if importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed"
    try:
        module = importlib.import_module(needed)
        if needed == "diffusers":
            _ = module.UNet2DModel  # imported on demand, with a RuntimeError where that fails
    except (ImportError, RuntimeError) as error:  # the package is there, and something that it needs is not
        return f"{needed} cannot be imported: {error}"
    return None


def make(name: str, configuration: Configuration, device: torch.device, *, seed: int = 0) -> Baseline:
    """A baseline with the weights of `seed`, its first calls (compilation) still ahead.

    Raises:
        Unavailable: a package that it needs is not installed.
    """
    reason = why_not(name)
    if reason is not None:
        raise Unavailable(reason)
    device = torch.device(device)
    torch.manual_seed(seed)
    build = _diffusers if name == "diffusers" else _ours if name.startswith("ours") else _upstream
    diffusion: Any = build(name, configuration, device.type == "cuda").to(device)
    if name == "upstream-channels-last":
        diffusion = diffusion.to(memory_format=torch.channels_last)
    if name in ("upstream-compiled", "upstream-max-autotune"):
        mode = "max-autotune" if name.endswith("autotune") else "default"
        # Shapes stay, also where another configuration was compiled before; a upstream that silently fell back to eager
        # would be timed under a wrong name.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        diffusion.model = torch.compile(diffusion.model, mode=mode, dynamic=False)
    images = _images(configuration, device)
    if name == "upstream-channels-last":
        images = images.contiguous(memory_format=torch.channels_last)
    if name in ("ours", "ours-step-by-step"):
        optimizer, label = _fused_adam(diffusion, device)
        training_step = _captured(diffusion, optimizer, images, configuration, graph=name == "ours")
    else:
        optimizer, label = (_fused_adam if name.startswith("ours") else _adam)(diffusion, device)
        training_step = _training_step(diffusion, optimizer, images, configuration)
    options = {"graph": False} if name == "ours-step-by-step" else {}
    return Baseline(name, diffusion, training_step, _sample(diffusion, configuration, device, options), label)


def check(ours: Baseline, other: Baseline, configuration: Configuration, *, gradients: bool = True) -> dict:
    """Give a form of upstream our weights and hold it equal (`check_equal`); diffusers is held to `same_size`."""
    if other.name == "diffusers":
        return same_size(ours, other)
    load_weights(ours, other)
    return check_equal(ours, other, configuration, gradients=gradients)


def check_equal(
    ours: Baseline, other: Baseline, configuration: Configuration, *, gradients: bool = True
) -> dict[str, float]:
    """Hold a form of upstream to our numbers: the network's output, the loss and every gradient, for one noise.

    Args:
        gradients: False compares outputs alone, as sampling makes them.

    Returns:
        Relative errors by name.

    Raises:
        AssertionError: one is past the tolerance of the precision.
    """
    device = next(ours.diffusion.parameters()).device
    images = _images(configuration, device)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=generator).to(device)
    t = torch.arange(images.shape[0], device=device) % configuration.steps
    found = [_results(baseline, configuration, images, noise, t, gradients) for baseline in (ours, other)]
    tf32 = configuration.dtype == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32
    loose, looser = _TOLERANCE["tf32" if tf32 else configuration.dtype]
    errors = {}
    for name in found[0]:
        a, b = found[0][name], found[1][name]
        errors[name] = ((a - b).norm() / b.norm()).item()
        bound = looser if name == "gradient" else loose
        message = f"{other.name} is not equal to ours: {name} differs by {errors[name]:.1e} > {bound}"
        assert errors[name] <= bound, message
    return errors


def _results(baseline: Baseline, configuration: Configuration, images, noise, t, gradients: bool) -> dict:
    """Copies in float64: a network in a CUDA graph writes its next output over the last.

    The calls are those that are timed later, so a compiled network compiles once.
    """
    diffusion = baseline.diffusion
    if not gradients:
        with autocast(configuration, images.device), torch.inference_mode():
            return {"output": diffusion.model(noise.clone(), t).double().clone()}
    found: dict[str, torch.Tensor] = {}
    hook = diffusion.model.register_forward_hook(
        lambda module, args, output: found.update(output=output.detach().double().clone())
    )
    diffusion.zero_grad(set_to_none=True)
    # Self-conditioning tosses a coin in each step, the two sides each their own.
    self_condition, diffusion.self_condition = diffusion.self_condition, False
    with autocast(configuration, images.device):
        loss = diffusion.p_losses(images * 2 - 1, t, noise=noise.clone())
    loss.backward()
    hook.remove()
    diffusion.self_condition = self_condition
    found["loss"] = loss.detach().double()
    found["gradient"] = torch.cat([p.grad.flatten().double() for p in diffusion.parameters()])
    diffusion.zero_grad(set_to_none=True)
    return found


def same_size(ours: Baseline, other: Baseline) -> dict[str, float]:
    """diffusers' network is another function; all that can be held is its size, and its scheduler's x_t to ours.

    Raises:
        AssertionError: it has less than half or more than twice our parameters, or x_t is another.
    """
    counts = [sum(p.numel() for p in c.diffusion.parameters()) for c in (ours, other)]
    ratio = counts[1] / counts[0]
    assert 1 / 2 <= ratio <= 2, f"{other.name} has {ratio:.2f} times our parameters"
    images = torch.linspace(-1, 1, 4 * 3 * 8 * 8, device=ours.diffusion.betas.device).reshape(4, 3, 8, 8)
    noise, t = images.flip(0), torch.arange(4, device=images.device) % ours.diffusion.num_timesteps
    x_t = other.diffusion.scheduler.add_noise(images, noise, t)
    error = ((x_t - ours.diffusion.q_sample(images, t, noise=noise)).norm() / x_t.norm()).item()
    assert error <= 1e-5, f"{other.name}: x_t differs by {error:.1e}"
    return {"parameters": ratio, "x_t": error}


def autocast(configuration: Configuration, device: torch.device):
    """torch's autocast in the configuration's dtype; nothing for float32."""
    if configuration.dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[configuration.dtype])


def _network_arguments(configuration: Configuration) -> dict:
    named = {"dim": configuration.dim, "dim_mults": configuration.dim_mults, "channels": configuration.channels}
    return {**named, "flash_attn": True, **configuration.network}  # a user's own network may say otherwise


def _ours(name: str, configuration: Configuration, on_cuda: bool) -> torch.nn.Module:
    from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
    from ddpm_fast.models.unet import Unet

    arguments = _network_arguments(configuration)
    if name == "ours-low-memory":
        arguments["memory"] = "low"
    network = Unet(**arguments)
    return GaussianDiffusion(network, image_size=configuration.image_size, timesteps=configuration.steps)


def _upstream(name: str, configuration: Configuration, on_cuda: bool) -> torch.nn.Module:
    import denoising_diffusion_pytorch as upstream

    arguments = _network_arguments(configuration)
    if arguments.pop("norm", "rms") != "rms":
        raise Unavailable("upstream's 2.x network has no GroupNorm")
    arguments = {k: v for k, v in arguments.items() if k not in ("memory", "resnet_block_groups")}
    if configuration.dtype == "fp32" and on_cuda:
        arguments["flash_attn"] = False  # it has no kernel for float32 on CUDA: its users leave it off there
    network = upstream.Unet(**arguments)
    return upstream.GaussianDiffusion(network, image_size=configuration.image_size, timesteps=configuration.steps)


class _Diffusers(torch.nn.Module):
    """diffusers' UNet2DModel and DDPMScheduler behind upstream's two calls."""

    def __init__(self, configuration: Configuration):
        super().__init__()
        from diffusers import DDPMScheduler, UNet2DModel

        from ddpm_fast.diffusion.schedules import make_betas

        widths = tuple(configuration.dim * m for m in configuration.dim_mults)
        stages = len(widths)
        self.unet = UNet2DModel(
            sample_size=configuration.size,
            in_channels=configuration.channels,
            out_channels=configuration.channels,
            block_out_channels=widths,
            layers_per_block=1,  # with two it has 1.7 times our parameters at dim 64, with one 1.2 times
            norm_num_groups=min(8, configuration.dim),
            down_block_types=("DownBlock2D",) * (stages - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (stages - 1),
        )
        self.scheduler = DDPMScheduler(
            num_train_timesteps=configuration.steps,
            trained_betas=make_betas("sigmoid", configuration.steps).numpy(),
            prediction_type="v_prediction",
        )
        self.shape = (configuration.channels, *configuration.size)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x_start, noise = images * 2 - 1, torch.randn_like(images)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, images.shape[:1], device=images.device)
        out = self.unet(self.scheduler.add_noise(x_start, noise, t), t).sample
        return torch.nn.functional.mse_loss(out, self.scheduler.get_velocity(x_start, noise, t))

    @torch.inference_mode()
    def sample(self, batch_size: int) -> torch.Tensor:
        x = torch.randn(batch_size, *self.shape, device=self.device)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
        return (x + 1) / 2


def _diffusers(name: str, configuration: Configuration, on_cuda: bool) -> torch.nn.Module:
    if configuration.network:
        raise Unavailable(f"diffusers' network has no {', '.join(configuration.network)}")
    return _Diffusers(configuration)


def load_weights(ours: Baseline, other: Baseline) -> None:
    """Give a form of upstream our weights."""
    network = other.diffusion.model
    network = getattr(network, "_orig_mod", network)
    network.load_state_dict(copy.deepcopy(ours.diffusion.model.state_dict()))


def _images(configuration: Configuration, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(configuration.batch, configuration.channels, *configuration.size, generator=generator).to(device)


def _adam(diffusion, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer that upstream's users write."""
    return torch.optim.Adam(diffusion.parameters(), lr=1e-5), "torch.optim.Adam"


def _fused_adam(diffusion, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer that `Trainer` takes."""
    from ddpm_fast import optim

    options: dict[str, Any] = {"fused": True, "capturable": True} if device.type == "cuda" else {"fused": True}
    return optim.Adam(diffusion.parameters(), lr=1e-5, **options), "ddpm_fast.optim.Adam(fused=True)"


def _training_step(diffusion, optimizer, images: torch.Tensor, configuration: Configuration) -> Callable:
    device = images.device

    def step() -> torch.Tensor:
        with autocast(configuration, device):
            loss = diffusion(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _captured(diffusion, optimizer, images: torch.Tensor, configuration: Configuration, graph: bool) -> Callable:
    """The training step as one recording, or without it: the same operators on the same numbers."""
    from ddpm_fast.training.captured_step import capture_training_step

    dtype = None if configuration.dtype == "fp32" else DTYPES[configuration.dtype]
    # As the Trainer: float16 with a scaler, and the copies of the weights written by the optimizer.
    scaler = torch.amp.GradScaler(images.device.type) if configuration.dtype == "fp16" else None
    step = capture_training_step(
        diffusion, optimizer, images.shape, max_grad_norm=None, autocast=dtype, scaler=scaler, graph=graph,
        keep_copies=True,
    )  # fmt: skip
    return lambda: step(images)


def _sample(diffusion, configuration: Configuration, device: torch.device, options: dict) -> Callable:
    def sample() -> torch.Tensor:
        # The progress bars of both sides run, into nothing.
        with autocast(configuration, device), contextlib.redirect_stderr(io.StringIO()):
            return diffusion.sample(batch_size=configuration.batch, **options)

    return sample
