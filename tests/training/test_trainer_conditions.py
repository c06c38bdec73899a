"""Training with classes, vectors and images as conditions: any dataset, agreement, resuming, checkpoints, samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast import GaussianDiffusion, PreparedDataset, Trainer, Unet
from ddpm_fast.training.checkpoint import load_checkpoint, read_settings
from ddpm_fast.training.checkpoint_files import CheckpointError, load_file
from ddpm_fast.training.conditioning import plan_grid, spread
from ddpm_fast.training.data import Dataset
from ddpm_fast.training.evaluation import FIDEvaluation
from ddpm_fast.training.items import Given, check_items
from ddpm_fast.training.prepared import prepare

pytestmark = pytest.mark.filterwarnings("ignore:only .* images:UserWarning", "ignore:the effective batch:UserWarning")

NAMES = ("ant", "bee", "cat")


class Items(torch.utils.data.Dataset):
    """24 images; what an item is, says a function of (image, index)."""

    def __init__(self, item, names=None):
        self.item = item
        if names is not None:
            self.class_names = names

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return self.item(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index)), index)


def labelled(image, index):
    return {"image": image, "classes": index % 3}


def make(**network) -> GaussianDiffusion:
    torch.manual_seed(1)
    model = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4, **network)
    return GaussianDiffusion(model, image_size=8, timesteps=10, sampling_timesteps=2)


def trainer(folder, dataset, network=None, **options) -> Trainer:
    defaults = {
        "train_batch_size": 4, "train_num_steps": 6, "train_lr": 1e-2, "ema_update_every": 1, "num_workers": 0,
        "save_and_sample_every": 3, "calculate_fid": False, "progress": False, "seed": 3, "num_samples": 6,
    }  # fmt: skip
    diffusion = make(**({"num_classes": 3} if network is None else network))
    return Trainer(diffusion, dataset, results_folder=folder, **{**defaults, **options})


def make_folder(folder, names=NAMES, each=4):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(each):
            Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(folder / name / f"{index}.png")
    return folder


class TestAnyDataset:
    def losses(self, folder, dataset, **network):
        made = trainer(folder, dataset, network or None, train_num_steps=2)
        made.train()
        return (folder / "loss.csv").read_text().splitlines()[1].split(",")[1], made.model.state_dict()

    def test_dictionaries_and_pairs_are_the_same(self, tmp_path):
        forms = {
            "dictionary": labelled,
            "pair": lambda image, index: (image, index % 3),
            "tensors": lambda image, index: {"classes": torch.tensor(index % 3), "image": image},
            "numpy": lambda image, index: [image, np.int64(index % 3)],
        }
        found = {name: self.losses(tmp_path / name, Items(form)) for name, form in forms.items()}
        loss, state = found["dictionary"]
        for name, (other_loss, other) in found.items():
            assert loss == other_loss, name
            assert all(torch.equal(state[key], other[key]) for key in state), name

    def test_classes_reach_the_network(self, tmp_path):
        """With other classes the weights become others."""
        _, one = self.losses(tmp_path / "one", Items(labelled))
        _, other = self.losses(tmp_path / "other", Items(lambda image, index: (image, (index + 1) % 3)))
        assert not torch.equal(one["model.classes_emb.weight"], other["model.classes_emb.weight"])

    def test_torchvision_s_folders(self, tmp_path):
        torchvision = pytest.importorskip("torchvision")
        folder = make_folder(tmp_path / "images")
        transform = torchvision.transforms.Compose(
            [torchvision.transforms.CenterCrop(8), torchvision.transforms.ToTensor()]
        )
        theirs = torchvision.datasets.ImageFolder(folder, transform)
        made = trainer(tmp_path / "run", theirs, train_num_steps=3)
        made.train()
        assert load_checkpoint(tmp_path / "run" / "model-1.pt").diffusion.class_names == NAMES

    def test_vectors_and_condition_images(self, tmp_path):
        def item(image, index):
            return {"image": image, "cond": [index, -index], "cond_image": (image[:1] * 255).byte()}

        network = {"cond_dim": 2, "cond_channels": 1}
        made = trainer(tmp_path, Items(item), network)
        made.train()
        assert Image.open(tmp_path / "sample-2.png").size == (3 * 10 + 2, 2 * 10 + 2)

    @pytest.mark.parametrize(
        ("item", "sentence"),
        [
            (
                lambda image, index: {"image": image, "label": 3},
                'give dictionaries of "image" and classes, cond, cond_im',
            ),
            (lambda image, index: {"classes": 3}, "its item has the keys classes$"),
            (lambda image, index: (image, 1.0), "must give classes as integers, one for each image; got 1.0"),
            (lambda image, index: (image, "cat"), "must give classes as integers, one for each image; got 'cat'"),
            (lambda image, index: (image, 1, 2), "must give image tensors; its first item is a tuple"),
            (
                lambda image, index: {"image": image, "cond_image": image[:, :4]},
                r"cond_image of shape \(C, 8, 8\), as high and wide as its images; its first is \(3, 4, 8\)",
            ),
            (lambda image, index: {"image": image, "cond_image": 3}, "must give cond_image as tensors"),
        ],
    )
    def test_wrong_items(self, item, sentence):
        with pytest.raises((TypeError, ValueError), match=sentence):
            check_items(Items(item), (3, 8, 8), (0, 1))

    def test_items_that_differ_in_their_conditions(self, tmp_path):
        made = trainer(tmp_path, Items(lambda image, index: labelled(image, index) if index < 12 else {"image": image}))
        with pytest.raises(
            ValueError, match="the same conditions with each image; it gives .* with one and .* with ano"
        ):
            made.train()

    def test_a_class_that_the_network_has_not(self, tmp_path):
        made = trainer(tmp_path, Items(lambda image, index: (image, 3 if index == 17 else 0)))
        with pytest.raises(
            ValueError, match="image 17 of the dataset has the class 3, and .* num_classes=3 means 0 to 2"
        ):
            made.train()


class TestAgreement:
    @pytest.mark.parametrize(
        ("item", "names", "network", "sentence"),
        [
            (labelled, None, {}, "the dataset gives classes, and the network takes none: make it with num_classes=K"),
            (lambda i, n: i, None, {"num_classes": 3}, "has num_classes=3, and the dataset gives no classes: labels="),
            (labelled, (*NAMES, "dog"), {"num_classes": 3}, "dataset has 4 classes, and the network has num_classes=3"),
            (
                lambda i, n: {"image": i, "cond": [1.0, 2.0]},
                None,
                {"cond_dim": 3},
                "the dataset gives vectors of 2 numbers, and the network has cond_dim=3$",
            ),
            (lambda i, n: i, None, {"cond_dim": 3}, "the dataset gives no vectors, and the network has cond_dim=3$"),
            (
                lambda i, n: {"image": i, "cond_image": i},
                None,
                {},
                "the dataset gives condition images of 3 channels, and the network has cond_channels=0$",
            ),
        ],
    )
    def test_one_sentence_before_the_first_step(self, tmp_path, item, names, network, sentence):
        with pytest.raises(ValueError, match=sentence):
            trainer(tmp_path / "run", Items(item, names), network)
        assert not (tmp_path / "run").exists()

    def test_a_folder_s_options_are_refused_for_a_dataset(self, tmp_path):
        with pytest.raises(
            ValueError, match="labels is for a folder of images, and folder is a dataset; got labels='fol"
        ):
            trainer(tmp_path, Items(labelled), labels="folders")


class TestResuming:
    def test_a_continued_run_is_the_same_run(self, tmp_path):
        conditions = {"num_classes": 3, "cond_dim": 2, "cond_channels": 1, "cond_drop_prob": 0.5}

        def item(image, index):
            return {"image": image, "classes": index % 3, "cond": [index / 24, 1.0], "cond_image": image[:1]}

        whole = trainer(tmp_path / "whole", Items(item), conditions)
        whole.train()
        trainer(tmp_path / "half", Items(item), conditions, train_num_steps=3).train()
        rest = trainer(tmp_path / "half", Items(item), conditions)
        rest.load(1)
        rest.train()
        expected, found = whole.ema.state_dict(), rest.ema.state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    def test_class_names_are_kept_and_others_refused(self, tmp_path):
        trainer(tmp_path, Items(labelled, NAMES), train_num_steps=3).train()
        loaded = load_checkpoint(tmp_path / "model-1.pt")
        assert loaded.diffusion.class_names == loaded.ema.ema_model.class_names == NAMES
        assert loaded.model.num_classes == 3 and read_settings(tmp_path / "model-1.pt")["class_names"] == NAMES
        other = trainer(tmp_path, Items(labelled, ("ant", "cat", "bee")))
        before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
        with pytest.raises(
            CheckpointError, match="with 3 classes and the dataset has 3: class 1 was 'bee' and is 'cat'"
        ):
            other.load(1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items())
        trainer(tmp_path, Items(labelled)).load(1)  # a dataset without names says nothing else

    def test_fewer_names_are_other_names(self, tmp_path):
        trainer(tmp_path, Items(labelled, NAMES), train_num_steps=3).train()
        with pytest.raises(CheckpointError, match="3 classes and the dataset has 2: class 2 was 'cat' and is None"):
            trainer(tmp_path, Items(lambda image, index: (image, index % 2), NAMES[:2])).load(1)

    def test_what_a_folder_s_conditions_were_is_on_record(self, tmp_path):
        folder = make_folder(tmp_path / "images")
        network = {"num_classes": 3, "cond_channels": 3}
        options = {"labels": "folders", "cond_folder": folder, "train_num_steps": 3}
        trainer(tmp_path / "run", folder, network, **options).train()
        recorded = read_settings(tmp_path / "run" / "model-1.pt")["training"]["conditions"]
        assert recorded == {"labels": "folders", "cond_folder": str(folder)}

    def test_another_share_of_dropped_conditions_is_allowed(self, tmp_path):
        trainer(tmp_path, Items(labelled), {"num_classes": 3}, train_num_steps=3).train()
        trainer(tmp_path, Items(labelled), {"num_classes": 3, "cond_drop_prob": 0.2}).load(1)
        with pytest.raises(CheckpointError, match="the file has num_classes=3, this trainer has num_classes=4"):
            trainer(tmp_path, Items(labelled), {"num_classes": 4}).load(1)

    def test_upstream_s_class_conditional_network_is_rebuilt(self, tmp_path):
        from ddpm_fast import classifier_free_guidance

        def make_upstream_s():
            model = classifier_free_guidance.Unet(8, num_classes=3, dim_mults=(1,), attn_heads=1, attn_dim_head=4)
            return classifier_free_guidance.GaussianDiffusion(model, image_size=8, timesteps=10, sampling_timesteps=2)

        options = {"train_batch_size": 4, "calculate_fid": False, "progress": False, "num_samples": 6, "num_workers": 0}
        options |= {"results_folder": tmp_path, "save_and_sample_every": 2, "ema_update_every": 1}
        Trainer(make_upstream_s(), Items(labelled, NAMES), train_num_steps=2, **options).train()
        loaded = load_checkpoint(tmp_path / "model-1.pt")
        assert type(loaded.model) is classifier_free_guidance.Unet and loaded.diffusion.class_names == NAMES
        assert Image.open(tmp_path / "sample-1.png").size == (2 * 10 + 2, 3 * 10 + 2)
        again = Trainer(make_upstream_s(), Items(labelled, NAMES), train_num_steps=4, **options)
        again.load(1)
        assert all(
            map(torch.equal, again.ema.ema_model.state_dict().values(), loaded.ema.ema_model.state_dict().values())
        )

    def test_the_network_is_read_off_its_tensors(self, tmp_path):
        conditions = {"num_classes": 3, "cond_dim": 2, "cond_channels": 1}

        def item(image, index):
            return {"image": image, "classes": index % 3, "cond": [0.0, 1.0], "cond_image": image[:1]}

        trainer(tmp_path, Items(item), conditions, train_num_steps=3).train()
        contents = load_file(tmp_path / "model-1.pt")
        del contents["config"]
        torch.save(contents, tmp_path / "bare.pt")
        model = load_checkpoint(tmp_path / "bare.pt", image_size=8).model
        assert (model.num_classes, model.cond_dim, model.cond_channels, model.channels) == (3, 2, 1, 3)


class TestSamples:
    @pytest.mark.parametrize(
        ("known", "count", "rows", "columns"),
        [(3, 6, 3, 2), (3, 25, 3, 8), (10, 25, 10, 2), (10, 60, 10, 6), (1000, 25, 5, 5), (10, 4, 2, 2), (7, 1, 1, 1)],
    )
    def test_a_row_for_each_class_and_the_first_ones_of_many(self, known, count, rows, columns):
        grid = plan_grid(None, Given(has_classes=True), known, count)
        assert (grid.size, grid.columns) == (rows * columns, columns)
        assert grid.conditions["classes"].tolist() == [row for row in range(rows) for _ in range(columns)]

    def test_the_grid_of_a_milestone(self, tmp_path):
        made = trainer(tmp_path, Items(labelled))
        made.train()
        asked = []
        sample = made.ema.ema_model.sample
        made.ema.ema_model.sample = lambda **options: asked.append(options) or sample(**options)
        made._save_samples(tmp_path / "again.png")
        assert torch.cat([options["classes"] for options in asked]).tolist() == [0, 0, 1, 1, 2, 2]
        assert [options["start_index"] for options in asked] == [0, 4]
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "sample-2.png").read_bytes()
        assert Image.open(tmp_path / "again.png").size == (2 * 10 + 2, 3 * 10 + 2)

    def test_samples_for_fid_have_the_data_s_frequencies(self, tmp_path):
        folder = make_folder(tmp_path / "a", NAMES[:2], each=9)
        for index in (1, 4, 7):
            (folder / "bee" / f"{index}.png").unlink()
        made = trainer(tmp_path / "run", folder, {"num_classes": 2}, labels="folders", train_batch_size=64)
        asked = []
        made.ema.ema_model.sample = lambda classes, batch_size, **options: (
            asked.append(classes) or torch.zeros(batch_size, 3, 8, 8)
        )
        made.fid_scorer = FIDEvaluation(
            64, [torch.zeros(15, 3, 8, 8)], made.ema.ema_model, stats_dir=tmp_path, device="cpu", num_fid_samples=500,
            feature_extractor=lambda images: images[:, :, 0, 0], draw=made._draw_as_in_data,
        )  # fmt: skip
        assert made.fid_scorer.fid_score() == 0
        assert torch.bincount(torch.cat(asked)).tolist() == [300, 200]  # 9 and 6 of 15 images
        assert spread(3, 7) == [0, 0, 0, 1, 1, 2, 2]

    def test_super_resolution_is_shown_on_the_data_s_images(self, tmp_path):
        torch.manual_seed(0)
        model = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=4, cond_channels=3, cond_dim=1, num_classes=3)
        diffusion = GaussianDiffusion(model, image_size=8, timesteps=10, sampling_timesteps=2, super_resolution=2)
        options = {"train_batch_size": 4, "calculate_fid": False, "progress": False, "num_samples": 6, "num_workers": 0}
        made = Trainer(diffusion, Items(labelled), results_folder=tmp_path, **options)
        asked = []
        made.ema.ema_model.upscale = lambda low, classes, **options: (
            asked.append((low, classes)) or torch.zeros(len(low), 3, 8, 8)
        )
        made._save_samples(tmp_path / "a.png")
        low, classes = (torch.cat(parts) for parts in zip(*asked, strict=True))
        images = torch.stack([Items(labelled)[index]["image"] for index in range(0, 24, 4)])
        assert torch.allclose(low, torch.nn.functional.avg_pool2d(images, 2))
        assert classes.tolist() == [index % 3 for index in range(0, 24, 4)]


def test_a_prepared_file_keeps_labels_vectors_and_names(tmp_path):
    folder = make_folder(tmp_path / "images")
    rows = [f"{name}/{index}.png,{index}.5" for name in NAMES for index in range(4)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,age", *rows]))
    (folder / "bee" / "0.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="skipped a broken"):
        prepare(folder, tmp_path / "a.npy", 8, labels="folders", cond_columns=["age"], num_workers=0, progress=False)
    assert np.load(tmp_path / "a.npy").shape == (11, 3, 8, 8)  # numpy reads the images alone
    dataset = PreparedDataset(tmp_path / "a.npy")
    assert dataset.class_names == NAMES and dataset.classes.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert dataset.cond.flatten().tolist() == [0.5, 1.5, 2.5, 3.5, 1.5, 2.5, 3.5, 0.5, 1.5, 2.5, 3.5]
    whole = Dataset(folder, 8, labels="folders", cond_columns=["age"], dtype=torch.uint8)
    item, expected = dataset[5], whole[6]
    assert torch.equal(item["image"], expected["image"]) and item["classes"] == expected["classes"]
    made = trainer(tmp_path / "run", tmp_path / "a.npy", {"num_classes": 3, "cond_dim": 1}, train_num_steps=3)
    made.train()
    assert load_checkpoint(tmp_path / "run" / "model-1.pt").diffusion.class_names == NAMES


def test_what_follows_the_images_of_a_prepared_file_must_be_labels(tmp_path):
    folder = make_folder(tmp_path / "images")
    prepare(folder, tmp_path / "a.npy", 8, labels="folders", num_workers=0, progress=False)
    whole = (tmp_path / "a.npy").read_bytes()
    for damaged in (whole[:-1], whole + b"x" * 70000, whole[:-30]):
        (tmp_path / "b.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match="b.npy has something after its images that are no labels"):
            PreparedDataset(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.zeros((2, 3, 8, 8), np.uint8))
    assert PreparedDataset(tmp_path / "c.npy").class_names is None
