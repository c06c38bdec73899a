"""Whatever a user does to a module of upstream's network does here what it does there, in outputs and gradients.

Both networks have the same weights in float64, and the same change is made to the module of the same name.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from ddpm_fast import GaussianDiffusion, Unet, explain

upstream = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
CONFIG = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}
T = 4


@functools.lru_cache
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    values = upstream.Unet(**CONFIG).double().state_dict()
    generator = torch.Generator().manual_seed(1)
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in values.items()}


def networks() -> tuple[nn.Module, nn.Module]:
    """Ours and upstream's."""
    both = (Unet(**CONFIG).double(), upstream.Unet(**CONFIG).double())
    for network in both:
        network.load_state_dict(state())
    return both


def shared_modules() -> list[str]:
    ours, theirs = ({name for name, _ in network.named_modules()} for network in networks())
    return sorted(ours & theirs)


NAMES = shared_modules()


# One of each kind of place: the other stages have the same modules. A list of modules is never called.
PLACES = (
    "downs.0.0",
    "downs.0.2",
    "downs.0.3",
    "downs.1.3",
    "mid_block2",
    "mid_attn",
    "ups.0.0",
    "ups.0.3",
    "time_mlp",
)
PLACES += ("init_conv", "final_res_block", "final_conv")
CALLED = [name for name in NAMES if not name or name.startswith(PLACES)]
OTHERS = [name for name in NAMES if name not in CALLED]
_THEIRS = networks()[1]
PARAMETRIC = [name for name in CALLED if name and _THEIRS.get_submodule(name)._parameters]
WEIGHTED = [name for name in CALLED if isinstance(_THEIRS.get_submodule(name), (nn.Conv2d, nn.Linear))]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    # Upstream's embedding of an integer is float32, which its float64 layers do not take.
    return torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64), torch.tensor([3.0, 7.0]).double()


def changed(x: torch.Tensor) -> torch.Tensor:
    return x + 0.3 * x.square().clamp(max=2)


def replace(network: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The network with another module under a name; the module itself for the name of the network."""
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
    return network


class Wrapper(nn.Module):
    """Behind the module that it wraps, another function."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return changed(self.inner(*args, **kwargs))

    def __getitem__(self, index):  # time_mlp and mlp are sequences
        return self.inner[index]


def forward_hook(network, name):
    network.get_submodule(name).register_forward_hook(lambda module, args, out: changed(out))
    return network


def pre_hook(network, name):
    def hook(module, args):
        return (changed(args[0]) if args[0].is_floating_point() else args[0], *args[1:])

    network.get_submodule(name).register_forward_pre_hook(hook)
    return network


def backward_hook(network, name):
    network.get_submodule(name).register_full_backward_hook(
        lambda module, grads, outs: tuple(None if g is None else 1.5 * g for g in grads)
    )
    return network


def patched_forward(network, name):
    module = network.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: changed(forward(*args, **kwargs))
    return network


def wrapped(network, name):
    return replace(network, name, Wrapper(network.get_submodule(name)))


def subclass(network, name):
    module = network.get_submodule(name)

    def forward(self, *args, **kwargs):
        return changed(super(type(self), self).forward(*args, **kwargs))

    module.__class__ = type(f"My{type(module).__name__}", (type(module),), {"forward": forward})
    return network


CHANGES = [forward_hook, pre_hook, backward_hook, patched_forward, wrapped, subclass]


def results(network: nn.Module) -> dict[str, torch.Tensor]:
    """The output and every gradient, by the parameters' names without wrappers."""
    x, t = batch()
    x.requires_grad_()
    network.zero_grad()
    out = network(x, t)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weights).sum().backward()
    found = {"out": out.detach(), "dx": x.grad}
    return found | {name.replace("inner.", ""): p.grad for name, p in network.named_parameters()}


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    found, expected = results(ours), results(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def has_its_turn(places: list, changes: list, every: int):
    """The cases that `make test` runs: one place of a kind has some of the changes and the next ones have others."""
    return lambda name, **change: (places.index(name) + changes.index(*change.values())) % every == 0


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.release(but=has_its_turn(CALLED, CHANGES, every=6))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CALLED)
def test_a_change_does_what_it_does_upstream(name, change):
    assert_same(*(change(network, name) for network in networks()))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_all_other_modules_at_once(change):
    names = [name for name in OTHERS if not isinstance(_THEIRS.get_submodule(name), nn.ModuleList)]
    assert len(names) > 50
    outer = [n for n in names if change is not wrapped or not any(n.startswith(f"{other}.") for other in names)]
    assert_same(*(functools.reduce(change, outer, network) for network in networks()))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("name", PARAMETRIC)
