"""README.md and the documentation: their code runs, and the commands, options, targets and files they name exist."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

import ddpm_fast
from ddpm_fast.cli import bench, doctor, likelihood, prepare, progressive, sample, train
from ddpm_fast.diffusion import samplers, spacings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# A block of Python is not run only where a comment before it says why, and only a GPU or several processes may be why.
FENCE = re.compile(
    r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
REASONS = ("needs CUDA", "needs several processes")

COMMANDS = {
    "train": train.Train,
    "prepare": prepare.Prepare,
    "sample": sample.Sample,
    "likelihood": likelihood.Likelihood,
    "progressive": progressive.Progressive,
    "bench": bench.Bench,
    "doctor": doctor.Doctor,
}
# Options whose names are no names of attributes.
RENAMED = {"classes": "class"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, but those that say why they are not run."""
    found = []
    for match in FENCE.finditer(page.read_text()):
        assert match["why"] is None or match["why"] in REASONS, f"{page.name}: no reason not to run: {match['why']}"
        if match["language"] == language and match["why"] is None:
            found.append(match["code"])
    return found


def code(page: Path) -> list[str]:
    """Lines of blocks that are not Python, and the texts between backquotes."""
    text = page.read_text()
    lines = [line for language in ("", "bash") for block in blocks(page, language) for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def options_of(command: type) -> set[str]:
    """The options of a command and of the groups in it, as they are typed."""
    found = set()
    for field in dataclasses.fields(command):
        group = get_args(field.type)[0] if get_args(field.type) else field.type
        found |= (
            options_of(group)
            if dataclasses.is_dataclass(group)
            else {f"--{RENAMED.get(field.name, field.name).replace('_', '-')}"}
        )
    return found | ({"--sampling-timesteps"} if command is sample.Sample else set())


@pytest.fixture
def _small(tmp_path, monkeypatch):
    """A temporary folder and one thread; restores forced backends, and registered samplers and spacings."""
    monkeypatch.chdir(tmp_path)
    # pages register their own
    monkeypatch.setattr(samplers, "SAMPLERS", dict(samplers.SAMPLERS))
    monkeypatch.setattr(spacings, "SPACINGS", dict(spacings.SPACINGS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    ddpm_fast.use_backend(None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_code_runs(page, _small):
    namespace: dict = {"__name__": "page"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_targets_exist(name):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in code(ROOT / name):
        line = re.sub(r"\s+#.*", "", line)
        for target in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", line):
            assert target in targets, f"{name}: make {target}"
        for command, rest in re.findall(r"(?:ddpm-fast|-m ddpm_fast) (\w+)([^`]*)", line):
            assert command in COMMANDS, f"{name}: ddpm-fast {command}"
            unknown = set(re.findall(r"--[a-z-]+", rest)) - options_of(COMMANDS[command]) - {"--help"}
            assert not unknown, f"{name}: ddpm-fast {command} has no {unknown}"


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    page = ROOT / name
    for path in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / path).exists(), f"{name} links to {path}"
    for path in re.findall(r"`((?:ddpm_fast|tests|benchmarks|csrc|docs)/[\w./*-]+)`", page.read_text()):
        assert list(ROOT.glob(path)), f"{name} names {path}"


def test_the_readme_fits_on_a_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100, f"README.md has {len(lines)} lines"
