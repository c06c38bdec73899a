"""Unet with classes, vectors and images: what a network is told, its tables when sampling, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddpm_fast import Unet, explain, inference_weights, use_backend
from ddpm_fast.models import conditions, unet_base
from ddpm_fast.runtime.recording import TapeRecorder
from ddpm_fast.testing.networks import randomise, run
from ddpm_fast.testing.truth import assert_close_to_truth

T = 20
N, D, C = 5, 3, 2
CLASSES, VECTORS, IMAGES = dict(num_classes=N), dict(cond_dim=D), dict(cond_channels=C)
KINDS = {
    "classes": CLASSES,
    "vectors": VECTORS,
    "images": IMAGES,
    "all": {**CLASSES, **VECTORS, **IMAGES},
    "all, conditioned on itself": {**CLASSES, **VECTORS, **IMAGES, "self_condition": True},
    "classes, group norm, little memory": {**CLASSES, "norm": "group", "resnet_block_groups": 2, "memory": "low"},
    "all, learned frequencies": {**CLASSES, **VECTORS, "learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 6},
}


def network(**config):
    torch.manual_seed(3)
    model = Unet(8, **{"dim_mults": (1, 2), **config})
    randomise(model)
    return model.eval()


def batch(model, size=4, masked=False):
    """x, t and the conditions of a network."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    t = torch.randint(0, T, (size,), generator=generator)
    given = {
        "classes": torch.arange(size) % (N + 1),
        "cond": torch.randn(size, D, generator=generator),
        "cond_image": torch.randn(size, C, 8, 8, generator=generator),
        "cond_keep_mask": torch.arange(size) % 2 == 0,
    }
    settings = {"classes": model.num_classes, "cond": model.cond_dim, "cond_image": model.cond_channels}
    settings["cond_keep_mask"] = masked and (model.num_classes or model.cond_dim)
    return x, t, {name: tensor for name, tensor in given.items() if settings[name]}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_equals_its_modules(name, masked):
    """One product of all embeddings and block ops, against the blocks that are called one by one in plain torch."""
    model = network(**KINDS[name])
    x, t, given = batch(model, masked=masked)
    x_self_cond = x.flip(0) if model.self_condition else None
    with use_backend("reference"):
        truth, truth_grads = run(copy.deepcopy(model).double(), x, t.double(), x_self_cond, **given)
        expected, expected_grads = run(copy.deepcopy(model), x, t, x_self_cond, **given)
    actual, grads = run(model, x, t, x_self_cond, **given)
    assert_close_to_truth(actual, expected, truth, floor=256)
    for key, grad in expected_grads.items():
        if grad is None:
            assert grads[key] is None and not masked and key == "null_cond"
        else:
            assert_close_to_truth(grads[key], grad, truth_grads[key], name=key, floor=256)


def test_blocks_read_the_embeddings_side_by_side():
    """cat(time, classes, vectors), each of one MLP, as upstream's class-conditional network has it."""
    model = network(**KINDS["all"])
    x, t, given = batch(model, masked=True)
    seen = []
    model.mid_block1.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, t, **given)
    keep = given["cond_keep_mask"][:, None]
    by_number = torch.cat((model.classes_emb.weight, model.null_classes_emb[None]))
    c = torch.where(keep, by_number[given["classes"]], model.null_classes_emb)
    v = torch.where(keep, given["cond"], model.null_cond)
    for name, x in (("classes_mlp", c), ("cond_mlp", v)):
        first, last = model.get_submodule(f"{name}.0"), model.get_submodule(f"{name}.2")
        expected = F.linear(F.gelu(F.linear(x, first.weight, first.bias)), last.weight, last.bias)
        place = 1 if name == "classes_mlp" else 2
        torch.testing.assert_close(seen[0].chunk(3, dim=1)[place], expected)
    torch.testing.assert_close(seen[0].chunk(3, dim=1)[0], model.time_mlp(t))


def test_images_are_channels_after_x():
    model = network(**IMAGES, self_condition=True)
    x, t, given = batch(model)
    seen = []
    model.init_conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x, t, x + 1, **given)
    assert torch.equal(seen[0], torch.cat((x + 1, x, given["cond_image"]), dim=1))


def test_without_its_columns_it_is_the_network_without_conditions():
    plain, model = network(), network(**KINDS["all"])
    state = model.state_dict()
    for name, weight in plain.state_dict().items():
        if state[name].shape == weight.shape:
            state[name].copy_(weight)
        else:
            state[name].zero_()
            state[name][:, : weight.shape[1]] = weight
    x, t, given = batch(model)
    torch.testing.assert_close(model(x, t, **given), plain(x, t), rtol=1e-4, atol=1e-5)


