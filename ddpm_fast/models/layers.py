"""The UNet's building blocks, with the peer's parameter names and shapes.

Each module's weights stay in the peer's layout, so checkpoints load both ways; what runs may use another form of the
same formula (DESIGN.md, "Algebra before kernels").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ddpm_fast import noise
from ddpm_fast.models.derived_weights import DerivesWeights
from ddpm_fast.ops.attention.op import attention
from ddpm_fast.ops.attention_block.op import attention_block_natively
from ddpm_fast.ops.conv3x3.op import conv3x3
from ddpm_fast.ops.linear_attention.op import linear_attention
from ddpm_fast.ops.linear_attention.reference import context_and_queries
from ddpm_fast.ops.linear_attention_block.op import linear_attention_block_natively
from ddpm_fast.ops.norm_linear.op import linear, linear_residual, linears, norm_linear
from ddpm_fast.ops.norm_silu.op import group_norm_silu, rms_norm_silu
from ddpm_fast.ops.resnet_block.op import natively, runs_natively
from ddpm_fast.ops.stem_conv.op import stem_conv
from ddpm_fast.runtime.autocast import autocast_dtype


def weights_format(device: torch.device) -> torch.memory_format:
    """How the convolutions' weights lie: channels-last on CUDA, and on meta tensors, which stand for those of CUDA.

    cuDNN would copy them in every call otherwise. oneDNN copies them into blocks of its own in either case.
    """
    return torch.channels_last if device.type in ("cuda", "meta") else torch.contiguous_format


def has_native_maps(x: torch.Tensor) -> bool:
    """Whether a network of maps like x, in whatever layout, had best be channels-last for the CPU's native kernels."""
    return x.device.type == "cpu" and runs_natively(x.contiguous(memory_format=torch.channels_last))


def is_plain(*modules: nn.Module) -> bool:
    """Whether modules may be computed from their weights without being called: nobody replaced them or listens."""
    for module in modules:  # dicts and no attributes: small networks ask two hundred times in a forward pass
        own = module.__dict__
        if type(module) not in _PLAIN or "forward" in own:
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
    return True


def _parameter(module: nn.Module, name: str) -> torch.Tensor | None:
    """module.name, found in a fraction of the time where it is a parameter, as it nearly always is."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def _autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as autocast hands them to a convolution; None stays None."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution of stride 1 with padding 1, natively where that runs: (B, C, H, W) → (B, K, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if runs_natively(x):
            return conv3x3(*_autocast(x), self.weight, self.bias)
        return super().forward(x)


class StemConv(nn.Conv2d):
    """The network's first convolution, of odd side, natively where that runs: (B, C, H, W) → (B, K, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, side: int):
        super().__init__(in_channels, out_channels, side, padding=side // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if runs_natively(x):
            return stem_conv(*_autocast(x), self.weight, self.bias)
        return super().forward(x)


class _UpsampleConv2d(nn.Conv2d, DerivesWeights):
    """Nearest 2× upsampling and a 3×3 convolution as one transposed 4×4 convolution of stride 2.

    Every output pixel sees 2×2 pixels of the small map, with taps that are sums of the 3×3 ones: along an axis, w0 and
    w1 + w2 at even positions, w0 + w1 and w2 at odd ones. A transposed convolution of stride 2 is exactly that, four
    products of 2×2 taps, one per phase: 16 taps where the plain form has 36, and neither the large map between the two
    nor an interleaving pass exists. On one CPU thread it takes a third of the plain form's time, too.
    """

    def derive(self) -> torch.Tensor:
        return _upsampling_taps(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, dim_out, 2H, 2W)
        if runs_natively(x):
            return conv3x3(*_autocast(x), self.weight, self.bias, upsampled=True)
        if torch.is_grad_enabled():
            return _UpsampleConv.apply(*_autocast(x, self.weight, self.bias))
        x, taps, bias = _autocast(x, self.derived(), self.bias)
        return F.conv_transpose2d(x, taps, bias, stride=2, padding=1)


def _upsampling_taps(weight: torch.Tensor) -> torch.Tensor:  # (O, C, 3, 3) -> (C, O, 4, 4)
    """Sums over the 2×2 windows of the zero-padded, mirrored weight: along an axis (w2, w1 + w2, w0 + w1, w0)."""
    if weight.device.type == "cpu":
        # Sums as a product: torch pools planes as small as these, one by one, thirty times slower.
        sums = weight.reshape(-1, 9) @ _window_sums(weight)
        return sums.reshape(*weight.shape[:2], 4, 4).transpose(0, 1)
    mirrored = weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=weights_format(weight.device))
    return F.avg_pool2d(mirrored, 2, stride=1, padding=1, divisor_override=1)


