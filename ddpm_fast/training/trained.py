"""The parts of what a trainer trains, the process and its network, and what files record of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.xm import XMWrapper, process_of
from ddpm_fast.models.networks import network_name


def averaged_module(module: nn.Module) -> nn.Module:
    """The process in a module, else the module."""
    return process_of(module) or module


def network_of(module: nn.Module) -> Any:
    """The network of a process, or of another module that calls it `model`."""
    process = process_of(module)
    network = getattr(module, "model", None) if process is None else process.network
    return getattr(network, "_orig_mod", network)


def factor_of(process: Any) -> int | None:
    """By how much a process enlarges images; None for the others."""
    return getattr(process, "super_resolution", None)


def calls_of_a_sample(process: Any) -> int | None:
    """Network calls of `process.sample`, where they are many and fewer could be asked for; else None."""
    if getattr(process, "is_ddim_sampling", False):
        return None
    if isinstance(process, DiffusionProcess):
        return process.network_calls()
    return getattr(process, "num_timesteps", None)


def process_in(diffusion: nn.Module) -> DiffusionProcess | None:
    """The process, compiled or not; None for another module of the user's."""
    process = getattr(diffusion, "_orig_mod", diffusion)
    return process if isinstance(process, DiffusionProcess) else None


def process_name_of(diffusion: nn.Module) -> str | None:
    """The registered name of the process's class; the class's own where it is not registered."""
    process = process_in(diffusion)
    return None if process is None else getattr(process, "process_name", type(process).__name__)


def process_config(diffusion: nn.Module, image_size: tuple[int, int]) -> dict[str, Any] | None:
    """The process's arguments; of those that are plain attributes, the values of now."""
    process = process_in(diffusion)
    return None if process is None else {**process.current_config(), "image_size": list(image_size)}


def network_config(diffusion: nn.Module) -> dict[str, Any] | None:
    """The network's arguments, as far as it is this package's."""
    network = network_of(getattr(diffusion, "_orig_mod", diffusion))
    return None if network_name(network) is None else network.config


def config_of(trained: nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
    """Constructor arguments that rebuild network and process, as far as they are this package's, and their names."""
    diffusion = averaged_module(trained)
    wrapper = None
    if isinstance(trained, XMWrapper):
        wrapper = {"candidates": trained.candidates, "max_batch_size": trained.max_batch_size}
    return {
        "unet": network_config(diffusion),
        "network": network_name(network_of(getattr(diffusion, "_orig_mod", diffusion))),
        "process": process_name_of(diffusion),
        "diffusion": process_config(diffusion, image_size),
        "xm": wrapper,
    }
