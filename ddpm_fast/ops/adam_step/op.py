"""A whole optimizer step over many tensors: public function, eligibility.

    g = grad / grad_scale · min(1, max_grad_norm / (‖grads / grad_scale‖₂ + 1e-6))
    m ← β₁·m + (1 − β₁)·g,   v ← β₂·v + (1 − β₂)·g²                          (Kingma & Ba 2015, algorithm 1)
    p ← p − lr · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + eps)
    average ← average + weight · (p − average),   copy ← p

On CUDA three launches, however many tensors there are; on the CPU two passes over memory, one where nothing is clipped.
The state is torch.optim.Adam's own, tensor by tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch

from ddpm_fast.ops.adam_step import reference
from ddpm_fast.ops.adam_step.settings import AdamSettings, have_same_layout
from ddpm_fast.runtime import extension, triton_launch
from ddpm_fast.runtime.dispatch import Implementation, Op

__all__ = ["AdamSettings", "Tables", "adam_step", "why_not_fused"]


class Tables:
    """What is known of the tensors of a step, and where the kernels find them: addresses on the device.

    All is made again when a tensor is another one or moves, and when other parameters have gradients. A graph reads the
    addresses of its capture at every replay, and those stay until `release`: keep the object as long as the graph, and
    give it to every call with these parameters. A first call, or one with other tensors, waits for the device, and must
    not be recorded.
    """

    def __init__(self) -> None:
        self._numbers: tuple | None = None
        self._tensors: list[torch.Tensor | None] = []
        self._params: list[Any] = []
        self._facts: tuple[list, ...] = ()
        self._like: tuple[list, ...] = ()
        # Of the kernels' own; True once native code has taken the tensors.
        self.held: Any = None
        # Of `held`, those that a capture has read.
        self._captured: list[Any] = []

    def hold(self, lists: Sequence[Sequence[torch.Tensor | None] | None], settings: Sequence[AdamSettings]) -> bool:
        """True if these tensors and settings, besides the learning rates, were remembered and nothing has moved."""
        return (
            self._numbers == _numbers(lists, settings)
            and all(map(is_, chain.from_iterable(filter(None, lists)), self._tensors))
            and self._facts == self._facts_now()
        )

    def remember(self, lists: Sequence[Sequence[torch.Tensor | None] | None], settings: Sequence[AdamSettings]) -> None:
        """Once they have been checked."""
        self._numbers = _numbers(lists, settings)
        self._tensors = list(chain.from_iterable(filter(None, lists)))
        self._params = list(lists[0] or ())
        self._facts = self._facts_now()
        self._like = tuple(list(map(of, self._params)) for of in _FACTS_OF_GRADS)
        self.held = None

    def keep(self) -> None:
        """Keep what the kernels hold now until `release`: a capture reads it."""
        if not any(kept is self.held for kept in self._captured):
            self._captured.append(self.held)

    def release(self) -> None:
        """No graph reads earlier tables any more."""
        self._captured.clear()

    def fit(self, grads: Sequence[torch.Tensor]) -> bool:
        """True if these are gradients of the remembered parameters, in shape, dtype and device."""
        alike = all(list(map(of, grads)) == like for of, like in zip(_FACTS_OF_GRADS, self._like, strict=True))
        return alike and _why_not_gradients(self._params[0].dtype, grads) is None

    def _facts_now(self) -> tuple[list, ...]:
        tensors = [tensor for tensor in self._tensors if tensor is not None]
        facts = (list(map(of, tensors)) for of in (torch.Tensor.data_ptr, attrgetter("dtype")))
        return *facts, list(map(torch.Tensor.stride, self._params))


_FACTS_OF_GRADS: tuple[Callable[[Any], object], ...] = (
    attrgetter("shape"),
    torch.Tensor.get_device,
)


_HALF_TYPES = {torch.float16, torch.bfloat16}


def _numbers(lists: Sequence[Sequence | None], settings: Sequence[AdamSettings]) -> tuple:
    own = [(g.count, g.beta1, g.beta2, g.eps, g.weight_decay, g.decoupled, type(g.lr)) for g in settings]
    return tuple(None if tensors is None else len(tensors) for tensors in lists), own


def adam_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    settings: Sequence[AdamSettings],
    *,
    max_grad_norm: float | None = None,
    grad_scale: torch.Tensor | None = None,
    averages: Sequence[torch.Tensor | None] | None = None,
    average_weight: torch.Tensor | None = None,
    copies: Sequence[torch.Tensor | None] | None = None,
    tables: Tables | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip gradients, update parameters in place by Adam, and with them their average and their copies.

    Args:
        params: float32 (float64: reference only), of one device.
        grads: one for each parameter, of its shape, and of its dtype or, not natively, some in one half type. They are
            read only; not those of torch's clipping.
        exp_avgs, exp_avg_sqs: the moments, of the parameters' shape and dtype; overwritten.
        steps: steps so far, one float32 element each, on the device; counted up. Natively, each of its own.
        settings: one entry for each group of consecutive parameters. On the CPU a tensor lr may be float64.
        max_grad_norm: the norm of all gradients together is clipped to this; None leaves them.
        grad_scale: one float32 element that the loss was multiplied by. Gradients are divided by it, and where one is
            not finite, or their norm overflows, no parameter, moment and step changes.
        averages: moved towards the new parameters by `average_weight`, one float32 element on the device; all the way
            if None. With a weight of 0 they are not read. A parameter whose entry is None has no average.
        copies: overwritten with the new parameters, in float16 or bfloat16; None as an entry means none.
        tables: see `Tables`; None makes some for this call alone.

    Returns:
        The gradients' norm before clipping, and 1.0 if the step was skipped, else 0.0: float32 scalars on the device.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    lists = (params, exp_avgs, exp_avg_sqs, steps, averages, copies)
    tables = Tables() if tables is None else tables
    if not tables.hold(lists, settings) or not tables.fit(grads):
        _check(params, grads, exp_avgs, exp_avg_sqs, steps, settings, averages, copies)
        tables.remember(lists, settings)
    _check_scalars(params[0].device, settings, average_weight, grad_scale)
    return _adam_step_op(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        settings,
        max_grad_norm=max_grad_norm,
        grad_scale=grad_scale,
        averages=averages,
        average_weight=average_weight,
        copies=copies,
        tables=tables,
    )


def _check(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    settings: Sequence[AdamSettings],
    averages: Sequence[torch.Tensor | None] | None,
    copies: Sequence[torch.Tensor | None] | None,
) -> None:
    """The checks of every implementation; elements are not asked for, since that would wait for the device."""
    if len(params) == 0:
        raise ValueError("params must not be empty")
    counted = sum(group.count for group in settings)
    if counted != len(params):
        raise ValueError(f"settings must be of {len(params)} parameters, one for each of params, got {counted}")
    device, dtype = params[0].device, params[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"params must be float32 or float64, got {dtype}")
    lists: dict[str, Sequence[torch.Tensor | None]] = {"params": params, "grads": grads}
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    lists |= {} if averages is None else {"averages": averages}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} must be {len(params)}, one for each of params, got {len(tensors)}")
        for p, tensor in zip(params, tensors, strict=True):
            if tensor is None:
                if tensors is averages:
                    continue
                raise TypeError(f"{name} must be tensors, got None for {tuple(p.shape)}")
            is_half = tensors is grads and tensor.dtype in _HALF_TYPES  # see _why_not_gradients
            fits = tensor.shape == p.shape and tensor.device == device and (is_half or tensor.dtype is dtype)
            if not fits:
                raise ValueError(
                    f"{name} must be {dtype} on {device} and of their parameters' shapes, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)} on {tensor.device} for {tuple(p.shape)}"
                )
    reason = _why_not_gradients(dtype, grads)
    if reason is not None:
        raise TypeError(reason)
    if len(steps) != len(params) or any(step.numel() != 1 for step in steps):
        raise ValueError("steps must be one element for each of params")
    if copies is not None and (
        len(copies) != len(params)
        or any(copy is not None and copy.shape != p.shape for copy, p in zip(copies, params, strict=True))
    ):
        raise ValueError("copies must be of the shapes of params")


def _why_not_gradients(dtype: torch.dtype, grads: Sequence[torch.Tensor]) -> str | None:
    """Why gradients of these dtypes are refused, in one clause; None where they are not."""
    others = {grad.dtype for grad in grads} - {dtype}
    if others and (dtype is not torch.float32 or len(others) > 1 or not others <= _HALF_TYPES):
        return f"grads must be {dtype} or of one half type beside float32, got {', '.join(sorted(map(str, others)))}"
    return None


def _check_scalars(
    device: torch.device,
    settings: Sequence[AdamSettings],
    average_weight: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
) -> None:
    scalars = [("average_weight", average_weight), ("grad_scale", grad_scale)]
    scalars += [("a tensor lr", group.lr) for group in settings if isinstance(group.lr, torch.Tensor)]
    for name, scalar in scalars:
        if scalar is not None and (scalar.numel() != 1 or scalar.device != device):
            raise ValueError(f"{name} must be one element on {device}, got {tuple(scalar.shape)} on {scalar.device}")


def _triton(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Triton is imported where it runs.
    return importlib.import_module("ddpm_fast.ops.adam_step.triton").adam_step(*args, **kwargs)


def _fake(params: Sequence[torch.Tensor], *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return params[0].new_empty(()), params[0].new_empty(())


_library = torch.library.Library("ddpm_fast", "FRAGMENT")
# Lists of tensors that not every parameter or group has come with the places of those that have one. `numbers` are
# those of a group, one group after another: lr, beta1, beta2, eps, weight_decay, decoupled.
_library.define(
    "native_adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] averages, int[] averaged, Tensor(f!)[] copies, int[] copied, Tensor[] rates, "
    "int[] rated, int[] counts, float[] numbers, float? max_grad_norm, Tensor? grad_scale, Tensor? average_weight) "
    "-> (Tensor norm, Tensor skipped)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("ddpm_fast::native_adam_step", _fake, lib=_library)


@torch.no_grad()
def _native(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    settings: Sequence[AdamSettings],
    *,
    max_grad_norm: float | None,
    grad_scale: torch.Tensor | None,
    averages: Sequence[torch.Tensor | None] | None,
    average_weight: torch.Tensor | None,
    copies: Sequence[torch.Tensor | None] | None,
    tables: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    lrs = [group.lr if isinstance(group.lr, torch.Tensor) else None for group in settings]
    result = torch.ops.ddpm_fast.native_adam_step.default(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        *_with_places(averages),
        *_with_places(copies),
        *_with_places(lrs),
        [group.count for group in settings],
        [number for group in settings for number in _numbers_of(group)],
        max_grad_norm,
        grad_scale,
        average_weight,
    )
    if tables is not None:
        tables.held = True
    return result


def _with_places(tensors: Sequence[torch.Tensor | None] | None) -> tuple[list[torch.Tensor], list[int]]:
    """The tensors of a list with holes, and where in the list they are."""
    found = [(tensor, place) for place, tensor in enumerate(tensors or ()) if tensor is not None]
    return [tensor for tensor, _ in found], [place for _, place in found]


def _numbers_of(group: AdamSettings) -> tuple[float, ...]:
    """A group's row of `numbers`; a learning rate that is a tensor is read by the kernel."""
    lr = 0.0 if isinstance(group.lr, torch.Tensor) else float(group.lr)
    return lr, group.beta1, group.beta2, group.eps, group.weight_decay, float(group.decoupled)


