"""Checkpoints: written whole or not at all, read without running code, rebuilt from their tensors where need be.

A checkpoint is upstream's dictionary (step, model, opt, ema, scaler, version) plus `config`, constructor arguments and
the name of the process, and `training`, the trainer's arguments. Upstream's files lack both; then the architecture and
the process are read off names, shapes and buffers. Files of other programs are searched for a network's names
(`state_names.py`).
"""

from __future__ import annotations

import errno
import inspect
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.processes import PROCESSES
from ddpm_fast.diffusion.schedules import cosine_beta_schedule, linear_beta_schedule, sigmoid_beta_schedule
from ddpm_fast.models.networks import NETWORKS
from ddpm_fast.models.networks import network_name as network_name
from ddpm_fast.models.unet_base import UnetBase
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.plain import as_int, plain
from ddpm_fast.runtime.pretrained import UndrawnWeights
from ddpm_fast.training.atomic_files import write_atomically
from ddpm_fast.training.numpy_pickles import STAND_INS, without_arrays
from ddpm_fast.training.state_names import AmbiguousNamesError, FoundStates, bare_name, find_states

_Path = str | os.PathLike
_State = Mapping[str, torch.Tensor]
_Size = int | tuple[int, int]

# What torch raises on the contents of a file; what is missing on the machine (a module, memory) is none of these.
_LOADING_ERRORS = (
    RuntimeError,
    EOFError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    TypeError,
    ValueError,
    struct.error,
)

# Weights of a network that takes conditions, whose length is an argument of it.
_CONDITIONS = {"classes_emb.weight": "num_classes", "null_cond": "cond_dim"}
_SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule, "sigmoid": sigmoid_beta_schedule}


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or belongs to another architecture."""


class Checkpoint(NamedTuple):
    """What `load_checkpoint` returns; `ema` is an `ema_pytorch.EMA` around `diffusion`, whose network is `model`."""

    model: UnetBase
    diffusion: DiffusionProcess
    ema: Any
    step: int


def save_atomically(obj: object, path: _Path) -> None:
    """`torch.save` that never leaves a partial file and never loses the earlier one; OSError says what went wrong."""
    with write_atomically(path) as file:
        torch.save(obj, file)


def load_file(path: _Path, map_location: torch.device | str = "cpu", mmap: bool = False) -> Any:
    """`torch.load(weights_only=True)` with one sentence for each way it can fail; numpy's scalars become Python's.

    Raises FileNotFoundError; OSError for a file that cannot be read; CheckpointError for one that is truncated or
    damaged, no checkpoint, or holds code.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is a folder; it must be a file such as model-1.pt")
    is_archive = _check_container(path)
    try:
        return _load(path, map_location, mmap and is_archive)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:Unsupported|GLOBAL) (?:global: GLOBAL )?(\S+)", str(error))
        if refused is None and _is_damaged(path):
            raise CheckpointError(f"checkpoint {path} is damaged: its checksums do not agree") from error
        what = f"it refers to {refused.group(1)}" if refused else "it is not a pickle of tensors"
        raise CheckpointError(
            f"checkpoint {path} was not loaded: {what}, and only plain data and tensors are"
        ) from error
    except OSError as error:
        raise OSError(error.errno, f"could not read checkpoint {path}: {error.strerror or error}") from error
    except _LOADING_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = "is damaged" if _is_damaged(path) else "could not be loaded"
        raise CheckpointError(f"checkpoint {path} {what}: {reason}") from error


def _load(path: Path, map_location: torch.device | str, mmap: bool) -> Any:
    """`torch.load` of plain data and tensors, again with stand-ins for numpy's scalars if there are any."""
    options: dict[str, Any] = {"map_location": map_location, "weights_only": True}
    try:
        return torch.load(path, mmap=mmap, **options)
    except RuntimeError as error:
        if not mmap or "mmap" not in str(error):
            raise
        return _load(path, map_location, mmap=False)  # the file system maps no files
    except pickle.UnpicklingError as error:
        if "numpy." not in str(error):
            raise
    with torch.serialization.safe_globals(STAND_INS):
        return without_arrays(torch.load(path, **options))


