"""Counts the work of a training step and a sampling step from operator dispatch, without computing or timing.

Per image: operators that touch memory (views are free and not counted), bytes that they read and write (each input read
once, each output written once), bytes kept from forward for backward (each storage once, without parameters,
buffers and the network's input), and floating-point operations of convolutions, matrix products and attention (a
multiply-add is two). All of it runs on the meta device, so the numbers are the same on every machine. Under
`kernels_take_meta_tensors` ours is counted with the kernels that a CUDA device runs, and a fused op is one operator.

Registries by operator name hold the costs of a fused op that its arguments and results do not show; an entry is a
function of the op's arguments, a dict by name with defaults filled in:

- `SECOND_READS`: the tensors that it reads once more.
- `LOOKED_UP`: an input of which only as much is read as comes out.
- `SCRATCH_BYTES`: bytes of partial results between its stages, written and read.
- `FLOPS`: floating-point operations by kind, from the arguments and the result; for torch's own operators
  torch.utils.flop_counter knows them.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.models.derived_weights import inference_weights
from ddpm_fast.ops.norm_silu import launch as norm_silu_launch

H100_BYTES_PER_SECOND = 3.0e12  # copy bandwidth as measured
KINDS = ("convolution", "matmul", "attention")

# Ops that alias their input although the schema of their result does not say so.
_FREE = {torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default}
_ALLOCATE = ("aten::empty", "aten::new_empty")  # no memory is touched
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

Arguments = dict[str, Any]


def _reads_twice(arguments: Arguments) -> bool:
    """GroupNorm's statistics, and its backward's sums, are a pass of their own where no program holds a whole group."""
    groups, (_, C, H, W) = arguments["groups"], arguments["x"].shape
    return groups > 0 and norm_silu_launch.choose_groups(H * W, C, groups) is None


def _image_and_gradient(arguments: Arguments) -> list[torch.Tensor]:
    return [arguments["grad"], arguments["x"]] if _reads_twice(arguments) else []


SECOND_READS: dict[str, Callable[[Arguments], list[torch.Tensor]]] = {
    "ddpm_fast::norm_silu": lambda arguments: [arguments["x"]] if _reads_twice(arguments) else [],
    "ddpm_fast::norm_silu_backward": _image_and_gradient,
    "ddpm_fast::norm_silu_backward_beside": _image_and_gradient,
    # torch's kernels make them in passes of their own as well: ATen/native/cuda/group_norm_kernel.cu.
    "aten::native_group_norm": lambda arguments: [arguments["input"]],
    "aten::native_group_norm_backward": lambda arguments: [arguments["grad_out"], arguments["input"]],
    "ddpm_fast::norm_silu_backward_of_last": _image_and_gradient,
    "ddpm_fast::norm_silu_backward_of_both": _image_and_gradient,
    # One launch owns queries, the other keys, and both read grad and qkv; tiles read again by neighbours come from L2.
    "ddpm_fast::attention_backward": lambda arguments: [arguments["grad"], arguments["qkv"]],
    # Where a tile does not hold all columns of the output, the sums of the gradient are a pass of their own over q.
    "ddpm_fast::linear_attention_backward": lambda arguments: _linear_attention_second_reads(arguments),
    # Sums of k are a pass of their own.
    "ddpm_fast::linear_attention_block": lambda arguments: [arguments["x"]],
    # One pass for q and one for k, which reads what the first one wrote of dx; x stands for dx, written and read.
    "ddpm_fast::linear_attention_block_backward": lambda arguments: (
        [arguments["x"]] * 3 + [arguments["grad"]] * arguments["adds_x"]
    ),
    "ddpm_fast::linear_attention_block_backward_of_readers": lambda arguments: [
        *[arguments["x"]] * 3,
        arguments["grad"],
    ],
    # One launch owns pixels, the other outputs and channels; tiles read again by neighbours come from L2.
    "ddpm_fast::norm_linear_backward": lambda arguments: [arguments["grad"], arguments["x"]],
    "ddpm_fast::norm_linear_beside_backward": lambda arguments: [arguments["grad"], arguments["x"]],
    # One launch makes the maps' gradients, the other the weight's.
    "ddpm_fast::residual_conv_gradients": lambda arguments: [arguments["grad"]],
}

# Inputs of which an operator reads as much as it writes, by name.
LOOKED_UP = {"aten::index": "self"}


def _linear_attention_launch(arguments: Arguments):
    """Sizes (B, heads, N, D, C) of a linear attention, and how its kernels cut them up."""
    from ddpm_fast.ops.linear_attention.launch import choose_launch

    qkv, heads, C = arguments["qkv"], arguments["heads"], arguments["weight"].shape[0]
    B, channels, H, W = qkv.shape
    D = channels // (3 * heads)
    launch = choose_launch(H * W, heads, D, C, half=qkv.dtype != torch.float32)
    return (B, heads, H * W, D, C), launch


def _linear_attention_second_reads(arguments: Arguments) -> list[torch.Tensor]:
    _, launch = _linear_attention_launch(arguments)
    if launch.backward_columns == launch.block_c:
        return []
    return [arguments["grad"], arguments["qkv"].chunk(3, 1)[0]]


def _linear_attention_scratch(arguments: Arguments) -> int:
    """Maximum, sum and context of every chunk, written and read."""
    (B, heads, N, D, _), launch = _linear_attention_launch(arguments)
    return 4 * 2 * B * heads * launch.context.programs(N) * D * (D + 2)


def _linear_attention_backward_scratch(arguments: Arguments) -> int:
    """Gradients of P, bias and gain per chunk, two numbers per row where they are a pass of their own, those of the
    weight per image: all written and read."""
    (B, heads, N, D, C), launch = _linear_attention_launch(arguments)
    fused = launch.backward_columns == launch.block_c
    chunks = (launch.backward if fused else launch.sums).programs(N)
    blocks = math.ceil(D / launch.small_rows)
    numbers = B * chunks * (heads * D + 1) * C + (0 if fused else 2 * B * N) + B * blocks * C * heads * D
    return 4 * 2 * numbers


def _block_sizes(arguments: Arguments) -> tuple[int, int, int, int, int]:
    """B, positions, chunks, hidden and C of a block of linear attention."""
    from ddpm_fast.ops.linear_attention_block.launch import choose_launch

    (B, C, H, W), (_, heads, D, _) = arguments["x"].shape, arguments["mem_kv"].shape
    return B, H * W, choose_launch(H * W, heads, D, C).chunks(H * W), heads * D, C


def _linear_attention_block_scratch(arguments: Arguments) -> int:
    """Sums, maximum and sum of every chunk, written and read."""
    B, _, chunks, hidden, C = _block_sizes(arguments)
    return 4 * 2 * B * chunks * hidden * (C + 2)


def _linear_attention_block_backward_scratch(arguments: Arguments) -> int:
    """Three matrices (hidden, C) and a row per chunk, of which one matrix is read twice and of that one head once more
    at the end; four matrices per image. All are written and read."""
    B, _, chunks, hidden, C = _block_sizes(arguments)
    first = arguments["mem_kv"].shape[2]  # rows of the first head, which alone are summed for the bias
    return 4 * B * (chunks * (6 * hidden + 2 + first) * C + 2 * 4 * hidden * C)


def _attention_backward_scratch(arguments: Arguments) -> int:
    """Gradients of the memory per tile of queries, written and read; one number per row and head, written and read."""
    from ddpm_fast.ops.attention import triton as kernel

    qkv, heads = arguments["qkv"], arguments["heads"]
    B, channels, H, W = qkv.shape
    tile = kernel.choose_tile("dq", "half" if qkv.dtype != torch.float32 else "ieee", H * W, channels // (3 * heads))
    tiles = math.ceil(H * W / tile.queries)
    return 4 * 2 * B * (tiles * arguments["mem_kv"].numel() + heads * H * W)


def _norm_silu_chunks(arguments: Arguments, dropout: bool) -> int:
    """Chunks of pixels, over the batch, into which ops/norm_silu/launch.py cuts its sums, times channels."""
    B, chunks, _, C = norm_silu_launch.sums_shape(arguments["x"], None, arguments["groups"], dropout=dropout)
    return B * chunks * C


def _norm_silu_scratch(arguments: Arguments) -> int:
    """GroupNorm's mean and Σ (v − mean)² per chunk: the merge reads the means twice, all the rest moves once."""
    if not _reads_twice(arguments):
        return 0
    B, C, H, W = arguments["x"].shape
    tile = norm_silu_launch.choose_tile(H * W, C, whole_rows=False, sums=True, dropout=False)
    return 4 * (2 + 3) * B * math.ceil(H * W / tile.chunk) * C


