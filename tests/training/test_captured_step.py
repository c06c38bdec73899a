"""capture_training_step against the loop that it replaces, on the CPU, also with a recorder in CUDA's place."""

from __future__ import annotations

import copy

import pytest
import torch
from ema_pytorch import EMA
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_fast import GaussianDiffusion, Unet, capture_training_step
from ddpm_fast.runtime import recording
from ddpm_fast.testing.adam_cases import move_weights
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training.captured_step import TrainingStep

# Tapes need the extension.
RECORDERS = [recording.EagerRecorder, FrozenRecorder]
RECORDERS += [recording.TapeRecorder] if recording.TapeRecorder.why_not(torch.device("cpu")) is None else []
needs_tapes = pytest.mark.skipif(len(RECORDERS) == 2, reason="tapes need the extension")
SHAPE = (3, 3, 4, 4)
RATE = 1e-2


def make(dropout: float = 0.1, self_condition: bool = False, **kwargs) -> GaussianDiffusion:
    torch.manual_seed(1)
    model = Unet(8, dim_mults=(1,), dropout=dropout, self_condition=self_condition, attn_heads=1, attn_dim_head=4)
    return GaussianDiffusion(model, image_size=4, timesteps=20, **kwargs)


def adam(diffusion, **kwargs):
    # A rate that is a tensor, since that is what a recording reads.
    rate = torch.tensor(RATE, dtype=torch.float64)
    return torch.optim.Adam(diffusion.parameters(), **{"lr": rate, "fused": True, "capturable": True, **kwargs})


def average(diffusion, **kwargs):
    return EMA(diffusion, **{"beta": 0.9, "update_every": 2, "update_after_step": 2, "use_foreach": True, **kwargs})


def step_of(recorder: type, diffusion, optimizer, shape=SHAPE, **kwargs):
    defaults = {"ema": None, "max_grad_norm": 1.0, "autocast": None, "any_module": False}
    return TrainingStep(diffusion, optimizer, shape, recorder=recorder, **{**defaults, **kwargs})


def images(steps: int) -> torch.Tensor:
    return torch.rand(steps, *SHAPE, generator=torch.Generator().manual_seed(2))


def plain_step(diffusion, optimizer, batch, ema=None, max_grad_norm=1.0, autocast=None):
    """A step as the trainer writes it."""
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = diffusion(batch)
    loss.backward()
    move_weights(optimizer, max_grad_norm)
    optimizer.zero_grad()
    if ema is not None:
        ema.update()
    return loss.detach()


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.01, "autocast": torch.bfloat16}, {"max_grad_norm": None}])
def test_every_step_equals_the_plain_loop(recorder, options):
    plain, ours = make(), make()
    plain_ema, our_ema = average(plain), average(ours)
    plain_adam = adam(plain)
    step = step_of(recorder, ours, adam(ours), ema=our_ema, **options)
    batches = images(12)
    for index, batch in enumerate(batches):
        torch.manual_seed(index)
        expected = plain_step(plain, plain_adam, batch, plain_ema, **options)
        torch.manual_seed(index)
        loss = step(batch)
        assert torch.equal(loss, expected) and loss.dtype == torch.float32 and not loss.requires_grad
        for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert torch.equal(a, b), (index, name)
        assert int(our_ema.step) == int(plain_ema.step) and bool(our_ema.initted)
        averages = zip(plain_ema.ema_model.named_parameters(), our_ema.ema_model.parameters(), strict=True)
        for (name, a), b in averages:
            assert torch.equal(a, b), (index, name)
    assert torch.isnan(step.grad_norm) if options.get("max_grad_norm", 0) is None else step.grad_norm > 0
    moved = [not torch.equal(a, b) for a, b in zip(ours.parameters(), our_ema.ema_model.parameters(), strict=True)]
    assert all(moved), "the average is past its beginning"


