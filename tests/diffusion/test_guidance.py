"""Guidance in the sampler's table against a plain loop in float64, recorded and not, and what it costs."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast
from ddpm_fast import Guidance, Unet, use_backend
from ddpm_fast.diffusion import guidance as columns
from ddpm_fast.diffusion import sampled_process
from ddpm_fast.noise import STREAM_INITIAL, STREAM_STEP, normal

CLASSES = [0, 3, 2]
SEED = 5


def unet(seed: int = 0, **options) -> Unet:
    torch.manual_seed(seed)
    network = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4, channels=2, num_classes=4, **options)
    with torch.no_grad():  # classes that make a difference
        network.classes_emb.weight.mul_(3)
    return network


PROCESSES = {
    "ddpm": lambda: ddpm_fast.GaussianDiffusion(unet(), image_size=4, timesteps=12),
    "pred_noise": lambda: ddpm_fast.GaussianDiffusion(unet(), image_size=4, timesteps=12, objective="pred_noise"),
    "learned": lambda: ddpm_fast.LearnedGaussianDiffusion(unet(learned_variance=True), image_size=4, timesteps=12),
    "v-continuous": lambda: ddpm_fast.VParamContinuousTimeGaussianDiffusion(
        unet(random_fourier_features=True), image_size=4
    ),
    "edm": lambda: ddpm_fast.ElucidatedDiffusion(unet(random_fourier_features=True), image_size=4),
    "flow": lambda: ddpm_fast.RectifiedFlow(unet(), image_size=4),
}
GUIDANCES = {
    "scale": {"scale": 3.0},
    "null alone": {"scale": 0.0},
    "interval": {"scale": 4.0, "interval": (0.3, 2.0)},
    "linear": {"scale": 3.0, "schedule": "linear"},
    "cosine": {"scale": 3.0, "schedule": "cosine"},
    "function": {"scale": 3.0, "schedule": lambda fraction: 1 - fraction**2},
    "rescale": {"scale": 5.0, "rescale": 0.7},
    "rescaled x0": {"scale": 5.0, "rescale": 0.4, "space": "x0"},
    "projection": {"scale": 5.0, "eta": 0.25},
    "projected output": {"scale": 5.0, "eta": 0.0, "space": "output"},
    "threshold": {"scale": 4.0, "norm_threshold": 1.0},
    "momentum": {"scale": 4.0, "momentum": -0.5, "interval": (0.0, 3.0)},
    "all of APG": {"scale": 6.0, "eta": 0.1, "norm_threshold": 2.0, "momentum": -0.75, "rescale": 0.3},
    "cfg++": {"scale": 0.6, "cfg_plus_plus": True},
    "cfg++ in an interval": {"scale": 0.8, "cfg_plus_plus": True, "interval": (0.2, math.inf)},
}


def share_of(schedule, fraction: float) -> float:
    shares = {"constant": 1.0, "linear": fraction, "cosine": 0.5 * (1 - math.cos(math.pi * fraction))}
    return shares[schedule] if isinstance(schedule, str) else schedule(fraction)


def guided_output(out, second, x, row, spec, w, state):
    """What takes the place of the network's output, by the papers' formulas, per image in a loop."""
    p, q = row["p"], row["q"]
    by_x_start = spec.get("space") == "x0" or "space" not in spec and {"eta", "norm_threshold", "momentum"} & set(spec)
    y, y_null = (p * x + q * out, p * x + q * second) if by_x_start else (out, second)
    found = []
    for i in range(len(x)):
        update = y[i] - y_null[i] + spec.get("momentum", 0.0) * state["update"][i]
        state["update"][i] = update
        if spec.get("norm_threshold"):
            update = update * min(1.0, spec["norm_threshold"] / update.norm().item())
        parallel = (update * y[i]).sum() / (y[i] * y[i]).sum() * y[i]
        update = update - parallel + spec.get("eta", 1.0) * parallel
        g = y[i] + (w - 1) * update
        rescaled = g * (y[i].std() / g.std())
        found.append(spec.get("rescale", 0.0) * rescaled + (1 - spec.get("rescale", 0.0)) * g)
    g = torch.stack(found)
    return (g - p * x) / q if by_x_start else g


def plain_loop(diffusion, plan, spec, classes=CLASSES, guide=None, cond_fn=None, clip=True):
    """The walk in float64, without a kernel: returns images in [0, 1]."""
    shape = (len(classes), diffusion.channels, *diffusion.image_size)
    network = copy.deepcopy(diffusion.network).double()
    guide = None if guide is None else copy.deepcopy(guide).double()
    y = torch.tensor(classes)
    x = normal(shape, seed=SEED, stream=STREAM_INITIAL, dtype=torch.float32).double() * plan.first_scale
    state, kept, rows = {"update": torch.zeros(shape, dtype=torch.float64)}, [], len(plan.times)
    for index in range(rows):
        numbers = dict(zip(("p", "q", "r", "s", "u", "sigma", "u2", "u3", "lo", "hi"), plan.table[index].tolist()))  # noqa: B905
        row = {"u2": 0.0, "u3": 0.0, "lo": 0.0, "hi": 0.0, **numbers}
        a, b = plan.levels.a[index].item(), plan.levels.b[index].item()
        t = torch.full(shape[:1], plan.times[index], dtype=torch.int64 if plan.has_integer_times else torch.float64)
        out = network(x, t, classes=y)
        out, variance = out[:, : shape[1]], out[:, shape[1] :]
        low, high = spec.get("interval", (0.0, math.inf))
        is_inside = low < (b / a if a else math.inf) <= high
        w = 1 + (spec.get("scale", 1.0) - 1) * share_of(spec.get("schedule", "constant"), index / max(1, rows - 1))
        w, noise_x_start = w if is_inside else 1.0, None
        if is_inside and (w != 1 or spec.get("momentum") or spec.get("cfg_plus_plus")):
            if guide is None:
                second = network(x, t, classes=y, cond_keep_mask=torch.zeros(len(y), dtype=torch.bool))[:, : shape[1]]
            else:
                second = guide(x, t, classes=y)
            out = guided_output(out, second, x, row, spec, w, state)
            if spec.get("cfg_plus_plus"):
                noise_x_start = row["p"] * x + row["q"] * second
        x_start = row["p"] * x + row["q"] * out
        by_mean = plan.sampler == "ddpm" and not diffusion.learned_variance
        told = 0.0
        if cond_fn is not None and is_inside and (by_mean or a > 0):
            gradient = spec.get("classifier_scale", 1.0) * cond_fn(x.clone(), t, y)
            if by_mean:
                told = row["sigma"] ** 2 * gradient
            else:  # ε − b·∇ in place of ε
                x_start = x_start + b * b / a * gradient
        x_start = x_start.clamp(-1, 1) if clip else x_start
        noise_x_start = x_start if noise_x_start is None else noise_x_start.clamp(-1, 1) if clip else noise_x_start
        noise = normal(shape, seed=SEED, stream=STREAM_STEP, step=index, dtype=torch.float32).double()
        if diffusion.learned_variance and row["lo"] != row["hi"]:
            noise = noise * (row["lo"] + (row["hi"] - row["lo"]) * (variance + 1) / 2).exp()
        # s·x is s·a of one x0 and s·b of the noise, (x − a·x0)/b.
        epsilon = (x - a * noise_x_start) / b
        x_next = (row["r"] + row["s"] * a) * x_start + row["s"] * b * epsilon + row["sigma"] * noise + told
        for factor, earlier in zip((row["u"], row["u2"], row["u3"]), kept):  # noqa: B905
            x_next = x_next + factor * earlier
        kept = [x_start, *kept][:3]
        x = x_next
    return ((x.clamp(-1, 1) + 1) / 2).float()


def check_walk(diffusion, sampler, spec, steps=6, guide=None, cond_fn=None, graphs=(False, None), **options):
    plan = diffusion._plan(sampler, steps, "own" if sampler == "heun" else None)
    guided = Guidance(**spec, network=guide)
    with torch.no_grad():
        expected = plain_loop(diffusion, plan, spec, guide=guide, cond_fn=cond_fn)
    found = []
    spacing = "own" if sampler == "heun" else None
    for graph in graphs:
        given = {"sampler": sampler, "sampling_timesteps": steps, "spacing": spacing, "seed": SEED, "progress": False}
        given |= {"classes": CLASSES, "guidance": guided, "cond_fn": cond_fn, "graph": graph}
        found.append(diffusion.sample(**given, **options))
    # Unlike the clipped images of another guidance, which are at least a hundred times as far off.
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    assert all(torch.equal(found[0], other) for other in found[1:])
    return found[0]


@pytest.mark.parametrize(
    "sampler, name",
    [(sampler, name) for name in GUIDANCES for sampler in ("ddpm", "dpmpp_2m")]
    + list(itertools.product(("ddim", "heun", "unipc"), ("interval", "all of APG", "cfg++"))),
)
def test_guidance_is_the_plain_loop(sampler, name):
    found = check_walk(PROCESSES["ddpm"](), sampler, GUIDANCES[name])
    unguided = PROCESSES["ddpm"]().sample(
        classes=CLASSES, sampler=sampler, sampling_timesteps=6, seed=SEED, progress=False
    )
    assert (found - unguided).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["scale", "interval", "all of APG", "cfg++"])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("process", [name for name in PROCESSES if name != "ddpm"])
def test_every_process_is_guided(process, sampler, name):
    check_walk(PROCESSES[process](), sampler, GUIDANCES[name])


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_sequence_of_one_share_per_network_call(backend):
    diffusion = PROCESSES["flow"]()
    shares = (0.0, 1.0, 2.0, 0.5, 1.0)
    with use_backend(backend):
        found = check_walk(diffusion, "ddim", {"scale": 2.0, "schedule": lambda f: shares[round(4 * f)]}, steps=5)
        options = {"sampler": "ddim", "sampling_timesteps": 5, "seed": SEED, "progress": False}
        given = diffusion.sample(classes=CLASSES, guidance=Guidance(2.0, schedule=shares), **options)
    assert torch.equal(found, given)
    with pytest.raises(ValueError, match="guidance schedule must have one number per network call, 4, got 5"):
        diffusion.sample(classes=CLASSES, guidance=Guidance(2.0, schedule=shares), sampling_timesteps=4)


@pytest.mark.parametrize("name", ["scale", "interval", "all of APG"])
def test_another_network_guides(name):
    diffusion, guide = PROCESSES["ddpm"](), unet(seed=7)
    check_walk(diffusion, "dpmpp_2m", GUIDANCES[name], guide=guide)
    check_walk(PROCESSES["edm"](), "heun", GUIDANCES[name], guide=unet(seed=7, random_fourier_features=True))


def test_a_network_without_conditions_guides_one_without():
    torch.manual_seed(0)
    networks = [Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4, channels=2) for _ in range(2)]
    diffusion = ddpm_fast.GaussianDiffusion(networks[0], image_size=4, timesteps=8)
    options = {"seed": 1, "progress": False, "sampler": "ddim"}
    guided = diffusion.sample(2, guidance=Guidance(2.0, network=networks[1]), **options)
    assert (guided - diffusion.sample(2, **options)).abs().max() > 1e-3
    assert torch.equal(guided, diffusion.sample(2, guidance=Guidance(2.0, network=networks[1]), graph=False, **options))


def test_a_network_of_narrow_weights_guides():
    diffusion, guide = PROCESSES["ddpm"](), unet(seed=7)
    options = {"classes": CLASSES, "seed": 1, "progress": False, "sampler": "ddim", "sampling_timesteps": 4}
    expected = diffusion.sample(guidance=Guidance(2.0, network=guide), **options)
    narrow = Guidance(2.0, network=unet(seed=7).bfloat16())
    found = diffusion.sample(guidance=narrow, **options)
    assert found.dtype is torch.float32 and 0 < (found - expected).abs().max() < 0.1
    assert torch.equal(found, diffusion.sample(guidance=narrow, graph=False, **options))


def gradient(x, t, classes):
    """Of log p = −|x − c|²/8, by autograd."""
    centre = (classes.to(x.dtype) / 3 - 0.5)[:, None, None, None]
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        log_p = -((x - centre) ** 2).sum() / 8 * (1 + 0.01 * t.to(x.dtype).mean())
        return torch.autograd.grad(log_p, x)[0]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("process", ["ddpm", "learned", "edm", "flow"])
def test_a_classifier_guides(process, sampler):
    diffusion = PROCESSES[process]()
    for spec in ({"classifier_scale": 0.5}, {"scale": 3.0, "classifier_scale": 2.0, "interval": (0.2, 3.0)}):
        check_walk(diffusion, sampler, spec, cond_fn=gradient, graphs=(False, None, True))


class LogP(nn.Module):
    """The same as a module of torch's modules, which a recording trusts no more than a function."""

    def __init__(self):
        super().__init__()
        self.net = nn.Conv2d(2, 4, 3)

    def forward(self, x, t, classes):
        x = x.requires_grad_()
        log_p = self.net(x).mean((2, 3)).log_softmax(1).gather(1, classes[:, None]).sum()
        return torch.autograd.grad(log_p, x)[0]


