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
from collections.abc import Callable, Iterator

import torch
from torch import nn


class HasDerivedWeight(nn.Module):
    """A module that runs with a tensor made from its parameters, `derived()`.

    A subclass defines the tensor in `derive`. Under `inference_weights`, where no gradient is recorded, the module uses
    the tensor built on entry. A tensor of equal shape, strides, dtype and device is written in place by later blocks:
    a CUDA graph captured in one block replays with new weights in the next. Copies and pickles leave it out.
    """

    is_built = False
    _built: torch.Tensor | None = None

    def derive(self) -> torch.Tensor:
        """The tensor, made now; gradients flow to the parameters."""
        raise NotImplementedError

    def derived(self) -> torch.Tensor:
        """The built tensor where there is one and no gradient is recorded, else `derive()`."""
        built = self._built  # read once: another thread may drop it
        return self.derive() if built is None or torch.is_grad_enabled() else built

    def build(self, num_timesteps: int | None) -> None:
        """Make the tensor; `num_timesteps` is for modules whose tensor has a row for every timestep."""
        self.is_built = True
        self._keep(self.derive)

    def _keep(self, make: Callable[[], torch.Tensor]) -> None:
        # Outside inference mode, so that a later block may write into the tensor, in that mode or not.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            slots = self.__dict__.setdefault("_slots", {})
            key = (made.shape, made.stride(), made.dtype, made.device)
            if key in slots:
                slots[key].copy_(made)
            else:
                slots[key] = made.clone()  # never the parameter's own memory
        self._built = slots[key]

    def drop(self) -> None:
        """Derive at every use again. The memory stays, see the class."""
        self.is_built, self._built = False, None

    def __getstate__(self) -> dict:
        left_out = ("is_built", "_built", "_slots")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}


@contextlib.contextmanager
def inference_weights(network, num_timesteps: int | None = None) -> Iterator[None]:
    """Inside, tensors derived from the network's weights are made once, and the weights must not change.

    Args:
        network: any module. One without derived weights, or a callable that is no module, runs as always.
        num_timesteps: T, if every integer timestep given to the network is in [0, T): then a Unet also looks up the
            projections of the time embedding in a table.
    """
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    deriving = [module for module in modules if isinstance(module, HasDerivedWeight)]
    try:
        for module in deriving:
            module.build(num_timesteps)
        yield
    finally:
        for module in deriving:
            module.drop()


def free_inference_weights(network) -> None:
    """Free the memory of derived tensors, outside `inference_weights`; recorded graphs that read it must be gone."""
    for module in network.modules() if isinstance(network, nn.Module) else ():
        if isinstance(module, HasDerivedWeight) and not module.is_built:
            module.__dict__.pop("_slots", None)