def test_without_a_recording():
    diffusion = make()
    optimizer = torch.optim.AdamW(diffusion.parameters(), RATE)
    step = capture_training_step(diffusion, optimizer, SHAPE, graph=False)
    assert not step.recorder.freezes_decisions
    assert step.explain_graphs() == "training runs step by step: graph=False was given"
    before = [p.detach().clone() for p in diffusion.parameters()]
    step(images(1)[0])
    assert not any(torch.equal(a, b) for a, b in zip(before, diffusion.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == RATE


class Copies(TorchDispatchMode):
    """The elements that clones in the block have."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.elements += args[0].numel() if func is torch.ops.aten.clone.default else 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_without_a_recording_copies_no_weights(accumulate):
    diffusion = make()
    weights = sum(p.numel() for p in diffusion.parameters())
    step = step_of(recording.EagerRecorder, diffusion, adam(diffusion), accumulate=accumulate)
    batches = images(accumulate)
    with Copies() as copies:
        for _ in range(3):  # Adam's moments are new in the second
            step(*batches)
    assert copies.elements < weights


@needs_tapes
def test_the_cpu_replays_a_tape(monkeypatch):
    """Python calls the network in the first two steps, whose bits are those of a number for a rate."""
    plain, ours = make(), make()
    steps = [
        capture_training_step(diffusion, torch.optim.AdamW(diffusion.parameters(), RATE), SHAPE, graph=graph)
        for diffusion, graph in ((plain, False), (ours, None))
    ]
    calls, forward = [], type(ours).forward
    monkeypatch.setattr(type(ours), "forward", lambda self, *a, **k: calls.append(self) or forward(self, *a, **k))
    for index, batch in enumerate(images(5)):
        losses = []
        for step in steps:
            torch.manual_seed(index)
            losses.append(step(batch))
        assert torch.equal(*losses) and torch.equal(steps[0].grad_norm, steps[1].grad_norm)
    assert sum(diffusion is ours for diffusion in calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    assert steps[1].explain_graphs() == "training replays a tape of operator calls"
    with pytest.raises(ValueError, match="img must be finite, got NaN or infinity in images .1. of the batch"):
        bad = images(1)[0]
        bad[1, 0, 0, 0] = float("nan")
        steps[1](bad)


class Reads(torch.nn.Conv2d):
    """Reads a value, which no tape accepts, once it is told to."""

    reads = False

    def forward(self, x):
        assert not self.reads or x.sum().item() != 12345
        return super().forward(x)


@needs_tapes
@pytest.mark.parametrize("hooked", [False, True])
def test_the_cpu_goes_on_step_by_step_where_it_cannot_record(hooked):
    """With the same numbers, from the step on that could not be recorded."""
    plain, ours = make(), make()
    steps = []
    for diffusion, graph in ((plain, False), (ours, None)):
        diffusion.model.final_conv.__class__ = Reads
        optimizer = torch.optim.Adam(diffusion.parameters(), RATE)
        steps.append(
            capture_training_step(diffusion, optimizer, SHAPE, graph=graph, any_module=True, ema=average(diffusion))
        )
        diffusion.model.final_conv.reads = not hooked
    seen = []
    for index, batch in enumerate(images(6)):
        if hooked and index == 4:
            ours.model.final_conv.register_forward_hook(lambda *args: seen.append(1))
        for step in steps:
            torch.manual_seed(index)
            step(batch)
    assert len(seen) == (2 if hooked else 0)
    reason = "final_conv has forward hooks" if hooked else "_local_scalar_dense hands Python a value"
    assert steps[1].explain_graphs().startswith("training runs step by step: ") and reason in steps[1].explain_graphs()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
    for one, other in zip(steps[0].ema.parameters(), steps[1].ema.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises((ValueError, recording.CaptureError), match="hook" if hooked else "hands Python a value"):
        insists = capture_training_step(ours, adam(ours), SHAPE, graph=True, any_module=True)
        for batch in images(2):
            insists(batch)


@needs_tapes
def test_an_optimizer_that_only_torch_can_step_is_not_recorded():
    """Its steps read values, and a call that stopped there would have moved weights."""
    ours = make()
    step = capture_training_step(ours, torch.optim.Adam(ours.parameters(), RATE, amsgrad=True), SHAPE)
    for batch in images(3):
        step(batch)
    reason = "torch moves the weights: the optimizer has amsgrad=True"
    assert step.explain_graphs() == f"training runs step by step: {reason}"


@needs_tapes
def test_rates_stay_what_the_user_set():
    """A number, which torch's own step takes, too, where it goes on for a recording."""
    plain, ours = make(), make()
    optimizers = [torch.optim.Adam(diffusion.parameters(), RATE, foreach=True) for diffusion in (plain, ours)]
    steps = [
        capture_training_step(diffusion, optimizer, SHAPE, graph=graph)
        for diffusion, optimizer, graph in zip((plain, ours), optimizers, (False, None), strict=True)
    ]
    for index, batch in enumerate(images(10)):
        for step, optimizer in zip(steps, optimizers, strict=True):
            (group,) = optimizer.param_groups
            if 2 <= index < 6:
                kept = group["lr"]
                group["lr"] = kept * 0.5
                assert kept == RATE * 0.5 ** (index - 2)
            if index == 6:
                group["params"] = group["params"][:-1]
                assert len(step._recordings) == 1
            if index == 8:
                optimizer.register_step_pre_hook(lambda *args: None)
            torch.manual_seed(index)
            step(batch)
            assert type(group["lr"]) is float
    assert "the optimizer has hooks on its step" in steps[1].explain_graphs()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


@needs_tapes
@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_anomaly_detection_sees_the_backward_of_a_step_that_was_recorded():
    diffusion = make()
    step = capture_training_step(diffusion, torch.optim.Adam(diffusion.parameters(), RATE), SHAPE)
    for batch in images(3):
        step(batch)
    with torch.no_grad():
        diffusion.model.final_conv.weight.fill_(float("nan"))
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError, match="returned nan values"):
        step(images(1)[0])
    assert step.explain_graphs().startswith("training runs step by step: anomaly detection")


@needs_tapes
def test_a_step_is_recorded_anew_under_another_default_dtype():
    """Operators that make a tensor without a dtype take it from there."""
    plain, ours = make(), make()
    steps = [
        capture_training_step(diffusion, torch.optim.Adam(diffusion.parameters(), RATE), SHAPE, graph=graph)
        for diffusion, graph in ((plain, False), (ours, None))
    ]
    try:
        for index, batch in enumerate(images(6)):
            torch.set_default_dtype(torch.float64 if index > 2 else torch.float32)
            for step in steps:
                torch.manual_seed(index)
                step(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert steps[1].explain_graphs() == "training replays a tape of operator calls"
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def test_self_conditioning_has_a_recording_for_each_side_of_the_coin():
    plain, ours = make(self_condition=True, dropout=0.0), make(self_condition=True, dropout=0.0)
    plain_adam = adam(plain)
    step = step_of(FrozenRecorder, ours, adam(ours))
    FrozenRecorder.recorded = 0
    sides = []
    for index, batch in enumerate(images(6)):
        torch.manual_seed(index)
        self_conditioned = (
            plain.draw_self_condition()
        )  # a recording draws it first; on CUDA the rest has another generator
        sides.append(self_conditioned)
        plain_adam.zero_grad()
        expected = plain(batch, self_conditioned=self_conditioned)
        expected.backward()
        move_weights(plain_adam, 1.0)
        torch.manual_seed(index)
        assert torch.equal(step(batch), expected.detach())
    assert set(sides) == {True, False} and FrozenRecorder.recorded == 2
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def test_what_is_replaced_is_recorded_anew_and_what_changes_in_place_is_not():
    ours, plain = make(), make()
    optimizer, plain_adam = adam(ours, lr=RATE), adam(plain)
    step = step_of(FrozenRecorder, ours, optimizer)
    FrozenRecorder.recorded = 0

    def check(recorded: int):
        torch.manual_seed(3)
        expected = plain_step(plain, plain_adam, images(1)[0])
        torch.manual_seed(3)
        assert torch.equal(step(images(1)[0]), expected)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))
        assert FrozenRecorder.recorded == recorded

    check(1)
    check(1)
    optimizer.param_groups[0]["lr"] = 0.5 * RATE
    plain_adam.param_groups[0]["lr"].fill_(0.5 * RATE)
    check(1)
    optimizer.param_groups[0]["lr"].fill_(2 * RATE)  # as torch's schedulers do with a rate that is a tensor
    plain_adam.param_groups[0]["lr"].fill_(2 * RATE)
    check(1)
    other = make(dropout=0.0)
    other.load_state_dict({k: v * 0.9 if k.startswith("model") else v for k, v in other.state_dict().items()})
    for diffusion in (ours, plain):
        diffusion.load_state_dict(other.state_dict())
    check(1)
    optimizer.load_state_dict(copy.deepcopy(plain_adam.state_dict()))
    check(2)
    for diffusion in (ours, plain):
        diffusion.model.final_conv.bias.data = torch.ones(3)
    check(3)
    for diffusion in (ours, plain):
        diffusion.eval()
    check(4)
    for group in (optimizer.param_groups[0], plain_adam.param_groups[0]):
        group["betas"] = (0.5, 0.9)
    check(5)
    step.clear()
    check(6)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_accumulated_a_parameter_without_gradient_is_left_alone(recorder):
    """Weight decay would change it, if its gradient were zeros instead of none."""
    plain, ours = make(), make()
    optimizers = []
    for diffusion in (plain, ours):
        diffusion.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        options = {"lr": torch.tensor(RATE), "fused": True, "capturable": True, "weight_decay": 0.1}
        optimizers.append(torch.optim.AdamW(diffusion.parameters(), **options))
    step = step_of(recorder, ours, optimizers[1], accumulate=2)
    for index in range(2):
        batches = images(2 * index + 2)[-2:]
        torch.manual_seed(index)
        for batch in batches:
            (plain(batch) / 2).backward()
        move_weights(optimizers[0], 1.0)
        optimizers[0].zero_grad()
        torch.manual_seed(index)
        step(*batches)
    assert torch.equal(ours.model.unused, torch.ones(3)) and ours.model.unused not in optimizers[1].state
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"update_model_with_ema_every": 3}, {"lazy_init_ema": True}, {"param_or_buffer_names_no_ema": {"betas"}}],
    ids=str,
)
def test_averages_that_write_more_than_their_own_copy(recorder, options):
    """From the first step on, or once the user says so."""
    plain, ours = make(), make()
    averages = [average(diffusion, update_every=1, update_after_step=0, **options) for diffusion in (plain, ours)]
    plain_adam, step = adam(plain), step_of(recorder, ours, adam(ours), ema=averages[1])
    for index, batch in enumerate(images(8)):
        if index == 4:
            for one in averages:
                one.update_model_with_ema_every = 2
        torch.manual_seed(index)
        plain_step(plain, plain_adam, batch, averages[0])
        torch.manual_seed(index)
        step(batch)
        for one, other in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
            assert torch.equal(one, other), index
    assert "not their average: it" in step.explain_optimizer()


