"""Tapes: operators that a body called on the CPU, called again without Python."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ddpm_fast import GaussianDiffusion, Unet
from ddpm_fast.runtime import extension, recording

REASON = recording.TapeRecorder.why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def record(body):
    return recording.TapeRecorder(torch.device("cpu")).record(body, lambda: None)


def concatenate(x, w):
    return torch.cat([x, w[:2], x * 2])


def split(x, w):
    a, b = (x @ w).split([1, 3], dim=1)
    first, second = x.unbind(0)[0], x.unbind(0)[1]
    return a * b.sum() + first.outer(second).sum()


def views(x, w):
    y = x.clone()
    y[:, 1:].mul_(3).add_(w[0, 1:])
    return y.t().contiguous().reshape(-1)


def lookup(x, w):
    order = x[:, 0].argsort()
    return w[order, :][:, [2, 0]] + torch.arange(2)


def numbers(x, w):
    y = (x.half() + 1.5) / 2
    y *= 3
    return y - torch.tensor(0.25), 2**x, x.to(torch.int64) + True, (x > 0) * True, x * 2j


def several(x, w):
    values, indices = x.max(dim=1)
    return torch.var_mean(x, dim=0), values, indices


def options(x, w):
    return torch.nn.functional.layer_norm(x, (4,)), torch.full_like(x, 2.0, dtype=torch.float64), x.clamp(max=0.5)


def nothing_new(x, w):
    return x.to(torch.float32).contiguous().detach().relu_()


def sums(x, w):
    """Whose first addend nothing else reads, is read again, has a view, and has not the shape, type or layout."""
    y, z = x * 2, x * 3
    view = z.t()
    others = (x * 5) + w.t(), (x[0] * 6) + w, (x * 7).half() + w, (x * 8).t() + w
    return (x * 4) + w, (x * 9).add(w, alpha=-2), y + w, y, z + w, view, *others


BODIES = [concatenate, split, views, lookup, numbers, several, options, nothing_new, sums]


@pytest.mark.parametrize("make", BODIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_replay_does_what_the_call_does(make, mode):
    """Results land in tensors made before, as those of a sampling step do."""

    def flat(results):
        return [results] if isinstance(results, torch.Tensor) else [t for r in results for t in flat(r)]

    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 4, generator=generator), torch.randn(4, 4, generator=generator)
    calls = []
    with mode():
        out = flat(make(x.clone(), w))

        def body():
            calls.append(1)
            for to, result in zip(out, flat(make(x, w)), strict=True):
                to.copy_(result)

        replay = record(body)
        for turn in range(4):
            fresh = torch.randn(4, 4, generator=generator)
            expected = flat(make(fresh.clone(), w))
            x.copy_(fresh)
            replay()
            for got, want in zip(out, expected, strict=True):
                assert got.dtype == want.dtype and torch.equal(got, want), turn
    assert len(calls) == 1, "Python runs once"


def test_a_sum_is_made_where_its_addend_was():
    x, out = torch.randn(64, 64), torch.zeros(64, 64)
    replay = record(lambda: out.copy_((x * 2) + (x * 3)))
    replay()
    with torch.profiler.profile() as profile:
        replay()
    names = {event.name for event in profile.events()}
    assert "aten::add_" in names and "aten::add" not in names
    assert torch.equal(out, x * 2 + x * 3)


def test_random_numbers_are_drawn_anew():
    out = torch.zeros(8)
    replay = record(lambda: out.copy_(torch.randn(8)))
    torch.manual_seed(1)
    drawn = []
    for _ in range(3):
        replay()
        drawn.append(out.clone())
    torch.manual_seed(1)
    assert all(torch.equal(d, torch.randn(8)) for d in drawn)


def test_a_body_that_reads_a_value_is_refused():
    x, out = torch.tensor([2.0]), torch.zeros(1)

    def body():
        out.fill_(1.0 if x.item() > 1 else 0.0)

    replay = record(body)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="hands Python a value, which a replay would not look at"):
            replay()
    assert out.item() == 0


def test_errors_of_a_replay_surface_and_leave_the_tape_as_it_was():
    table, index, out = torch.arange(3.0), torch.tensor([1]), torch.zeros(1)
    replay = record(lambda: out.copy_(table.index_select(0, index)))
    replay()
    index.fill_(7)
    with pytest.raises(IndexError, match="out of range"):
        replay()
    index.fill_(2)
    replay()
    assert out.item() == 2


def test_autocast_is_that_of_the_recording():
    x, w, out = torch.randn(4, 4), torch.randn(4, 4), torch.zeros(4, 4)

    def body():
        out.copy_(x @ w)

    replay = record(body)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        replay()
    low = out.clone()
    assert not torch.equal(low, x @ w)
    out.zero_()
    replay()
    assert torch.equal(out, low)

    plain = record(body)
    plain()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.zero_()
        plain()
    assert torch.equal(out, x @ w)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_autocast_reaches_what_an_operator_is_made_of(mode):
    x, w, y = torch.randn(2, 3, 4, 4), torch.randn(3, 3), torch.empty(2, 3, 4, 4)

    def body():
        with recording.outside_inference_mode():
            y.copy_(torch.einsum("bchw,dc->bdhw", torch.relu(torch.nn.functional.conv2d(x, w[:, :, None, None])), w))

    with mode(), torch.autocast("cpu", torch.bfloat16):
        body()
        expected, replay = y.clone(), record(body)
        for _ in range(2):
            y.zero_()
            replay()
            assert torch.equal(y, expected)


def test_no_map_outlives_its_last_reader():
    """Neither the recording's, which would be a network's maps at once, nor a replay's."""
    x, out, seen = torch.ones(1000), torch.zeros(()), []

    def body():
        y = x * 2
        seen.append(StorageWeakRef(y.untyped_storage()))
        z = y + 1
        del y
        seen.append(seen[0].expired())
        out.copy_(z.sum())

    replay = record(body)
    replay()
    assert seen[1] is True
    replay()
    assert out.item() == 3000


