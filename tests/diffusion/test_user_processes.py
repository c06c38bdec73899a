"""Whatever a user does to a process does here what it does upstream: methods, buffers, dtypes, devices, threads."""

from __future__ import annotations

import copy
import threading
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import ddpm_fast
from ddpm_fast import GaussianDiffusion, Unet, noise, use_backend

upstream = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
UNET = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 4}


def pair(**options) -> tuple[nn.Module, nn.Module]:
    """Our process and upstream's, with the same weights."""
    options = {"image_size": 8, "timesteps": 10, **options}
    torch.manual_seed(0)
    theirs = upstream.GaussianDiffusion(upstream.Unet(**UNET), **options)
    ours = GaussianDiffusion(Unet(**UNET), **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(seed: int = 1) -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def losses(diffusion: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of given noise and timesteps, and the gradients."""
    diffusion.zero_grad()
    loss = diffusion.p_losses(images() * 2 - 1, torch.tensor([0, 3, 7, 9]), noise=images(2) - 0.5)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in diffusion.parameters()]


def assert_same_loss(ours: nn.Module, theirs: nn.Module) -> None:
    found, expected = losses(ours), losses(theirs)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)


def replaced(cls, name, how, change):
    """A change of a method of both classes' objects: on the object, in a subclass, or in the class itself."""
    original = getattr(cls, name)

    def method(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return change(original(self, *args, **kwargs))

    return method


@pytest.mark.parametrize("how", ["object", "subclass", "patched class"])
@pytest.mark.parametrize("name", ["q_sample", "predict_v"])
def test_methods_of_training_are_called_once_per_loss(monkeypatch, name, how):
    both = pair()
    for diffusion, cls in zip(both, (GaussianDiffusion, upstream.GaussianDiffusion), strict=True):
        method = replaced(cls, name, how, lambda x: 1.5 * x + 0.1)
        if how == "object":
            setattr(diffusion, name, types.MethodType(method, diffusion))
        elif how == "subclass":
            diffusion.__class__ = type("Mine", (cls,), {name: method})
        else:
            monkeypatch.setattr(cls, name, method)
    assert_same_loss(*both)
    assert [diffusion.calls for diffusion in both] == [1, 1]
    for diffusion in both:  # with noise of their own
        diffusion(images())
        assert diffusion.calls == 2


WEIGHTS = {
    "in place": lambda diffusion: diffusion.loss_weight.mul_(torch.linspace(1, 3, 10)),
    "through .data": lambda diffusion: diffusion.loss_weight.data.mul_(2),
    "one entry": lambda diffusion: diffusion.loss_weight.__setitem__(3, 7.0),
    "another tensor": lambda diffusion: setattr(diffusion, "loss_weight", torch.linspace(1, 3, 10)),
    "registered again": lambda diffusion: diffusion.register_buffer("loss_weight", torch.linspace(1, 3, 10)),
}


@pytest.mark.parametrize("change", WEIGHTS)
def test_a_changed_loss_weight_reaches_the_loss(change):
    both = pair()
    for diffusion in both:
        WEIGHTS[change](diffusion)
    assert_same_loss(*both)
    torch.testing.assert_close(both[0].loss_weight, both[1].loss_weight)
    for way in (copy.deepcopy, lambda diffusion: diffusion.double().float(), lambda diffusion: diffusion.to("cpu")):
        again = [way(diffusion) for diffusion in both]
        for diffusion in again:
            diffusion.loss_weight.mul_(3)
        assert_same_loss(*again)


def test_a_loss_weight_of_another_length_is_named():
    diffusion = pair()[0]
    diffusion.loss_weight = torch.ones(9)
    with pytest.raises(ValueError, match=r"loss_weight must have shape \(10,\), got \(9,\)"):
        losses(diffusion)


def test_files_have_upstreams_loss_weight(tmp_path):
    ours, theirs = pair()
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict()) and state["loss_weight"].is_contiguous()
    torch.save(state, tmp_path / "state.pt")
    theirs.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other = GaussianDiffusion(Unet(**UNET), image_size=8, timesteps=10, min_snr_loss_weight=True)
    other.load_state_dict(theirs.state_dict())
    assert_same_loss(other, theirs)
    other.load_state_dict(theirs.state_dict(), assign=True)
    assert_same_loss(other, theirs)


def test_functional_call_with_other_buffers():
    ours, theirs = pair()
    args = (images() * 2 - 1, torch.tensor([0, 3, 7, 9]), images(2) - 0.5)
    found = []
    for diffusion in (ours, theirs):
        tensors = dict(diffusion.named_parameters()) | {"loss_weight": torch.linspace(1, 3, 10)}
        diffusion.forward = diffusion.p_losses
        found.append(torch.func.functional_call(diffusion, tensors, args))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_under_a_default_dtype_of_float64():
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = pair()
        x = images().double()
        torch.manual_seed(3)
        ours(x).backward()
        assert all(p.grad.dtype == torch.float64 for p in ours.parameters())
        args = (x * 2 - 1, torch.tensor([0, 3, 7, 9]), x.flip(0))
        torch.testing.assert_close(ours.p_losses(*args), theirs.p_losses(*args), rtol=1e-6, atol=1e-8)
        assert ours.sample(2, seed=1, progress=False).isfinite().all()
        assert ours.interpolate(x[:2], x[2:], seed=1, progress=False).isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_a_process_in_float64_samples(sampler):
    ours = pair()[0]
    ours.sampler = sampler
    expected = ours.sample(2, seed=1, progress=False)
    found = ours.double().sample(2, seed=1, progress=False)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)
    ours(images().double()).backward()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_made_on_another_device_and_materialised(device):
    ours, theirs = pair()
    with torch.device(device):
        made = GaussianDiffusion(Unet(**UNET), image_size=8, timesteps=10)
    if device == "meta":
        assert all(p.is_meta for p in made.parameters())
        made.to_empty(device="cpu")
    for name, buffer in ours.named_buffers():  # without a file, too
        torch.testing.assert_close(dict(made.named_buffers())[name], buffer, msg=name)
    made.load_state_dict(theirs.state_dict())
    assert_same_loss(made, theirs)
    assert torch.equal(made.sample(2, seed=1, progress=False), ours.sample(2, seed=1, progress=False))


class NoFloat64(TorchDispatchMode):
    """A device that refuses float64, as mps does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and tensor.ndim:  # numbers are
                raise TypeError("Cannot convert a tensor to float64, which the device does not have")
        return out


@pytest.mark.parametrize("way", ["sample", "loss", "interpolate"])
def test_a_device_without_float64(monkeypatch, way):
    """The noise is made on the host, which the stand-in is not while it makes it."""
    ours = pair()[0]
    ours.sample(1, progress=False)  # the sampler's table, float64 on the CPU, is made once
    expected = run(ours, way)
    made = noise._made

    def on_host(shape, seed, *rest):
        assert seed.device.type == "cpu"
        with _disable_current_modes():
            return made(shape, seed, *rest)

    flag = next(iter(ours._plans.values())).uses_x_start_previous  # of the table on the CPU
    monkeypatch.setattr(type(next(iter(ours._plans.values()))), "uses_x_start_previous", flag)
    monkeypatch.setattr(noise, "_made", on_host)
    monkeypatch.setattr(noise, "_WITHOUT_FLOAT64", ("cpu",))
    with use_backend("reference"), NoFloat64():
        found = run(ours, way)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def run(diffusion, way):
    torch.manual_seed(5)
    if way == "sample":
        return diffusion.sample(2, seed=1, progress=False, graph=False)
    if way == "interpolate":
        return diffusion.interpolate(images()[:2], images()[2:], seed=1, progress=False, graph=False)
    return diffusion(images(), offset_noise_strength=0.1).detach()


def test_threads_that_share_a_model_get_the_bits_that_each_gets_alone():
    """Samples, forward passes and samples of another length, in four threads, over and over."""
    ours = pair()[0].eval()
    x, t = images() * 2 - 1, torch.tensor([0, 3, 7, 9])

    def forward():
        with torch.no_grad():
            return ours.model(x, t)

    calls = {
        **{f"seed {seed}": lambda seed=seed: ours.sample(2, seed=seed, progress=False) for seed in range(2)},
        "forward": forward,
        "ddim": lambda: ours.ddim_sample((2, 3, 8, 8), seed=3, progress=False),
    }
    expected = {name: call() for name, call in calls.items()}
    errors = []

    def work(name):
        for _ in range(40):
            try:
                if not torch.equal(calls[name](), expected[name]):
                    errors.append(f"{name}: other bits")
            except Exception as error:
                errors.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def per_sample(diffusion, vmapped: bool):
    """Gradients of each image's loss, by vmap over grad or one after another."""
    weights = {name: p.detach() for name, p in diffusion.named_parameters()}
    x, t, noise = images() * 2 - 1, torch.tensor([0, 3, 7, 9]), images(2) - 0.5
    network = diffusion.model

    def loss(weights, x, t, noise):
        out = torch.func.functional_call(
            network, {name.removeprefix("model."): w for name, w in weights.items()}, (x[None], t[None])
        )
        return (out - noise[None]).square().mean()

    if vmapped:
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(weights, x, t, noise)
    rows = [torch.func.grad(loss)(weights, *parts) for parts in zip(x, t, noise, strict=True)]
    return {name: torch.stack([row[name] for row in rows]) for name in weights}


@pytest.mark.parametrize("vmapped", [False, True])
def test_gradients_of_each_image(vmapped):
    ours, theirs = pair()
    with use_backend("reference"):
        found = per_sample(ours, vmapped)
    expected = per_sample(theirs, False)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_other_transforms_of_torch_func():
    ours, theirs = (process.model.double() for process in pair())
    x, t = images().double(), torch.tensor([0.0, 3, 7, 9]).double()
    tangent = torch.ones_like(x)
    with use_backend("reference"):
        found = torch.func.jvp(lambda x: ours(x, t), (x,), (tangent,)), torch.func.vjp(lambda x: ours(x, t), x)[1](x)
    expected = torch.func.jvp(lambda x: theirs(x, t), (x,), (tangent,)), torch.func.vjp(lambda x: theirs(x, t), x)[1](x)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_second_derivatives_by_the_reference():
    ours, theirs = (process.model.double() for process in pair())
    t = torch.tensor([0.0, 3, 7, 9]).double()
    found = []
    for network, backend in ((ours, "reference"), (theirs, None)):
        x = images().double().requires_grad_()
        with use_backend(backend):
            (first,) = torch.autograd.grad(network(x, t).square().sum(), x, create_graph=True)
            first.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)
    x = images().requires_grad_()
    float_network = pair()[0].model
    with pytest.raises(RuntimeError, match="use_backend\\(.reference.\\) for second derivatives"):
        (first,) = torch.autograd.grad(float_network(x, t.long()).square().sum(), x, create_graph=True)
        first.square().sum().backward()


