"""The command line with conditions: labels in, classes and guidance out, and mistakes that get one line."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import cli
from ddpm_fast.training.checkpoint import load_checkpoint
from ddpm_fast.training.checkpoint_files import load_file
from ddpm_fast.training.data import DigitsDataset

TINY = (
    "--dim 8 --dim-mults 1 2 --timesteps 20 --sampling-timesteps 4 --batch-size 16 --save-every 2 --steps 2 "
    "--workers 0 --seed 1 --channels 1 --image-size 8"
).split()
QUICK = ["--steps", 2, "--seed", 3]

pytestmark = pytest.mark.filterwarnings("ignore:only .* images:UserWarning")


def run(*arguments):
    cli.main(list(map(str, arguments)))


def fail(capsys, *arguments):
    """`main` on arguments that must fail; returns its one line on stderr."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ddpm-fast: error: ")
    return error.removeprefix("ddpm-fast: error: ")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 real digits in the folders cat, dog and owl, with a table of their ages and of their numbers."""
    folder = tmp_path_factory.mktemp("data") / "images"
    rows = []
    for index, image in enumerate(DigitsDataset().images[:30]):
        name = f"{('owl', 'cat', 'dog')[index % 3]}/{index:02}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(folder / name)
        rows.append({"file_name": name, "label": index % 3, "age": index / 2, "size": -index})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def animals(folder, tmp_path_factory):
    """Results of a run with a class per folder."""
    results = tmp_path_factory.mktemp("animals")
    run("train", folder, "--labels", "folders", "--cond-drop-prob", 0.3, "--results-folder", results, *TINY)
    return results


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Results of a run on the digits without labels."""
    results = tmp_path_factory.mktemp("plain")
    run("train", "digits", "--results-folder", results, *TINY)
    return results


