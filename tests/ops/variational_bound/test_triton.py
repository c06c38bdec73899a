"""The Triton kernels of the variational bound against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ddpm_fast import noise, use_backend
from ddpm_fast.noise import Noise
from ddpm_fast.ops import q_sample
from ddpm_fast.ops.variational_bound import reference
from ddpm_fast.ops.variational_bound.op import variational_bound
from ddpm_fast.runtime import triton_launch
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

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
T = 20
SHAPES = [
    (1, 1, 1, 1),
    (3, 3, 1, 1),
    (3, 1, 7, 1),
    (1, 3, 1, 7),
    (3, 3, 7, 1),
    (1, 1, 33, 31),
    (2, 3, 31, 33),  # several tiles, pixels no multiple of 4
    (1, 3, 24, 32),  # several tiles, pixels a multiple of 4
    (2, 5, 6, 6),
    (1, 65, 2, 2),
]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SEED = -123456789012345


@pytest.fixture(autouse=True)
def poisoned_memory_and_triton():
    """torch.empty gives NaN, so an unwritten element fails the comparison."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def make_options(shape, rng: random.Random, **fixed) -> dict:
    """Options, drawn where not fixed."""
    names = ("normalize", "flip", "offset", "clip_x_start", "detach_mean")
    drawn = {**{name: rng.random() < 0.5 for name in names}, **fixed}
    flip = None
    if drawn["flip"]:
        flip = torch.tensor([i % 2 == 0 for i in range(shape[0])], device=DEVICE)
        flip = flip if rng.random() < 0.5 else flip.to(torch.uint8)
    return {
        "seed": torch.tensor([SEED], device=DEVICE),
        "normalize": drawn["normalize"],
        "flip": flip,
        "offset_noise_strength": 0.3 if drawn["offset"] and shape[1] <= 64 else 0.0,
        "clip_x_start": drawn["clip_x_start"],
        "detach_mean": drawn["detach_mean"],
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
    x, t = make_images(shape, x_dtype, x_format, DEVICE), make_times(shape[0], T, DEVICE)
    whole = noise.epsilon(x, eps, options["seed"], options["offset_noise_strength"], torch.float32).float()
    output = make_output(x, t, rows.to(DEVICE), whole, options, dtype, out_format, learned)
    check(output, x, t, rows, eps, options)


@pytest.mark.production
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_images_of_production(dtype):
    """The output of a network, channels-last in its dtype; small ones in the interpreter."""
    shape, rng = (2, 3, 16, 16) if triton_launch.interpreted() else (32, 3, 128, 128), random.Random(7)
    for flip, detach_mean in itertools.product((False, True), repeat=2):
        options = make_options(shape, rng, normalize=True, flip=flip, offset=flip, detach_mean=detach_mean)
        check_case(shape, options, dtype=dtype, out_format="channels_last", x_dtype=torch.uint8)


@pytest.mark.release(
    but=lambda shape, x_format, out_format: (
        x_format == out_format == list(FORMATS)[SHAPES.index(shape) % 2] or shape == SHAPES[1]
    )
)
@pytest.mark.parametrize("out_format", FORMATS)
@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_formats(shape, x_format, out_format):
    rng = random.Random(f"{shape}{x_format}{out_format}")
    for given, learned in ((False, True), (True, False)):
        eps = laid_out(torch.randn(shape, device=DEVICE), x_format) if given else None
        kinds = {"x_dtype": rng.choice([torch.uint8, *FLOATS]), "dtype": rng.choice(FLOATS)}
        kinds |= {"x_format": x_format, "out_format": out_format, "learned": learned, "eps": eps}
        if shape[1] <= 64 or out_format == "contiguous":
            check_case(shape, make_options(shape, rng, normalize=kinds["x_dtype"] == torch.uint8), **kinds)


@pytest.mark.release(
    but=lambda x_dtype, dtype, memory_format: (
        x_dtype in (torch.uint8, torch.float32, dtype) and (memory_format == "contiguous") == (dtype == torch.float32)
    )
)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("x_dtype", [torch.uint8, *FLOATS])
def test_dtypes(x_dtype, dtype, memory_format):
    shape, rng = (2, 3, 5, 7), random.Random(0)
    for eps in (None, torch.randn(shape, device=DEVICE).to(dtype)):
        options = make_options(shape, rng, normalize=x_dtype == torch.uint8)
        kinds = {"x_format": memory_format, "out_format": memory_format}
        check_case(shape, options, x_dtype=x_dtype, dtype=dtype, eps=eps, **kinds)


@pytest.mark.release(
    but=lambda learned, clip_x_start, detach_mean, memory_format, _arithmetic=None: (
        (_arithmetic is None) != clip_x_start and (memory_format == "contiguous") == (clip_x_start == detach_mean)
    )
)
@pytest.mark.arithmetic
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("clip_x_start, detach_mean", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("learned", [True, False])
def test_options(learned, clip_x_start, detach_mean, memory_format):
    shape, rng = (3, 3, 4, 6), random.Random(1)
    for x_dtype in (torch.uint8, torch.float32):
        fixed = {"clip_x_start": clip_x_start, "detach_mean": detach_mean, "normalize": x_dtype == torch.uint8}
        options = make_options(shape, rng, **fixed)
        check_case(shape, options, x_dtype=x_dtype, out_format=memory_format, learned=learned)


@pytest.mark.release(but=lambda objective, _arithmetic=None, **_: (_arithmetic is None) == (objective == "pred_v"))
@pytest.mark.arithmetic
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_tables(objective, weights):
    shape, first_variance = (2, 3, 5, 6), "clipped" if weights == "hybrid" else "next"
    options = make_options(shape, random.Random(2), normalize=False, detach_mean=weights != "rescaled-kl")
    check_case(shape, options, objective=objective, weights=weights, first_variance=first_variance)


@pytest.mark.arithmetic
@pytest.mark.parametrize("log_scale, distance", [(0.0, 3.0), (-5.0, 0.05), (-5.0, 3.0), (-20.0, 1e-8), (2.0, 2.0)])
def test_the_decoder_for_narrow_wide_and_distant_bins(log_scale, distance):
    """The bound and every pixel's gradients, from bins that hold everything to bins below 1e-15."""
    pixels = torch.linspace(-distance, distance, 300, device=DEVICE).reshape(1, 1, 20, 15)
    table = torch.zeros(1, 14, dtype=torch.float64)
    table[0, 6] = table[0, 7] = table[0, 12] = table[0, 13] = 1.0  # the mean is the output
    table[0, 9], table[0, 10] = 2 * log_scale - 1, 2 * log_scale + 1
    t = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    options = {"detach_mean": False, "normalize": False, "flip": None}
    for center in (0.0, 1.0, -1.0):
        x = torch.full_like(pixels, center)
        output = torch.cat([pixels + center, torch.zeros_like(pixels)], dim=1)
        single, ones = table.float().to(DEVICE), torch.ones(1, device=DEVICE)
        actual = loss_and_gradient(variational_bound, output, x, t, single, 0 * x, dloss=ones, **options)
        expected = loss_and_gradient(reference.variational_bound, output, x, t, single, 0 * x, dloss=ones, **options)
        double = (output.double(), x.double(), t, single.double(), 0 * x.double())
        truth = loss_and_gradient(reference.variational_bound, *double, dloss=ones, **options)
        for name, ours, theirs, true in zip(("loss", "gradient"), actual, expected, truth, strict=True):
            assert_close_to_truth(ours, theirs, true, name=name)


@pytest.mark.arithmetic
def test_exponentials_keep_the_digits_of_small_arguments():
    """A bound near 0 and its gradient, where e^δ − 1 − δ cancels: the variance is off by 1e-4 of its logarithm."""
    table = torch.zeros(1, 14, dtype=torch.float64)
    table[0, 13], table[0, 10] = 1.0, 1e-4
    x, t = torch.zeros(2, 3, 4, 5, device=DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    output = torch.cat([x, torch.rand_like(x) + 0.5], dim=1)
    single, ones = table.float().to(DEVICE), torch.ones(2, device=DEVICE)
    actual = loss_and_gradient(variational_bound, output, x, t, single, x, dloss=ones)
    double = (output.double(), x.double(), t, single.double(), x.double())
    truth = loss_and_gradient(reference.variational_bound, *double, dloss=ones)
    assert (truth[0] < 1e-8).all() and (truth[0] > 1e-10).all()
    for ours, true in zip(actual, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-6, atol=0)


def test_float16_gradients_of_large_images_do_not_underflow():
    """Loss scaling of 2^14 on images of 64×64, with a variance whose range is 1e-3 of its logarithm."""
    shape, table = (1, 3, 64, 64), make_table("pred_noise", 1000)
    options = make_options(shape, random.Random(3), normalize=False, flip=False, offset=False, detach_mean=True)
    x, t = make_images(shape, torch.float32, device=DEVICE), torch.tensor([900], device=DEVICE)
    eps = torch.randn(shape, device=DEVICE)
    output = make_output(x, t, table.to(DEVICE), eps, options).half()
    single, dloss = table.float().to(DEVICE), torch.full((1,), 2.0**14, device=DEVICE)
    arguments = (x, t, single, eps)
    _, actual = loss_and_gradient(variational_bound, output, *arguments, dloss=dloss, **options)
    _, expected = loss_and_gradient(reference.variational_bound, output, *arguments, dloss=dloss, **options)
    double = (x.double(), t, single.double(), eps.double())
    _, truth = loss_and_gradient(reference.variational_bound, output.double(), *double, dloss=dloss, **options)
    assert_close_to_truth(actual[:, :3], expected[:, :3], truth[:, :3])
    assert_close_to_truth(actual[:, 3:], expected[:, 3:], truth[:, 3:])
    assert (actual[:, :3] != 0).float().mean() > 0.9


@pytest.mark.arithmetic
def test_x_t_and_epsilon_are_those_of_q_sample():
    """The loss of a seed is that of the noise in q_sample's x_t, in both layouts."""
    shape, table = (3, 3, 7, 9), make_table("pred_v", T, first_variance="next")
    single = table.float().to(DEVICE)
    x, t, seed = make_images(shape, torch.float32, device=DEVICE), make_times(3, T, DEVICE), SEED
    for memory_format in FORMATS:
        given = noise.normal(shape, seed=seed, stream=noise.STREAM_TRAINING, device=DEVICE)
        x_t = q_sample(x, t, single[:, :2].contiguous(), seed=seed)
        torch.testing.assert_close(x_t, q_sample(x, t, single[:, :2].contiguous(), given), rtol=1e-5, atol=1e-5)
        output = laid_out(torch.cat([x_t, x_t], dim=1), memory_format)
        loss = variational_bound(output, x, t, single, Noise(None, seed), detach_mean=False)
        torch.testing.assert_close(
            loss, variational_bound(output, x, t, single, given, detach_mean=False), rtol=1e-4, atol=1e-5
        )


def test_runs_repeat_bit_for_bit_and_inputs_stay():
    shape, table = (2, 3, 31, 33), make_table("pred_v", T).float().to(DEVICE)
    options = make_options(shape, random.Random(5))
    x, t = make_images(shape, torch.uint8, device=DEVICE), make_times(2, T, DEVICE)
    output = torch.randn((2, 6, 31, 33), device=DEVICE)
    copies, dloss = [tensor.clone() for tensor in (x, t, output)], torch.randn(2, device=DEVICE)
    results = [
        (
            *loss_and_gradient(variational_bound, output, x, t, table, None, dloss=dloss, **options),
            variational_bound(output, x, t, table, None, terms=True, **options),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, t, output), strict=True))


@pytest.mark.arithmetic
@pytest.mark.parametrize("learned, detach_mean", list(itertools.product([False, True], repeat=2)))
def test_the_second_stage_sums_any_number_of_tiles(learned, detach_mean):
    from ddpm_fast.ops.variational_bound import triton as kernel

    table, t = make_table("pred_v", T, weights="rescaled-mse").float().to(DEVICE), make_times(3, T, DEVICE)
    w, weight, span = table[t, 4].double(), table[t, 13].double(), (table[t, 10].double() - table[t, 9].double())
    for tiles in (1, 31, 32, 33, 70):
        partial = torch.rand(3, tiles, 2, device=DEVICE)
        loss, terms, factor = (torch.empty(size, device=DEVICE) for size in ((3,), (3, 2), (3, 2)))
        kernel.variational_bound_reduce_kernel[(3,)](
            loss, terms, factor, partial, t, table, T, tiles, 48,
            LEARNED=learned, DETACH_MEAN=detach_mean, BLOCK=32, BLOCKS=(tiles + 31) // 32, num_warps=1,
        )  # fmt: skip
        means = partial.double().sum(dim=1) / 48
        assert_close_to_truth(terms, partial.sum(dim=1) / 48, means, name="terms")
        true = w * means[:, 0] + weight * means[:, 1]
        assert_close_to_truth(loss, true.float(), true, name="loss")
        first = 2 * w / 48 if detach_mean else torch.full_like(w, 1 / 48)
        second = -0.25 * reference.BITS * span * weight / 48 if learned else first
        for i, true in enumerate((first, second)):
            assert_close_to_truth(factor[:, i], true.float(), true, name="factor")


@pytest.mark.parametrize("memory_format", FORMATS)
def test_only_the_result_is_written(memory_format, monkeypatch):
    """Every output is between guards that no kernel may touch."""
    guard, made, empty = 64, [], torch.empty

    def guarded(shape, *, memory_format=torch.contiguous_format, **kwargs):
        layout = empty(shape, device="meta", memory_format=memory_format)
        base = torch.full((layout.numel() + 2 * guard,), 7.0, **kwargs)
        made.append(base)
        return base.as_strided(layout.shape, layout.stride(), guard)

    def guarded_like(tensor):
        layout = FORMATS["contiguous" if tensor.is_contiguous() else "channels_last"]
        return guarded(tensor.shape, memory_format=layout, dtype=tensor.dtype, device=tensor.device)

    shape, table = (2, 3, 5, 7), make_table("pred_noise", T).float().to(DEVICE)
    options = make_options(shape, random.Random(6))
    x, t = make_images(shape, torch.float32, device=DEVICE), make_times(2, T, DEVICE)
    output = laid_out(torch.randn((2, 6, 5, 7), device=DEVICE), memory_format)
    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", guarded_like)
    loss_and_gradient(variational_bound, output, x, t, table, dloss=torch.ones(2, device=DEVICE), **options)
    monkeypatch.undo()
    assert len(made) == 6  # gradient without its factors, loss, terms, factor, partial sums; the gradient
    for base in made:
        assert (base[:guard] == 7).all() and (base[-guard:] == 7).all()


def test_times_outside_the_table_give_nan_and_read_nothing():
    t = torch.tensor([-1, 3, T, 2**40, -(2**62)], device=DEVICE)
    table, x = make_table("pred_noise", T).float().to(DEVICE), make_images((5, 3, 3, 3), torch.float32, device=DEVICE)
    output = torch.cat([x, x], dim=1)
    ones = torch.ones(5, device=DEVICE)
    results = loss_and_gradient(variational_bound, output, x, t, table, None, seed=SEED, dloss=ones)
    for i in range(5):
        for result in results:
            assert result[i].isnan().all() if i != 1 else result[i].isfinite().all()


@pytest.mark.parametrize("decoder", [False, True])
def test_nan_stays_in_its_image(decoder):
    table = make_table("pred_noise", T, first_variance="next").float().to(DEVICE)
    t = torch.zeros(4, dtype=torch.int64, device=DEVICE) if decoder else torch.full((4,), 5, device=DEVICE)
    x, eps = make_images((4, 3, 3, 3), torch.float32, device=DEVICE), torch.randn(4, 3, 3, 3, device=DEVICE)
    output = torch.cat([eps, x], dim=1)
    output[1, 0, 1, 1] = output[2, 4, 1, 1] = x[3, 0, 0, 0] = float("nan")
    loss, gradient = loss_and_gradient(
        variational_bound, output, x, t, table, eps, dloss=torch.ones(4, device=DEVICE), detach_mean=False
    )
    assert loss[0].isfinite() and loss[1:].isnan().all()
    assert gradient[0].isfinite().all()
    assert gradient[1, 0, 1, 1].isnan() and gradient[2, 4, 1, 1].isnan() and gradient[3, 0, 0, 0].isnan()


def operator_arguments(memory_format: str, learned: bool):
    """Arguments of the operators variational_bound and variational_bound_backward."""
    shape, table = (2, 3, 4, 5), make_table("pred_noise", T).float().to(DEVICE)
    x, t = make_images(shape, torch.uint8, memory_format, DEVICE), make_times(2, T, DEVICE)
    seed, flip = torch.tensor([3], device=DEVICE), torch.tensor([True, False], device=DEVICE)
    output = laid_out(torch.randn((2, 6 if learned else 3, 4, 5), device=DEVICE), memory_format)
    options = (True, 0.2, True, False, 1e-15, True)
    return {
        "variational_bound": (output.requires_grad_(), x, t, table, None, seed, flip, *options),
        "variational_bound_backward": (
            output.detach(), torch.randn(2, 2, device=DEVICE), torch.randn(2, device=DEVICE),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["variational_bound", "variational_bound_backward"])
def test_opcheck(name, memory_format, learned):
    torch.use_deterministic_algorithms(False)  # opcheck compares unused memory, and NaN is not NaN
    operator = getattr(torch.ops.ddpm_fast, name).default
    torch.library.opcheck(operator, operator_arguments(memory_format, learned)[name])


@pytest.mark.parametrize("given", [False, True])
def test_compiles_without_a_graph_break(given):
    shape, table = (2, 3, 4, 5), make_table("pred_noise", T).float().to(DEVICE)
    x, t = make_images(shape, torch.float32, device=DEVICE), make_times(2, T, DEVICE)
    eps, seed = torch.randn(shape, device=DEVICE) if given else None, torch.tensor([SEED], device=DEVICE)
    scale, forward_table = torch.tensor(0.7, device=DEVICE), table[:, :2].contiguous()

    def step(scale):
        x_t = q_sample(x, t, forward_table, eps, seed=seed)
        output = torch.cat([scale * x_t, scale * x_t], dim=1)
        return variational_bound(output, x, t, table, eps, seed=seed).mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = scale.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_backward_twice_and_double_backward():
    shape, table = (2, 3, 4, 5), make_table("pred_noise", T).float().to(DEVICE)
    x, t = make_images(shape, torch.float32, device=DEVICE), make_times(2, T, DEVICE)
    output = torch.randn((2, 6, 4, 5), device=DEVICE, requires_grad=True)
    loss = variational_bound(output, x, t, table, seed=SEED).sum()
    first, second = (torch.autograd.grad(loss, output, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, output, create_graph=True)


def refusal_cases():
    x, t = make_images((2, 3, 4, 4), torch.float32, device=DEVICE), make_times(2, T, DEVICE)
    output, table = torch.cat([x, x], dim=1), make_table("pred_noise", T).float().to(DEVICE)
    many = torch.zeros(2, 65, 2, 2, device=DEVICE)
    last = torch.zeros(2, 130, 2, 2, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return {
        "x_start has 3 dimensions": ((output[:, 0], x[:, 0], t, table), {}),
        "the batch is empty": ((output[:0], x[:0], t[:0], table), {}),
        "table is torch.float64": ((output, x, t, table.double()), {}),
        "table is not contiguous": ((output, x, t, table.t().contiguous().t()), {}),
        "x_start is torch.float64": ((output, x.double(), t, table), {}),
        "x_start is neither contiguous nor channels-last": ((output[..., :2].clone(), x[..., ::2], t, table), {}),
        "model_output is torch.float64": ((output.double(), x, t, table), {}),
        "model_output is neither contiguous": ((output.transpose(2, 3), x, t, table), {}),
        "images have 65 channels": ((last, many, t, table), {}),
        "a gradient of x_start is wanted": ((output, x.clone().requires_grad_(), t, table), {}),
    }


@pytest.mark.parametrize("reason", refusal_cases())
def test_refusals(reason):
    args, options = refusal_cases()[reason]
    with pytest.raises(RuntimeError, match=f"variational_bound: backend 'triton' was forced and refuses: {reason}"):
        variational_bound(*args, seed=SEED, **options)
    with use_backend("reference"):
        variational_bound(*args, seed=SEED, **options)