def _norm_silu_backward_scratch(arguments: Arguments) -> int:
    """Σ dy, Σ dy·x̂ and, where there is a bias, Σ dx per chunk, written and read; GroupNorm's means read two again."""
    sums = 2 if arguments.get("bias") is None else 3
    moved = 2 * sums + (2 if _reads_twice(arguments) else 0)
    return 4 * moved * _norm_silu_chunks(arguments, dropout=arguments.get("seed") is not None)


def _norm_silu_backward_of_last_scratch(arguments: Arguments) -> int:
    """GroupNorm's means read two of the returned sums."""
    return 4 * 2 * _norm_silu_chunks(arguments, dropout=False) if _reads_twice(arguments) else 0


def _diffusion_loss_scratch(arguments: Arguments) -> int:
    """The sum of squares per tile, written and read."""
    from ddpm_fast.ops.common import triton as kernel

    output = arguments["model_output"]
    B, C, H, W = output.shape
    _, shape = kernel.tile_constants(C, H * W, kernel.is_channels_last(output))
    return 4 * 2 * B * math.ceil(C * H * W / shape["STEP"])


def _variational_bound_scratch(arguments: Arguments) -> int:
    """Two sums per tile of x_start, written and read."""
    from ddpm_fast.ops.common import triton as kernel

    B, C, H, W = arguments["x_start"].shape
    _, shape = kernel.tile_constants(C, H * W, kernel.is_channels_last(arguments["model_output"]))
    return 4 * 2 * 2 * B * math.ceil(C * H * W / shape["STEP"])


