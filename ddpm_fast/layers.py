"""The UNet's building blocks, with the peer's parameter names and shapes.

Each module's weights stay in the peer's layout, so checkpoints load both ways; what runs may use another form of the
same formula (DESIGN.md, "Algebra before kernels").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ddpm_fast import noise
from ddpm_fast.ops.norm_silu.op import group_norm_silu, rms_norm_silu


class _UpsampleConv2d(nn.Conv2d):
    """Nearest 2× upsampling and a 3×3 convolution; the large map between them is made again in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, dim_out, 2H, 2W)
        return _conv_of_recomputed(_nearest_2x, 1, self.weight, self.bias, x)


def _nearest_2x(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def Upsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """Nearest 2× upsampling and a 3×3 convolution: (B, C, H, W) → (B, dim_out, 2H, 2W)."""
    # The identity stands where the peer upsamples, so that the convolution is "1" in the state dict.
    return nn.Sequential(nn.Identity(), _UpsampleConv2d(dim, dim if dim_out is None else dim_out, 3, padding=1))


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
        return _rms_norm(x, self.g)


def _rms_norm(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return rms_norm_silu(x, g, activation=False)


class _ConvOfRecomputed(torch.autograd.Function):
    """conv2d(h, weight, bias) of stride 1 for h = make(*sources); keeps the sources for backward instead of h.

    The sources are smaller than h, or kept by what made h anyway; making h again before the weight's gradient saves a
    map for one more elementwise pass. Gradients flow to h, weight and bias; those of the sources flow through h.
    """

    @staticmethod
    def forward(ctx, make: Callable, padding: int, h: torch.Tensor, weight: torch.Tensor, bias, *sources):
        ctx.make, ctx.padding = make, padding
        ctx.save_for_backward(weight, *sources)
        return F.conv2d(h, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable  # h is made again without a graph: a second derivative through it would be wrong
    def backward(ctx, grad):
        weight, *sources = ctx.saved_tensors
        with torch.no_grad():
            h = ctx.make(*sources).to(weight.dtype)
        geometry = ((1, 1), (ctx.padding,) * 2, (1, 1), False, (0, 0), 1)
        wanted = ctx.needs_input_grad[2:5]
        bias_size = (weight.shape[0],) if wanted[2] else None
        gradients = torch.ops.aten.convolution_backward(grad, h, weight, bias_size, *geometry, wanted)
        return None, None, *gradients, *(None for _ in sources)


def _conv_of_recomputed(
    make: Callable, padding: int, weight: torch.Tensor, bias: torch.Tensor | None, *sources
) -> torch.Tensor:
    """conv2d(make(*sources), weight, bias), without keeping what `make` gives."""
    h = make(*sources)
    device_type = h.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        h, weight = h.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _ConvOfRecomputed.apply(make, padding, h, weight, bias, *sources)


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
        make, *sources = self.after_convolution(F.conv2d(x, self.proj.weight, padding=1), scale_shift)
        return make(*sources, residual=residual)

    def after_convolution(
        self, y: torch.Tensor, scale_shift: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple:  # (B, dim_out, H, W), two of (B, dim_out)
        """What follows the convolution's output y, as a function and its tensors, so that it can be called again."""
        scale, shift = (None, None) if scale_shift is None else scale_shift
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        seed = noise.draw_seed(y.device) if dropout_p > 0 else None
        norm = self.norm
        if isinstance(norm, RMSNorm):
            return partial(_rms_block, dropout_p=dropout_p), y, norm.g, self.proj.bias, scale, shift, seed
        make = partial(_group_block, groups=norm.num_groups, eps=norm.eps, dropout_p=dropout_p)
        return make, y, norm.weight, norm.bias, self.proj.bias, scale, shift, seed


def _rms_block(y, g, bias, scale, shift, seed, *, dropout_p, residual=None) -> torch.Tensor:
    return rms_norm_silu(
        y, g, bias=bias, scale=scale, shift=shift, residual=residual, dropout_p=dropout_p, seed=seed
    )


def _group_block(y, weight, affine, bias, scale, shift, seed, *, groups, eps, dropout_p, residual=None) -> torch.Tensor:
    return group_norm_silu(
        y, weight, affine, groups=groups, eps=eps, bias=bias, scale=scale, shift=shift, residual=residual,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


class ResnetBlock(nn.Module):
    """Two blocks around a residual; the first is scaled and shifted by the time embedding.

    With `low_memory` the map between the two blocks is made again in backward instead of being kept.
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
        if not (self.low_memory and torch.is_grad_enabled()):
            return self.block2(self.block1(x, scale_shift=scale_shift), residual=self.res_conv(x))
        y1 = F.conv2d(x, self.block1.proj.weight, padding=1)
        make1, *sources1 = self.block1.after_convolution(y1, scale_shift)
        y2 = _conv_of_recomputed(make1, 1, self.block2.proj.weight, None, *sources1)
        make2, *sources2 = self.block2.after_convolution(y2)
        return make2(*sources2, residual=self.res_conv(x))


class LinearAttention(nn.Module):
    """Linear attention with learned memory keys and values (Shen et al. 2021, "Efficient Attention").

    Softmax over the head dimension for q and over positions for k. Shapes: (B, C, H, W) → (B, C, H, W). With
    `low_memory` only x is kept for backward, which runs the forward again.
    """

    def __init__(
        self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4, low_memory: bool = False
    ):
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.low_memory and torch.is_grad_enabled():
            return checkpoint(self._attend, x, use_reentrant=False, preserve_rng_state=False)
        return self._attend(x)

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        B, C, H, W = x.shape
        qkv = _conv_of_recomputed(_rms_norm, 0, self.to_qkv.weight, None, x, self.norm.g)
        qkv = qkv.reshape(B, 3, self.heads, self.dim_head, H * W)
        q, k, v = qkv.unbind(1)  # (B, heads, D, N)
        mem_k, mem_v = self.mem_kv.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, D, M)
        k = torch.cat((mem_k, k), dim=-1).softmax(dim=-1)
        v = torch.cat((mem_v, v), dim=-1)
        q = q.softmax(dim=-2)
        # The scale belongs to q, but the context is small: scaling it keeps one map less for backward.
        context = (k @ v.transpose(-1, -2)) * self.scale  # (B, heads, D, E)
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
        qkv = _conv_of_recomputed(_rms_norm, 0, self.to_qkv.weight, None, x, self.norm.g)
        qkv = qkv.reshape(B, 3, self.heads, self.dim_head, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # (B, heads, N, D)
        mem_k, mem_v = self.mem_kv.to(k.dtype)[:, None].expand(-1, B, -1, -1, -1)  # (B, heads, M, D)
        k = torch.cat((mem_k, k), dim=-2)
        v = torch.cat((mem_v, v), dim=-2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(-1, -2).reshape(B, self.heads * self.dim_head, H, W))
