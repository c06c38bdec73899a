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
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader

from ddpm_fast._version import __version__
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.discrete_process import DiscreteProcess
from ddpm_fast.diffusion.images import as_floats, identity
from ddpm_fast.diffusion.super_resolution import shrunk
from ddpm_fast.diffusion.xm import XMWrapper, process_of
from ddpm_fast.runtime import recording
from ddpm_fast.runtime.compile_ahead import count_processors
from ddpm_fast.runtime.extras import needed_for
from ddpm_fast.runtime.plain import as_int, as_number, plain, shown
from ddpm_fast.runtime.snapshot import Snapshot
from ddpm_fast.training.average import Average, why_not_averaged
from ddpm_fast.training.batches import (
    Batch,
    BatchOrder,
    BatchStream,
    derive_seed,
)
from ddpm_fast.training.captured_step import (
    NotRecordableError,
    TrainingStep,
    draws_coin_first,
    lay_out_state,
    plain_groups,
    why_not_recorded,
)
from ddpm_fast.training.checkpoint import (
    CheckpointError,
    as_named_in,
    check_average,
    exact_states,
    find_file,
    find_weights,
    first_difference,
    load_average,
    load_file,
    network_name,
    recorded_config,
    save_atomically,
    step_of,
    warn_of_names,
    with_buffers,
)
from ddpm_fast.training.conditioning import check_agreement, plan_grid, spread
from ddpm_fast.training.data import Dataset, DigitsDataset
from ddpm_fast.training.evaluation import FIDEvaluation, FIDUnavailableError
from ddpm_fast.training.history import LossHistory
from ddpm_fast.training.images_out import save_image_grid
from ddpm_fast.training.items import check_items, collate, read_conditions
from ddpm_fast.training.optimizer_step import Adam, OptimizerStep
from ddpm_fast.training.pixels import Color
from ddpm_fast.training.prepared import PreparedDataset, is_a_function_of_the_index, is_prepared
from ddpm_fast.training.resuming import changes, check_class_names, check_process, describe_network
from ddpm_fast.training.state_names import FoundStates, bare_name

with needed_for("Trainer"):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        DataLoaderConfiguration,
        DistributedDataParallelKwargs,
        DistributedType,
        InitProcessGroupKwargs,
        broadcast_object_list,
        gather_object,
    )
    from ema_pytorch import EMA
    from tqdm.auto import tqdm

# Only rank 0 samples at a milestone; the others wait in their next all-reduce for as long as that takes.
_LONGEST_WAIT = timedelta(hours=12)

# What the trainer reads of a diffusion process, besides what every module has.
_ATTRIBUTES = ("channels", "image_size", "sample")
# And of one in timesteps, before the first step instead of at its first sample.
_ATTRIBUTES_OF_TIMESTEPS = ("objective", "num_timesteps", "is_ddim_sampling")
_PRECISIONS = ("no", "fp16", "bf16")
# What images of so many channels are converted to.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class DivergenceError(ValueError):
    """The loss or a gradient stopped being finite."""


