"""Measurement: rounds, refusals, baselines, and the command `ddpm-fast bench`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ddpm_fast import use_backend
from ddpm_fast.cli import main
from ddpm_fast.measure import baselines, charts, command, compare, machine, profile, timing
from ddpm_fast.measure.baselines import Configuration
from ddpm_fast.measure.timing import Interleaved, Timing, ratio
from ddpm_fast.runtime import dispatch, extension
from ddpm_fast.training import captured_step

CPU = torch.device("cpu")
TINY = Configuration(dim=8, dim_mults=(1, 2), image_size=8, batch=2, steps=2)


def test_each_round_begins_with_the_next_call():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    rounds = Interleaved(calls, CPU, warmup=0)
    rounds._repeat = dict.fromkeys("abc", 1)
    order.clear()
    timings = rounds.run(0.0, least=3, most=3)
    assert order == list("abcbcacab")
    assert all(len(timing.seconds) == 3 for timing in timings.values())


@pytest.mark.parametrize("seconds, block", [(1e-6, 1000), (1e-5, 100), (1e-3, 1), (1.0, 1)])
def test_short_calls_are_timed_in_blocks(seconds, block, monkeypatch):
    """One call of a microsecond is the clock's noise."""
    count = 0

    def call():
        nonlocal count
        count += 1

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: count * seconds))
    rounds = Interleaved({"call": call}, CPU)
    before = count
    rounds.round()
    assert count - before == pytest.approx(block, abs=1)
    assert rounds.timings["call"].median == pytest.approx(seconds)


def test_timing_summaries():
    some = Timing([4.0, 1.0, 2.0, 3.0, 100.0])
    assert some.as_dict() == {"median": 3.0, "low": 2.0, "high": 4.0, "rounds": 5}
    assert Timing([7.0]).quartiles == (7.0, 7.0)
    assert ratio(some, Timing([1.5])) == 2.0
    with pytest.raises(ValueError, match="at least one call"):
        Interleaved({}, CPU)


def test_ceilings_and_description():
    ceilings = machine.measure_ceilings(CPU, quick=True, seconds=0.01)
    assert ceilings.copy > 0 and ceilings.matmul["fp32"] > 0
    facts = json.loads(json.dumps(machine.describe(CPU)))
    assert facts["torch"] == torch.__version__ and machine.name(facts).endswith("1 thread")


@pytest.mark.parametrize(
    "name", ["upstream", "upstream-channels-last", "ours-low-memory", "ours-step-by-step", "diffusers"]
)
def test_baselines_are_held_equal(name):
    made, left_out, errors = compare.prepare([name], TINY, CPU)
    assert list(made) == ["ours", name] and not left_out
    assert all(error < 1e-3 for what, error in errors[name].items() if what != "parameters")
    assert made[name].training_step().isfinite() and made[name].sample().shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name, dtype, graph", [("ours", "bf16", True), ("ours-step-by-step", "fp32", False)])
def test_ours_is_recorded_on_cuda(monkeypatch, name, dtype, graph):
    asked = []
    network = torch.nn.Linear(1, 1)
    network.to = lambda *args: network
    monkeypatch.setattr(baselines, "_ours", lambda *args: network)
    monkeypatch.setattr(baselines, "_images", lambda *args: torch.zeros(1))
    monkeypatch.setattr(baselines, "_captured", lambda *args, graph: asked.append(graph))
    made = baselines.make(name, replace(TINY, dtype=dtype), torch.device("cuda"))
    assert asked == [graph] and "fused" in made.optimizer
    baselines.make(name, replace(TINY, dtype="fp16"), torch.device("cuda"))
    assert asked == [graph, graph]


def test_float16_is_recorded_with_a_scaler(monkeypatch):
    asked = {}
    monkeypatch.setattr(captured_step, "capture_training_step", lambda *args, **options: asked.update(options))
    baselines._captured(None, None, torch.zeros(1), replace(TINY, dtype="fp16"), graph=True)
    assert asked["autocast"] is torch.float16 and asked["scaler"] is not None and asked["keep_copies"]


def test_a_red_equality_check_refuses_to_time(monkeypatch):
    """Upstream with other weights is not the same function: nothing is timed."""
    load = baselines.load_weights

    def load_others(ours, other):
        load(ours, other)
        with torch.no_grad():
            other.diffusion.model.final_conv.weight.mul_(1.01)

    monkeypatch.setattr(baselines, "load_weights", load_others)
    monkeypatch.setattr(compare, "Interleaved", lambda *args, **kwargs: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match="upstream is not equal to ours: output differs by 1.*e-02"):
        compare.compare(TINY, CPU, ["upstream"], seconds=0.1)


def test_who_is_left_out_and_why(monkeypatch):
    monkeypatch.setitem(baselines.NEEDS, "upstream", "a_package_that_is_not_there")
    grouped = Configuration(dim=8, dim_mults=(1,), image_size=8, batch=1, steps=2, network={"norm": "group"})
    _, left_out, _ = compare.prepare(["upstream", "upstream-channels-last", "diffusers"], grouped, CPU)
    assert left_out == {
        "upstream": "a_package_that_is_not_there is not installed",
        "upstream-channels-last": "upstream's 2.x network has no GroupNorm",
        "diffusers": "diffusers' network has no norm",
    }


