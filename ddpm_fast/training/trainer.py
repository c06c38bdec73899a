"""Training on Hugging Face accelerate: one device, or many with `accelerate launch` and `torchrun`."""

from __future__ import annotations

import math
import os
import random
import signal
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader

from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.images import identity
from ddpm_fast.diffusion.xm import XMWrapper
from ddpm_fast.runtime import recording
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.plain import as_flag, as_int, as_number
from ddpm_fast.training.accelerator import make_accelerator, own_precision, prepare
from ddpm_fast.training.arguments import (
    as_dataset,
    check_process,
    choose_precision,
    choose_workers,
    mode_of,
    pair_of_betas,
    size_of,
)
from ddpm_fast.training.atomic_files import make_folder
from ddpm_fast.training.batches import BatchOrder, BatchStream, derive_seed
from ddpm_fast.training.conditioning import check_agreement, spread
from ddpm_fast.training.data import Dataset
from ddpm_fast.training.evaluation import FIDEvaluation, FIDUnavailableError
from ddpm_fast.training.history import LossHistory
from ddpm_fast.training.items import check_items, collate, read_conditions
from ddpm_fast.training.optimizer_step import Adam
from ddpm_fast.training.pixels import Color
from ddpm_fast.training.prepared import is_a_function_of_the_index
from ddpm_fast.training.samples import draw, save_grid
from ddpm_fast.training.saved_run import SavedRun
from ddpm_fast.training.stop_signals import StopSignals
from ddpm_fast.training.trained import averaged_module, calls_of_a_sample, factor_of, network_of

with needed_for("Trainer"):
    from accelerate.utils import broadcast_object_list
    from ema_pytorch import EMA
    from tqdm.auto import tqdm


# Attributes that are positive integers.
_COUNTS = (
    "train_num_steps", "gradient_accumulate_every", "save_and_sample_every", "num_samples", "batch_size", "log_every",
)  # fmt: skip


class DivergenceError(ValueError):
    """The loss or a gradient stopped being finite."""


