"""The Triton kernels of forward diffusion against the reference in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ddpm_fast import GaussianDiffusion, Unet, noise, use_backend
from ddpm_fast.diffusion import schedules
from ddpm_fast.diffusion.weightings import find_weighting
from ddpm_fast.noise import Noise
from ddpm_fast.ops.forward_diffusion import reference
from ddpm_fast.ops.forward_diffusion.op import diffusion_loss, q_sample
from ddpm_fast.runtime import triton_launch
from ddpm_fast.testing.truth import assert_close_to_truth

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
DTYPES = [torch.uint8, *FLOATS]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SEED = -123456789012345


@pytest.fixture(autouse=True)
def poisoned_memory_and_triton():
    """torch.empty gives NaN, so an unwritten element fails the comparison."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def tables(objective: str = "pred_v") -> tuple[torch.Tensor, torch.Tensor]:
    """(T, 2) and (T, 3) float32."""
    schedule = schedules.Schedule(schedules.make_betas("sigmoid", T))
    weight = schedules.loss_weight(schedule, objective, find_weighting("min_snr", {"gamma": 5}))
    loss_table = schedules.loss_table(schedule, objective, weight)
    return tuple(table.float().to(DEVICE) for table in (schedules.forward_table(schedule), loss_table))


def make_images(shape, dtype, memory_format) -> torch.Tensor:
    x = torch.rand(shape, device=DEVICE)
    x = (x * 255).round().to(torch.uint8) if dtype == torch.uint8 else (2 * x - 1).to(dtype)
    return x.contiguous(memory_format=FORMATS[memory_format])


def make_times(batch: int) -> torch.Tensor:
    return torch.randint(0, T, (batch,), device=DEVICE)


def make_options(shape, rng: random.Random, **fixed) -> dict:
    """Options of both ops, drawn where not fixed: seed, normalize, flip, offset_noise_strength."""
    drawn = {"normalize": rng.random() < 0.5, "flip": rng.random() < 0.5, "offset": rng.random() < 0.5, **fixed}
    flip = None
    if drawn["flip"]:
        flip = torch.tensor([i % 2 == 0 for i in range(shape[0])], device=DEVICE)
        flip = flip if rng.random() < 0.5 else flip.to(torch.uint8)
    return {
        "seed": torch.tensor([SEED], device=DEVICE),
        "normalize": drawn["normalize"],
        "flip": flip,
        "offset_noise_strength": 0.3 if drawn["offset"] and shape[1] <= 64 else 0.0,
    }


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def check_q_sample(x, noise, options, dtype, memory_format) -> None:
    t, (table, _) = make_times(x.shape[0]), tables()
    kwargs = {**options, "dtype": dtype, "memory_format": FORMATS[memory_format]}
    actual = q_sample(x, t, table, noise, **kwargs)
    expected = reference.q_sample(x, t, table, noise, **kwargs)
    truth = reference.q_sample(wide(x), t, table.double(), wide(noise), **{**kwargs, "dtype": torch.float64})
    assert actual.is_contiguous(memory_format=FORMATS[memory_format])
    assert_close_to_truth(actual, expected, truth, name="x_t")


def loss_and_gradient(function, output, *args, dloss, **options):
    output = output.detach().requires_grad_()
    loss = function(output, *args, **options)
    return loss.detach(), torch.autograd.grad(loss, output, dloss.to(loss.dtype))[0]


def check_loss(output, x, noise, options, objective="pred_v") -> None:
    t, (_, table) = make_times(x.shape[0]), tables(objective)
    dloss = torch.randn(x.shape[0], device=DEVICE)
    actual = loss_and_gradient(diffusion_loss, output, x, t, table, noise, dloss=dloss, **options)
    with torch.no_grad():
        assert torch.equal(diffusion_loss(output, x, t, table, noise, **options), actual[0])
    expected = loss_and_gradient(reference.diffusion_loss, output, x, t, table, noise, dloss=dloss, **options)
    arguments = (wide(output), wide(x), t, table.double(), wide(noise))
    truth = loss_and_gradient(reference.diffusion_loss, *arguments, dloss=dloss, **options)
    assert actual[1].dtype == output.dtype and actual[1].stride() == output.stride()
    for name, ours, theirs, true in zip(("loss", "gradient"), actual, expected, truth, strict=True):
        assert_close_to_truth(ours, theirs, true, name=name)


