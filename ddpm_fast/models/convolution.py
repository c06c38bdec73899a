"""The network's single convolutions: 3×3, the first one, and those that change the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast.models.derived_weights import HasDerivedWeight
from ddpm_fast.models.narrow_weights import Group, dtype_of_copies, narrow
from ddpm_fast.models.stock import (
    calls_every_module,
    is_convolution,
    is_instance,
    is_unmodified,
    keeps_size,
    parameter,
    stock,
    why_by_modules,
)
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.resample.composite import upsampling_taps
from ddpm_fast.ops.resample.op import unchecked_downsample_conv, unchecked_upsample_conv
from ddpm_fast.ops.stem_conv.op import reads_in_place, stem_conv
from ddpm_fast.runtime.autocast import autocast_dtype, no_autocast, to_autocast_dtype


@stock
class Conv3x3(nn.Conv2d):
    """A 3×3 convolution of stride 1 with padding 1: (B, C, H, W) → (B, K, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None or not keeps_size(self, 3):  # a user has changed the settings
            return super().forward(x)
        (x,) = to_autocast_dtype(x)
        return conv3x3(x, narrow(self, "weight"), narrow(self, "bias"))

    def before_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The output without its bias, and the bias; None where a user has changed the settings."""
        if self.bias is None or not keeps_size(self, 3):
            return None
        (x,) = to_autocast_dtype(x)
        return conv3x3(x, narrow(self, "weight")), narrow(self, "bias")

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`."""
        return _weight_and_bias(self) if self.bias is not None and keeps_size(self, 3) else []


class Conv4x4(nn.Conv2d):
    """A 4×4 convolution of stride 2 with padding 1: (B, C, H, W) → (B, K, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or not self._is_as_made():
            return super().forward(x)
        (x,) = to_autocast_dtype(x)
        weight, bias = narrow(self, "weight"), narrow(self, "bias")
        with no_autocast(x.device.type):
            return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), stride=2, padding=1)

    def _is_as_made(self) -> bool:
        """False where a user has changed the settings."""
        own = self.__dict__
        return (
            self.bias is not None
            and "_conv_forward" not in own
            and (own["kernel_size"], own["stride"], own["padding"]) == ((4, 4), (2, 2), (1, 1))
            and (own["dilation"], own["groups"], own["padding_mode"]) == ((1, 1), 1, "zeros")
        )

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`."""
        return _weight_and_bias(self) if self._is_as_made() else []


@stock
class StemConv(nn.Conv2d):
    """The network's first convolution, of odd side: (B, C, H, W) → (B, K, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, side: int):
        super().__init__(in_channels, out_channels, side, padding=side // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or not self._takes(x):
            return super().forward(x)
        (x,) = to_autocast_dtype(x)
        return stem_conv(x, narrow(self, "weight"), narrow(self, "bias"))

    def compute(self, maps: Sequence[torch.Tensor], layout: torch.memory_format) -> torch.Tensor:
        """The convolution of maps (B, C_i, H, W) side by side, in the layout that the network's maps have.

        Native code reads the maps where they are. Otherwise they become one tensor of that layout, since torch's
        convolution takes one; and so where a user has changed the module, which is then called.
        """
        if is_unmodified(self) and self._takes(maps[0]):
            maps = to_autocast_dtype(*maps)
            first, *beside = maps
            weight, bias = narrow(self, "weight"), narrow(self, "bias")
            if reads_in_place(first, weight, bias, beside=beside):
                return stem_conv(first, weight, bias, beside=beside)
        x = one_map(maps, layout)
        out = self(x)
        # Of one channel a map is of both layouts, and torch's convolution chooses one.
        return out.contiguous(memory_format=layout) if x.shape[1] == 1 else out

    def _takes(self, x: torch.Tensor) -> bool:
        """False where a user has changed the settings, and where torch's convolution raises for the dtype of x."""
        fits = x.dtype is parameter(self, "weight").dtype or autocast_dtype(x.device.type) is not None
        return fits and self._is_as_made()

    def _is_as_made(self) -> bool:
        """False where a user has changed the settings."""
        return self.bias is not None and keeps_size(self, self.weight.shape[-1])

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`."""
        return _weight_and_bias(self) if self._is_as_made() else []


def one_map(maps: Sequence[torch.Tensor], layout: torch.memory_format) -> torch.Tensor:
    """Maps (B, C_i, H, W) side by side as one, (B, Σ C_i, H, W)."""
    x = maps[0] if len(maps) == 1 else torch.cat(list(maps), dim=1)
    return x.contiguous(memory_format=layout)


@stock
class Upsample(nn.Sequential, HasDerivedWeight):
    """Nearest 2× upsampling and a 3×3 convolution, as one op: (B, C, H, W) → (B, dim_out, 2H, 2W)."""

    def __init__(self, dim: int, dim_out: int | None = None):
        convolution = nn.Conv2d(dim, dim if dim_out is None else dim_out, 3, padding=1)
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), convolution)

    def derive(self) -> torch.Tensor | None:
        """The taps of the four 2×2 convolutions; None where the modules are called."""
        return _in_dtype_of_copies(upsampling_taps(parameter(self[1], "weight"))) if self._is_fused() else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.before_bias(x, adds_bias=True)
        return super().forward(x) if found is None else found[0]

    def before_bias(self, x: torch.Tensor, adds_bias: bool = False) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The output without its bias unless `adds_bias`, and the bias; None where the modules are called."""
        if not self._is_fused():
            return None
        conv = self._modules["1"]
        (x,) = to_autocast_dtype(x)
        bias = narrow(conv, "bias")
        taps = _fitting(self.built(), x, conv)
        return unchecked_upsample_conv(x, narrow(conv, "weight"), bias if adds_bias else None, taps=taps), bias

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`."""
        return _weight_and_bias(self._modules["1"]) if self._is_fused() else []

    def _is_fused(self) -> bool:
        modules: dict[str, Any] = self._modules
        if calls_every_module() or len(modules) != 2 or not is_instance(modules.get("0"), nn.Upsample):
            return False
        resize = modules["0"]
        is_nearest = (resize.mode, resize.scale_factor, resize.size) == ("nearest", 2.0, None)
        return is_nearest and is_convolution(modules.get("1"), 3)

    def why_by_modules(self) -> str | None:
        """Why the modules are called one after another, in one clause; None where they are one op."""
        return None if self._is_fused() else why_by_modules(self)


@stock
class Downsample(nn.Sequential, HasDerivedWeight):
    """Pixel-unshuffle by 2 and a 1×1 convolution, as one op: (B, C, H, W) → (B, dim_out, H/2, W/2).

    The weight keeps the shape (dim_out, 4·C, 1, 1) of the 1×1 convolution. Its input channels are ordered
    (channel, row, column), so the same numbers are a (dim_out, C, 2, 2) kernel of stride 2.
    """

    def __init__(self, dim: int, dim_out: int | None = None):
        super().__init__(nn.PixelUnshuffle(2), nn.Conv2d(dim * 4, dim if dim_out is None else dim_out, 1))

    def derive(self) -> torch.Tensor | None:
        """The weight as a 2×2 kernel; None where the modules are called."""
        return _in_dtype_of_copies(self._kernel()) if self._is_fused() else None

    def _kernel(self) -> torch.Tensor:
        weight = narrow(self._modules["1"], "weight")
        weight = weight.reshape(weight.shape[0], weight.shape[1] // 4, 2, 2)
        return weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_fused():
            return super().forward(x)
        conv = self._modules["1"]
        (x,) = to_autocast_dtype(x)
        kernel = _fitting(self.built(), x, conv)
        kernel = self._kernel() if kernel is None else kernel
        return unchecked_downsample_conv(x, kernel, narrow(conv, "bias"))

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`."""
        return _weight_and_bias(self._modules["1"]) if self._is_fused() else []

    def _is_fused(self) -> bool:
        modules: dict[str, Any] = self._modules
        if calls_every_module() or len(modules) != 2 or not is_instance(modules.get("0"), nn.PixelUnshuffle):
            return False
        return modules["0"].downscale_factor == 2 and is_convolution(modules.get("1"), 1)

    def why_by_modules(self) -> str | None:
        """Why the modules are called one after another, in one clause; None where they are one op."""
        return None if self._is_fused() else why_by_modules(self)


def _weight_and_bias(conv: Any) -> list[Group]:
    return [(parameter(conv, "weight"),), (parameter(conv, "bias"),)]


def _in_dtype_of_copies(derived: torch.Tensor) -> torch.Tensor:
    """In the dtype that the convolution reads, so that no call casts it; as it is where native code reads float32."""
    dtype = dtype_of_copies(derived.device)
    return derived if dtype is None else derived.to(dtype)


def _fitting(derived: torch.Tensor | None, x: torch.Tensor, conv: Any) -> torch.Tensor | None:
    """What was derived from a weight, unless in the dtype of an autocast that is no longer on."""
    if derived is None or derived.dtype in (x.dtype, parameter(conv, "weight").dtype):
        return derived
    return None
