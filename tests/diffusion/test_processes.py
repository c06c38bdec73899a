"""Processes beside GaussianDiffusion against upstream's classes, from the same weights, times and noise."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from ddpm_fast import LearnedGaussianDiffusion, Unet, from_openai_options
from ddpm_fast.diffusion.continuous_time import (
    ContinuousTimeGaussianDiffusion,
    VParamContinuousTimeGaussianDiffusion,
)
from ddpm_fast.diffusion.elucidated_diffusion import ElucidatedDiffusion
from ddpm_fast.diffusion.rectified_flow import RectifiedFlow
from ddpm_fast.diffusion.weighted_objective import WeightedObjectiveGaussianDiffusion
from ddpm_fast.diffusion.xm import XMWrapper
from ddpm_fast.runtime import extension

upstream = pytest.importorskip("denoising_diffusion_pytorch")
UNET = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4, "learned_sinusoidal_cond": True}
B, C, SIZE = 3, 3, 8

OURS = {
    "ElucidatedDiffusion": ElucidatedDiffusion,
    "ContinuousTimeGaussianDiffusion": ContinuousTimeGaussianDiffusion,
    "VParamContinuousTimeGaussianDiffusion": VParamContinuousTimeGaussianDiffusion,
}
CASES = [
    ("ElucidatedDiffusion", {}),
    ("ElucidatedDiffusion", {"sigma_data": 0.3, "P_mean": -0.5}),
    ("ContinuousTimeGaussianDiffusion", {}),
    ("ContinuousTimeGaussianDiffusion", {"noise_schedule": "cosine"}),
    ("ContinuousTimeGaussianDiffusion", {"noise_schedule": "cosine", "min_snr_loss_weight": True}),
    ("ContinuousTimeGaussianDiffusion", {"noise_schedule": "learned", "learned_schedule_net_hidden_dim": 8}),
    ("VParamContinuousTimeGaussianDiffusion", {}),
]
IDS = [f"{name.removesuffix('GaussianDiffusion').removesuffix('Diffusion')}-{list(o.values())}" for name, o in CASES]


def pair(name: str, options: dict, self_condition: bool = False):
    """Upstream's process and ours, with the same weights."""
    torch.manual_seed(0)
    unet = {**UNET, "self_condition": self_condition}
    theirs = getattr(upstream, name)(upstream.Unet(**unet), image_size=SIZE, **options)
    ours = OURS[name](Unet(**unet), image_size=SIZE, **options)
    ours.load_state_dict(theirs.state_dict())  # strict, both ways
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def images(seed: int = 1) -> torch.Tensor:
    return torch.rand(B, C, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def gaussian(seed: int) -> torch.Tensor:
    return torch.randn(B, C, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def given_noise(monkeypatch, noises: list[torch.Tensor]) -> None:
    """torch.randn and randn_like give these in turn to upstream."""
    fresh = iter(noises)
    for name in ("randn", "randn_like"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: next(fresh).clone())


@pytest.mark.parametrize("name, options", CASES, ids=IDS)
def test_loss_and_gradients(monkeypatch, name, options):
    theirs, ours = pair(name, options)
    noise, found = gaussian(2), []
    times = torch.tensor([0.02, 0.4, 0.97]) if name != "ElucidatedDiffusion" else torch.tensor([0.01, 0.5, 7.0])
    for diffusion in (theirs, ours):
        given = {"sigma": times} if name == "ElucidatedDiffusion" else {"times": times, "noise": noise}
        if name == "ElucidatedDiffusion" and diffusion is ours:
            given["noise"] = noise
        with monkeypatch.context() as patch:
            if diffusion is theirs:
                given_noise(patch, [noise])
            loss = diffusion(images(), loss_reduction="none", **given)
        loss.mean().backward()
        found.append((loss.detach(), [p.grad for p in diffusion.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-5, atol=1e-6)
    assert all((a is None) == (b is None) for a, b in zip(found[1][1], found[0][1], strict=True))
    for mine, other in zip(found[1][1], found[0][1], strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=2e-5 * (1 + other.abs().max().item()))


@pytest.mark.parametrize("name, options", CASES[2:], ids=IDS[2:])
def test_ancestral_trajectory_in_continuous_time(monkeypatch, name, options):
    """Upstream's sample, step by step with our noise: its last step ends at time 0, which keeps some noise."""
    from ddpm_fast import noise as noise_function

    steps = 5
    theirs, ours = pair(name, {**options, "num_sample_steps": steps})
    noises = [noise_function.normal((B, C, SIZE, SIZE), seed=3, stream=noise_function.STREAM_INITIAL)]
    noises += [
        noise_function.normal((B, C, SIZE, SIZE), seed=3, stream=noise_function.STREAM_STEP, step=row)
        for row in range(steps)
    ]
    given_noise(monkeypatch, noises)
    expected = theirs.sample(B)
    found = ours.sample(B, seed=3, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("clip", [True, False])
def test_unclipped_continuous_sampling(monkeypatch, clip):
    from ddpm_fast import noise as noise_function

    theirs, ours = pair("ContinuousTimeGaussianDiffusion", {"num_sample_steps": 4, "clip_sample_denoised": clip})
    noises = [noise_function.normal((B, C, SIZE, SIZE), seed=1, stream=noise_function.STREAM_INITIAL)]
    noises += [
        noise_function.normal((B, C, SIZE, SIZE), seed=1, stream=noise_function.STREAM_STEP, step=row)
        for row in range(4)
    ]
    given_noise(monkeypatch, noises)
    expected = theirs.sample(B)
    torch.testing.assert_close(ours.sample(B, seed=1, progress=False), expected, rtol=0, atol=5e-5)


def test_dpmpp_of_elucidated_diffusion(monkeypatch):
    from ddpm_fast import noise as noise_function

    theirs, ours = pair("ElucidatedDiffusion", {"num_sample_steps": 6})
    initial = noise_function.normal((B, C, SIZE, SIZE), seed=5, stream=noise_function.STREAM_INITIAL)
    given_noise(monkeypatch, [initial])
    expected = theirs.sample_using_dpmpp(B)
    found = ours.sample_using_dpmpp(B, seed=5, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize("options", [{}, {"S_churn": 0}, {"S_churn": 20, "S_tmin": 0.01, "S_noise": 1.0}], ids=str)
def test_heun_of_elucidated_diffusion(monkeypatch, options, self_condition):
    """Upstream's sample, with the noise that our rows take: churn of a step is the noise of the row before."""
    from ddpm_fast import noise as noise_function

    steps = 5
    theirs, ours = pair("ElucidatedDiffusion", {"num_sample_steps": steps, **options}, self_condition)
    initial = noise_function.normal((B, C, SIZE, SIZE), seed=5, stream=noise_function.STREAM_INITIAL)
    churn = [
        noise_function.normal((B, C, SIZE, SIZE), seed=5, stream=noise_function.STREAM_STEP, step=2 * i + 1)
        for i in range(steps - 1)
    ]
    given_noise(monkeypatch, [initial, torch.zeros_like(initial), *churn])
    expected = theirs.sample(B)
    found = ours.sample(B, seed=5, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_upstreams_methods_of_elucidated_diffusion():
    theirs, ours = pair("ElucidatedDiffusion", {})
    sigma = torch.tensor([0.01, 0.5, 60.0])
    for name in ("c_skip", "c_out", "c_in", "c_noise", "loss_weight"):
        torch.testing.assert_close(getattr(ours, name)(sigma), getattr(theirs, name)(sigma))
    torch.testing.assert_close(ours.sample_schedule(7), theirs.sample_schedule(7), rtol=1e-5, atol=0)
    x = gaussian(3)
    for sigmas in (sigma, 0.7):
        args = (x, sigmas)
        torch.testing.assert_close(
            ours.preconditioned_network_forward(*args, clamp=True),
            theirs.preconditioned_network_forward(*args, clamp=True),
            rtol=1e-4,
            atol=1e-5,
        )
    torch.manual_seed(1)
    expected = theirs.noise_distribution(5)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.exp(4 * ours.random_times(5)), expected)


def make(process: str, **options):
    torch.manual_seed(0)
    unet = {**UNET, "self_condition": options.pop("self_condition", False)}
    cls = {
        "edm": ElucidatedDiffusion,
        "continuous": ContinuousTimeGaussianDiffusion,
        "v-continuous": VParamContinuousTimeGaussianDiffusion,
        "flow": RectifiedFlow,
    }[process]
    return cls(Unet(**unet), image_size=SIZE, **{"num_sample_steps": 4, **options})


PROCESSES = ("edm", "continuous", "v-continuous", "flow")


@pytest.mark.parametrize("self_condition", [False, True], ids=["plain", "self-conditioned"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("process", PROCESSES)
def test_every_sampler_is_recorded_seeded_and_independent_of_the_batch(process, sampler, self_condition):
    diffusion = make(process, sampler=sampler, self_condition=self_condition)
    assert extension.load() is None or "replays" in diffusion.explain_graphs()
    together = diffusion.sample(5, seed=7, progress=False)
    step_by_step = diffusion.sample(5, seed=7, progress=False, graph=False)
    torch.testing.assert_close(together, step_by_step, rtol=1e-5, atol=1e-5)
    assert torch.equal(diffusion.sample(5, True, seed=7, progress=False)[:, -1], together)
    parts = [diffusion.sample(n, seed=7, start_index=i, progress=False) for i, n in ((0, 2), (2, 3))]
    # A batch of another size may round otherwise. The first image of "continuous" is (x - sigma*noise)/alpha, with the
    # smallest alpha 1/148: there 16 units in the last place of the network's output are 1.4e-4.
    torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1.4e-4 if process == "continuous" else 1e-5)
    assert not torch.equal(diffusion.sample(5, seed=8, progress=False), together)
    assert together.min() >= 0 and together.max() <= 1


@pytest.mark.parametrize("process", PROCESSES)
def test_the_table_of_times_changes_nothing(process):
    """The network is told rows of a table where it can look them up, and times where it cannot: with a hook."""
    diffusion = make(process)
    expected = diffusion.sample(2, seed=1, progress=False)
    handle = diffusion.network.time_mlp.register_forward_hook(lambda module, args, output: None)
    found = diffusion.sample(2, seed=1, progress=False)
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"offset_noise_strength": 0.1},
        {"immiscible": True},
        {"self_condition": True},
        {"loss_weighting": "min_snr"},
        {"loss_weighting": "p2", "loss_weighting_options": {"gamma": 0.5, "k": 1}},
        {"uncertainty_weighting": True},
        {"auto_normalize": False},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
@pytest.mark.parametrize("process", PROCESSES)
def test_training_options_of_the_base(process, options):
    diffusion = make(process, **options)
    for batch in (images(), (images() * 255).byte()):
        torch.manual_seed(3)
        loss = diffusion(batch, flip=torch.tensor([True, False, True]))
        assert loss.isfinite() and loss.ndim == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in diffusion.parameters() if p.requires_grad)
    torch.manual_seed(3)
    assert torch.equal(diffusion(batch, flip=torch.tensor([True, False, True])), loss)


@pytest.mark.parametrize("process", PROCESSES)
def test_interpolation_ends_on_its_images_where_there_is_no_noise(process):
    diffusion = make(process)
    x1, x2 = images(1), images(2)
    scale = diffusion.noise_scale
    assert torch.equal(
        diffusion.interpolate(x1, x2, seed=1, progress=False), diffusion.interpolate(x1, x2, seed=1, progress=False)
    )
    middle = (scale.first + scale.last) / 2
    assert diffusion.interpolate(x1, x2, middle, seed=1, progress=False).isfinite().all()


def test_flow_matching_loss_is_the_velocitys():
    flow = make("flow", time_scale=1.0)
    t, noise, x0 = torch.tensor([0.1, 0.5, 0.9]), gaussian(4), images()
    at = t.reshape(-1, 1, 1, 1)
    x_t = (1 - at) * (2 * x0 - 1) + at * noise
    expected = ((flow.model(x_t, t) - (noise - (2 * x0 - 1))) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(flow(x0, times=t, noise=noise, loss_reduction="none"), expected, rtol=1e-4, atol=1e-5)


def test_optimal_transport_shortens_the_lines():
    flow = make("flow", optimal_transport=True)
    x0, noise = 2 * images() - 1, gaussian(4)
    order = flow.noise_assignment(x0, noise)
    assert sorted(order.tolist()) == [0, 1, 2]

    def length(order):
        return (x0 - noise[order]).square().sum().item()

    import itertools

    assert length(order) == min(length(list(p)) for p in itertools.permutations(range(3)))


def test_elucidated_diffusion_takes_any_network():
    """Upstream asserts attributes of its own Unet."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(C, C, 3, padding=1)

        def forward(self, x, t, x_self_cond=None):
            return self.conv(x) + t.reshape(-1, 1, 1, 1).to(x.dtype)

    with pytest.raises((AttributeError, AssertionError)):
        upstream.ElucidatedDiffusion(Small(), image_size=SIZE)
    diffusion = ElucidatedDiffusion(Small(), image_size=SIZE, channels=C, num_sample_steps=3)
    diffusion(images()).backward()
    assert diffusion.sample(2, seed=1, progress=False).shape == (2, C, SIZE, SIZE)


@pytest.mark.parametrize(
    "process, options, error, message",
    [
        ("edm", {"sigma_min": 80}, ValueError, "sigma_min must be less than sigma_max"),
        ("edm", {"sigma_data": 0}, ValueError, "sigma_data must be a number in"),
        ("edm", {"num_sample_steps": 0}, ValueError, "num_sample_steps must be a positive integer"),
        ("continuous", {"noise_schedule": "sigmoid"}, ValueError, "noise_schedule must be linear, cosine or learned"),
        ("flow", {"time_distribution": "beta"}, ValueError, "time_distribution must be one of uniform, logit_normal"),
        ("flow", {"optimal_transport": True, "immiscible": True}, ValueError, "use one of them"),
        ("flow", {"sampler": "magic"}, ValueError, "sampler must be one of"),
        ("edm", {"spacing": "magic"}, ValueError, "spacing must be one of"),
        ("edm", {"loss_weighting": "magic"}, ValueError, "loss_weighting must be a function or one of"),
        ("edm", {"sampler": "ddim", "sampler_options": {"churn": 1}}, TypeError, "has no option 'churn'; it takes eta"),
        (
            "flow",
            {"sampling_timesteps": 4},
            TypeError,
            "no argument 'sampling_timesteps': its steps are num_sample_steps",
        ),
        ("edm", {"clip_x_start": True}, TypeError, "ElucidatedDiffusion has no argument 'clip_x_start'"),
        ("continuous", {"sampling_timesteps": 4}, TypeError, "its steps are num_sample_steps"),
        ("v-continuous", {"noise_schedule": "linear"}, TypeError, "Gaussian.* has no argument 'noise_schedule'"),
        ("edm", {"channels": 4}, ValueError, "channels must be the model's, 3, got 4"),
    ],
)
def test_wrong_arguments_get_one_sentence(process, options, error, message):
    with pytest.raises(error, match=message):
        make(process, **options)


@pytest.mark.parametrize("process", PROCESSES)
def test_wrong_times_get_one_sentence(process):
    diffusion = make(process)
    with pytest.raises(TypeError, match="times must be a floating point tensor, got torch.int64"):
        diffusion(images(), times=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"times must have shape \(3,\), one per image"):
        diffusion(images(), times=torch.tensor([0.5]))


def weighted_pair(**options):
    torch.manual_seed(0)
    unet = {k: v for k, v in UNET.items() if k != "learned_sinusoidal_cond"} | {"out_dim": 2 * C + 2}
    options = {"image_size": SIZE, "timesteps": 10, **options}
    theirs = upstream.WeightedObjectiveGaussianDiffusion(upstream.Unet(**unet), **options)
    ours = WeightedObjectiveGaussianDiffusion(Unet(**unet), **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


def test_weighted_objective_loss_and_gradients():
    found = []
    for diffusion in weighted_pair(pred_noise_loss_weight=0.2):
        loss = diffusion.p_losses(images() * 2 - 1, torch.tensor([0, 4, 9]), noise=gaussian(2), loss_reduction="none")
        loss.mean().backward()
        found.append((loss.detach(), [p.grad for p in diffusion.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=2e-4)


def test_weighted_objective_samples_where_upstream_cannot():
    theirs, ours = weighted_pair()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        theirs.sample(2)
    assert extension.load() is None or "replays" in ours.explain_graphs()
    found = ours.sample(2, seed=1, progress=False)
    x = torch.zeros(2, C, SIZE, SIZE)
    t = torch.full((2,), 5)
    expected, *_ = theirs.p_mean_variance(x=x, t=t, clip_denoised=True)
    torch.testing.assert_close(ours.p_mean_variance(x, t)[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found, ours.sample(2, seed=1, progress=False, graph=False))
    few = WeightedObjectiveGaussianDiffusion(ours.model, image_size=SIZE, timesteps=10, sampling_timesteps=4)
    assert few.sample(2, seed=1, progress=False).isfinite().all()


@pytest.mark.parametrize("process", PROCESSES)
def test_xm_trains_on_the_best_candidate(process):
    diffusion = make(process, offset_noise_strength=0.1)
    wrapper = XMWrapper(diffusion, candidates=4)
    assert wrapper.image_size == (SIZE, SIZE) and wrapper.sample(1, seed=1, progress=False).shape == (1, C, SIZE, SIZE)
    times = diffusion.random_times(B)
    torch.manual_seed(5)
    with torch.no_grad():
        noises = [diffusion.training_noise(images(), 0.1) for _ in range(4)]
        options = {"times": times, "loss_reduction": "none", "offset_noise_strength": 0.0}
        losses = torch.stack([diffusion(images(), noise=noise, **options) for noise in noises])
    best = losses.argmin(0)
    chosen = torch.stack([noises[k][i] for i, k in enumerate(best.tolist())])
    diffusion(images(), noise=chosen, times=times, offset_noise_strength=0.0).backward()
    expected = [p.grad.clone() for p in diffusion.parameters()]
    diffusion.zero_grad()
    torch.manual_seed(5)
    for at_once in (None, 2):
        torch.manual_seed(5)
        loss = wrapper(images(), times=times, max_batch_size=at_once)
        torch.testing.assert_close(loss, losses.min(0).values.mean(), rtol=1e-5, atol=1e-6)
    loss.backward()
    torch.testing.assert_close([p.grad for p in diffusion.parameters()], expected, rtol=1e-3, atol=1e-5)


def test_xm_goes_backward_once():
    """K forwards without gradients and one with: (K + 3)/3K of K with, where a backward costs two forwards."""
    diffusion, calls = make("flow"), []
    diffusion.model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    XMWrapper(diffusion, candidates=5)(images()).backward()
    assert calls == [False] * 5 + [True]


def test_xm_around_another_module_is_upstreams(monkeypatch):
    theirs, _ = pair("ContinuousTimeGaussianDiffusion", {})
    times, found = torch.tensor([0.2, 0.5, 0.9]), []
    for cls in (upstream.XMWrapper, XMWrapper):
        torch.manual_seed(2)
        found.append(cls(theirs, candidates=3, max_batch_size=4)(images(), times=times))
    torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match="flow_model must have a method 'random_times'"):
        XMWrapper(torch.nn.Conv2d(C, C, 1), candidates=2)(images())


def test_a_weighting_of_the_users_own():
    diffusion = make("flow", loss_weighting=lambda snr: snr.clamp(max=2))
    t, noise = torch.tensor([0.1, 0.5, 0.9]), gaussian(4)
    plain = make("flow")
    ratio = diffusion(images(), times=t, noise=noise, loss_reduction="none") / plain(
        images(), times=t, noise=noise, loss_reduction="none"
    )
    torch.testing.assert_close(ratio, (((1 - t) / t) ** 2).clamp(max=2) * t**2, rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match="weighted by a function, which a file does not hold"):
        RectifiedFlow(plain.model, **diffusion.config)


def learned_pair(**options):
    torch.manual_seed(0)
    unet = {k: v for k, v in UNET.items() if k != "learned_sinusoidal_cond"} | {"learned_variance": True}
    options = {"image_size": SIZE, "timesteps": 10, **options}
    theirs = upstream.LearnedGaussianDiffusion(upstream.Unet(**unet), **options)
    options = {**options, "objective": "pred_noise"}
    ours = LearnedGaussianDiffusion(Unet(**unet), **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


@pytest.mark.parametrize("options", [{}, {"vb_loss_weight": 1.0, "beta_schedule": "cosine"}], ids=str)
def test_learned_variance_loss_and_gradients(options):
    found, decoders = [], []
    for diffusion in learned_pair(**options):
        x = images() * 2 - 1
        loss = diffusion.p_losses(x, torch.tensor([1, 4, 9]), noise=gaussian(2), loss_reduction="none")
        loss.mean().backward()
        found.append((loss.detach(), [p.grad for p in diffusion.parameters()]))
        decoders.append(diffusion.p_losses(x, torch.tensor([0, 0, 0]), noise=gaussian(2)).detach())
    torch.testing.assert_close(found[1][0], found[0][0], rtol=5e-5, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-3, atol=1e-3)
    # At t = 0 σ is about 1e-6: a rounding of the mean moves a pixel by standard deviations.
    torch.testing.assert_close(decoders[1], decoders[0], rtol=5e-3, atol=0)


def test_learned_variance_trajectory(monkeypatch):
    """Upstream's ancestral sampling with our noise; the variance of p_mean_variance is the model's."""
    from ddpm_fast import noise as noise_function

    theirs, ours = learned_pair(beta_schedule="linear", timesteps=30)
    shape = (B, C, SIZE, SIZE)
    noises = [noise_function.normal(shape, seed=3, stream=noise_function.STREAM_INITIAL)]
    noises += [noise_function.normal(shape, seed=3, stream=noise_function.STREAM_STEP, step=row) for row in range(30)]
    given_noise(monkeypatch, noises)
    expected = theirs.p_sample_loop(shape)
    assert extension.load() is None or "replays" in ours.explain_graphs()
    found = ours.sample(B, seed=3, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sample(B, seed=3, progress=False, graph=False), found, rtol=0, atol=1e-5)


def test_learned_variance_in_few_steps_where_upstream_cannot():
    """Upstream's model_predictions has a name that does not exist."""
    theirs, ours = learned_pair(sampling_timesteps=4)
    with pytest.raises(NameError):
        theirs.sample(2)
    for sampler in (None, "dpmpp_2m", "ddpm"):
        assert ours.sample(2, sampler=sampler, seed=1, progress=False).isfinite().all()


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_the_objective_counts_in_the_bound(objective):
    """A network that knows x0 has the same bound whatever it gives; upstream reads every output as noise."""
    torch.manual_seed(0)
    x0, noise, t = images() * 2 - 1, gaussian(2), torch.tensor([1, 4, 9])

    class Knows(torch.nn.Module):
        channels, out_dim, self_condition = C, 2 * C, False

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, x_self_cond=None):
            a, b = (diffusion.forward_table[t, i].reshape(-1, 1, 1, 1) for i in range(2))
            output = {"pred_noise": noise, "pred_x0": x0, "pred_v": a * noise - b * x0}[objective]
            return self.scale * torch.cat((output, torch.zeros_like(output)), dim=1)

    options = {"image_size": SIZE, "timesteps": 10, "objective": objective, "vb_loss_weight": 1.0}
    diffusion = LearnedGaussianDiffusion(Knows(), **options)
    loss = diffusion.p_losses(x0, t, noise=noise, loss_reduction="none")
    low, high = diffusion.posterior_log_variance_clipped[t].double(), diffusion.betas[t].double().log()
    log_var = (low + high) / 2
    expected = 0.5 * (-1 + log_var - low + torch.exp(low - log_var)) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-5)
    theirs = upstream.LearnedGaussianDiffusion(Knows(), **options).p_losses(x0, t, noise=noise, loss_reduction="none")
    assert torch.allclose(loss, theirs, rtol=1e-3) == (objective == "pred_noise")


def test_openais_options():
    torch.manual_seed(0)
    plain, learned = Unet(8, dim_mults=(1, 2)), Unet(8, dim_mults=(1, 2), learned_variance=True)
    x, t, noise = images() * 2 - 1, torch.tensor([0, 4, 9]), gaussian(2)

    def loss(model=learned, **options):
        diffusion = from_openai_options(model, image_size=SIZE, steps=50, **options)
        with torch.no_grad():
            return diffusion.p_losses(x, t, noise=noise, loss_reduction="none")

    learned_from_openai = from_openai_options(learned, image_size=SIZE, steps=50, learn_sigma=True)
    mse = loss(plain)
    once, rescaled, kl = (
        loss(learn_sigma=True, **options) for options in ({}, {"rescale_learned_sigmas": True}, {"use_kl": True})
    )
    assert learned_from_openai.bound_table[0, 9] == learned_from_openai.bound_table[1, 9], (
        "that of t = 1, not log(1e-20)"
    )
    # mse + vb, mse + vb·T/1000, vb·T
    torch.testing.assert_close(kl / 50 * (1 - 50 / 1000), once - rescaled, rtol=1e-3, atol=1e-4)
    assert mse.shape == once.shape and (once > rescaled).all()
    large = from_openai_options(plain, image_size=SIZE, steps=50)
    small = from_openai_options(plain, image_size=SIZE, steps=50, sigma_small=True)
    betas = large.betas.double().flip(0)
    torch.testing.assert_close(large._plan().table[:-1, 5], betas[:-1].sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        small._plan().table[:-1, 5], small.posterior_variance.double().flip(0)[:-1].sqrt(), rtol=1e-4, atol=0
    )
    respaced = from_openai_options(plain, image_size=SIZE, steps=50, timestep_respacing="ddim10", use_ddim=True)
    assert respaced._plan().times == tuple(range(45, -1, -5)) and respaced._plan().sampler == "ddim"
    parts = from_openai_options(plain, image_size=SIZE, steps=50, timestep_respacing="3,5")
    assert len(parts._plan().times) == 8
    xstart = from_openai_options(plain, image_size=SIZE, predict_xstart=True, schedule_sampler="loss-second-moment")
    assert xstart.objective == "pred_x0" and (xstart.loss_weight == 1).all() and xstart.timestep_history is not None
    for options, message in (
        ({"noise_schedule": "sigmoid"}, "noise_schedule must be linear or cosine"),
        ({"rescale_timesteps": True}, "rescale_timesteps must be False unless"),
        ({"use_kl": True}, "use_kl must be False without learn_sigma"),
    ):
        with pytest.raises(ValueError, match=message):
            from_openai_options(plain, image_size=SIZE, steps=50, **options)


ALL = {
    **{name: lambda name=name: make(name) for name in PROCESSES},
    "learned schedule": lambda: make("continuous", noise_schedule="learned", learned_schedule_net_hidden_dim=8),
    "learned": lambda: learned_pair(sampling_timesteps=4)[1],
    "weighted": lambda: weighted_pair()[1],
}


@pytest.mark.release(but=lambda process: process in ("edm", "learned"))
@pytest.mark.parametrize("process", ALL)
def test_what_users_do_to_a_process(process):
    """Other dtypes, autocast, copies, pickles, the meta device, torch.compile."""
    diffusion = ALL[process]()
    expected = diffusion.sample(1, seed=2, progress=False)
    for dtype in (torch.bfloat16, torch.float64):
        other = copy.deepcopy(diffusion).to(dtype)
        other(images().double() if dtype == torch.float64 else images()).backward()
        assert other.sample(2, seed=1, progress=False).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        diffusion(images()).backward()
    file = io.BytesIO()
    torch.save(diffusion, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).sample(1, seed=2, progress=False), expected)
    empty = copy.deepcopy(diffusion).to("meta").to_empty(device="cpu")
    empty.load_state_dict(diffusion.state_dict())
    assert torch.equal(empty.sample(1, seed=2, progress=False), expected)
    losses = []
    for each in (diffusion, empty, torch.compile(diffusion, fullgraph=True, backend="eager")):
        torch.manual_seed(4)
        losses.append(each(images()).detach())
    torch.testing.assert_close(losses, [losses[0]] * 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", CASES[2:], ids=IDS[2:])
def test_upstreams_methods_of_continuous_time(monkeypatch, name, options):
    theirs, ours = pair(name, options)
    x, times, noise = gaussian(3), torch.tensor([0.1, 0.5, 0.9]), gaussian(4)
    for found, expected in zip(ours.q_sample(x, times, noise), theirs.q_sample(x, times, noise), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    at = torch.tensor(0.6), torch.tensor(0.4)
    for found, expected in zip(ours.p_mean_variance(x, *at), theirs.p_mean_variance(x, *at), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for time_next in (0.4, 0.0):
        given_noise(monkeypatch, [noise, noise])
        args = (x, torch.tensor(0.6), torch.tensor(time_next))
        torch.testing.assert_close(ours.p_sample(*args), theirs.p_sample(*args), rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    assert ours.clip_sample_denoised is True
    ours.num_sample_steps = 3
    assert torch.equal(
        ours.p_sample_loop((2, C, SIZE, SIZE), seed=1, progress=False), ours.sample(2, seed=1, progress=False)
    )


def test_a_subclass_with_its_own_steps_in_continuous_time(monkeypatch):
    class Mine(ContinuousTimeGaussianDiffusion):
        def p_mean_variance(self, x, time, time_next):
            mean, variance = super().p_mean_variance(x=x, time=time, time_next=time_next)
            return 0.5 * mean, variance

        def q_sample(self, x_start, times, noise=None):
            x, log_snr = super().q_sample(x_start, times, noise)
            return x + 1, log_snr

    theirs_class = type("Theirs", (upstream.ContinuousTimeGaussianDiffusion,), {
        "p_mean_variance": lambda self, x, time, time_next: (
            lambda mean, variance: (0.5 * mean, variance)
        )(*upstream.ContinuousTimeGaussianDiffusion.p_mean_variance(self, x, time, time_next)),
    })  # fmt: skip
    theirs, plain = pair("ContinuousTimeGaussianDiffusion", {"num_sample_steps": 3})
    theirs.__class__ = theirs_class
    ours = Mine(plain.model, image_size=SIZE, num_sample_steps=3)
    assert "has its own p_mean_variance" in ours.explain_graphs()
    first, rest = gaussian(5), [gaussian(6), gaussian(7)]
    given_noise(monkeypatch, [first, *rest])
    expected = theirs.sample(B)
    monkeypatch.undo()
    monkeypatch.setattr("ddpm_fast.diffusion.sampled_process.normal", lambda *args, **kwargs: first.clone())
    given_noise(monkeypatch, rest)
    torch.testing.assert_close(ours.sample(B, seed=1, progress=False), expected, rtol=0, atol=5e-5)
    with pytest.raises(ValueError, match="sampler must be 'ddpm' with the spacing 'own' where Mine has its own"):
        ours.sample(2, sampler="dpmpp_2m", seed=1, progress=False)
    monkeypatch.undo()
    t, noise = torch.tensor([0.2, 0.5, 0.8]), gaussian(4)
    shifted = ours(images(), times=t, noise=noise)
    assert not torch.allclose(shifted, plain(images(), times=t, noise=noise))


def test_another_network_of_elucidated_diffusion():
    """`model` is another name of `net`, also where it is assigned."""
    diffusion = make("edm")
    before = list(diffusion.state_dict())
    diffusion.model = other = Unet(**UNET)
    assert diffusion.net is diffusion.model is other and list(diffusion.state_dict()) == before


def test_a_subclass_with_its_own_variance():
    """Its steps are its own in sampling; in training the kernel would leave it out, and says so."""
    mine = type("Mine", (LearnedGaussianDiffusion,), {
        "p_mean_variance": lambda self, *args, **kwargs: LearnedGaussianDiffusion.p_mean_variance(self, *args, **kwargs)
    })  # fmt: skip
    diffusion = mine(learned_pair()[1].model, image_size=SIZE, timesteps=10)
    assert "has its own p_mean_variance" in diffusion.explain_graphs()
    assert diffusion.sample(1, seed=1, progress=False).isfinite().all()
    with pytest.raises(ValueError, match="Mine has its own p_mean_variance, which the bound's kernel would leave out"):
        diffusion(images())
