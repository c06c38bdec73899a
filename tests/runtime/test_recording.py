"""Recorded sampling, its cache and its progress: with tapes, and with a stand-in for CUDA's recorder (recorders.py)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from ddpm_fast import GaussianDiffusion, Unet, use_backend
from ddpm_fast.diffusion import sampling
from ddpm_fast.runtime import recording
from ddpm_fast.testing.recorders import CountedTape, FrozenRecorder

SAMPLERS = {
    "ddpm": dict(),
    "ddim": dict(sampling_timesteps=4, ddim_sampling_eta=0.5),
    "dpmpp_2m": dict(sampling_timesteps=4, sampler="dpmpp_2m"),
}

Recorder = None  # the one of the test


@pytest.fixture(autouse=True, params=[FrozenRecorder, CountedTape])
def _recorder(request, monkeypatch):
    reason = request.param.why_not(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    request.param.recorded = 0
    monkeypatch.setitem(globals(), "Recorder", request.param)


def make(self_condition: bool = False, **kwargs) -> GaussianDiffusion:
    """A small diffusion that records on the CPU."""
    torch.manual_seed(0)
    model = Unet(8, dim_mults=(1,), self_condition=self_condition, attn_heads=1, attn_dim_head=4)
    diffusion = GaussianDiffusion(model, image_size=4, timesteps=6, **kwargs)
    diffusion.graphs = recording.GraphCache(recorder=Recorder)
    return diffusion


def assert_made(number: int) -> None:
    """So many recordings were made; tapes are made in every run."""
    assert Recorder.recorded == number or not Recorder.is_kept


def assert_kept(diffusion, number: int) -> None:
    assert len(diffusion.graphs) == (number if Recorder.is_kept else 0)


def both(diffusion, batch: int = 2, **kwargs) -> torch.Tensor:
    """Samples, after checking that recorded and step by step they are the same bits."""
    kwargs = {"seed": 3, "progress": False, **kwargs}
    recorded = diffusion.sample(batch, **kwargs)
    assert torch.equal(recorded, diffusion.sample(batch, graph=False, **kwargs))
    return recorded


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("self_condition", [False, True])
def test_replays_equal_steps(sampler, self_condition):
    diffusion = make(self_condition, **SAMPLERS[sampler])
    first = both(diffusion)
    for seed in (4, torch.tensor([5])):  # seed, state and the last x0 are set again
        assert not torch.equal(both(diffusion, seed=seed), first)
    assert torch.equal(both(diffusion), first)
    assert_made(1)
    states = both(diffusion, return_all_timesteps=True)
    assert torch.equal(states[:, -1], first) and states.shape[1] == diffusion.sampling_timesteps + 1
    images = torch.rand(2, 3, 4, 4)
    mixed = [diffusion.interpolate(images, images.flip(0), t=3, seed=1, progress=False, graph=g) for g in (None, False)]
    assert torch.equal(*mixed)


def test_tables_are_read_anew():
    diffusion = make(sampling_timesteps=4)
    results = [both(diffusion)]
    for eta in (0.5, 1.0):
        diffusion.ddim_sampling_eta = eta
        results.append(both(diffusion))
    diffusion.objective = "pred_noise"
    results.append(both(diffusion))
    assert_made(1)  # schedules, samplers and objectives are numbers in one recording
    assert len({tuple(r.flatten().tolist()) for r in results}) == 4


def test_each_setting_in_the_key_has_its_own_recording():
    diffusion = make()
    diffusion.graphs.limit = 100
    both(diffusion)
    changes = [
        lambda: both(diffusion, batch=3),
        lambda: both(diffusion, start_index=1),
        lambda: (setattr(diffusion, "image_size", (4, 8)), both(diffusion), setattr(diffusion, "image_size", (4, 4))),
        lambda: (setattr(diffusion, "sampler", "dpmpp_2m"), both(diffusion), setattr(diffusion, "sampler", None)),
    ]
    for number, change in enumerate(changes, start=2):
        change()
        change()
        assert_made(number)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = both(diffusion)
    with use_backend("reference"):
        both(diffusion)
    torch.use_deterministic_algorithms(True)
    both(diffusion)
    torch.use_deterministic_algorithms(False)
    assert_made(8)
    assert_kept(diffusion, 8)
    assert not torch.equal(low, both(diffusion))
    assert_made(8)  # every one of them is still there


def test_few_are_kept_and_the_least_recently_used_goes():
    diffusion = make()
    diffusion.graphs.limit = 2
    for batch in (1, 2, 1, 3, 1):
        both(diffusion, batch=batch)
    assert_made(3)
    assert_kept(diffusion, 2)
    both(diffusion, batch=2)
    assert_made(4)
    diffusion.clear_graphs()
    assert len(diffusion.graphs) == 0
    both(diffusion, batch=2)
    assert_made(5)


def load_other_weights(diffusion):
    diffusion.load_state_dict({k: v * 1.5 if k.startswith("model.") else v for k, v in diffusion.state_dict().items()})


def assign_other_weights(diffusion):
    state = {k: v * 1.5 for k, v in diffusion.model.state_dict().items()}
    diffusion.model.load_state_dict(state, assign=True)


def step_an_optimizer(diffusion):
    optimizer = torch.optim.SGD(diffusion.parameters(), lr=0.1)
    diffusion(torch.rand(2, 3, 4, 4)).backward()
    optimizer.step()


def move_like_an_average(diffusion):
    """Change weights as `ema_pytorch` does: in place through .data, without a new tensor version."""
    for parameter in diffusion.parameters():
        parameter.data.mul_(1.5)


def test_replaced_weights_are_left_alone():
    """Weights derived in a run have memory of their own."""
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2)), image_size=4, timesteps=2)
    diffusion.sample(1, progress=False)
    kept = list(diffusion.model.parameters())
    before = [parameter.detach().clone() for parameter in kept]
    assign_other_weights(diffusion)
    diffusion.sample(1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


def replace_a_parameter(diffusion):
    diffusion.model.final_conv.weight = torch.nn.Parameter(diffusion.model.final_conv.weight.detach() * 2)


def replace_the_model(diffusion):
    diffusion.model = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4)


@pytest.mark.parametrize(
    "change",
    [
        load_other_weights,
        assign_other_weights,
        step_an_optimizer,
        move_like_an_average,
        replace_a_parameter,
        replace_the_model,
        lambda diffusion: diffusion.bfloat16(),
    ],
)
def test_weights_of_now_are_used(change):
    diffusion = make()
    before = both(diffusion)
    both(diffusion, batch=1)
    change(diffusion)
    assert not torch.equal(both(diffusion), before)
    in_place = change in (load_other_weights, step_an_optimizer, move_like_an_average)
    assert_kept(diffusion, 2 if in_place else 1)  # nothing of replaced weights


def test_what_changes_no_number_changes_no_recording():
    diffusion = make()
    before = both(diffusion)
    diffusion.requires_grad_(False)
    diffusion.to("cpu", torch.float32)
    diffusion(torch.rand(2, 3, 4, 4))
    with torch.no_grad():
        assert torch.equal(both(diffusion), before)
    assert_made(1)
    diffusion.eval()
    both(diffusion)
    assert_made(2)  # dropout may be switched by this


def test_copies_and_pickles_record_anew():
    diffusion = make()
    before = both(diffusion)
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert len(other.graphs) == 0 and other.graphs.recorder is Recorder
        load_other_weights(other)
        assert not torch.equal(both(other), before)
        assert torch.equal(both(diffusion), before)
    assert_made(3)


def test_recording_leaves_torchs_generator_alone():
    diffusion = make()
    torch.manual_seed(7)
    drawn = diffusion.sample(1, progress=False, graph=False), torch.rand(())
    torch.manual_seed(7)
    recorded = diffusion.sample(1, progress=False), torch.rand(())
    assert torch.equal(recorded[0], drawn[0]) and recorded[1] == drawn[1]


def test_a_tape_knows_nothing_of_the_run_before():
    """A tape lasts for one run, so a change made in Python takes effect in the next run."""
    if Recorder.is_kept:
        pytest.skip("CUDA graphs are kept until clear_graphs")
    diffusion = make()
    before = both(diffusion)
    diffusion.model.mid_block1.block1.dropout.p = 0.5
    results = []
    for graph in (None, False):
        torch.manual_seed(2)
        results.append(diffusion.sample(2, seed=3, progress=False, graph=graph))
    assert torch.equal(*results) and not torch.equal(results[0], before)


class OwnStep(GaussianDiffusion):
    def p_sample(self, x, t, x_self_cond=None):
        return x, x


class OwnUnet(Unet):
    pass


class Elsewhere(torch.nn.Conv2d):
    pass


def hooked(diffusion):
    diffusion.model.mid_attn.register_forward_hook(lambda module, args, output: None)


def own_forward(diffusion):
    diffusion.model.forward = diffusion.model.forward


def foreign(diffusion):
    diffusion.model.init_conv.__class__ = Elsewhere


REFUSALS = [
    (hooked, "the model's mid_attn has forward hooks"),
    (own_forward, "the model has a forward of its own"),
    (foreign, "the model's init_conv is a Elsewhere"),
    (lambda d: d.model.compile(backend="eager"), "the model is compiled"),
    (lambda d: setattr(d, "model", torch.compile(d.model, backend="eager")), "the model is compiled"),
    (lambda d: setattr(d, "__class__", OwnStep), "OwnStep has its own p_sample"),
    (lambda d: setattr(d.graphs, "recorder", recording.CudaRecorder), "tensors are on cpu, and CUDA graphs need CUDA"),
]


@pytest.mark.parametrize("change, reason", REFUSALS)
def test_refusals_have_reasons(change, reason):
    diffusion = make()
    kept = "0 are kept, 4 at most" if Recorder.is_kept else "every run makes one"
    assert diffusion.explain_graphs() == f"sampling replays {Recorder.what}; {kept}"
    change(diffusion)
    assert diffusion.explain_graphs().startswith(f"sampling runs step by step: {reason}")
    if change is foreign:
        diffusion.sample(1, progress=False, graph=True)  # asked for: the module is trusted
        assert_made(1)
        return
    with pytest.raises(RuntimeError, match=f"graph=True, and a graph cannot replace the steps: {reason}"):
        diffusion.sample(1, progress=False, graph=True)
    assert Recorder.recorded == 0


def test_global_hooks_are_seen():
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert "hooks on every module" in make().explain_graphs()
    handle.remove()


def test_a_foreign_self_conditioned_model_gets_none_first():
    class Model(torch.nn.Module):
        channels = out_dim = 3
        self_condition = True

        def __init__(self):
            super().__init__()
            self.given = []

        def forward(self, x, t, x_self_cond=None):
            self.given.append(x_self_cond is None)
            return x

    diffusion = make()
    diffusion.model, diffusion.self_condition = Model(), True
    assert "no Unet" in diffusion.explain_graphs()
    diffusion.sample(1, progress=False)
    assert diffusion.model.given == [True] + [False] * 5
    assert Recorder.recorded == 0


def test_empty_batches_are_not_recorded():
    diffusion = make()
    assert diffusion.sample(0, progress=False).shape == (0, 3, 4, 4) and Recorder.recorded == 0


def test_errors_while_recording_surface():
    class Broken(Recorder):
        def record(self, body, reset):
            raise RuntimeError("operation not permitted when stream is capturing")

    diffusion = make()
    diffusion.graphs.recorder = Broken
    with pytest.raises(RuntimeError, match="not permitted"):
        diffusion.sample(1, progress=False)
    assert len(diffusion.graphs) == 0


class Device:
    """A device that finishes work only when asked to wait, and its events."""

    def __init__(self):
        self.started = self.finished = self.waits = 0

    def event(self):
        device = self

        class Event:
            def __init__(self):
                device.started += 1
                self.number = device.started

            def query(self):
                return device.finished >= self.number

            def synchronize(self):
                device.waits += not self.query()
                device.finished = max(device.finished, self.number)

        return Event()


def test_progress_counts_what_is_finished_and_waits_for_nothing_recent(capsys):
    device = Device()
    with sampling.Progress(100, desc="steps", enabled=True, mark=device.event) as bar:
        for step in range(100):
            bar.step_done()
            assert device.finished == bar._bar.n == max(0, step + 1 - 32)
        device.finished = 80
        assert device.waits == 68
    assert device.finished == 100 and "100/100" in capsys.readouterr().err
    quiet = Device()
    with sampling.Progress(100, desc="steps", enabled=False, mark=quiet.event) as bar:
        for _ in range(100):
            bar.step_done()
    assert quiet.waits == quiet.started == 0


def test_progress_does_not_wait_after_an_error():
    device = Device()
    with pytest.raises(KeyError), sampling.Progress(9, desc="steps", enabled=True, mark=device.event) as bar:
        bar.step_done()
        raise KeyError
    assert device.waits == 0
