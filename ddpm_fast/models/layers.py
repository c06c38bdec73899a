"""The UNet's building blocks, with the parameter names and shapes of upstream.

A block whose modules are all stock calls one op with their weights; otherwise it calls its modules one after another.
Weights stay in upstream's layout, so checkpoints load both ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpm_fast import noise
from ddpm_fast.models.derived_weights import DerivesWeights
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.attention_block.op import unchecked_attention_block
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.linear_attention_block.op import unchecked_linear_attention_block
from ddpm_fast.ops.norm_linear.op import linears
from ddpm_fast.ops.norm_silu.op import rms_norm_silu
from ddpm_fast.ops.resample.composite import upsampling_taps
from ddpm_fast.ops.resample.op import downsample_conv, upsample_conv
from ddpm_fast.ops.resnet_block.op import unchecked_resnet_block
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.runtime.autocast import to_autocast_dtype


def is_plain(*modules: nn.Module) -> bool:
    """True if every module is stock and has no hooks, so its weights may be used without calling it."""
    for module in modules:  # dicts, not attributes: a small network asks two hundred times in a forward pass
        own = module.__dict__
        if type(module) not in _PLAIN or "forward" in own:
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True


def _parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """module.name, found in a fraction of the time where it is a parameter, as it nearly always is."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


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


