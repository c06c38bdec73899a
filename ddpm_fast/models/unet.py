"""Upstream's UNet: same arguments, same parameters, same function."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn

from ddpm_fast.models.attention import Attention, LinearAttention
from ddpm_fast.models.convolution import Conv3x3, Downsample, StemConv, Upsample
from ddpm_fast.models.derived_weights import Derived, HasDerivedWeight, Times
from ddpm_fast.models.embeddings import (
    RandomOrLearnedSinusoidalPosEmb,
    SinusoidalPosEmb,
    TimeMLP,
    linears_of_one_input,
)
from ddpm_fast.models.narrow_weights import Copies, Group, copies_of, copy_weights, dtype_of_copies, groups_of, reading
from ddpm_fast.models.resnet import ResnetBlock, ScaleShift
from ddpm_fast.models.stock import is_convolution, is_unmodified, parameter
from ddpm_fast.ops.layout import maps_format, weights_format
from ddpm_fast.runtime.plain import as_int, as_ints, as_number, plain

# Without native kernels, channels-last is slower on the CPU when the smallest maps have fewer than 64 pixels per batch
# and 256 channels or more (Unet(64) at 32×32: 1.4 times the time with 32 pixels, 0.99 with 128; Unet(32, (1, 2, 4))
# with 16 pixels: 0.92).
_FEW_PIXELS, _WIDE = 64, 256

_TABLE = "table"  # the name of one derived tensor; copies of weights have other keys

NORMS = ("rms", "group")
MEMORY = ("fast", "low")


def _per_stage(name: str, value: Any, num_stages: int) -> tuple:
    """One value per stage from a scalar or a sequence of that length."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * num_stages
    if len(values) != num_stages:
        raise ValueError(f"{name} must be one value or {num_stages}, one per entry of dim_mults, got {value!r}")
    return values


def _ints_per_stage(name: str, value: Any) -> int | tuple[int, ...]:
    """An int, or a tuple of them, from one number or a sequence."""
    value = plain(name, value)
    return as_ints(name, value) if isinstance(value, (tuple, list)) else as_int(name, value)


