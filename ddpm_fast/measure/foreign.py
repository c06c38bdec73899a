"""Networks of other packages, timed as they are and accelerated: a training step and a forward pass.

Both hold the same weights, and `check_equal` finds their outputs and every gradient equal before anything is timed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast.integrations import accelerate as integrations
from ddpm_fast.measure import machine
from ddpm_fast.measure.charts import columns
from ddpm_fast.measure.timing import Interleaved

PHASES = ("training step", "forward")
EAGER, ACCELERATED = "eager", "accelerated"

# Relative errors allowed of outputs and of gradients, as ‖a − b‖ / ‖b‖: see `baselines`.
TOLERANCE = {"fp32": (1e-4, 1e-3), "tf32": (1e-2, 3e-2), "fp16": (2e-2, 5e-2), "bf16": (5e-2, 1.5e-1)}
_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}

# The network of google/ddpm-cifar10-32, from its config.json: 35.7 million parameters.
DDPM_CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}
# The network of torchcfm's examples/images/cifar10: 35.7 million parameters.
CFM_CIFAR10: dict[str, Any] = {
    "dim": (3, 32, 32),
    "num_res_blocks": 2,
    "num_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "num_heads": 4,
    "num_head_channels": 64,
    "attention_resolutions": "16",
    "dropout": 0.1,
}
# EDM's networks for CIFAR-10 (DDPM++) and for ImageNet at 64×64 (ADM): training of Karras et al. 2022.
EDM_CIFAR10 = {"img_resolution": 32, "in_channels": 3, "out_channels": 3, "channel_mult": [2, 2, 2], "dropout": 0.13}
EDM_IMAGENET = {"img_resolution": 64, "in_channels": 3, "out_channels": 3}


@dataclass
class ForeignNetwork:
    """A network with how it is called.

    Args:
        size: channels, height and width of an image.
        call: the output for (network, x, t), x being (B, C, H, W) and t integers (B,).
    """

    name: str
    network: nn.Module
    size: tuple[int, int, int]
    call: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def _diffusers(folder: str | None) -> ForeignNetwork:
    import diffusers

    if folder is None:
        network = diffusers.UNet2DModel(**DDPM_CIFAR10)
    else:
        at = Path(folder)
        at = at / "unet" if (at / "unet").is_dir() else at
        name = json.loads((at / "config.json").read_text())["_class_name"]
        network = getattr(diffusers, name).from_pretrained(at)
    side = network.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side

    def call(network: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        width = network.config.get("cross_attention_dim")
        given = {} if width is None else {"encoder_hidden_states": x.new_zeros(x.shape[0], 77, width)}
        return network(x, t, **given).sample

    return ForeignNetwork("diffusers", network, (network.config.in_channels, height, width), call)


def _torchcfm(folder: str | None) -> ForeignNetwork:
    from torchcfm.models.unet.unet import UNetModelWrapper

    network = UNetModelWrapper(**CFM_CIFAR10)
    size: Any = CFM_CIFAR10["dim"]
    return ForeignNetwork("torchcfm", network, size, lambda network, x, t: network(t / 1000, x))


def _edm(class_name: str, arguments: dict) -> Callable[[str | None], ForeignNetwork]:
    def make(folder: str | None) -> ForeignNetwork:
        module = importlib.import_module("physicsnemo.models.diffusion_unets")
        network = getattr(module, class_name)(**arguments)
        network.amp_mode = True  # else it refuses autocast
        side = arguments["img_resolution"]
        size = (arguments["in_channels"], side, side)
        return ForeignNetwork(class_name, network, size, lambda network, x, t: network(x, t / 1000))

    return make


def _upstream(folder: str | None) -> ForeignNetwork:
    import denoising_diffusion_pytorch as upstream

    network = upstream.Unet(64, dim_mults=(1, 2, 4, 8), flash_attn=True)
    return ForeignNetwork("upstream", network, (3, 32, 32), lambda network, x, t: network(x, t))


def _rectified_flow(folder: str | None) -> ForeignNetwork:
    from rectified_flow_pytorch import Unet

    network = Unet(64, dim_mults=(1, 2, 4, 8), flash_attn=True)
    return ForeignNetwork("rectified-flow", network, (3, 32, 32), lambda network, x, t: network(x, t / 1000))


# Name → package that it needs, and what makes it; diffusers takes a folder.
NETWORKS: dict[str, tuple[str, Callable[[str | None], ForeignNetwork]]] = {
    "diffusers": ("diffusers", _diffusers),
    "torchcfm": ("torchcfm", _torchcfm),
    "edm": ("physicsnemo", _edm("SongUNet", EDM_CIFAR10)),
    "edm-adm": ("physicsnemo", _edm("DhariwalUNet", EDM_IMAGENET)),
    "upstream": ("denoising_diffusion_pytorch", _upstream),
    "rectified-flow": ("rectified_flow_pytorch", _rectified_flow),
}


def why_not(name: str) -> str | None:
    """Why a network of this name, or "diffusers:FOLDER", cannot be made, in one clause; None where it can."""
    kind, _, folder = name.partition(":")
    if kind not in NETWORKS:
        return f"{name!r} is none of diffusers, diffusers:FOLDER, {', '.join(n for n in NETWORKS if n != 'diffusers')}"
    if folder and kind != "diffusers":
        return f"{kind} takes no folder"
    if folder and not any((Path(folder) / file).is_file() for file in ("config.json", "unet/config.json")):
        return f"{folder} has no config.json, and neither has a folder unet in it"
    if importlib.util.find_spec(NETWORKS[kind][0]) is None:
        return f"{NETWORKS[kind][0]} is not installed"
    return None


def make(name: str, seed: int = 0, device: torch.device | str = "cpu") -> ForeignNetwork:
    """A network with the random weights of `seed`, or those of its folder, in training mode.

    Parameters that are zero at the start (the last layer of each block) are drawn as well: with zeros no output and
    nearly no gradient would depend on the blocks.
    """
    kind, _, folder = name.partition(":")
    torch.manual_seed(seed)
    with torch.device(device):
        made = NETWORKS[kind][1](folder or None)
    with torch.no_grad():
        for parameter in made.network.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.02)
    made.network.train()
    return made


def inputs(
    foreign: ForeignNetwork, batch: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with noise, timesteps and what the output is compared with."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, batch, *foreign.size, generator=generator).to(device)
    t = (torch.arange(batch, device=device) * 97 + 13) % 1000
    return x, t, target


def autocast(dtype: str, device: torch.device) -> contextlib.AbstractContextManager:
    """torch's autocast in "fp16" or "bf16"; nothing for "fp32"."""
    return contextlib.nullcontext() if dtype == "fp32" else torch.autocast(device.type, _DTYPES[dtype])


