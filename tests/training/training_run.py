"""One training run of a small network on the digits, in a process of its own or under torchrun.

Usage: training_run.py RESULTS_FOLDER OPTIONS_AS_JSON [count-reductions | print-order | recorded | MILESTONE_TO_LOAD]
"""

import json
import random
import sys

import torch
from torch import distributed

import ddpm_fast
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training.data import DigitsDataset
from ddpm_fast.training.trainer import Trainer


def main():
    folder, options, *what = sys.argv[1:]
    torch.manual_seed(0)
    model = ddpm_fast.Unet(8, dim_mults=(1, 2), channels=1, self_condition=True, dropout=0.1)
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
    if what == ["recorded"]:
        pretend_to_record()
    trainer = Trainer(diffusion, DigitsDataset(), results_folder=folder, **{**defaults, **json.loads(options)})
    if what == ["count-reductions"]:
        count_reductions(trainer)
    elif what == ["print-order"]:
        print(f"rank {trainer.rank}: {json.dumps(next(iter(trainer.dl.order)))}", flush=True)
    elif what == ["recorded"]:
        trainer.opt.param_groups[0]["lr"] = torch.tensor(trainer.opt.param_groups[0]["lr"])  # as a recording reads it
        trainer.train()
        print(trainer.explain_graphs(), flush=True)
    else:
        if what:
            trainer.load(what[0])
        trainer.train()
    trainer.accelerator.end_training()


def pretend_to_record():
    """A recorder in CUDA's place, and a coin that is drawn from another generator than the times."""
    Trainer._recorder = FrozenRecorder
    DiffusionProcess.draw_self_condition = lambda process: process.self_condition and random.random() < 0.5


def count_reductions(trainer):
    """Print how many times gradients are reduced, whether the ranks' weights agree and their noise differs."""
    count = 0

    def hook(state, bucket):
        nonlocal count
        count += bucket.is_last()
        return distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(state, bucket)

    trainer.model.register_comm_hook(None, hook)
    trainer.train()
    print(f"reductions {count}", flush=True)
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    everyone = trainer.accelerator.gather(weights[None])
    trainer._seed_step()
    noise = trainer.accelerator.gather(torch.randn(1, 8))
    if trainer.accelerator.is_main_process:
        print("ranks equal" if torch.equal(everyone[0], everyone[1]) else "ranks differ")
        print("noise differs" if not torch.equal(noise[0], noise[1]) else "noise equal")


if __name__ == "__main__":
    main()