def load_checkpoint(
    path: _Path,
    *,
    process: str | None = None,
    image_size: _Size | None = None,
    map_location: torch.device | str = "cpu",
    **overrides: Any,
) -> Checkpoint:
    """Rebuild network, diffusion and EMA from a checkpoint of ours or of upstream's `Trainer`; returns a `Checkpoint`.

    `class_names` of its `diffusion` and of the average are the names of the classes that it was trained with, or None.

    State dicts of a process, a `Unet` or an EMA load too, alone or as `model` or `state_dict` of a dictionary, with the
    prefixes of DistributedDataParallel, `torch.compile`, ema-pytorch, XMWrapper and Lightning; one warning says what
    was stripped (step 0 without a step, EMA equal to the weights without an EMA).
    process: the name of the process ("ddpm", "edm", "flow", ...), for state dicts whose names do not tell it.
    image_size: needed for upstream's files to sample, since they do not record it. overrides: further arguments of
    `Unet` and of the process, for what tensors cannot tell (`resnet_block_groups`, `auto_normalize`, ...) or what
    may be chosen again (`sampling_timesteps`, `sampler`, ...).

    Raises FileNotFoundError, OSError (unreadable), CheckpointError (damaged, foreign, other architecture or process,
    two networks that could be meant), TypeError (unknown override), ValueError (unknown process).
    """
    with needed_for("load_checkpoint"):
        from ema_pytorch import EMA

    contents = load_file(path)
    states = find_weights(contents, path, attribute=_network_attribute(contents, process))
    config = recorded_config(contents)
    name = process_name(contents, states, path, process)
    cls = PROCESSES[name]
    network = recorded_network(contents)
    unet_options, diffusion_options = _split_overrides(overrides, network, cls)
    unet_config = config["unet"] or infer_unet_config(network_state(states.model), path)
    diffusion_config = dict(config["diffusion"] or infer_diffusion_config(states.model, name))
    if image_size is not None:
        diffusion_config["image_size"] = image_size
    is_size_unknown = diffusion_config.get("image_size") is None

    with UndrawnWeights():
        model: Any = network(**{**unet_config, **unet_options})
    if is_size_unknown:
        diffusion_config["image_size"] = model.downsample_factor
    diffusion = cls(model, **{**diffusion_config, **diffusion_options})
    step = step_of(contents, path)
    load_matching(diffusion, with_buffers(states.model, diffusion), path)
    check_average(contents, states, path)
    ema = EMA(diffusion, **(config["ema"] or {}))
    load_average(ema, states, diffusion, path, step)
    if is_size_unknown:
        _forget_image_size(path, diffusion, ema.ema_model)
    for one in (diffusion, ema.ema_model):
        one.class_names = recorded_class_names(contents)
    ema.to(map_location)
    warn_of_names(states, path)
    return Checkpoint(model, diffusion, ema, step)


def find_latest(folder: _Path) -> tuple[Path, int] | None:
    """(path, step) of the checkpoint with the largest step in a results folder, or None.

    A damaged file or one without a step is skipped with a warning. Raises OSError for a file that cannot be read.
    """
    found = []
    for path in sorted(Path(folder).glob("model-*.pt")):
        try:
            contents = load_file(path, mmap=True)
            has_step = isinstance(contents, dict) and contents.get("step") is not None
            if not has_step or (isinstance(contents["step"], torch.Tensor) and "model" not in contents):
                raise CheckpointError("it has no step, so it is no trainer's file")
            found.append((step_of(contents, path), path))
        except CheckpointError as error:
            warnings.warn(f"skipped {path}: {error}", stacklevel=2)
    if not found:
        return None
    step, path = max(found)
    return path, step