def test_dynamic_quantisation():
    ours, theirs = (process.model.eval() for process in pair())
    x, t = images(), torch.tensor([0, 3, 7, 9])
    found = []
    for network in (ours, theirs):
        quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear})
        with torch.no_grad():
            found.append(quantised(x, t))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_tracing(tmp_path):
    ours, theirs = (process.model.eval() for process in pair())
    x, t = images(), torch.tensor([0, 3, 7, 9])
    with use_backend("reference"), torch.no_grad():
        traced = torch.jit.trace(ours, (x, t), check_trace=False)
        traced.save(tmp_path / "traced.pt")
        loaded = torch.jit.load(tmp_path / "traced.pt")
        torch.testing.assert_close(loaded(x, t), theirs(x, t), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(loaded(x[:2], t[:2]), theirs(x[:2], t[:2]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["Unet1D", "GaussianDiffusion1D", "KarrasUnet", "Trainer1D"])
def test_names_of_upstream_that_are_not_here(name):
    package = pytest.importorskip("denoising_diffusion_pytorch")
    assert hasattr(package, name) and name not in dir(ddpm_fast)
    with pytest.raises(ImportError, match=f"ddpm_fast has no {name}.*from denoising_diffusion_pytorch import {name}"):
        exec(f"from ddpm_fast import {name}")
