"""The class-conditional UNet equals upstream's: parameters, output, every gradient, guidance; its faults are mended."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from ddpm_fast import explain, inference_weights
from ddpm_fast.models import classifier_free_unet as ours_module
from ddpm_fast.models.classifier_free_unet import Residual, Unet
from ddpm_fast.testing.networks import assert_equal_networks, inputs, randomise, run
from ddpm_fast.testing.truth import assert_close_to_truth

theirs_module = pytest.importorskip("denoising_diffusion_pytorch.classifier_free_guidance")
CONFIG = dict(dim=8, num_classes=4, dim_mults=(1, 2))
T = 20

UNETS = {
    "plain": dict(dim=16, num_classes=5, dim_mults=(1, 2)),
    "four_stages": dict(dim=16, num_classes=10, dim_mults=(1, 2, 4, 8)),
    "one_stage": dict(dim=8, num_classes=1, dim_mults=(1,)),
    "init_and_out_dim": dict(dim=8, num_classes=3, init_dim=12, out_dim=5, dim_mults=(1, 3), channels=1),
    "learned_variance": dict(dim=8, num_classes=3, dim_mults=(1, 2), learned_variance=True),
    "learned_sinusoidal": dict(
        dim=8, num_classes=3, dim_mults=(1, 2), learned_sinusoidal_cond=True, learned_sinusoidal_dim=6
    ),
    "random_fourier": dict(dim=8, num_classes=3, dim_mults=(1, 2), random_fourier_features=True),
    "attention": dict(dim=24, num_classes=3, dim_mults=(1, 3), attn_heads=3, attn_dim_head=10),
}


def both(config=CONFIG):
    """Upstream's network and ours, with the same random weights."""
    torch.manual_seed(3)
    theirs, ours = theirs_module.Unet(**config), Unet(**config)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def batch(size=4, num_classes=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    t = torch.randint(0, T, (size,), generator=generator)
    return x, t, torch.randint(0, num_classes, (size,), generator=generator)


@pytest.mark.parametrize("name", UNETS)
def test_equals_upstream(name):
    config = UNETS[name]
    torch.manual_seed(3)
    theirs = theirs_module.Unet(**config)
    torch.manual_seed(3)
    ours = Unet(**config)
    for a, b in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1]), "one seed must give both the same initial weights"
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    factor = ours.downsample_factor
    classes = torch.arange(3) % config["num_classes"]
    keep = torch.tensor([True, False, True])
    assert_equal_networks(theirs, ours, config, (2 * factor, 3 * factor), classes=classes, cond_keep_mask=keep)


