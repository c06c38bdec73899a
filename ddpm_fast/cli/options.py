"""What the commands share: types of options, and checks of what was given. Heavy imports stand in functions."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddpm_fast.diffusion.samplers import SAMPLERS


def _unset(kind, metavar):
    """An option of this type that may be left out, without the word None in the help."""
    return Annotated[kind | None, tyro.conf.arg(metavar=metavar, help_behavior_hint="")]


Folder = _unset(Path, "FOLDER")
Text = _unset(str, "NAME")
Integer = _unset(int, "INT")
Integers = _unset(tuple[int, ...], "INT ...")
Number = _unset(float, "FLOAT")
YesNo = _unset(bool, "True|False")
Channels = _unset(Literal[1, 3, 4], "1|3|4")
Schedule = _unset(Literal["linear", "cosine", "sigmoid"], "linear|cosine|sigmoid")
Sampler = _unset(Literal[tuple(SAMPLERS)], "|".join(SAMPLERS))


class UserError(ValueError):
    """Something to put right on the command line."""


def checkpoint_file(path):
    """The file itself, or the latest checkpoint of a results folder."""
    from ddpm_fast.training.checkpoint import find_latest

    if not path.is_dir():
        return path
    latest = find_latest(path)
    if latest is None:
        raise UserError(f"folder {path} holds no checkpoint")
    return latest[0]


def image_size_of(numbers):
    """None, one number, or a pair (height, width) from the numbers of --image-size."""
    if numbers is None:
        return None
    if len(numbers) not in (1, 2):
        raise UserError(f"--image-size takes one number or two (height width); got {len(numbers)}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def device_of(name):
    import torch

    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"--device must be such as cpu or cuda:0; got {name!r}") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
        return device
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def check_positive(**values):
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
