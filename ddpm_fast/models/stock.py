"""Stock modules: those of the network that nobody replaced, and whose weights may therefore be used without a call.

Whatever a user does to a module (hooks, patched forward, wrapper, subclass, LoRA) makes its block call its modules.
"""

from __future__ import annotations

import torch
from torch import nn

_STOCK = {nn.Conv2d, nn.Linear, nn.Identity, nn.SiLU, nn.Dropout, nn.GroupNorm, nn.Sequential}


def stock(cls: type[nn.Module]) -> type[nn.Module]:
    """A decorator: modules of this class, and of no subclass, are stock."""
    _STOCK.add(cls)
    return cls


def is_unmodified(*modules: nn.Module) -> bool:
    """True if every module is stock and has no hooks, so its weights may be used without calling it."""
    for module in modules:  # dicts, not attributes: a small network asks two hundred times in a forward pass
        own = module.__dict__
        if type(module) not in _STOCK or "forward" in own:
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True


def parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """module.name, found in a fraction of the time where it is a parameter, as it nearly always is."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found
