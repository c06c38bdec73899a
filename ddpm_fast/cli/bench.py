"""`ddpm-fast bench`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddpm_fast.cli.options import (
    Folder,
    Int,
    Integer,
    Integers,
    Text,
    UserError,
    check_positive,
    checkpoint_file,
    device_of,
    image_size_of,
)

Baseline = Literal[
    "upstream",
    "upstream-channels-last",
    "upstream-compiled",
    "upstream-max-autotune",
    "diffusers",
    "ours-low-memory",
    "ours-step-by-step",
]


@dataclasses.dataclass
class Bench:
    """Time a configuration here against upstream, denoising-diffusion-pytorch, which must be installed.

    Both are timed in interleaved rounds of one process with the same weights, images and precision, after their output,
    loss and gradients were found equal. Prints a table, says which implementation each op took and why, and draws a
    bar chart. With --model, a network of another package is timed as it is and accelerated.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[CHECKPOINT]")] = None
    """Take the configuration of this checkpoint or results folder; the options below override it."""
    model: Annotated[
        Text,
        tyro.conf.arg(
            help="Time this network of another package, as it is and accelerated: diffusers (the DDPM paper's for "
            "CIFAR-10), diffusers:FOLDER (of a saved model or pipeline), torchcfm, edm, edm-adm, upstream, "
            "rectified-flow."
        ),
    ] = None
    dim: Integer = None
    """Width of the network's first stage (64)."""
    dim_mults: Integers = None
    """Width of each stage in multiples of --dim (1 2 4 8)."""
    channels: Integer = None
    """1 grey, 3 RGB, 4 RGBA, or any other number (3)."""
    image_size: Integers = None
    """Height and width, or one number for both (on a GPU 128, on a CPU 32)."""
    batch_size: Integer = None
    """Images per step (on a GPU 16, on a CPU 4)."""
    amp: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision, on both sides."""
    steps: Int = 10
    """Steps of each sampling run that is timed."""
    against: tuple[Baseline, ...] = ("upstream", "upstream-channels-last")
    """Baselines to compare with; the compiled ones take minutes to compile."""
    seconds: float = 40.0
    """Seconds of timing, without preparation."""
    profile: bool = False
    """Also profile ours: the least time that the machine allows, our multiple of it, and the slowest operators."""
    out: Path = Path("bench.png")
    """The bar chart."""
    json: Annotated[Folder, tyro.conf.arg(metavar="FILE")] = None
    """Also write every number here."""
    device: Text = None
    """Such as cpu or cuda:0; by default the first accelerator."""
    debug: bool = False
    """Show the traceback of an error."""


def run(options: Bench) -> None:
    """`ddpm-fast bench`."""
    from ddpm_fast.measure import baselines, command

    if options.model is not None:
        run_foreign(options)
        return
    check_positive(steps=options.steps, batch_size=options.batch_size, channels=options.channels)
    if options.seconds <= 0:
        raise UserError(f"--seconds must be positive; got {options.seconds}")
    reason = baselines.why_not("upstream") if "upstream" in options.against else None
    if reason is not None:
        raise UserError(f"{reason}, and --against upstream needs it")
    device = device_of(options.device)
    given = {
        "dim": options.dim,
        "dim_mults": options.dim_mults,
        "channels": options.channels,
        "steps": options.steps,
        "image_size": image_size_of(options.image_size),
        "batch": options.batch_size,
        "dtype": None if options.amp == "no" else options.amp,
    }
    checkpoint = None if options.checkpoint is None else checkpoint_file(options.checkpoint)
    configuration = command.configuration_from(checkpoint, given, device)
    command.run(
        configuration,
        device,
        against=list(options.against),
        seconds=options.seconds,
        out=options.out,
        json_file=options.json,
        with_profile=options.profile,
    )


def run_foreign(options: Bench) -> None:
    """`ddpm-fast bench --model NAME`."""
    from ddpm_fast.measure import command, foreign

    model = options.model or ""
    ours = ("checkpoint", "dim", "dim_mults", "channels", "image_size", "profile")
    given = [name.replace("_", "-") for name in ours if getattr(options, name)]
    if given:
        raise UserError(f"--model brings its own network and images; leave out {', '.join(given)}")
    check_positive(batch_size=options.batch_size)
    if options.seconds <= 0:
        raise UserError(f"--seconds must be positive; got {options.seconds}")
    reason = foreign.why_not(model)
    if reason is not None:
        raise UserError(f"--model {model}: {reason}")
    device = device_of(options.device)
    command.run_foreign(
        model,
        device,
        batch=options.batch_size or (16 if device.type == "cuda" else 4),
        dtype="fp32" if options.amp == "no" else options.amp,
        seconds=options.seconds,
        out=options.out,
        json_file=options.json,
    )
