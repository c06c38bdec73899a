"""Branches of a network's maps, whose gradients Triton's kernels add.

Runs on the CPU in Triton's interpreter, else on CUDA; see ../conftest.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules import module as torch_module

from ddpm_fast import Unet
from ddpm_fast.models import stock
from ddpm_fast.ops import branches
from ddpm_fast.ops.norm_silu import operators as norm_silu
from ddpm_fast.ops.stem_conv import op as stem_conv
from ddpm_fast.runtime import triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.testing.truth import exact_convolutions

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"


@pytest.fixture
def given(monkeypatch) -> list[int]:
    """How many gradients each later backward of a map with branches is given."""
    found: list[int] = []

    def several(gradients):
        found.append(sum(gradient is not None for gradient in gradients))
        return branches.several(gradients)

    for op in (norm_silu, stem_conv):
        monkeypatch.setattr(op, "several", several)
    return found


def make(norm: str = "rms", dim_mults=(1, 2)) -> tuple[Unet, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = Unet(8, dim_mults=dim_mults, norm=norm, resnet_block_groups=4).to(DEVICE)
    x = torch.randn(2, 3, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return model, x, torch.tensor([3, 500], device=DEVICE)


def gradients(model: Unet, x: torch.Tensor, t: torch.Tensor, backend: str = "triton") -> dict[str, torch.Tensor]:
    model.zero_grad()
    with use_backend(backend), exact_convolutions():
        out = model(x, t)
        out.square().mean().backward()
    return {"out": out.detach(), **{name: weight.grad.clone() for name, weight in model.named_parameters()}}


@pytest.mark.arithmetic
@pytest.mark.release(but=lambda norm, _arithmetic=None: (norm == "rms") == (_arithmetic is None))
@pytest.mark.parametrize("norm", ["rms", "group"])
def test_a_network(norm, given):
    """A stage's first block is read by the next one's convolution and residual, and by a skip connection; the network's
    first convolution by the first block's, and by the last block."""
    model, x, t = make(norm)
    made = gradients(model, x, t)
    assert given.count(3) == 2 + 1 and set(given) == {1, 3}
    for name, expected in gradients(model, x, t, "reference").items():
        torch.testing.assert_close(made[name], expected, atol=1e-5, rtol=1e-3, msg=name)


def watch_output(module: torch.nn.Module, seen: list[torch.Tensor]):
    return module.register_forward_hook(lambda module, inputs, out: out.register_hook(seen.append) and None)


def watch_input(module: torch.nn.Module, seen: list[torch.Tensor]):
    return module.register_forward_pre_hook(lambda module, inputs: inputs[0].register_hook(seen.append) and None)


def watch_all(module: torch.nn.Module, seen: list[torch.Tensor]):
    return torch_module.register_module_forward_hook(
        lambda called, inputs, out: out.register_hook(seen.append) and None if called is module else None
    )


@pytest.mark.parametrize(
    "watch, name",
    [(watch_output, "downs.0.0"), (watch_input, "downs.0.1.block1.proj"), (watch_input, "downs.0.3"),
     (watch_output, "init_conv"), (watch_all, "downs.0.0")],
)  # fmt: skip
def test_a_hook_sees_the_whole_gradient_of_a_map(watch, name, given):
    model, x, t = make(dim_mults=(1,))
    seen: list[torch.Tensor] = []
    with watch(model.get_submodule(name), seen):
        gradients(model, x, t)
        gradients(model, x, t, "reference")
    triton, reference = seen
    torch.testing.assert_close(triton, reference, atol=1e-6, rtol=1e-3)
    assert set(given) <= {1}


def test_modules_that_show_their_maps_to_nobody():
    conv = torch.nn.Conv2d(1, 1, 1)
    inside = [torch.nn.ModuleList([torch.nn.Sequential(conv)])]
    assert stock.show_nobody(inside)
    for name in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        for register in (getattr(conv, f"register_{name}"), getattr(torch_module, f"register_module_{name}")):
            with register(lambda *_: None):
                assert not stock.show_nobody(inside), name
    assert stock.show_nobody(inside)
    assert not stock.show_nobody([type("Own", (torch.nn.Conv2d,), {"__module__": "own"})(1, 1, 1)])
    conv.forward = conv.forward
    assert not stock.show_nobody(inside)


def test_a_class_that_is_patched_shows_its_maps(monkeypatch):
    inside = [torch.nn.Conv2d(1, 1, 1)]
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: x)
    assert not stock.show_nobody(inside)


def test_threads_have_branches_of_their_own():
    with branches.branching():
        with branches.branching():
            pass
        assert branches.number_of_branches() == branches.MOST_BRANCHES
        with torch.no_grad():
            assert branches.number_of_branches() == 0
    assert branches.number_of_branches() == 0