@contextlib.contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Inside, no module drops anything, in training mode as well: two networks can be compared."""
    changed = []
    for module in network.modules():
        name = "p" if isinstance(module, nn.Dropout) else "dropout"
        value = getattr(module, name, None)
        if isinstance(value, float) and value > 0:
            setattr(module, name, 0.0)
            changed.append((module, name, value))
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def loss_of(foreign: ForeignNetwork, network: nn.Module, batch: tuple, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean squared error of the output, and the output."""
    x, t, target = batch
    with autocast(dtype, x.device):
        out = foreign.call(network, x, t)
        return F.mse_loss(out.float(), target), out


def check_equal(foreign: ForeignNetwork, eager: nn.Module, other: nn.Module, batch: tuple, dtype: str) -> dict:
    """Hold two networks equal: the output and every parameter's gradient, without dropout.

    Returns:
        Relative errors: of the output, of all gradients together, of the worst gradient (against its own norm, and at
        least 1/1000 of the largest's: those of keys' biases are 0 but for rounding).

    Raises:
        AssertionError: one is past the tolerance of the precision.
    """
    outputs, gradients = [], []
    for network in (eager, other):
        network.zero_grad(set_to_none=True)
        with without_dropout(network):
            loss, out = loss_of(foreign, network, batch, dtype)
            loss.backward()
        outputs.append(out.detach().double())
        gradients.append({name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None})
        network.zero_grad(set_to_none=True)
    assert gradients[0].keys() == gradients[1].keys(), "other parameters have gradients"
    largest = max(gradient.norm().item() for gradient in gradients[0].values())
    worst = {
        name: ((gradients[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-3 * largest)).item()
        for name, gradient in gradients[0].items()
    }
    flat = [torch.cat([gradient.flatten() for gradient in found.values()]) for found in gradients]
    errors = {
        "output": ((outputs[1] - outputs[0]).norm() / outputs[0].norm()).item(),
        "gradients": ((flat[1] - flat[0]).norm() / flat[0].norm()).item(),
        "worst gradient": max(worst.values()),
    }
    tf32 = dtype == "fp32" and batch[0].is_cuda and torch.backends.cudnn.allow_tf32
    loose, looser = TOLERANCE["tf32" if tf32 else dtype]
    bounds = {"output": loose, "gradients": looser, "worst gradient": 3 * looser}
    for name, error in errors.items():
        where = f" ({max(worst, key=lambda n: worst[n])})" if name == "worst gradient" else ""
        assert error <= bounds[name], f"{name}{where} differs by {error:.1e} > {bounds[name]:.0e}"
    return errors


def training_step(
    foreign: ForeignNetwork,
    network: nn.Module,
    batch: tuple,
    dtype: str,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], torch.Tensor]:
    """A step as users write it: forward, mean squared error, backward and the optimizer, torch.optim.Adam."""
    optimizer = optimizer or torch.optim.Adam(network.parameters(), lr=1e-5)

    def step() -> torch.Tensor:
        loss, _ = loss_of(foreign, network, batch, dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def forward(foreign: ForeignNetwork, network: nn.Module, batch: tuple, dtype: str) -> Callable[[], torch.Tensor]:
    """The network under torch.no_grad, in its present mode."""
    x, t, _ = batch

    def run() -> torch.Tensor:
        with torch.no_grad(), autocast(dtype, x.device):
            return foreign.call(network, x, t)

    return run


def compare(
    foreign: ForeignNetwork,
    device: torch.device,
    *,
    batch: int,
    dtype: str = "fp32",
    seconds: float = 40.0,
    rounds: int = 3,
    say: Callable[[str], None] = lambda _: None,
    others: dict[str, nn.Module] | None = None,
) -> dict:
    """Time a network as it is and accelerated.

    Args:
        dtype: "fp32", or "fp16" / "bf16" for torch's autocast.
        rounds: the least of each phase.
        others: further networks with the same calls, parameters and values, timed beside by name.

    Returns:
        JSON-ready: network, batch, dtype, machine, errors, modules (class, number, what runs them), phases (name →
        "eager" and "accelerated" → timing in seconds).

    Raises:
        AssertionError: the accelerated network is not equal, or restoring it gives other bits; nothing is timed then.
    """
    device = torch.device(device)
    eager = foreign.network.to(device)
    networks = {EAGER: eager, ACCELERATED: integrations.accelerate(copy.deepcopy(eager))}
    networks |= {name: network.to(device) for name, network in (others or {}).items()}
    data = inputs(foreign, batch, device)
    say("checking outputs and gradients")
    errors = {name: check_equal(foreign, eager, networks[name], data, dtype) for name in networks if name != EAGER}
    result: dict[str, Any] = {
        "network": foreign.name, "parameters": sum(p.numel() for p in eager.parameters()),
        "size": list(foreign.size), "batch": batch, "dtype": dtype, "machine": machine.describe(device),
        "errors": errors[ACCELERATED], "modules": _modules(networks[ACCELERATED]), "phases": {},
    }  # fmt: skip
    for phase, make_call in zip(PHASES, (training_step, forward), strict=True):
        say(f"timing the {phase}")
        calls: dict[str, Callable[[], object]] = {}
        for name, network in networks.items():
            network.train(phase == PHASES[0])
            calls[name] = make_call(foreign, network, data, dtype)
        timings = Interleaved(calls, device).run(seconds / len(PHASES), least=rounds)
        result["phases"][phase] = {name: timing.as_dict() for name, timing in timings.items()}
    return result


def _modules(network: nn.Module) -> list[tuple[str, int, str]]:
    """Classes of the blocks, how many there are, and the op that computes them, or why their own forward does."""
    lines = integrations.table(network)
    kinds = Counter((line.cls, line.runs or f"its own forward: {line.reason}") for line in lines)
    return [(cls, number, runs) for (cls, runs), number in kinds.items()]


def modules_table(result: dict) -> str:
    """Markdown: the blocks by class, and the op that computes them."""
    return columns(["class", "modules", "runs"], [[cls, str(n), runs] for cls, n, runs in result["modules"]])


def table(result: dict) -> str:
    """Markdown: milliseconds of each phase, and how many times as long the network as it is takes."""
    rows = []
    for phase, timings in result["phases"].items():
        for name, numbers in timings.items():
            over = "" if name == EAGER else f"{timings[EAGER]['median'] / numbers['median']:.2f}"
            spread = f"{numbers['low'] * 1e3:.4g} – {numbers['high'] * 1e3:.4g}"
            rows.append([phase, name, f"{numbers['median'] * 1e3:.4g}", spread, over])
    return columns(["", "", "ms (median)", "middle half", "times as fast"], rows)
