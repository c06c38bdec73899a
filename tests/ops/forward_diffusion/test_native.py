"""Forward diffusion and its loss in C++ against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import GaussianDiffusion, Unet, noise, use_backend
from ddpm_fast.diffusion import schedules
from ddpm_fast.diffusion.weightings import find_weighting
from ddpm_fast.noise import Noise
from ddpm_fast.ops.forward_diffusion import reference
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.runtime import dispatch, extension
from ddpm_fast.testing.truth import assert_close_to_truth

pytestmark = pytest.mark.skipif(extension.load() is None, reason=f"no extension: {extension.reason()}")

T = 20
SEED = -123456789012345
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [
    (1, 1, 1, 1),
    (3, 3, 1, 7),
    (3, 1, 7, 1),
    (1, 17, 3, 3),
    (3, 64, 1, 3),
    (1, 100, 3, 7),
    (1, 513, 3, 3),
    (2, 3, 31, 33),  # several tiles, pixels no multiple of 4
    (1, 3, 24, 32),
    (3, 5),
    (2, 3, 7),
    (2, 3, 2, 3, 5),
]


@pytest.fixture(autouse=True)
def native():
    with use_backend("native"):
        yield


def tables(objective: str = "pred_v") -> tuple[torch.Tensor, torch.Tensor]:
    """(T, 2) and (T, 3) float32."""
    schedule = schedules.Schedule(schedules.make_betas("sigmoid", T))
    weight = schedules.loss_weight(schedule, objective, find_weighting("min_snr", {"gamma": 5}))
    loss_table = schedules.loss_table(schedule, objective, weight)
    return schedules.forward_table(schedule).float(), loss_table.float()


def laid_out(x: torch.Tensor, memory_format: str) -> torch.Tensor:
    return x.contiguous(memory_format=FORMATS[memory_format]) if x.ndim == 4 else x


def make_images(shape, dtype, memory_format="contiguous") -> torch.Tensor:
    x = torch.rand(shape)
    x = (x * 255).round().to(torch.uint8) if dtype == torch.uint8 else (2 * x - 1).to(dtype)
    return laid_out(x, memory_format)


def make_times(batch: int) -> torch.Tensor:
    return torch.randint(0, T, (batch,))


def make_options(batch: int, normalize: bool = False, flip: bool = False, offset: bool = False) -> dict:
    return {
        "seed": torch.tensor([SEED]),
        "normalize": normalize,
        "flip": torch.arange(batch) % 2 == 0 if flip else None,
        "offset_noise_strength": 0.3 if offset else 0.0,
    }


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def check_q_sample(x, eps, options, dtype=torch.float32, memory_format="contiguous") -> None:
    t, (table, _) = make_times(x.shape[0]), tables()
    memory_format = FORMATS[memory_format] if x.ndim == 4 else torch.contiguous_format
    kwargs = {**options, "dtype": dtype, "memory_format": memory_format}
    actual = q_sample(x, t, table, eps, **kwargs)
    expected = reference.q_sample(x, t, table, eps, **kwargs)
    truth = reference.q_sample(wide(x), t, table.double(), wide(eps), **{**kwargs, "dtype": torch.float64})
    assert actual.is_contiguous(memory_format=memory_format)
    assert_close_to_truth(actual, expected, truth, name="x_t")


def loss_and_gradient(function, output, *args, dloss, **options):
    output = output.detach().requires_grad_()
    loss = function(output, *args, **options)
    return loss.detach(), torch.autograd.grad(loss, output, dloss.to(loss.dtype))[0]


def check_loss(output, x, eps, options, objective="pred_v") -> None:
    t, (_, table) = make_times(x.shape[0]), tables(objective)
    dloss = torch.randn(x.shape[0])
    actual = loss_and_gradient(diffusion_loss, output, x, t, table, eps, dloss=dloss, **options)
    with torch.no_grad():
        assert torch.equal(diffusion_loss(output, x, t, table, eps, **options), actual[0])
    expected = loss_and_gradient(reference.diffusion_loss, output, x, t, table, eps, dloss=dloss, **options)
    arguments = (wide(output), wide(x), t, table.double(), wide(eps))
    truth = loss_and_gradient(reference.diffusion_loss, *arguments, dloss=dloss, **options)
    assert actual[1].dtype == output.dtype and actual[1].stride() == output.stride()
    for name, ours, theirs, true in zip(("loss", "gradient"), actual, expected, truth, strict=True):
        assert_close_to_truth(ours, theirs, true, name=name)


def check_both(shape, x_dtype, out_dtype, x_format, out_format, eps, options) -> None:
    x = make_images(shape, x_dtype, x_format)
    check_q_sample(x, eps, options, out_dtype, out_format)
    check_loss(laid_out(torch.randn(shape).to(out_dtype), out_format), x, eps, options)


@pytest.mark.parametrize("x_format, out_format", list(itertools.product(FORMATS, FORMATS)))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_formats(shape, x_format, out_format):
    torch.manual_seed(0)
    for eps, flip in ((None, False), (laid_out(torch.randn(shape), x_format), True)):
        options = make_options(shape[0], normalize=flip, flip=flip, offset=flip)
        check_both(shape, torch.float32, torch.float32, x_format, out_format, eps, options)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_dtypes(dtype, out_dtype, memory_format):
    torch.manual_seed(1)
    shape = (2, 3, 5, 7)
    for eps in (None, torch.randn(shape).to(out_dtype)):
        check_both(shape, dtype, out_dtype, memory_format, memory_format, eps, make_options(2, True, True, True))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("normalize, flip, offset", list(itertools.product([False, True], repeat=3)))
def test_options(normalize, flip, offset, memory_format):
    torch.manual_seed(2)
    options = make_options(3, normalize, flip, offset)
    for dtype in (torch.uint8, torch.float32):
        check_both((3, 3, 4, 6), dtype, torch.float32, "contiguous", memory_format, None, options)


@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
def test_objectives(objective):
    torch.manual_seed(3)
    shape = (4, 3, 5, 6)
    check_loss(torch.randn(shape), make_images(shape, torch.float32), None, make_options(4), objective)


@settings(max_examples=200)
@given(data=st.data())
def test_any_small_call(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    shape = (draw(1, 2, 3), draw(1, 2, 3, 5, 17), draw(1, 2, 3, 7), draw(1, 2, 3, 7, 64, 733))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    eps = laid_out(torch.randn(shape).to(draw(*FLOATS)), draw(*FORMATS)) if draw(False, True) else None
    options = make_options(shape[0], draw(False, True), draw(False, True), draw(False, True))
    options["seed"] = torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1))])
    check_both(shape, draw(torch.uint8, *FLOATS), draw(*FLOATS), draw(*FORMATS), draw(*FORMATS), eps, options)


def test_float16_gradients_of_large_images_do_not_underflow():
    torch.manual_seed(4)
    shape = (1, 3, 64, 64)
    output, (_, table) = 0.01 * torch.randn(shape).half(), tables()
    x, t, dloss = make_images(shape, torch.float32), make_times(1), torch.full((1,), 2.0**14)
    arguments = (x, t, table, output.float())  # the error is small
    double = (output.double(), x.double(), t, table.double(), output.double())
    _, actual = loss_and_gradient(diffusion_loss, output, *arguments, dloss=dloss)
    _, expected = loss_and_gradient(reference.diffusion_loss, output, *arguments, dloss=dloss)
    _, truth = loss_and_gradient(reference.diffusion_loss, *double, dloss=dloss)
    assert_close_to_truth(actual, expected, truth)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 3, 7, 9), (2, 4, 16, 16), (2, 3, 40, 50)])
def test_the_noise_is_the_noise_function(shape, memory_format):
    """With a = 0 and b = 1 x_t is ε itself, whatever the layout and the flip."""
    table, t = torch.tensor([[0.0, 1.0]]), torch.zeros(shape[0], dtype=torch.int64)
    kwargs = {"seed": SEED, "dtype": torch.float64}
    truth = noise.normal(shape, stream=noise.STREAM_TRAINING, **kwargs)
    flip, x = torch.ones(shape[0], dtype=torch.bool), torch.zeros(shape)
    actual = q_sample(x, t, table, seed=SEED, flip=flip, memory_format=FORMATS[memory_format])
    assert ((actual - truth).abs() / truth.abs().clamp(min=1)).max() <= 4 * 2**-24
    offset = noise.normal(shape[:2], stream=noise.STREAM_OFFSET, **kwargs)[:, :, None, None]
    options = {"seed": SEED, "offset_noise_strength": 0.5, "memory_format": FORMATS[memory_format]}
    actual = q_sample(x, t, table, torch.zeros(shape), **options)
    assert_close_to_truth(actual, (0.5 * offset + 0 * truth).float(), 0.5 * offset + 0 * truth)


def test_the_number_of_threads_changes_nothing():
    torch.manual_seed(5)
    shape, (forward_table, table) = (3, 3, 61, 67), tables()
    x, t, output, dloss = torch.rand(shape), make_times(3), torch.randn(shape), torch.randn(3)
    options = make_options(3, True, True, True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            loss, gradient = loss_and_gradient(diffusion_loss, output, x, t, table, None, dloss=dloss, **options)
            results.append((q_sample(x, t, forward_table, **options), loss, gradient))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_times_outside_the_table_give_nan_and_read_nothing():
    t = torch.tensor([-1, 3, T, 2**40, -(2**62)])
    x, (forward_table, table) = torch.rand(5, 3, 3, 3), tables()
    loss, gradient = loss_and_gradient(diffusion_loss, x, x, t, table, None, seed=SEED, dloss=torch.ones(5))
    for result in (q_sample(x, t, forward_table, seed=SEED), loss, gradient):
        assert all(result[i].isfinite().all() if i == 1 else result[i].isnan().all() for i in range(5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_are(value):
    torch.manual_seed(6)
    x, eps, output = torch.rand(2, 3, 5, 7), torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    t, (forward_table, table) = make_times(2), tables()
    x[0, 1, 2, 3] = eps[0, 2, 2, 2] = output[0, 0, 1, 1] = value
    actual, expected = q_sample(x, t, forward_table, eps), reference.q_sample(x, t, forward_table, eps)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    results = [
        loss_and_gradient(function, output, x, t, table, eps, dloss=torch.ones(2))
        for function in (diffusion_loss, reference.diffusion_loss)
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    shape, (forward_table, table) = (2, 3, 4, 5), tables()
    x, t, seed = make_images(shape, torch.uint8, memory_format), make_times(2), torch.tensor([3])
    flip, output = torch.tensor([True, False]), laid_out(torch.randn(shape), memory_format)
    last = memory_format == "channels_last"
    ops = torch.ops.ddpm_fast
    for operator, arguments in (
        (ops.native_q_sample, (x, t, forward_table, None, seed, flip, True, 0.2, torch.bfloat16, last)),
        (ops.native_diffusion_loss, (output.requires_grad_(), x, t, table, None, seed, flip, True, 0.2, True)),
        (ops.native_diffusion_loss_backward, (output.detach(), torch.randn(2), torch.randn(2))),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_backward_twice_and_second_derivatives():
    x, t, (_, table) = torch.rand(2, 3, 4, 5), make_times(2), tables()
    output = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = diffusion_loss(output, x, t, table, seed=SEED)
    first = torch.autograd.grad(loss.sum(), output, retain_graph=True)[0]  # an expanded gradient
    assert torch.equal(first, torch.autograd.grad(loss, output, torch.ones(2), retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss.sum(), output, create_graph=True)


def refusal_cases():
    x, t, (table, _) = torch.rand(2, 3, 4, 4), make_times(2), tables()
    return {
        "x_start has 1 dimensions": ((x[:, 0, 0, 0], t, table), {}),
        "the batch is empty": ((x[:0], t[:0], table), {}),
        "table is torch.float64": ((x, t, table.double()), {}),
        "table is not contiguous": ((x, t, table.t().contiguous().t()), {}),
        "x_start is torch.float64": ((x.double(), t, table), {}),
        "noise is torch.float64": ((x, t, table, x.double()), {}),
        "x_start is neither contiguous nor channels-last": ((x[..., ::2], t, table), {}),
        "dtype is torch.float64": ((x, t, table), {"dtype": torch.float64}),
        "a gradient of x_start is wanted": ((x.clone().requires_grad_(), t, table), {}),
        "a gradient of noise is wanted": ((x, t, table, x.clone().requires_grad_()), {}),
    }


@pytest.mark.parametrize("reason", refusal_cases())
def test_refusals(reason):
    args, options = refusal_cases()[reason]
    with pytest.raises(RuntimeError, match=f"q_sample: backend 'native' was forced and refuses: {reason}"):
        q_sample(*args, seed=SEED, **options)
    with use_backend(None):
        q_sample(*args, seed=SEED, **options)  # the reference runs


def test_loss_refusals():
    x, t, (_, table) = torch.rand(2, 3, 4, 4), make_times(2), tables()
    for output, reason in ((x.double(), "is torch.float64"), (x.transpose(2, 3), "is neither contiguous")):
        with pytest.raises(RuntimeError, match=f"diffusion_loss: .* refuses: model_output {reason}"):
            diffusion_loss(output, x, t, table, seed=SEED)


def test_the_operators_themselves_guard_memory():
    x, t, (table, loss_table) = torch.rand(2, 3, 4, 4), make_times(2), tables()
    seed, eps = torch.tensor([1]), torch.rand(2, 3, 4, 4)
    sample = torch.ops.ddpm_fast.native_q_sample
    tail = (False, 0.0, torch.float32, False)
    for arguments, sentence in [
        ((x[:0], t[:0], table, None, seed, None, *tail), "not empty"),
        ((x, t[:1], table, None, seed, None, *tail), "t must be contiguous, of shape"),
        ((x, t.int(), table, None, seed, None, *tail), "t must be int64"),
        ((x, t, loss_table, None, seed, None, *tail), "table must be contiguous, of shape"),
        ((x, t, table.double(), None, seed, None, *tail), "table must be float32"),
        ((x, t, table, eps[:1], seed, None, *tail), "noise must have x_start's shape"),
        ((x, t, table, eps.transpose(2, 3), seed, None, *tail), "noise must be contiguous"),
        ((x, t, table, eps.long(), seed, None, *tail), "not implemented for 'Long'"),
        ((x, t, table, None, None, None, *tail), "seed must be given"),
        ((x, t, table, None, seed.int(), None, *tail), "seed must be one int64"),
        ((x, t, table, None, seed, t[:1] > 0, *tail), "flip must be contiguous"),
        ((x, t, table, None, seed, t, *tail), "flip must be bool or uint8"),
        ((x.long(), t, table, None, seed, None, *tail), "not implemented for 'Long'"),
        ((x[0], t[:1].repeat(3), table, None, seed, None, *tail[:3], True), "can be channels-last"),
    ]:
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=sentence):
            sample(*arguments)
    loss = torch.ops.ddpm_fast.native_diffusion_loss
    with pytest.raises(ValueError, match="model_output must have x_start's shape"):
        loss(x[:1], x, t, loss_table, None, seed, None, False, 0.0, True)
    backward = torch.ops.ddpm_fast.native_diffusion_loss_backward
    with pytest.raises(ValueError, match="factor and dloss must be contiguous"):
        backward(x, torch.ones(1), torch.ones(2))
    with pytest.raises(TypeError, match="must be float32"):
        backward(x, torch.ones(2).double(), torch.ones(2))


class Scale(torch.nn.Module):
    """The smallest model: one factor."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t, x_self_cond=None):
        return self.scale * x


