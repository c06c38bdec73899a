"""Checkpoints: network, process and average rebuilt from a file, and what it records of its run.

A checkpoint is upstream's dictionary (step, model, opt, ema, scaler, version) plus `config`, constructor arguments and
the name of the process, and `training`, the trainer's arguments. Upstream's files lack both; then the architecture and
the process are read off names, shapes and buffers. Files of other programs are searched for a network's names
(`state_names.py`).
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.processes import PROCESSES
from ddpm_fast.models.networks import NETWORKS
from ddpm_fast.models.unet_base import UnetBase
from ddpm_fast.runtime import measured
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.plain import as_int, as_number, plain, shown
from ddpm_fast.runtime.pretrained import UndrawnWeights
from ddpm_fast.training.checkpoint_files import CheckpointError, load_checked, load_file, step_of
from ddpm_fast.training.checkpoint_states import (
    check_average,
    find_weights,
    load_average,
    load_matching,
    network_state,
    warn_of_names,
    with_buffers,
)
from ddpm_fast.training.inferred import infer_diffusion_config, infer_process, infer_unet_config
from ddpm_fast.training.state_names import FoundStates

_Path = str | os.PathLike
_Size = int | tuple[int, int]


def _as_dictionary(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dictionary; got {shown(value)}")
    return dict(value or {})


def _as_range(name: str, value: Any) -> list[float] | None:
    if value is None:
        return None
    numbers = [as_number(name, entry) for entry in value] if isinstance(value, (list, tuple)) else []
    if len(numbers) != 2 or not numbers[0] < numbers[1]:
        raise ValueError(f"{name} must be two numbers (low, high), low < high; got {shown(value)}")
    return numbers


# What a run goes on with from the record of its trainer, and the checks of it.
_CONTINUED: dict[str, Callable[[str, Any], Any]] = {
    "seed": as_int,
    "position": partial(as_int, least=0),
    "world_size": partial(as_int, least=1),
    "best_fid": as_number,
    "forms": measured.check_forms,
    "value_range": _as_range,
    "conditions": _as_dictionary,
}


# What networks and processes raise for arguments that they cannot use.
_UNUSABLE = (TypeError, ValueError, RuntimeError, ArithmeticError)


class Checkpoint(NamedTuple):
    """What `load_checkpoint` returns.

    Args:
        model: the network.
        diffusion: the process around it.
        ema: an `ema_pytorch.EMA` of `diffusion`.
        step: steps of training that are done; 0 where the file does not say.
    """

    model: UnetBase
    diffusion: DiffusionProcess
    ema: Any
    step: int


def load_checkpoint(
    path: _Path,
    *,
    process: str | None = None,
    image_size: _Size | None = None,
    map_location: torch.device | str = "cpu",
    **overrides: Any,
) -> Checkpoint:
    """Rebuild network, process and EMA from a checkpoint of ours or of upstream's `Trainer`.

    State dicts of a process, a `Unet` or an EMA load too, alone or as `model` or `state_dict` of a dictionary, with the
    prefixes of DistributedDataParallel, `torch.compile`, ema-pytorch, XMWrapper and Lightning; one warning says what
    was stripped. Without an EMA in the file, that of the result is equal to the weights.

    Args:
        path: of the file.
        process: the name of the process ("ddpm", "edm", "flow", ...), for state dicts whose names do not tell it.
        image_size: one int, or (height, width); needed for upstream's files to sample, since they do not record it.
        map_location: the device of network, process and EMA.
        overrides: further arguments of `Unet` and of the process, for what tensors cannot tell (`resnet_block_groups`,
            `auto_normalize`, ...) or what may be chosen again (`sampling_timesteps`, `sampler`, ...).

    Returns:
        A `Checkpoint`. `class_names` of its process and of the average's are the names of the classes that it was
        trained with, or None.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
        CheckpointError: the file is damaged, foreign, of another architecture or process, or two networks could be
            meant.
        TypeError, ValueError: an unknown override, an unknown process.
    """
    with needed_for("load_checkpoint"):
        from ema_pytorch import EMA

    contents = load_checked(path)
    states = find_weights(contents, path, attribute=_network_attribute(contents, process))
    config = recorded_config(contents)
    name = process_name(contents, states, path, process)
    cls = PROCESSES[name]
    network = recorded_network(contents, path)
    unet_options, diffusion_options = _split_overrides(overrides, network, cls)
    unet_config = config["unet"] or infer_unet_config(network_state(states.model), path)
    diffusion_config = dict(config["diffusion"] or infer_diffusion_config(states.model, name))
    check_network_config(unet_config, network, path)
    _check_names("ema", config["ema"] or {}, inspect.signature(EMA.__init__).parameters, path)
    class_names = recorded_class_names(contents, path)
    if image_size is not None:
        diffusion_options["image_size"] = image_size

    with UndrawnWeights():
        model: Any = _build("network", path, network, unet_config, unet_options)
    is_size_recorded = diffusion_config.get("image_size") is not None
    if not is_size_recorded:
        diffusion_config["image_size"] = model.downsample_factor
    diffusion = _build("process", path, partial(cls, model), diffusion_config, diffusion_options)
    step = step_of(contents, path)
    load_matching(diffusion, with_buffers(states.model, diffusion), path)
    check_average(contents, states, path)
    ema = EMA(diffusion, **(config["ema"] or {}))
    load_average(ema, states, diffusion, path, step)
    if image_size is None and not is_size_recorded:
        _forget_image_size(path, diffusion, ema.ema_model)
    for one in (diffusion, ema.ema_model):
        one.class_names = class_names
    ema.to(map_location)
    warn_of_names(states, path)
    return Checkpoint(model, diffusion, ema, step)


def _build(part: str, path: _Path, make: Callable[..., Any], recorded: Mapping, given: Mapping) -> Any:
    """What `make` makes of a file's arguments and the caller's; CheckpointError where the file's are unusable."""
    try:
        return make(**{**recorded, **given})
    except _UNUSABLE as error:
        if given and _is_usable(make, recorded):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"checkpoint {path} has no usable config of its {part}: {reason}") from error


