"""Inputs of another dtype than the weights, without autocast: an accelerated network does what the eager one does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import ddpm_fast
from ddpm_fast.integrations.accelerate import is_accelerated
from ddpm_fast.testing.accelerated import randomise_all
from ddpm_fast.testing.foreign_packages import small_diffusers_unet, small_edm_unet, small_openai_unet

upstream = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
with_classes = pytest.importorskip("denoising_diffusion_pytorch.classifier_free_guidance")
rectified_flow = pytest.importorskip("rectified_flow_pytorch.rectified_flow")
HALF = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 7])


# The network, and its call with images.
NETWORKS: dict[str, tuple[Any, Any]] = {
    "upstream": (lambda: upstream.Unet(8, dim_mults=(1, 2)), lambda n, x: n(x, T)),
    "upstream with classes": (
        lambda: with_classes.Unet(8, num_classes=4, dim_mults=(1, 2), cond_drop_prob=0.0),
        lambda n, x: n(x, T, torch.tensor([1, 3])),
    ),
    "rectified flow": (lambda: rectified_flow.Unet(8, dim_mults=(1, 2)), lambda n, x: n(x, T / 10)),
    "diffusers": (small_diffusers_unet, lambda n, x: n(x, T).sample),
    "diffusers, by name": (small_diffusers_unet, lambda n, x: n(sample=x, timestep=T).sample),
    "torchcfm": (small_openai_unet, lambda n, x: n(T / 10, x)),
    "SongUNet": (lambda: small_edm_unet("SongUNet"), lambda n, x: n(x, T / 10, None)),
    "DhariwalUNet": (lambda: small_edm_unet("DhariwalUNet"), lambda n, x: n(x, T / 10, None)),
}
ALL = pytest.mark.parametrize("name", NETWORKS)


def made(name: str) -> tuple[nn.Module, nn.Module, Any]:
    """An accelerated network, the eager one, and their call."""
    torch.manual_seed(0)
    make, call = NETWORKS[name]
    eager = randomise_all(make()).eval()
    return ddpm_fast.accelerate(copy.deepcopy(eager)), eager, call


def assert_the_same(ours: Any, eagers: Any, where: str) -> None:
    """Two functions raise the same, or return the same dtype and nearly the same numbers."""
    try:
        expected = eagers()
    except (RuntimeError, ValueError, TypeError) as error:
        with pytest.raises(type(error)) as found:
            ours()
        assert str(found.value) == str(error), where
        return
    found = ours()
    assert found.dtype is expected.dtype, where
    scale = expected.float().abs().max().clamp(min=1)
    assert (found.float() - expected.float()).abs().max() < 0.06 * scale, where


@HALF
@ALL
def test_networks(name, half):
    network, eager, call = made(name)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_the_same(lambda: call(network, X.to(half)), lambda: call(eager, X.to(half)), name)


@HALF
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("self_condition", [False, True])
def test_this_packages_network(half, backend, self_condition):
    """It raises what upstream's raises, in calls that are replayed, too; autocast and narrow weights work on."""
    torch.manual_seed(0)
    eager = randomise_all(upstream.Unet(8, dim_mults=(1, 2), self_condition=self_condition)).eval()
    network = ddpm_fast.Unet(8, dim_mults=(1, 2), self_condition=self_condition).eval()
    network.load_state_dict(eager.state_dict())
    with ddpm_fast.use_backend(backend):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for _ in range(4):
                    network(X, T)
                    for x in (X.to(half), X.double()):
                        assert_the_same(lambda x=x: network(x, T), lambda x=x: eager(x, T), f"{x.dtype}, {grad}")
                    with torch.autocast("cpu", dtype=half):
                        network(X, T)
                        network(X.to(half), T)
        narrow = copy.deepcopy(network).to(half)
        assert narrow(X.to(half), T).dtype is half
        with pytest.raises(RuntimeError, match=r"Input type \(float\)"):
            narrow(X, T)


@ALL
def test_calls_that_are_replayed(name):
    """After calls in float32 that are replayed, and again and again."""
    network, eager, call = made(name)
    with torch.no_grad():
        for _ in range(4):
            call(network, X)
        for _ in range(4):
            assert_the_same(lambda: call(network, X.bfloat16()), lambda: call(eager, X.bfloat16()), name)
        expected = call(eager, X)
        torch.testing.assert_close(call(network, X), expected, rtol=1e-3, atol=1e-3)


@HALF
@ALL
def test_each_block_alone(name, half):
    network, eager, call = made(name)
    calls: dict[str, tuple] = {}
    for path, module in eager.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, kwargs, path=path: calls.update({path: (args, kwargs)}), with_kwargs=True
        )
    with torch.no_grad():
        call(eager, X)
    for module in eager.modules():
        module._forward_pre_hooks.clear()
        module._forward_pre_hooks_with_kwargs.clear()

    def narrowed(value):
        return value.to(half) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    tried = 0
    for path, module in network.named_modules():
        if path in calls and path and is_accelerated(module):
            args, kwargs = calls[path]
            # The map alone, as code around a network hands it on, and all arguments.
            for narrow in ([narrowed(args[0]), *args[1:]] if args else None, [narrowed(arg) for arg in args]):
                if narrow is None:
                    continue
                own = eager.get_submodule(path)

                def run(which, narrow=narrow, kwargs=kwargs):
                    with torch.no_grad():
                        out = which(*narrow, **kwargs)
                    return out[0] if isinstance(out, tuple) else out

                assert_the_same(lambda run=run, m=module: run(m), lambda run=run, m=own: run(m), path)
                tried += 1
    assert tried
