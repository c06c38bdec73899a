"""`ddpm-fast train`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from ddpm_fast.cli import processes
from ddpm_fast.cli.labels import LabelOptions, check_labels, sizes_of
from ddpm_fast.cli.options import (
    Flag,
    Integer,
    Integers,
    Memory,
    Number,
    Precision,
    Range,
    Text,
    UserError,
    Words,
    YesNo,
    image_size_of,
)
from ddpm_fast.cli.processes import ProcessOptions

if TYPE_CHECKING:
    from ddpm_fast.training.trainer import Trainer

Data = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATA")]

# Defaults that depend on the data: photographs in a folder, or scikit-learn's handwritten digits of 8 x 8 pixels.
# The average is taken every 10 steps: 0.95 looks back over 200 of them, which suits a run of minutes; 0.995 over 2,000.
_FOLDER_DEFAULTS = dict(
    image_size=64, channels=3, dim=64, dim_mults=(1, 2, 4, 8), sampling_timesteps=250, beta_schedule="sigmoid",
    steps=100_000, batch_size=16, lr=1e-4, ema_decay=0.995, save_every=1000, flip=True,
)  # fmt: skip
_DIGITS_DEFAULTS = dict(
    image_size=8, channels=1, dim=32, dim_mults=(1, 2), sampling_timesteps=50, beta_schedule="cosine",
    steps=1200, batch_size=64, lr=1e-3, ema_decay=0.95, save_every=300, flip=False,
)  # fmt: skip
# Six of each digit.
_LABELLED_DIGITS_DEFAULTS = dict(num_samples=60)
# Of the grids of a network with classes or vectors: strong enough to show what was asked for.
_GUIDANCE = 2.0
_DEFAULTS = dict(timesteps=1000, memory="fast", grad_accumulate=1, amp=None, num_samples=25)

# Option → argument of Unet and Trainer. A flag that is not given is False and says nothing.
_NETWORK = {name: name for name in ("dim", "dim_mults", "channels", "self_condition", "memory", "cond_drop_prob")}
_TRAINER = {
    "batch_size": "train_batch_size",
    "grad_accumulate": "gradient_accumulate_every",
    "flip": "augment_horizontal_flip",
    "lr": "train_lr",
    "steps": "train_num_steps",
    "ema_decay": "ema_decay",
    "save_every": "save_and_sample_every",
    "num_samples": "num_samples",
    "seed": "seed",
}


@dataclasses.dataclass
class Train:
    """Train a model on images.

    Writes to the results folder: model-N.pt and sample-N.png every --save-every steps, model-last.pt at the end or
    after Ctrl-C, loss.csv and loss.png. Options marked (data) default to what suits DATA: a folder, a prepared
    file, or the digits.
    A network with classes or vectors learns what guidance needs: --cond-drop-prob is the share of the images that it
    is shown without them.
    With --resume an option that is not given keeps the checkpoint's value. One that is given holds from there on, or is
    refused where the weights belong to another: those of the network, the schedule, the objective and the size.

    Many GPUs: torchrun --nproc-per-node=8 -m ddpm_fast train ..., or accelerate launch -m ddpm_fast train ...
    """

    data: Annotated[
        Data,
        tyro.conf.arg(
            help="A folder of images (subfolders included), a file of `ddpm-fast prepare`, which says size and "
            "channels, or the word digits for scikit-learn's 1,797 handwritten digits."
        ),
    ]
    results_folder: Path = Path("results")
    """Where everything is written."""
    resume: bool = False
    """Continue from the checkpoint with the largest step in the results folder."""
    resume_from: Text = None
    """Continue from this checkpoint: a milestone (7, last), a file name in the results folder, or a path."""
    image_size: Integers = None
    """Height and width, or one number for both (data: 64, digits 8)."""
    exts: Words = None
    """Endings of the files that are images (jpg jpeg png tiff tif bmp webp jfif avif npy)."""
    value_range: Range = None
    """What becomes [0, 1] in images of more than 8 bits and of floats; by default found in a sample of the files."""
    background: Text = None
    """Colour behind transparent images where --channels has no transparency (white)."""
    channels: Integer = None
    """1 grey, 3 RGB, 4 RGBA; other numbers take images that have as many (data: 3, digits 1)."""
    dim: Integer = None
    """Width of the network's first stage (data: 64, digits 32)."""
    dim_mults: Integers = None
    """Width of each stage in multiples of --dim (data: 1 2 4 8, digits 1 2)."""
    self_condition: bool = False
    """Let the network see its previous estimate."""
    memory: Memory = None
    """fast; low keeps fewer maps from forward for backward, and takes longer to make the others again."""
    flash: Flag = True
    """Record flash_attn=False in the checkpoint, which upstream reads; here no kernel depends on it."""
    steps: Integer = None
    """Training steps (data: 100000, digits 1200)."""
    batch_size: Integer = None
    """Images per step over all devices (data: 16, digits 64)."""
    grad_accumulate: Integer = None
    """Batches whose gradients are summed before each step (1)."""
    lr: Number = None
    """Adam's learning rate (data: 1e-4, digits 1e-3)."""
    ema_decay: Number = None
    """Decay of the moving average that samples are drawn from (data: 0.995, digits 0.95)."""
    flip: YesNo = None
    """Mirror images at random (data: yes, digits no)."""
    amp: Precision = None
    """Mixed precision (bf16 on CUDA cards that have it, else no); fp16 is for CUDA."""
    graph: YesNo = None
    """Record a step as CUDA graphs and replay it (where that can be done)."""
    seed: Integer = None
    """Fixes weights, order, flips and noise."""
    save_every: Integer = None
    """Steps between checkpoints and sample grids (data: 1000, digits 300)."""
    num_samples: Integer = None
    """Images in each grid (25); with classes at most so many, in a row for each class, the first ones if many."""
    cond_channels: Integer = None
    """Channels of the images in --cond-folder (3)."""
    cond_drop_prob: Number = None
    """Share of images whose classes and vectors are left out in training, which guidance needs (0.1)."""
    workers: Integer = None
    """Processes that read images, per device."""
    fid: bool = False
    """Measure the Frechet inception distance at every checkpoint (needs pytorch-fid)."""
    debug: bool = False
    """Show the traceback of an error."""
    conditions: tyro.conf.OmitArgPrefixes[LabelOptions] = dataclasses.field(default_factory=LabelOptions)
    process: tyro.conf.OmitArgPrefixes[ProcessOptions] = dataclasses.field(default_factory=ProcessOptions)


