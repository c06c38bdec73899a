"""OpenAI's UNet (Nichol & Dhariwal 2021, Dhariwal & Nichol 2021), as torchcfm has it.

The network's own forward is replaced as well: it makes the rows of all residual blocks by one product, and gives a
block the map and its skip connection side by side without putting them together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ddpm_fast import noise
from ddpm_fast.integrations import rules
from ddpm_fast.integrations.family import (
    Fast,
    channels_last,
    computes,
    computes_plainly,
    declare,
    fast,
    is_unchanged,
    own_forward,
    why_changed,
    why_not,
)
from ddpm_fast.integrations.replays import Replayed, replayed
from ddpm_fast.models.embeddings import linears_of_one_input
from ddpm_fast.models.norm import is_group_norm
from ddpm_fast.models.stock import (
    is_convolution,
    is_instance,
    is_unmodified,
    own_class,
    parameter,
    why_modified,
)
from ddpm_fast.ops.attention_block.op import unchecked_group_norm_attention_block
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.norm_silu.op import group_norm_silu
from ddpm_fast.ops.preactivation_block.op import unchecked_preactivation_block
from ddpm_fast.ops.resample.op import unchecked_upsample_conv
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.runtime.autocast import to_autocast_dtype

_UNET = "torchcfm.models.unet.unet"
_GROUP_NORM = "torchcfm.models.unet.nn.GroupNorm32"  # computes in float32, and so do the ops
_ORDERS = {f"{_UNET}.QKVAttentionLegacy": "h3d", f"{_UNET}.QKVAttention": "3hd"}

# How a module inside a block is recognised.
_Fits = Callable[[Any], bool]


def _is_norm(module: Any) -> bool:
    if is_group_norm(module):
        return True
    return (
        is_unchanged(module, _GROUP_NORM)
        and parameter(module, "weight") is not None
        and parameter(module, "bias") is not None
    )


def _is_silu(module: Any) -> bool:
    return is_instance(module, nn.SiLU)


def _is_dropout(module: Any) -> bool:
    return is_instance(module, nn.Dropout) and 0 <= module.p < 1


def _is_linear(module: Any) -> bool:
    return is_instance(module, nn.Linear) and parameter(module, "bias") is not None


def _is_convolution_of(side: int) -> _Fits:
    return lambda module: is_convolution(module, side)


def _is_product(module: Any) -> bool:
    """True for an unmodified `nn.Conv1d` of one element."""
    return (
        is_unchanged(module, "torch.nn.modules.conv.Conv1d")
        and (module.kernel_size, module.stride, module.padding, module.groups) == ((1,), (1,), (0,), 1)
        and "_conv_forward" not in module.__dict__
    )


def _why_not_sequence(block: nn.Module, name: str, fits: tuple[_Fits, ...]) -> str | None:
    """Why a sequence inside a block has other modules than OpenAI's."""
    layers: Any = block._modules.get(name)
    if not is_instance(layers, nn.Sequential):
        return why_not(block, name)
    if len(layers._modules) != len(fits):
        return f"{name} has {len(layers._modules)} modules"
    for (i, layer), fit in zip(layers._modules.items(), fits, strict=True):
        if not fit(layer):
            changed = why_changed(layer, _GROUP_NORM) if isinstance(layer, nn.GroupNorm) else why_modified(layer)
            return f"{name}.{i}: {changed or 'it has other settings than the op'}"
    return None


_IN_LAYERS = (_is_norm, _is_silu, _is_convolution_of(3))
_EMB_LAYERS = (_is_silu, _is_linear)
_OUT_LAYERS = (_is_norm, _is_silu, _is_dropout, _is_convolution_of(3))


def _why_not_res_block(block: Any) -> str | None:
    for name, fits in (("in_layers", _IN_LAYERS), ("emb_layers", _EMB_LAYERS), ("out_layers", _OUT_LAYERS)):
        reason = _why_not_sequence(block, name, fits)
        if reason is not None:
            return reason
    skip = block._modules.get("skip_connection")
    if not (is_instance(skip, nn.Identity) or is_convolution(skip, 1) or is_convolution(skip, 3)):
        return why_not(block, "skip_connection")
    if block.updown and _resampling(block) is None:
        return "h_upd and x_upd are not both of the package's nearest upsampling or means of 2×2 pixels"
    return None


