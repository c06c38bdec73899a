"""GaussianDiffusion equals upstream's: buffers, predictions, loss, gradients, whole trajectories."""

from __future__ import annotations

import copy
import inspect
import random

import pytest
import torch

from ddpm_fast import GaussianDiffusion, Unet, noise
from ddpm_fast.diffusion import schedules
from ddpm_fast.testing.networks import randomise
from ddpm_fast.testing.truth import assert_close_to_truth

SIZE = (4, 6)
SMALL = dict(dim=8, dim_mults=(1, 2))


def pair(upstream, unet: dict | None = None, **diffusion):
    """Upstream's diffusion and ours with the same weights."""
    unet = {**SMALL, **(unet or {})}
    diffusion = {"image_size": SIZE, "timesteps": 30, **diffusion}
    theirs = upstream.GaussianDiffusion(upstream.Unet(**unet), **diffusion)
    randomise(theirs)
    ours = GaussianDiffusion(Unet(**unet), **diffusion)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def images(batch: int = 4, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, channels, *SIZE, generator=torch.Generator().manual_seed(5))


def drawn_diffusion(seed: int) -> dict:
    """A random diffusion configuration, without the image size."""
    rng = random.Random(1000 + seed)
    beta_schedule = rng.choice(["linear", "cosine", "sigmoid"])
    kwargs = {
        "linear": {},
        "cosine": rng.choice([{}, {"s": 0.02}]),
        "sigmoid": rng.choice([{}, {"start": -2, "end": 2.5, "tau": 0.9}]),
    }[beta_schedule]
    return dict(
        timesteps=rng.choice([25, 40, 100]),
        objective=rng.choice(["pred_noise", "pred_x0", "pred_v"]),
        beta_schedule=beta_schedule,
        schedule_fn_kwargs=kwargs,
        min_snr_loss_weight=rng.random() < 0.5,
        min_snr_gamma=rng.choice([1, 5]),
        auto_normalize=rng.random() < 0.8,
        ddim_sampling_eta=rng.choice([0.0, 0.3, 1.0]),
    )


LISTED = {
    **{
        f"{objective}-{schedule}": dict(objective=objective, beta_schedule=schedule)
        for objective in schedules.OBJECTIVES
        for schedule in schedules.BETA_SCHEDULES
    },
    **{f"min_snr-{o}": dict(objective=o, min_snr_loss_weight=True, min_snr_gamma=3) for o in schedules.OBJECTIVES},
    "schedule_kwargs": dict(beta_schedule="sigmoid", schedule_fn_kwargs=dict(start=-2, end=2, tau=0.7)),
    "unnormalised": dict(auto_normalize=False),
    **{f"drawn-{seed}": drawn_diffusion(seed) for seed in range(6)},
}


@pytest.mark.parametrize("name", LISTED)
def test_buffers_equal_upstream(upstream, name):
    config = {"image_size": SIZE, "timesteps": 30, **LISTED[name]}
    theirs = upstream.GaussianDiffusion(upstream.Unet(**SMALL), **config).state_dict()
    ours = GaussianDiffusion(Unet(**SMALL), **config).state_dict()
    assert list(theirs) == list(ours)
    for key in [k for k in theirs if not k.startswith("model.")]:
        assert ours[key].dtype == torch.float32
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-7, atol=0, msg=key)


@pytest.mark.parametrize("name", LISTED)
def test_loss_and_gradients_equal_upstream(upstream, name):
    theirs, ours = pair(upstream, **LISTED[name])
    x = images()
    t = torch.tensor([0, 3, 11, theirs.num_timesteps - 1])
    eps = torch.randn(x.shape)
    truth_model = copy.deepcopy(theirs).double()
    losses, grads = {}, {}
    for key, model, dtype in (("truth", truth_model, torch.float64), ("upstream", theirs, None), ("ours", ours, None)):
        dtype = dtype or torch.float32
        times = t
        if key == "truth":  # upstream's time embedding follows the dtype of the timestep
            inner = model.model.time_mlp[0]
            inner.register_forward_pre_hook(lambda module, args: (args[0].double(),))
        loss = model(x.to(dtype), times=times, noise=eps.to(dtype), loss_reduction="none")
        assert loss.shape == (4,)
        losses[key] = loss.detach()
        loss.mean().backward()
        grads[key] = {k: p.grad for k, p in model.named_parameters()}
    assert_close_to_truth(losses["ours"], losses["upstream"], losses["truth"], name="loss", floor=16)
    for k in grads["upstream"]:
        assert_close_to_truth(grads["ours"][k], grads["upstream"][k], grads["truth"][k], name=k, floor=64)
    mean = ours(x, times=t, noise=eps)
    assert mean.shape == () and torch.allclose(mean, losses["ours"].mean())


