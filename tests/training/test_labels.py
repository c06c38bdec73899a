"""Labels and vectors of a folder: by subfolder, in metadata as Hugging Face's imagefolder has it, and in tables."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training.data import Dataset, DigitsDataset

NAMES = ["a.png", "b/c.png", "b/d/e.png", "f.png"]


def make_image(path, size=(12, 10), seed=0, mode="RGB"):
    """A noisy picture of Pillow's size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


def make_folder(folder, names=NAMES):
    for seed, name in enumerate(names):
        make_image(folder / name, seed=seed)
    return folder


def write_csv(path, *rows):
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def write_json(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def open_strictly(folder, **options):
    """A dataset whose warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Dataset(folder, 8, **options)


class TestSubfolders:
    def test_the_first_level_is_the_class_and_names_are_sorted(self, tmp_path):
        make_folder(tmp_path, ["dog/1.png", "cat/x/2.png", "cat/1.png", "10/a.png", "9/a.png"])
        dataset = open_strictly(tmp_path, labels="folders")
        assert dataset.class_names == ("10", "9", "cat", "dog")
        of_paths = {
            str(path.relative_to(tmp_path)): dataset[index]["classes"] for index, path in enumerate(dataset.paths)
        }
        assert of_paths == {"10/a.png": 0, "9/a.png": 1, "cat/1.png": 2, "cat/x/2.png": 2, "dog/1.png": 3}
        assert dataset.classes.dtype == torch.int64 and dataset.conditions_at([4, 0])["classes"].tolist() == [3, 0]

    def test_classes_are_those_of_torchvision(self, tmp_path):
        torchvision = pytest.importorskip("torchvision")
        make_folder(tmp_path, [f"{name}/{index}.png" for name in ("b", "A", "ä", "a") for index in range(3)])
        theirs = torchvision.datasets.ImageFolder(tmp_path)
        ours = open_strictly(tmp_path, labels="folders")
        assert ours.class_names == tuple(theirs.classes)
        assert {str(p): int(c) for p, c in zip(ours.paths, ours.classes, strict=True)} == dict(theirs.samples)

    def test_the_image_is_as_without_labels(self, tmp_path):
        make_folder(tmp_path, ["a/1.png", "b/1.png"])
        for dtype in (torch.float32, torch.uint8, None):
            plain, labelled = (Dataset(tmp_path, 8, dtype=dtype, labels=labels) for labels in (None, "folders"))
            assert torch.equal(plain[1], labelled[1]["image"]) and plain[1].dtype == labelled[1]["image"].dtype

    def test_an_image_beside_the_subfolders_is_named(self, tmp_path):
        make_folder(tmp_path, ["cat/1.png", "stray.png"])
        with pytest.raises(ValueError, match=r"first level of subfolders, and \S+/stray.png lies in none$"):
            Dataset(tmp_path, 8, labels="folders")

    def test_metadata_beside_them_is_no_forgotten_file(self, tmp_path):
        make_folder(tmp_path, ["cat/1.png", "dog/1.png"])
        write_csv(tmp_path / "metadata.csv", "file_name,age", "cat/1.png,2", "dog/1.png,-1.5e1")
        dataset = open_strictly(tmp_path, labels="folders", cond_columns=["age"])
        assert dataset.class_names == ("cat", "dog") and dataset.cond.tolist() == [[2.0], [-15.0]]


class TestMetadata:
    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_names_are_relative_to_the_table_and_tables_may_lie_below(self, tmp_path, kind):
        make_folder(tmp_path)
        if kind == "csv":
            write_csv(tmp_path / "metadata.csv", "label,file_name", "dog,f.png", '"big, cat",./a.png', "dog,b/c.png")
            write_csv(tmp_path / "b" / "d" / "metadata.csv", "\ufefffile_name,label", "e.png,ant")
        else:
            rows = [("f.png", "dog"), ("a.png", "big, cat"), ("b/c.png", "dog")]
            write_json(tmp_path / "metadata.jsonl", *({"file_name": n, "label": c, "text": None} for n, c in rows))
            write_json(tmp_path / "b" / "d" / "metadata.jsonl", {"file_name": "e.png", "label": "ant"})
        dataset = open_strictly(tmp_path, labels="metadata")
        assert dataset.class_names == ("ant", "big, cat", "dog")
        assert [dataset[index]["classes"] for index in range(4)] == [1, 2, 0, 2]

    @pytest.mark.parametrize("kind", ["csv", "jsonl"])
    def test_integers_are_sorted_by_value(self, tmp_path, kind):
        make_folder(tmp_path)
        labels = dict(zip(NAMES, (10, -1, 9, 10), strict=True))
        if kind == "csv":
            write_csv(
                tmp_path / "metadata.csv", "file_name,label", *(f"{name},{label}" for name, label in labels.items())
            )
        else:
            write_json(tmp_path / "metadata.jsonl", *({"file_name": n, "label": c} for n, c in labels.items()))
        dataset = open_strictly(tmp_path, labels="metadata")
        assert dataset.class_names == ("-1", "9", "10") and dataset.classes.tolist() == [2, 0, 1, 2]

    def test_text_with_leading_zeros_is_text(self, tmp_path):
        make_folder(tmp_path)
        write_csv(
            tmp_path / "metadata.csv",
            "file_name,label",
            *(f"{n},{c}" for n, c in zip(NAMES, "9 010 10 9".split(), strict=True)),
        )
        assert open_strictly(tmp_path, labels="metadata").class_names == ("010", "10", "9")

    def test_vectors_are_the_columns_as_they_are(self, tmp_path):
        make_folder(tmp_path)
        write_json(
            tmp_path / "metadata.jsonl",
            *({"file_name": name, "y": place, "x": str(1e3 * place)} for place, name in enumerate(NAMES)),
        )
        dataset = open_strictly(tmp_path, cond_columns=("x", "y"), labels="metadata")  # there is no column of labels
        assert dataset.class_names is None and dataset.classes is None
        assert set(dataset[2]) == {"image", "cond"} and dataset[2]["cond"].dtype == torch.float32
        assert dataset.cond.tolist() == [[0, 0], [1000, 1], [2000, 2], [3000, 3]]

    def test_another_column_may_hold_the_labels(self, tmp_path):
        make_folder(tmp_path)
        table = write_csv(tmp_path / "list.csv", "file_name,kind", *(f"{name},{name[0]}" for name in NAMES))
        dataset = open_strictly(tmp_path, labels=table, label_column="kind")
        assert dataset.class_names == ("a", "b", "f") and dataset.classes.tolist() == [0, 1, 1, 2]

    def test_a_table_elsewhere_has_names_relative_to_the_images(self, tmp_path):
        folder = make_folder(tmp_path / "images")
        rows = (f"{folder / name if name == 'a.png' else name},{index % 2}" for index, name in enumerate(NAMES))
        table = write_csv(tmp_path / "labels.csv", "file_name,label", *rows)
        assert open_strictly(folder, labels=str(table)).classes.tolist() == [0, 1, 0, 1]


CSV_ERRORS = {
    "no row": (["a.png,x", "b/c.png,x"], r"b/d/e.png has no row in \S+metadata.csv, nor 1 other images$"),
    "unknown": (["a.png,x", "g.png,x"], r"metadata.csv, line 3, names 'g.png', and \S+/g.png does not exist$"),
    "no image": (["a.png,x", "metadata.csv,x"], r"line 3, names 'metadata.csv', and \S+ is no image by its ending"),
    "twice": (["a.png,x", "./a.png,x"], r"line 3, names './a.png', which \S+metadata.csv, line 2, names, too$"),
    "empty label": (["a.png,"], r"metadata.csv, line 2, has nothing in column 'label'$"),
    "no name": ([",x"], r"metadata.csv, line 2, has nothing in column 'file_name'$"),
    "too long": (["a.png,x,y"], r"metadata.csv, line 2, has 3 cells, and the header has 2$"),
}


class TestWrongTables:
    @pytest.mark.parametrize("case", CSV_ERRORS)
    def test_one_sentence_names_file_and_line(self, tmp_path, case):
        make_folder(tmp_path)
        rows, sentence = CSV_ERRORS[case]
        write_csv(tmp_path / "metadata.csv", "file_name,label", *rows)
        with pytest.raises(ValueError, match=sentence):
            Dataset(tmp_path, 8, labels="metadata")

    @pytest.mark.parametrize("cell", ["old", "nan", "1e999", "1,5", "true"])
    def test_a_cell_that_is_no_number(self, tmp_path, cell):
        make_folder(tmp_path, ["a.png"])
        write_csv(tmp_path / "metadata.csv", "file_name,age", f'a.png,"{cell}"')
        with pytest.raises(
            ValueError, match=rf"metadata.csv, line 2, has '{cell}' in column 'age', which is no finite"
        ):
            Dataset(tmp_path, 8, cond_columns=["age"])

    @pytest.mark.parametrize(
        ("row", "sentence"),
        [
            ({"file_name": "a.png"}, "line 1, has no column 'label'; it has file_name$"),
            ({"file_name": "a.png", "label": None}, "line 1, has nothing in column 'label'$"),
            ({"file_name": "a.png", "label": 1.5}, "line 1, has a label that is neither text nor an integer: 1.5"),
            ({"file_name": "a.png", "label": True}, "line 1, has a label that is neither text nor an integer: True"),
            ({"file_name": 3, "label": 1}, "line 1, has a file_name that is no text: 3$"),
            (["a.png"], "line 1, must be a JSON object; it is a list$"),
        ],
    )
    def test_rows_of_json(self, tmp_path, row, sentence):
        make_folder(tmp_path, ["a.png"])
        write_json(tmp_path / "metadata.jsonl", row)
        with pytest.raises(ValueError, match=sentence):
            Dataset(tmp_path, 8, labels="metadata")

    def test_what_is_no_json_and_no_text(self, tmp_path):
        make_folder(tmp_path, ["a.png"])
        (tmp_path / "metadata.jsonl").write_text('\n{"file_name": ')
        with pytest.raises(ValueError, match=r"metadata.jsonl, line 2, is no JSON: "):
            Dataset(tmp_path, 8, labels="metadata")
        (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"metadata.jsonl is no text in UTF-8: .* at byte 0$"):
            Dataset(tmp_path, 8, labels="metadata")

    def test_labels_of_two_kinds(self, tmp_path):
        make_folder(tmp_path, ["a.png", "b.png"])
        write_json(
            tmp_path / "metadata.jsonl", {"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": "1"}
        )
        with pytest.raises(ValueError, match=r"all text or all integers: \S+, line 2, has '1', \S+, line 1, has 1$"):
            Dataset(tmp_path, 8, labels="metadata")

    def test_missing_and_doubled_tables(self, tmp_path):
        make_folder(tmp_path, ["a.png"])
        with pytest.raises(ValueError, match=r"holds no metadata.csv or metadata.jsonl$"):
            Dataset(tmp_path, 8, labels="metadata")
        write_csv(tmp_path / "metadata.csv", "file_name,label", "a.png,x")
        write_json(tmp_path / "metadata.jsonl", {"file_name": "a.png", "label": "x"})
        with pytest.raises(ValueError, match=r"holds metadata.csv and metadata.jsonl; keep one of them$"):
            Dataset(tmp_path, 8, labels="metadata")
        write_csv(tmp_path / "double.csv", "file_name,label,label", "a.png,x,y")
        with pytest.raises(ValueError, match=r"double.csv has a column twice in its header: file_name, label, label$"):
            Dataset(tmp_path, 8, labels=tmp_path / "double.csv")

    @pytest.mark.parametrize("labels", ["folder", "x.txt", 3, True])
    def test_unknown_kinds_of_labels(self, tmp_path, labels):
        make_folder(tmp_path, ["a.png"])
        with pytest.raises(
            ValueError, match=r"labels must be 'folders', 'metadata', the path of a .csv or .jsonl file"
        ):
            Dataset(tmp_path, 8, labels=labels)

    def test_arguments_that_do_not_fit(self, tmp_path):
        make_folder(tmp_path, ["a/a.png"])
        with pytest.raises(FileNotFoundError, match=r"labels: file nowhere.csv does not exist$"):
            Dataset(tmp_path, 8, labels="nowhere.csv")
        with pytest.raises(ValueError, match=r"label_column is for labels in a table, and labels is 'folders'"):
            Dataset(tmp_path, 8, labels="folders", label_column="kind")
        with pytest.raises(TypeError, match=r"cond_columns must be a sequence of column names; got 'age'$"):
            Dataset(tmp_path, 8, cond_columns="age")
        with pytest.raises(ValueError, match=r"cond_columns must not name a column twice"):
            Dataset(tmp_path, 8, cond_columns=["x", "x"])

    def test_paths_of_a_labelled_dataset_stay(self, tmp_path):
        make_folder(tmp_path, ["a/a.png"])
        dataset = Dataset(tmp_path, 8, labels="folders")
        with pytest.raises(ValueError, match=r"paths cannot be replaced in a dataset with labels"):
            dataset.paths = list(dataset.paths)


class TestPairs:
    def make_pairs(self, tmp_path, sizes=((40, 30), (40, 30))):
        """An image of two halves and, under another ending, the same in grey."""
        for folder, mode, size in (("images", "RGB", sizes[0]), ("masks", "L", sizes[1])):
            width, height = size
            values = np.zeros((height, width, 3), np.uint8)
            values[:, : width // 2] = 255
            picture = Image.fromarray(values).convert(mode)
            (tmp_path / folder / "sub").mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / folder / "sub" / ("a.png" if mode == "RGB" else "a.bmp"))
        return tmp_path / "images", tmp_path / "masks"

    @pytest.mark.parametrize("sizes", [((40, 30), (40, 30)), ((40, 30), (20, 15)), ((41, 31), (123, 93))])
    def test_both_are_resized_cropped_and_mirrored_together(self, tmp_path, sizes):
        images, masks = self.make_pairs(tmp_path, sizes)
        dataset = open_strictly(images, cond_folder=masks, augment_horizontal_flip=True)
        sides = set()
        for _ in range(40):
            item = dataset[0]
            image, mask = item["image"], item["cond_image"]
            assert image.shape == (3, 8, 8) and mask.shape == (1, 8, 8)
            assert torch.allclose(image.mean(0, keepdim=True), mask, atol=0.1)
            sides.add(bool(image[0, 0, 0] > 0.5))
        assert sides == {False, True}

    def test_channels_and_bytes_are_its_own(self, tmp_path):
        images, masks = self.make_pairs(tmp_path)
        item = Dataset(images, 8, cond_folder=masks, convert_cond_image_to="RGBA", convert_image_to="L", dtype=None)[0]
        assert item["image"].shape == (1, 8, 8) and item["cond_image"].shape == (4, 8, 8)
        assert item["image"].dtype == item["cond_image"].dtype == torch.uint8

    def test_missing_and_doubled_partners_are_named(self, tmp_path):
        images, masks = self.make_pairs(tmp_path)
        make_image(masks / "sub" / "a.jpg")
        with pytest.raises(ValueError, match=r"has 2 images for \S+sub/a.png: sub/a.bmp, sub/a.jpg$"):
            Dataset(images, 8, cond_folder=masks)
        make_image(images / "b.png")
        (masks / "sub" / "a.jpg").unlink()
        with pytest.raises(ValueError, match=r"cond_folder \S+masks has no image for \S+images/b.png$"):
            Dataset(images, 8, cond_folder=masks)

    def test_broken_and_misshapen_partners_are_skipped_with_their_image(self, tmp_path):
        images, masks = self.make_pairs(tmp_path)
        make_image(images / "z.png", (40, 30))
        (masks / "z.png").write_bytes(b"no image")
        dataset = Dataset(images, 8, cond_folder=masks)
        with pytest.warns(UserWarning, match=r"skipped a broken image file: \S+masks/z.png"):
            assert set(dataset[1]) == {"image", "cond_image"}
        make_image(masks / "z.png", (30, 40))
        dataset = Dataset(images, 8, cond_folder=masks)
        with pytest.warns(
            UserWarning, match=r"z.png \(it has 30 x 40 pixels, and \S+z.png another aspect ratio, 40 x 30"
        ):
            dataset[1]
        assert dataset.broken_files == [images / "z.png"]


def test_the_digits_are_classes_where_they_are_asked_for():
    pytest.importorskip("sklearn")
    plain, dataset = DigitsDataset(), DigitsDataset(has_classes=True)
    assert plain.class_names is None and isinstance(plain[0], torch.Tensor)
    assert dataset.class_names == tuple("0123456789")
    assert dataset[7]["classes"] == int(plain.labels[7]) and torch.equal(dataset[7]["image"], plain[7])
    whole = dataset.__getitems__([3, 5])
    assert whole[1]["classes"] == dataset[5]["classes"] and torch.equal(whole[0]["image"], plain[3])