def find_file(name: int | str | os.PathLike, folder: _Path) -> Path:
    """The file of a milestone (1, "last"), a file name in a results folder (model-1.pt), or a path.

    A path that is absolute or begins with a dot is that file; anything else is looked for in the folder and here.
    Raises FileNotFoundError, or CheckpointError where two files fit.
    """
    folder = Path(folder)
    if not isinstance(name, (str, os.PathLike)):
        candidates = [folder / f"model-{as_int('milestone', name)}.pt"]
    elif os.path.isabs(name) or str(name).startswith("."):
        candidates = [Path(name)]
    else:
        is_milestone = Path(name).name == str(name) and Path(name).suffix != ".pt"
        milestone = [folder / f"model-{name}.pt", folder / f"{name}.pt"] if is_milestone else []
        candidates = [*milestone, folder / name, Path(name)]
        if not is_milestone:
            candidates.reverse()
    return one_file(name, candidates)


def one_file(name: object, candidates: Sequence[Path]) -> Path:
    """The candidate that is a file; FileNotFoundError names the first one, CheckpointError two that both are."""
    found: list[Path] = []
    for path in candidates:
        if path.is_file() and not any(path.samefile(other) for other in found):
            found.append(path)
    if len(found) > 1:
        raise CheckpointError(f"checkpoint {str(name)!r} may be {found[0]} or {found[1]}; give the whole path of one")
    if not found:
        folder = next((path for path in candidates if path.is_dir()), None)
        return candidates[0] if folder is None else folder  # load_file says what is wrong with it
    return found[0]


def find_weights(
    contents: Any,
    path: _Path,
    network_names: Sequence[str] = ("init_conv.weight",),
    process_names: Collection[str] | None = None,
    attribute: str | None = None,
) -> FoundStates:
    """The weights in a file's contents, with the names of a process; CheckpointError says why there are none.

    The arguments are those of `find_states`.

    Of a trainer's dictionary only `model` and `ema` are searched, of another one everything.
    """
    if not isinstance(contents, Mapping):
        raise CheckpointError(f"checkpoint {path} holds a {type(contents).__name__}, not a dictionary")
    model, ema = contents.get("model"), contents.get("ema")
    is_trainers = isinstance(model, Mapping) and "step" in contents
    try:
        searched = {"model": model, "ema": ema} if is_trainers else contents
        states = find_states(searched, network_names, process_names, attribute)
    except AmbiguousNamesError as error:
        raise CheckpointError(f"checkpoint {path} is ambiguous: {error}; save the one that is meant alone") from error
    if states is None:
        if isinstance(model, Mapping) or isinstance(contents.get("state_dict"), Mapping):
            raise CheckpointError(f"checkpoint {path} is of another architecture: it has no {network_names[0]!r}")
        found = ", ".join(map(str, list(contents)[:5]))
        raise CheckpointError(
            f"checkpoint {path} is no checkpoint of a diffusion trainer: it holds {found or 'nothing'}"
        )
    return states


def check_average(contents: Mapping, states: FoundStates, path: _Path) -> None:
    """Raise CheckpointError for a trainer's dictionary whose `ema` holds no network."""
    if "step" in contents and contents.get("ema") is not None and states.average is None:
        raise CheckpointError(f"checkpoint {path} has no network in its 'ema'")


def exact_states(contents: Mapping, network: str = "model.") -> FoundStates:
    """The weights of a trainer's file whose `model` has the names of the model that loads it.

    network: the prefix of its network's names.
    """

    def found(state: Mapping) -> dict[str, torch.Tensor]:
        return {
            f"model.{name.removeprefix(network)}" if name.startswith(network) else name: tensor
            for name, tensor in state.items()
        }

    ema = contents.get("ema")
    entries = ema if isinstance(ema, Mapping) else {}
    prefix = "ema_model."
    average = {name.removeprefix(prefix): tensor for name, tensor in entries.items() if name.startswith(prefix)}
    if entries and not average:  # the weights alone, without ema-pytorch's names
        average = dict(entries)
    counters = {name: entries[name] for name in ("initted", "step") if name in entries and name not in average}
    states = found(contents["model"]), found(average) if ema is not None else None
    return FoundStates(states[0], True, states[1], counters, [], [], network.removesuffix("."))


