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
from collections.abc import Hashable, Iterator

import torch
from torch import nn

from ddpm_fast.models.stock import has_global_hooks
from ddpm_fast.runtime.autocast import autocast_dtype


class HasDerivedWeight(nn.Module):
    """A module that runs with a tensor made from its parameters, by `derive`.

    Under `inference_weights`, where no gradient is recorded, `built` is the tensor made on entry, in the threads that
    entered and in no other: the same call gives the same bits whatever other threads do. A tensor of equal shape,
    strides, dtype and device is written in place by later blocks: a CUDA graph captured in one block replays with new
    weights in the next. Copies and pickles leave it out.
    """

    # Key → tensor, for the keys that a thread is inside with. A subclass whose tensor depends on T has T as key.
    _tensors: dict[Hashable, torch.Tensor]
    # Thread → keys of the blocks that it is inside, the innermost last.
    _inside: dict[int, list[Hashable]]
    # For torch.compile, which traces no thread: the tensor that was built last, and None outside all blocks.
    _latest: torch.Tensor | None = None
    # Of the last thread that left, on CUDA: work that may still read the tensors.
    _last_use: torch.cuda.Event | None = None

    def derive(self) -> torch.Tensor | None:
        """The tensor, made now; None where the module cannot use one."""
        raise NotImplementedError

    def key(self, num_timesteps: int | None) -> Hashable:
        """What the tensor depends on besides the weights and autocast."""
        return None

    def built(self) -> torch.Tensor | None:
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

    def enter(self, num_timesteps: int | None) -> None:
        """Make the tensor, unless a thread is inside with the same key: the weights have not changed since."""
        key = (self.key(num_timesteps), autocast_dtype("cpu"), autocast_dtype("cuda"))
        tensors = self.__dict__.setdefault("_tensors", {})
        if key not in tensors:
            # Outside inference mode, so that a later block may write into the tensor, in that mode or not.
            with torch.inference_mode(False), torch.no_grad():
                made = self._make(num_timesteps)
                if made is not None:
                    tensors[key] = self._latest = self._keep(made)
        self.__dict__.setdefault("_inside", {}).setdefault(threading.get_ident(), []).append(key)

    def _make(self, num_timesteps: int | None) -> torch.Tensor | None:
        return self.derive()

    def _keep(self, made: torch.Tensor) -> torch.Tensor:
        slots = self.__dict__.setdefault("_slots", {})
        key = (made.shape, made.stride(), made.dtype, made.device)
        if key not in slots:
            slots[key] = made.clone()  # never the parameter's own memory
            return slots[key]
        if self._last_use is not None:
            torch.cuda.current_stream(made.device).wait_event(self._last_use)
        return slots[key].copy_(made)

    def leave(self) -> None:
        """The end of a block; the tensor goes with the last thread that uses it. Its memory stays, see the class."""
        keys = self._inside[threading.get_ident()]
        key = keys.pop()
        if not keys:
            del self._inside[threading.get_ident()]
        if any(key in others for others in self._inside.values()):
            return
        tensor = self._tensors.pop(key, None)
        if tensor is not None and tensor.is_cuda:
            self._last_use = torch.cuda.current_stream(tensor.device).record_event()
        self._latest = next(iter(self._tensors.values()), None)

    def __getstate__(self) -> dict:
        left_out = ("_tensors", "_inside", "_latest", "_last_use", "_slots")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}


_lock = threading.RLock()


@contextlib.contextmanager
def inference_weights(network: object, num_timesteps: int | None = None) -> Iterator[None]:
    """Inside, tensors derived from the network's weights are made once, and the weights must not change.

    Several threads may be inside with one network at the same time.

    Args:
        network: any module. One without derived weights, or a callable that is no module, runs as always.
        num_timesteps: T, if every integer timestep given to the network is in [0, T): then a Unet also looks up the
            projections of the time embedding in a table.
    """
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    entered: list[HasDerivedWeight] = []
    try:
        with _lock:
            for module in modules:
                if isinstance(module, HasDerivedWeight):
                    module.enter(num_timesteps)
                    entered.append(module)
        yield
    finally:
        with _lock:
            for module in entered:
                module.leave()


def may_derive(network: object) -> bool:
    """True if nothing in the network can renew its weights while it runs: no hooks, and modules of known classes only.

    A hook such as `torch.nn.utils.weight_norm`'s makes a weight again at every call.
    """
    if not isinstance(network, nn.Module) or has_global_hooks():
        return False
    for module in network.modules():
        own = module.__dict__
        is_known = type(module).__module__.split(".")[0] in ("torch", "ddpm_fast")
        if not is_known or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return False
    return True


def free_inference_weights(network: object) -> None:
    """Free the memory of derived tensors, outside `inference_weights`; recorded graphs that read it must be gone."""
    for module in network.modules() if isinstance(network, nn.Module) else ():
        if isinstance(module, HasDerivedWeight) and not module.__dict__.get("_inside"):
            module.__dict__.pop("_slots", None)
