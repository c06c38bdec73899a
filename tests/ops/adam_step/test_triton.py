"""The kernels of adam_step against torch.optim in float64.

Runs on the CPU in Triton's interpreter, else on CUDA; see conftest.py.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from ema_pytorch import EMA

from ddpm_fast import GaussianDiffusion, Trainer
from ddpm_fast.ops.adam_step import triton as kernel
from ddpm_fast.ops.adam_step.op import AdamSettings, Tables, adam_step
from ddpm_fast.runtime import dispatch, triton_launch
from ddpm_fast.runtime.dispatch import use_backend
from ddpm_fast.runtime.recording import CudaRecorder, EagerRecorder
from ddpm_fast.testing.adam_cases import CASES, SHAPES, Model, assert_same_as_torch
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training.captured_step import TrainingStep
from ddpm_fast.training.optimizer_step import OptimizerStep

DEVICE = "cpu" if triton_launch.interpreted() else "cuda"
RECORDER = FrozenRecorder if DEVICE == "cpu" else CudaRecorder


@pytest.fixture(autouse=True)
def kernels_run():
    with use_backend("triton"):
        yield


@pytest.mark.release(
    but=lambda case, _arithmetic=None: _arithmetic is None or case in ("clipped", "average", "two groups")
)
@pytest.mark.arithmetic
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case):
    assert_same_as_torch(DEVICE, **CASES[case])


def test_sizes_cover_the_kernels_paths():
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    assert any(size > kernel.CHUNK for size in sizes) and any(0 < size % kernel.BLOCK < 4 for size in sizes)
    assert any(size == 0 for size in sizes) and any(size > kernel.CHUNK and size % kernel.BLOCK for size in sizes)


def run(model, tables=None, **options):
    return adam_step(*model.lists, [AdamSettings(len(model.params), 1e-2)], tables=tables, **options)


def test_the_same_bits_every_time():
    results = []
    for _ in range(2):
        model = Model(DEVICE)
        norm, _ = run(model, max_grad_norm=1.0)
        results.append([norm, *model.params, *model.exp_avgs, *model.exp_avg_sqs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_gradients_give_the_bits_of_their_float32(half):
    """Also with gradients that are one type at one step and another at the next, by the same tables."""
    results = []
    for widened in (False, True):
        model, tables, found = Model(DEVICE, half_grads=half), Tables(), []
        held = []
        for step in range(3):
            model.draw()
            model.grads = [g.float() if widened or step == 1 else g for g in model.grads]
            found.append(run(model, tables, max_grad_norm=0.5)[0])
            held.append(tables.held)
        assert all(layout is held[0] for layout in held)
        results.append([*found, *model.params, *model.exp_avgs, *model.exp_avg_sqs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_of_two_half_types_are_refused():
    model = Model(DEVICE, half_grads=torch.float16)
    model.grads[1] = model.grads[1].bfloat16()
    with pytest.raises(TypeError, match="one half type"):
        run(model)


def test_nothing_outside_a_tensor_is_touched():
    model = Model(DEVICE)
    guarded = []

    def place(tensor):
        memory = torch.full((tensor.numel() + 64,), float("nan"), device=DEVICE)
        guarded.append((memory, tensor.numel()))
        return memory[32 : 32 + tensor.numel()].view(tensor.shape).copy_(tensor)

    model.params, model.grads = [place(p) for p in model.params], [place(g) for g in model.grads]
    model.exp_avgs, model.exp_avg_sqs = [place(e) for e in model.exp_avgs], [place(e) for e in model.exp_avg_sqs]
    norm, _ = run(model, max_grad_norm=1.0, averages=[place(p) for p in model.params])
    assert torch.isfinite(norm)
    for memory, size in guarded:
        assert memory[:32].isnan().all() and memory[32 + size :].isnan().all()
        assert memory[32 : 32 + size].isfinite().all()


def test_tables_are_made_again_when_tensors_move():
    model, tables = Model(DEVICE), Tables()
    expected = Model(DEVICE)
    run(model, tables)
    first = tables.held
    model.draw()
    run(model, tables)
    assert tables.held is first, "gradients have addresses of their own"
    model.params = [p.clone() for p in model.params]
    model.draw()
    run(model, tables)
    assert tables.held is not first
    for _ in range(3):
        run(expected)
        expected.draw()
    assert all(torch.equal(a, b) for a, b in zip(model.params, expected.params, strict=True))


def test_a_gradient_that_is_not_finite_without_a_scale_is_torchs_own_matter():
    """As in torch: weights become NaN, and nothing is skipped."""
    model = Model(DEVICE)
    model.grads[3][5] = float("nan")
    norm, skipped = run(model, max_grad_norm=1.0)
    assert norm.isnan() and skipped == 0 and all(p.isnan().all() for p in model.params)


def test_bias_correction_near_and_far():
    """1 − β^t to float32's accuracy for every t: a first step would lose four digits otherwise."""
    for first_step in (0, 100, 249, 10**4):
        assert_same_as_torch(DEVICE, first_step=first_step, betas=(0.999, 0.9999))


