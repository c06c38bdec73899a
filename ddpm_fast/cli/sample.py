"""`ddpm-fast sample`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddpm_fast.cli.asked import AskedOptions, Drawing, drawing_of, strip_of
from ddpm_fast.cli.inputs import prepare_places
from ddpm_fast.cli.options import (
    Folder,
    Int,
    Integer,
    Integers,
    Number,
    Process,
    Sampler,
    Text,
    UserError,
    check_positive,
    checkpoint_file,
    device_of,
    image_size_of,
)

if TYPE_CHECKING:
    import torch

    from ddpm_fast.diffusion.diffusion_process import DiffusionProcess

Options = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...", help_behavior_hint="")]
File = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]

# A strip keeps every step of the few trajectories it shows; more than this is not held in memory.
_MAX_TRAJECTORY_BYTES = 2**30
_STRIP_ROWS = 4


@dataclasses.dataclass
class Sample:
    """Draw images from a checkpoint.

    Takes checkpoints of ddpm-fast and of denoising-diffusion-pytorch's Trainer (give --image-size for those). Writes a
    grid, and a strip that shows how the first few images come out of the noise. Of a checkpoint with classes the grid
    has a row for each class that is asked for.
    """

    checkpoint: File
    """A file such as results/model-last.pt, a results folder (its largest step), or results/7 for model-7.pt."""
    out: Annotated[
        Path,
        tyro.conf.arg(
            help="The grid, a PNG, JPEG, ... by its ending; the strip is written next to it as NAME-strip.png. Of "
            "other than 1, 3 or 4 channels each is a grey tile, and NAME.npy has the values."
        ),
    ] = Path("samples.png")
    num_samples: Integer = None
    """Number of images (64); with classes as many as fill their rows; at most as many as --upscale has."""
    batch_size: Int = 64
    """Images drawn at once; does not change them."""
    seed: Integer = None
    """The same seed draws the same images."""
    sampler: Sampler = None
    """Sampler; by default the checkpoint's, and with fewer --steps than it has timesteps the best for few steps."""
    spacing: Text = None
    """At which times it calls the network, such as karras:rho=5; by default what suits the sampler."""
    steps: Annotated[Integer, tyro.conf.arg(aliases=["--sampling-timesteps"])] = None
    """Steps of the sampler; by default the checkpoint's."""
    sampler_option: Options = ()
    """Options of the sampler, such as eta=0.5."""
    eta: Number = None
    """Noise of the DDIM sampler: 0 none, 1 as much as ddpm."""
    process: Process = None
    """The process of a state dict whose names do not tell it."""
    image_size: Integers = None
    """Height and width, or one number for both; needed if the checkpoint does not record it."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average of the weights, or the weights themselves."""
    scale: Int = 1
    """Draw each pixel as a square of this many."""
    raw: Folder = None
    """Also write each image to its own PNG in this folder."""
    device: Text = None
    """Such as cpu or cuda:0; by default the first accelerator."""
    debug: bool = False
    """Show the traceback of an error."""
    conditions: tyro.conf.OmitArgPrefixes[AskedOptions] = dataclasses.field(default_factory=AskedOptions)


