"""Forward diffusion and its loss: declarations, public functions, eligibility.

    x_t = a·x0 + b·ε
    loss = w · mean((out − (c·ε + d·x0))²) per sample

An objective is a table of a, b, c, d, w with a row per timestep, made by diffusion/schedules.py. Given a seed, both
make the same ε where they need it: it is never stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ddpm_fast.noise import Noise
from ddpm_fast.ops.common.tables import widest_dtype
from ddpm_fast.ops.forward_diffusion import reference
from ddpm_fast.ops.images import (
    KERNEL_DTYPES,
    MAX_CHANNELS,
    as_noise,
    check_images,
    why_not_by_native,
    why_not_by_triton,
    why_not_channels,
    why_not_images,
    why_not_tensor,
    with_noise,
)
from ddpm_fast.ops.operator import Operator
from ddpm_fast.runtime.autocast import autocast_dtype
from ddpm_fast.runtime.dispatch import Implementation, Op

_IMAGES = "Tensor x_start, Tensor t, Tensor table, Tensor? noise, Tensor? seed, Tensor? flip"
_OPTIONS = "bool normalize, float offset_noise_strength"


def _q_sample_fake(x_start: torch.Tensor, dtype: torch.dtype, channels_last: bool, **_: object) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x_start.shape, dtype=dtype, device=x_start.device, memory_format=memory_format)


def _diffusion_loss_fake(
    model_output: torch.Tensor, x_start: torch.Tensor, with_gradient: bool, **_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = torch.empty(x_start.shape[:1], dtype=torch.float32, device=x_start.device)
    error = torch.empty_like(model_output) if with_gradient else model_output.new_empty(0)
    return loss, torch.empty_like(loss), error


_q_sample = Operator(
    "q_sample",
    f"{_IMAGES}, {_OPTIONS}, ScalarType dtype, bool channels_last",
    returns="x_t",
    fake=_q_sample_fake,
    triton=f"{__package__}.triton",
    native=True,
)
_diffusion_loss = Operator(
    "diffusion_loss",
    f"Tensor model_output, {_IMAGES}, {_OPTIONS}, bool with_gradient",
    returns="loss, factor, error",
    fake=_diffusion_loss_fake,
    backward="error, factor, grad",
    gradients="model_output",
    maps="model_output",
    contiguous_grad=True,
    triton=f"{__package__}.triton",
    native=True,
)


def q_sample(
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | Noise | None = None,
    *,
    seed: int | torch.Tensor | None = None,
    normalize: bool = False,
    flip: torch.Tensor | None = None,
    offset_noise_strength: float = 0.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    for_network: bool = False,
) -> torch.Tensor:
    """x_t = a·x0 + b·ε (Ho et al. 2020, eq. 4).

    Args:
        x_start: (B, ...) floating point, or uint8, which is divided by 255; channels are the second dimension.
        t: (B,) int64. Outside [0, T) its image becomes NaN and nothing is read outside the table.
        table: (T, 2) floating point, columns a, b.
        noise: exactly this ε, shape of x_start; None generates it: the noise function of (seed, STREAM_TRAINING,
            sample = batch index, step 0), in x_start's dtype. A `ddpm_fast.noise.Noise` says either, with its offset;
            seed and offset_noise_strength are not given then.
        seed: an int of 64 bits or a one-element int64 tensor; needed where noise or its offset is generated.
        normalize: map x0 from [0, 1] to [−1, 1].
        flip: (B,) bool or uint8: mirror the image left to right, before the noise is added.
        offset_noise_strength: ε gains this times one normal number per image and channel, of STREAM_OFFSET.
        dtype: of the result; None is the widest of x_start, table and noise.
        memory_format: of the result, torch.contiguous_format or torch.channels_last; None is x_start's.
        for_network: the result is read by a convolution and by nothing else. Where dtype is None it is that of autocast
            or float32, and on CUDA the memory format is channels_last, in which convolutions are fastest there.

    Returns:
        x_t, shape of x_start.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    noise = as_noise(noise, seed, offset_noise_strength)
    check_images(x_start, t, table, noise, flip, columns=("a", "b"))
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format must be contiguous_format, channels_last or None, got {memory_format}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type or None, got {dtype}")
    if for_network:
        memory_format = _format_for_network(x_start) if memory_format is None else memory_format
        dtype = autocast_dtype(x_start.device.type) if dtype is None else dtype
    options = {"normalize": normalize, "flip": flip, "dtype": dtype, "memory_format": memory_format}
    return with_noise(_q_sample_op, (x_start, t, table), noise, options)


