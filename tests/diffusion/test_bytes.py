"""A training loss of bytes and flips has the bits of one of floats u/255 that were mirrored before."""

from __future__ import annotations

import copy
import types

import pytest
import torch

from ddpm_fast import GaussianDiffusion, Unet, use_backend
from ddpm_fast.diffusion import diffusion_process
from ddpm_fast.diffusion.schedules import OBJECTIVES

TIMES = torch.tensor([0, 3, 7, 9])
FLIP = torch.tensor([True, False, False, True])


def make(dim_mults: tuple[int, ...] = (1, 2), **options) -> GaussianDiffusion:
    torch.manual_seed(0)
    model = Unet(
        8, dim_mults=dim_mults, attn_heads=2, attn_dim_head=4, self_condition=options.pop("self_condition", False)
    )
    return GaussianDiffusion(model, **{"image_size": 16, "timesteps": 10, **options})


def all_bytes() -> torch.Tensor:
    """(4, 3, 16, 16) uint8: each of the 256 values at 12 places."""
    order = torch.randperm(4 * 3 * 256, generator=torch.Generator().manual_seed(1))
    return torch.arange(256, dtype=torch.uint8).repeat(12)[order].view(4, 3, 16, 16)


def as_floats(images: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    floats = images.to(torch.float32) / 255
    return floats if flip is None else torch.stack([x.flip(-1) if f else x for x, f in zip(floats, flip, strict=True)])


def loss_and_gradients(diffusion: GaussianDiffusion, images: torch.Tensor, **options) -> list[torch.Tensor]:
    diffusion.zero_grad()
    torch.manual_seed(5)
    loss = diffusion(images, times=TIMES, **options)
    loss.sum().backward()
    return [loss.detach(), *(p.grad.clone() for p in diffusion.parameters() if p.grad is not None)]


def assert_same_bits(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert len(ours) == len(theirs) > 10
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("flip", [None, FLIP, FLIP.byte()], ids=["kept", "bool", "uint8"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients(objective, backend, flip):
    diffusion = make(objective=objective, offset_noise_strength=0.1)
    with use_backend(backend):
        ours = loss_and_gradients(diffusion, all_bytes(), flip=flip)
        assert_same_bits(ours, loss_and_gradients(diffusion, as_floats(all_bytes(), flip)))
        assert_same_bits(ours, loss_and_gradients(diffusion, as_floats(all_bytes()), flip=flip))


@pytest.mark.parametrize(
    "options, call",
    [
        ({"auto_normalize": False}, {}),
        ({"immiscible": True}, {}),
        ({"self_condition": True}, {"self_conditioned": True}),
        ({}, {"noise": torch.rand(4, 3, 16, 16) - 0.5}),
        ({}, {"loss_reduction": "none"}),
    ],
    ids=["not normalised", "immiscible", "self-conditioned", "noise given", "per image"],
)
def test_options(options, call):
    diffusion = make(**options)
    ours = loss_and_gradients(diffusion, all_bytes(), flip=FLIP, **call)
    assert_same_bits(ours, loss_and_gradients(diffusion, as_floats(all_bytes(), FLIP), **call))


def test_channels_last_bytes():
    images = all_bytes().contiguous(memory_format=torch.channels_last)
    diffusion = make()
    floats = as_floats(images, FLIP).contiguous(memory_format=torch.channels_last)
    assert_same_bits(loss_and_gradients(diffusion, images, flip=FLIP), loss_and_gradients(diffusion, floats))


def test_bfloat16_networks():
    diffusion = make()
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(diffusion, all_bytes(), flip=FLIP)
        assert_same_bits(ours, loss_and_gradients(diffusion, as_floats(all_bytes(), FLIP)))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float32_images_have_the_bits_of_normalised_ones(objective, backend):
    diffusion = make(objective=objective, offset_noise_strength=0.1)
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with use_backend(backend):
        ours = loss_and_gradients(diffusion, images)
        diffusion.normalize, images = (lambda img: img), images * 2 - 1
        assert_same_bits(ours, loss_and_gradients(diffusion, images))


@pytest.mark.parametrize("is_wanted", [True, False])
def test_the_gradient_of_an_image(is_wanted):
    diffusion, images = make(), torch.rand(4, 3, 16, 16, requires_grad=is_wanted)
    torch.manual_seed(5)
    loss = diffusion(images, times=TIMES)
    if is_wanted:
        (gradient,) = torch.autograd.grad(loss, images)
        assert gradient.abs().sum() > 0
    torch.manual_seed(5)
    # Images that want a gradient take the reference, whose products round before they are added.
    rtol = 1e-6 if is_wanted else 0
    torch.testing.assert_close(diffusion(images.detach(), times=TIMES), loss, rtol=rtol, atol=0)


@pytest.mark.parametrize("images", [all_bytes(), as_floats(all_bytes())], ids=["bytes", "float32"])
def test_the_ops_read_the_images_themselves(images, monkeypatch):
    """No float copy of the images is made: both ops get the tensor that the caller gave."""
    seen = []
    for name in ("q_sample", "diffusion_loss"):
        op = getattr(diffusion_process, name)

        def record(*args, op=op, **options):
            seen.append((args[-4], options))
            return op(*args, **options)

        monkeypatch.setattr(diffusion_process, name, record)
    make()(images, flip=FLIP)
    assert len(seen) == 2
    for x_start, options in seen:
        assert x_start is images and options["flip"] is FLIP and options["normalize"] is True


@pytest.mark.parametrize("name", ["p_losses", "q_sample", "predict_v", "training_noise", "normalize"])
def test_methods_of_the_users_get_mirrored_floats(name):
    diffusion, seen = make(), []
    original = getattr(diffusion, name)

    def method(*args, **kwargs):
        seen.append(kwargs.get("x_start", args[0] if args else None))
        return original(*args, **kwargs)

    setattr(diffusion, name, method)
    ours = loss_and_gradients(diffusion, all_bytes(), flip=FLIP)
    expected = as_floats(all_bytes(), FLIP)
    assert torch.equal(seen[0], expected if name == "normalize" else expected * 2 - 1)
    assert_same_bits(ours, loss_and_gradients(diffusion, expected))


def test_who_takes_bytes():
    class Own(GaussianDiffusion):
        def forward(self, img, *args, **kwargs):
            return super().forward(img.clamp(0, 1), *args, **kwargs)

    diffusion = make()
    assert diffusion.takes_bytes
    assert not Own(diffusion.model, image_size=16).takes_bytes
    listened = copy.deepcopy(diffusion)
    listened.register_forward_pre_hook(lambda module, args: None)
    assert not listened.takes_bytes
    diffusion.forward = types.MethodType(GaussianDiffusion.forward, diffusion)
    assert not diffusion.takes_bytes


def test_compiles_without_graph_breaks():
    diffusion = make((1,))
    compiled = torch.compile(diffusion, fullgraph=True, backend="eager")
    torch.manual_seed(5)
    ours = compiled(all_bytes(), times=TIMES, flip=FLIP)
    torch.manual_seed(5)
    assert torch.equal(ours, diffusion(all_bytes(), times=TIMES, flip=FLIP))


@pytest.mark.parametrize(
    "flip, error, message",
    [
        (FLIP.long(), ValueError, r"flip must be bool or uint8 of shape \(4,\), one per image, got torch.int64 \(4,\)"),
        (FLIP[:2], ValueError, r"flip must be bool or uint8 of shape \(4,\), one per image, got torch.bool \(2,\)"),
        (FLIP.to("meta"), ValueError, "flip must be on the device of img, cpu, got meta"),
        ([True] * 4, TypeError, "flip must be a tensor, got list"),
    ],
)
def test_wrong_flips_are_named(flip, error, message):
    with pytest.raises(error, match=message):
        make()(all_bytes(), flip=flip)


def test_only_forward_takes_bytes():
    diffusion = make()
    with pytest.raises(TypeError, match="x_start must be floating point"):
        diffusion.p_losses(all_bytes(), TIMES)
    with pytest.raises(TypeError, match="x1 must be floating point"):
        diffusion.interpolate(all_bytes(), all_bytes())