def test_a_parametrization(name):
    ours, theirs = networks()
    for network in (ours, theirs):
        module = network.get_submodule(name)
        for parameter in [n for n, _ in module.named_parameters(recurse=False)]:
            parametrize.register_parametrization(module, parameter, Doubled())
    assert_same(ours, theirs)


RENEWALS = ["weight_norm", "spectral_norm", "prune"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.release(but=has_its_turn(WEIGHTED, RENEWALS, every=3))
@pytest.mark.parametrize("renew", RENEWALS)
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_renewed_by_a_hook(name, renew):
    """In training, and in sampling: what is derived from a weight must not be made before the hook has run."""
    ours, theirs = networks()
    renewals = {
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "prune": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    }
    for network in (ours, theirs):
        torch.manual_seed(5)
        renewals[renew](network.get_submodule(name))
    assert_same(ours, theirs)
    with torch.no_grad():  # as an optimizer would: the hook makes the weight of these
        for network in (ours, theirs):
            network.eval()
            for key, p in network.named_parameters():
                if key.startswith(f"{name}.weight_"):
                    p.mul_(1.5)
    assert_same_samples(ours, theirs)


def process(network, package=None) -> nn.Module:
    cls = GaussianDiffusion if package is None else package.GaussianDiffusion
    return cls(network, image_size=8, timesteps=T, objective="pred_noise")


def their_samples(network, noises) -> torch.Tensor:
    """Upstream's p_sample_loop with given noise: the first is x_T, the others those of the steps."""
    diffusion = process(network, upstream)
    remaining = iter(noises)
    original = torch.randn, torch.randn_like
    torch.randn = lambda *shape, **kwargs: next(remaining)
    torch.randn_like = lambda x: next(remaining)
    try:
        return diffusion.p_sample_loop((2, 3, 8, 8))
    finally:
        torch.randn, torch.randn_like = original


def noise_of(seed: int) -> list[torch.Tensor]:
    from ddpm_fast import noise
    from ddpm_fast.ops import normal

    shape = (2, 3, 8, 8)
    first = normal(shape, seed=seed, stream=noise.STREAM_INITIAL)
    steps = [normal(shape, seed=seed, stream=noise.STREAM_STEP, step=row) for row in range(T)]
    return [first, *steps]


def assert_same_samples(ours: nn.Module, theirs: nn.Module) -> None:
    """In float32, with a recording where one is made, and without."""
    expected = their_samples(theirs.float(), noise_of(3))
    diffusion = process(ours.float())
    for graph in (None, False):
        images = diffusion.sample(2, seed=3, progress=False, graph=graph)
        torch.testing.assert_close(images, expected, rtol=1e-3, atol=2e-4)


# A wrapper of the whole network lacks the attributes that a process reads, upstream's as ours.
SAMPLED = [(name, change) for name in CALLED for change in (forward_hook, wrapped) if name or change is not wrapped]


@pytest.mark.release(but=has_its_turn(CALLED, [forward_hook, wrapped], every=2))
@pytest.mark.parametrize("name, change", SAMPLED)
def test_sampling_with_a_change(name, change):
    assert_same_samples(*(change(network, name) for network in networks()))


SETTINGS = {
    "circular padding": ("downs.0.0.block1.proj", lambda conv: setattr(conv, "padding_mode", "circular")),
    "circular padding of the first convolution": ("init_conv", lambda conv: setattr(conv, "padding_mode", "circular")),
    "circular padding of an upsampling": ("ups.0.3.1", lambda conv: setattr(conv, "padding_mode", "circular")),
    "a patched _conv_forward": (
        "downs.1.3",
        lambda conv: setattr(conv, "_conv_forward", lambda x, w, b: 2 * nn.functional.conv2d(x, w, b, padding=1)),
    ),
    "no bias": ("mid_block1.block2.proj", lambda conv: setattr(conv, "bias", None)),
    "the factor of a norm": ("mid_attn.norm", lambda norm: setattr(norm, "scale", 1.5)),
    "the factor of a norm in a block": ("ups.1.0.block1.norm", lambda norm: setattr(norm, "scale", 1.5)),
    "the factor of linear attention": ("downs.0.2", lambda attention: setattr(attention, "scale", 0.3)),
    "the factor of attention": ("mid_attn.attend", lambda attend: setattr(attend, "scale", 0.3)),
    "another resampling": ("ups.0.3.0", lambda module: setattr(module, "mode", "bilinear")),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_modules(setting):
    name, change = SETTINGS[setting]
    ours, theirs = networks()
    for network in (ours, theirs):
        change(network.get_submodule(name))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "name, make",
    [
        ("mid_attn", nn.Identity),
        ("downs.0.2", nn.Identity),
        ("downs.0.0.block1.act", nn.Identity),
        ("downs.0.0.block1.act", nn.GELU),
        ("mid_block2.block2.norm", nn.Identity),
        ("ups.0.1.block2", nn.Identity),
        ("final_res_block.res_conv", lambda: nn.Conv2d(16, 8, 3, padding=1).double()),
        ("time_mlp", lambda: nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 32)).double()),
        ("time_mlp.2", nn.ReLU),
        ("final_conv", lambda: nn.Conv2d(8, 3, 3, padding=1).double()),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "made"),
)
def test_a_stock_module_in_another_ones_place(name, make):
    """Also where torch's own class would fit: an identity in the place of an activation is no activation."""
    ours, theirs = networks()
    torch.manual_seed(4)
    module = make()
    replace(ours, name, module), replace(theirs, name, module)
    assert_same(ours, theirs)


