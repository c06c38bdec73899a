"""What the ops on images and their noise share: checks, reasons for refusal, and the noise of a seed."""

from __future__ import annotations

import torch

from ddpm_fast import noise as noise_function
from ddpm_fast.noise import Noise
from ddpm_fast.ops.common.tables import widest_dtype
from ddpm_fast.runtime import extension, triton_launch
from ddpm_fast.runtime.dispatch import Op

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 64  # the tiles of channels-last images hold all channels
MAX_ELEMENTS = 2**31 - 2**16  # positions within a sample are 32-bit


def with_noise(op: Op, inputs: tuple, noise: Noise, options: dict) -> torch.Tensor:
    """Run an op whose last three inputs are x_start, t and a table; the reference stores the noise of a seed."""

    def arguments() -> tuple[tuple, dict]:
        seed = None if noise.seed is None else noise_function.seed_tensor(noise.seed, x_start.device)
        strength = noise.offset_noise_strength
        return (*inputs, noise.tensor), {"seed": seed, "offset_noise_strength": strength, **options}

    x_start, _, table = inputs[-3:]
    args, kwargs = arguments()
    implementation = op.choose(*args, **kwargs)
    if implementation.name == "reference" and noise.seed is not None:
        noise.store(x_start, widest_dtype(table, x_start))
        args, kwargs = arguments()
    return implementation.function(*args, **kwargs)


def as_noise(noise: torch.Tensor | Noise | None, seed: int | torch.Tensor | None, strength: float) -> Noise:
    """The three arguments as one value.

    Raises:
        ValueError: a `Noise` together with a seed or a strength, or neither noise nor seed.
    """
    if not isinstance(noise, Noise):
        return Noise(noise, seed, strength)
    if seed is not None or strength != 0.0:
        raise ValueError("seed and offset_noise_strength must not be given with a Noise, which has its own")
    return noise


def check_images(
    x_start: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    noise: Noise,
    flip: torch.Tensor | None,
    columns: tuple[str, ...],
) -> None:
    """The checks of every implementation; values on the device are not looked at."""
    epsilon, offset_noise_strength = noise.tensor, noise.offset_noise_strength
    for name, tensor in (("x_start", x_start), ("t", t), ("table", table), ("noise", epsilon), ("flip", flip)):
        if tensor is None and name in ("noise", "flip"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != x_start.device:
            raise ValueError(f"{name} must be on the device of x_start, {x_start.device}, got {tensor.device}")
    if not x_start.is_floating_point() and x_start.dtype != torch.uint8:
        raise TypeError(f"x_start must be floating point or uint8, got {x_start.dtype}")
    if t.dtype != torch.int64:
        raise TypeError(f"t must be int64, got {t.dtype}")
    if x_start.ndim < 1 or t.shape != x_start.shape[:1]:
        raise ValueError(f"t must have shape (B,) for x_start (B, ...), got {tuple(t.shape)}, {tuple(x_start.shape)}")
    if not table.is_floating_point():
        raise TypeError(f"table must be floating point, got {table.dtype}")
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] != len(columns):
        raise ValueError(
            f"table must have shape (T, {len(columns)}), columns {', '.join(columns)}, got {tuple(table.shape)}"
        )
    if epsilon is not None and (epsilon.shape != x_start.shape or not epsilon.is_floating_point()):
        raise ValueError(
            f"noise must be floating point of x_start's shape {tuple(x_start.shape)}, "
            f"got {epsilon.dtype} of {tuple(epsilon.shape)}"
        )
    if flip is not None and (flip.dtype not in (torch.bool, torch.uint8) or flip.shape != t.shape):
        raise ValueError(f"flip must be bool or uint8 of shape {tuple(t.shape)}, got {flip.dtype} {tuple(flip.shape)}")
    if offset_noise_strength > 0 and x_start.ndim < 2:
        raise ValueError(f"x_start must have channels for offset noise, got shape {tuple(x_start.shape)}")


def why_not_by_triton(x_start: torch.Tensor) -> str | None:
    reason = triton_launch.why_not_triton(x_start.device)
    if reason is not None:
        return reason
    if x_start.ndim != 4:
        return f"x_start has {x_start.ndim} dimensions, and the kernels read images (B, C, H, W)"
    if x_start.numel() and x_start[0].numel() > MAX_ELEMENTS:
        return f"an image has {x_start[0].numel()} elements, and the kernels count up to {MAX_ELEMENTS}"
    return None


def why_not_by_native(x_start: torch.Tensor) -> str | None:
    if x_start.device.type != "cpu":
        return f"tensors are on {x_start.device.type}, and native code runs on the CPU"
    if x_start.ndim < 2:
        return f"x_start has {x_start.ndim} dimensions, and native code reads (B, C, ...)"
    return extension.why_not(x_start.device)


def why_not_images(
    x_start: torch.Tensor, t: torch.Tensor, table: torch.Tensor, noise: torch.Tensor | None, flip: torch.Tensor | None
) -> str | None:
    """Why no kernel of this op can run on these inputs, in one clause; None where both can."""
    if x_start.numel() == 0:
        return "the batch is empty"
    if table.dtype != torch.float32:
        return f"table is {table.dtype}, and the kernels compute in float32"
    for name, tensor in (("t", t), ("table", table), ("flip", flip)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    for name, tensor, dtypes in (
        ("x_start", x_start, (*KERNEL_DTYPES, torch.uint8)),
        ("noise", noise, KERNEL_DTYPES),
    ):
        reason = None if tensor is None else why_not_tensor(name, tensor, dtypes)
        if reason is not None:
            return reason
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return f"a gradient of {name} is wanted, and the kernels have that of model_output only"
    return None


def why_not_tensor(name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if tensor.dtype not in dtypes:
        return f"{name} is {tensor.dtype}, and the kernels read {', '.join(str(d).split('.')[1] for d in dtypes)}"
    if not tensor.is_contiguous() and not tensor.is_contiguous(memory_format=torch.channels_last):
        return f"{name} is neither contiguous nor channels-last, its strides are {tuple(tensor.stride())}"
    return None


def why_not_channels(x_start: torch.Tensor, all_in_one_tile: bool) -> str | None:
    if all_in_one_tile and x_start.shape[1] > MAX_CHANNELS:
        return f"images have {x_start.shape[1]} channels, and the kernels' tiles hold up to {MAX_CHANNELS}"
    return None