@pytest.mark.parametrize("recorder", RECORDERS)
def test_accumulated_weights_are_frozen_and_trained_again_between_steps(recorder):
    """One that is frozen has no gradient, so that neither its moments nor weight decay move it."""
    plain, ours = make(), make()
    optimizers = []
    for diffusion in (plain, ours):
        options = {"lr": torch.tensor(RATE, dtype=torch.float64), "fused": True, "capturable": True}
        optimizers.append(torch.optim.AdamW(diffusion.parameters(), weight_decay=0.1, **options))
        diffusion.model.final_conv.requires_grad_(False)
    step = step_of(recorder, ours, optimizers[1], accumulate=2)
    for index in range(9):
        for diffusion in (plain, ours):
            if index == 3:
                diffusion.model.final_conv.requires_grad_(True)
                diffusion.model.init_conv.requires_grad_(False)
            if index == 6:
                diffusion.model.init_conv.weight = torch.nn.Parameter(diffusion.model.init_conv.weight.detach() * 0.5)
        batches = images(2 * index + 2)[-2:]
        torch.manual_seed(index)
        for batch in batches:
            (plain(batch) / 2).backward()
        move_weights(optimizers[0], 1.0)
        plain.zero_grad()
        torch.manual_seed(index)
        step(*batches)
        for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert torch.equal(a, b), (index, name)


