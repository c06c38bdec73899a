"""`ddpm-fast train`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ddpm_fast.cli.options import (
    Channels,
    Integer,
    Integers,
    Number,
    Sampler,
    Schedule,
    UserError,
    YesNo,
    image_size_of,
)

if TYPE_CHECKING:
    from ddpm_fast.training.trainer import Trainer

Data = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]

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


def run(options: Train) -> None:
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


def _make_trainer(options: Train, values: dict[str, Any]) -> "Trainer":
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


def _with_defaults(options: Train) -> dict[str, Any]:
    """The options marked (data); missing ones get the defaults of a folder or of the digits."""
    defaults = dict(_DIGITS_DEFAULTS if options.data == "digits" else _FOLDER_DEFAULTS)
    given = {name: getattr(options, name) for name in defaults if getattr(options, name) is not None}
    if "image_size" in given:
        given["image_size"] = image_size_of(given["image_size"])
    return {**defaults, **given}
