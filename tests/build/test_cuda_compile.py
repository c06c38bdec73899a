"""The CUDA kernels as the compiler sees them, on machines without a GPU: no spills, few registers, wide accesses."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = sorted(CUDA.glob("*.cu"))
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]

# 16-byte loads and stores of one thread of each kernel. In the wide ones x, the previous x0, the given noise and both
# results move as 2 × 16 bytes, the model's output as 2 (float32) or 1; in the strided ones the state moves as 1 × 16,
# and in their extended form two more earlier states. A guided step has momentum, a gradient and a known image, too.
WIDE = {
    "fill_normal_kernelIfLb1": (0, 2),
    "fill_normal_kernelI6__halfLb1": (0, 1),
    "fill_normal_kernelI13__nv_bfloat16Lb1": (0, 1),
    "sampler_step_kernelIfLNS_6AccessE0ELb0": (8, 4),
    "sampler_step_kernelI6__halfLNS_6AccessE0ELb0": (7, 4),
    "sampler_step_kernelI13__nv_bfloat16LNS_6AccessE0ELb0": (7, 4),
    "sampler_step_kernelIfLNS_6AccessE1ELb0": (3, 2),
    "sampler_step_kernelI6__halfLNS_6AccessE1ELb0": (3, 2),
    "sampler_step_kernelI13__nv_bfloat16LNS_6AccessE1ELb0": (3, 2),
    "sampler_step_kernelIfLNS_6AccessE1ELb1": (5, 4),
    "sampler_step_kernelI6__halfLNS_6AccessE1ELb1": (5, 4),
    "sampler_step_kernelI13__nv_bfloat16LNS_6AccessE1ELb1": (5, 4),
    "guided_step_kernelIfLNS_6AccessE1E": (8, 5),
    "guided_step_kernelI6__halfLNS_6AccessE1E": (8, 5),
    "guided_step_kernelI13__nv_bfloat16LNS_6AccessE1E": (8, 5),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    # The build of the environment compiles for the others, too; `make release-tests` reads their code.
    pytest.mark.release(but=lambda compiled: compiled == "sm_90"),
]


def cuobjdump() -> str:
    """From the toolkit, else from Triton's package."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    assert spec is not None, "neither the toolkit nor Triton's package has cuobjdump"
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """The architecture, and per source (the report of ptxas, the machine code)."""
    folder = tmp_path_factory.mktemp(request.param)
    results = []
    for source in SOURCES:
        cubin = folder / f"{source.stem}.cubin"
        flags = [f"-I{CUDA.parent}", "-std=c++20", "-O3", "-cubin", f"-arch={request.param}", "-Xptxas=-v"]
        report = run("nvcc", *flags, "-Werror=all-warnings", str(source), "-o", str(cubin))
        results.append((report, run(cuobjdump(), "-sass", str(cubin))))
    return request.param, results


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_every_kernel_is_compiled(compiled):
    kernels = [len(re.findall("Compiling entry function", report)) for report, _ in compiled[1]]
    assert [source.stem for source in SOURCES] == ["guided_step", "noise", "sampler_step"]
    # dtypes × accesses, of sums and step; and those of the extended form
    assert kernels == [3 * 2 * 2, 3 * 2, 3 * (3 + 2)]


def test_no_spills_and_few_registers(compiled, gate):
    architecture, results = compiled
    for source, (report, _) in zip(SOURCES, results, strict=True):
        kernels = len(re.findall("Compiling entry function", report))
        clean = re.findall(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
        assert len(clean) == kernels and len(registers) == kernels, report
        gate("cuda registers", f"{source.name}, {architecture}", max(registers))


def test_wide_kernels_use_16_byte_accesses(compiled):
    counts = {}
    for _, code in compiled[1]:
        for name, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", code, re.DOTALL):
            loads, stores = (len(re.findall(rf"\b{kind}\.E[.\w]*\.128\b", body)) for kind in ("LDG", "STG"))
            counts[name] = (loads, stores)
            assert not re.search(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
    for kernel, expected in WIDE.items():
        (found,) = [count for name, count in counts.items() if kernel in name]
        assert found[0] >= expected[0] and found[1] == expected[1], f"{kernel}: {found}, expected {expected}"
