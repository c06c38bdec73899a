"""`ddpm-fast sample`."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddpm_fast.cli.options import (
    Folder,
    Int,
    Integer,
    Integers,
    Number,
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

    from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion

File = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]

# A strip keeps every step of the few trajectories it shows; more than this is not held in memory.
_MAX_TRAJECTORY_BYTES = 2**30
_STRIP_ROWS = 4


@dataclasses.dataclass
class Sample:
    """Draw images from a checkpoint.

    Takes checkpoints of ddpm-fast and of denoising-diffusion-pytorch's Trainer (give --image-size for those). Writes a
    grid, and a strip that shows how the first few images come out of the noise.
    """

    checkpoint: File
    """A file such as results/model-last.pt, or a results folder: the checkpoint with the largest step in it. Also
    results/7 for the milestone model-7.pt."""
    out: Path = Path("samples.png")
    """The grid, a PNG, JPEG, ... by its ending; the strip is written next to it as NAME-strip.png.

    Of other than 1, 3 or 4 channels each is a grey tile, and NAME.npy has the values."""
    num_samples: Int = 64
    """Number of images."""
    batch_size: Int = 64
    """Images drawn at once; does not change them."""
    seed: Integer = None
    """The same seed draws the same images."""
    sampler: Sampler = None
    """Sampler; by default the checkpoint's."""
    sampling_timesteps: Integer = None
    """Steps of the sampler; by default the checkpoint's."""
    eta: Number = None
    """Noise of the DDIM sampler: 0 none, 1 as much as ddpm."""
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


def run(options: Sample) -> None:
    """`ddpm-fast sample`."""
    import torch

    from ddpm_fast.training.checkpoint import load_checkpoint
    from ddpm_fast.training.images_out import check_ending, check_grid, save_image_grid, save_trajectory_strip

    check_positive(num_samples=options.num_samples, batch_size=options.batch_size, scale=options.scale)
    _check_places(options)
    check_ending(options.out)
    overrides: dict[str, Any] = {
        "image_size": image_size_of(options.image_size),
        "sampler": options.sampler,
        "sampling_timesteps": options.sampling_timesteps,
        "ddim_sampling_eta": options.eta,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    path = checkpoint_file(options.checkpoint)
    loaded = load_checkpoint(path, map_location=device_of(options.device), **given)
    diffusion = (loaded.ema.ema_model if options.weights == "ema" else loaded.diffusion).eval()
    if diffusion.image_size is None:
        raise UserError(f"{path} does not record image_size; give --image-size")
    shape = (options.num_samples, diffusion.channels, *diffusion.image_size)
    check_grid(options.out, shape, _columns(options.num_samples), scale=options.scale)
    strip = options.out.with_name(f"{options.out.stem}-strip.png")
    _prepare_places(options, [options.out, strip])
    seed = torch.seed() if options.seed is None else options.seed

    images = _draw(diffusion, options.num_samples, options.batch_size, seed)
    if not images.isfinite().all():
        raise UserError(f"the samples of {path} are not finite (NaN or infinity); nothing was written")
    save_image_grid(images, options.out, nrow=_columns(options.num_samples), scale=options.scale)
    trajectories = diffusion.sample(_strip_rows(diffusion, options), True, seed=seed, progress=False)
    save_trajectory_strip(trajectories.clamp(0, 1), strip, scale=options.scale)
    print(f"{options.num_samples} samples (seed {seed}) of step {loaded.step}: {options.out}, {strip}")
    if options.raw is not None:
        for index, image in enumerate(images):
            save_image_grid(image[None], options.raw / f"{index:05}.png", scale=options.scale)
        print(f"each image on its own: {options.raw}")


class _JustTrying(Exception):
    """Ends a trial of `write_atomically`, which then leaves no file."""


def _check_places(options: Sample) -> None:
    """Raise UserError for an --out that is a folder and a --raw that is none."""
    if options.out.is_dir():
        raise UserError(f"--out {options.out} is a folder; it must be a file such as {options.out / 'samples.png'}")
    if options.raw is not None and options.raw.exists() and not options.raw.is_dir():
        raise UserError(f"--raw {options.raw} is a file; it must be a folder")


def _prepare_places(options: Sample, pictures: list[Path]) -> None:
    """Make the folders of the pictures and of --raw, and try to write there; OSError or UserError if that fails."""
    from ddpm_fast.training.atomic_files import write_atomically

    single = [] if options.raw is None else [options.raw / "00000.png"]
    for path in [*pictures, *single]:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(_JustTrying), write_atomically(path):
            raise _JustTrying
    for path in [*pictures, *single]:
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a picture would be written there")


def _draw(diffusion: "GaussianDiffusion", count: int, batch_size: int, seed: int) -> "torch.Tensor":
    """`count` images (N, C, h, w) on the CPU; the batch size does not change them."""
    import torch

    starts = range(0, count, batch_size)
    batches = [diffusion.sample(min(batch_size, count - start), seed=seed, start_index=start).cpu() for start in starts]
    return torch.cat(batches)


def _strip_rows(diffusion: "GaussianDiffusion", options: Sample) -> int:
    """How many trajectories to show: four, or fewer where holding all their steps would take too much memory."""
    height, width = diffusion.image_size
    bytes_each = 4 * diffusion.channels * height * width * (diffusion.sampling_timesteps + 1)
    return max(1, min(_STRIP_ROWS, options.num_samples, _MAX_TRAJECTORY_BYTES // bytes_each))


def _columns(count: int) -> int:
    """Columns of a grid that is about square."""
    return max(1, round(count**0.5 + 0.49))
