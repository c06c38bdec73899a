"""Trainers that record their steps against trainers that run them: tapes, and on the CPU a recorder in CUDA's place."""

from __future__ import annotations

import warnings

import pytest
import torch
from ema_pytorch import EMA

from ddpm_fast import GaussianDiffusion, Trainer, Unet, optim
from ddpm_fast.runtime import recording
from ddpm_fast.testing.recorders import CountedTape, FrozenRecorder
from ddpm_fast.training.captured_step import TrainingStep

# Small batches, few images and float32 on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:only .* images:UserWarning", "ignore:the effective batch:UserWarning")


WHY_NOT = recording.TapeRecorder.why_not(torch.device("cpu"))
needs_tapes = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


class Recorded(Trainer):
    _recorder = FrozenRecorder


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(index))


class ConditionedImages(Images):
    """With what a network takes, and vectors and condition images that differ from image to image."""

    def __init__(self, network):
        self.network = network

    def __getitem__(self, index):
        item = {"image": super().__getitem__(index)}
        generator = torch.Generator().manual_seed(index + 100)
        if self.network.num_classes:
            item["classes"] = index % self.network.num_classes
        if self.network.cond_dim:
            item["cond"] = torch.randn(self.network.cond_dim, generator=generator)
        if self.network.cond_channels:
            shape = (self.network.cond_channels, 4, 4)
            item["cond_image"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return item if len(item) > 1 else item["image"]


_OF_NETWORK = ("self_condition", "dropout", "num_classes", "cond_dim", "cond_channels", "cond_drop_prob")


def make(**options) -> GaussianDiffusion:
    torch.manual_seed(1)
    network = {name: options.pop(name) for name in _OF_NETWORK if name in options}
    model = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4, **network)
    return GaussianDiffusion(model, image_size=4, timesteps=20, **options)


def trainer(cls: type[Trainer], diffusion: GaussianDiffusion, folder, **options) -> Trainer:
    defaults = {
        "train_batch_size": 4, "train_num_steps": 7, "train_lr": 1e-2, "ema_update_every": 2, "num_workers": 0,
        "save_and_sample_every": 1000, "calculate_fid": False, "progress": False, "seed": 3, "log_every": 2,
    }  # fmt: skip
    made = cls(diffusion, ConditionedImages(diffusion.model), results_folder=folder, **{**defaults, **options})
    made.ema.update_after_step = 2
    return made


def states(trained: Trainer) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": t for name, t in trained._diffusion.state_dict().items()}
    found |= {f"ema.{name}": t for name, t in trained.ema.state_dict().items()}
    for number, state in enumerate(trained.opt.state_dict()["state"].values()):
        found |= {f"adam.{number}.{name}": t for name, t in state.items()}
    return found


