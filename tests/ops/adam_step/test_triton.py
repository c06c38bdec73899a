"""The kernels of adam_step against torch.optim in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.ops.adam_step import triton as kernel
from ddpm_fast.ops.adam_step.op import AdamSettings, Tables, adam_step
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.adam_cases import CASES, SHAPES, Model, assert_same_as_torch

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"


@pytest.fixture(autouse=True)
def kernels_run():
    with use_backend("triton"):
        yield


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
