"""The UNet's building blocks, with the peer's parameter names and shapes.

Each module's weights stay in the peer's layout, so checkpoints load both ways; what runs may use another form of the
same formula (DESIGN.md, "Algebra before kernels").
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast import noise
from ddpm_fast.ops.norm_silu.op import group_norm_silu, rms_norm_silu


def Upsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """Nearest 2× upsampling and a 3×3 convolution: (B, C, H, W) → (B, dim_out, 2H, 2W)."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(dim, dim if dim_out is None else dim_out, 3, padding=1),
    )


class _PixelUnshuffleConv2d(nn.Conv2d):
    """Pixel-unshuffle by 2 and a 1×1 convolution, computed as one 2×2 convolution of stride 2.

    The weight keeps the shape (dim_out, 4·dim, 1, 1) of the 1×1 convolution; its input channels are ordered
    (channel, row, column), so the same numbers are a (dim_out, dim, 2, 2) kernel.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, dim_out, H/2, W/2)
        weight = self.weight.reshape(self.out_channels, self.in_channels // 4, 2, 2)
        return F.conv2d(x, weight, self.bias, stride=2)


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
        return F.normalize(x, dim=1) * (self.g * self.scale)


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


def make_norm(norm: str, dim: int, groups: int) -> nn.Module:
    """The norm of a residual block: "rms" is the peer's 2.x network, "group" its 1.x network."""
    return RMSNorm(dim) if norm == "rms" else nn.GroupNorm(groups, dim)


class Block(nn.Module):
    """3×3 convolution, norm, optional scale and shift, SiLU, dropout, and a residual where one is given.

    All after the convolution, its bias included, is one op (DESIGN.md, "Algebra before kernels").
    """

    def __init__(self, dim: int, dim_out: int, dropout: float = 0.0, norm: str = "rms", groups: int = 8):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = make_norm(norm, dim_out, groups)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: torch.Tensor,
        scale_shift: tuple[torch.Tensor, torch.Tensor] | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:  # (B, dim, H, W), two of (B, dim_out), (B, dim_out, H, W) -> (B, dim_out, H, W)
        x = F.conv2d(x, self.proj.weight, padding=1)
        scale, shift = (None, None) if scale_shift is None else scale_shift
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        options = {
            "bias": self.proj.bias,
            "scale": scale,
            "shift": shift,
            "residual": residual,
            "dropout_p": dropout_p,
            "seed": noise.draw_seed(x.device) if dropout_p > 0 else None,
        }
        if isinstance(self.norm, RMSNorm):
            return rms_norm_silu(x, self.norm.g, **options)
        norm = self.norm
        return group_norm_silu(x, norm.weight, norm.bias, groups=norm.num_groups, eps=norm.eps, **options)


class ResnetBlock(nn.Module):
    """Two blocks around a residual; the first is scaled and shifted by the time embedding."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        time_emb_dim: int | None = None,
        dropout: float = 0.0,
        norm: str = "rms",
        groups: int = 8,
    ):
        super().__init__()
        self.mlp = None
        if time_emb_dim is not None:
            self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim, dim_out * 2))
        self.block1 = Block(dim, dim_out, dropout=dropout, norm=norm, groups=groups)
        self.block2 = Block(dim_out, dim_out, norm=norm, groups=groups)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(
        self, x: torch.Tensor, time_emb: torch.Tensor | None = None
    ) -> torch.Tensor:  # (B, dim, H, W), (B, time_emb_dim) -> (B, dim_out, H, W)
        scale_shift = None
        if self.mlp is not None and time_emb is not None:
            scale_shift = self.mlp(time_emb).chunk(2, dim=1)
        return self.block2(self.block1(x, scale_shift=scale_shift), residual=self.res_conv(x))


class LinearAttention(nn.Module):
    """Linear attention with learned memory keys and values (Shen et al. 2021, "Efficient Attention").

    Softmax over the head dimension for q and over positions for k. Shapes: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4):
        super().__init__()
        self.scale = dim_head**-0.5
        self.heads = heads
        self.dim_head = dim_head
        hidden_dim = dim_head * heads
        self.norm = RMSNorm(dim)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, dim_head, num_mem_kv))
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), RMSNorm(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(B, 3, self.heads, self.dim_head, H * W)
        q, k, v = qkv.unbind(1)  # (B, heads, D, N)
        mem_k, mem_v = self.mem_kv.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, D, M)
        k = torch.cat((mem_k, k), dim=-1).softmax(dim=-1)
        v = torch.cat((mem_v, v), dim=-1)
        q = q.softmax(dim=-2) * self.scale
        context = k @ v.transpose(-1, -2)  # (B, heads, D, E)
        out = context.transpose(-1, -2) @ q  # (B, heads, E, N)
        return self.to_out(out.reshape(B, self.heads * self.dim_head, H, W))


class Attention(nn.Module):
    """Softmax attention over all positions, with learned memory keys and values (Vaswani et al. 2017, eq. 1).

    `flash` is kept for the peer's signature: torch's scaled_dot_product_attention runs in either case and picks its
    kernel by device and dtype. Shapes: (B, C, H, W) → (B, C, H, W).
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(B, 3, self.heads, self.dim_head, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, N, D)
        mem_k, mem_v = self.mem_kv.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, M, D)
        k = torch.cat((mem_k, k), dim=-2)
        v = torch.cat((mem_v, v), dim=-2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(-1, -2).reshape(B, self.heads * self.dim_head, H, W))
