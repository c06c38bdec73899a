"""The class-conditional process equals upstream's: buffers, loss, gradients, predictions, whole trajectories."""

from __future__ import annotations

import copy
import importlib
import inspect

import pytest
import torch

from ddpm_fast import Unet as NativeUnet
from ddpm_fast import XMWrapper, noise
from ddpm_fast.classifier_free_guidance import GaussianDiffusion, Unet
from ddpm_fast.diffusion import schedules
from ddpm_fast.diffusion.processes import PROCESSES
from ddpm_fast.models.classifier_free_unet import guided_output
from ddpm_fast.testing.networks import randomise
from ddpm_fast.testing.truth import assert_close_to_truth

SIZE, CLASSES = 8, 5
SMALL = dict(dim=8, num_classes=CLASSES, dim_mults=(1, 2))


def scales_of_gains(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """√(Σ term²) of the gradients of upstream's gains, by the parameter's name; filled by the backward of a loss.

    That is the size of a sum of such terms whose signs are random, and says how far one cancels.

    Args:
        model: upstream's network, whose norms multiply by a parameter g (1, C, 1, 1) that is nowhere 0.
    """
    sums: dict[str, torch.Tensor] = {}

    def keep(name: str, gain: torch.Tensor, out: torch.Tensor) -> None:
        def of_gradient(grad: torch.Tensor) -> None:
            sums[name] = (grad * out / gain).detach().square().sum_to_size(gain.shape).sqrt()

        out.register_hook(of_gradient)

    for path, module in model.named_modules():
        gain = getattr(module, "g", None)
        if isinstance(gain, torch.nn.Parameter):
            name = f"{path}.g" if path else "g"
            module.register_forward_hook(lambda module, args, out, name=name: keep(name, module.g, out))
    return sums


@pytest.fixture(scope="session")
def upstream():
    return importlib.import_module("denoising_diffusion_pytorch.classifier_free_guidance")


def pair(upstream, unet: dict | None = None, **diffusion):
    """Upstream's process and ours with the same weights."""
    unet = {**SMALL, **(unet or {})}
    diffusion = {"image_size": SIZE, "timesteps": 30, **diffusion}
    theirs = upstream.GaussianDiffusion(upstream.Unet(**unet), **diffusion)
    randomise(theirs)
    ours = GaussianDiffusion(Unet(**unet), **diffusion)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


def images(batch: int = 4) -> torch.Tensor:
    return torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def classes_of(batch: int = 4) -> torch.Tensor:
    return torch.arange(batch) % CLASSES


LISTED = {
    **{
        f"{objective}-{schedule}": dict(objective=objective, beta_schedule=schedule)
        for objective in schedules.OBJECTIVES
        for schedule in ("linear", "cosine")
    },
    **{f"min_snr-{o}": dict(objective=o, min_snr_loss_weight=True, min_snr_gamma=3) for o in schedules.OBJECTIVES},
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
    x, t, eps = images(), torch.tensor([0, 3, 11, 29]), torch.randn(4, 3, SIZE, SIZE)
    told = {"classes": classes_of(), "cond_keep_mask": torch.tensor([True, False, True, True])}
    truth_model = copy.deepcopy(theirs).double()
    # Upstream's time embedding follows the dtype of the timestep.
    truth_model.model.time_mlp[0].register_forward_pre_hook(lambda module, args: (args[0].double(),))
    scales = scales_of_gains(truth_model)
    losses, grads = {}, {}
    for key, model, dtype in (("truth", truth_model, torch.float64), ("upstream", theirs, None), ("ours", ours, None)):
        dtype = dtype or torch.float32
        loss = model(x.to(dtype), times=t, noise=eps.to(dtype), loss_reduction="none", **told)
        assert loss.shape == (4,)
        losses[key] = loss.detach()
        loss.mean().backward()
        grads[key] = {k: p.grad for k, p in model.named_parameters()}
    assert_close_to_truth(losses["ours"], losses["upstream"], losses["truth"], name="loss", floor=16)
    assert scales.keys() == {k for k in grads["truth"] if k.endswith(".g")}

    # A layer's gains are a few sums that cancel: by chance upstream's error of all may be a tenth of its usual one.
    def gains(key: str) -> torch.Tensor:
        return torch.cat([(grads[key][k].double() / scales[k]).flatten() for k in scales]).to(
            grads[key][next(iter(scales))].dtype
        )

    assert_close_to_truth(gains("ours"), gains("upstream"), gains("truth"), name="gains", floor=64, scale=torch.ones(1))
    for k in grads["upstream"].keys() - scales.keys():
        assert_close_to_truth(grads["ours"][k], grads["upstream"][k], grads["truth"][k], name=k, floor=64)
    mean = ours(x, times=t, noise=eps, **told)
    assert mean.shape == () and torch.allclose(mean, losses["ours"].mean())


def test_offset_noise_equals_upstream(upstream, monkeypatch):
    """The target has the offset, too; upstream adds it to the caller's tensor, ours leaves that alone."""
    theirs, ours = pair(upstream, offset_noise_strength=0.3)
    x, t, eps, offset = images(), torch.tensor([0, 3, 11, 29]), torch.randn(4, 3, SIZE, SIZE), torch.randn(4, 3)
    told = {"classes": classes_of(), "cond_keep_mask": torch.ones(4, dtype=torch.bool)}
    monkeypatch.setattr(upstream.torch, "randn", lambda *args, **kwargs: offset)
    given = eps.clone()
    expected = theirs(x, times=t, noise=given, **told)
    monkeypatch.undo()
    assert not torch.equal(given, eps), "upstream has been fixed"
    monkeypatch.setattr(ours, "_offset", lambda noise, strength, seed: noise + strength * offset[:, :, None, None])
    torch.testing.assert_close(ours(x, times=t, noise=eps, **told), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ours.q_sample(x, t, eps),
        theirs.sqrt_alphas_cumprod[t][:, None, None, None] * x
        + theirs.sqrt_one_minus_alphas_cumprod[t][:, None, None, None] * given,
    )


@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
@pytest.mark.parametrize("cfg_plus_plus", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("cond_scale, rescaled_phi", [(6.0, 0.7), (3.0, 0.0), (0.0, 0.3)])
def test_predictions_equal_upstream(upstream, objective, cfg_plus_plus, clip, cond_scale, rescaled_phi):
    theirs, ours = pair(upstream, objective=objective, use_cfg_plus_plus=cfg_plus_plus)
    x, t, classes = torch.randn(3, 3, SIZE, SIZE), torch.tensor([0, 10, 29]), classes_of(3)
    args = (x, t, classes, cond_scale, rescaled_phi)
    with torch.no_grad():
        # x0 from ε is a difference of numbers near 1/√ᾱ, whose rounding is the tolerance.
        atol = 1e-5 * (ours.sqrt_recip_alphas_cumprod.max().item() if objective == "pred_noise" else 10)
        for a, b in zip(theirs.model_predictions(*args, clip), ours.model_predictions(*args, clip), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=atol)
        for a, b in zip(theirs.p_mean_variance(*args), ours.p_mean_variance(*args), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=atol)


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
    "ddpm": dict(timesteps=14),
    "ddim-0": dict(timesteps=14, sampling_timesteps=5, ddim_sampling_eta=0.0),
    "ddim-0.5": dict(sampling_timesteps=8, ddim_sampling_eta=0.5),
    "ddim-1": dict(timesteps=14, sampling_timesteps=13),
}


@pytest.mark.release(but=lambda sampler, **_: sampler in ("ddpm", "ddim-0.5"))
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
@pytest.mark.parametrize("cfg_plus_plus", [False, True])
def test_trajectories_equal_upstream(upstream, monkeypatch, sampler, objective, cfg_plus_plus):
    theirs, ours = pair(upstream, objective=objective, use_cfg_plus_plus=cfg_plus_plus, **SAMPLERS[sampler])
    classes = classes_of(3)
    states = ours.sample(classes, seed=9, progress=False, return_all_timesteps=True)
    assert states.shape == (3, ours.sampling_timesteps + 1, 3, SIZE, SIZE)
    for options in ({}, {"cond_scale": 3.0, "rescaled_phi": 0.0}):
        actual = ours.sample(classes, seed=9, progress=False, **options)
        with monkeypatch.context() as patch:
            ScriptedNoise(patch, upstream, 9)
            expected = theirs.sample(classes, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-4)
        if not options:
            torch.testing.assert_close(states[:, -1], actual, rtol=0, atol=0)


@pytest.mark.parametrize("objective", schedules.OBJECTIVES)
@pytest.mark.parametrize("cfg_plus_plus", [False, True])
def test_ddim_without_clipping_equals_upstream(upstream, monkeypatch, objective, cfg_plus_plus):
    config = dict(objective=objective, use_cfg_plus_plus=cfg_plus_plus, sampling_timesteps=9, beta_schedule="linear")
    theirs, ours = pair(upstream, **config)
    shape, classes = (3, 3, SIZE, SIZE), classes_of(3)
    actual = ours.ddim_sample(classes, shape, 2.0, 0.5, clip_denoised=False, seed=4, progress=False)
    ScriptedNoise(monkeypatch, upstream, 4)
    expected = theirs.ddim_sample(classes, shape, 2.0, 0.5, clip_denoised=False)
    expected = expected.clamp(0, 1)  # upstream's images leave [0, 1] then
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cfg_plus_plus", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_p_sample_equals_upstream(upstream, monkeypatch, cfg_plus_plus, clip):
    theirs, ours = pair(upstream, objective="pred_v", use_cfg_plus_plus=cfg_plus_plus)
    x, eps, classes = torch.randn(2, 3, SIZE, SIZE), torch.randn(2, 3, SIZE, SIZE), classes_of(2)
    monkeypatch.setattr(upstream.torch, "randn_like", lambda x: eps)
    for t in (29, 7, 0):
        expected = theirs.p_sample(x.clone(), t, classes, 4.0, 0.5, clip)
        actual = ours.p_sample(x, t, classes, 4.0, 0.5, clip, noise=eps)
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(b, a, rtol=5e-5, atol=5e-5)


class TestUpstreamsFaults:
    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize("sampler", ["ddpm", "ddim-1"])
    def test_a_scale_of_one(self, upstream, batch, sampler):
        """cond_scale=1 is sampling without guidance; upstream takes the images of its batch apart."""
        theirs, ours = pair(upstream, objective="pred_x0", **SAMPLERS[sampler])
        classes = classes_of(batch)
        made = ours.sample(classes, 1.0, seed=3, progress=False)
        # A scale that differs by a rounding is guided, with the same output.
        near = ours.sample(classes, 1 + 1e-6, 0.0, seed=3, progress=False)
        torch.testing.assert_close(made, near, rtol=1e-4, atol=1e-4)
        x, t = torch.randn(batch, 3, SIZE, SIZE), torch.full((batch,), 7)
        keep = torch.ones(batch, dtype=torch.bool)
        with torch.no_grad():
            expected = theirs.model(x, t, classes, cond_keep_mask=keep)
            found = ours.model_predictions(x, t, classes, 1.0).pred_x_start
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            x_start = ours.p_sample(x, 7, classes, 1.0, clip_denoised=False)[1]
            torch.testing.assert_close(x_start, expected, rtol=1e-4, atol=1e-5)
            if batch == 2:
                wrong = theirs.model_predictions(x, t, classes, 1.0).pred_x_start
                assert wrong.shape != expected.shape, "upstream has been fixed"
            else:
                with pytest.raises(ValueError, match="values to unpack"):
                    theirs.model_predictions(x, t, classes, 1.0)

    def test_a_network_whose_third_argument_is_not_the_classes(self, upstream):
        """This package's Unet takes x_self_cond third: upstream gives it the classes there, ours by their name."""

        class Recorder(torch.nn.Module):
            channels = out_dim = 3
            num_classes, cond_drop_prob, random_or_learned_sinusoidal_cond = CLASSES, 0.0, False

            def forward(self, x, t, x_self_cond=None, *, classes=None, cond_keep_mask=None):
                self.seen = (x_self_cond, classes)
                return torch.zeros_like(x)

        classes = classes_of()
        network = Recorder()
        GaussianDiffusion(network, image_size=SIZE)(images(), classes=classes)
        assert network.seen[0] is None and torch.equal(network.seen[1], classes)
        upstream.GaussianDiffusion(network, image_size=SIZE)(images(), classes=classes)
        assert torch.equal(network.seen[0], classes), "upstream has been fixed"

    def test_a_network_without_classes_is_refused(self):
        with pytest.raises(ValueError, match="model must take classes and cond_keep_mask by keyword"):
            GaussianDiffusion(NativeUnet(8, dim_mults=(1,)), image_size=SIZE)

    def test_interpolate_ends_are_reconstructions(self, upstream):
        """With a perfect denoiser of one image, either end of the interpolation gives it back, in its own range."""
        image = torch.rand(1, 3, SIZE, SIZE)

        class Oracle(torch.nn.Module):
            channels = out_dim = 3
            num_classes, cond_drop_prob, random_or_learned_sinusoidal_cond = CLASSES, 0.0, False

            def forward(self, x, t, classes, cond_keep_mask=None):
                self.first = getattr(self, "first", int(t[0]))
                return (image * 2 - 1).expand_as(x)

            def forward_with_cond_scale(self, x, t, classes, **kwargs):
                return self(x, t, classes), self(x, t, classes)

        config = dict(image_size=SIZE, timesteps=20, objective="pred_x0")
        ours, theirs = GaussianDiffusion(Oracle(), **config), upstream.GaussianDiffusion(Oracle(), **config)
        result = ours.interpolate(image, image, torch.tensor([1]), t=12, seed=1, progress=False)
        torch.testing.assert_close(result, image, rtol=1e-5, atol=1e-5)
        assert ours.model.first == 12
        wrong = theirs.interpolate(image, image, torch.tensor([1]), t=12)
        assert theirs.model.first == 11 and not torch.allclose(wrong, image, atol=1e-2), "upstream has been fixed"


def test_signatures_begin_with_upstreams(upstream):
    theirs, ours = (inspect.signature(cls).parameters for cls in (upstream.GaussianDiffusion, GaussianDiffusion))
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default and ours[name].kind == parameter.kind, name
    for name, method in vars(upstream.GaussianDiffusion).items():
        if callable(method) and not name.startswith("_"):
            expected = inspect.signature(method).parameters
            found = inspect.signature(getattr(GaussianDiffusion, name)).parameters
            takes_any = any(p.kind is p.VAR_KEYWORD for p in found.values())
            positional = [p for p, v in expected.items() if v.kind is v.POSITIONAL_OR_KEYWORD]
            assert list(found)[: len(positional)] == positional, name
            for parameter, value in expected.items():
                assert parameter in found or takes_any, (name, parameter)
                if value.default is not value.empty and parameter in found:
                    assert found[parameter].default == value.default, (name, parameter)


def test_the_modules_names_are_upstreams(upstream):
    ours = importlib.import_module("ddpm_fast.classifier_free_guidance")
    assert set(ours.__all__) <= set(dir(upstream)) and set(ours.__all__) <= set(dir(ours))
    for name in ("cosine_beta_schedule", "linear_beta_schedule"):
        torch.testing.assert_close(getattr(ours, name)(50), getattr(upstream, name)(50))
    assert ours.ModelPrediction._fields == upstream.ModelPrediction._fields
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = ours.Trainer


def test_it_is_registered():
    assert PROCESSES["classifier_free"] is GaussianDiffusion
    ours = GaussianDiffusion(Unet(**SMALL), image_size=SIZE, use_cfg_plus_plus=True, min_snr_loss_weight=True)
    again = GaussianDiffusion(Unet(**SMALL), **ours.current_config())
    assert again.current_config() == ours.current_config()
    assert set(ours.current_config()) - {"image_size"} <= GaussianDiffusion.arguments() | {"image_size"}


def test_upstreams_own_network_runs(upstream):
    """Its forward draws a mask where it is given none, so that it is always given one."""
    theirs, ours = pair(upstream)
    other = GaussianDiffusion(theirs.model, image_size=SIZE, timesteps=30)
    args = dict(seed=2, progress=False)
    expected = ours.sample(classes_of(), **args)
    torch.testing.assert_close(other.sample(classes_of(), **args), expected, rtol=1e-4, atol=5e-4)


def test_the_native_network_runs():
    diffusion = GaussianDiffusion(
        NativeUnet(8, dim_mults=(1, 2), num_classes=CLASSES), image_size=SIZE, timesteps=8, objective="pred_v"
    )
    diffusion(images(), classes=classes_of()).backward()
    assert diffusion.sample(classes_of(), 2.0, seed=1, progress=False).isfinite().all()


def test_the_mask_is_drawn_with_the_networks_probability():
    diffusion = GaussianDiffusion(Unet(**{**SMALL, "cond_drop_prob": 0.3}), image_size=SIZE)
    torch.manual_seed(0)
    keep = diffusion.random_cond_keep_mask(20_000)
    assert keep.dtype == torch.bool and keep.float().mean().item() == pytest.approx(0.7, abs=0.013)
    torch.manual_seed(0)
    assert torch.equal(diffusion.random_cond_keep_mask(20_000), keep)
    for rate, expected in ((0.0, True), (1.0, False)):
        diffusion.model.cond_drop_prob = rate
        assert (diffusion.random_cond_keep_mask(64) == expected).all()


def test_candidates_share_the_mask():
    """Explorative modelling compares candidates of noise, so that all see the class or none does."""

    class Recorder(torch.nn.Module):
        channels = out_dim = 3
        num_classes, cond_drop_prob, random_or_learned_sinusoidal_cond = CLASSES, 0.5, False

        def __init__(self):
            super().__init__()
            self.masks = []

        def forward(self, x, t, *, classes, cond_keep_mask=None):
            self.masks.append(cond_keep_mask.clone())
            return torch.zeros_like(x)

    network = Recorder()
    wrapper = XMWrapper(GaussianDiffusion(network, image_size=SIZE), candidates=3)
    drawn = []
    for _ in range(4):
        network.masks.clear()
        wrapper(images(16), classes=classes_of(16))
        assert len(network.masks) == 4 and all(torch.equal(mask, network.masks[0]) for mask in network.masks)
        drawn.append(network.masks[0])
    assert not torch.equal(drawn[0], drawn[1]) and 0 < drawn[0].sum() < 16


def test_guided_output_equals_upstreams(upstream):
    class Two(upstream.Unet):
        def __init__(self):
            torch.nn.Module.__init__(self)

        def forward(self, output, null, *, cond_drop_prob):
            return output if cond_drop_prob == 0 else null

    output, null = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for scale, phi in ((6.0, 0.7), (2.0, 0.0), (0.0, 1.0)):
        expected = Two().forward_with_cond_scale(output, null, cond_scale=scale, rescaled_phi=phi)[0]
        torch.testing.assert_close(guided_output(output, null, scale, phi), expected)


def test_the_batch_changes_nothing():
    diffusion = GaussianDiffusion(Unet(**SMALL), image_size=SIZE, timesteps=12)
    classes = classes_of(6)
    whole = diffusion.sample(classes, seed=7, progress=False)
    parts = [
        diffusion.sample(classes[:2], seed=7, progress=False),
        diffusion.sample(classes[2:], seed=7, start_index=2, progress=False),
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{}, {"sampling_timesteps": 5}], ids=["ddpm", "ddim"])
def test_a_recording_changes_nothing(config):
    diffusion = GaussianDiffusion(Unet(**SMALL), image_size=SIZE, timesteps=12, **config)
    options = dict(seed=3, progress=False)
    assert diffusion.explain_graphs(2).startswith("sampling replays")
    recorded = diffusion.sample(classes_of(2), graph=True, **options)
    assert torch.equal(recorded, diffusion.sample(classes_of(2), graph=False, **options))


def test_what_else_samples_is_guided_alike():
    """`progressive`, with the same arguments, ends at the images of `sample`; inpainting keeps what is known."""
    diffusion = GaussianDiffusion(Unet(**SMALL), image_size=SIZE, timesteps=12, sampling_timesteps=5)
    options = dict(classes=classes_of(2), seed=1, progress=False)
    torch.testing.assert_close(diffusion.progressive(num_columns=3, **options).images, diffusion.sample(**options))
    mask = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    mask[..., :4] = True
    short = dict(num_resamples=2, jump_length=2, sampling_timesteps=5)
    made, unguided = (diffusion.inpaint(images(2), mask, guidance=g, **short, **options) for g in (None, 1.0))
    assert torch.equal(made[..., :4], images(2)[..., :4]) and not torch.equal(made, unguided)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "heun"])