def _norm_linear_backward_scratch(arguments: Arguments) -> int:
    """The weight's gradient per chunk of pixels, written and read."""
    from ddpm_fast.ops.norm_linear import triton as kernel

    B, C, H, W = arguments["x"].shape
    M = arguments["weight"].shape[0]
    tile = kernel.backward_weight_tile(B * H * W, C, M, exact=False)
    chunks = math.ceil(B * H * W / (tile.block_n * kernel.tiles_per_chunk(B * H * W, C, M, tile)))
    return 4 * M * C * 2 * chunks


def _stem_conv_backward_scratch(arguments: Arguments) -> int:
    """Gradients of the weight and of the bias per chunk of pixels, written and read."""
    from ddpm_fast.ops.stem_conv import triton_conv as kernel

    (B, _, H, W), (K, C, side, _) = arguments["x"].shape, arguments["weight"].shape
    tile, width = kernel.weight_tile(H, W, K, side**2 * C, exact=False)
    others = math.ceil(K / tile["BLOCK_K"]) * math.ceil((side**2 * C + 1) / width)
    _, chunks = kernel.chunks_of_tiles(kernel.tiles_of_pixels(B, H, W, tile["ROWS"], tile["COLUMNS"]), others)
    return 4 * 2 * chunks * K * (side**2 * C + 1)


def _residual_conv_gradients_scratch(arguments: Arguments) -> int:
    """Gradients of the weight and of the bias per chunk of pixels, written and read."""
    from ddpm_fast.ops.resnet_block import triton as kernel

    (B, C0, H, W), C1, K = arguments["x"].shape, arguments["skip"].shape[1], arguments["weight"].shape[0]
    tile = kernel.choose_tile(K, min(C0, C1), B * H * W, exact=False, names="KCN")
    _, chunks = kernel.chunks_of_pixels(B * H * W, K, C0, C1, tile)
    return 4 * 2 * chunks * K * (C0 + C1 + 1)


