"""What autocast is set to, asked in a way that dynamo can trace in every release of torch."""

from __future__ import annotations

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast where it is on for a type of device, else None."""
    # Small networks ask two hundred times in a forward pass, so the usual devices are not asked about.
    if device_type not in ("cpu", "cuda") and not _has_autocast(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# As in extension.py: dynamo of torch 2.9 to 2.11 cannot trace the question, and the answer never changes.
_has_autocast._dynamo_marked_constant = True
