"""The network's single convolutions: 3×3, the first one, and those that change the resolution."""

from __future__ import annotations

import torch
from torch import nn

from ddpm_fast.models.derived_weights import HasDerivedWeight
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.resample.composite import upsampling_taps
from ddpm_fast.ops.resample.op import unchecked_downsample_conv, unchecked_upsample_conv
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.runtime.autocast import to_autocast_dtype


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution of stride 1 with padding 1: (B, C, H, W) → (B, K, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv3x3(*to_autocast_dtype(x), self.weight, self.bias)


class StemConv(nn.Conv2d):
    """The network's first convolution, of odd side: (B, C, H, W) → (B, K, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, side: int):
        super().__init__(in_channels, out_channels, side, padding=side // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return stem_conv(*to_autocast_dtype(x), self.weight, self.bias)


class _UpsampleConv2d(nn.Conv2d, HasDerivedWeight):
    """Nearest 2× upsampling and a 3×3 convolution: (B, C, H, W) → (B, dim_out, 2H, 2W)."""

    def derive(self) -> torch.Tensor:
        return upsampling_taps(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return unchecked_upsample_conv(*to_autocast_dtype(x), self.weight, self.bias, taps=self._built)


def Upsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """Nearest 2× upsampling and a 3×3 convolution: (B, C, H, W) → (B, dim_out, 2H, 2W)."""
    # The identity is in the place where upstream upsamples, so that the convolution is "1" in the state dict.
    return nn.Sequential(nn.Identity(), _UpsampleConv2d(dim, dim if dim_out is None else dim_out, 3, padding=1))


class _PixelUnshuffleConv2d(nn.Conv2d, HasDerivedWeight):
    """Pixel-unshuffle by 2 and a 1×1 convolution: (B, C, H, W) → (B, dim_out, H/2, W/2).

    The weight keeps the shape (dim_out, 4·C, 1, 1) of the 1×1 convolution. Its input channels are ordered
    (channel, row, column), so the same numbers are a (dim_out, C, 2, 2) kernel of stride 2.
    """

    def derive(self) -> torch.Tensor:
        weight = self.weight.reshape(self.out_channels, self.in_channels // 4, 2, 2)
        return weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return unchecked_downsample_conv(*to_autocast_dtype(x), self.derived(), self.bias)


def Downsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """Pixel-unshuffle by 2 and a 1×1 convolution: (B, C, H, W) → (B, dim_out, H/2, W/2)."""
    # The identity is in the place where upstream has its rearrange, so that the convolution is "1" in the state dict.
    return nn.Sequential(nn.Identity(), _PixelUnshuffleConv2d(dim * 4, dim if dim_out is None else dim_out, 1))