def _is_usable(make: Callable[..., Any], recorded: Mapping) -> bool:
    try:
        make(**recorded)
    except _UNUSABLE:
        return False
    return True


def recorded_config(contents: Mapping) -> dict[str, Any]:
    """The constructor arguments in a file of ours: `unet`, `diffusion`, `xm` and `ema`, None where there are none."""
    config = contents.get("config")
    record = config if isinstance(config, Mapping) else {}
    parts = {name: record.get(name) for name in ("unet", "diffusion", "xm", "ema")}
    return {name: dict(part) if isinstance(part, Mapping) else None for name, part in parts.items()}


def recorded_network(contents: Any, path: _Path) -> type[UnetBase]:
    """The class of the network whose arguments a file records."""
    config = contents.get("config") if isinstance(contents, Mapping) else None
    recorded = config.get("network") if isinstance(config, Mapping) else None
    name = "unet" if recorded is None else recorded
    if not isinstance(name, str) or name not in NETWORKS:
        raise CheckpointError(f"checkpoint {path} has a network {shown(name)}, which is none of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def recorded_class_names(contents: Any, path: _Path) -> tuple[str, ...] | None:
    """The names of the classes 0, 1, ... that a file of ours records; None where it does not."""
    config = contents.get("config") if isinstance(contents, Mapping) else None
    names = config.get("class_names") if isinstance(config, Mapping) else None
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"checkpoint {path} has no usable class_names: they must be text; got {shown(names)}")
    return tuple(names)


def recorded_training(contents: Mapping, path: _Path) -> dict[str, Any]:
    """What a file says of its trainer, of which a run goes on with some; upstream's files have nothing."""
    training = contents.get("training")
    if not isinstance(training, Mapping):
        return {}
    try:
        record = plain("training", training)
        for name, check in _CONTINUED.items():
            if name in record:
                record[name] = check(name, record[name])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} has no usable record of its training: {error}") from error
    return record


def param_groups(contents: Mapping, path: _Path) -> list[dict[str, Any]]:
    """The groups of the optimizer in a file, none where it holds none."""
    optimizer = contents.get("opt")
    groups = optimizer.get("param_groups", []) if isinstance(optimizer, Mapping) else []
    is_list = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    if not is_list or not all(isinstance(group.get("params"), list) for group in groups):
        raise CheckpointError(f"checkpoint {path} has no usable param_groups in its 'opt': got {shown(groups)}")
    return groups


def check_network_config(config: Mapping, network: type[UnetBase], path: _Path) -> None:
    """Raise CheckpointError for recorded arguments with which the network cannot be built."""
    if "dim" not in config:
        raise CheckpointError(f"checkpoint {path} has no usable config of its network: it has no 'dim'")
    _check_names("network", config, inspect.signature(network).parameters, path)


