"""What files hold of a run: a checkpoint is written, and a run goes on from one."""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from ddpm_fast import __version__
from ddpm_fast.runtime import measured
from ddpm_fast.runtime.plain import plain
from ddpm_fast.training.accelerator import is_one_or_ddp
from ddpm_fast.training.adam_state import plain_groups
from ddpm_fast.training.captured_step import lay_out_state
from ddpm_fast.training.checkpoint import recorded_training
from ddpm_fast.training.checkpoint_files import find_file, load_checked, save_with_sums, step_of
from ddpm_fast.training.checkpoint_states import check_average, load_average
from ddpm_fast.training.data import Dataset
from ddpm_fast.training.items import Given
from ddpm_fast.training.resuming import check_states, find_trained_states, optimizer_state, warn_of_changes
from ddpm_fast.training.step_runner import StepRunner
from ddpm_fast.training.trained import config_of


class SavedRun(StepRunner):
    """The part of `Trainer` that writes and reads checkpoints; `Trainer` sets the attributes."""

    ds: Any
    results_folder: Path
    step: int
    seed: int
    _train_batch_size: int
    train_num_steps: int
    save_and_sample_every: int
    num_samples: int
    best_fid: float
    _given: Given
    _is_seed_given: bool

    def save(self, milestone: int | str) -> None:
        """Write model-{milestone}.pt from the main process, whole or not at all; OSError if the disk refuses it."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        optimizer = self.opt.state_dict()
        data = {
            "step": self.step,
            "model": self._model_state(),
            "opt": {**optimizer, "param_groups": plain("opt.param_groups", plain_groups(optimizer))},
            "ema": self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "version": __version__,
            "config": self._config(),
            "training": plain(
                "training",
                {
                    **self._settings(),
                    "position": self.dl.position,
                    "world_size": self.world_size,
                    "best_fid": self.best_fid,
                    "forms": measured.chosen(),
                    "value_range": _recorded_value_range(self.ds),
                    "conditions": getattr(self.ds, "label_arguments", {}),
                },
            ),
        }
        path = self.results_folder / f"model-{milestone}.pt"
        save_with_sums(data, path)
        self._latest_path = path

    def load(self, milestone: int | str | os.PathLike) -> None:
        """Continue from a milestone (1, "last"), a file of the results folder, or a path; every process calls this.

        Files of ours and upstream's, and whatever `load_checkpoint` takes. Weights, average, moments, step and position
        in the data come from the file. The trainer's own arguments hold: `train_lr`, `adam_betas`, `train_batch_size`,
        `ema_decay`, ...; one warning names those that the file has otherwise. The seed is the trainer's if it was
        given, else the file's.

        Raises:
            FileNotFoundError, OSError: the file cannot be read.
            CheckpointError: a damaged file, two files or networks that could be meant, another architecture, or another
                process (objective, schedule, image size, min-SNR, ...), with old and new values.

        After an error nothing has been loaded.
        """
        path = find_file(milestone, self.results_folder)
        data = load_checked(path, with_moments=True)
        states = find_trained_states(self._diffusion, data, path)
        model = check_states(self._diffusion, self.image_size, self._given.class_names, data, states, path)
        check_average(data, states, path)
        step, training = step_of(data, path), recorded_training(data, path)
        is_main = self.accelerator.is_main_process
        optimizer = optimizer_state(self.opt, data, path, warns=is_main)
        if is_main:
            own = {
                "training": self._settings(),
                "opt": {"param_groups": plain_groups(self.opt.state_dict())},
                "config": self._config(),
            }
            warn_of_changes(data, states, path, own, is_seed_given=self._is_seed_given)

        self._diffusion.load_state_dict(model)
        if optimizer is not None:
            self.opt.load_state_dict(optimizer)
            lay_out_state(self.opt)
        if is_main:
            load_average(self.ema, states, self._diffusion, path, step)
        if self.accelerator.scaler is not None and data.get("scaler"):
            self.accelerator.scaler.load_state_dict(data["scaler"])
        self.step = step
        self._continue_order(training)

    def _model_state(self) -> dict[str, torch.Tensor]:
        """The state of the process, from wherever accelerate keeps it."""
        trained, prefix = self._trained, ""
        is_whole = is_one_or_ddp(self.accelerator)
        state = trained.state_dict() if is_whole else self.accelerator.get_state_dict(self.model)
        while trained is not self._diffusion:
            prefix, trained = f"{prefix}flow_model.", trained.flow_model
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    def _settings(self) -> dict[str, Any]:
        """The trainer's arguments that a file records besides Adam's and the average's, which have their own places."""
        return {
            "seed": self.seed,
            "train_batch_size": self._train_batch_size,
            "gradient_accumulate_every": self.gradient_accumulate_every,
            "train_num_steps": self.train_num_steps,
            "save_and_sample_every": self.save_and_sample_every,
            "num_samples": self.num_samples,
            "max_grad_norm": self.max_grad_norm,
            "augment_horizontal_flip": self.dl.augment_horizontal_flip,
            "mixed_precision": self._mixed_precision,
            "split_batches": self.accelerator.split_batches,
        }

    def _config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild network, diffusion and average, as far as they are this package's."""
        config = config_of(self._trained, self.image_size)
        ema = {"beta": self.ema.beta, "update_every": self.ema.update_every}
        names = self._given.class_names
        return plain("config", {**config, "ema": ema, "class_names": None if names is None else list(names)})

    def _continue_order(self, training: dict[str, Any]) -> None:
        """Set seed, position in the data and forms from a checkpoint's record; upstream's files have none."""
        if not self._is_seed_given:
            self.seed = training.get("seed", self.seed)
        self.best_fid = training.get("best_fid", math.inf)
        measured.adopt(training.get("forms", {}))
        if isinstance(self.ds, Dataset):
            self.ds.keep_value_range(training.get("value_range"))
        consumed = self.step * self.gradient_accumulate_every * self._global_batch_size()
        self.dl.seek(training.get("position", consumed), seed=self.seed)
        earlier = training.get("world_size", self.world_size)
        if earlier != self.world_size and self.accelerator.is_main_process:
            warnings.warn(
                f"the checkpoint was written by {earlier} processes and is continued by {self.world_size}: the order "
                "of the images goes on, the noise differs",
                stacklevel=3,
            )

    def _global_batch_size(self) -> int:
        """Images of all processes in one micro-step."""
        if not self.accelerator.split_batches:
            return self._train_batch_size * self.world_size
        if self._train_batch_size % self.world_size:
            raise ValueError(
                f"train_batch_size is {self._train_batch_size}; with split_batches=True it must be a multiple of the "
                f"{self.world_size} processes"
            )
        return self._train_batch_size


def _recorded_value_range(dataset: Any) -> list[float] | None:
    is_known = isinstance(dataset, Dataset) and dataset.value_range is not None
    return list(dataset.value_range) if is_known else None
