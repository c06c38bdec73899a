"""The residual block: one op with the weights of its modules, or its modules one after another."""

from __future__ import annotations

import torch
from torch import nn

from ddpm_fast import noise
from ddpm_fast.models.norm import RMSNorm, make_norm
from ddpm_fast.models.stock import is_unmodified, parameter, stock
from ddpm_fast.ops.resnet_block.op import unchecked_resnet_block
from ddpm_fast.runtime.autocast import to_autocast_dtype


@stock
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


@stock
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
            x: a map, or two whose channels are concatenated.
            scale_shift: the output of `mlp` where the caller has computed it already.
            final_conv: a stock 1×1 convolution of the block's output, which `low_memory` does not keep for it.
        """
        if self.mlp is not None and time_emb is not None:
            scale_shift = self.mlp(time_emb).chunk(2, dim=1)
        modules = self._modules  # see `parameter`
        block1, block2, res_conv = modules["block1"], modules["block2"], modules["res_conv"]
        if not is_unmodified(block1, block2, res_conv, *block1._modules.values(), *block2._modules.values()):
            x = torch.cat(x, dim=1) if isinstance(x, tuple) else x
            x = block2(block1(x, scale_shift)) + res_conv(x)
            return x if final_conv is None else final_conv(x)
        x, skip = to_autocast_dtype(*x) if isinstance(x, tuple) else (*to_autocast_dtype(x), None)
        scale, shift = (None, None) if scale_shift is None else scale_shift
        options = {"skip": skip, "scale": scale, "shift": shift, "recompute": self.low_memory}
        block1, block2 = block1._modules, block2._modules
        dropout = block1["dropout"]
        if dropout.training and dropout.p > 0:
            options |= {"dropout_p": dropout.p, "seed": noise.draw_seed(x.device)}
        norm1, norm2 = block1["norm"], block2["norm"]
        if isinstance(norm1, RMSNorm):
            gain1, gain2 = parameter(norm1, "g"), parameter(norm2, "g")
        else:
            gain1, gain2 = norm1.weight, norm2.weight
            options |= {"offset1": norm1.bias, "offset2": norm2.bias, "groups": norm1.num_groups, "eps": norm1.eps}
        if isinstance(res_conv, nn.Conv2d):
            options |= {"res_weight": parameter(res_conv, "weight"), "res_bias": parameter(res_conv, "bias")}
        if final_conv is not None:
            options |= {"out_weight": parameter(final_conv, "weight"), "out_bias": parameter(final_conv, "bias")}
        conv1, conv2 = block1["proj"], block2["proj"]
        return unchecked_resnet_block(
            x, parameter(conv1, "weight"), parameter(conv1, "bias"), gain1,
            parameter(conv2, "weight"), parameter(conv2, "bias"), gain2, **options,
        )  # fmt: skip