def test_weights_are_read_anew():
    weight, out = torch.nn.Parameter(torch.ones(3)), torch.zeros(3)
    with torch.no_grad():
        replay = record(lambda: out.copy_(weight * 2))
        replay()
        weight.data.mul_(5)
        replay()
    assert out.tolist() == [10, 10, 10]


def test_a_backward_reads_what_its_forward_made():
    """autograd keeps an output, such as that of exp, as another tensor of its memory, for which no operator runs."""
    w, x = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0])), torch.tensor([1.0, 2.0, -0.5])
    out, loss = torch.zeros(3), torch.zeros(())

    def body():
        w.grad = None
        y = (x * w).exp()
        made = (y * torch.sigmoid(y) + w.tanh()).sum()
        made.backward()
        out.copy_(w.grad)
        loss.copy_(made.detach())
        w.grad = None

    replay = record(body)
    for turn in range(4):
        with torch.no_grad():
            w.add_(0.25)
            x.mul_(-1.5)
        replay()
        found = out.clone(), loss.clone()
        body()
        assert torch.equal(found[0], out) and torch.equal(found[1], loss), turn


def test_lists_are_taken_from_the_calls_that_made_them():
    x, outs = torch.arange(4.0), [torch.zeros(4) for _ in range(3)]

    def body():
        made = torch._foreach_add([x, x * 2, x + 1], 1.0)
        torch._foreach_mul_(made, [made[1], x, made[2] * 2])
        torch._foreach_copy_(outs, made)

    replay = record(body)
    for _ in range(3):
        x.add_(1)
        replay()
        found = [out.clone() for out in outs]
        body()
        assert all(torch.equal(a, b) for a, b in zip(found, outs, strict=True))


def test_a_view_without_an_operator_is_refused():
    """Held fast, it would be memory of the recording."""
    module = extension.load()
    tape, x = module.Tape(), torch.ones(4)
    y = x * 2
    tape.append("aten::mul", "Tensor", (x, 2), {}, y)
    tape.append("aten::neg", "", (y.detach(),), {}, -y)
    with pytest.raises(RuntimeError, match="aten::neg was given a view that no operator made"):
        tape.append("aten::neg", "", (y[1:],), {}, -y[1:])


def test_a_sampling_step_calls_few_operators():
    """About one per module; upstream's step has some 800 for this network."""
    diffusion = GaussianDiffusion(Unet(32, dim_mults=(1, 2, 4)), image_size=16, timesteps=3)
    tapes = []

    class Keeps(recording.TapeRecorder):
        def record(self, body, reset):
            tape = extension.load().Tape()
            tapes.append(tape)
            with recording._RecordingMode(tape), torch.no_grad():
                reset()
                body()
            return body

    diffusion.graphs = recording.GraphCache(recorder=Keeps)
    diffusion.sample(1, progress=False)
    assert 40 <= len(tapes[0]) <= 110, len(tapes[0])
