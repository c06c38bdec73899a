"""Filling a tensor with the noise function: public functions, registration, eligibility."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ddpm_fast import noise
from ddpm_fast.ops.noise import reference
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.dispatch import Implementation, Op

_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_library = torch.library.Library("ddpm_fast", "FRAGMENT")
_library.define(
    "fill_normal_(Tensor(a!) out, Tensor seed, Tensor step, int stream, int start_index) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("ddpm_fast::fill_normal_", lib=_library)
def _fill_normal_fake(out: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, stream: int, start_index: int) -> None:
    return None


def fill_normal_(
    out: torch.Tensor,
    seed: int | torch.Tensor,
    *,
    stream: int,
    step: int | torch.Tensor = 0,
    start_index: int = 0,
) -> torch.Tensor:
    """Overwrite `out` with standard normal noise that is a pure function of the other arguments.

    Args:
        out: (B, ...) float32, float16, bfloat16 or float64; the narrow types get the rounded float32 numbers.
        seed: an int of 64 bits, or a one-element int64 tensor, which is read on the device.
        stream: which use of the seed this is, in [0, 2^32); see the constants of `ddpm_fast.noise`.
        step: the sampling step, an int or a one-element int64 tensor, taken modulo 2^32.
        start_index: index of the first sample, in [0, 2^32 - B].

    Returns:
        `out`.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    if not isinstance(out, torch.Tensor) or not out.is_floating_point():
        raise TypeError(f"out must be a floating point tensor, got {getattr(out, 'dtype', type(out).__name__)}")
    noise.check_counter_range(tuple(out.shape), stream=stream, start_index=start_index)
    seed = noise.seed_tensor(seed, out.device)
    return _fill_normal_op(out, seed, stream=stream, step=_step_tensor(step, out.device), start_index=start_index)


def normal(
    shape: Sequence[int],
    *,
    seed: int | torch.Tensor,
    stream: int = noise.STREAM_INITIAL,
    step: int | torch.Tensor = 0,
    start_index: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A new tensor of noise: `ddpm_fast.noise.normal`, by the fastest implementation.

    Args:
        shape: (B, ...).
        device: of the result; None is the seed's device.
        dtype: a floating point type.
        seed, stream, step, start_index: see `fill_normal_`.

    Returns:
        Contiguous tensor of `shape`.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype}")
    shape = tuple(int(n) for n in shape)
    noise.check_counter_range(shape, stream=stream, start_index=start_index)
    seed = noise.seed_tensor(seed, device)
    out = torch.empty(shape, dtype=dtype, device=seed.device)
    return fill_normal_(out, seed, stream=stream, step=step, start_index=start_index)


def _step_tensor(step: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(step, torch.Tensor):
        if step.dtype != torch.int64 or step.numel() != 1:
            raise TypeError(
                f"step must be an int or a one-element int64 tensor, got {step.dtype} of shape {tuple(step.shape)}"
            )
        return step.to(device)
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step must be an int or a one-element int64 tensor, got {type(step).__name__}")
    return torch.full((1,), step % 2**32, dtype=torch.int64, device=device)


def _native(
    out: torch.Tensor, seed: torch.Tensor, *, stream: int, step: torch.Tensor, start_index: int
) -> torch.Tensor:
    torch.ops.ddpm_fast.fill_normal_(out, seed, step, stream, start_index)
    return out


def _native_refuses(
    out: torch.Tensor, seed: torch.Tensor, *, stream: int, step: torch.Tensor, start_index: int
) -> str | None:
    reason = extension.why_not(out.device)
    if reason is not None:
        return reason
    if out.dtype not in _NATIVE_DTYPES:
        return f"out is {out.dtype}, and native code makes float32, float16 and bfloat16"
    if not out.is_contiguous():
        return "out is not contiguous"
    return None


def _example(device: torch.device) -> tuple[tuple, dict]:
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return (torch.empty(2, 3, 8, 8, device=device), zero), {"stream": 0, "step": zero, "start_index": 0}


_fill_normal_op = Op(
    "fill_normal_",
    [
        Implementation("native", _native, _native_refuses),
        Implementation("reference", reference.fill_normal_),
    ],
    _example,
)
