"""Forward diffusion and its loss in plain torch: the specification.

It computes in the widest of its inputs' dtypes, so that float64 tables and images give a truth to measure float32
against.
"""

from __future__ import annotations

import torch

from ddpm_fast import noise as noise_function


def lookup(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Rows of a per-timestep table: (T, K), (B,) int64 → (B, K).

    A t outside [0, T) gives NaN and reads nothing outside the table. On CUDA that costs no synchronisation and does not
    poison the process as a device-side assertion would; on the CPU callers check the values first.
    """
    num_timesteps = table.shape[0]
    inside = (t >= 0) & (t < num_timesteps)
    rows = table[t.clamp(0, num_timesteps - 1)]
    return torch.where(inside[:, None], rows, float("nan"))


def _columns(table: torch.Tensor, t: torch.Tensor, ndim: int) -> tuple[torch.Tensor, ...]:
    """Each column of the rows at t, shaped (B, 1, ..., 1) to broadcast over `ndim` dimensions."""
    return tuple(column.reshape(-1, *(1,) * (ndim - 1)) for column in lookup(table, t).unbind(1))


def prepared_images(
    x_start: torch.Tensor, normalize: bool, flip: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """x0 as the model sees it: 8-bit images divided by 255, mapped from [0, 1] to [−1, 1], flipped, each where asked.

    Args:
        x_start: (B, ...) uint8 or floating point.
        dtype: of the result where x_start is uint8 or `normalize` computes; else x_start stays as it is.
    """
    x = x_start
    if x.dtype == torch.uint8:
        x = x.to(dtype) / 255
    if normalize:
        x = x.to(dtype) * 2 - 1
    if flip is not None:
        x = torch.where((flip != 0).reshape(-1, *(1,) * (x.ndim - 1)), x.flip(-1), x)
    return x


def training_noise(
    x_start: torch.Tensor, noise: torch.Tensor | None, seed: torch.Tensor | None, strength: float, dtype: torch.dtype
) -> torch.Tensor:
    """ε as given, or the noise function's; with one normal number per image and channel added (Guttenberg 2023).

    Args:
        x_start: (B, C, ...); made noise has its dtype, or `dtype` where it is uint8.
        noise: shape of x_start, or None to make it from `seed`: stream STREAM_TRAINING, first sample 0, step 0.
        strength: of the offset, stream STREAM_OFFSET; 0 for none.
    """
    if noise is None:
        made = x_start.dtype if x_start.is_floating_point() else dtype
        noise = noise_function.normal(
            x_start.shape, seed=seed, stream=noise_function.STREAM_TRAINING, device=x_start.device, dtype=made
        )
    if strength > 0:
        offset = noise_function.normal(
            noise.shape[:2], seed=seed, stream=noise_function.STREAM_OFFSET, device=noise.device, dtype=noise.dtype
        )
        noise = noise + strength * offset.reshape(*offset.shape, *(1,) * (noise.ndim - 2))
    return noise


def compute_dtype(table: torch.Tensor, *others: torch.Tensor | None) -> torch.dtype:
    """The widest dtype of the table and those others that are floating point."""
    dtype = table.dtype
    for tensor in others:
        if tensor is not None and tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def q_sample(
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    normalize: bool = False,
    flip: torch.Tensor | None = None,
    offset_noise_strength: float = 0.0,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """See `ddpm_fast.ops.forward_diffusion.op.q_sample`."""
    wide = compute_dtype(table, x_start, noise)
    a, b = _columns(table, t, x_start.ndim)
    x = prepared_images(x_start, normalize, flip, wide)
    x_t = (a * x + b * training_noise(x_start, noise, seed, offset_noise_strength, wide)).to(dtype or wide)
    return x_t if memory_format is None else x_t.contiguous(memory_format=memory_format)


def diffusion_loss(
    model_output: torch.Tensor,
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: torch.Tensor | None = None,
    *,
    seed: torch.Tensor | None = None,
    normalize: bool = False,
    flip: torch.Tensor | None = None,
    offset_noise_strength: float = 0.0,
) -> torch.Tensor:
    """See `ddpm_fast.ops.forward_diffusion.op.diffusion_loss`."""
    wide = compute_dtype(table, x_start, noise)
    c, d, w = _columns(table, t, x_start.ndim)
    x = prepared_images(x_start, normalize, flip, wide)
    target = c * training_noise(x_start, noise, seed, offset_noise_strength, wide) + d * x
    error = model_output.to(torch.promote_types(model_output.dtype, torch.float32)) - target
    return w.reshape(-1) * error.square().flatten(1).mean(dim=1)
