"""Noise as a function: `noise(seed, stream, sample, step, element)`, the specification in torch.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") followed by Box-Muller. The key is the
64-bit seed, the counter is (element // 4, sample, step, stream); one call gives elements 4k ... 4k+3 of a sample in
C, H, W order. The C++ header csrc/core/philox.h and the Triton kernels compute the same function, so noise never has to
be stored, and sample 17 of seed 3 gets the same noise whatever the batch, the device or the number of machines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import cast

import torch

# One stream per use, so that no two uses of a seed ever share noise.
STREAM_INITIAL = 0  # x_T, the start of sampling
STREAM_STEP = 1  # sampler steps
STREAM_TRAINING = 2  # the ε of q_sample
STREAM_OFFSET = 3  # offset noise, one number per channel
STREAM_FLIP = 4  # horizontal flips of training images
STREAM_INTERPOLATE = 5  # the second image's noise in interpolate; the first has STREAM_TRAINING
STREAM_DROPOUT = 6  # which elements dropout keeps: its words are compared, not made normal
STREAM_LIKELIHOOD = 7  # the ε of bits_per_dim, at every level of its chain
STREAM_CONDITION = 8  # which images of a training batch keep their condition, one number per image
STREAM_AUGMENTATION = 9  # the noise of low-resolution conditions, and at step 1 its level

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_MAX_ELEMENTS = 2**34  # element // 4 is a 32-bit word
_WITHOUT_FLOAT64 = ("mps",)  # types of devices


def philox4x32(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor], rounds: int = 10) -> list[torch.Tensor]:
    """Philox4x32 (Salmon et al. 2011, section 3.3) on int64 tensors that hold 32-bit words.

    Args:
        counter: four int64 tensors, broadcastable with each other, values in [0, 2^32).
        key: two such tensors.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # An unsigned 32×32 product does not fit a signed 64-bit integer, but its wrapped bits are right.
        product0 = c0 * _MULTIPLIER[0]
        product1 = c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def box_muller(bits0: torch.Tensor, bits1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent normals from two 32-bit words (Box & Muller 1958), in float64.

    The uniform u in (0, 1] and the angle w in half-turns are rounded to float32 first: that rounding is part of the
    function, so that kernels that work in float32 start from exactly the same numbers.
    """
    u = bits0.to(torch.float32) * 2.0**-32 + 2.0**-33
    w = as_int32(bits1).to(torch.float32) * 2.0**-31
    radius = torch.sqrt(-2.0 * torch.log(u.double()))
    angle = math.pi * w.double()
    return radius * torch.cos(angle), radius * torch.sin(angle)


def as_int32(bits: torch.Tensor) -> torch.Tensor:
    """32-bit words held in int64, read as signed integers."""
    return ((bits + 2**31) & _MASK) - 2**31


def seed_tensor(seed: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """A seed as the one-element int64 tensor that ops read.

    Args:
        seed: an int (any 64-bit value, signed or unsigned) or a one-element int64 tensor, which is returned as it is
            if it is on `device` already.

    Raises:
        TypeError: neither of these.
        ValueError: the int has more than 64 bits.
    """
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or a one-element int64 tensor, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        return seed.to(device).reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int or a one-element int64 tensor, got {type(seed).__name__}")
    seed = int(seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    # Filled on the device: a copy from the host would wait for it.
    return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def draw_seed(device: torch.device | str | None = None) -> torch.Tensor:
    """A fresh seed from torch's default generator of the device, so that `torch.manual_seed` fixes a run.

    Returns:
        int64 tensor of shape (1,) on `device`; no synchronisation with the host.
    """
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def draw_seeds(count: int, device: torch.device | str | None = None) -> tuple[torch.Tensor, ...]:
    """So many seeds, see `draw_seed`, by one operator; kernels find each at an address of 16 bytes."""
    drawn = torch.randint(0, 2**62, (count, 2), dtype=torch.int64, device=device)
    return drawn[:, 0].split(1)


def normal(
    shape: Sequence[int],
    *,
    seed: int | torch.Tensor,
    stream: int = STREAM_INITIAL,
    step: int | torch.Tensor = 0,
    start_index: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal noise that is a pure function of its arguments.

    Args:
        shape: (B, ...): B samples; the noise of sample i depends on `start_index + i`, not on B.
        seed: 64-bit seed, an int or a one-element int64 tensor.
        stream: which use of the seed this is, in [0, 2^32); see the constants of this module.
        step: the sampling step, an int or a one-element int64 tensor, taken modulo 2^32.
        start_index: index of the first sample, in [0, 2^32 - B].
        dtype: float16 and bfloat16 are the rounded float32 numbers; float64 is not rounded at all.

    Returns:
        Tensor of `shape` on `device`, contiguous.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    shape = tuple(int(n) for n in shape)
    check_counter_range(shape, stream=stream, start_index=start_index)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype}")
    seed = seed_tensor(seed, device)
    device = seed.device
    if not isinstance(step, torch.Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    # A device without float64 gets the numbers that the host makes: the same ones.
    made_on = torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device
    step = step.to(device=made_on, dtype=torch.int64).reshape(())
    return _made(shape, seed.to(made_on), stream, step, start_index, dtype).to(device)


def _made(
    shape: tuple[int, ...], seed: torch.Tensor, stream: int, step: torch.Tensor, start_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """`normal` on the device of the seed."""
    device = seed.device
    batch, elements = shape[0], math.prod(shape[1:])
    blocks = (elements + 3) // 4

    block = torch.arange(blocks, dtype=torch.int64, device=device)  # (K,)
    sample = torch.arange(start_index, start_index + batch, dtype=torch.int64, device=device)[:, None]  # (B, 1)
    counter = (block, sample, step & _MASK, torch.full((), stream, dtype=torch.int64, device=device))
    key = (seed & _MASK, (seed >> 32) & _MASK)
    bits = [word.expand(batch, blocks) for word in philox4x32(counter, key)]
    z = torch.stack([*box_muller(bits[0], bits[1]), *box_muller(bits[2], bits[3])], dim=-1)  # (B, K, 4)
    z = z.reshape(batch, blocks * 4)[:, :elements].reshape(shape)
    return z.contiguous() if dtype == torch.float64 else z.to(torch.float32).to(dtype).contiguous()


@dataclass
class Noise:
    """ε of a batch of images: a tensor, or the seed that makes it. `q_sample` and `diffusion_loss` both take it.

    Kernels make the noise of a seed where they need it and store nothing. An implementation that cannot do so stores it
    here, once, and whoever takes this object next reads the tensor.

    Args:
        tensor: exactly this ε, shape of the images.
        seed: makes ε = noise(seed, STREAM_TRAINING, sample = batch index, step 0) where there is no tensor, and the
            offset: an int of 64 bits or a one-element int64 tensor.
        offset_noise_strength: ε gains this times one normal number per image and channel, of STREAM_OFFSET
            (Guttenberg 2023, offset noise).

    Raises:
        ValueError: there is no seed, and noise or its offset is to be made; or a negative strength.
    """

    tensor: torch.Tensor | None = None
    seed: int | torch.Tensor | None = None
    offset_noise_strength: float = 0.0

    def __post_init__(self) -> None:
        if self.offset_noise_strength < 0:
            raise ValueError(f"offset_noise_strength must not be negative, got {self.offset_noise_strength}")
        if self.seed is None and (self.tensor is None or self.offset_noise_strength > 0):
            raise ValueError("seed must be given where noise or its offset is generated, got None")

    def store(self, x_start: torch.Tensor, dtype: torch.dtype) -> None:
        """Make the tensor, offset included, where it is not there; nothing is made from the seed any more.

        Args:
            x_start: (B, C, ...); the noise has its shape, and its dtype where that is floating point, else `dtype`.
        """
        self.tensor = epsilon(x_start, self.tensor, self.seed, self.offset_noise_strength, dtype)
        self.seed, self.offset_noise_strength = None, 0.0


def epsilon(
    x_start: torch.Tensor,
    noise: torch.Tensor | None,
    seed: int | torch.Tensor | None,
    offset_noise_strength: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """ε of training as a tensor: given, or the noise function's, with offset noise added; arguments as in `Noise`."""
    seed = cast("int | torch.Tensor", seed)  # `Noise` refuses to be without one where it is needed
    if noise is None:
        dtype = x_start.dtype if x_start.is_floating_point() else dtype
        noise = normal(x_start.shape, seed=seed, stream=STREAM_TRAINING, device=x_start.device, dtype=dtype)
    if offset_noise_strength > 0:
        offset = normal(noise.shape[:2], seed=seed, stream=STREAM_OFFSET, device=noise.device, dtype=noise.dtype)
        noise = noise + offset_noise_strength * offset.reshape(*offset.shape, *(1,) * (noise.ndim - 2))
    return noise


def check_counter_range(shape: tuple[int, ...], *, stream: int, start_index: int) -> None:
    """Raise TypeError or ValueError where the arguments of a noise call do not fit the 32-bit words of its counter."""
    if len(shape) == 0:
        raise ValueError("shape must have at least one dimension, the batch, got ()")
    if min(shape) < 0:
        raise ValueError(f"shape must not have negative sizes, got {shape}")
    if math.prod(shape[1:]) > _MAX_ELEMENTS:
        raise ValueError(f"shape must have at most 2^34 elements per sample, got {math.prod(shape[1:])}")
    if not 0 <= stream <= _MASK:
        raise ValueError(f"stream must be in [0, 2^32), got {stream}")
    if not isinstance(start_index, (Integral, torch.SymInt)):
        raise TypeError(f"start_index must be an int, got {type(start_index).__name__}")
    if start_index < 0 or start_index + shape[0] > 2**32:
        raise ValueError(f"start_index must be in [0, 2^32 - batch size], got {start_index} with a batch of {shape[0]}")
