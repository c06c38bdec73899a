"""Upstream's UNet: same arguments, same parameters, same function."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ddpm_fast.models.attention import Attention, LinearAttention
from ddpm_fast.models.conditions import GivenConditions
from ddpm_fast.models.convolution import Conv3x3, Downsample, StemConv, Upsample
from ddpm_fast.models.resnet import ResnetBlock
from ddpm_fast.models.unet_base import UnetBase
from ddpm_fast.runtime.plain import as_int, as_ints, as_number, plain

NORMS = ("rms", "group")
MEMORY = ("fast", "low")


def _per_stage(name: str, value: Any, num_stages: int) -> tuple:
    """One value per stage from a scalar or a sequence of that length."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * num_stages
    if len(values) != num_stages:
        raise ValueError(f"{name} must be one value or {num_stages}, one per entry of dim_mults, got {value!r}")
    return values


def _ints_per_stage(name: str, value: Any) -> int | tuple[int, ...]:
    """A positive int, or a tuple of them, from one number or a sequence."""
    value = plain(name, value)
    return as_ints(name, value, 1) if isinstance(value, (tuple, list)) else as_int(name, value, 1)


class Unet(UnetBase):
    """UNet of Ho et al. 2020 as `denoising-diffusion-pytorch` 2.3 builds it; checkpoints load both ways.

    Args:
        dim: width of the first stage; stage i has `dim * dim_mults[i]` channels.
        init_dim: channels of the first convolution, `dim` if None.
        out_dim: output channels; if None `channels`, twice that with `learned_variance`.
        dim_mults: one factor per stage; every stage but the last halves height and width.
        channels: channels of the image.
        self_condition: the network also sees its previous estimate of x0 (Chen et al. 2022), as `x_self_cond`.
        learned_variance: twice the output channels (Nichol & Dhariwal 2021).
        learned_sinusoidal_cond, random_fourier_features, learned_sinusoidal_dim: Fourier features of the timestep with
            learned or random frequencies, for continuous time; `GaussianDiffusion` does not take such a network.
        sinusoidal_pos_emb_theta: base of the sinusoidal time embedding.
        dropout: after the first block of each residual block.
        attn_dim_head, attn_heads: one value, or one per stage.
        full_attn: softmax attention instead of linear attention, one bool or one per stage; None: the last stage only.
            Upstream treats False like None; here False means linear attention in every stage. The middle of the network
            always has softmax attention.
        flash_attn: kept for upstream's signature; torch's attention kernels run either way.
        norm: "rms" (upstream's 2.x network) or "group" (its 1.9–1.11 network, GroupNorm in the residual blocks).
        resnet_block_groups: groups of that GroupNorm.
        memory: "fast", or "low", which keeps fewer maps from forward for backward and makes the others again there: the
            map between the two blocks of each residual block, and what is inside linear attention.
        num_classes: classes that the network is told, as `classes` in [0, num_classes], num_classes being no class.
        cond_dim: length of the vectors that it is told, as `cond`.
        cond_channels: channels of the images that it sees beside x, as `cond_image`.
        cond_drop_prob: how often a process hides classes and vectors in training, for guidance; the network itself
            never does.

    Raises:
        ValueError: an argument does not fit, named in one sentence.
    """

    def __init__(
        self,
        dim: int,
        init_dim: int | None = None,
        out_dim: int | None = None,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        channels: int = 3,
        self_condition: bool = False,
        learned_variance: bool = False,
        learned_sinusoidal_cond: bool = False,
        random_fourier_features: bool = False,
        learned_sinusoidal_dim: int = 16,
        sinusoidal_pos_emb_theta: float = 10000,
        dropout: float = 0.0,
        attn_dim_head: int | Sequence[int] = 32,
        attn_heads: int | Sequence[int] = 4,
        full_attn: bool | Sequence[bool] | None = None,
        flash_attn: bool = False,
        *,
        norm: str = "rms",
        resnet_block_groups: int = 8,
        memory: str = "fast",
        num_classes: int | None = None,
        cond_dim: int | None = None,
        cond_channels: int = 0,
        cond_drop_prob: float = 0.1,
    ):
        super().__init__()
        dim = as_int("dim", dim, 1)
        init_dim = None if init_dim is None else as_int("init_dim", init_dim, 1)
        out_dim = None if out_dim is None else as_int("out_dim", out_dim, 1)
        dim_mults = as_ints("dim_mults", dim_mults, 1)
        channels = as_int("channels", channels, 1)
        learned_sinusoidal_dim = as_int("learned_sinusoidal_dim", learned_sinusoidal_dim)
        sinusoidal_pos_emb_theta = as_number("sinusoidal_pos_emb_theta", sinusoidal_pos_emb_theta, 1e-12)
        dropout = as_number("dropout", dropout, 0, 1)
        attn_dim_head = _ints_per_stage("attn_dim_head", attn_dim_head)
        attn_heads = _ints_per_stage("attn_heads", attn_heads)
        full_attn = plain("full_attn", full_attn)
        resnet_block_groups = as_int("resnet_block_groups", resnet_block_groups, 1)
        num_classes = None if num_classes is None else as_int("num_classes", num_classes, 1)
        cond_dim = None if cond_dim is None else as_int("cond_dim", cond_dim, 1)
        cond_channels = as_int("cond_channels", cond_channels, 0)
        cond_drop_prob = as_number("cond_drop_prob", cond_drop_prob, 0, 1)
        self.config = {k: plain(k, v) for k, v in locals().items() if k not in ("self", "__class__")}

        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        if memory not in MEMORY:
            raise ValueError(f"memory must be one of {', '.join(MEMORY)}, got {memory!r}")
        if len(dim_mults) == 0:
            raise ValueError("dim_mults must have at least one entry, got none")
        num_stages = len(dim_mults)
        if full_attn is None:
            full_attn = (False,) * (num_stages - 1) + (True,)
        full_attn = _per_stage("full_attn", full_attn, num_stages)
        attn_heads = _per_stage("attn_heads", attn_heads, num_stages)
        attn_dim_head = _per_stage("attn_dim_head", attn_dim_head, num_stages)

        self.channels = channels
        self.self_condition = self_condition
        self.num_classes, self.cond_dim, self.cond_channels = num_classes, cond_dim, cond_channels
        self.cond_drop_prob = cond_drop_prob
        init_dim = dim if init_dim is None else init_dim
        self.init_conv = StemConv(channels * (2 if self_condition else 1) + cond_channels, init_dim, 7)

        dims = [init_dim, *(dim * m for m in dim_mults)]
        in_out = list(zip(dims[:-1], dims[1:], strict=True))
        if norm == "group":
            for width in dims:
                if width % resnet_block_groups:
                    raise ValueError(
                        f"resnet_block_groups must divide every stage's width {dims}, got {resnet_block_groups}"
                    )

        self._make_time_mlp(
            dim, learned_sinusoidal_cond, random_fourier_features, learned_sinusoidal_dim, sinusoidal_pos_emb_theta
        )
        conditions_emb_dim = self._make_condition_embeddings(dim)

        resnet_block = partial(
            ResnetBlock,
            time_emb_dim=4 * dim,
            conditions_emb_dim=conditions_emb_dim,
            dropout=dropout,
            norm=norm,
            groups=resnet_block_groups,
            low_memory=memory == "low",
        )

        def attention(width: int, stage: int, full: bool) -> nn.Module:
            kwargs = {"heads": attn_heads[stage], "dim_head": attn_dim_head[stage]}
            if full:
                return Attention(width, flash=flash_attn, **kwargs)
            return LinearAttention(width, low_memory=memory == "low", **kwargs)

        # Modules are made in upstream's order, so that one seed gives both the same initial weights.
        self.downs = nn.ModuleList()
        self.ups = nn.ModuleList()
        for stage, (dim_in, dim_out) in enumerate(in_out):
            is_last = stage == num_stages - 1
            self.downs.append(
                nn.ModuleList(
                    [
                        resnet_block(dim_in, dim_in),
                        resnet_block(dim_in, dim_in),
                        attention(dim_in, stage, full_attn[stage]),
                        Conv3x3(dim_in, dim_out) if is_last else Downsample(dim_in, dim_out),
                    ]
                )
            )

        mid_dim = dims[-1]
        self.mid_block1 = resnet_block(mid_dim, mid_dim)
        self.mid_attn = attention(mid_dim, num_stages - 1, True)
        self.mid_block2 = resnet_block(mid_dim, mid_dim)

        for stage, (dim_in, dim_out) in reversed(list(enumerate(in_out))):
            is_last = stage == 0
            self.ups.append(
                nn.ModuleList(
                    [
                        resnet_block(dim_out + dim_in, dim_out),
                        resnet_block(dim_out + dim_in, dim_out),
                        attention(dim_out, stage, full_attn[stage]),
                        Conv3x3(dim_out, dim_in) if is_last else Upsample(dim_out, dim_in),
                    ]
                )
            )

        self.out_dim = channels * (2 if learned_variance else 1) if out_dim is None else out_dim
        self.final_res_block = resnet_block(init_dim * 2, init_dim)
        self.final_conv = nn.Conv2d(init_dim, self.out_dim, 1)
        self._lay_out_weights()

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor | float,
        x_self_cond: torch.Tensor | None = None,
        *,
        classes: torch.Tensor | None = None,
        cond: torch.Tensor | None = None,
        cond_image: torch.Tensor | None = None,
        cond_keep_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict noise, x0 or v, whatever it was trained for.

        Args:
            x: (B, channels, H, W), floating point.
            time: (B,), timesteps; (1,) or a number is the timestep of all images.
            x_self_cond: (B, channels, H, W), the previous estimate of x0; zeros if None; only with `self_condition`.
            classes: (B,) int64 in [0, num_classes], num_classes being no class; needed with `num_classes`. On CUDA,
                where a check would wait for the device, the output of another number is NaN.
            cond: (B, cond_dim), floating point; needed with `cond_dim`.
            cond_image: (B, cond_channels, H, W), floating point; needed with `cond_channels`.
            cond_keep_mask: (B,) bool: False hides class and vector, so that the image has no class and `null_cond`.

        Returns:
            (B, out_dim, H, W).

        Raises:
            TypeError, ValueError: an input does not fit, named in one sentence.
        """
        time = self._timesteps(time)
        given = GivenConditions(classes, cond, cond_image, cond_keep_mask)
        self._check_inputs(x, time, given)
        maps = [x]
        if self.self_condition:
            maps = [torch.zeros_like(x) if x_self_cond is None else x_self_cond, x]
        if x_self_cond is not None:
            self._check_self_condition(x, x_self_cond)
        if cond_image is not None:
            maps.append(cond_image.to(x.dtype))
        return self._call(maps, time, given)

    def _check_self_condition(self, x: torch.Tensor, x_self_cond: torch.Tensor) -> None:
        device = self._weight.device
        if not isinstance(x_self_cond, torch.Tensor):
            raise TypeError(f"x_self_cond must be a tensor, got {type(x_self_cond).__name__}")
        if x_self_cond.device != device:
            raise ValueError(f"x_self_cond must be on the Unet's device {device}, got {x_self_cond.device}")
        if not self.self_condition:
            raise ValueError("x_self_cond must be None, since this Unet has self_condition=False and would not read it")
        if x_self_cond.shape != x.shape:
            raise ValueError(f"x_self_cond must have x's shape {tuple(x.shape)}, got {tuple(x_self_cond.shape)}")
