"""Every process from the command line: training, resuming, sampling by any sampler, and mistakes."""

import pytest
import torch

from ddpm_fast import cli, load_checkpoint
from ddpm_fast.diffusion.processes import PROCESSES
from ddpm_fast.diffusion.samplers import FEW_STEPS, SAMPLERS
from ddpm_fast.diffusion.spacings import SPACINGS
from ddpm_fast.training.checkpoint_files import load_file

TINY = (
    "--dim 8 --dim-mults 1 --batch-size 16 --steps 2 --save-every 2 --num-samples 2 --workers 0 --seed 1 "
    "--sampling-timesteps 2"
).split()
# Process → options that it has, and what the file then records of them.
OPTIONS = {
    "ddpm": (
        "--timesteps 20 --objective pred_v --zero-terminal-snr --loss-weighting truncated_snr --uncertainty-weighting",
        {"timesteps": 20, "zero_terminal_snr": True, "loss_weighting": "truncated_snr", "uncertainty_weighting": True},
    ),
    "weighted": ("--timesteps 20", {"timesteps": 20, "sampling_timesteps": 2}),
    "edm": ("--sigma-data 0.7 --candidates 2", {"sigma_data": 0.7, "num_sample_steps": 2}),
    "continuous": ("--noise-schedule cosine --min-snr", {"noise_schedule": "cosine", "loss_weighting": "min_snr"}),
    "v-continuous": ("--loss-weighting truncated_snr", {"loss_weighting": "truncated_snr"}),
    "flow": (
        "--time-distribution logit_normal --spacing log_snr --sampler heun",
        {"time_distribution": "logit_normal", "spacing": "log_snr", "sampler": "heun"},
    ),
}
if "learned" in PROCESSES:
    OPTIONS["learned"] = ("--timesteps 20 --objective pred_v", {"timesteps": 20, "objective": "pred_v"})


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(folder, *options):
    cli.main(["train", "digits", "--results-folder", str(folder), *TINY, *options])


def fail(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("ddpm-fast: error: ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function from a process to the results of a tiny run with it."""
    made = {}

    def results(process: str):
        if process not in made:
            made[process] = tmp_path_factory.mktemp(process)
            train(made[process], "--process", process, *OPTIONS[process][0].split())
        return made[process]

    return results


@pytest.mark.parametrize("process", OPTIONS)
def test_each_trains_resumes_and_samples(process, trained, tmp_path, capsys):
    folder = trained(process)
    config = load_file(folder / "model-1.pt")["config"]
    assert config["process"] == process
    assert config["diffusion"] == {**config["diffusion"], **OPTIONS[process][1]}
    copy = tmp_path / "resumed"
    copy.mkdir()
    (copy / "model-1.pt").write_bytes((folder / "model-1.pt").read_bytes())
    capsys.readouterr()
    cli.main(["train", "digits", "--results-folder", str(copy), "--workers", "0", "--resume", "--steps", "3"])
    assert "warning" not in capsys.readouterr().err
    resumed = load_file(copy / "model-last.pt")
    assert resumed["step"] == 3 and resumed["config"] == config
    options = "--num-samples 2 --seed 3 --sampler ddim --spacing log_snr --steps 3 --sampler-option eta=0.5".split()
    cli.main(["sample", str(copy), "--out", str(tmp_path / "grid.png"), *options])
    assert (tmp_path / "grid.png").exists() and (tmp_path / "grid-strip.png").exists()
    assert type(load_checkpoint(copy / "model-last.pt").diffusion) is PROCESSES[process]


@pytest.mark.parametrize(
    ("process", "options", "sampler"),
    [
        ("weighted", ["--steps", 3], FEW_STEPS),
        ("weighted", ["--sampling-timesteps", 3], FEW_STEPS),
        ("weighted", ["--steps", 20], None),  # as many as timesteps: ancestral
        ("weighted", ["--steps", 3, "--eta", 1], "ddim"),
        ("edm", ["--steps", 3], None),  # Heun's is one of few steps
        ("flow", ["--steps", 3], None),  # the checkpoint's
        ("flow", ["--steps", 3, "--sampler", "unipc", "--sampler-option", "order=3"], "unipc"),
    ],
)
def test_few_steps_take_the_sampler_for_few_and_say_so(
    process, options, sampler, trained, tmp_path, monkeypatch, capsys
):
    checkpoint, seen = trained(process), []
    cls = PROCESSES[process]
    own = cls.sample

    def sample(self, *args, **kwargs):
        seen.append(kwargs.get("sampler"))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(cls, "sample", sample)
    cli.main(["sample", *map(str, [checkpoint, "--out", tmp_path / "a.png", "--num-samples", 2, *options])])
    assert set(seen) == {sampler}
    assert ("with the sampler dpmpp_2m" in capsys.readouterr().out) == (sampler == FEW_STEPS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train digits --process edm --objective pred_v", "--objective is no option of --process edm, which has "),
        ("train digits --process flow --sigma-data 0.5", "--sigma-data is no option of --process flow, which has "),
        ("train digits --process weighted --min-snr", "--min-snr is no option of --process weighted, which has "),
        ("train digits --process v-continuous --noise-schedule cosine", "--noise-schedule is no option of --process"),
        ("train digits --zero-terminal-snr --objective pred_noise", "objective must be pred_v or pred_x0"),
        ("train digits --process edm --candidates 0", "candidates must be"),
        ("train digits --process edm --spacing nowhere", "spacing"),
        ("train digits --resume --process flow --results-folder {edm}", "the checkpoint is of edm, and its weights"),
        ("sample {edm} --sampler dpmpp_2m --sampler-option eta=1", "sampler 'dpmpp_2m' has no option 'eta'"),
        ("sample {edm} --sampler ddim --sampler-option eta", "--sampler-option takes NAME=VALUE such as eta=0.5"),
        ("sample {edm} --steps 0", "--steps must be at least 1; got 0"),
        ("sample {edm} --process flow", "is of the process 'edm', not of 'flow'"),
        ("sample {edm} --spacing nowhere", "spacing"),
    ],
)
def test_mistakes_get_one_sentence(arguments, sentence, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edm = trained("edm")
    assert sentence in fail(capsys, *arguments.format(edm=edm).split())


def test_names_come_from_the_registries(capsys):
    cli.main(["doctor"])
    told = capsys.readouterr().out
    for names in (PROCESSES, sorted(SAMPLERS), SPACINGS):
        assert ", ".join(names) in told
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    told = "".join(capsys.readouterr().out.split())
    assert "|".join(sorted(PROCESSES)) in told and "|".join(sorted(SAMPLERS)) in told.replace("│", "")
