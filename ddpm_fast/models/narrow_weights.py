"""Copies of a network's weights in autocast's dtype, made by one multi-tensor pass.

Under autocast a convolution reads its weight in a half type, and casts it in every call: two launches per parameter
and step, forward and backward, most of them shorter than an empty launch. A `Unet` makes all copies at once before its
first module runs, and its gradients arrive in float32 by one pass, too. A cast is a cast: results are the same.

Only where Triton's kernels run: native code on the CPU reads float32 weights. A network in which anything could renew a
weight while it runs, such as a hook or a module of unknown class, casts weights one by one, when they are read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ddpm_fast.models.stock import calls_every_module, parameter, renews_no_weight
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.autocast import autocast_dtype
from ddpm_fast.runtime.dispatch import in_forward_mode

Copies = Mapping[Hashable, torch.Tensor]

# A weight, or several whose copies stand side by side along their first dimension, as one tensor.
Group = tuple[torch.Tensor, ...]

# Thread → the copies that its running network reads.
_read: dict[int, Copies] = {}


def narrow(module: Any, name: str) -> Any:
    """The parameter of a module, or its copy in autocast's dtype if the running network has made one."""
    found = parameter(module, name)
    if torch.compiler.is_compiling() or not _read:
        return found
    copies = _read.get(threading.get_ident())
    return found if copies is None else copies.get(id(found), found)


