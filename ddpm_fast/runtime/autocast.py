"""Autocast and narrow weights: the current setting, and calls of a network under it.

Everything here can be traced by dynamo in every release of torch that the package supports.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast where it is on for a type of device, else None."""
    # Small networks ask two hundred times in a forward pass, so the usual devices are not asked about.
    if device_type not in ("cpu", "cuda") and not _has_autocast(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def to_autocast_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that autocast gives a convolution; unchanged where it is off."""
    dtype = autocast_dtype(tensors[0].device.type)
    return tensors if dtype is None else tuple([tensor.to(dtype) for tensor in tensors])


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# As in extension.py: dynamo of torch 2.9 to 2.11 cannot trace the question, and the answer never changes.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A context without autocast: references compute in the dtype of their arguments, as the kernels do."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def uncached_autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast to `dtype` without its cache of cast weights; None leaves autocast as it is.

    The cache lives until the outermost autocast ends, and a recording would read it afterwards. A weight cast without
    gradients would, in some releases of torch, take the weight's gradient from a later pass.
    """
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def narrow_dtype(model: Callable) -> torch.dtype | None:
    """float16 or bfloat16 where the model's weights are that, and its inputs have to be; else None."""
    dtype = _weights_dtype(model)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def _weights_dtype(model: Callable) -> torch.dtype | None:
    if not isinstance(model, nn.Module):
        return None
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def call_model(
    model: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    x_self_cond: torch.Tensor | None = None,
    **conditions: torch.Tensor,
) -> torch.Tensor:
    """model(x, t, x_self_cond, **conditions), with floating point inputs in the dtype of weights that are not float32.

    With conditions an x_self_cond of None is left out: the model's third argument may be one of them.
    """
    dtype = _weights_dtype(model)
    if dtype not in (None, torch.float32):
        x, x_self_cond = x.to(dtype), None if x_self_cond is None else x_self_cond.to(dtype)
        conditions = {k: v.to(dtype) if v.is_floating_point() else v for k, v in conditions.items()}
    if conditions and x_self_cond is None:
        return model(x, t, **conditions)
    return model(x, t, x_self_cond, **conditions)
