"""The weights in the contents of a checkpoint, and those of its average, under the names of what loads them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ddpm_fast.runtime.plain import shown
from ddpm_fast.training.checkpoint_files import CheckpointError
from ddpm_fast.training.state_names import AmbiguousNamesError, FoundStates, bare_name, find_states

_Path = str | os.PathLike
_State = Mapping[str, torch.Tensor]


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
    """Raise CheckpointError for a trainer's dictionary whose `ema` holds no network, or no usable counters."""
    if "step" in contents and contents.get("ema") is not None and states.average is None:
        raise CheckpointError(f"checkpoint {path} has no network in its 'ema'")
    for name, value in states.counters.items():
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise CheckpointError(f"checkpoint {path} has no usable {name!r} in its 'ema': got {shown(value)}")


def exact_states(contents: Mapping, path: _Path, network: str = "model.") -> FoundStates:
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
    for name in entries:
        if not isinstance(name, str):
            raise CheckpointError(f"checkpoint {path} has an entry in its 'ema' whose name is no text: {shown(name)}")
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


def as_named_in(module: nn.Module, state: _State) -> dict[str, torch.Tensor]:
    """The state with the wrappers' parts that the module has in its names."""
    own = module.state_dict()
    if state.keys() == own.keys():
        return dict(state)
    names = {bare_name(name): name for name in own}
    return {names.get(bare_name(name), name): tensor for name, tensor in state.items()}


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


def load_matching(module: nn.Module, state: _State, path: _Path) -> None:
    """`load_state_dict(strict=True)`; CheckpointError names the first key that is missing, unknown or misshapen.

    The names in the state may lack what `torch.compile` and other wrappers add to the module's.
    """
    state = as_named_in(module, state)
    difference = first_difference(module.state_dict(), state)
    if difference:
        raise CheckpointError(f"checkpoint {path} is of another architecture: {difference}")
    module.load_state_dict(state)


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