def diffusion_loss(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | Noise | None = None,
    *,
    seed: int | torch.Tensor | None = None,
    normalize: bool = False,
    flip: torch.Tensor | None = None,
    offset_noise_strength: float = 0.0,
) -> torch.Tensor:
    """w · mean((out − (c·ε + d·x0))²) of each sample (Ho et al. 2020, eq. 14, for every objective).

    The kernels are differentiable in model_output, once; the reference in everything, as often as wanted.

    Args:
        model_output: (B, ...), of x_start's shape, any floating point dtype; the loss is computed in float32 at least.
        table: (T, 3) floating point, columns c, d, w.
        others: see `q_sample`; the same noise, seed and options mean the same x0 and ε as there.

    Returns:
        (B,) losses.

    Raises:
        TypeError, ValueError: an argument does not match its description.
    """
    noise = as_noise(noise, seed, offset_noise_strength)
    check_images(x_start, t, table, noise, flip, columns=("c", "d", "w"))
    if x_start.ndim < 2:
        raise ValueError(f"x_start must have at least two dimensions, got {tuple(x_start.shape)}")
    if not isinstance(model_output, torch.Tensor) or not model_output.is_floating_point():
        got = getattr(model_output, "dtype", type(model_output).__name__)
        raise TypeError(f"model_output must be a floating point tensor, got {got}")
    if model_output.shape != x_start.shape or model_output.device != x_start.device:
        raise ValueError(
            f"model_output must have x_start's shape {tuple(x_start.shape)} and device {x_start.device}, "
            f"got {tuple(model_output.shape)} on {model_output.device}"
        )
    return with_noise(
        _diffusion_loss_op, (model_output, x_start, t, table), noise, {"normalize": normalize, "flip": flip}
    )


def _format_for_network(x_start: torch.Tensor) -> torch.memory_format | None:
    """channels_last where the device's convolutions are fastest with it and the kernels can write it."""
    # Counts on meta tensors are to be those of CUDA.
    is_accelerated = x_start.device.type in ("cuda", "meta") and x_start.ndim == 4
    return torch.channels_last if is_accelerated and x_start.shape[1] <= MAX_CHANNELS else None


