"""The variational bound in C++ against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import noise, use_backend
from ddpm_fast.noise import Noise
from ddpm_fast.ops import q_sample
from ddpm_fast.ops.variational_bound import reference
from ddpm_fast.ops.variational_bound.op import variational_bound
from ddpm_fast.runtime import dispatch, extension
from ddpm_fast.testing.native_cases import instruction_sets, instructions, threads
from ddpm_fast.testing.truth import assert_close_to_truth
from ddpm_fast.testing.variational_bound_cases import (
    FORMATS,
    WEIGHTS,
    check,
    laid_out,
    loss_and_gradient,
    make_images,
    make_output,
    make_table,
    make_times,
)

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")

T = 20
SEED = -123456789012345
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 1, 1, 1),
    (3, 3, 1, 7),
    (3, 1, 7, 1),
    (1, 17, 3, 3),
    (1, 100, 3, 7),
    (1, 513, 3, 3),
    (2, 3, 31, 33),  # several tiles, pixels no multiple of 4
    (1, 3, 24, 32),
    (3, 5),
    (2, 3, 7),
    (2, 3, 2, 3, 5),
]


@pytest.fixture(autouse=True, params=instruction_sets())
def each_instruction_set(request):
    torch.manual_seed(0)
    with instructions(request.param), use_backend("native"):
        yield


def make_options(batch: int, normalize=False, flip=False, offset=False, clip_x_start=False, detach_mean=True) -> dict:
    return {
        "seed": torch.tensor([SEED]),
        "normalize": normalize,
        "flip": torch.arange(batch) % 2 == 0 if flip else None,
        "offset_noise_strength": 0.3 if offset else 0.0,
        "clip_x_start": clip_x_start,
        "detach_mean": detach_mean,
    }


def check_case(
    shape,
    options: dict,
    *,
    x_dtype=torch.float32,
    dtype=torch.float32,
    x_format="contiguous",
    out_format="contiguous",
    eps: torch.Tensor | None = None,
    learned: bool = True,
    objective: str = "pred_noise",
    **table,
) -> None:
    rows = make_table(objective, T, **{"first_variance": "next", **table})
    x, t = make_images(shape, x_dtype, x_format), make_times(shape[0], T)
    whole = noise.epsilon(x, eps, options["seed"], options["offset_noise_strength"], torch.float32).float()
    check(make_output(x, t, rows, whole, options, dtype, out_format, learned), x, t, rows, eps, options)


@pytest.mark.parametrize("x_format, out_format", list(itertools.product(FORMATS, FORMATS)))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_formats(shape, x_format, out_format):
    for eps, other in ((None, False), (laid_out(torch.randn(shape), x_format), True)):
        options = make_options(shape[0], other, other, other, clip_x_start=other, detach_mean=other)
        kinds = {"x_dtype": torch.uint8 if other else torch.float32, "x_format": x_format, "out_format": out_format}
        check_case(shape, options, eps=eps, learned=not other, **kinds)
        check_case(shape, options, eps=eps, **kinds)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", [torch.uint8, *FLOATS])
def test_dtypes(x_dtype, dtype, memory_format):
    shape = (2, 3, 5, 7)
    for eps in (None, torch.randn(shape).to(dtype)):
        options = make_options(2, x_dtype == torch.uint8, flip=True, offset=True)
        check_case(
            shape, options, x_dtype=x_dtype, dtype=dtype, x_format=memory_format, out_format=memory_format, eps=eps
        )


@pytest.mark.parametrize("learned, clip_x_start, detach_mean", list(itertools.product([False, True], repeat=3)))
def test_options(learned, clip_x_start, detach_mean):
    for memory_format in FORMATS:
        options = make_options(3, clip_x_start=clip_x_start, detach_mean=detach_mean)
        check_case((3, 3, 4, 6), options, out_format=memory_format, learned=learned)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("first_variance", ["clipped", "next"])
def test_tables(first_variance, objective, weights):
    options = make_options(4, detach_mean=weights != "rescaled-kl")
    check_case((4, 3, 5, 6), options, objective=objective, weights=weights, first_variance=first_variance)


@settings(max_examples=60)
@given(data=st.data())
def test_any_small_call(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    shape = (draw(1, 2, 3), draw(1, 2, 3, 5, 17), draw(1, 2, 3, 7), draw(1, 2, 3, 7, 64, 733))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    eps = laid_out(torch.randn(shape).to(draw(*FLOATS)), draw(*FORMATS)) if draw(False, True) else None
    x_dtype = draw(torch.uint8, *FLOATS)
    options = make_options(shape[0], x_dtype == torch.uint8, *(draw(False, True) for _ in range(4)))
    options["seed"] = torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1))])
    kinds = {"x_dtype": x_dtype, "dtype": draw(*FLOATS), "x_format": draw(*FORMATS), "out_format": draw(*FORMATS)}
    check_case(shape, options, eps=eps, learned=draw(False, True), objective=draw("pred_noise", "pred_v"), **kinds)


@pytest.mark.parametrize("log_scale, distance", [(0.0, 3.0), (-5.0, 0.05), (-5.0, 3.0), (-20.0, 1e-8), (2.0, 2.0)])
def test_the_decoder_for_narrow_wide_and_distant_bins(log_scale, distance):
    """Every pixel is an image: its bound and its gradients, from bins that hold everything to bins below 1e-15."""
    pixels = torch.linspace(-distance, distance, 500).reshape(-1, 1, 1, 1)
    table = torch.zeros(1, 14, dtype=torch.float64)
    table[0, 6] = table[0, 7] = table[0, 12] = table[0, 13] = 1.0  # the mean is the output
    table[0, 9], table[0, 10] = 2 * log_scale - 1, 2 * log_scale + 1
    t, single, ones = torch.zeros(500, dtype=torch.int64), table.float(), torch.ones(500)
    for center in (0.0, 1.0, -1.0):
        x = torch.full_like(pixels, center)
        output = torch.cat([pixels + center, torch.zeros_like(pixels)], dim=1)
        arguments = (output, x, t, single, 0 * x)
        actual = loss_and_gradient(variational_bound, *arguments, dloss=ones, detach_mean=False)
        expected = loss_and_gradient(reference.variational_bound, *arguments, dloss=ones, detach_mean=False)
        double = (output.double(), x.double(), t, single.double(), 0 * x.double())
        truth = loss_and_gradient(reference.variational_bound, *double, dloss=ones, detach_mean=False)
        for name, ours, theirs, true in zip(("loss", "gradient"), actual, expected, truth, strict=True):
            assert_close_to_truth(ours, theirs, true, name=name)


def test_exponentials_keep_the_digits_of_small_arguments():
    """A bound near 0 and its gradient, where e^δ − 1 − δ cancels: the variance is off by 1e-4 of its logarithm."""
    table = torch.zeros(1, 14, dtype=torch.float64)
    table[0, 13], table[0, 10] = 1.0, 1e-4
    x, t = torch.zeros(2, 3, 4, 5), torch.zeros(2, dtype=torch.int64)
    output = torch.cat([x, torch.rand_like(x) + 0.5], dim=1)
    actual = loss_and_gradient(variational_bound, output, x, t, table.float(), x, dloss=torch.ones(2))
    double = (output.double(), x.double(), t, table.float().double(), x.double())
    truth = loss_and_gradient(reference.variational_bound, *double, dloss=torch.ones(2))
    assert (truth[0] < 1e-8).all() and (truth[0] > 1e-10).all()
    for ours, true in zip(actual, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-6, atol=0)


def test_the_number_of_threads_changes_nothing():
    shape, table = (3, 3, 61, 67), make_table("pred_v", T).float()
    x, t, output, dloss = torch.rand(shape), make_times(3, T), torch.randn(3, 6, 61, 67), torch.randn(3)
    options, results = make_options(3, True, True, True, True, False), []
    for count in (1, 2, 1):
        with threads(count):
            loss, gradient = loss_and_gradient(variational_bound, output, x, t, table, None, dloss=dloss, **options)
            terms = variational_bound(output, x, t, table, None, terms=True, **options)
            results.append((loss, gradient, terms))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_every_element_is_written_and_nothing_else(memory_format):
    """New memory is NaN; inputs stay as they are."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        x, t = make_images((2, 3, 31, 33), torch.uint8), make_times(2, T)
        output = laid_out(torch.randn(2, 6, 31, 33), memory_format)
        copies = [tensor.clone() for tensor in (output, x, t)]
        table = make_table("pred_noise", T).float()
        options = make_options(2, normalize=True, detach_mean=False)
        loss, gradient = loss_and_gradient(variational_bound, output, x, t, table, None, dloss=torch.ones(2), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(copies, (output, x, t), strict=True))


