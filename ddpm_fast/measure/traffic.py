"""Counts the work of a training step and a sampling step from operator dispatch, without computing or timing.

Per image: operators that touch memory (views are free and not counted), bytes that they read and write (each input read
once, each output written once), bytes kept from forward for backward (each storage once, without parameters,
buffers and the network's input), and floating-point operations of convolutions, matrix products and attention (a
multiply-add is two). All of it runs on the meta device, so the numbers are the same on every machine. Under
`kernels_take_meta_tensors` ours is counted with the kernels that a CUDA device runs, and a fused op is one operator.
What its arguments do not show, such as partial results, is in the registries of op_costs.py.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.measure.op_costs import FLOPS, KINDS, LOOKED_UP, SCRATCH_BYTES, SECOND_READS, Arguments
from ddpm_fast.models.derived_weights import inference_weights

H100_BYTES_PER_SECOND = 3.0e12  # copy bandwidth as measured

# Ops that alias their input although the schema of their result does not say so.
_FREE = {torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default}
_ALLOCATE = ("aten::empty", "aten::new_empty")  # no memory is touched
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def _no_flops() -> dict[str, int]:
    return dict.fromkeys(KINDS, 0)


@dataclass
class Operator:
    """All calls of one operator."""

    calls: int = 0
    bytes_moved: int = 0
    flops: int = 0


@dataclass
class Traffic:
    """Per image: operators, bytes moved, bytes kept for backward, operations by kind; and all of these by operator."""

    operators: int = 0
    bytes_moved: int = 0
    bytes_kept: int = 0
    flops: dict[str, int] = field(default_factory=_no_flops)
    by_operator: dict[str, Operator] = field(default_factory=dict)

    @property
    def floor_seconds(self) -> float:
        """The time of the bytes alone at an H100's copy bandwidth."""
        return self.bytes_moved / H100_BYTES_PER_SECOND

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def dominating(self, count: int | None = None) -> list[tuple[str, Operator]]:
        """Operators by name, those that move most first."""
        return sorted(self.by_operator.items(), key=lambda item: -item[1].bytes_moved)[:count]


@dataclass(frozen=True)
class Call:
    """One call of an operator that is not a view.

    Args:
        name: of the operator, such as "aten::add".
        arguments: by name, with defaults.
        bytes_moved: see the module.
        flops: by kind; empty for operators that are none of `KINDS`.
    """

    name: str
    arguments: Arguments
    result: Any
    bytes_moved: int
    flops: dict[str, int]


class Observer(TorchDispatchMode):
    """Calls `see`, which a subclass defines, for every operator that is not a view."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _only_calls_others(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        result = self.run(func, args, kwargs)
        if not _is_view(func):
            arguments = _bind(func, args, kwargs)
            flops = _flops(func, args, kwargs, arguments, result)
            self.see(Call(func._schema.name, arguments, result, _bytes_moved(func, args, kwargs, result), flops))
        return result

    def run(self, func, args: tuple, kwargs: dict) -> Any:
        """The result of an operator."""
        return func(*args, **kwargs)

    def see(self, call: Call) -> None:
        """Called after every operator that is not a view."""
        raise NotImplementedError


class Counter(Observer):
    """Adds every operator to a `Traffic`."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def see(self, call: Call) -> None:
        self.traffic.operators += 1
        self.traffic.bytes_moved += call.bytes_moved
        operator = self.traffic.by_operator.setdefault(call.name, Operator())
        operator.calls += 1
        operator.bytes_moved += call.bytes_moved
        for kind, number in call.flops.items():
            self.traffic.flops[kind] += number
            operator.flops += number


def _bytes_moved(func, args: tuple, kwargs: dict, result) -> int:
    name, arguments = func._schema.name, _bind(func, args, kwargs)
    tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
    if name in SECOND_READS:
        tensors += SECOND_READS[name](arguments)
    moved = sum(t.numel() * t.element_size() for t in tensors)
    if name in LOOKED_UP:
        table = arguments[LOOKED_UP[name]]
        moved += (result.numel() - table.numel()) * table.element_size()
    if name in SCRATCH_BYTES:
        moved += SCRATCH_BYTES[name](arguments)
    return moved