def warn_of_names(states: FoundStates, path: _Path, stacklevel: int = 3) -> None:
    """One warning on what was stripped from names, what is missing and what was left out; nothing for usual files."""
    notes = []
    if states.stripped:
        parts = ", ".join(repr(f"{part}.") for part in states.stripped)
        notes.append(f"the prefix {parts} was stripped from its names")
    if not states.has_process:
        notes.append("it holds only a network; the diffusion gets default arguments")
    if states.left_out:
        notes.append(f"{len(states.left_out)} other tensors were left out, such as {states.left_out[0]!r}")
    if notes:
        warnings.warn(f"{path}: {'; '.join(notes)}", stacklevel=stacklevel)


def recorded_config(contents: Mapping) -> dict[str, Any]:
    """The constructor arguments in a file of ours: `unet`, `diffusion`, `xm` and `ema`, None where there are none."""
    config = contents.get("config")
    record = config if isinstance(config, Mapping) else {}
    parts = {name: record.get(name) for name in ("unet", "diffusion", "xm", "ema")}
    return {name: dict(part) if isinstance(part, Mapping) else None for name, part in parts.items()}


def recorded_network(contents: Any) -> type[UnetBase]:
    """The class of the network whose arguments a file records."""
    config = contents.get("config") if isinstance(contents, Mapping) else None
    name = (config.get("network") if isinstance(config, Mapping) else None) or "unet"
    if name not in NETWORKS:
        raise CheckpointError(f"the checkpoint's network is a {name!r}, which is none of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def recorded_class_names(contents: Any) -> tuple[str, ...] | None:
    """The names of the classes 0, 1, ... that a file of ours records; None where it does not."""
    config = contents.get("config") if isinstance(contents, Mapping) else None
    names = config.get("class_names") if isinstance(config, Mapping) else None
    return None if names is None else tuple(names)


def recorded_process(contents: Mapping, states: FoundStates) -> str | None:
    """The name of a file's process, as it records it or as names and shapes of its tensors tell; None: they do not."""
    return _process_in_config(contents) or infer_process(states)


def _process_in_config(contents: Any) -> str | None:
    config = contents.get("config") if isinstance(contents, Mapping) else None
    if not isinstance(config, Mapping) or config.get("diffusion") is None:
        return None
    return config.get("process") or "ddpm"  # releases without other processes did not say it


def _network_attribute(contents: Any, asked: str | None) -> str | None:
    """The name of the network in a file's process, where that is recorded or asked for."""
    name = _process_in_config(contents) or asked
    return PROCESSES[name].network_name if name in PROCESSES else None


def infer_process(states: FoundStates) -> str | None:
    """The process that tensors belong to, where they tell: "learned" and "weighted" have wider outputs than "ddpm"."""
    state = states.model
    if states.network_name == "net":
        return "edm"
    if any(name.startswith("log_snr.") for name in state):
        return "continuous"
    if "betas" not in state:
        return None
    output, given = state.get("model.final_conv.weight"), state.get("model.init_conv.weight")
    if output is None or given is None:
        return "ddpm"
    wide = {2 * given.shape[1]: "learned", 2 * given.shape[1] + 2: "weighted"}
    return wide.get(output.shape[0], "ddpm")


def process_name(contents: Mapping, states: FoundStates, path: _Path, asked: str | None) -> str:
    """The registered name of the process to build: as asked for, recorded or inferred, else "ddpm".

    Raises ValueError for an unknown name, CheckpointError where file and wish do not agree or a file's process cannot
    be known.
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


def step_of(contents: Mapping, path: _Path) -> int:
    """The step of a trainer's file, `global_step` of Lightning's, or 0."""
    has_step = not isinstance(contents.get("step"), (torch.Tensor, type(None))) or "model" in contents
    step = contents.get("step" if has_step else "global_step")
    try:
        return 0 if step is None else as_int("step", step, 0)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} has no usable step: {error}") from error


def read_settings(path: _Path) -> dict[str, Any]:
    """What a trainer's file says of its run: `unet`, `diffusion`, `xm` and `ema` (arguments), `process` (its name),
    `training`, `adam`, `class_names`.

    Of upstream's file the first two and the process are read off its tensors; what a file does not tell is left out.
    Raises what `load_file` raises, and CheckpointError for another architecture.
    """
    contents = load_file(path, mmap=True)
    states = find_weights(contents, path, attribute=_network_attribute(contents, None))
    state, process = states.model, process_name(contents, states, path, None)
    config = recorded_config(contents)
    training, optimizer = contents.get("training"), contents.get("opt")
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    return {
        "unet": config["unet"] or infer_unet_config(network_state(state), path),
        "process": process,
        "diffusion": config["diffusion"] or infer_diffusion_config(state, process),
        "xm": config["xm"] or {},
        "ema": config["ema"] or {},
        "training": dict(training) if isinstance(training, Mapping) else {},
        "class_names": recorded_class_names(contents),
        "adam": plain("opt", {name: groups[0][name] for name in ("lr", "betas") if name in groups[0]})
        if groups
        else {},
    }


def load_matching(module: nn.Module, state: _State, path: _Path) -> None:
    """`load_state_dict(strict=True)`; CheckpointError names the first key that is missing, unknown or misshapen.

    The names in the state may lack what `torch.compile` and other wrappers add to the module's.
    """
    state = as_named_in(module, state)
    difference = first_difference(module.state_dict(), state)
    if difference:
        raise CheckpointError(f"checkpoint {path} is of another architecture: {difference}")
    module.load_state_dict(state)


def as_named_in(module: nn.Module, state: _State) -> dict[str, torch.Tensor]:
    """The state with the wrappers' parts that the module has in its names."""
    own = module.state_dict()
    if state.keys() == own.keys():
        return dict(state)
    names = {bare_name(name): name for name in own}
    return {names.get(bare_name(name), name): tensor for name, tensor in state.items()}


def load_average(ema: Any, states: FoundStates, diffusion: nn.Module, path: _Path, step: int) -> None:
    """Load what a file has of an `ema_pytorch.EMA` around the loaded diffusion; without any, it copies the weights."""
    if states.average is None:
        ema.copy_params_from_model_to_ema()
        return
    # Older releases of ema-pytorch kept the counters as (1,) instead of ().
    counters = {name: value.reshape(()) for name, value in states.counters.items()}
    average = as_named_in(ema.ema_model, with_buffers(states.average, diffusion))
    online = as_named_in(diffusion, with_buffers(states.model, diffusion)) if ema.include_online_model else {}
    state = {
        "initted": torch.tensor(True),
        "step": torch.tensor(step),
        **counters,
        **{f"online_model.{name}": tensor for name, tensor in online.items()},
        **{f"ema_model.{name}": tensor for name, tensor in average.items()},
    }
    difference = first_difference(ema.state_dict(), state)
    if difference:
        raise CheckpointError(f"checkpoint {path} is of another architecture: {difference}")
    ema.load_state_dict(state)


def infer_unet_config(state: _State, path: _Path) -> dict[str, Any]:
    """Arguments of `Unet` from the names and shapes of its state dict.

    Not to be seen there, so left at the defaults: dropout, flash_attn, resnet_block_groups, sinusoidal_pos_emb_theta,
    and whether sinusoidal weights were learned or random.
    """
    _check_generation(state, path)
    in_channels, out_dim = state["init_conv.weight"].shape[1], state["final_conv.weight"].shape[0]
    dim = state["time_mlp.1.weight"].shape[0] // 4
    stages = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("downs."))
    last = f"downs.{stages - 1}.3.weight"
    widths = [_shape(state, f"downs.{stage}.3.1.weight", path)[0] for stage in range(stages - 1)]
    widths.append(_shape(state, last, path)[0])
    attention = [_attention_config(state, f"downs.{stage}.2", path) for stage in range(stages)]
    frequencies = state.get("time_mlp.0.weights")
    return {
        "dim": dim,
        "init_dim": state["init_conv.weight"].shape[0],
        "dim_mults": tuple(width // dim for width in widths),
        **_channel_config(in_channels, out_dim),
        "out_dim": out_dim,
        "learned_sinusoidal_cond": frequencies is not None,
        "learned_sinusoidal_dim": 16 if frequencies is None else 2 * len(frequencies),
        "full_attn": tuple(is_full for is_full, _, _ in attention),
        "attn_heads": tuple(heads for _, heads, _ in attention),
        "attn_dim_head": tuple(dim_head for _, _, dim_head in attention),
        "norm": "rms" if "mid_block1.block1.norm.g" in state else "group",
        **{argument: len(state[name]) for name, argument in _CONDITIONS.items() if name in state},
    }


def infer_diffusion_config(state: _State, process: str = "ddpm") -> dict[str, Any]:
    """Arguments of a process from its buffers and names; image_size is not among them.

    Betas of no known schedule keep the loaded buffers. A bare `Unet` state dict has no buffers: the defaults hold.
    """
    kept = {"uncertainty_weighting": True} if "uncertainty.weight" in state else {}
    if "betas" not in state:
        hidden = state.get("log_snr.net.2.fn.0.net.weight")
        learned = {} if hidden is None else dict(noise_schedule="learned", learned_schedule_net_hidden_dim=len(hidden))
        return {**learned, **kept}
    betas = state["betas"].double()
    objective = {} if "objective" in PROCESSES[process].fixed_arguments else _infer_objective(state)
    config: dict[str, Any] = {"timesteps": len(betas), **objective, **kept}
    if any(name.startswith("timestep_history.") for name in state):
        config["timestep_sampler"] = "loss-second-moment"
    for name, schedule in _SCHEDULES.items():
        if torch.allclose(schedule(len(betas)).double(), betas, rtol=1e-4, atol=1e-9):
            config["beta_schedule"] = name
    return config


def _infer_objective(state: _State) -> dict[str, Any]:
    """Objective and min-SNR gamma from loss_weight, which is clip(SNR)/SNR, clip(SNR) or clip(SNR)/(SNR + 1)."""
    # 1/SNR kept as its square root: alphas_cumprod near 1 in float32 would lose 1 - alphas_cumprod.
    snr = state["sqrt_recipm1_alphas_cumprod"].double().square().reciprocal()
    is_usable = snr > 0  # a schedule that ends in pure noise has 0/0 there
    snr, weight = snr[is_usable], state["loss_weight"].double()[is_usable]
    clipped_snr = {"pred_v": weight * (snr + 1), "pred_noise": weight * snr, "pred_x0": weight}
    for objective, clipped in clipped_snr.items():
        if torch.allclose(clipped, snr, rtol=1e-4):
            return {"objective": objective}
    for objective, clipped in clipped_snr.items():
        gamma = clipped.max()
        if torch.allclose(clipped, snr.clamp(max=gamma), rtol=1e-4):
            return {"objective": objective, "min_snr_loss_weight": True, "min_snr_gamma": float(f"{gamma:.5g}")}
    warnings.warn("loss_weight follows no known objective; objective='pred_v' is assumed", stacklevel=4)
    return {"objective": "pred_v"}


def _channel_config(in_channels: int, out_dim: int) -> dict[str, Any]:
    """channels, self_condition, learned_variance and cond_channels that give these widths of the outer convolutions.

    As many condition channels as images have cannot be told from self-conditioning, and are taken for it.
    """
    if in_channels == 2 * out_dim:
        return {"channels": out_dim, "self_condition": True}
    if out_dim == 2 * in_channels:
        return {"channels": in_channels, "learned_variance": True}
    if in_channels > out_dim:
        return {"channels": out_dim, "cond_channels": in_channels - out_dim}
    return {"channels": in_channels}


def _attention_config(state: _State, prefix: str, path: _Path) -> tuple[bool, int, int]:
    """(is full attention, heads, dim_head) of one stage."""
    is_full = f"{prefix}.to_out.weight" in state
    heads = _shape(state, f"{prefix}.mem_kv", path)[1]
    hidden = _shape(state, f"{prefix}.to_qkv.weight", path)[0] // 3
    return is_full, heads, hidden // heads


def _check_generation(state: _State, path: _Path) -> None:
    """Refuse what is no `Unet` of this family, or one of a generation that computes something else."""
    for name in ("init_conv.weight", "time_mlp.1.weight", "final_conv.weight", "downs.0.0.block1.proj.weight"):
        _shape(state, name, path)
    is_old = not any(name.endswith(".mem_kv") for name in state)
    if is_old:
        raise CheckpointError(
            f"checkpoint {path} is of denoising-diffusion-pytorch 1.8 or older, whose network has no memory "
            "key-values (mem_kv); files of 1.9 and later load"
        )


def _shape(state: _State, name: str, path: _Path) -> torch.Size:
    if name not in state:
        raise CheckpointError(f"checkpoint {path} is of another architecture: it has no {name!r}")
    return state[name].shape


def _check_container(path: Path) -> bool:
    """True for an archive, False for an old pickle; a truncated archive and a foreign file are told apart here."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise CheckpointError(f"checkpoint {path} is empty")
    if start[:2] == b"PK":
        try:
            has_end = zipfile.is_zipfile(path)
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {error}") from error
        if not has_end:
            raise CheckpointError(f"checkpoint {path} is truncated: the end of the archive is missing")
        return True
    if start[:1] != b"\x80":
        raise CheckpointError(f"checkpoint {path} is not a PyTorch file")
    return False


def _is_damaged(path: Path) -> bool:
    """True if the checksums of an archive do not agree, or its table of contents is senseless; an old pickle has none.

    Raises OSError for a file that cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning
            raise
        return True
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OverflowError, struct.error):
        return True