def test_weights_are_known_to_have_changed():
    """A replay changes weights behind autograd's back; what was saved for a backward must not be used after it."""
    diffusion = make()
    ema = average(diffusion)
    step = step_of(FrozenRecorder, diffusion, adam(diffusion), ema=ema)
    weight, averaged = (d.model.final_conv.weight for d in (diffusion, ema.ema_model))
    before = weight._version, averaged._version
    step(images(1)[0])
    assert weight._version > before[0] and averaged._version > before[1]


def test_ignored_and_frozen_averages():
    diffusion = make()
    for options in ({"ignore_startswith_names": {"model.init_conv"}}, {"ignore_names": {"betas"}}, {"beta": 1.0}):
        theirs, ours = (average(diffusion, update_after_step=0, update_every=1, **options) for _ in range(2))
        step = step_of(FrozenRecorder, diffusion, adam(diffusion), ema=ours)
        for batch in images(3):
            step(batch)
            theirs.update()
        for a, b in zip(theirs.ema_model.state_dict().values(), ours.ema_model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


class OwnLoss(GaussianDiffusion):
    def p_losses(self, x_start, t, *args, **kwargs):
        return super().p_losses(x_start, t, *args, **kwargs)


@pytest.mark.parametrize("recorder", RECORDERS)
def test_conditions_are_read_anew_by_every_replay(recorder):
    """As a plain loop with the same seeds, for two kinds of batches: with a mask, and without."""
    network = {"num_classes": 4, "cond_dim": 2, "cond_channels": 1, "cond_drop_prob": 0.5}

    def process():
        torch.manual_seed(1)
        model = Unet(8, dim_mults=(1,), channels=SHAPE[1], attn_heads=1, attn_dim_head=4, **network)
        return GaussianDiffusion(model, image_size=SHAPE[2:], timesteps=20)

    ours, plain = process(), process()
    step = step_of(recorder, ours, adam(ours))
    optimizer = adam(plain)
    for number, batch in enumerate(images(6)):
        generator = torch.Generator().manual_seed(number)
        conditions = {
            "classes": torch.randint(0, 5, SHAPE[:1], generator=generator),
            "cond": torch.randn(SHAPE[0], 2, generator=generator),
            "cond_image": torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=generator),
        }
        if number % 2:
            conditions["cond_keep_mask"] = torch.rand(SHAPE[0], generator=generator) < 0.5
        torch.manual_seed(number)
        found = step((batch, None, conditions))
        torch.manual_seed(number)
        optimizer.zero_grad()
        loss = plain(batch, **conditions)
        loss.backward()
        move_weights(optimizer, 1.0)
        assert torch.equal(found, loss.detach())
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=r"classes must have one entry per image, \d+, got shape \(1,\)$"):
        step((batch, None, {"classes": torch.zeros(1, dtype=torch.int64)}))


