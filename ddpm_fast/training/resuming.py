"""What a run that continues a checkpoint may change: the trainer's settings may, network and process may not."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpm_fast.models.unet import Unet
from ddpm_fast.runtime.plain import as_int, as_ints, plain, shown
from ddpm_fast.training.checkpoint import (
    check_network_config,
    param_groups,
    recorded_class_names,
    recorded_config,
    recorded_network,
    recorded_process,
    recorded_training,
)
from ddpm_fast.training.checkpoint_files import CheckpointError
from ddpm_fast.training.checkpoint_states import (
    as_named_in,
    exact_states,
    find_weights,
    first_difference,
    network_state,
    warn_of_names,
    with_buffers,
)
from ddpm_fast.training.inferred import infer_diffusion_config, infer_unet_config
from ddpm_fast.training.state_names import FoundStates, bare_name
from ddpm_fast.training.trained import network_config, process_config, process_in, process_name_of

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
# Settings of a trainer in which nothing is continued.
_FREE_OF_SETTINGS = ("train_num_steps", "save_and_sample_every", "num_samples")
# Names of a trainer's settings where a file has them in the states of Adam and of the average.
_OF_ADAM = {"lr": "train_lr", "betas": "adam_betas"}
_OF_AVERAGE = {"beta": "ema_decay", "update_every": "ema_update_every"}
_SCHEDULE = ("beta_schedule", "schedule_fn_kwargs")
_LOSS_WEIGHT = ("min_snr_loss_weight", "min_snr_gamma")


def find_trained_states(diffusion: nn.Module, data: Any, path: Path) -> FoundStates:
    """The weights of a file, by the names of what a trainer averages and saves."""
    own = diffusion.state_dict()
    network = f"{getattr(process_in(diffusion), 'network_name', 'model')}."
    if isinstance(data, Mapping) and isinstance(data.get("model"), Mapping) and data["model"].keys() == own.keys():
        return exact_states(data, path, network)
    names = [bare_name(name) for name in own]
    network_names = [name.removeprefix(network) for name in names if name.startswith(network)]
    if not network_names:
        raise CheckpointError(f"checkpoint {path} has other names than this trainer's {type(diffusion).__name__}")
    process_names = [name for name in names if not name.startswith(network)]
    return find_weights(data, path, network_names, process_names, None if process_names else network[:-1])


def check_states(
    diffusion: nn.Module,
    image_size: tuple[int, int],
    class_names: tuple[str, ...] | None,
    data: dict[str, Any],
    states: FoundStates,
    path: Path,
) -> dict[str, torch.Tensor]:
    """The state to load into `diffusion`, once it is of this process, this architecture and these classes."""
    own = diffusion.state_dict()
    check_process(path, data, states, process_name_of(diffusion), process_config(diffusion, image_size), own)
    state = as_named_in(diffusion, with_buffers(states.model, diffusion))
    causes = [first_difference(own, state), describe_network(path, data, states.model, network_config(diffusion))]
    if any(causes):
        raise CheckpointError(f"checkpoint {path} is of another architecture: {'; '.join(filter(None, causes))}")
    check_class_names(path, data, class_names)
    return state


def optimizer_state(adam: Any, data: dict[str, Any], path: Path, *, warns: bool) -> dict[str, Any] | None:
    """The file's moments under the settings of a trainer's Adam; None, with a warning, if it has none."""
    saved, own = data.get("opt"), adam.state_dict()
    if not isinstance(saved, Mapping):
        if warns:
            warnings.warn(f"{path} holds no state of the optimizer: Adam starts anew", stacklevel=3)
        return None
    sizes = [len(group["params"]) for group in own["param_groups"]]
    groups, state = param_groups(data, path), saved.get("state", {})
    if not isinstance(state, Mapping) or not all(isinstance(moments, Mapping) for moments in state.values()):
        raise CheckpointError(f"checkpoint {path} has no usable state in its 'opt': got {shown(state)}")
    if [len(group["params"]) for group in groups] != sizes:
        raise CheckpointError(
            f"checkpoint {path} has an optimizer of {[len(group['params']) for group in groups]} parameters, "
            f"this trainer's has {sizes}"
        )
    weights = [p for group in adam.param_groups for p in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    shapes = {number: weight.shape for number, weight in zip(numbers, weights, strict=True)}
    for number, moments in state.items():
        missing = {"step", "exp_avg", "exp_avg_sq"} - set(moments)
        if missing:
            raise CheckpointError(
                f"checkpoint {path} has an optimizer that is no Adam: parameter {number} has no {min(missing)!r}"
            )
        for name in ("exp_avg", "exp_avg_sq"):
            shape = getattr(moments[name], "shape", None)
            if number not in shapes or shape != shapes[number]:
                raise CheckpointError(
                    f"checkpoint {path} has an optimizer of other weights: {name} of parameter {number} has shape "
                    f"{None if shape is None else tuple(shape)}"
                )
        if not isinstance(moments["step"], (int, float, torch.Tensor)):
            raise CheckpointError(f"checkpoint {path} has no number of steps for parameter {number}")
    pairs = zip(groups, own["param_groups"], strict=True)
    fused = adam.defaults["fused"]  # the device decides
    groups = [{**old, **new, "fused": fused, "params": old["params"]} for old, new in pairs]
    # The optimizer keeps tensors of its own device as they are, and these are the file's memory.
    own_state = {
        number: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in moments.items()}
        for number, moments in state.items()
    }
    return {**saved, "state": own_state, "param_groups": groups}


def warn_of_changes(
    data: dict[str, Any], states: FoundStates, path: Path, own: Mapping[str, Any], *, is_seed_given: bool
) -> None:
    """One warning that names the settings with which the run goes on otherwise than before.

    own: what a file of this trainer would have as "training", "opt" and "config".
    """
    warn_of_names(states, path, stacklevel=4)
    now = _settings_in(own, path)
    for name in (*_FREE_OF_SETTINGS, *(() if is_seed_given else ["seed"])):
        now.pop(name)
    clause = changes(_settings_in(data, path), now)
    if clause:
        order = "; the order of the images goes on" if "train_batch_size" in clause else ""
        warnings.warn(f"{path} is continued with {clause}{order}", stacklevel=3)


def _settings_in(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The trainer's arguments that a file records, by their names."""
    groups = param_groups(data, path)
    adam = plain("opt", {new: groups[0][old] for old, new in _OF_ADAM.items() if old in groups[0]}) if groups else {}
    ema = recorded_config(data)["ema"] or {}
    average = {new: ema[old] for old, new in _OF_AVERAGE.items() if old in ema}
    return {**recorded_training(data, path), **adam, **average}


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
    recorded = recorded_class_names(contents, path)
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
    else:
        check_network_config(recorded, recorded_network(contents, path), path)
    own = _with_defaults_resolved(own_config)
    try:
        told = _with_defaults_resolved(recorded) if recorded_config(contents)["unet"] else recorded
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} has no usable config of its network: {error}") from error
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
    found.update(plain("config", config))
    stages = len(as_ints("dim_mults", found["dim_mults"], 1))
    found["channels"] = as_int("channels", found["channels"], 1)
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
