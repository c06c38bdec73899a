"""A training step of another package's network on CUDA, as it is and accelerated, counted on meta tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

from cuda_model.pretend import META
from cuda_model.recorder import Step, recording
from ddpm_fast.measure import foreign

BATCH = 128  # of CIFAR-10, as these networks were trained


def record_training(network: foreign.ForeignNetwork, target: GPUTarget, dtype: str, batch: int = BATCH) -> Step:
    """Forward, mean squared error, backward and fused Adam."""
    module = copy.deepcopy(network.network).to(META)
    data = tuple(tensor.to(META) for tensor in foreign.inputs(network, batch, torch.device("cpu")))
    with recording(target) as block:
        optimizer = torch.optim.Adam(module.parameters(), 1e-4, fused=True, capturable=True)
        run = foreign.training_step(network, module, data, dtype, optimizer)
        run()  # the optimizer makes its state
        with block() as step:
            run()
    return step


@dataclass(frozen=True)
class Counts:
    """Launches of a step and the bytes that they move, of a network as it is and accelerated."""

    eager: Step
    accelerated: Step

    @property
    def launches(self) -> float:
        """Launches of the accelerated step over those of the eager one."""
        return self.accelerated.count / self.eager.count

    @property
    def bytes_moved(self) -> float:
        return self.accelerated.bytes_moved / self.eager.bytes_moved


def count(name: str, target: GPUTarget, dtype: str, batch: int = BATCH) -> Counts:
    """Both steps of a network of `foreign.NETWORKS`."""
    from ddpm_fast.integrations.accelerate import accelerate

    network = foreign.make(name)
    eager = record_training(network, target, dtype, batch)
    accelerate(network.network)
    return Counts(eager, record_training(network, target, dtype, batch))
