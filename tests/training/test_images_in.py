"""Pixels of files: more than 8 bits, floats, arrays, EXIF orientation, transparency, and damage."""

import copy
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, JpegImagePlugin, features
from torch.utils.data import DataLoader

from ddpm_fast.training.data import Dataset

RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)


def save(path, values):
    """An array as a file: by Pillow, or as .npy."""
    np.save(path, values) if path.suffix == ".npy" else Image.fromarray(values).save(path)
    return path


def dataset_of(folder, size=32, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Dataset(folder, size, **options)


def png_16(path, values):
    """A PNG of 16 bits per channel from uint16 (h, w, C), which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("ending", ["png", "tif", "npy"])
@pytest.mark.parametrize("bits", [1, 4, 8, 10, 12, 14, 16])
def test_unsigned_integers_fill_the_bits_that_they_use(tmp_path, bits, ending):
    values = np.round(RAMP * (2**bits - 1)).astype(np.uint16)
    save(tmp_path / f"a.{ending}", values)
    with pytest.warns(UserWarning, match=rf"values from 0 to {2**bits - 1} become \[0, 1\]") as caught:
        dataset = Dataset(tmp_path, 32)
    assert len(caught) == 1 and dataset.value_range == (0, 2**bits - 1)
    image = dataset[0]
    assert image.shape == (1, 32, 32) and image.dtype == torch.float32
    assert torch.equal(image[0], torch.from_numpy(values.astype(np.float32)) / (2**bits - 1))
    assert len(image.unique()) == min(2**bits, 1024)


@pytest.mark.parametrize("ending", ["tif", "npy"])
@pytest.mark.parametrize(
    "values, expected",
    [
        ((RAMP * 255).astype(np.int32), (0, 255)),
        ((RAMP * 60_000).astype(np.int32), (0, 65_535)),
        ((RAMP * 3000 - 1000).round().astype(np.int32), (-1000, 2000)),
        ((RAMP * 2e6).round().astype(np.int32), (0, 2_000_000)),
        (RAMP.astype(np.float32), (0, 1)),
        ((RAMP * 0.5 + 0.2).astype(np.float32), (0, 1)),
        ((RAMP * 2 - 1).astype(np.float32), (-1, 1)),
        ((RAMP * 255).astype(np.float32), (0, 255)),
        ((RAMP * 40 + 270).astype(np.float32), (270, 310)),
        (np.full((32, 32), 7, np.float32), (7, 8)),
    ],
)
def test_signed_integers_and_floats_take_the_range_that_is_found(tmp_path, values, expected, ending):
    save(tmp_path / f"a.{ending}", values)
    dataset = dataset_of(tmp_path)
    low, high = expected
    assert dataset.value_range == expected
    assert np.allclose(dataset[0][0].numpy(), (values.astype(float) - low) / (high - low), atol=1e-6)


def test_unsigned_32_bits_do_not_turn_negative(tmp_path):
    values = (RAMP * (2**32 - 1)).astype(np.uint32)
    save(tmp_path / "a.npy", values)
    Image.fromarray(values.view(np.int32)).save(tmp_path / "b.tif")
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))  # the tag SampleFormat
    (tmp_path / "b.tif").write_bytes((tmp_path / "b.tif").read_bytes().replace(signed, unsigned))
    dataset = dataset_of(tmp_path)
    assert dataset.value_range == (0, 2**32 - 1)
    assert all(np.allclose(image[0].numpy(), RAMP, atol=1e-6) for image in dataset)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_keep_them(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 4096, (32, 32, channels), dtype=np.uint16)
    png_16(tmp_path / "a.png", values)
    dataset = dataset_of(tmp_path)
    assert dataset.value_range == (0, 4095)
    assert torch.equal(dataset[0], torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1) / 4095)


def test_one_range_holds_for_all_files_of_a_folder(tmp_path):
    for index, top in enumerate((50, 900, 3000)):
        save(tmp_path / f"{index}.png", np.full((8, 8), top, np.uint16))
    Image.new("L", (8, 8), 51).save(tmp_path / "8-bit.png")
    dataset = dataset_of(tmp_path, 8)
    assert dataset.value_range == (0, 4095)
    assert [image.max().item() for image in dataset] == pytest.approx([top / 4095 for top in (50, 900, 3000)] + [0.2])


def test_workers_have_the_range_of_the_main_process(tmp_path):
    for index in range(6):
        save(tmp_path / f"{index}.tif", (RAMP * (index + 1) * 100).astype(np.float32))
    dataset = dataset_of(tmp_path)
    loader = DataLoader(dataset, batch_size=3, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), torch.stack(list(dataset)))
    assert copy.deepcopy(dataset).value_range == dataset.value_range == (0, 600)


def test_a_given_range_is_taken_and_clips(tmp_path):
    save(tmp_path / "a.png", np.array([[0, 100, 150, 200]] * 4, np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = Dataset(tmp_path, 4, value_range=(100, 200))
        assert dataset[0][0, 0].tolist() == [0, 0, 0.5, 1]


def test_a_given_range_without_deep_images_is_said(tmp_path):
    Image.new("L", (8, 8), 51).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="value_range is for images of more than 8 bits.*hold none"):
        assert Dataset(tmp_path, 8, value_range=(0, 10))[0].mean().item() == pytest.approx(0.2)


@pytest.mark.parametrize("value_range", [(1, 0), (1, 1), (0,), (0, 1, 2), 5, "01", (0, np.inf), (0, np.nan)])
def test_impossible_ranges_are_named(tmp_path, value_range):
    save(tmp_path / "a.png", np.zeros((8, 8), np.uint16))
    with pytest.raises(ValueError, match="value_range must be two finite numbers"):
        Dataset(tmp_path, 8, value_range=value_range)


def test_images_beyond_the_sample_are_clipped_and_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.training.value_range._MAX_FILES", 2)
    for index, top in enumerate((200, 5000, 6000, 100)):  # the first and the last are looked at
        save(tmp_path / f"{index}.png", np.full((8, 8), top, np.uint16))
    dataset = dataset_of(tmp_path, 8)
    assert dataset.value_range == (0, 255)
    with pytest.warns(UserWarning, match=r"1.png has values from 5000 to 5000.*\[0, 255\]") as caught:
        assert [image.max().item() for image in dataset] == pytest.approx([200 / 255, 1, 1, 100 / 255])
    assert len(caught) == 1


def test_deep_images_that_the_sample_misses_have_their_16_bits_and_are_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_fast.training.value_range._MAX_HEADERS", 2)
    for index in range(4):
        Image.new("L", (8, 8), 51).save(tmp_path / f"{index}.png")
    for index in (1, 2):
        save(tmp_path / f"{index}.png", np.full((8, 8), 13107, np.uint16))
    dataset = dataset_of(tmp_path, 8)
    assert dataset.value_range is None
    with pytest.warns(UserWarning, match="give value_range=") as caught:
        assert [image.mean().item() for image in dataset] == pytest.approx([0.2] * 4)
    assert len(caught) == 1


def test_floats_among_integers_are_refused_unless_a_range_is_given(tmp_path):
    save(tmp_path / "a.tif", np.full((8, 8), 0.5, np.float32))
    save(tmp_path / "b.png", np.full((8, 8), 3000, np.uint16))
    with pytest.raises(ValueError, match="float images and integer images.*value_range="):
        dataset_of(tmp_path, 8)
    assert len(dataset_of(tmp_path, 8, value_range=(0, 4095))) == 2


@pytest.mark.parametrize("to_mode, channels", [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_deep_grey_becomes_the_mode_that_is_asked_for(tmp_path, to_mode, channels):
    save(tmp_path / "a.png", (RAMP * 4095).astype(np.uint16))
    image = dataset_of(tmp_path, convert_image_to=to_mode)[0]
    grey = dataset_of(tmp_path)[0]
    assert image.shape == (channels, 32, 32)
    assert all(torch.equal(image[index], grey[0]) for index in range(min(channels, 3)))
    assert channels != 4 or torch.equal(image[3], torch.ones(32, 32))


def test_deep_images_are_resized_like_others(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (50, 71), dtype=np.uint8)
    save(tmp_path / "a.png", values)
    save(tmp_path / "b.png", values.astype(np.uint16) * 257)
    shallow, deep = dataset_of(tmp_path, (16, 24))
    assert (shallow - deep).abs().max() <= 1 / 255
    torch.manual_seed(0)
    flipped = [dataset_of(tmp_path, 16, augment_horizontal_flip=True)[1] for _ in range(12)]
    plain = dataset_of(tmp_path, 16)[1]
    assert {torch.equal(image, plain.flip(-1)) for image in flipped} == {True, False}


@pytest.mark.parametrize(
    "shape, channels", [((8, 9), 1), ((8, 9, 1), 1), ((8, 9, 3), 3), ((3, 8, 9), 3), ((2, 8, 8), 2), ((8, 8, 5), 5),
                        ((12, 16, 16), 12), ((16, 16, 12), 12)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16, np.float64, np.int64, np.bool_])
def test_arrays_of_any_channels_are_images(tmp_path, shape, channels, dtype):
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    save(tmp_path / "a.npy", values)
    size = (16, 16) if channels == 12 else (8, 8)
    image = dataset_of(tmp_path, size)[0]
    top = 255 if dtype == np.uint8 else 1
    expected = values if len(shape) == 3 and shape[0] == channels else np.moveaxis(np.atleast_3d(values), 2, 0)
    assert image.shape == (channels, *size) and image.is_contiguous()
    assert torch.equal(image, torch.from_numpy(expected.astype(np.float32))[:, :, : size[1]] / top)


@pytest.mark.parametrize(
    "values, reason",
    [
        (np.zeros((8, 8, 8)), r"shape \(8, 8, 8\)"),
        (np.zeros((4, 3, 9)), r"shape \(4, 3, 9\)"),
        (np.zeros(9), r"shape \(9,\)"),
        (np.zeros((0, 8)), "broken"),
        (np.zeros((8, 8), complex), "complex128"),
        (np.full((8, 8), np.nan), "not finite"),
        (np.array([["a"]]), "<U1"),
    ],
)
def test_arrays_that_are_no_images_are_broken_files(tmp_path, values, reason):
    save(tmp_path / "a.npy", values)
    save(tmp_path / "b.npy", np.ones((8, 8)))
    dataset = dataset_of(tmp_path, 8)
    with pytest.warns(UserWarning, match=f"skipped a broken image file: .*a.npy.*{reason}|{reason}.*a.npy"):
        assert torch.equal(dataset[0], torch.ones(1, 8, 8))


def test_an_array_that_claims_more_than_it_holds_or_holds_objects_is_broken(tmp_path):
    save(tmp_path / "a.npy", np.zeros((8, 8)))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(8, 8)", b"(999999999, 999999)").replace(b" " * 13, b"", 1))
    (tmp_path / "b.npy").write_bytes(data[:50])
    np.save(tmp_path / "c.npy", np.array([object()]), allow_pickle=True)
    np.savez(tmp_path / "d", np.ones((8, 8)))
    (tmp_path / "d.npz").rename(tmp_path / "d.npy")
    save(tmp_path / "e.npy", np.ones((8, 8)))
    dataset = dataset_of(tmp_path, 8)
    with pytest.warns(UserWarning, match="broken"):
        assert torch.equal(dataset[0], torch.ones(1, 8, 8))
    assert [path.name for path in dataset.broken_files] == ["a.npy", "b.npy", "c.npy", "d.npy"]


def test_channels_that_do_not_convert_are_named(tmp_path):
    save(tmp_path / "a.npy", np.zeros((12, 16, 16)))
    with pytest.raises(ValueError, match="convert_image_to is 'RGB', and an image of .* has 12 channels"):
        dataset_of(tmp_path, 8, convert_image_to="RGB")[0]
    with pytest.raises(ValueError, match="convert_image_to must be a mode of Pillow .* got 'RGG'"):
        Dataset(tmp_path, 8, convert_image_to="RGG")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp", "avif"])
def test_exif_orientation_is_applied(tmp_path, ending, orientation):
    if ending in ("webp", "avif") and not features.check(ending):
        pytest.skip(f"this Pillow has no {ending}")
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.new("RGB", (24, 16), "blue")
    picture.paste("red", (0, 0, 12, 8))
    picture.save(tmp_path / f"a.{ending}", exif=exif, quality=95)
    image = Dataset(tmp_path, (16, 24) if orientation < 5 else (24, 16))[0]
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"a.{ending}")).convert("RGB"))
    assert torch.equal(image, torch.from_numpy(expected.copy()).permute(2, 0, 1) / 255)
    left, top = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    assert image[0, -3 if top else 2, -3 if left else 2] > 0.8, "the red corner"
    assert image[0].mean() == pytest.approx(0.25, abs=0.05)


def photograph(size):
    """A photograph of (width, height), of a temple, with sharp edges and colours."""
    path = Path(pytest.importorskip("sklearn").__file__).parent / "datasets" / "images" / "china.jpg"
    return Image.open(path).convert("RGB").resize(size, Image.Resampling.LANCZOS)


def decoded_sizes(monkeypatch):
    """A list that gets the sizes at which JPEGs are decoded, and read again."""
    sizes, load = [], JpegImagePlugin.JpegImageFile.load

    def record(image):
        sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", record)
    return sizes


@pytest.mark.parametrize(
    "size, target, decoded",
    [
        ((640, 480), 40, (160, 120)),  # a quarter: 160 × 120 is 3 × (53 × 40) and a little
        ((640, 480), 41, (320, 240)),
        ((641, 483), 80, (321, 242)),
        ((640, 480), 81, (640, 480)),
        ((640, 480), (40, 53), (160, 120)),
        ((640, 480), (20, 100), (320, 240)),  # the width has to be covered
        ((2000, 400), 10, (250, 50)),  # an eighth at most
        ((30, 20), 64, (30, 20)),
    ],
)
def test_large_jpegs_are_decoded_at_a_scale_that_is_three_times_as_large(tmp_path, monkeypatch, size, target, decoded):
    photograph(size).save(tmp_path / "a.jpg", quality=90)
    sizes = decoded_sizes(monkeypatch)
    image = Dataset(tmp_path, target)[0]
    assert sizes[0] == decoded and image.shape[1:] == ((target,) * 2 if isinstance(target, int) else target)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "size, target", [((640, 427), 32), ((640, 427), 64), ((641, 427), (48, 32)), ((1283, 855), 64)]
)
def test_a_reduced_scale_changes_little(tmp_path, size, target, mode):
    """No value by more than 8 of 255, in the mean by less than 0.6; and the picture stays where it is."""
    photograph(size).convert(mode).save(tmp_path / "a.jpg", quality=90)
    whole = Image.open(tmp_path / "a.jpg")
    whole.load()
    reduced = Dataset(tmp_path, target, dtype=torch.uint8)
    expected = reduced.transform(whole).float()
    difference = reduced[0].float() - expected
    assert difference.any() and difference.abs().max() <= 8 and difference.abs().mean() < 0.6
    for shift in (-1, 1):
        assert (reduced[0].float() - expected.roll(shift, 2)).abs().mean() > 5 * difference.abs().mean()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_scale_is_turned_upright(tmp_path, monkeypatch, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photograph((640, 400))
    stored.save(tmp_path / "a.jpg", exif=exif, quality=90)
    sizes = decoded_sizes(monkeypatch)
    target = (40, 64) if orientation < 5 else (64, 40)
    image = Dataset(tmp_path, target, dtype=torch.uint8)[0]
    assert sizes[0] == (320, 200)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    expected = np.asarray(upright.resize(target[::-1], Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 0.6


def test_a_truncated_jpeg_is_broken_at_a_reduced_scale_too(tmp_path):
    photograph((640, 480)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:9000])
    photograph((64, 48)).save(tmp_path / "b.jpg")
    with pytest.warns(UserWarning, match=r"broken image file: .*a.jpg \(image file is truncated"):
        assert Dataset(tmp_path, 16)[0].shape == (3, 16, 16)


def test_pictures_of_telephones_are_jpegs(tmp_path, monkeypatch):
    first, second = photograph((640, 480)), photograph((64, 48))
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second])
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    sizes = decoded_sizes(monkeypatch)
    assert Dataset(tmp_path, 40)[0].shape == (3, 40, 40) and sizes[0] == (160, 120)


def test_deep_images_are_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 1000
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    turned = dataset_of(tmp_path, (3, 2))[0][0] * 16_383
    assert turned.round().tolist() == [[3000, 0], [4000, 1000], [5000, 2000]]


def test_damaged_exif_spoils_no_picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.webp", lossless=True, exif=b"Exif\0\0XX*\0\0\0\0\0")
    with pytest.warns(UserWarning, match="EXIF data of .*a.webp is damaged"):
        image = Dataset(tmp_path, 8)[0]
    assert image[:, 0, 0].tolist() == [1, 0, 0]


def hidden_red(mode):
    """A picture of 16 × 8: opaque blue or grey on the left, and red or grey that is transparent on the right."""
    picture = Image.new("RGBA", (16, 8), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 8, 8))
    if mode == "P":
        palette = Image.new("P", (16, 8), 1)
        palette.putpalette([0, 0, 255, 255, 0, 0])
        palette.paste(0, (0, 0, 8, 8))
        return palette, {"transparency": 1}
    if mode == "RGB":
        return picture.convert("RGB"), {"transparency": (255, 0, 0)}
    return picture.convert(mode), {}


@pytest.mark.parametrize("background, colour", [(None, (1, 1, 1)), ("black", (0, 0, 0)), ((0, 255, 0), (0, 1, 0)),
                                                ("#0000ff", (0, 0, 1))])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB", "LA"])
def test_the_background_shows_where_an_image_is_transparent(tmp_path, mode, background, colour):
    picture, options = hidden_red(mode)
    picture.save(tmp_path / "a.png", **options)
    given = {} if background is None else {"background": background}
    image = Dataset(tmp_path, (8, 16), convert_image_to="RGB", **given)[0]
    blue = (29 / 255,) * 3 if mode == "LA" else (0, 0, 1)
    assert image[:, 4, 3].tolist() == pytest.approx(blue)
    assert image[:, 4, 12].tolist() == list(colour)
    grey = Dataset(tmp_path, (8, 16), convert_image_to="L", **given)[0]
    assert grey[0, 4, 12].item() == pytest.approx(np.dot(colour, (0.299, 0.587, 0.114)), abs=1 / 255)


def test_half_transparent_pixels_are_mixed_and_opaque_ones_kept(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    save(tmp_path / "a.png", values)
    image = Dataset(tmp_path, 8, convert_image_to="RGB", background=(10, 200, 90))[0]
    alpha = values[:, :, 3:] / 255
    mixed = alpha * values[:, :, :3] + (1 - alpha) * np.array([10, 200, 90])
    assert np.abs(image.permute(1, 2, 0).numpy() * 255 - mixed).max() <= 1
    values[:, :, 3] = 255
    save(tmp_path / "a.png", values)
    image = Dataset(tmp_path, 8, convert_image_to="RGB", background="red")[0]
    assert torch.equal(image, torch.from_numpy(values[:, :, :3].copy()).permute(2, 0, 1) / 255)


def test_where_transparency_is_kept_nothing_is_composed(tmp_path):
    picture, _ = hidden_red("RGBA")
    picture.save(tmp_path / "a.png")
    for mode in (None, "RGBA"):
        assert Dataset(tmp_path, (8, 16), convert_image_to=mode)[0][:, 4, 12].tolist() == [1, 0, 0, 0]


def test_deep_transparency_is_composed(tmp_path):
    values = np.full((8, 8, 4), 4095, np.uint16)
    values[:, 4:, 3] = 0
    values[:, :, 1:3] = 0
    png_16(tmp_path / "a.png", values)
    image = dataset_of(tmp_path, 8, convert_image_to="RGB")[0]
    assert image[:, 0, 0].tolist() == [1, 0, 0] and image[:, 0, 7].tolist() == [1, 1, 1]


@pytest.mark.parametrize("background", ["nocolour", (1, 2), (0, 0, 256), (0.5, 0.5, 0.5), 3, None])
def test_impossible_backgrounds_are_named(tmp_path, background):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="background must be the name of a colour or"):
        Dataset(tmp_path, 8, background=background)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_by_another_name_is_a_broken_file(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.avif")
    data = (tmp_path / "a.avif").read_bytes()
    (tmp_path / "a.avif").unlink()
    (tmp_path / "a.jpg").write_bytes(data[: data.index(b"mdat") + 4] + b"\xff" * 1000)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.jpg")
    dataset = Dataset(tmp_path, 8)
    with pytest.warns(UserWarning, match="skipped a broken image file: .*a.jpg"):
        assert dataset[0][0].mean() > 0.9


def test_the_checkpoint_s_range_replaces_a_found_one_and_not_a_given_one(tmp_path):
    save(tmp_path / "a.png", np.full((8, 8), 1000, np.uint16))
    dataset = dataset_of(tmp_path, 8)
    dataset.keep_value_range(None)
    dataset.keep_value_range([0, 1023])
    assert dataset.value_range == (0, 1023)
    with pytest.warns(UserWarning, match=r"value_range is \(0, 4095\), as where the run began"):
        dataset.keep_value_range([0, 4095])
    assert dataset[0].mean().item() == pytest.approx(1000 / 4095)
    given = dataset_of(tmp_path, 8, value_range=(0, 2000))
    with pytest.warns(UserWarning, match=r"the run began with value_range=\(0, 4095\)"):
        given.keep_value_range([0, 4095])
    assert given[0].mean().item() == pytest.approx(0.5)
