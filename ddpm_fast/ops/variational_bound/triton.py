"""The hybrid loss of learned variance in Triton: all is read once, and the gradient is written by the forward pass.

A program works on a tile of one sample, see ops/common/triton.py: positions of x0, in the memory order of the model's
output, whose second half along channels says the variance. A sample's row of the table says in one place whether its
tiles compute the divergence or the decoder's likelihood.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ddpm_fast.ops.common.triton import (
    cast,
    is_channels_last,
    log_positive,
    read_image,
    read_noise,
    table_entry,
    tile_constants,
    tile_position,
)
from ddpm_fast.runtime import triton_launch

COLUMNS = tl.constexpr(14)  # of the table
BITS = tl.constexpr(1 / math.log(2))  # of a nat
HALF_BIN = tl.constexpr(1 / 255)
OPEN_BEYOND = tl.constexpr(0.999)
SATURATED = tl.constexpr(20.0)
TWICE_ROOT = tl.constexpr(2 * math.sqrt(2 / math.pi))


@triton.jit
def clamp(x, low, high):
    """x in [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def exp(x):
    """e^x of float32 to 1 ulp or so for x in [−87, 88], as in csrc/core/variational_bound.h; 0 below, e^88 above.

    The hardware's instruction loses as many digits as x has before its point.
    """
    y = clamp(x, -87.0, 88.0)
    shifted = y * 1.4426950408889634 + 12582912.0  # 1.5·2^23: rounds to an integer and leaves it in the low bits
    n = shifted - 12582912.0
    r = (y - n * 0.693359375) + n * 2.12194440e-4
    poly = r * 1.9875691500e-4 + 1.3981999507e-3
    poly = poly * r + 8.3334519073e-3
    poly = poly * r + 4.1665795894e-2
    poly = poly * r + 1.6666665459e-1
    poly = poly * r + 5.0000001201e-1
    poly = poly * (r * r) + r + 1.0
    scale = ((shifted.to(tl.uint32, bitcast=True) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, poly * scale)


@triton.jit
def exponentials(x):
    """e^x, e^x − 1 and e^x − 1 − x of float32, without the cancellation of small x."""
    y = clamp(x, -0.5, 0.5)
    poly = y * 2.4801587e-5 + 1.9841270e-4
    poly = poly * y + 1.3888889e-3
    poly = poly * y + 8.3333333e-3
    poly = poly * y + 4.1666667e-2
    poly = poly * y + 1.6666667e-1
    poly = poly * y + 0.5
    least = (y * y) * poly
    e = exp(x)
    small = (x >= -0.5) & (x <= 0.5)
    e = tl.where(small, 1.0 + (y + least), e)
    e1 = tl.where(small, y + least, e - 1.0)
    return e, e1, tl.where(small, least, e1 - x)


@triton.jit
def sigmoids(u):
    """σ(u), σ(−u) and ln σ(u) of float32."""
    e = exp(tl.where(u < 0, u, -u))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    log_sigmoid = tl.where(u > 0, 0.0, u) - log_positive(1.0 + e)
    return tl.where(u < 0, smaller, larger), tl.where(u < 0, larger, smaller), log_sigmoid


@triton.jit
def negative_log_probability(x, mean, log_variance, min_log_probability):
    """−ln of the probability of the bin of x (reference.bin_log_probability), and its gradients.

    Returns:
        the value; its derivative with respect to the mean; minus twice that with respect to log_variance.
    """
    inverse_scale = exp(-0.5 * log_variance)
    centered = x - mean
    above = clamp(inverse_scale * (centered + HALF_BIN), -SATURATED, SATURATED)
    below = clamp(inverse_scale * (centered - HALF_BIN), -SATURATED, SATURATED)
    width = clamp(inverse_scale * (2 * HALF_BIN), 0.0, 2 * SATURATED)
    a = (above + 0.044715 * (above * above * above)) * TWICE_ROOT
    b = (below + 0.044715 * (below * below * below)) * TWICE_ROOT
    # a − b without its cancellation; the derivatives of the bin follow from those of a, b and a − b.
    width = width * TWICE_ROOT
    squares = above * above + above * below + below * below
    of_a, of_minus_a, log_left = sigmoids(a)
    of_minus_b, of_b, log_right = sigmoids(-b)
    e, minus_share, _ = exponentials(-width * (1.0 + 0.044715 * squares))
    log_probability = log_left + log_right + log_positive(-minus_share)

    is_first = x < -OPEN_BEYOND
    is_last = x > OPEN_BEYOND
    log_probability = tl.where(is_first, log_left, tl.where(is_last, log_right, log_probability))
    is_bound = log_probability < min_log_probability
    log_probability = tl.where(is_bound, min_log_probability, log_probability)
    at_above = tl.where(is_bound | is_last, 0.0, of_minus_a * (1.0 + 0.134145 * (above * above)) * TWICE_ROOT)
    at_below = tl.where(is_bound | is_first, 0.0, of_b * (1.0 + 0.134145 * (below * below)) * TWICE_ROOT)
    between = tl.where(is_bound | is_first | is_last, 0.0, width * (e / -minus_share))
    dmean = inverse_scale * ((at_above - at_below) + between * (0.134145 * (above + below)))
    dvariance = (at_below * below - at_above * above) - between * (1.0 + 0.134145 * squares)
    return -log_probability, dmean, dvariance


@triton.jit
def variational_bound_fwd_kernel(
    gradient_ptr,  # (B, C or 2·C, H, W), format of output, or None
    partial_ptr,  # (B, tiles, 2) float32: Σ error², Σ bound
    output_ptr,  # (B, C or 2·C, H, W)
    x_ptr,  # (B, C, H, W)
    noise_ptr,  # (B, C, H, W) or None
    seed_ptr,  # (1,) int64 or None
    flip_ptr,  # (B,) or None
    t_ptr,  # (B,) int64
    table_ptr,  # (T, 14) float32, see op.py
    T,
    HW,
    W,
    tiles,
    offset_strength,
    min_log_probability,
    C: tl.constexpr,
    C_PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    X_CHANNELS_LAST: tl.constexpr,
    NOISE_CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OFFSET: tl.constexpr,
    LEARNED: tl.constexpr,  # output has 2·C channels
    CLIP: tl.constexpr,
    DETACH_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums of error² and bound, and what times factor is the gradient; the first stage, grid (B·tiles,)."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    m, c, pixel, mask = tile_position(i_tile, HW, C, CHANNELS_LAST, BLOCK, STEP)
    CHANNELS: tl.constexpr = 2 * C if LEARNED else C
    place = m
    half = C * HW
    if CHANNELS_LAST and LEARNED:
        place = pixel * CHANNELS + c
        half = C
    output_ptr += i_b * (CHANNELS * HW)
    out = tl.load(output_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x = read_image(x_ptr, flip_ptr, i_b, m, c, pixel, mask, HW, W, C, CHANNELS_LAST, X_CHANNELS_LAST, NORMALIZE)
    eps = read_noise(
        noise_ptr, seed_ptr, i_b, i_tile, m, c, pixel, mask, HW, offset_strength,
        C, C_PAD, CHANNELS_LAST, NOISE_CHANNELS_LAST, OFFSET, BLOCK, STEP,
    )  # fmt: skip
    t = tl.load(t_ptr + i_b)
    low = table_entry(table_ptr, t, T, 9, COLUMNS)
    high = table_entry(table_ptr, t, T, 10, COLUMNS)
    log_variance_true = table_entry(table_ptr, t, T, 11, COLUMNS)
    over_low = tl.zeros((BLOCK,), tl.float32)  # log_variance − low
    if LEARNED:
        v = tl.load(output_ptr + half + place, mask=mask, other=0.0).to(tl.float32)
        over_low = (0.5 * (high - low)) * (v + 1.0)

    error = out - (table_entry(table_ptr, t, T, 2, COLUMNS) * eps + table_entry(table_ptr, t, T, 3, COLUMNS) * x)
    x_t = table_entry(table_ptr, t, T, 0, COLUMNS) * x + table_entry(table_ptr, t, T, 1, COLUMNS) * eps
    q = table_entry(table_ptr, t, T, 6, COLUMNS)
    predicted = table_entry(table_ptr, t, T, 5, COLUMNS) * x_t + q * out
    is_inside = (predicted >= -1.0) & (predicted <= 1.0)
    if CLIP:
        predicted = clamp(predicted, -1.0, 1.0)
    m1 = table_entry(table_ptr, t, T, 7, COLUMNS)
    if table_entry(table_ptr, t, T, 12, COLUMNS) > 0.5:
        mean = m1 * predicted + table_entry(table_ptr, t, T, 8, COLUMNS) * x_t
        bound, dmean, dvariance = negative_log_probability(x, mean, low + over_low, min_log_probability)
    else:
        e, e1, e2 = exponentials((log_variance_true - low) - over_low)
        precision = m1 * exp(-log_variance_true)
        difference = x - predicted
        squared = e * ((m1 * precision) * (difference * difference))
        bound = 0.5 * (e2 + squared)
        dmean = -e * (precision * difference)
        dvariance = e1 + squared
    if gradient_ptr is not None:
        gradient_ptr += i_b * (CHANNELS * HW)
        gradient = error
        if not DETACH_MEAN:
            weight = table_entry(table_ptr, t, T, 13, COLUMNS) * BITS
            through_mean = ((weight * q) * m1) * dmean
            if CLIP:
                through_mean = tl.where(is_inside, through_mean, 0.0)
            gradient = (2.0 * table_entry(table_ptr, t, T, 4, COLUMNS)) * error + through_mean
        tl.store(gradient_ptr + place, cast(gradient, gradient_ptr.dtype.element_ty), mask=mask)
        if LEARNED:
            tl.store(gradient_ptr + half + place, cast(dvariance, gradient_ptr.dtype.element_ty), mask=mask)
    error = tl.where(mask, error, 0.0)
    tl.store(partial_ptr + 2 * tl.program_id(0), tl.sum(error * error, axis=0))
    tl.store(partial_ptr + 2 * tl.program_id(0) + 1, tl.sum(tl.where(mask, bound, 0.0), axis=0) * BITS)


@triton.jit
def variational_bound_reduce_kernel(
    loss_ptr,  # (B,) float32
    terms_ptr,  # (B, 2) float32
    factor_ptr,  # (B, 2) float32
    partial_ptr,  # (B, tiles, 2) float32
    t_ptr,  # (B,) int64
    table_ptr,  # (T, 14) float32
    T,
    tiles,
    elements,
    LEARNED: tl.constexpr,
    DETACH_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # a constant, since Triton 3.6's interpreter cannot count up to an argument
):
    """Both means, their weighted sum, and the factors of the gradient's halves; the second stage, grid (B,).

    A gradient of C channels has one factor, twice.
    """
    i_b = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    bounds = tl.zeros((BLOCK,), tl.float32)
    for i_block in range(BLOCKS):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        squares += tl.load(partial_ptr + 2 * (i_b * tiles + o), mask=o < tiles, other=0.0)
        bounds += tl.load(partial_ptr + 2 * (i_b * tiles + o) + 1, mask=o < tiles, other=0.0)
    square = tl.sum(squares, axis=0) / elements
    bound = tl.sum(bounds, axis=0) / elements
    t = tl.load(t_ptr + i_b)
    w = table_entry(table_ptr, t, T, 4, COLUMNS)
    weight = table_entry(table_ptr, t, T, 13, COLUMNS)
    span = table_entry(table_ptr, t, T, 10, COLUMNS) - table_entry(table_ptr, t, T, 9, COLUMNS)
    tl.store(terms_ptr + 2 * i_b, square)
    tl.store(terms_ptr + 2 * i_b + 1, bound)
    tl.store(loss_ptr + i_b, w * square + weight * bound)
    first = (2.0 * w if DETACH_MEAN else 1.0) / elements
    tl.store(factor_ptr + 2 * i_b, first)
    tl.store(factor_ptr + 2 * i_b + 1, (span * (-0.25 * BITS)) * (weight / elements) if LEARNED else first)


@triton.jit
def variational_bound_bwd_kernel(
    doutput_ptr,  # shape, dtype and format of gradient
    gradient_ptr,  # (B, C or 2·C, ...)
    factor_ptr,  # (B, 2) float32
    dloss_ptr,  # (B,) float32
    elements,  # of a sample's gradient
    half,  # positions to the second half
    tiles,
    CHANNELS: tl.constexpr,  # of both halves where they alternate from pixel to pixel, else 0
    BLOCK: tl.constexpr,
):
    """doutput = dloss·factor·gradient, each half with its factor; grid (B·tiles,)."""
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    m = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = m < elements
    dloss = tl.load(dloss_ptr + i_b)
    first = dloss * tl.load(factor_ptr + 2 * i_b)
    second = dloss * tl.load(factor_ptr + 2 * i_b + 1)
    place = m
    if CHANNELS > 0:
        place = m % CHANNELS
    gradient = tl.load(gradient_ptr + i_b * elements + m, mask=mask, other=0.0).to(tl.float32)
    doutput = tl.where(place < half, first, second) * gradient
    tl.store(doutput_ptr + i_b * elements + m, cast(doutput, doutput_ptr.dtype.element_ty), mask=mask)


def options_of(launch: triton_launch.Launch) -> dict[str, int]:
    """A thread handles 4 numbers, those of one Philox call: with 16, as in lighter kernels, registers spill.

    Triton 3.5 spills one of bf16's channels-last tiles on sm_100 unless it is given a bound.
    """
    bound = triton_launch.register_bound(128 if triton_launch.is_triton_before(3, 6) else None)
    return {**launch.options, "num_warps": 4 * launch.num_warps, **bound}


def variational_bound(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    flip: torch.Tensor | None,
    normalize: bool,
    offset_noise_strength: float,
    clip_x_start: bool,
    detach_mean: bool,
    min_probability: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch both stages; arguments as `op.variational_bound`, checked there.

    The gradient is kept without its factors: it is of order 1, where the gradient of a mean over many elements would
    underflow in float16.

    Returns:
        loss: (B,) float32.
        terms: (B, 2) float32, the means of error² and of the bound in bits.
        factor: (B, 2) float32.
        gradient: d loss / d model_output = factor·gradient, each half along channels with its own factor; shape, dtype
            and format of model_output, or empty.
    """
    batch, channels, height, width = x_start.shape
    elements, learned = channels * height * width, model_output.shape[1] != channels
    launch, shape = tile_constants(channels, height * width, is_channels_last(model_output))
    tiles = triton_launch.ceil_div(elements, shape["STEP"])
    gradient = torch.empty_like(model_output) if with_gradient else model_output.new_empty(0)
    float32 = {"dtype": torch.float32, "device": x_start.device}
    loss, terms, factor = (torch.empty(size, **float32) for size in ((batch,), (batch, 2), (batch, 2)))
    partial = torch.empty((batch, tiles, 2), **float32)
    with torch.cuda.device_of(x_start):
        variational_bound_fwd_kernel[(batch * tiles,)](
            gradient if with_gradient else None, partial, model_output, x_start, noise, seed, flip, t, table,
            table.shape[0], height * width, width, tiles, offset_noise_strength, math.log(min_probability),
            X_CHANNELS_LAST=is_channels_last(x_start),
            NOISE_CHANNELS_LAST=noise is not None and is_channels_last(noise),
            NORMALIZE=normalize,
            OFFSET=offset_noise_strength > 0,
            LEARNED=learned,
            CLIP=clip_x_start,
            DETACH_MEAN=detach_mean,
            **shape,
            **options_of(launch),
        )  # fmt: skip
        reduce = triton_launch.row_sum(tiles)
        variational_bound_reduce_kernel[(batch,)](
            loss, terms, factor, partial, t, table, table.shape[0], tiles, elements,
            LEARNED=learned, DETACH_MEAN=detach_mean,
            BLOCK=reduce.block, BLOCKS=triton_launch.ceil_div(tiles, reduce.block), **reduce.options,
        )  # fmt: skip
    return loss, terms, factor, gradient


def variational_bound_backward(gradient: torch.Tensor, factor: torch.Tensor, dloss: torch.Tensor) -> torch.Tensor:
    """Launch variational_bound_bwd_kernel: dloss·factor·gradient in the dtype and format of gradient."""
    doutput = torch.empty_like(gradient)
    elements = gradient[0].numel()
    period = gradient.shape[1] if is_channels_last(gradient) else 0
    launch = triton_launch.elementwise(elements, triton_launch.interpreted())
    tiles = triton_launch.ceil_div(elements, launch.block)
    with torch.cuda.device_of(gradient):
        variational_bound_bwd_kernel[(gradient.shape[0] * tiles,)](
            doutput, gradient, factor, dloss, elements, (period or elements) // 2, tiles,
            CHANNELS=period, BLOCK=launch.block, **launch.options,
        )  # fmt: skip
    return doutput


triton_launch.hash_functions(globals())
