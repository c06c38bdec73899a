"""Copies of the weights in autocast's dtype, made by one pass: the same results, and never a stale copy."""

from __future__ import annotations

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint

from ddpm_fast import Unet, use_backend
from ddpm_fast.models import classifier_free_unet, narrow_weights
from ddpm_fast.models.derived_weights import inference_weights
from ddpm_fast.testing.networks import randomise

T = 20
CONFIG = dict(dim=8, dim_mults=(1, 2))
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch, without_native):
    """Weights are copied at once on the CPU, too, and blocks are composed of their steps in plain torch."""
    monkeypatch.setattr(narrow_weights, "triton_launch", SimpleNamespace(why_not_triton=lambda device: None))


@pytest.fixture
def passes(monkeypatch):
    """For every pass over weights, how many it copied."""
    made, real = [], narrow_weights._copy

    def counted(groups, dtype):
        made.append(sum(map(len, groups)))
        return real(groups, dtype)

    monkeypatch.setattr(narrow_weights, "_copy", counted)
    return made


def network(**config):
    model = Unet(**{**CONFIG, **config})
    randomise(model)
    return model


def batch(model, size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, model.channels, size, size, generator=generator)
    condition = (torch.randn(2, model.channels, size, size, generator=generator),) if model.self_condition else ()
    return x, torch.tensor([4, 19]), *condition


def told(model):
    """The conditions of a batch, by name."""
    given = {}
    if model.num_classes is not None:
        given |= {"classes": torch.tensor([0, 1]), "cond_keep_mask": torch.tensor([True, False])}
    if model.cond_dim is not None:
        given["cond"] = torch.linspace(-1, 1, 2 * model.cond_dim).reshape(2, -1)
    if model.cond_channels:
        given["cond_image"] = torch.linspace(-1, 1, 128 * model.cond_channels).reshape(2, -1, 8, 8)
    return given


def train(model, at_once=True, call=None, dtype=BF16):
    """Output and gradients; with `at_once` False every module casts its own weights."""
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=dtype):
        if not at_once:
            patch.setattr(narrow_weights, "groups_of", lambda network, device: [])
        torch.manual_seed(1)
        out = (call or model)(*batch(model), **told(model))
        out.float().square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(results, expected):
    (out, grads), (out_expected, grads_expected) = results, expected
    assert torch.equal(out, out_expected)
    for name, grad in grads.items():
        assert (grad is None) == (grads_expected[name] is None), name
        assert grad is None or (grad.dtype is torch.float32 and torch.equal(grad, grads_expected[name])), name


