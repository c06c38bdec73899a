"""Forward diffusion and its loss in Triton: images are read once, noise and target exist in registers only.

A program works on a tile of one sample, in the memory order of what it writes (q_sample) or of the model's output
(loss), so that the wide accesses are contiguous. Position m of a sample is (channel, pixel); the noise function counts
elements in C, H, W order. In channels-last memory the noise of a tile is therefore made channel by channel, four
pixels per Philox call, and brought into memory order by a gather in shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast import noise as noise_function
from ddpm_fast.ops.common.triton import normal, philox_key
from ddpm_fast.runtime import triton_launch

STREAM_TRAINING = tl.constexpr(noise_function.STREAM_TRAINING)
STREAM_OFFSET = tl.constexpr(noise_function.STREAM_OFFSET)


@triton.jit
def table_entry(table_ptr, t, T, COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """table[t, COLUMN] of a (T, COLUMNS) float32 table; NaN for a t outside [0, T), and nothing read outside it."""
    inside = (t >= 0) & (t < T)
    value = tl.load(table_ptr + tl.where(inside, t, 0) * COLUMNS + COLUMN)
    return tl.where(inside, value, float("nan"))


@triton.jit
def tile_position(tile, HW, C: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The place of a tile in its sample: memory position, channel, pixel and mask, each (BLOCK,).

    A tile covers STEP ≤ BLOCK positions. Positions outside have channel and pixel 0.
    """
    o = tl.arange(0, BLOCK)
    m = tile * STEP + o
    mask = (m < C * HW) & (o < STEP)
    inside = tl.where(mask, m, 0)
    if CHANNELS_LAST:
        return m, inside % C, inside // C, mask
    else:
        return m, inside // HW, inside % HW, mask


@triton.jit
def read(ptr, m, c, p, mask, HW, C: tl.constexpr, IN_PLACE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Elements (c, p) of one sample as float32.

    Args:
        ptr: the sample's first element.
        IN_PLACE: (c, p) is at memory position m, so that the access is contiguous.
        CHANNELS_LAST: the format of the memory that is read.
    """
    if IN_PLACE:
        offset = m
    elif CHANNELS_LAST:
        offset = p * C + c
    else:
        offset = c * HW + p
    return tl.load(ptr + offset, mask=mask, other=0).to(tl.float32)


@triton.jit
def read_image(
    x_ptr,  # (B, C, H, W) uint8 or floating point
    flip_ptr,  # (B,) or None
    b,
    m,
    c,
    p,
    mask,
    HW,
    W,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """x0 at (c, p): 8-bit images divided by 255, flipped, mapped from [0, 1] to [−1, 1] where asked."""
    x_ptr += b * (C * HW)
    if flip_ptr is not None:
        flipped = tl.load(flip_ptr + b) != 0
        p = tl.where(flipped, p + (W - 1) - 2 * (p % W), p)
    x = read(x_ptr, m, c, p, mask, HW, C, flip_ptr is None and CHANNELS_LAST == X_CHANNELS_LAST, X_CHANNELS_LAST)
    if x_ptr.dtype.element_ty == tl.uint8:
        # x/255 to the last bit for each of the 256 values, unlike x·(1/255): 3·x is exact, and 1/765 nearly a float32.
        x = (x * 3) * (1 / 765)
    if NORMALIZE:
        x = 2.0 * x - 1.0
    return x


@triton.jit
def generated_noise(
    k0,
    k1,
    b,
    tile,
    c,
    p,
    mask,
    HW,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """ε at (c, p), in memory order: element c·HW + p of sample b, stream STREAM_TRAINING, step 0."""
    q = tl.arange(0, BLOCK // 4)
    if CHANNELS_LAST:
        PIXELS: tl.constexpr = BLOCK // C_PAD  # made per channel; the tile's own are STEP / C of them
        first_pixel = tile * (STEP // C)
        first_block = ((q // (PIXELS // 4)) * HW + first_pixel) // 4
        made = normal(k0, k1, first_block + q % (PIXELS // 4), b, b * 0, STREAM_TRAINING)
        # A channel's first pixel is in the middle of a block where HW is not a multiple of 4.
        place = c * PIXELS + (p - first_pixel) + (c * HW + first_pixel) % 4
        return tl.gather(made, tl.where(mask, place, 0), 0)
    else:
        return normal(k0, k1, tile * (BLOCK // 4) + q, b, b * 0, STREAM_TRAINING)


@triton.jit
def read_noise(
    noise_ptr,  # (B, C, H, W) or None: generated
    seed_ptr,  # (1,) int64 or None
    b,
    tile,
    m,
    c,
    p,
    mask,
    HW,
    offset_strength,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NOISE_CHANNELS_LAST: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """ε at (c, p), given or generated, plus one normal number per image and channel where OFFSET."""
    if seed_ptr is not None:
        k0, k1 = philox_key(tl.load(seed_ptr))
    if noise_ptr is not None:
        in_place: tl.constexpr = CHANNELS_LAST == NOISE_CHANNELS_LAST
        eps = read(noise_ptr + b * (C * HW), m, c, p, mask, HW, C, in_place, NOISE_CHANNELS_LAST)
    else:
        eps = generated_noise(k0, k1, b, tile, c, p, mask, HW, C, C_PAD, CHANNELS_LAST, BLOCK, STEP)
    if OFFSET:
        offsets = normal(k0, k1, tl.arange(0, C_PAD // 4), b, b * 0, STREAM_OFFSET)  # (C_PAD,)
        eps += offset_strength * tl.gather(offsets, c, 0)
    return eps


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


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether the memory is to be read in B, H, W, C order; a tensor that is both is contiguous."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def tile_constants(channels: int, pixels: int, channels_last: bool) -> tuple[triton_launch.Launch, dict[str, int]]:
    """How a sample is cut into tiles: the launch, and the kernels' C, C_PAD, CHANNELS_LAST, BLOCK, STEP."""
    c_pad = max(4, triton_launch.next_power_of_2(channels))
    launch = triton_launch.image_tiles(channels * pixels, c_pad if channels_last else 1, triton_launch.interpreted())
    step = launch.block
    if channels_last:
        made = launch.block // c_pad  # pixels; channels that begin inside a block of noise lose up to 3 of them
        step = channels * (made if pixels % 4 == 0 else made - 4)
    shape = {"C": channels, "C_PAD": c_pad, "CHANNELS_LAST": channels_last, "BLOCK": launch.block, "STEP": step}
    return launch, shape


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
