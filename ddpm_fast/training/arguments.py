"""The arguments of a trainer: their checks, and what it chooses where it is given none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddpm_fast.diffusion.discrete_process import DiscreteProcess
from ddpm_fast.diffusion.xm import process_of
from ddpm_fast.runtime.compile_ahead import count_processors
from ddpm_fast.runtime.plain import as_flag, as_int, as_number, plain, shown
from ddpm_fast.training.data import Dataset, DigitsDataset
from ddpm_fast.training.pixels import Color
from ddpm_fast.training.prepared import PreparedDataset, is_prepared
from ddpm_fast.training.trained import network_of

# What the trainer reads of a diffusion process, besides what every module has.
_ATTRIBUTES = ("channels", "image_size", "sample")
# And of one in timesteps, before the first step instead of at its first sample.
_ATTRIBUTES_OF_TIMESTEPS = ("objective", "num_timesteps", "is_ddim_sampling")
_PRECISIONS = ("no", "fp16", "bf16")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def check_process(process: Any) -> None:
    """Raise TypeError or ValueError for a process that lacks what the trainer reads of it."""
    if not isinstance(process, nn.Module):
        raise TypeError(f"diffusion_model must be a module such as GaussianDiffusion; got {type(process).__name__}")
    wanted = (*_ATTRIBUTES, *(_ATTRIBUTES_OF_TIMESTEPS if isinstance(process_of(process), DiscreteProcess) else ()))
    missing = [name for name in wanted if not hasattr(process, name)]
    if missing:
        raise TypeError(
            f"diffusion_model must have the attributes {', '.join(wanted)}; {type(process).__name__} lacks "
            f"{', '.join(missing)}"
        )
    height, width = size_of(process)
    factor = getattr(network_of(process), "downsample_factor", 1)
    if isinstance(factor, int) and (height % factor or width % factor):
        raise ValueError(
            f"diffusion_model.image_size must be divisible by {factor} for its network; got ({height}, {width})"
        )


def size_of(process: Any) -> tuple[int, int]:
    """(height, width) of a process, as ints."""
    size = process.image_size
    if size is None:
        raise ValueError("diffusion_model.image_size is None; set it to (height, width) before training")
    entries = size.tolist() if hasattr(size, "tolist") else size
    if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) != 2:
        raise ValueError(f"diffusion_model.image_size must be a pair (height, width); got {shown(size)}")
    height, width = (as_int("diffusion_model.image_size", entry, 1) for entry in entries)
    return height, width


def pair_of_betas(betas: Any) -> tuple[float, float]:
    """Adam's betas as plain numbers."""
    values = plain("adam_betas", betas)
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise ValueError(f"adam_betas must be two numbers; got {shown(betas)}")
    first, second = (float(as_number("adam_betas", value, 0, 1)) for value in values)
    if 1 in (first, second):
        raise ValueError(f"adam_betas must be less than 1; got {shown(betas)}")
    return first, second


def choose_precision(amp: Any, kind: Any) -> str:
    """The name of accelerate's precision; None chooses."""
    if amp is None:
        amp = torch.cuda.is_available() and _has_bf16()
    if not as_flag("amp", amp):
        return "no"
    if kind is None:
        return "bf16" if _has_bf16() or not torch.cuda.is_available() else "fp16"
    if kind not in _PRECISIONS:
        raise ValueError(f"mixed_precision_type must be one of {', '.join(_PRECISIONS)}; got {shown(kind)}")
    return str(kind)


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def mode_of(channels: int | None) -> str | None:
    """What images of so many channels are converted to; None: they stay as they are."""
    return None if channels is None else _MODES.get(channels)


def as_dataset(
    folder: Any,
    image_size: tuple[int, int],
    background: Color,
    *,
    convert_image_to: str | None,
    convert_cond_image_to: str | None,
    **of_folder: Any,
) -> Any:
    """The dataset of a path; `of_folder` are arguments of `Dataset`, None where none was given."""
    of_folder = {name: value for name, value in of_folder.items() if value is not None}
    if is_prepared(folder):
        folder = PreparedDataset(folder)
    if isinstance(folder, (str, os.PathLike)):
        return Dataset(
            folder,
            image_size,
            convert_image_to=convert_image_to,
            convert_cond_image_to=convert_cond_image_to,
            background=background,
            dtype=None,
            **of_folder,
        )
    if not hasattr(folder, "__len__") or not hasattr(folder, "__getitem__"):
        raise TypeError(f"folder must be a path or a map-style dataset of images; got {type(folder).__name__}")
    for name, value in of_folder.items():
        raise ValueError(f"{name} is for a folder of images, and folder is a dataset; got {name}={value!r}")
    return folder


def choose_workers(num_workers: int | None, dataset: object, world_size: int) -> int:
    """The number given, or up to 8 of this process's share of the processors; images in memory need none.

    Of a prepared file one process reads ahead.
    """
    if num_workers is not None:
        return num_workers
    if isinstance(dataset, (DigitsDataset, PreparedDataset)):
        return 0 if isinstance(dataset, DigitsDataset) else 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, min(8, count_processors() // local_processes))
