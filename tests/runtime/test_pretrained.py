"""Folders of arguments and weights: networks and processes come back as they were, without a download."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file

import ddpm_fast
from ddpm_fast import classifier_free_guidance
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess

SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8}
NETWORKS = {
    "rms": lambda: ddpm_fast.Unet(**SMALL),
    "group": lambda: ddpm_fast.Unet(**SMALL, norm="group", resnet_block_groups=4, num_classes=3, cond_dim=2),
    "classifier_free": lambda: classifier_free_guidance.Unet(
        8, dim_mults=(1, 2), num_classes=3, attn_heads=2, attn_dim_head=8
    ),
}
PROCESSES = {
    "ddpm": lambda: ddpm_fast.GaussianDiffusion(
        ddpm_fast.Unet(**SMALL), image_size=8, timesteps=20, sampler="ddim", sampling_timesteps=3, clip_x_start=False
    ),
    "learned": lambda: ddpm_fast.LearnedGaussianDiffusion(
        ddpm_fast.Unet(**SMALL, learned_variance=True), image_size=8, timesteps=20, beta_schedule="cosine"
    ),
    "edm": lambda: ddpm_fast.ElucidatedDiffusion(
        ddpm_fast.Unet(**SMALL, learned_sinusoidal_cond=True), image_size=8, num_sample_steps=3
    ),
    "flow": lambda: ddpm_fast.RectifiedFlow(ddpm_fast.Unet(**SMALL), image_size=8, clip_x_start=False),
}


def assert_same_state(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back(name, tmp_path):
    network = NETWORKS[name]()
    assert network.save_pretrained(tmp_path / "there") is None
    again = type(network).from_pretrained(tmp_path / "there")
    assert type(again) is type(network)
    assert not again.training
    assert_same_state(network, again)
    assert dict(again.config) == dict(network.config) or json.dumps(again.config) == json.dumps(network.config)


@pytest.mark.parametrize("name", [*NETWORKS, *PROCESSES])
def test_loading_draws_nothing(name, tmp_path):
    """And leaves nothing uninitialised: new memory is NaN here."""
    module = (NETWORKS | PROCESSES)[name]()
    module.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        again = type(module).from_pretrained(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(module, again)
    tensors = [value for part in again.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    assert not any(tensor.isnan().any() for tensor in [*tensors, *again.parameters(), *again.buffers()])


def test_a_network_of_the_users_draws_what_it_likes(tmp_path):
    class Own(ddpm_fast.Unet):
        def __init__(self, **options):
            super().__init__(**options)
            self.register_buffer("phases", torch.randn(3), persistent=False)

    Own(**SMALL).save_pretrained(tmp_path)
    torch.manual_seed(0)
    phases = Own(**SMALL).phases
    torch.manual_seed(0)
    assert torch.equal(Own.from_pretrained(tmp_path).phases, phases)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_comes_back_and_samples_the_same(name, tmp_path):
    process = PROCESSES[name]()
    process.class_names = ("cat", "dog")
    process.save_pretrained(tmp_path)
    again = type(process).from_pretrained(str(tmp_path))
    assert_same_state(process, again)
    assert again.class_names == ("cat", "dog")
    assert again.clip_x_start == process.clip_x_start
    drawn = [one.eval().sample(2, seed=3, progress=False) for one in (process, again)]
    assert torch.equal(*drawn)
    assert type(DiffusionProcess.from_pretrained(tmp_path)) is type(process)


def test_arguments_in_place_of_the_recorded_ones(tmp_path):
    PROCESSES["ddpm"]().save_pretrained(tmp_path)
    again = ddpm_fast.GaussianDiffusion.from_pretrained(tmp_path, sampling_timesteps=5, clip_x_start=True)
    assert (again.sampling_timesteps, again.clip_x_start) == (5, True)


def test_a_class_of_the_users_comes_back_as_that_class(tmp_path):
    class Mine(ddpm_fast.GaussianDiffusion):
        pass

    PROCESSES["ddpm"]().save_pretrained(tmp_path)
    assert type(Mine.from_pretrained(tmp_path)) is Mine


def test_huggingface_hubs_mixin_reads_and_writes_the_same_folders(tmp_path):
    class Theirs(PyTorchModelHubMixin, ddpm_fast.Unet):
        pass

    network = Theirs(**SMALL)
    network.save_pretrained(tmp_path / "theirs")
    ours = ddpm_fast.Unet.from_pretrained(tmp_path / "theirs")
    assert_same_state(network, ours)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_state(ours, Theirs.from_pretrained(tmp_path / "ours"))


def test_uploading_and_downloading_go_through_huggingface_hub(tmp_path, monkeypatch):
    import huggingface_hub

    uploads, network = [], NETWORKS["rms"]()

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            uploads.append((repo_id, private, exist_ok, self.token))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, repo_type, folder_path, **options):
            uploads.append((repo_id, repo_type, load_file(folder_path / "model.safetensors"), options))
            return "address"

    def download(repo_id, name, **options):
        assert repo_id == "someone/net" and options["revision"] == "v1"
        return str(tmp_path / "net" / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert network.push_to_hub("someone/net", private=True, commit_message="first") == "address"
    assert network.save_pretrained(tmp_path / "net", push_to_hub=True, token="t") == "address"
    assert uploads[0] == ("someone/net", True, True, None)
    assert uploads[1][3] == {"commit_message": "first"}
    assert uploads[2] == ("net", None, True, "t")
    for name, tensor in network.state_dict().items():
        assert torch.equal(uploads[1][2][name], tensor)
    assert_same_state(network, ddpm_fast.Unet.from_pretrained("someone/net", revision="v1"))


def test_damaged_files_are_named(tmp_path):
    PROCESSES["ddpm"]().save_pretrained(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("config.json", "model.safetensors")}

    def check(sentence, **contents):
        for name, content in {**whole, **contents}.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            ddpm_fast.GaussianDiffusion.from_pretrained(tmp_path)

    for content in (b"", b"\xff" * 200, whole["model.safetensors"][:-9]):
        check("model.safetensors is damaged", **{"model.safetensors": content})
        check("config.json is damaged", **{"config.json": content[:200]})
    check("config.json must hold a dictionary, got a list", **{"config.json": b"[]"})
    config = json.loads(whole["config.json"])
    for name in ("unet", "diffusion", "network"):
        rest = {key: value for key, value in config.items() if key != name}
        check(f"lacks '{name}'|names no network", **{"config.json": json.dumps(rest).encode()})


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    first = PROCESSES["ddpm"]()
    first.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fails(weights, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        first.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_folders_that_do_not_fit(tmp_path):
    NETWORKS["rms"]().save_pretrained(tmp_path / "network")
    PROCESSES["ddpm"]().save_pretrained(tmp_path / "process")
    with pytest.raises(ValueError, match="holds the process 'ddpm', not a network alone"):
        ddpm_fast.Unet.from_pretrained(tmp_path / "process")
    with pytest.raises(ValueError, match="holds a network alone, and no GaussianDiffusion"):
        ddpm_fast.GaussianDiffusion.from_pretrained(tmp_path / "network")
    with pytest.raises(ValueError, match="holds the process 'ddpm', not a RectifiedFlow"):
        ddpm_fast.RectifiedFlow.from_pretrained(tmp_path / "process")
    with pytest.raises(ValueError, match="another architecture: 'init_conv.weight' has shape"):
        ddpm_fast.Unet.from_pretrained(tmp_path / "network", dim=16)
    with pytest.raises(FileNotFoundError, match="folder .*nowhere does not exist"):
        ddpm_fast.Unet.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "network" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        ddpm_fast.Unet.from_pretrained(tmp_path / "network")
    with pytest.raises(TypeError, match="this network is a Conv2d"):
        network = torch.nn.Conv2d(3, 3, 1)
        network.channels = network.out_dim = 3
        ddpm_fast.GaussianDiffusion(network, image_size=8).save_pretrained(tmp_path / "other")
