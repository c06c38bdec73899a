"""Triton device functions shared by the kernels of all ops: the noise function, SiLU, products, rounding, images.

The noise function is csrc/core/philox.h in Triton, the same polynomials in the same order: Philox4x32-10 (Salmon et al.
2011, "Parallel random numbers: as easy as 1, 2, 3"), then Box-Muller (Box & Muller 1958). No libm call, so that the
interpreter, which has none, and the GPU give the same numbers but for the rounding of fused multiply-adds.

A tile of images is a part of one sample, in the memory order of what the kernel writes. Position m of a sample is
(channel, pixel); the noise function counts elements in C, H, W order. In channels-last memory the noise of a tile is
therefore made channel by channel, four pixels per Philox call, and brought into memory order by a gather in shared
memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ddpm_fast import noise as noise_function
from ddpm_fast.runtime import triton_launch

STREAM_TRAINING = tl.constexpr(noise_function.STREAM_TRAINING)
STREAM_OFFSET = tl.constexpr(noise_function.STREAM_OFFSET)
_INTERPRETED = tl.constexpr(triton_launch.interpreted())


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011, section 3.3).

    Args:
        c0, c1, c2, c3: uint32 words of the counter, of one shape.
        k0, k1: uint32 words of the key.

    Returns:
        Four uint32 words.
    """
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def log_positive(u):
    """ln(u) of positive normal float32: u = 2^e·(1 + f) with 1 + f in [√½, √2), and a polynomial in f."""
    bits = u.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    f = (bits - (exponent.to(tl.uint32, bitcast=True) << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    poly = f * -0.0762240623 + 0.129034404
    poly = poly * f - 0.132421613
    poly = poly * f + 0.141819413
    poly = poly * f - 0.166092124
    poly = poly * f + 0.200019715
    poly = poly * f - 0.250015764
    poly = poly * f + 0.333333257
    poly = poly * f - 0.499999884
    # ln 2 in two parts; the first has 15 bits, so its product with an exponent is exact.
    return e * 0.693145752 + (f + (poly * (f * f) + e * 1.42860677e-6))


@triton.jit
def cos_sin_half_turns(w):
    """(cos πw, sin πw) of float32 w in [−1, 1]: w = quadrant/2 + t with t in [−¼, ¼], both exact."""
    # Adding 1.5·2^23 rounds to an integer and leaves that in the low bits.
    shifted = 2.0 * w + 12582912.0
    quadrant = shifted.to(tl.uint32, bitcast=True)
    t = w - 0.5 * (shifted - 12582912.0)
    y = t * t
    sine = t * (3.14159264 + y * (-5.16770768 + y * (2.54976105 + y * -0.589012227)))
    cosine = 1.0 + y * (-4.93480218 + y * (4.05870811 + y * (-1.33506357 + y * 0.231469379)))
    odd = (quadrant & 1) != 0
    cos_bits = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    sin_bits = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    return cos_bits.to(tl.float32, bitcast=True), sin_bits.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(x0, x1):
    """Two float32 normals from two uint32 words: u = (x0 + ½)/2^32 in (0, 1], angle = x1 in signed half-turns."""
    u = x0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    w = x1.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10  # 2^-31
    radius = tl.sqrt(-2.0 * log_positive(u))
    cosine, sine = cos_sin_half_turns(w)
    return radius * cosine, radius * sine


@triton.jit
def philox_key(seed):
    """An int64 seed as the two uint32 words of the key."""
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def normal4(k0, k1, block, sample, step, STREAM: tl.constexpr):
    """Elements 4·block … 4·block + 3 of one sample's noise.

    Args:
        k0, k1: the key, see `philox_key`.
        block: integers of any shape.
        sample, step: scalars.
        STREAM: which use of the seed this is, a constant of ddpm_fast/noise.py.

    Returns:
        Four float32 tensors of block's shape.
    """
    zero = (block * 0).to(tl.uint32)
    words = philox4x32(
        block.to(tl.uint32), zero + sample.to(tl.uint32), zero + step.to(tl.uint32), zero + STREAM, k0, k1
    )
    z0, z1 = box_muller(words[0], words[1])
    z2, z3 = box_muller(words[2], words[3])
    return z0, z1, z2, z3


@triton.jit
def normal(k0, k1, block, sample, step, STREAM: tl.constexpr):
    """The noise of whole blocks in element order: see `normal4`; block (K,) → (4·K,) float32."""
    z0, z1, z2, z3 = normal4(k0, k1, block, sample, step, STREAM)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * block.shape[0],))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^−x) of float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    """x·σ(x) of float32."""
    return x * sigmoid(x)


@triton.jit
def silu_and_derivative(x):
    """x·σ(x) and d silu / dx = σ(x)·(1 + x·σ(−x)) of float32; 1 − σ(x) would cancel, and x would multiply the error."""
    e = tl.exp(tl.minimum(-x, 80.0))  # e·σ(x) is not inf·0; σ(−80) is 2e-35
    s = 1.0 / (1.0 + e)
    return x * s, s * (1.0 + x * (e * s))


@triton.jit
def silu_derivative(x):
    """d silu / dx of float32."""
    return silu_and_derivative(x)[1]


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a·b in float32; (m, k), (k, n), (m, n) or None, with m, n, k at least 16.

    PRECISION, "ieee" or "tf32", applies to float32 operands only.
    """
    if _INTERPRETED:  # the interpreter's bfloat16 products are wrong; float32 products equal the hardware's
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def dot_of_many(a, b, accumulator, PRECISION: tl.constexpr):
    """`dot` for long loops: "ieee" products are summed by themselves; errors grow with tiles, not with terms."""
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # Without a limit the compiler would add into accumulator term by term; to float32 the limit means nothing else.
        return accumulator + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    return dot(a, b, accumulator, PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in another type, rounded to nearest even; the interpreter's own cast truncates to bfloat16."""
    if _INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


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


triton_launch.hash_functions(globals())
