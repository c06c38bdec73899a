"""Memory formats: in which layout maps and the weights of convolutions are fastest."""

from __future__ import annotations

import torch

from ddpm_fast.ops.arguments import why_not_on_cpu, why_steps_come_first
from ddpm_fast.runtime.dispatch import forced_backend, in_forward_mode


def weights_format(device: torch.device) -> torch.memory_format:
    """The memory format of convolution weights: channels-last on CUDA, and on meta tensors, which represent CUDA's.

    cuDNN would copy them in every call otherwise. oneDNN copies them into blocks of its own in either case.
    """
    return torch.channels_last if device.type in ("cuda", "meta") else torch.contiguous_format


def maps_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format of a network's maps of the dtype and device of x: channels-last where kernels expect it.

    These are CUDA's kernels and the CPU's native ones; torch's own convolutions on the CPU do not.
    """
    native = (
        x.device.type == "cpu"
        and forced_backend() not in ("triton", "reference")
        and not in_forward_mode()
        and why_steps_come_first(x) is None
        and why_not_on_cpu({"x": x}) is None
    )
    return torch.channels_last if native else weights_format(x.device)