def _resampling(block: Any) -> str | None:
    """How a block that changes the resolution does so; None where its two modules are not those of the package."""
    found = {_resampling_of(block._modules.get(name)) for name in ("h_upd", "x_upd")}
    return found.pop() if len(found) == 1 else None


def _resampling_of(module: Any) -> str | None:
    if is_unchanged(module, f"{_UNET}.Upsample") and not module.use_conv and module.dims == 2:
        return "up"
    if not is_unchanged(module, f"{_UNET}.Downsample") or module.use_conv:
        return None
    pool: Any = module._modules.get("op")
    is_mean = is_unchanged(pool, "torch.nn.modules.pooling.AvgPool2d") and (
        (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.divisor_override) == (2, 2, 0, False, None)
    )
    return "down" if is_mean else None


@fast(f"{_UNET}.ResBlock", runs="preactivation_block", refuses=_why_not_res_block)
def res_block(block: Any, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W), (B, D) → (B, K, H, W), or of half or twice the height and width."""

    seed = _drawn_seed(block, x)

    def run(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return _compute(block, x, block._modules["emb_layers"](emb), seed)

    return _checkpointed(block, run, x, emb)


def _drops(block: Any) -> bool:
    dropout = block._modules["out_layers"]._modules["2"]
    return dropout.training and dropout.p > 0


def _drawn_seed(block: Any, x: torch.Tensor) -> torch.Tensor | None:
    return noise.draw_seed(x.device) if _drops(block) else None


def _checkpointed(block: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """The function of the inputs and of the block's parameters; with `use_checkpoint` backward computes it again."""
    if not block.use_checkpoint:
        return function(*inputs)
    module = sys.modules[own_class(block).__module__]
    return module.checkpoint(function, inputs, block.parameters(), True)


def _compute(
    block: Any,
    x: torch.Tensor,
    rows: torch.Tensor,
    seed: torch.Tensor | None,
    skip: torch.Tensor | None = None,
    with_bias: bool = False,
) -> torch.Tensor:
    """The block for the output of its `emb_layers`.

    Args:
        seed: of its dropout.
        skip: channels that follow those of x.
        with_bias: the first convolution's bias is in the rows already.
    """
    modules = block._modules
    norm1, _, conv1 = modules["in_layers"]._modules.values()
    norm2, _, dropout, conv2 = modules["out_layers"]._modules.values()
    residual = modules["skip_connection"]
    options: dict[str, Any] = {"resample": _resampling(block) if block.updown else None}
    if skip is None:
        (x,) = to_autocast_dtype(channels_last(x))
    else:
        x, options["skip"] = to_autocast_dtype(channels_last(x), channels_last(skip))
    if rows.shape[0] != x.shape[0]:
        rows = rows.expand(x.shape[0], -1)
    if block.use_scale_shift_norm:
        options["scale"], options["shift"] = rows.chunk(2, dim=1)
    else:
        options["embedding"] = rows
    if is_instance(residual, nn.Identity):
        options |= {"res_weight": None, "res_bias": None}
    else:
        options |= {"res_weight": parameter(residual, "weight"), "res_bias": parameter(residual, "bias")}
    if seed is not None:
        options |= {"dropout_p": dropout.p, "seed": seed}
    bias1 = None if with_bias else parameter(conv1, "bias")
    return unchecked_preactivation_block(
        x, parameter(conv1, "weight"), bias1, parameter(norm1, "weight"), parameter(norm1, "bias"),
        parameter(conv2, "weight"), parameter(conv2, "bias"), parameter(norm2, "weight"), parameter(norm2, "bias"),
        groups1=norm1.num_groups, groups2=norm2.num_groups, eps1=norm1.eps, eps2=norm2.eps, **options,
    )  # fmt: skip