def test_classes_are_the_classifiers_alone_where_the_network_takes_none():
    torch.manual_seed(0)
    diffusion = ddpm_fast.GaussianDiffusion(
        Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4, channels=2), image_size=4, timesteps=8
    )
    cond_fn, options = LogP(), {"seed": 1, "progress": False}
    found = diffusion.sample(classes=CLASSES, cond_fn=cond_fn, **options)
    assert (found - diffusion.sample(3, **options)).abs().max() > 1e-4
    assert torch.equal(found, diffusion.sample(classes=CLASSES, cond_fn=cond_fn, graph=True, **options))
    with pytest.raises(ValueError, match="classes must be None, since the network, a Unet, takes no classes"):
        diffusion.sample(classes=CLASSES, **options)


def test_explain_graphs_says_who_is_not_recorded():
    diffusion = PROCESSES["ddpm"]()
    assert "sampling replays" in diffusion.explain_graphs(guidance=3.0)
    assert "cond_fn is a function, and what it does besides is not known" in diffusion.explain_graphs(cond_fn=gradient)
    assert "of cond_fn, the model is a LogP, and what" in diffusion.explain_graphs(cond_fn=LogP())
    guide = unet(1)
    guide.register_forward_hook(lambda *args: None)
    assert "of guidance's network, the model has forward hooks" in diffusion.explain_graphs(
        guidance=Guidance(2.0, network=guide)
    )


