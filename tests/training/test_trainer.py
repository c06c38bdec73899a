"""The trainer: exact resuming, many processes, what it writes, and how it fails."""

import csv
import fcntl
import json
import math
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast
from ddpm_fast.runtime import measured, recording
from ddpm_fast.training.batches import BatchOrder, BatchStream
from ddpm_fast.training.checkpoint import load_checkpoint
from ddpm_fast.training.checkpoint_files import CheckpointError, load_file
from ddpm_fast.training.data import DigitsDataset
from ddpm_fast.training.evaluation import FIDEvaluation, FIDUnavailableError, frechet_distance, mean_and_covariance
from ddpm_fast.training.history import LossHistory
from ddpm_fast.training.trainer import DivergenceError, Trainer

WHY_NO_TAPES = recording.TapeRecorder.why_not(torch.device("cpu"))
TESTS = Path(__file__).parent
RUN = TESTS / "training_run.py"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small are slower on more threads, and very much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_diffusion(**options):
    channels = options.pop("channels", 1)
    model = ddpm_fast.Unet(8, dim_mults=(1, 2), channels=channels, self_condition=options.pop("self_condition", False))
    return ddpm_fast.GaussianDiffusion(model, **{"image_size": 8, "timesteps": 20, **options})


# An entry of a trainer's file, a value that it cannot have, and a part of the sentence on it.
UNUSABLE = [
    (("config", "class_names"), -1, "no usable class_names: they must be text; got -1"),
    (("config", "class_names"), [1, 2], r"no usable class_names: they must be text; got \[1, 2\]"),
    (("config", "network"), [1, 2], r"has a network \[1, 2\], which is none of unet, classifier_free"),
    (("config", "unet"), {"nonsense": 1}, "no usable config of its network: it has no 'dim'"),
    (("config", "unet", "nonsense"), 1, "no usable config of its network: 'nonsense' is none of its arguments"),
    (("training", "seed"), torch.zeros(3), "no usable record of its training: seed must be an integer; got"),
    (("training", "position"), -1, "training: position must be a non-negative integer; got -1"),
    (("training", "world_size"), "two", "training: world_size must be a positive integer; got 'two'"),
    (("training", "best_fid"), None, "training: best_fid must be a number; got None"),
    (
        ("training", "forms"),
        {"op": "quick"},
        "training: forms must give 'fused' or 'separate' for each name, got 'quick'",
    ),
    (("training", "value_range"), -1, "training: value_range must be two numbers"),
    (("training", "conditions"), 3, "training: conditions must be a dictionary; got 3"),
    (("ema", 7), torch.zeros(3), "an entry in its 'ema' whose name is no text: 7"),
    (("ema", "step"), "many", "no usable 'step' in its 'ema': got 'many'"),
    (("opt", "param_groups"), -1, "no usable param_groups in its 'opt': got -1"),
    (("opt", "state"), {0: -1}, r"no usable state in its 'opt': got \{0: -1\}"),
]


def make_trainer(folder, diffusion=None, dataset=None, **options):
    torch.manual_seed(0)
    defaults = dict(
        train_batch_size=16,
        train_num_steps=4,
        calculate_fid=False,
        augment_horizontal_flip=False,
        progress=False,
        save_and_sample_every=100,
        num_samples=4,
        log_every=1,
        ema_update_every=1,
        seed=0,
        train_lr=1e-3,
    )
    dataset = DigitsDataset() if dataset is None else dataset
    return Trainer(diffusion or make_diffusion(), dataset, results_folder=folder, **{**defaults, **options})


