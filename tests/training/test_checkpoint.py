"""Checkpoints: never partial, never unsafe, read in both directions between us and upstream."""

import os
import pickle
import random
import resource
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch

import ddpm_fast
from ddpm_fast.models.unet import Unet
from ddpm_fast.training.checkpoint import (
    CheckpointError,
    find_latest,
    infer_diffusion_config,
    infer_unet_config,
    load_checkpoint,
    load_file,
    save_atomically,
)
from ddpm_fast.training.data import DigitsDataset
from ddpm_fast.training.trainer import Trainer

SMALL = dict(dim=8, dim_mults=(1, 2), channels=1)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small are slower on more threads, and very much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(folder, unet=SMALL, **diffusion):
    """Our trainer on the digits, as small as it gets."""
    model = ddpm_fast.Unet(**unet)
    process = ddpm_fast.GaussianDiffusion(model, **{"image_size": 8, "timesteps": 20, **diffusion})
    return Trainer(
        process,
        DigitsDataset(),
        results_folder=folder,
        train_batch_size=16,
        train_num_steps=3,
        calculate_fid=False,
        augment_horizontal_flip=False,
        save_and_sample_every=100,
        progress=False,
        ema_update_every=1,
    )


def make_upstream_trainer(upstream, folder, image_folder, unet=SMALL, image_size=8, **diffusion):
    """Upstream's trainer on a folder of digits; without workers, which take seconds to end."""
    upstream.cpu_count = lambda: 0
    model = upstream.Unet(**unet)
    process = upstream.GaussianDiffusion(model, **{"image_size": image_size, "timesteps": 20, **diffusion})
    return upstream.Trainer(
        process,
        str(image_folder),
        results_folder=str(folder),
        train_batch_size=16,
        train_num_steps=3,
        calculate_fid=False,
        save_and_sample_every=100,
        num_samples=4,
        ema_update_every=1,
    )


def load_quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_checkpoint(*args, **kwargs)