@pytest.mark.parametrize("process", ["ddpm", "learned", "edm", "flow"])
@pytest.mark.parametrize("name", ["scale", "interval", "all of APG", "cfg++"])
def test_images_do_not_depend_on_their_batch(process, name):
    """Bit for bit where the network's output does not; a Unet's rounds by its batch, which guidance enlarges."""
    diffusion = PROCESSES[process]()
    options = {"guidance": Guidance(**GUIDANCES[name]), "seed": SEED, "progress": False, "sampling_timesteps": 5}
    together = diffusion.sample(classes=CLASSES, **options)
    alone = [diffusion.sample(classes=[c], start_index=i, **options) for i, c in enumerate(CLASSES)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=5e-4)
    pixelwise = copy.deepcopy(diffusion)
    setattr(pixelwise, pixelwise.network_name, Pixelwise(diffusion.learned_variance))
    together = pixelwise.sample(classes=CLASSES, **options)
    alone = [pixelwise.sample(classes=[c], start_index=i, **options) for i, c in enumerate(CLASSES)]
    assert torch.equal(torch.cat(alone), together)


class Pixelwise(nn.Module):
    """A network whose output of an image has the same bits in every batch."""

    channels, self_condition, num_classes, cond_drop_prob = 2, False, 4, 0.1

    def __init__(self, learned_variance: bool = False):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, 5))
        self.out_dim = 4 if learned_variance else 2

    def forward(self, x, t, x_self_cond=None, *, classes, cond_keep_mask=None):
        if cond_keep_mask is not None:
            classes = torch.where(cond_keep_mask, classes, 4)
        out = x * self.shift[classes][:, None, None, None] + 0.001 * t[:, None, None, None]
        return out if self.out_dim == 2 else torch.cat((out, 0.1 * out), dim=1)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("process", ["ddpm", "edm", "flow"])