@pytest.mark.production
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_images_of_production(dtype):
    """x_t written channels-last in the network's dtype, and the loss of its output; small ones in the interpreter."""
    shape = (2, 3, 16, 16) if triton_launch.interpreted() else (32, 3, 128, 128)
    x, rng = make_images(shape, torch.float32, "contiguous"), random.Random(7)
    for flip in (False, True):
        options = make_options(shape, rng, normalize=True, flip=flip, offset=flip)
        check_q_sample(x, None, options, dtype, "channels_last")
        output = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
        check_loss(output, x, None, options)


@pytest.mark.release(
    but=lambda shape, x_format, out_format: (
        x_format == out_format == list(FORMATS)[SHAPES.index(shape) % 2] or shape == (2, 5, 6, 6)
    )
)
@pytest.mark.parametrize("out_format", FORMATS)
@pytest.mark.parametrize("x_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_formats(shape, x_format, out_format):
    rng = random.Random(f"{shape}{x_format}{out_format}")
    for given in (False, True):
        x = make_images(shape, rng.choice([torch.uint8, *FLOATS]), x_format)
        eps = torch.randn(shape, device=DEVICE).contiguous(memory_format=FORMATS[x_format]) if given else None
        options = make_options(shape, rng)
        if shape[1] <= 64 or out_format == "contiguous":
            check_q_sample(x, eps, options, rng.choice(FLOATS), out_format)
            output = torch.randn(shape, device=DEVICE).to(rng.choice(FLOATS))
            check_loss(output.contiguous(memory_format=FORMATS[out_format]), x, eps, options)


def in_half_of_the_formats(dtype, out_dtype, memory_format) -> bool:
    """Every two of the three have each of their values together."""
    return (DTYPES.index(dtype) + FLOATS.index(out_dtype)) % 2 == list(FORMATS).index(memory_format)


@pytest.mark.release(but=in_half_of_the_formats)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, out_dtype, memory_format):
    shape, rng = (2, 3, 5, 7), random.Random(0)
    x = make_images(shape, dtype, memory_format)
    for eps in (None, torch.randn(shape, device=DEVICE).to(out_dtype)):
        options = make_options(shape, rng)
        check_q_sample(x, eps, options, out_dtype, memory_format)
        output = torch.randn(shape, device=DEVICE).to(out_dtype)
        check_loss(output.contiguous(memory_format=FORMATS[memory_format]), x, eps, options)


def is_one_of_the_pairs(normalize, flip, offset, memory_format, _arithmetic=None) -> bool:
    """Every two of the four options have each of their values together."""
    is_even = (normalize + flip + offset + (memory_format == "contiguous")) % 2 == 0
    return is_even and (_arithmetic is None) != (normalize == flip)


@pytest.mark.release(but=is_one_of_the_pairs)
@pytest.mark.arithmetic
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("normalize, flip, offset", list(itertools.product([False, True], repeat=3)))
def test_options(normalize, flip, offset, memory_format):
    shape = (3, 3, 4, 6)
    options = make_options(shape, random.Random(1), normalize=normalize, flip=flip, offset=offset)
    for dtype in (torch.uint8, torch.float32):
        x = make_images(shape, dtype, "contiguous")
        check_q_sample(x, None, options, torch.float32, memory_format)
        output = torch.randn(shape, device=DEVICE).contiguous(memory_format=FORMATS[memory_format])
        check_loss(output, x, None, options)