def run(options: Train) -> None:
    """`ddpm-fast train`."""
    from ddpm_fast.training.checkpoint import read_settings

    resumed = _checkpoint_to_resume(options)
    record = None if resumed is None else read_settings(resumed[0])
    plan = _arguments(options, record)
    if resumed and resumed[1] >= plan.training["train_num_steps"]:
        print(f"{resumed[0]} is at step {resumed[1]} already; a larger --steps would continue it")
        return
    trainer = _make_trainer(options, plan)
    if resumed:
        trainer.load(resumed[0].absolute())
    trainer.train()
    broken = getattr(trainer.ds, "broken_files", [])
    if broken:
        trainer.accelerator.print(f"{len(broken)} broken image files were skipped")
    trainer.accelerator.print(f"results are in {options.results_folder}")
    trainer.accelerator.end_training()


def _checkpoint_to_resume(options: Train) -> tuple[Path, int] | None:
    """(path, step) of the checkpoint to go on from, or None for a new run."""
    from ddpm_fast.training.checkpoint_files import find_file, find_latest, load_file, step_of

    if options.resume_from is not None:
        path = find_file(options.resume_from, options.results_folder)
        return path, step_of(load_file(path, mmap=True), path)
    latest = find_latest(options.results_folder)
    if latest and not options.resume:
        raise UserError(
            f"{options.results_folder} already holds checkpoints (up to step {latest[1]}); give --resume to continue "
            "them, or another --results-folder"
        )
    if options.resume and not latest:
        raise UserError(f"--resume: there is no checkpoint in {options.results_folder}")
    return latest