def _native_refuses(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    settings: Sequence[AdamSettings],
    *,
    averages: Sequence[torch.Tensor | None] | None = None,
    copies: Sequence[torch.Tensor | None] | None = None,
    tables: Tables | None = None,
    **others: Any,
) -> str | None:
    if any(grad.dtype in _HALF_TYPES for grad in grads):
        return "a gradient is in a half type"
    if tables is not None and tables.held is True:
        return extension.why_not(params[0].device)
    reason = _why_not_native(params, steps, copies)
    if reason is not None:
        return reason
    for tensors in (exp_avgs, exp_avg_sqs, averages or (), copies or ()):
        for p, tensor in zip(params, tensors, strict=False):
            if tensor is not None and not have_same_layout(tensor, p):
                return f"a tensor of strides {tensor.stride()} is of a parameter of strides {p.stride()}"
    return None


def why_not_fused(
    params: Sequence[torch.Tensor], steps: Sequence[torch.Tensor], copies: Sequence[torch.Tensor | None] | None = None
) -> str | None:
    """Why neither kernels nor native code can do a step of these parameters, in one clause; None where one can."""
    if params[0].device.type == "cpu" and triton_launch.why_not_triton(params[0].device) is not None:
        return _why_not_native(params, steps, copies)
    return _why_not_triton(params, steps, copies)