@pytest.mark.parametrize("name", ["scale", "all of APG"])
def test_a_guided_step_has_at_most_1_15_times_the_operators(process, name):
    torch.manual_seed(0)
    fourier = {"random_fourier_features": True} if process == "edm" else {}
    network = Unet(16, dim_mults=(1, 2), num_classes=10, **fourier)
    classes = {
        "ddpm": ddpm_fast.GaussianDiffusion,
        "edm": ddpm_fast.ElucidatedDiffusion,
        "flow": ddpm_fast.RectifiedFlow,
    }
    diffusion = classes[process](network, image_size=8)
    counts = []
    diffusion.sample(classes=[1, 2], sampling_timesteps=1, progress=False)  # what later calls copy into is made here
    for guidance, steps in itertools.product((None, Guidance(**GUIDANCES[name])), (3, 4)):
        with Counted() as counted:
            options = {"sampler": "ddim", "sampling_timesteps": steps, "seed": 1, "progress": False, "graph": False}
            diffusion.sample(classes=[1, 2], guidance=guidance, **options)
        counts.append(len(counted.names))
    unguided, guided = counts[1] - counts[0], counts[3] - counts[2]  # of a step
    assert unguided > 10 and unguided < guided <= 1.15 * unguided


def test_rows_outside_the_interval_run_the_network_once():
    diffusion, batches = PROCESSES["ddpm"](), []
    diffusion.model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    guidance = Guidance(3.0, interval=(0.3, 2.0))
    plan = diffusion._plan("ddim", 6)
    inside = (plan.levels.sigma > 0.3) & (plan.levels.sigma <= 2.0)
    assert 0 < inside.sum() < 6
    options = {"sampler": "ddim", "sampling_timesteps": 6, "progress": False}
    diffusion.sample(classes=CLASSES, guidance=guidance, **options)
    assert batches == [6 if row else 3 for row in inside]


