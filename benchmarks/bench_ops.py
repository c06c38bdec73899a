"""Ops of this package against eager torch: `pytest benchmarks/bench_ops.py` (pytest-benchmark prints the table).

Nothing is timed that has not just been found equal to the reference. `--benchmark-disable` only checks.
"""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import noise, schedules, use_backend
from ddpm_fast.ops.noise.op import fill_normal_
from ddpm_fast.ops.sampler_step.op import sampler_step_

ELEMENTS = {"1M": (8, 3, 128, 341), "3K": (1, 3, 32, 32)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ELEMENTS)
def shape(request):
    return ELEMENTS[request.param]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_noise(benchmark, shape, backend):
    out = torch.empty(shape)
    with use_backend(backend):
        torch.testing.assert_close(fill_normal_(out, 3, stream=0), noise.normal(shape, seed=3), rtol=1e-5, atol=2e-6)
        seed = noise.seed_tensor(3)
        benchmark(lambda: fill_normal_(out, seed, stream=0))


def test_noise_eager_torch(benchmark, shape):
    out = torch.empty(shape)
    benchmark(lambda: out.normal_())


def step_arguments(shape, dtype):
    schedule = schedules.Schedule(schedules.make_betas("cosine", 100))
    table = schedules.sampler_table(schedule, "pred_v", "ddpm", 100).table.float()
    return torch.randn(shape), torch.randn(shape).to(dtype), table, torch.tensor([50]), noise.seed_tensor(3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_sampler_step(benchmark, shape, dtype, backend):
    x, *arguments = step_arguments(shape, DTYPES[dtype])
    with use_backend("reference"):
        expected = sampler_step_(x.clone(), *arguments)
    with use_backend(backend):
        torch.testing.assert_close(sampler_step_(x.clone(), *arguments), expected, rtol=1e-5, atol=5e-6)
        benchmark(lambda: sampler_step_(x, *arguments))


def test_sampler_step_eager_torch(benchmark, shape):
    """What the peer does per step after the network, in its operators."""
    x, output, table, _, _ = step_arguments(shape, torch.float32)
    p, q, r, s, _, sigma = (column.reshape(1, 1, 1, 1) for column in table[50])

    def step():
        x_start = (p * x + q * output).clamp_(-1.0, 1.0)
        return r * x_start + s * x + sigma * torch.randn_like(x)

    benchmark(step)
