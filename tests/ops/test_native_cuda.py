"""The CUDA kernels on a GPU; their indexing is tested without one in test_cuda_on_host.py."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast import noise, use_backend
from ddpm_fast.ops.noise.op import normal
from ddpm_fast.ops.sampler_step import reference
from ddpm_fast.ops.sampler_step.op import sampler_step, sampler_step_
from ddpm_fast.runtime import extension
from ddpm_fast.testing.guided_step_cases import MASKS, ROWS, SUMS, GuidedStep, guided_table, make_guided
from ddpm_fast.testing.truth import assert_close_to_truth

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

TABLE = [[float("nan")] * 6, [0.9, 0.4, 0.7, 0.5, -0.2, 0.3], [0.8, -0.5, 0.9, 0.1, 0.0, 0.2]]


@pytest.fixture(autouse=True)
def native():
    assert extension.has_cuda(), extension.why_not(torch.device("cuda"))
    with use_backend("native"):
        yield


def make_inputs(shape, dtype=torch.float32, step=1):
    output = torch.randn(shape, device="cuda").to(dtype)
    scalars = [torch.tensor([value], device="cuda") for value in (step, -123456789012345)]
    return torch.randn(shape, device="cuda"), output, torch.tensor(TABLE, device="cuda"), *scalars


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (2, 3, 8, 8), (1, 3, 6, 6), (3, 4, 40, 64), (3, 10), (0, 3, 8, 8)])
def test_equals_the_reference(shape, dtype):
    x, output, table, step, seed = make_inputs(shape, dtype)
    previous = torch.randn_like(x)
    views = [output]
    if output.dim() == 4:
        views.append(output.contiguous(memory_format=torch.channels_last))
    options = {"start_index": 3, "stream": 7}
    theirs = reference.sampler_step(x, output, table, step, seed, x_start_previous=previous, **options)
    wide = (x.double(), output.double(), table.double(), step, seed)
    truth = reference.sampler_step(*wide, x_start_previous=previous.double(), **options)
    for view in views:
        ours = sampler_step(x, view, table, step, seed, x_start_previous=previous, **options)
        for a, b, c in zip(ours, theirs, truth, strict=True):
            assert_close_to_truth(a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (2, 3, 8, 8), (1, 3, 6, 6), (3, 4, 40, 64), (3, 10)])
def test_the_extended_row_equals_the_reference(shape, dtype):
    """Three earlier states, a learned variance and kept noise; in place the history moves on."""
    values = [0.9, 0.4, 0.7, 0.5, -0.2, 0.3, 0.15, -0.1, -0.4, 0.7, 1.1, -0.6]
    x, _, _, step, seed = make_inputs(shape)
    table = torch.tensor([[float("nan")] * 12, values], device="cuda")
    output = torch.randn(shape[0], 2 * shape[1], *shape[2:], device="cuda").to(dtype)
    history = [torch.randn_like(x) for _ in range(3)]
    names = ("x_start_previous", "x_start_previous2", "x_start_previous3")
    options = dict(zip(names, history, strict=True))
    theirs = reference.sampler_step(x, output, table, step, seed, start_index=3, **options)
    wide = (x.double(), output.double(), table.double(), step, seed)
    doubled = {name: tensor.double() for name, tensor in options.items()}
    truth = reference.sampler_step(*wide, start_index=3, **doubled)
    views = [output]
    if output.dim() == 4:
        views.append(output.contiguous(memory_format=torch.channels_last))
    for view in views:
        ours = sampler_step(x, view, table, step, seed, start_index=3, **options)
        for a, b, c in zip(ours, theirs, truth, strict=True):
            assert_close_to_truth(a, b, c)
        states = [x.clone(), *(tensor.clone() for tensor in history)]
        kept = dict(zip(("x_start", "x_start2", "x_start3"), states[1:], strict=True))
        sampler_step_(states[0], view, table, step, seed, start_index=3, **kept)
        expected = (ours[0], ours[1], 1.1 * x - 0.6 * ours[1], history[1])
        torch.testing.assert_close(tuple(states), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5, 1, 7, 9), (2, 3, 64, 64)])
def test_cpu_and_gpu_give_the_same_noise(shape, dtype):
    arguments = {"seed": -5, "stream": 2, "step": 9, "start_index": 4, "dtype": dtype}
    ours = normal(shape, device="cuda", **arguments).cpu()
    torch.testing.assert_close(ours, noise.normal(shape, **arguments), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_guided_row_equals_the_reference(row, dtype):
    for i, shape in enumerate([(5, 3, 7, 9), (2, 3, 8, 8), (1, 3, 6, 6), (3, 4, 40, 64), (2, 3, 200, 300), (3, 10)]):
        for layout in ("halves", "misaligned"):
            case = make_guided(row, shape, dtype, layout=layout, mask=MASKS[i % 4], only_read=bool(i % 2)).to("cuda")
            for run, step, theirs in (
                (GuidedStep.run, sampler_step, reference.sampler_step),
                (GuidedStep.run_in_place, sampler_step_, reference.sampler_step_),
            ):
                actual, expected, truth = run(case, step), run(case, theirs), run(case.doubled(), theirs)
                for name, tensor in actual.items():
                    assert_close_to_truth(tensor, expected[name], truth[name], name=f"{shape} {layout} {name}")


@pytest.mark.parametrize("row", [*SUMS, "w"])
def test_a_guided_sample_does_not_depend_on_its_batch(row):
    case = make_guided(row, (5, 3, 91, 76), torch.bfloat16, layout="halves").to("cuda")
    whole = case.run(sampler_step)
    x, output, *rest = case.arguments
    options = {k: v[2:3] if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    options["start_index"] += 2
    one = GuidedStep((x[2:3], output[2:3], *rest), tuple(t[2:3] for t in case.history), options)
    for name, tensor in one.run(sampler_step).items():
        assert torch.equal(tensor, whole[name][2:3]), name


def test_a_graph_replays_guided_and_neutral_rows():
    case = make_guided("everything with sums", (2, 3, 16, 16)).to("cuda")
    x, output, table, step, seed = case.arguments
    table = torch.stack([table[1], guided_table()[1].cuda()])
    update = case.options["update"]
    start, momentum = x.clone(), update.clone()
    options = {name: value for name, value in case.options.items() if name not in ("known", "mask", "noise")}
    step.fill_(0)
    sampler_step_(x, output, table, step, seed, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sampler_step_(x, output, table, step, seed, **options)
    for row in (0, 1, 0):
        x.copy_(start)
        update.copy_(momentum)
        step.fill_(row)
        graph.replay()
        expected_update = momentum.clone()
        expected = reference.sampler_step(start, output, table, step, seed, **{**options, "update": expected_update})[0]
        torch.testing.assert_close((x, update), (expected, expected_update), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [-1, 3, 2**40])
def test_a_step_outside_the_table_is_nan(step):
    inputs = make_inputs((2, 3, 8, 8), step=step)
    x_next, x_start = sampler_step(*inputs, x_start_previous=torch.zeros_like(inputs[0]))
    assert x_next.isnan().all() and x_start.isnan().all()


def test_a_graph_replays_with_new_step_and_seed():
    x, output, table, step, seed = make_inputs((2, 3, 16, 16), step=2)
    start = x.clone()
    graph = torch.cuda.CUDAGraph()
    sampler_step_(x, output, table, step, seed)
    with torch.cuda.graph(graph):
        sampler_step_(x, output, table, step, seed)
    for value in (7, 8):
        x.copy_(start)
        seed.fill_(value)
        graph.replay()
        expected = reference.sampler_step(start, output, table, step, seed)[0]
        torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