SCRATCH_BYTES: dict[str, Callable[[Arguments], int]] = {
    "ddpm_fast::norm_silu": _norm_silu_scratch,
    "ddpm_fast::norm_silu_backward": _norm_silu_backward_scratch,
    "ddpm_fast::norm_silu_backward_beside": _norm_silu_backward_scratch,
    "ddpm_fast::norm_silu_backward_of_last": _norm_silu_backward_of_last_scratch,
    "ddpm_fast::norm_silu_backward_of_both": _norm_silu_backward_scratch,
    "ddpm_fast::diffusion_loss": _diffusion_loss_scratch,
    "ddpm_fast::variational_bound": _variational_bound_scratch,
    "ddpm_fast::norm_linear_backward": _norm_linear_backward_scratch,
    "ddpm_fast::norm_linear_beside_backward": _norm_linear_backward_scratch,
    "ddpm_fast::residual_conv_gradients": _residual_conv_gradients_scratch,
    "ddpm_fast::stem_conv_backward": _stem_conv_backward_scratch,
    "ddpm_fast::stem_conv_backward_of_readers": _stem_conv_backward_scratch,
    "ddpm_fast::linear_attention": _linear_attention_scratch,
    "ddpm_fast::linear_attention_backward": _linear_attention_backward_scratch,
    "ddpm_fast::linear_attention_block": _linear_attention_block_scratch,
    "ddpm_fast::linear_attention_block_backward": _linear_attention_block_backward_scratch,
    "ddpm_fast::linear_attention_block_backward_of_readers": _linear_attention_block_backward_scratch,
    "ddpm_fast::attention_backward": _attention_backward_scratch,
}


# From the arguments and the result to operations by kind (see `KINDS`).
def _norm_linear_flops(products: int) -> Callable[[Arguments, Any], dict[str, int]]:
    return lambda a, _: {"convolution": 2 * products * a["x"].numel() * a["weight"].shape[0]}