def test_moments_in_another_layout_are_refused():
    model = Model(DEVICE)
    model.exp_avgs[2] = model.exp_avgs[2].contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="strides"):
        run(model)


def test_the_kernels_run():
    with use_backend(None), dispatch.watch_choices() as choices:
        run(Model(DEVICE))
    assert [(op, backend) for op, backend, _ in choices] == [("adam_step", "triton")]


class Tiny(torch.nn.Module):
    """A network of two convolutions."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Conv2d(5, 3, 1)

    def forward(self, x, t, x_self_cond=None):
        return self.last(self.first(x) * t[:, None, None, None].cos())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_step_by_the_kernels(scaled):
    """Recorded and not the same bits, and the weights of torch's clipping and Adam."""
    results = []
    for recorder, by_torch in ((RECORDER, False), (EagerRecorder, False), (EagerRecorder, True)):
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(Tiny(), image_size=4, timesteps=10).to(DEVICE)
        optimizer = torch.optim.Adam(
            diffusion.parameters(), torch.tensor(1e-2, device=DEVICE), fused=True, capturable=True
        )
        scaler = torch.amp.GradScaler(torch.device(DEVICE).type, init_scale=2.0**10) if scaled else None
        step = TrainingStep(
            diffusion, optimizer, (2, 3, 4, 4), recorder=recorder, scaler=scaler, max_grad_norm=0.5, any_module=True
        )
        assert step._optimizer_step.why_not() == "there is no gradient"
        with pytest.MonkeyPatch.context() as patch:
            if by_torch:
                patch.setattr(OptimizerStep, "why_not", lambda step, *gradients: "not asked")
            for index in range(2):
                torch.manual_seed(index)
                loss = step(torch.rand(2, 3, 4, 4).to(DEVICE))
        results.append([loss, step.grad_norm, *(p.detach() for p in diffusion.parameters())])
    recorded, eager, torchs = results
    assert all(torch.equal(a, b) for a, b in zip(recorded, eager, strict=True))
    for ours, theirs in zip(eager, torchs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


AVERAGES = {
    "every step": dict(update_every=1, update_after_step=-1, beta=0.9),
    "warming up": dict(update_every=2, update_after_step=2, inv_gamma=2.0, power=0.75, min_value=0.1, beta=0.5),
    "ignored": dict(update_every=1, update_after_step=1, ignore_names={"model.first.weight"}),
    "frozen": dict(update_every=1, update_after_step=1, beta=1.0),
}


def averaged_run(options, recorder, by_the_package=False, steps=7):
    """A TrainingStep with an average after a few steps, and the diffusion."""
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Tiny(), image_size=4, timesteps=10).to(DEVICE)
    ema = EMA(diffusion, use_foreach=True, **options)
    if by_the_package:
        ema.update = lambda: EMA.update(ema)
    rate = torch.tensor(1e-2, device=DEVICE)
    optimizer = torch.optim.Adam(diffusion.parameters(), rate, fused=True, capturable=True)
    step = TrainingStep(diffusion, optimizer, (2, 3, 4, 4), recorder=recorder, ema=ema, any_module=True)
    assert "no step" in step.explain_optimizer()
    for index in range(steps):
        torch.manual_seed(index)
        step(torch.rand(2, 3, 4, 4).to(DEVICE))
    return step, diffusion


