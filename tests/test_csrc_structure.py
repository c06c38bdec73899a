"""csrc: a folder's name says what its files may include."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
TORCH = ("ATen", "c10", "torch")

FOR_KERNELS = ("cpu/runtime/parallel.h", "cpu/runtime/shares.h")
# Folder → the folders whose headers it may include.
FOLDERS = {
    "core": ("core",),
    "cpu/kernels": ("core", "cpu/kernels", *FOR_KERNELS),
    "cpu/kernels/targets": ("cpu/kernels", "cpu/kernels/targets", *FOR_KERNELS),
    "cpu/runtime": ("core", "cpu/kernels", "cpu/kernels/targets/targets.h", "cpu/runtime"),
    "cpu/ops": ("core", "cpu/kernels", "cpu/runtime", "cpu/ops"),
    "cuda": ("core", "cuda"),
    "python": ("core", "cpu/kernels", "cpu/runtime", "python"),
}
FILES = sorted(str(file.relative_to(CSRC)) for file in CSRC.rglob("*") if file.is_file())


def includes(file: str) -> list[str]:
    """The headers that a file includes: ours by their path in csrc, others in angle brackets."""
    found = []
    for quote, name in re.findall(r'^#include (["<])([^">]+)', (CSRC / file).read_text(), re.MULTILINE):
        if quote == "<":
            found.append(f"<{name}>")
        else:
            beside = Path(file).parent / name
            found.append(str(beside) if (CSRC / beside).exists() else name)
            assert (CSRC / found[-1]).exists(), f"{file} includes {name}, which is nowhere"
    return found


def is_from(header: str, *roots: str) -> bool:
    return header.startswith(tuple(f"<{root}/" for root in roots))


@pytest.mark.parametrize("file", FILES)
def test_a_folder_includes_what_it_may(file):
    for header in includes(file):
        if header.startswith("<"):
            continue
        assert {header, str(Path(header).parent)} & set(FOLDERS[str(Path(file).parent)]), f"{file} includes {header}"
        if header.endswith("-inl.h"):
            assert file.startswith("cpu/kernels/"), f"{file} includes {header}, which is compiled once per target"


@pytest.mark.parametrize("file", FILES)
def test_torch_and_pybind11_stay_in_their_folders(file):
    folder, suffix = str(Path(file).parent), Path(file).suffix
    torch_free = folder.startswith(("core", "cpu/kernels")) or suffix in (".cu", ".cuh") or file == "cuda/launchers.h"
    for header in includes(file):
        # checks.h is for the torch side of the CPU and of CUDA.
        assert not (torch_free and is_from(header, *TORCH)) or file == "core/checks.h", f"{file} includes {header}"
        assert not is_from(header, "pybind11") or folder == "python", f"{file} includes {header}"


@pytest.mark.parametrize("file", [file for file in FILES if file.endswith("-inl.h")])
def test_code_compiled_once_per_target_includes_no_standard_library(file):
    """An inline function of std compiled for AVX-512 might be the one copy that the linker keeps."""
    assert [header for header in includes(file) if header.startswith("<")] in ([], ["<stdint.h>"])


@pytest.mark.parametrize("file", FILES)
def test_headers_that_cost_most_to_compile_are_included_once(file):
    """torch/library.h costs as long as two files of operators, torch/extension.h and pybind_utils.h half a minute."""
    only = {"<torch/library.h>": ("cpu/ops/register.cpp", "cuda/bindings.cpp")}
    heavy = ("<torch/extension.h>", "<torch/torch.h>", "<ATen/ATen.h>", "<torch/csrc/jit/python/pybind_utils.h>")
    for header in includes(file):
        assert file in only.get(header, (file,)) and header not in heavy, f"{file} includes {header}"
        if file.startswith("cpu/") and not header.endswith("_ops.h>"):  # each of these brings ATen/Context.h
            assert not is_from(header, "ATen/ops"), f"{file} includes {header}: use cpu/runtime/memory.h"
