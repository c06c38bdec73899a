"""`ddpm-fast likelihood`."""

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddpm_fast.cli.inputs import Images, Loaded, load_process, prepare_places
from ddpm_fast.cli.labels import LabelOptions
from ddpm_fast.cli.options import Int, Integer, Integers, Text, UserError, check_positive

if TYPE_CHECKING:
    from ddpm_fast.diffusion.likelihood import BitsPerDim

File = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
Data = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
Variance = Annotated[Literal["small", "large"] | None, tyro.conf.arg(metavar="small|large", help_behavior_hint="")]


@dataclasses.dataclass
class Likelihood:
    """Measure in bits per dimension how well a checkpoint explains images, as Ho et al. 2020 report it.

    The number is the variational bound: a code of at most so many bits per channel of a pixel holds the image without
    loss. Writes the curves of rate and distortion (their figure 5) as a picture and a table, and a table of the images.
    A run that was stopped goes on where it was. Of a network with classes each image is coded with its own.
    """

    checkpoint: File
    """A file such as results/model-last.pt, or a results folder, or results/7 for the milestone model-7.pt."""
    data: Data
    """A folder of images, a file that `ddpm-fast prepare` wrote, or the word digits."""
    num_images: Integer = None
    """Take this many, evenly spaced; by default all."""
    batch_size: Int = 64
    """Images at once; does not change the numbers."""
    timesteps: Integer = None
    """Length of the chain; fewer steps have a bound of their own (the checkpoint's; in continuous time 1000)."""
    variance: Variance = None
    """Of a reverse step: small is the posterior's, large is beta; by default small, or what the network gives."""
    seed: Int = 0
    """Of the noise."""
    out: Path = Path("likelihood.png")
    """The picture of rate and distortion."""
    csv: Path = Path("likelihood.csv")
    """The same as a table, a row per timestep; NAME-images.csv beside it has a row per image."""
    image_size: Integers = None
    """Height and width, or one number for both; needed if the checkpoint does not record it."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average of the weights, or the weights themselves."""
    device: Text = None
    """Such as cpu or cuda:0; by default the first accelerator."""
    debug: bool = False
    """Show the traceback of an error."""
    conditions: tyro.conf.OmitArgPrefixes[LabelOptions] = dataclasses.field(default_factory=LabelOptions)


def run(options: Likelihood) -> None:
    """`ddpm-fast likelihood`."""
    from ddpm_fast.diffusion.likelihood import rate_distortion
    from ddpm_fast.measure.rate_distortion import plot_rate_distortion
    from ddpm_fast.training.images_out import check_ending

    check_positive(batch_size=options.batch_size)
    for name in ("num_images", "timesteps"):
        if getattr(options, name) is not None:
            check_positive(**{name: getattr(options, name)})
    check_ending(options.out)
    of_images = options.csv.with_name(f"{options.csv.stem}-images.csv")
    loaded = load_process(options.checkpoint, options.weights, options.image_size, options.device)
    images = Images(options.data, loaded.diffusion, options.num_images, options.conditions.given())
    sums = Sums(options, loaded, len(images))
    prepare_places([options.out, options.csv, of_images, sums.path])

    sums.resume()
    while sums.count < len(images):
        chosen = slice(sums.count, min(sums.count + options.batch_size, len(images)))
        batch = images[chosen]
        print(f"images {sums.count + 1} to {sums.count + len(batch)} of {len(images)}", flush=True)
        sums.add(
            loaded.diffusion.bits_per_dim(
                batch,
                seed=options.seed,
                batch_size=len(batch),
                timesteps=options.timesteps,
                variance=options.variance,
                start_index=sums.count,
                **images.conditions(chosen, loaded.diffusion.device),
            )
        )
    bits = sums.mean()
    curve = rate_distortion(bits)
    _report(options, loaded, sums, bits)
    title = f"{bits.mean:.3f} bits/dim of {options.data}, {len(images)} images, step {loaded.step}"
    plot_rate_distortion(curve, options.out, title=title)
    columns = (curve.timesteps, bits.terms[0].flip(0), curve.rate, curve.distortion, bits.noise_mse[0].flip(0))
    names = ("timestep", "bits_per_dim", "rate", "distortion", "noise_mse")
    _write_csv(options.csv, names, zip(*(column.tolist() for column in columns), strict=True))
    per_image = zip(range(len(images)), sums.total, sums.prior, sums.decoder, strict=True)
    _write_csv(of_images, ("image", "bits_per_dim", "prior", "decoder"), per_image)
    sums.path.unlink(missing_ok=True)
    print(f"curves: {options.out}, {options.csv}; each image: {of_images}")