class _Plan(NamedTuple):
    """A run: the name of its process, and arguments of Unet, the process, XMWrapper, Trainer and Dataset."""

    process: str
    network: dict[str, Any]
    diffusion: dict[str, Any]
    wrapper: dict[str, Any]
    training: dict[str, Any]
    labels: dict[str, Any]


def _arguments(options: Train, record: dict[str, Any] | None) -> _Plan:
    """What was given, else what the file records, else the defaults.

    record: of `read_settings`; None for a new run.
    """
    from ddpm_fast.diffusion.processes import PROCESSES

    given = {name: getattr(options, name) for name in (*_NETWORK, *_TRAINER, "amp", "image_size")}
    given |= {field.name: getattr(options.process, field.name) for field in dataclasses.fields(options.process)}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if options.flip is False:  # the only option that is given as False
        given["flip"] = False
    if "image_size" in given:
        given["image_size"] = image_size_of(given["image_size"])
    recorded = None if record is None else record["process"]
    name = given.pop("process", None) or recorded or "ddpm"
    if recorded not in (None, name):
        raise UserError(f"--process {name}: the checkpoint is of {recorded}, and its weights belong to that")
    of_process = processes.arguments_of(name, {o: value for o, value in given.items() if o in processes.ARGUMENTS})
    data = _defaults_of(options)
    off = {"self_condition": False, "seed": None, "cond_drop_prob": None}
    values: dict[str, Any] = {**_DEFAULTS, **data, **off}
    network, training = (
        {argument: values[option] for option, argument in names.items()} for names in (_NETWORK, _TRAINER)
    )
    diffusion = processes.arguments_of(name, processes.defaults_of(name, values))
    if network["cond_drop_prob"] is None:
        del network["cond_drop_prob"]
    network["flash_attn"] = True
    training["mixed_precision"] = values["amp"]
    if record is not None:
        # A file's record is whole; what upstream's file does not tell are the size and the trainer's arguments.
        image_size = record["diffusion"].get("image_size") or diffusion["image_size"]
        network, diffusion = dict(record["unet"]), {**record["diffusion"], "image_size": image_size}
        training.update(_recorded_training(record))
        if of_process.get("beta_schedule", diffusion.get("beta_schedule")) != diffusion.get("beta_schedule"):
            diffusion.pop("schedule_fn_kwargs", None)  # arguments of the other schedule
    for names, arguments in ((_NETWORK, network), (_TRAINER, training)):
        arguments.update({names[option]: value for option, value in given.items() if option in names})
    diffusion.update(of_process)
    labels = _labels_of(options, record)
    if record is None:
        network.update(processes.network_of(name, network["channels"]))
        is_guided = _add_conditions(options, labels, network, diffusion)
        if is_guided and "guidance" in PROCESSES[name].arguments():
            diffusion.setdefault("guidance", _GUIDANCE)
    if not options.flash:
        network["flash_attn"] = False
    training["mixed_precision"] = given.get("amp", training["mixed_precision"])
    timesteps = diffusion.get("timesteps")
    if "sampling_timesteps" not in given and timesteps and (diffusion.get("sampling_timesteps") or 0) > timesteps:
        diffusion["sampling_timesteps"] = timesteps
    wrapper = {} if record is None else dict(record["xm"])
    if "candidates" in given:
        wrapper["candidates"] = given["candidates"]
    return _Plan(name, network, diffusion, wrapper, training, labels)