class Trainer(SavedRun):
    """Upstream's trainer: same arguments, attributes and checkpoint files, with runs that resume exactly.

    Args:
        diffusion_model: any process of this package, such as `GaussianDiffusion` or `ElucidatedDiffusion`, or an
            `XMWrapper` around one; files and the average hold the process.
        folder: a folder of images, a file of `ddpm-fast prepare`, or any map-style torch dataset of images (C, h, w),
            floats in [0, 1] or uint8. Its items may be dictionaries of "image" and conditions, "classes", "cond" and
            "cond_image", or pairs (image, label).
        train_batch_size: images per step and accumulation, over all processes (`split_batches=True`) or in each.
        num_samples: any number; the grid has ceil(sqrt(num_samples)) columns.
        seed: fixes order, flips and noise. None draws it from torch's generator, so that `torch.manual_seed` fixes a
            run; after `load` None goes on with the file's.
        num_workers: DataLoader processes per training process; None chooses.
        log_every: steps between two readings of the loss, besides milestones the only times when the host waits for the
            device.
        amp: whether to use mixed precision; None does so on CUDA cards that have bf16.
        mixed_precision_type: "bf16", "fp16" (on the CPU that is float32, with a warning) or "no"; None is fp16 on CUDA
            cards without bf16, else bf16.
        graph: a step is recorded, as CUDA graphs or on the CPU as a tape of operator calls, and replayed with the same
            result. None does so where it can and warns with the reason on CUDA where it cannot (`explain_graphs` says
            it, too), True raises there, False never does.
        exts, value_range, background: of a folder, as of `Dataset`; None chooses. A checkpoint records the value range.
        labels, label_column, cond_columns, cond_folder: of a folder, as of `Dataset`: conditions, which the network
            takes by `num_classes`, `cond_dim` and `cond_channels`. A checkpoint records the names of the classes.
        others: upstream's.

    The randomness of a step is a function of (seed, rank, step), and its images are one of (seed, step): a run that
    loads a checkpoint of step k computes what it would have computed without stopping, bit for bit on the CPU.
    Datasets with random transforms of their own share that only with `num_workers=0`.

    Writes to results_folder: model-{milestone}.pt, sample-{milestone}.png, loss.csv and loss.png every
    `save_and_sample_every` steps, and model-last.pt at the end or after Ctrl-C or SIGTERM. With classes the picture has
    a row for each, the first ones if there are many, with the process's own `guidance`.

    `explain_optimizer` says what moves the weights. Numbers may be numpy's, a float without a fraction (1e5), or
    tensors of one; files hold plain ones.

    Raises:
        TypeError, ValueError: an argument does not fit, named in one sentence.
        OSError: a folder cannot be read or written.
    """

    def __init__(
        self,
        diffusion_model: DiffusionProcess | XMWrapper | nn.Module,
        folder: str | os.PathLike | torch.utils.data.Dataset,
        *,
        train_batch_size: int = 16,
        gradient_accumulate_every: int = 1,
        augment_horizontal_flip: bool = True,
        train_lr: float = 1e-4,
        train_num_steps: int = 100000,
        ema_update_every: int = 10,
        ema_decay: float = 0.995,
        adam_betas: tuple[float, float] = (0.9, 0.99),
        save_and_sample_every: int = 1000,
        num_samples: int = 25,
        results_folder: str | os.PathLike = "./results",
        amp: bool | None = None,
        mixed_precision_type: str | None = None,
        split_batches: bool = True,
        convert_image_to: str | None = None,
        calculate_fid: bool = True,
        inception_block_idx: int = 2048,
        max_grad_norm: float = 1.0,
        num_fid_samples: int = 50000,
        save_best_and_latest_only: bool = False,
        seed: int | None = None,
        num_workers: int | None = None,
        progress: bool = True,
        log_every: int = 20,
        exts: Sequence[str] | None = None,
        value_range: Sequence[float] | None = None,
        background: Color = "white",
        graph: bool | None = None,
        labels: str | os.PathLike | None = None,
        label_column: str | None = None,
        cond_columns: Sequence[str] | None = None,
        cond_folder: str | os.PathLike | None = None,
    ):
        train_batch_size = as_int("train_batch_size", train_batch_size, 1)
        gradient_accumulate_every = as_int("gradient_accumulate_every", gradient_accumulate_every, 1)
        train_num_steps = as_int("train_num_steps", train_num_steps, 1)
        ema_update_every = as_int("ema_update_every", ema_update_every, 1)
        save_and_sample_every = as_int("save_and_sample_every", save_and_sample_every, 1)
        num_samples = as_int("num_samples", num_samples, 1)
        inception_block_idx = as_int("inception_block_idx", inception_block_idx)
        num_fid_samples = as_int("num_fid_samples", num_fid_samples, 1)
        log_every = as_int("log_every", log_every, 1)
        seed = None if seed is None else as_int("seed", seed)
        num_workers = None if num_workers is None else as_int("num_workers", num_workers, 0)
        train_lr = as_number("train_lr", train_lr, 0)
        ema_decay = as_number("ema_decay", ema_decay, 0, 1)
        max_grad_norm = as_number("max_grad_norm", max_grad_norm, 0)
        adam_betas = pair_of_betas(adam_betas)
        augment_horizontal_flip = as_flag("augment_horizontal_flip", augment_horizontal_flip)
        split_batches = as_flag("split_batches", split_batches)
        calculate_fid = as_flag("calculate_fid", calculate_fid)
        save_best_and_latest_only = as_flag("save_best_and_latest_only", save_best_and_latest_only)
        progress = as_flag("progress", progress)
        graph = None if graph is None else as_flag("graph", graph)
        results_folder = Path(results_folder)
        mixed_precision = choose_precision(amp, mixed_precision_type)
        check_process(diffusion_model)
        if save_best_and_latest_only and not calculate_fid:
            raise ValueError("save_best_and_latest_only=True chooses by FID, so calculate_fid must be True")

        self._mixed_precision = mixed_precision
        network = network_of(diffusion_model)
        # Without dropped conditions the null condition has no gradient, for which all processes would wait.
        has_unused = hasattr(network, "cond_drop_prob") and not network.cond_drop_prob
        self.accelerator = make_accelerator(mixed_precision, split_batches, has_unused)
        self.channels = as_int("diffusion_model.channels", diffusion_model.channels, 1)
        self.image_size = size_of(diffusion_model)
        self.num_samples = num_samples
        self.save_and_sample_every = save_and_sample_every
        self._train_batch_size = train_batch_size
        self.batch_size = train_batch_size  # of samples: what is assigned later changes no batch of training
        self.gradient_accumulate_every = gradient_accumulate_every
        self.train_num_steps = train_num_steps
        self.max_grad_norm = max_grad_norm
        self.log_every = log_every
        self.step = 0

        with warnings.catch_warnings():
            if not self.accelerator.is_main_process:
                warnings.simplefilter("ignore")  # the main process says the same
            self.ds = as_dataset(
                folder,
                self.image_size,
                background,
                convert_image_to=mode_of(self.channels) if convert_image_to is None else convert_image_to,
                convert_cond_image_to=mode_of(getattr(network, "cond_channels", None)),
                exts=exts,
                value_range=value_range,
                labels=labels,
                label_column=label_column,
                cond_columns=cond_columns,
                cond_folder=cond_folder,
            )
            is_normalized = getattr(diffusion_model, "normalize", None) is not identity
            expected = (0, 1) if is_normalized else (-1, 1)
            shape = (self.channels, *self.image_size)
            self._given = check_items(self.ds, shape, None if isinstance(self.ds, Dataset) else expected)
        has_own = factor_of(averaged_module(diffusion_model)) is not None
        check_agreement(self._given, network, makes_condition=has_own)
        self._warn_if_small()
        self._warn_if_float32(mixed_precision)

        self._is_seed_given = seed is not None
        self.seed = self._agree_on_seed(seed)
        num_workers = choose_workers(num_workers, self.ds, self.world_size)
        self.dl = BatchStream(
            self.ds,
            BatchOrder(len(self.ds), self._global_batch_size(), self.seed, self.rank, self.world_size),
            device=self.device,
            augment_horizontal_flip=augment_horizontal_flip,
            num_workers=num_workers,
            as_bytes=getattr(diffusion_model, "takes_bytes", False),
            reads_ahead=num_workers > 0 or is_a_function_of_the_index(self.ds),
            num_classes=getattr(network, "num_classes", None),
        )

        # Adam in one pass: at 35.7 million parameters a quarter of the time of its default on the CPU. On CUDA it is
        # also the one that skips a step of fp16's scaler without asking the device whether to; a recording needs its
        # count of steps there, too.
        options = {"fused": True} if self.device.type in ("cpu", "cuda") else {}
        self._recorder = self._recorder or recording.recorder_on(self.device)
        if self._recorder.needs_capturable:
            options["capturable"] = True
        self.opt: Any = Adam(diffusion_model.parameters(), lr=train_lr, betas=adam_betas, **options)
        if self.accelerator.is_main_process:
            self.ema = EMA(
                averaged_module(diffusion_model), beta=ema_decay, update_every=ema_update_every, use_foreach=True
            )
            self.ema.to(self.device)
            # Its counters are read by the host at every step: on the device each reading would wait for it.
            self.ema.initted, self.ema.step = self.ema.initted.cpu(), self.ema.step.cpu()

        self.results_folder = results_folder
        make_folder(self.results_folder, "results_folder")
        self.model, self.opt = prepare(self.accelerator, diffusion_model, self.opt, mixed_precision)
        self._given_model = diffusion_model
        self._prepare_steps(graph)

        self.calculate_fid = calculate_fid and self.accelerator.is_main_process
        self.save_best_and_latest_only = save_best_and_latest_only
        self.best_fid = math.inf
        if self.calculate_fid:
            self._make_fid_scorer(num_fid_samples, inception_block_idx)

        self._history = LossHistory(self.results_folder)
        self._bar = tqdm(disable=True)
        self._show_progress = progress
        self._stop_signals = StopSignals()
        self._start_window()

    def train(self) -> None:
        """Train until `train_num_steps`; returns nothing.

        Raises:
            ValueError: a setting that was assigned to an attribute does not fit, named in one sentence.
            DivergenceError: the loss or a gradient stopped being finite.
            KeyboardInterrupt, SystemExit(143): after Ctrl-C or SIGTERM, once model-last.pt is written (in a single
                process; torchrun and accelerate handle their own).
        """
        self._check_settings()
        if self.accelerator.is_main_process:
            self._history.start(self.step)
        is_shown = self._show_progress and self.accelerator.is_main_process
        bar = tqdm(initial=self.step, total=self.train_num_steps, unit="step", disable=not is_shown)
        # torchrun and accelerate have handlers of their own.
        stopping = self._stop_signals.caught() if self.world_size == 1 else nullcontext()
        with own_precision(self._mixed_precision), stopping, bar as self._bar:
            self._start_window()
            self.model.train()
            if self._captured is not None:
                self._captured.renew_copies()
            while self.step < self.train_num_steps:
                self._train_step()
                self._bar.update(1)
                self._report()
            if self._stop_signals.noted:
                self._stop(self._stop_signals.noted)
        self.accelerator.wait_for_everyone()
        self.accelerator.print("training complete")

    def _check_settings(self) -> None:
        """Check what may have been assigned since construction, and follow it."""
        for name in _COUNTS:
            setattr(self, name, as_int(name, getattr(self, name), 1))
        self.step = as_int("step", self.step, 0)
        self.seed = as_int("seed", self.seed)
        self.max_grad_norm = as_number("max_grad_norm", self.max_grad_norm, 0)
        self.best_fid = as_number("best_fid", self.best_fid)
        if self.seed != self.dl.order.seed:
            self.dl.seek(self.dl.position, self.seed)
        folder = Path(self.results_folder)
        if folder != self._history.path.parent:
            make_folder(folder, "results_folder")
            self._history = LossHistory(folder)
        self.results_folder = folder
        if self.accelerator.is_main_process:
            if self.calculate_fid and not hasattr(self, "fid_scorer"):
                raise ValueError("calculate_fid must be True when the trainer is made; got True afterwards")
            if self.save_best_and_latest_only and not self.calculate_fid:
                raise ValueError("save_best_and_latest_only=True chooses by FID, so calculate_fid must be True")

    def _train_step(self) -> None:
        """One optimizer step over `gradient_accumulate_every` batches."""
        self._follow_replacements()
        self._seed_step()
        batches = [self.dl.next_batch() for _ in range(self.gradient_accumulate_every)]
        loss, norm = self._run_recorded(batches) or self._run_step_by_step(batches)
        self.step += 1
        self._losses.append(loss.float())
        self._norms.append(norm.float())

    def _seed_step(self) -> None:
        """Make what is drawn in this step a function of (seed, rank, step)."""
        step_seed = derive_seed(self.seed, "step", self.rank, self.step)
        torch.manual_seed(step_seed)
        random.seed(step_seed)

    def _report(self) -> None:
        """What is due after a step: reading the loss, a milestone, the last checkpoint, or stopping."""
        is_milestone = self.step % self.save_and_sample_every == 0
        is_end = self.step >= self.train_num_steps
        if is_milestone or is_end or self._stop_signals.noted or self.step % self.log_every == 0:
            self._read_losses()
        if self.accelerator.is_main_process:
            if is_milestone:
                self._finish_milestone(self.step // self.save_and_sample_every)
            elif is_end or self._stop_signals.noted:
                self.save("last")
                self._history.plot()
        if is_milestone:
            self._start_window()
        if self._stop_signals.noted:
            self._stop(self._stop_signals.noted)

    def _read_losses(self) -> None:
        """Fetch the losses since the last reading, check them, and put their mean on record."""
        self._agree_on_forms()
        losses = self.accelerator.reduce(torch.stack(self._losses), reduction="mean")
        values = losses.tolist()
        self._check_finite(values, torch.stack(self._norms).tolist())
        seconds = time.perf_counter() - self._window_began
        images = len(losses) * self._global_batch_size() * self.gradient_accumulate_every
        loss, images_per_second = math.fsum(values) / len(values), images / seconds
        if self.accelerator.is_main_process:
            self._history.append(self.step, loss, images_per_second)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s")
        self._start_window()

    def _check_finite(self, losses: Sequence[float], norms: Sequence[float]) -> None:
        """Raise DivergenceError naming the first bad step; fp16 may overflow now and then, its scaler skips those."""
        if self.accelerator.scaler is not None:
            is_bad = [not any(map(math.isfinite, losses))]
        else:
            is_bad = [not math.isfinite(loss + norm) for loss, norm in zip(losses, norms, strict=True)]
        if any(is_bad):
            index = is_bad.index(True)
            step = self.step - len(losses) + 1 + index
            has_checkpoints = any(self.results_folder.glob("model-*.pt"))
            kept = f"earlier checkpoints in {self.results_folder} are untouched (" if has_checkpoints else "("
            raise DivergenceError(
                f"training diverged at step {step}: loss {losses[index]}, gradient norm {norms[index]}; "
                f"{kept}a lower learning rate may help)"
            )

    def _start_window(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._window_began = time.perf_counter()

    def _finish_milestone(self, milestone: int) -> None:
        """Checkpoint, sample grid, loss plot, and FID where asked; on the main process."""
        if not self.save_best_and_latest_only:
            self.save(milestone)
        self._save_samples(self.results_folder / f"sample-{milestone}.png")
        self._history.plot()
        if self.calculate_fid:
            fid_score = self.fid_scorer.fid_score()
            self.accelerator.print(f"fid_score: {fid_score}")
        if isinstance(self.ema.ema_model, DiffusionProcess):
            self.ema.ema_model.clear_graphs()  # their memory is training's again
        if self.save_best_and_latest_only:
            if fid_score < self.best_fid:
                self.best_fid = float(fid_score)
                self.save("best")
            self.save("latest")

    def _save_samples(self, path: Path) -> None:
        """A grid from the EMA weights, from the same noise and conditions at every milestone."""
        save_grid(
            path,
            self.ema.ema_model.eval(),
            self.ds,
            self._given,
            self.device,
            count=self.num_samples,
            batch_size=self.batch_size,
            seed=derive_seed(self.seed, "samples"),
        )

    def _draw_as_in_data(self, start: int, end: int) -> torch.Tensor:
        """Of FID's samples those from `start` to `end`, whose conditions are as frequent as the dataset's."""
        indices = spread(len(self.ds), self.fid_scorer.n_samples, start, end)
        return draw(self.ema.ema_model, self.ds, indices, read_conditions(self.ds, indices, self._given), self.device)

    def _stop(self, number: int) -> NoReturn:
        self._bar.close()
        sentence = f"stopped at step {self.step}; {self._latest_path} resumes from there"
        self.accelerator.print(sentence)
        if number == signal.SIGINT:
            raise KeyboardInterrupt(sentence)
        raise SystemExit(128 + number)

    def _agree_on_seed(self, seed: int | None) -> int:
        """The given seed, or one drawn by the main process; the same in all processes."""
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        agreed = [seed]
        broadcast_object_list(agreed)
        return agreed[0]

    def _warn_if_float32(self, mixed_precision: str) -> None:
        if mixed_precision == "fp16" and not self.accelerator.native_amp and self.accelerator.is_main_process:
            warnings.warn(f"fp16 is not there on {self.device.type}: training runs in float32 (bf16 is)", stacklevel=3)

    def _warn_if_small(self) -> None:
        effective = self._global_batch_size() * self.gradient_accumulate_every  # a size that does not split ends all
        if not self.accelerator.is_main_process:
            return
        if len(self.ds) < 100:
            warnings.warn(f"only {len(self.ds)} images to train on; 10,000 or more are recommended", stacklevel=3)
        if effective < 16:
            warnings.warn(
                f"the effective batch size (train_batch_size x gradient_accumulate_every) is {effective}; "
                "16 or more is recommended",
                stacklevel=3,
            )

    def _make_fid_scorer(self, num_fid_samples: int, inception_block_idx: int) -> None:
        """FID on its own pass over the data; without pytorch_fid or its weights, a warning and no FID."""
        try:
            self.fid_scorer = FIDEvaluation(
                batch_size=self.batch_size,
                dl=DataLoader(self.ds, self.batch_size, collate_fn=collate),
                sampler=self.ema.ema_model,
                channels=self.channels,
                accelerator=self.accelerator,
                stats_dir=self.results_folder,
                device=self.device,
                num_fid_samples=num_fid_samples,
                inception_block_idx=inception_block_idx,
                draw=self._draw_as_in_data,
            )
        except FIDUnavailableError as error:
            if self.save_best_and_latest_only:
                raise FIDUnavailableError(f"save_best_and_latest_only=True chooses by FID, but {error}") from error
            warnings.warn(f"FID is switched off: {error}", stacklevel=3)
            self.calculate_fid = False
            return
        calls = calls_of_a_sample(self._diffusion)
        if calls is not None:
            self.accelerator.print(
                f"FID takes {num_fid_samples} samples of {calls} network calls each at every milestone; fewer sampling "
                "steps shorten that"
            )
