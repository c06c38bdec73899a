"""Which tensors of a file are the network's, the process's and the average's, whatever they are wrapped in.

A file may be a trainer's dictionary, a state dict of a network, a process or an EMA, or a dictionary around one of
them. Wrappers put prefixes before the names: DistributedDataParallel `module.`, `torch.compile` `_orig_mod.`,
ema-pytorch `online_model.` and `ema_model.`, Lightning the attribute's name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

_State = dict[str, torch.Tensor]

# Parts of a name that a wrapper adds and that say nothing about the tensor.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The attributes that are the network, by process; found states call it by the first.
_NETWORK = ("model", "net")
# Parts of a process that have weights of their own.
_PARTS_OF_PROCESSES = ("uncertainty", "log_snr", "timestep_history")
_IS_AVERAGE = re.compile(r"(^|_)ema(_|$)")
_IS_ONLINE = re.compile(r"^online(_|$)")


class AmbiguousNamesError(ValueError):
    """Two tensors or networks of a file could be the one that is looked for."""


class FoundStates(NamedTuple):
    """State dicts with the names of a process: `model.` before the network's, none before what stands beside it.

    model: the weights. has_process: buffers or weights of the process are there, too. network_name: the attribute that
    is the network in the file, None where only a network is known. average: the EMA's weights, or None.
    counters: `initted` and `step` of an EMA, where the file has them. stripped: parts of names that were taken off.
    left_out: names of tensors that belong to none of these.
    """

    model: _State
    has_process: bool
    average: _State | None
    counters: _State
    stripped: list[str]
    left_out: list[str]
    network_name: str | None = None


def bare_name(name: str) -> str:
    """The name without the parts that wrappers add anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def find_states(
    contents: Mapping,
    network_names: Sequence[str],
    process_names: Collection[str] | None = None,
    attribute: str | None = None,
) -> FoundStates | None:
    """The states in a file, or None if there is no network whose first name is `network_names[0]`.

    network_names: names of the network, with no wrapper's parts; the first one finds it, the others choose among many.
    process_names: names of the process outside of the network; None takes those without a dot, if `betas` is there,
    and those of weights that processes have.
    attribute: the name of the network in the process that the file is known to be of; None: it is not known.

    Raises:
        AmbiguousNamesError: with both places.
    """
    raw = dict(_tensors(contents))
    raw_names = _raw_names(raw)
    prefixes = [name.removesuffix(network_names[0]) for name in raw_names if _ends_with(name, network_names[0])]
    roles: dict[str, list[str]] = {"model": [], "online": [], "average": []}
    for candidate in prefixes:
        roles[_role(candidate)].append(candidate)
    chosen = {role: _one(found, network_names, raw_names) for role, found in roles.items()}
    places = [place for place in chosen.values() if place is not None]
    if not places:
        return None
    prefix = places[0]

    buffers = _buffers(prefix, raw_names, process_names)
    names = {**buffers, **_under(prefix, raw_names)}
    model = {name: raw[raw_names[place]] for name, place in names.items()}
    used = set(names.values()) | {place for name in roles["online"] for place in _all_of(name, raw_names)}
    average, counters = None, {}
    if chosen["average"] is not None:
        average_names = {
            **_buffers(chosen["average"], raw_names, process_names),
            **_under(chosen["average"], raw_names),
        }
        average = {name: raw[raw_names[place]] for name, place in average_names.items()}
        around = _around_average(chosen["average"])
        counter_names = {name: around + name for name in ("initted", "step") if around + name in raw_names}
        counters = {name: raw[raw_names[place]] for name, place in counter_names.items()}
        used |= set(average_names.values()) | set(counter_names.values())
    network_name = _network_name(prefix)
    # EDM has no buffers; the frequencies that upstream's network must have tell it from a wrapper's `net.`.
    is_edm = network_name == "net" and f"{prefix}time_mlp.0.weights" in raw_names
    is_named = bool(buffers) or is_edm or (network_name is not None and network_name == attribute)
    base = _base(prefix) if is_named else prefix
    stripped = _stripped(contents, base, [raw_names[place] for place in names.values()])
    left_out = [raw_names[place] for place in raw_names if place not in used]
    return FoundStates(model, is_named, average, counters, stripped, left_out, network_name if is_named else None)