class _UpsampleConv2d(nn.Conv2d, DerivesWeights):
    """Nearest 2× upsampling and a 3×3 convolution: (B, C, H, W) → (B, dim_out, 2H, 2W)."""

    def derive(self) -> torch.Tensor:
        return upsampling_taps(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return upsample_conv(*to_autocast_dtype(x), self.weight, self.bias, taps=self._frozen)


def Upsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """Nearest 2× upsampling and a 3×3 convolution: (B, C, H, W) → (B, dim_out, 2H, 2W)."""
    # The identity stands where the peer upsamples, so that the convolution is "1" in the state dict.
    return nn.Sequential(nn.Identity(), _UpsampleConv2d(dim, dim if dim_out is None else dim_out, 3, padding=1))


class _PixelUnshuffleConv2d(nn.Conv2d, DerivesWeights):
    """Pixel-unshuffle by 2 and a 1×1 convolution: (B, C, H, W) → (B, dim_out, H/2, W/2).

    The weight keeps the shape (dim_out, 4·C, 1, 1) of the 1×1 convolution. Its input channels are ordered
    (channel, row, column), so the same numbers are a (dim_out, C, 2, 2) kernel of stride 2.
    """

    def derive(self) -> torch.Tensor:
        weight = self.weight.reshape(self.out_channels, self.in_channels // 4, 2, 2)
        return weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return downsample_conv(*to_autocast_dtype(x), self.derived(), self.bias)


def Downsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """Pixel-unshuffle by 2 and a 1×1 convolution: (B, C, H, W) → (B, dim_out, H/2, W/2)."""
    # The identity stands where the peer has its rearrange, so that the convolution is "1" in the state dict.
    return nn.Sequential(nn.Identity(), _PixelUnshuffleConv2d(dim * 4, dim if dim_out is None else dim_out, 1))


class RMSNorm(nn.Module):
    """x / max(‖x‖₂, 1e-12) · g · √C over the channels (Zhang & Sennrich 2019, in the peer's form).

    Shapes: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.scale = dim**0.5
        self.g = nn.Parameter(torch.ones(1, dim, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm_silu(x, self.g, activation=False)


class SinusoidalPosEmb(nn.Module):
    """Sinusoidal embedding of the timestep (Vaswani et al. 2017, section 3.5): (B,) → (B, dim), float32."""

    def __init__(self, dim: int, theta: float = 10000):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim must be even and at least 4 for a sinusoidal embedding, got {dim}")
        self.dim = dim
        self.theta = theta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half_dim = self.dim // 2
        exponent = math.log(self.theta) / (half_dim - 1)
        frequencies = torch.exp(torch.arange(half_dim, device=x.device) * -exponent)
        angles = x[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class RandomOrLearnedSinusoidalPosEmb(nn.Module):
    """Fourier features with random or learned frequencies (Tancik et al. 2020): (B,) → (B, dim + 1)."""

    def __init__(self, dim: int, is_random: bool = False):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"learned_sinusoidal_dim must be even and at least 2, got {dim}")
        self.weights = nn.Parameter(torch.randn(dim // 2), requires_grad=not is_random)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        angles = x * self.weights[None, :] * 2 * math.pi
        return torch.cat((x, angles.sin(), angles.cos()), dim=-1)


def linears_of_one_input(x: torch.Tensor, layers: Sequence[nn.Linear]) -> torch.Tensor:
    """The outputs of linear layers with bias side by side, (B, D) → (B, sum of their out_features), as one product."""
    weights = [_parameter(layer, "weight") for layer in layers]
    return linears(*to_autocast_dtype(x), weights, [_parameter(layer, "bias") for layer in layers])


def make_norm(norm: str, dim: int, groups: int) -> nn.Module:
    """The norm of a residual block: "rms" is the peer's 2.x network, "group" its 1.x network."""
    return RMSNorm(dim) if norm == "rms" else nn.GroupNorm(groups, dim)


class Block(nn.Module):
    """3×3 convolution, norm, optional scale and shift, SiLU and dropout, one module after another.

    Shapes: (B, dim, H, W), two of (B, dim_out) → (B, dim_out, H, W). `ResnetBlock` computes two blocks as one op.
    """

    def __init__(self, dim: int, dim_out: int, dropout: float = 0.0, norm: str = "rms", groups: int = 8):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = make_norm(norm, dim_out, groups)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, scale_shift: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = (tensor[:, :, None, None] for tensor in scale_shift)
            x = x * (scale + 1) + shift
        return self.dropout(self.act(x))


class ResnetBlock(nn.Module):
    """Two blocks around a residual; the first is scaled and shifted by the time embedding.

    With `low_memory` backward keeps fewer maps and computes them again, see the op `resnet_block`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        time_emb_dim: int | None = None,
        dropout: float = 0.0,
        norm: str = "rms",
        groups: int = 8,
        low_memory: bool = False,
    ):
        super().__init__()
        self.low_memory = low_memory
        self.dim_out = dim_out
        self.mlp = None
        if time_emb_dim is not None:
            self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim, dim_out * 2))
        self.block1 = Block(dim, dim_out, dropout=dropout, norm=norm, groups=groups)
        self.block2 = Block(dim_out, dim_out, norm=norm, groups=groups)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(
        self,
        x: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        time_emb: torch.Tensor | None = None,
        scale_shift: tuple[torch.Tensor, torch.Tensor] | None = None,
        final_conv: nn.Conv2d | None = None,
    ) -> torch.Tensor:  # (B, dim, H, W), (B, time_emb_dim) or two of (B, dim_out) -> (B, dim_out, H, W)
        """One residual block.

        Args:
            x: a map, or two whose channels stand side by side.
            scale_shift: the output of `mlp` where the caller has computed it already.
            final_conv: a stock 1×1 convolution of the block's output, which `low_memory` does not keep for it.
        """
        if self.mlp is not None and time_emb is not None:
            scale_shift = self.mlp(time_emb).chunk(2, dim=1)
        modules = self._modules  # see `_parameter`
        block1, block2, res_conv = modules["block1"], modules["block2"], modules["res_conv"]
        if not is_plain(block1, block2, res_conv, *block1._modules.values(), *block2._modules.values()):
            x = torch.cat(x, dim=1) if isinstance(x, tuple) else x
            x = block2(block1(x, scale_shift)) + res_conv(x)
            return x if final_conv is None else final_conv(x)
        maps = to_autocast_dtype(*x) if isinstance(x, tuple) else to_autocast_dtype(x)
        scale, shift = (None, None) if scale_shift is None else scale_shift
        options = {"beside": maps[1] if len(maps) == 2 else None, "scale": scale, "shift": shift}
        block1, block2 = block1._modules, block2._modules
        dropout = block1["dropout"]
        if dropout.training and dropout.p > 0:
            options |= {"dropout_p": dropout.p, "seed": noise.draw_seed(maps[0].device)}
        norm1, norm2 = block1["norm"], block2["norm"]
        if isinstance(norm1, RMSNorm):
            gain1, gain2 = _parameter(norm1, "g"), _parameter(norm2, "g")
        else:
            gain1, gain2 = norm1.weight, norm2.weight
            options |= {"affine1": norm1.bias, "affine2": norm2.bias, "groups": norm1.num_groups, "eps": norm1.eps}
        if isinstance(res_conv, nn.Conv2d):
            options |= {"res_weight": _parameter(res_conv, "weight"), "res_bias": _parameter(res_conv, "bias")}
        if final_conv is not None:
            options |= {"out_weight": _parameter(final_conv, "weight"), "out_bias": _parameter(final_conv, "bias")}
        conv1, conv2 = block1["proj"], block2["proj"]
        return unchecked_resnet_block(
            maps[0], _parameter(conv1, "weight"), _parameter(conv1, "bias"), gain1,
            _parameter(conv2, "weight"), _parameter(conv2, "bias"), gain2, recompute=self.low_memory, **options,
        )  # fmt: skip


class LinearAttention(nn.Module):
    """Linear attention with learned memory keys and values (Shen et al. 2021, "Efficient Attention").

    Softmax over the head dimension for q and over positions for k. Shapes: (B, C, H, W) → (B, C, H, W). With
    `low_memory` no map but x is kept for backward, which runs the forward again.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4, low_memory: bool = False):
        super().__init__()
        self.low_memory = low_memory
        self.scale = dim_head**-0.5
        self.heads = heads
        self.dim_head = dim_head
        hidden_dim = dim_head * heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), RMSNorm(dim))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of x, plus `residual` of its shape where one is given."""
        if not is_plain(self.norm, self.to_qkv, self.to_out, *self.to_out):
            out = self._by_modules(x)
            return out if residual is None else out + residual
        conv, norm = self.to_out
        return unchecked_linear_attention_block(
            *to_autocast_dtype(x), self.norm.g, self.to_qkv.weight, self.mem_kv, conv.weight, conv.bias, norm.g,
            heads=self.heads, residual=residual, recompute=self.low_memory,
        )  # fmt: skip

    def _by_modules(self, x: torch.Tensor) -> torch.Tensor:
        if self.low_memory and torch.is_grad_enabled():
            return checkpoint(self._steps, x, use_reentrant=False, preserve_rng_state=False)
        return self._steps(x)

    def _steps(self, x: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x.shape
        q, k, v = self.to_qkv(self.norm(x)).reshape(B, 3, self.heads, self.dim_head, H * W).unbind(1)
        mem_k, mem_v = self.mem_kv.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, D, M)
        k, v = torch.cat((mem_k, k), dim=-1).softmax(dim=-1), torch.cat((mem_v, v), dim=-1)
        context = (k @ v.transpose(-1, -2)) * self.scale  # (B, heads, D, E)
        return self.to_out((context.transpose(-1, -2) @ q.softmax(dim=-2)).reshape(B, -1, H, W))


class Attention(nn.Module):
    """Softmax attention over all positions, with learned memory keys and values (Vaswani et al. 2017, eq. 1).

    `flash` is kept for upstream's signature: which kernel runs does not depend on it. Shapes: (B, C, H, W) →
    (B, C, H, W).
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4, flash: bool = False):
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.flash = flash
        hidden_dim = dim_head * heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, num_mem_kv, dim_head))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of x, plus `residual` of its shape where one is given."""
        if not is_plain(self.norm, self.to_qkv, self.to_out):
            out = self.to_out(attention(self.to_qkv(self.norm(x)), self.mem_kv, heads=self.heads))
            return out if residual is None else out + residual
        return unchecked_attention_block(
            *to_autocast_dtype(x), self.norm.g, self.to_qkv.weight, self.mem_kv, self.to_out.weight, self.to_out.bias,
            heads=self.heads, residual=residual,
        )  # fmt: skip


_PLAIN = frozenset(
    (
        nn.Conv2d, nn.Linear, nn.Identity, nn.SiLU, nn.Dropout, nn.GroupNorm, nn.Sequential,
        Conv3x3, RMSNorm, Block, ResnetBlock,
    )
)  # fmt: skip
