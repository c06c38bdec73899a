"""`ddpm-fast bench --model`: networks of other packages, held equal and timed as they are and accelerated."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torchcfm.models.unet.unet import UNetModel

from ddpm_fast.cli import bench
from ddpm_fast.cli.options import UserError
from ddpm_fast.measure import foreign


def tiny(folder=None):
    network = UNetModel(8, 3, 32, 3, 1, (), dropout=0.5, channel_mult=(1,))
    return foreign.ForeignNetwork("tiny", network, (3, 8, 8), lambda network, x, t: network(t / 1000, x))


@pytest.fixture
def a_tiny_network(monkeypatch):
    monkeypatch.setitem(foreign.NETWORKS, "tiny", ("torchcfm", tiny))


def test_the_command_checks_times_and_draws(a_tiny_network, tmp_path, capsys):
    files = {"out": tmp_path / "chart.png", "json": tmp_path / "folder" / "numbers.json"}
    bench.run(bench.Bench(model="tiny", batch_size=2, seconds=0.01, device="cpu", **files))
    printed = capsys.readouterr().out
    assert "training step" in printed and "accelerated" in printed and "preactivation_block" in printed
    result = json.loads(files["json"].read_text())
    assert result["phases"].keys() == set(foreign.PHASES) and files["out"].stat().st_size > 0
    for timings in result["phases"].values():
        assert timings.keys() == {"eager", "accelerated"}
        assert all(numbers["rounds"] >= 3 and numbers["median"] > 0 for numbers in timings.values())
    assert ["ResBlock", 5, "preactivation_block"] in result["modules"]


@pytest.mark.parametrize(
    "model, message",
    [
        ("resnet18", "is none of diffusers"),
        ("torchcfm:folder", "torchcfm takes no folder"),
        ("diffusers:nowhere", "has no config.json"),
        ("absent", "absent_package is not installed"),
    ],
)
def test_a_network_that_cannot_be_made_is_named(model, message, monkeypatch):
    monkeypatch.setitem(foreign.NETWORKS, "absent", ("absent_package", tiny))
    with pytest.raises(UserError, match=message):
        bench.run(bench.Bench(model=model, device="cpu"))


def test_options_of_our_networks_are_refused(a_tiny_network):
    with pytest.raises(UserError, match="leave out dim, image-size"):
        bench.run(bench.Bench(model="tiny", dim=64, image_size=(32,), device="cpu"))


def test_a_saved_model_of_diffusers_is_loaded(tmp_path):
    from diffusers import UNet2DModel

    saved = UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    saved.save_pretrained(tmp_path / "unet")
    made = foreign.make(f"diffusers:{tmp_path}")
    assert made.size == (3, 8, 8)
    x, t, target = foreign.inputs(made, 2, torch.device("cpu"))
    assert made.call(made.network, x, t).shape == target.shape


def test_a_network_that_is_not_equal_is_not_timed(a_tiny_network):
    made = foreign.make("tiny")
    foreign_batch = foreign.inputs(made, 2, torch.device("cpu"))
    other = copy.deepcopy(made.network)
    assert max(foreign.check_equal(made, made.network, other, foreign_batch, "fp32").values()) < 1e-6
    with torch.no_grad():
        other.out[2].bias.add_(1.0)
    with pytest.raises(AssertionError, match="output differs"):
        foreign.check_equal(made, made.network, other, foreign_batch, "fp32")


def test_dropout_comes_back():
    network = nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.0))
    with foreign.without_dropout(network):
        assert [module.p for module in network] == [0.0, 0.0]
    assert [module.p for module in network] == [0.3, 0.0]