def narrow_group(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The copies of several weights as one tensor, if the running network has made them so."""
    if torch.compiler.is_compiling() or not _read:
        return None
    copies = _read.get(threading.get_ident())
    return None if copies is None else copies.get(_key(weights))


@contextlib.contextmanager
def reading(copies: Copies | None) -> Iterator[None]:
    """Inside, this thread's modules read these copies; their parameters if None."""
    thread = threading.get_ident()
    before = _read.pop(thread, None)
    if copies is not None:
        _read[thread] = copies
    try:
        yield
    finally:
        _read.pop(thread, None)
        if before is not None:
            _read[thread] = before


def dtype_of_copies(device: torch.device) -> torch.dtype | None:
    """The half type that autocast gives convolutions on a device where weights are copied at once; else None."""
    if torch.compiler.is_compiling() or triton_launch.why_not_triton(device) is not None or in_forward_mode():
        return None
    dtype = autocast_dtype(device.type)
    return dtype if dtype in (torch.float16, torch.bfloat16) else None


def groups_of(network: nn.Module, device: torch.device) -> list[list[Group]]:
    """The weights that the network's modules read in autocast's dtype; empty where a module could renew one.

    One list, or, where processes share gradients, one for each child and entry of a child, see `_ByPart`.
    """
    if calls_every_module():
        return []
    parts: list[list[Group]] = [[]]
    for i, top in enumerate((None, *_parts(network))):
        if i and _shares_gradients():
            parts.append([])
        for module in (network,) if top is None else _inside(top):
            if not renews_no_weight(module):
                return []
            groups: Any = getattr(type(module), "narrow_groups", None)
            if groups is not None:
                parts[-1] += [group for group in groups(module) if _may_copy(group, device)]
    return [part for part in parts if part]


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


def _inside(top: nn.Module) -> dict[nn.Module, None]:
    """What `top.modules()` gives, in another order and in a fraction of the time."""
    found = [top]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return dict.fromkeys(found)


def _shares_gradients() -> bool:
    return torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized()


def _may_copy(group: Group, device: torch.device) -> bool:
    """True for plain float32 tensors on a device, contiguous if there are several."""
    return all(
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.dtype is torch.float32
        and weight.device == device
        and (len(group) == 1 or weight.is_contiguous())
        for weight in group
    )


def copy_weights(network: nn.Module, device: torch.device) -> Copies | None:
    """Copies for one call of a network, through which gradients flow; None where weights are cast one by one."""
    dtype = dtype_of_copies(device)
    if dtype is None:
        return None
    parts = groups_of(network, device)
    if len(parts) > 1:
        return _ByPart(parts, dtype)
    return copies_of(parts[0], dtype) if parts else None


class _ByPart(dict[Hashable, torch.Tensor]):
    """Copies that are made part by part, each when it is first read.

    Autograd runs what was made last first: gradients of a part's weights arrive when backward leaves the part, so that
    their exchange between processes overlaps with the rest. Those of one pass before the network would arrive at its
    end.
    """

    def __init__(self, parts: list[list[Group]], dtype: torch.dtype):
        self._dtype = dtype
        self._unread = {_key(group): part for part in parts for group in part}

    def get(self, key: Hashable, default: Any = None) -> Any:
        part = self._unread.get(key)
        if part is not None:
            self.update(copies_of(part, self._dtype))
            for group in part:
                del self._unread[_key(group)]
        return super().get(key, default)


def copies_of(groups: Sequence[Group], dtype: torch.dtype) -> dict[Hashable, torch.Tensor]:
    """Key of a group → its copy."""
    weights = [weight for group in groups for weight in group]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        made = _Narrow.apply(dtype, [len(group) for group in groups], *weights)
    else:
        made = _copy(groups, dtype)
    return {_key(group): copy for group, copy in zip(groups, made, strict=True)}


def _key(weights: Sequence[torch.Tensor]) -> Hashable:
    return id(weights[0]) if len(weights) == 1 else tuple([id(weight) for weight in weights])


def _copy(groups: Sequence[Group], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    copies: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    with torch.no_grad():
        for group in groups:
            if len(group) == 1:
                copies.append(torch.empty_like(group[0], dtype=dtype))
                parts: Sequence[torch.Tensor] = copies[-1:]
            else:
                rows = [weight.shape[0] for weight in group]
                copies.append(group[0].new_empty((sum(rows), *group[0].shape[1:]), dtype=dtype))
                parts = copies[-1].split(rows)
            for part, weight in zip(parts, group, strict=True):
                if part.stride() == weight.stride():
                    targets.append(part)
                    sources.append(weight)
                else:  # of tensors in another layout torch copies a whole list one by one
                    part.copy_(weight)
        if targets:
            torch._foreach_copy_(targets, sources)
    return tuple(copies)


class _Narrow(torch.autograd.Function):
    """Keeps nothing; can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, sizes: list[int], *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes = sizes
        ctx.layouts = [(weight.shape, weight.stride()) for weight in weights]
        rest = iter(weights)
        groups = [tuple([next(rest) for _ in range(size)]) for size in sizes]
        copies = _copy(groups, dtype)
        frozen = [
            copy
            for copy, group in zip(copies, groups, strict=True)
            if not any(weight.requires_grad for weight in group)
        ]
        ctx.mark_non_differentiable(*frozen)
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        parts: list[torch.Tensor | None] = []
        first = 0
        for grad, size in zip(grads, ctx.sizes, strict=True):
            shapes = [shape for shape, _ in ctx.layouts[first : first + size]]
            first += size
            if grad is None or size == 1:
                parts += [grad] * size
            else:
                parts += grad.split([shape[0] for shape in shapes])
        needed = zip(parts, ctx.needs_input_grad[2:], strict=True)
        parts = [part if needs else None for part, needs in needed]
        if torch.is_grad_enabled():
            return None, None, *(None if part is None else part.float() for part in parts)
        return None, None, *_widened(parts, ctx.layouts)


def _widened(parts: list[torch.Tensor | None], layouts: list[tuple]) -> list[torch.Tensor | None]:
    """Gradients in float32, laid out as their weights, so that autograd takes them as they are."""
    made: list[torch.Tensor | None] = []
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for part, (shape, stride) in zip(parts, layouts, strict=True):
        if part is None:
            made.append(None)
            continue
        # Strides of dimensions of one element may differ.
        alike = all(size == 1 or one == other for size, one, other in zip(shape, part.stride(), stride, strict=True))
        widened = torch.empty_strided(shape, part.stride() if alike else stride, device=part.device)
        made.append(widened)
        if alike:
            targets.append(widened)
            sources.append(part)
        else:
            widened.copy_(part)
    if targets:
        torch._foreach_copy_(targets, sources)
    return made
