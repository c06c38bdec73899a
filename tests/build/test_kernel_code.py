"""The machine code of the kernels' innermost loops: a slip there halves the speed, and no other test would fail."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
HERE = sys.platform == "linux" and platform.machine() == "x86_64"


class Target(NamedTuple):
    """An instruction set: its compiler, the width of its vectors, a product's rows, and how a term of it looks."""

    compiler: list[str]
    lanes: int
    rows: int
    multiply_add: str
    element: str  # a load of an element of A, for two multiply-adds
    wrong: str  # other arithmetic; on aarch64 also spills


TARGETS = {
    "avx2": Target(["g++", "-march=x86-64-v3"], 8, 6, r"\tvfmadd", r"\tvbroadcastss", r"\tv(add|mul)[ps]s"),
    "avx512": Target(["g++", "-march=x86-64-v4"], 16, 14, r"\tvfmadd", r"\tvbroadcastss", r"\tv(add|mul)[ps]s"),
    # `fmla v, v, v.s[0]` takes an element as `ldr s` loads it. ld1r, a load and a broadcast, comes where a moves on.
    "portable": Target(
        ["aarch64-linux-gnu-g++"], 4, 14, r"\tfmla\t", r"\tldr\ts|\tld1r\t", r"\tf(add|mul)\t|\tdup\t|\[sp"
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_term_of_a_product_is_loads_and_multiply_adds(tmp_path, name):
    """A broadcast written as 0 + x was an addition per row and term: products ran at half their speed."""
    target = TARGETS[name]
    if target.compiler[0] == "g++" and not HERE:
        pytest.skip("needs x86-64 Linux")
    if shutil.which(target.compiler[0]) is None:
        pytest.skip(f"{target.compiler[0]} is not installed")
    source = tmp_path / "tile.cpp"
    width = 2 * target.lanes
    source.write_text(
        f'#define DDPM_FAST_ISA {name}\n#define DDPM_FAST_LANES {target.lanes}\n#include "cpu/kernels/gemm-inl.h"\n'
        f"using namespace ddpm_fast::{name};\nstatic_assert(kRows == {target.rows});\n"
        f"void tile(const float* a, int64_t row, const float* panel, int64_t K, float* c, int64_t piece) {{\n"
        f"  product_tile<kRows, true>(a, row, 1, panel, K, c, {width}, {width}, false, piece);\n}}\n"
    )
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", f"-I{CSRC}"]
    built = subprocess.run([*target.compiler, *flags, "-S", str(source), "-o", "-"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    terms = [
        loop for loop in innermost_loops(built.stdout) if len(re.findall(target.multiply_add, loop)) >= 2 * target.rows
    ]
    assert terms, "the kernel's loop was not found"
    for loop in terms:
        assert len(re.findall(target.multiply_add, loop)) == len(re.findall(target.element, loop)) * 2, loop
        assert not re.search(target.wrong, loop), loop


def innermost_loops(assembly: str) -> list[str]:
    """Lines between a label and a jump back to it, with no label in between."""
    found, label, lines = [], None, []
    for line in assembly.splitlines():
        if re.match(r"\.L\d+:", line):
            label, lines = line.rstrip(":"), []
        elif re.match(rf"\t(?:j\w+|b\.?\w+)\t{re.escape(label)}$" if label else r"$^", line):
            found.append("\n".join(lines))
        else:
            lines.append(line)
    return found
