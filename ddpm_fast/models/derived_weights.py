"""Tensors derived from a network's weights, computed once for a whole sampling run.

Weights stay in upstream's parameters; some modules run another form of them (convolution.py). In training, that form is
made in every step. A sampler runs the network many times with the same weights and says so:

    with inference_weights(unet, num_timesteps=1000):
        ...

Why a block, and not a cache that notices changed weights: a tensor's version counter counts neither writes through
`.data`, as in ema_pytorch, nor writes to tensors made in inference mode. Entering the block costs one derivation;
nothing from before is trusted.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from ddpm_fast.models.stock import has_global_hooks, renews_no_weight
from ddpm_fast.runtime.autocast import autocast_dtype

# What a network is told: range(T), or times in the order of a sampler's rows.
Times = range | tuple[float, ...] | None
# Attributes of a module that has derived weights: neither copied nor pickled.
_LEFT_OUT = ("_tensors", "_inside", "_latest", "_last_use", "_slots")
# A tensor, or several by name.
Derived = torch.Tensor | dict[Hashable, torch.Tensor]


class HasDerivedWeight(nn.Module):
    """A module that runs with a tensor made from its parameters, or several by name, by `derive`.

    Under `inference_weights`, where no gradient is recorded, `built` is the tensor made on entry, in the threads that
    entered and in no other: the same call gives the same bits whatever other threads do. A tensor of equal shape,
    strides, dtype and device is written in place by later blocks: a CUDA graph captured in one block replays with new
    weights in the next. Copies and pickles leave it out.
    """

    # Key → tensor, for the keys that a thread is inside with. It is what a tensor depends on, such as times.
    _tensors: dict[Hashable, Derived]
    # Thread → keys of the blocks that it is inside, the innermost last.
    _inside: dict[int, list[Hashable]]
    # For torch.compile, which traces no thread: the tensor that was built last, and None outside all blocks.
    _latest: Derived | None = None
    # Of the last thread that left, on CUDA: work that may still read the tensors.
    _last_use: torch.cuda.Event | None = None

    def derive(self) -> Derived | None:
        """The tensor, made now; None where the module cannot use one."""
        raise NotImplementedError

    def key(self, times: Times) -> Hashable:
        """What the tensor depends on besides the weights and autocast."""
        return None

    def built(self) -> Any:
        """The tensor that this thread may use; None where there is none or gradients are recorded."""
        if self._latest is None or torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            return self._latest
        keys = self._inside.get(threading.get_ident())
        return self._tensors.get(keys[-1]) if keys else None

    def is_inside(self) -> bool:
        """True in a thread inside `inference_weights`."""
        inside = self.__dict__.get("_inside")
        return bool(inside) and (torch.compiler.is_compiling() or threading.get_ident() in self._inside)

    def enter(self, times: Times) -> None:
        """Make the tensor, unless a thread is inside with the same key: the weights have not changed since."""
        key = (self.key(times), autocast_dtype("cpu"), autocast_dtype("cuda"))
        tensors = self.__dict__.setdefault("_tensors", {})
        if key not in tensors:
            # Outside inference mode, so that a later block may write into the tensor, in that mode or not.
            with torch.inference_mode(False), torch.no_grad():
                made = self._make(times)
                if made is not None:
                    tensors[key] = self._latest = self._keep(made, self.key(times))
        self.__dict__.setdefault("_inside", {}).setdefault(threading.get_ident(), []).append(key)

    def _make(self, times: Times) -> Derived | None:
        return self.derive()

    def _keep(self, made: Derived, key: Hashable) -> Derived:
        if isinstance(made, torch.Tensor):
            return self._kept([made], key)[0]
        return dict(zip(made, self._kept(list(made.values()), key), strict=True))

    def _kept(self, made: list[torch.Tensor], key: Hashable) -> list[torch.Tensor]:
        slots = self.__dict__.setdefault("_slots", {})
        keys = [(key, i, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for i, tensor in enumerate(made)]
        old = [(slots[place], tensor) for place, tensor in zip(keys, made, strict=True) if place in slots]
        for place, tensor in zip(keys, made, strict=True):
            if place not in slots:
                slots[place] = tensor.clone()  # never the parameter's own memory
        if old:
            if self._last_use is not None:
                torch.cuda.current_stream(made[0].device).wait_event(self._last_use)
            for dtype in {tensor.dtype for _, tensor in old}:  # torch copies a list of several dtypes one by one
                pairs = [pair for pair in old if pair[1].dtype is dtype]
                torch._foreach_copy_([slot for slot, _ in pairs], [tensor for _, tensor in pairs])
        return [slots[place] for place in keys]

    def leave(self) -> None:
        """The end of a block; the tensor goes with the last thread that uses it. Its memory stays, see the class."""
        keys = self._inside[threading.get_ident()]
        key = keys.pop()
        if not keys:
            del self._inside[threading.get_ident()]
        if any(key in others for others in self._inside.values()):
            return
        derived = self._tensors.pop(key, None)
        tensors = derived.values() if isinstance(derived, dict) else () if derived is None else (derived,)
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is not None:
            self._last_use = torch.cuda.current_stream(device).record_event()
        self._latest = next(iter(self._tensors.values()), None)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in _LEFT_OUT}


_lock = threading.RLock()

# What is kept of networks, which are not kept alive for it.
Kept = MutableMapping[nn.Module, Any]


class _Blocks(threading.local):
    """Of a thread: what is kept of networks outside all blocks, and in each that it is inside, the innermost last."""

    def __init__(self) -> None:
        self.kept: list[Kept | None] = [weakref.WeakKeyDictionary()]


_blocks = _Blocks()


def kept_by_block() -> Kept | None:
    """What this thread keeps of networks until the innermost block ends; None in a block that records no calls."""
    return _blocks.kept[-1]


@contextlib.contextmanager
def inference_weights(
    network: object,
    num_timesteps: int | None = None,
    *,
    times: Sequence[float] | None = None,
    record: bool = True,
) -> Iterator[None]:
    """Inside, tensors derived from the network's weights are made once, and the weights must not change.

    Several threads may be inside with one network at the same time.

    Args:
        network: any module. One without derived weights, or a callable that is no module, runs as always.
        num_timesteps: T, if every integer timestep given to the network is in [0, T): then a Unet also looks up the
            projections of the time embedding in a table.
        times: what the network will be told instead, in the order of a sampler's rows: inside, an integer i means
            times[i] to a network that has `has_table_of_times`.
        record: on the CPU, a Unet or an accelerated network replays calls without gradients from a tape, from the
            third of equal shapes on, with the same bits and without Python. A changed module or setting is seen, and
            recorded anew. What is recorded inside ends with the block. False: nothing is recorded or replayed inside.
    """
    given: Times = None
    if times is not None or num_timesteps is not None:
        given = range(num_timesteps or 0) if times is None else tuple(times)
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    entered: list[HasDerivedWeight] = []
    _blocks.kept.append(weakref.WeakKeyDictionary() if record else None)
    try:
        with _lock:
            for module in modules:
                if isinstance(module, HasDerivedWeight):
                    module.enter(given)
                    entered.append(module)
        yield
    finally:
        _blocks.kept.pop()
        with _lock:
            for module in entered:
                module.leave()


def may_derive(network: object) -> bool:
    """True if nothing in the network can renew its weights while it runs: no hooks, and known classes only."""
    if not isinstance(network, nn.Module) or has_global_hooks():
        return False
    return all(renews_no_weight(module) for module in network.modules())


def free_inference_weights(network: object) -> None:
    """Free the memory of derived tensors, outside `inference_weights`; recorded graphs that read it must be gone."""
    for module in network.modules() if isinstance(network, nn.Module) else ():
        if isinstance(module, HasDerivedWeight) and not module.__dict__.get("_inside"):
            module.__dict__.pop("_slots", None)


def forget_derived(module: nn.Module) -> None:
    """Remove every trace of derived weights from a module that is outside `inference_weights`."""
    for name in _LEFT_OUT:
        module.__dict__.pop(name, None)