def test_a_class_that_is_patched(monkeypatch):
    """As programs do that add adapters or tiling to every convolution."""
    ours, theirs = networks()
    plain = results(ours)["out"]
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: changed(forward(self, x)))
    found, expected = results(ours)["out"], results(theirs)["out"]
    # Ours has subclasses of convolutions with a forward of their own, in two places.
    assert not torch.allclose(found, plain)
    assert found.shape == expected.shape


def test_hooks_on_every_module():
    ours, theirs = networks()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: changed(out) if isinstance(module, (nn.Linear, nn.SiLU)) else None
    )
    try:
        assert_same(ours, theirs)
    finally:
        handle.remove()


def test_modules_with_state_of_each_image():
    """A module that adds something of its own to every image of a batch trains and samples."""

    class Labelled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.labels = inner, torch.tensor([[0.1], [0.7]])

        def forward(self, x):
            return self.inner(x) + self.labels.to(x.dtype)

    for name in ("time_mlp.0", "time_mlp.3", "downs.0.0.mlp.1", "mid_block1.mlp.1"):
        ours, theirs = networks()
        for network in (ours, theirs):
            module = network.get_submodule(name)
            network.time_mlp[0].register_forward_hook(lambda m, a, out: out.double()) if name == "time_mlp.0" else None
            replace(network, name, Labelled(module))
        assert_same(ours, theirs)
        ours, theirs = networks()
        for network in (ours, theirs):
            replace(network, name, Labelled(network.get_submodule(name)))
        assert_same_samples(ours, theirs)


def test_the_table_of_timesteps_is_a_stock_time_mlps():
    ours, theirs = networks()
    for network in (ours, theirs):
        network.time_mlp[2] = nn.ReLU()
        network.mid_block1.mlp[0] = nn.Identity()
    assert_same_samples(ours, theirs)


@pytest.mark.parametrize("name", ["", "mid_block1", "ups.0.3"])
def test_weights_that_a_hook_further_up_renews(name):
    """Weights derived for sampling are not made where anything in the network may renew them."""

    def renew(module, args, kept={}):  # noqa: B006 (the weights as they were)
        with torch.no_grad():
            for p in module.parameters():
                p.data = 1.3 * kept.setdefault(p, p.data.clone())

    ours, theirs = networks()
    for network in (ours, theirs):
        network.float().get_submodule(name).register_forward_pre_hook(renew)
    assert_same_samples(ours, theirs)


def test_explain_names_blocks_that_call_their_modules():
    network, _ = networks()
    assert "calls its modules" not in explain(model=network)
    network.mid_block1.block1.proj.register_forward_hook(lambda *args: None)
    network.downs[0][2].norm.scale = 2.0
    network.ups[0][3][1] = Wrapper(network.ups[0][3][1])
    lines = explain(model=network).splitlines()
    assert "mid_block1 calls its modules one after another: block1.proj: it has hooks" in lines
    assert any(line.startswith("downs.0.2 calls its modules") and "settings" in line for line in lines)
    assert "ups.0.3 calls its modules one after another: 1: it is a Wrapper" in lines


def test_an_estimate_that_nobody_reads_is_refused():
    network = networks()[0]
    x, t = batch()
    with pytest.raises(ValueError, match="x_self_cond must be None, since this Unet has self_condition=False"):
        network(x, t, x)


@pytest.mark.parametrize("time", [5, 5.0, torch.tensor(5), torch.tensor([5]), torch.tensor([5.0])], ids=repr)
def test_one_timestep_for_all_images(time):
    network = networks()[0].float()
    x = batch()[0].float()
    expected = network(x, torch.tensor([5, 5]))
    torch.testing.assert_close(network(x, time), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(network(x, time), expected.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="time must be a tensor or a number, got str"):
        network(x, "5")


@pytest.mark.parametrize("name", ["downs.0.0.block1.proj", "downs.0.0.block2.norm", "downs.0.2.to_qkv"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_weight_that_was_never_loaded_is_named(name, grad):
    """A network made on torch.device("meta") and loaded in part gives no output of memory that nobody has written."""
    model = Unet(8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8)
    model.get_submodule(name).to("meta")
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError, NotImplementedError), match="meta"):
        model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]))