@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("rederive", [False, True])
def test_predictions_equal_upstream(upstream, objective, clip, rederive):
    theirs, ours = pair(upstream, objective=objective)
    x = torch.randn(3, 3, *SIZE)
    t = torch.tensor([0, 10, 29])
    with torch.no_grad():
        # x0 from ε is a difference of numbers near 1/√ᾱ, whose rounding is the tolerance.
        atol = 2e-6 * (ours.sqrt_recip_alphas_cumprod.max().item() if objective == "pred_noise" else 10)
        expected = theirs.model_predictions(x, t, None, clip, rederive)
        for a, b in zip(expected, ours.model_predictions(x, t, None, clip, rederive), strict=True):
            torch.testing.assert_close(b, a, rtol=2e-5, atol=atol)
        for a, b in zip(theirs.p_mean_variance(x, t), ours.p_mean_variance(x, t), strict=True):
            torch.testing.assert_close(b, a, rtol=2e-5, atol=atol)
        for a, b in zip(theirs.q_posterior(x, x * 0.5, t), ours.q_posterior(x, x * 0.5, t), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
        for name in ("predict_start_from_noise", "predict_noise_from_start", "predict_v", "predict_start_from_v"):
            a, b = getattr(theirs, name)(x, t, x * 0.3), getattr(ours, name)(x, t, x * 0.3)
            torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(ours.q_sample(x, t, x * 0.3), theirs.q_sample(x, t, x * 0.3), rtol=1e-6, atol=1e-6)


class ScriptedNoise:
    """Stands in for torch's generators in upstream: x_T first, then our noise function step by step."""

    def __init__(self, monkeypatch, upstream, seed: int):
        self.seed, self.steps = seed, 0
        monkeypatch.setattr(upstream.torch, "randn", lambda shape, device=None: noise.normal(shape, seed=seed))
        monkeypatch.setattr(upstream.torch, "randn_like", self.next)

    def next(self, x):
        z = noise.normal(x.shape, seed=self.seed, stream=noise.STREAM_STEP, step=self.steps)
        self.steps += 1
        return z


SAMPLERS = {
    "ddpm": dict(),
    "ddim-0": dict(sampling_timesteps=7, ddim_sampling_eta=0.0),
    "ddim-0.5": dict(sampling_timesteps=11, ddim_sampling_eta=0.5),
    "ddim-1": dict(sampling_timesteps=29, ddim_sampling_eta=1.0),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
@pytest.mark.parametrize("self_condition", [False, True])
def test_trajectories_equal_upstream(upstream, monkeypatch, sampler, objective, self_condition):
    theirs, ours = pair(
        upstream, dict(self_condition=self_condition), objective=objective, beta_schedule="cosine", **SAMPLERS[sampler]
    )
    actual = ours.sample(batch_size=3, return_all_timesteps=True, seed=9, progress=False)
    ScriptedNoise(monkeypatch, upstream, 9)
    expected = theirs.sample(batch_size=3, return_all_timesteps=True)
    monkeypatch.undo()
    assert actual.shape == expected.shape == (3, theirs.sampling_timesteps + 1, 3, *SIZE)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)
    last = ours.sample(batch_size=3, seed=9, progress=False)
    assert torch.equal(last, actual[:, -1])


@pytest.mark.parametrize("seed", range(6))
def test_drawn_trajectories_equal_upstream(upstream, monkeypatch, seed):
    config = drawn_diffusion(seed)
    if seed % 2:
        config["sampling_timesteps"] = 5 + seed
    theirs, ours = pair(upstream, **config)
    actual = ours.sample(batch_size=2, return_all_timesteps=True, seed=seed, progress=False)
    ScriptedNoise(monkeypatch, upstream, seed)
    expected = theirs.sample(batch_size=2, return_all_timesteps=True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


def test_p_sample_equals_upstream(upstream, monkeypatch):
    theirs, ours = pair(upstream, objective="pred_v")
    x, eps = torch.randn(2, 3, *SIZE), torch.randn(2, 3, *SIZE)
    monkeypatch.setattr(upstream.torch, "randn_like", lambda x: eps)
    for t in (29, 7, 0):
        expected = theirs.p_sample(x.clone(), t)
        actual = ours.p_sample(x, t, noise=eps)
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5)


def test_signature_begins_with_upstream(upstream):
    theirs = inspect.signature(upstream.GaussianDiffusion).parameters
    ours = inspect.signature(GaussianDiffusion).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        same_default = ours[name].default == parameter.default
        assert same_default or (name == "schedule_fn_kwargs" and parameter.default == {}), name
        assert ours[name].kind == parameter.kind, name


def test_methods_begin_with_upstreams_signatures(upstream):
    for name, method in vars(upstream.GaussianDiffusion).items():
        if callable(method) and not name.startswith("_"):
            theirs = [p for p in inspect.signature(method).parameters if p not in ("args", "kwargs")]
            ours = [
                p for p in inspect.signature(getattr(GaussianDiffusion, name)).parameters if p not in ("args", "kwargs")
            ]
            assert ours[: len(theirs)] == theirs, name


def test_attributes_are_upstream(upstream):
    theirs, ours = pair(upstream, sampling_timesteps=10, offset_noise_strength=0.1, immiscible=True)
    names = "channels self_condition image_size objective num_timesteps sampling_timesteps is_ddim_sampling device"
    for name in (names + " ddim_sampling_eta immiscible offset_noise_strength").split():
        assert getattr(ours, name) == getattr(theirs, name), name
    x = images()
    assert torch.equal(ours.normalize(x), theirs.normalize(x))
    assert torch.equal(ours.unnormalize(x), theirs.unnormalize(x))


def test_settings_may_change_after_construction():
    ours = GaussianDiffusion(Unet(**SMALL), image_size=8, timesteps=30)
    ours.sampling_timesteps, ours.is_ddim_sampling = 4, True
    assert ours.sample(1, True, seed=1, progress=False).shape[1] == 5
    deterministic = ours.sample(1, seed=1, progress=False)
    ours.ddim_sampling_eta = 1.0
    assert not torch.allclose(ours.sample(1, seed=1, progress=False), deterministic)
    ours.sampler = "dpmpp_2m"
    assert ours.sample(1, True, seed=1, progress=False).shape[1] == 5


def test_a_loaded_schedule_is_followed(upstream):
    """Buffers of another schedule in a state dict change the process, as they do in upstream."""
    theirs = upstream.GaussianDiffusion(upstream.Unet(**SMALL), image_size=SIZE, timesteps=30, beta_schedule="cosine")
    ours = GaussianDiffusion(Unet(**SMALL), image_size=SIZE, timesteps=30, beta_schedule="linear")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, eps = images(), torch.tensor([1, 5, 20, 29]), torch.randn(4, 3, *SIZE)
    torch.testing.assert_close(ours.q_sample(x, t, eps), theirs.q_sample(x, t, eps))
    torch.testing.assert_close(ours(x, times=t, noise=eps), theirs(x, times=t, noise=eps))


def test_batch_size_does_not_change_samples():
    ours = GaussianDiffusion(Unet(**SMALL), image_size=8, timesteps=12)
    whole = ours.sample(6, seed=7, progress=False)
    parts = [ours.sample(2, seed=7, progress=False), ours.sample(4, seed=7, start_index=2, progress=False)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, ours.sample(6, seed=8, progress=False))


def test_torch_manual_seed_fixes_a_run():
    ours = GaussianDiffusion(Unet(**SMALL), image_size=8, timesteps=12)
    x = torch.rand(2, 3, 8, 8)
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append((ours(x).item(), ours.sample(1, progress=False)))
    assert runs[0][0] == runs[1][0] and torch.equal(runs[0][1], runs[1][1])
    assert ours(x).item() != runs[0][0]


def test_sampling_in_autocast_keeps_a_float32_state():
    ours = GaussianDiffusion(Unet(**SMALL), image_size=8, timesteps=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = ours.sample(2, seed=1, progress=False)
    high = ours.sample(2, seed=1, progress=False)
    assert low.dtype == torch.float32 and (low - high).abs().mean() < 0.05


class WithEinsum(torch.nn.Module):
    channels, out_dim, self_condition = 3, 3, False

    def __init__(self):
        super().__init__()
        self.conv, self.weight = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Parameter(torch.eye(3))

    def forward(self, x, t, x_self_cond=None):
        return torch.einsum("bchw,dc->bdhw", self.conv(x), self.weight)


def test_recorded_autocast_reaches_what_an_operator_is_made_of():
    """A tape that is written in inference mode sees einsum whole, and its product of two dtypes raises."""
    ours = GaussianDiffusion(WithEinsum(), image_size=8, timesteps=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, recorded = [ours.sample(2, seed=1, progress=False, graph=graph) for graph in (False, True)]
    assert torch.equal(plain, recorded)


def test_samples_may_be_trained_on():
    ours = GaussianDiffusion(Unet(**SMALL), image_size=8, timesteps=4)
    ours(ours.sample(2, progress=False).clamp(0, 1)).backward()


def test_training_loss_compiles_without_graph_breaks():
    """The whole network of two stages compiles in models/test_upstream.py."""
    ours = GaussianDiffusion(Unet(8, dim_mults=(1,)), image_size=8, timesteps=12)
    x, t = torch.rand(2, 3, 8, 8), torch.tensor([1, 9])
    eps = torch.randn(x.shape)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    loss = compiled(x, times=t, noise=eps)
    torch.testing.assert_close(loss, ours(x, times=t, noise=eps), rtol=1e-5, atol=1e-6)
    assert torch.isfinite(compiled(x))  # times and noise drawn inside


class TestSubclasses:
    """What a subclass overrides is used: the fused step replaces unmodified methods only."""

    def test_p_mean_variance(self):
        class Guided(GaussianDiffusion):
            calls = 0

            def p_mean_variance(self, *args, **kwargs):
                self.calls += 1
                return super().p_mean_variance(*args, **kwargs)

        model = Unet(**SMALL)
        guided = Guided(model, image_size=8, timesteps=6, beta_schedule="cosine")
        plain = GaussianDiffusion(model, image_size=8, timesteps=6, beta_schedule="cosine")
        torch.testing.assert_close(
            guided.sample(2, seed=3, progress=False), plain.sample(2, seed=3, progress=False), rtol=1e-4, atol=1e-4
        )
        assert guided.calls == 6

    @pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
    def test_model_predictions(self, sampler):
        class Guided(GaussianDiffusion):
            calls = 0

            def model_predictions(self, *args, **kwargs):
                self.calls += 1
                return super().model_predictions(*args, **kwargs)

        model = Unet(**SMALL)
        config = dict(image_size=8, timesteps=20, sampling_timesteps=6, sampler=sampler, ddim_sampling_eta=0.4)
        guided, plain = Guided(model, **config), GaussianDiffusion(model, **config)
        torch.testing.assert_close(
            guided.sample(2, seed=3, progress=False), plain.sample(2, seed=3, progress=False), rtol=1e-4, atol=1e-4
        )
        assert guided.calls == 6

    def test_p_sample(self):
        class Frozen(GaussianDiffusion):
            def p_sample(self, x, t, x_self_cond=None):
                return x, x

        frozen = Frozen(Unet(**SMALL), image_size=8, timesteps=6)
        states = frozen.sample(2, True, seed=3, progress=False)
        assert torch.equal(states[:, 0], states[:, -1])

    def test_upstreams_learned_variance_diffusion_runs_on_our_unet(self, upstream):
        from denoising_diffusion_pytorch import LearnedGaussianDiffusion

        model = Unet(**SMALL, learned_variance=True)
        theirs = LearnedGaussianDiffusion(model, image_size=8, timesteps=4)
        assert torch.isfinite(theirs.sample(1)).all()