def assert_equal_states(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].reshape(-1), theirs[name].reshape(-1)), name


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """100 digits as PNG files."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(DigitsDataset().images[:100]):
        Image.fromarray((image[0] * 255).byte().numpy()).save(folder / f"{index:03}.png")
    return folder


class TestAtomicSaving:
    def test_a_killed_save_leaves_a_file_that_loads(self, tmp_path):
        """kill -9 at random moments of saves in a loop: the file always is one whole version."""
        path = tmp_path / "model.pt"
        program = f"""
            import torch
            from ddpm_fast.training.checkpoint import save_atomically
            for version in range(10**9):
                save_atomically({{"version": version, "data": torch.full((300_000,), version)}}, {str(path)!r})
                print("saved", flush=True)
        """
        wait = random.Random(0)
        for _ in range(3):
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout.readline() == "saved\n"
            for _ in range(8):
                time.sleep(wait.uniform(0, 0.02))
                loaded = load_file(path)
                assert (loaded["data"] == loaded["version"]).all()
            process.kill()
            process.wait()
            process.stdout.close()
            loaded = load_file(path)
            assert (loaded["data"] == loaded["version"]).all()
        save_atomically({"version": -1}, path)
        assert os.listdir(tmp_path) == ["model.pt"], "temporary files of killed saves must go with the next save"

    @pytest.mark.parametrize("limit", [0, 4096, 100_000])
    def test_a_full_disk_leaves_the_earlier_file(self, tmp_path, limit):
        path = tmp_path / "model.pt"
        save_atomically({"step": 1}, path)
        before = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match=r"could not write .*model\.pt: .*; the earlier file there is untouched"):
                save_atomically({"data": torch.zeros(100_000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["model.pt"]

    def test_a_failing_pickle_leaves_the_earlier_file(self, tmp_path):
        path = tmp_path / "model.pt"
        save_atomically({"step": 1}, path)
        with pytest.raises((AttributeError, pickle.PicklingError)):
            save_atomically({"step": lambda: None}, path)
        assert load_file(path) == {"step": 1}
        assert os.listdir(tmp_path) == ["model.pt"]

    def test_a_live_save_of_another_process_is_left_alone(self, tmp_path):
        """Only temporary files whose process is gone are stale."""
        with ddpm_fast.training.atomic_files.write_atomically(tmp_path / "model.pt") as file:
            file.write(b"first")
            save_atomically({"step": 2}, tmp_path / "model.pt")
        assert (tmp_path / "model.pt").read_bytes() == b"first"

    def test_the_file_gets_the_usual_permissions(self, tmp_path):
        save_atomically({}, tmp_path / "ours.pt")
        (tmp_path / "usual").touch()
        assert (tmp_path / "ours.pt").stat().st_mode == (tmp_path / "usual").stat().st_mode

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(OSError, match="could not write .*nowhere"):
            save_atomically({}, tmp_path / "nowhere" / "model.pt")


class TestLoadingFiles:
    @pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.9, 0.999])
    def test_truncated(self, tmp_path, fraction):
        path = tmp_path / "model.pt"
        save_atomically({"model": {"weight": torch.randn(1000)}, "step": 1}, path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * fraction)])
        with pytest.raises(CheckpointError, match=r"checkpoint .*model\.pt is (truncated|empty|not a PyTorch file)"):
            load_file(path)

    def test_scrambled_in_the_middle(self, tmp_path):
        path = tmp_path / "model.pt"
        save_atomically({"weight": torch.zeros(1000)}, path)
        content = bytearray(path.read_bytes())
        content[60:400] = bytes(340)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint .*model\.pt"):
            load_file(path)

    @pytest.mark.parametrize("content", [b"hello", b"\x89PNG\r\n\x1a\n", b"\x80\x04garbage", b"PK\x03\x04" + bytes(50)])
    def test_foreign(self, tmp_path, content):
        path = tmp_path / "model.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint .*model\.pt"):
            load_file(path)

    def test_missing_and_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="checkpoint .*model-7.pt does not exist"):
            load_file(tmp_path / "model-7.pt")
        with pytest.raises(CheckpointError, match="is a folder"):
            load_file(tmp_path)

    @pytest.mark.parametrize("is_zip", [True, False])
    def test_code_is_refused_and_not_run(self, tmp_path, is_zip):
        path = tmp_path / "model.pt"
        torch.save({"step": RunsOnLoading(tmp_path / "owned")}, path, _use_new_zipfile_serialization=is_zip)
        with pytest.raises(CheckpointError, match="was not loaded: .*only plain data and tensors are"):
            load_file(path)
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize("contents", [[1, 2], {"weights": torch.zeros(3)}, {}])
    def test_no_trainer_file(self, tmp_path, contents):
        torch.save(contents, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=r"checkpoint .*model\.pt"):
            load_checkpoint(tmp_path / "model.pt")


class RunsOnLoading:
    """A pickle that creates a file when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class TestOurFiles:
    def test_everything_comes_back(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            objective="pred_noise",
            beta_schedule="cosine",
            schedule_fn_kwargs={"s": 0.02},
            sampling_timesteps=5,
            sampler="dpmpp_2m",
            min_snr_loss_weight=True,
        )
        trainer.train()
        loaded = load_checkpoint(tmp_path / "model-last.pt")
        assert_equal_states(loaded.diffusion, trainer.model)
        assert_equal_states(loaded.ema, trainer.ema)
        assert loaded.step == 3
        assert loaded.model is loaded.diffusion.model
        assert loaded.ema.beta == trainer.ema.beta
        assert loaded.diffusion.config == trainer.model.config
        assert loaded.model.config == trainer.model.model.config
        ours = trainer.ema.ema_model.eval().sample(2, seed=3, progress=False)
        assert torch.equal(loaded.ema.ema_model.eval().sample(2, seed=3, progress=False), ours)

    def test_overrides_change_what_may_change(self, tmp_path):
        make_trainer(tmp_path).save(1)
        loaded = load_checkpoint(tmp_path / "model-1.pt", sampling_timesteps=4, sampler="ddim", image_size=(8, 16))
        assert loaded.diffusion.sampling_timesteps == loaded.ema.ema_model.sampling_timesteps == 4
        assert loaded.diffusion.sample(1, progress=False).shape == (1, 1, 8, 16)

    def test_unknown_overrides_are_named(self, tmp_path):
        make_trainer(tmp_path).save(1)
        with pytest.raises(TypeError, match="'colour', which is no argument of Unet or GaussianDiffusion"):
            load_checkpoint(tmp_path / "model-1.pt", colour="red")

    def test_another_architecture_is_named(self, tmp_path):
        make_trainer(tmp_path).save(1)
        wider = make_trainer(tmp_path, unet=dict(SMALL, dim=16))
        with pytest.raises(CheckpointError, match=r"another architecture: 'model\.init_conv\.weight' has shape \(8,"):
            wider.load(1)
        with pytest.raises(CheckpointError, match="another architecture: "):
            load_checkpoint(tmp_path / "model-1.pt", dim_mults=(1, 2, 4))

    def test_another_objective_is_named(self, tmp_path):
        make_trainer(tmp_path, objective="pred_noise").save(1)
        with pytest.raises(CheckpointError, match="objective='pred_noise'"):
            make_trainer(tmp_path, objective="pred_v").load(1)

    def test_upstream_loads_them(self, upstream, tmp_path, image_folder):
        trainer = make_trainer(tmp_path)
        trainer.train()
        theirs = make_upstream_trainer(upstream, tmp_path, image_folder)
        theirs.load("last")
        assert theirs.step == 3
        assert_equal_states(trainer.model, theirs.model)
        assert_equal_states(trainer.ema, theirs.ema)
        theirs.train_num_steps = 5
        theirs.train()
        assert theirs.step == 5

    def test_the_latest_is_found_by_step_not_by_name(self, tmp_path):
        assert find_latest(tmp_path) is None
        for name, step in {"model-10.pt": 1000, "model-9.pt": 900, "model-last.pt": 1050}.items():
            save_atomically({"step": step}, tmp_path / name)
        assert find_latest(tmp_path) == (tmp_path / "model-last.pt", 1050)
        (tmp_path / "model-last.pt").write_bytes(b"")
        with pytest.warns(UserWarning, match="skipped .*model-last.pt"):
            assert find_latest(tmp_path) == (tmp_path / "model-10.pt", 1000)