def _why_not_attention(block: Any) -> str | None:
    modules = block._modules
    if not _is_norm(modules.get("norm")):
        changed = why_changed(modules.get("norm"), _GROUP_NORM)
        return f"norm: {changed or 'it has other settings than the op'}"
    for name in ("qkv", "proj_out"):
        if not _is_product(modules.get(name)):
            changed = why_changed(modules.get(name), "torch.nn.modules.conv.Conv1d")
            return f"{name}: {changed or 'it has other settings than the op'}"
    changed = why_changed(modules.get("attention"), *_ORDERS)
    return None if changed is None else f"attention: {changed}"


@fast(f"{_UNET}.AttentionBlock", runs="group_norm_attention_block", refuses=_why_not_attention)
def attention_block(block: Any, x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, C, H, W); sequences and volumes take the own forward."""
    if x.dim() != 4:
        return own_forward(block, x)
    return _checkpointed(block, lambda x: _attend(block, x), x)


def _attend(block: Any, x: torch.Tensor) -> torch.Tensor:
    norm, qkv, attention, last = (block._modules[name] for name in ("norm", "qkv", "attention", "proj_out"))
    (x,) = to_autocast_dtype(channels_last(x))
    cls = own_class(attention)
    return unchecked_group_norm_attention_block(
        x, parameter(norm, "weight"), parameter(norm, "bias"), parameter(qkv, "weight"), parameter(qkv, "bias"),
        parameter(last, "weight"), parameter(last, "bias"), groups=norm.num_groups, heads=attention.n_heads,
        eps=norm.eps, order=_ORDERS[f"{cls.__module__}.{cls.__qualname__}"], residual=True, output_scale=1.0,
    )  # fmt: skip


def _why_not_upsample(module: Any) -> str | None:
    if not module.use_conv:
        return "it has no convolution"
    if module.dims != 2:
        return f"it is of {module.dims} dimensions"
    return None if is_convolution(module._modules.get("conv"), 3) else why_not(module, "conv")


@fast(f"{_UNET}.Upsample", runs="upsample_conv", refuses=_why_not_upsample)
def upsample(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Nearest upsampling by 2 and a 3×3 convolution."""
    if x.dim() != 4 or x.shape[1] != module.channels:
        return own_forward(module, x)
    conv = module._modules["conv"]
    (x,) = to_autocast_dtype(channels_last(x))
    return unchecked_upsample_conv(x, parameter(conv, "weight"), parameter(conv, "bias"), taps=None)


