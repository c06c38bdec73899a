"""Training runs of a small network on the digits, in processes of their own, one after another.

Usage: training_run.py PROCESSES GROUPS, where GROUPS is JSON: a list of groups of runs, each group in new processes.
A run is [results folder, the trainer's options, what], and what is "" (train), the milestone to continue, "order",
"reductions", "forms", "recorded", "taped", "hook first", "hook later" or "refused". What a rank has to say is in
rank-RANK.txt of the folder of its run.

This process imports torch once and forks the ranks, with torchrun's variables. Under torchrun it is a rank itself, and
with PROCESSES = 0 it runs all by itself.
"""

import importlib
import json
import os
import random
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch import distributed

import ddpm_fast
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.runtime import measured
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training.data import DigitsDataset
from ddpm_fast.training.history import LossHistory
from ddpm_fast.training.trainer import Trainer


def main():
    processes, groups = int(sys.argv[1]), json.loads(sys.argv[2])
    LossHistory.plot = lambda history: None  # drawing takes longer than these runs
    for runs in groups:
        if "RANK" in os.environ or processes == 0:
            run_all(runs)
        else:
            fork_ranks(processes, runs)


def run_all(runs: list) -> None:
    for folder, options, what in runs:
        trainer = run(Path(folder), options, what)
    trainer.accelerator.end_training()


def fork_ranks(processes: int, runs: list) -> None:
    """Run in forked processes, which find each other through this one's store if they are several."""
    for name in ("torch._dynamo", "sklearn.datasets"):  # what a training run imports takes longer than the run
        importlib.import_module(name)
    variables = {}
    if processes > 1:
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        variables |= {"TORCHELASTIC_RESTART_COUNT": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    ranks = [fork_rank(rank, variables, runs) for rank in range(processes)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    if any(codes):
        sys.exit(f"the ranks ended with {codes}")


def fork_rank(rank: int, variables: dict, runs: list) -> int:
    """Returns the process's number; the process itself never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if variables:
            os.environ.update({k: str(v) for k, v in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items()})
        run_all(runs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def make_trainer(folder: Path, options: dict) -> Trainer:
    torch.manual_seed(0)
    options = dict(options)
    drop = options.pop("cond_drop_prob", None)  # where it is given, each image has its digit as its class
    classes = {} if drop is None else {"num_classes": 10, "cond_drop_prob": drop}
    model = ddpm_fast.Unet(8, dim_mults=(1, 2), channels=1, self_condition=True, dropout=0.1, **classes)
    diffusion = ddpm_fast.GaussianDiffusion(model, image_size=8, timesteps=20)
    defaults = dict(
        train_batch_size=16,
        gradient_accumulate_every=2,
        calculate_fid=False,
        save_and_sample_every=1000,
        ema_update_every=1,
        progress=False,
        log_every=1,
        seed=0,
        num_workers=1,
        train_lr=1e-3,
    )
    return Trainer(
        diffusion, DigitsDataset(has_classes=drop is not None), results_folder=folder, **{**defaults, **options}
    )


def run(folder: Path, options: dict, what: str) -> Trainer:
    """One run; returns its trainer."""
    if what == "recorded":
        return train_recorded(folder, options)
    trainer = make_trainer(folder, {} if what == "refused" else options)
    if what == "refused":
        try:
            make_trainer(folder, options)
        except ValueError as error:
            say(trainer, str(error))
    elif what == "reductions":
        count_reductions(trainer)
    elif what in ("taped", "hook first", "hook later"):
        train_with_a_hook(trainer, at={"taped": None, "hook first": 0, "hook later": 3}[what])
    elif what == "forms":
        choose_otherwise(trainer)
    elif what == "order":
        say(trainer, json.dumps(next(iter(trainer.dl.order))))
    else:
        if what:
            trainer.load(what)
        trainer.train()
    return trainer


def say(trainer: Trainer, text: str) -> None:
    with open(trainer.results_folder / f"rank-{trainer.rank}.txt", "a") as file:
        file.write(f"{text}\n")


def train_recorded(folder: Path, options: dict) -> Trainer:
    """A recorder in CUDA's place, and a coin that is drawn from another generator than the times."""

    def draw(process):
        return process.self_condition and random.random() < 0.5

    with (
        mock.patch.object(Trainer, "_recorder", FrozenRecorder),
        mock.patch.object(DiffusionProcess, "draw_self_condition", draw),
    ):
        trainer = make_trainer(folder, options)
        trainer.opt.param_groups[0]["lr"] = torch.tensor(trainer.opt.param_groups[0]["lr"])  # as a recording reads it
        trainer.train()
        say(trainer, trainer.explain_graphs())
    return trainer


def train_with_a_hook(trainer, at: int | None) -> None:
    """Before a step the first process alone gets a hook, which a tape would not call."""
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    whole_step = trainer._train_step

    def step():
        if trainer.step == at and trainer.rank == 0:
            trainer._diffusion.model.register_forward_pre_hook(count)
        whole_step()

    trainer._train_step = step
    trainer.train()
    captured = trainer._captured
    tapes = captured is not None and captured.recorder.records_calls and bool(captured._recordings)
    say(trainer, f"{trainer.explain_graphs()}; {tapes=}, hooks={calls > 0}")


def choose_otherwise(trainer):
    """The ranks measure different times for one computation, and each one of its own."""
    for key, fused in ("both", 1 + 2 * trainer.rank), (f"rank {trainer.rank}", 3):
        measured._choices["op", key] = measured.Choice({measured.FUSED: fused, measured.SEPARATE: 2})
    trainer.train()
    say(trainer, json.dumps(measured.chosen(), sort_keys=True))
    measured.forget()


def count_reductions(trainer):
    """Say how many times gradients are reduced, whether the ranks' weights agree and their noise differs."""
    count = 0

    def hook(state, bucket):
        nonlocal count
        count += bucket.is_last()
        return distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(state, bucket)

    trainer.model.register_comm_hook(None, hook)
    trainer.train()
    say(trainer, f"reductions {count}")
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    everyone = trainer.accelerator.gather(weights[None])
    trainer._seed_step()
    noise = trainer.accelerator.gather(torch.randn(1, 8))
    if trainer.accelerator.is_main_process:
        say(trainer, "ranks equal" if torch.equal(everyone[0], everyone[1]) else "ranks differ")
        say(trainer, "noise differs" if not torch.equal(noise[0], noise[1]) else "noise equal")


if __name__ == "__main__":
    main()
