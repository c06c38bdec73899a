"""What fused ops cost besides what their arguments and results show, for the counts of traffic.py.

Registries by operator name; an entry is a function of the op's arguments, a dict by name with defaults filled in:

- `SECOND_READS`: the tensors that it reads once more.
- `LOOKED_UP`: an input of which only as much is read as comes out.
- `SCRATCH_BYTES`: bytes of partial results between its stages, written and read.
- `FLOPS`: floating-point operations by kind, from the arguments and the result; for torch's own operators
  torch.utils.flop_counter knows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.ops.norm_silu import launch as norm_silu_launch

KINDS = ("convolution", "matmul", "attention")

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
    "ddpm_fast::linear_attention_block_backward": lambda arguments: [arguments["x"]] * 3,
    "ddpm_fast::linear_attention_block_backward_of_readers": lambda arguments: [arguments["x"]] * 3,
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
    """Gradients of the weight and of the biases per chunk of pixels, written and read."""
    from ddpm_fast.ops.common.triton_rows import choose_tile
    from ddpm_fast.ops.resnet_block import triton as kernel

    (B, C0, H, W), C1, K = arguments["x"].shape, arguments["skip"].shape[1], arguments["weight"].shape[0]
    tile = choose_tile(K, min(C0, C1), B * H * W, exact=False, names="KCN")
    _, chunks = kernel.chunks_of_pixels(B * H * W, K, C0, C1, tile)
    numbers = chunks * K * (C0 + C1 + 1)
    if arguments["x_bias"] is not None:
        tile = choose_tile(H * W, min(C0, C1), K, exact=False, names="NCK")
        numbers += C0 * math.ceil(B * H * W / tile["BLOCK_N"])
    return 4 * 2 * numbers


def _conv_norm_gradients_scratch(arguments: Arguments) -> int:
    """Σ da', Σ da'·x̂ and Σ dy per tile of pixels, written and read."""
    from ddpm_fast.ops.resnet_block.launch import conv_norm_tile

    (B, K, H, W), C = arguments["y"].shape, arguments["grad"].shape[1]
    return 4 * 2 * 3 * K * B * math.ceil(H * W / conv_norm_tile(H * W, C, K)["BLOCK_N"])


def _product_gradients_scratch(window: int) -> Callable[[Arguments], int]:
    """The bias's gradient per tile of pixels, written and read."""

    def scratch(arguments: Arguments) -> int:
        from ddpm_fast.ops.common.triton_rows import choose_tile

        (B, K, H, W), weight = arguments["grad"].shape, arguments["weight"]
        tile = choose_tile(H * W, window * weight.shape[1], K, False, names="NCK")
        return 4 * 2 * K * math.ceil(B * H * W / tile["BLOCK_N"])

    return scratch


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
    "ddpm_fast::conv_norm_gradients": _conv_norm_gradients_scratch,
    "ddpm_fast::downsample_conv_gradients": _product_gradients_scratch(2),
    "ddpm_fast::linear_residual_gradients": _product_gradients_scratch(1),
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


def _residual_conv_flops(products: int) -> Callable[[Arguments, Any], dict[str, int]]:
    def flops(arguments: Arguments, result: Any) -> dict[str, int]:
        numbers = arguments["x"].numel() + arguments["skip"].numel()
        return {"convolution": 2 * products * numbers * arguments["weight"].shape[0]}

    return flops


def _product_gradients_flops(arguments: Arguments, result: Any) -> dict[str, int]:
    return {"convolution": 2 * arguments["grad"].numel() * arguments["weight"][0].numel()}


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
    "ddpm_fast::norm_silu_conv": _norm_linear_flops(1),
    "ddpm_fast::norm_silu_conv_gradients": _norm_linear_flops(2),
    "ddpm_fast::downsample_conv": lambda a, out: {"convolution": 2 * out.numel() * a["weight"][0].numel()},
    "ddpm_fast::downsample_conv_gradients": _product_gradients_flops,
    "ddpm_fast::linear_residual_gradients": _product_gradients_flops,
    "ddpm_fast::residual_conv": _residual_conv_flops(1),
    "ddpm_fast::residual_conv_gradients": _residual_conv_flops(2),
    "ddpm_fast::conv_norm": lambda a, made: {"convolution": 2 * made[1].numel() * a["weight"][0].numel()},
    "ddpm_fast::conv_norm_gradients": lambda a, _: {"convolution": 2 * a["grad"].numel() * a["weight"][0].numel()},
    "ddpm_fast::stem_conv": _stem_conv_flops,
    "ddpm_fast::stem_conv_backward": _stem_conv_flops,
    "ddpm_fast::stem_conv_backward_of_readers": _stem_conv_flops,
}
