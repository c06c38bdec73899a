"""Modules of torch itself, in any accelerated network; how several of them are known by what they are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddpm_fast.integrations.family import Fast, channels_last, declare, fast, is_unchanged, own_forward
from ddpm_fast.models import convolution
from ddpm_fast.models.narrow_weights import narrow
from ddpm_fast.models.stock import calls_every_module, is_convolution, is_instance, keeps_size
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.strided_conv.op import strided_conv
from ddpm_fast.runtime.autocast import to_autocast_dtype


def _why_not_conv3x3(module: Any) -> str | None:
    if not keeps_size(module, 3):
        return "it is no 3×3 convolution of stride 1 with zeros around"
    return "it has no bias" if module.bias is None else None


@fast("torch.nn.modules.conv.Conv2d", runs="conv3x3", refuses=_why_not_conv3x3)
def conv2d(module: Any, input: torch.Tensor) -> torch.Tensor:
    """`nn.Conv2d` of side 3 that keeps height and width: (B, C, H, W) → (B, K, H, W)."""
    if input.dim() != 4:
        return own_forward(module, input)
    (x,) = to_autocast_dtype(channels_last(input))
    return conv3x3(x, narrow(module, "weight"), narrow(module, "bias"))


def _why_not_strided_conv(module: Any) -> str | None:
    own = module.__dict__
    plain = own["dilation"] == (1, 1) and own["groups"] == 1 and own["padding_mode"] == "zeros"
    if plain and "_conv_forward" not in own and (own["kernel_size"], own["stride"]) == ((3, 3), (2, 2)):
        return None if own["padding"] in ((0, 0), (1, 1)) else "its padding is neither 0 nor 1"
    return "it is no 3×3 convolution of stride 2 with zeros around"


@fast("torch.nn.modules.conv.Conv2d", runs="strided_conv", refuses=_why_not_strided_conv, order=1)
def strided_conv2d(module: Any, input: torch.Tensor) -> torch.Tensor:
    """`nn.Conv2d` of side 3 and stride 2: (B, C, H, W) → (B, K, about H / 2, about W / 2)."""
    if input.dim() != 4 or min(input.shape[2:]) + 2 * module.padding[0] < 3:
        return own_forward(module, input)
    (x,) = to_autocast_dtype(channels_last(input))
    return strided_conv(x, narrow(module, "weight"), narrow(module, "bias"), padding=module.padding[0])


def _why_not_stem(conv: Any) -> str | None:
    """For a network's first convolution."""
    side = conv.kernel_size[0]
    if side < 3 or conv.in_channels > (4 if side == 3 else 16):
        return "it is no convolution of images, of few channels and a side of 3 or more"
    keeps = keeps_size(conv, side) and conv.bias is not None
    return None if keeps else "it does not keep height and width, or has no bias"


class _Downsample(convolution.Downsample):
    """Its pixel-unshuffle is an einops layer."""

    def _is_fused(self) -> bool:
        modules: dict[str, Any] = self._modules
        return not calls_every_module() and _is_unshuffle(modules.get("0")) and is_convolution(modules.get("1"), 1)


def _is_unshuffle(layer: Any) -> bool:
    if not is_unchanged(layer, "einops.layers.torch.Rearrange"):
        return False
    return layer.pattern == "b c (h p1) (w p2) -> b (c p1 p2) h w" and layer.axes_lengths == {"p1": 2, "p2": 2}


def _why_not_downsample(module: Any) -> str | None:
    layers = list(module._modules.values())
    if len(layers) == 2 and _is_unshuffle(layers[0]) and is_convolution(layers[1], 1):
        return None
    return "it is no pixel-unshuffle and 1×1 convolution"


def _why_not_upsample(module: Any) -> str | None:
    layers = list(module._modules.values())
    if len(layers) == 2 and is_instance(layers[0], nn.Upsample) and is_convolution(layers[1], 3):
        resize = layers[0]
        if (resize.mode, resize.scale_factor, resize.size) == ("nearest", 2.0, None):
            return None
    return "it is no nearest upsampling by 2 and 3×3 convolution"


declare(
    Fast(
        "torch.nn.modules.conv.Conv2d",
        "stem_conv",
        _why_not_stem,
        mixin=convolution.StemConv,
        stands_for=convolution.StemConv,
        order=-1,  # with three channels half the time of conv3x3
    )
)
_SEQUENTIAL = "torch.nn.modules.container.Sequential"
declare(Fast(_SEQUENTIAL, "downsample_conv", _why_not_downsample, mixin=_Downsample, stands_for=convolution.Downsample))
declare(
    Fast(_SEQUENTIAL, "upsample_conv", _why_not_upsample, mixin=convolution.Upsample, stands_for=convolution.Upsample)
)