@pytest.mark.release(but=lambda name: name == "warming up")
@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_moves_in_the_same_pass(name):
    """Recorded and not the same bits, and the average of ema_pytorch's own update; its state dict is the same."""
    recorded, eager = (averaged_run(AVERAGES[name], recorder)[0] for recorder in (RECORDER, EagerRecorder))
    package, _ = averaged_run(AVERAGES[name], RECORDER, by_the_package=True)
    states = [step.ema.state_dict() for step in (recorded, eager, package)]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for key in states[0]:
        assert torch.equal(states[0][key], states[1][key]), key
        torch.testing.assert_close(states[0][key], states[2][key], rtol=2e-6, atol=2e-7, msg=key)
    assert recorded.explain_optimizer() == "one pass clips gradients and moves weights and their average"
    assert "not their average: it is a EMA with its own update" in package.explain_optimizer()
    both = zip(eager.ema.model.parameters(), eager.ema.ema_model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in both)


def test_what_is_served_is_not_moved_again(monkeypatch):
    """Only buffers are left to torch's operators."""
    seen = []
    lerp = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda to, *rest: (seen.extend(to), lerp(to, *rest)))
    step, diffusion = averaged_run(AVERAGES["every step"], EagerRecorder)
    assert seen and len(diffusion._buffers) >= len({t.data_ptr() for t in seen})
    parameters = {p.data_ptr() for p in step.ema.ema_model.parameters()}
    assert not parameters & {t.data_ptr() for t in seen}


def test_a_replaced_average_is_recorded_anew():
    step, diffusion = averaged_run(AVERAGES["every step"], RECORDER, steps=3)
    other, plain = averaged_run(AVERAGES["every step"], EagerRecorder, steps=3)
    for one in (step, other):
        weight = torch.full_like(one.ema.ema_model.model.first.weight, 2.0)
        one.ema.ema_model.model.first.weight = torch.nn.Parameter(weight, requires_grad=False)
    for index in range(2):
        for one in (step, other):
            torch.manual_seed(index)
            one(torch.rand(2, 3, 4, 4).to(DEVICE))
    averages = [one.ema.ema_model.model.first.weight for one in (step, other)]
    assert torch.equal(*averages) and averages[0].max() < 2


def test_averages_and_copies_of_some():
    """A parameter without an average, or without a copy, beside others that have one."""
    model = Model(DEVICE)
    averages = [None if i % 2 else torch.randn_like(p) for i, p in enumerate(model.params)]
    copies = [torch.zeros_like(p, dtype=torch.float16) if i % 2 else None for i, p in enumerate(model.params)]
    given = [None if a is None else a.clone() for a in averages]
    weight = torch.tensor(0.3, device=DEVICE)
    run(model, averages=averages, average_weight=weight, copies=copies)
    for p, average, before, copy in zip(model.params, averages, given, copies, strict=True):
        if average is None:
            assert torch.equal(copy, p.half())
        else:
            torch.testing.assert_close(average, before.lerp(p, 0.3))


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(index))


class Recorded(Trainer):
    _recorder = RECORDER