class Trainer:
    """Upstream's trainer: same arguments, attributes and checkpoint files, with runs that resume exactly.

    diffusion_model: any process of this package, such as `GaussianDiffusion` or `ElucidatedDiffusion`, or an
        `XMWrapper` around one; files and the average hold the process.
    folder: a folder of images, a file of `ddpm-fast prepare`, or any map-style torch dataset of images (C, h, w),
        floats in [0, 1] or uint8. Its items may be dictionaries of "image" and conditions, "classes", "cond" and
        "cond_image", or pairs (image, label).
    train_batch_size: images per step and accumulation, over all processes (`split_batches=True`) or in each.
    num_samples: any number; the grid has ceil(sqrt(num_samples)) columns.
    seed: fixes order, flips and noise. None draws it from torch's generator, so that `torch.manual_seed` fixes a run;
        after `load` None goes on with the file's.
    num_workers: DataLoader processes per training process; None chooses.
    log_every: steps between two readings of the loss, besides milestones the only times when the host waits for the
        device.
    amp: whether to use mixed precision; None does so on CUDA cards that have bf16.
    mixed_precision_type: "bf16", "fp16" or "no"; None is fp16 on CUDA cards without bf16, else bf16.
    graph: a step is recorded, as CUDA graphs or on the CPU as a tape of operator calls, and replayed with the same
        result. None does so where it can and warns with the reason on CUDA where it cannot (`explain_graphs` says it,
        too), True raises there, False never does.
        What makes the update of the weights, `explain_optimizer` says.
    exts, value_range, background: of a folder, as of `Dataset`; None chooses. A checkpoint records the value range.
    labels, label_column, cond_columns, cond_folder: of a folder, as of `Dataset`: conditions, which the network takes
        by `num_classes`, `cond_dim` and `cond_channels`. A checkpoint records the names of the classes.

    The randomness of a step is a function of (seed, rank, step), and its images are one of (seed, step): a run that
    loads a checkpoint of step k computes what it would have computed without stopping, bit for bit on the CPU.
    Datasets with random transforms of their own share that only with `num_workers=0`.

    Writes to results_folder: model-{milestone}.pt, sample-{milestone}.png, loss.csv and loss.png every
    `save_and_sample_every` steps, and model-last.pt at the end or after Ctrl-C or SIGTERM. With classes the picture has
    a row for each, the first ones if there are many, with the process's own `guidance`.

    Numbers may be numpy's, a float without a fraction (1e5), or tensors of one; files hold plain ones.

    Raises ValueError, TypeError or OSError for unusable arguments or folders.
    """

    # What records a step; None: the recorder of the device.
    _recorder: Any = None

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
        adam_betas = _pair_of_betas(adam_betas)
        results_folder = Path(results_folder)
        mixed_precision = _precision(amp, mixed_precision_type)
        _check_process(diffusion_model)
        if save_best_and_latest_only and not calculate_fid:
            raise ValueError("save_best_and_latest_only=True chooses by FID, so calculate_fid must be True")

        self._mixed_precision = mixed_precision
        network = _network_of(diffusion_model)
        # Without dropped conditions the null condition has no gradient, for which all processes would wait.
        has_unused = hasattr(network, "cond_drop_prob") and not network.cond_drop_prob
        with self._own_precision():
            self.accelerator = Accelerator(
                # Without this, torchrun on a machine without accelerators would start unrelated single runs.
                cpu=not torch.accelerator.is_available(),
                # accelerate 1.x ignores its old argument split_batches=, which upstream still passes.
                dataloader_config=DataLoaderConfiguration(split_batches=bool(split_batches)),
                mixed_precision=mixed_precision,
                kwargs_handlers=[
                    DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=has_unused),
                    InitProcessGroupKwargs(timeout=_LONGEST_WAIT),
                ],
            )
        self.channels = as_int("diffusion_model.channels", diffusion_model.channels, 1)
        self.image_size = _size_of(diffusion_model)
        self.num_samples = num_samples
        self.save_and_sample_every = save_and_sample_every
        self.batch_size = train_batch_size
        self.gradient_accumulate_every = gradient_accumulate_every
        self.train_num_steps = train_num_steps
        self.max_grad_norm = max_grad_norm
        self.log_every = log_every
        self.step = 0

        if convert_image_to is None:
            convert_image_to = _MODES.get(self.channels)
        of_folder = {
            "exts": exts,
            "value_range": value_range,
            "labels": labels,
            "label_column": label_column,
            "cond_columns": cond_columns,
            "cond_folder": cond_folder,
        }
        of_folder = {name: value for name, value in of_folder.items() if value is not None}
        with warnings.catch_warnings():
            if not self.accelerator.is_main_process:
                warnings.simplefilter("ignore")  # the main process says the same
            cond_mode = _MODES.get(getattr(network, "cond_channels", None) or 0)
            self.ds = _as_dataset(folder, self.image_size, convert_image_to, cond_mode, background, of_folder)
            is_normalized = getattr(diffusion_model, "normalize", None) is not identity
            expected = (0, 1) if is_normalized else (-1, 1)
            shape = (self.channels, *self.image_size)
            self._given = check_items(self.ds, shape, None if isinstance(self.ds, Dataset) else expected)
        has_own = _factor_of(_averaged_module(diffusion_model)) is not None
        check_agreement(self._given, network, makes_condition=has_own)
        self._warn_if_small()

        self._is_seed_given = seed is not None
        self.seed = self._agree_on_seed(seed)
        num_workers = _choose_workers(num_workers, self.ds, self.world_size)
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
        self._adam_options = {"fused": True} if self.device.type in ("cpu", "cuda") else {}
        self._recorder = self._recorder or recording.recorder_on(self.device)
        if self._recorder.needs_capturable:
            self._adam_options["capturable"] = True
        self.opt: Any = Adam(diffusion_model.parameters(), lr=train_lr, betas=adam_betas, **self._adam_options)
        if self.accelerator.is_main_process:
            self.ema = EMA(
                _averaged_module(diffusion_model), beta=ema_decay, update_every=ema_update_every, use_foreach=True
            )
            self.ema.to(self.device)
            # Its counters are read by the host at every step: on the device each reading would wait for it.
            self.ema.initted, self.ema.step = self.ema.initted.cpu(), self.ema.step.cpu()

        self.results_folder = results_folder
        self.results_folder.mkdir(parents=True, exist_ok=True)
        own_forward = vars(diffusion_model).get("forward")
        places = None
        if _is_one_or_ddp(self.accelerator.distributed_type):
            # Asked to move a model, accelerate imports torch.distributed.tensor and sympy, 0.4 s, to look for shards.
            diffusion_model.to(self.device)
            places = [False, True]
        with self._own_precision():
            self.model, self.opt = self.accelerator.prepare(diffusion_model, self.opt, device_placement=places)
        self._given_model = diffusion_model
        if mixed_precision != "no" and process_of(diffusion_model) is not None:
            # accelerate's forward casts the loss to float32, which it is already, and would hide the class's own.
            for name in ("forward", "_original_forward"):
                vars(diffusion_model).pop(name, None)
            if own_forward is not None:
                vars(diffusion_model)["forward"] = own_forward
        self._optimizer_step = OptimizerStep(self.opt.optimizer)
        # Of steps that are not recorded, and what it was made of.
        self._average: Average | None = None
        self._averaged: tuple[object, Snapshot] | None = None
        self._graph = graph
        self._captured: TrainingStep | None = None
        # Why a recording failed, once one has.
        self._refusal: str | None = None
        self._said_why_not = False
        if graph and (reason := self._why_not_recorded()) is not None:
            raise ValueError(f"graph=True, and a recording cannot replace the step: {reason}")

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
                    "value_range": _recorded_value_range(self.ds),
                    "conditions": getattr(self.ds, "label_arguments", {}),
                },
            ),
        }
        path = self.results_folder / f"model-{milestone}.pt"
        save_atomically(data, path)
        self._latest_path = path

    def load(self, milestone: int | str | os.PathLike) -> None:
        """Continue from a milestone (1, "last"), a file of the results folder, or a path; every process calls this.

        Files of ours and upstream's, and whatever `load_checkpoint` takes. Weights, average, moments, step and position
        in the data come from the file. The trainer's own arguments hold: `train_lr`, `adam_betas`, `train_batch_size`,
        `ema_decay`, ...; one warning names those that the file has otherwise. The seed is the trainer's if it was
        given, else the file's.

        Raises FileNotFoundError, OSError (unreadable), or CheckpointError: a damaged file, two files or networks that
        could be meant, another architecture, or another process (objective, schedule, image size, min-SNR, ...), with
        old and new values. After an error nothing has been loaded.
        """
        path = find_file(milestone, self.results_folder)
        data = load_file(path, map_location="cpu")
        states = self._find_states(data, path)
        model = self._check_states(data, states, path)
        check_average(data, states, path)
        step = step_of(data, path)
        optimizer = self._optimizer_state(data, path)
        self._warn_of_changes(data, states, path)

        self._diffusion.load_state_dict(model)
        if optimizer is not None:
            self.opt.load_state_dict(optimizer)
            lay_out_state(self.opt)
        if self.accelerator.is_main_process:
            load_average(self.ema, states, self._diffusion, path, step)
        if self.accelerator.scaler is not None and data.get("scaler"):
            self.accelerator.scaler.load_state_dict(data["scaler"])
        self.step = step
        self._continue_order(_training_of(data))

    def train(self) -> None:
        """Train until `train_num_steps`; returns nothing.

        Raises DivergenceError when the loss stops being finite. Ctrl-C is answered with a checkpoint and then raises
        KeyboardInterrupt, SIGTERM with one and then SystemExit(143) (in a single process; torchrun and accelerate
        handle their own).
        """
        if self.accelerator.is_main_process:
            self._history.start(self.step)
        is_shown = self._show_progress and self.accelerator.is_main_process
        bar = tqdm(initial=self.step, total=self.train_num_steps, unit="step", disable=not is_shown)
        with self._own_precision(), self._catch_stop_signals(), bar as self._bar:
            self._start_window()
            self.model.train()
            if self._captured is not None:
                self._captured.renew_copies()
            while self.step < self.train_num_steps:
                self._train_step()
                self._bar.update(1)
                self._report()
            if self._stop_signal:
                self._stop(self._stop_signal)
        self.accelerator.wait_for_everyone()
        self.accelerator.print("training complete")

    def explain_graphs(self) -> str:
        """Whether training replays a recorded step now, and if not, why; one sentence."""
        reason = self._why_not_recorded()
        if reason is not None:
            return f"training runs step by step: {reason}"
        return f"training replays {self._recorder.what}" if self._captured is None else self._captured.explain_graphs()

    def explain_optimizer(self) -> str:
        """What moved weights and their average in the last step, and why no kernel where none did; one sentence."""
        if self._captured is not None:
            return self._captured.explain_optimizer()
        is_main = self.accelerator.is_main_process
        reason = why_not_averaged(self.ema, self._diffusion) if is_main else None
        return self._optimizer_step.explain({"their average": reason})

    @property
    def _trained(self) -> Any:
        """What gives the loss: the process, or a wrapper of it."""
        # accelerate imports torch.compile, 1.2 s, to ask whether a model is compiled.
        return self.model if self.model is self._given_model else self.accelerator.unwrap_model(self.model)

    @property
    def _diffusion(self) -> Any:
        """What is averaged, saved and sampled: the process, or another module of the user's."""
        return _averaged_module(self._trained)

    def _model_state(self) -> dict[str, torch.Tensor]:
        """The state of the process, from wherever accelerate keeps it."""
        trained, prefix = self._trained, ""
        is_whole = _is_one_or_ddp(self.accelerator.distributed_type)
        state = trained.state_dict() if is_whole else self.accelerator.get_state_dict(self.model)
        while trained is not self._diffusion:
            prefix, trained = f"{prefix}flow_model.", trained.flow_model
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    def _train_step(self) -> None:
        """One optimizer step over `gradient_accumulate_every` batches."""
        self._seed_step()
        batches = [self.dl.next_batch() for _ in range(self.gradient_accumulate_every)]
        loss, norm = self._run_recorded(batches) or self._run_step_by_step(batches)
        self.step += 1
        self._losses.append(loss.float())
        self._norms.append(norm.float())

    def _run_recorded(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Loss and gradient norm of a replayed step; None where nothing can be replayed."""
        reason = self._agree_on_recording() if self._captured is None else None
        if reason is None:
            drawn = torch.get_rng_state()
            try:
                self._captured = self._captured or self._capture()
                loss = self._captured(*batches)
                return loss, self._captured.grad_norm.clone()
            except (NotRecordableError, recording.CaptureError) as error:
                if self._graph:
                    raise
                # Weights, moments and the device's generator are as they were.
                torch.set_rng_state(drawn)
                self._captured = None
                reason = self._refusal = error.reason if isinstance(error, NotRecordableError) else str(error)
        self._say_why_not(reason)
        return None

    def _capture(self) -> TrainingStep:
        precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self._mixed_precision)
        return TrainingStep(
            self._trained,
            self.opt.optimizer,
            (self.dl.order.batch_size, self.channels, *self.image_size),
            recorder=self._recorder,
            ema=self.ema if self.accelerator.is_main_process else None,
            max_grad_norm=self.max_grad_norm,
            autocast=precision,
            scaler=self.accelerator.scaler,
            accumulate=self.gradient_accumulate_every,
            any_module=bool(self._graph),
            keep_copies=True,  # nobody else changes weights while `train` runs
            # A process that cannot go on recording still averages gradients as the others do.
            falls_back=self._recorder is recording.TapeRecorder and self.world_size > 1 and not self._graph,
        )

    def _agree_on_recording(self) -> str | None:
        """Why no process records, which holds for good where there are several; they average gradients in one way."""
        reason = self._why_not_recorded()
        if self.world_size == 1 or self._graph is False or self._refusal is not None:
            return reason
        reasons = gather_object([reason])
        self._refusal = next((other for other in reasons if other is not None), None)
        return self._refusal

    def _why_not_recorded(self) -> str | None:
        """Why a recording cannot replace the step, in one clause; None where it can."""
        if self._graph is False:
            return "graph=False was given"
        reason = self._refusal or self._recorder.why_not(self.device)
        if reason is not None:
            return reason
        if getattr(self.model, "_comm_hooks", None):
            return "the model has a hook on its communication, which a replay does not call"
        return why_not_recorded(self._trained, self.opt.optimizer, any_module=bool(self._graph))

    def _say_why_not(self, reason: str) -> None:
        """Once, and only where the user may expect a recording."""
        if self._said_why_not or self._graph is False or self.device.type != "cuda":
            return
        self._said_why_not = True
        if self.accelerator.is_main_process:
            warnings.warn(f"training runs step by step: {reason}", stacklevel=5)

    def _run_step_by_step(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and gradient norm of a step."""
        total_loss: Any = 0.0
        draws = draws_coin_first(self._trained)
        for micro_step, batch in enumerate(batches):
            options = {"self_conditioned": self._trained.draw_self_condition()} if draws else {}
            is_last = micro_step == len(batches) - 1
            # Gradients are summed over processes once per step, in the backward of the last micro-step.
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self.model(batch.images, **batch.options, **options) / self.gradient_accumulate_every
                self.accelerator.backward(loss)
            total_loss = total_loss + loss.detach()
        average, moved = None, frozenset[torch.Tensor]()
        if self._optimizer_step.why_not() is None:
            average = self._average_beside_the_step()
            if average is not None:
                average.begin()
            norm, moved = self._optimizer_step.apply(self.max_grad_norm, self.accelerator.scaler, average)
        else:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.opt.step()
        self.opt.zero_grad()
        if average is not None:
            average.finish(moved)
        elif self.accelerator.is_main_process:
            self.ema.update()
        return total_loss, norm.detach()

    def _average_beside_the_step(self) -> Average | None:
        """What the optimizer's kernel moves of the average; None where `ema.update()` does."""
        if not self.accelerator.is_main_process or why_not_averaged(self.ema, self._diffusion) is not None:
            return None
        average = self._average
        if average is None or self._averaged is None or self._averaged[0] is not self.ema:
            self._average = average = Average(self.ema, self.device, recording.EagerRecorder)
        elif self._averaged[1].holds() and average.holds():
            return average
        else:
            average.refresh()
        self._averaged = self.ema, Snapshot(self._diffusion)
        return average

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
        if self._stop_signal:
            self._stop(self._stop_signal)

    def _read_losses(self) -> None:
        """Fetch the losses since the last reading, check them, and put their mean on record."""
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
        sampler, seed = self.ema.ema_model.eval(), derive_seed(self.seed, "samples")
        num_classes = getattr(_network_of(sampler), "num_classes", None)
        grid = plan_grid(self.ds, self._given, num_classes, self.num_samples, of_images=_factor_of(sampler) is not None)
        indices = spread(len(self.ds), grid.size)
        images = []
        for start in range(0, grid.size, self.batch_size):
            part = slice(start, min(start + self.batch_size, grid.size))
            conditions = {name: values[part] for name, values in grid.conditions.items()}
            images.append(self._draw(indices[part], conditions, seed=seed, start_index=start))
        save_image_grid(torch.cat(images), path, nrow=grid.columns)

    def _draw_as_in_data(self, start: int, end: int) -> torch.Tensor:
        """Of FID's samples those from `start` to `end`, whose conditions are as frequent as the dataset's."""
        indices = spread(len(self.ds), self.fid_scorer.n_samples, start, end)
        return self._draw(indices, read_conditions(self.ds, indices, self._given))

    def _draw(self, indices: Sequence[int], conditions: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """Samples with these conditions; of super-resolution, those of these images at low resolution."""
        sampler, factor = self.ema.ema_model, _factor_of(self.ema.ema_model)
        options |= {name: values.to(self.device) for name, values in conditions.items()} | {"progress": False}
        if factor is None:
            return sampler.sample(batch_size=len(indices), **options)
        images = as_floats(collate([self.ds[index] for index in indices]))
        return sampler.upscale(shrunk(images, factor).to(self.device), **options)

    def _stop(self, number: int) -> NoReturn:
        self._bar.close()
        sentence = f"stopped at step {self.step}; {self._latest_path} resumes from there"
        self.accelerator.print(sentence)
        if number == signal.SIGINT:
            raise KeyboardInterrupt(sentence)
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
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

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
        calls = _calls_of_a_sample(self._diffusion)
        if calls is not None:
            self.accelerator.print(
                f"FID takes {num_fid_samples} samples of {calls} network calls each at every milestone; fewer sampling "
                "steps shorten that"
            )

    @contextlib.contextmanager
    def _own_precision(self) -> Iterator[None]:
        """accelerate keeps one precision for the whole process; in this block it is this trainer's."""
        state = AcceleratorState._shared_state
        earlier = state.get("_mixed_precision", self._mixed_precision)
        if earlier == self._mixed_precision:
            yield
            return
        kind = state.get("distributed_type", DistributedType.NO)
        if not _is_one_or_ddp(kind):
            raise ValueError(
                f"mixed_precision_type must be {earlier!r}, which accelerate keeps for the process under "
                f"{kind.value}; got {self._mixed_precision!r}"
            )
        state["_mixed_precision"] = self._mixed_precision
        try:
            yield
        finally:
            state["_mixed_precision"] = earlier

    def _settings(self) -> dict[str, Any]:
        """The trainer's arguments that a file records besides Adam's and the average's, which have their own places."""
        return {
            "seed": self.seed,
            "train_batch_size": self.batch_size,
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
        config = {
            "unet": self._network_config(),
            "network": network_name(_network_of(getattr(self._diffusion, "_orig_mod", self._diffusion))),
            "process": self._process_name(),
            "diffusion": self._process_config(),
            "xm": self._wrapper_config(),
        }
        ema = {"beta": self.ema.beta, "update_every": self.ema.update_every}
        names = self._given.class_names
        return plain("config", {**config, "ema": ema, "class_names": None if names is None else list(names)})

    def _network_config(self) -> dict[str, Any] | None:
        network = _network_of(getattr(self._diffusion, "_orig_mod", self._diffusion))
        return None if network_name(network) is None else network.config

    def _process(self) -> DiffusionProcess | None:
        """The process, compiled or not; None for another module of the user's."""
        process = getattr(self._diffusion, "_orig_mod", self._diffusion)
        return process if isinstance(process, DiffusionProcess) else None

    def _process_name(self) -> str | None:
        """The registered name of the process's class; the class's own where it is not registered."""
        process = self._process()
        return None if process is None else getattr(process, "process_name", type(process).__name__)

    def _process_config(self) -> dict[str, Any] | None:
        """The process's arguments; of those that are plain attributes, the values of now."""
        process = self._process()
        return None if process is None else {**process.current_config(), "image_size": list(self.image_size)}

    def _wrapper_config(self) -> dict[str, Any] | None:
        """The arguments of an `XMWrapper` around the process."""
        trained = self._trained
        if not isinstance(trained, XMWrapper):
            return None
        return {"candidates": trained.candidates, "max_batch_size": trained.max_batch_size}

    def _find_states(self, data: Any, path: Path) -> FoundStates:
        """The weights of a file, by the names of this trainer's model."""
        own = self._diffusion.state_dict()
        network = f"{getattr(self._process(), 'network_name', 'model')}."
        if isinstance(data, Mapping) and isinstance(data.get("model"), Mapping) and data["model"].keys() == own.keys():
            return exact_states(data, network)
        names = [bare_name(name) for name in own]
        network_names = [name.removeprefix(network) for name in names if name.startswith(network)]
        if not network_names:
            raise CheckpointError(
                f"checkpoint {path} has other names than this trainer's {type(self._diffusion).__name__}"
            )
        process_names = [name for name in names if not name.startswith(network)]
        return find_weights(data, path, network_names, process_names, None if process_names else network[:-1])

    def _check_states(self, data: dict[str, Any], states: FoundStates, path: Path) -> dict[str, torch.Tensor]:
        """The state to load into the model, once it is of this process and this architecture."""
        own = self._diffusion.state_dict()
        check_process(path, data, states, self._process_name(), self._process_config(), own)
        model = as_named_in(self._diffusion, with_buffers(states.model, self._diffusion))
        causes = [
            first_difference(own, model),
            describe_network(path, data, states.model, self._network_config()),
        ]
        if any(causes):
            raise CheckpointError(f"checkpoint {path} is of another architecture: {'; '.join(filter(None, causes))}")
        check_class_names(path, data, self._given.class_names)
        return model

    def _optimizer_state(self, data: dict[str, Any], path: Path) -> dict[str, Any] | None:
        """The file's moments under this trainer's settings of Adam; None, with a warning, if it has none."""
        saved, own = data.get("opt"), self.opt.state_dict()
        if not isinstance(saved, Mapping):
            if self.accelerator.is_main_process:
                warnings.warn(f"{path} holds no state of the optimizer: Adam starts anew", stacklevel=3)
            return None
        sizes = [len(group["params"]) for group in own["param_groups"]]
        groups, state = saved.get("param_groups", []), saved.get("state", {})
        if [len(group["params"]) for group in groups] != sizes:
            raise CheckpointError(
                f"checkpoint {path} has an optimizer of {[len(group['params']) for group in groups]} parameters, "
                f"this trainer's has {sizes}"
            )
        for number, moments in state.items():
            missing = {"step", "exp_avg", "exp_avg_sq"} - set(moments)
            if missing:
                raise CheckpointError(
                    f"checkpoint {path} has an optimizer that is no Adam: parameter {number} has no {min(missing)!r}"
                )
        pairs = zip(groups, own["param_groups"], strict=True)
        fused = self._adam_options.get("fused")  # the device decides
        merged = [{**old, **new, "fused": fused, "params": old["params"]} for old, new in pairs]
        return {**saved, "param_groups": merged}

    def _warn_of_changes(self, data: dict[str, Any], states: FoundStates, path: Path) -> None:
        """One warning that names the settings with which the run goes on otherwise than before."""
        if not self.accelerator.is_main_process:
            return
        warn_of_names(states, path, stacklevel=4)
        recorded = {**_training_of(data), **_adam_of(data), **_average_of(data)}
        now = {
            **self._settings(),
            **_adam_of({"opt": {"param_groups": plain_groups(self.opt.state_dict())}}),
            **_average_of({"config": self._config()}),
        }
        for name in (
            "train_num_steps",
            "save_and_sample_every",
            "num_samples",
            *(() if self._is_seed_given else ["seed"]),
        ):
            now.pop(name)
        clause = changes(recorded, now)
        if clause:
            order = "; the order of the images goes on" if "train_batch_size" in clause else ""
            warnings.warn(f"{path} is continued with {clause}{order}", stacklevel=3)

    def _continue_order(self, training: dict[str, Any]) -> None:
        """Set seed and position in the data from a checkpoint's record; upstream's files have none."""
        if not self._is_seed_given:
            self.seed = training.get("seed", self.seed)
        self.best_fid = training.get("best_fid", math.inf)
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


def _training_of(data: Mapping[str, Any]) -> dict[str, Any]:
    training = data.get("training")
    return dict(training) if isinstance(training, Mapping) else {}


def _adam_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Learning rate and betas of an optimizer's state, under the trainer's names."""
    optimizer = data.get("opt")
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    names = {"lr": "train_lr", "betas": "adam_betas"}
    return plain("opt", {ours: groups[0][name] for name, ours in names.items() if name in groups[0]}) if groups else {}


def _average_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Decay and interval of the average, under the trainer's names."""
    ema = recorded_config(data)["ema"] or {}
    names = {"beta": "ema_decay", "update_every": "ema_update_every"}
    return {ours: ema[name] for name, ours in names.items() if name in ema}


def _as_dataset(
    folder: Any,
    image_size: tuple[int, int],
    convert_image_to: str | None,
    convert_cond_image_to: str | None,
    background: Color,
    of_folder: dict[str, Any],
) -> Any:
    """The dataset of a path; `of_folder` are arguments of `Dataset` that were given."""
    if is_prepared(folder):
        folder = PreparedDataset(folder)
    if isinstance(folder, (str, os.PathLike)):
        return Dataset(
            folder,
            image_size,
            convert_image_to=convert_image_to,
            convert_cond_image_to=convert_cond_image_to,
            background=background,
            dtype=None,
            **of_folder,
        )
    if not hasattr(folder, "__len__") or not hasattr(folder, "__getitem__"):
        raise TypeError(f"folder must be a path or a map-style dataset of images; got {type(folder).__name__}")
    for name, value in of_folder.items():
        raise ValueError(f"{name} is for a folder of images, and folder is a dataset; got {name}={value!r}")
    return folder


def _recorded_value_range(dataset: Any) -> list[float] | None:
    is_known = isinstance(dataset, Dataset) and dataset.value_range is not None
    return list(dataset.value_range) if is_known else None


def _choose_workers(num_workers: int | None, dataset: object, world_size: int) -> int:
    """The number given, or up to 8 of this process's share of the processors; images in memory need none.

    Of a prepared file one process reads ahead.
    """
    if num_workers is not None:
        return num_workers
    if isinstance(dataset, (DigitsDataset, PreparedDataset)):
        return 0 if isinstance(dataset, DigitsDataset) else 1
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, min(8, count_processors() // local_processes))


def _is_one_or_ddp(kind: DistributedType) -> bool:
    """Whether accelerate runs one process, or several that have all weights each."""
    return kind == DistributedType.NO or kind.value.startswith("MULTI_")


def _network_of(module: nn.Module) -> Any:
    """The network of a process, or of another module that calls it `model`."""
    process = process_of(module)
    network = getattr(module, "model", None) if process is None else process.network
    return getattr(network, "_orig_mod", network)


def _factor_of(process: Any) -> int | None:
    """By how much a process enlarges images; None for the others."""
    return getattr(process, "super_resolution", None)


def _averaged_module(module: nn.Module) -> nn.Module:
    """The process in a module, else the module."""
    return process_of(module) or module


def _calls_of_a_sample(process: Any) -> int | None:
    """Network calls of `process.sample`, where they are many and fewer could be asked for; else None."""
    if getattr(process, "is_ddim_sampling", False):
        return None
    if isinstance(process, DiffusionProcess):
        return process.network_calls()
    return getattr(process, "num_timesteps", None)


def _check_process(process: Any) -> None:
    """Raise TypeError or ValueError for a process that lacks what the trainer reads of it."""
    if not isinstance(process, nn.Module):
        raise TypeError(f"diffusion_model must be a module such as GaussianDiffusion; got {type(process).__name__}")
    wanted = (*_ATTRIBUTES, *(_ATTRIBUTES_OF_TIMESTEPS if isinstance(process_of(process), DiscreteProcess) else ()))
    missing = [name for name in wanted if not hasattr(process, name)]
    if missing:
        raise TypeError(
            f"diffusion_model must have the attributes {', '.join(wanted)}; {type(process).__name__} lacks "
            f"{', '.join(missing)}"
        )
    _size_of(process)


def _size_of(process: Any) -> tuple[int, int]:
    """(height, width) of a process, as ints."""
    size = process.image_size
    if size is None:
        raise ValueError("diffusion_model.image_size is None; set it to (height, width) before training")
    entries = size.tolist() if hasattr(size, "tolist") else size
    if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) != 2:
        raise ValueError(f"diffusion_model.image_size must be a pair (height, width); got {shown(size)}")
    height, width = (as_int("diffusion_model.image_size", entry, 1) for entry in entries)
    return height, width


def _pair_of_betas(betas: Any) -> tuple[float, float]:
    values = plain("adam_betas", betas)
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise ValueError(f"adam_betas must be two numbers; got {shown(betas)}")
    first, second = (as_number("adam_betas", value, 0, 1) for value in values)
    return first, second


def _precision(amp: Any, kind: Any) -> str:
    """The name of accelerate's precision; None chooses."""
    if amp is None:
        amp = torch.cuda.is_available() and _has_bf16()
    if not amp:
        return "no"
    if kind is None:
        return "bf16" if _has_bf16() or not torch.cuda.is_available() else "fp16"
    if kind not in _PRECISIONS:
        raise ValueError(f"mixed_precision_type must be one of {', '.join(_PRECISIONS)}; got {shown(kind)}")
    return str(kind)


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
