"""`ddpm-fast likelihood` and `ddpm-fast progressive`: whole runs in this process, and mistakes that get one line."""

import csv

import pytest
import torch
from PIL import Image

from ddpm_fast import GaussianDiffusion, Unet, cli
from ddpm_fast.diffusion.diffusion_process import DiffusionProcess
from ddpm_fast.diffusion.likelihood import rate_distortion
from ddpm_fast.training.data import DigitsDataset


def make() -> GaussianDiffusion:
    torch.manual_seed(0)
    unet = Unet(dim=8, dim_mults=(1, 2), channels=1, attn_heads=2, attn_dim_head=4)
    return GaussianDiffusion(unet, image_size=8, timesteps=12, objective="pred_v").eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The state dict of a tiny process."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save(make().state_dict(), path)
    return path


def run(*arguments) -> None:
    cli.main([*map(str, arguments), "--image-size", "8", "--device", "cpu"])


def fail(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ddpm-fast: error: ")
    return error


def table(path) -> dict[str, list[float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_numbers_picture_and_tables(tmp_path, checkpoint, capsys):
    out, curves = tmp_path / "new" / "curve.png", tmp_path / "new" / "curve.csv"
    options = ["--num-images", 5, "--batch-size", 3, "--seed", 4, "--out", out, "--csv", curves]
    run("likelihood", checkpoint, "digits", *options)
    said = capsys.readouterr().out
    images = DigitsDataset().images[[index * 1797 // 5 for index in range(5)]]
    bits = make().bits_per_dim(images, seed=4, progress=False)
    assert f"bits/dim  {bits.mean:.4f} ± {bits.standard_error:.4f}" in said and "images 4 to 5 of 5" in said
    assert f"{bits.decoder.mean():.4f}   (L_0)" in said
    found, curve = table(curves), rate_distortion(bits)
    assert found["timestep"] == list(range(11, -1, -1))
    torch.testing.assert_close(torch.tensor(found["rate"], dtype=torch.float64), curve.rate, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["distortion"]).double(), curve.distortion, rtol=1e-4, atol=1e-4)
    each = table(out.with_name("curve-images.csv"))
    torch.testing.assert_close(torch.tensor(each["bits_per_dim"]).double(), bits.total, rtol=1e-5, atol=1e-5)
    assert Image.open(out).width > 900
    assert sorted(path.name for path in out.parent.iterdir()) == ["curve-images.csv", "curve.csv", "curve.png"]


def test_a_stopped_run_goes_on(tmp_path, checkpoint, capsys, monkeypatch):
    def options(name: str, batch_size: int) -> list:
        places = ["--out", tmp_path / f"{name}.png", "--csv", tmp_path / f"{name}.csv"]
        return ["likelihood", checkpoint, "digits", "--num-images", 6, "--batch-size", batch_size, *places]

    run(*options("whole", 6))
    original, calls = DiffusionProcess.bits_per_dim, []

    def stopped(*arguments, **given):
        if calls:
            raise KeyboardInterrupt
        calls.append(given["start_index"])
        return original(*arguments, **given)

    monkeypatch.setattr(DiffusionProcess, "bits_per_dim", stopped)
    with pytest.raises(SystemExit) as ended:
        run(*options("parts", 4))
    assert ended.value.code == 130 and not (tmp_path / "parts.csv").exists()
    assert (tmp_path / "parts.csv.partial").exists()
    monkeypatch.setattr(DiffusionProcess, "bits_per_dim", original)
    capsys.readouterr()
    run(*options("parts", 1))
    said = capsys.readouterr().out
    assert "going on after 4 images" in said and "images 5 to 5 of 6" in said and "images 4 to" not in said
    for name in (".csv", "-images.csv"):
        whole, parts = (table(tmp_path / f"{run}{name}") for run in ("whole", "parts"))
        for column in whole:
            assert parts[column] == pytest.approx(whole[column], rel=1e-5, abs=1e-7), column

    # Of other arguments nothing is taken over.
    calls.clear()
    monkeypatch.setattr(DiffusionProcess, "bits_per_dim", stopped)
    with pytest.raises(SystemExit):
        run(*options("parts", 4))
    monkeypatch.setattr(DiffusionProcess, "bits_per_dim", original)
    run(*options("parts", 6), "--seed", 9)
    shown = capsys.readouterr()
    assert "is of another run" in shown.err and "images 1 to 6 of 6" in shown.out


def test_strips_of_samples_and_of_images(tmp_path, checkpoint, capsys):
    out = tmp_path / "strip.png"
    sampler = ["--sampler", "ddim", "--sampling-timesteps", 6]
    run("progressive", checkpoint, "--out", out, "--num-samples", 2, "--columns", 4, "--seed", 3, *sampler)
    assert "2 rows of step 0 (seed 3)" in capsys.readouterr().out
    assert Image.open(out).size == (5 * 10 + 2, 2 * 10 + 2)

    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(DigitsDataset().images[:3]):
        Image.fromarray((image[0] * 255).byte().numpy()).save(folder / f"{index}.png")
    run("progressive", checkpoint, "--images", folder, "--out", out, "--num-samples", 2, "--columns", 3, "--seed", 3)
    said = capsys.readouterr().out
    assert Image.open(out).size == (4 * 10 + 2, 4 * 10 + 2)
    lines = said[said.index("time") :].splitlines()
    assert [float(line.split()[0]) for line in lines[1:4]] == [11, 5, 0]
    # The rows are the times that are shown, with more bits and less error from one to the next.
    rates = [float(line.split()[1]) for line in lines[1:4]]
    assert rates == sorted(rates)


def test_mistakes(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "has 1797 images" in fail(capsys, "likelihood", checkpoint, "digits", "--num-images", 1798)
    assert "--batch-size must be at least 1" in fail(capsys, "likelihood", checkpoint, "digits", "--batch-size", 0)
    assert "at most the process's 12" in fail(capsys, "likelihood", checkpoint, "digits", "--timesteps", 13)
    assert "ends in such as .png" in fail(capsys, "likelihood", checkpoint, "digits", "--out", "likelihood")
    assert "is a folder" in fail(capsys, "likelihood", checkpoint, "digits", "--csv", tmp_path)
    assert "--timesteps needs --images" in fail(capsys, "progressive", checkpoint, "--timesteps", 5)
    error = fail(capsys, "progressive", checkpoint, "--images", "digits", "--num-samples", 1798)
    assert "--num-samples 1798: digits has 1797 images" in error
    (tmp_path / "file").touch()
    for command in (["likelihood", checkpoint, "digits"], ["progressive", checkpoint]):
        error = fail(capsys, *command, "--out", tmp_path / "file" / "out.png")
        assert f"{tmp_path / 'file'} is a file; it must be a folder" in error
    error = fail(capsys, "progressive", checkpoint, "--images", "digits", "--sampler", "ddim")
    assert "--sampler cannot be given with --images" in error
    torch.save({**make().state_dict(), "model.init_conv.bias": torch.full((8,), float("nan"))}, tmp_path / "nan.pt")
    places = ["--csv", tmp_path / "b.csv", "--out", tmp_path / "b.png"]
    error = fail(capsys, "likelihood", tmp_path / "nan.pt", "digits", "--num-images", 2, *places)
    assert "is not finite" in error and not list(tmp_path.glob("b*"))