@pytest.mark.parametrize("strength", [0.0, 0.2])
def test_training_makes_no_noise_tensor_and_equals_the_reference(strength, monkeypatch):
    diffusion = GaussianDiffusion(Scale(), image_size=8, timesteps=T, offset_noise_strength=strength)
    x, t = torch.rand(3, 3, 8, 8), make_times(3)
    results = []
    for backend in ("reference", None):
        torch.manual_seed(3)
        with use_backend(backend), monkeypatch.context() as patch:
            if backend is None:
                patch.setattr(Noise, "store", None)
            loss = diffusion(x, times=t, loss_reduction="none")
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), diffusion.model.scale)[0]))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_whole_training_loss_compiles_without_a_graph_break():
    diffusion = GaussianDiffusion(Scale(), image_size=8, timesteps=T, offset_noise_strength=0.1)
    x, t = torch.rand(3, 3, 8, 8), make_times(3)

    def step(x, t):
        return diffusion(x, times=t, loss_reduction="none")

    results = []
    with use_backend(None):
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(3)
            loss = function(x, t)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), diffusion.model.scale)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_x_t_is_written_in_the_networks_dtype(dtype):
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=T)
    image, t, seen, losses = torch.rand(2, 3, 8, 8), torch.tensor([3, 7]), [], []
    diffusion.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for backend in (None, "reference"):
        torch.manual_seed(4)
        with use_backend(backend), torch.autocast("cpu", dtype=dtype):
            losses.append(diffusion(image, times=t, loss_reduction="none"))
    assert seen == [dtype, dtype]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.02)
    losses[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in diffusion.parameters())


def test_explain_shows_native():
    with use_backend(None):
        lines = dispatch.explain(devices=[torch.device("cpu")]).splitlines()
    for op in ("q_sample", "diffusion_loss"):
        assert any(line.split()[:4] == [op, "cpu", "*", "native"] and line.endswith("accepts") for line in lines)
