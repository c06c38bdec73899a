"""Types of options and checks of their values, shared by the commands. Heavy imports are in functions."""

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ddpm_fast.diffusion.processes import PROCESSES
from ddpm_fast.diffusion.samplers import SAMPLERS

if TYPE_CHECKING:
    import torch


def _integer(texts: list[str]) -> int:
    """An int from digits, or from a number without a fraction such as 1e5; tyro shows the ValueError."""
    try:
        number = Decimal(texts[0])
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite() or number.adjusted() > 30 or number != int(number):
        raise ValueError(f"{texts[0]!r} is no integer")
    return int(number)


# An int of the command line.
Int = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=_integer,
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    ),
]

# Options that may be left out, without the word None in the help.
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Integer = Annotated[Int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Integers = Annotated[tuple[Int, ...] | None, tyro.conf.arg(metavar="INT ...", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
YesNo = Annotated[bool | None, tyro.conf.arg(metavar="True|False", help_behavior_hint="")]
Words = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]
Numbers = Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="FLOAT ...", help_behavior_hint="")]
Range = Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH", help_behavior_hint="")]
Schedule = Annotated[
    Literal["linear", "cosine", "sigmoid"] | None,
    tyro.conf.arg(metavar="linear|cosine|sigmoid", help_behavior_hint=""),
]
Memory = Annotated[Literal["fast", "low"] | None, tyro.conf.arg(metavar="fast|low", help_behavior_hint="")]
Objective = Annotated[
    Literal["pred_v", "pred_noise", "pred_x0"] | None,
    tyro.conf.arg(metavar="pred_v|pred_noise|pred_x0", help_behavior_hint=""),
]
Precision = Annotated[
    Literal["no", "fp16", "bf16"] | None, tyro.conf.arg(metavar="no|fp16|bf16", help_behavior_hint="")
]


# A flag that is on, whose option is --no-NAME.
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


def one_of(names: tuple[str, ...]) -> object:
    """The type of an option that takes one of these words, or is left out."""
    return Annotated[Literal[names] | None, tyro.conf.arg(metavar="|".join(names), help_behavior_hint="")]


if TYPE_CHECKING:
    Sampler = str | None
    Process = str | None
else:  # the names that are registered
    Sampler = one_of(tuple(sorted(SAMPLERS)))
    Process = one_of(tuple(sorted(PROCESSES)))


class UserError(ValueError):
    """Something to put right on the command line."""


def checkpoint_file(path: Path) -> Path:
    """The file of a path, the latest checkpoint of a results folder, or the milestone that FOLDER/MILESTONE names.

    A bare milestone (7, last) is one of ./results, where `ddpm-fast train` writes by default.
    """
    from ddpm_fast.training.checkpoint_files import find_latest, one_file

    if not path.is_dir():
        folder = Path("results") if path.parent == Path() else path.parent
        is_milestone = path.suffix != ".pt"
        milestone = [folder / f"model-{path.name}.pt"] if is_milestone else []
        return one_file(path, [path, *milestone])
    latest = find_latest(path)
    if latest is None:
        raise UserError(f"folder {path} holds no checkpoint")
    return latest[0]


def image_size_of(numbers: tuple[int, ...] | None) -> int | tuple[int, int] | None:
    """None, one number, or a pair (height, width) from the numbers of --image-size."""
    if numbers is None:
        return None
    if len(numbers) not in (1, 2):
        raise UserError(f"--image-size takes one number or two (height width); got {len(numbers)}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def device_of(name: str | None) -> "torch.device":
    """The device of --device, or the first accelerator."""
    import torch

    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"--device must be such as cpu or cuda:0; got {name!r}") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices")
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def check_positive(**values: int | None) -> None:
    """Raise UserError for a number below 1, by the name of its option; None was not given."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
