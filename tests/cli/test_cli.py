"""The command line as a user meets it: whole runs, and mistakes that get one line."""

import ast
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_code
from PIL import Image

import ddpm_fast
from ddpm_fast import cli
from ddpm_fast.training.checkpoint_files import find_latest, load_file
from ddpm_fast.training.data import DigitsDataset

TINY = (
    "--dim 8 --dim-mults 1 2 --timesteps 20 --batch-size 16 --save-every 2 --num-samples 4 --workers 0 --seed 1".split()
)


def run(*arguments, code=0, cwd=None):
    """Run `python -m ddpm_fast` in a new process; returns stdout and stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=cwd,
        timeout=600,
    )
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished.stdout, finished.stderr


def run_here(*arguments):
    """The same in this process, without two seconds of imports."""
    cli.main(list(map(str, arguments)))


def fail(capsys, *arguments):
    """`main` on arguments that must fail; returns its one line on stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ddpm-fast: error: ")
    return error


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small are slower on more threads, and very much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 110 small colour photographs of digits, one of them broken."""
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(DigitsDataset().images[:110]):
        pixels = Image.fromarray((image[0] * 255).byte().numpy())
        pixels.resize((20, 17)).convert("RGB").save(folder / f"{index:03}.png")
    (folder / "050.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Results of a tiny run on the digits."""
    folder = tmp_path_factory.mktemp("digits") / "results"
    run_here("train", "digits", "--results-folder", folder, "--steps", 3, *TINY)
    return folder


def test_a_folder_trains_resumes_and_samples(tmp_path, images, capsys):
    results = tmp_path / "results"
    options = ["--results-folder", results, "--image-size", 8, 16, "--memory", "low", *TINY]
    out, err = run("train", images, "--steps", 8, *options)
    assert "1 broken image files were skipped" in out and f"results are in {results}" in out
    assert err.count("skipped a broken image file") == 1 and "050.png" in err and "Traceback" not in err
    assert "images/s" in err and "loss" in err
    run_here("train", images, "--steps", 10, "--resume", *options)
    saved = load_file(results / "model-5.pt")
    assert saved["step"] == 10 and saved["config"]["unet"]["memory"] == "low"
    assert (results / "loss.png").exists() and (results / "sample-5.png").exists()

    capsys.readouterr()
    run_here(
        "sample",
        results,
        "--out",
        tmp_path / "new" / "grid.png",
        "--num-samples",
        5,
        "--seed",
        3,
        "--sampler",
        "dpmpp_2m",
        "--sampling-timesteps",
        4,
        "--raw",
        tmp_path / "raw",
        "--scale",
        2,
    )
    out = capsys.readouterr().out
    assert "step 10" in out and "seed 3" in out
    assert Image.open(tmp_path / "new" / "grid.png").size == (3 * 34 + 2, 2 * 18 + 2)
    assert Image.open(tmp_path / "new" / "grid-strip.png").size == (5 * 34 + 2, 4 * 18 + 2)
    assert len(list((tmp_path / "raw").glob("*.png"))) == 5


def test_a_folder_is_prepared_and_trains(tmp_path, images, capsys):
    """Size and channels are the file's; a resumed run keeps them."""
    run_here("prepare", images, tmp_path / "images.npy", "--image-size", 8, 16, "--workers", 0)
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'images.npy'} holds 109 images of 3 x 8 x 16 bytes, without 1 broken files" in out
    assert "050.png" in err and "Traceback" not in err
    options = [tmp_path / "images.npy", "--results-folder", tmp_path / "results", *TINY]
    run_here("train", *options, "--steps", 2)
    run_here("train", *options, "--steps", 3, "--resume")
    saved = load_file(tmp_path / "results" / "model-last.pt")
    assert saved["step"] == 3 and saved["config"]["diffusion"]["image_size"] == [8, 16]
    sentence = "--background is for a folder of images, not for a prepared file"
    assert sentence in fail(capsys, "train", *options[:1], "--background", "red", "--results-folder", tmp_path / "o")
    assert "shape (3, 32, 32)" in fail(
        capsys, "train", *options[:1], "--image-size", 32, "--results-folder", tmp_path / "o"
    )


def test_a_seed_fixes_samples_whatever_the_batch_size(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed, batch in (("a", 7, 64), ("b", 7, 2), ("c", 8, 64)):
        options = f"--out {name}.png --num-samples 5 --seed {seed} --batch-size {batch}"
        cli.main(["sample", str(trained / "model-1.pt"), *options.split()])
    a, b, c = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in "abc")
    assert abs(a - b).max() <= 1
    assert abs(a - c).max() > 20
    assert (tmp_path / "a-strip.png").exists()


