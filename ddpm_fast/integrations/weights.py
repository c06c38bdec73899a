"""The weights of convolutions in accelerated networks, laid out for their device.

cuDNN copies a weight that is not channels-last in every call, and autograd its gradient into the weight's layout.
Values, names and shapes stay, and so does every parameter; torch's optimizers and files keep either layout. Fused Adam
refuses moments of another layout on CUDA: an optimizer makes them after `accelerate`, and `lay_out_state` of
training/adam_state.py lays out those that it loads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ddpm_fast.ops.layout import weights_format

# Paths of classes that have the weight of a 2D convolution and are no nn.Conv2d; families add theirs.
CONVOLUTIONS: set[str] = set()

_MARK = "_ddpm_fast_laid_out"  # in the __dict__ of a convolution whose weight was contiguous before


def lay_out_weights(module: nn.Module) -> None:
    """Lay out the weights of all 2D convolutions inside: channels-last where that is faster, else as they were."""
    for convolution, weight in _weights(module):
        if weights_format(weight.device) is not torch.channels_last:
            _give_back(convolution, weight)
        elif not weight.is_contiguous(memory_format=torch.channels_last) and weight.is_contiguous():
            _relay(weight, torch.channels_last)
            convolution.__dict__[_MARK] = True


def give_back_weights(module: nn.Module) -> None:
    """Undo `lay_out_weights`."""
    for convolution, weight in _weights(module):
        _give_back(convolution, weight)


def _weights(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Convolutions whose weight is a parameter of torch itself, and no tensor of a sharded or quantised kind."""
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d) or _path(convolution) in CONVOLUTIONS:
            weight = convolution._parameters.get("weight")
            if type(weight) is nn.Parameter and weight.layout is torch.strided:
                yield convolution, weight


def _path(module: nn.Module) -> str:
    cls = type(module)  # an accelerated class has the names of its own
    return f"{cls.__module__}.{cls.__qualname__}"


def _give_back(convolution: nn.Module, weight: nn.Parameter) -> None:
    if convolution.__dict__.pop(_MARK, False):
        _relay(weight, torch.contiguous_format)


def _relay(weight: nn.Parameter, memory_format: torch.memory_format) -> None:
    for tensor in (weight, weight.grad):
        if tensor is not None:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
