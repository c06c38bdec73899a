"""Calls of a network without gradients, replayed from tapes: same bits, and no change is missed."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.fx
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast import GaussianDiffusion, Unet, explain, use_backend
from ddpm_fast.models import recorded_calls, unet_base
from ddpm_fast.models.derived_weights import inference_weights, kept_by_block
from ddpm_fast.models.recorded_calls import RecordedCalls
from ddpm_fast.runtime import extension
from ddpm_fast.runtime.snapshot import Snapshot

T = 20

pytestmark = pytest.mark.skipif(
    extension.why_not(torch.device("cpu")) is not None, reason="tapes are the extension's, which is not here"
)


@pytest.fixture
def runs(monkeypatch):
    """The calls of the network's Python, each as the number of images."""
    counted = []
    run = unet_base.UnetBase._run

    def counting(self, maps, time, given):
        counted.append(maps[0].shape[0])
        return run(self, maps, time, given)

    monkeypatch.setattr(unet_base.UnetBase, "_run", counting)
    return counted


def make(**options) -> Unet:
    torch.manual_seed(3)
    return Unet(8, dim_mults=(1, 2), **options).eval()


def batch(seed: int, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(T, (size,), generator=generator)


def outputs(model: Unet, record: bool, num_timesteps: int | None = T, **conditions) -> list[torch.Tensor]:
    with torch.no_grad(), inference_weights(model, num_timesteps, record=record):
        return [model(*batch(seed), **conditions) for seed in range(5)]


@pytest.mark.parametrize("num_timesteps", [T, None])
@pytest.mark.parametrize("autocast", [False, True])
def test_replays_give_the_same_bits(runs, num_timesteps, autocast):
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = outputs(model, False, num_timesteps)
        runs.clear()
        found = outputs(model, True, num_timesteps)
    assert runs == [2, 2], "one call as always, one that is recorded"
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_calls_outside_of_blocks_are_replayed_too(runs):
    model = make()
    expected = outputs(model, False, None)
    runs.clear()
    with torch.no_grad():
        for seed, out in enumerate(expected):
            assert torch.equal(model(*batch(seed)), out)
        assert runs == [2, 2]
        model.final_conv.weight.mul_(2)
        assert not torch.equal(model(*batch(0)), expected[0])
        model.final_conv.weight.div_(2)
        assert torch.equal(model(*batch(0)), expected[0])
    assert runs == [2, 2]
    assert "are replayed from a tape, from the third" in explain(model)
    model.mid_block1.register_forward_hook(lambda *_: None)
    assert "tape, not: the model's mid_block1 has forward hooks" in explain(model)
    model(*batch(0)).sum().backward()
    assert runs == [2, 2, 2] and model.final_conv.weight.grad is not None


def test_outputs_are_the_callers(runs):
    model = make()
    with torch.inference_mode(), inference_weights(model, T):
        first = [model(*batch(1)) for _ in range(4)]
        kept = first[-1].clone()
        first[-1].zero_()
        assert torch.equal(model(*batch(1)), kept) and first[-1].is_inference()


def test_conditions_are_read_by_every_replay(runs):
    model = make(num_classes=4, cond_dim=3, cond_channels=2)

    def asked(record):
        found = []
        with torch.no_grad(), inference_weights(model, T, record=record):
            for seed in range(5):
                torch.manual_seed(seed)
                conditions = {
                    "classes": torch.randint(5, (2,)), "cond": torch.randn(2, 3), "cond_image": torch.randn(2, 2, 8, 8),
                    "cond_keep_mask": torch.rand(2) > 0.5,
                }  # fmt: skip
                found.append(model(*batch(seed), **conditions))
            with pytest.raises(ValueError, match="classes must be in"):
                model(*batch(0), **{**conditions, "classes": torch.tensor([0, 5])})
        return found

    expected = asked(False)
    runs.clear()
    for a, b in zip(asked(True), expected, strict=True):
        assert torch.equal(a, b)
    assert runs == [2, 2]


def test_a_kind_of_call_has_its_own_tape(runs):
    model = make()
    with torch.no_grad(), inference_weights(model, T):
        for _ in range(3):
            for size in (1, 2, 3):
                expected = copy.deepcopy(model)(*batch(size, size))
                torch.testing.assert_close(model(*batch(size, size)), expected, rtol=1e-4, atol=1e-5)
            model(batch(2)[0].contiguous(memory_format=torch.channels_last), batch(2)[1])
        runs.clear()
        for size in (1, 2, 3):
            model(*batch(size, size))
        assert runs == []
        for size in (4, 5):  # more than are kept: the oldest goes
            model(*batch(size, size))
        model(*batch(1, 1))
        assert runs == [4, 5, 1]


def test_a_hook_a_module_and_a_setting_are_seen(runs):
    model = make()
    with torch.no_grad(), inference_weights(model, T):
        before = [model(*batch(0)) for _ in range(4)][-1]
        called = []
        handle = model.mid_block1.register_forward_hook(lambda *_: called.append(0))
        for _ in range(3):
            model(*batch(0))
        assert len(called) == 3
        handle.remove()
        model.final_conv = torch.nn.Conv2d(8, 3, 1)
        changed = [model(*batch(0)) for _ in range(4)]
        assert all(torch.equal(changed[0], other) for other in changed) and not torch.equal(changed[0], before)
        with use_backend("reference"):
            runs.clear()
            plain = model(*batch(0))
            assert runs == [2]
        torch.testing.assert_close(plain, changed[0], rtol=1e-4, atol=1e-5)


def test_dropout_draws_anew(runs):
    model = make(dropout=0.5).train()
    found = []
    for record in (False, True):
        torch.manual_seed(0)
        found.append(outputs(model, record))
    for plain, replayed in zip(*found, strict=True):
        assert torch.equal(plain, replayed)
    assert not torch.equal(*(model(*batch(0)) for _ in range(2)))


def test_what_watches_operators_sees_them(runs):
    model = make()
    x, t = batch(0)
    with torch.no_grad(), inference_weights(model, T):
        for _ in range(3):
            model(x, t)
        runs.clear()
        with FlopCounterMode(display=False) as counter:
            model(x, t)
        assert runs == [2] and counter.get_total_flops() > 0
    with inference_weights(model, T):
        for _ in range(4):
            model(x, t).sum().backward()
    assert runs == [2] * 5 and model.final_conv.weight.grad is not None


def test_a_sampler_without_recordings_calls_the_network(runs):
    diffusion = GaussianDiffusion(make(), image_size=8, timesteps=T, auto_normalize=False)
    diffusion.sample(2, seed=0, graph=False, progress=False, sampling_timesteps=6, sampler="ddim")
    assert len(runs) == 6


def test_threads_have_tapes_of_their_own():
    model, found = make(), {}
    expected = outputs(model, False)

    def work(name):
        found[name] = outputs(model, True)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(3):
        for a, b in zip(found[name], expected, strict=True):
            assert torch.equal(a, b)


def test_nothing_is_kept_after_the_block():
    model = make()
    with torch.no_grad(), inference_weights(model, T):
        for _ in range(3):
            model(*batch(0))
        assert kept_by_block()[model]._recorded
        assert copy.deepcopy(model) not in kept_by_block()
        with inference_weights(model, T, record=False):
            assert kept_by_block() is None
        assert model in kept_by_block()
    assert model not in kept_by_block()


def test_a_network_that_is_recorded_is_freed_with_its_last_name():
    model = make()
    gone = weakref.ref(model)
    gc.disable()
    try:
        with torch.no_grad(), inference_weights(None):
            calls, kept = RecordedCalls(model), [model]
            del model
            for seed in range(4):
                calls.call(lambda given: kept[0](*given), batch(seed))
            assert calls._recorded
            kept.clear()
            assert gone() is None
    finally:
        gc.enable()


def test_a_call_that_reads_a_value_is_made_as_always():
    model = make()
    calls, found = RecordedCalls(model), []

    def run(given):
        found.append(given[0].sum().item())
        return given[0] * found[-1]

    with torch.no_grad():
        for seed in range(4):
            x, t = batch(seed)
            assert torch.equal(calls.call(run, (x, t)), x * x.sum().item())
    assert "hands Python a value" in calls.reason


def test_a_network_that_always_changes_is_asked_less_and_less_often(monkeypatch):
    model, snapshots = make(), []
    monkeypatch.setattr(recorded_calls, "Snapshot", lambda network: snapshots.append(0) or Snapshot(network))
    calls = RecordedCalls(model)
    with torch.no_grad(), inference_weights(None, record=False):
        for i in range(100):
            model.note = object()
            calls.call(lambda given: model(*given), batch(i))
        assert len(snapshots) < 10
        for i in range(140):
            calls.call(lambda given: model(*given), batch(i))
        replays = calls._recorded[next(iter(calls._recorded))]
        assert replays._replay is not None and len(snapshots) < 12


def test_weights_that_were_put_in_for_a_call_are_not_kept():
    model = make()
    with torch.no_grad():
        for seed in range(4):
            model(*batch(seed))
        for _ in range(3):
            weights = {name: parameter * 1.1 for name, parameter in model.named_parameters()}
            gone = weakref.ref(weights["final_conv.weight"])
            expected = torch.func.functional_call(model, weights, batch(0))
            with inference_weights(None, record=False):
                assert torch.equal(torch.func.functional_call(model, weights, batch(0)), expected)
            del weights
            model(*batch(0))
            gc.collect()
            assert gone() is None


def test_a_traced_module_that_calls_python_is_called(runs):
    model, called = make(), []

    def counted(x):
        called.append(0)
        return x + len(called)

    graph = torch.fx.Graph()
    graph.output(graph.call_function(counted, (graph.placeholder("x"),)))
    model.mid_attn = torch.fx.GraphModule({}, graph)
    with torch.no_grad():
        found = [model(*batch(0)) for _ in range(5)]
    assert len(called) == 5 and len({out.sum().item() for out in found}) == 5
    assert "not: the model's mid_attn is a GraphModule" in explain(model)


def bytes_kept() -> int:
    """Bytes of all inputs and outputs that this thread keeps, by the tensors themselves."""
    calls = [call for recorded in kept_by_block().values() for call in recorded._recorded.values()]
    tensors = [tensor for call in calls for tensor in (*call._given, call._output) if tensor is not None]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_inputs_and_outputs_are_bounded_by_bytes(runs, monkeypatch):
    """Of networks outside all blocks: what was used last is kept, and a call with more is made as always."""
    of_two = 2 * 2 * 3 * 8 * 8 * 4 + 2 * 8  # images and output of two images, and their times
    monkeypatch.setattr(recorded_calls, "_MOST_BYTES", 4 * of_two)
    models = [make() for _ in range(3)]
    with torch.no_grad(), inference_weights(None):
        for model in models:
            for size in (2, 4, 1, 9, 3, 4, 9, 4, 9):
                expected = model(*batch(size, size))
                assert torch.equal(model(*batch(size, size)), expected)
                assert kept_by_block()[model].kept_bytes() <= 4 * of_two
        assert 0 < bytes_kept() == sum(calls.kept_bytes() for calls in kept_by_block().values()) <= 3 * 4 * of_two
        runs.clear()
        for _ in range(3):
            models[-1](*batch(1, 4))
            models[-1](*batch(1, 9))
        assert runs == [9, 9, 9], "four images are replayed, nine are more than is kept"


def test_the_bound_lets_the_shapes_of_small_networks_be_kept():
    """Eight images of 3 × 128 × 128 with their output; of all networks of a thread 64 MiB."""
    assert 2 * 8 * 3 * 128 * 128 * 4 <= recorded_calls._MOST_BYTES
    assert recorded_calls._MOST_BYTES * recorded_calls._MOST_NETWORKS <= 64 * 2**20
