"""The kernels of adam_step against torch.optim in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import GaussianDiffusion
from ddpm_fast.ops.adam_step import triton as kernel
from ddpm_fast.ops.adam_step.op import AdamSettings, Tables, adam_step
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.runtime.recording import EagerRecorder
from ddpm_fast.testing.adam_cases import CASES, SHAPES, Model, assert_same_as_torch
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training.captured_step import TrainingStep
from ddpm_fast.training.optimizer_step import OptimizerStep

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def kernels_run():
    with use_backend("triton"):
        yield


@pytest.mark.release(
    but=lambda case, _arithmetic=None: _arithmetic is None or case in ("clipped", "average", "two groups")
)
@pytest.mark.arithmetic
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case):
    assert_same_as_torch(DEVICE, **CASES[case])


def test_sizes_cover_the_kernels_paths():
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    assert any(size > kernel.CHUNK for size in sizes) and any(0 < size % kernel.BLOCK < 4 for size in sizes)
    assert any(size == 0 for size in sizes) and any(size > kernel.CHUNK and size % kernel.BLOCK for size in sizes)


def run(model, tables=None, **options):
    return adam_step(*model.lists, [AdamSettings(len(model.params), 1e-2)], tables=tables, **options)


def test_the_same_bits_every_time():
    results = []
    for _ in range(2):
        model = Model(DEVICE)
        norm, _ = run(model, max_grad_norm=1.0)
        results.append([norm, *model.params, *model.exp_avgs, *model.exp_avg_sqs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_outside_a_tensor_is_touched():
    model = Model(DEVICE)
    guarded = []

    def place(tensor):
        memory = torch.full((tensor.numel() + 64,), float("nan"), device=DEVICE)
        guarded.append((memory, tensor.numel()))
        return memory[32 : 32 + tensor.numel()].view(tensor.shape).copy_(tensor)

    model.params, model.grads = [place(p) for p in model.params], [place(g) for g in model.grads]
    model.exp_avgs, model.exp_avg_sqs = [place(e) for e in model.exp_avgs], [place(e) for e in model.exp_avg_sqs]
    norm, _ = run(model, max_grad_norm=1.0, averages=[place(p) for p in model.params])
    assert torch.isfinite(norm)
    for memory, size in guarded:
        assert memory[:32].isnan().all() and memory[32 + size :].isnan().all()
        assert memory[32 : 32 + size].isfinite().all()


def test_tables_are_made_again_when_tensors_move():
    model, tables = Model(DEVICE), Tables()
    expected = Model(DEVICE)
    run(model, tables)
    first = tables.held
    model.draw()
    run(model, tables)
    assert tables.held is first, "gradients have addresses of their own"
    model.params = [p.clone() for p in model.params]
    model.draw()
    run(model, tables)
    assert tables.held is not first
    for _ in range(3):
        run(expected)
        expected.draw()
    assert all(torch.equal(a, b) for a, b in zip(model.params, expected.params, strict=True))


def test_a_gradient_that_is_not_finite_without_a_scale_is_torchs_own_matter():
    """As in torch: weights become NaN, and nothing is skipped."""
    model = Model(DEVICE)
    model.grads[3][5] = float("nan")
    norm, skipped = run(model, max_grad_norm=1.0)
    assert norm.isnan() and skipped == 0 and all(p.isnan().all() for p in model.params)


def test_bias_correction_near_and_far():
    """1 − β^t to float32's accuracy for every t: a first step would lose four digits otherwise."""
    for first_step in (0, 100, 249, 10**4):
        assert_same_as_torch(DEVICE, first_step=first_step, betas=(0.999, 0.9999))


def test_moments_in_another_layout_are_refused():
    model = Model(DEVICE)
    model.exp_avgs[2] = model.exp_avgs[2].contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="strides"):
        run(model)


def test_the_kernels_run():
    with use_backend(None), dispatch.watch_choices() as choices:
        run(Model(DEVICE))
    assert [(op, backend) for op, backend, _ in choices] == [("adam_step", "triton")]


class Tiny(torch.nn.Module):
    """A network of two convolutions."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Conv2d(5, 3, 1)

    def forward(self, x, t, x_self_cond=None):
        return self.last(self.first(x) * t[:, None, None, None].cos())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_step_by_the_kernels(scaled):
    """Recorded and not the same bits, and the weights of torch's clipping and Adam."""
    results = []
    for recorder, by_torch in ((FrozenRecorder, False), (EagerRecorder, False), (EagerRecorder, True)):
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(Tiny(), image_size=4, timesteps=10).to(DEVICE)
        optimizer = torch.optim.Adam(
            diffusion.parameters(), torch.tensor(1e-2, device=DEVICE), fused=True, capturable=True
        )
        scaler = torch.amp.GradScaler(torch.device(DEVICE).type, init_scale=2.0**10) if scaled else None
        step = TrainingStep(
            diffusion, optimizer, (2, 3, 4, 4), recorder=recorder, scaler=scaler, max_grad_norm=0.5, any_module=True
        )
        assert step._optimizer_step.why_not() == "there is no gradient"
        with pytest.MonkeyPatch.context() as patch:
            if by_torch:
                patch.setattr(OptimizerStep, "why_not", lambda step: "not asked")
            for index in range(2):
                torch.manual_seed(index)
                loss = step(torch.rand(2, 3, 4, 4).to(DEVICE))
        results.append([loss, step.grad_norm, *(p.detach() for p in diffusion.parameters())])
    recorded, eager, torchs = results
    assert all(torch.equal(a, b) for a, b in zip(recorded, eager, strict=True))
    for ours, theirs in zip(eager, torchs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