def _attention_flops(products: int) -> Callable[[Arguments, Any], dict[str, int]]:
    """So many products of queries with keys and memory; the two kernels of backward make three and four."""

    def flops(arguments: Arguments, result: Any) -> dict[str, int]:
        B, channels, H, W = arguments["qkv"].shape
        memory = arguments["mem_kv"].shape[2]
        return {"attention": products * 2 * B * (channels // 3) * H * W * (H * W + memory)}

    return flops


def _linear_attention_flops(contexts: int, rows: int) -> Callable[[Arguments, Any], dict[str, int]]:
    """So many products of the size of keys with values, and of queries with P."""

    def flops(arguments: Arguments, result: Any) -> dict[str, int]:
        (B, heads, N, D, C), _ = _linear_attention_launch(arguments)
        return {"attention": 2 * B * heads * N * D * (contexts * D + rows * C)}

    return flops


def _linear_attention_block_flops(convolutions: int, products: int) -> Callable[[Arguments, Any], dict[str, int]]:
    """So many products with parts of weight_qkv, and so many others, all of positions, hidden and C."""

    def flops(arguments: Arguments, result: Any) -> dict[str, int]:
        B, N, _, hidden, C = _block_sizes(arguments)
        one = 2 * B * N * hidden * C
        return {"convolution": convolutions * one, "attention": products * one}

    return flops


def _stem_conv_flops(arguments: Arguments, result: Any) -> dict[str, int]:
    (B, _, H, W), weight = arguments["x"].shape, arguments["weight"]
    return {"convolution": 2 * B * H * W * weight.numel()}


def _residual_conv_gradients_flops(arguments: Arguments, result: Any) -> dict[str, int]:
    numbers = arguments["x"].numel() + arguments["skip"].numel()
    return {"convolution": 4 * numbers * arguments["weight"].shape[0]}


FLOPS: dict[str, Callable[[Arguments, Any], dict[str, int]]] = {
    "ddpm_fast::attention": _attention_flops(2),
    "ddpm_fast::attention_backward": _attention_flops(7),
    "ddpm_fast::linear_attention": _linear_attention_flops(1, 1),
    "ddpm_fast::linear_attention_backward": _linear_attention_flops(2, 3),
    "ddpm_fast::linear_attention_block": _linear_attention_block_flops(2, 2),
    "ddpm_fast::linear_attention_block_backward": _linear_attention_block_flops(6, 5),
    "ddpm_fast::linear_attention_block_backward_of_readers": _linear_attention_block_flops(6, 5),
    "ddpm_fast::norm_linear": _norm_linear_flops(1),
    "ddpm_fast::norm_linear_backward": _norm_linear_flops(2),
    "ddpm_fast::norm_linear_beside_backward": _norm_linear_flops(2),
    "ddpm_fast::linear_residual": _norm_linear_flops(1),
    "ddpm_fast::residual_conv": _norm_linear_flops(1),
    "ddpm_fast::residual_conv_gradients": _residual_conv_gradients_flops,
    "ddpm_fast::stem_conv": _stem_conv_flops,
    "ddpm_fast::stem_conv_backward": _stem_conv_flops,
    "ddpm_fast::stem_conv_backward_of_readers": _stem_conv_flops,
}


def _no_flops() -> dict[str, int]:
    return dict.fromkeys(KINDS, 0)


@dataclass
class Operator:
    """All calls of one operator."""

    calls: int = 0
    bytes_moved: int = 0
    flops: int = 0


@dataclass
class Traffic:
    """Per image: operators, bytes moved, bytes kept for backward, operations by kind; and all of these by operator."""

    operators: int = 0
    bytes_moved: int = 0
    bytes_kept: int = 0
    flops: dict[str, int] = field(default_factory=_no_flops)
    by_operator: dict[str, Operator] = field(default_factory=dict)

    @property
    def floor_seconds(self) -> float:
        """The time of the bytes alone at an H100's copy bandwidth."""
        return self.bytes_moved / H100_BYTES_PER_SECOND

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    def dominating(self, count: int | None = None) -> list[tuple[str, Operator]]:
        """Operators by name, those that move most first."""
        return sorted(self.by_operator.items(), key=lambda item: -item[1].bytes_moved)[:count]


@dataclass(frozen=True)
class Call:
    """One call of an operator that is not a view.

    Args:
        name: of the operator, such as "aten::add".
        arguments: by name, with defaults.
        bytes_moved: see the module.
        flops: by kind; empty for operators that are none of `KINDS`.
    """

    name: str
    arguments: Arguments
    result: Any
    bytes_moved: int
    flops: dict[str, int]


class Observer(TorchDispatchMode):
    """Calls `see`, which a subclass defines, for every operator that is not a view."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _only_calls_others(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        result = self.run(func, args, kwargs)
        if not _is_view(func):
            arguments = _bind(func, args, kwargs)
            flops = _flops(func, args, kwargs, arguments, result)
            self.see(Call(func._schema.name, arguments, result, _bytes_moved(func, args, kwargs, result), flops))
        return result

    def run(self, func, args: tuple, kwargs: dict) -> Any:
        """The result of an operator."""
        return func(*args, **kwargs)

    def see(self, call: Call) -> None:
        """Called after every operator that is not a view."""
        raise NotImplementedError


class Counter(Observer):
    """Adds every operator to a `Traffic`."""

    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def see(self, call: Call) -> None:
        self.traffic.operators += 1
        self.traffic.bytes_moved += call.bytes_moved
        operator = self.traffic.by_operator.setdefault(call.name, Operator())
        operator.calls += 1
        operator.bytes_moved += call.bytes_moved
        for kind, number in call.flops.items():
            self.traffic.flops[kind] += number
            operator.flops += number


def _bytes_moved(func, args: tuple, kwargs: dict, result) -> int:
    name, arguments = func._schema.name, _bind(func, args, kwargs)
    tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
    if name in SECOND_READS:
        tensors += SECOND_READS[name](arguments)
    moved = sum(t.numel() * t.element_size() for t in tensors)
    if name in LOOKED_UP:
        table = arguments[LOOKED_UP[name]]
        moved += (result.numel() - table.numel()) * table.element_size()
    if name in SCRATCH_BYTES:
        moved += SCRATCH_BYTES[name](arguments)
    return moved


def _only_calls_others(func) -> bool:
    """Such an operator arrives whole in inference mode; outside it, autograd has it call the others first."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), _COMPOSITE) and not has_kernel(func.name(), torch._C.DispatchKey.CPU)


def _is_view(func) -> bool:
    returns = [r.alias_info for r in func._schema.returns]
    return (
        func in _FREE
        or func._schema.name.startswith(_ALLOCATE)
        or any(alias is not None and not alias.is_write for alias in returns)
    )


def _bind(func, args: tuple, kwargs: dict) -> Arguments:
    """The arguments of a call by name."""
    schema = func._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    return defaults | {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs


def _flops(func, args: tuple, kwargs: dict, arguments: Arguments, result) -> dict[str, int]:
    """Operations by kind; empty for operators that are none of `KINDS`."""
    name = func._schema.name
    if name in FLOPS:
        return FLOPS[name](arguments, result)
    packet = func._overloadpacket
    if packet not in flop_registry:
        return {}
    kind = "convolution" if "conv" in name else "attention" if "attention" in name else "matmul"
    return {kind: flop_registry[packet](*args, **kwargs, out_val=result)}


@contextlib.contextmanager
def _count_kept(traffic: Traffic, excluded: set[int]):
    """Bytes of the distinct storages that autograd saves."""
    seen = set(excluded)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            traffic.bytes_kept += storage.nbytes()
        return tensor

    def checkpoint_and_count(function, *args, **kwargs):
        """torch's checkpoint keeps its arguments where no hook sees them."""
        for argument in args:
            if isinstance(argument, torch.Tensor):
                pack(argument)
        return checkpoint(function, *args, **kwargs)

    with (
        mock.patch("ddpm_fast.ops.linear_attention_block.composite.checkpoint", checkpoint_and_count),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        yield


@contextlib.contextmanager
def kernels_take_meta_tensors() -> Iterator[None]:
    """Let the implementations for CUDA accept meta tensors, whose shapes are all that is counted.

    Triton must be installed: how its kernels cut up their work is asked of them.
    """
    with (
        mock.patch("ddpm_fast.runtime.triton_launch.why_not_triton", lambda device: None),
        mock.patch("ddpm_fast.runtime.extension.why_not", lambda device: None),
    ):
        yield


def measure_training(diffusion: Any, batch: int = 1) -> Traffic:
    """One training step on a batch, of one image unless told otherwise: loss and backward, the noise drawn inside."""
    diffusion = copy.deepcopy(diffusion).to("meta")
    image = torch.rand(batch, diffusion.channels, *diffusion.image_size, device="meta")
    t = torch.zeros(batch, dtype=torch.int64, device="meta")
    constants = [*diffusion.parameters(), *diffusion.buffers(), image]
    traffic = Traffic()
    with Counter(traffic):
        with _count_kept(traffic, {c.untyped_storage()._cdata for c in constants}):
            loss = diffusion(image, times=t)
        loss.backward()
    return traffic


def measure_sampling(diffusion: Any, batch: int = 1) -> Traffic:
    """One step of sampling a batch, of one image unless told otherwise: the network and the update of the state.

    The network has its inference weights, and this package's process its table, as in a run of many steps.
    """
    diffusion = copy.deepcopy(diffusion).to("meta")
    if isinstance(diffusion, GaussianDiffusion):
        diffusion._plan("ddpm", diffusion.num_timesteps, "own")
    x = torch.zeros(batch, diffusion.channels, *diffusion.image_size, device="meta")
    traffic = Traffic()
    with inference_weights(diffusion.model, diffusion.num_timesteps), Counter(traffic), torch.inference_mode():
        diffusion.p_sample(x, 1)
    return traffic


def measure(package: ModuleType, image_size: int | tuple[int, int], **unet) -> dict[str, Traffic]:
    """Both of a package that has Unet and GaussianDiffusion, upstream or this one; `unet` goes to its Unet."""
    diffusion = package.GaussianDiffusion(package.Unet(**unet), image_size=image_size)
    return {"training step": measure_training(diffusion), "sampling step": measure_sampling(diffusion)}
