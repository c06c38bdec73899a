"""The trainer's Adam is torch's fused one on the CPU: its numbers, its files, and the layout that it relies on."""

from __future__ import annotations

import pytest
import torch

import ddpm_fast
from ddpm_fast import capture_training_step
from ddpm_fast.training.data import DigitsDataset
from ddpm_fast.training.trainer import Trainer


def make_trainer(folder) -> Trainer:
    torch.manual_seed(0)
    model = ddpm_fast.Unet(8, dim_mults=(1, 2), channels=1)
    diffusion = ddpm_fast.GaussianDiffusion(model, image_size=8, timesteps=20)
    return Trainer(
        diffusion, DigitsDataset(), results_folder=folder, train_batch_size=16, calculate_fid=False, seed=0,
        num_workers=0, progress=False, train_num_steps=20,
    )  # fmt: skip


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def take_steps(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer._train_step()


def use_default_adam(trainer: Trainer) -> None:
    for group in trainer.opt.param_groups:
        group["fused"] = None


def assert_same_weights(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def test_twenty_steps_equal_those_of_the_default_adam(tmp_path):
    trainer, plain = make_trainer(tmp_path), make_trainer(tmp_path)
    assert trainer.opt.param_groups[0]["fused"] is True
    use_default_adam(plain)
    before = parameters(trainer)
    take_steps(trainer, 20)
    take_steps(plain, 20)
    assert_same_weights(parameters(trainer), parameters(plain))
    assert all(not torch.equal(*pair) for pair in zip(before, parameters(trainer), strict=True))


@pytest.mark.parametrize("written_by_fused", [True, False])
def test_files_load_both_ways(tmp_path, written_by_fused):
    first, second = make_trainer(tmp_path), make_trainer(tmp_path)
    use_default_adam(second if written_by_fused else first)
    take_steps(first, 3)
    first.save(1)
    saved = torch.load(tmp_path / "model-1.pt", weights_only=True)["opt"]
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    loading = torch.optim.Adam(second.model.parameters())
    loading.load_state_dict(saved)  # as upstream does
    second.load(1)
    assert second.opt.param_groups[0]["fused"] is True, "the device decides, not the file"
    take_steps(first, 5)
    take_steps(second, 5)
    assert_same_weights(parameters(first), parameters(second))


def channels_last_moments(optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if parameter.ndim == 4:
                state[name] = state[name].contiguous(memory_format=torch.channels_last)


def test_moments_in_another_layout_are_laid_out_anew(tmp_path):
    """A run on CUDA has channels-last weights, and its file moments in the same layout."""
    trainer, other = make_trainer(tmp_path), make_trainer(tmp_path)
    take_steps(trainer, 3)
    channels_last_moments(trainer.opt)
    trainer.save(1)
    for each in (trainer, other):
        each.load(1)
    use_default_adam(other)
    take_steps(trainer, 3)
    take_steps(other, 3)
    assert_same_weights(parameters(trainer), parameters(other))


def test_the_training_step_lays_moments_out_anew():
    results = []
    for options in ({"fused": True}, {}):
        torch.manual_seed(0)
        model = ddpm_fast.Unet(8, dim_mults=(1, 2))
        diffusion = ddpm_fast.GaussianDiffusion(model, image_size=8, timesteps=20)
        optimizer = torch.optim.Adam(diffusion.parameters(), 1e-3, **options)
        step = capture_training_step(diffusion, optimizer, (2, 3, 8, 8))
        torch.manual_seed(1)
        for images in torch.rand(4, 2, 3, 8, 8):
            step(images)
            channels_last_moments(optimizer)
        results.append([parameter.detach() for parameter in diffusion.parameters()])
    assert_same_weights(*results)