# An objective is three columns of a table; the kernel does not know it.
@pytest.mark.release(
    but=lambda objective, memory_format, _arithmetic=None: (
        (_arithmetic is None) == (memory_format == "contiguous") and (_arithmetic is None or objective == "pred_v")
    )
)
@pytest.mark.arithmetic
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
def test_objectives(objective, memory_format):
    shape = (4, 3, 5, 6)
    output = torch.randn(shape, device=DEVICE).contiguous(memory_format=FORMATS[memory_format])
    check_loss(
        output, make_images(shape, torch.float32, "contiguous"), None, make_options(shape, random.Random(2)), objective
    )


@pytest.mark.release(
    but=lambda flip, memory_format, _arithmetic=None: (
        (memory_format == "contiguous") == (flip == bool(_arithmetic)) and (flip or _arithmetic is None)
    )
)
@pytest.mark.production
@pytest.mark.arithmetic
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("flip", [False, True])
def test_bytes_give_the_bits_of_floats(memory_format, flip):
    """All 256 values: x_t, loss and gradient of bytes are those of u/255·2 − 1 in float32, mirrored before."""
    shape = (2, 3, 16, 16)
    images = torch.arange(2 * 3 * 256, device=DEVICE).remainder(256).to(torch.uint8).view(shape)
    options = make_options(shape, random.Random(5), normalize=True, flip=flip, offset=True)
    plain = {**options, "normalize": False, "flip": None}
    floats = reference.prepared_images(images.cpu(), True, None, torch.float32).to(DEVICE)
    if flip:
        floats = torch.where(options["flip"].bool()[:, None, None, None], floats.flip(-1), floats)
    t, (forward_table, loss_table) = make_times(2), tables()
    for dtype in FLOATS:
        arguments = {"dtype": dtype, "memory_format": FORMATS[memory_format]}
        actual, expected = (
            q_sample(x, t, forward_table, None, **arguments, **kwargs)
            for x, kwargs in ((images, options), (floats, plain))
        )
        assert torch.equal(actual, expected)
        output = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=FORMATS[memory_format])
        ours, theirs = (
            loss_and_gradient(
                diffusion_loss, output, x, t, loss_table, None, dloss=torch.ones(2, device=DEVICE), **kwargs
            )
            for x, kwargs in ((images, options), (floats, plain))
        )
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_float16_gradients_of_large_images_do_not_underflow():
    shape = (1, 3, 64, 64)
    options = make_options(shape, random.Random(3), normalize=False, flip=False, offset=False)
    output = 0.01 * torch.randn(shape, device=DEVICE).half()
    t, (_, table) = make_times(1), tables()
    x, dloss = make_images(shape, torch.float32, "contiguous"), torch.full((1,), 2.0**14, device=DEVICE)
    arguments = (x, t, table, output.float())  # the error is small
    _, actual = loss_and_gradient(diffusion_loss, output, *arguments, dloss=dloss, **options)
    _, expected = loss_and_gradient(reference.diffusion_loss, output, *arguments, dloss=dloss, **options)
    double = (x.double(), t, table.double(), output.double())
    _, truth = loss_and_gradient(reference.diffusion_loss, output.double(), *double, dloss=dloss, **options)
    assert_close_to_truth(actual, expected, truth)


@pytest.mark.arithmetic
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 3, 7, 9), (2, 4, 16, 16)])
def test_the_noise_is_the_noise_function(shape, memory_format):
    """With a = 0 and b = 1 x_t is ε itself, whatever the layout and the flip."""
    table = torch.tensor([[0.0, 1.0]], device=DEVICE)
    x, t = torch.zeros(shape, device=DEVICE), torch.zeros(shape[0], dtype=torch.int64, device=DEVICE)
    flip = torch.ones(shape[0], dtype=torch.bool, device=DEVICE)
    kwargs = {"seed": SEED, "stream": noise.STREAM_TRAINING, "device": DEVICE, "dtype": torch.float64}
    truth = noise.normal(shape, **kwargs)
    actual = q_sample(x, t, table, seed=SEED, flip=flip, memory_format=FORMATS[memory_format])
    assert_close_to_truth(actual, truth.float(), truth)
    offset = noise.normal(shape[:2], **{**kwargs, "stream": noise.STREAM_OFFSET})[:, :, None, None]
    options = {"seed": SEED, "offset_noise_strength": 0.5, "memory_format": FORMATS[memory_format]}
    for eps in (None, torch.zeros(shape, device=DEVICE)):
        actual = q_sample(x, t, table, eps, **options)
        expected = 0.5 * offset + (truth if eps is None else 0 * truth)
        assert_close_to_truth(actual, expected.float(), expected)