def test_refusals():
    def check(error, sentence, diffusion=None, optimizer=None, recorder=FrozenRecorder, **kwargs):
        diffusion = diffusion or make()
        with pytest.raises(error, match=sentence):
            step_of(recorder, diffusion, optimizer or adam(diffusion), **kwargs)

    with pytest.raises(TypeError, match="diffusion must be a process or an XMWrapper around one, got Unet"):
        capture_training_step(make().model, None, SHAPE)
    diffusion = make()
    check(TypeError, "Adam or AdamW itself.*got SGD", diffusion, torch.optim.SGD(diffusion.parameters(), 0.1))
    diffusion = make()
    check(ValueError, "capturable=True, fused=True", diffusion, torch.optim.Adam(diffusion.parameters()))
    check(ValueError, "parameters of diffusion only", optimizer=adam(make()))
    check(ValueError, r"batch_shape must be \(B, 3, 4, 4\), got \(2, 3, 8, 8\)", shape=(2, 3, 8, 8))
    check(ValueError, "batch_shape", shape=(0, 3, 4, 4))
    check(ValueError, "gradient scaler", autocast=torch.float16)
    check(ValueError, "immiscible=True assigns.*graph=False runs it without one", make(immiscible=True))
    diffusion = make()
    diffusion.model.final_conv.register_forward_hook(lambda *args: None)
    check(ValueError, "final_conv has forward hooks", diffusion)
    diffusion = make()
    diffusion.model.final_conv.register_full_backward_hook(lambda *args: None)
    check(ValueError, "final_conv has backward hooks", diffusion)
    diffusion = make()
    diffusion.model.final_conv.weight.register_hook(lambda grad: grad)
    check(ValueError, "final_conv.weight has gradient hooks", diffusion)
    diffusion = make()
    optimizer = adam(diffusion)
    average(diffusion).add_to_optimizer_post_step_hook(optimizer)
    check(ValueError, "optimizer has hooks", diffusion, optimizer)
    diffusion = make()
    diffusion.__class__ = OwnLoss
    check(ValueError, "is a OwnLoss", diffusion)
    step_of(FrozenRecorder, diffusion, adam(diffusion), any_module=True)(images(1)[0])
    step_of(recording.EagerRecorder, diffusion, adam(diffusion))(images(1)[0])
    diffusion = make()
    check(ValueError, "of another model", ema=average(make()))
    step = step_of(FrozenRecorder, diffusion, adam(diffusion))
    with pytest.raises(ValueError, match=r"images must have shape \(3, 3, 4, 4\), got \(2, 3, 4, 4\)"):
        step(torch.rand(2, 3, 4, 4))
    with pytest.raises(TypeError, match="floating point in .0, 1. or uint8, got torch.int32"):
        step(torch.zeros(SHAPE, dtype=torch.int32))
    with pytest.raises(ValueError, match="a step takes 1 batches, accumulate=1; got 2"):
        step(torch.zeros(SHAPE), torch.zeros(SHAPE))
