"""EDM's networks (Karras et al. 2022), SongUNet and DhariwalUNet, as physicsnemo has them.

Their own forward runs. Its blocks are computed by an op; one product makes the rows of all of them, the outputs of
their affine layers, and one call draws all seeds.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast import noise
from ddpm_fast.integrations.family import (
    Fast,
    channels_last,
    computes,
    computes_plainly,
    declare,
    fast,
    own_forward,
    why_changed,
)
from ddpm_fast.integrations.replays import ReplaysOwnForward
from ddpm_fast.integrations.weights import CONVOLUTIONS
from ddpm_fast.models.embeddings import linears_of_one_input
from ddpm_fast.models.stock import parameter
from ddpm_fast.ops.attention_block.op import unchecked_group_norm_attention_block
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.norm_silu.op import group_norm_silu
from ddpm_fast.ops.preactivation_block.op import unchecked_preactivation_block
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.runtime.autocast import to_autocast_dtype
from ddpm_fast.runtime.threads import of_this_thread

_LAYERS = "physicsnemo.nn.module"
_BLOCK = f"{_LAYERS}.unet_layers.UNetBlock"
_CONV = f"{_LAYERS}.conv_layers.Conv2d"
_LINEAR = f"{_LAYERS}.fully_connected_layers.Linear"
_NORM = f"{_LAYERS}.group_norm.GroupNorm"
_ATTENTION = f"{_LAYERS}.attention_layers.UNetAttention"


def _why_not_conv(conv: Any, side: int, resampled: bool = False) -> str | None:
    """Why a convolution is none of this side, after nearest upsampling or means of 2×2 pixels where that is allowed."""
    changed = why_changed(conv, _CONV)
    if changed is not None:
        return changed
    weight = parameter(conv, "weight")
    if (0 if weight is None else weight.shape[-1]) != side:
        return "it has another size"
    if not (conv.up or conv.down):
        return None
    if not resampled:
        return "it changes the resolution"
    if conv.fused_resample:
        return "its resampling is fused"
    return None if _has_equal_taps(conv) else "its resampling filter is not of two equal taps"


# Convolution → a filter, its version, and whether it has two equal taps: numbers of a device are read once.
_equal_taps: weakref.WeakKeyDictionary[nn.Module, tuple[torch.Tensor, int, bool]] = weakref.WeakKeyDictionary()


def _has_equal_taps(conv: nn.Module) -> bool:
    taps = conv._buffers["resample_filter"]
    if taps is None or taps.shape[-2:] != (2, 2):
        return False
    return taps.is_meta or _are_equal(conv, taps)


@torch.compiler.assume_constant_result
def _are_equal(conv: nn.Module, taps: torch.Tensor) -> bool:
    known = _equal_taps.get(conv)
    if known is None or known[0] is not taps or known[1] != taps._version:
        known = (taps, taps._version, bool((taps == 0.25).all()))
        _equal_taps[conv] = known
    return known[2]


def _why_not_norm(norm: Any, activation: str | None) -> str | None:
    changed = why_changed(norm, _NORM)
    if changed is not None:
        return changed
    as_named = norm.act == activation and norm.act_fn is (None if activation is None else F.silu)
    return None if as_named else f"its activation is {norm.act}"


def _why_not_attention(attn: Any) -> str | None:
    reasons = (
        ("norm", _why_not_norm(attn._modules.get("norm"), None)),
        ("qkv", _why_not_conv(attn._modules.get("qkv"), 1)),
        ("proj", _why_not_conv(attn._modules.get("proj"), 1)),
    )
    return next((f"{name}: {reason}" for name, reason in reasons if reason is not None), None)


def _why_not_block(block: Any) -> str | None:
    modules = block._modules
    reasons = [
        ("norm0", _why_not_norm(modules.get("norm0"), "silu")),
        ("conv0", _why_not_conv(modules.get("conv0"), 3, resampled=True)),
        ("affine", why_changed(modules.get("affine"), _LINEAR)),
        ("norm1", _why_not_norm(modules.get("norm1"), None if block.adaptive_scale else "silu")),
        ("conv1", _why_not_conv(modules.get("conv1"), 3)),
    ]
    skip = modules.get("skip")
    if skip is not None:
        side = 0 if parameter(skip, "weight") is None else 1
        reasons.append(("skip", _why_not_conv(skip, side, resampled=True)))
    reason = next((f"{name}: {reason}" for name, reason in reasons if reason is not None), None)
    if reason is None and block.profile_mode:
        return "profile_mode marks its parts"
    if reason is None and skip is not None and (skip.up, skip.down) != (modules["conv0"].up, modules["conv0"].down):
        return "skip and conv0 change the resolution differently"
    return reason


@fast(_BLOCK, runs="preactivation_block", refuses=_why_not_block, casts_weights=True)
def unet_block(block: Any, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W), (B or 1, D) → (B, K, H, W), or of half or twice the height and width."""
    if x.dim() != 4 or (not block.amp_mode and torch.is_autocast_enabled(x.device.type)):
        return own_forward(block, x, emb)  # which refuses autocast
    modules = block._modules
    rows, seed, with_bias = _row(block, emb)
    (x,) = to_autocast_dtype(channels_last(x))
    if rows.shape[0] != x.shape[0]:
        rows = rows.expand(x.shape[0], -1)
    conv0, conv1, skip = modules["conv0"], modules["conv1"], modules.get("skip")
    options: dict[str, Any] = {"resample": "up" if conv0.up else "down" if conv0.down else None}
    if block.adaptive_scale:
        options["scale"], options["shift"] = rows.chunk(2, dim=1)
    else:
        options["embedding"] = rows
    if skip is not None and parameter(skip, "weight") is not None:
        options |= {"res_weight": parameter(skip, "weight"), "res_bias": parameter(skip, "bias")}
    if _drops(block):
        options |= {"dropout_p": block.dropout, "seed": noise.draw_seed(x.device) if seed is None else seed}
    B, C, H, W = x.shape
    pixels = H * W
    gain1, eps1 = _norm_of(modules["norm0"], C, pixels)
    pixels = 4 * pixels if conv0.up else (H // 2) * (W // 2) if conv0.down else pixels
    gain2, eps2 = _norm_of(modules["norm1"], conv0.out_channels, pixels)
    bias1 = None if with_bias else parameter(conv0, "bias")
    x = unchecked_preactivation_block(
        x, parameter(conv0, "weight"), bias1, gain1, parameter(modules["norm0"], "bias"),
        parameter(conv1, "weight"), parameter(conv1, "bias"), gain2, parameter(modules["norm1"], "bias"),
        groups1=modules["norm0"].num_groups, groups2=modules["norm1"].num_groups, eps1=eps1, eps2=eps2,
        output_scale=float(block.skip_scale), **options,
    )  # fmt: skip
    attn = modules.get("attn")
    if attn is None:
        return x
    if why_changed(attn, _ATTENTION) is not None or _why_not_attention(attn) is not None:
        return attn(x) * block.skip_scale
    return attention(attn, x, float(block.skip_scale))


@fast(_ATTENTION, runs="group_norm_attention_block", refuses=_why_not_attention, casts_weights=True)
def attention(attn: Any, x: torch.Tensor, output_scale: float = 1.0) -> torch.Tensor:
    """(B, C, H, W) → (B, C, H, W), times `output_scale`."""
    norm, qkv, last = (attn._modules[name] for name in ("norm", "qkv", "proj"))
    if x.dim() != 4 or (not qkv.amp_mode and torch.is_autocast_enabled(x.device.type)):
        return own_forward(attn, x) * output_scale
    (x,) = to_autocast_dtype(channels_last(x))
    gain, eps = _norm_of(norm, x.shape[1], x.shape[2] * x.shape[3])
    return unchecked_group_norm_attention_block(
        x, gain, parameter(norm, "bias"), parameter(qkv, "weight"), parameter(qkv, "bias"), parameter(last, "weight"),
        parameter(last, "bias"), groups=norm.num_groups, heads=attn.num_heads, eps=eps, order="hd3", residual=True,
        output_scale=output_scale,
    )  # fmt: skip


def _norm_of(norm: Any, channels: int, pixels: int) -> tuple[torch.Tensor, float]:
    """Gain and eps of a norm; outside training the package divides by the unbiased variance, of n − 1 numbers.

    g·(x − m)/√(v·n/(n − 1) + eps) is g·√((n − 1)/n)·(x − m)/√(v + eps·(n − 1)/n).
    """
    gain = parameter(norm, "weight")
    if norm.training:
        return gain, norm.eps
    n = channels // norm.num_groups * pixels
    return gain * ((n - 1) / n) ** 0.5, norm.eps * (n - 1) / n


def _drops(block: Any) -> bool:
    return block.training and block.dropout > 0


def _refuses_autocast(module: Any, x: torch.Tensor) -> bool:
    """True where the package's own forward raises."""
    return not module.amp_mode and torch.is_autocast_enabled(x.device.type)


def _why_not_conv3x3(conv: Any) -> str | None:
    return _why_not_conv(conv, 3)


def _why_not_stem_conv(conv: Any) -> str | None:
    return _why_not_conv(conv, 3) if conv.in_channels <= 4 else "it has more than 4 input channels"


@fast(_CONV, runs="conv3x3", refuses=_why_not_conv3x3, casts_weights=True)
def convolution(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """The last convolution of a network: (B, C, H, W) → (B, K, H, W)."""
    if x.dim() != 4 or _refuses_autocast(conv, x):
        return own_forward(conv, x)
    (x,) = to_autocast_dtype(channels_last(x))
    return conv3x3(x, parameter(conv, "weight"), parameter(conv, "bias"))


@fast(_CONV, runs="stem_conv", refuses=_why_not_stem_conv, order=-1, casts_weights=True)
def first_convolution(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """That of a network: (B, 3, H, W) → (B, K, H, W)."""
    if x.dim() != 4 or _refuses_autocast(conv, x):
        return own_forward(conv, x)
    (x,) = to_autocast_dtype(x)
    return stem_conv(x, parameter(conv, "weight"), parameter(conv, "bias"))


def _why_not_last_norm(norm: Any) -> str | None:
    return _why_not_norm(norm, None if norm.act is None else "silu")


@fast(_NORM, runs="group_norm_silu", refuses=_why_not_last_norm, casts_weights=True)
def last_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """That of a network: (B, C, H, W) → (B, C, H, W)."""
    if x.dim() != 4 or _refuses_autocast(norm, x):
        return own_forward(norm, x)
    (x,) = to_autocast_dtype(channels_last(x))
    gain, eps = _norm_of(norm, x.shape[1], x.shape[2] * x.shape[3])
    offset, activation = parameter(norm, "bias"), norm.act is not None
    return group_norm_silu(x, gain, offset, groups=norm.num_groups, eps=eps, activation=activation)


# Of a block: the output of its affine layer, its seed, and whether the first convolution's bias is in the rows.
_Row = tuple[torch.Tensor, torch.Tensor | None, bool]


class _Rows:
    """The rows of a running network's blocks, made when the first of them is called.

    They are those of an embedding, with or without gradients: a block that is called otherwise, in a user's checkpoint
    or under torch.no_grad, makes its own.
    """

    def __init__(self, blocks: list[Any]):
        self.blocks = {id(block): block for block in blocks}
        self.emb: torch.Tensor | None = None
        self.with_gradients = False
        self.made: dict[int, _Row] = {}

    def of(self, block: Any, emb: torch.Tensor) -> _Row | None:
        """None for a block, an embedding or a mode of which no rows were made."""
        if id(block) not in self.blocks:
            return None
        if self.emb is None:
            self.emb, self.with_gradients = emb, torch.is_grad_enabled()
            self._make(emb)
        if self.emb is not emb or self.with_gradients is not torch.is_grad_enabled():
            return None
        row = self.made.get(id(block))
        if row is not None and row[1] is not None:
            self.made[id(block)] = (row[0], None, row[2])  # a block in two places draws again
        return row

    def _make(self, emb: torch.Tensor) -> None:
        blocks = [block for block in self.blocks.values() if not _refuses_autocast(block.affine, emb)]
        if not blocks:
            return
        biases = [parameter(block._modules["conv0"], "bias") for block in blocks]
        with_bias = not any(block.adaptive_scale for block in blocks) and all(bias is not None for bias in biases)
        layers = [block._modules["affine"] for block in blocks]
        rows = linears_of_one_input(emb, layers, biases if with_bias else ())
        seeds: Iterator[torch.Tensor] = iter(())
        if any(_drops(block) for block in blocks):
            seeds = iter(noise.draw_seeds(len(blocks), emb.device))
        for block, part in zip(blocks, rows.split([len(layer.weight) for layer in layers], dim=1), strict=True):
            self.made[id(block)] = (part, next(seeds) if _drops(block) else None, with_bias)


# Thread → the rows of its running network.
_running: dict[int, _Rows] = {}


def _row(block: Any, emb: torch.Tensor) -> _Row:
    if not torch.compiler.is_compiling() and _running:
        rows = _running.get(threading.get_ident())
        row = None if rows is None else rows.of(block, emb)
        if row is not None:
            return row
    return block._modules["affine"](emb), None, False


class _Network(ReplaysOwnForward):
    arguments = ("x", "noise_labels", "class_labels", "augment_labels")

    def _run(self: Any, **given: Any) -> Any:
        if torch.compiler.is_compiling() or self._checkpoints(given["x"]):
            return own_forward(self, **given)
        blocks = [
            block
            for block in (*self.enc.values(), *self.dec.values())
            if computes(block, unet_block) and parameter(block._modules["affine"], "bias") is not None
        ]
        with of_this_thread(_running, _Rows(blocks)):
            return own_forward(self, **given)

    def _checkpoints(self: Any, x: torch.Tensor) -> bool:
        """True where a block may run again in backward, which then has to keep the same tensors."""
        side = getattr(self, "checkpoint_threshold", None)
        return side is not None and x.dim() == 4 and x.shape[2] * x.shape[3] >= side**2


for _path in ("song_unet.SongUNet", "dhariwal_unet.DhariwalUNet"):
    _NETWORK = f"physicsnemo.models.diffusion_unets.{_path}"
    _RUNS = "its own forward, replayed, with rows of all blocks by one product"
    declare(Fast(_NETWORK, _RUNS, mixin=_Network, is_network=True, casts_weights=True))
computes_plainly(_CONV, _LINEAR, _NORM)
computes_plainly(*(f"{_LAYERS}.embedding_layers.{name}Embedding" for name in ("Positional", "Fourier")))
CONVOLUTIONS.add(_CONV)