def network_state(state: _State) -> dict[str, torch.Tensor]:
    """The part of a process's state that is its network's, under the network's names."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}


def with_buffers(state: _State, diffusion: nn.Module) -> _State:
    """The state under this process's names; to a bare network's, which lacks a process's buffers, those of this one."""
    network = getattr(diffusion, "network_name", "model")
    if network != "model":
        pairs = ((name.removeprefix("model."), name, tensor) for name, tensor in state.items())
        state = {name if bare == name else f"{network}.{bare}": tensor for bare, name, tensor in pairs}
    own = diffusion.state_dict()
    if state.keys() == own.keys():
        return state
    weights = {bare_name(name) for name, _ in diffusion.named_parameters()}
    beside = {bare_name(name): tensor for name, tensor in own.items()}
    process = {name: tensor for name, tensor in beside.items() if not name.startswith(f"{network}.")}
    buffers = {name: tensor for name, tensor in process.items() if name not in weights}
    return state if process.keys() & state.keys() else {**buffers, **state}


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


def first_difference(expected: _State, state: _State) -> str | None:
    """One phrase on the first key that differs in presence or shape, or None."""
    for name, tensor in expected.items():
        if name not in state:
            return f"it has no {name!r}"
        if not isinstance(state[name], torch.Tensor):
            return f"{name!r} is a {type(state[name]).__name__}, not a tensor"
        if state[name].shape != tensor.shape:
            return f"{name!r} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
    unknown = next((name for name in state if name not in expected), None)
    return f"it has an unknown {unknown!r}" if unknown else None


def _forget_image_size(path: _Path, *diffusions: DiffusionProcess) -> None:
    for diffusion in diffusions:
        diffusion.image_size = None  # type: ignore[assignment]  # sampling then asks for it
    warnings.warn(f"{path} does not record image_size; give load_checkpoint(..., image_size=) to sample", stacklevel=3)
