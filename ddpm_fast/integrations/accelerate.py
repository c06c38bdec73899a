"""`accelerate(model)`: the blocks of a network run fused ops, and everything else about it stays.

    model = ddpm_fast.accelerate(model)
    print(ddpm_fast.explain(model))
    ddpm_fast.restore(model)

A module of a known class gets, as `__class__`, a subclass of its own class with another forward: `isinstance` holds,
and `type(module) is nn.Conv2d` does not. Its parameters, buffers, names, hooks and state dict are not touched; on CUDA
the weights of convolutions are laid out as cuDNN reads them (weights.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ddpm_fast.integrations import rules
from ddpm_fast.integrations.family import (
    Fast,
    handlers_around,
    known,
    load_families,
    made_class,
    options_for,
    path_of,
    why_own_forward,
    why_refused,
)
from ddpm_fast.integrations.weights import give_back_weights, lay_out_weights
from ddpm_fast.models.derived_weights import forget_derived
from ddpm_fast.models.stock import own_class
from ddpm_fast.runtime import dispatch

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Line:
    """One line of the table of `explain`.

    Args:
        path: name of the module in the network.
        cls: name of its class.
        runs: the op that computes it; None where its own forward does.
        reason: why its own forward does; None where the op does.
    """

    path: str
    cls: str
    runs: str | None
    reason: str | None


def accelerate(model: Thing) -> Thing:
    """Let the known blocks of a network run fused ops, in place.

    Args:
        model: a module, or a pipeline whose family knows it.

    Returns:
        The same object. Modules that no family knows, or that a family refuses, stay as they are; `explain(model)`
        says which, and why.

    Raises:
        TypeError: `model` is neither.
    """
    load_families()
    if not isinstance(model, nn.Module):
        _handlers(model)[0](model)
        return model
    for module in model.modules():
        known(own_class(module))
        if is_accelerated(module):
            continue
        for option in options_for(module):
            if why_refused(module, option) is None:
                _replace(module, option)
                lay_out_weights(module)
                break
    return model


def _replace(module: nn.Module, option: Fast) -> None:
    module.__class__ = made_class(type(module), option)
    for inner, its_option in () if option.inside is None else option.inside(module):
        if not is_accelerated(inner) and path_of(type(inner)) == its_option.path:
            if why_refused(inner, its_option) is None:
                _replace(inner, its_option)


def restore(model: Thing) -> Thing:
    """Give the modules of an accelerated network their own classes again, in place; returns the same object.

    Raises:
        TypeError: `model` is neither a module nor a pipeline whose family knows it.
    """
    load_families()
    if not isinstance(model, nn.Module):
        _handlers(model)[1](model)
        return model
    for module in model.modules():
        cls: Any = type(module)
        if not is_accelerated(module):
            continue
        forget_derived(module)
        give_back_weights(module)
        if cls.__dict__.get("_ddpm_fast_own") is not None:
            module.__class__ = cls._ddpm_fast_own
        else:  # a class that torch's parametrizations made for this module alone
            cls.__bases__ = tuple([getattr(base, "_ddpm_fast_own", base) for base in cls.__bases__])
    return model


def is_accelerated(module: nn.Module) -> bool:
    """True for a module that `accelerate` gave another forward."""
    return hasattr(type(module), "_ddpm_fast")


def table(model: nn.Module) -> list[Line]:
    """What every block of a network runs: those of known classes, and others that have weights of their own."""
    load_families()
    lines = []
    inside: list[str] = []  # an op computes what lies below these paths
    computed: dict[int, str] = {}  # modules that a network computes by an op of its own forward
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in inside):
            continue
        cls: Any = type(module)
        if is_accelerated(module):
            reason = why_own_forward(module) or _why_by_modules(module)
            lines.append(Line(path, cls.__name__, None if reason else cls._ddpm_fast.runs, reason))
            if reason is None and not cls._ddpm_fast.is_network:
                inside.append(f"{path}." if path else "")
            if reason is None and hasattr(module, "computed_modules"):
                computed |= {id(inner): runs for inner, runs in module.computed_modules()}
        elif id(module) in computed:
            lines.append(Line(path, cls.__name__, computed[id(module)], None))
        elif options_for(module) and (module._parameters or not cls.__module__.startswith("torch.")):
            reasons = [why_refused(module, option) for option in options_for(module)]
            reason = None if None in reasons else reasons[0]
            lines.append(Line(path, cls.__name__, None, reason or "the model is not accelerated"))
        elif module._parameters:
            lines.append(Line(path, cls.__name__, None, "no family knows its class"))
    return lines


def _why_by_modules(module: Any) -> str | None:
    return module.why_by_modules() if hasattr(module, "why_by_modules") else None


def lines_of_explain(model: object) -> Iterator[str]:
    """The lines of `explain` of an accelerated network; none of anything else."""
    if not isinstance(model, nn.Module):
        return
    if not any(is_accelerated(module) for module in model.modules()):
        return
    lines = table(model)
    widths = [max(len(line.path) for line in lines), max(len(line.cls) for line in lines)]
    for line in lines:
        runs = line.runs or f"its own forward: {line.reason}"
        yield f"{line.path.ljust(widths[0])}  {line.cls.ljust(widths[1])}  {runs}"
    kinds = sorted({line.runs for line in lines if line.runs})
    for rule in dict.fromkeys(rule for kind in kinds for rule in rules.rules_for(kind)):
        yield f"{rule.runs or 'every block'} keeps its own forward where {rule.clause}"


def _handlers(thing: object) -> Any:
    found = handlers_around(thing)
    if found is None:
        raise TypeError(f"model must be a torch.nn.Module or a known pipeline, got {type(thing).__name__}")
    return found


dispatch.accounts.append(lines_of_explain)