def test_signatures_are_upstream():
    for name in ("__init__", "forward"):
        theirs, ours = (inspect.signature(getattr(m.Unet, name)).parameters for m in (theirs_module, ours_module))
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize("name", UNETS)
def test_attributes_are_upstream(name):
    config = UNETS[name]
    theirs, ours = theirs_module.Unet(**config), Unet(**config)
    for attribute in ("channels", "out_dim", "random_or_learned_sinusoidal_cond", "cond_drop_prob"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    assert ours.num_classes == config["num_classes"]


@pytest.mark.parametrize("given", [{}, {"cond_drop_prob": 0.3}, {"cond_drop_prob": 0.0}, {"cond_drop_prob": 1.0}])
def test_drops_the_same_classes_at_random(given):
    theirs, ours = both()
    x, t, classes = batch(8)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        results.append((model(x, t, classes, **given), torch.rand(3)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[1][1], results[0][1]), "as many random numbers"
    with torch.no_grad():
        kept = ours(x, t, classes, 0.0)
    differs = (results[1][0] - kept).abs().amax(dim=(1, 2, 3)) > 1e-4
    expected = {None: 0 < differs.sum() < 8, 0.3: 0 < differs.sum() < 8, 0.0: not differs.any(), 1.0: differs.all()}
    assert expected[given.get("cond_drop_prob")]


GUIDANCE = {
    "plain": dict(cond_scale=3.0),
    "rescaled": dict(cond_scale=6.0, rescaled_phi=0.7),
    "parallel": dict(cond_scale=2.0, remove_parallel_component=False),
    "part of parallel": dict(cond_scale=2.0, keep_parallel_frac=0.3, rescaled_phi=0.2),
    "negative": dict(cond_scale=-1.0),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_guided_output_is_upstream(name):
    theirs, ours = both()
    x, t, classes = batch()
    with torch.no_grad():
        truth = (
            copy.deepcopy(theirs).double().forward_with_cond_scale(x.double(), t.double(), classes, **GUIDANCE[name])
        )
        expected = theirs.forward_with_cond_scale(x, t, classes, **GUIDANCE[name])
        actual = ours.forward_with_cond_scale(x, t, classes, **GUIDANCE[name])
    for out, reference, exact in zip(actual, expected, truth, strict=True):
        assert_close_to_truth(out, reference, exact, floor=32)


def test_guidance_runs_one_doubled_batch(monkeypatch):
    _, ours = both()
    sizes = []
    real = ours._call
    monkeypatch.setattr(ours, "_call", lambda maps, *rest: sizes.append(maps[0].shape[0]) or real(maps, *rest))
    with torch.no_grad():
        ours.forward_with_cond_scale(*batch(), cond_scale=3.0)
        one_time = ours.forward_with_cond_scale(batch()[0], 7, batch()[2], cond_scale=3.0)[0]
        times = ours.forward_with_cond_scale(batch()[0], torch.full((4,), 7), batch()[2], cond_scale=3.0)[0]
    assert sizes == [8] * 3
    torch.testing.assert_close(one_time, times, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_a_scale_of_1_is_the_output_with_classes(size):
    """Upstream returns one tensor there, which its callers unpack as two."""
    theirs, ours = both()
    x, t, classes = batch(size)
    with torch.no_grad():
        expected, null = theirs(x, t, classes, cond_drop_prob=0.0), theirs(x, t, classes, cond_drop_prob=1.0)
        diffusion = theirs_module.GaussianDiffusion(theirs, image_size=8, timesteps=T)
        if size == 2:
            wrong = diffusion.model_predictions(x, t, classes, cond_scale=1.0).pred_noise
            assert wrong.shape == x.shape[1:], "upstream takes one image for the whole batch"
        else:
            with pytest.raises(ValueError, match="too many values to unpack"):
                diffusion.model_predictions(x, t, classes, cond_scale=1.0)
        for scale in (1, 1.0):
            out, out_null = ours.forward_with_cond_scale(x, t, classes, cond_scale=scale)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out_null, null, rtol=1e-4, atol=1e-5)


def test_the_null_class_has_a_number():
    _, ours = both()
    x, t, classes = batch()
    with torch.no_grad():
        null = ours(x, t, classes, cond_drop_prob=1.0)
        assert torch.equal(ours(x, t, torch.full((4,), 4), cond_drop_prob=0.0), null)
        with pytest.raises(ValueError, match=r"classes must be in \[0, 4\], where 4 means no class; got 5"):
            ours(x, t, torch.tensor([0, 1, 5, 2]))
        with pytest.raises(ValueError, match="classes must be given, since this Unet has num_classes=4"):
            ours(x, t, None)


def test_tables_of_a_sampling_run(monkeypatch):
    _, ours = both()
    x, t, classes = batch()
    keep = torch.tensor([True, False, True, False])
    with torch.no_grad():
        expected = ours(x, t, classes, cond_keep_mask=keep)
        with inference_weights(ours, T):
            monkeypatch.setattr(ours.classes_mlp, "forward", None)  # whoever calls it fails
            monkeypatch.setattr(ours, "_embeds_as_built", lambda: True)
            torch.testing.assert_close(ours(x, t, classes, cond_keep_mask=keep), expected, rtol=1e-4, atol=1e-5)


def add(value):
    return lambda module, args, out: out + value


CHANGED = ("downs.0.0", "downs.0.2", "downs.0.2.fn", "downs.0.2.fn.norm", "downs.0.2.fn.fn", "downs.0.2.fn.fn.to_qkv")
CHANGED += (
    "downs.0.3",
    "mid_attn",
    "mid_attn.fn.fn",
    "mid_attn.fn.fn.to_out",
    "classes_emb",
    "classes_mlp.1",
    "ups.0.3",
)
CHANGED += ("downs.0.2.fn.fn.to_out.1", "final_res_block.mlp.1")


@pytest.mark.parametrize("name", CHANGED)
def test_hooks_do_what_they_do_upstream(name):
    theirs, ours = both()
    x, t, classes = batch()
    keep = torch.tensor([True, False, True, True])
    results = []
    for model in (theirs, ours):
        model.double()
        plain = model(x.double(), t.double(), classes, cond_keep_mask=keep)
        model.get_submodule(name).register_forward_hook(add(0.3))
        results.append(run(model, x, t.double(), classes=classes, cond_keep_mask=keep))
        assert not torch.allclose(results[-1][0], plain)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-7, atol=1e-9)
    for key, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][key], grad, rtol=1e-6, atol=1e-8)
    with torch.no_grad(), inference_weights(ours, T):
        inside = ours(x.double(), t, classes, cond_keep_mask=keep)
    torch.testing.assert_close(inside, results[1][0], rtol=1e-4, atol=1e-5)


