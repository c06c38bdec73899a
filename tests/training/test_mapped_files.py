"""Checkpoints that are mapped: what the disk cannot read is an OSError, and no signal that ends the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ddpm_fast.training.mapped_files import read_pages


def _can_populate() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor.split("-")[0])) >= (5, 14)


needs_populate = pytest.mark.skipif(not _can_populate(), reason="only Linux 5.14 and later tell of such pages")

RUN = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
from ddpm_fast import GaussianDiffusion, Trainer, Unet, load_checkpoint
from ddpm_fast.training import checkpoint_files

diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=4)
trainer = Trainer(
    diffusion, torch.rand(16, 3, 8, 8), results_folder=sys.argv[1], train_batch_size=16, train_num_steps=1,
    calculate_fid=False, progress=False, num_workers=0,
)
trainer.save(1)
load = checkpoint_files._load

def cut_off(path, *options):
    contents = load(path, *options)
    os.truncate(path, 4096)
    return contents

checkpoint_files._load = cut_off
try:
    load_checkpoint(f"{sys.argv[1]}/model-1.pt") if sys.argv[2] == "load_checkpoint" else trainer.load(1)
except OSError as error:
    print(error)
"""


@needs_populate
@pytest.mark.parametrize("function", ["load_checkpoint", "Trainer.load"])
def test_a_file_that_is_cut_off_while_it_is_read(tmp_path, function):
    command = [sys.executable, "-c", RUN, str(tmp_path), function]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])
    assert f"could not read checkpoint {tmp_path}/model-1.pt: Input/output error" in ran.stdout


def test_other_memory_is_left_alone():
    tensors = [torch.rand(5000), torch.rand(3)[1:], torch.empty(0), torch.empty(4, device="meta")]
    before = [tensor.clone() for tensor in tensors[:2]]
    read_pages(tensors)
    assert all(map(torch.equal, tensors[:2], before))