def _window_sums(weight: torch.Tensor) -> torch.Tensor:
    """(9, 16) zeros and ones: which of the 3×3 taps are summed into each of the 4×4."""
    axis = weight.new_tensor([[0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]])
    return torch.kron(axis, axis)


class _UpsampleConv(torch.autograd.Function):
    """The transposed convolution; the taps are made again in backward, where they would be 1.8 weights to keep."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv_transpose2d(x, _upsampling_taps(weight), bias, stride=2, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        geometry = ((2, 2), (1, 1), (1, 1), True, (0, 0), 1)
        dx, dtaps, dbias = torch.ops.aten.convolution_backward(
            grad, x, _upsampling_taps(weight), (weight.shape[0],), *geometry, wanted
        )
        return dx, _gradient_of_taps(dtaps) if wanted[1] else None, dbias


def _gradient_of_taps(dtaps: torch.Tensor) -> torch.Tensor:  # (C, O, 4, 4) -> (O, C, 3, 3)
    """Each tap of the weight went into 2×2 sums."""
    if dtaps.device.type == "cpu":
        sums = dtaps.reshape(-1, 16) @ _window_sums(dtaps).t()
        return sums.reshape(*dtaps.shape[:2], 3, 3).transpose(0, 1)
    return F.avg_pool2d(dtaps, 2, stride=1, divisor_override=1).flip(2, 3).transpose(0, 1)


def Upsample(dim: int, dim_out: int | None = None) -> nn.Sequential:
    """Nearest 2× upsampling and a 3×3 convolution: (B, C, H, W) → (B, dim_out, 2H, 2W)."""
    # The identity stands where the peer upsamples, so that the convolution is "1" in the state dict.
    return nn.Sequential(nn.Identity(), _UpsampleConv2d(dim, dim if dim_out is None else dim_out, 3, padding=1))


class _PixelUnshuffleConv2d(nn.Conv2d, DerivesWeights):
    """Pixel-unshuffle by 2 and a 1×1 convolution, computed as one 2×2 convolution of stride 2.

    The weight keeps the shape (dim_out, 4·dim, 1, 1) of the 1×1 convolution; its input channels are ordered
    (channel, row, column), so the same numbers are a (dim_out, dim, 2, 2) kernel. Channels-last, that kernel is a 1×1
    one again, of the four pixels' channels side by side: natively it is a matrix product.
    """

    def derive(self) -> torch.Tensor:
        weight = self.weight.reshape(self.out_channels, self.in_channels // 4, 2, 2)
        return weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, dim_out, H/2, W/2)
        weight = self.derived()
        if x.shape[2] % 2 or x.shape[3] % 2 or not runs_natively(x):
            return F.conv2d(x, weight, self.bias, stride=2)
        weight = weight.permute(0, 2, 3, 1).reshape(self.weight.shape)
        return linear(_pixels_side_by_side(*_autocast(x)), weight, self.bias)


def _pixels_side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Channels of 2×2 pixels side by side, (row, column, channel): channels-last (B, C, H, W) → (B, 4·C, H/2, W/2)."""
    B, C, H, W = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(B, H // 2, 2, W // 2, 2 * C)
    return rows.transpose(2, 3).reshape(B, H // 2, W // 2, 4 * C).permute(0, 3, 1, 2)


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
        return rms_norm_silu(x, self.g, activation=False)


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
    return _ConvOfRecomputed.apply(make, padding, *_autocast(make(*sources), weight, bias), *sources)


class _ConvsOfParts(torch.autograd.Function):
    """Convolutions of stride 1 of the same input, which is several maps side by side; see `convs_of_parts`."""

    @staticmethod
    def forward(ctx, num_parts, *tensors):
        parts, rest = tensors[:num_parts], tensors[num_parts:]
        weights, biases = rest[::2], rest[1::2]
        ctx.save_for_backward(*parts, *weights)
        ctx.num_parts = num_parts
        h = torch.cat(parts, dim=1)
        return tuple(_same_conv(h, *parameters) for parameters in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        saved = ctx.saved_tensors  # asked for once: under torch's checkpoint a second time is an error
        parts, weights = saved[: ctx.num_parts], saved[ctx.num_parts :]
        needs = ctx.needs_input_grad[1:]
        needs_parts, needs = needs[: len(parts)], needs[len(parts) :]
        dparts, gradients = [None] * len(parts), []
        for grad, weight, needs_weight, needs_bias in zip(grads, weights, needs[::2], needs[1::2], strict=True):
            geometry = ((1, 1), (weight.shape[2] // 2,) * 2, (1, 1), False, (0, 0), 1)
            dweights, dbias, channel = [], None, 0
            for i, part in enumerate(parts):
                taps = weight[:, channel : channel + part.shape[1]]
                taps = taps.contiguous(memory_format=weights_format(weight.device))
                channel += part.shape[1]
                wanted = (needs_parts[i], needs_weight, needs_bias and i == 0)
                dpart, dweight, dbias_once = torch.ops.aten.convolution_backward(
                    grad, part, taps, (weight.shape[0],), *geometry, wanted
                )
                dweights.append(dweight)
                dbias = dbias_once if i == 0 else dbias
                if needs_parts[i]:
                    dparts[i] = dpart if dparts[i] is None else dparts[i] + dpart
            gradients += [torch.cat(dweights, dim=1) if needs_weight else None, dbias]
        return None, *dparts, *gradients


def _same_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def convs_of_parts(
    parts: tuple[torch.Tensor, ...], *parameters: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """Convolutions of several maps side by side, one output for each weight (O, ΣC, k, k), k odd, and bias.

    A skip connection is read by two convolutions, and is there already; what stands side by side is kept for neither.
    Backward takes each map by itself, so that gradients come out as whole maps and not as slices to be copied.

    Forward does put the maps side by side. For two maps of n bytes and two convolutions with outputs of n that is 10n:
    4n to write them side by side, and 3n per convolution. One convolution per map and a sum would be 14n, and still
    10n with the sums inside the norm that follows. Producers could write into halves of one map, but cuDNN's
    convolutions, which are half of them, write no halves, and a skip has had readers of the whole before.
    """
    if not torch.is_grad_enabled():
        h = torch.cat(parts, dim=1)
        return tuple(_same_conv(h, weight, bias) for weight, bias in parameters)
    flat = [tensor for pair in parameters for tensor in pair]
    return _ConvsOfParts.apply(len(parts), *_autocast(*parts, *flat))


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


def linears_of_one_input(x: torch.Tensor, layers: Sequence[nn.Linear]) -> torch.Tensor:
    """The outputs of linear layers with bias side by side, (B, D) → (B, sum of their out_features), as one product."""
    weights = [_parameter(layer, "weight") for layer in layers]
    return linears(*_autocast(x), weights, [_parameter(layer, "bias") for layer in layers])


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

    def modules_as_made(self) -> bool:
        """Whether the block may be computed from its modules' weights, see `is_plain`."""
        return is_plain(*self._modules.values())  # proj, norm, act, dropout

    def by_modules(self, x, scale_shift=None) -> torch.Tensor:
        """The block by calling its modules one after another, as they may have been replaced."""
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = (tensor[:, :, None, None] for tensor in scale_shift)
            x = x * (scale + 1) + shift
        return self.dropout(self.act(x))

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
    return rms_norm_silu(y, g, bias=bias, scale=scale, shift=shift, residual=residual, dropout_p=dropout_p, seed=seed)


def _group_block(y, weight, affine, bias, scale, shift, seed, *, groups, eps, dropout_p, residual=None) -> torch.Tensor:
    return group_norm_silu(
        y, weight, affine, groups=groups, eps=eps, bias=bias, scale=scale, shift=shift, residual=residual,
        dropout_p=dropout_p, seed=seed,
    )  # fmt: skip


class ResnetBlock(nn.Module):
    """Two blocks around a residual; the first is scaled and shifted by the time embedding.

    With `low_memory` the map between the two blocks is made again in backward instead of being kept; natively, where a
    block is one op that keeps the two convolutions' outputs, the whole block is.
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
        x: torch.Tensor | tuple[torch.Tensor, ...],
        time_emb: torch.Tensor | None = None,
        scale_shift: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # (B, dim, H, W), (B, time_emb_dim) or two of (B, dim_out) -> (B, dim_out, H, W)
        """One residual block.

        Args:
            x: a map, or several whose channels stand side by side and add up to another number than dim_out.
            scale_shift: what `mlp` makes of the time embedding, where the caller has computed it already.
        """
        if self.mlp is not None and time_emb is not None:
            scale_shift = self.mlp(time_emb).chunk(2, dim=1)
        if not self._as_made():
            x = torch.cat(x, dim=1) if isinstance(x, tuple) else x
            return self.block2.by_modules(self.block1.by_modules(x, scale_shift)) + self.res_conv(x)
        parts = x if isinstance(x, tuple) else (x,)
        if len(parts) <= 2 and runs_natively(*parts):
            return self._as_one_op(*_autocast(*parts), scale_shift=scale_shift)
        make, sources, residual = self._last_pass(x, scale_shift)
        return make(*sources, residual=residual)

    def _as_one_op(self, x, beside=None, *, scale_shift) -> torch.Tensor:
        """The block by the op that keeps x and two maps for backward; with `low_memory` x alone, to run again."""
        modules = self._modules  # see `_parameter`
        block1, block2, res_conv = modules["block1"]._modules, modules["block2"]._modules, modules["res_conv"]
        proj1, proj2 = block1["proj"], block2["proj"]
        scale, shift = (None, None) if scale_shift is None else scale_shift
        dropout = block1["dropout"]
        dropout_p = dropout.p if dropout.training else 0.0
        options = {"dropout_p": dropout_p, "seed": noise.draw_seed(x.device)} if dropout_p > 0 else {}
        norm1, norm2 = block1["norm"], block2["norm"]
        if isinstance(norm1, RMSNorm):
            gain1, gain2 = _parameter(norm1, "g"), _parameter(norm2, "g")
        else:
            gain1, gain2 = norm1.weight, norm2.weight
            options |= {"affine1": norm1.bias, "affine2": norm2.bias, "groups": norm1.num_groups, "eps": norm1.eps}
        if isinstance(res_conv, nn.Conv2d):
            options |= {"res_weight": _parameter(res_conv, "weight"), "res_bias": _parameter(res_conv, "bias")}
        if self.low_memory and torch.is_grad_enabled():
            run = partial(checkpoint, natively, use_reentrant=False, preserve_rng_state=False)
        else:
            run = natively
        return run(
            x, _parameter(proj1, "weight"), _parameter(proj1, "bias"), gain1,
            _parameter(proj2, "weight"), _parameter(proj2, "bias"), gain2,
            beside=beside, scale=scale, shift=shift, **options,
        )  # fmt: skip

    def _as_made(self) -> bool:
        modules = self._modules
        blocks = modules["block1"].modules_as_made() and modules["block2"].modules_as_made()
        return blocks and is_plain(modules["res_conv"])

    def followed_by(self, conv: nn.Conv2d, x, scale_shift=None) -> torch.Tensor:
        """A 1×1 convolution of the block's output, for x in parts; with `low_memory` that output is not kept."""
        if not (self._as_made() and is_plain(conv)):
            return conv(self(x, scale_shift=scale_shift))
        if runs_natively(*x):
            return linear(self(x, scale_shift=scale_shift), _parameter(conv, "weight"), _parameter(conv, "bias"))
        make, sources, residual = self._last_pass(x, scale_shift)
        h = make(*sources, residual=residual)
        if not (self.low_memory and torch.is_grad_enabled()):
            return conv(h)
        remake = partial(_block_of_parts, make, len(sources))
        kept = (*sources, *_autocast(*x, self.res_conv.weight, self.res_conv.bias))
        return _ConvOfRecomputed.apply(remake, 0, *_autocast(h, conv.weight, conv.bias), *kept)

    def _last_pass(self, x, scale_shift) -> tuple[Callable, list[torch.Tensor], torch.Tensor]:
        """What follows the second convolution, as a function, its tensors and the residual."""
        if isinstance(x, tuple):
            weight, res_conv = self.block1.proj.weight, self.res_conv
            y1, residual = convs_of_parts(x, (weight, None), (res_conv.weight, res_conv.bias))
        else:
            y1, residual = F.conv2d(x, self.block1.proj.weight, padding=1), self.res_conv(x)
        make1, *sources1 = self.block1.after_convolution(y1, scale_shift)
        if self.low_memory and torch.is_grad_enabled():
            y2 = _conv_of_recomputed(make1, 1, self.block2.proj.weight, None, *sources1)
        else:
            y2 = F.conv2d(make1(*sources1), self.block2.proj.weight, padding=1)
        make2, *sources2 = self.block2.after_convolution(y2)
        return make2, sources2, residual


def _block_of_parts(make: Callable, count: int, *tensors: torch.Tensor) -> torch.Tensor:
    """make(*sources, residual=1×1 convolution of the parts): `count` sources, the parts, that convolution's tensors."""
    sources, (*parts, weight, bias) = tensors[:count], tensors[count:]
    (residual,) = convs_of_parts(tuple(parts), (weight, bias))
    return make(*sources, residual=residual)


def _norm_linear(x: torch.Tensor, norm: nn.Module, linear: nn.Module) -> torch.Tensor:
    if not is_plain(norm, linear):
        return linear(norm(x))
    return norm_linear(*_autocast(x), norm.g, linear.weight)


class LinearAttention(nn.Module):
    """Linear attention with learned memory keys and values (Shen et al. 2021, "Efficient Attention").

    Softmax over the head dimension for q and over positions for k. Shapes: (B, C, H, W) → (B, C, H, W). With
    `low_memory` only x is kept for backward, which runs the forward again.
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32, num_mem_kv: int = 4, low_memory: bool = False):
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

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of x, plus `residual` of its shape where one is given."""
        if runs_natively(x) and is_plain(self.norm, self.to_qkv, self.to_out, *self.to_out):
            project, norm = self.to_out
            return linear_attention_block_natively(
                *_autocast(x), self.norm.g, self.to_qkv.weight, self.mem_kv, project.weight, project.bias, norm.g,
                heads=self.heads, residual=residual,
            )  # fmt: skip
        if self.low_memory and torch.is_grad_enabled():
            return checkpoint(self._attend, x, residual, use_reentrant=False, preserve_rng_state=False)
        return self._attend(x, residual)

    def _attend(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        qkv = _norm_linear(x, self.norm, self.to_qkv)
        project, norm = self.to_out
        if not is_plain(self.to_out, project, norm):
            context, q = context_and_queries(qkv, self.mem_kv, self.heads)
            out = self.to_out((context.transpose(-1, -2) @ q).reshape(len(q), -1, *x.shape[2:]))
            return out if residual is None else out + residual
        return linear_attention(
            qkv, self.mem_kv, project.weight, project.bias, norm.g, heads=self.heads, residual=residual
        )


class Attention(nn.Module):
    """Softmax attention over all positions, with learned memory keys and values (Vaswani et al. 2017, eq. 1).

    `flash` is kept for the peer's signature: which kernel runs does not depend on it. Shapes: (B, C, H, W) →
    (B, C, H, W).
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

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of x, plus `residual` of its shape where one is given."""
        if runs_natively(x) and is_plain(self.norm, self.to_qkv, self.to_out):
            return attention_block_natively(
                *_autocast(x), self.norm.g, self.to_qkv.weight, self.mem_kv, self.to_out.weight, self.to_out.bias,
                heads=self.heads, residual=residual,
            )  # fmt: skip
        qkv = _norm_linear(x, self.norm, self.to_qkv)
        out = attention(qkv, self.mem_kv, heads=self.heads)
        if residual is None or not is_plain(self.to_out):
            return self.to_out(out) if residual is None else self.to_out(out) + residual
        return linear_residual(out, self.to_out.weight, self.to_out.bias, residual)


_PLAIN = frozenset(
    (nn.Conv2d, Conv3x3, nn.Linear, nn.Identity, nn.SiLU, nn.Dropout, nn.GroupNorm, nn.Sequential, RMSNorm)
)
