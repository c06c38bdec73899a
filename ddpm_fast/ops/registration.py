"""Registers operators with torch.library, and calls kernels without its dispatcher where nothing watches.

A call from Python costs torch's dispatcher about 100 µs where the operator's autograd is Python's. So a call that
nothing watches goes through one autograd function straight to the kernel's launch; the registered operator serves
torch.compile, modes, torch.func, tracing and subclasses of tensors.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._C import (
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)

from ddpm_fast.runtime import extension

library = torch.library.Library("ddpm_fast", "FRAGMENT")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def define(name: str, signature: str, fake: Callable) -> torch._ops.OpOverload:
    library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.ddpm_fast, name).default
    names = [argument.name for argument in operator._schema.arguments]

    def checked(*values: Any, **named: Any) -> Any:
        _check_meta({**dict(zip(names, values, strict=False)), **named})
        return fake(*values, **named)

    torch.library.register_fake(f"ddpm_fast::{name}", checked, lib=library)
    return operator


def _check_meta(given: dict[str, Any]) -> None:
    """Raise ValueError for an argument on meta among real ones: a fake would return memory that nobody has written."""
    plain = {name: value for name, value in given.items() if type(value) in _PLAIN}
    real = next((name for name, value in plain.items() if not value.is_meta), None)
    on_meta = next((name for name, value in plain.items() if value.is_meta), None)
    if real is not None and on_meta is not None:
        raise ValueError(f"{on_meta} must be on the device of {real}, {plain[real].device}, got meta")


def launcher(module: str, name: str) -> Callable:
    """The function of a name in a module, which the first call imports."""

    def launch(*values: Any) -> Any:
        return getattr(sys.modules.get(module) or importlib.import_module(module), name)(*values)

    return launch


def implement(name: str, function: Callable) -> None:
    for device in ("CPU", "CUDA"):  # on the CPU, Triton's interpreter
        library.impl(name, function, device)


def below_autograd(operator: torch._ops.OpOverload) -> Callable:
    """A native operator without its autograd, which is Python's."""
    function = operator._op  # what its __call__ calls, with one copy of the arguments less

    def call(*values: Any) -> Any:
        with _AutoDispatchBelowAutograd():
            return function(*values)

    return call


def autograd_of(name: str, forward: Callable, backward: Callable) -> Callable:
    """Calls `forward` such that autograd calls `backward`."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]  # without the steps for torch.func


def unless_watched(
    operator: Callable, direct: Callable, places: tuple[int, ...], differentiable: Callable[[], Callable] | None = None
) -> Callable:
    """Calls `direct`, or the registered operator where something sees or changes operators.

    Args:
        places: of tensors among the arguments.
        differentiable: returns the function that is called instead of `direct` where an argument takes a gradient.
    """
    if operator is direct:
        return operator

    def call(*values: Any) -> Any:
        if _is_watched(values, places):
            return operator(*values)
        if differentiable is not None and torch.is_grad_enabled() and _any_requires_grad(*values):
            return differentiable()(*values)
        return direct(*values)

    return call


def by_extension(
    operator: Callable, otherwise: Callable, description: tuple
) -> tuple[Callable, Callable[[], Callable]]:
    """The direct call of a native operator and its autograd in C++, csrc/python/native_operator.cpp.

    Args:
        otherwise: takes the calls that C++ leaves alone, and all where there is no extension.
        description: of the operator, see `Operator._description`.

    Returns:
        The call, which loads the extension when it is first made, and `Operator.fitting`.
    """

    @cache
    def functions() -> tuple[Callable, Callable]:
        module = extension.load()
        return (otherwise, lambda *_: None) if module is None else module.native_operator(*description, otherwise)

    def call(*values: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*values)
        return functions()[0](*values)

    return call, lambda: functions()[1]


def _is_watched(values: tuple, places: tuple[int, ...]) -> bool:
    """Whether torch's dispatcher has more to do than to find the kernel for these arguments."""
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
    ):
        return True
    for place in places:
        tensor = values[place]
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta or tensor.is_neg()):
            return True
    return False


def may_read(tensor: torch.Tensor) -> bool:
    """Whether the host may read a tensor's values: on the CPU, where nothing records, traces or transforms the call."""
    return tensor.device.type == "cpu" and not _is_watched((tensor,), (0,))