class Unet(HasDerivedWeight):
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

    Raises:
        ValueError: an argument does not fit, named in one sentence.
    """

    # What a diffusion process may do with this network: write its input in the dtype and layout of convolutions, and
    # give it zeros where there is no estimate of x0 yet, as a recorded step has to.
    begins_with_convolution = True
    takes_zeros_for_no_estimate = True

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
    ):
        super().__init__()
        dim = as_int("dim", dim)
        init_dim = None if init_dim is None else as_int("init_dim", init_dim)
        out_dim = None if out_dim is None else as_int("out_dim", out_dim)
        dim_mults = as_ints("dim_mults", dim_mults)
        channels = as_int("channels", channels)
        learned_sinusoidal_dim = as_int("learned_sinusoidal_dim", learned_sinusoidal_dim)
        sinusoidal_pos_emb_theta = as_number("sinusoidal_pos_emb_theta", sinusoidal_pos_emb_theta)
        dropout = as_number("dropout", dropout)
        attn_dim_head = _ints_per_stage("attn_dim_head", attn_dim_head)
        attn_heads = _ints_per_stage("attn_heads", attn_heads)
        full_attn = plain("full_attn", full_attn)
        resnet_block_groups = as_int("resnet_block_groups", resnet_block_groups)
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
        init_dim = dim if init_dim is None else init_dim
        self.init_conv = StemConv(channels * (2 if self_condition else 1), init_dim, 7)

        dims = [init_dim, *(dim * m for m in dim_mults)]
        in_out = list(zip(dims[:-1], dims[1:], strict=True))
        if norm == "group":
            for width in dims:
                if width % resnet_block_groups:
                    raise ValueError(
                        f"resnet_block_groups must divide every stage's width {dims}, got {resnet_block_groups}"
                    )

        self.random_or_learned_sinusoidal_cond = learned_sinusoidal_cond or random_fourier_features
        if self.random_or_learned_sinusoidal_cond:
            embedding: nn.Module = RandomOrLearnedSinusoidalPosEmb(learned_sinusoidal_dim, random_fourier_features)
            fourier_dim = learned_sinusoidal_dim + 1
        else:
            embedding = SinusoidalPosEmb(dim, theta=sinusoidal_pos_emb_theta)
            fourier_dim = dim
        time_dim = dim * 4
        self.time_mlp = TimeMLP(embedding, nn.Linear(fourier_dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))

        resnet_block = partial(
            ResnetBlock,
            time_emb_dim=time_dim,
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

    @property
    def downsample_factor(self) -> int:
        """Height and width must be divisible by this."""
        return 2 ** (len(self.downs) - 1)

    @property
    def _weight(self) -> torch.Tensor:
        """Any weight: its device and dtype are the network's."""
        for weight in self.parameters():
            return weight
        # The replicas of DataParallel have none.
        return next(w for module in self.modules() for w in getattr(module, "_former_parameters", {}).values())

    def forward(
        self, x: torch.Tensor, time: torch.Tensor | float, x_self_cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict noise, x0 or v, whatever it was trained for.

        Args:
            x: (B, channels, H, W), floating point.
            time: (B,), timesteps; (1,) or a number is the timestep of all images.
            x_self_cond: (B, channels, H, W), the previous estimate of x0; zeros if None; only with `self_condition`.

        Returns:
            (B, out_dim, H, W).

        Raises:
            TypeError, ValueError: an input does not fit, named in one sentence.
        """
        time = self._timesteps(time)
        self._check_inputs(x, time, x_self_cond)
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), dim=1)
        if torch.compiler.is_compiling():
            return self._run(x, time)
        with reading(self._copies(x.device)):
            return self._run(x, time)

    def _run(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The network of inputs that fit."""
        # Every convolution and op keeps this layout.
        pixels = x.shape[0] * x.shape[2] * x.shape[3] // self.downsample_factor**2
        layout, has_both_layouts = self._maps_format(few=pixels < _FEW_PIXELS), x.shape[1] == 1
        x = self.init_conv(x.contiguous(memory_format=layout))
        if has_both_layouts:  # then torch's convolution has chosen one
            x = x.contiguous(memory_format=layout)
        residual = x
        t, scales_and_shifts = self._time_rows(time)
        rows = iter(scales_and_shifts)

        skips = []
        for block1, block2, attn, downsample in _stages(self.downs):
            x = _residual_block(block1, x, t, next(rows))
            skips.append(x)
            x = _residual_block(block2, x, t, next(rows))
            x = _attention_block(attn, x)
            skips.append(x)
            x = downsample(x)

        x = _residual_block(self.mid_block1, x, t, next(rows))
        x = _attention_block(self.mid_attn, x)
        x = _residual_block(self.mid_block2, x, t, next(rows))

        for block1, block2, attn, upsample in _stages(self.ups):
            x = _residual_block(block1, x, t, next(rows), skips.pop())
            x = _residual_block(block2, x, t, next(rows), skips.pop())
            x = _attention_block(attn, x)
            x = upsample(x)

        row = next(rows)
        if row is not None and is_convolution(self.final_conv, 1):
            return self.final_res_block.compute(x, row, residual, self.final_conv)
        return self.final_conv(_residual_block(self.final_res_block, x, t, row, residual))

    def _copies(self, device: torch.device) -> Copies | None:
        """Copies of the weights in autocast's dtype, see `narrow_weights`: of `inference_weights`, or made now."""
        built = self.built() or {}
        dtype = next((tensor.dtype for name, tensor in built.items() if name != _TABLE), None)
        return built if dtype is not None and dtype is dtype_of_copies(device) else copy_weights(self, device)

    def narrow_groups(self) -> list[Group]:
        """See `narrow_weights`."""
        final_conv: Any = self._modules["final_conv"]
        groups: list[Group] = []
        if is_convolution(final_conv, 1):
            groups += [(parameter(final_conv, "weight"),), (parameter(final_conv, "bias"),)]
        projections = [block.projection for block in self._blocks() if _takes_rows(block)]
        if projections:
            groups += [tuple([parameter(layer, name) for layer in projections]) for name in ("weight", "bias")]
        return groups

    def _blocks(self) -> list[nn.Module]:
        """The residual blocks in the order in which they run."""
        blocks: list[nn.Module] = []
        for block1, block2, *_ in _stages(self.downs):  # a slice of a ModuleList would be a new module
            blocks += (block1, block2)
        blocks += (self.mid_block1, self.mid_block2)
        for block1, block2, *_ in _stages(self.ups):
            blocks += (block1, block2)
        return [*blocks, self.final_res_block]

    def _time_rows(self, time: torch.Tensor) -> tuple[torch.Tensor | None, list[ScaleShift | None]]:
        """The time embedding, (B or 1, 4·dim), and for each of `_blocks` two of (B or 1, dim_out): scale and shift.

        A block that has to be called as upstream calls it, with the embedding, has None. The embedding is None where
        every row is found in the table of `inference_weights`.
        """
        blocks = self._blocks()
        takes = [_takes_rows(block) for block in blocks]
        takers: list[Any] = [block for block, taken in zip(blocks, takes, strict=True) if taken]
        table = None if time.is_floating_point() or len(takers) < len(blocks) else (self.built() or {}).get(_TABLE)
        if table is not None and self._embeds_as_built():
            t, rows = None, table[time]
        else:
            t = self.time_mlp(time)
            if not takers:
                return t, [None] * len(blocks)
            rows = _projections(t, takers)
        widths = [block.dim_out for block in takers for _ in range(2)]
        parts = iter(rows.split(widths, dim=1))
        return t, [(next(parts), next(parts)) if taken else None for taken in takes]

    def _embeds_as_built(self) -> bool:
        return isinstance(self.time_mlp, TimeMLP) and self.time_mlp.is_stock()

    @property
    def has_table_of_times(self) -> bool:
        """True inside `inference_weights` with times: an integer time is the row of its table."""
        return (self.built() or {}).get(_TABLE) is not None

    def key(self, times: Times) -> Hashable:
        """The table has a row for each of the times."""
        return times

    def _make(self, times: Times) -> Derived | None:
        """The table of the time embedding, and copies of the weights in autocast's dtype."""
        derived: dict[Hashable, torch.Tensor] = {}
        table = self._make_table(times)
        if table is not None:
            derived[_TABLE] = table
        device = self._weight.device
        dtype = dtype_of_copies(device)
        if dtype is not None:
            groups = [group for part in groups_of(self, device) for group in part]
            derived |= copies_of(groups, dtype)
        return derived or None

    def _make_table(self, times: Times) -> torch.Tensor | None:
        """Projections of the time embedding for given times, (N, Σ 2·dim_out): a step then looks up its row."""
        blocks = [block for block in self._blocks() if _takes_rows(block)]
        if times is None or not self._embeds_as_built() or len(blocks) < len(self._blocks()):
            return None
        device = next(self.time_mlp.parameters()).device
        given = torch.tensor(list(times), device=device)
        return _projections(self.time_mlp(given if not given.is_floating_point() else given.float()), blocks)

    def _apply(self, fn: Any, recurse: bool = True) -> Unet:
        super()._apply(fn, recurse)
        self._lay_out_weights()
        return self

    def _lay_out_weights(self) -> None:
        """Lay out the convolutions' weights for their device; shapes and values, and so the state dict, stay."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                for tensor in (module.weight, module.weight.grad):
                    if tensor is not None:
                        tensor.data = tensor.data.contiguous(memory_format=weights_format(tensor.device))

    def _maps_format(self, few: bool) -> torch.memory_format:
        """The memory format of the network's maps.

        On the CPU without native kernels, channels-last makes a forward pass up to 20% faster and no training step:
        only sampling runs (`inference_weights`) use it. oneDNN then converts the weights in every call, which takes
        longer than the product where few pixels meet wide weights.

        Args:
            few: the smallest maps of the batch have few pixels.
        """
        fastest = maps_format(self._weight.device, self._weight.dtype)
        if fastest is torch.channels_last or not self.is_inside() or torch.is_grad_enabled():
            return fastest
        few_for_wide = few and getattr(self.mid_block1, "dim_out", 0) >= _WIDE
        return fastest if few_for_wide else torch.channels_last

    def _timesteps(self, time: torch.Tensor | float) -> torch.Tensor:
        """The timesteps as a tensor, (B,) or (1,)."""
        if isinstance(time, torch.Tensor):
            return time[None] if time.ndim == 0 else time
        if isinstance(time, bool) or not isinstance(time, (int, float)):
            raise TypeError(f"time must be a tensor or a number, got {type(time).__name__}")
        return torch.full((1,), time, device=self._weight.device)

    def _check_inputs(self, x: torch.Tensor, time: torch.Tensor, x_self_cond: torch.Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must have shape (B, {self.channels}, H, W), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, got {x.dtype}")
        factor = self.downsample_factor
        if x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"x must have height and width divisible by {factor} for this Unet, got {tuple(x.shape[2:])}"
            )
        if time.shape not in (x.shape[:1], (1,)):
            raise ValueError(f"time must have shape ({x.shape[0]},), one timestep per image, got {tuple(time.shape)}")
        device = self._weight.device
        for name, tensor in (("x", x), ("time", time), ("x_self_cond", x_self_cond)):
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name} must be on the Unet's device {device}, got {tensor.device}")
        if x_self_cond is not None:
            if not self.self_condition:
                raise ValueError(
                    "x_self_cond must be None, since this Unet has self_condition=False and would not read it"
                )
            if x_self_cond.shape != x.shape:
                raise ValueError(f"x_self_cond must have x's shape {tuple(x.shape)}, got {tuple(x_self_cond.shape)}")


def _stages(modules: nn.ModuleList) -> Iterable[Any]:
    """The stages of one half: lists of two residual blocks, attention, and what changes the resolution."""
    return modules


def _takes_rows(block: nn.Module) -> TypeGuard[ResnetBlock]:
    return isinstance(block, ResnetBlock) and block.takes_rows()


def _projections(t: torch.Tensor, blocks: Sequence[ResnetBlock]) -> torch.Tensor:
    """The blocks' projections of the time embedding side by side, as one product: (B, 4·dim) → (B, Σ 2·dim_out)."""
    return linears_of_one_input(nn.functional.silu(t), [block.projection for block in blocks])


def _residual_block(
    block: nn.Module, x: torch.Tensor, t: torch.Tensor | None, row: ScaleShift | None, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """A residual block with its scale and shift; where it has none, called as upstream calls it."""
    if row is None:
        return block(x if skip is None else torch.cat((x, skip), dim=1), t)
    return block.compute(x, row, skip)  # type: ignore[operator]  # a block with a row is a ResnetBlock


def _attention_block(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention of x plus x: one op where nobody changed the module."""
    if type(attn) in (Attention, LinearAttention) and is_unmodified(attn):
        return attn.compute(x, residual=x)
    return attn(x) + x