def _labels_of(options: Train, record: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of `Dataset` for its conditions: those given, else those that the file records for such data."""
    from ddpm_fast.training.prepared import is_prepared

    given = options.conditions.given()
    check_labels(options.data, given)
    recorded = {} if record is None else record["training"].get("conditions") or {}
    is_of_digits = recorded.get("labels") == "digits"
    if is_prepared(options.data) or is_of_digits != (options.data == "digits"):
        recorded = {}
    return {**recorded, **given}


def _add_conditions(options: Train, labels: dict[str, Any], network: dict[str, Any], diffusion: dict[str, Any]) -> bool:
    """Give a new network the sizes that the data's conditions ask for; True if it learns what guidance needs."""
    channels = 3 if options.cond_channels is None else options.cond_channels
    sizes = sizes_of(options.data, options.exts, labels, channels)
    found = {name: getattr(sizes, name) for name in ("num_classes", "cond_dim", "cond_channels")}
    network.update({name: value for name, value in found.items() if value})
    if diffusion.get("super_resolution") is not None:
        from ddpm_fast.diffusion.super_resolution import unet_arguments

        network.update(unet_arguments(**network))
    can_guide = bool(sizes.num_classes or sizes.cond_dim)
    for option, is_useful, what in (
        ("cond_drop_prob", can_guide, "classes or vectors: --labels or --cond-columns"),
        ("cond_channels", sizes.cond_channels, "condition images: --cond-folder"),
    ):
        if getattr(options, option) is not None and not is_useful:
            raise UserError(f"--{option.replace('_', '-')} is for {what}")
    return can_guide and network.get("cond_drop_prob") != 0


def _defaults_of(options: Train) -> dict[str, Any]:
    """The defaults that depend on the data."""
    from ddpm_fast.training.prepared import PreparedDataset, is_prepared

    data = options.data
    if data == "digits":
        return {**_DIGITS_DEFAULTS, **(_LABELLED_DIGITS_DEFAULTS if options.conditions.labels else {})}
    if not is_prepared(data):
        return _FOLDER_DEFAULTS
    _, channels, height, width = PreparedDataset(data).images.shape
    return {**_FOLDER_DEFAULTS, "channels": channels, "image_size": (height, width)}


def _recorded_training(record: dict[str, Any]) -> dict[str, Any]:
    """Arguments of Trainer in a file's record, but for the seed, which `Trainer.load` takes from there."""
    names = {*_TRAINER.values(), "max_grad_norm", "mixed_precision"} - {"seed"}
    found = {name: value for name, value in record["training"].items() if name in names}
    renamed = (("adam", "lr", "train_lr"), ("adam", "betas", "adam_betas"), ("ema", "beta", "ema_decay"))
    for part, name, argument in (*renamed, ("ema", "update_every", "ema_update_every")):
        if name in record[part]:
            found[argument] = record[part][name]
    return found


def _make_trainer(options: Train, plan: _Plan) -> "Trainer":
    import torch

    from ddpm_fast.diffusion.processes import PROCESSES
    from ddpm_fast.diffusion.xm import XMWrapper
    from ddpm_fast.models.unet import Unet
    from ddpm_fast.training.data import DigitsDataset
    from ddpm_fast.training.prepared import is_prepared
    from ddpm_fast.training.trainer import Trainer

    of_folder = {
        name: getattr(options, name)
        for name in ("exts", "value_range", "background")
        if getattr(options, name) is not None
    }
    if of_folder and (options.data == "digits" or is_prepared(options.data)):
        kind = "the digits" if options.data == "digits" else "a prepared file"
        raise UserError(f"--{next(iter(of_folder)).replace('_', '-')} is for a folder of images, not for {kind}")
    if options.seed is not None:
        if not -(2**63) <= options.seed < 2**64:
            raise UserError(f"--seed must fit in 64 bits; got {options.seed}")
        torch.manual_seed(options.seed)
    diffusion = PROCESSES[plan.process](Unet(**plan.network), **plan.diffusion)
    training = dict(plan.training)
    dataset: Any = options.data
    if options.data == "digits":
        dataset = DigitsDataset(diffusion.image_size, has_classes=bool(plan.labels))
    else:
        of_folder |= plan.labels
    precision = training.pop("mixed_precision")
    return Trainer(
        XMWrapper(diffusion, **plan.wrapper) if plan.wrapper.get("candidates", 1) != 1 else diffusion,
        dataset,
        **training,
        results_folder=options.results_folder,
        amp=None if precision is None else precision != "no",
        mixed_precision_type=precision,
        calculate_fid=options.fid,
        num_workers=options.workers,
        graph=options.graph,
        **of_folder,
    )
