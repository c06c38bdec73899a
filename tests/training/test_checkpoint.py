"""Checkpoints: never partial, never unsafe, read in both directions between us and upstream."""

import errno
import gc
import multiprocessing
import os
import pickle
import random
import re
import resource
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_fast
from ddpm_fast.models.unet import Unet
from ddpm_fast.training.checkpoint import load_checkpoint
from ddpm_fast.training.checkpoint_files import CheckpointError, find_file, find_latest, load_file, save_atomically
from ddpm_fast.training.data import DigitsDataset
from ddpm_fast.training.inferred import infer_diffusion_config, infer_unet_config
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


def test_load_checkpoint_draws_nothing_and_leaves_nothing_undrawn(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.save(1)
    before = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        loaded = load_checkpoint(tmp_path / "model-1.pt")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal_states(trainer.model, loaded.diffusion)
    assert_equal_states(trainer.ema, loaded.ema)
    values = [value for part in loaded.ema.modules() for value in vars(part).values()]
    assert not any(value.isnan().any() for value in values if isinstance(value, torch.Tensor))


class TestSums:
    """Bytes that a disk changed inside of weights, which torch.load does not see."""

    @pytest.fixture
    def path(self, tmp_path):
        trainer = make_trainer(tmp_path)
        with torch.no_grad():
            trainer.ema.ema_model.model.init_conv.weight.add_(1)
        trainer.save(1)
        return tmp_path / "model-1.pt"

    @pytest.mark.parametrize("name", ["model", "ema"])
    def test_a_changed_byte_is_damage(self, path, name):
        contents, data = load_file(path), bytearray(path.read_bytes())
        key = {"model": "model.init_conv.weight", "ema": "ema_model.model.init_conv.weight"}[name]
        data[data.index(contents[name][key].numpy().tobytes()) + 99] ^= 16
        path.write_bytes(data)
        trainer, untouched = make_trainer(path.parent), make_trainer(path.parent)
        untouched.model.load_state_dict(trainer.model.state_dict())
        for load in (load_checkpoint, trainer.load):
            with pytest.raises(CheckpointError, match="model-1.pt is damaged: its checksums do not agree"):
                load(path)
        assert_equal_states(trainer.model, untouched.model)

    @pytest.mark.parametrize("name", ["moments", "pickle"])
    def test_a_changed_byte_of_moments_or_of_the_pickle_is_damage(self, path, name):
        trainer = make_trainer(path.parent)
        trainer.train()
        trainer.save(1)
        found = (
            load_file(path)["opt"]["state"][0]["exp_avg_sq"].numpy().tobytes()
            if name == "moments"
            else b"max_grad_norm"
        )
        data = bytearray(path.read_bytes())
        data[data.index(found) + 3] ^= 16
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="model-1.pt is damaged: its checksums do not agree"):
            trainer.load(path)
        if name == "moments":
            load_checkpoint(path)

    def test_tensors_that_a_program_changed_are_no_damage(self, path):
        """It keeps the entry with the sums, and its archive has checksums of its own."""
        contents = torch.load(path)
        contents["ema"]["ema_model.model.init_conv.bias"].fill_(7)
        torch.save(contents, path)
        assert (load_checkpoint(path).ema.ema_model.model.init_conv.bias == 7).all()

    @pytest.mark.parametrize("sums", [None, {}, {"model": 3}, "text"])
    def test_without_sums_files_load_as_before(self, path, sums):
        contents = torch.load(path)
        del contents["sums"]
        torch.save(contents if sums is None else {**contents, "sums": sums}, path)
        load_checkpoint(path)
        make_trainer(path.parent).load(path)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is mapped")
    def test_nothing_stays_mapped(self, path):
        trainer = make_trainer(path.parent)
        trainer.load(path)
        loaded = load_checkpoint(path)
        gc.collect()
        assert path.name not in Path("/proc/self/maps").read_text()
        assert loaded.step == trainer.step == 0