def test_gradient_is_the_finite_difference():
    shape, (_, table) = (2, 3, 3, 5), tables()
    options = make_options(shape, random.Random(4))
    x, t, output = make_images(shape, torch.uint8, "contiguous"), make_times(2), torch.randn(shape, device=DEVICE)
    _, gradient = loss_and_gradient(
        diffusion_loss, output, x, t, table, None, dloss=torch.ones(2, device=DEVICE), **options
    )
    h = 0.5  # the loss is a parabola: a central difference is exact for any step
    for index in [(0, 0, 0, 0), (0, 2, 2, 4), (1, 1, 0, 3), (1, 2, 1, 2)]:
        up, down = output.clone(), output.clone()
        up[index] += h
        down[index] -= h
        above, below = (diffusion_loss(moved, x, t, table, **options)[index[0]] for moved in (up, down))
        torch.testing.assert_close(gradient[index], (above - below) / (2 * h), rtol=1e-3, atol=1e-5)


def test_runs_repeat_bit_for_bit_and_inputs_stay():
    shape, (forward_table, table) = (2, 3, 31, 33), tables()
    options = make_options(shape, random.Random(5))
    x, t, output = make_images(shape, torch.uint8, "contiguous"), make_times(2), torch.randn(shape, device=DEVICE)
    copies = [tensor.clone() for tensor in (x, t, output)]
    dloss = torch.randn(2, device=DEVICE)
    results = [
        (
            q_sample(x, t, forward_table, **options),
            *loss_and_gradient(diffusion_loss, output, x, t, table, None, dloss=dloss, **options),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, t, output), strict=True))


@pytest.mark.arithmetic
def test_the_second_stage_sums_any_number_of_tiles():
    from ddpm_fast.ops.forward_diffusion import triton as kernel

    (_, table), t = tables(), make_times(3)
    for tiles in (1, 31, 32, 33, 70):
        partial = torch.rand(3, tiles, device=DEVICE)
        loss, factor = torch.empty(3, device=DEVICE), torch.empty(3, device=DEVICE)
        blocks = (tiles + 31) // 32
        arguments = (loss, factor, partial, t, table, T, tiles, 48)
        kernel.diffusion_loss_reduce_kernel[(3,)](*arguments, BLOCK=32, BLOCKS=blocks, num_warps=1)
        weight = table[t, 2].double()
        truth = weight * partial.double().sum(dim=1) / 48
        assert_close_to_truth(loss, (table[t, 2] * partial.sum(dim=1) / 48), truth)
        assert_close_to_truth(factor, table[t, 2] * 2 / 48, 2 * weight / 48)


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

    shape, (forward_table, table) = (2, 3, 5, 7), tables()
    options = make_options(shape, random.Random(6))
    x, t = make_images(shape, torch.float32, "contiguous"), make_times(2)
    output = torch.randn(shape, device=DEVICE).contiguous(memory_format=FORMATS[memory_format])
    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch, "empty_like", guarded_like)
    q_sample(x, t, forward_table, memory_format=FORMATS[memory_format], **options)
    loss_and_gradient(diffusion_loss, output, x, t, table, dloss=torch.ones(2, device=DEVICE), **options)
    monkeypatch.undo()
    assert len(made) == 6  # x_t; error, loss, factor, partial sums; the gradient
    for base in made:
        assert (base[:guard] == 7).all() and (base[-guard:] == 7).all()


