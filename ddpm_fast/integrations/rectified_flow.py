"""The `Unet` of rectified-flow-pytorch: its residual blocks, both kinds of attention, and the norms over maps before.

Its norms store the gain minus one, or no gain, and a `Residual` around a block or attention adds the input. Its
attention over the maps before, of x-unet, norms each of them twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddpm_fast import noise
from ddpm_fast.integrations.family import (
    Fast,
    channels_last,
    computes_plainly,
    declare,
    fast,
    is_unchanged,
    own_forward,
    why_changed,
    why_not,
)
from ddpm_fast.integrations.replays import ReplaysOwnForward
from ddpm_fast.models.narrow_weights import narrow
from ddpm_fast.models.stock import is_convolution, is_instance, parameter, why_modified
from ddpm_fast.ops.attention_block.op import unchecked_attention_block
from ddpm_fast.ops.linear_attention_block.op import unchecked_linear_attention_block
from ddpm_fast.ops.norm_silu.op import rms_norm_silu
from ddpm_fast.ops.resnet_block.op import unchecked_resnet_block
from ddpm_fast.runtime.autocast import autocast_dtype, to_autocast_dtype

_FILE = "rectified_flow_pytorch.rectified_flow"
_NORM, _BLOCK, _RESNET = f"{_FILE}.RMSNorm", f"{_FILE}.Block", f"{_FILE}.ResnetBlock"
_LINEAR_ATTENTION, _ATTENTION = f"{_FILE}.LinearAttention", f"{_FILE}.Attention"


def _is_norm(norm: Any, width: int) -> bool:
    return is_unchanged(norm, _NORM) and norm.scale == width**0.5


def _gain(norm: Any, x: torch.Tensor, width: int) -> torch.Tensor:
    """(C,): the factor of each normed channel."""
    gamma = norm._parameters.get("gamma")
    return x.new_ones(width, dtype=torch.float32) if gamma is None else gamma.reshape(-1) + 1


def _why_not_residual(module: Any) -> str | None:
    branch, shortcut = module._modules.get("branch"), module._modules.get("residual_transform")
    if is_unchanged(branch, _RESNET):
        if not (is_instance(shortcut, nn.Identity) or is_convolution(shortcut, 1, bias=False)):
            return why_not(module, "residual_transform")
        return _why_not_resnet(branch)
    if not is_instance(shortcut, nn.Identity):
        return why_not(module, "residual_transform")
    if is_unchanged(branch, _LINEAR_ATTENTION):
        return _why_not_linear_attention(branch)
    if is_unchanged(branch, _ATTENTION):
        return _why_not_attention(branch)
    return f"branch: {why_changed(branch, _RESNET, _LINEAR_ATTENTION, _ATTENTION)}"


def _why_not_resnet(branch: Any) -> str | None:
    for name in ("block1", "block2"):
        block: Any = branch._modules.get(name)
        if not is_unchanged(block, _BLOCK):
            return f"branch.{name}: {why_changed(block, _BLOCK)}"
        modules = block._modules
        if not is_convolution(modules.get("proj"), 3):
            return f"branch.{name}.{why_not(block, 'proj')}"
        if not _is_norm(modules.get("norm"), modules["proj"].weight.shape[0]):
            return f"branch.{name}.norm: {why_changed(modules.get('norm'), _NORM) or 'its scale is another'}"
        for inner, cls in (("act", nn.SiLU), ("dropout", nn.Dropout)):
            if not is_instance(modules.get(inner), cls):
                return f"branch.{name}.{why_not(block, inner)}"
    dropout: Any = branch.block2.dropout
    return "branch.block2.dropout is active" if dropout.training and dropout.p > 0 else None


def _why_not_linear_attention(branch: Any) -> str | None:
    to_out = branch._modules.get("to_out")
    if not is_instance(to_out, nn.Sequential) or len(to_out) != 2:
        return f"branch.{why_not(branch, 'to_out')}"
    if not is_convolution(to_out[0], 1):
        return f"branch.to_out.0: {why_modified(to_out[0]) or 'it has other settings than the op'}"
    if not _is_norm(to_out[1], to_out[0].weight.shape[0]):
        return f"branch.to_out.1: {why_changed(to_out[1], _NORM) or 'its scale is another'}"
    return _why_not_scaled_by(branch, branch.mem_kv.shape[2])


def _why_not_attention(branch: Any) -> str | None:
    if not is_convolution(branch._modules.get("to_out"), 1, bias=False):
        return f"branch.{why_not(branch, 'to_out')}"
    return _why_not_scaled_by(branch, branch.mem_kv.shape[3])


def _why_not_scaled_by(branch: Any, dim_head: int) -> str | None:
    to_qkv = branch._modules.get("to_qkv")
    if not is_convolution(to_qkv, 1, bias=False):
        return f"branch.{why_not(branch, 'to_qkv')}"
    norm = branch._modules.get("norm")
    if not _is_norm(norm, to_qkv.weight.shape[1]):
        return f"branch.norm: {why_changed(norm, _NORM) or 'its scale is another'}"
    return None if branch.scale == dim_head**-0.5 else f"its scale is {branch.scale}"


@fast(f"{_FILE}.Residual", runs="resnet_block or attention_block", refuses=_why_not_residual)
def residual(module: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """(B, C, H, W) and, for a residual block, (B, D) → (B, K, H, W)."""
    branch, shortcut = module._modules["branch"], module._modules["residual_transform"]
    if x.dim() != 4 or kwargs or len(args) > 1:
        return own_forward(module, x, *args, **kwargs)
    if is_unchanged(branch, _RESNET):
        return _resnet_block(branch, shortcut, x, *args)
    if args:
        return own_forward(module, x, *args)
    (x,) = to_autocast_dtype(channels_last(x))
    to_out = branch._modules["to_out"]
    gain = _gain(branch.norm, x, x.shape[1])
    if is_unchanged(branch, _ATTENTION):
        return unchecked_attention_block(
            x, gain, narrow(branch.to_qkv, "weight"), parameter(branch, "mem_kv"), narrow(to_out, "weight"),
            gain.new_zeros(to_out.weight.shape[0]), heads=branch.heads, residual=x,
        )  # fmt: skip
    conv, norm_out = to_out._modules.values()
    return unchecked_linear_attention_block(
        x, gain, narrow(branch.to_qkv, "weight"), parameter(branch, "mem_kv"), narrow(conv, "weight"),
        parameter(conv, "bias"), _gain(norm_out, x, conv.weight.shape[0]), heads=branch.heads, residual=x,
        recompute=False,
    )  # fmt: skip


def _resnet_block(branch: Any, shortcut: Any, x: torch.Tensor, time_emb: torch.Tensor | None = None) -> torch.Tensor:
    options: dict[str, Any] = {}
    if branch.mlp is not None and time_emb is not None:
        options["scale"], options["shift"] = branch.mlp(time_emb).chunk(2, dim=1)
    (x,) = to_autocast_dtype(channels_last(x))
    block1, block2 = branch.block1._modules, branch.block2._modules
    dropout = block1["dropout"]
    if dropout.training and dropout.p > 0:
        options |= {"dropout_p": dropout.p, "seed": noise.draw_seed(x.device)}
    width = block1["proj"].weight.shape[0]
    if isinstance(shortcut, nn.Conv2d):
        weight = narrow(shortcut, "weight")
        options |= {"res_weight": weight, "res_bias": weight.new_zeros(weight.shape[0])}
    return unchecked_resnet_block(
        x, narrow(block1["proj"], "weight"), parameter(block1["proj"], "bias"), _gain(block1["norm"], x, width),
        narrow(block2["proj"], "weight"), parameter(block2["proj"], "bias"), _gain(block2["norm"], x, width),
        **options,
    )  # fmt: skip


def _why_not_norm(norm: Any) -> str | None:
    gamma = parameter(norm, "gamma")
    if gamma is None or gamma.dim() != 1:
        return "its gain is no row"
    return None if norm.scale == gamma.numel() ** 0.5 else f"its scale is {norm.scale}"


@fast("x_unet.x_unet.RMSNorm", runs="rms_norm_silu", refuses=_why_not_norm)
def norm_of_a_map(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, C, H, W) of its dtype, under autocast, too; others take the own forward."""
    gain = parameter(norm, "gamma")
    if x.dim() != 4 or x.shape[1] != gain.numel():
        return own_forward(norm, x)
    if x.dtype is not gain.dtype and autocast_dtype(x.device.type) is None:
        return own_forward(norm, x)  # of the wider dtype
    return rms_norm_silu(channels_last(x), gain, activation=False)


class _Network(ReplaysOwnForward):
    arguments = ("x", "times", "s", "cond", "image_cond", "action")


declare(Fast(f"{_FILE}.Unet", "its own forward, replayed", mixin=_Network, is_network=True))
computes_plainly(f"{_FILE}.SinusoidalPosEmb", f"{_FILE}.RandomOrLearnedSinusoidalPosEmb")
# Its attention over the maps before, and the resampling of upstream.
computes_plainly(*(f"x_unet.x_unet.{name}" for name in ("XAttnRes", "Project", "LoRA", "RMSNorm")))
computes_plainly("einops.layers.torch.Rearrange")