def test_a_function_as_schedule_is_asked_in_every_run():
    process = PROCESSES["ddpm"]()
    share = [1.0]
    run = {"classes": CLASSES, "seed": 3, "sampler": "ddim", "sampling_timesteps": 3, "progress": False}
    given = {"scale": 3.0, "schedule": lambda fraction: share[0]}
    first = process.sample(guidance=given, **run)
    share[0] = 0.5
    assert torch.equal(process.sample(guidance=given, **run), process.sample(guidance=2.0, **run))
    assert not torch.equal(process.sample(guidance=2.0, **run), first)


def test_as_many_tables_are_kept_as_the_limit_says(monkeypatch):
    monkeypatch.setattr(sampled_process, "_PLANS", 4)
    process = PROCESSES["ddpm"]()
    for last in range(9):
        assert process.network_calls("ddim", spacing=[10, last]) == 2
        assert len(process._plans) <= 4


def test_tables_are_kept_and_unguided_ones_stay_as_they_were():
    diffusion = PROCESSES["ddpm"]()
    plan = diffusion._plan("ddim", 6)
    found = [diffusion._guided_plan(plan, Guidance(2.0), False) for _ in range(2)]
    assert found[0] is found[1] and found[0].table.shape == (6, 25)
    assert diffusion._guided_plan(plan, Guidance(1.0), False) is plan
    assert torch.equal(found[0].table[:, :6], plan.table)
    assert list(columns.COLUMNS) == ["A", "B", "w", "phi", "eta", "rho", "mu", "space", "kg", "kn", "kc", "h", "j"]
    neutral = columns.widened(plan.table)[:, 12:]
    assert neutral[0].tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0] and bool((neutral == neutral[:1]).all())


def test_other_classes_replay_the_same_recording():
    from ddpm_fast.runtime.recording import GraphCache
    from ddpm_fast.testing.recorders import FrozenRecorder

    diffusion = PROCESSES["ddpm"]()
    diffusion.graphs = GraphCache(recorder=FrozenRecorder)
    options = {"seed": 1, "progress": False, "sampling_timesteps": 4, "sampler": "ddim"}
    FrozenRecorder.recorded = 0
    for classes, guidance in (([0, 1], 2.0), ([3, 2], 2.0), ([1, 1], Guidance(5.0)), ([1, 4], 3.0)):
        found = diffusion.sample(classes=classes, guidance=guidance, **options)
        assert torch.equal(found, diffusion.sample(classes=classes, guidance=guidance, graph=False, **options))
    assert FrozenRecorder.recorded == 1
    diffusion.sample(classes=[0, 1], guidance=Guidance(2.0, interval=(0.5, 2.0)), **options)
    assert FrozenRecorder.recorded == 3, "guided rows and others"
    diffusion.sample(classes=[0, 1], **options)
    assert FrozenRecorder.recorded == 4