class Sums:
    """What a run has found so far; kept beside the table while it is not whole."""

    def __init__(self, options: Likelihood, loaded: Loaded, num_images: int):
        state = loaded.path.stat()
        self.path = options.csv.with_name(f"{options.csv.name}.partial")
        # What the numbers depend on; the batch size is not among it.
        self._of = {
            "checkpoint": [str(loaded.path.resolve()), state.st_size, state.st_mtime_ns],
            **{name: getattr(options, name) for name in ("data", "timesteps", "variance", "seed", "weights")},
            "images": num_images,
            "conditions": {name: str(value) for name, value in options.conditions.given().items()},
        }
        self.count = 0
        self.total: list[float] = []
        self.prior: list[float] = []
        self.decoder: list[float] = []
        self._over_images: Any = None  # of the fields of BitsPerDim that have timesteps

    def resume(self) -> None:
        """Go on where a run with the same arguments was stopped."""
        import warnings

        from ddpm_fast.training.checkpoint_files import load_file

        if not self.path.exists():
            return
        found = load_file(self.path)
        if found["of"] != self._of:
            warnings.warn(f"{self.path} is of another run, so that this one begins anew", stacklevel=2)
            return
        self.total, self.prior, self.decoder = found["total"], found["prior"], found["decoder"]
        self._over_images, self.count = found["over_images"], len(self.total)
        print(f"going on after {self.count} images, from {self.path}")

    def add(self, bits: "BitsPerDim") -> None:
        """Take in the next images, and keep what there is."""
        import torch

        from ddpm_fast.training.atomic_files import write_atomically

        if not bits.total.isfinite().all():
            raise UserError(f"the bound of {self._of['checkpoint'][0]} is not finite (NaN or infinity)")
        self.total += bits.total.tolist()
        self.prior += bits.prior.tolist()
        self.decoder += bits.decoder.tolist()
        sums = {name: getattr(bits, name).sum(0) for name in ("terms", "x_start_mse", "noise_mse")}
        if self._over_images is not None:
            sums = {name: values + self._over_images[name] for name, values in sums.items()}
        self._over_images = {**sums, "timesteps": bits.timesteps}
        self.count = len(self.total)
        lists = {"total": self.total, "prior": self.prior, "decoder": self.decoder}
        with write_atomically(self.path) as file:
            torch.save({"of": self._of, **lists, "over_images": self._over_images}, file)

    def mean(self) -> "BitsPerDim":
        """The mean over images, as of one image."""
        import torch

        from ddpm_fast.diffusion.likelihood import BitsPerDim

        means = {name: self._over_images[name][None] / self.count for name in ("terms", "x_start_mse", "noise_mse")}
        prior = torch.tensor([sum(self.prior) / self.count], dtype=torch.float64)
        return BitsPerDim(timesteps=self._over_images["timesteps"], prior=prior, **means)


def _report(options: Likelihood, loaded: Loaded, sums: Sums, bits: "BitsPerDim") -> None:
    import statistics

    error = f" ± {statistics.stdev(sums.total) / sums.count**0.5:.4f}" if sums.count > 1 else ""
    steps = len(bits.timesteps)
    print(f"{loaded.path}, step {loaded.step}: {sums.count} images of {options.data}, {steps} timesteps")
    between = (bits.terms.sum() - bits.decoder[0]).item()
    for name, value in (
        ("bits/dim", f"{bits.mean:.4f}{error}"),
        ("prior", f"{bits.prior.item():.6f}"),
        ("rate", f"{between:.4f}   (the terms of timesteps, decoder left out)"),
        ("decoder", f"{bits.decoder.item():.4f}   (L_0)"),
    ):
        print(f"{name:>10}  {value}")


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from ddpm_fast.training.atomic_files import write_atomically

    text = io.StringIO()
    csv.writer(text).writerows([names, *rows])
    with write_atomically(path) as file:
        file.write(text.getvalue().encode())
