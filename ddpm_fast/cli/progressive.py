"""`ddpm-fast progressive`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddpm_fast.cli.asked import asked_classes
from ddpm_fast.cli.inputs import Images, load_process, prepare_places
from ddpm_fast.cli.labels import LabelOptions
from ddpm_fast.cli.options import Int, Integer, Integers, Sampler, Text, UserError, Words, check_positive

if TYPE_CHECKING:
    import torch

    from ddpm_fast.diffusion.diffusion_process import DiffusionProcess

File = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]


@dataclasses.dataclass
class Progressive:
    """Draw how images come about: the network's estimate of the final image over the time of sampling.

    Coarse features come first (Ho et al. 2020, figure 6). With --images, real images are noised to several times, as a
    receiver of a progressive code has them, and estimated from there; the rate and the error of each are printed.
    """

    checkpoint: File
    """A file such as results/model-last.pt, or a results folder, or results/7 for the milestone model-7.pt."""
    out: Annotated[
        Path,
        tyro.conf.arg(
            help="The strip: a row per sample, time from left to right, the image that is reached last. With "
            "--images two rows per image, what is received and the estimate, and the image itself last."
        ),
    ] = Path("progressive.png")
    num_samples: Int = 4
    """Rows: samples, or images of --images."""
    columns: Int = 10
    """Times that are shown, evenly spaced."""
    images: Text = None
    """A folder of images, a file that `ddpm-fast prepare` wrote, or the word digits."""
    sampler: Sampler = None
    """Sampler; by default the checkpoint's. Not with --images."""
    sampling_timesteps: Integer = None
    """Steps of the sampler; by default the checkpoint's. Not with --images."""
    timesteps: Integer = None
    """Length of the chain of --images (the checkpoint's timesteps; in continuous time 1000)."""
    seed: Integer = None
    """The same seed draws the same picture."""
    image_size: Integers = None
    """Height and width, or one number for both; needed if the checkpoint does not record it."""
    weights: Literal["ema", "model"] = "ema"
    """The moving average of the weights, or the weights themselves."""
    scale: Int = 1
    """Draw each pixel as a square of this many."""
    device: Text = None
    """Such as cpu or cuda:0; by default the first accelerator."""
    classes: Annotated[Words, tyro.conf.arg(name="class")] = None
    """Classes of the samples by name or number, one after another; by default all. Images have those of --labels."""
    debug: bool = False
    """Show the traceback of an error."""
    conditions: tyro.conf.OmitArgPrefixes[LabelOptions] = dataclasses.field(default_factory=LabelOptions)


def run(options: Progressive) -> None:
    """`ddpm-fast progressive`."""
    import torch

    from ddpm_fast.training.images_out import check_grid, save_trajectory_strip

    check_positive(num_samples=options.num_samples, columns=options.columns, scale=options.scale)
    for name in ("sampling_timesteps", "timesteps"):
        if getattr(options, name) is not None:
            check_positive(**{name: getattr(options, name)})
    _check_together(options)
    loaded = load_process(
        options.checkpoint,
        options.weights,
        options.image_size,
        options.device,
        sampler=options.sampler,
        sampling_timesteps=options.sampling_timesteps,
    )
    diffusion = loaded.diffusion
    rows = options.num_samples * (1 if options.images is None else 2)
    cells = (rows * (options.columns + 1), diffusion.channels, *diffusion.image_size)
    check_grid(options.out, cells, options.columns + 1, scale=options.scale)
    prepare_places([options.out])
    seed = torch.seed() if options.seed is None else options.seed
    strip = _sampled(diffusion, options, seed) if options.images is None else _coded(diffusion, options, seed)
    if not strip.isfinite().all():
        raise UserError(f"the estimates of {loaded.path} are not finite (NaN or infinity); nothing was written")
    save_trajectory_strip(strip.clamp(0, 1), options.out, num_frames=strip.shape[1], scale=options.scale)
    print(f"{options.num_samples} rows of step {loaded.step} (seed {seed}): {options.out}")


def _check_together(options: Progressive) -> None:
    """Raise UserError for options of the other picture."""
    names = ("sampler", "sampling_timesteps", "classes") if options.images is not None else ("timesteps",)
    for name in names:
        if getattr(options, name) is not None:
            which = "cannot be given with" if options.images is not None else "needs"
            option = "class" if name == "classes" else name.replace("_", "-")
            raise UserError(f"--{option} {which} --images")
    if options.images is None and options.conditions.given():
        raise UserError(f"--{next(iter(options.conditions.given())).replace('_', '-')} needs --images")


def _sampled(diffusion: "DiffusionProcess", options: Progressive, seed: int) -> "torch.Tensor":
    """(B, K + 1, C, h, w), the estimates and the image of each sample."""
    import torch

    classes = asked_classes(diffusion, options.classes)
    count = options.num_samples
    given: dict[str, Any] = {"classes": [classes[index % len(classes)] for index in range(count)]} if classes else {}
    found = diffusion.progressive(count, options.columns, seed=seed, **given)
    print(f"times: {', '.join(f'{time:.4g}' for time in found.times.tolist())}, and the end")
    return torch.cat((found.estimates, found.images[:, None]), dim=1).cpu()


def _coded(diffusion: "DiffusionProcess", options: Progressive, seed: int) -> "torch.Tensor":
    """(2·N, K + 1, C, h, w): what is received of each image, and the estimates; the image itself is last."""
    import torch

    assert options.images is not None
    labels = options.conditions.given()
    chosen = Images(options.images, diffusion, options.num_samples, labels, option="--num-samples")
    images, conditions = chosen[:], chosen.conditions(slice(None), diffusion.device)
    found = diffusion.progressive_coding(images, options.columns, seed=seed, timesteps=options.timesteps, **conditions)
    print(f"{'time':>8}  {'bits/dim':>9}  RMSE of 0 to 255")
    for time, rate, distortion in zip(
        found.times.tolist(),
        found.rate.mean(0).tolist(),
        found.distortion.square().mean(0).sqrt().tolist(),
        strict=True,
    ):
        print(f"{time:8.4g}  {rate:9.4f}  {distortion:6.2f}")
    original = diffusion.unnormalize(images.float() / 127.5 - 1)
    rows = [torch.cat((shown.cpu(), original[:, None]), dim=1) for shown in (found.noised, found.estimates)]
    return torch.stack(rows, dim=1).flatten(0, 1)
