"""One trainer for every process (upstream's takes GaussianDiffusion alone): recorded steps, exact resume, files."""

from __future__ import annotations

import warnings

import pytest
import torch

import ddpm_fast
from ddpm_fast import Trainer, Unet, XMWrapper, load_checkpoint
from ddpm_fast.diffusion.processes import PROCESSES
from ddpm_fast.testing.recorders import FrozenRecorder
from ddpm_fast.training.captured_step import capture_training_step
from ddpm_fast.training.checkpoint_files import CheckpointError
from ddpm_fast.training.recordable import why_not_recorded

# Small batches, few images and float32 on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:only .* images:UserWarning", "ignore:the effective batch:UserWarning")

SIZE, CHANNELS = 4, 1
NETWORK = {"dim": 8, "dim_mults": (1,), "channels": CHANNELS, "attn_heads": 1, "attn_dim_head": 4}
# Name of a case → process, arguments of the process, arguments of Unet.
CASES = {
    "ddpm": ("ddpm", {"timesteps": 20}, {}),
    "zero terminal SNR": ("ddpm", {"timesteps": 20, "zero_terminal_snr": True, "loss_weighting": "truncated_snr"}, {}),
    "weighted": ("weighted", {"timesteps": 20}, {"out_dim": 2 * CHANNELS + 2}),
    "edm": ("edm", {}, {"learned_sinusoidal_cond": True}),
    "continuous": ("continuous", {}, {"learned_sinusoidal_cond": True}),
    "learned schedule": (
        "continuous",
        {"noise_schedule": "learned", "learned_schedule_net_hidden_dim": 6},
        {"learned_sinusoidal_cond": True},
    ),
    "v-continuous": ("v-continuous", {}, {"learned_sinusoidal_cond": True}),
    "flow": ("flow", {"time_distribution": "logit_normal"}, {}),
}
if "learned" in PROCESSES:
    CASES["learned"] = ("learned", {"timesteps": 20}, {"learned_variance": True})


class Recorded(Trainer):
    _recorder = FrozenRecorder


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.rand(CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(index))


def make(case: str, *, candidates: int = 1, self_condition: bool = False, **options) -> torch.nn.Module:
    torch.manual_seed(1)
    name, own, network = CASES[case]
    model = Unet(**NETWORK, **network, self_condition=self_condition)
    if "num_sample_steps" in PROCESSES[name].arguments():
        own = {"num_sample_steps": 3, **own}
    process = PROCESSES[name](model, image_size=SIZE, **{**own, **options})
    return process if candidates == 1 else XMWrapper(process, candidates=candidates)


def trainer(diffusion: torch.nn.Module, folder, cls: type[Trainer] = Trainer, **options) -> Trainer:
    defaults = {
        "train_batch_size": 4, "train_num_steps": 4, "train_lr": 1e-2, "ema_update_every": 2, "num_workers": 0,
        "save_and_sample_every": 1000, "calculate_fid": False, "progress": False, "seed": 3, "log_every": 2,
    }  # fmt: skip
    made = cls(diffusion, Images(), results_folder=folder, **{**defaults, **options})
    made.ema.update_after_step = 1
    return made


def states(trained: Trainer) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": t for name, t in trained._diffusion.state_dict().items()}
    found |= {f"ema.{name}": t for name, t in trained.ema.state_dict().items()}
    for number, state in enumerate(trained.opt.state_dict()["state"].values()):
        found |= {f"adam.{number}.{name}": t for name, t in state.items()}
    return found


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


ALL = [*CASES, "candidates"]


def make_any(case: str, **options) -> torch.nn.Module:
    return make("edm", candidates=3, **options) if case == "candidates" else make(case, **options)


def upstreams(case: str) -> torch.nn.Module:
    upstream = pytest.importorskip("denoising_diffusion_pytorch")
    classes = {
        "edm": upstream.ElucidatedDiffusion,
        "continuous": upstream.ContinuousTimeGaussianDiffusion,
        "v-continuous": upstream.VParamContinuousTimeGaussianDiffusion,
        "candidates": upstream.ElucidatedDiffusion,
    }
    torch.manual_seed(1)
    network = upstream.Unet(**NETWORK, learned_sinusoidal_cond=True)
    channels = {"channels": CHANNELS} if case in ("edm", "candidates") else {}
    process = classes[case](network, image_size=SIZE, num_sample_steps=3, **channels)
    if case != "candidates":
        return process
    from denoising_diffusion_pytorch.xm import XMWrapper as Theirs

    return Theirs(process, candidates=3)


