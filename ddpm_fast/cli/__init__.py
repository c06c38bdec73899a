"""The command `ddpm-fast`: train, sample, bench, doctor. Heavy imports stand in the functions that need them."""

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddpm_fast.diffusion.samplers import SAMPLERS


def _unset(kind, metavar):
    """An option of this type that may be left out, without the word None in the help."""
    return Annotated[kind | None, tyro.conf.arg(metavar=metavar, help_behavior_hint="")]


Data = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]
File = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
Folder = _unset(Path, "FOLDER")
Text = _unset(str, "NAME")
Integer = _unset(int, "INT")
Integers = _unset(tuple[int, ...], "INT ...")
Number = _unset(float, "FLOAT")
YesNo = _unset(bool, "True|False")
Channels = _unset(Literal[1, 3, 4], "1|3|4")
Schedule = _unset(Literal["linear", "cosine", "sigmoid"], "linear|cosine|sigmoid")
Sampler = _unset(Literal[tuple(SAMPLERS)], "|".join(SAMPLERS))

# A strip keeps every step of the few trajectories it shows; more than this is not held in memory.
_MAX_TRAJECTORY_BYTES = 2**30
_STRIP_ROWS = 4

# Defaults that depend on the data: photographs in a folder, or scikit-learn's handwritten digits of 8 x 8 pixels.
# The average is taken every 10 steps: 0.95 looks back over 200 of them, which suits a run of minutes; 0.995 over 2,000.
_FOLDER_DEFAULTS = dict(
    image_size=64,
    channels=3,
    dim=64,
    dim_mults=(1, 2, 4, 8),
    timesteps=1000,
    sampling_timesteps=250,
    beta_schedule="sigmoid",
    steps=100_000,
    batch_size=16,
    lr=1e-4,
    ema_decay=0.995,
    save_every=1000,
    flip=True,
)
_DIGITS_DEFAULTS = dict(
    image_size=8, channels=1, dim=32, dim_mults=(1, 2), timesteps=1000, sampling_timesteps=50,
    beta_schedule="cosine", steps=1200, batch_size=64, lr=1e-3, ema_decay=0.95, save_every=300, flip=False,
)  # fmt: skip


class UserError(ValueError):
    """Something to put right on the command line."""


@dataclasses.dataclass
class Train:
    """Train a model on images.

    Writes to the results folder: model-N.pt and sample-N.png every --save-every steps, model-last.pt at the end or
    after Ctrl-C, loss.csv and loss.png. Options marked (data) default to what suits DATA: a folder, or the digits.

    Many GPUs: torchrun --nproc-per-node=8 -m ddpm_fast train ..., or accelerate launch -m ddpm_fast train ...
    """

    data: Data
    """A folder of images (subfolders included), or the word "digits" for scikit-learn's 1,797 handwritten digits."""
    results_folder: Path = Path("results")
    """Where everything is written."""
    resume: bool = False
    """Continue from the checkpoint with the largest step in the results folder."""
    image_size: Integers = None
    """Height and width, or one number for both (data: 64, digits 8)."""
    channels: Channels = None
    """1 grey, 3 RGB, 4 RGBA (data: 3, digits 1)."""
    dim: Integer = None
    """Width of the network's first stage (data: 64, digits 32)."""
    dim_mults: Integers = None
    """Width of each stage in multiples of --dim (data: 1 2 4 8, digits 1 2)."""
    self_condition: bool = False
    """Let the network see its previous estimate."""
    memory: Literal["fast", "low"] = "fast"
    """low keeps fewer maps from forward for backward, and takes longer to make the others again."""
    flash: bool = True
    """Fused attention where the device has it."""
    timesteps: Integer = None
    """Steps of the diffusion process (1000)."""
    objective: Literal["pred_v", "pred_noise", "pred_x0"] = "pred_v"
    """What the network predicts."""
    beta_schedule: Schedule = None
    """Noise schedule (data: sigmoid, digits cosine)."""
    min_snr: bool = False
    """Clip the loss weight at a signal-to-noise ratio of 5."""
    sampler: Sampler = None
    """Sampler of the grids; by default ddim if there are fewer sampling steps than timesteps, else ddpm."""
    sampling_timesteps: Integer = None
    """Steps of that sampler (data: 250, digits 50)."""
    steps: Integer = None
    """Training steps (data: 100000, digits 1200)."""
    batch_size: Integer = None
    """Images per step over all devices (data: 16, digits 64)."""
    grad_accumulate: int = 1
    """Batches whose gradients are summed before each step."""
    lr: Number = None
    """Adam's learning rate (data: 1e-4, digits 1e-3)."""
    ema_decay: Number = None
    """Decay of the moving average that samples are drawn from (data: 0.995, digits 0.95)."""
    flip: YesNo = None
    """Mirror images at random (data: yes, digits no)."""
    amp: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision."""
    seed: Integer = None
    """Fixes weights, order, flips and noise."""
    save_every: Integer = None
    """Steps between checkpoints and sample grids (data: 1000, digits 300)."""
    num_samples: int = 25
    """Images in each grid."""
    workers: Integer = None
    """Processes that read images, per device."""
    fid: bool = False
    """Measure the Frechet inception distance at every checkpoint (needs pytorch-fid)."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclasses.dataclass
