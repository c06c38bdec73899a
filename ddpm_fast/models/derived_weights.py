"""Tensors derived from a network's weights, computed once for a whole sampling run.

Weights stay in the peer's parameters; some layers run another form of them (layers.py). When training, that form is
made in every step. A sampler that runs the network many times with the same weights says so:

    with frozen_weights(unet, num_timesteps=1000):
        ...

Why a block, and not a cache that notices changed weights: a tensor's version counter does not count what is written
through `.data`, as ema_pytorch does, nor what happens to tensors made in inference mode. Entering the block costs one
derivation; nothing is trusted from before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class DerivesWeights(nn.Module):
    """A module that runs with a tensor made from its parameters, `derived()`.

    A subclass says what it is in `derive`. Under `frozen_weights`, where no gradient is recorded, it is a tensor that
    was made when the block was entered; one of equal shape, strides, dtype and device is written in place from then on,
    so that a CUDA graph captured in one block replays with new weights in the next. Copies and pickles leave it out.
    """

    is_frozen = False
    _frozen: torch.Tensor | None = None

    def derive(self) -> torch.Tensor:
        """The tensor, made now; gradients flow to the parameters."""
        raise NotImplementedError

    def derived(self) -> torch.Tensor:
        """The frozen tensor where there is one and no gradient is recorded, else `derive()`."""
        frozen = self._frozen  # once: another thread may thaw
        return self.derive() if frozen is None or torch.is_grad_enabled() else frozen

    def freeze(self, num_timesteps: int | None) -> None:
        """Make the tensor; `num_timesteps` is for modules that know all timesteps beforehand."""
        self.is_frozen = True
        self._keep(self.derive)

    def _keep(self, make) -> None:
        # Outside inference mode, so that a later block may write into the tensor, in that mode or not.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            slots = self.__dict__.setdefault("_slots", {})
            key = (made.shape, made.stride(), made.dtype, made.device)
            if key in slots:
                slots[key].copy_(made)
            else:
                slots[key] = made.clone()  # never the parameter's own memory
        self._frozen = slots[key]

    def thaw(self) -> None:
        """Derive at every use again; the memory stays, see the class."""
        self.is_frozen, self._frozen = False, None

    def __getstate__(self) -> dict:
        left_out = ("is_frozen", "_frozen", "_slots")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}


@contextlib.contextmanager
def frozen_weights(network, num_timesteps: int | None = None) -> Iterator[None]:
    """Inside, what the network derives from its weights is made once, and the weights must not change.

    Args:
        network: any module; one without derived weights, or a callable that is no module, runs as always.
        num_timesteps: T, if every integer timestep given to the network is in [0, T): then a Unet also looks up what it
            computes from the timestep in a table.
    """
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    deriving = [module for module in modules if isinstance(module, DerivesWeights)]
    try:
        for module in deriving:
            module.freeze(num_timesteps)
        yield
    finally:
        for module in deriving:
            module.thaw()


def forget_frozen_weights(network) -> None:
    """Give back the memory of what was derived, outside `frozen_weights`; recorded graphs that read it must be gone."""
    for module in network.modules() if isinstance(network, nn.Module) else ():
        if isinstance(module, DerivesWeights) and not module.is_frozen:
            module.__dict__.pop("_slots", None)
