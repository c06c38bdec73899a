"""A training step of another package's network on CUDA, as it is and accelerated, counted on meta tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from cuda_model.pretend import META, cuda_on_meta
from cuda_model.recorder import laid_out
from ddpm_fast.integrations.accelerate import accelerate
from ddpm_fast.measure import foreign
from ddpm_fast.measure.traffic import Counter, Traffic

BATCH = 16


@dataclass(frozen=True)
class Counts:
    """Operators of a step and the bytes that they move, of a network as it is and accelerated."""

    eager: Traffic
    accelerated: Traffic

    @property
    def operators(self) -> float:
        """Operators of the accelerated step over those of the eager one."""
        return self.accelerated.operators / self.eager.operators

    @property
    def bytes_moved(self) -> float:
        return self.accelerated.bytes_moved / self.eager.bytes_moved


class _Counter(Counter):
    """Counts operators whose convolutions lay out their results as cuDNN does."""

    def run(self, func, args: tuple, kwargs: dict):
        return laid_out(func._schema.name, args, super().run(func, args, kwargs))


def count(name: str, dtype: str = "fp32", batch: int = BATCH) -> Counts:
    """Forward, loss and backward of a network of `foreign.NETWORKS`, in both forms."""
    network = foreign.make(name, device=META)
    data = tuple(tensor.to(META) for tensor in foreign.inputs(network, batch, META))
    found = []
    for module in (network.network, accelerate(copy.deepcopy(network.network))):
        traffic = Traffic()
        with cuda_on_meta(), _Counter(traffic):
            foreign.loss_of(network, module, data, dtype)[0].backward()
        found.append(traffic)
    return Counts(*found)
