"""Memory formats: in which layout maps and the weights of convolutions are fastest."""

from __future__ import annotations

import torch

from ddpm_fast.runtime import extension, triton_launch
from ddpm_fast.runtime.dispatch import forced_backend, in_forward_mode


def weights_format(device: torch.device) -> torch.memory_format:
    """The memory format of convolution weights: channels-last on CUDA, and on meta tensors, which represent CUDA's.

    cuDNN would copy them in every call otherwise. oneDNN copies them into blocks of its own in either case.
    """
    return torch.channels_last if device.type in ("cuda", "meta") else torch.contiguous_format


def maps_format(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The memory format of a network's maps of a device and dtype: channels-last where kernels expect it.

    These are CUDA's kernels and the CPU's native ones; torch's own convolutions on the CPU do not.
    """
    native = (
        device.type == "cpu"
        and dtype != torch.float64
        and forced_backend() not in ("triton", "reference")
        and not in_forward_mode()
        and triton_launch.why_not_triton(device) is not None
        and extension.why_not(device) is None
    )
    return torch.channels_last if native else weights_format(device)