class TestUpstreamFiles:
    def test_upstream_trainer_file_loads(self, upstream, tmp_path, image_folder):
        theirs = make_upstream_trainer(upstream, tmp_path, image_folder)
        theirs.train()
        theirs.save(1)
        loaded = load_checkpoint(tmp_path / "model-1.pt", image_size=8)
        assert loaded.step == 3
        assert_equal_states(loaded.diffusion, theirs.model)
        assert_equal_states(loaded.ema, theirs.ema)
        assert loaded.diffusion.image_size == (8, 8)

    def test_without_image_size_sampling_says_what_is_missing(self, upstream, tmp_path, image_folder):
        make_upstream_trainer(upstream, tmp_path, image_folder).save(1)
        with pytest.warns(UserWarning, match="does not record image_size"):
            loaded = load_checkpoint(tmp_path / "model-1.pt")
        with pytest.raises(ValueError, match="image_size"):
            loaded.diffusion.sample(1)
        with pytest.raises(ValueError, match="image_size"):
            loaded.ema.ema_model.sample(1)

    def test_our_trainer_continues_them(self, upstream, tmp_path, image_folder):
        theirs = make_upstream_trainer(upstream, tmp_path, image_folder)
        theirs.train()
        theirs.save(1)
        ours = make_trainer(tmp_path)
        ours.load(1)
        assert ours.step == 3
        assert_equal_states(ours.model, theirs.model)
        state, expected = ours.opt.state_dict()["state"], theirs.opt.state_dict()["state"]
        assert all(torch.equal(state[i][name], expected[i][name]) for i in expected for name in expected[i])
        ours.train_num_steps = 5
        ours.train()
        assert ours.step == 5

    @pytest.mark.parametrize("is_network", [True, False])
    def test_plain_state_dicts_load(self, upstream, tmp_path, is_network):
        process = upstream.GaussianDiffusion(upstream.Unet(**SMALL), image_size=8, timesteps=20)
        torch.save((process.model if is_network else process).state_dict(), tmp_path / "weights.pt")
        loaded = load_quietly(tmp_path / "weights.pt", image_size=8)
        assert_equal_states(loaded.model, process.model)
        assert_equal_states(loaded.ema.ema_model, loaded.diffusion)
        assert loaded.diffusion.num_timesteps == (1000 if is_network else 20)

    def test_old_ema_counters_load(self, upstream, tmp_path, image_folder):
        """ema-pytorch before 0.5 kept its counters as (1,)."""
        make_upstream_trainer(upstream, tmp_path, image_folder).save(1)
        data = load_file(tmp_path / "model-1.pt")
        data["ema"]["step"], data["ema"]["initted"] = torch.tensor([7]), torch.tensor([True])
        torch.save(data, tmp_path / "old.pt")
        assert load_quietly(tmp_path / "old.pt").ema.step == 7