def _q_sample_by(operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(
        x_start: torch.Tensor,
        t: torch.Tensor,
        table: torch.Tensor,
        noise: torch.Tensor | None,
        *,
        seed: torch.Tensor | None,
        normalize: bool,
        flip: torch.Tensor | None,
        offset_noise_strength: float,
        dtype: torch.dtype | None,
        memory_format: torch.memory_format | None,
    ) -> torch.Tensor:
        if dtype is None:
            dtype = widest_dtype(table, x_start, noise)
        options = (normalize, offset_noise_strength, dtype, _writes_channels_last(x_start, memory_format))
        return operator(x_start, t, table, noise, seed, flip, *options)

    return run


def _diffusion_loss_by(operator: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., torch.Tensor]:
    def run(
        model_output: torch.Tensor,
        x_start: torch.Tensor,
        t: torch.Tensor,
        table: torch.Tensor,
        noise: torch.Tensor | None,
        *,
        seed: torch.Tensor | None,
        normalize: bool,
        flip: torch.Tensor | None,
        offset_noise_strength: float,
    ) -> torch.Tensor:
        with_gradient = torch.is_grad_enabled() and model_output.requires_grad
        options = (normalize, offset_noise_strength, with_gradient)
        return operator(model_output, x_start, t, table, noise, seed, flip, *options)[0]

    return run


def _writes_channels_last(x_start: torch.Tensor, memory_format: torch.memory_format | None) -> bool:
    if memory_format is not None:
        return memory_format == torch.channels_last
    return not x_start.is_contiguous() and x_start.is_contiguous(memory_format=torch.channels_last)


def _triton_q_sample_refuses(
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    flip: torch.Tensor | None,
    offset_noise_strength: float,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    **others: object,
) -> str | None:
    reason = why_not_by_triton(x_start) or why_not_images(x_start, t, table, noise, flip)
    if reason is not None:
        return reason
    if dtype == torch.float64:
        return "dtype is torch.float64, and the kernels compute in float32"
    return why_not_channels(x_start, _writes_channels_last(x_start, memory_format) or offset_noise_strength > 0)


def _triton_diffusion_loss_refuses(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    flip: torch.Tensor | None,
    offset_noise_strength: float,
    **others: object,
) -> str | None:
    reason = why_not_by_triton(x_start) or why_not_images(x_start, t, table, noise, flip)
    if reason is not None:
        return reason
    reason = why_not_tensor("model_output", model_output, KERNEL_DTYPES)
    if reason is not None:
        return reason
    return why_not_channels(x_start, not model_output.is_contiguous() or offset_noise_strength > 0)


def _native_q_sample_refuses(
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    flip: torch.Tensor | None,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
    **others: object,
) -> str | None:
    reason = why_not_by_native(x_start) or why_not_images(x_start, t, table, noise, flip)
    if reason is not None:
        return reason
    if dtype is not None and dtype not in KERNEL_DTYPES:
        return f"dtype is {dtype}, and the kernels compute in float32"
    if memory_format == torch.channels_last and x_start.ndim != 4:
        return f"x_start has {x_start.ndim} dimensions, and only images (B, C, H, W) can be channels-last"
    return None


def _native_diffusion_loss_refuses(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None,
    *,
    flip: torch.Tensor | None,
    **others: object,
) -> str | None:
    reason = why_not_by_native(x_start) or why_not_images(x_start, t, table, noise, flip)
    return why_not_tensor("model_output", model_output, KERNEL_DTYPES) if reason is None else reason


_DEFAULTS = {
    "seed": None,
    "normalize": False,
    "flip": None,
    "offset_noise_strength": 0.0,
    "dtype": None,
    "memory_format": None,
}


def _example(columns: int) -> Callable[[torch.device], tuple[tuple, dict]]:
    def example(device: torch.device) -> tuple[tuple, dict]:
        image = torch.zeros(2, 3, 8, 8, device=device)
        t = torch.zeros(2, dtype=torch.int64, device=device)
        table = torch.zeros(10, columns, device=device)
        if columns == 2:
            return (image, t, table, image), _DEFAULTS
        options = {name: value for name, value in _DEFAULTS.items() if name not in ("dtype", "memory_format")}
        return (image, image, t, table, image), options

    return example


_q_sample_op = Op(
    "q_sample",
    [
        Implementation("triton", _q_sample_by(_q_sample.triton), _triton_q_sample_refuses),
        Implementation("native", _q_sample_by(_q_sample.native), _native_q_sample_refuses),
        Implementation("reference", reference.q_sample),
    ],
    _example(2),
)
_diffusion_loss_op = Op(
    "diffusion_loss",
    [
        Implementation("triton", _diffusion_loss_by(_diffusion_loss.triton), _triton_diffusion_loss_refuses),
        Implementation("native", _diffusion_loss_by(_diffusion_loss.native), _native_diffusion_loss_refuses),
        Implementation("reference", reference.diffusion_loss),
    ],
    _example(3),
)
