"""Upstream's class-conditional UNet, of its `classifier_free_guidance`: same arguments, parameters and function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddpm_fast.models import attention
from ddpm_fast.models.conditions import GivenConditions
from ddpm_fast.models.convolution import Conv3x3, Conv4x4, StemConv, Upsample
from ddpm_fast.models.norm import RMSNorm
from ddpm_fast.models.resnet import ResnetBlock
from ddpm_fast.models.stock import calls_every_module, is_instance, is_unmodified, stock, why_by_modules
from ddpm_fast.models.unet_base import UnetBase
from ddpm_fast.runtime.plain import as_int, as_ints, as_number, plain


@stock
class LinearAttention(attention.LinearAttention):
    """Linear attention without memory keys, of maps that a `PreNorm` has normed."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        nn.Module.__init__(self)
        self.low_memory = False
        self.scale = dim_head**-0.5
        self.heads = heads
        hidden_dim = dim_head * heads
        self.register_buffer("mem_kv", torch.empty(2, heads, dim_head, 0), persistent=False)
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(hidden_dim, dim, 1), RMSNorm(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_modules(x)

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_qkv(x)

    def why_by_modules(self) -> None:
        """Its `Residual` says so for all of the block."""


@stock
class Attention(attention.Attention):
    """Softmax attention without memory keys, of maps that a `PreNorm` has normed."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32):
        nn.Module.__init__(self)
        self.scale = dim_head**-0.5
        self.heads = heads
        hidden_dim = dim_head * heads
        self.register_buffer("mem_kv", torch.empty(2, heads, 0, dim_head), persistent=False)
        self.to_qkv = nn.Conv2d(dim, hidden_dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_modules(x)

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_qkv(x)

    def why_by_modules(self) -> None:
        """Its `Residual` says so for all of the block."""

    def _attends_as_the_op(self) -> bool:
        return self.scale == self.mem_kv.shape[-1] ** -0.5

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)


@stock
class PreNorm(nn.Module):
    """RMSNorm, then another module."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.fn = fn
        self.norm = RMSNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(self.norm(x))


@stock
class Residual(nn.Module):
    """A module's output plus its input; norm, attention and residual are one op where nobody changed them."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self._is_fused():
            return self.fn(x, *args, **kwargs) + x
        modules: dict[str, Any] = self._modules["fn"]._modules  # type: ignore[union-attr]  # see `parameter`
        return modules["fn"].compute(x, residual=x, norm=modules["norm"])

    def _is_fused(self) -> bool:
        """True if the modules inside may be computed from their weights as one op."""
        inner = self._modules["fn"]
        if calls_every_module() or not is_instance(inner, PreNorm):
            return False
        attn, norm = inner._modules["fn"], inner._modules["norm"]
        return (is_instance(attn, LinearAttention) or is_instance(attn, Attention)) and attn.is_fused(norm)

    def why_by_modules(self) -> str | None:
        """Why the module calls its modules one after another, in one clause; None where they are one op."""
        return None if self._is_fused() and is_unmodified(self) else why_by_modules(self)


class Unet(UnetBase):
    """The class-conditional UNet of `denoising-diffusion-pytorch` 2.3; checkpoints load both ways.

    Args:
        dim: width of the first stage; stage i has `dim * dim_mults[i]` channels.
        num_classes: classes are numbers in [0, num_classes).
        cond_drop_prob: how often a call hides the class of an image, unless it says otherwise.
        init_dim: channels of the first convolution, `dim` if None.
        out_dim: output channels; if None `channels`, twice that with `learned_variance`.
        dim_mults: one factor per stage; every stage but the last halves height and width.
        channels: channels of the image.
        learned_variance: twice the output channels (Nichol & Dhariwal 2021).
        learned_sinusoidal_cond, random_fourier_features, learned_sinusoidal_dim: Fourier features of the timestep with
            learned or random frequencies, for continuous time.
        attn_dim_head, attn_heads: of the softmax attention in the middle.

    Raises:
        ValueError: an argument does not fit, named in one sentence.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        cond_drop_prob: float = 0.5,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        learned_variance: bool = False,
        learned_sinusoidal_cond: bool = False,
        random_fourier_features: bool = False,
        learned_sinusoidal_dim: int = 16,
        attn_dim_head: int = 32,
        attn_heads: int = 4,
    ):
        super().__init__()
        dim = as_int("dim", dim, 1)
        num_classes = as_int("num_classes", num_classes, 1)
        cond_drop_prob = as_number("cond_drop_prob", cond_drop_prob, 0, 1)
        init_dim = None if init_dim is None else as_int("init_dim", init_dim, 1)
        out_dim = None if out_dim is None else as_int("out_dim", out_dim, 1)
        dim_mults = as_ints("dim_mults", dim_mults, 1)
        channels = as_int("channels", channels, 1)
        learned_sinusoidal_dim = as_int("learned_sinusoidal_dim", learned_sinusoidal_dim)
        attn_dim_head = as_int("attn_dim_head", attn_dim_head, 1)
        attn_heads = as_int("attn_heads", attn_heads, 1)
        self.config = {k: plain(k, v) for k, v in locals().items() if k not in ("self", "__class__")}
        if len(dim_mults) == 0:
            raise ValueError("dim_mults must have at least one entry, got none")

        self.cond_drop_prob = cond_drop_prob
        self.num_classes = num_classes
        self.channels = channels
        init_dim = dim if init_dim is None else init_dim
        # Modules are made in upstream's order, so that one seed gives both the same initial weights.
        self.init_conv = StemConv(channels, init_dim, 7)
        dims = [init_dim, *(dim * m for m in dim_mults)]
        in_out = list(zip(dims[:-1], dims[1:], strict=True))
        self._make_time_mlp(dim, learned_sinusoidal_cond, random_fourier_features, learned_sinusoidal_dim, 10000)
        classes_emb_dim = self._make_condition_embeddings(dim)

        def resnet_block(dim_in: int, dim_out: int) -> ResnetBlock:
            return ResnetBlock(dim_in, dim_out, time_emb_dim=4 * dim, conditions_emb_dim=classes_emb_dim)

        def linear_attention(width: int) -> Residual:
            return Residual(PreNorm(width, LinearAttention(width)))

        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        for stage, (dim_in, dim_out) in enumerate(in_out):
            is_last = stage == len(in_out) - 1
            downsample = Conv3x3 if is_last else Conv4x4
            blocks = [resnet_block(dim_in, dim_in), resnet_block(dim_in, dim_in), linear_attention(dim_in)]
            self.downs.append(nn.ModuleList([*blocks, downsample(dim_in, dim_out)]))

        mid_dim = dims[-1]
        self.mid_block1 = resnet_block(mid_dim, mid_dim)
        self.mid_attn = Residual(PreNorm(mid_dim, Attention(mid_dim, dim_head=attn_dim_head, heads=attn_heads)))
        self.mid_block2 = resnet_block(mid_dim, mid_dim)

        for stage, (dim_in, dim_out) in reversed(list(enumerate(in_out))):
            blocks = [resnet_block(dim_out + dim_in, dim_out) for _ in range(2)]
            upsample = Conv3x3 if stage == 0 else Upsample
            self.ups.append(nn.ModuleList([*blocks, linear_attention(dim_out), upsample(dim_out, dim_in)]))

        self.out_dim = channels * (2 if learned_variance else 1) if out_dim is None else out_dim
        self.final_res_block = resnet_block(init_dim * 2, init_dim)
        self.final_conv = nn.Conv2d(init_dim, self.out_dim, 1)
        self._lay_out_weights()

    def _attend(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        return attn(x)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor | float,
        classes: torch.Tensor,
        cond_drop_prob: float | None = None,
        cond_keep_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict noise, x0 or v, whatever it was trained for.

        Args:
            x: (B, channels, H, W), floating point.
            time: (B,), timesteps; (1,) or a number is the timestep of all images.
            classes: (B,) int64 in [0, num_classes]; num_classes is no class, which upstream has no number for.
            cond_drop_prob: how often the class of an image is hidden, at random; None is the network's own.
            cond_keep_mask: (B,) bool, False hides the class of an image; then nothing is random.

        Returns:
            (B, out_dim, H, W).

        Raises:
            TypeError, ValueError: an input does not fit, named in one sentence.
        """
        time = self._timesteps(time)
        if cond_keep_mask is None:
            rate = self.cond_drop_prob if cond_drop_prob is None else cond_drop_prob
            cond_keep_mask = None if rate == 0 else random_mask(x.shape[0], 1 - rate, x.device)
        given = GivenConditions(classes, keep_mask=cond_keep_mask)
        self._check_inputs(x, time, given)
        return self._call([x], time, given)

    def forward_with_cond_scale(
        self,
        x: torch.Tensor,
        time: torch.Tensor | float,
        classes: torch.Tensor,
        *,
        cond_scale: float = 1.0,
        rescaled_phi: float = 0.0,
        remove_parallel_component: bool = True,
        keep_parallel_frac: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The guided output (Ho & Salimans 2022), and the output without classes, from one pass of a doubled batch.

        Args:
            x, time, classes: see `forward`.
            cond_scale: 1 is the output with classes, without guidance.
            rescaled_phi: how much of the guided output is rescaled to the standard deviation of the conditional one
                (Lin et al. 2023, eq. 15 and 16).
            remove_parallel_component, keep_parallel_frac: leave out the guidance's part along the conditional output,
                but for this fraction (Sadat et al. 2024).

        Returns:
            Two of (B, out_dim, H, W). Upstream returns one with `cond_scale=1`, where its callers unpack two.
        """
        time = self._timesteps(time)
        time = time if time.shape[0] == 1 else torch.cat((time, time))
        keep = torch.ones_like(classes, dtype=torch.bool)
        both = self(
            torch.cat((x, x)),
            time,
            torch.cat((classes, classes)),
            cond_keep_mask=torch.cat((keep, torch.zeros_like(keep))),
        )
        out, null = both.chunk(2)
        kept = keep_parallel_frac if remove_parallel_component else 1.0
        return guided_output(out, null, cond_scale, rescaled_phi, kept), null


def guided_output(
    out: torch.Tensor, null: torch.Tensor, cond_scale: float, rescaled_phi: float, keep_parallel_frac: float = 0.0
) -> torch.Tensor:
    """The guided output of those with and without classes; see `Unet.forward_with_cond_scale`."""
    if cond_scale == 1:
        return out
    update = out - null
    if keep_parallel_frac != 1:
        parallel = _along(update, out)
        update = (update - parallel) + parallel * keep_parallel_frac
    guided = out + update * (cond_scale - 1)
    if rescaled_phi == 0:
        return guided
    rescaled = guided * (_std(out) / _std(guided))
    return rescaled * rescaled_phi + guided * (1 - rescaled_phi)


def random_mask(batch_size: int, rate: float, device: torch.device) -> torch.Tensor:
    """True with probability `rate`, by upstream's random numbers."""
    if rate == 1 or rate == 0:
        return torch.full((batch_size,), rate == 1, device=device)
    return torch.zeros(batch_size, device=device).uniform_(0, 1) < rate


def _along(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The part of each x along its y, in float64 as upstream computes it."""
    flat, unit = x.flatten(1).double(), nn.functional.normalize(y.flatten(1).double(), dim=-1)
    return ((flat * unit).sum(dim=-1, keepdim=True) * unit).reshape(x.shape).to(x.dtype)


def _std(x: torch.Tensor) -> torch.Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
