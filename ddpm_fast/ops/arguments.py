"""Checks of arguments and reasons for refusal that the ops on feature maps share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch

from ddpm_fast.runtime import dispatch, extension, triton_launch

_CPU = torch.device("cpu")
_FLOAT64 = torch.float64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(given: Mapping[str, torch.Tensor | None], optional: Sequence[str] = ()) -> None:
    """Types, floating dtypes and devices of arguments by name.

    Args:
        given: the first is the one on whose device the others must be.
        optional: names of those that may be None.

    Raises:
        TypeError, ValueError: one sentence that names the wrong argument.
    """
    first, device = next(iter(given)), None
    for name, tensor in given.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of {first}, {device}, got {tensor.device}")


def check_seed(dropout_p: float, seed: torch.Tensor | None, device: torch.device) -> None:
    """Raise TypeError or ValueError where these are no probability and the seed that it needs, on the device of x."""
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError("seed must be given where dropout_p > 0, got None")
    if seed is None:
        return
    if not isinstance(seed, torch.Tensor):
        raise TypeError(f"seed must be a tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed must be a one-element int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed must be on the device of x, {device}, got {seed.device}")


def why_steps_come_first(x: torch.Tensor, *args: object, **kwargs: object) -> str | None:
    """Why a native block yields to the ops of its steps, in one clause; None where it does not."""
    return "Triton runs the block's steps" if triton_launch.why_not_triton(x.device) is None else None


def native_comes_first(x: torch.Tensor) -> bool:
    """Whether native code runs every call that fits it: then an op may ask `Operator.fitting` before its own checks."""
    if torch.compiler.is_compiling() or not (isinstance(x, torch.Tensor) and x.is_cpu and dispatch.chooses_freely()):
        return False
    return triton_launch.why_not_triton(_CPU) is not None and extension.why_not(_CPU) is None


def why_not_on_cpu(
    given: Mapping[str, torch.Tensor | None], maps: Sequence[str] = (), may_be_empty: Sequence[str] = ()
) -> str | None:
    """Why the CPU's native kernels refuse these arguments, in one clause; None where they do not.

    Args:
        given: arguments by name, None for those that there are not; the first says on which device all are.
        maps: names of those that must be channels-last.
        may_be_empty: names of those that may have no elements.
    """
    first = cast("torch.Tensor", next(iter(given.values())))  # the first is never None
    reason = extension.why_not(first.device)
    if reason is not None:
        return reason
    if first.device.type != "cpu":
        return f"tensors are on {first.device.type}, and this native code is the CPU's"
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.dtype == _FLOAT64:
            return f"{name} is torch.float64, and native code computes in float32"
        if tensor.numel() == 0 and name not in may_be_empty:
            return f"{name} is empty"
    for name in maps:
        tensor = given[name]
        if tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
            return f"{name} is not channels-last, its strides are {tensor.stride()}"
    return None
