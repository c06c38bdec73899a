"""Packages whose networks the tests and benchmarks accelerate, where they need more than the tests install."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

# Where the Makefile puts packages without what they need.
REFERENCE_PACKAGES = Path(sys.prefix) / "reference-packages"

# What physicsnemo imports at its start and its UNets do not use: kernels for meshes, access to S3, annotations.
_UNUSED_BY_EDM = (
    "warp", "warp.optim", "warp.optim.linear", "s3fs", "jaxtyping", "tensordict", "timm", "timm.layers",
    "timm.layers.attention", "timm.models", "timm.models.swin_transformer", "nvtx",
)  # fmt: skip


def small_diffusers_unet() -> Any:
    """diffusers' UNet2DModel with attention in its second stage, for images (3, 8, 8)."""
    return importlib.import_module("diffusers").UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def small_openai_unet() -> Any:
    """The same of torchcfm's UNetModel."""
    return importlib.import_module("torchcfm.models.unet.unet").UNetModel(
        image_size=8, in_channels=3, model_channels=64, out_channels=3, num_res_blocks=1, attention_resolutions=(2,),
        channel_mult=(1, 2), num_heads=2,
    )  # fmt: skip


def small_edm_unet(kind: str = "SongUNet") -> Any:
    """The same of EDM's networks."""
    return getattr(import_edm(), kind)(
        img_resolution=8, in_channels=3, out_channels=3, model_channels=32, num_blocks=1, channel_mult=[1, 2],
        attn_resolutions=[4], dropout=0.0,
    )  # fmt: skip


def import_edm() -> ModuleType:
    """The module of physicsnemo with EDM's networks; absent packages that these do not use are replaced meanwhile."""
    name = "physicsnemo.models.diffusion_unets"
    if name in sys.modules:
        return sys.modules[name]
    if importlib.util.find_spec("physicsnemo") is None:
        sys.path.append(str(REFERENCE_PACKAGES))
    tops = {module.partition(".")[0] for module in _UNUSED_BY_EDM}
    absent = {top for top in tops if top not in sys.modules and importlib.util.find_spec(top) is None}
    replaced = [module for module in _UNUSED_BY_EDM if module.partition(".")[0] in absent]
    for module in replaced:
        sys.modules[module] = MagicMock(name=module, __spec__=None, __version__="0")
    try:
        return importlib.import_module(name)
    finally:
        for module in replaced:
            del sys.modules[module]