def test_times_outside_the_table_give_nan_and_read_nothing():
    t = torch.tensor([-1, 3, T, 2**40, -(2**62)])
    x, table = make_images((5, 3, 3, 3), torch.float32), make_table("pred_noise", T).float()
    output = torch.cat([x, x], dim=1)
    results = loss_and_gradient(variational_bound, output, x, t, table, None, seed=SEED, dloss=torch.ones(5))
    for result in results:
        assert all(result[i].isfinite().all() if i == 1 else result[i].isnan().all() for i in range(5))


@pytest.mark.parametrize("decoder", [False, True])
def test_nan_stays_in_its_image(decoder):
    table = make_table("pred_noise", T, first_variance="next").float()
    t = torch.zeros(4, dtype=torch.int64) if decoder else torch.full((4,), 5)
    x, eps = make_images((4, 3, 3, 3), torch.float32), torch.randn(4, 3, 3, 3)
    output = torch.cat([eps, x], dim=1)
    output[1, 0, 1, 1] = output[2, 4, 1, 1] = x[3, 0, 0, 0] = float("nan")
    loss, gradient = loss_and_gradient(
        variational_bound, output, x, t, table, eps, dloss=torch.ones(4), detach_mean=False
    )
    assert loss[0].isfinite() and loss[1:].isnan().all()
    assert gradient[0].isfinite().all()
    assert gradient[1, 0, 1, 1].isnan() and gradient[2, 4, 1, 1].isnan() and gradient[3, 0, 0, 0].isnan()


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format, learned):
    table, x, t = make_table("pred_noise", T).float(), make_images((2, 3, 4, 5), torch.uint8, memory_format), None
    t, seed, flip = make_times(2, T), torch.tensor([3]), torch.tensor([True, False])
    output = laid_out(torch.randn(2, 6 if learned else 3, 4, 5), memory_format)
    options = (True, 0.2, True, False, 1e-15, True)
    ops = torch.ops.ddpm_fast
    for operator, arguments in (
        (ops.native_variational_bound, (output.clone().requires_grad_(), x, t, table, None, seed, flip, *options)),
        (ops.native_variational_bound_backward, (output, torch.randn(2, 2), torch.randn(2))),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_compiles_without_a_graph_break():
    table, x, t = make_table("pred_noise", T).float(), make_images((2, 3, 4, 5), torch.float32), make_times(2, T)
    seed, forward_table = torch.tensor([SEED]), table[:, :2].contiguous()

    def step(scale):
        x_t = q_sample(x, t, forward_table, seed=seed)
        return variational_bound(torch.cat([scale * x_t, scale * x_t], dim=1), x, t, table, seed=seed).mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = torch.tensor(0.7, requires_grad=True)
        loss = function(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_no_noise_tensor_is_made(monkeypatch):
    table, x, t = make_table("pred_noise", T).float(), make_images((2, 3, 4, 5), torch.float32), make_times(2, T)
    output, given = torch.randn(2, 6, 4, 5), Noise(None, SEED, 0.2)
    monkeypatch.setattr(Noise, "store", None)
    loss = variational_bound(output, x, t, table, given)
    assert given.tensor is None and loss.isfinite().all()


def test_backward_twice_and_second_derivatives():
    table, x, t = make_table("pred_noise", T).float(), make_images((2, 3, 4, 5), torch.float32), make_times(2, T)
    output = torch.randn(2, 6, 4, 5, requires_grad=True)
    loss = variational_bound(output, x, t, table, seed=SEED)
    first = torch.autograd.grad(loss.sum(), output, retain_graph=True)[0]  # an expanded gradient
    assert torch.equal(first, torch.autograd.grad(loss, output, torch.ones(2), retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss.sum(), output, create_graph=True)


def refusal_cases():
    x, t, table = make_images((2, 3, 4, 4), torch.float32), make_times(2, T), make_table("pred_noise", T).float()
    output = torch.cat([x, x], dim=1)
    return {
        "the batch is empty": (output[:0], x[:0], t[:0], table),
        "table is torch.float64": (output, x, t, table.double()),
        "table is not contiguous": (output, x, t, table.t().contiguous().t()),
        "x_start is torch.float64": (output, x.double(), t, table),
        "x_start is neither contiguous nor channels-last": (output[..., :2].clone(), x[..., ::2], t, table),
        "model_output is torch.float64": (output.double(), x, t, table),
        "model_output is neither contiguous": (output.transpose(2, 3), x, t, table),
        "a gradient of x_start is wanted": (output, x.clone().requires_grad_(), t, table),
    }


@pytest.mark.parametrize("reason", refusal_cases())
def test_refusals(reason):
    arguments = refusal_cases()[reason]
    with pytest.raises(RuntimeError, match=f"variational_bound: backend 'native' was forced and refuses: {reason}"):
        variational_bound(*arguments, seed=SEED)
    with use_backend(None):
        variational_bound(*arguments, seed=SEED)  # the reference runs


def test_the_operators_themselves_guard_memory():
    x, t, table = torch.rand(2, 3, 4, 4), make_times(2, T), make_table("pred_noise", T).float()
    seed, tail, output = torch.tensor([1]), (False, 0.0, False, True, 1e-15, True), torch.rand(2, 6, 4, 4)
    operator = torch.ops.ddpm_fast.native_variational_bound
    for arguments, sentence in [
        ((output[:0], x[:0], t[:0], table, None, seed, None, *tail), "not empty"),
        ((output, x, t[:1], table, None, seed, None, *tail), "t must be contiguous, of shape"),
        ((output, x, t, table[:, :13].contiguous(), None, seed, None, *tail), "table must be contiguous, of shape"),
        ((output[:1], x, t, table, None, seed, None, *tail), "model_output must have x_start's shape or twice"),
        ((output[:, :5], x, t, table, None, seed, None, *tail), "model_output must have x_start's shape or twice"),
        ((output.transpose(2, 3), x, t, table, None, seed, None, *tail), "model_output must be contiguous"),
        ((output, x, t, table, None, None, None, *tail), "seed must be given"),
        ((output, x, t, table, None, seed, None, *tail[:4], 0.0, True), "min_probability must be positive"),
    ]:
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=sentence):
            operator(*arguments)
    backward = torch.ops.ddpm_fast.native_variational_bound_backward
    with pytest.raises(ValueError, match="factor and dloss must be contiguous, of shapes"):
        backward(output, torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match="must be float32"):
        backward(output, torch.ones(2, 2).double(), torch.ones(2))


def test_explain_shows_native():
    with use_backend(None):
        lines = dispatch.explain(devices=[torch.device("cpu")]).splitlines()
    assert any(line.split()[:4] == ["variational_bound", "cpu", "*", "native"] for line in lines)
