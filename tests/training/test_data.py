"""Images in and out: pixels against torchvision, and folders as users leave them."""

import os
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ddpm_fast.training.data import Dataset, DigitsDataset
from ddpm_fast.training.images_out import check_grid, save_image_grid, save_trajectory_strip

torchvision = pytest.importorskip("torchvision")


def make_image(path, size, mode="RGB", seed=0):
    """A noisy image of Pillow size (width, height), saved at `path`."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    Image.fromarray(pixels, mode=mode).save(path)
    return path


def read(dataset):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("size", [(64, 64), (97, 41), (41, 97), (33, 32), (20, 20), (32, 32), (301, 7)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_square_images_match_torchvision_exactly(tmp_path, size, mode):
    path = make_image(tmp_path / "a.png", size, mode)
    transforms = torchvision.transforms
    expected = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()])
    image = Dataset(tmp_path, 32)[0]
    assert torch.equal(image, expected(Image.open(path)))
    assert image.dtype == torch.float32 and image.is_contiguous()


@pytest.mark.parametrize("size", [(64, 64), (97, 41), (20, 33)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("dtype", [torch.uint8, None])
def test_bytes_are_those_of_which_floats_are_a_255th(tmp_path, size, mode, dtype):
    make_image(tmp_path / "a.png", size, mode)
    image = Dataset(tmp_path, (32, 24), dtype=dtype)[0]
    assert image.dtype == torch.uint8 and image.is_contiguous()
    assert torch.equal(image.float() / 255, Dataset(tmp_path, (32, 24))[0])


def test_without_a_dtype_what_has_no_bytes_is_float32(tmp_path, monkeypatch):
    make_image(tmp_path / "a.png", (9, 9))
    np.save(tmp_path / "b.npy", np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    np.save(tmp_path / "c.npy", np.random.default_rng(0).integers(0, 256, (9, 9, 5), dtype=np.uint8))
    dataset = Dataset(tmp_path, 8, dtype=None)
    assert [image.dtype for image in read(dataset)] == [torch.uint8, torch.uint8, torch.float32]
    assert dataset[2].max() <= 1
    Image.fromarray(np.full((9, 9), 4095, np.uint16)).save(tmp_path / "d.png")
    with pytest.warns(UserWarning, match="values from 0 to 4095"):
        dataset = Dataset(tmp_path, 8, dtype=None)
    assert {image.dtype for image in read(dataset)} == {torch.float32}


def test_a_recorded_range_makes_all_images_floats(tmp_path):
    """A folder whose deep images have gone goes on as it began, with one dtype."""
    make_image(tmp_path / "a.png", (9, 9))
    dataset = Dataset(tmp_path, 8, dtype=None)
    with pytest.warns(UserWarning, match="as where the run began"):
        dataset.keep_value_range((0, 4095))
    assert dataset[0].dtype == torch.float32


def test_impossible_dtypes_are_named(tmp_path):
    make_image(tmp_path / "a.png", (9, 9))
    for dtype in (torch.float16, "uint8", np.uint8):
        with pytest.raises(ValueError, match="dtype must be torch.float32, torch.uint8 or None; got"):
            Dataset(tmp_path, 8, dtype=dtype)


def test_where_bytes_are_asked_for_others_are_refused(tmp_path):
    make_image(tmp_path / "a.png", (9, 9))
    np.save(tmp_path / "b.npy", np.zeros((9, 9, 5), dtype=np.uint8))
    with pytest.raises(ValueError, match="b.npy has more than 8 bits .* or as an array other than 1 or 3 channels"):
        Dataset(tmp_path, 8, dtype=torch.uint8)[1]


@pytest.mark.parametrize("to_mode", ["L", "RGB", "RGBA"])
def test_conversion_matches_upstream(tmp_path, to_mode):
    upstream = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    make_image(tmp_path / "a.png", (50, 39), "RGB")
    ours, theirs = (cls(tmp_path, 16, convert_image_to=to_mode)[0] for cls in (Dataset, upstream.Dataset))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("to_mode, channels", [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_images_in_lab_become_the_mode_that_is_asked_for(tmp_path, to_mode, channels):
    Image.new("LAB", (9, 9), (128, 0, 0)).save(tmp_path / "a.tif")
    assert Dataset(tmp_path, 8, convert_image_to=to_mode)[0].shape == (channels, 8, 8)


def test_a_slice_is_no_index(tmp_path):
    make_image(tmp_path / "a.png", (9, 9))
    with pytest.raises(TypeError, match="'slice' object cannot be interpreted as an integer"):
        Dataset(tmp_path, 8)[:1]


@pytest.mark.parametrize("target", [(16, 48), (48, 16), (24, 40)])
@pytest.mark.parametrize("size", [(64, 64), (200, 30), (30, 200)])
def test_non_square_targets_keep_the_aspect_ratio(tmp_path, target, size):
    """A centred disc stays a disc; upstream's Resize((h, w)) makes an ellipse of it."""
    width, height = size
    y, x = np.mgrid[:height, :width].astype(float)
    radius = min(width, height) / 12
    disc = (x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2 < radius**2
    Image.fromarray((disc * 255).astype(np.uint8)).save(tmp_path / "disc.png")
    image = Dataset(tmp_path, target)[0][0]
    assert image.shape == target
    spread_y, spread_x = weighted_spread(image)
    assert spread_y == pytest.approx(spread_x, rel=0.08)


def weighted_spread(image):
    """Standard deviation of the mass of an image (h, w) along y and along x, in pixels."""
    mass = image / image.sum()
    spreads = []
    for axis in (1, 0):
        profile = mass.sum(axis)
        position = torch.arange(len(profile))
        mean = (profile * position).sum()
        spreads.append((profile * (position - mean) ** 2).sum().sqrt().item())
    return spreads


def test_files_are_found_in_subfolders_sorted_and_in_any_case(tmp_path):
    names = ["b.PNG", "a.jpg", "sub/deep/c.Jpeg", "z.tiff", "sub/a.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_image(tmp_path / name, (9, 9))
    (tmp_path / "notes.txt").write_text("no image")
    dataset = Dataset(str(tmp_path), 8)
    assert [str(path.relative_to(tmp_path)) for path in dataset.paths] == sorted(names)
    assert len(Dataset(tmp_path, 8, exts=["png"])) == 2


def test_flips_half_of_the_time_before_cropping(tmp_path):
    make_image(tmp_path / "a.png", (8, 8))
    plain = Dataset(tmp_path, 8)[0]
    dataset = Dataset(tmp_path, 8, augment_horizontal_flip=True)
    torch.manual_seed(0)
    images = [dataset[0] for _ in range(200)]
    flipped = [torch.equal(image, plain.flip(-1)) for image in images]
    assert 70 < sum(flipped) < 130
    assert all(torch.equal(image, plain) for image, is_flipped in zip(images, flipped, strict=True) if not is_flipped)


@pytest.mark.parametrize("values", [0, 40_000, 65_535])
def test_16_bit_grey_keeps_its_brightness(tmp_path, values):
    Image.fromarray(np.full((8, 8), values, dtype=np.uint16)).save(tmp_path / "deep.png")
    image = Dataset(tmp_path, 8, convert_image_to="L")[0]
    assert image.shape == (1, 8, 8)
    assert image.mean().item() == pytest.approx(values / 65_535, abs=1 / 255)


def test_palette_and_bilevel_images_become_colours(tmp_path):
    make_image(tmp_path / "a.png", (8, 8))
    reduced = Image.open(tmp_path / "a.png").quantize(16)
    reduced.save(tmp_path / "palette.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "white.png")
    palette, white = (Dataset(tmp_path, 8)[index] for index in (1, 2))
    assert torch.equal(palette, torchvision.transforms.functional.to_tensor(reduced.convert("RGB")))
    assert torch.equal(white, torch.ones(1, 8, 8))


def break_images(folder):
    """Every kind of broken file we know of, each named for what is wrong with it; returns their paths."""
    good = make_image(folder / "source.png", (64, 64)).read_bytes()
    jpeg = folder / "source.jpg"
    Image.open(folder / "source.png").save(jpeg)
    contents = {
        "truncated.png": good[: len(good) // 2],
        "truncated.jpg": jpeg.read_bytes()[:300],
        "zero.png": b"",
        "text.png": b"this is no image\n",
        "scrambled.png": good[:40] + random.Random(0).randbytes(len(good) - 40),
        "signature_only.png": good[:8],
        "html.jpeg": b"<!doctype html><title>404</title>",
        "bomb.png": bomb(good),
    }
    jpeg.unlink()
    (folder / "source.png").unlink()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    os.symlink(folder / "nowhere", folder / "dangling.png")
    return sorted([*(folder / name for name in contents), folder / "dangling.png"])


def bomb(png):
    """The PNG with a header that claims 60,000 × 60,000 pixels."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
    return png[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def test_every_kind_of_broken_file_is_named_once_skipped_and_counted(tmp_path):
    broken = break_images(tmp_path)
    make_image(tmp_path / "k_good.png", (10, 10), seed=1)
    make_image(tmp_path / "zz_good.png", (10, 10), seed=2)
    dataset = Dataset(tmp_path, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = [dataset[index] for index in range(len(dataset)) for _ in range(2)]
    messages = [str(warning.message) for warning in caught if "broken image" in str(warning.message)]
    assert dataset.broken_files == broken
    assert len(messages) == len(broken)
    assert all(sum(str(path) in message for message in messages) == 1 for path in broken)
    assert all(image.shape == (3, 8, 8) for image in images)


def test_the_next_readable_file_stands_in(tmp_path):
    for index in range(4):
        make_image(tmp_path / f"{index}.png", (8, 8), seed=index)
    originals = read(Dataset(tmp_path, 8))
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "3.png").write_bytes(b"")
    images = read(Dataset(tmp_path, 8))
    assert torch.equal(images[1], originals[2])
    assert torch.equal(images[3], originals[0])


def test_a_file_deleted_after_the_listing_is_skipped(tmp_path):
    for index in range(3):
        make_image(tmp_path / f"{index}.png", (8, 8), seed=index)
    dataset = Dataset(tmp_path, 8)
    (tmp_path / "0.png").unlink()
    with pytest.warns(UserWarning, match="0.png"):
        dataset[0]
    assert dataset.broken_files == [tmp_path / "0.png"]


@pytest.mark.parametrize("start_method, num_workers", [("fork", 2), ("spawn", 1)])
def test_counts_from_workers_reach_the_main_process(tmp_path, start_method, num_workers):
    for index in range(8):
        make_image(tmp_path / f"{index}.png", (8, 8), seed=index)
    for index in (2, 5):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    dataset = Dataset(tmp_path, 8)
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, multiprocessing_context=start_method)
    assert sum(len(batch) for batch in loader) == 8
    assert [path.name for path in dataset.broken_files] == ["2.png", "5.png"]


def test_only_broken_files_is_one_clear_error(tmp_path):
    break_images(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of them could be read"):
        Dataset(tmp_path, 8)[0]


def test_unusable_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder .*missing does not exist"):
        Dataset(tmp_path / "missing", 8)
    with pytest.raises(ValueError, match=r"folder .* holds no images; file names must end in .*\.png"):
        Dataset(tmp_path, 8)
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        Dataset(tmp_path / "file.png", 8)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read every folder")
def test_an_unreadable_folder_is_named(tmp_path):
    tmp_path.chmod(0)
    try:
        with pytest.raises(PermissionError, match="may not be read"):
            Dataset(tmp_path, 8)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("image_size", [0, -3, 2.5, (8,), (8, 8, 8), "8", (8, 0)])
def test_impossible_sizes_are_named(tmp_path, image_size):
    make_image(tmp_path / "a.png", (8, 8))
    with pytest.raises(ValueError, match="image_size must be"):
        Dataset(tmp_path, image_size)


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    dataset = DigitsDataset()
    digits = load_digits()
    assert len(dataset) == 1797
    assert torch.equal(dataset[100] * 16, torch.tensor(digits.images[100:101], dtype=torch.float32))
    assert dataset.labels.tolist() == digits.target.tolist()
    loader = DataLoader(dataset, batch_sampler=[[3, 1, 2]])
    assert torch.equal(next(iter(loader)), torch.stack([dataset[index] for index in (3, 1, 2)]))


def test_resized_digits_stay_in_range_and_alike():
    large = DigitsDataset(image_size=16)
    assert large.images.shape == (1797, 1, 16, 16)
    assert large.images.min() >= 0 and large.images.max() <= 1
    shrunk = torch.nn.functional.avg_pool2d(large.images, 2)
    assert (shrunk - DigitsDataset().images).abs().mean() < 0.06


@pytest.mark.parametrize("count, channels, nrow", [(1, 3, 8), (5, 1, 3), (9, 3, 3), (4, 4, 10)])
def test_grids_have_the_pixels_of_torchvision(tmp_path, count, channels, nrow):
    images = torch.rand(count, channels, 6, 9) * 1.4 - 0.2
    save_image_grid(images, tmp_path / "ours.png", nrow)
    torchvision.utils.save_image(images, tmp_path / "theirs.png", nrow=nrow)
    ours, theirs = (np.asarray(Image.open(tmp_path / name)) for name in ("ours.png", "theirs.png"))
    assert np.array_equal(ours, theirs)
    assert sorted(os.listdir(tmp_path)) == ["ours.png", "theirs.png"]


def test_scale_enlarges_pixels_not_the_gaps(tmp_path):
    save_image_grid(torch.ones(2, 1, 3, 3), tmp_path / "grid.png", nrow=2, padding=1, scale=4)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (14, 27, 3)
    assert (pixels == 255).sum() == 2 * 12 * 12 * 3


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(2, 0, 8, 8), torch.zeros(0, 3, 8, 8)])
def test_grids_of_other_shapes_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="images must be"):
        save_image_grid(images, tmp_path / "grid.png")


@pytest.mark.parametrize("channels", [2, 5, 6, 12])
def test_other_channels_are_a_row_of_tiles_and_an_array(tmp_path, channels):
    images = torch.rand(3, channels, 6, 9) * 1.4 - 0.2
    save_image_grid(images, tmp_path / "grid.png", nrow=7, scale=2)
    save_image_grid(images.flatten(0, 1)[:, None], tmp_path / "tiles.png", nrow=channels, scale=2)
    grid, tiles = (np.asarray(Image.open(tmp_path / name)) for name in ("grid.png", "tiles.png"))
    assert np.array_equal(grid, tiles) and grid.shape == (3 * 14 + 2, channels * 20 + 2, 3)
    values = np.load(tmp_path / "grid.npy")
    assert values.dtype == np.float32 and np.array_equal(values, images.numpy())
    assert sorted(os.listdir(tmp_path)) == ["grid.npy", "grid.png", "tiles.png"]


def test_a_strip_of_other_channels_has_a_row_for_each(tmp_path):
    frames = torch.linspace(0, 1, 31)[None, :, None, None, None] * torch.tensor([1.0, 0.5])[None, None, :, None, None]
    save_trajectory_strip(frames.expand(2, 31, 2, 4, 4), tmp_path / "strip.png", num_frames=5, padding=0)
    pixels = np.asarray(Image.open(tmp_path / "strip.png"))
    assert pixels.shape == (16, 20, 3)
    assert pixels[0, ::4, 0].tolist() == [0, 68, 127, 187, 255] and pixels[4, 16, 0] == 128
    assert os.listdir(tmp_path) == ["strip.png"]


@pytest.mark.parametrize(
    "ending, kind",
    [("png", "PNG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP"), ("tif", "TIFF")],
)
def test_the_ending_says_the_kind_of_file(tmp_path, ending, kind):
    y, x = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    images = torch.stack([x, y, 1 - x])[None].expand(4, -1, -1, -1)
    save_image_grid(images, tmp_path / "grid.png", 2)
    save_image_grid(images, tmp_path / f"ours.{ending}", 2)
    written = Image.open(tmp_path / f"ours.{ending}")
    assert written.format == kind
    difference = np.asarray(written).astype(int) - np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.abs(difference).mean() < 10


@pytest.mark.parametrize(
    "name, channels, sentence",
    [
        ("grid", 3, "grid has no ending"),
        ("grid.xyz", 3, "ends in '.xyz', which Pillow cannot write"),
        ("grid.psd", 3, "ends in '.psd', which Pillow cannot write"),
        ("grid.jpg", 4, "cannot hold a picture of 38 x 20 pixels and 4 channels: cannot write mode RGBA as JPEG"),
    ],
)
def test_files_that_cannot_be_written_are_named(tmp_path, name, channels, sentence):
    with pytest.raises(ValueError, match=sentence):
        save_image_grid(torch.zeros(2, channels, 16, 16), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_grid_too_long_for_its_kind_of_file_is_known_before(tmp_path):
    assert check_grid("a.jpg", (64, 3, 100, 100)) == "JPEG"
    with pytest.raises(ValueError, match="a.jpg cannot hold a picture of 80018 x 26 pixels"):
        check_grid("a.jpg", (8, 3, 22, 10_000))
    assert check_grid("a.png", (8, 3, 22, 10_000)) == "PNG"


def test_nan_images_leave_the_earlier_grid_alone(tmp_path):
    path = tmp_path / "grid.png"
    save_image_grid(torch.rand(4, 1, 8, 8), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not finite"):
        save_image_grid(torch.full((4, 1, 8, 8), torch.nan), path)
    assert path.read_bytes() == before


def test_a_strip_shows_first_and_last_frame(tmp_path):
    frames = torch.linspace(0, 1, 31)[None, :, None, None, None].expand(2, 31, 1, 4, 4)
    save_trajectory_strip(frames, tmp_path / "strip.png", num_frames=5, padding=0)
    pixels = np.asarray(Image.open(tmp_path / "strip.png"))
    assert pixels.shape == (8, 20, 3)
    assert pixels[0, ::4, 0].tolist() == [0, 68, 127, 187, 255]


def test_the_signature_is_upstreams_with_additions_at_the_end(upstream):
    import inspect

    theirs, ours = (list(inspect.signature(cls.__init__).parameters.values()) for cls in (upstream.Dataset, Dataset))
    assert [(p.name, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.kind) for p in theirs]
    assert [p.default for p in ours[: len(theirs)] if p.name != "exts"] == [
        p.default for p in theirs if p.name != "exts"
    ]
    (their_endings,), (our_endings,) = ([p.default for p in side if p.name == "exts"] for side in (theirs, ours))
    assert our_endings[: len(their_endings)] == their_endings
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