def _check_names(part: str, config: Mapping, known: Collection[str], path: _Path) -> None:
    unknown = next((name for name in config if name not in known), None)
    if unknown is not None:
        raise CheckpointError(
            f"checkpoint {path} has no usable config of its {part}: {unknown!r} is none of its arguments here"
        )


def recorded_process(contents: Mapping, states: FoundStates) -> str | None:
    """The name of a file's process, as it records it or as names and shapes of its tensors tell; None: they do not."""
    return _process_in_config(contents) or infer_process(states)


def _process_in_config(contents: Any) -> str | None:
    config = contents.get("config") if isinstance(contents, Mapping) else None
    if not isinstance(config, Mapping) or config.get("diffusion") is None:
        return None
    name = config.get("process")
    if name is None:  # releases without other processes did not say it
        return "ddpm"
    return name if isinstance(name, str) else shown(name)


def _network_attribute(contents: Any, asked: str | None) -> str | None:
    """The name of the network in a file's process, where that is recorded or asked for."""
    name = _process_in_config(contents) or asked
    return PROCESSES[name].network_name if name in PROCESSES else None


def process_name(contents: Mapping, states: FoundStates, path: _Path, asked: str | None) -> str:
    """The registered name of the process to build: as asked for, recorded or inferred, else "ddpm".

    Raises:
        ValueError: an unknown name.
        CheckpointError: file and wish do not agree, or a file's process cannot be known.
    """
    known = ", ".join(PROCESSES)
    if asked is not None and asked not in PROCESSES:
        raise ValueError(f"process must be one of {known}, got {asked!r}")
    found = recorded_process(contents, states)
    if found is not None and asked is not None and asked != found:
        raise CheckpointError(f"checkpoint {path} is of the process {found!r}, not of {asked!r}")
    name = asked or found
    if name is None:
        if "model.time_mlp.0.weights" in states.model:
            raise CheckpointError(
                f"checkpoint {path} has a network for continuous time, and its names do not tell the process: give "
                "process= (edm, continuous, v-continuous or flow)"
            )
        name = "ddpm"
    if name not in PROCESSES:
        raise CheckpointError(f"checkpoint {path} is of the process {name!r}, which is not registered ({known} are)")
    return name


def read_settings(path: _Path) -> dict[str, Any]:
    """What a trainer's file says of its run: `unet`, `diffusion`, `xm` and `ema` (arguments), `process` (its name),
    `training`, `adam`, `class_names`.

    Of upstream's file the first two and the process are read off its tensors; what a file does not tell is left out.

    Raises:
        FileNotFoundError, OSError, CheckpointError: as `load_file`; the last for another architecture, too.
    """
    contents = load_file(path, mmap=True)
    states = find_weights(contents, path, attribute=_network_attribute(contents, None))
    state, process = states.model, process_name(contents, states, path, None)
    config = recorded_config(contents)
    groups = param_groups(contents, path)
    return {
        "unet": config["unet"] or infer_unet_config(network_state(state), path),
        "process": process,
        "diffusion": config["diffusion"] or infer_diffusion_config(state, process),
        "xm": config["xm"] or {},
        "ema": config["ema"] or {},
        "training": recorded_training(contents, path),
        "class_names": recorded_class_names(contents, path),
        "adam": plain("opt", {name: groups[0][name] for name in ("lr", "betas") if name in groups[0]})
        if groups
        else {},
    }


def _split_overrides(
    overrides: dict[str, Any], network: type[UnetBase], process: type[DiffusionProcess]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments split into those of the network and those of the process."""
    unet_names, diffusion_names = set(inspect.signature(network).parameters), process.arguments()
    if "num_sample_steps" in diffusion_names and "sampling_timesteps" in overrides:
        renamed = {"num_sample_steps": overrides["sampling_timesteps"], **overrides}
        overrides = {name: value for name, value in renamed.items() if name != "sampling_timesteps"}
    for name in overrides:
        if name not in unet_names | diffusion_names:
            raise TypeError(f"load_checkpoint got {name!r}, which is no argument of Unet or {process.__name__}")
    unet_options = {name: value for name, value in overrides.items() if name in unet_names}
    return unet_options, {name: value for name, value in overrides.items() if name in diffusion_names - unet_names}


def _forget_image_size(path: _Path, *diffusions: DiffusionProcess) -> None:
    for diffusion in diffusions:
        diffusion.image_size = None  # type: ignore[assignment]  # sampling then asks for it
    warnings.warn(f"{path} does not record image_size; give load_checkpoint(..., image_size=) to sample", stacklevel=3)
