"""Files that are mapped: what the disk cannot read is an OSError, and no signal that ends the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ddpm_fast.runtime.mapped_files import read_pages


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


CUT = """
import os, sys
import numpy as np
import safetensors.torch
from ddpm_fast import PreparedDataset, Unet
from ddpm_fast.training import images_in

path, how = sys.argv[1:]
load, open_memmap = safetensors.torch.load_file, images_in.open_memmap

def cut_off(function):
    def opened(path, *args, **options):
        contents = function(path, *args, **options)
        os.truncate(path, 4096)
        return contents
    return opened

safetensors.torch.load_file, images_in.open_memmap = cut_off(load), cut_off(open_memmap)
try:
    if how == "weights":
        Unet(8, dim_mults=(1, 2)).save_pretrained(path)
        Unet.from_pretrained(path)
    elif how == "image":
        np.save(path + "/a.npy", np.zeros((64, 64, 3), np.uint8))
        images_in._read_array(images_in.Path(path) / "a.npy")
    else:
        np.save(path + "/a.npy", np.ones((9, 3, 64, 64), np.uint8))
        dataset = PreparedDataset(path + "/a.npy")
        whole = dataset.__getitems__([-1, 0, 8]), dataset[8]
        os.truncate(path + "/a.npy", 5 * 3 * 64 * 64)
        dataset.__getitems__([0, 1, -8]), dataset[1]
        {"item": lambda: dataset[8], "items": lambda: dataset.__getitems__([0, -1])}[how]()
except OSError as error:
    print(error)
"""


@needs_populate
@pytest.mark.parametrize(
    ("how", "file"),
    [("weights", "{}/model.safetensors"), ("image", "{}/a.npy"), ("item", "prepared file {}/a.npy"),
     ("items", "prepared file {}/a.npy")],
)  # fmt: skip
def test_other_files_that_are_cut_off(tmp_path, how, file):
    command = [sys.executable, "-c", CUT, str(tmp_path), how]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-2000:])
    assert f"could not read {file.format(tmp_path)}: Input/output error" in ran.stdout


def test_other_memory_is_left_alone():
    tensors = [torch.rand(5000), torch.rand(3)[1:], torch.empty(0), torch.empty(4, device="meta")]
    before = [tensor.clone() for tensor in tensors[:2]]
    read_pages(tensors, "nothing")
    assert all(map(torch.equal, tensors[:2], before))