class Sample:
    """Draw images from a checkpoint.

    Takes checkpoints of ddpm-fast and of denoising-diffusion-pytorch's Trainer (give --image-size for those). Writes a
    grid, and a strip that shows how the first few images come out of the noise.
    """

    checkpoint: File
    """A file such as results/model-last.pt, or a results folder: the checkpoint with the largest step in it."""
    out: Path = Path("samples.png")
    """The grid; the strip is written beside it as NAME-strip.png."""
    num_samples: int = 64
    """Number of images."""
    batch_size: int = 64
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
    scale: int = 1
    """Draw each pixel as a square of this many."""
    raw: Folder = None
    """Also write each image to its own PNG in this folder."""
    device: Text = None
    """Such as cpu or cuda:0; by default the first accelerator."""
    debug: bool = False
    """Show the traceback of an error."""


Rival = Literal[
    "peer",
    "peer-channels-last",
    "peer-compiled",
    "peer-max-autotune",
    "diffusers",
    "ours-low-memory",
    "ours-step-by-step",
]


@dataclasses.dataclass
class Bench:
    """Time a configuration here against the peer, denoising-diffusion-pytorch, which must be installed.

    Both take turns in one process with the same weights, images and precision, after their output, loss and gradients
    were found equal. Prints a table, says which implementation each op took and why, and draws a bar chart.
    """

    checkpoint: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[CHECKPOINT]")] = None
    """Take the configuration of this checkpoint or results folder; what is given below goes over it."""
    dim: Integer = None
    """Width of the network's first stage (64)."""
    dim_mults: Integers = None
    """Width of each stage in multiples of --dim (1 2 4 8)."""
    channels: Channels = None
    """1 grey, 3 RGB, 4 RGBA (3)."""
    image_size: Integers = None
    """Height and width, or one number for both (on a GPU 128, on a CPU 32)."""
    batch_size: Integer = None
    """Images per step (on a GPU 16, on a CPU 4)."""
    amp: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision, on both sides."""
    steps: int = 10
    """Steps of each sampling run that is timed."""
    against: tuple[Rival, ...] = ("peer", "peer-channels-last")
    """What to compare with; the compiled ones take minutes to compile."""
    seconds: float = 40.0
    """Time to measure for, preparation aside."""
    profile: bool = False
    """Also say where our time goes: the floor that the machine allows, how far from it we are, what dominates."""
    out: Path = Path("bench.png")
    """The bar chart."""
    json: Annotated[Folder, tyro.conf.arg(metavar="FILE")] = None
    """Also write every number here."""
    device: Text = None
    """Such as cpu or cuda:0; by default the first accelerator."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclasses.dataclass