@pytest.mark.parametrize("case", ["edm", "continuous", "v-continuous", "candidates"])
def test_upstreams_trainer_fails_and_this_one_trains(case, tmp_path):
    upstream = pytest.importorskip("denoising_diffusion_pytorch")
    for index, image in enumerate([Images()[i] for i in range(4)]):
        from torchvision.utils import save_image

        (tmp_path / "images").mkdir(exist_ok=True)
        save_image(image, tmp_path / "images" / f"{index}.png")
    options = dict(
        train_batch_size=4, train_num_steps=2, save_and_sample_every=2, num_samples=4, calculate_fid=False,
        augment_horizontal_flip=False,
    )  # fmt: skip
    with pytest.raises((AttributeError, AssertionError, TypeError)):
        theirs = upstream.Trainer(
            upstreams(case), str(tmp_path / "images"), results_folder=str(tmp_path / "theirs"), **options
        )
        theirs.train()
    ours = Trainer(
        make_any(case), tmp_path / "images", results_folder=tmp_path / "ours", num_workers=0, progress=False, **options
    )
    ours.train()
    assert (tmp_path / "ours" / "sample-1.png").exists()


@pytest.mark.parametrize("case", ALL)
def test_a_run_that_stops_goes_on_bit_for_bit_and_its_file_loads(case, tmp_path):
    """Milestones with samples on the way; the file names the process, and its average samples as the trainer's does."""
    options = {"save_and_sample_every": 2, "num_samples": 2, "train_num_steps": 4}
    whole = trainer(make_any(case), tmp_path / "whole", **options)
    whole.train()
    first = trainer(make_any(case), tmp_path / "half", **{**options, "train_num_steps": 2})
    first.train()
    second = trainer(make_any(case), tmp_path / "half", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load(1)
    second.train()
    assert_same(states(whole), states(second))

    contents = torch.load(tmp_path / "half" / "model-2.pt", weights_only=True)
    name = "edm" if case == "candidates" else CASES[case][0]
    assert contents["config"]["process"] == name
    assert contents["config"]["xm"] == ({"candidates": 3, "max_batch_size": None} if case == "candidates" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_checkpoint(tmp_path / "half" / "model-2.pt")
    assert type(loaded.diffusion) is PROCESSES[name] and loaded.step == 4
    assert loaded.diffusion.network is loaded.model
    assert loaded.diffusion.current_config() == second._diffusion.current_config()
    assert_same(loaded.diffusion.state_dict(), second._diffusion.state_dict())
    expected = second.ema.ema_model.eval().sample(2, seed=1, progress=False)
    assert torch.equal(loaded.ema.ema_model.eval().sample(2, seed=1, progress=False), expected)


FEATURES = {
    "plain": {},
    "self-conditioned": {"self_condition": True},
    "offset noise": {"offset_noise_strength": 0.2},
    "min-SNR": {"loss_weighting": "min_snr"},
    "uncertainty": {"uncertainty_weighting": True},
}


# Weighted and learned processes take no network that is conditioned on itself; by min-SNR T − 1 would have no weight.
NOT_TOGETHER = [
    ("weighted", "self-conditioned"), ("learned", "self-conditioned"), ("zero terminal SNR", "min-SNR"),
]  # fmt: skip
TOGETHER = [(case, feature) for case in ALL for feature in FEATURES if (case, feature) not in NOT_TOGETHER]


@pytest.mark.parametrize("case, feature", TOGETHER)
def test_recorded_steps_have_the_same_bits(case, feature, tmp_path):
    results = []
    for is_recorded in (False, True):
        diffusion = make_any(case, **FEATURES[feature])
        run = trainer(diffusion, tmp_path / str(is_recorded), Recorded, graph=None if is_recorded else False)
        if feature == "uncertainty":  # its weights begin with 0, and so does their gradient's effect on the others
            before = run._diffusion.uncertainty.weight.detach().clone()
        FrozenRecorder.recorded = 0
        for _ in range(4):
            run._train_step()
        # The average's copy and its move are recorded where the optimizer's kernel does not move all of it.
        moved = len(run._captured._by_kernel) if is_recorded else 0
        rest = len(list(run._diffusion.parameters())) + len(list(run._diffusion.buffers())) - moved
        expected = (2 if feature == "self-conditioned" else 1) + (2 if rest else 0)
        assert FrozenRecorder.recorded == (expected if is_recorded else 0)
        results.append((states(run), torch.stack(run._losses)))
        if feature == "uncertainty":
            assert not torch.equal(before, run._diffusion.uncertainty.weight)
            assert not torch.equal(before, run.ema.ema_model.uncertainty.weight)
    assert results[0][1].isfinite().all() and torch.equal(results[0][1], results[1][1])
    assert_same(results[0][0], results[1][0])


def test_a_step_of_ones_own_takes_every_process():
    for case in ALL:
        diffusion = make_any(case)
        optimizer = torch.optim.Adam(diffusion.parameters(), 1e-3, fused=True)
        step = capture_training_step(diffusion, optimizer, (4, CHANNELS, SIZE, SIZE))
        assert step(torch.rand(4, CHANNELS, SIZE, SIZE)).isfinite()
    with pytest.raises(TypeError, match="must be a process or an XMWrapper around one, got Unet"):
        capture_training_step(Unet(**NETWORK), None, (4, 1, 4, 4))


def test_what_a_recording_stands_on(tmp_path):
    """A change of the process's numbers makes a new recording; a wrapper's number of candidates, too.

    A function in place of a method is code that a replay would not call.
    """
    run = trainer(make("edm", candidates=2), tmp_path, Recorded)
    process = run._diffusion
    run._train_step()

    def recordings(change) -> int:
        FrozenRecorder.recorded = 0
        change()
        run._train_step()
        return FrozenRecorder.recorded - 1  # the first steps record the average, too

    run._train_step(), run._train_step()
    FrozenRecorder.recorded = 0
    run._train_step()
    assert FrozenRecorder.recorded == 0
    for change in (
        lambda: setattr(process, "P_mean", -0.3),
        lambda: setattr(run._trained, "candidates", 3),
    ):
        assert recordings(change) >= 0
    process.random_times = lambda batch: torch.zeros(batch)
    run._train_step()
    assert "has a random_times of its own instead of its class's" in run.explain_graphs()
    with pytest.raises(ValueError, match="optimal_transport=True assigns the noise on the host"):
        trainer(make("flow", optimal_transport=True), tmp_path / "x", Recorded, graph=True)
    run = trainer(make("flow", immiscible=True), tmp_path / "y", Recorded)
    assert run.explain_graphs() == "training runs step by step: immiscible=True assigns the noise on the host"
    wrapped = XMWrapper(torch.nn.Linear(1, 1))
    assert why_not_recorded(wrapped, run.opt.optimizer, False).startswith("the loss is that of a XMWrapper, and")


# files


def saved(process: torch.nn.Module, path, **more) -> None:
    torch.save({**process.state_dict(), **more}, path)


@pytest.mark.parametrize("case", ["edm", "learned schedule", "weighted", "candidates"])
@pytest.mark.filterwarnings("ignore:.*does not record image_size", "ignore:.*was stripped from its names")
@pytest.mark.filterwarnings("ignore:loss_weight follows no known")
def test_state_dicts_whose_names_tell_the_process(case, tmp_path):
    diffusion = make_any(case)
    saved(diffusion, tmp_path / "state.pt")
    loaded = load_checkpoint(tmp_path / "state.pt", attn_heads=1, attn_dim_head=4, image_size=SIZE).diffusion
    process = diffusion.flow_model if case == "candidates" else diffusion
    assert type(loaded) is type(process)
    assert_same(loaded.state_dict(), process.state_dict())


@pytest.mark.parametrize("case", ["edm", "continuous", "v-continuous", "candidates"])
def test_state_dicts_of_upstreams_classes(case, tmp_path):
    theirs = upstreams(case)
    saved(theirs, tmp_path / "state.pt")
    name = "edm" if case == "candidates" else case
    loaded = load_checkpoint(tmp_path / "state.pt", process=name, image_size=SIZE).diffusion
    assert type(loaded) is PROCESSES[name]
    state = {bare.removeprefix("flow_model."): tensor for bare, tensor in theirs.state_dict().items()}
    assert_same(loaded.state_dict(), state)
    resumed = trainer(make_any(case), tmp_path / "run")
    resumed.load(tmp_path / "state.pt")
    assert_same(resumed._diffusion.state_dict(), state)


def test_the_wrong_process_is_named(tmp_path):
    saved(make("edm"), tmp_path / "edm.pt")
    saved(make("continuous"), tmp_path / "continuous.pt")
    saved(make("ddpm"), tmp_path / "ddpm.pt")
    with pytest.raises(CheckpointError, match="edm.pt is of the process 'edm', not of 'flow'$"):
        load_checkpoint(tmp_path / "edm.pt", process="flow")
    with pytest.raises(CheckpointError, match="ddpm.pt is of the process 'ddpm', not of 'continuous'$"):
        load_checkpoint(tmp_path / "ddpm.pt", process="continuous")
    with pytest.raises(CheckpointError, match="its names do not tell the process: give process="):
        load_checkpoint(tmp_path / "continuous.pt")
    with pytest.raises(ValueError, match="process must be one of .*ddpm.*, got 'vp'"):
        load_checkpoint(tmp_path / "edm.pt", process="vp")
    with pytest.raises(TypeError, match="got 'timesteps', which is no argument of Unet or ElucidatedDiffusion"):
        load_checkpoint(tmp_path / "edm.pt", timesteps=7)
    run = trainer(make("flow"), tmp_path / "flow")
    with pytest.raises(CheckpointError, match=r"process='edm', this trainer's diffusion has process='flow'"):
        run.load(tmp_path / "edm.pt")
    run.save(1)
    other = trainer(make("edm"), tmp_path / "flow")
    with pytest.raises(CheckpointError, match=r"process='flow', this trainer's diffusion has process='edm'"):
        other.load(1)


@pytest.mark.parametrize(
    ("case", "changed"),
    [
        ("edm", {"sigma_data": 0.25}),
        ("flow", {"time_scale": 1.0}),
        ("flow", {"loss_weighting": "edm"}),
        ("ddpm", {"uncertainty_weighting": True}),
        ("ddpm", {"zero_terminal_snr": True}),
    ],
    ids=str,
)
def test_what_a_run_cannot_change(case, changed, tmp_path):
    trainer(make(case), tmp_path).save(1)
    (name,) = changed
    with pytest.raises(CheckpointError, match=f"was trained with .*{name}=.*this trainer's diffusion has {name}="):
        trainer(make(case, **changed), tmp_path).load(1)


def test_what_a_user_changes_is_recorded(tmp_path):
    run = trainer(make("edm"), tmp_path)
    run._diffusion.num_sample_steps, run._diffusion.S_churn, run._diffusion.spacing = 2, 0.0, "karras:rho=5"
    run.save(1)
    loaded = load_checkpoint(tmp_path / "model-1.pt", S_noise=1.0, sampling_timesteps=4)
    assert (loaded.diffusion.S_churn, loaded.diffusion.spacing) == (0.0, "karras:rho=5")
    assert (loaded.diffusion.S_noise, loaded.diffusion.num_sample_steps) == (1.0, 4)


def test_a_process_of_a_later_release_is_named(tmp_path, monkeypatch):
    run = trainer(make("edm"), tmp_path)
    monkeypatch.setattr("ddpm_fast.training.trained.process_name_of", lambda diffusion: "consistency")
    run.save(1)
    with pytest.raises(CheckpointError, match="is of the process 'consistency', which is not registered"):
        load_checkpoint(tmp_path / "model-1.pt")


def test_the_package_registers_them_all():
    assert {name for name, _, _ in CASES.values()} <= set(PROCESSES)
    assert ddpm_fast.ElucidatedDiffusion is PROCESSES["edm"]
