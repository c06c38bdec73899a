"""The trainer on a CUDA device: no step waits for it."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 200

    def __getitem__(self, index):
        return torch.full((3, 16, 16), index / 200)


@pytest.fixture(autouse=True)
def _accelerate_anew():
    """accelerate keeps the precision of its first use in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_waits_for_nothing(precision, num_workers, tmp_path):
    diffusion = GaussianDiffusion(Unet(16, dim_mults=(1, 2), self_condition=True), image_size=16, timesteps=12)
    options = {"train_batch_size": 16, "gradient_accumulate_every": 2, "calculate_fid": False, "progress": False}
    trainer = Trainer(
        diffusion, Images(), results_folder=tmp_path, amp=precision != "no", mixed_precision_type=precision, **options,
        num_workers=num_workers, ema_update_every=2,
    )  # fmt: skip
    assert trainer.device.type == "cuda" and trainer.opt.param_groups[0]["fused"] is True
    for _ in range(8):  # kernels are compiled, pinned memory is there, both sides of the coin
        trainer._train_step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(6):
        trainer._train_step()
    torch.cuda.set_sync_debug_mode("default")
    trainer._read_losses()


def test_files_of_an_adam_that_is_not_fused_load(tmp_path):
    """Its count of steps is in the host's memory, and the fused one's on the device."""
    options = {"train_batch_size": 16, "calculate_fid": False, "progress": False, "seed": 0, "num_workers": 0}

    def make() -> Trainer:
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(Unet(16, dim_mults=(1, 2)), image_size=16, timesteps=12)
        return Trainer(diffusion, Images(), results_folder=tmp_path, **options)

    trainer = make()
    for group in trainer.opt.param_groups:
        group["fused"] = None
    trainer._train_step()
    assert next(iter(trainer.opt.state.values()))["step"].device.type == "cpu"
    trainer.save(1)
    other = make()
    other.load(1)
    assert other.opt.param_groups[0]["fused"] is True
    assert next(iter(other.opt.state.values()))["step"].device.type == "cuda"
    for each in (trainer, other):
        each._train_step()
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)