def test_times_outside_the_table_give_nan_and_read_nothing():
    t = torch.tensor([-1, 3, T, 2**40, -(2**62)], device=DEVICE)
    shape, (forward_table, table) = (5, 3, 3, 3), tables()
    x = make_images(shape, torch.float32, "contiguous")
    x_t = q_sample(x, t, forward_table, seed=SEED)
    loss, gradient = loss_and_gradient(
        diffusion_loss, x, x, t, table, None, seed=SEED, dloss=torch.ones(5, device=DEVICE)
    )
    for i in range(5):
        for result in (x_t, loss, gradient):
            assert result[i].isnan().all() if i != 1 else result[i].isfinite().all()


def operator_arguments(memory_format: str):
    """Arguments of the operators q_sample, diffusion_loss and diffusion_loss_backward."""
    shape, (forward_table, table) = (2, 3, 4, 5), tables()
    x, t, seed = make_images(shape, torch.uint8, memory_format), make_times(2), torch.tensor([3], device=DEVICE)
    flip = torch.tensor([True, False], device=DEVICE)
    output = torch.randn(shape, device=DEVICE).contiguous(memory_format=FORMATS[memory_format])
    last = memory_format == "channels_last"
    return {
        "q_sample": (x, t, forward_table, None, seed, flip, True, 0.2, torch.bfloat16, last),
        "diffusion_loss": (output.requires_grad_(), x, t, table, None, seed, flip, True, 0.2, True),
        "diffusion_loss_backward": (output.detach(), torch.randn(2, device=DEVICE), torch.randn(2, device=DEVICE)),
    }


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["q_sample", "diffusion_loss", "diffusion_loss_backward"])
def test_opcheck(name, memory_format):
    torch.use_deterministic_algorithms(False)  # opcheck compares unused memory, and NaN is not NaN
    operator = getattr(torch.ops.ddpm_fast, name).default
    torch.library.opcheck(operator, operator_arguments(memory_format)[name])