class TestAtomicSaving:
    def test_a_killed_save_leaves_a_file_that_loads(self, tmp_path):
        """kill -9 at random moments of saves in a loop: the file always is one whole version."""
        path, context = tmp_path / "model.pt", multiprocessing.get_context("fork")

        def keep_saving(saved):
            for version in range(10**9):
                save_atomically({"version": version, "data": torch.full((300_000,), version)}, path)
                saved.set()

        wait = random.Random(0)
        for _ in range(3):
            saved = context.Event()
            process = context.Process(target=keep_saving, args=(saved,), daemon=True)
            process.start()
            assert saved.wait(600)
            for _ in range(8):
                time.sleep(wait.uniform(0, 0.02))
                loaded = load_file(path)
                assert (loaded["data"] == loaded["version"]).all()
            process.kill()
            process.join()
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


class TestSharesWithoutSync:
    """Network shares and FUSE refuse fsync of folders, some of files too; a save there works."""

    @staticmethod
    def refuse(monkeypatch, number, of_files=False):
        original = os.fsync

        def fsync(descriptor):
            is_folder = not os.path.isfile(f"/proc/self/fd/{descriptor}")
            if is_folder or of_files:
                raise OSError(number, os.strerror(number))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EACCES])
    def test_a_folder_that_cannot_be_synced(self, tmp_path, monkeypatch, number):
        self.refuse(monkeypatch, number)
        save_atomically({"step": 1}, tmp_path / "model.pt")
        assert load_file(tmp_path / "model.pt") == {"step": 1}
        assert os.listdir(tmp_path) == ["model.pt"]

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
    def test_a_file_that_cannot_be_synced(self, tmp_path, monkeypatch, number):
        self.refuse(monkeypatch, number, of_files=True)
        save_atomically({"step": 1}, tmp_path / "model.pt")
        assert load_file(tmp_path / "model.pt") == {"step": 1}

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES])
    def test_a_folder_that_cannot_be_opened(self, tmp_path, monkeypatch, number):
        original = os.open

        def refusing(path, flags, *rest, **options):
            if os.path.isdir(path):
                raise OSError(number, os.strerror(number))
            return original(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", refusing)
        save_atomically({"step": 1}, tmp_path / "model.pt")
        assert load_file(tmp_path / "model.pt") == {"step": 1}

    def test_a_failure_of_the_disk_at_the_file_is_no_save(self, tmp_path, monkeypatch):
        save_atomically({"step": 1}, tmp_path / "model.pt")
        self.refuse(monkeypatch, errno.EIO, of_files=True)
        with pytest.raises(OSError, match="could not write .*model.pt: .*; the earlier file there is untouched"):
            save_atomically({"step": 2}, tmp_path / "model.pt")
        assert load_file(tmp_path / "model.pt") == {"step": 1}

    def test_after_the_renaming_no_text_speaks_of_the_earlier_file(self, tmp_path, monkeypatch):
        save_atomically({"step": 1}, tmp_path / "model.pt")
        self.refuse(monkeypatch, errno.EIO)
        with pytest.raises(OSError, match="model.pt is written, but .* its folder could not be synced") as failed:
            save_atomically({"step": 2}, tmp_path / "model.pt")
        assert "untouched" not in str(failed.value) and failed.value.errno == errno.EIO
        assert load_file(tmp_path / "model.pt") == {"step": 2}

    def test_a_folder_in_the_files_place_is_no_earlier_file(self, tmp_path):
        (tmp_path / "model.pt").mkdir()
        with pytest.raises(OSError, match="could not write .*model.pt: Is a directory$"):
            save_atomically({"step": 2}, tmp_path / "model.pt")


class TestErrorTexts:
    """A text says what is so: a file is damaged only if its checksums say so."""

    def test_what_the_system_refuses_is_not_damaged(self, tmp_path, monkeypatch):
        save_atomically({"step": 1}, tmp_path / "model-1.pt")

        def refuse(*args, **kwargs):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(torch, "load", refuse)
        with pytest.raises(PermissionError, match=r"could not read checkpoint .*model-1\.pt: Permission denied"):
            load_file(tmp_path / "model-1.pt")
        with pytest.raises(PermissionError):
            find_latest(tmp_path)

    @pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'triton'"), MemoryError()])
    def test_what_is_not_the_files_fault_passes(self, tmp_path, monkeypatch, error):
        save_atomically({"step": 1}, tmp_path / "model.pt")
        monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            load_file(tmp_path / "model.pt")

    def test_a_device_that_is_not_there_is_not_damage(self, tmp_path, monkeypatch):
        save_atomically({"weight": torch.zeros(3)}, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match="model.pt could not be loaded: "):
            load_file(tmp_path / "model.pt", map_location="cuda:77")

    def test_a_changed_byte_is_damage(self, tmp_path):
        path = tmp_path / "model.pt"
        save_atomically({"weight": torch.zeros(1000)}, path)
        content = bytearray(path.read_bytes())
        content[content.index(b"weight") + 1] = 0xFF
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="model.pt is damaged: "):
            load_file(path)

    def test_an_old_pickle_is_found_too(self, tmp_path):
        """Files of torch before 1.6, which torch cannot map into memory."""
        torch.save({"step": 3}, tmp_path / "model-1.pt", _use_new_zipfile_serialization=False)
        assert find_latest(tmp_path) == (tmp_path / "model-1.pt", 3)

    def test_a_file_system_that_maps_nothing_is_read(self, tmp_path, monkeypatch):
        save_atomically({"step": 3}, tmp_path / "model-1.pt")
        original = torch.load

        def load(path, mmap=False, **options):
            if mmap:
                raise RuntimeError("unable to mmap 1024 bytes from file <model-1.pt>: No such device (19)")
            return original(path, **options)

        monkeypatch.setattr(torch, "load", load)
        assert find_latest(tmp_path) == (tmp_path / "model-1.pt", 3)

    def test_a_file_without_step_is_skipped_with_its_reason(self, tmp_path):
        torch.save(Unet(**SMALL).state_dict(), tmp_path / "model-1.pt")
        with pytest.warns(UserWarning, match="skipped .*model-1.pt: it has no step"):
            assert find_latest(tmp_path) is None

    @pytest.mark.parametrize("step", ["three", -1, 2.5, True])
    def test_an_unusable_step_is_named(self, tmp_path, step):
        torch.save({"step": step, "model": {}}, tmp_path / "model-1.pt")
        with pytest.warns(UserWarning, match="has no usable step: step must be a non-negative integer; got "):
            assert find_latest(tmp_path) is None


