"""What the 2D UNets of this package share: how they run, and what they derive from their weights.

A network is a subclass whose constructor makes the modules, with upstream's names and in upstream's order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from ddpm_fast.models.attention import Attention, LinearAttention
from ddpm_fast.models.conditions import (
    GivenConditions,
    check_conditions,
    class_rows,
    embed_classes,
    embed_vectors,
)
from ddpm_fast.models.convolution import Conv3x3, StemConv, Upsample, one_map
from ddpm_fast.models.derived_weights import Derived, HasDerivedWeight, Times, kept_by_block
from ddpm_fast.models.embeddings import (
    CondMLP,
    RandomOrLearnedSinusoidalPosEmb,
    SinusoidalPosEmb,
    TimeMLP,
    linears_of_one_input,
    side_by_side,
)
from ddpm_fast.models.narrow_weights import Copies, Group, copies_of, copy_weights, dtype_of_copies, groups_of, reading
from ddpm_fast.models.resnet import ResnetBlock, ScaleShift
from ddpm_fast.models.stock import (
    is_convolution,
    is_instance,
    is_unmodified,
    parameter,
    show_nobody,
)
from ddpm_fast.ops.branches import branching
from ddpm_fast.ops.layout import maps_format, weights_format
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.autocast import no_autocast
from ddpm_fast.runtime.dispatch import forced_backend, in_forward_mode
from ddpm_fast.runtime.pretrained import Pretrained, UndrawnWeights

if TYPE_CHECKING:
    from typing_extensions import Self

    from ddpm_fast.models.recorded_calls import RecordedCalls

# Without native kernels, channels-last is slower on the CPU when the smallest maps have fewer than 64 pixels per batch
# and 256 channels or more (Unet(64) at 32×32: 1.4 times the time with 32 pixels, 0.99 with 128; Unet(32, (1, 2, 4))
# with 16 pixels: 0.92).
_FEW_PIXELS, _WIDE = 64, 256

# Names of derived tensors; copies of weights have other keys. Rows of times and of classes, and the columns of the
# projections' weights that read an embedding without a table.
_TIMES, _CLASSES, _COMPUTED = "times", "classes", "computed"
_TABLES = (_TIMES, _CLASSES, _COMPUTED)
_MOST_CLASSES = 4096  # with more, a table of all takes longer to make than the rows of a run's batch


class UnetBase(Pretrained, HasDerivedWeight):
    """A UNet of residual blocks that are scaled and shifted by embeddings of the time and of conditions."""

    config: dict[str, Any]  # the constructor's arguments

    # What a diffusion process may do with this network: write its input in the dtype and layout of convolutions, and
    # give it zeros where there is no estimate of x0 yet, as a recorded step has to.
    begins_with_convolution = True
    takes_zeros_for_no_estimate = True

    # Made by the constructors.
    init_conv: nn.Module
    time_mlp: nn.Module
    classes_mlp: nn.Module
    downs: nn.ModuleList
    mid_block1: ResnetBlock
    mid_attn: nn.Module
    mid_block2: ResnetBlock
    ups: nn.ModuleList
    final_res_block: ResnetBlock
    final_conv: nn.Conv2d
    channels: int
    self_condition = False
    num_classes: int | None = None
    cond_dim: int | None = None
    cond_channels = 0
    cond_drop_prob = 0.0

    def pretrained_config(self) -> dict[str, Any]:
        return dict(self.config)

    @classmethod
    def from_pretrained_config(cls, config: dict[str, Any], **arguments: Any) -> Self:
        if "process" in config:
            raise ValueError(
                f"the folder holds the process {config['process']!r}, not a network alone: load it as its process and "
                "take its model"
            )
        if cls.__module__.split(".")[0] != "ddpm_fast":  # a user's class may draw what no file holds
            return cls(**{**config, **arguments})
        with UndrawnWeights():
            return cls(**{**config, **arguments})

    def _make_time_mlp(self, dim: int, learned: bool, random: bool, fourier_dim: int, theta: float) -> None:
        """`time_mlp`, in upstream's order of random numbers."""
        self.random_or_learned_sinusoidal_cond = learned or random
        if self.random_or_learned_sinusoidal_cond:
            embedding: nn.Module = RandomOrLearnedSinusoidalPosEmb(fourier_dim, random)
            width = fourier_dim + 1
        else:
            embedding, width = SinusoidalPosEmb(dim, theta=theta), dim
        self.time_mlp = TimeMLP(embedding, nn.Linear(width, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))

    def _make_condition_embeddings(self, dim: int) -> int:
        """Modules and null values of classes and vectors; returns the width of their embeddings together."""

        def mlp(width: int) -> CondMLP:
            return CondMLP(nn.Linear(width, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))

        width = 0
        if self.num_classes is not None:
            self.classes_emb = nn.Embedding(self.num_classes, dim)
            self.null_classes_emb = nn.Parameter(torch.randn(dim))
            self.classes_mlp = mlp(dim)
            width += 4 * dim
        if self.cond_dim is not None:
            self.null_cond = nn.Parameter(torch.randn(self.cond_dim))
            self.cond_mlp = mlp(self.cond_dim)
            width += 4 * dim
        return width

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

    def _call(self, maps: Sequence[torch.Tensor], time: torch.Tensor, given: GivenConditions) -> torch.Tensor:
        """The network of inputs that fit; its first convolution reads the maps side by side."""
        if torch.compiler.is_compiling():
            return self._run(maps, time, given)
        recorded = None if torch.is_grad_enabled() else self._recorded_calls()
        if recorded is None:
            return self._run_with_copies(maps, time, given)

        def run(tensors: Sequence[Any]) -> torch.Tensor:
            number = len(maps)
            return self._run_with_copies(tensors[:number], tensors[number], GivenConditions(*tensors[number + 1 :]))

        return recorded.call(run, (*maps, time, *given))

    def _recorded_calls(self) -> RecordedCalls | None:
        """See `recorded_calls.calls_of`."""
        if kept_by_block() is None:
            return None
        from ddpm_fast.models.recorded_calls import calls_of  # not before it is needed

        return calls_of(self)

    def why_not_replayed(self) -> str | None:
        """For `explain`; see `recorded_calls.why_not_replayed`."""
        from ddpm_fast.models.recorded_calls import why_not_replayed

        return why_not_replayed(self)

    def _run_with_copies(
        self, maps: Sequence[torch.Tensor], time: torch.Tensor, given: GivenConditions
    ) -> torch.Tensor:
        with reading(self._copies(maps[0].device)), self._branching(maps[0].device):
            return self._run(maps, time, given)

    def _branching(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Inside, maps with several readers have branches: where kernels add gradients and nobody else sees them."""
        if not torch.is_grad_enabled() or triton_launch.why_not_triton(device) is not None or in_forward_mode():
            return contextlib.nullcontext()
        if forced_backend() == "reference" or not show_nobody(self.children()):
            return contextlib.nullcontext()
        return branching()

    def _run(self, maps: Sequence[torch.Tensor], time: torch.Tensor, given: GivenConditions) -> torch.Tensor:
        # Every convolution and op keeps this layout.
        B, _, H, W = maps[0].shape
        layout = self._maps_format(few=B * H * W // self.downsample_factor**2 < _FEW_PIXELS)
        if isinstance(self.init_conv, StemConv):
            x = self.init_conv.compute(maps, layout)
        else:
            x = self.init_conv(one_map(maps, layout)).contiguous(memory_format=layout)
        residual = x
        t, scales_and_shifts = self._rows(time, given)
        rows = iter(scales_and_shifts)

        skips = []
        for block1, block2, attn, downsample in _stages(self.downs):
            x = _residual_block(block1, x, t, next(rows))
            skips.append(x)
            x = _residual_block(block2, x, t, next(rows))
            x = self._attend(attn, x)
            skips.append(x)
            x = downsample(x)

        x = _residual_block(self.mid_block1, x, t, next(rows))
        x = self._attend(self.mid_attn, x)
        x = _residual_block(self.mid_block2, x, t, next(rows))

        bias = None  # of the convolution that made x, where the next block adds it
        row = next(rows)
        for stage, (block1, block2, attn, upsample) in enumerate(_stages(self.ups), 1):
            x = _residual_block(block1, x, t, row, skips.pop(), bias)
            x = _residual_block(block2, x, t, next(rows), skips.pop())
            x, row = self._attend(attn, x), next(rows)
            following = self.final_res_block if stage == len(self.ups) else self.ups[stage][0]  # type: ignore[index]
            x, bias = _before_block(upsample, x, following, row)

        if row is not None and is_convolution(self.final_conv, 1):
            return self.final_res_block.compute(x, row, residual, self.final_conv, bias)
        return self.final_conv(_residual_block(self.final_res_block, x, t, row, residual, bias))

    def _copies(self, device: torch.device) -> Copies | None:
        """Copies of the weights in autocast's dtype, see `narrow_weights`: of `inference_weights`, or made now."""
        built = self.built() or {}
        dtype = next((tensor.dtype for name, tensor in built.items() if name not in _TABLES), None)
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

    def _attend(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        """Attention of x plus x: one op where nobody changed the module."""
        if is_unmodified(attn) and (is_instance(attn, LinearAttention) or is_instance(attn, Attention)):
            return attn.compute(x, residual=x)
        return attn(x) + x

    def _rows(
        self, time: torch.Tensor, given: GivenConditions
    ) -> tuple[tuple[torch.Tensor, ...], list[ScaleShift | None]]:
        """The embeddings, (B or 1, 4·dim) each, and for each of `_blocks` two of (B or 1, dim_out): scale and shift.

        A block that has to be called as upstream calls it, with the embeddings, has None. There are no embeddings
        where rows are found in the tables of `inference_weights`.
        """
        blocks = self._blocks()
        takes = [_takes_rows(block) for block in blocks]
        takers: list[Any] = [block for block, taken in zip(blocks, takes, strict=True) if taken]
        tables = {} if time.is_floating_point() or len(takers) < len(blocks) else self.built() or {}
        embeddings: tuple[torch.Tensor, ...] = ()
        if _TIMES in tables and self._embeds_as_built():
            rows = self._rows_of_tables(tables, time, given)
        else:
            embeddings = self._embeddings(time, given)
            if not takers:
                return embeddings, [None] * len(blocks)
            rows = _projections(embeddings, takers)
        widths = [block.dim_out for block in takers for _ in range(2)]
        parts = iter(rows.split(widths, dim=1))
        return embeddings, [(next(parts), next(parts)) if taken else None for taken in takes]

    def _rows_of_tables(self, tables: Any, time: torch.Tensor, given: GivenConditions) -> torch.Tensor:
        """The projections, which are a sum over embeddings: looked up, or computed for those without a table."""
        rows = tables[_TIMES][time]
        if _CLASSES in tables:
            assert self.num_classes is not None
            rows = rows + tables[_CLASSES][class_rows(given, self.num_classes)]
        weight = tables.get(_COMPUTED)
        if weight is None:
            return rows
        computed = side_by_side(self._condition_embeddings(given, but_classes=_CLASSES in tables))
        with no_autocast(rows.device.type):
            return rows + nn.functional.linear(nn.functional.silu(computed).to(weight.dtype), weight)

    def _embeddings(self, time: torch.Tensor, given: GivenConditions) -> tuple[torch.Tensor, ...]:
        """Of the time and of each condition, (B or 1, 4·dim), in the order of the projections' columns."""
        return (self.time_mlp(time), *self._condition_embeddings(given))

    def _condition_embeddings(self, given: GivenConditions, but_classes: bool = False) -> tuple[torch.Tensor, ...]:
        embeddings: list[torch.Tensor] = []
        if self.num_classes is not None and not but_classes:
            embeddings.append(self._class_embedding(given))
        if self.cond_dim is not None:
            embeddings.append(self.cond_mlp(embed_vectors(self.null_cond, given)))
        return tuple(embeddings)

    def _class_embedding(self, given: GivenConditions) -> torch.Tensor:
        assert self.num_classes is not None
        return self.classes_mlp(embed_classes(self.classes_emb, self.null_classes_emb, given, self.num_classes))

    def _embeds_as_built(self) -> bool:
        mlps = [self.time_mlp] if self.num_classes is None else [self.time_mlp, self.classes_mlp]
        if not all(isinstance(mlp, CondMLP) and mlp.is_stock() for mlp in mlps):
            return False
        return self.num_classes is None or (is_unmodified(self.classes_emb) and self.classes_emb.max_norm is None)

    @property
    def has_table_of_times(self) -> bool:
        """True inside `inference_weights` with times: an integer time is the row of its table."""
        return _TIMES in (self.built() or {})

    def key(self, times: Times) -> Hashable:
        """The table has a row for each of the times."""
        return times

    def _make(self, times: Times) -> Derived | None:
        """Tables of the projections, and copies of the weights in autocast's dtype."""
        derived = self._make_tables(times)
        device = self._weight.device
        dtype = dtype_of_copies(device)
        if dtype is not None:
            groups = [group for part in groups_of(self, device) for group in part]
            derived |= copies_of(groups, dtype)
        return derived or None

    def _make_tables(self, times: Times) -> dict[Hashable, torch.Tensor]:
        """Projections of the time embedding for given times, (N, Σ 2·dim_out), of which a step looks up its row.

        With conditions, rows are sums, so that there is a second table of all classes, and a product for the others.
        """
        blocks = [block for block in self._blocks() if _takes_rows(block)]
        if times is None or not self._embeds_as_built() or len(blocks) < len(self._blocks()):
            return {}
        device = next(self.time_mlp.parameters()).device
        given = torch.tensor(list(times), device=device)
        t = self.time_mlp(given if not given.is_floating_point() else given.float())
        if self.num_classes is None and self.cond_dim is None:
            return {_TIMES: _projections((t,), blocks)}
        width = t.shape[1]
        weight = torch.cat([block.projection.weight for block in blocks])  # (Σ 2·dim_out, 4·dim for each embedding)
        bias = torch.cat([block.projection.bias for block in blocks])
        tables: dict[Hashable, torch.Tensor] = {}
        tables[_TIMES] = nn.functional.linear(nn.functional.silu(t), weight[:, :width], bias)
        if self.num_classes is not None and self.num_classes <= _MOST_CLASSES:
            c = self._class_embedding(GivenConditions(torch.arange(self.num_classes + 2, device=device)))
            tables[_CLASSES] = nn.functional.linear(nn.functional.silu(c), weight[:, width : 2 * width])
            width *= 2
        if width < weight.shape[1]:
            tables[_COMPUTED] = weight[:, width:].to(tables[_TIMES].dtype)
        return tables

    def _apply(self, fn: Any, recurse: bool = True) -> UnetBase:
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

    def _check_inputs(self, x: torch.Tensor, time: torch.Tensor, given: GivenConditions) -> None:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
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
        for name, tensor in (("x", x), ("time", time)):
            if tensor.device != device:
                raise ValueError(f"{name} must be on the Unet's device {device}, got {tensor.device}")
        check_conditions(self, x, given)


def _stages(modules: nn.ModuleList) -> Iterable[Any]:
    """The stages of one half: lists of two residual blocks, attention, and what changes the resolution."""
    return modules


def _takes_rows(block: nn.Module) -> TypeGuard[ResnetBlock]:
    return isinstance(block, ResnetBlock) and block.takes_rows()


def _projections(embeddings: Sequence[torch.Tensor], blocks: Sequence[ResnetBlock]) -> torch.Tensor:
    """The blocks' projections of the embeddings side by side, as one product: (B, 4·dim) each → (B, Σ 2·dim_out)."""
    t = side_by_side(embeddings)
    return linears_of_one_input(nn.functional.silu(t), [block.projection for block in blocks])


def _residual_block(
    block: nn.Module,
    x: torch.Tensor,
    t: Sequence[torch.Tensor],
    row: ScaleShift | None,
    skip: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A residual block with its scale and shift; where it has none, called as upstream calls it."""
    if row is None:
        return block(x if skip is None else torch.cat((x, skip), dim=1), *t)
    return block.compute(x, row, skip, x_bias=x_bias)  # type: ignore[operator]  # a block with a row is a ResnetBlock


def _before_block(
    upsample: Any, x: torch.Tensor, block: Any, row: ScaleShift | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output of a stage's last module, and its bias where the block that follows, with a skip connection, adds it.

    On CUDA, where torch adds the bias of cuDNN's convolutions in a pass of its own.
    """
    runs_triton = triton_launch.why_not_triton(x.device) is None and x.is_contiguous(memory_format=torch.channels_last)
    adds = runs_triton and row is not None and is_unmodified(upsample)
    if adds and isinstance(upsample, (Conv3x3, Upsample)) and block.adds_bias():
        found = upsample.before_bias(x)
        if found is not None:
            return found
    return upsample(x), None
