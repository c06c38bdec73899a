"""Prepared files: the bytes of a folder in one array, written whole or not at all, and trained from."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ddpm_fast import GaussianDiffusion, PreparedDataset, Trainer, Unet
from ddpm_fast.training import prepared
from ddpm_fast.training.data import Dataset
from ddpm_fast.training.items import collate
from ddpm_fast.training.prepared import prepare


def make_folder(path, count=7, size=(20, 17)):
    path.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path / f"{index}.png")
    return path


def prepare_quietly(*arguments, **options):
    return prepare(*arguments, **{"num_workers": 0, "progress": False, **options})


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_it_holds_the_folder_s_bytes_in_its_order(tmp_path, channels, num_workers):
    folder = make_folder(tmp_path / "images")
    shape, broken = prepare_quietly(folder, tmp_path / "a.npy", (8, 12), channels=channels, num_workers=num_workers)
    assert shape == (7, channels, 8, 12) and broken == []
    array = np.load(tmp_path / "a.npy")  # anybody's numpy reads it
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    expected = torch.stack(
        [*map(Dataset(folder, (8, 12), convert_image_to=mode, dtype=torch.uint8).__getitem__, range(7))]
    )
    assert array.dtype == np.uint8 and np.array_equal(array, expected)
    dataset = PreparedDataset(tmp_path / "a.npy")
    assert len(dataset) == 7 and torch.equal(dataset[-1], expected[6])
    batch = collate(dataset.__getitems__([5, 0, 5]))
    assert batch.dtype == torch.uint8 and torch.equal(batch, expected[[5, 0, 5]])


def test_broken_images_are_named_and_left_out(tmp_path):
    folder = make_folder(tmp_path / "images", count=12)
    for index in (0, 4):
        (folder / f"{index}.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped a broken image file: .*4.png"):
        shape, broken = prepare_quietly(folder, tmp_path / "a.npy", 8)
    assert shape == (10, 3, 8, 8) and broken == [folder / "0.png", folder / "4.png"]
    whole = Dataset(folder, 8, dtype=torch.uint8)
    kept = [index for index in range(12) if whole.paths[index] not in broken]
    array = np.load(tmp_path / "a.npy")
    assert array.shape == shape
    assert all(np.array_equal(array[place], whole[index]) for place, index in enumerate(kept))


def test_a_header_with_fewer_images_fits_into_the_place():
    lengths = {len(prepared._header((count, 4, 1024, 1024))) for count in (1, 10**3, 10**6, 10**9)}
    assert lengths == {128}


def test_only_broken_images_are_an_error(tmp_path):
    folder = make_folder(tmp_path / "images", count=1)
    (folder / "0.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="holds 1 image files, and none of them could be read"),
    ):
        prepare_quietly(folder, tmp_path / "a.npy", 8)
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_deep_images_get_one_sentence_wherever_they_are(tmp_path, monkeypatch, num_workers):
    folder = make_folder(tmp_path / "images", count=5)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(folder / "2.png")
    with pytest.raises(ValueError, match="holds images of more than 8 bits or of floats, which are no uint8"):
        prepare_quietly(folder, tmp_path / "a.npy", 8, num_workers=num_workers)
    monkeypatch.setattr("ddpm_fast.training.value_range._MAX_HEADERS", 2)  # the first and the last
    with warnings.catch_warnings(), pytest.raises(ValueError, match="2.png has more than 8 bits per channel") as info:
        warnings.simplefilter("ignore")
        prepare_quietly(folder, tmp_path / "a.npy", 8, num_workers=num_workers)
    assert "\n" not in str(info.value) and not list(tmp_path.glob("*.npy"))


def test_other_channels_are_taken_where_all_have_as_many(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("LA", (9, 9), (10, 200)).save(folder / "a.png")
    Image.new("L", (9, 9)).save(folder / "b.png")
    with pytest.raises(ValueError, match="b.png has 1 channels, and channels is 2"):
        prepare_quietly(folder, tmp_path / "a.npy", 8, channels=2)
    (folder / "b.png").unlink()
    assert prepare_quietly(folder, tmp_path / "a.npy", 8, channels=2).shape == (1, 2, 8, 8)
    assert np.load(tmp_path / "a.npy")[0, :, 0, 0].tolist() == [10, 200]


def test_an_earlier_file_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "images", count=3)
    (tmp_path / "a.npy").write_bytes(b"earlier")
    monkeypatch.setattr(prepared._Reader, "__getitem__", lambda self, index: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_quietly(folder, tmp_path / "a.npy", 8)
    assert (tmp_path / "a.npy").read_bytes() == b"earlier" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "out, message",
    [
        ("images/a.npy", "must not be inside the folder"),
        ("a.bin", "must be a file that ends in .npy"),
        ("images", ".npy"),
    ],
)
def test_impossible_places_are_named(tmp_path, out, message):
    folder = make_folder(tmp_path / "images", count=1)
    with pytest.raises(ValueError, match=message):
        prepare_quietly(folder, tmp_path / out, 8)


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((3, 3, 8, 8), np.float32), r"must hold uint8 images of shape \(N, C, h, w\).*holds float32 of shape"),
        (np.zeros((3, 8, 8), np.uint8), r"holds uint8 of shape \(3, 8, 8\)"),
        (np.zeros((0, 3, 8, 8), np.uint8), r"uint8 of shape \(0, 3, 8, 8\)"),
        (np.asfortranarray(np.zeros((3, 3, 8, 8), np.uint8)), "in Fortran's order"),
        (np.array([{}]), "no whole .npy file"),
    ],
)
def test_other_arrays_are_named(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=message):
        PreparedDataset(tmp_path / "a.npy")


def test_files_that_are_not_whole_are_named(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(FileNotFoundError, match="prepared file .*a.npy does not exist"):
        PreparedDataset(path)
    np.save(path, np.zeros((9, 3, 8, 8), np.uint8))
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"<!doctype html>" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no whole .npy file"):
            PreparedDataset(path)


def test_workers_map_the_file_themselves(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4 * 3 * 64, dtype=np.uint8).reshape(4, 3, 8, 8))
    dataset = PreparedDataset(tmp_path / "a.npy")
    written = pickle.dumps(dataset)
    assert len(written) < 1000 and torch.equal(pickle.loads(written)[3], dataset[3])
    loader = DataLoader(dataset, 3, num_workers=1, multiprocessing_context="spawn")  # with torch's own collate
    assert torch.equal(torch.cat(list(loader)), torch.from_numpy(np.load(tmp_path / "a.npy")))


def test_items_are_copies(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 1, 8, 8), np.uint8))
    dataset = PreparedDataset(tmp_path / "a.npy")
    dataset[0].fill_(1)
    dataset.__getitems__([0, 1]).batch.fill_(1)
    assert not np.load(tmp_path / "a.npy").any()


def train(folder, results):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2), channels=3), image_size=8, timesteps=10)
    options = {"train_num_steps": 3, "calculate_fid": False, "num_workers": 0, "seed": 1, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images
        trainer = Trainer(diffusion, folder, results_folder=results, **options)
        trainer.train()
    return trainer


def test_a_run_from_the_file_has_the_bits_of_one_from_the_folder(tmp_path):
    folder = make_folder(tmp_path / "images", count=20)
    prepare_quietly(folder, tmp_path / "a.npy", 8)
    ours, theirs = train(str(tmp_path / "a.npy"), tmp_path / "1"), train(folder, tmp_path / "2")
    assert isinstance(ours.ds, PreparedDataset) and theirs.ds[0].dtype == torch.uint8
    pairs = zip(ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


def test_a_trainer_names_what_does_not_fit(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((9, 3, 16, 16), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\).*its first is torch.uint8 \(3, 16, 16\)"):
        train(tmp_path / "a.npy", tmp_path / "1")
    diffusion = GaussianDiffusion(Unet(8, dim_mults=(1, 2), channels=3), image_size=16, timesteps=10)
    with pytest.raises(ValueError, match="exts is for a folder of images"):
        Trainer(diffusion, tmp_path / "a.npy", exts=["png"], results_folder=tmp_path / "1")