class TestNumpyInFiles:
    """Earlier versions, and upstream, saved numpy's scalars where they were given."""

    SETTINGS = {
        "f8": np.float64(0.995), "f4": np.float32(0.5), "f2": np.float16(0.5), "i8": np.int64(-3), "u1": np.uint8(200),
        "b": np.bool_(True), "U": np.str_("cosine"), "big": np.array(2.5, dtype=">f8")[()], "list": np.array([1, 2]),
        "table": np.array([[1.5, 2], [3, 4]]), "zero": np.array(7),
    }  # fmt: skip

    @pytest.mark.parametrize("is_zip", [True, False])
    def test_they_become_plain(self, tmp_path, is_zip):
        contents = {"config": {"a": [self.SETTINGS]}, "weight": torch.ones(3)}
        torch.save(contents, tmp_path / "model.pt", _use_new_zipfile_serialization=is_zip)
        loaded = load_file(tmp_path / "model.pt")
        assert torch.equal(loaded["weight"], torch.ones(3))
        expected = {name: value.tolist() for name, value in self.SETTINGS.items()}
        assert loaded["config"]["a"] == [expected]
        assert {name: type(value) for name, value in loaded["config"]["a"][0].items()} == {
            name: type(value) for name, value in expected.items()
        }

    def test_numpys_first_version_names_its_module_otherwise(self, tmp_path):
        path = tmp_path / "model.pt"
        torch.save({"lr": np.float64(0.5)}, path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        assert b"numpy._core.multiarray" in content
        path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert load_file(path) == {"lr": 0.5}

    @pytest.mark.parametrize("value", [np.array([{}], dtype=object), np.datetime64("2026-01-01"), np.longdouble(1)])
    def test_other_kinds_get_one_sentence(self, tmp_path, value):
        torch.save({"value": value}, tmp_path / "model.pt")
        with pytest.raises(
            CheckpointError, match="was not loaded: it refers to numpy.*and only plain data and tensors"
        ):
            load_file(tmp_path / "model.pt")

    def test_a_whole_run_goes_on(self, tmp_path):
        make_trainer(tmp_path).save(1)
        data = load_file(tmp_path / "model-1.pt")
        data["step"] = np.int64(2)
        data["config"]["unet"].update(dim=np.int64(8), dim_mults=np.array([1, 2]), dropout=np.float64(0))
        data["config"]["diffusion"].update(min_snr_gamma=np.float64(5), timesteps=np.int64(20))
        data["config"]["ema"].update(beta=np.float64(0.995))
        data["opt"]["param_groups"][0].update(lr=np.float64(1e-4), betas=(np.float64(0.9), np.float64(0.99)))
        data["training"]["seed"] = np.int64(4)
        torch.save(data, tmp_path / "model-1.pt")
        assert find_latest(tmp_path) == (tmp_path / "model-1.pt", 2)
        assert load_checkpoint(tmp_path / "model-1.pt").step == 2
        trainer = make_trainer(tmp_path)
        trainer.load(1)
        trainer.save(2)
        saved = torch.load(tmp_path / "model-2.pt", weights_only=True)
        assert saved["step"] == 2 and saved["training"]["seed"] == 4


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

    @pytest.mark.parametrize(
        "part, name, value, message",
        [
            ("unet", "dim", "x", "its network: dim must be"),
            ("unet", "dim_mults", None, "its network: dim_mults must be a sequence of integers; got None"),
            ("unet", "channels", {}, "its network: channels must be"),
            ("unet", "self_condition", torch.zeros(3), "its network: "),
            ("diffusion", "timesteps", -1, "its process: timesteps must be"),
        ],
    )
    def test_unusable_arguments_are_the_files(self, tmp_path, part, name, value, message):
        make_trainer(tmp_path).save(1)
        contents = torch.load(tmp_path / "model-1.pt", weights_only=True)
        contents["config"][part][name] = value
        torch.save(contents, tmp_path / "model-2.pt")
        with pytest.raises(CheckpointError, match="checkpoint .*model-2.pt has no usable config of " + message):
            load_checkpoint(tmp_path / "model-2.pt")
        if name in ("dim_mults", "channels"):
            with pytest.raises(CheckpointError, match="checkpoint .*model-2.pt has no usable config of " + message):
                make_trainer(tmp_path).load(2)

    def test_an_unusable_argument_of_the_call_is_not_the_files(self, tmp_path):
        make_trainer(tmp_path).save(1)
        with pytest.raises(ValueError, match="^image_size must be a positive int"):
            load_checkpoint(tmp_path / "model-1.pt", image_size="x")
        with pytest.raises(ValueError, match="^sampling_timesteps must be in"):
            load_checkpoint(tmp_path / "model-1.pt", sampling_timesteps=0)

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


@pytest.fixture(scope="module")
def network():
    """A network, a process around it, and an EMA of that whose weights differ."""
    from ema_pytorch import EMA

    process = ddpm_fast.GaussianDiffusion(Unet(**SMALL), image_size=8, timesteps=20, objective="pred_x0")
    ema = EMA(process, beta=0.5, update_every=1, update_after_step=0)
    for _ in range(3):
        with torch.no_grad():
            for parameter in process.parameters():
                parameter.add_(0.1)
        ema.update()
    return process, ema


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


# name → (contents from (network, process, EMA) states, what the warning says was stripped, where the EMA is)
WRAPPED = {
    "a process": (lambda n, p, e: p, None, False),
    "a process in model": (lambda n, p, e: {"model": p}, None, False),
    "a process in state_dict": (lambda n, p, e: {"state_dict": p, "epoch": 3}, "'state_dict.'", False),
    "DDP": (lambda n, p, e: prefixed(p, "module."), "'module.'", False),
    "DDP in model": (lambda n, p, e: {"step": 7, "model": prefixed(p, "module.")}, "'module.'", False),
    "compiled": (lambda n, p, e: prefixed(p, "_orig_mod."), "'_orig_mod.'", False),
    "compiled in DDP": (lambda n, p, e: prefixed(p, "module._orig_mod."), "'module.', '_orig_mod.'", False),
    "compiled network": (
        lambda n, p, e: {name.replace("model.", "model._orig_mod."): tensor for name, tensor in p.items()},
        "'_orig_mod.'",
        False,
    ),
    "compiled blocks": (
        lambda n, p, e: {name.replace("downs.0.0.", "downs.0.0._orig_mod."): tensor for name, tensor in p.items()},
        "'_orig_mod.'",
        False,
    ),
    "Lightning": (
        lambda n, p, e: {"state_dict": prefixed(p, "model."), "global_step": 7},
        "'state_dict.', 'model.'",
        False,
    ),
    "Lightning, compiled": (
        lambda n, p, e: {"state_dict": prefixed(p, "diffusion._orig_mod."), "global_step": 7},
        "'state_dict.', 'diffusion.', '_orig_mod.'",
        False,
    ),
    "Lightning with an EMA": (
        lambda n, p, e: {"state_dict": {**prefixed(p, "model."), **prefixed(e, "ema.")}},
        "'state_dict.', 'model.'",
        True,
    ),
    "an EMA": (lambda n, p, e: e, "'online_model.'", True),
    "an EMA in DDP": (lambda n, p, e: prefixed(e, "module."), "'online_model.', 'module.'", True),
    "an EMA in model": (lambda n, p, e: {"model": e}, "'online_model.'", True),
    "a trainer's": (lambda n, p, e: {"step": 7, "model": p, "ema": e}, None, True),
    "a trainer's of DDP": (
        lambda n, p, e: {"step": 7, "model": prefixed(p, "module."), "ema": e},
        "'module.'",
        True,
    ),
    "a trainer's with bare EMA weights": (
        lambda n, p, e: {
            "step": 7,
            "model": p,
            "ema": {k.removeprefix("ema_model."): t for k, t in e.items() if k.startswith("ema_model.")},
        },
        None,
        True,
    ),
    "a network": (lambda n, p, e: n, "only a network", False),
    "a network in model": (lambda n, p, e: {"model": n}, "only a network", False),
    "a network in Lightning": (lambda n, p, e: {"state_dict": prefixed(n, "model.")}, "only a network", False),
    "a network in DDP": (lambda n, p, e: prefixed(n, "module."), "'module.'.*only a network", False),
    "a network in net": (lambda n, p, e: prefixed(n, "net."), "'net.'.*only a network", False),
}


class TestWrappedNames:
    @pytest.mark.parametrize("name", WRAPPED)
    def test_load_checkpoint_finds_them(self, tmp_path, network, name):
        process, ema = network
        make, sentence, has_average = WRAPPED[name]
        contents = make(process.model.state_dict(), process.state_dict(), ema.state_dict())
        torch.save(contents, tmp_path / "weights.pt")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = load_checkpoint(tmp_path / "weights.pt", image_size=8)
        said = [str(warning.message) for warning in caught if "weights.pt: " in str(warning.message)]
        assert len(said) == (sentence is not None)
        if sentence is not None:
            assert re.search(sentence, said[0])
        assert_equal_states(loaded.model, process.model)
        if "network" not in name or "compiled" in name:
            assert loaded.diffusion.objective == "pred_x0" and loaded.diffusion.num_timesteps == 20
        assert_equal_states(loaded.ema.ema_model.model, ema.ema_model.model if has_average else process.model)
        assert loaded.step == (7 if {"step", "global_step"} & contents.keys() and name != "an EMA" else 0)

    @pytest.mark.parametrize("name", WRAPPED)
    def test_the_trainer_goes_on_from_them(self, tmp_path, network, name):
        process, ema = network
        make, _, has_average = WRAPPED[name]
        contents = make(process.model.state_dict(), process.state_dict(), ema.state_dict())
        torch.save(contents, tmp_path / "weights.pt")
        trainer = make_trainer(tmp_path, objective="pred_x0")
        with pytest.warns(UserWarning, match="weights.pt holds no state of the optimizer: Adam starts anew"):
            trainer.load("weights.pt")
        assert_equal_states(trainer.model, process)
        assert_equal_states(trainer.ema.ema_model, ema.ema_model if has_average else process)
        assert trainer.step == (7 if {"step", "global_step"} & contents.keys() and name != "an EMA" else 0)

    def test_a_compiled_network_takes_the_file_of_a_plain_one_and_back(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.save(1)
        compiled = ddpm_fast.GaussianDiffusion(
            torch.compile(Unet(**SMALL), backend="eager"), image_size=8, timesteps=20
        )
        other = Trainer(compiled, DigitsDataset(), results_folder=tmp_path, calculate_fid=False, progress=False)
        other.load(1)
        other.save(2)
        assert load_file(tmp_path / "model-2.pt")["config"]["unet"] == trainer.model.model.config
        trainer.load(2)
        assert_equal_states(load_quietly(tmp_path / "model-2.pt").model, trainer.model.model)

    @pytest.mark.parametrize(
        "make, first, second",
        [
            (lambda s: {"teacher": s, "student": s}, "teacher.init_conv.weight", "student.init_conv.weight"),
            (lambda s: {"model": s, "state_dict": s}, "model.init_conv.weight", "state_dict.init_conv.weight"),
            (
                lambda s: {**s, **prefixed({name: tensor + 1 for name, tensor in s.items()}, "module.")},
                "init_conv.weight",
                "module.init_conv.weight",
            ),
        ],
    )
    def test_two_that_could_be_meant_are_named(self, tmp_path, make, first, second):
        torch.save(make(Unet(**SMALL).state_dict()), tmp_path / "weights.pt")
        for load in (load_checkpoint, make_trainer(tmp_path).load):
            with pytest.raises(CheckpointError, match=f"is ambiguous: it holds .*'{first}' and '{second}'"):
                load(tmp_path / "weights.pt")

    def test_what_is_left_out_is_said(self, tmp_path, network):
        state = {**prefixed(network[0].state_dict(), "model."), "loss.weight": torch.zeros(3)}
        torch.save({"state_dict": state}, tmp_path / "weights.pt")
        with pytest.warns(UserWarning, match="1 other tensors were left out, such as 'state_dict.loss.weight'"):
            load_checkpoint(tmp_path / "weights.pt", image_size=8)

    def test_an_average_without_a_network_is_an_error(self, tmp_path, network):
        data = {"step": 1, "model": network[0].state_dict(), "ema": {"step": torch.tensor(3)}}
        torch.save(data, tmp_path / "model-1.pt")
        with pytest.raises(CheckpointError, match="has no network in its 'ema'"):
            load_checkpoint(tmp_path / "model-1.pt")


class TestWhichFile:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        folder = tmp_path / "results"
        folder.mkdir()
        for name in ("model-1.pt", "model-last.pt", "weights.pt"):
            (folder / name).touch()
        return folder

    @pytest.mark.parametrize(
        "name, file",
        [
            (1, "model-1.pt"),
            (np.int64(1), "model-1.pt"),
            (1.0, "model-1.pt"),
            ("1", "model-1.pt"),
            ("last", "model-last.pt"),
            ("model-1", "model-1.pt"),
            ("model-1.pt", "model-1.pt"),
            ("weights.pt", "weights.pt"),
            (Path("weights.pt"), "weights.pt"),
            ("../results/model-1.pt", "model-1.pt"),
        ],
    )
    def test_a_milestone_a_name_or_a_path(self, folder, name, file):
        assert find_file(name, folder).samefile(folder / file)
        assert find_file(str(folder / file), folder) == folder / file
        assert find_file(folder / file, "elsewhere") == folder / file

    def test_two_files_that_fit_are_named(self, folder):
        Path("weights.pt").touch()
        with pytest.raises(CheckpointError, match=r"'weights.pt' may be weights.pt or .*results/weights.pt; give the"):
            find_file("weights.pt", folder)
        assert find_file("./weights.pt", folder) == Path("weights.pt")
        assert find_file(folder / "weights.pt", folder) == folder / "weights.pt"

    def test_one_file_by_two_names_is_one(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        assert find_file("weights.pt", folder).samefile(folder / "weights.pt")

    @pytest.mark.parametrize(
        "name, named",
        [(7, "results/model-7.pt"), ("best", "results/model-best.pt"), ("other.pt", "other.pt"), ("a/b.pt", "a/b.pt")],
    )
    def test_a_missing_one_is_named(self, folder, name, named):
        with pytest.raises(FileNotFoundError, match=f"checkpoint .*{named} does not exist"):
            load_file(find_file(name, folder))

    @pytest.mark.parametrize("name", [True, 1.5, None])
    def test_no_milestone(self, folder, name):
        with pytest.raises(ValueError, match="milestone must be an integer; got "):
            find_file(name, folder)


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