class TestTrain:
    def test_folders_make_classes(self, animals):
        loaded = load_checkpoint(animals / "model-1.pt")
        assert loaded.diffusion.class_names == ("cat", "dog", "owl")
        assert (loaded.model.num_classes, loaded.model.cond_drop_prob, loaded.diffusion.guidance) == (3, 0.3, 2.0)
        assert Image.open(animals / "sample-1.png").size == (8 * 10 + 2, 3 * 10 + 2)

    def test_it_goes_on_with_the_labels_that_are_on_record(self, animals, folder, tmp_path, capsys):
        (tmp_path / "model-1.pt").write_bytes((animals / "model-1.pt").read_bytes())
        run("train", folder, "--resume", "--results-folder", tmp_path, *TINY, "--steps", 4)
        assert load_file(tmp_path / "model-2.pt")["step"] == 4
        error = fail(capsys, "train", folder, "--labels", "metadata", "--resume", "--results-folder", tmp_path, *TINY,
                     "--steps", 6)  # fmt: skip
        assert "3 classes and the dataset has 3: class 0 was 'cat' and is '0'; a run cannot change that" in error

    def test_metadata_with_vectors_and_pairs(self, folder, tmp_path):
        run("train", folder, "--labels", "metadata", "--cond-columns", "age", "size", "--cond-folder", folder,
            "--cond-channels", 1, "--guidance", 1.5, "--results-folder", tmp_path, *TINY)  # fmt: skip
        loaded = load_checkpoint(tmp_path / "model-1.pt")
        model = loaded.model
        assert (model.num_classes, model.cond_dim, model.cond_channels) == (3, 2, 1)
        assert loaded.diffusion.class_names == ("0", "1", "2") and loaded.diffusion.guidance == 1.5
        run("sample", tmp_path, "--class", 2, "--cond", 3, -1, "--cond-images", folder / "cat",
            "--columns-per-class", 2, "--out", tmp_path / "grid.png", *QUICK)  # fmt: skip
        assert Image.open(tmp_path / "grid.png").size == (2 * 10 + 2, 1 * 10 + 2)

    def test_a_table_of_labels(self, folder, tmp_path):
        rows = [f"{path.relative_to(folder)},{path.parent.name[0]}" for path in folder.rglob("*.png")]
        (tmp_path / "names.csv").write_text("\n".join(["file_name,letter", *rows]))
        run("train", folder, "--labels", tmp_path / "names.csv", "--label-column", "letter", "--results-folder",
            tmp_path / "run", *TINY)  # fmt: skip
        assert load_checkpoint(tmp_path / "run" / "model-1.pt").diffusion.class_names == ("c", "d", "o")

    def test_a_prepared_file_brings_its_labels(self, folder, tmp_path, capsys):
        run("prepare", folder, tmp_path / "a.npy", "--labels", "folders", "--cond-columns", "age", "--image-size", 8,
            "--channels", 1, "--workers", 0)  # fmt: skip
        assert "3 classes" in capsys.readouterr().out
        run("train", tmp_path / "a.npy", "--results-folder", tmp_path / "run", *TINY)
        loaded = load_checkpoint(tmp_path / "run" / "model-1.pt")
        assert loaded.diffusion.class_names == ("cat", "dog", "owl") and loaded.model.cond_dim == 1
        error = fail(capsys, "train", tmp_path / "a.npy", "--labels", "folders", *TINY)
        assert error.startswith(
            "--labels is for a folder of images; a prepared file keeps what `ddpm-fast prepare --la"
        )

    @pytest.mark.parametrize(
        "process", ["edm", "continuous", "v-continuous", "learned", "weighted", "flow", "classifier_free"]
    )
    def test_every_process_takes_classes(self, process, tmp_path):
        sizes = (
            "--dim 8 --dim-mults 1 --steps 2 --save-every 2 --sampling-timesteps 2 --num-samples 20 --seed 1".split()
        )
        run("train", "digits", "--labels", "digits", "--process", process, *sizes, "--results-folder", tmp_path)
        out = tmp_path / "a.png"
        run("sample", tmp_path, "--class", 3, 5, "--guidance", 3, "--columns-per-class", 2, "--out", out, *QUICK)
        assert Image.open(out).size == (2 * 10 + 2, 2 * 10 + 2)

    def test_digits(self, tmp_path, capsys):
        run("train", "digits", "--labels", "digits", "--results-folder", tmp_path, *TINY)
        assert load_checkpoint(tmp_path / "model-1.pt").diffusion.class_names == tuple("0123456789")
        assert Image.open(tmp_path / "sample-1.png").size == (6 * 10 + 2, 10 * 10 + 2)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (
                ["digits", "--labels", "folders"],
                "--labels folders is for a folder of images; the digits take --labels digi",
            ),
            (
                ["FOLDER", "--labels", "digits"],
                "--labels digits is for the digits; a folder takes folders, metadata or a ",
            ),
            (
                ["FOLDER", "--labels", "nothing"],
                "labels must be 'folders', 'metadata', the path of a .csv or .jsonl file",
            ),
            (["FOLDER", "--labels", "none.csv"], "labels: file none.csv does not exist"),
            (
                ["FOLDER", "--cond-columns", "weight"],
                "line 1, has no column 'weight'; it has file_name, label, age, size",
            ),
            (
                ["FOLDER", "--cond-drop-prob", "0.2"],
                "--cond-drop-prob is for classes or vectors: --labels or --cond-colum",
            ),
            (["FOLDER", "--cond-channels", "1"], "--cond-channels is for condition images: --cond-folder"),
            (["FOLDER", "--super-resolution", "3"], "super_resolution must be at least 2 and divide image_size"),
        ],
    )
    def test_mistakes(self, arguments, sentence, folder, tmp_path, capsys):
        arguments = [folder if argument == "FOLDER" else argument for argument in arguments]
        error = fail(capsys, "train", *arguments, "--results-folder", tmp_path / "run", *TINY)
        assert sentence in error
        assert not (tmp_path / "run").exists()