@pytest.mark.parametrize("given", [False, True])
def test_compiles_without_a_graph_break(given):
    shape, (forward_table, table) = (2, 3, 4, 5), tables()
    x, t, seed = make_images(shape, torch.float32, "contiguous"), make_times(2), torch.tensor([SEED], device=DEVICE)
    eps = torch.randn(shape, device=DEVICE) if given else None
    scale = torch.tensor(0.7, device=DEVICE)

    def step(scale):
        x_t = q_sample(x, t, forward_table, eps, seed=seed)
        return diffusion_loss(scale * x_t, x, t, table, eps, seed=seed).mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = scale.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_backward_twice_and_double_backward():
    shape, (_, table) = (2, 3, 4, 5), tables()
    x, t = make_images(shape, torch.float32, "contiguous"), make_times(2)
    output = torch.randn(shape, device=DEVICE, requires_grad=True)
    loss = diffusion_loss(output, x, t, table, seed=SEED).sum()
    first, second = (torch.autograd.grad(loss, output, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, output, create_graph=True)


def refusal_cases():
    x, t, (table, _) = make_images((2, 3, 4, 4), torch.float32, "contiguous"), make_times(2), tables()
    many = torch.zeros(2, 65, 2, 2, device=DEVICE)
    return {
        "x_start has 3 dimensions": ((x[:, 0], t, table), {}),
        "the batch is empty": ((x[:0], t[:0], table), {}),
        "table is torch.float64": ((x, t, table.double()), {}),
        "table is not contiguous": ((x, t, table.t().contiguous().t()), {}),
        "x_start is torch.float64": ((x.double(), t, table), {}),
        "noise is torch.float64": ((x, t, table, x.double()), {}),
        "x_start is neither contiguous nor channels-last": ((x[..., ::2], t, table), {}),
        "dtype is torch.float64": ((x, t, table), {"dtype": torch.float64}),
        "images have 65 channels": ((many, t, table), {"offset_noise_strength": 0.1}),
        "a gradient of x_start is wanted": ((x.clone().requires_grad_(), t, table), {}),
        "a gradient of noise is wanted": ((x, t, table, x.clone().requires_grad_()), {}),
    }


@pytest.mark.parametrize("reason", refusal_cases())
def test_refusals(reason):
    args, options = refusal_cases()[reason]
    with pytest.raises(RuntimeError, match=f"q_sample: backend 'triton' was forced and refuses: {reason}"):
        q_sample(*args, seed=SEED, **options)
    with use_backend(None):
        q_sample(*args, seed=SEED, **options)  # the reference runs


@pytest.mark.parametrize("reason", ["model_output is torch.float64", "model_output is neither contiguous"])
def test_loss_refusals(reason):
    x, t, (_, table) = make_images((2, 3, 4, 4), torch.float32, "contiguous"), make_times(2), tables()
    output = x.double() if "float64" in reason else x.transpose(2, 3)
    with pytest.raises(RuntimeError, match=f"diffusion_loss: .* refuses: {reason}"):
        diffusion_loss(output, x, t, table, seed=SEED)


class Scale(torch.nn.Module):
    """The smallest model: one factor."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t, x_self_cond=None):
        return self.scale * x


def test_the_whole_training_loss_compiles_without_a_graph_break():
    diffusion = GaussianDiffusion(Scale(), image_size=8, timesteps=T, offset_noise_strength=0.1).to(DEVICE)
    x, t = torch.rand(3, 3, 8, 8, device=DEVICE), make_times(3)

    def step(x, t):
        return diffusion(x, times=t, loss_reduction="none")

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        loss = function(x, t)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), diffusion.model.scale)[0]))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("strength", [0.0, 0.2])
@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
def test_training_loss_makes_no_noise_tensor_and_equals_the_reference(objective, strength, monkeypatch):
    diffusion = GaussianDiffusion(
        Scale(), image_size=8, timesteps=T, objective=objective, offset_noise_strength=strength
    ).to(DEVICE)
    x, t = torch.rand(3, 3, 8, 8, device=DEVICE), make_times(3)
    results = []
    for backend in ("reference", "triton"):
        torch.manual_seed(3)
        with use_backend(backend), monkeypatch.context() as patch:
            if backend == "triton":
                patch.setattr(Noise, "store", None)
            loss = diffusion(x, times=t, loss_reduction="none")
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), diffusion.model.scale)[0]))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_immiscible_and_overridden_methods_keep_the_tensor():
    class Own(GaussianDiffusion):
        def q_sample(self, x_start, t, noise=None):
            self.seen = noise
            return super().q_sample(x_start, t, noise)

    x, t = torch.rand(3, 3, 8, 8, device=DEVICE), make_times(3)
    own = Own(Scale(), image_size=8, timesteps=T).to(DEVICE)
    own(x, times=t)
    assert own.seen.shape == x.shape
    immiscible = GaussianDiffusion(Scale(), image_size=8, timesteps=T, immiscible=True).to(DEVICE)
    assert immiscible._noise(x, None, 0.0).tensor.shape == x.shape
    assert immiscible(x, times=t).isfinite()


@pytest.mark.release(but=lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_x_t_is_written_in_the_networks_dtype(dtype):
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=4, timesteps=T).to(DEVICE)
    image, t = torch.rand(2, 3, 4, 4, device=DEVICE), torch.tensor([3, 7], device=DEVICE)
    seen = []
    diffusion.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    losses = []
    for backend in ("triton", "reference"):
        torch.manual_seed(4)
        with use_backend(backend), torch.autocast(torch.device(DEVICE).type, dtype=dtype):
            losses.append(diffusion(image, times=t, loss_reduction="none"))
    assert seen == [dtype, dtype]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.05, atol=0.02)
    losses[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in diffusion.parameters())
