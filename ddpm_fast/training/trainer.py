"""Training on Hugging Face accelerate: one device, or many with `accelerate launch` and `torchrun`."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch.optim import Adam
from torch.utils.data import DataLoader

from ddpm_fast._version import __version__
from ddpm_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.training.batches import BatchOrder, BatchStream, derive_seed
from ddpm_fast.training.captured_step import lay_out_state
from ddpm_fast.training.checkpoint import CheckpointError, load_ema, load_file, load_matching, save_atomically
from ddpm_fast.training.data import Dataset, DigitsDataset, save_image_grid
from ddpm_fast.training.evaluation import FIDEvaluation, FIDUnavailableError
from ddpm_fast.training.history import LossHistory

with needed_for("Trainer"):
    from accelerate import Accelerator
    from accelerate.utils import (
        DataLoaderConfiguration,
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
        broadcast_object_list,
    )
    from ema_pytorch import EMA
    from tqdm.auto import tqdm

# Only rank 0 samples at a milestone; the others wait in their next all-reduce for as long as that takes.
_LONGEST_WAIT = timedelta(hours=12)


class DivergenceError(ValueError):
    """The loss or a gradient stopped being finite."""


class Trainer:
    """Upstream's trainer: same arguments, attributes and checkpoint files, with runs that resume exactly.

    folder: a folder of images, or any map-style torch dataset of float images (C, h, w) in [0, 1].
    train_batch_size: images per step and accumulation, over all processes (`split_batches=True`) or in each.
    num_samples: any number; the grid has ceil(sqrt(num_samples)) columns.
    seed: fixes order, flips and noise. None draws it from torch's generator, so that `torch.manual_seed` fixes a run.
    num_workers: DataLoader processes per training process; None chooses.
    log_every: steps between two readings of the loss, besides milestones the only times when the host waits for the
        device.

    The randomness of a step is a function of (seed, rank, step), and its images are one of (seed, step): a run that
    loads a checkpoint of step k computes what it would have computed without stopping, bit for bit on the CPU.
    Datasets with random transforms of their own share that only with `num_workers=0`.

    Writes to results_folder: model-{milestone}.pt, sample-{milestone}.png, loss.csv and loss.png every
    `save_and_sample_every` steps, and model-last.pt at the end or after Ctrl-C or SIGTERM.

    Raises ValueError, TypeError or OSError for unusable arguments or folders.
    """

    def __init__(
        self,
        diffusion_model: GaussianDiffusion,
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
        amp: bool = False,
        mixed_precision_type: str = "fp16",
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
    ):
        _check_positive_integers(
            train_batch_size=train_batch_size,
            gradient_accumulate_every=gradient_accumulate_every,
            train_num_steps=train_num_steps,
            save_and_sample_every=save_and_sample_every,
            num_samples=num_samples,
            log_every=log_every,
        )
        if diffusion_model.image_size is None:
            raise ValueError("diffusion_model.image_size is None; set it to (height, width) before training")
        if save_best_and_latest_only and not calculate_fid:
            raise ValueError("save_best_and_latest_only=True chooses by FID, so calculate_fid must be True")

        self.accelerator = Accelerator(
            # Without this, torchrun on a machine without accelerators would start unrelated single runs.
            cpu=not torch.accelerator.is_available(),
            # accelerate 1.x ignores its old argument split_batches=, which upstream still passes.
            dataloader_config=DataLoaderConfiguration(split_batches=split_batches),
            mixed_precision=mixed_precision_type if amp else "no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=_LONGEST_WAIT),
            ],
        )
        self.channels = diffusion_model.channels
        self.image_size = diffusion_model.image_size
        self.num_samples = num_samples
        self.save_and_sample_every = save_and_sample_every
        self.batch_size = train_batch_size
        self.gradient_accumulate_every = gradient_accumulate_every
        self.train_num_steps = train_num_steps
        self.max_grad_norm = max_grad_norm
        self.log_every = log_every
        self.step = 0

        if convert_image_to is None:
            convert_image_to = {1: "L", 3: "RGB", 4: "RGBA"}.get(self.channels)
        self.ds = _as_dataset(folder, self.image_size, convert_image_to)
        _check_first_image(self.ds, (self.channels, *self.image_size))
        self._warn_if_small()

        self.seed = self._agree_on_seed(seed)
        self.dl = BatchStream(
            self.ds,
            BatchOrder(len(self.ds), self._global_batch_size(), self.seed, self.rank, self.world_size),
            device=self.device,
            augment_horizontal_flip=augment_horizontal_flip,
            num_workers=_choose_workers(num_workers, self.ds, self.world_size),
        )

        # Adam in one pass: at 35.7 million parameters a quarter of the time of its default on the CPU. On CUDA it is
        # also the one that skips a step of fp16's scaler without asking the device whether to.
        self._adam_options = {"fused": True} if self.device.type in ("cpu", "cuda") else {}
        self.opt = Adam(diffusion_model.parameters(), lr=train_lr, betas=adam_betas, **self._adam_options)
        self._ema_config = {"beta": ema_decay, "update_every": ema_update_every}
        if self.accelerator.is_main_process:
            self.ema = EMA(diffusion_model, **self._ema_config, use_foreach=True)
            self.ema.to(self.device)
            # Its counters are read by the host at every step: on the device each reading would wait for it.
            self.ema.initted, self.ema.step = self.ema.initted.cpu(), self.ema.step.cpu()

        self.results_folder = Path(results_folder)
        self.results_folder.mkdir(parents=True, exist_ok=True)
        self.model, self.opt = self.accelerator.prepare(diffusion_model, self.opt)

        self.calculate_fid = calculate_fid and self.accelerator.is_main_process
        self.save_best_and_latest_only = save_best_and_latest_only
        self.best_fid = math.inf
        if self.calculate_fid:
            self._make_fid_scorer(num_fid_samples, inception_block_idx)

        self._history = LossHistory(self.results_folder)
        self._bar = tqdm(disable=True)
        self._show_progress = progress
        self._stop_signal: int | None = None
        self._start_window()

    @property
    def device(self) -> torch.device:
        """The device this process trains on."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Index of this process among all of them."""
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return self.accelerator.num_processes

    def save(self, milestone: int | str) -> None:
        """Write model-{milestone}.pt from the main process, whole or not at all; OSError if the disk refuses it."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        data = {
            "step": self.step,
            "model": self.accelerator.get_state_dict(self.model),
            "opt": self.opt.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "version": __version__,
            "config": self._config(),
            "training": {
                "seed": self.seed,
                "position": self.dl.position,
                "world_size": self.world_size,
                "best_fid": self.best_fid,
            },
        }
        self._latest_path = self._checkpoint_path(milestone)
        save_atomically(data, self._latest_path)

    def load(self, milestone: int | str) -> None:
        """Continue from model-{milestone}.pt, ours or upstream's; every process calls this.

        The seed of our files replaces the trainer's. Raises FileNotFoundError, or CheckpointError for a damaged file,
        another architecture or another objective.
        """
        path = self._checkpoint_path(milestone)
        data = load_file(path, map_location="cpu")
        if not isinstance(data, dict) or not {"step", "model", "opt", "ema"} <= data.keys():
            raise CheckpointError(f"checkpoint {path} is no trainer's file: step, model, opt or ema is missing")
        self._check_objective(data, path)
        load_matching(self._diffusion, data["model"], path)
        # What a file says of speed is of the device that wrote it.
        groups = [{**group, "fused": self._adam_options.get("fused")} for group in data["opt"]["param_groups"]]
        self.opt.load_state_dict({**data["opt"], "param_groups": groups})
        lay_out_state(self.opt)
        if self.accelerator.is_main_process:
            load_ema(self.ema, data["ema"], path)
        if self.accelerator.scaler is not None and data.get("scaler") is not None:
            self.accelerator.scaler.load_state_dict(data["scaler"])
        self.step = data["step"]
        self._continue_order(data.get("training", {}))

    def train(self) -> None:
        """Train until `train_num_steps`; returns nothing.

        Raises DivergenceError when the loss stops being finite, SystemExit(128 + signal) after Ctrl-C or SIGTERM has
        been answered with a checkpoint (in a single process; torchrun and accelerate handle their own).
        """
        if self.accelerator.is_main_process:
            self._history.start(self.step)
        is_shown = self._show_progress and self.accelerator.is_main_process
        bar = tqdm(initial=self.step, total=self.train_num_steps, unit="step", disable=not is_shown)
        with self._catch_stop_signals(), bar as self._bar:
            self._start_window()
            while self.step < self.train_num_steps:
                self._train_step()
                self._bar.update(1)
                self._report()
        self.accelerator.wait_for_everyone()
        self.accelerator.print("training complete")

    @property
    def _diffusion(self) -> GaussianDiffusion:
        return self.accelerator.unwrap_model(self.model)

    def _train_step(self) -> None:
        """One optimizer step over `gradient_accumulate_every` batches."""
        self._seed_step()
        self.model.train()
        total_loss: Any = 0.0
        for micro_step in range(self.gradient_accumulate_every):
            images = next(self.dl)
            is_last = micro_step == self.gradient_accumulate_every - 1
            # Gradients are summed over processes once per step, in the backward of the last micro-step.
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.model(images) / self.gradient_accumulate_every
                self.accelerator.backward(loss)
            total_loss = total_loss + loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.opt.step()
        self.opt.zero_grad()
        self.step += 1
        self._losses.append(total_loss.float())
        self._norms.append(norm.detach().float())
        if self.accelerator.is_main_process:
            self.ema.update()

    def _seed_step(self) -> None:
        """Make what is drawn in this step a function of (seed, rank, step)."""
        step_seed = derive_seed(self.seed, "step", self.rank, self.step)
        torch.manual_seed(step_seed)
        random.seed(step_seed)

    def _report(self) -> None:
        """What is due after a step: reading the loss, a milestone, the last checkpoint, or stopping."""
        is_milestone = self.step % self.save_and_sample_every == 0
        is_end = self.step >= self.train_num_steps
        if is_milestone or is_end or self._stop_signal or self.step % self.log_every == 0:
            self._read_losses()
        if self.accelerator.is_main_process:
            if is_milestone:
                self._finish_milestone(self.step // self.save_and_sample_every)
            elif is_end or self._stop_signal:
                self.save("last")
                self._history.plot()
        if is_milestone:
            self._start_window()
        if self._stop_signal and not is_end:
            self._stop(self._stop_signal)

    def _read_losses(self) -> None:
        """Fetch the losses since the last reading, check them, and put their mean on record."""
        losses = self.accelerator.reduce(torch.stack(self._losses), reduction="mean")
        self._check_finite(losses.tolist(), torch.stack(self._norms).tolist())
        seconds = time.perf_counter() - self._window_began
        images = len(losses) * self._global_batch_size() * self.gradient_accumulate_every
        loss, images_per_second = losses.double().mean().item(), images / seconds
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
            raise DivergenceError(
                f"training diverged at step {step}: loss {losses[index]}, gradient norm {norms[index]}; earlier "
                f"checkpoints in {self.results_folder} are untouched (a lower learning rate may help)"
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
        if isinstance(self.ema.ema_model, GaussianDiffusion):
            self.ema.ema_model.clear_graphs()  # their memory is training's again
        if self.save_best_and_latest_only:
            if fid_score < self.best_fid:
                self.best_fid = float(fid_score)
                self.save("best")
            self.save("latest")

    def _save_samples(self, path: Path) -> None:
        """A grid from the EMA weights, from the same noise at every milestone."""
        self.ema.ema_model.eval()
        starts = range(0, self.num_samples, self.batch_size)
        images = [
            self.ema.ema_model.sample(
                batch_size=min(self.batch_size, self.num_samples - start),
                seed=derive_seed(self.seed, "samples"),
                start_index=start,
                progress=False,
            )
            for start in starts
        ]
        save_image_grid(torch.cat(images), path, nrow=math.ceil(math.sqrt(self.num_samples)))

    def _stop(self, number: int) -> NoReturn:
        self._bar.close()
        self.accelerator.print(f"stopped at step {self.step}; {self._latest_path} resumes from there")
        raise SystemExit(128 + number)

    @contextlib.contextmanager
    def _catch_stop_signals(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the run after the current step; a second Ctrl-C ends it at once."""
        if self.world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.signal(number, self._note_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._stop_signal = None
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _note_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = number
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    def _agree_on_seed(self, seed: int | None) -> int:
        """The given seed, or one drawn by the main process; the same in all processes."""
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        agreed = [seed]
        broadcast_object_list(agreed)
        return agreed[0]

    def _global_batch_size(self) -> int:
        """Images of all processes in one micro-step."""
        if not self.accelerator.split_batches:
            return self.batch_size * self.world_size
        if self.batch_size % self.world_size:
            raise ValueError(
                f"train_batch_size is {self.batch_size}; with split_batches=True it must be a multiple of the "
                f"{self.world_size} processes"
            )
        return self.batch_size

    def _warn_if_small(self) -> None:
        if not self.accelerator.is_main_process:
            return
        if len(self.ds) < 100:
            warnings.warn(f"only {len(self.ds)} images to train on; 10,000 or more are recommended", stacklevel=3)
        effective = self._global_batch_size() * self.gradient_accumulate_every
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
                dl=DataLoader(self.ds, self.batch_size),
                sampler=self.ema.ema_model,
                channels=self.channels,
                accelerator=self.accelerator,
                stats_dir=self.results_folder,
                device=self.device,
                num_fid_samples=num_fid_samples,
                inception_block_idx=inception_block_idx,
            )
        except FIDUnavailableError as error:
            if self.save_best_and_latest_only:
                raise FIDUnavailableError(f"save_best_and_latest_only=True chooses by FID, but {error}") from error
            warnings.warn(f"FID is switched off: {error}", stacklevel=3)
            self.calculate_fid = False
            return
        if not self._diffusion.is_ddim_sampling:
            self.accelerator.print(
                f"FID takes {num_fid_samples} samples of {self._diffusion.num_timesteps} steps each at every "
                "milestone; sampling_timesteps shortens that"
            )

    def _config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild the diffusion, as far as its classes keep them."""
        diffusion = self._diffusion
        return {
            "unet": getattr(diffusion.model, "config", None),
            "diffusion": getattr(diffusion, "config", None),
            "ema": self._ema_config,
        }

    def _check_objective(self, data: dict[str, Any], path: Path) -> None:
        """The same tensors fit every objective, so only the record tells that a file belongs to another one."""
        recorded = ((data.get("config") or {}).get("diffusion") or {}).get("objective")
        if recorded not in (None, self._diffusion.objective):
            raise CheckpointError(
                f"checkpoint {path} was trained with objective={recorded!r}, this trainer's diffusion has "
                f"{self._diffusion.objective!r}"
            )

    def _continue_order(self, training: dict[str, Any]) -> None:
        """Set seed and position in the data from a checkpoint's record; upstream's files have none."""
        self.seed = training.get("seed", self.seed)
        self.best_fid = training.get("best_fid", math.inf)
        consumed = self.step * self.gradient_accumulate_every * self._global_batch_size()
        self.dl.seek(training.get("position", consumed), seed=self.seed)
        earlier = training.get("world_size", self.world_size)
        if earlier != self.world_size and self.accelerator.is_main_process:
            warnings.warn(
                f"the checkpoint was written by {earlier} processes and is continued by {self.world_size}: the order "
                "of the images goes on, the noise differs",
                stacklevel=3,
            )

    def _checkpoint_path(self, milestone: int | str) -> Path:
        return self.results_folder / f"model-{milestone}.pt"


def _as_dataset(folder: Any, image_size: tuple[int, int], convert_image_to: str | None) -> Any:
    if isinstance(folder, (str, os.PathLike)):
        return Dataset(folder, image_size, convert_image_to=convert_image_to)
    if hasattr(folder, "__len__") and hasattr(folder, "__getitem__"):
        return folder
    raise TypeError(f"folder must be a path or a map-style dataset of images; got {type(folder).__name__}")


def _check_first_image(dataset: Any, shape: tuple[int, ...]) -> None:
    if len(dataset) == 0:
        raise ValueError("folder is a dataset without images")
    image = dataset[0]
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"folder must give image tensors in [0, 1]; its first item is a {type(image).__name__}")
    if not image.is_floating_point() or tuple(image.shape) != shape:
        raise ValueError(
            f"folder must give float images of shape {shape} in [0, 1]; its first is {image.dtype} {tuple(image.shape)}"
        )


def _choose_workers(num_workers: int | None, dataset: object, world_size: int) -> int:
    """The number given, or up to 8 of this process's share of the processors; images in memory need none."""
    if num_workers is not None:
        return num_workers
    if isinstance(dataset, DigitsDataset):
        return 0
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, min(8, len(os.sched_getaffinity(0)) // local_processes))


def _check_positive_integers(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}")