def _why_not_native(
    params: Sequence[torch.Tensor], steps: Sequence[torch.Tensor], copies: Sequence[torch.Tensor | None] | None
) -> str | None:
    device = params[0].device
    if device.type != "cpu":
        return f"tensors are on {device.type}, and native code is for the CPU"
    return extension.why_not(device) or _why_not_these(params, steps, copies)


def _why_not_triton(
    params: Sequence[torch.Tensor], steps: Sequence[torch.Tensor], copies: Sequence[torch.Tensor | None] | None
) -> str | None:
    return triton_launch.why_not_triton(params[0].device) or _why_not_these(params, steps, copies)


def _why_not_these(
    params: Sequence[torch.Tensor], steps: Sequence[torch.Tensor], copies: Sequence[torch.Tensor | None] | None
) -> str | None:
    for p in params:
        if p.dtype is not torch.float32:
            return f"a parameter is {p.dtype}, and the kernels compute in float32"
        if not p.is_contiguous() and not _is_dense(p):
            return f"a parameter of strides {p.stride()} has gaps in memory"
    for step in steps:
        if step.dtype is not torch.float32 or step.device != params[0].device:
            return f"a step count is {step.dtype} on {step.device}, and the kernels count in float32 on the device"
    dtypes = {copy.dtype for copy in copies or () if copy is not None}
    if len(dtypes) > 1 or any(dtype.itemsize != 2 for dtype in dtypes):
        return "copies are not of one half type"
    return None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a piece of memory, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _triton_refuses(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    settings: Sequence[AdamSettings],
    *,
    copies: Sequence[torch.Tensor | None] | None = None,
    tables: Tables | None = None,
    **others: Any,
) -> str | None:
    if tables is not None and tables.held not in (None, True):  # the kernels have taken these tensors before
        return triton_launch.why_not_triton(params[0].device)
    return _why_not_triton(params, steps, copies)


def _example(device: torch.device) -> tuple[tuple, dict]:
    tensors = [[torch.zeros(8, 4, device=device)] for _ in range(4)]
    return (*tensors, [torch.zeros((), device=device)], [AdamSettings(1, 1e-3)]), {}


_adam_step_op = Op(
    "adam_step",
    [
        Implementation("triton", _triton, _triton_refuses),
        Implementation("native", _native, _native_refuses),
        Implementation("reference", reference.adam_step),
    ],
    _example,
)