def _only_calls_others(func) -> bool:
    """Such an operator arrives whole in inference mode; outside it, autograd has it call the others first."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), _COMPOSITE) and not has_kernel(func.name(), torch._C.DispatchKey.CPU)


def _is_view(func) -> bool:
    returns = [r.alias_info for r in func._schema.returns]
    return (
        func in _FREE
        or func._schema.name.startswith(_ALLOCATE)
        or any(alias is not None and not alias.is_write for alias in returns)
    )


def _bind(func, args: tuple, kwargs: dict) -> Arguments:
    """The arguments of a call by name."""
    schema = func._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return defaults | {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs


def _flops(func, args: tuple, kwargs: dict, arguments: Arguments, result) -> dict[str, int]:
    """Operations by kind; empty for operators that are none of `KINDS`."""
    name = func._schema.name
    if name in FLOPS:
        return FLOPS[name](arguments, result)
    packet = func._overloadpacket
    if packet not in flop_registry:
        return {}
    kind = "convolution" if "conv" in name else "attention" if "attention" in name else "matmul"
    return {kind: flop_registry[packet](*args, **kwargs, out_val=result)}


@contextlib.contextmanager
def _count_kept(traffic: Traffic, excluded: set[int]):
    """Bytes of the distinct storages that autograd saves."""
    seen = set(excluded)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            traffic.bytes_kept += storage.nbytes()
        return tensor

    def checkpoint_and_count(function, *args, **kwargs):
        """torch's checkpoint keeps its arguments where no hook sees them."""
        for argument in args:
            if isinstance(argument, torch.Tensor):
                pack(argument)
        return checkpoint(function, *args, **kwargs)

    with (
        mock.patch("ddpm_fast.ops.linear_attention_block.composite.checkpoint", checkpoint_and_count),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield


@contextlib.contextmanager
def kernels_take_meta_tensors() -> Iterator[None]:
    """Let the implementations for CUDA accept meta tensors, whose shapes are all that is counted.

    Triton must be installed: how its kernels cut up their work is asked of them.
    """
    with (
        mock.patch("ddpm_fast.runtime.triton_launch.why_not_triton", lambda device: None),
        mock.patch("ddpm_fast.runtime.extension.why_not", lambda device: None),
    ):
        yield


def measure_training(diffusion: Any, batch: int = 1) -> Traffic:
    """One training step on a batch, of one image unless told otherwise: loss and backward, the noise drawn inside."""
    diffusion = copy.deepcopy(diffusion).to("meta")
    image = torch.rand(batch, diffusion.channels, *diffusion.image_size, device="meta")
    t = torch.zeros(batch, dtype=torch.int64, device="meta")
    constants = [*diffusion.parameters(), *diffusion.buffers(), image]
    traffic = Traffic()
    with Counter(traffic):
        with _count_kept(traffic, {c.untyped_storage()._cdata for c in constants}):
            loss = diffusion(image, times=t)
        loss.backward()
    return traffic


def measure_sampling(diffusion: Any, batch: int = 1) -> Traffic:
    """One step of sampling a batch, of one image unless told otherwise: the network and the update of the state.

    The network has its inference weights, and this package's process its table, as in a run of many steps.
    """
    diffusion = copy.deepcopy(diffusion).to("meta")
    if isinstance(diffusion, GaussianDiffusion):
        diffusion._plan("ddpm", diffusion.num_timesteps, "own")
    x = torch.zeros(batch, diffusion.channels, *diffusion.image_size, device="meta")
    traffic = Traffic()
    with inference_weights(diffusion.model, diffusion.num_timesteps), Counter(traffic), torch.inference_mode():
        diffusion.p_sample(x, 1)
    return traffic


def measure(package: ModuleType, image_size: int | tuple[int, int], **unet) -> dict[str, Traffic]:
    """Both of a package that has Unet and GaussianDiffusion, upstream or this one; `unet` goes to its Unet."""
    diffusion = package.GaussianDiffusion(package.Unet(**unet), image_size=image_size)
    return {"training step": measure_training(diffusion), "sampling step": measure_sampling(diffusion)}
