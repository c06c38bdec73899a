"""A network of this package as a component of a diffusers pipeline. Importing this file imports diffusers.

diffusers loads a component whose class is in a module that is imported already, and finds `ModelMixin` in that module.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_fast.models.networks import NETWORKS, network_name
from ddpm_fast.models.unet_base import UnetBase


class FastUnet2D(ModelMixin, ConfigMixin):  # type: ignore[misc]  # mypy sees no types of diffusers
    """A `Unet` of this package, called as diffusers calls its `UNet2DModel`.

    Args:
        arguments: of the network.
        network: the name of its class, as checkpoints have it.
        sample_size: height and width of the images, or both at once.
        in_channels, out_channels: the network's.
    """

    @register_to_config
    def __init__(
        self,
        arguments: dict[str, Any],
        network: str = "unet",
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
    ):
        super().__init__()
        self.net: UnetBase = NETWORKS[network](**arguments)

    @classmethod
    def around(cls, network: UnetBase, sample_size: int | tuple[int, int]) -> FastUnet2D:
        """A component that holds this very network."""
        out_channels: Any = network.out_dim
        sizes = {"sample_size": sample_size, "in_channels": network.channels, "out_channels": out_channels}
        with torch.device("meta"):
            component = cls(arguments=dict(network.config), network=network_name(network), **sizes)
        component.net = network
        return component

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' `ModelMixin` does; the weights are then laid out for their device."""
        loaded = super().from_pretrained(*args, **kwargs)
        component = loaded[0] if isinstance(loaded, tuple) else loaded
        in_own_memory(component).net.to(component.device)
        return loaded

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """(B, in_channels, H, W), one timestep for all or (B,), (B,) → (B, out_channels, H, W)."""
        if isinstance(timestep, torch.Tensor):
            timestep = timestep.to(sample.device)
        conditions = {} if class_labels is None else {"classes": class_labels}
        out = self.net(sample, timestep, **conditions)
        return UNet2DOutput(sample=out) if return_dict else (out,)


def in_own_memory(module: Any) -> Any:
    """The module with its weights where torch allocates: in a file that is mapped they are not aligned."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module
