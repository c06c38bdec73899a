"""Forward diffusion and its loss in Triton: images are read once, noise and target exist in registers only.

A program works on a tile of one sample, in the memory order of what it writes (q_sample) or of the model's output
(loss), so that the wide accesses are contiguous; ops/common/triton.py has the tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import (
    is_channels_last,
    read,
    read_image,
    read_noise,
    table_entry,
    tile_constants,
    tile_position,
)
from ddpm_fast.runtime import triton_launch


@triton.jit
def q_sample_fwd_kernel(
    out_ptr,  # (B, C, H, W)
    x_ptr,  # (B, C, H, W)
    noise_ptr,  # (B, C, H, W) or None
    seed_ptr,  # (1,) int64 or None
    flip_ptr,  # (B,) or None
    t_ptr,  # (B,) int64
    table_ptr,  # (T, 2) float32: a, b
    T,
    HW,
    W,
    tiles,
    offset_strength,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    NOISE_CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """x_t = a·x0 + b·ε (Ho et al. 2020, eq. 4); grid (B·tiles,)."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    m, c, p, mask = tile_position(i_tile, HW, C, CHANNELS_LAST, BLOCK, STEP)
    x = read_image(x_ptr, flip_ptr, i_b, m, c, p, mask, HW, W, C, CHANNELS_LAST, X_CHANNELS_LAST, NORMALIZE)
    eps = read_noise(
        noise_ptr, seed_ptr, i_b, i_tile, m, c, p, mask, HW, offset_strength,
        C, C_PAD, CHANNELS_LAST, NOISE_CHANNELS_LAST, OFFSET, BLOCK, STEP,
    )  # fmt: skip
    t = tl.load(t_ptr + i_b)
    x_t = table_entry(table_ptr, t, T, 0, 2) * x + table_entry(table_ptr, t, T, 1, 2) * eps
    tl.store(out_ptr + i_b * (C * HW) + m, x_t.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def diffusion_loss_fwd_kernel(
    error_ptr,  # shape, dtype and format of the model's output, or None: not wanted
    partial_ptr,  # (B, tiles) float32
    output_ptr,  # (B, C, H, W)
    x_ptr,  # (B, C, H, W)
    noise_ptr,  # (B, C, H, W) or None
    seed_ptr,  # (1,) int64 or None
    flip_ptr,  # (B,) or None
    t_ptr,  # (B,) int64
    table_ptr,  # (T, 3) float32: c, d, w
    T,
    HW,
    W,
    tiles,
    offset_strength,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    NOISE_CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """out − (c·ε + d·x0), and the sum of its squares over each tile; grid (B·tiles,)."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    m, c, p, mask = tile_position(i_tile, HW, C, CHANNELS_LAST, BLOCK, STEP)
    output = read(output_ptr + i_b * (C * HW), m, c, p, mask, HW, C, True, CHANNELS_LAST)
    x = read_image(x_ptr, flip_ptr, i_b, m, c, p, mask, HW, W, C, CHANNELS_LAST, X_CHANNELS_LAST, NORMALIZE)
    eps = read_noise(
        noise_ptr, seed_ptr, i_b, i_tile, m, c, p, mask, HW, offset_strength,
        C, C_PAD, CHANNELS_LAST, NOISE_CHANNELS_LAST, OFFSET, BLOCK, STEP,
    )  # fmt: skip
    t = tl.load(t_ptr + i_b)
    error = output - (table_entry(table_ptr, t, T, 0, 3) * eps + table_entry(table_ptr, t, T, 1, 3) * x)
    if error_ptr is not None:
        tl.store(error_ptr + i_b * (C * HW) + m, error.to(error_ptr.dtype.element_ty), mask=mask)
    error = tl.where(mask, error, 0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(error * error, axis=0))


@triton.jit
def diffusion_loss_reduce_kernel(
    loss_ptr,  # (B,) float32
    factor_ptr,  # (B,) float32
    partial_ptr,  # (B, tiles) float32
    t_ptr,  # (B,) int64
    table_ptr,  # (T, 3) float32: c, d, w
    T,
    tiles,
    elements,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # a constant, since Triton 3.6's interpreter cannot count up to an argument
):
    """loss = w·Σ error² / elements and d loss / d out = factor·error; the second stage, grid (B,)."""
    i_b = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for i_block in range(BLOCKS):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        sums += tl.load(partial_ptr + i_b * tiles + o, mask=o < tiles, other=0.0)
    scale = table_entry(table_ptr, tl.load(t_ptr + i_b), T, 2, 3) / elements
    tl.store(loss_ptr + i_b, scale * tl.sum(sums, axis=0))
    tl.store(factor_ptr + i_b, 2.0 * scale)


@triton.jit
def diffusion_loss_bwd_kernel(
    doutput_ptr,  # shape, dtype and format of error
    error_ptr,  # (B, ...)
    factor_ptr,  # (B,) float32
    dloss_ptr,  # (B,) float32
    elements,
    tiles,
    BLOCK: tl.constexpr,
):
    """doutput = dloss·factor·error; grid (B·tiles,)."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = m < elements
    scale = tl.load(dloss_ptr + i_b) * tl.load(factor_ptr + i_b)
    error = tl.load(error_ptr + i_b * elements + m, mask=mask, other=0.0).to(tl.float32)
    tl.store(doutput_ptr + i_b * elements + m, (scale * error).to(doutput_ptr.dtype.element_ty), mask=mask)


def q_sample(
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    flip: torch.Tensor | None,
    normalize: bool,
    offset_noise_strength: float,
    dtype: torch.dtype,
    channels_last: bool,
) -> torch.Tensor:
    """Launch q_sample_fwd_kernel; arguments as `op.q_sample`, checked there."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(x_start.shape, dtype=dtype, device=x_start.device, memory_format=memory_format)
    batch, channels, height, width = x_start.shape
    launch, shape = tile_constants(channels, height * width, is_channels_last(out))
    tiles = triton_launch.ceil_div(channels * height * width, shape["STEP"])
    with torch.cuda.device_of(x_start):
        q_sample_fwd_kernel[(batch * tiles,)](
            out, x_start, noise, seed, flip, t, table,
            table.shape[0], height * width, width, tiles, offset_noise_strength,
            X_CHANNELS_LAST=is_channels_last(x_start),
            NOISE_CHANNELS_LAST=noise is not None and is_channels_last(noise),
            NORMALIZE=normalize,
            OFFSET=offset_noise_strength > 0,
            **shape,
            **launch.options,
        )  # fmt: skip
    return out


def diffusion_loss(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    flip: torch.Tensor | None,
    normalize: bool,
    offset_noise_strength: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch both stages of the loss; arguments as `op.diffusion_loss`, checked there.

    The error is kept, not the gradient: it is of order 1, where the gradient of a mean over many elements would
    underflow in float16.

    Returns:
        loss, factor: (B,) float32.
        error: d loss / d model_output = factor·error; shape, dtype and format of model_output, or empty.
    """
    batch, channels, height, width = x_start.shape
    elements = channels * height * width
    launch, shape = tile_constants(channels, height * width, is_channels_last(model_output))
    tiles = triton_launch.ceil_div(elements, shape["STEP"])
    error = torch.empty_like(model_output) if with_gradient else model_output.new_empty(0)
    loss, factor = (torch.empty(batch, dtype=torch.float32, device=x_start.device) for _ in range(2))
    partial = torch.empty((batch, tiles), dtype=torch.float32, device=x_start.device)
    with torch.cuda.device_of(x_start):
        diffusion_loss_fwd_kernel[(batch * tiles,)](
            error if with_gradient else None, partial, model_output, x_start, noise, seed, flip, t, table,
            table.shape[0], height * width, width, tiles, offset_noise_strength,
            X_CHANNELS_LAST=is_channels_last(x_start),
            NOISE_CHANNELS_LAST=noise is not None and is_channels_last(noise),
            NORMALIZE=normalize,
            OFFSET=offset_noise_strength > 0,
            **shape,
            **launch.options,
        )  # fmt: skip
        reduce = triton_launch.row_sum(tiles)
        diffusion_loss_reduce_kernel[(batch,)](
            loss, factor, partial, t, table, table.shape[0], tiles, elements,
            BLOCK=reduce.block, BLOCKS=triton_launch.ceil_div(tiles, reduce.block), **reduce.options,
        )  # fmt: skip
    return loss, factor, error


def diffusion_loss_backward(error: torch.Tensor, factor: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    """Launch diffusion_loss_bwd_kernel: dloss·factor·error in the dtype and format of error."""
    doutput = torch.empty_like(error)
    elements = error[0].numel()
    launch = triton_launch.elementwise(elements, triton_launch.interpreted())
    tiles = triton_launch.ceil_div(elements, launch.block)
    with torch.cuda.device_of(error):
        diffusion_loss_bwd_kernel[(error.shape[0] * tiles,)](
            doutput, error, factor, dloss, elements, tiles, BLOCK=launch.block, **launch.options
        )
    return doutput


triton_launch.hash_functions(globals())