def _tensors(contents: Mapping, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of nested dictionaries, with dots between the keys."""
    for key, value in contents.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            yield prefix + key, value
        elif isinstance(key, str) and isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")


def _raw_names(raw: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Bare name → name in the file; two that become one must hold the same numbers."""
    names: dict[str, str] = {}
    for name in raw:
        bare = bare_name(name)
        earlier = names.setdefault(bare, name)
        if earlier != name and not torch.equal(raw[earlier], raw[name]):
            raise AmbiguousNamesError(f"it holds both {earlier!r} and {name!r}")
    return names


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _role(prefix: str) -> str:
    """What the last telling part of a prefix says of the weights."""
    for part in reversed(prefix.split(".")):
        if _IS_ONLINE.search(part):
            return "online"
        if _IS_AVERAGE.search(part):
            return "average"
    return "model"


def _one(prefixes: list[str], network_names: Sequence[str], names: Mapping[str, str]) -> str | None:
    """The one prefix of a network with all these names, or the only one at all; None if there is none."""
    whole = [prefix for prefix in prefixes if all(prefix + name in names for name in network_names)]
    candidates = whole or prefixes
    if len(candidates) > 1:
        first, second = (names[prefix + network_names[0]] for prefix in candidates[:2])
        raise AmbiguousNamesError(f"it holds two networks, with {first!r} and {second!r}")
    return candidates[0] if candidates else None


def _all_of(prefix: str, names: Iterable[str]) -> Iterator[str]:
    """Names of the network at this prefix, and of what stands beside it."""
    base = _base(prefix)
    return (name for name in names if name.startswith(base))


def _under(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Name in a process → bare name, of the network at this prefix."""
    return {f"model.{name.removeprefix(prefix)}": name for name in names if name.startswith(prefix)}


def _buffers(prefix: str, names: Collection[str], process_names: Collection[str] | None) -> dict[str, str]:
    """Name in a process → bare name, of the process around the network at this prefix; nothing if there is none."""
    base = _base(prefix)
    if base == prefix or (base and not base.endswith(".")):
        return {}
    if process_names is not None:
        return {name: base + name for name in process_names if base + name in names}
    beside = [name.removeprefix(base) for name in names if name.startswith(base) and not name.startswith(prefix)]
    has_buffers = f"{base}betas" in names
    wanted = [name for name in beside if name.split(".")[0] in _PARTS_OF_PROCESSES or (has_buffers and "." not in name)]
    return {name: base + name for name in wanted}


def _network_name(prefix: str) -> str | None:
    """The attribute at the end of a network's prefix, where it may be a process's."""
    last = prefix.removesuffix(".").rpartition(".")[2]
    return last if last in _NETWORK else None


def _base(prefix: str) -> str:
    """What stands before a network's attribute."""
    name = _network_name(prefix)
    return prefix if name is None else prefix.removesuffix(f"{name}.")


def _around_average(prefix: str) -> str:
    """The prefix of the EMA that holds the network at this prefix."""
    parts = prefix.split(".")
    last = max(index for index, part in enumerate(parts) if _IS_AVERAGE.search(part))
    return "".join(f"{part}." for part in parts[:last])


def _stripped(contents: Mapping, base: str, raw_names: Sequence[str]) -> list[str]:
    """Parts that were taken off the names; a dictionary's key `model` is none."""
    parts = base.split(".")[:-1]
    if parts[:1] == ["model"] and isinstance(contents.get("model"), Mapping):
        parts = parts[1:]
    wrappers = [part for name in raw_names for part in name.split(".") if part in _WRAPPERS]
    return list(dict.fromkeys([*parts, *wrappers]))