def test_no_class_by_number_or_by_mask():
    model = network(**CLASSES, **VECTORS)
    x, t, given = batch(model)
    with torch.no_grad():
        none = torch.zeros(4, dtype=torch.bool)
        by_mask = model(x, t, **given, cond_keep_mask=none)
        null = {"classes": torch.full((4,), N), "cond": model.null_cond.expand(4, -1)}
        assert torch.equal(model(x, t, **null), by_mask)
        assert not torch.allclose(model(x, t, **given), by_mask)
        assert torch.equal(model(x, t, **given, cond_keep_mask=~none), model(x, t, **given))


def test_a_network_drops_nothing_by_itself():
    model = network(**CLASSES, cond_drop_prob=1.0).train()
    x, t, given = batch(model)
    assert model.cond_drop_prob == 1
    assert torch.equal(model(x, t, **given), model(x, t, **given, cond_keep_mask=torch.ones(4, dtype=torch.bool)))


def test_gradients_reach_the_classes_of_the_batch_alone():
    model = network(**CLASSES)
    x, t, _ = batch(model)
    model(x, t, classes=torch.tensor([1, 1, 4, N])).square().mean().backward()
    assert (model.classes_emb.weight.grad.abs().sum(dim=1) > 0).tolist() == [False, True, False, False, True]
    assert model.null_classes_emb.grad.any()