CONFIGS = {
    "plain": {},
    "low memory": dict(memory="low"),
    "group norm": dict(norm="group", resnet_block_groups=4),
    "dropout": dict(dropout=0.3),
    "self-conditioned": dict(self_condition=True),
    "Fourier features": dict(learned_sinusoidal_cond=True, learned_sinusoidal_dim=6),
    "softmax attention": dict(full_attn=True),
    "conditions": dict(num_classes=3, cond_dim=4, cond_channels=2),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_equals_casts_one_by_one(config, dtype, passes):
    model = network(**CONFIGS[config])
    expected = train(model, at_once=False, dtype=dtype)
    assert passes == []
    results = train(model, dtype=dtype)
    assert len(passes) == 1 and passes[0] > 40
    assert_same(results, expected)


def test_every_weight_that_autocast_casts_is_in_the_pass():
    """Convolutions, and the layers of the time embedding; attention's kernels read float32."""
    model = network()
    seen = {id(w) for part in narrow_weights.groups_of(model, torch.device("cpu")) for group in part for w in group}
    left = {name for name, p in model.named_parameters() if id(p) not in seen}
    in_attention = {name for name in left if any(part in name for part in ("to_qkv", "to_out", "mem_kv"))}
    read_by_norms = {name for name in left if name.endswith((".g", "proj.bias"))}
    assert left == in_attention | read_by_norms and len(seen) > 40


def test_conditions_weights_are_in_the_pass_and_in_the_tables(passes):
    """But for the embeddings, which are looked up in float32."""
    model = network(num_classes=3, cond_dim=4)
    seen = {id(w) for part in narrow_weights.groups_of(model, torch.device("cpu")) for group in part for w in group}
    left = {name for name, p in model.named_parameters() if id(p) not in seen and ("class" in name or "cond" in name)}
    assert left == {"classes_emb.weight", "null_classes_emb", "null_cond"}
    expected, _ = train(model, at_once=False)
    out = sample(model, 3)
    assert len(passes) == 1
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


def test_the_class_conditional_network(passes):
    model = classifier_free_unet.Unet(8, 3, dim_mults=(1, 2))
    randomise(model)
    expected = train(model, at_once=False)
    assert passes == []
    results = train(model)
    assert len(passes) == 1 and passes[0] > 40
    assert_same(results, expected)
    seen = {id(w) for part in narrow_weights.groups_of(model, torch.device("cpu")) for group in part for w in group}
    assert id(model.mid_attn.fn.fn.to_out.weight) in seen and id(model.downs[0][3].weight) in seen


def test_gradients_lie_as_their_weights():
    """Else autograd would clone them."""
    model = network().to(memory_format=torch.channels_last)
    _, grads = train(model)
    for name, p in model.named_parameters():
        alike = zip(p.shape, p.stride(), grads[name].stride(), strict=True)
        assert all(size == 1 or one == other for size, one, other in alike), name


def test_frozen_weights_take_no_gradient():
    model = network()
    for name, p in model.named_parameters():
        p.requires_grad_("block1" in name)
    assert_same(train(model), train(model, at_once=False))
    model.requires_grad_(False)
    with torch.autocast("cpu", dtype=BF16):
        assert not model(*batch(model)).requires_grad


def test_without_autocast_nothing_is_copied(passes):
    model = network()
    model(*batch(model))
    model.double()(*(t.double() if t.is_floating_point() else t for t in batch(model)))
    with torch.autocast("cpu", dtype=BF16):
        model.bfloat16()(*(t.bfloat16() if t.is_floating_point() else t for t in batch(model)))
    assert passes in ([], [0])


def add_pre_hook_on_another(model):
    """A hook that renews the weight of a module that runs later."""
    weight = model.ups[0][0].block1.proj.weight

    def renew(*_) -> None:
        weight.data.mul_(0.5)

    model.mid_block1.register_forward_pre_hook(renew)


class Scaled(nn.Module):
    """A wrapper that changes what it wraps, as a low-rank adapter does."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.inner(x) * self.scale


def wrap(model):
    model.downs[0][0].block1.proj = Scaled(model.downs[0][0].block1.proj)


def patch_forward(model):
    conv = model.init_conv
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2


CHANGES = {
    "a hook that renews another's weight": add_pre_hook_on_another,
    "a weight norm": lambda model: weight_norm(model.mid_block1.block2.proj),
    "a wrapper": wrap,
    "a patched forward": patch_forward,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_where_a_weight_may_be_renewed_each_is_cast_when_it_is_read(change, passes):
    model = network()
    CHANGES[change](model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    results = train(model)
    assert passes == []
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    assert_same(results, train(model, at_once=False))


def test_a_parametrized_weight_is_computed_when_it_is_read(passes):
    """Its module is called; the weights of all others are copied at once."""
    model = network()
    parametrizations.orthogonal(model.mid_block1.block2.proj)
    parametrizations.orthogonal(model.downs[1][3])  # a module that casts its own weight
    results = train(model)
    assert len(passes) == 1
    assert_same(results, train(model, at_once=False))


def test_weights_that_changed_between_calls_count():
    model = network()
    first, _ = train(model)
    for p in model.parameters():
        p.data.mul_(1.2)
    second = train(model)
    assert not torch.equal(second[0], first)
    assert_same(second, train(model, at_once=False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_of_a_network(reentrant):
    model = network()

    def call(x, t):
        return checkpoint(model, x.requires_grad_(), t, use_reentrant=reentrant)

    assert_same(train(model, call=call), train(model, at_once=False))


def test_use_backend_reference_reads_the_parameters(passes):
    model = network()
    with use_backend("reference"):
        train(model)
    assert passes == []


def test_copies_can_be_differentiated_twice():
    weights = [torch.randn(3, 2, requires_grad=True), *(torch.randn(2, 3, requires_grad=True) for _ in range(2))]
    copies = narrow_weights.copies_of([(weights[0],), (weights[1], weights[2])], BF16)
    a, b = copies.values()
    assert b.shape == (4, 3)
    loss = (b.float() @ a.float()).pow(3).sum()
    first = torch.autograd.grad(loss, weights, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
    assert all(torch.isfinite(g).all() and g.any() and g.dtype is torch.float32 for g in second)


def test_gradients_of_shared_processes_arrive_by_part(passes, tmp_path):
    """So that their exchange overlaps with backward."""
    model = network()
    expected = train(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        passes.clear()
        results = train(model)
        assert len(passes) >= 8
        arrived, handles = [], []
        for name, p in model.named_parameters():
            handles.append(p.register_post_accumulate_grad_hook(lambda p, name=name: arrived.append(name)))
        assert_same(train(model), expected)
        assert arrived.index("ups.1.0.block2.proj.weight") < arrived.index("downs.1.2.norm.g")
        for handle in handles:
            handle.remove()
    finally:
        torch.distributed.destroy_process_group()
    assert_same(results, expected)


def test_threads_read_their_own_copies():
    models = [network(), network()]
    expected = [train(model, at_once=False)[0] for model in models]
    outs = [[], []]

    def run(i):
        with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
            for _ in range(5):
                outs[i].append(models[i](*batch(models[i])))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, out in zip(outs, expected, strict=True):
        assert len(found) == 5 and all(torch.equal(one, out) for one in found)
    assert not narrow_weights._read


def test_an_error_leaves_no_copies_behind():
    model = network()
    model.mid_block1.block1.proj.weight = nn.Parameter(torch.randn(16, 15, 3, 3))
    with torch.autocast("cpu", dtype=BF16), pytest.raises((RuntimeError, ValueError)):
        model(*batch(model))
    assert not narrow_weights._read


def test_compiles_whole(passes):
    model = network(dim_mults=(1,))
    expected = train(model, at_once=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(train(model, call=lambda *inputs: compiled(*inputs)), expected)
    assert passes == []


def sample(model, calls=1, num_timesteps=T):
    with torch.autocast("cpu", dtype=BF16, cache_enabled=False), inference_weights(model, num_timesteps):
        with torch.inference_mode():
            return [model(*batch(model), **told(model)) for _ in range(calls)][-1]


@pytest.mark.parametrize("num_timesteps", [T, None])
def test_inference_weights_are_copied_once_per_run(num_timesteps, passes):
    model = network()
    expected, _ = train(model, at_once=False)
    out = sample(model, 3, num_timesteps)
    assert len(passes) == 1
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    slots = {key: tensor.data_ptr() for key, tensor in model._slots.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.1)
    again = sample(model, 3, num_timesteps)
    assert len(passes) == 2 and not torch.equal(again, out)
    assert torch.equal(again, sample(copy.deepcopy(model), 1, num_timesteps))
    assert {key: tensor.data_ptr() for key, tensor in model._slots.items()} == slots, (
        "a captured graph reads them there"
    )


def test_inference_weights_of_another_autocast_are_not_read(passes):
    model = network()
    x, t = batch(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        narrow = model(x, t)
    with torch.no_grad():
        wide = model(x, t)
    passes.clear()
    with torch.no_grad(), inference_weights(model):
        torch.testing.assert_close(model(x, t), wide, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=BF16):
            torch.testing.assert_close(model(x, t), narrow, rtol=0.05, atol=0.05)
    assert len(passes) == 1
    assert (narrow - wide).abs().max() > 1e-3
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16), inference_weights(model):
        torch.testing.assert_close(model(x, t), narrow, rtol=0.05, atol=0.05)
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(model(x, t.float()), wide, rtol=1e-4, atol=1e-5)