def test_a_baseline_that_fails_by_itself_is_left_out(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory\nand more lines")

    monkeypatch.setattr(baselines, "load_weights", fail)
    made, left_out, _ = compare.prepare(["upstream", "diffusers"], TINY, CPU)
    assert left_out == {"upstream": "failed: OutOfMemoryError: no memory"} and list(made) == ["ours", "diffusers"]


def test_an_unequal_baseline_can_be_left_out(monkeypatch):
    monkeypatch.setattr(
        baselines, "load_weights", lambda ours, other: other.diffusion.model.final_conv.reset_parameters()
    )
    _, left_out, _ = compare.prepare(["upstream"], TINY, CPU, leave_unequal_out=True)
    assert left_out["upstream"].startswith("not timed: upstream is not equal to ours: output differs by")


def test_watching_choices():
    network = baselines.make("ours", TINY, CPU)
    sample = partial(network.diffusion.sample, TINY.batch, progress=False, graph=False)  # a recording chooses once
    with dispatch.watch_choices() as choices:
        sample()
    taken = {op: implementation for op, implementation, _ in choices}
    reasons = {op: why for op, _, why in choices}
    blocks = "resnet_block" if extension.load() is not None else "rms_norm_silu"
    assert taken[blocks] == ("native" if blocks == "resnet_block" else "reference")
    with use_backend("reference"), dispatch.watch_choices() as choices_of_forced:
        sample()
    assert not choices_of_forced
    assert choices["sampler_step_", taken["sampler_step_"], reasons["sampler_step_"]] == TINY.steps
    with dispatch.watch_choices() as choices:
        pass
    assert not choices


def test_profile_counts_and_measures():
    result = json.loads(json.dumps(profile.profile(TINY, CPU, seconds=0.2, quick=True)))
    step = result["phases"]["training step"]
    assert step["flops"] > 0 and step["operators"] > 100 and step["seconds"] > 0
    assert step["floor_seconds"] >= max(step["matrix_seconds"], step["launch_total_seconds"]) * 0.99
    assert sum(share for _, share in step["floor_by_operator"]) <= 1.001
    assert "times the floor" in profile.report(result)


def test_columns_line_up():
    assert charts.columns(["a", "bb"], [["ccc", ""]]) == "| a   | bb |\n|-----|----|\n| ccc |    |"


def test_configuration_of_a_checkpoint(tmp_path):
    from ddpm_fast import GaussianDiffusion, Unet

    network = Unet(8, dim_mults=(1, 2), channels=1, attn_heads=2, memory="low", flash_attn=True)
    diffusion = GaussianDiffusion(network, image_size=(8, 16), timesteps=10)
    torch.save(diffusion.state_dict(), tmp_path / "bare.pt")
    bare = command.configuration_from(tmp_path / "bare.pt", {"image_size": (8, 16)}, CPU)
    assert (bare.dim, bare.dim_mults, bare.channels, bare.size) == (8, (1, 2), 1, (8, 16))
    fields = command._of_network(network)
    assert fields.pop("network") == {"attn_heads": 2, "memory": "low", "flash_attn": True}
    assert fields == {"dim": 8, "channels": 1, "dim_mults": (1, 2)}
    assert command.configuration_from(None, {"batch": 3, "dim": None}, CPU) == Configuration(image_size=32, batch=3)


def run(*arguments):
    finished = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", "bench", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout, finished.stderr


def test_command(tmp_path):
    out, err = run(
        "--dim", 8, "--dim-mults", 1, 2, "--image-size", 8, "--batch-size", 2, "--steps", 2, "--seconds", 0.5,
        "--device", "cpu", "--out", tmp_path / "new" / "bench.png", "--json", tmp_path / "b.json",
    )  # fmt: skip
    assert "Unet(8, (1,2)), 8×8, batch 2, fp32, on" in out and "upstream equals ours: output to" in out
    assert "| sampling step | `sampler_step_`" in out and "Triton kernels need CUDA" in out
    assert "checking upstream" in err
    numbers = json.loads((tmp_path / "b.json").read_text())
    assert list(numbers["phases"]) == ["training step", "sampling step"]
    assert Image.open(tmp_path / "new" / "bench.png").size[0] > 500


def test_command_errors(capsys):
    def error_of(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["bench", *map(str, arguments)])
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and not printed.out, "nothing may be timed first"
        return " ".join(printed.err.replace("│", " ").split())

    assert "--steps must be at least 1; got 0" in error_of("--steps", 0)
    assert "--seconds must be positive; got -1.0" in error_of("--seconds", -1)
    assert "--device must be such as cpu or cuda:0; got 'nonsense'" in error_of("--device", "nonsense")
    assert "--device cuda:99: torch sees" in error_of("--device", "cuda:99")
    assert "/proc/none" in error_of("--device", "cpu", "--out", "/proc/none/bench.png")
    assert "no-such-file.pt" in error_of("no-such-file.pt")
