"""`make test-torch`: the release that it chooses, its tests, and the error if the release cannot be installed."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import zipfile

import pytest
import torch_release


@pytest.mark.parametrize("newest", ["2.15.0", "2.14.1"])
def test_every_release_has_its_turn_but_the_one_that_make_test_has_tested(newest):
    releases = torch_release.takes_turns(newest, pinned="2.14.1")
    turns = [torch_release.whose_turn(releases, commits) for commits in range(100, 100 + 2 * len(releases))]
    half = len(releases)
    assert turns[:half] == turns[half:]
    assert set(turns) == {*torch_release.OLDER, newest} - {"2.14.1"}


def test_the_pinned_release_is_one_that_pip_is_asked_for():
    assert re.fullmatch(r"\d+\.\d+\.\d+", torch_release.pinned_release())
    assert torch_release.pinned_release() not in torch_release.OLDER


def write_wheel(folder, release):
    """A wheel named torch without a module."""
    with zipfile.ZipFile(folder / f"torch-{release}-py3-none-any.whl", "w") as wheel:
        info = f"torch-{release}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {release}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_newest_release_is_what_pip_would_install(monkeypatch, tmp_path):
    for variable, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    with pytest.raises(torch_release.NotInstalled):
        torch_release.newest_release()
    for release in ("3.1.0", "3.2.0+cpu"):
        write_wheel(tmp_path, release)
    assert torch_release.newest_release() == "3.2.0"


@pytest.mark.parametrize(
    "release, requirement", [("2.11.0", "torch==2.11.0"), ("torch==2.9.1", "torch==2.9.1"), ("newest", "torch")]
)
def test_requirements(release, requirement):
    assert torch_release.requirement(release) == requirement


def test_every_pattern_names_tests():
    root = torch_release.ROOT
    lists = (torch_release.NATIVE, torch_release.COMPILED, torch_release.WITHOUT_TORCH, torch_release.INTERPRETED)
    for pattern in sum(lists, ()):
        assert list((root / "tests").glob(pattern)), pattern
    files = torch_release.tests(root, torch_release.NATIVE + torch_release.COMPILED)
    assert len(files) == len(set(files)) and not set(files) & set(torch_release.tests(root, torch_release.INTERPRETED))


def test_cases_are_left_out_of_the_quick_tests_and_some_are_kept():
    for beginning in torch_release.JUDGED:
        file, function, start = re.fullmatch(r"(.+)::(.+)\[(.+)", beginning).groups()
        module = runpy.run_path(str(torch_release.ROOT / "tests" / file))
        names = next(list(mark.args[1]) for mark in module[function].pytestmark if mark.name == "parametrize")
        left_out = [name for name in names if name.startswith(start)]
        assert 0 < len(left_out) < len(names), names


def test_a_copy_is_built_again_where_a_source_is_younger(tmp_path):
    for name in ("csrc/cpu/x.h", "setup.py", "pyproject.toml", "ddpm_fast/_build_info.json"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1000, 1000))
    assert not torch_release.is_stale(tmp_path)
    os.utime(tmp_path / "csrc" / "cpu" / "x.h", (2000, 2000))
    assert torch_release.is_stale(tmp_path)
    os.utime(tmp_path / "ddpm_fast" / "_build_info.json", (3000, 3000))
    assert not torch_release.is_stale(tmp_path)
    (tmp_path / "ddpm_fast" / "_build_info.json").unlink()
    assert torch_release.is_stale(tmp_path)


def test_a_release_that_cannot_be_installed_is_an_error_that_names_it(tmp_path):
    """The environment is there, and is this one: pip, which finds no package, changes nothing."""
    python = torch_release.python_of(tmp_path / "environment")
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, torch_release.__file__, "2.9.1", "--folder", str(tmp_path / "environment")]
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_IGNORE_INSTALLED": "1"}
    environment = {**os.environ, **settings}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.endswith("torch==2.9.1 could not be installed; pip's reason is above\n"), result.stderr
    assert "No matching distribution found" in result.stderr


@pytest.mark.parametrize("tested, options", [([], ["--prepare"]), (["2.9.1"], ["--quick"])])
def test_an_environment_can_be_prepared_before_it_is_tested(monkeypatch, tmp_path, tested, options):
    made, ran = [], []
    monkeypatch.setattr(torch_release, "make", lambda folder, release: made.append(release))
    monkeypatch.setattr(torch_release, "test", lambda folder, *rest: ran.append(folder.name) or 0)
    monkeypatch.setattr(sys, "argv", ["torch_release.py", "2.9.1", "--folder", str(tmp_path / "2.9.1"), *options])
    with pytest.raises(SystemExit) as end:
        torch_release.main()
    assert not end.value.code and made == ["2.9.1"] and ran == tested


def test_sources_of_the_kernels_that_nvcc_alone_judges_include_nothing_of_torch():
    csrc = torch_release.ROOT / "csrc"
    seen, waiting = set(), sorted((csrc / "cuda").glob("*.cu"))
    while waiting:
        file = waiting.pop()
        names = re.findall(r'^#include (?:"(.+)"|<(.+)>)', file.read_text(), re.MULTILINE)
        assert not [name for _, name in names if name.startswith(("torch/", "ATen/", "c10/"))], file
        seen.add(file)
        ours = [
            next(place / name for place in (file.parent, csrc) if (place / name).exists()) for name, _ in names if name
        ]
        waiting += set(ours) - seen
    assert csrc / "core" / "philox.h" in seen