OPTIONS = {
    "plain": ({}, {}),
    "accumulated": ({}, {"gradient_accumulate_every": 3}),
    "bf16": ({}, {"amp": True, "mixed_precision_type": "bf16"}),
    "bf16, accumulated": ({}, {"amp": True, "gradient_accumulate_every": 2}),
    "clipped": ({}, {"max_grad_norm": 1e-3, "adam_betas": (0.5, 0.9)}),
    "self-conditioned": ({"self_condition": True}, {"gradient_accumulate_every": 2}),
    "classes": ({"num_classes": 5, "cond_drop_prob": 0.5}, {}),
    "classes, accumulated": ({"num_classes": 5, "cond_drop_prob": 0.5}, {"gradient_accumulate_every": 2}),
    "all conditions": (
        {"num_classes": 5, "cond_dim": 3, "cond_channels": 2, "cond_drop_prob": 0.5, "self_condition": True},
        {"augment_horizontal_flip": True},
    ),
    "classes in bf16": ({"num_classes": 5}, {"amp": True, "mixed_precision_type": "bf16"}),
    "dropout and offset": ({"dropout": 0.3, "offset_noise_strength": 0.2, "min_snr_loss_weight": True}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_bits(name, tmp_path):
    of_process, of_trainer = OPTIONS[name]
    plain = trainer(Recorded, make(**of_process), tmp_path / "plain", graph=False, **of_trainer)
    ours = trainer(Recorded, make(**of_process), tmp_path / "ours", **of_trainer)
    FrozenRecorder.recorded = 0
    plain.train()
    assert FrozenRecorder.recorded == 0 and plain._captured is None
    assert ours.explain_graphs() == "training replays the step itself"
    ours.train()
    accumulates = of_trainer.get("gradient_accumulate_every", 1) > 1
    coins = 2 if of_process.get("self_condition") else 1
    averages = 2  # a copy, and a move
    assert FrozenRecorder.recorded == (2 * coins + 1 if accumulates else coins) + averages
    assert ours.explain_graphs() == "training replays the step itself"
    expected, found = states(plain), states(ours)
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    for records in ("loss.csv",):
        rows = [[row.split(",")[:2] for row in (folder / records).read_text().splitlines()] for folder in
                (tmp_path / "plain", tmp_path / "ours")]  # fmt: skip
        assert rows[0] == rows[1] and len(rows[0]) > 3


class Taped(Trainer):
    _recorder = CountedTape


@needs_tapes
@pytest.mark.parametrize("name", ["accumulated", "bf16, accumulated", "all conditions", "dropout and offset"])
def test_tapes_have_the_same_bits(name, tmp_path):
    """A tape is recorded in the second call of its kind; numbers of rates and torch's own generator as users have."""
    of_process, of_trainer = OPTIONS[name]
    plain = trainer(Trainer, make(**of_process), tmp_path / "plain", graph=False, **of_trainer)
    ours = trainer(Taped, make(**of_process), tmp_path / "ours", **of_trainer)
    CountedTape.recorded = 0
    plain.train()
    ours.train()
    accumulates = of_trainer.get("gradient_accumulate_every", 1) > 1
    coins = 2 if of_process.get("self_condition") else 1
    averages = 2
    assert CountedTape.recorded == (2 * coins + 1 if accumulates else coins) + averages
    assert ours.explain_graphs() == "training replays a tape of operator calls"
    assert ours.explain_optimizer().startswith(plain.explain_optimizer())
    expected, found = states(plain), states(ours)
    assert expected.keys() == found.keys()
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    files = [torch.load(tmp_path / run / "model-last.pt", weights_only=True)["opt"] for run in ("plain", "ours")]
    assert files[0]["param_groups"] == files[1]["param_groups"]


def test_fp16_with_its_scaler(tmp_path):
    """The scaler's own CPU form: its scale grows, and a step with an infinite gradient is skipped, without the host."""
    plain, ours = make(), make()
    results = []
    for diffusion, recorded in ((plain, False), (ours, True)):
        optimizer = torch.optim.Adam(diffusion.parameters(), torch.tensor(1e-2), fused=True, capturable=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)
        step = TrainingStep(
            diffusion, optimizer, (4, 3, 4, 4), autocast=torch.float16, scaler=scaler,
            recorder=FrozenRecorder if recorded else FrozenRecorder.__mro__[1],
        )  # fmt: skip
        scales, losses = [], []
        for index in range(8):
            torch.manual_seed(index)
            losses.append(step(torch.rand(4, 3, 4, 4)))
            scales.append(scaler.get_scale())
        results.append((torch.stack(losses), scales, [p.detach() for p in diffusion.parameters()]))
    (losses, scales, weights), (our_losses, our_scales, our_weights) = results
    assert torch.equal(losses, our_losses) and scales == our_scales and len(set(scales)) > 1
    assert all(torch.equal(a, b) for a, b in zip(weights, our_weights, strict=True))


def test_rates_may_change_and_files_keep_numbers(tmp_path):
    plain = trainer(Recorded, make(), tmp_path / "plain", graph=False, train_num_steps=4)
    ours = trainer(Recorded, make(), tmp_path / "ours", train_num_steps=4)
    FrozenRecorder.recorded = 0
    for index in range(4):
        rate = 1e-2 / (index + 1)
        for trained in (plain, ours):
            trained.opt.param_groups[0]["lr"] = rate
            trained._train_step()
    assert all(torch.equal(a, b) for a, b in zip(states(plain).values(), states(ours).values(), strict=True))
    assert FrozenRecorder.recorded == 2  # a step, and the average's beginning
    ours.opt.param_groups[0]["lr"] = 3e-5
    ours._train_step()
    ours.save("x")
    (group,) = torch.load(tmp_path / "ours" / "model-x.pt", weights_only=True)["opt"]["param_groups"]
    assert group["lr"] == 3e-5 and type(group["lr"]) is float and group["capturable"] is False


def test_a_loaded_run_goes_on_with_the_same_bits(tmp_path):
    whole = trainer(Recorded, make(), tmp_path / "whole", train_num_steps=6)
    whole.train()
    first = trainer(Recorded, make(), tmp_path / "half", train_num_steps=3)
    first.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "is continued with")
        second = trainer(Recorded, make(), tmp_path / "half", train_num_steps=6)
        second.load("last")
    second.train()
    assert all(torch.equal(a, b) for a, b in zip(states(whole).values(), states(second).values(), strict=True))


def _other_optimizer(trained):
    trained.opt = torch.optim.SGD(trained.model.parameters(), 1e-3)


def _other_model(trained):
    trained.model = make()
    trained.opt = optim.Adam(trained.model.parameters(), 1e-3)
    trained.ema = EMA(trained.model, update_every=1)


REPLACED = {
    "clipping": lambda trained: setattr(trained, "max_grad_norm", 1e-3),
    "accumulation": lambda trained: setattr(trained, "gradient_accumulate_every", 2),
    "average": lambda trained: setattr(trained, "ema", EMA(trained.model, beta=0.5, update_every=1)),
    "optimizer": _other_optimizer,
    "model": _other_model,
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_assigned_to_a_trainer_counts_from_the_next_step_on(name, tmp_path):
    plain = trainer(Trainer, make(), tmp_path / "plain", graph=False)
    ours = trainer(Trainer, make(), tmp_path / "ours")
    for trained in (plain, ours):
        for _ in range(3):
            trained._train_step()
        REPLACED[name](trained)
        for _ in range(3):
            trained._train_step()
    expected, found = states(plain), states(ours)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("graph", [False, None])
def test_another_optimizer_moves_the_weights_and_has_the_files_moments(graph, tmp_path):
    ours = trainer(Trainer, make(), tmp_path, graph=graph)
    ours._train_step()
    ours.opt = optim.AdamW(ours.model.parameters(), 0.0)
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    ours._train_step()
    ours._train_step()
    assert all(torch.equal(a, b) for a, b in zip(before, ours.model.parameters(), strict=True))
    ours.save("x")
    moments = torch.load(tmp_path / "model-x.pt", weights_only=True)["opt"]["state"]
    assert {int(state["step"]) for state in moments.values()} == {2} and len(moments) == len(before)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fp16_is_float32_on_the_cpu(accumulate, tmp_path):
    options = {"amp": True, "mixed_precision_type": "fp16", "gradient_accumulate_every": accumulate}
    with pytest.warns(UserWarning, match=r"fp16 is not there on cpu: training runs in float32 \(bf16 is\)"):
        trained = [trainer(Trainer, make(), tmp_path / str(graph), graph=graph, **options) for graph in (False, None)]
    for one in trained:
        assert one.accelerator.scaler is None
        one.train()
    expected, found = map(states, trained)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_what_cannot_be_recorded_runs_step_by_step_and_says_why(tmp_path):
    diffusion = make()
    ours = trainer(Recorded, diffusion, tmp_path / "hook")
    ours._train_step()
    seen = []
    handle = diffusion.model.final_conv.register_forward_hook(lambda *args: seen.append(1))
    ours._train_step()
    assert seen == [1]
    assert ours.explain_graphs() == (
        "training runs step by step: the model's model.final_conv has forward hooks, which a replay does not call"
    )
    handle.remove()
    plain = trainer(Recorded, make(), tmp_path / "plain", graph=False)
    plain._train_step()
    plain._diffusion.model.final_conv.register_forward_hook(lambda *args: None)
    plain._train_step()
    assert all(
        torch.equal(weight, diffusion.get_parameter(name)) for name, weight in plain._diffusion.named_parameters()
    )
    assert plain.explain_graphs() == "training runs step by step: graph=False was given"
    with pytest.raises(ValueError, match="graph=True, and a recording cannot replace the step: .*immiscible"):
        trainer(Recorded, make(immiscible=True), tmp_path / "immiscible", graph=True)


def test_a_step_that_cannot_be_captured_is_run(tmp_path, monkeypatch):
    """The images of the step are not lost, and its random numbers are the same."""

    class Fails(FrozenRecorder):
        def record(self, body, reset):
            with torch.random.fork_rng([]):
                reset()
                body()
            raise recording.CaptureError(
                "`x.item()` cannot be captured into a CUDA graph; graph=False runs without one"
            )

    plain = trainer(Recorded, make(dropout=0.2), tmp_path / "plain", graph=False)
    ours = trainer(Recorded, make(dropout=0.2), tmp_path / "ours")
    ours._recorder = Fails
    for trained in (plain, ours):
        trained.train()
    assert "`x.item()` cannot be captured" in ours.explain_graphs()
    expected, found = states(plain), states(ours)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    insists = trainer(Recorded, make(), tmp_path / "insists", graph=True)
    insists._recorder = Fails
    with pytest.raises(recording.CaptureError):
        insists._train_step()