class TestSample:
    def test_a_row_for_each_class_by_name_or_number(self, animals, tmp_path, capsys):
        run("sample", animals, "--class", "owl", 0, "--columns-per-class", 5, "--guidance", 4, "--batch-size", 3,
            "--out", tmp_path / "a.png", "--raw", tmp_path / "raw", *QUICK)  # fmt: skip
        assert "10 samples (seed 3)" in capsys.readouterr().out
        assert Image.open(tmp_path / "a.png").size == (5 * 10 + 2, 2 * 10 + 2)
        diffusion = load_checkpoint(animals / "model-1.pt").ema.ema_model
        expected = diffusion.sample(classes=[2] * 5 + [0] * 5, guidance=4.0, seed=3, sampler="dpmpp_2m",
                                    sampling_timesteps=2, progress=False)  # fmt: skip
        for index in range(10):
            found = np.asarray(Image.open(tmp_path / "raw" / f"{index:05}.png"))[:, :, 0] / 255
            assert np.abs(found - expected[index, 0].clamp(0, 1).numpy()).max() <= 0.51 / 255

    def test_all_classes_where_nobody_says_which(self, animals, tmp_path):
        run("sample", animals, "--out", tmp_path / "a.png", *QUICK)
        assert Image.open(tmp_path / "a.png").size == (8 * 10 + 2, 3 * 10 + 2)
        assert Image.open(tmp_path / "a-strip.png").size == (3 * 10 + 2, 3 * 10 + 2)
        run("sample", animals, "--num-samples", 7, "--out", tmp_path / "b.png", *QUICK)
        assert Image.open(tmp_path / "b.png").size == (2 * 10 + 2, 3 * 10 + 2)

    def test_a_strip_over_scales_from_the_same_noise(self, animals, tmp_path):
        run(
            "sample", animals, "--class", "dog", "cat", "--guidance-strip", 0, 1, 4, "--out", tmp_path / "a.png", *QUICK
        )
        strip = Image.open(tmp_path / "a-guidance.png")
        assert strip.size == (3 * 10 + 2, 2 * 10 + 2)
        pixels = np.asarray(strip)[:, :, 0]
        diffusion = load_checkpoint(animals / "model-1.pt").ema.ema_model
        for column, scale in enumerate((0.0, 1.0, 4.0)):
            expected = diffusion.sample(
                classes=[1, 0], guidance=scale, seed=3, sampler="dpmpp_2m", sampling_timesteps=2, progress=False
            )
            for row in range(2):
                found = pixels[10 * row + 2 : 10 * row + 10, 10 * column + 2 : 10 * column + 10] / 255
                assert np.abs(found - expected[row, 0].clamp(0, 1).numpy()).max() <= 0.51 / 255

    def test_intervals_and_rescaling_change_what_a_scale_gives(self, animals, tmp_path):
        options = ["--class", "dog", "--columns-per-class", 2, "--guidance", 6, *QUICK]
        found = []
        for number, more in enumerate(([], ["--guidance-interval", 0.1, 1.0], ["--guidance-rescale", 0.7])):
            run("sample", animals, *options, *more, "--out", tmp_path / f"{number}.png")
            found.append((tmp_path / f"{number}.png").read_bytes())
        assert len(set(found)) == 3

    def test_inpainting_keeps_what_the_mask_keeps(self, animals, folder, tmp_path):
        image = next((folder / "cat").glob("*.png"))
        mask = np.zeros((8, 8), np.uint8)
        mask[:, :4] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        run("sample", animals, "--inpaint", image, "--mask", tmp_path / "mask.png", "--class", "cat", "--num-samples",
            3, "--out", tmp_path / "a.png", "--raw", tmp_path / "raw", "--steps", 12, "--seed", 0)  # fmt: skip
        original = np.asarray(Image.open(image).convert("L"))
        drawn = [np.asarray(Image.open(tmp_path / "raw" / f"{index:05}.png"))[:, :, 0] for index in range(3)]
        assert all(np.array_equal(one[:, :4], original[:, :4]) for one in drawn)
        assert not np.array_equal(drawn[0][:, 4:], drawn[1][:, 4:])

    def test_super_resolution_enlarges(self, folder, tmp_path, capsys):
        run("train", folder, "--super-resolution", 4, "--results-folder", tmp_path, *TINY)
        loaded = load_checkpoint(tmp_path / "model-1.pt")
        assert (loaded.diffusion.super_resolution, loaded.model.cond_channels, loaded.model.cond_dim) == (4, 1, 1)
        assert Image.open(tmp_path / "sample-1.png").size == (5 * 10 + 2, 5 * 10 + 2)
        capsys.readouterr()
        small = tmp_path / "small"
        small.mkdir()
        for index in range(3):
            Image.fromarray(np.full((2, 2), 80 * index, np.uint8)).save(small / f"{index}.png")
        run("sample", tmp_path, "--upscale", small, "--out", tmp_path / "big.png", "--raw", tmp_path / "raw", *QUICK)
        assert "3 samples" in capsys.readouterr().out
        assert len(list((tmp_path / "raw").glob("*.png"))) == 3
        run("sample", tmp_path, "--upscale", small / "1.png", "--out", tmp_path / "one.png", *QUICK)
        assert Image.open(tmp_path / "one.png").size == (2 * 10 + 2, 10 + 2)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--class", "cow"], "--class cow is unknown; the classes are cat, dog, owl, or their numbers 0 to 2"),
            (["--class", "3"], "--class 3 is unknown; the classes are cat, dog, owl, or their numbers 0 to 2"),
            (["--columns-per-class", "0"], "--columns-per-class must be at least 1; got 0"),
            (
                ["--columns-per-class", "2", "--num-samples", "4"],
                "--num-samples cannot be given with --columns-per-class",
            ),
            (["--cond", "1"], "--cond: the checkpoint's network takes no vector; got 1"),
            (["--cond-images", "x.png"], "--cond-images: the checkpoint's network takes no images as conditions"),
            (["--upscale", "x.png"], "--upscale: the checkpoint was not trained with --super-resolution"),
            (["--inpaint", "x.png"], "--inpaint and --mask are given together"),
            (["--inpaint", "x.png", "--mask", "y.png"], "--inpaint: x.png does not exist"),
            (["--guidance-rescale", "2"], "guidance rescale must be a number in [0, 1]; got 2.0"),
            (["--guidance-interval", "3", "1"], "guidance interval must have low < high, got 3 and 1"),
        ],
    )
    def test_mistakes(self, arguments, sentence, animals, tmp_path, capsys):
        assert fail(capsys, "sample", animals, *arguments, "--out", tmp_path / "a.png", *QUICK) == sentence
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--class", "0"], "--class: the checkpoint's network takes no classes"),
            (["--columns-per-class", "3"], "--columns-per-class: the checkpoint's network takes no classes"),
            (["--guidance", "3"], "guidance must be None or 1 without classes and cond"),
            (
                ["--guidance-interval", "0", "1"],
                "--guidance-interval needs --guidance, since the checkpoint has no scale",
            ),
            (
                ["--guidance-strip", "0", "1"],
                "--guidance-strip: the checkpoint's network takes no classes and no vectors",
            ),
        ],
    )
    def test_mistakes_with_a_network_without_conditions(self, arguments, sentence, plain, tmp_path, capsys):
        assert sentence in fail(capsys, "sample", plain, *arguments, "--out", tmp_path / "a.png", *QUICK)