class _Network(Replayed):
    """What an accelerated network has before its own methods."""

    def forward(self: Any, t: torch.Tensor, x: torch.Tensor, y: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) or a number, (B, C, H, W), labels (B,) → (B, K, H, W)."""
        if x.dim() != 4 or t.dim() > 1 or (y is None) is not (self.num_classes is None):
            return own_forward(self, t, x, y, *args, **kwargs)
        if y is not None and y.shape != (x.shape[0],):
            return own_forward(self, t, x, y, *args, **kwargs)
        return replayed(self, self._run, t, x, y)

    def computed_modules(self: Any) -> Iterator[tuple[nn.Module, str]]:
        """See family.py."""
        layers = _last_layers(self._modules["out"])
        if layers is not None:
            yield layers[0], "group_norm_silu"

    def _run(self: Any, t: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        timesteps = t.repeat(x.shape[0]) if t.dim() == 0 else t
        package = sys.modules[_UNET]
        emb = self.time_embed(package.timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.type(self.dtype)
        rows = _rows(self, h, emb)
        skips = []
        for sequence in self.input_blocks:
            h = _run(sequence, h, emb, rows)
            skips.append(h)
        h = _run(self.middle_block, h, emb, rows)
        for sequence in self.output_blocks:
            h = _run(sequence, h, emb, rows, skips.pop())
        return _last(self._modules["out"], h, x.dtype)


computes_plainly(f"{_UNET}.TimestepEmbedSequential", f"{_UNET}.Downsample", f"{_UNET}.Upsample", _GROUP_NORM)
for _name in ("UNetModel", "UNetModelWrapper"):
    declare(Fast(f"{_UNET}.{_name}", "preactivation_block, group_norm_silu", mixin=_Network, is_network=True))


# Of a residual block: the output of its `emb_layers`, its seed, and whether its first bias is in the rows.
_Row = tuple[torch.Tensor, torch.Tensor | None, bool]


def _rows(network: Any, h: torch.Tensor, emb: torch.Tensor) -> dict[nn.Module, _Row]:
    """For each residual block that may be computed without a call of its module, what `_compute` takes.

    One product makes all rows, to which one sum adds the biases that would follow, and one call draws all seeds.
    """
    sequences = (*network.input_blocks, network.middle_block, *network.output_blocks)
    blocks: list[Any] = [
        layer
        for sequence in sequences
        if is_unchanged(sequence, f"{_UNET}.TimestepEmbedSequential")
        for layer in sequence._modules.values()
        if computes(layer, res_block, h) and not layer.use_checkpoint
    ]
    if not blocks:
        return {}
    layers = [block._modules["emb_layers"]._modules["1"] for block in blocks]
    with_bias = not any(block.use_scale_shift_norm for block in blocks)
    biases = [parameter(block._modules["in_layers"]._modules["2"], "bias") for block in blocks] if with_bias else ()
    made = linears_of_one_input(nn.functional.silu(emb), layers, biases)
    widths = [parameter(layer, "weight").shape[0] for layer in layers]
    seeds: Iterator[torch.Tensor] = iter(())
    if any(_drops(block) for block in blocks):
        seeds = iter(noise.draw_seeds(len(blocks), h.device))
    return {
        block: (part, next(seeds) if _drops(block) else None, with_bias)
        for block, part in zip(blocks, made.split(widths, dim=1), strict=True)
    }


def _run(
    sequence: Any,
    h: torch.Tensor,
    emb: torch.Tensor,
    rows: dict[nn.Module, _Row],
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """A `TimestepEmbedSequential` of h and skip side by side."""
    if not is_unchanged(sequence, f"{_UNET}.TimestepEmbedSequential"):
        return sequence(h if skip is None else torch.cat((h, skip), dim=1), emb)
    takes_embeddings = sys.modules[_UNET].TimestepBlock
    for layer in sequence._modules.values():
        if layer in rows:
            row, seed, with_bias = rows[layer]
            h = _compute(layer, h, row, seed, skip, with_bias)
        else:
            h = h if skip is None else torch.cat((h, skip), dim=1)
            if isinstance(layer, takes_embeddings):
                h = layer(h, emb)
            elif (
                is_convolution(layer, 3)
                and layer.in_channels < 16
                and rules.why_slower("stem_conv", layer, (h,)) is None
            ):
                h = stem_conv(to_autocast_dtype(h)[0], parameter(layer, "weight"), parameter(layer, "bias"))
            else:
                h = layer(h)
        skip = None
    return h


def _last_layers(out: Any) -> tuple[Any, Any] | None:
    """The norm and the convolution, with SiLU between them, where nobody changed them."""
    if not is_unmodified(out) or len(out._modules) != 3:
        return None
    norm, activation, conv = out._modules.values()
    return (norm, conv) if _is_norm(norm) and _is_silu(activation) and is_convolution(conv, 3) else None


def _last(out: Any, h: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The layers that `_last_layers` gives, or a call of `out`."""
    layers, h = _last_layers(out), h.type(dtype)
    if layers is None or rules.why_slower("conv3x3", out, (h,)) is not None:
        return out(h)
    norm, conv = layers
    (h,) = to_autocast_dtype(channels_last(h))
    gain, offset = parameter(norm, "weight"), parameter(norm, "bias")
    h = group_norm_silu(h, gain, offset, groups=norm.num_groups, eps=norm.eps)
    return conv3x3(h, parameter(conv, "weight"), parameter(conv, "bias"))