UNETS = {
    "default": dict(dim=8, dim_mults=(1, 2, 4)),
    "one stage": dict(dim=8, dim_mults=(1,)),
    "odd widths": dict(dim=16, init_dim=24, dim_mults=(3, 1), channels=4),
    "self condition": dict(dim=8, dim_mults=(1, 2), self_condition=True, channels=1),
    "attention per stage": dict(
        dim=8, dim_mults=(1, 2, 2), full_attn=(True, False, True), attn_heads=(1, 2, 3), attn_dim_head=(4, 8, 16)
    ),
    "linear innermost": dict(dim=8, dim_mults=(1, 2), full_attn=(True, False)),
}


@pytest.mark.parametrize("unet", UNETS.values(), ids=UNETS)
def test_unet_arguments_are_read_off_the_shapes(upstream, unet):
    theirs = upstream.Unet(**unet)
    ours = Unet(**infer_unet_config(theirs.state_dict(), "file"))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert (ours.channels, ours.out_dim, ours.self_condition) == (
        theirs.channels,
        theirs.out_dim,
        theirs.self_condition,
    )


@pytest.mark.parametrize(
    "unet", [dict(learned_variance=True), dict(learned_sinusoidal_cond=True, learned_sinusoidal_dim=6)]
)
def test_unet_arguments_of_subclasses_of_the_diffusion(upstream, unet):
    theirs = upstream.Unet(8, dim_mults=(1, 2), **unet)
    ours = Unet(**infer_unet_config(theirs.state_dict(), "file"))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.channels == theirs.channels


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("gamma", [None, 5, 0.8])
@pytest.mark.parametrize("timesteps", [20, 1000])
def test_the_process_is_read_off_the_buffers(upstream, objective, beta_schedule, gamma, timesteps):
    options = dict(objective=objective, beta_schedule=beta_schedule, timesteps=timesteps)
    snr_options = {} if gamma is None else dict(min_snr_loss_weight=True, min_snr_gamma=gamma)
    network = upstream.Unet(**SMALL)
    state = upstream.GaussianDiffusion(network, image_size=8, **options, **snr_options).state_dict()
    assert infer_diffusion_config(state) == {**options, **snr_options}


def test_an_unknown_schedule_keeps_its_buffers(upstream, tmp_path):
    theirs = upstream.GaussianDiffusion(
        upstream.Unet(**SMALL),
        image_size=8,
        timesteps=50,
        beta_schedule="sigmoid",
        schedule_fn_kwargs=dict(start=-2, end=4, tau=0.7),
        objective="pred_x0",
    )
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    loaded = load_quietly(tmp_path / "weights.pt", image_size=8)
    assert_equal_states(loaded.diffusion, theirs)
    assert loaded.diffusion.objective == "pred_x0"


def test_the_group_norm_generation_loads(upstream_1x, tmp_path):
    network = upstream_1x.Unet(16, dim_mults=(1, 2), channels=1, resnet_block_groups=4)
    process = upstream_1x.GaussianDiffusion(network, image_size=8, timesteps=20)
    torch.save(process.state_dict(), tmp_path / "weights.pt")
    loaded = load_checkpoint(tmp_path / "weights.pt", image_size=8, resnet_block_groups=4)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 11])
    torch.testing.assert_close(loaded.model(x, t), network(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["downs.0.2.fn.fn.to_qkv.weight", "downs.0.2.to_qkv.weight"])
def test_older_generations_get_one_sentence(tmp_path, attention):
    """1.0–1.8 name their parameters like this; the network differs in more than names."""
    state = {f"model.{name}": tensor for name, tensor in Unet(**SMALL).state_dict().items() if "mem_kv" not in name}
    state[f"model.{attention}"] = torch.zeros(384, 8, 1, 1)
    torch.save({"step": 1, "model": state, "ema": {}}, tmp_path / "model-1.pt")
    with pytest.raises(CheckpointError, match="denoising-diffusion-pytorch 1.8 or older"):
        load_checkpoint(tmp_path / "model-1.pt")


def test_other_networks_are_named(tmp_path):
    state = {"model.encoder.weight": torch.zeros(3)}
    torch.save({"step": 1, "model": state, "ema": {}}, tmp_path / "model-1.pt")
    with pytest.raises(CheckpointError, match="another architecture: it has no 'init_conv.weight'"):
        load_checkpoint(tmp_path / "model-1.pt")