def test_digits_get_their_own_defaults(trained):
    config = load_file(trained / "model-last.pt")["config"]
    assert config["diffusion"]["image_size"] == [8, 8]
    assert config["unet"]["channels"] == 1
    assert config["diffusion"]["beta_schedule"] == "cosine"


def test_training_again_without_resume_is_refused(trained, capsys):
    before = sorted(path.name for path in trained.iterdir())
    error = fail(capsys, "train", "digits", "--results-folder", trained, *TINY)
    assert "already holds checkpoints (up to step 3); give --resume" in error
    assert sorted(path.name for path in trained.iterdir()) == before


def test_a_finished_run_says_so(trained, capsys):
    cli.main(["train", "digits", "--results-folder", str(trained), "--steps", "3", "--resume", *TINY])
    assert "is at step 3 already" in capsys.readouterr().out


def test_resume_takes_the_largest_step_not_the_largest_name(trained, tmp_path, capsys):
    torch.save({"step": 0}, tmp_path / "model-9.pt")
    for name in ("model-1.pt", "model-last.pt"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    run_here("train", "digits", "--results-folder", tmp_path, "--steps", 4, "--resume", *TINY)
    assert "3/4" in capsys.readouterr().err


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Contents and path of a file after three steps with every option given."""
    folder = tmp_path_factory.mktemp("first")
    cli.main(["train", "digits", "--results-folder", str(folder), "--workers", "0", *TestResuming.GIVEN])
    return load_file(folder / "model-last.pt"), folder / "model-last.pt"


class TestResuming:
    """An option that is not given keeps the file's value; one that is given holds, or is refused by name."""

    GIVEN = (
        "--dim 8 --dim-mults 1 2 --timesteps 30 --sampling-timesteps 4 --beta-schedule linear --objective pred_x0 "
        "--min-snr --self-condition --batch-size 16 --grad-accumulate 2 --lr 2e-3 --ema-decay 0.8 --flip True --seed 4 "
        "--save-every 100 --num-samples 4 --steps 3 --memory low"
    ).split()

    @staticmethod
    def resume(first, folder, *options):
        """The file after `train --resume` with these options in a folder with a copy of the first file."""
        (folder / "model-last.pt").write_bytes(first[1].read_bytes())
        cli.main(["train", "digits", "--results-folder", str(folder), "--workers", "0", "--resume", *options])
        return load_file(folder / "model-last.pt")

    @staticmethod
    def record(data):
        settings = {name: value for name, value in data["training"].items() if name != "position"}
        return {**data["config"], **settings, "adam": data["opt"]["param_groups"]}

    def test_what_is_not_given_is_the_files(self, first, tmp_path, capsys):
        data = self.resume(first, tmp_path, "--steps", "4")
        assert data["step"] == 4
        assert self.record(data) == {**self.record(first[0]), "train_num_steps": 4}
        assert "warning" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options, name, value",
        [
            ("--lr 5e-3", "lr", 5e-3),
            ("--ema-decay 0.5", "beta", 0.5),
            ("--batch-size 32", "train_batch_size", 32),
            ("--flip False", "augment_horizontal_flip", False),
            ("--seed 0", "seed", 0),
            ("--grad-accumulate 1", "gradient_accumulate_every", 1),
        ],
    )
    def test_what_is_given_holds_and_is_said(self, first, tmp_path, capsys, options, name, value):
        data = self.resume(first, tmp_path, "--steps", "4", *options.split())
        everything = {**data["training"], **data["opt"]["param_groups"][0], **data["config"]["ema"]}
        assert everything[name] == value
        assert "model-last.pt is continued with " in capsys.readouterr().err

    @pytest.mark.parametrize(
        "options, sentence",
        [
            ("--beta-schedule cosine", "beta_schedule='linear', this trainer's diffusion has beta_schedule='cosine'"),
            ("--objective pred_v", "objective='pred_x0', this trainer's diffusion has objective='pred_v'"),
            ("--timesteps 40", "timesteps=30, this trainer's diffusion has timesteps=40"),
            ("--image-size 16", "image_size=[8, 8], this trainer's diffusion has image_size=[16, 16]"),
            ("--dim 16", "the file has dim=8; init_dim=8, this trainer has dim=16; init_dim=16"),
            ("--dim-mults 1 4", "the file has dim_mults=(1, 2), this trainer has dim_mults=(1, 4)"),
        ],
    )
    def test_what_cannot_change_is_refused_with_both_values(self, first, tmp_path, capsys, options, sentence):
        (tmp_path / "model-last.pt").write_bytes(first[1].read_bytes())
        arguments = ["--results-folder", tmp_path, "--workers", 0, "--resume", "--steps", 4]
        error = fail(capsys, "train", "digits", *arguments, *options.split())
        theirs, ours = sentence.split(", this trainer")
        assert theirs in error and f", this trainer{ours}" in error
        assert load_file(tmp_path / "model-last.pt")["step"] == 3

    def test_a_flag_is_refused_too(self, trained, tmp_path, capsys):
        (tmp_path / "model-1.pt").write_bytes((trained / "model-1.pt").read_bytes())
        arguments = ["train", "digits", "--results-folder", tmp_path, "--resume", "--steps", 4, "--workers", 0]
        assert "min_snr_loss_weight=True" in fail(capsys, *arguments, "--min-snr")
        assert "self_condition=False, this trainer has self_condition=True" in fail(
            capsys, *arguments, "--self-condition"
        )

    def test_from_a_milestone_a_name_or_a_path(self, trained, tmp_path, capsys):
        for name in ("model-1.pt", "model-last.pt"):
            (tmp_path / name).write_bytes((trained / name).read_bytes())
        outside = tmp_path / "elsewhere.pt"
        outside.write_bytes((trained / "model-1.pt").read_bytes())
        for name in ("1", "model-1.pt", outside):
            arguments = ["--results-folder", tmp_path, "--steps", 2, "--workers", 0, "--resume-from", name]
            cli.main(list(map(str, ["train", "digits", *arguments])))
            assert "is at step 2 already" in capsys.readouterr().out
        arguments = ["--results-folder", tmp_path, "--resume-from", 9]
        assert "model-9.pt does not exist" in fail(capsys, "train", "digits", *arguments)

    def test_a_file_of_upstream_goes_on(self, upstream, tmp_path):
        network = upstream.Unet(8, dim_mults=(1, 2), channels=1)
        process = upstream.GaussianDiffusion(network, image_size=8, timesteps=40, objective="pred_noise")
        optimizer = torch.optim.Adam(process.parameters(), lr=7e-4, betas=(0.8, 0.9))
        data = {"step": 4, "model": process.state_dict(), "opt": optimizer.state_dict(), "ema": None, "scaler": None}
        torch.save(data, tmp_path / "model-1.pt")
        options = ["--workers", "0", "--steps", "5", "--batch-size", "16", "--num-samples", "1"]
        cli.main(["train", "digits", "--results-folder", str(tmp_path), "--resume", *options])
        data = load_file(tmp_path / "model-last.pt")
        assert data["step"] == 5 and data["config"]["diffusion"]["objective"] == "pred_noise"
        assert data["opt"]["param_groups"][0]["lr"] == 7e-4
        assert data["opt"]["param_groups"][0]["betas"] == (0.8, 0.9)


