"""Conditions reach the network of every process, in training, bounds and sampling; what does not fit is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ddpm_fast
from ddpm_fast import Unet, XMWrapper, noise
from ddpm_fast.diffusion.conditions import Conditions, taken_by

UNET = {"dim": 8, "dim_mults": (1,), "attn_heads": 1, "attn_dim_head": 4, "channels": 2}


def unet(**options) -> Unet:
    torch.manual_seed(0)
    return Unet(**{**UNET, "num_classes": 4, **options})


FOURIER = {"random_fourier_features": True}
PROCESSES = {
    "ddpm": lambda **net: ddpm_fast.GaussianDiffusion(unet(**net), image_size=4, timesteps=12),
    "learned": lambda **net: ddpm_fast.LearnedGaussianDiffusion(
        unet(learned_variance=True, **net), image_size=4, timesteps=12
    ),
    "weighted": lambda **net: ddpm_fast.WeightedObjectiveGaussianDiffusion(
        unet(out_dim=6, **net), image_size=4, timesteps=12
    ),
    "continuous": lambda **net: ddpm_fast.ContinuousTimeGaussianDiffusion(
        unet(**FOURIER, **net), image_size=4, num_sample_steps=5
    ),
    "learned-schedule": lambda **net: ddpm_fast.ContinuousTimeGaussianDiffusion(
        unet(**FOURIER, **net), image_size=4, num_sample_steps=5, noise_schedule="learned"
    ),
    "v-continuous": lambda **net: ddpm_fast.VParamContinuousTimeGaussianDiffusion(
        unet(**FOURIER, **net), image_size=4, num_sample_steps=5
    ),
    "edm": lambda **net: ddpm_fast.ElucidatedDiffusion(unet(**FOURIER, **net), image_size=4, num_sample_steps=5),
    "flow": lambda **net: ddpm_fast.RectifiedFlow(unet(**net), image_size=4, num_sample_steps=5),
}
CLASSES = torch.tensor([0, 3, 2])


def images(seed: int = 1, channels: int = 2) -> torch.Tensor:
    return torch.rand(3, channels, 4, 4, generator=torch.Generator().manual_seed(seed))


def loss_of(diffusion, **conditions) -> torch.Tensor:
    torch.manual_seed(3)
    return diffusion(images(), loss_reduction="none", **conditions)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_loss_is_of_the_conditions(process):
    diffusion = PROCESSES[process]()
    keep = torch.tensor([True, False, True])
    found = loss_of(diffusion, classes=CLASSES, cond_keep_mask=keep)
    # 4 is no class: dropping one is telling the network so.
    assert torch.equal(found, loss_of(diffusion, classes=torch.tensor([0, 4, 2]), cond_keep_mask=torch.ones_like(keep)))
    assert (found != loss_of(diffusion, classes=CLASSES, cond_keep_mask=torch.ones_like(keep))).tolist() == [0, 1, 0]
    found.sum().backward()
    received = diffusion.network.classes_emb.weight.grad.abs().sum(1) > 0
    assert received.tolist() == [True, False, True, False]
    assert diffusion.network.null_classes_emb.grad.abs().sum() > 0


@pytest.mark.parametrize("process", ["ddpm", "edm"])
def test_the_loss_is_that_of_the_network_called_by_hand(process):
    diffusion = PROCESSES[process]()
    seen = []
    diffusion.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    eps = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    times = torch.tensor([0, 5, 11]) if process == "ddpm" else torch.tensor([-0.9, 0.0, 0.8])
    loss = diffusion(
        images(), times=times, noise=eps, classes=CLASSES, cond_keep_mask=CLASSES > 0, loss_reduction="none"
    )
    (args, kwargs) = seen[0]
    assert len(args) == 2 and set(kwargs) == {"classes", "cond_keep_mask"}
    rows = diffusion._rows(times)
    a, b = rows.forward_table[rows.of_images].unbind(1)
    c, d, w = rows.loss_table[rows.of_images].unbind(1)
    x_start = images() * 2 - 1
    shaped = [factor[:, None, None, None] for factor in (a, b, c, d)]
    torch.testing.assert_close(args[0], shaped[0] * x_start + shaped[1] * eps)
    output = diffusion.network(args[0], rows.times, classes=CLASSES, cond_keep_mask=CLASSES > 0)
    expected = w * (output - (shaped[2] * eps + shaped[3] * x_start)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_conditions_are_dropped_at_the_networks_rate_and_by_torchs_seed(process):
    diffusion = PROCESSES[process](cond_drop_prob=0.5)
    assert torch.equal(loss_of(diffusion, classes=CLASSES), loss_of(diffusion, classes=CLASSES))
    masks = []
    diffusion.network.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["cond_keep_mask"]), with_kwargs=True
    )
    for seed in range(40):
        torch.manual_seed(seed)
        diffusion(images(), classes=CLASSES)
    kept = torch.stack(masks)
    assert (
        kept.dtype == torch.bool and 0.35 < kept.float().mean() < 0.65 and len({tuple(m.tolist()) for m in kept}) == 8
    )
    diffusion.network.cond_drop_prob = 1.0
    diffusion(images(), classes=CLASSES)
    assert not masks[-1].any()


def test_the_mask_is_a_function_of_the_seed():
    network = unet(cond_drop_prob=0.3)
    assert noise.STREAM_CONDITION == 8
    torch.manual_seed(7)
    found = Conditions(torch.zeros(2000, dtype=torch.int64)).with_drawn_mask(network, torch.device("cpu")).keep_mask
    torch.manual_seed(7)
    seed = torch.randint(0, 2**62, (1,))
    numbers = noise.normal((2000,), seed=seed, stream=8)
    assert torch.equal(found, numbers >= -0.5244005127080407) and 0.67 < found.float().mean() < 0.73
    untouched = torch.get_rng_state()
    network.cond_drop_prob = 0.0
    assert Conditions(CLASSES).with_drawn_mask(network, torch.device("cpu")).keep_mask is None
    assert torch.equal(untouched, torch.get_rng_state()), "nothing is drawn where nothing is dropped"


def test_a_first_estimate_sees_the_same_conditions():
    diffusion = PROCESSES["ddpm"](self_condition=True, cond_drop_prob=0.5)
    masks = []
    diffusion.network.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["cond_keep_mask"]), with_kwargs=True
    )
    for seed in range(5):
        torch.manual_seed(seed)
        diffusion(images(), classes=CLASSES, self_conditioned=True)
    assert len(masks) == 10 and all(torch.equal(*masks[2 * i : 2 * i + 2]) for i in range(5))


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_candidates_of_noise_share_the_mask(process):
    wrapper, masks = XMWrapper(PROCESSES[process](cond_drop_prob=0.5), candidates=3, max_batch_size=2), []
    wrapper.network.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["cond_keep_mask"]), with_kwargs=True
    )
    torch.manual_seed(2)
    wrapper(images(), classes=CLASSES).backward()
    whole = [torch.cat(masks[i : i + 2]) for i in range(0, len(masks), 2)]
    assert len(whole) == 4 and all(torch.equal(mask, whole[0]) for mask in whole)
    masks.clear()
    wrapper(images(), classes=CLASSES, cond_keep_mask=torch.tensor([False, True, False]))
    assert torch.cat(masks[:2]).tolist() == [False, True, False]


def conditioned_on_images(**options):
    options = {"num_classes": None, "cond_dim": 3, "cond_channels": 1, "cond_drop_prob": 0.0, **options}
    return PROCESSES["ddpm"](**options)


def test_condition_images_are_normalised_and_mirrored_with_the_images():
    diffusion, seen = conditioned_on_images(), []
    hook = lambda module, args, kwargs: seen.append((args[0], kwargs["cond_image"]))  # noqa: E731
    diffusion.network.register_forward_pre_hook(hook, with_kwargs=True)
    given = {"cond": torch.randn(3, 3), "times": torch.tensor([0, 5, 11])}
    cond_image = (images(2, channels=1) * 255).to(torch.uint8)
    flip = torch.tensor([True, False, True])
    as_bytes = (images() * 255).to(torch.uint8)
    found = []
    for floats, of_images in ((False, as_bytes), (True, as_bytes.float() / 255)):
        torch.manual_seed(1)
        given["cond_image"] = cond_image.float() / 255 if floats else cond_image
        found.append(diffusion(of_images, flip=flip, **given))
    mirrored = torch.where(flip[:, None, None, None], cond_image.flip(-1), cond_image).float() / 255 * 2 - 1
    for _, told in seen:
        torch.testing.assert_close(told, mirrored)
    torch.testing.assert_close(*found)
    images_of_sampling = diffusion.sample(cond=given["cond"], cond_image=cond_image, seed=1, progress=False)
    torch.testing.assert_close(seen[-1][1], cond_image.float() / 255 * 2 - 1)
    assert images_of_sampling.shape == (3, 2, 4, 4)


@pytest.mark.parametrize("process", PROCESSES)
def test_bounds_are_of_the_conditions(process):
    diffusion = PROCESSES[process]()
    options = {"seed": 1, "progress": False, "timesteps": 3}
    found = diffusion.bits_per_dim(images(), classes=CLASSES, **options)
    for other in ({"graph": False}, {"batch_size": 2}, {"batch_size": 1, "graph": False}):
        again = diffusion.bits_per_dim(images(), classes=CLASSES, **options, **other)
        torch.testing.assert_close(again.total, found.total, rtol=1e-5, atol=1e-5)
    assert bool((diffusion.bits_per_dim(images(), classes=[1, 1, 1], **options).total != found.total).all())
    coding = diffusion.progressive_coding(images(), num_columns=2, classes=CLASSES, **options)
    assert coding.estimates.shape == (3, 2, 2, 4, 4)
    with pytest.raises(ValueError, match="classes must be given, since the network, a Unet, takes classes; got None"):
        diffusion.bits_per_dim(images(), **options)


@pytest.mark.parametrize("process", PROCESSES)
def test_every_way_of_sampling_takes_conditions(process):
    diffusion = PROCESSES[process](self_condition=process in ("ddpm", "flow"))
    options = {"seed": 1, "progress": False}
    found = diffusion.sample(classes=CLASSES, **options)
    assert found.shape == (3, 2, 4, 4), "as many as conditions"
    assert torch.equal(found, diffusion.sample(3, classes=[0, 3, 2], graph=False, **options))
    assert bool((found != diffusion.sample(classes=[1, 1, 1], **options)).flatten(1).any(1).all())
    progressive = diffusion.progressive(classes=CLASSES, num_columns=2, guidance=2.0, **options)
    assert torch.equal(progressive.images, diffusion.sample(classes=CLASSES, guidance=2.0, **options))
    for guidance in (None, 3.0):
        between = diffusion.interpolate(images(), images(2), classes=CLASSES, guidance=guidance, **options)
        again = diffusion.interpolate(images(), images(2), classes=CLASSES, guidance=guidance, graph=False, **options)
        assert torch.equal(between, again)
    every = diffusion.sample(classes=CLASSES, return_all_timesteps=True, **options)
    torch.testing.assert_close(every[:, -1].clamp(0, 1), found, rtol=0, atol=1e-6)


# Networks of other people.


class Third(nn.Module):
    """Takes classes in the place of x_self_cond, by another name in a subclass."""

    channels = out_dim = 2
    self_condition = False

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 2)

    def forward(self, x, t, classes, scale: float = 0.5):
        assert classes.dtype == torch.int64 and classes.shape == x.shape[:1]
        return scale * x + self.emb(classes)[:, :, None, None]


class ByY(Third):
    def forward(self, x, t, y=None):
        return 0.5 * x if y is None else super().forward(x, t, y)


class WithNull(Third):
    num_classes, null_class, cond_drop_prob = 4, 4, 0.5


class AnyKeyword(Third):
    num_classes, cond_drop_prob = 4, 0.0

    def forward(self, x, t, *args, **kwargs):
        assert args in ((), (None,))
        keep = kwargs.get("cond_keep_mask")
        classes = kwargs["classes"] if keep is None else torch.where(keep, kwargs["classes"], 4)
        return super().forward(x, t, classes)


@pytest.mark.parametrize("network", [Third, ByY, WithNull, AnyKeyword])
def test_other_peoples_networks(network):
    torch.manual_seed(0)
    diffusion = ddpm_fast.GaussianDiffusion(network(), image_size=4, timesteps=8)
    diffusion(images(), classes=CLASSES).backward()
    options = {"seed": 1, "progress": False}
    found = diffusion.sample(classes=CLASSES, **options)
    assert torch.equal(found, diffusion.sample(classes=CLASSES, graph=True, **options))
    if taken_by(diffusion.model).has_null:
        guided = diffusion.sample(classes=CLASSES, guidance=3.0, **options)
        assert torch.equal(guided, diffusion.sample(classes=CLASSES, guidance=3.0, graph=True, **options))
        assert (guided - found).abs().max() > 1e-3
    else:
        with pytest.raises(ValueError, match="guidance must be None or 1, since the network"):
            diffusion.sample(classes=CLASSES, guidance=3.0, **options)
    if network is ByY:
        assert diffusion.sample(3, **options).shape == found.shape, "it does without"
    else:
        with pytest.raises(ValueError, match=f"classes must be given, since the network, a {network.__name__}"):
            diffusion.sample(3, **options)


def test_upstreams_class_conditional_network_in_a_process_of_ours():
    """It would draw a mask of its own while sampling, and takes classes in the place of x_self_cond."""
    upstream = pytest.importorskip("denoising_diffusion_pytorch.classifier_free_guidance")
    torch.manual_seed(0)
    network = upstream.Unet(
        8, num_classes=4, dim_mults=(1,), channels=2, attn_heads=1, attn_dim_head=4, cond_drop_prob=0.5
    )
    diffusion = ddpm_fast.GaussianDiffusion(network, image_size=4, timesteps=6)
    diffusion(images(), classes=CLASSES).backward()
    options = {"classes": CLASSES, "seed": 1, "progress": False}
    found = [diffusion.sample(**options) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    guided = diffusion.sample(guidance=3.0, **options)
    assert torch.equal(guided, diffusion.sample(guidance=3.0, **options)) and (guided - found[0]).abs().max() > 1e-3


def test_wrappers_of_torch_take_what_their_network_takes():
    compiled = torch.compile(unet(), backend="eager")
    assert taken_by(compiled) == taken_by(unet()) and taken_by(unet()).classes == "classes"
    assert taken_by(nn.DataParallel(unet())).classes == "classes"


def test_half_weights_get_conditions_in_their_dtype():
    diffusion = conditioned_on_images()
    diffusion.model.to(torch.bfloat16)
    found = diffusion.sample(cond=torch.randn(3, 3), cond_image=images(2, channels=1), seed=1, progress=False)
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_a_whole_training_loss_is_one_graph_of_torch_compile():
    diffusion = PROCESSES["flow"]()
    compiled = torch.compile(diffusion, backend="eager", fullgraph=True)
    eps = torch.randn(3, 2, 4, 4)
    given = {"times": torch.tensor([0.1, 0.5, 0.9]), "noise": eps, "classes": CLASSES}
    for keep in ({"cond_keep_mask": CLASSES > 0}, {}):
        torch.manual_seed(1)
        expected = diffusion(images(), **given, **keep)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(images(), **given, **keep), expected)


WRONG = {
    "classes must be given, since the network, a Unet, takes classes; got None": {},
    r"classes must be in \[0, 4\], 4 being no class, got values from 0 to 5": {"classes": torch.tensor([0, 5, 1])},
    r"classes must be in \[0, 4\], 4 being no class, got values from -1 to 1": {"classes": torch.tensor([-1, 0, 1])},
    "classes must be a tensor of integers, got torch.float32": {"classes": torch.tensor([0.0, 1.0, 2.0])},
    r"classes must have one entry per image, 3, got shape \(2,\)": {"classes": torch.tensor([0, 1])},
    r"classes must have shape \(B,\), one per image, got \(3, 1\)": {"classes": torch.tensor([[0], [1], [2]])},
    "classes must be on the diffusion's device cpu, got meta": {
        "classes": torch.zeros(3, dtype=torch.int64, device="meta")
    },
    "classes must be a tensor or a sequence of numbers, got 'cat'": {"classes": "cat"},
    "cond must be None, since the network, a Unet, takes no condition vectors": {
        "classes": CLASSES,
        "cond": torch.zeros(3, 2),
    },
    "cond_image must be None, since the network, a Unet, takes no condition images": {
        "classes": CLASSES,
        "cond_image": torch.zeros(3, 1, 4, 4),
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_conditions_are_named(message):
    diffusion = PROCESSES["ddpm"]()
    for call in (
        lambda: diffusion(images(), **WRONG[message]),
        lambda: diffusion.sample(3, progress=False, **WRONG[message]),
        lambda: diffusion.bits_per_dim(images(), progress=False, **WRONG[message]),
    ):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            call()
        assert str(caught.value).count(". ") == 0


WRONG_VECTORS = {
    "cond must be given, since the network, a Unet, takes condition vectors; got None": {"cond": None},
    r"cond must have shape \(B, 3\), got \(3, 4\)": {"cond": torch.zeros(3, 4)},
    "cond must be floating point, got torch.int64": {"cond": torch.zeros(3, 3, dtype=torch.int64)},
    "cond_image must be given, since the network, a Unet, takes condition images": {"cond_image": None},
    r"cond_image must have shape \(B, 1, 4, 4\), got \(3, 2, 4, 4\)": {"cond_image": torch.zeros(3, 2, 4, 4)},
    r"cond_image must have shape \(B, 1, 4, 4\), got \(3, 1, 2, 2\)": {"cond_image": torch.zeros(3, 1, 2, 2)},
    "cond_image must be floating point in": {"cond_image": torch.zeros(3, 1, 4, 4, dtype=torch.int64)},
    r"cond_keep_mask must be bool of shape \(B,\), got torch.float32": {"cond_keep_mask": torch.ones(3)},
    "cond_keep_mask must have one entry per image, 3, got shape": {"cond_keep_mask": torch.ones(2, dtype=torch.bool)},
}


@pytest.mark.parametrize("message", WRONG_VECTORS)
def test_wrong_vectors_and_images_are_named(message):
    given = {"cond": torch.zeros(3, 3), "cond_image": torch.zeros(3, 1, 4, 4), **WRONG_VECTORS[message]}
    with pytest.raises((TypeError, ValueError), match=message):
        conditioned_on_images()(images(), **given)


def test_a_mask_needs_a_null_condition():
    diffusion = ddpm_fast.GaussianDiffusion(Third(), image_size=4, timesteps=8)
    with pytest.raises(ValueError, match="cond_keep_mask must be None, since the network, a Third, has no null"):
        diffusion(images(), classes=CLASSES, cond_keep_mask=CLASSES > 0)
    diffusion = ddpm_fast.GaussianDiffusion(Unet(**UNET), image_size=4, timesteps=8)
    with pytest.raises(ValueError, match="classes must be None, since the network, a Unet, takes no classes"):
        diffusion(images(), classes=CLASSES)
    assert diffusion.sample(2, progress=False).shape == (2, 2, 4, 4)