@pytest.mark.filterwarnings("ignore:only .* images:UserWarning", "ignore:the effective batch:UserWarning")
def test_a_trainer_goes_on_from_its_file(tmp_path):
    """Recorded, step by step, and in two parts: the same bits of weights, moments and average."""

    def trainer(folder, steps, **options):
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(Tiny(), image_size=4, timesteps=10)
        made = Recorded(
            diffusion, Images(), results_folder=tmp_path / folder, train_batch_size=2, train_num_steps=steps,
            ema_update_every=2, num_workers=0, calculate_fid=False, progress=False, seed=3, amp=False, **options,
        )  # fmt: skip
        made.ema.update_after_step = 2
        made.opt.param_groups[0]["lr"] = torch.tensor(made.opt.param_groups[0]["lr"], device=DEVICE)
        return made

    runs = [trainer("recorded", 6, graph=True), trainer("eager", 6, graph=False)]
    trainer("parts", 4, graph=True).train()
    runs.append(trainer("parts", 6, graph=True))
    runs[-1].load("last")
    for made in runs:
        made.train()
        assert made.explain_optimizer() == "one pass clips gradients and moves weights and their average"
    files = [torch.load(made.results_folder / "model-last.pt", weights_only=True) for made in runs]
    for part in ("model", "ema"):
        for key, value in files[0][part].items():
            assert all(torch.equal(value, file[part][key]) for file in files[1:]), key
    for number, state in files[0]["opt"]["state"].items():
        for name, value in state.items():
            assert all(torch.equal(value, file["opt"]["state"][number][name]) for file in files[1:]), name


def contents(layout):
    return [tensor.clone() for tensor in (layout.addresses, layout.chunks, layout.numbers)]


def test_a_graph_keeps_the_tables_of_its_capture(monkeypatch):
    """Between its replays other parameters have gradients, as of a network with and without a condition."""
    model, tables = Model(DEVICE), Tables()

    def step(count, is_captured=False):
        monkeypatch.setattr(triton_launch, "is_captured", lambda device: is_captured)
        adam_step(*[list(tensors[:count]) for tensors in model.lists], [AdamSettings(count, 1e-2)], tables=tables)
        return weakref.ref(tables.held)

    whole = step(6)
    assert step(6, is_captured=True)() is whole()
    before = contents(whole())
    part = step(3)
    step(6)
    gc.collect()
    assert part() is None, "nothing reads tables that no capture has read"
    assert whole() is not None and all(map(torch.equal, contents(whole()), before))
    monkeypatch.setattr(triton_launch, "is_captured", lambda device: False)
    tables.release()
    gc.collect()
    assert whole() is None and tables.held is not None


class Estimating(Tiny):
    """Trains some of its weights only in steps with an estimate."""

    self_condition = True

    def __init__(self):
        super().__init__()
        self.of_estimate = torch.nn.Conv2d(3, 5, 1)

    def forward(self, x, t, x_self_cond=None):
        hidden = self.first(x) + (0 if x_self_cond is None else self.of_estimate(x_self_cond))
        return self.last(hidden * t[:, None, None, None].cos())


class Capturing(FrozenRecorder):
    """Runs each body once more, as captured."""

    def record(self, body, reset):
        replay = super().record(body, reset)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_launch, "is_captured", lambda device: True)
            body()
        reset()
        return replay


def test_recordings_of_steps_with_and_without_an_estimate_keep_their_tables(monkeypatch):
    recorder = Capturing if DEVICE == "cpu" else CudaRecorder
    made, make_layout = [], kernel.make_layout

    def remembered(*arguments):
        layout = make_layout(*arguments)
        made.append((weakref.ref(layout), len(layout.places), contents(layout)))
        return layout

    monkeypatch.setattr(kernel, "make_layout", remembered)
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Estimating(), image_size=4, timesteps=10).to(DEVICE)
    rate = torch.tensor(1e-2, device=DEVICE)
    optimizer = torch.optim.Adam(diffusion.parameters(), rate, fused=True, capturable=True)
    step = TrainingStep(diffusion, optimizer, (2, 3, 4, 4), recorder=recorder, any_module=True)
    for _ in range(8):
        step(torch.rand(2, 3, 4, 4).to(DEVICE))
    assert len(step._recordings) == 2, "both sides of the coin"
    step._optimizer_step._tables.held = None  # those of the last call
    gc.collect()
    kept = [(size, before, layout()) for layout, size, before in made if layout() is not None]
    assert {size for size, _, _ in kept} == {4, 6}
    assert all(all(map(torch.equal, contents(layout), before)) for _, before, layout in kept)
    del kept
    step.clear()
    gc.collect()
    assert all(layout() is None for layout, _, _ in made)