TABLES = {
    "as it is": {},
    "without a table of classes": {"_MOST_CLASSES": N - 1},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("limit", TABLES)
@pytest.mark.parametrize("name", KINDS)
def test_tables_of_a_sampling_run(name, limit, masked, monkeypatch):
    for setting, value in TABLES[limit].items():
        monkeypatch.setattr(unet_base, setting, value)
    model = network(**KINDS[name])
    x, t, given = batch(model, masked=masked)
    with torch.no_grad():
        expected, at_3 = model(x, t, **given), model(x, 3, **given)
        of_float = model(x, t + 0.5, **given)
        by_time = model(x, torch.full((4,), 1.25), **given)
        with inference_weights(model, T):
            torch.testing.assert_close(model(x, t + 0.5, **given), of_float, rtol=1e-4, atol=1e-5)
            monkeypatch.setattr(model.time_mlp, "forward", None)  # whoever calls it fails
            monkeypatch.setattr(model, "_embeds_as_built", lambda: True)
            torch.testing.assert_close(model(x, t, **given), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(x, 3, **given), at_3, rtol=1e-4, atol=1e-5)
        monkeypatch.undo()
        with inference_weights(model, times=(0.5, 1.25)):  # a row of the table stands for its time
            torch.testing.assert_close(model(x, 1, **given), by_time, rtol=1e-4, atol=1e-5)


def test_classes_have_a_table_and_vectors_a_product(monkeypatch):
    model = network(**CLASSES, **VECTORS)
    x, t, given = batch(model)
    with torch.no_grad(), inference_weights(model, T):
        expected = model(x, t, **given)
        rows = sum(2 * block.dim_out for block in model._blocks())
        shapes = {name: tuple(tensor.shape) for name, tensor in model.built().items()}
        assert shapes == {"times": (T, rows), "classes": (N + 2, rows), "computed": (rows, 32)}
        monkeypatch.setattr(model.classes_mlp, "forward", None)
        monkeypatch.setattr(model, "_embeds_as_built", lambda: True)
        assert torch.equal(model(x, t, **given), expected)
        monkeypatch.setattr(model.cond_mlp, "forward", None)
        with pytest.raises(TypeError):
            model(x, t, **given)


def test_changed_weights_count_from_the_next_run_on():
    model = network(**CLASSES, **VECTORS)
    x, t, given = batch(model)

    def sampled():
        with torch.inference_mode(), inference_weights(model, T):
            return model(x, t, **given)

    before = sampled()
    places = [tensor.data_ptr() for tensor in model._slots.values()]
    with torch.no_grad():
        for p in (model.classes_emb.weight, model.cond_mlp[2].weight, model.classes_mlp[0].weight):
            p.data.mul_(1.5)
        expected = model(x, t, **given)
    torch.testing.assert_close(sampled(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, expected)
    assert [tensor.data_ptr() for tensor in model._slots.values()] == places, "a captured graph reads them there"


@pytest.mark.parametrize("limit", TABLES)
@pytest.mark.parametrize("wrong", [-1, -(2**62), N + 1, N + 2, 2**62])
def test_what_is_no_class_gives_nan_where_the_host_may_not_read(wrong, limit, monkeypatch):
    """As on CUDA: that image alone, with nothing read outside a table."""
    for setting, value in TABLES[limit].items():
        monkeypatch.setattr(unet_base, setting, value)
    model = network(**CLASSES)
    x, t, given = batch(model)
    with torch.no_grad():
        expected = model(x, t, **given)
    monkeypatch.setattr(conditions, "may_read", lambda tensor: False)
    given["classes"] = given["classes"].clone()
    given["classes"][2] = wrong
    with torch.no_grad():
        live = model(x, t, **given)
        with inference_weights(model, T):
            looked_up = model(x, t, **given)
    for out in (live, looked_up):
        assert out[2].isnan().all()
        others = torch.tensor([0, 1, 3])
        torch.testing.assert_close(out[others], expected[others], rtol=1e-4, atol=1e-5)


def test_a_hidden_class_may_be_any_number(monkeypatch):
    model = network(**CLASSES)
    x, t, given = batch(model)
    keep = torch.tensor([True, True, False, True])
    expected = model(x, t, **given, cond_keep_mask=keep)
    monkeypatch.setattr(conditions, "may_read", lambda tensor: False)
    given["classes"][2] = 77
    assert torch.equal(model(x, t, **given, cond_keep_mask=keep), expected)


def test_a_tape_reads_the_conditions_again():
    model = network(**KINDS["all"])
    x, t, given = batch(model, masked=True)
    out = torch.zeros_like(x)

    def body():
        out.copy_(model(x, t, **given))

    with torch.no_grad(), inference_weights(model, T):
        replay = TapeRecorder(x.device).record(body, lambda: None)
        replay()
        assert torch.equal(out, model(x, t, **given))
        given["classes"].copy_(torch.tensor([4, 3, 2, 1]))
        given["cond"].add_(1)
        given["cond_image"].mul_(0.5)
        given["cond_keep_mask"].logical_not_()
        before = out.clone()
        replay()
        assert torch.equal(out, model(x, t, **given)) and not torch.allclose(out, before)


@pytest.mark.release(but=lambda name: name == "all")
@pytest.mark.parametrize("name", KINDS)
def test_compiles_without_graph_breaks(name):
    """With one stage: networks of two compile in test_upstream.py."""
    model = network(dim_mults=(1,), **KINDS[name])
    x, t, given = batch(model, masked=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, **given), model(x, t, **given), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), inference_weights(model, T):
        torch.testing.assert_close(compiled(x, t, **given), model(x, t, **given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = network(**KINDS["all"]).train()
    x, t, given = batch(model, masked=True)
    exact = model(x, t, **given).detach()
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, t, **given)
        out.float().square().sum().backward()
        with torch.no_grad(), inference_weights(model, T):
            sampled = model(x, t, **given)
    assert out.dtype is sampled.dtype is dtype
    assert all(p.grad.dtype is torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())
    for half in (out, sampled):
        assert (half.float() - exact).norm() < 0.03 * exact.norm()


def test_weights_in_bfloat16():
    model = network(**KINDS["all"])
    x, t, given = batch(model, masked=True)
    exact = model(x, t, **given).detach()
    with torch.no_grad():
        half = model.bfloat16()(x.bfloat16(), t, **given)
    assert half.dtype is torch.bfloat16
    assert (half.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("place", ["classes_emb", "classes_mlp", "cond_mlp", "cond_mlp.1", "mid_block1", "time_mlp"])
def test_hooks_and_forwards_of_the_users_are_called(place):
    model = network(**KINDS["all"])
    x, t, given = batch(model, masked=True)
    plain = model(x, t, **given)
    model.get_submodule(place).register_forward_hook(lambda module, args, out: out * 1.5)
    hooked = model(x, t, **given)
    assert not torch.allclose(hooked, plain)
    with torch.no_grad(), inference_weights(model, T):
        torch.testing.assert_close(model(x, t, **given), hooked, rtol=1e-4, atol=1e-5)
    with use_backend("reference"):
        torch.testing.assert_close(model(x, t, **given), hooked, rtol=1e-4, atol=1e-4)


def test_a_block_that_a_user_changed_reads_the_conditions():
    model = network(**KINDS["all"])
    x, t, given = batch(model, masked=True)
    expected = model(x, t, **given)
    seen = []

    class Watched(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, *embeddings):
            seen.append([tuple(embedding.shape) for embedding in embeddings])
            return self.block(x, *embeddings)

    model.ups[0][0] = Watched(model.ups[0][0])
    torch.testing.assert_close(model(x, t, **given), expected, rtol=1e-4, atol=1e-5)
    assert seen == [[(4, 32)] * 3]
    model.mid_block1.mlp[1].register_forward_hook(lambda *_: None)
    assert "mid_block1 calls its modules one after another: mlp.1: it has hooks" in explain(model=model)


def test_an_embedding_that_renews_its_weight_has_no_table():
    model = network(**CLASSES)
    x, t, given = batch(model)
    model.classes_emb.max_norm = 0.5
    with torch.no_grad(), inference_weights(model, T):
        looked_up = model(x, t, **given)
        assert model.classes_emb.weight[given["classes"].clamp(max=N - 1)].norm(dim=1).max() < 0.51
    torch.testing.assert_close(looked_up, model(x, t, **given), rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_config():
    model = network(**KINDS["all, conditioned on itself"], cond_drop_prob=0.2)
    x, t, given = batch(model, masked=True)
    expected = model(x, t, **given)
    again = Unet(**model.config)
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.cond_drop_prob == 0.2
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        assert torch.equal(other(x, t, **given), expected)


def replica_of(model):
    """As DataParallel makes it: modules without parameters, whose tensors are attributes."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in copies.items():
        other._former_parameters = {}
        for name, child in module._modules.items():
            other._modules[name] = copies.get(child)
        for name, p in module._parameters.items():
            other._parameters.pop(name, None)
            setattr(other, name, None if p is None else p.detach().clone())
            other._former_parameters[name] = p
    return copies[model]


def test_replicas_of_data_parallel():
    model = network(**KINDS["all"])
    x, t, given = batch(model, masked=True)
    replica = replica_of(model)
    assert not list(replica.parameters())
    with torch.no_grad():
        torch.testing.assert_close(replica(x, t, **given), model(x, t, **given), rtol=1e-4, atol=1e-5)


ONES = dict(classes=torch.ones(4, dtype=torch.int64), cond=torch.ones(4, D), cond_image=torch.ones(4, C, 8, 8))
WRONG = {
    "no classes": ("all", dict(classes=None), ValueError, r"classes must be given, since this Unet has num_classes=5"),
    "no vectors": ("all", dict(cond=None), ValueError, "cond must be given, since this Unet has cond_dim=3"),
    "no images": ("all", dict(cond_image=None), ValueError, "cond_image must be given, since .* cond_channels=2"),
    "classes unknown": (
        "images",
        dict(classes=ONES["classes"]),
        ValueError,
        "classes must be None, since this Unet has",
    ),
    "vectors unknown": ("classes", dict(cond=ONES["cond"]), ValueError, "cond must be None, since .* has no cond_dim"),
    "images unknown": ("classes", dict(cond_image=ONES["cond_image"]), ValueError, "cond_image must be None, since"),
    "mask unknown": (
        "images",
        dict(cond_keep_mask=torch.ones(4) > 0),
        ValueError,
        "cond_keep_mask must be None, since",
    ),
    "classes no tensor": ("classes", dict(classes=[1, 2, 3, 4]), TypeError, "classes must be a tensor, got list"),
    "classes floating": ("classes", dict(classes=torch.ones(4)), TypeError, "classes must be int64, got torch.float32"),
    "classes too many": (
        "classes",
        dict(classes=ONES["classes"][:3]),
        ValueError,
        r"classes must have shape \(4,\), one",
    ),
    "classes too high": ("classes", dict(classes=torch.tensor([0, 1, 6, 7])), ValueError, r"in \[0, 5\], .*; got 7$"),
    "classes too low": ("classes", dict(classes=torch.tensor([0, -2, 6, 7])), ValueError, r"in \[0, 5\], .*; got -2$"),
    "classes elsewhere": ("classes", dict(classes=ONES["classes"].to("meta")), ValueError, "device cpu, got meta"),
    "vectors integer": ("all", dict(cond=torch.ones(4, D).long()), TypeError, "cond must be floating point, got"),
    "vectors short": ("all", dict(cond=torch.ones(4, 2)), ValueError, r"cond must have shape \(4, 3\), one vector"),
    "vectors elsewhere": ("all", dict(cond=ONES["cond"].to("meta")), ValueError, "cond must be on the Unet's device"),
    "images small": (
        "all",
        dict(cond_image=torch.ones(4, C, 4, 4)),
        ValueError,
        r"must have shape \(4, 2, 8, 8\), one",
    ),
    "images bytes": ("all", dict(cond_image=torch.ones(4, C, 8, 8).byte()), TypeError, "cond_image must be floating"),
    "mask floating": ("all", dict(cond_keep_mask=torch.ones(4)), TypeError, "cond_keep_mask must be bool, got"),
    "mask of one": (
        "all",
        dict(cond_keep_mask=torch.ones(1) > 0),
        ValueError,
        r"cond_keep_mask must have shape \(4,\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_conditions_are_named(name):
    kind, change, error, message = WRONG[name]
    model = network(**KINDS[kind])
    x, t, given = batch(model)
    with pytest.raises(error, match=message) as caught:
        model(x, t, **{**given, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_classes=0), "num_classes must be a positive integer; got 0"),
        (dict(cond_dim=2.5), "cond_dim must be a positive integer; got 2.5"),
        (dict(cond_channels=-1), "cond_channels must be a non-negative integer; got -1"),
        (dict(cond_drop_prob=-0.1), r"cond_drop_prob must be a number in \[0, 1\]; got -0.1"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Unet(8, **kwargs)
