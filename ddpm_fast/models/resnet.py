"""The residual block: one op with the weights of its modules, or its modules one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddpm_fast import noise
from ddpm_fast.models.embeddings import side_by_side
from ddpm_fast.models.narrow_weights import Group, narrow
from ddpm_fast.models.norm import RMSNorm, is_group_norm, is_rms_norm, make_norm
from ddpm_fast.models.stock import (
    calls_every_module,
    is_convolution,
    is_instance,
    is_unmodified,
    parameter,
    stock,
    why_by_modules,
)
from ddpm_fast.ops.resnet_block.op import unchecked_resnet_block
from ddpm_fast.runtime.autocast import to_autocast_dtype

ScaleShift = tuple[torch.Tensor, torch.Tensor]


@stock
class Block(nn.Module):
    """3×3 convolution, norm, optional scale and shift, SiLU and dropout, one module after another.

    Shapes: (B, dim, H, W), two of (B, dim_out, 1, 1) → (B, dim_out, H, W). `ResnetBlock` computes two blocks as one op.
    """

    def __init__(self, dim: int, dim_out: int, dropout: float = 0.0, norm: str = "rms", groups: int = 8):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, padding=1)
        self.norm = make_norm(norm, dim_out, groups)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, scale_shift: ScaleShift | None = None) -> torch.Tensor:
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = scale_shift
            x = x * (scale + 1) + shift
        return self.dropout(self.act(x))


def _is_stock_block(block: nn.Module | None, dropout: bool) -> bool:
    """True if the weights of a `Block` may be used without calling it; without `dropout`, none may be active."""
    if not is_instance(block, Block):
        return False
    modules: dict[str, Any] = block._modules  # see `parameter`
    norm, last = modules.get("norm"), modules.get("dropout")
    if last is not None and not (is_instance(last, nn.Dropout) and (dropout or not (last.training and last.p > 0))):
        return False
    return (
        is_convolution(modules.get("proj"), 3)
        and (is_rms_norm(norm) or is_group_norm(norm))
        and is_instance(modules.get("act"), nn.SiLU)
    )


@stock
class ResnetBlock(nn.Module):
    """Two blocks around a residual; the first is scaled and shifted by the embeddings of the time and of conditions.

    With `low_memory` backward keeps fewer maps and computes them again, see the op `resnet_block`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        time_emb_dim: int | None = None,
        conditions_emb_dim: int = 0,
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
            self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_emb_dim + conditions_emb_dim, dim_out * 2))
        self.block1 = Block(dim, dim_out, dropout=dropout, norm=norm, groups=groups)
        self.block2 = Block(dim_out, dim_out, norm=norm, groups=groups)
        self.res_conv = nn.Conv2d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(
        self, x: torch.Tensor, time_emb: torch.Tensor | None = None, *conditions_emb: torch.Tensor
    ) -> torch.Tensor:
        """(B, dim, H, W), (B, time_emb_dim) and as many of conditions as the mlp reads → (B, dim_out, H, W)."""
        scale_shift = None
        if self.mlp is not None and time_emb is not None:
            scale_shift = self.mlp(side_by_side((time_emb, *conditions_emb))).chunk(2, dim=1)
        return self.compute(x, scale_shift)

    def compute(
        self,
        x: torch.Tensor,
        scale_shift: ScaleShift | None,
        skip: torch.Tensor | None = None,
        final_conv: nn.Conv2d | None = None,
        x_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block without its mlp; a network calls it where the block itself is unmodified.

        Args:
            x: (B, C, H, W).
            scale_shift: the output of `mlp`, two of (B or 1, dim_out).
            skip: (B, C', H, W), channels that follow those of x, as if the two were concatenated.
            final_conv: a stock 1×1 convolution of the block's output, which `low_memory` does not keep for it.
            x_bias: (C,), added to x; the caller has asked `adds_bias`.
        """
        if not self._is_fused():
            x = x if skip is None else torch.cat((x, skip), dim=1)
            maps = None
            if scale_shift is not None:
                maps = tuple([row[:, :, None, None] for row in scale_shift])
            x = self.block2(self.block1(x, scale_shift=maps)) + self.res_conv(x)
            return x if final_conv is None else final_conv(x)
        options: dict[str, Any] = {"recompute": self.low_memory, "x_bias": x_bias}
        if skip is None:
            (x,) = to_autocast_dtype(x)
        else:
            x, options["skip"] = to_autocast_dtype(x, skip)
        if scale_shift is not None:
            scale, shift = scale_shift
            if scale.shape[0] != x.shape[0]:  # one timestep for all images
                scale, shift = scale.expand(x.shape[0], -1), shift.expand(x.shape[0], -1)
            options |= {"scale": scale, "shift": shift}
        modules: dict[str, Any] = self._modules  # see `parameter`
        block1, block2, res_conv = modules["block1"]._modules, modules["block2"]._modules, modules["res_conv"]
        dropout = block1.get("dropout")  # upstream's class-conditional blocks, accelerated, have none
        if dropout is not None and dropout.training and dropout.p > 0:
            options |= {"dropout_p": dropout.p, "seed": noise.draw_seed(x.device)}
        norm1, norm2 = block1["norm"], block2["norm"]
        if isinstance(norm1, RMSNorm):
            gain1, gain2 = parameter(norm1, "g"), parameter(norm2, "g")
        else:
            gain1, gain2 = norm1.weight, norm2.weight
            options |= {"offset1": norm1.bias, "offset2": norm2.bias, "groups": norm1.num_groups, "eps": norm1.eps}
        if isinstance(res_conv, nn.Conv2d):
            options |= {"res_weight": narrow(res_conv, "weight"), "res_bias": narrow(res_conv, "bias")}
        if final_conv is not None:
            options |= {"out_weight": narrow(final_conv, "weight"), "out_bias": narrow(final_conv, "bias")}
        conv1, conv2 = block1["proj"], block2["proj"]
        return unchecked_resnet_block(
            x, narrow(conv1, "weight"), parameter(conv1, "bias"), gain1,
            narrow(conv2, "weight"), parameter(conv2, "bias"), gain2, **options,
        )  # fmt: skip

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`; the biases of the 3×3 convolutions are the norms', which read float32."""
        if not self._is_fused():
            return []
        modules: dict[str, Any] = self._modules
        groups: list[Group] = [(parameter(modules[name]._modules["proj"], "weight"),) for name in ("block1", "block2")]
        res_conv = modules["res_conv"]
        if isinstance(res_conv, nn.Conv2d):
            groups += [(parameter(res_conv, "weight"),), (parameter(res_conv, "bias"),)]
        return groups

    def _is_fused(self) -> bool:
        """True if the two blocks and the residual's convolution may be computed from their weights as one op."""
        if calls_every_module():
            return False
        modules: dict[str, Any] = self._modules
        block1, block2, res_conv = modules["block1"], modules["block2"], modules["res_conv"]
        if not (_is_stock_block(block1, dropout=True) and _is_stock_block(block2, dropout=False)):
            return False
        norm1, norm2 = block1._modules["norm"], block2._modules["norm"]
        if type(norm1) is not type(norm2):
            return False
        if isinstance(norm1, nn.GroupNorm) and (norm1.num_groups, norm1.eps) != (norm2.num_groups, norm2.eps):
            return False
        return is_instance(res_conv, nn.Identity) or is_convolution(res_conv, 1)

    def adds_bias(self) -> bool:
        """True where a pass over x and a skip connection adds a bias to x, too."""
        recompute = self.low_memory and torch.is_grad_enabled()
        return self._is_fused() and not recompute and isinstance(self._modules["res_conv"], nn.Conv2d)

    def takes_rows(self) -> bool:
        """True if a network may compute the output of `mlp` itself, from its weights, and call `compute`."""
        mlp: Any = self._modules["mlp"]
        if not is_unmodified(self, mlp) or len(mlp) != 2:
            return False
        activation, linear = mlp._modules.values()
        return (
            is_instance(activation, nn.SiLU)
            and is_instance(linear, nn.Linear)
            and parameter(linear, "bias") is not None
            and parameter(linear, "weight").shape[0] == 2 * self.dim_out
        )

    @property
    def projection(self) -> nn.Linear:
        """The linear layer of `mlp`."""
        mlp: Any = self._modules["mlp"]
        return mlp[1]

    def why_by_modules(self) -> str | None:
        """Why the block calls its modules one after another, in one clause; None where it is one op."""
        return None if self._is_fused() and self.takes_rows() else why_by_modules(self)
