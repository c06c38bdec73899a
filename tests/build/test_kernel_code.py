"""The machine code of the kernels' innermost loops: a slip there halves the speed, and no other test would fail."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
# Vector width and architecture by instruction set; rows of a product's kernel.
TARGETS = {"avx2": (8, "x86-64-v3", 6), "avx512": (16, "x86-64-v4", 14)}


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="needs gcc on x86-64 Linux",
)
@pytest.mark.parametrize("name", TARGETS)
def test_a_term_of_a_product_is_loads_and_multiply_adds(tmp_path, name):
    """A broadcast written as 0 + x was an addition per row and term: products ran at half their speed."""
    lanes, architecture, rows = TARGETS[name]
    source = tmp_path / "tile.cpp"
    source.write_text(
        f'#define DDPM_FAST_ISA {name}\n#define DDPM_FAST_LANES {lanes}\n#include "cpu/kernels/gemm-inl.h"\n'
        f"void tile(const float* a, int64_t row, const float* panel, int64_t K, float* c, int64_t piece) {{\n"
        f"  ddpm_fast::{name}::product_tile<{rows}>(a, row, 1, panel, K, c, {2 * lanes}, {2 * lanes}, false,\n"
        "    piece);\n}\n"
    )
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", f"-march={architecture}", f"-I{CSRC}"]
    built = subprocess.run(["g++", *flags, "-S", str(source), "-o", "-"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loops = innermost_loops(built.stdout)
    terms = [loop for loop in loops if loop.count("vfmadd") >= 2 * rows]
    assert terms, "the kernel's loop was not found"
    for loop in terms:
        assert loop.count("vfmadd") == loop.count("vbroadcastss") * 2, loop
        assert not re.search(r"\tv(add|mul)[ps]s", loop), loop


def innermost_loops(assembly: str) -> list[str]:
    """Lines between a label and a jump back to it, with no label in between."""
    found, label, lines = [], None, []
    for line in assembly.splitlines():
        if re.match(r"\.L\d+:", line):
            label, lines = line.rstrip(":"), []
        elif re.match(rf"\tj\w+\t{re.escape(label)}$" if label else r"$^", line):
            found.append("\n".join(lines))
        else:
            lines.append(line)
    return found
