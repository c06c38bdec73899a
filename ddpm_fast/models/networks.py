"""The networks that files hold the arguments of, by the names that files give them."""

from __future__ import annotations

from typing import Any

from ddpm_fast.models import classifier_free_unet
from ddpm_fast.models.unet import Unet
from ddpm_fast.models.unet_base import UnetBase

NETWORKS: dict[str, type[UnetBase]] = {"unet": Unet, "classifier_free": classifier_free_unet.Unet}


def network_name(network: Any) -> str | None:
    """The name of a network's class among `NETWORKS`; None for others, whose arguments a file does not hold."""
    return next((name for name, cls in NETWORKS.items() if isinstance(network, cls)), None)
