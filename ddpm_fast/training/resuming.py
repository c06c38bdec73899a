"""What a run that continues a checkpoint may change: the trainer's settings may, network and process may not."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.models.unet import Unet
from ddpm_fast.runtime.plain import shown
from ddpm_fast.training.checkpoint import (
    CheckpointError,
    infer_diffusion_config,
    infer_unet_config,
    network_state,
    recorded_class_names,
    recorded_config,
    recorded_process,
)
from ddpm_fast.training.state_names import FoundStates

_State = Mapping[str, torch.Tensor]

# Arguments of a network that choose an implementation or act in training only; all others make it another function.
_FREE_OF_NETWORKS = {"memory", "flash_attn", "dropout", "cond_drop_prob"}
# Arguments of processes that say what the network learns; all others act in sampling, or choose what it sees of it.
_FIXED_OF_PROCESSES = (
    "image_size",
    "timesteps",
    "objective",
    "auto_normalize",
    "sigma_data",
    "noise_schedule",
    "learned_schedule_net_hidden_dim",
    "time_scale",
    "uncertainty_weighting",
    "loss_weighting",
    "loss_weighting_options",
    "zero_terminal_snr",
    "vb_loss_weight",
    "loss",
    "pred_noise_loss_weight",
    "pred_x_start_loss_weight",
    "super_resolution",
)
# Of those, what a file does not record unless it was asked for.
_UNASKED = {
    "uncertainty_weighting": False,
    "loss_weighting": None,
    "loss_weighting_options": None,
    "zero_terminal_snr": False,
    "super_resolution": None,
}
_SCHEDULE = ("beta_schedule", "schedule_fn_kwargs")
_LOSS_WEIGHT = ("min_snr_loss_weight", "min_snr_gamma")


def check_process(
    path: Path, contents: Mapping, states: FoundStates, own_name: str | None, own_config: Mapping | None, own: _State
) -> None:
    """Raise CheckpointError, naming old and new values, if a file's process is another one than this trainer's.

    states, own: the states of file and trainer, whose buffers are compared where the file has them. Of upstream's files
    the arguments are read off the buffers.
    """
    if own_config is None:
        return
    found = recorded_process(contents, states)
    if found is not None and own_name is not None:
        _refuse(path, _changed({"process": found}, {"process": own_name}, ["process"]))
    state, recorded = states.model, recorded_config(contents)["diffusion"]
    if recorded is None:
        if "betas" not in state or _agree(state, own, "betas", "loss_weight"):
            return
        recorded = {"min_snr_loss_weight": False, **infer_diffusion_config(state)}
    else:
        recorded, own_config = {**_UNASKED, **recorded}, {**_UNASKED, **own_config}
    names = [*_FIXED_OF_PROCESSES, *_LOSS_WEIGHT]
    if not _agree(state, own, "betas"):
        names += _SCHEDULE
    if not (recorded.get("min_snr_loss_weight") and own_config.get("min_snr_loss_weight")):
        names.remove("min_snr_gamma")
    _refuse(path, _changed(recorded, own_config, names))


def check_class_names(path: Path, contents: Mapping, own: tuple[str, ...] | None) -> None:
    """Raise CheckpointError if a file's classes have other names than the dataset's; either may have none."""
    recorded = recorded_class_names(contents)
    if recorded is None or own is None or recorded == own:
        return
    pairs = enumerate(itertools.zip_longest(recorded, own))
    number, (old, new) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    raise CheckpointError(
        f"checkpoint {path} was trained with {len(recorded)} classes and the dataset has {len(own)}: class {number} "
        f"was {shown(old)} and is {shown(new)}; a run cannot change that"
    )


def describe_network(path: Path, contents: Mapping, state: _State, own_config: Mapping | None) -> str:
    """A clause with the arguments of `Unet` that differ between file and trainer, or ""."""
    if own_config is None:
        return ""
    recorded = recorded_config(contents)["unet"]
    if recorded is None:
        if "init_conv.weight" not in network_state(state):
            return ""
        recorded = infer_unet_config(network_state(state), path)
    own = _with_defaults_resolved(own_config)
    told = _with_defaults_resolved(recorded) if recorded_config(contents)["unet"] else recorded
    names = [name for name in inspect.signature(Unet).parameters if name not in _FREE_OF_NETWORKS]
    changed = _changed(told, own, names)
    if not changed:
        return ""
    theirs, ours = ("; ".join(f"{name}={shown(pair[side])}" for name, pair in changed.items()) for side in (0, 1))
    return f"the file has {theirs}, this trainer has {ours}"


def changes(recorded: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The settings of a trainer that the file has with other values, as one clause, or ""."""
    changed = _changed(recorded, own, [name for name in own if recorded.get(name) is not None])
    return ", ".join(f"{name}={shown(new)} (was {shown(old)})" for name, (old, new) in changed.items())


def _changed(recorded: Mapping, own: Mapping, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """name → (value in the file, value here) of those that differ; a name that one of them lacks is left out."""
    both = [name for name in names if name in recorded and name in own]
    return {name: (recorded[name], own[name]) for name in both if not _is_same(recorded[name], own[name])}


def _is_same(first: Any, second: Any) -> bool:
    """Equality in which a list equals a tuple, and a float one that was read off float32."""
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_is_same, first, second))
    if isinstance(first, float) or isinstance(second, float):
        is_number = isinstance(first, (int, float)) and isinstance(second, (int, float))
        return is_number and math.isclose(first, second, rel_tol=1e-4)
    return first == second


def _refuse(path: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    if changed:
        pairs = ", ".join(f"{name}={shown(old)}" for name, (old, _) in changed.items())
        own = ", ".join(f"{name}={shown(new)}" for name, (_, new) in changed.items())
        raise CheckpointError(
            f"checkpoint {path} was trained with {pairs}, this trainer's diffusion has {own}; a run cannot change that"
        )


def _agree(state: _State, own: _State, *names: str) -> bool:
    """True if these buffers are in both with the same numbers."""
    return all(
        name in state
        and name in own
        and state[name].shape == own[name].shape
        and torch.allclose(state[name].double().cpu(), own[name].double().cpu(), rtol=1e-4, atol=1e-9)
        for name in names
    )


def _with_defaults_resolved(config: Mapping) -> dict[str, Any]:
    """Arguments of `Unet` with its defaults, and with the values that None and one number per network stand for."""
    signature = inspect.signature(Unet).parameters.values()
    found = {parameter.name: parameter.default for parameter in signature if parameter.default is not parameter.empty}
    found.update(config)
    stages = len(found["dim_mults"])
    if found["full_attn"] is None:
        found["full_attn"] = (False,) * (stages - 1) + (True,)
    for name in ("full_attn", "attn_heads", "attn_dim_head"):
        if not isinstance(found[name], (list, tuple)):
            found[name] = (found[name],) * stages
    if found["init_dim"] is None:
        found["init_dim"] = found["dim"]
    if found["out_dim"] is None:
        found["out_dim"] = found["channels"] * (2 if found["learned_variance"] else 1)
    if found["norm"] != "group":
        del found["resnet_block_groups"]
    if not (found["learned_sinusoidal_cond"] or found["random_fourier_features"]):
        del found["learned_sinusoidal_dim"]
    return found
