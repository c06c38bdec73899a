"""diffusers' networks of images: `UNet2DModel`, and the same blocks in `UNet2DConditionModel` and others.

A `ResnetBlock2D` is one pre-activation block, with every option but FIR filters; an `Attention` of a map with itself is
one block where its processor is diffusers' own. `UpBlock2D` and `AttnUpBlock2D` give a block two maps instead of a
concatenation, and `UNet2DModel` ends in one norm with SiLU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast import noise
from ddpm_fast.integrations import rules
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
from ddpm_fast.integrations.replays import Replayed, replayed
from ddpm_fast.models.embeddings import linears_of_one_input
from ddpm_fast.models.narrow_weights import narrow
from ddpm_fast.models.norm import is_group_norm
from ddpm_fast.models.stock import is_convolution, is_instance, parameter
from ddpm_fast.ops.attention_block.op import unchecked_group_norm_attention_block
from ddpm_fast.ops.norm_silu.op import group_norm_silu
from ddpm_fast.ops.preactivation_block.op import unchecked_preactivation_block
from ddpm_fast.ops.resample.op import unchecked_upsample_conv
from ddpm_fast.runtime.autocast import to_autocast_dtype
from ddpm_fast.runtime.threads import of_this_thread

RESNET = "diffusers.models.resnet.ResnetBlock2D"
ATTENTION = "diffusers.models.attention_processor.Attention"
UPSAMPLE = "diffusers.models.upsampling.Upsample2D"
DOWNSAMPLE = "diffusers.models.downsampling.Downsample2D"
UP_BLOCKS = (
    "diffusers.models.unets.unet_2d_blocks.UpBlock2D",
    "diffusers.models.unets.unet_2d_blocks.AttnUpBlock2D",
)
UNET = "diffusers.models.unets.unet_2d.UNet2DModel"

# The two processors that compute softmax attention and nothing else.
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


# Residual blocks


def _why_not_resnet(block: Any) -> str | None:
    modules = block._modules
    for name in ("conv1", "conv2"):
        if not _is_conv3x3(modules.get(name)):
            return why_not(block, name)
    for name in ("norm1", "norm2"):
        if not is_group_norm(modules.get(name)):
            return why_not(block, name)
    for name, cls in (("nonlinearity", nn.SiLU), ("dropout", nn.Dropout)):
        if not is_instance(modules.get(name), cls):
            return why_not(block, name)
    projection, shortcut = block.time_emb_proj, block.conv_shortcut
    if projection is not None and not is_instance(projection, nn.Linear):
        return why_not(block, "time_emb_proj")
    if shortcut is not None and not (is_convolution(shortcut, 1) or is_convolution(shortcut, 1, bias=False)):
        return why_not(block, "conv_shortcut")
    width, out = modules["conv1"].weight.shape[0], modules["conv2"].weight.shape[0]
    if out != width:
        return f"conv2 gives {out} channels and conv1 {width}"
    if shortcut is None and modules["conv1"].weight.shape[1] != out:
        return "there is no conv_shortcut, and the block changes the number of channels"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"time_embedding_norm is {block.time_embedding_norm!r}"
    if block.time_embedding_norm == "scale_shift" and projection is None:
        return "there is no time_emb_proj for its scale and shift"
    return _why_not_resampled(block)


def _is_conv3x3(module: Any) -> bool:
    return is_convolution(module, 3) or is_convolution(module, 3, bias=False)


def _why_not_resampled(block: Any) -> str | None:
    up, down = block.upsample, block.downsample
    if up is not None and not _is_nearest(up):
        return "its upsampling is not the nearest of 2×2 pixels"
    if up is None and down is not None and not _is_mean(down):
        return "its downsampling is not the mean of 2×2 pixels"
    return None


def _is_nearest(resize: Any) -> bool:
    if isinstance(resize, functools.partial):
        return resize.func is F.interpolate and resize.keywords == {"scale_factor": 2.0, "mode": "nearest"}
    return (
        is_unchanged(resize, UPSAMPLE)
        and not (resize.use_conv or resize.use_conv_transpose)
        and resize.norm is None
        and resize.interpolate
    )


def _is_mean(resize: Any) -> bool:
    if isinstance(resize, functools.partial):
        return resize.func is F.avg_pool2d and resize.keywords == {"kernel_size": 2, "stride": 2}
    if not is_unchanged(resize, DOWNSAMPLE) or resize.use_conv or resize.norm is not None:
        return False
    pool = resize.conv
    settings = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.divisor_override)
    return is_unchanged(pool, "torch.nn.modules.pooling.AvgPool2d") and settings == (2, 2, 0, False, None)


@fast(RESNET, runs="preactivation_block", refuses=_why_not_resnet)
def resnet(module: Any, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """`ResnetBlock2D`: (B, C, H, W), (B, T) → (B, K, H, W), twice or half that height and width."""
    if args or kwargs or not _fits(module, input_tensor, temb):
        return own_forward(module, input_tensor, temb, *args, **kwargs)
    return _resnet(module, input_tensor, temb)


def _fits(module: Any, x: torch.Tensor, temb: torch.Tensor | None) -> bool:
    """True for a map and, where the block reads one, an embedding of each image or of all."""
    if x.dim() != 4 or (temb is None) != (module.time_emb_proj is None):
        return False
    return temb is None or (temb.dim() == 2 and temb.shape[0] in (1, x.shape[0]))


def _resnet(module: Any, x: torch.Tensor, temb: torch.Tensor | None, skip: torch.Tensor | None = None) -> torch.Tensor:
    """A block that `_why_not_resnet` does not refuse, of what `_fits`; `skip` is concatenated to x."""
    modules = module._modules
    options: dict[str, Any] = {}
    (x,) = to_autocast_dtype(channels_last(x))
    if skip is not None:
        (options["skip"],) = to_autocast_dtype(channels_last(skip))
    bias1 = parameter(modules["conv1"], "bias")
    if temb is not None:
        rows, with_bias = _projected(module, temb)
        bias1 = None if with_bias else bias1
        if rows.shape[0] != x.shape[0]:
            rows = rows.expand(x.shape[0], -1)
        if module.time_embedding_norm == "scale_shift":
            options["scale"], options["shift"] = rows.chunk(2, dim=1)
        else:
            options["embedding"] = rows
    shortcut, dropout = module.conv_shortcut, modules["dropout"]
    if shortcut is not None:
        options |= {"res_weight": narrow(shortcut, "weight"), "res_bias": narrow(shortcut, "bias")}
    if dropout.training and dropout.p > 0:
        options |= {"dropout_p": dropout.p, "seed": noise.draw_seed(x.device)}
    if module.upsample is not None or module.downsample is not None:
        options["resample"] = "down" if module.upsample is None else "up"
    (norm1, norm2), (conv1, conv2) = [[modules[f"{name}{i}"] for i in (1, 2)] for name in ("norm", "conv")]
    return unchecked_preactivation_block(
        x, narrow(conv1, "weight"), bias1, parameter(norm1, "weight"), parameter(norm1, "bias"),
        narrow(conv2, "weight"), parameter(conv2, "bias"), parameter(norm2, "weight"), parameter(norm2, "bias"),
        groups1=norm1.num_groups, groups2=norm2.num_groups, eps1=norm1.eps, eps2=norm2.eps,
        output_scale=1 / float(module.output_scale_factor), **options,
    )  # fmt: skip


# Attention


def _why_not_attention(module: Any) -> str | None:
    processor = module.processor
    cls = type(processor)
    if cls.__module__ != "diffusers.models.attention_processor" or cls.__name__ not in _PROCESSORS:
        return f"its processor is a {cls.__name__}"
    if cls.__call__.__module__ != cls.__module__ or "__call__" in vars(processor):
        return f"the __call__ of {cls.__name__} was replaced"
    modules = module._modules
    for name in ("spatial_norm", "norm_q", "norm_k"):
        if getattr(module, name, None) is not None:
            return f"it has a {name}"
    if module.group_norm is None or not is_group_norm(module.group_norm):
        return why_not(module, "group_norm")
    layers = {name: modules.get(name) for name in ("to_q", "to_k", "to_v")}
    for name, layer in layers.items():
        if not is_instance(layer, nn.Linear):
            return why_not(module, name)
    if any(layer.weight.shape != layers["to_q"].weight.shape for layer in layers.values()):
        return "query, key and value are not of one shape"
    if len({layer.bias is None for layer in layers.values()}) > 1:
        return "some of query, key and value have a bias and some not"
    return _why_not_out(module, layers["to_q"].weight.shape)


def _why_not_out(module: Any, shape: torch.Size) -> str | None:
    """Of the layer after attention; `shape` is that of query's weight."""
    out = module._modules.get("to_out")
    if out is None or len(out) != 2 or not (is_instance(out[0], nn.Linear) and is_instance(out[1], nn.Dropout)):
        return "to_out is not a linear layer and dropout"
    if out[1].training and out[1].p > 0:
        return "it drops out after its last layer"
    if out[0].weight.shape != shape[::-1]:
        return "it changes the number of channels"
    if type(module.processor).__name__ == "AttnProcessor" and module.scale != (shape[0] // module.heads) ** -0.5:
        return f"its scale is {module.scale}"
    return None


@fast(ATTENTION, runs="group_norm_attention_block", refuses=_why_not_attention)
def attention(
    module: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """`Attention` of a map with itself: (B, C, H, W) → (B, C, H, W)."""
    is_itself = encoder_hidden_states is None and attention_mask is None and kwargs.keys() <= {"temb"}
    if not is_itself or hidden_states.dim() != 4:
        return own_forward(module, hidden_states, encoder_hidden_states, attention_mask, **kwargs)
    modules = module._modules
    layers, norm, out = (
        [modules[name] for name in ("to_q", "to_k", "to_v")],
        modules["group_norm"],
        modules["to_out"][0],
    )
    (x,) = to_autocast_dtype(channels_last(hidden_states))
    weight = torch.cat([narrow(layer, "weight") for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([narrow(layer, "bias") for layer in layers])
    return unchecked_group_norm_attention_block(
        x, parameter(norm, "weight"), parameter(norm, "bias"), weight, bias, narrow(out, "weight"), narrow(out, "bias"),
        groups=norm.num_groups, heads=module.heads, eps=norm.eps, order="3hd", residual=module.residual_connection,
        output_scale=1 / float(module.rescale_output_factor),
    )  # fmt: skip


# Resampling


def _convolution(module: Any) -> Any:
    """The convolution of an `Upsample2D`, by either of its names."""
    return module._modules.get("conv" if module.name == "conv" else "Conv2d_0")


def _why_not_upsample(module: Any) -> str | None:
    if module.use_conv_transpose or not module.interpolate:
        return "it does not repeat pixels"
    if module.norm is not None:
        return "it has a norm"
    if not module.use_conv:
        return "it has no convolution"
    return None if is_convolution(_convolution(module), 3) else why_not(module, "conv")


@fast(UPSAMPLE, runs="upsample_conv", refuses=_why_not_upsample)
def upsample(
    module: Any, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`Upsample2D`: (B, C, H, W) → (B, K, 2H, 2W)."""
    if output_size is not None or args or kwargs:
        return own_forward(module, hidden_states, output_size, *args, **kwargs)
    conv = _convolution(module)
    (x,) = to_autocast_dtype(channels_last(hidden_states))
    return unchecked_upsample_conv(x, narrow(conv, "weight"), narrow(conv, "bias"), taps=None)


# Blocks of the upward half


def _why_not_up_block(module: Any) -> str | None:
    if module.gradient_checkpointing and module.training:
        return "it computes its blocks again in backward"
    if all(getattr(module, name, None) for name in ("s1", "s2", "b1", "b2")):
        return "FreeU scales what it concatenates"
    for i, block in enumerate(module.resnets):
        reason = why_changed(block, RESNET) or _why_not_resnet(block)
        if reason is not None:
            return f"resnets.{i}: {reason}"
    return None


class UpBlock:
    """`UpBlock2D` and `AttnUpBlock2D`, whose residual blocks read the map and the skip where they are."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        res_hidden_states_tuple: tuple[torch.Tensor, ...],
        temb: torch.Tensor | None = None,
        upsample_size: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, C, H, W), as many of (B, C', H, W) as there are residual blocks, (B, T) → (B, K, H, W) or twice that."""
        if args or kwargs or not all(_fits(block, hidden_states, temb) for block in self.resnets):
            return own_forward(self, hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs)
        attentions = self._modules.get("attentions") or [None] * len(self.resnets)
        skips = reversed(res_hidden_states_tuple)
        x = hidden_states
        for block, attend, skip in zip(self.resnets, attentions, skips, strict=False):
            if rules.why_slower("preactivation_block", block, (x,)) is None:
                x = _resnet(block, x, temb, skip)
            else:
                x = block(torch.cat((x, skip), dim=1), temb)
            x = x if attend is None else attend(x)
        for upsampler in self.upsamplers or ():
            if getattr(self, "upsample_type", None) == "resnet":
                x = upsampler(x, temb=temb)
            else:
                x = upsampler(x) if upsample_size is None else upsampler(x, upsample_size)
        return x


for _path in UP_BLOCKS:
    declare(Fast(_path, "preactivation_block of a map and a skip", _why_not_up_block, mixin=UpBlock, is_network=True))


# The network


# Thread → the embedding of the running network, of each block its projection, and whether the first convolution's bias
# is in it.
_projections: dict[int, tuple[torch.Tensor, dict[int, torch.Tensor], bool]] = {}


def _projected(block: Any, temb: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The projection of an embedding, (B, K) or (B, 2K): that which the network has made, or made now.

    And whether the bias of the block's first convolution is added to it.
    """
    if not torch.compiler.is_compiling() and _projections:
        embedding, rows, with_bias = _projections.get(threading.get_ident(), (None, {}, False))
        if embedding is temb and id(block) in rows:
            return rows[id(block)], with_bias
    return block.time_emb_proj(temb if block.skip_time_act else F.silu(temb)), False


def _projecting(blocks: list[Any], temb: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside, this thread's blocks find their projections of the embedding, which are one product."""
    if len(blocks) < 2:
        return of_this_thread(_projections, None)
    layers = [block.time_emb_proj for block in blocks]
    biases = [parameter(block._modules["conv1"], "bias") for block in blocks]
    is_whole = all(bias is not None for bias in biases)
    with_bias = is_whole and all(block.time_embedding_norm == "default" for block in blocks)
    rows = linears_of_one_input(F.silu(temb), layers, biases if with_bias else ())
    parts = rows.split([layer.weight.shape[0] for layer in layers], dim=1)
    made = {id(block): part for block, part in zip(blocks, parts, strict=True)}
    return of_this_thread(_projections, (temb, made, with_bias))


def _projecting_blocks(network: nn.Module) -> list[Any]:
    """The residual blocks whose projections of SiLU(embedding) may be one product.

    None where a module may run again in backward, which then has to keep the same tensors.
    """
    found: list[Any] = []
    for block in _inside(network):
        own = block.__dict__
        if "forward" in own or own.get("gradient_checkpointing"):
            return []
        if why_changed(block, RESNET) is None and not block.skip_time_act and _why_not_resnet(block) is None:
            if block.time_emb_proj is not None and block.time_emb_proj.bias is not None:
                found.append(block)
    return found


def _inside(network: Any) -> Iterator[Any]:
    """A network's blocks and the layers of each, in an eighth of the time of `modules()`."""
    for block in (*network.down_blocks, network.mid_block, *network.up_blocks):
        if block is None:
            continue
        yield block
        for layers in block._modules.values():
            inside = layers if isinstance(layers, nn.ModuleList) else (layers,)
            yield from (layer for layer in inside if layer is not None)


def _why_not_unet(module: Any) -> str | None:
    if not is_group_norm(module._modules.get("conv_norm_out")):
        return why_not(module, "conv_norm_out")
    return None if is_instance(module._modules.get("conv_act"), nn.SiLU) else why_not(module, "conv_act")


class Unet2D(Replayed):
    """`UNet2DModel`: its projections of the time are one product, and its last norm and SiLU one pass."""

    def forward(
        self: Any,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """(B, C, H, W), one timestep or (B,), (B,) → (B, K, H, W), as diffusers' class returns it."""
        if self.config.time_embedding_type == "fourier" or torch.compiler.is_compiling():
            return own_forward(self, sample, timestep, class_labels, return_dict)
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        elif timestep.dim() == 0:
            timestep = timestep[None].to(sample.device)
        out = replayed(self, self._run, sample, timestep, class_labels)
        return _output_class(self)(sample=out) if return_dict else (out,)

    def computed_modules(self: Any) -> Iterator[tuple[nn.Module, str]]:
        """See family.py."""
        yield self.conv_norm_out, "group_norm_silu"

    def _run(
        self: Any, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        x = 2 * sample - 1.0 if self.config.center_input_sample else sample
        temb = self._embedding(x, timestep, class_labels)
        skip_sample: torch.Tensor | None = x
        x = self.conv_in(channels_last(x))
        with _projecting(_projecting_blocks(self), temb):
            skips = (x,)
            for block in self.down_blocks:
                if hasattr(block, "skip_conv"):
                    x, more, skip_sample = block(hidden_states=x, temb=temb, skip_sample=skip_sample)
                else:
                    x, more = block(hidden_states=x, temb=temb)
                skips += more
            if self.mid_block is not None:
                x = self.mid_block(x, temb)
            skip_sample = None
            for block in self.up_blocks:
                count = len(block.resnets)
                if hasattr(block, "skip_conv"):
                    x, skip_sample = block(x, skips[-count:], temb, skip_sample)
                else:
                    x = block(x, skips[-count:], temb)
                skips = skips[:-count]
        norm = self.conv_norm_out
        (x,) = to_autocast_dtype(channels_last(x))
        x = group_norm_silu(x, parameter(norm, "weight"), parameter(norm, "bias"), groups=norm.num_groups, eps=norm.eps)
        out = self.conv_out(x)
        return out if skip_sample is None else out + skip_sample

    def _embedding(
        self: Any, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, T), of the time and of the classes."""
        temb = self.time_embedding(self.time_proj(timestep.expand(x.shape[0])).to(dtype=self._embedding_dtype()))
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_embedding needs to be initialized in order to use class conditioning")
            return temb
        if class_labels is None:
            raise ValueError("class_labels should be provided when doing class conditioning")
        if self.config.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels)
        return temb + self.class_embedding(class_labels).to(dtype=self.dtype)

    def _embedding_dtype(self: Any) -> torch.dtype:
        """That of the first layer to read the embedding; diffusers asks every module of the network for a hook."""
        layer = self.time_embedding._modules.get("linear_1")
        return parameter(layer, "weight").dtype if is_instance(layer, nn.Linear) else self.dtype


def _output_class(network: Any) -> Any:
    """`UNet2DOutput`, from the module of the network's class."""
    return sys.modules[type(network).__module__].UNet2DOutput


_PLAIN_BLOCKS = (
    "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "UNetMidBlock2D", "ResnetUpsampleBlock2D",
)  # fmt: skip
computes_plainly(
    *(f"diffusers.models.unets.unet_2d_blocks.{name}" for name in _PLAIN_BLOCKS),
    "diffusers.models.embeddings.Timesteps", "diffusers.models.embeddings.TimestepEmbedding", DOWNSAMPLE, UPSAMPLE,
)  # fmt: skip
declare(Fast(UNET, "projections of the time, group_norm_silu", _why_not_unet, mixin=Unet2D, is_network=True))
