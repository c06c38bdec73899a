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


@pytest.mark.skipif(not HERE or shutil.which("g++") is None, reason="needs gcc on x86-64 Linux")
@pytest.mark.parametrize(("rows", "terms_in_rows", "most"), [(8, "true", 14), (14, "true", 18), (7, "false", 13)])
def test_eight_terms_of_a_group_have_few_other_instructions(tmp_path, rows, terms_in_rows, most):
    """Other instructions are executed in place of multiply-adds: an address for each row, moved on, costs 4%."""
    source = tmp_path / "groups.cpp"
    source.write_text(
        "#define DDPM_FAST_ISA avx512\n#define DDPM_FAST_LANES 16\n"
        '#include "cpu/kernels/gemm-inl.h"\nusing namespace ddpm_fast::avx512;\n'
        "void product(int64_t groups, const float* a, int64_t apart, const float* panel, int64_t K, float* c,\n"
        "             int64_t piece, PrefetchQueue* queue) {\n"
        f"  product_of_groups<{rows}, true, {terms_in_rows}, {terms_in_rows}>(\n"
        "      groups, a, apart, panel, K, c, 32, 32, false, piece, 0, a, queue);\n}\n"
    )
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-march=x86-64-v4", f"-I{CSRC}"]
    built = subprocess.run(["g++", *flags, "-S", str(source), "-o", "-"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # The loop, from its label to its jump back, with the jumps over the queue's lines in it.
    lines = built.stdout.splitlines()
    label = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.L\w+:$", line)}
    loops = [
        lines[label[jump[1]] : i + 1]
        for i, line in enumerate(lines)
        if (jump := re.match(r"\tj\w+\t(\.L\w+)$", line)) and label.get(jump[1], i) < i
    ]
    loops = [loop for loop in loops if sum("vfmadd" in line for line in loop) >= 2 * rows * 8]
    loop = min(loops, key=len)
    instructions = [line.strip() for line in loop if line.startswith("\t") and line[1] not in ".#"]
    others = [line for line in instructions if not re.match(r"vfmadd|vbroadcastss|vmovups|prefetch", line)]
    assert sum("vfmadd" in line for line in loop) == 2 * rows * 8
    assert sum("vbroadcastss" in line for line in loop) == rows * 8
    assert not any(re.search("rsp.*zmm|zmm.*rsp", line) for line in loop), loop
    assert len(others) <= most, others


@pytest.mark.skipif(not HERE or shutil.which("g++") is None, reason="needs gcc on x86-64 Linux")
@pytest.mark.parametrize(("name", "march", "lanes", "columns"), [("avx2", 3, 8, 2), ("avx512", 4, 16, 6)])
def test_the_sums_of_dot_products_are_in_registers(tmp_path, name, march, lanes, columns):
    """A step reads a vector of each row and adds each pair's product; no sum goes to memory."""
    source = tmp_path / "dots.cpp"
    source.write_text(
        f'#define DDPM_FAST_ISA {name}\n#define DDPM_FAST_LANES {lanes}\n#include "cpu/kernels/dot_products-inl.h"\n'
        f"using namespace ddpm_fast::{name};\nstatic_assert(kDotRows == 4 && kDotColumns == {columns});\n"
        "void dots(const float* a, int64_t apart, const float* b, int64_t K, float* c) {\n"
        "  dot_tile<kDotRows, kDotColumns>(a, apart, b, apart, K, c, 4);\n}\n"
    )
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", f"-march=x86-64-v{march}", f"-I{CSRC}"]
    built = subprocess.run(["g++", *flags, "-S", str(source), "-o", "-"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loops = [loop for loop in innermost_loops(built.stdout) if loop.count("vfmadd") == 4 * columns]
    assert loops, "the kernel's loop was not found"
    for loop in loops:
        assert "sp)" not in loop and not re.search(r"vmov\w+\t%[yz]mm\d+, .*\(", loop), loop


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="needs gcc on x86-64 Linux",
)
def test_a_pair_of_a_bfloat16_product_is_loads_and_products(tmp_path):
    """A pair is broadcast by the product itself: in registers of their own, broadcasts made the compiler spill sums."""
    source = tmp_path / "tile.cpp"
    source.write_text(
        "#define DDPM_FAST_ISA avx512\n#define DDPM_FAST_LANES 16\n#define DDPM_FAST_BFLOAT16\n"
        '#include "cpu/kernels/pairs-inl.h"\n'
        "void tile(const uint32_t* a, int64_t row, const float* panel, int64_t pairs, float* c) {\n"
        "  ddpm_fast::avx512::pair_tile<14>(a, row, 1, panel, pairs, ddpm_fast::avx512::StorePanel{c, 32, false});\n}\n"
    )
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-march=x86-64-v4", f"-I{CSRC}"]
    built = subprocess.run(["g++", *flags, "-S", str(source), "-o", "-"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    # Comments of the assembler surround every instruction that is written as one.
    assembly = "\n".join(line for line in built.stdout.splitlines() if not line.startswith("#"))
    (loop,) = [loop for loop in innermost_loops(assembly) if "vdpbf16ps" in loop]
    assert loop.count("vdpbf16ps") == 2 * 14, loop
    assert "broadcast" not in loop and not re.search(r"\tv(add|mul)[ps]s", loop), loop


@pytest.mark.skipif(not HERE or shutil.which("g++") is None, reason="needs gcc on x86-64 Linux")
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_bounds_and_half_types_are_one_instruction(tmp_path, name):
    """gcc compares and then chooses for a bound, 8% of a norm's time, and converts half types in pieces, 25%."""
    target = TARGETS[name]
    source = tmp_path / "vectors.cpp"
    source.write_text(
        f"#define DDPM_FAST_ISA {name}\n#define DDPM_FAST_LANES {target.lanes}\n"
        f'#include "cpu/kernels/convert-inl.h"\nusing namespace ddpm_fast::{name};\n'
        "void bounded(float* x) { store(x, exp(load(x))); }\n"
        "void from_half(float* to, const Half* from) { store(to, load(from)); }\n"
        "void from_bfloat16(float* to, const Bfloat16* from) { store(to, load(from)); }\n"
        "void to_half(Half* to, const float* from) { store(to, load(from)); }\n"
        "void to_bfloat16(Bfloat16* to, const float* from) { store(to, load(from)); }\n"
    )
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", f"-I{CSRC}"]
    built = subprocess.run([*target.compiler, *flags, "-S", str(source), "-o", "-"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    names = ("bounded", "from_half", "from_bfloat16", "to_half", "to_bfloat16")
    code = dict(zip(names, re.findall(r"^_Z\w+:\n(.*?)\tret\n", built.stdout, re.MULTILINE | re.DOTALL), strict=True))
    assert code["bounded"].count("vmaxps") == code["bounded"].count("vminps") == 1, code["bounded"]
    assert not re.search("vcmp|blend", code["bounded"]), code["bounded"]
    assert "vcvtph2ps" in code["from_half"] and "vcvtps2ph" in code["to_half"]
    assert "vpmovzxwd" in code["from_bfloat16"] and not re.search("insert|vperm", code["from_bfloat16"])
    assert not re.search("vperm", code["to_bfloat16"]), code["to_bfloat16"]


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
