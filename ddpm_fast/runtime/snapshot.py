"""Whether anything that a recording stands on has changed, asked before every replay.

Thousands of entries are compared: by C++ where there is the extension (csrc/python/snapshot.h), else here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import nn

from ddpm_fast.runtime import extension, recording

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_FACTS: tuple[Callable[[torch.Tensor], object], ...] = (
    torch.Tensor.data_ptr,
    torch.Tensor.stride,
    torch.Tensor.size,
    attrgetter("dtype"),
    attrgetter("requires_grad"),
)


class Snapshot:
    """A model and what belongs to it as they are now; `holds` says whether they still are.

    Attributes of modules and entries of their dictionaries (parameters, buffers, submodules, hooks) are compared by
    identity, tensors by address and layout, and the forwards of all their classes. So `holds` may say False where an
    equal value was assigned, and never True where something was replaced, added or taken away.

    What is in the model is kept alive, and the model itself is not.

    Args:
        model: the module whose calls are recorded, with all modules inside.
        dicts: further dictionaries whose entries count, such as an optimizer's state.
        lists: further lists.
        tensors: further tensors.
        is_called: False for a model of which only its parameters and buffers count, and no attribute, hook and setting.
    """

    def __init__(
        self,
        model: nn.Module,
        dicts: Iterable[dict] = (),
        lists: Iterable[list] = (),
        tensors: Iterable[torch.Tensor] = (),
        is_called: bool = True,
    ):
        modules = list(model.modules())
        self._model, self._class = weakref.ref(model), type(model)
        self._forwards = _forwards_of(set(map(type, modules))) if is_called else {}
        parameters = list(model.parameters())
        self._parameters = parameters if is_called else []
        self._hooks = [list(map(attrgetter(name), self._parameters)) for name in _HOOKS]
        compared = [*dicts, *(_hooks_of_every_module() if is_called else ())]
        compared += [hooks for hooks in chain(*self._hooks) if hooks is not None]
        for module in modules:
            own = vars(module)
            if is_called:
                compared += (own, *(value for value in own.values() if isinstance(value, dict)))
            else:
                compared += (own["_parameters"], own["_buffers"], own["_modules"])
        native = extension.load()
        comparison = _Comparison if native is None else native.Snapshot
        self._comparison = comparison(compared, list(lists), modules[1:], [*parameters, *model.buffers(), *tensors])
        self._settings = recording.settings() if is_called else None

    def holds(self) -> bool:
        """True if nothing has been replaced since."""
        return (
            type(self._model()) is self._class
            and self._comparison.holds()
            and all(vars(cls).get("forward") is forward for cls, forward in self._forwards.items())
            and all(
                all(map(is_, map(attrgetter(name), self._parameters), hooks))
                for name, hooks in zip(_HOOKS, self._hooks, strict=True)
            )
            and (self._settings is None or recording.settings() == self._settings)
        )


class _Comparison:
    """What csrc/python/snapshot.h does, in loops of Python's own C."""

    def __init__(self, dicts: list[dict], lists: list[list], objects: list[Any], tensors: list[torch.Tensor]):
        self._dicts, self._lists, self._objects, self._tensors = dicts, lists, objects, tensors
        self._lengths = list(map(len, chain(dicts, lists)))
        self._entries = list(self._all_entries())
        self._types = list(map(type, objects))
        self._facts = [list(map(fact, tensors)) for fact in _FACTS]

    def holds(self) -> bool:
        return (
            all(map(eq, map(len, chain(self._dicts, self._lists)), self._lengths))
            and all(map(is_, self._all_entries(), self._entries))
            and all(map(is_, map(type, self._objects), self._types))
            and all(all(map(eq, map(f, self._tensors), was)) for f, was in zip(_FACTS, self._facts, strict=True))
        )

    def _all_entries(self) -> Iterable[object]:
        return chain(chain.from_iterable(map(dict.values, self._dicts)), chain.from_iterable(self._lists))


def _forwards_of(classes: set[type]) -> dict[type, object]:
    """The forward of each class and of each that it inherits from, None where it has none of its own."""
    return {base: vars(base).get("forward") for cls in classes for base in cls.__mro__}


def _hooks_of_every_module() -> tuple[dict, ...]:
    module = nn.modules.module
    return (
        module._global_forward_hooks,
        module._global_forward_pre_hooks,
        module._global_backward_hooks,
        module._global_backward_pre_hooks,
    )