class TestMeasures:
    def test_the_likelihood_of_labelled_images(self, animals, folder, tmp_path, capsys):
        """A class of the same name counts, whatever its number in these data."""
        few = tmp_path / "few"
        for name in ("owl", "dog"):
            (few / name).mkdir(parents=True)
            source = sorted((folder / name).iterdir())[0]
            (few / name / source.name).write_bytes(source.read_bytes())
        places = ["--out", tmp_path / "a.png", "--csv", tmp_path / "a.csv"]
        run("likelihood", animals, few, "--labels", "folders", *places)
        with open(tmp_path / "a-images.csv") as file:
            found = [float(row["bits_per_dim"]) for row in csv.DictReader(file)]
        diffusion = load_checkpoint(animals / "model-1.pt").ema.ema_model.eval()
        images = [np.asarray(Image.open(path).convert("L")) for path in sorted(few.rglob("*.png"))]  # dog, owl
        tensor = torch.from_numpy(np.stack(images))[:, None]
        expected = diffusion.bits_per_dim(tensor, classes=[1, 2], seed=0, progress=False).total
        assert found == pytest.approx(expected.tolist(), rel=1e-9)

    def test_what_is_missing_gets_one_line(self, animals, folder, tmp_path, capsys):
        places = ["--out", tmp_path / "a.png", "--csv", tmp_path / "a.csv"]
        error = fail(capsys, "likelihood", animals, folder, *places)
        assert error == f"the checkpoint's network takes classes, and {folder} has none; give --labels"
        error = fail(capsys, "likelihood", animals, folder, "--labels", "metadata", *places)
        assert error == "the data's class '0' is none of the checkpoint's: cat, dog, owl"

    def test_progressive_pictures_of_classes(self, animals, folder, tmp_path, capsys):
        out = tmp_path / "a.png"
        run(
            "progressive",
            animals,
            "--class",
            "owl",
            "cat",
            "--num-samples",
            2,
            "--columns",
            3,
            "--out",
            out,
            "--seed",
            0,
        )
        assert Image.open(out).size == (4 * 10 + 2, 2 * 10 + 2)
        run("progressive", animals, "--images", folder, "--labels", "folders", "--num-samples", 2, "--columns", 3,
            "--out", out, "--seed", 0)  # fmt: skip
        assert Image.open(out).size == (4 * 10 + 2, 4 * 10 + 2)
        assert fail(capsys, "progressive", animals, "--labels", "folders", "--out", out) == "--labels needs --images"
