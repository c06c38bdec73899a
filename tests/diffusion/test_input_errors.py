"""Wrong input to GaussianDiffusion: one sentence names the argument, what came and what is accepted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ddpm_fast import ElucidatedDiffusion, GaussianDiffusion, RectifiedFlow, Unet, XMWrapper
from ddpm_fast.diffusion.gaussian_diffusion import extract
from ddpm_fast.ops.common.tables import lookup


def make(**kwargs) -> GaussianDiffusion:
    return GaussianDiffusion(Unet(8, dim_mults=(1, 2)), **{"image_size": 8, "timesteps": 30, **kwargs})


def image(*shape: int, **kwargs) -> torch.Tensor:
    return torch.rand(shape or (2, 3, 8, 8), **kwargs)


def with_nan() -> torch.Tensor:
    x = image()
    x[1, 0, 3, 3] = float("nan")
    return x


FORWARD = {
    "integer_images": (
        lambda d: d(torch.zeros(2, 3, 8, 8, dtype=torch.int32)),
        TypeError,
        r"img must be floating point in \[0, 1\] or uint8 in 0..255, got torch.int32",
    ),
    "channels": (lambda d: d(image(2, 1, 8, 8)), ValueError, r"img must have shape \(B, 3, 8, 8\), got \(2, 1, 8, 8\)"),
    "size": (lambda d: d(image(2, 3, 8, 10)), ValueError, r"img must have shape \(B, 3, 8, 8\)"),
    "dims": (lambda d: d(image(3, 8, 8)), ValueError, r"got \(3, 8, 8\)"),
    "device": (lambda d: d(image(device="meta")), ValueError, "img must be on the diffusion's device cpu, got meta"),
    "nan": (lambda d: d(with_nan()), ValueError, r"img must be finite, got NaN or infinity in images \[1\]"),
    "not_a_tensor": (lambda d: d([1, 2]), TypeError, "img must be a tensor, got list"),
    "t_high": (
        lambda d: d(image(), times=torch.tensor([0, 30])),
        ValueError,
        r"t must be in \[0, 30\), got values from 0 to 30",
    ),
    "t_low": (lambda d: d(image(), times=torch.tensor([-1, 3])), ValueError, "got values from -1 to 3"),
    "t_float": (lambda d: d(image(), times=torch.tensor([0.0, 1.0])), TypeError, "t must be an integer tensor"),
    "t_shape": (lambda d: d(image(), times=torch.tensor([3])), ValueError, r"t must have shape \(2,\)"),
    "t_device": (
        lambda d: d(image(), times=torch.tensor([3, 4], device="meta")),
        ValueError,
        "t must be on the diffusion's device",
    ),
    "noise_shape": (lambda d: d(image(), noise=torch.randn(2, 3, 8, 4)), ValueError, "noise must have x_start's shape"),
    "reduction": (
        lambda d: d(image(), loss_reduction="sum"),
        ValueError,
        "loss_reduction must be 'mean' or 'none', got 'sum'",
    ),
    "batch_size": (lambda d: d.sample(-1), ValueError, "batch_size must be a non-negative integer; got -1"),
    "seed": (lambda d: d.sample(1, seed="7"), TypeError, "seed must be an int"),
    "sampler": (lambda d: d.sample(1, sampler=["ddim"]), ValueError, "sampler must be one of"),
    "steps": (
        lambda d: d.sample(1, sampling_timesteps=2.5),
        ValueError,
        "sampling_timesteps must be an integer; got 2.5",
    ),
    "spacing": (lambda d: d.sample(1, spacing=3), TypeError, "spacing must be a name or a sequence of times, got 3"),
    "spacing_times": (
        lambda d: d.sample(1, spacing=["a"]),
        ValueError,
        "each time of spacing must be a number; got 'a'",
    ),
    "options": (lambda d: d.sample(1, sampler_options=[1]), TypeError, "sampler_options must be a dictionary, got"),
    "option": (
        lambda d: d.sample(1, sampler="ddim", sampler_options={"eta": [1, 2]}),
        ValueError,
        "eta must be a number",
    ),
    "option_text": (
        lambda d: d.sample(1, sampler="unipc", sampler_options={"solver": ["bh2"]}),
        TypeError,
        "solver must be text, got",
    ),
    "clip_x_start": (
        lambda d: d.sample(1, clip_x_start="no"),
        ValueError,
        "clip_x_start must be True or False; got 'no'",
    ),
    "graph": (lambda d: d.sample(1, graph="no"), ValueError, "graph must be True or False; got 'no'"),
    "all": (lambda d: d.sample(1, "no"), ValueError, "return_all_timesteps must be True or False; got 'no'"),
    "start_index_float": (lambda d: d.sample(1, start_index=0.5), TypeError, "start_index must be an int, got float"),
    "shape": (lambda d: d.p_sample_loop(3), ValueError, "shape must be a sequence of integers; got 3"),
    "classes": (lambda d: d.sample(1, classes=[None]), TypeError, "classes must be a tensor or a sequence of numbers"),
    "cfg_plus_plus": (
        lambda d: d.sample(1, guidance={"cfg_plus_plus": "no"}),
        ValueError,
        "guidance cfg_plus_plus must be True or False; got 'no'",
    ),
    "noise_type": (lambda d: d(image(), noise=0.5), TypeError, "noise must be a tensor, got float"),
    "offset": (
        lambda d: d(image(), offset_noise_strength="1"),
        ValueError,
        "offset_noise_strength must be a number; got '1'",
    ),
    "network_x": (lambda d: d.model([1], torch.tensor([1])), TypeError, "x must be a tensor, got list"),
    "bound_images": (lambda d: d.bits_per_dim([1]), TypeError, "images must be a tensor, got list"),
    "bound_times": (lambda d: d.bits_per_dim(image(), timesteps=2.5), TypeError, "timesteps must be how many, or"),
    "bound_start": (
        lambda d: d.bits_per_dim(image(), start_index="1"),
        ValueError,
        "start_index must be a non-negative",
    ),
    "interpolate_type": (lambda d: d.interpolate([1], image()), TypeError, "x1 must be a tensor, got list"),
    "interpolate_lam": (
        lambda d: d.interpolate(image(), image(), lam=math.nan),
        ValueError,
        r"lam must be a number in \[-1e\+06, 1e\+06\]; got nan",
    ),
    "interpolate_name": (
        lambda d: d.interpolate(image(), image(), steps=3),
        TypeError,
        "sampling has no argument 'steps'; of conditions it has classes",
    ),
    "inpaint_name": (
        lambda d: d.inpaint(image(), torch.ones(1, 1, 8, 8), known=1),
        TypeError,
        "sampling has no argument 'known'; of conditions it has classes",
    ),
    "interpolate_between": (
        lambda d: d.interpolate(image(), image(), t=5.5),
        ValueError,
        "t must be an integer; got 5.5",
    ),
    "p_sample_between": (lambda d: d.p_sample(image(), 5.5), ValueError, "t must be an integer; got 5.5"),
    "start_index": (lambda d: d.sample(1, seed=7, start_index=-1), ValueError, "start_index must be in"),
    "interpolate_t": (lambda d: d.interpolate(image(), image(), t=30), ValueError, r"t must be in \[0, 30\), got 30"),
    "interpolate_shape": (lambda d: d.interpolate(image(), image(1, 3, 8, 8)), ValueError, "x2 must have x1's shape"),
    "p_sample_t": (lambda d: d.p_sample(image(), 30), ValueError, r"t must be in \[0, 30\), got 30"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_wrong_input_is_named(name):
    call, error, message = FORWARD[name]
    with pytest.raises(error, match=message) as info:
        call(make())
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(objective="pred_eps"), "objective must be one of pred_noise, pred_x0, pred_v"),
        (dict(beta_schedule="quadratic"), "beta_schedule must be one of"),
        (dict(sampling_timesteps=31), r"sampling_timesteps must be in \[1, timesteps = 30\], got 31"),
        (dict(sampling_timesteps=0), "sampling_timesteps must be in"),
        (dict(sampler="magic"), "sampler must be one of"),
        (dict(image_size=(8, 8, 8)), "image_size must be a positive int or two of them"),
        (dict(image_size="8"), "image_size must be"),
        (dict(timesteps=-3), "timesteps must be a positive int"),
        (dict(timesteps=10, beta_schedule="linear"), "at least 21 timesteps"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_numbers_of_numpy_are_numbers():
    d = make(sampling_timesteps=3)
    expected = d.sample(2, seed=7, start_index=1, progress=False)
    one, seven = np.int64(1), np.int64(7)
    assert torch.equal(d.sample(np.int64(2), seed=seven, start_index=one, progress=False), expected)
    steps = {
        "sampling_timesteps": np.int64(3),
        "clip_x_start": np.bool_(True),
        "sampler_options": {"eta": np.float32(0)},
    }
    assert torch.equal(d.sample(2, seed=7, start_index=1, sampler="ddim", progress=False, **steps), expected)


def test_models_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="channels=3, out_dim=6"):
        GaussianDiffusion(Unet(8, dim_mults=(1,), learned_variance=True), image_size=8)
    with pytest.raises(ValueError, match="learned_sinusoidal_cond"):
        GaussianDiffusion(Unet(8, dim_mults=(1,), learned_sinusoidal_cond=True), image_size=8)


@pytest.mark.parametrize("process", [GaussianDiffusion, ElucidatedDiffusion, RectifiedFlow])
def test_what_is_no_network_is_named(process):
    for model, got in ((None, "NoneType"), ("unet", "str"), (Unet, "the class Unet itself")):
        with pytest.raises(TypeError, match=rf"model must be a network, such as Unet\(dim=64\), got {got}$"):
            process(model, image_size=8)


def test_size_not_divisible_by_the_unets_factor():
    diffusion = make(image_size=9)
    with pytest.raises(ValueError, match=r"divisible by 2 for this Unet, got \(9, 9\)"):
        diffusion(image(1, 3, 9, 9))
    with pytest.raises(ValueError, match="divisible by 2"):
        diffusion.sample(1, progress=False)


def test_empty_batches_pass_through():
    diffusion = make()
    assert diffusion(image(0, 3, 8, 8), loss_reduction="none").shape == (0,)
    assert diffusion.sample(0, progress=False).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    "make_loss",
    [
        make,
        lambda: make(timestep_sampler="loss-second-moment"),
        lambda: XMWrapper(make(), candidates=2),
    ],
    ids=["plain", "history", "candidates"],
)
def test_a_mean_over_no_images_is_refused(make_loss):
    with pytest.raises(ValueError, match=r"images must hold at least one image for a mean loss, got \(0, 3, 8, 8\)"):
        make_loss()(image(0, 3, 8, 8))


def test_nan_is_not_looked_for_while_compiling():
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=30)
    compiled = torch.compile(diffusion, backend="eager", fullgraph=True)
    assert torch.isnan(compiled(with_nan(), times=torch.tensor([1, 2]), noise=torch.randn(2, 3, 8, 8)))


def test_a_lookup_outside_the_table_is_nan_and_reads_nothing_outside():
    """What a CUDA call gets, where the values of t cannot be looked at without waiting."""
    table = torch.arange(6.0).reshape(3, 2)
    rows = lookup(table, torch.tensor([0, 2, 3, -1, 2**40]))
    assert torch.equal(rows[:2], table[[0, 2]]) and torch.isnan(rows[2:]).all()
    assert torch.isnan(extract(table[:, 0], torch.tensor([7]), (1, 3, 8, 8))).all()


def test_uint8_and_int32_times_are_taken():
    diffusion = make()
    eps, x = torch.randn(2, 3, 8, 8), image()
    expected = diffusion(x, times=torch.tensor([3, 4]), noise=eps)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(diffusion(x, times=torch.tensor([3, 4], dtype=dtype), noise=eps), expected)


def test_a_sum_that_overflows_is_no_nan():
    """The search for NaN adds numbers up first."""
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=20, auto_normalize=False)
    for dtype, value in ((torch.float32, 3e37), (torch.float16, 6e4)):
        images = torch.full((2, 3, 8, 8), value, dtype=dtype)
        diffusion._check_images("img", images)
        images[1, 0, 0, 0] = float("-inf")
        with pytest.raises(ValueError, match=r"img must be finite, got NaN or infinity in images \[1\]"):
            diffusion._check_images("img", images)
