"""Copies of a network's weights in autocast's dtype, made by one multi-tensor pass.

Under autocast a convolution reads its weight in a half type, and casts it in every call: two launches per parameter
and step, forward and backward, most of them shorter than an empty launch. A `Unet` makes all copies at once before its
first module runs, and its gradients arrive in float32 by one pass, too. A cast is a cast: results are the same.

A step whose optimizer reads gradients in half types takes them as they are instead, see `KeptCopies.read`.

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
from ddpm_fast.runtime.threads import of_this_thread

Copies = Mapping[Hashable, torch.Tensor]

# A weight, or several whose copies stand side by side along their first dimension, as one tensor.
Group = tuple[torch.Tensor, ...]

# Weight → its gradient.
Gradients = dict[torch.Tensor, torch.Tensor]

_ALIGNED = 8  # elements of a half type between the addresses from which accesses are widest

# Thread → the copies that its running network reads.
_read: dict[int, Copies] = {}
# Thread → copies that calls of one network may read.
_kept: dict[int, KeptCopies] = {}


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


def reading(copies: Copies | None) -> contextlib.AbstractContextManager[None]:
    """Inside, this thread's modules read these copies; their parameters if None."""
    return of_this_thread(_read, copies)


class KeptCopies:
    """Copies of a network's weights that outlive a call, for an optimizer that writes them as it moves the weights.

    Whoever keeps them answers for their being up to date: `is_current` sees what torch's operators have written since
    `now_current`, and not what was written through `.data`.

    Attributes:
        parts: weight → its part of a copy.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype):
        self.network, self._dtype = network, dtype
        self.groups = _all_groups(network, device)
        self._weights = [weight for group in self.groups for weight in group]
        with torch.no_grad():
            self.copies = _copy(self.groups, dtype)
        self.parts: dict[torch.Tensor, torch.Tensor] = {}
        for group, copy in zip(self.groups, self.copies, strict=True):
            rows = [weight.shape[0] for weight in group]
            self.parts.update(zip(group, [copy] if len(group) == 1 else copy.split(rows), strict=True))
        self._versions: list[int] = []
        self._gradients: Gradients | None = None
        self.now_current()

    def fit(self, device: torch.device, dtype: torch.dtype) -> bool:
        """True if the network has the same weights still."""
        groups = _all_groups(self.network, device)
        return dtype is self._dtype and list(map(_key, groups)) == list(map(_key, self.groups))

    def why_not_written(self) -> str | None:
        """Why one pass over weights and copies cannot write these, in one clause; None where it can."""
        if not self.parts:
            return "the network's weights are cast when they are read"
        for weight, part in self.parts.items():
            if not _are_alike(weight.shape, weight.stride(), part.stride()):
                return f"a copy of strides {part.stride()} is of a weight of strides {weight.stride()}"
        return None

    def is_current(self) -> bool:
        """True if no operator of torch has written a weight since `now_current`."""
        return [weight._version for weight in self._weights] == self._versions

    def now_current(self) -> None:
        """The copies were written after the last change of the weights."""
        self._versions = [weight._version for weight in self._weights]

    @torch.no_grad()
    def refresh(self) -> None:
        """Write all copies."""
        _copy(self.groups, self._dtype, self.copies)
        self.now_current()

    @contextlib.contextmanager
    def read(self, gradients: Gradients | None = None) -> Iterator[None]:
        """Inside, calls of the network in this thread read these copies.

        Args:
            gradients: takes, in backward, gradients of weights as they arrive, in the copies' dtype. Such a weight's
                `.grad` is what arrives otherwise, from a second call or a reader of the weight itself, mostly nothing;
                its gradient is the sum of both. Hooks of the weights see only `.grad`.
        """
        thread = threading.get_ident()
        _kept[thread], self._gradients = self, gradients
        try:
            yield
        finally:
            del _kept[thread]
            self._gradients = None


def _all_groups(network: nn.Module, device: torch.device) -> list[Group]:
    return [group for part in groups_of(network, device) for group in part]


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
    kept = _kept.get(threading.get_ident())
    if kept is not None and kept.network is network and kept.copies and kept.copies[0].dtype is dtype:
        return copies_of(kept.groups, dtype, kept.copies, kept._gradients)
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


def copies_of(
    groups: Sequence[Group],
    dtype: torch.dtype,
    made: Sequence[torch.Tensor] | None = None,
    gradients: Gradients | None = None,
) -> dict[Hashable, torch.Tensor]:
    """Key of a group → its copy; of those that are made already, only what gradients flow through.

    `gradients` is that of `KeptCopies.read`.
    """
    weights = [weight for group in groups for weight in group]
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        made = _Narrow.apply(dtype, [len(group) for group in groups], made, gradients, *weights)
    elif made is None:
        made = _copy(groups, dtype)
    return {_key(group): copy for group, copy in zip(groups, made, strict=True)}


def _key(weights: Sequence[torch.Tensor]) -> Hashable:
    return id(weights[0]) if len(weights) == 1 else tuple([id(weight) for weight in weights])


def _copy(
    groups: Sequence[Group], dtype: torch.dtype, into: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...]:
    """A copy of each group, in new memory or in that of earlier copies."""
    copies: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    with torch.no_grad():
        for i, group in enumerate(groups):
            rows = [weight.shape[0] for weight in group] if len(group) > 1 else []
            if into is not None:
                copies.append(into[i])
            elif rows:
                copies.append(group[0].new_empty((sum(rows), *group[0].shape[1:]), dtype=dtype))
            else:
                copies.append(torch.empty_like(group[0], dtype=dtype))
            parts: Sequence[torch.Tensor] = copies[-1].split(rows) if rows else copies[-1:]
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
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        sizes: list[int],
        made: Sequence[torch.Tensor] | None,
        gradients: Gradients | None,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.gradients = sizes, gradients
        ctx.weights = () if gradients is None else weights
        ctx.layouts = [(weight.shape, weight.stride()) for weight in weights]
        rest = iter(weights)
        groups = [tuple([next(rest) for _ in range(size)]) for size in sizes]
        copies = _copy(groups, dtype) if made is None else tuple([copy.detach() for copy in made])
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
        needed = zip(parts, ctx.needs_input_grad[4:], strict=True)
        parts = [part if needs else None for part, needs in needed]
        if torch.is_grad_enabled():
            return None, None, None, None, *(None if part is None else part.float() for part in parts)
        if ctx.gradients is not None:
            parts = _not_taken(ctx.gradients, ctx.weights, parts)
        return None, None, None, None, *_widened(parts, ctx.layouts)


def _not_taken(
    gradients: Gradients, weights: Sequence[torch.Tensor], parts: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Those parts, None for the others, of which `gradients` has one already, or that a kernel would read slowly."""
    left: list[torch.Tensor | None] = []
    for weight, part in zip(weights, parts, strict=True):
        if part is not None and weight not in gradients and part.storage_offset() % _ALIGNED == 0:
            if _are_alike(weight.shape, weight.stride(), part.stride()):
                gradients[weight], part = part, None
        left.append(part)
    return left


def _are_alike(shape: Sequence[int], one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether strides are of the same layout; those of dimensions of one element may differ."""
    return all(size == 1 or a == b for size, a, b in zip(shape, one, other, strict=True))


def _widened(parts: list[torch.Tensor | None], layouts: list[tuple]) -> list[torch.Tensor | None]:
    """Gradients in float32, laid out as their weights, so that autograd takes them as they are."""
    made: list[torch.Tensor | None] = []
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for part, (shape, stride) in zip(parts, layouts, strict=True):
        if part is None:
            made.append(None)
            continue
        alike = _are_alike(shape, part.stride(), stride)
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