def test_other_samplers_run(sampler):
    diffusion = GaussianDiffusion(Unet(**SMALL), image_size=SIZE, timesteps=30)
    options = dict(sampler=sampler, sampling_timesteps=6, seed=1, progress=False)
    made = diffusion.sample(classes_of(2), 3.0, **options)
    assert made.isfinite().all() and not torch.equal(made, diffusion.sample(classes_of(2), 1.0, **options))


@pytest.mark.parametrize("steps", [4, 2], ids=["ancestral", "ddim"])
@pytest.mark.parametrize("walk", [{}, {"sampler": "dpmpp_2m"}], ids=["own", "dpmpp_2m"])
def test_sampling_shows_its_progress_as_upstream(walk, steps, capsys):
    diffusion = GaussianDiffusion(Unet(**SMALL), image_size=SIZE, timesteps=4, sampling_timesteps=steps)
    diffusion.sample(classes_of(2), progress=False, **walk)
    assert "sampling loop time step" not in capsys.readouterr().err
    diffusion.sample(classes_of(2), **walk)
    assert "sampling loop time step" in capsys.readouterr().err


WRONG = {
    "classes must be given": dict(classes=None, batch_size=2),
    r"classes must be in \[0, 5\]": dict(classes=torch.tensor([0, 9])),
    "classes must be a tensor of integers": dict(classes=torch.tensor([0.0, 1.0])),
    "one entry per image, 3": dict(classes=torch.tensor([0, 1]), batch_size=3),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_classes_get_one_sentence(message):
    diffusion = GaussianDiffusion(Unet(**SMALL), image_size=SIZE, timesteps=4)
    with pytest.raises((TypeError, ValueError), match=message):
        diffusion.sample(**WRONG[message], progress=False)


class TestSubclasses:
    """What a subclass overrides is used, with upstream's arguments."""

    def diffusions(self, cls, **config):
        network = Unet(**SMALL)
        return [kind(network, image_size=SIZE, timesteps=6, **config) for kind in (cls, GaussianDiffusion)]

    @pytest.mark.parametrize("config", [{}, {"sampling_timesteps": 4}], ids=["ddpm", "ddim"])
    @pytest.mark.parametrize("cfg_plus_plus", [False, True])
    def test_model_predictions(self, config, cfg_plus_plus):
        class Own(GaussianDiffusion):
            calls = 0

            def model_predictions(self, x, t, classes, cond_scale=6.0, rescaled_phi=0.7, clip_x_start=False):
                self.calls += 1
                return super().model_predictions(x, t, classes, cond_scale, rescaled_phi, clip_x_start)

        own, plain = self.diffusions(Own, use_cfg_plus_plus=cfg_plus_plus, **config)
        made, expected = (d.sample(classes_of(2), 3.0, 0.4, seed=3, progress=False) for d in (own, plain))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=2e-4)
        assert own.calls == own.sampling_timesteps
        assert "has its own model_predictions" in own.explain_graphs()

    def test_p_sample(self):
        class Own(GaussianDiffusion):
            def p_sample(self, x, t, classes, cond_scale=6.0, rescaled_phi=0.7, clip_denoised=True):
                self.seen = (cond_scale, rescaled_phi)
                return x, x

        own = self.diffusions(Own)[0]
        states = own.sample(classes_of(2), 3.0, 0.4, seed=3, progress=False, return_all_timesteps=True)
        assert torch.equal(states[:, 0], states[:, -1])
        assert own.seen == pytest.approx((3.0, 0.4))

    @pytest.mark.parametrize("name, config", [("p_sample_loop", {}), ("ddim_sample", {"sampling_timesteps": 4})])
    def test_loops_with_upstreams_arguments(self, name, config):
        def loop(self, classes, shape, cond_scale=6.0, rescaled_phi=0.7):
            return torch.full(shape, cond_scale)

        own = self.diffusions(type("Own", (GaussianDiffusion,), {name: loop}), **config)[0]
        assert (own.sample(classes_of(2), 3.0) == 3).all()

    def test_the_networks_own_guidance(self):
        class Own(Unet):
            calls = 0

            def forward_with_cond_scale(self, *args, **kwargs):
                self.calls += 1
                return super().forward_with_cond_scale(*args, **kwargs)

        network = Own(**SMALL)
        diffusion = GaussianDiffusion(network, image_size=SIZE, timesteps=5)
        made = diffusion.sample(classes_of(2), 3.0, seed=3, progress=False)
        assert network.calls == 5 and "forward_with_cond_scale" in diffusion.explain_graphs()
        network.__class__ = Unet
        expected = diffusion.sample(classes_of(2), 3.0, seed=3, progress=False)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=2e-4)