def run(options: Sample) -> None:
    """`ddpm-fast sample`."""
    import torch

    from ddpm_fast.training.checkpoint import load_checkpoint
    from ddpm_fast.training.images_out import check_ending, check_grid, save_image_grid, save_trajectory_strip

    check_positive(batch_size=options.batch_size, scale=options.scale)
    if options.num_samples is not None:
        check_positive(num_samples=options.num_samples)
    _check_places(options)
    check_ending(options.out)
    if options.steps is not None:
        check_positive(steps=options.steps)
    path = checkpoint_file(options.checkpoint)
    loaded = load_checkpoint(
        path,
        process=options.process,
        image_size=image_size_of(options.image_size),
        map_location=device_of(options.device),
    )
    diffusion = (loaded.ema.ema_model if options.weights == "ema" else loaded.diffusion).eval()
    if diffusion.image_size is None:
        raise UserError(f"{path} does not record image_size; give --image-size")
    walk = _walk(diffusion, options)
    drawing, strip_drawings = (
        drawing_of(diffusion, options.conditions, options.num_samples),
        strip_of(diffusion, options.conditions),
    )
    calls = diffusion.network_calls(**walk)  # an option that does not fit ends the command here
    shape = (drawing.count, diffusion.channels, *diffusion.image_size)
    columns = drawing.columns * (1 if drawing.shown is None else 2)
    check_grid(options.out, shape, columns, scale=options.scale)
    has_strip = drawing.method.__name__ != "inpaint"
    strip, guidance_strip = (options.out.with_name(f"{options.out.stem}-{name}.png") for name in ("strip", "guidance"))
    pictures = [options.out, *([strip] if has_strip else []), *([guidance_strip] if strip_drawings else [])]
    prepare_places([*pictures, *([] if options.raw is None else [options.raw / "00000.png"])])
    seed = torch.seed() if options.seed is None else options.seed

    images = _draw(diffusion, drawing, options.batch_size, seed, walk)
    if not images.isfinite().all():
        raise UserError(f"the samples of {path} are not finite (NaN or infinity); nothing was written")
    shown = images if drawing.shown is None else torch.stack((drawing.shown, images), dim=1).flatten(0, 1)
    save_image_grid(shown, options.out, nrow=columns, scale=options.scale)
    if has_strip:
        whole = {"return_all_timesteps": True, "seed": seed, "progress": False, **walk}
        count = _strip_rows(diffusion, drawing.count, calls)
        parts = [drawing.draw(start, end, diffusion.device, **whole) for start, end in drawing.first(count)]
        trajectories = torch.cat(parts)
        save_trajectory_strip(trajectories.clamp(0, 1), strip, scale=options.scale)
    if strip_drawings:
        scales = [_draw(diffusion, one, options.batch_size, seed, walk) for one in strip_drawings]
        rows = torch.stack(scales, dim=1)  # (classes, scales, C, h, w)
        save_image_grid(rows.flatten(0, 1), guidance_strip, nrow=len(scales), scale=options.scale)
    written = ", ".join(map(str, pictures))
    print(f"{drawing.count} samples (seed {seed}) of step {loaded.step}: {written}")
    if options.raw is not None:
        for index, image in enumerate(images):
            save_image_grid(image[None], options.raw / f"{index:05}.png", scale=options.scale)
        print(f"each image on its own: {options.raw}")


def _check_places(options: Sample) -> None:
    """Raise UserError for an --out that is a folder and a --raw that is none."""
    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; it must be a file such as {options.out / 'samples.png'}")
    if options.raw is not None and options.raw.exists() and not options.raw.is_dir():
        raise UserError(f"--raw {options.raw} is a file; it must be a folder")


def _walk(diffusion: "DiffusionProcess", options: Sample) -> dict[str, Any]:
    """Arguments of `sample`: where only a number of steps is asked for, and it is small, the sampler for few steps."""
    from ddpm_fast.diffusion.samplers import FEW_STEPS

    of_sampler = dict(map(_option, options.sampler_option))
    if options.eta is not None:
        of_sampler["eta"] = options.eta
    sampler = options.sampler
    if sampler is None and diffusion.sampler is None and options.conditions.inpaint is None:
        if options.eta is not None:
            sampler = "ddim"
        elif options.steps is not None and options.steps < _many_steps(diffusion):
            sampler = FEW_STEPS
            print(f"{options.steps} steps with the sampler {sampler}, the best of few steps; --sampler takes another")
    walk = {
        "sampler": sampler,
        "spacing": options.spacing,
        "sampling_timesteps": options.steps,
        "sampler_options": {**diffusion.sampler_options, **of_sampler}
        if of_sampler and sampler is None
        else of_sampler,
    }
    return {name: value for name, value in walk.items() if value is not None and value != {}}


def _option(text: str) -> tuple[str, float | str]:
    """ "eta=0.5" → ("eta", 0.5); a word stays one."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise UserError(f"--sampler-option takes NAME=VALUE such as eta=0.5; got {text!r}")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def _many_steps(diffusion: "DiffusionProcess") -> int:
    """Fewer steps than these ask for a sampler of few: the timesteps of a process, else those of ancestral sampling."""
    timesteps = getattr(diffusion, "num_timesteps", None)
    if timesteps is not None:
        return timesteps
    return diffusion.sampling_timesteps if diffusion.default_sampler == "ddpm" else 0


def _draw(
    diffusion: "DiffusionProcess", drawing: Drawing, batch_size: int, seed: int, walk: dict[str, Any]
) -> "torch.Tensor":
    """The images (N, C, h, w) on the CPU; the batch size does not change them."""
    import torch

    ends = [min(start + batch_size, drawing.count) for start in range(0, drawing.count, batch_size)]
    starts = [0, *ends[:-1]]
    batches = [
        drawing.draw(start, end, diffusion.device, seed=seed, **walk).cpu()
        for start, end in zip(starts, ends, strict=True)
    ]
    return torch.cat(batches)


def _strip_rows(diffusion: "DiffusionProcess", count: int, calls: int) -> int:
    """How many trajectories to show: four, or fewer where holding all their steps would take too much memory."""
    height, width = diffusion.image_size
    bytes_each = 4 * diffusion.channels * height * width * (calls + 1)
    return max(1, min(_STRIP_ROWS, count, _MAX_TRAJECTORY_BYTES // bytes_each))