REFUSED = {
    "guidance must be a number": "strong",
    "guidance scale must be a number": {"scale": float("nan")},
    r"guidance interval must be two levels of noise \(low, high\)": {"interval": 3.0},
    "guidance interval must have low < high, got 2 and 1": {"interval": (2.0, 1.0)},
    "guidance schedule must be one of constant, linear, cosine, got 'up'": {"schedule": "up"},
    r"guidance rescale must be a number in \[0, 1\]": {"rescale": 1.5},
    r"guidance eta must be a number in \[0, 1\]": {"eta": -0.1},
    r"guidance norm_threshold must be a number in": {"norm_threshold": -1.0},
    r"guidance momentum must be a number in \[-1, 1\]": {"momentum": 2.0},
    "guidance space must be one of output, x0 or None, got 'noise'": {"space": "noise"},
    "guidance network must be a module, got str": {"network": "weak"},
    "guidance has no argument 'strength'; it takes scale, interval": {"strength": 1.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_guidance_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        PROCESSES["ddpm"]().sample(classes=CLASSES, guidance=REFUSED[message])
    assert str(caught.value).count(". ") == 0


def test_guidance_needs_a_condition_that_can_be_left_out():
    torch.manual_seed(0)
    diffusion = ddpm_fast.GaussianDiffusion(Unet(8, dim_mults=(1,), channels=2), image_size=4, timesteps=8)
    with pytest.raises(ValueError, match="guidance must be None or 1 without classes and cond"):
        diffusion.sample(2, guidance=2.0)
    assert diffusion.sample(2, guidance=1.0, progress=False).shape == (2, 2, 4, 4)
    diffusion.model = Labelled()
    with pytest.raises(ValueError, match="since the network, a Labelled, has no null condition"):
        diffusion.sample(classes=[1, 2], guidance=2.0)
    with pytest.raises(ValueError, match="cond_fn must return a gradient of x's shape"):
        diffusion.sample(classes=[1, 2], cond_fn=lambda x, t, y: x[:1], progress=False)
    with pytest.raises(TypeError, match="cond_fn must be a function"):
        diffusion.sample(classes=[1, 2], cond_fn=3)


class Labelled(nn.Module):
    """A network that takes classes as y, in the third place, and has no null class."""

    channels = out_dim = 2
    self_condition = False

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(4, 2)

    def forward(self, x, t, y):
        assert y.dtype == torch.int64
        return x * 0.5 + self.emb(y)[:, :, None, None]


def test_a_process_has_guidance_of_its_own():
    diffusion = ddpm_fast.GaussianDiffusion(unet(), image_size=4, timesteps=12, guidance=3.0)
    plain = PROCESSES["ddpm"]()
    options = {"classes": CLASSES, "seed": 1, "progress": False}
    assert torch.equal(diffusion.sample(**options), plain.sample(guidance=3.0, **options))
    assert torch.equal(diffusion.sample(guidance=1, **options), plain.sample(**options))
    assert diffusion.current_config()["guidance"] == 3.0 and "guidance" not in plain.current_config()
    diffusion.guidance = Guidance(4.0, interval=(0.1, 2.0), rescale=0.5)
    config = diffusion.current_config()
    assert config["guidance"] == {"scale": 4.0, "interval": (0.1, 2.0), "rescale": 0.5}
    again = ddpm_fast.GaussianDiffusion(unet(), **config)
    assert torch.equal(again.sample(**options), diffusion.sample(**options))
    with pytest.raises(ValueError, match="guidance of a process must have no network and no function"):
        ddpm_fast.RectifiedFlow(unet(), image_size=4, guidance=Guidance(2.0, schedule=lambda fraction: 1.0))


def test_methods_of_the_users_get_conditions_and_refuse_guidance():
    class Mine(ddpm_fast.GaussianDiffusion):
        seen = None

        def model_predictions(self, x, t, x_self_cond=None, **options):
            Mine.seen = options["classes"]
            return super().model_predictions(x, t, x_self_cond, **options)

    diffusion, plain = (
        Mine(unet(), image_size=4, timesteps=6),
        ddpm_fast.GaussianDiffusion(unet(), image_size=4, timesteps=6),
    )
    for sampler in ("ddpm", "ddim", "dpmpp_2m"):
        options = {"classes": CLASSES, "seed": 1, "progress": False, "sampler": sampler}
        torch.testing.assert_close(diffusion.sample(**options), plain.sample(**options), rtol=0, atol=1e-5)
        assert Mine.seen.tolist() == CLASSES
        with pytest.raises(ValueError, match="guidance must be None where Mine has its own model_predictions"):
            diffusion.sample(guidance=2.0, **options)