def test_another_scale_of_attention_counts():
    theirs, ours = both()
    x, t, classes = batch()
    for model in (theirs, ours):
        model.mid_attn.fn.fn.scale = model.downs[0][2].fn.fn.scale = 0.7
    with torch.no_grad():
        expected = theirs(x, t, classes, cond_drop_prob=0.0)
        torch.testing.assert_close(ours(x, t, classes, cond_drop_prob=0.0), expected, rtol=1e-4, atol=1e-5)


def test_explain_names_what_was_changed():
    _, ours = both()
    assert "calls its modules" not in explain(model=ours)
    ours.downs[0][2].fn.norm.register_forward_hook(add(0.0))
    ours.mid_attn.fn = nn.Identity()
    lines = [line for line in explain(model=ours).splitlines() if "calls its modules" in line]
    assert lines == [
        "downs.0.2 calls its modules one after another: fn.norm: it has hooks",
        "mid_attn calls its modules one after another: a module inside has other settings than upstream's",
    ]
    assert isinstance(ours.downs[1][2], Residual)


def test_copies_pickles_and_config():
    _, ours = both()
    x, t, classes = batch()
    expected = ours(x, t, classes, 0.0)
    again = Unet(**ours.config)
    again.load_state_dict(ours.state_dict(), strict=True)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), again):
        assert torch.equal(other(x, t, classes, 0.0), expected)


def test_compiles_without_graph_breaks():
    _, ours = both({**CONFIG, "dim_mults": (1,)})
    x, t, classes = batch()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, classes, 0.0), ours(x, t, classes, 0.0))
    with torch.no_grad():
        guided = torch.compile(ours.forward_with_cond_scale, backend="eager", fullgraph=True)
        kwargs = dict(cond_scale=2.0, rescaled_phi=0.5)
        expected = ours.forward_with_cond_scale(x, t, classes, **kwargs)
        torch.testing.assert_close(guided(x, t, classes, **kwargs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    theirs, ours = both()
    x, t, classes = batch()
    with torch.autocast("cpu", dtype=dtype):
        out = ours(x, t, classes, 0.0)
        out.float().square().sum().backward()
        assert out.dtype == theirs(x, t, classes, 0.0).dtype
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ours.parameters())
    assert all(p.grad is not None for name, p in ours.named_parameters() if name != "null_classes_emb")
    assert (out.float() - ours(x, t, classes, 0.0)).abs().max() < 0.1 * out.abs().max()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_classes=0), "num_classes must be a positive integer; got 0"),
        (dict(cond_drop_prob=1.5), r"cond_drop_prob must be a number in \[0, 1\]; got 1.5"),
        (dict(dim_mults=()), "dim_mults must have at least one"),
        (dict(dim_mults=(0,)), "each entry of dim_mults must be a positive integer; got 0"),
        (dict(dim=-8), "^dim must be a positive integer; got -8"),
        (dict(init_dim=0), "init_dim must be a positive integer; got 0"),
        (dict(out_dim=0), "out_dim must be a positive integer; got 0"),
        (dict(channels=-1), "channels must be a positive integer; got -1"),
        (dict(attn_dim_head=0), "attn_dim_head must be a positive integer; got 0"),
        (dict(attn_heads=0), "attn_heads must be a positive integer; got 0"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Unet(**{**CONFIG, **kwargs})


def test_inputs_are_checked_as_the_native_network_does():
    _, ours = both()
    x, t, _ = inputs({}, (8, 8))
    with pytest.raises(ValueError, match=r"classes must have shape \(3,\), one class per image; got \(2,\)"):
        ours(x, t, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"cond_keep_mask must have shape \(3,\)"):
        ours(x, t, torch.tensor([1, 2, 0]), cond_keep_mask=torch.tensor([True]))