def test_sample_takes_a_milestone(tmp_path, trained, monkeypatch, capsys):
    options = ["--num-samples", "1e0", "--batch-size", "1.0"]
    cli.main(["sample", str(trained / "1"), "--out", str(tmp_path / "a.png"), *options])
    (tmp_path / "results").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    for name in ("1", "last", "results/last", "results/model-1.pt"):
        cli.main(["sample", name, "--out", "b.png", *options])
    (tmp_path / "last").write_bytes(b"")
    assert "'last' may be last or results/model-last.pt; give the whole path of one" in fail(capsys, "sample", "last")
    assert "checkpoint 7 does not exist" in fail(capsys, "sample", "7")


@pytest.mark.parametrize("text", ["5.5", "abc", "1e400", "nan", "inf", "True"])
def test_what_is_no_integer_is_named(capsys, text):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "digits", "--steps", text])
    assert stopped.value.code == 2
    assert "is no integer" in capsys.readouterr().err


@pytest.mark.release(but=lambda number, code: number == signal.SIGINT)
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_saves_says_so_and_can_be_continued(tmp_path, number, code):
    command = [sys.executable, "-m", "ddpm_fast", "train", "digits", "--results-folder", str(tmp_path), *TINY]
    process = subprocess.Popen(
        [*command, "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 600
    while not (tmp_path / "model-1.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code
    path, step = find_latest(tmp_path)
    assert f"stopped at step {step}; {path} resumes from there" in out
    assert "Traceback" not in err
    run_here("train", "digits", "--results-folder", tmp_path, "--steps", step + 1, "--resume", *TINY)
    assert load_file(tmp_path / "model-last.pt")["step"] == step + 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train /nowhere", "folder /nowhere does not exist"),
        ("train {empty}", "holds no images"),
        ("train digits --resume", "there is no checkpoint in"),
        ("train digits --results-folder {garbage}", "results_folder {garbage} cannot be made: {garbage} is a file"),
        ("train digits --results-folder {garbage}/new", "results_folder {garbage}/new cannot be made: {garbage} is"),
        ("prepare {images} {garbage}/out.npy", "could not write {garbage}/out.npy: Not a directory"),
        ("bench --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("train digits --seed 99999999999999999999", "--seed must fit in 64 bits; got 99999999999999999999"),
        ("train digits --batch-size 0", "train_batch_size must be a positive integer; got 0"),
        ("train digits --dim -8", "dim must be a positive integer; got -8"),
        ("train digits --dim-mults 1 0", "each entry of dim_mults must be a positive integer; got 0"),
        ("train digits --image-size 8 8 8", "--image-size takes one number or two"),
        ("train digits --image-size -8", "image_size must be"),
        ("train digits --timesteps 0", "timesteps"),
        ("train digits --dim-mults 1 2 4 8 16", "8"),
        ("sample /nowhere/model-1.pt", "checkpoint /nowhere/model-1.pt does not exist"),
        ("sample {empty}", "holds no checkpoint"),
        ("sample {garbage}", "is not a PyTorch file"),
        ("sample {trained}/model-1.pt --num-samples 0", "--num-samples must be at least 1; got 0"),
        ("sample {trained}/model-1.pt --sampling-timesteps 9999", "sampling_timesteps"),
        ("sample {trained}/model-1.pt --image-size 7", "7"),
    ],
)
def test_mistakes_get_one_line(tmp_path, trained, images, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").write_bytes(b"garbage")
    places = dict(empty=tmp_path / "empty", garbage=tmp_path / "garbage", trained=trained, images=images)
    assert message.format(**places) in fail(capsys, *arguments.format(**places).split())


@pytest.fixture
def _no_sampling(monkeypatch):
    """What is refused is refused before sampling."""

    def sample(*_, **__):
        pytest.fail("sampled before the mistake was named")

    monkeypatch.setattr(ddpm_fast.GaussianDiffusion, "sample", sample)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--out {folder}", "--out {folder} is a folder; it must be a file"),
        ("--out {folder}/grid", "grid has no ending; a picture's name ends in such as .png"),
        ("--out {folder}/grid.xyz", "ends in '.xyz', which Pillow cannot write"),
        ("--out {folder}/grid.jpg --scale 4000", "grid.jpg cannot hold a picture of"),
        ("--out {file}/grid.png", "folder {file} cannot be made: {file} is a file; it must be a folder"),
        ("--out {folder}/" + 250 * "a" + ".png", "File name too long"),
        ("--out {folder}/strip.png", "strip-strip.png is a folder"),
        ("--raw {file}", "--raw {file} is a file; it must be a folder"),
        ("--raw {file}/raw", "cannot be made: {file} is a file; it must be a folder"),
        ("--out {folder}/grid.png --scale 99999", "grid.png cannot hold a picture of"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_sampling(
    tmp_path, trained, capsys, monkeypatch, _no_sampling, arguments, message
):
    monkeypatch.chdir(tmp_path)
    folder, file = tmp_path / "folder", tmp_path / "file"
    (folder / "strip-strip.png").mkdir(parents=True)
    file.write_bytes(b"")
    places = dict(folder=folder, file=file)
    error = fail(capsys, "sample", trained / "model-1.pt", *arguments.format(**places).split())
    assert message.format(**places) in error
    assert sorted(path.name for path in folder.iterdir()) == ["strip-strip.png"], "and nothing is left there"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_before_sampling(tmp_path, trained, capsys, _no_sampling):
    tmp_path.chmod(0o500)
    assert "Permission denied" in fail(capsys, "sample", trained / "model-1.pt", "--out", tmp_path / "grid.png")


def test_the_ending_of_out_says_the_kind_of_file(tmp_path, trained):
    options = f"--out {tmp_path}/new/grid.jpg --num-samples 4 --seed 1".split()
    cli.main(["sample", str(trained / "model-1.pt"), *options])
    assert Image.open(tmp_path / "new" / "grid.jpg").format == "JPEG"
    assert Image.open(tmp_path / "new" / "grid-strip.png").format == "PNG"
    assert sorted(os.listdir(tmp_path / "new")) == ["grid-strip.png", "grid.jpg"]


def test_a_folder_of_arrays_of_five_channels_trains_and_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for index in range(8):
        np.save(tmp_path / f"{index}.npy", rng.integers(0, 4096, (9, 10, 5), dtype=np.uint16))
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    cli.main(
        ["train", str(tmp_path), "--exts", "npy", "--channels", "5", "--value-range", "0", "5000", "--image-size", "8",
         "--background", "red", "--steps", "2", *TINY]
    )  # fmt: skip
    assert load_file("results/model-1.pt")["training"]["value_range"] == [0, 5000]
    assert Image.open("results/sample-1.png").size == (5 * 10 + 2, 4 * 10 + 2)
    cli.main(["sample", "results", "--out", "out/grid.webp", "--num-samples", "3", "--raw", "out/raw"])
    assert Image.open("out/grid.webp").size == (5 * 10 + 2, 3 * 10 + 2)
    assert np.load("out/grid.npy").shape == (3, 5, 8, 8)
    assert sorted(os.listdir("out/raw"))[:2] == ["00000.npy", "00000.png"]
    error = fail(capsys, "train", "digits", "--exts", "png", "--results-folder", "other", *TINY)
    assert "--exts is for a folder of images, not for the digits" in error


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(["sample", "/nowhere/model-1.pt", "--debug"])


def test_faults_of_the_program_keep_their_traceback(monkeypatch, trained):
    monkeypatch.setattr(
        "ddpm_fast.training.checkpoint.load_checkpoint", lambda *_, **__: torch.zeros(2) + torch.zeros(3)
    )
    with pytest.raises(RuntimeError):
        cli.main(["sample", str(trained / "model-1.pt")])


def test_nan_samples_are_refused(tmp_path, trained, capsys):
    data = load_file(trained / "model-1.pt")
    for part in ("model", "ema"):
        for name in data[part]:
            if name.endswith("final_conv.bias"):
                data[part][name].fill_(torch.nan)
    torch.save(data, tmp_path / "model-1.pt")
    error = fail(capsys, "sample", tmp_path / "model-1.pt", "--out", tmp_path / "grid.png", "--num-samples", 2)
    assert "are not finite" in error
    assert not (tmp_path / "grid.png").exists()


def test_a_file_of_upstream_is_sampled_given_its_size(upstream, tmp_path, capsys):
    diffusion = upstream.GaussianDiffusion(upstream.Unet(8, dim_mults=(1, 2), channels=1), image_size=8, timesteps=20)
    state = diffusion.state_dict()
    torch.save({"step": 4, "model": state, "ema": None}, tmp_path / "model-1.pt")
    arguments = ["sample", str(tmp_path / "model-1.pt"), "--out", str(tmp_path / "grid.png"), "--num-samples", "2"]
    assert "image_size" in fail(capsys, *arguments)
    cli.main([*arguments, "--image-size", "8", "16"])
    assert Image.open(tmp_path / "grid.png").size == (2 * 18 + 2, 12)


def test_doctor_reports_and_imports_nothing_heavy(tmp_path):
    program = """
        import sys
        from ddpm_fast.cli import main
        main(["doctor"])
        heavy = {"accelerate", "ema_pytorch", "matplotlib", "sklearn", "scipy", "torchvision"} & set(sys.modules)
        assert not heavy, heavy
    """
    finished = run_code(textwrap.dedent(program), tmp_path)
    assert torch.__version__ in finished.stdout and ddpm_fast.__version__ in finished.stdout
    assert "extension: " in finished.stdout and "sampler_step" in finished.stdout


@pytest.mark.parametrize("command", [[], ["train"], ["prepare"], ["sample"], ["doctor"]])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: ddpm-fast" in capsys.readouterr().out


def test_no_help_text_breaks_in_a_sentence():
    """tyro keeps the line breaks of an option's docstring, and in a page's those before a line that begins with --."""
    for file in Path(cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            texts = [s.value.value for s in node.body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
            page = ast.get_docstring(node) or ""
            of_options = texts[1:] if page else texts
            assert not [text for text in of_options if "\n" in text], (file.name, node.name)
            assert not [line for line in page.split("\n")[1:] if line.startswith("-")], (file.name, node.name)