def run_training(*groups, processes=1):
    """Groups of runs of tests/training/training_run.py, each in a new process, or in new ones on gloo.

    Before a release torchrun starts the ranks; otherwise they are forked, without the imports' 4 s each.
    """
    command = [sys.executable]
    by_torchrun = processes > 1 and "DDPM_FAST_RELEASE" in os.environ
    if by_torchrun:  # standalone: it finds a port by itself, and no other run of the tests can take that
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    groups = [[(str(folder), options, what) for folder, options, what in runs] for runs in groups]
    for some in [[group] for group in groups] if by_torchrun else [groups]:
        finished = subprocess.run(
            [*command, str(RUN), str(processes), json.dumps(some)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr


def run_here(folder, options, what):
    """A run of tests/training/training_run.py in this process."""
    runpy.run_path(str(RUN))["run"](folder, options, what)


def said(folder):
    """What the ranks of a run said, in their order."""
    return [file.read_text() for file in sorted(folder.glob("rank-*.txt"))]


def made_once(tmp_path_factory, name, make):
    """The folder that `make` fills, for all workers of pytest-xdist: the first that comes makes it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name / "made").exists():
            make(root / name)
            (root / name / "made").touch()
    return root / name


def make_runs(folder, processes):
    """Self-conditioning, dropout, flips, accumulation and workers on: everything that draws randomness."""
    runs = [
        ("straight", {"train_num_steps": 6}, ""),
        ("resumed", {"train_num_steps": 3}, ""),
        ("order", {"train_num_steps": 1}, "order"),
    ]
    if processes > 1:
        runs += [
            ("reductions", {"train_num_steps": 2, "gradient_accumulate_every": 4}, "reductions"),
            ("classes", {"train_num_steps": 2, "cond_drop_prob": 0.5}, "reductions"),
            ("undropped", {"train_num_steps": 2, "cond_drop_prob": 0.0}, "reductions"),
            ("forms", {"train_num_steps": 1}, "forms"),
            ("plain", {"train_num_steps": 3, "graph": False}, "recorded"),
            ("recorded", {"train_num_steps": 3}, "recorded"),
            ("step by step", {"train_num_steps": 5, "graph": False}, ""),
            ("taped", {"train_num_steps": 5}, "taped"),
            ("hook first", {"train_num_steps": 5}, "hook first"),
            ("hook later", {"train_num_steps": 5}, "hook later"),
            ("refused", {"train_batch_size": 15}, "refused"),
        ]
    first = [(folder / name, options, what) for name, options, what in runs]
    run_training(first, [(folder / "resumed", {"train_num_steps": 6}, "last")], processes=processes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs in a process, or in two; the run `resumed` was continued by others."""
    return lambda processes: made_once(
        tmp_path_factory, f"training-runs-{processes}", lambda folder: make_runs(folder, processes)
    )


def assert_same_training(folder, other):
    """Two model-last.pt hold the same weights, EMA, optimizer and loss history, bit for bit."""
    first, second = load_file(folder / "model-last.pt"), load_file(other / "model-last.pt")
    assert first["step"] == second["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])
    moments = [data["opt"]["state"] for data in (first, second)]
    assert all(torch.equal(moments[0][i][name], moments[1][i][name]) for i in moments[0] for name in moments[0][i])
    assert losses(folder) == losses(other)


def losses(folder):
    return [row[:2] for row in LossHistory(folder).rows()]


class TestExactResume:
    @pytest.mark.release(but=lambda processes: processes == 2)
    @pytest.mark.parametrize("processes", [1, 2])
    def test_stop_and_go_in_new_processes_is_bitwise_the_straight_run(self, runs, processes):
        straight, resumed = runs(processes) / "straight", runs(processes) / "resumed"
        assert_same_training(straight, resumed)
        assert [int(step) for step, _ in losses(straight)] == [1, 2, 3, 4, 5, 6]

    def test_milestones_do_not_disturb_training(self, tmp_path):
        make_trainer(tmp_path / "none").train()
        make_trainer(tmp_path / "many", save_and_sample_every=1, train_num_steps=4).train()
        first, second = load_file(tmp_path / "none" / "model-last.pt"), load_file(tmp_path / "many" / "model-4.pt")
        assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])

    def test_what_the_caller_draws_in_between_does_not_matter(self, tmp_path):
        make_trainer(tmp_path / "a").train()
        trainer = make_trainer(tmp_path / "b", train_num_steps=2)
        trainer.train()
        torch.manual_seed(99), random.seed(99), torch.randn(1000)
        trainer.train_num_steps = 4
        trainer.train()
        assert_same_training(tmp_path / "a", tmp_path / "b")

    def test_manual_seed_fixes_a_run_without_seed(self, tmp_path):
        for name, seed in (("a", 5), ("b", 5), ("c", 6)):
            diffusion = make_diffusion()
            torch.manual_seed(seed)
            trainer = Trainer(
                diffusion,
                DigitsDataset(),
                results_folder=tmp_path / name,
                train_num_steps=1,
                calculate_fid=False,
                progress=False,
            )
            assert (trainer.seed == getattr(self, "seed", trainer.seed)) == (name != "c")
            self.seed = trainer.seed

    def test_a_run_resumed_twice_has_no_row_twice(self, tmp_path):
        make_trainer(tmp_path, train_num_steps=4, save_and_sample_every=2).train()
        trainer = make_trainer(tmp_path, train_num_steps=6, save_and_sample_every=100)
        trainer.load(1)
        trainer.train()
        assert [int(step) for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("damage", [b"4,0.1", b"\xff\0\0,1,2\n", b"a,b,c\n4,0.1"])
    def test_a_half_written_row_is_dropped(self, tmp_path, damage):
        make_trainer(tmp_path, train_num_steps=3).train()
        with open(tmp_path / "loss.csv", "ab") as file:
            file.write(damage)
        trainer = make_trainer(tmp_path, train_num_steps=5)
        trainer.load("last")
        trainer.train()
        assert [int(step) for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5]

    def test_a_new_run_in_an_old_folder_starts_its_own_history(self, tmp_path):
        make_trainer(tmp_path, train_num_steps=3).train()
        make_trainer(tmp_path, train_num_steps=2).train()
        assert [int(step) for step, _ in losses(tmp_path)] == [1, 2]

    def test_a_run_goes_on_with_its_choices_of_forms(self, tmp_path):
        chosen = {"conv_norm ('a card', (1, 2))": "fused", "conv_norm ('a card', (3, 4))": "separate"}
        try:
            measured.adopt(chosen)
            make_trainer(tmp_path).save(1)
            measured.adopt({"conv_norm ('a card', (1, 2))": "separate"})
            make_trainer(tmp_path).load(1)
            assert measured.chosen() == chosen
            data = load_file(tmp_path / "model-1.pt")
            del data["training"]["forms"]  # as files were before
            torch.save(data, tmp_path / "model-1.pt")
            make_trainer(tmp_path).load(1)
            assert measured.chosen() == {}
        finally:
            measured.forget()

    def test_another_number_of_processes_is_said(self, tmp_path):
        make_trainer(tmp_path).save(1)
        data = load_file(tmp_path / "model-1.pt")
        data["training"]["world_size"] = 4
        torch.save(data, tmp_path / "model-1.pt")
        with pytest.warns(UserWarning, match="written by 4 processes and is continued by 1"):
            make_trainer(tmp_path).load(1)


class TestOrder:
    @pytest.mark.parametrize("size, batch, ranks", [(10, 4, 1), (10, 4, 2), (3, 8, 2), (12, 4, 4), (1, 2, 1)])
    def test_ranks_share_one_order_in_which_each_epoch_is_a_permutation(self, size, batch, ranks):
        orders = [BatchOrder(size, batch, seed=1, rank=rank, world_size=ranks) for rank in range(ranks)]
        steps = 3 * size
        streams = [iter(order) for order in orders]
        together = [index for _ in range(steps) for stream in streams for index in next(stream)]
        for start in range(0, len(together) - size + 1, size):
            assert sorted(together[start : start + size]) == list(range(size))
        alone = iter(BatchOrder(size, batch, seed=1))
        assert together == [index for _ in range(steps) for index in next(alone)]

    def test_epochs_and_seeds_differ(self):
        order = BatchOrder(100, 100, seed=1)
        first, second = order.batch_at(0)[0].tolist(), order.batch_at(100)[0].tolist()
        assert first != second
        assert first != BatchOrder(100, 100, seed=2).batch_at(0)[0].tolist()

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_the_stream_gives_the_order_and_flips_half(self, num_workers):
        images = torch.rand(50, 1, 4, 4)
        order = BatchOrder(50, 8, seed=3)
        options = dict(device=torch.device("cpu"), num_workers=num_workers)
        stream = BatchStream(Images(images), order, augment_horizontal_flip=True, **options)
        flipped = 0
        for step in range(20):
            indices, flips = BatchOrder(50, 8, seed=3).batch_at(step * 8)
            pairs = zip(indices, flips, strict=True)
            expected = torch.stack([images[i].flip(-1) if flip else images[i] for i, flip in pairs])
            assert torch.equal(next(stream), expected)
            flipped += int(flips.sum())
        assert 50 < flipped < 110
        stream.seek(16, seed=3)
        indices, flips = BatchOrder(50, 8, seed=3).batch_at(16)
        assert torch.equal(next(stream)[0], images[indices[0]].flip(-1) if flips[0] else images[indices[0]])

    def test_the_stream_leaves_the_global_generator_alone(self):
        stream = BatchStream(
            Images(torch.rand(20, 1, 4, 4)),
            BatchOrder(20, 4, seed=0),
            device=torch.device("cpu"),
            augment_horizontal_flip=True,
            num_workers=0,
        )
        before = torch.get_rng_state()
        next(stream)
        assert torch.equal(torch.get_rng_state(), before)


class Images(torch.utils.data.Dataset):
    """A map-style dataset over a tensor (N, C, h, w)."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


class TestManyProcesses:
    def test_gradients_are_reduced_once_per_step_and_ranks_stay_equal(self, runs):
        """Upstream reduces in each of the accumulation's backwards."""
        assert said(runs(2) / "reductions") == ["reductions 2\nranks equal\nnoise differs\n", "reductions 2\n"]

    @pytest.mark.parametrize("run", ["classes", "undropped"])
    def test_with_classes_too_also_where_no_gradient_reaches_the_null_class(self, runs, run):
        assert said(runs(2) / run) == ["reductions 2\nranks equal\nnoise differs\n", "reductions 2\n"]

    def test_recorded_steps_have_the_same_bits(self, runs):
        """Gradients are averaged between two recordings, in flat memory, as DistributedDataParallel does in buckets."""
        plain, ours = said(runs(2) / "plain"), said(runs(2) / "recorded")
        assert len(plain) == len(ours) == 2
        assert all("graph=False was given" in text for text in plain)
        assert all("training replays the step itself" in text for text in ours)
        assert_same_training(runs(2) / "plain", runs(2) / "recorded")

    def test_all_have_the_forms_that_the_first_has_measured_and_the_checkpoint_keeps(self, runs):
        chosen = [json.loads(text) for text in said(runs(2) / "forms")]
        assert chosen == [{"op both": "fused", f"op rank {rank}": "separate"} | own for rank, own in enumerate(
            ({}, {"op rank 0": "separate"}))]  # fmt: skip
        assert load_file(runs(2) / "forms" / "model-last.pt")["training"]["forms"] == chosen[0]

    @pytest.mark.skipif(WHY_NO_TAPES is not None, reason=f"no tapes: {WHY_NO_TAPES}")
    @pytest.mark.parametrize("run", ["taped", "hook first", "hook later"])
    def test_tapes_have_the_same_bits_also_where_one_process_cannot_record(self, runs, run):
        """A hook of the first process alone: both run step by step from the first step on, or it alone from then on."""
        replays = "training replays a tape of operator calls; tapes=True, hooks=False\n"
        stops = "training runs step by step: the model's model has forward hooks, which a replay does not call; "
        expected = {
            "taped": [replays, replays],
            "hook first": [f"{stops}tapes=False, hooks=True\n", f"{stops}tapes=False, hooks=False\n"],
            "hook later": [f"{stops}tapes=False, hooks=True\n", replays],
        }
        assert said(runs(2) / run) == expected[run]
        assert_same_training(runs(2) / "step by step", runs(2) / run)

    def test_two_processes_see_the_images_of_one(self, runs, tmp_path):
        """With split_batches=True `train_batch_size` is for all ranks; under accelerate 1.x upstream's is per rank."""
        run_here(tmp_path, {}, "order")
        alone, pair = (
            [index for text in said(folder) for index in json.loads(text)] for folder in (tmp_path, runs(2) / "order")
        )
        assert alone == pair and len(alone) == 16

    def test_a_batch_that_does_not_split_is_named(self, runs):
        found = said(runs(2) / "refused")
        assert len(found) == 2
        assert all(re.search("train_batch_size is 15.*multiple of the 2 processes", text) for text in found)


class CountedReads(torch.Tensor):
    """A tensor that notes each time it or what is computed from it is read by the host."""

    @staticmethod
    def of(tensor, reads):
        counted = tensor.as_subclass(CountedReads)
        CountedReads.reads = reads
        return counted

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("item", "tolist", "__float__", "__bool__", "__format__", "cpu", "numpy"):
            cls.reads.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


class TestOutputs:
    @pytest.mark.draws
    def test_a_milestone_writes_everything(self, tmp_path):
        trainer = make_trainer(tmp_path, save_and_sample_every=2, num_samples=7, train_num_steps=5)
        trainer.train()
        assert sorted(os.listdir(tmp_path)) == [
            "loss.csv",
            "loss.png",
            "model-1.pt",
            "model-2.pt",
            "model-last.pt",
            "sample-1.png",
            "sample-2.png",
        ]
        assert Image.open(tmp_path / "sample-1.png").size == (3 * 10 + 2, 3 * 10 + 2)
        with open(tmp_path / "loss.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]
        assert all(float(row["loss"]) > 0 and float(row["images_per_second"]) > 0 for row in rows)
        plot = np.asarray(Image.open(tmp_path / "loss.png").convert("L"))
        assert plot.shape[0] > 300 and plot.std() > 5
        assert load_checkpoint(tmp_path / "model-last.pt").step == 5

    def test_grids_come_from_the_ema_with_one_noise(self, tmp_path):
        trainer = make_trainer(tmp_path, save_and_sample_every=1, train_num_steps=1)
        trainer.train()
        first = (tmp_path / "sample-1.png").read_bytes()
        trainer._save_samples(tmp_path / "again.png")
        assert (tmp_path / "again.png").read_bytes() == first
        with torch.no_grad():
            next(trainer.ema.ema_model.parameters()).mul_(3)
        trainer._save_samples(tmp_path / "other.png")
        assert (tmp_path / "other.png").read_bytes() != first

    def test_the_recorded_loss_is_the_mean_of_its_steps(self, tmp_path):
        make_trainer(tmp_path / "each", train_num_steps=6).train()
        make_trainer(tmp_path / "some", train_num_steps=6, log_every=3).train()
        each = [float(loss) for _, loss in losses(tmp_path / "each")]
        some = losses(tmp_path / "some")
        assert [int(step) for step, _ in some] == [3, 6]
        assert float(some[1][1]) == pytest.approx(sum(each[3:]) / 3, rel=1e-6)

    def test_the_loss_is_read_only_when_logged(self, tmp_path):
        """Upstream calls .item() in every micro-step."""
        trainer = make_trainer(tmp_path, gradient_accumulate_every=2, log_every=5, train_num_steps=10)
        reads = []
        trainer.model.forward = lambda images: CountedReads.of(next(trainer.model.parameters()).square().sum(), reads)
        trainer.train()
        assert reads == ["tolist"] * 2, "one reading at step 5 and one at step 10"

    def test_training_learns(self, tmp_path):
        make_trainer(tmp_path, train_num_steps=120, log_every=20, train_batch_size=32, train_lr=4e-3).train()
        values = [float(loss) for _, loss in losses(tmp_path)]
        assert values[-1] < 0.7 * values[0]

    def test_bf16_trains_with_float32_weights(self, tmp_path):
        """In a process of its own: accelerate fixes the precision once per process."""
        options = {"amp": True, "mixed_precision_type": "bf16", "train_num_steps": 2}
        run_training([(tmp_path / "bf16", options, "")])
        run_here(tmp_path / "float32", {"train_num_steps": 2}, "")
        data = load_file(tmp_path / "bf16" / "model-last.pt")
        assert all(tensor.dtype == torch.float32 for tensor in data["model"].values())
        first, second = (float(losses(folder)[0][1]) for folder in (tmp_path / "bf16", tmp_path / "float32"))
        assert first != second
        assert first == pytest.approx(second, rel=0.02)


class TestFailures:
    def test_nan_stops_with_the_step_and_keeps_the_checkpoint(self, tmp_path):
        trainer = make_trainer(tmp_path, train_num_steps=2)
        trainer.train()
        before = (tmp_path / "model-last.pt").read_bytes()
        trainer.train_num_steps, trainer.log_every, trainer.save_and_sample_every = 40, 10, 100
        original, calls = trainer.model.p_losses, []

        def poisoned(*args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs) * (math.nan if len(calls) >= 3 else 1)

        trainer.model.p_losses = poisoned
        with pytest.raises(DivergenceError, match="diverged at step 5: loss nan"):
            trainer.train()
        assert trainer.step == 10
        assert (tmp_path / "model-last.pt").read_bytes() == before

    def test_an_infinite_gradient_stops_even_before_the_loss_shows_it(self, tmp_path):
        trainer = make_trainer(tmp_path, save_and_sample_every=1)
        parameter = next(trainer.model.parameters())
        parameter.register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(DivergenceError, match="diverged at step 1.*gradient norm (nan|inf)"):
            trainer.train()
        assert not list(tmp_path.glob("model-*.pt"))

    @pytest.mark.parametrize("number, stop", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
    def test_a_signal_saves_and_ends_as_python_does(self, tmp_path, number, stop):
        trainer = make_trainer(tmp_path, train_num_steps=10_000)
        original = trainer.model.p_losses
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

        def interrupted(*args, **kwargs):
            if trainer.step == 2:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        trainer.model.p_losses = interrupted
        with pytest.raises(stop) as stopped:
            trainer.train()
        assert stop is KeyboardInterrupt or stopped.value.code == 143
        assert load_file(tmp_path / "model-last.pt")["step"] == 3
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        make_trainer(tmp_path / "straight", train_num_steps=5).train()
        resumed = make_trainer(tmp_path, train_num_steps=5)
        resumed.load("last")
        resumed.train()
        assert_same_training(tmp_path / "straight", tmp_path)

    def test_a_signal_in_the_last_step_is_not_lost(self, tmp_path):
        trainer = make_trainer(tmp_path, train_num_steps=1)
        original = trainer.model.p_losses
        trainer.model.p_losses = lambda *args, **kwargs: (
            os.kill(os.getpid(), signal.SIGINT) or original(*args, **kwargs)
        )
        with pytest.raises(KeyboardInterrupt, match="stopped at step 1; .*model-last.pt resumes from there"):
            trainer.train()
        assert load_file(tmp_path / "model-last.pt")["step"] == 1

    def test_kill_9_in_training_leaves_loadable_checkpoints(self, tmp_path):
        options = dict(train_num_steps=10_000, save_and_sample_every=1, num_samples=1, num_workers=0)
        process = subprocess.Popen(
            [sys.executable, str(RUN), "0", json.dumps([[(str(tmp_path), options, "")]])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        deadline = time.monotonic() + 600
        while len(list(tmp_path.glob("model-*.pt"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        found = list(tmp_path.glob("model-*.pt"))
        assert len(found) >= 3
        assert sorted(load_file(path)["step"] for path in found) == list(range(1, len(found) + 1))

    def test_small_data_and_batches_are_warned_about_not_refused(self, tmp_path):
        with pytest.warns(UserWarning, match="only 20 images") as caught:
            make_trainer(tmp_path, dataset=Images(torch.rand(20, 1, 8, 8)), train_batch_size=2).train()
        assert any("effective batch size" in str(w.message) and "is 2;" in str(w.message) for w in caught)

    @pytest.mark.parametrize(
        "options, error, message",
        [
            (dict(train_num_steps=True), ValueError, "train_num_steps must be a positive integer; got True"),
            (dict(seed=1.5), ValueError, "seed must be an integer; got 1.5"),
            (dict(num_workers=-1), ValueError, "num_workers must be a non-negative integer; got -1"),
            (dict(train_lr="1e-4"), ValueError, "train_lr must be a number.*; got '1e-4'"),
            (dict(train_lr=-1), ValueError, r"train_lr must be a number in \[0, inf\]; got -1"),
            (dict(ema_decay=1.5), ValueError, r"ema_decay must be a number in \[0, 1\]; got 1.5"),
            (dict(adam_betas=0.9), ValueError, "adam_betas must be two numbers; got 0.9"),
            (dict(adam_betas=(0.9, 1)), ValueError, r"adam_betas must be less than 1; got \(0.9, 1\)"),
            (dict(amp="no"), ValueError, "amp must be True or False; got 'no'"),
            (dict(graph="no"), ValueError, "graph must be True or False; got 'no'"),
            (dict(augment_horizontal_flip="no"), ValueError, "augment_horizontal_flip must be True or False; got"),
            (
                dict(amp=True, mixed_precision_type="f8"),
                ValueError,
                "mixed_precision_type must be one of no, fp16, bf16",
            ),
            (dict(train_batch_size=0), ValueError, "train_batch_size must be a positive integer; got 0"),
            (dict(num_samples=2.5), ValueError, "num_samples must be a positive integer; got 2.5"),
            (dict(save_best_and_latest_only=True), ValueError, "calculate_fid must be True"),
            (dict(dataset=Images(torch.rand(200, 3, 8, 8))), ValueError, r"shape \(1, 8, 8\).*first is.*\(3, 8, 8\)"),
            (dict(dataset=Images(torch.zeros(200, 1, 8, 8).int())), ValueError, "or uint8 .* is torch.int32"),
            (dict(dataset=Images(torch.rand(0, 1, 8, 8))), ValueError, "without images"),
            (dict(dataset=[(0, 1)] * 200), TypeError, "its first item is a tuple"),
            (dict(dataset=3), TypeError, "folder must be a path or a map-style dataset of images; got int"),
            (dict(dataset="/nowhere/at/all"), FileNotFoundError, "folder /nowhere/at/all does not exist"),
        ],
    )
    def test_wrong_arguments_get_one_sentence(self, tmp_path, options, error, message):
        with pytest.raises(error, match=message):
            make_trainer(tmp_path, **options)

    @pytest.mark.parametrize(
        "name, value, message",
        [
            ("log_every", 0, "a positive integer; got 0"),
            ("save_and_sample_every", -3, "a positive integer; got -3"),
            ("train_num_steps", None, "a positive integer; got None"),
            ("gradient_accumulate_every", 1.5, "a positive integer; got 1.5"),
            ("num_samples", "9", "a positive integer; got '9'"),
            ("batch_size", 0, "a positive integer; got 0"),
            ("step", -1, "a non-negative integer; got -1"),
            ("seed", None, "an integer; got None"),
            ("max_grad_norm", -1, r"a number in \[0, inf\]; got -1"),
            ("best_fid", None, "a number; got None"),
            ("calculate_fid", True, "True when the trainer is made; got True afterwards"),
        ],
    )
    def test_wrong_attributes_get_one_sentence(self, tmp_path, name, value, message):
        trainer = make_trainer(tmp_path)
        setattr(trainer, name, value)
        with pytest.raises(ValueError, match=f"{name} must be {message}"):
            trainer.train()
        assert not list(tmp_path.iterdir())

    def test_the_best_without_fid_is_refused_when_assigned(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.save_best_and_latest_only = True
        with pytest.raises(ValueError, match="chooses by FID, so calculate_fid must be True"):
            trainer.train()

    def test_attributes_that_are_assigned_hold(self, tmp_path):
        """A trainer that is given the same from the start computes the same, and files record it."""
        assigned = make_trainer(tmp_path / "1", seed=1, train_num_steps=5, save_and_sample_every=9)
        assigned.seed, assigned.log_every, assigned.save_and_sample_every = 2, 3.0, np.int64(2)
        assigned.gradient_accumulate_every, assigned.max_grad_norm, assigned.train_num_steps = 2, 0.5, 4
        assigned.num_samples, assigned.results_folder = 4, str(tmp_path / "3")
        options = dict(gradient_accumulate_every=2, max_grad_norm=0.5, train_num_steps=4, num_samples=4)
        given = make_trainer(tmp_path / "2", seed=2, log_every=3, save_and_sample_every=2, **options)
        for trainer in (assigned, given):
            trainer.train()
        names = ["loss.csv", "model-1.pt", "model-2.pt", "sample-1.png", "sample-2.png"]
        assert sorted({path.name for path in (tmp_path / "3").iterdir()} - {"loss.png"}) == names
        assert not list((tmp_path / "1").iterdir())
        one, two = (load_file(tmp_path / folder / "model-2.pt") for folder in "23")
        assert one["training"] == two["training"]
        for key, tensor in one["model"].items():
            assert torch.equal(tensor, two["model"][key]), key

    def test_a_batch_size_that_is_assigned_is_that_of_samples(self, tmp_path):
        """As upstream's: the batches of training are made with the trainer."""
        trainer = make_trainer(tmp_path, train_num_steps=2, num_samples=5, train_batch_size=16)
        trainer.batch_size = 2
        trainer.train()
        assert load_file(tmp_path / "model-last.pt")["training"]["train_batch_size"] == 16
        sizes, sample = [], trainer.ema.ema_model.sample
        trainer.ema.ema_model.sample = lambda batch_size, **options: (
            sizes.append(batch_size) or sample(batch_size=batch_size, **options)
        )
        trainer._save_samples(tmp_path / "sample.png")
        assert sizes == [2, 2, 1]

    def test_betas_may_be_integers(self, tmp_path):
        trainer = make_trainer(tmp_path, adam_betas=(0, 0.5), train_num_steps=1)
        trainer.train()
        assert trainer.opt.param_groups[0]["betas"] == (0.0, 0.5)

    def test_a_results_folder_that_is_a_file_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match="results_folder .*new cannot be made: .*file is a file; it must"):
            make_trainer(tmp_path / "file" / "new")

    def test_a_diffusion_of_unknown_size_is_refused(self, tmp_path):
        diffusion = make_diffusion()
        diffusion.image_size = None
        with pytest.raises(ValueError, match="image_size is None"):
            make_trainer(tmp_path, diffusion)

    def test_an_image_size_that_its_network_cannot_halve(self, tmp_path):
        with pytest.raises(ValueError, match=r"image_size must be divisible by 2 for its network; got \(8, 9\)"):
            make_trainer(tmp_path, diffusion=make_diffusion(image_size=(8, 9)))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ["channels", "image_size", "objective", "num_timesteps", "is_ddim_sampling"])
    def test_a_process_that_lacks_an_attribute_is_named(self, tmp_path, name):
        diffusion = make_diffusion()
        delattr(diffusion, name)
        with pytest.raises(TypeError, match=f"must have the attributes .*; GaussianDiffusion lacks {name}$"):
            make_trainer(tmp_path, diffusion)

    @pytest.mark.parametrize("size", [8, np.int64(8), "88", (8,), (8, 8, 8), (8, 0), (8, 8.5)])
    def test_a_process_of_an_unusable_size_is_named(self, tmp_path, size):
        diffusion = make_diffusion()
        diffusion.image_size = size
        with pytest.raises(ValueError, match="diffusion_model.image_size must be"):
            make_trainer(tmp_path, diffusion)

    def test_what_is_no_module_is_named(self, tmp_path):
        with pytest.raises(TypeError, match="diffusion_model must be a module such as GaussianDiffusion; got str"):
            make_trainer(tmp_path, "diffusion")

    def test_divergence_without_a_checkpoint_speaks_of_none(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.model.p_losses = lambda *args, **kwargs: next(trainer.model.parameters()).sum() * math.nan
        with pytest.raises(DivergenceError, match=r"at step 1: loss nan, gradient norm nan; \(a lower learning rate"):
            trainer.train()

    def test_a_full_disk_stops_with_one_sentence_and_keeps_what_was(self, tmp_path):
        import resource

        trainer = make_trainer(tmp_path, train_num_steps=2)
        trainer.train()
        before = (tmp_path / "model-last.pt").read_bytes()
        trainer.train_num_steps = 4
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            with pytest.raises(OSError, match="could not write .*model-last.pt"):
                trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "model-last.pt").read_bytes() == before


class TestManyTrainersInOneProcess:
    """accelerate keeps one precision for the process; each trainer computes in its own all the same."""

    def test_each_has_its_own_precision(self, tmp_path):
        precisions = ["no", "bf16", "no"]
        trainers = [
            make_trainer(tmp_path / str(i), train_num_steps=1, amp=precision != "no", mixed_precision_type=precision)
            for i, precision in enumerate(precisions)
        ]
        for trainer in trainers:
            trainer.train()
        first, second, third = (losses(tmp_path / str(i)) for i in range(3))
        assert first == third and first != second
        assert float(first[0][1]) == pytest.approx(float(second[0][1]), rel=0.02)
        for i, precision in enumerate(precisions):
            assert load_file(tmp_path / str(i) / "model-last.pt")["training"]["mixed_precision"] == precision

    def test_anothers_accelerator_keeps_its_precision(self, tmp_path):
        from accelerate import Accelerator

        before = Accelerator().mixed_precision
        make_trainer(tmp_path, train_num_steps=1, amp=True, mixed_precision_type="bf16").train()
        assert Accelerator().mixed_precision == before


def test_without_sched_getaffinity_the_processors_are_counted(tmp_path, monkeypatch):
    """macOS and Windows have none."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    trainer = make_trainer(tmp_path, dataset=Images(torch.rand(200, 1, 8, 8)))
    assert trainer.dl._loader.num_workers == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert make_trainer(tmp_path, dataset=Images(torch.rand(200, 1, 8, 8))).dl._loader.num_workers == 1


class TestPlainSettings:
    NUMPY = dict(
        train_batch_size=np.int64(16),
        gradient_accumulate_every=1.0,
        train_lr=np.float64(1e-3),
        train_num_steps=torch.tensor([2]),
        ema_update_every=np.int32(1),
        ema_decay=np.float64(0.9),
        adam_betas=np.array([0.9, 0.99]),
        save_and_sample_every=1e5,
        num_samples=np.int64(4),
        max_grad_norm=np.float32(1),
        augment_horizontal_flip=np.bool_(False),
        seed=np.int64(0),
        num_workers=np.int64(0),
        log_every=torch.tensor(1),
    )

    def test_a_run_of_numpys_numbers_is_the_run_of_pythons(self, upstream, tmp_path):
        make_trainer(tmp_path / "numpy", **self.NUMPY).train()
        plain = dict(train_num_steps=2, ema_decay=0.9, save_and_sample_every=100_000, num_workers=0)
        make_trainer(tmp_path / "plain", **plain).train()
        assert_same_training(tmp_path / "numpy", tmp_path / "plain")
        path = tmp_path / "numpy" / "model-last.pt"
        first, second = torch.load(path, weights_only=True), load_file(tmp_path / "plain" / "model-last.pt")
        assert first["training"] == second["training"] and first["config"] == second["config"]
        assert first["opt"]["param_groups"] == second["opt"]["param_groups"]
        assert load_checkpoint(path).step == 2

    def test_what_is_changed_later_is_saved_plain(self, tmp_path):
        """Schedules of the learning rate often compute in numpy."""
        trainer = make_trainer(tmp_path)
        trainer.opt.param_groups[0]["lr"] = np.float64(1e-5)
        trainer.ema.beta = np.float64(0.5)
        trainer.train_num_steps = np.int64(7)
        trainer.model.sampling_timesteps = np.int64(3)
        trainer.save(np.int64(1))
        data = torch.load(tmp_path / "model-1.pt", weights_only=True)
        assert data["opt"]["param_groups"][0]["lr"] == 1e-5
        assert data["config"]["ema"] == {"beta": 0.5, "update_every": 1}
        assert data["config"]["diffusion"]["sampling_timesteps"] == 3
        assert data["training"]["train_num_steps"] == 7

    def test_a_config_of_another_package_is_not_recorded(self, tmp_path):
        diffusion = make_diffusion()
        network = torch.nn.Conv2d(1, 1, 3, padding=1)
        network.config = {"anything": object()}
        network.channels = network.out_dim = 1
        network.self_condition = False
        network.forward = lambda x, t, x_self_cond=None: torch.nn.Conv2d.forward(network, x)
        diffusion = ddpm_fast.GaussianDiffusion(network, image_size=8, timesteps=20)
        make_trainer(tmp_path, diffusion, train_num_steps=1).train()
        assert load_file(tmp_path / "model-last.pt")["config"]["unet"] is None
        again = make_trainer(tmp_path, diffusion)
        again.load("last")
        assert again.step == 1


class OwnProcess(torch.nn.Module):
    """A process of another package: names of its own, one of them `module`, and no network called model."""

    channels, image_size, objective, num_timesteps, is_ddim_sampling = 1, (8, 8), "own", 10, False

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(1, 1, 1)
        self.net.module = torch.nn.Linear(1, 1)
        self.module = torch.nn.Conv2d(1, 1, 1)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    @property
    def model(self):
        return self.net

    def forward(self, images):
        return (self.module(self.net(images)) + self.weight + self.net.module(images[..., :1])).square().mean()

    def sample(self, batch_size, **options):
        return torch.rand(batch_size, 1, 8, 8)


def test_a_process_of_another_package_trains_and_goes_on(tmp_path):
    trainer = make_trainer(tmp_path, OwnProcess(), train_num_steps=2)
    trainer.train()
    other = make_trainer(tmp_path, OwnProcess(), train_num_steps=3)
    other.load("last")
    for name, tensor in trainer.ema.state_dict().items():
        assert torch.equal(tensor, other.ema.state_dict()[name]), name
    other.train()
    torch.save({"step": 1, "model": {"weight": torch.zeros(1)}, "opt": {}, "ema": {}}, tmp_path / "model-1.pt")
    with pytest.raises(CheckpointError, match="has other names than this trainer's OwnProcess"):
        other.load(1)


class TestChangedSettings:
    """What the trainer was given holds after `load`; what the weights depend on is refused."""

    CHANGES = {
        "train_lr": (3e-3, "train_lr=0.003 (was 0.001)"),
        "adam_betas": ((0.8, 0.9), "adam_betas=(0.8, 0.9) (was (0.9, 0.99))"),
        "ema_decay": (0.9, "ema_decay=0.9 (was 0.995)"),
        "ema_update_every": (5, "ema_update_every=5 (was 1)"),
        "train_batch_size": (32, "train_batch_size=32 (was 16); the order of the images goes on"),
        "gradient_accumulate_every": (2, "gradient_accumulate_every=2 (was 1)"),
        "max_grad_norm": (0.5, "max_grad_norm=0.5 (was 1.0)"),
        "augment_horizontal_flip": (True, "augment_horizontal_flip=True (was False)"),
        "seed": (5, "seed=5 (was 0)"),
    }

    @pytest.mark.parametrize("name", CHANGES)
    def test_a_changed_setting_is_said_applied_and_recorded(self, tmp_path, name):
        value, sentence = self.CHANGES[name]
        make_trainer(tmp_path, train_num_steps=2).train()
        trainer = make_trainer(tmp_path, train_num_steps=3, **{name: value})
        with pytest.warns(UserWarning, match=re.escape(f"model-last.pt is continued with {sentence}")):
            trainer.load("last")
        assert trainer.dl.position == 32
        trainer.train()
        data = load_file(tmp_path / "model-last.pt")
        group, ema = data["opt"]["param_groups"][0], data["config"]["ema"]
        recorded = {
            **data["training"],
            "train_lr": group["lr"],
            "adam_betas": group["betas"],
            "ema_decay": ema["beta"],
            "ema_update_every": ema["update_every"],
        }
        assert recorded[name] == value
        assert data["step"] == 3

    def test_the_same_settings_say_nothing_and_no_seed_keeps_the_files(self, tmp_path, recwarn):
        make_trainer(tmp_path, seed=3).save(1)
        trainer = make_trainer(tmp_path, seed=None, train_num_steps=9, save_and_sample_every=7)
        recwarn.clear()
        trainer.load(1)
        assert trainer.seed == 3 and trainer.dl.order.seed == 3 and not recwarn.list

    def test_the_learning_rate_of_now_holds(self, tmp_path):
        make_trainer(tmp_path).save(1)
        trainer = make_trainer(tmp_path)
        trainer.opt.param_groups[0]["lr"] = 0.25
        with pytest.warns(UserWarning, match="train_lr=0.25"):
            trainer.load(1)
        assert trainer.opt.param_groups[0]["lr"] == 0.25

    @pytest.mark.parametrize(
        "options, old, new",
        [
            (dict(objective="pred_noise"), "objective='pred_v'", "objective='pred_noise'"),
            (dict(beta_schedule="cosine"), "beta_schedule='sigmoid'", "beta_schedule='cosine'"),
            (dict(schedule_fn_kwargs={"tau": 0.5}), "schedule_fn_kwargs={}", "schedule_fn_kwargs={'tau': 0.5}"),
            (dict(timesteps=30), "timesteps=20", "timesteps=30"),
            (dict(image_size=(8, 16)), "image_size=[8, 8]", "image_size=[8, 16]"),
            (dict(auto_normalize=False), "auto_normalize=True", "auto_normalize=False"),
            (dict(min_snr_loss_weight=True), "min_snr_loss_weight=False", "min_snr_loss_weight=True"),
        ],
    )
    @pytest.mark.parametrize("is_upstreams", [False, True])
    def test_another_process_is_refused_with_both_values(self, tmp_path, options, old, new, is_upstreams):
        make_trainer(tmp_path).save(1)
        if is_upstreams:
            data = load_file(tmp_path / "model-1.pt")
            torch.save(
                {name: data[name] for name in ("step", "model", "opt", "ema", "scaler")}, tmp_path / "model-1.pt"
            )
            if {"image_size", "auto_normalize", "schedule_fn_kwargs"} & options.keys():
                return  # its buffers tell nothing of the first two, and the file no arguments of a schedule
        shape = (1, *(options.get("image_size", (8, 8))))
        trainer = make_trainer(tmp_path, make_diffusion(**options), dataset=Images(torch.rand(200, *shape)))
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        pattern = f"was trained with .*{re.escape(old)}.*this trainer's diffusion has .*{re.escape(new)}"
        with pytest.raises(CheckpointError, match=pattern):
            trainer.load(1)
        assert trainer.step == 0
        assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())

    def test_another_gamma_is_refused(self, tmp_path):
        make_trainer(tmp_path, make_diffusion(min_snr_loss_weight=True)).save(1)
        other = make_trainer(tmp_path, make_diffusion(min_snr_loss_weight=True, min_snr_gamma=3))
        with pytest.raises(CheckpointError, match="min_snr_gamma=5, .*min_snr_gamma=3"):
            other.load(1)

    @pytest.mark.parametrize(
        "options, sentence",
        [
            (dict(dim=16), "the file has dim=8; init_dim=8, this trainer has dim=16; init_dim=16"),
            (dict(attn_heads=2, attn_dim_head=64), r"attn_dim_head=\(32, 32\).*attn_heads=\(2, 2\)"),
            (dict(dim_mults=(1, 4)), r"the file has dim_mults=\(1, 2\), this trainer has dim_mults=\(1, 4\)"),
            (dict(sinusoidal_pos_emb_theta=100), "the file has sinusoidal_pos_emb_theta=10000, this trainer has"),
            (dict(self_condition=True), "the file has self_condition=False, this trainer has self_condition=True"),
        ],
    )
    def test_another_network_is_refused_with_both_values(self, tmp_path, options, sentence):
        make_trainer(tmp_path).save(1)
        network = ddpm_fast.Unet(**{"dim": 8, "dim_mults": (1, 2), "channels": 1, **options})
        diffusion = ddpm_fast.GaussianDiffusion(network, image_size=8, timesteps=20)
        with pytest.raises(CheckpointError, match=f"of another architecture: .*{sentence}"):
            make_trainer(tmp_path, diffusion).load(1)

    def test_what_changes_no_function_is_taken(self, tmp_path):
        make_trainer(tmp_path).save(1)
        network = ddpm_fast.Unet(
            8, init_dim=8, dim_mults=[1, 2], channels=1, attn_heads=(4, 4), full_attn=[False, True], memory="low",
            dropout=0.1,
        )  # fmt: skip
        diffusion = ddpm_fast.GaussianDiffusion(
            network, image_size=8, timesteps=20, sampling_timesteps=4, sampler="ddim",
            schedule_fn_kwargs={"tau": 1.0},
        )  # fmt: skip
        trainer = make_trainer(tmp_path, diffusion)
        trainer.load(1)
        trainer.save(2)
        config = load_file(tmp_path / "model-2.pt")["config"]
        assert config["unet"]["dropout"] == 0.1 and config["diffusion"]["sampling_timesteps"] == 4

    def test_a_size_that_was_set_later_is_recorded(self, tmp_path):
        diffusion = make_diffusion(image_size=16)
        diffusion.image_size = (8, 8)
        make_trainer(tmp_path, diffusion).save(1)
        assert load_checkpoint(tmp_path / "model-1.pt").diffusion.image_size == (8, 8)

    @pytest.mark.parametrize("entry, value, sentence", UNUSABLE)
    def test_an_unusable_entry_is_named_and_nothing_is_loaded(self, tmp_path, entry, value, sentence):
        trainer = make_trainer(tmp_path)
        trainer.save(1)
        path = tmp_path / "model-1.pt"
        data = load_file(path)
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        data["model"] = {name: tensor + 1 for name, tensor in data["model"].items()}
        *parts, last = entry
        place = data
        for part in parts:
            place = place[part]
        place[last] = value
        torch.save(data, path)
        for load in (trainer.load, *([load_checkpoint] if parts[0] == "config" else [])):
            with pytest.raises(CheckpointError, match=sentence) as caught:
                load(path.absolute())
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())

    def test_another_optimizer_is_named_and_nothing_is_loaded(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.save(1)
        data = load_file(tmp_path / "model-1.pt")
        data["opt"]["state"] = {0: {"momentum_buffer": torch.zeros(8)}}
        torch.save(data, tmp_path / "model-1.pt")
        with pytest.raises(CheckpointError, match="an optimizer that is no Adam: parameter 0 has no 'exp_avg'"):
            trainer.load(1)
        data["opt"] = torch.optim.Adam([torch.zeros(2)]).state_dict()
        torch.save(data, tmp_path / "model-1.pt")
        with pytest.raises(CheckpointError, match=r"has an optimizer of \[1\] parameters, this trainer's has \["):
            trainer.load(1)

    def test_moments_of_other_weights_are_named_and_nothing_is_loaded(self, tmp_path):
        trainer = make_trainer(tmp_path, train_num_steps=1)
        trainer.train()
        data = load_file(tmp_path / "model-last.pt")
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        data["model"] = {name: tensor + 1 for name, tensor in data["model"].items()}
        first = data["opt"]["state"][0]
        for number, entry, sentence in (
            (0, {"exp_avg": torch.zeros(7)}, r"exp_avg of parameter 0 has shape \(7,\)"),
            (0, {"exp_avg_sq": None}, "exp_avg_sq of parameter 0 has shape None"),
            (0, {"step": None}, "no number of steps for parameter 0"),
            (10**6, {}, "exp_avg of parameter 1000000"),
        ):
            state = {**data["opt"]["state"], number: {**first, **entry}}
            torch.save({**data, "opt": {**data["opt"], "state": state}}, tmp_path / "model-7.pt")
            with pytest.raises(CheckpointError, match=sentence):
                trainer.load(7)
            assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


class TestFid:
    def test_the_distance_of_gaussians_is_the_closed_form(self):
        """Diagonal covariances: sum of (μ₁ − μ₂)² + (σ₁ − σ₂)²; the zeros make them singular."""
        rng = np.random.default_rng(0)
        means, deviations = rng.normal(size=(2, 20)), rng.uniform(0, 3, size=(2, 20))
        deviations[:, :5] = 0
        expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
        covariances = [np.diag(deviation**2) for deviation in deviations]
        assert frechet_distance(means[0], covariances[0], means[1], covariances[1]) == pytest.approx(expected)

    def test_the_distance_agrees_with_pytorch_fid(self):
        fid_score = pytest.importorskip("pytorch_fid.fid_score")
        rng = np.random.default_rng(0)
        sides = [mean_and_covariance(rng.normal(size=(100, 12)) @ rng.normal(size=(12, 12))) for _ in range(2)]
        expected = fid_score.calculate_frechet_distance(*sides[0], *sides[1])
        assert frechet_distance(*sides[0], *sides[1]) == pytest.approx(expected, rel=1e-6)

    def test_scores_sink_as_samples_approach_the_data(self, tmp_path):
        data = DigitsDataset().images
        scores = [self.score(tmp_path / str(level), data, level) for level in (0.0, 0.2, 1.0)]
        assert scores == sorted(scores)
        assert scores[0] < 0.1 * scores[2]

    @staticmethod
    def score(folder, data, noise_level):
        folder.mkdir()

        class Sampler(torch.nn.Module):
            def sample(self, batch_size, progress=True):
                start = torch.randint(0, len(data) - batch_size, ())
                return data[start : start + batch_size] + noise_level * torch.randn(batch_size, 1, 8, 8)

        scorer = FIDEvaluation(
            100,
            data.split(100),
            Sampler(),
            channels=1,
            stats_dir=folder,
            device="cpu",
            num_fid_samples=550,
            feature_extractor=lambda images: images.mean(1).flatten(1)[:, ::4],
        )
        first = scorer.fid_score()
        assert (folder / "dataset_stats.npz").exists()
        return first

    def test_without_pytorch_fid_training_goes_on(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pytorch_fid.inception", None)
        sentence = r"FID is switched off: FID needs pytorch_fid.*, which is not installed: .*ddpm_fast\[fid\]"
        with pytest.warns(UserWarning, match=sentence):
            trainer = make_trainer(tmp_path, calculate_fid=True, train_num_steps=1, save_and_sample_every=1)
        trainer.train()
        assert (tmp_path / "model-1.pt").exists()
        with pytest.raises(FIDUnavailableError, match="save_best_and_latest_only=True"):
            make_trainer(tmp_path, calculate_fid=True, save_best_and_latest_only=True)

    def test_best_and_latest(self, tmp_path, monkeypatch):
        scores = iter([5.0, 7.0, 3.0])
        scorer = type("Scorer", (), {"__init__": lambda self, **_: None, "fid_score": lambda self: next(scores)})
        monkeypatch.setattr("ddpm_fast.training.trainer.FIDEvaluation", scorer)
        trainer = make_trainer(
            tmp_path, calculate_fid=True, save_best_and_latest_only=True, save_and_sample_every=1, train_num_steps=2
        )
        trainer.train()
        steps = {name: load_file(tmp_path / f"model-{name}.pt")["step"] for name in ("best", "latest")}
        assert steps == {"best": 1, "latest": 2}
        trainer = make_trainer(
            tmp_path, calculate_fid=True, save_best_and_latest_only=True, save_and_sample_every=1, train_num_steps=3
        )
        trainer.load("latest")
        assert trainer.best_fid == 5.0
        trainer.train()
        assert load_file(tmp_path / "model-best.pt")["step"] == 3


def ranges_warned(caught):
    return [str(w.message) for w in caught if "values from" in str(w.message)]


class TestImages:
    @pytest.mark.parametrize(
        "low, high, options",
        [(-1, 1, {}), (0, 255, {}), (-2.1, 2.6, {}), (0, 2, {}), (0, 255, dict(auto_normalize=False))],
    )
    def test_a_dataset_plainly_out_of_range_gets_one_warning(self, tmp_path, low, high, options):
        images = torch.zeros(120, 1, 8, 8)
        images[119], images[0] = low, high
        expected = "-1, 1" if options else "0, 1"
        with pytest.warns(
            UserWarning, match=rf"values from {low} to {high}, .* expects them in \[{expected}\]"
        ) as caught:
            make_trainer(tmp_path, make_diffusion(**options), Images(images), train_num_steps=1, num_workers=0).train()
        assert len(ranges_warned(caught)) == 1

    @pytest.mark.parametrize("low, high, options", [(0, 1, {}), (-0.02, 1.03, {}), (-1, 1, dict(auto_normalize=False))])
    def test_a_dataset_in_range_gets_none(self, tmp_path, low, high, options):
        images = torch.zeros(120, 1, 8, 8)
        images[119], images[0] = low, high
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(tmp_path, make_diffusion(**options), Images(images))
        assert ranges_warned(caught) == []

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_items_of_other_floats_train_as_float32(self, tmp_path, dtype):
        images = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        make_trainer(tmp_path / "other", dataset=Images(images), train_num_steps=2, num_workers=0).train()
        make_trainer(tmp_path / "float32", dataset=Images(images.float()), train_num_steps=2, num_workers=0).train()
        assert_same_training(tmp_path / "other", tmp_path / "float32")

    def test_bytes_train_as_the_floats_that_they_stand_for(self, tmp_path):
        images = torch.randint(0, 256, (120, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        make_trainer(tmp_path / "bytes", dataset=Images(images), train_num_steps=3, num_workers=0).train()
        make_trainer(tmp_path / "floats", dataset=Images(images / 255), train_num_steps=3, num_workers=0).train()
        assert_same_training(tmp_path / "bytes", tmp_path / "floats")

    def test_a_process_that_listens_gets_mirrored_floats(self, tmp_path):
        images = torch.randint(0, 256, (120, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        seen = []
        diffusion = make_diffusion()
        diffusion.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        make_trainer(tmp_path / "heard", diffusion, Images(images), train_num_steps=2, num_workers=0).train()
        make_trainer(tmp_path / "plain", dataset=Images(images), train_num_steps=2, num_workers=0).train()
        assert_same_training(tmp_path / "heard", tmp_path / "plain")
        assert len(seen) == 2 and all(batch.dtype == torch.float32 and batch.max() <= 1 for batch in seen)

    @pytest.mark.parametrize("channels", [2, 5, 6, 12])
    def test_any_number_of_channels_trains_to_the_end(self, tmp_path, channels):
        (tmp_path / "images").mkdir()
        rng = np.random.default_rng(0)
        for index in range(4):
            np.save(tmp_path / "images" / f"{index}.npy", rng.random((channels, 14, 15)))
        results = tmp_path / "results"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = make_trainer(
                results,
                make_diffusion(channels=channels),
                str(tmp_path / "images"),
                train_num_steps=1,
                save_and_sample_every=1,
                num_workers=0,
                calculate_fid=True,
            )
        trainer.train()
        assert not trainer.calculate_fid
        assert Image.open(results / "sample-1.png").size == (channels * 10 + 2, 4 * 10 + 2)
        assert np.load(results / "sample-1.npy").shape == (4, channels, 8, 8)
        assert (results / "model-1.pt").exists()

    def test_fid_of_other_channels_is_switched_off_with_its_reason(self, tmp_path):
        with pytest.warns(UserWarning, match="FID is switched off: .*grey or RGB images, and these have 2 channels"):
            make_trainer(tmp_path, make_diffusion(channels=2), Images(torch.rand(120, 2, 8, 8)), calculate_fid=True)

    @pytest.mark.filterwarnings("ignore")
    def test_the_value_range_is_recorded_and_stays_when_the_folder_grows(self, tmp_path):
        images, results = tmp_path / "images", tmp_path / "results"
        images.mkdir()
        for index in range(3):
            Image.fromarray(np.full((8, 8), 300 * (index + 1), np.uint16)).save(images / f"{index}.png")
        options = dict(train_num_steps=1, num_workers=0)
        make_trainer(results, dataset=images, **options).save(1)
        assert load_file(results / "model-1.pt")["training"]["value_range"] == [0, 1023]
        Image.fromarray(np.full((8, 8), 5000, np.uint16)).save(images / "3.png")
        resumed = make_trainer(results, dataset=images, **options)
        assert resumed.ds.value_range == (0, 16_383)
        resumed.load(1)
        assert resumed.ds.value_range == (0, 1023)
        make_trainer(results, **options).save(7)
        assert load_file(results / "model-7.pt")["training"]["value_range"] is None

    @pytest.mark.filterwarnings("ignore")
    def test_what_concerns_a_folder_reaches_its_dataset(self, tmp_path):
        for name in ("a.png", "b.bmp"):
            Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / name)
        trainer = make_trainer(
            tmp_path / "results", dataset=tmp_path, exts=["png"], background="#ff0000", value_range=(0, 9)
        )
        assert [path.name for path in trainer.ds.paths] == ["a.png"]
        assert trainer.ds.value_range == (0, 9)
        assert trainer.ds[0].mean().item() == pytest.approx(76 / 255), "red as grey"

    @pytest.mark.parametrize("name, value", [("exts", ["png"]), ("value_range", (0, 1))])
    def test_what_concerns_a_folder_is_refused_for_a_dataset(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"{name} is for a folder of images, and folder is a dataset"):
            make_trainer(tmp_path, **{name: value})


def test_the_signature_is_upstreams_with_additions_at_the_end(upstream):
    import inspect

    theirs, ours = (list(inspect.signature(cls.__init__).parameters.values()) for cls in (upstream.Trainer, Trainer))
    # None chooses bf16 on cards that have it, where upstream stays with float32.
    chosen = {"amp": (False, None), "mixed_precision_type": ("fp16", None)}
    for their, our in zip(theirs, ours[: len(theirs)], strict=True):
        assert (their.name, their.kind) == (our.name, our.kind)
        assert (their.default, our.default) == chosen.get(our.name, (their.default, their.default)), our.name
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_upstreams_attributes_are_there(tmp_path):
    trainer = make_trainer(tmp_path)
    for name in (
        "accelerator model channels num_samples save_and_sample_every batch_size gradient_accumulate_every "
        "train_num_steps image_size max_grad_norm ds dl opt ema results_folder step calculate_fid "
        "save_best_and_latest_only device"
    ).split():
        assert hasattr(trainer, name), name
    assert next(trainer.dl).shape == (16, 1, 8, 8)


def test_a_folder_of_images_trains_and_broken_ones_are_counted(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index, image in enumerate(DigitsDataset().images[:100]):
        Image.fromarray((image[0] * 255).byte().numpy()).resize((20, 14)).convert("RGB").save(images / f"{index}.png")
    (images / "7.png").write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(tmp_path, dataset=str(images), train_num_steps=8, num_workers=2)
        trainer.train()
    assert trainer.ds[0].shape == (1, 8, 8)
    assert [path.name for path in trainer.ds.broken_files] == ["7.png"]