class Doctor:
    """Show versions, devices, the compiled extension, and which implementation each operation would use."""

    debug: bool = False
    """Show the traceback of an error."""


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments=None):
    """Run `ddpm-fast`; errors that the user can put right end with one line and exit code 2."""
    command = tyro.cli(
        Command,
        prog="ddpm-fast",
        args=arguments,
        description="Denoising diffusion, fast: train, sample, bench, doctor.",
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    run = {Train: train, Sample: sample, Bench: bench, Doctor: doctor}[type(command)]
    warnings.showwarning = _show_warning
    try:
        run(command)
    except (OSError, ValueError, TypeError) as error:
        if command.debug or not _is_for_the_user(error):
            raise
        print(f"ddpm-fast: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def train(options):
    """`ddpm-fast train`."""
    values = _with_defaults(options)
    from ddpm_fast.training.checkpoint import find_latest

    latest = find_latest(options.results_folder)
    if latest and not options.resume:
        raise UserError(
            f"{options.results_folder} already holds checkpoints (up to step {latest[1]}); give --resume to continue "
            "them, or another --results-folder"
        )
    if options.resume and not latest:
        raise UserError(f"--resume: there is no checkpoint in {options.results_folder}")
    if latest and latest[1] >= values["steps"]:
        print(f"{latest[0]} is at step {latest[1]} already; a larger --steps would continue it")
        return
    trainer = _make_trainer(options, values)
    if latest:
        trainer.load(latest[0].stem.removeprefix("model-"))
    trainer.train()
    broken = getattr(trainer.ds, "broken_files", [])
    if broken:
        trainer.accelerator.print(f"{len(broken)} broken image files were skipped")
    trainer.accelerator.print(f"results are in {options.results_folder}")
    trainer.accelerator.end_training()


def sample(options):
    """`ddpm-fast sample`."""
    import torch

    from ddpm_fast.training.checkpoint import load_checkpoint
    from ddpm_fast.training.data import save_image_grid, save_trajectory_strip

    _check_positive(num_samples=options.num_samples, batch_size=options.batch_size, scale=options.scale)
    overrides = {
        "image_size": _image_size(options.image_size),
        "sampler": options.sampler,
        "sampling_timesteps": options.sampling_timesteps,
        "ddim_sampling_eta": options.eta,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    path = _checkpoint_file(options.checkpoint)
    loaded = load_checkpoint(path, map_location=_device(options.device), **given)
    diffusion = (loaded.ema.ema_model if options.weights == "ema" else loaded.diffusion).eval()
    seed = torch.seed() if options.seed is None else options.seed

    images = _draw(diffusion, options.num_samples, options.batch_size, seed)
    if not images.isfinite().all():
        raise UserError(f"the samples of {path} are not finite (NaN or infinity); nothing was written")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_image_grid(images, options.out, nrow=_columns(options.num_samples), scale=options.scale)
    strip = options.out.with_name(f"{options.out.stem}-strip.png")
    trajectories = diffusion.sample(_strip_rows(diffusion, options), True, seed=seed, progress=False)
    save_trajectory_strip(trajectories.clamp(0, 1), strip, scale=options.scale)
    print(f"{options.num_samples} samples (seed {seed}) of step {loaded.step}: {options.out}, {strip}")
    if options.raw is not None:
        options.raw.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            save_image_grid(image[None], options.raw / f"{index:05}.png", scale=options.scale)
        print(f"each image on its own: {options.raw}")


def bench(options):
    """`ddpm-fast bench`."""
    from ddpm_fast.measure import baselines, command

    _check_positive(steps=options.steps, **{"batch-size": options.batch_size or 1})
    if options.seconds <= 0:
        raise UserError(f"--seconds must be positive; got {options.seconds}")
    reason = baselines.why_not("peer") if "peer" in options.against else None
    if reason is not None:
        raise UserError(f"{reason}, and --against peer needs it")
    device = _device(options.device)
    given = {
        "dim": options.dim,
        "dim_mults": options.dim_mults,
        "channels": options.channels,
        "steps": options.steps,
        "image_size": _image_size(options.image_size),
        "batch": options.batch_size,
        "dtype": None if options.amp == "no" else options.amp,
    }
    checkpoint = None if options.checkpoint is None else _checkpoint_file(options.checkpoint)
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


def doctor(options):
    """`ddpm-fast doctor`."""
    import platform

    import torch

    import ddpm_fast
    from ddpm_fast.runtime import extension

    print(f"ddpm_fast {ddpm_fast.__version__}, python {platform.python_version()}, torch {torch.__version__}")
    print(f"system: {platform.platform()}, {torch.get_num_threads()} threads")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(names) or 'none'} (torch built for CUDA {torch.version.cuda or 'none'})")
    info = extension.info()
    print(f"extension: {info if info else f'not loaded: {extension.reason()}'}")
    print(ddpm_fast.explain())


def _make_trainer(options, values):
    import torch

    from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
    from ddpm_fast.models.unet import Unet
    from ddpm_fast.training.data import DigitsDataset
    from ddpm_fast.training.trainer import Trainer

    if options.seed is not None:
        torch.manual_seed(options.seed)
    network = Unet(
        values["dim"],
        dim_mults=values["dim_mults"],
        channels=values["channels"],
        flash_attn=options.flash,
        self_condition=options.self_condition,
        memory=options.memory,
    )
    diffusion = GaussianDiffusion(
        network,
        image_size=values["image_size"],
        timesteps=values["timesteps"],
        objective=options.objective,
        sampling_timesteps=min(values["sampling_timesteps"], values["timesteps"]),
        sampler=options.sampler,
        beta_schedule=values["beta_schedule"],
        min_snr_loss_weight=options.min_snr,
    )
    return Trainer(
        diffusion,
        DigitsDataset(values["image_size"]) if options.data == "digits" else options.data,
        train_batch_size=values["batch_size"],
        gradient_accumulate_every=options.grad_accumulate,
        augment_horizontal_flip=values["flip"],
        train_lr=values["lr"],
        train_num_steps=values["steps"],
        ema_decay=values["ema_decay"],
        save_and_sample_every=values["save_every"],
        num_samples=options.num_samples,
        results_folder=options.results_folder,
        amp=options.amp != "no",
        mixed_precision_type=options.amp,
        calculate_fid=options.fid,
        seed=options.seed,
        num_workers=options.workers,
    )


def _checkpoint_file(path):
    """The file itself, or the latest checkpoint of a results folder."""
    from ddpm_fast.training.checkpoint import find_latest

    if not path.is_dir():
        return path
    latest = find_latest(path)
    if latest is None:
        raise UserError(f"folder {path} holds no checkpoint")
    return latest[0]


def _with_defaults(options):
    """The options marked (data), with what was not given filled in for a folder or for the digits."""
    defaults = dict(_DIGITS_DEFAULTS if options.data == "digits" else _FOLDER_DEFAULTS)
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    if "image_size" in given:
        given["image_size"] = _image_size(given["image_size"])
    return {**defaults, **given}


def _image_size(numbers):
    """None, one number, or a pair (height, width) from the numbers of --image-size."""
    if numbers is None:
        return None
    if len(numbers) not in (1, 2):
        raise UserError(f"--image-size takes one number or two (height width); got {len(numbers)}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def _draw(diffusion, count, batch_size, seed):
    """`count` images (N, C, h, w) on the CPU; the batch size does not change them."""
    import torch

    starts = range(0, count, batch_size)
    batches = [diffusion.sample(min(batch_size, count - start), seed=seed, start_index=start).cpu() for start in starts]
    return torch.cat(batches)


def _strip_rows(diffusion, options):
    """How many trajectories to show: four, or fewer where holding all their steps would take too much memory."""
    height, width = diffusion.image_size
    bytes_each = 4 * diffusion.channels * height * width * (diffusion.sampling_timesteps + 1)
    return max(1, min(_STRIP_ROWS, options.num_samples, _MAX_TRAJECTORY_BYTES // bytes_each))


def _columns(count):
    """Columns of a grid that is about square."""
    return max(1, round(count**0.5 + 0.49))


def _device(name):
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


def _check_positive(**values):
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


def _is_for_the_user(error):
    """Whether our own code raised it as a check: an error from deeper down is a fault of the program."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, OSError) or module.split(".")[0] in ("ddpm_fast", "accelerate")


def _show_warning(message, category, filename, lineno, file=None, line=None):
    print(f"ddpm-fast: warning: {message}", file=sys.stderr)
