"""Builds the extension ddpm_fast._C; everything else about the package is in pyproject.toml.

DDPM_FAST_BUILD=auto|cpu|cuda|none. `auto` builds what it can: CUDA kernels where there are nvcc and a CUDA build of
torch (a GPU is not needed), C++ alone otherwise, pure Python if nothing compiles. `cpu` and `cuda` fail instead. What
was built, against what, and why the rest was left out goes to ddpm_fast/_build_info.json, which the loader reads.

DDPM_FAST_MARCH=native|portable. `native` compiles for this processor, `portable` for any of its kind, with the kernels
chosen while running. Not set, it is native where the extension stays next to its sources (in place, editable) on Linux
and x86-64, and portable in a wheel, which may travel.
DDPM_FAST_EMULATE_AVX512=1 builds the AVX-512 kernels from vectors of AVX2, for tests of their arithmetic on processors
without AVX-512.
DDPM_FAST_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer, for tests/build/sanitize.py.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("DDPM_FAST_BUILD", "auto")
MARCHES = ("native", "portable")
MARCH = os.environ.get("DDPM_FAST_MARCH")
SANITIZE = os.environ.get("DDPM_FAST_SANITIZE", "0") == "1"
EMULATE_AVX512 = os.environ.get("DDPM_FAST_EMULATE_AVX512", "0") == "1"


def files(*patterns: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]


CPU_SOURCES = files("csrc/python/*.cpp", "csrc/cpu/**/*.cpp")
CUDA_SOURCES = files("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
HEADERS = files("csrc/**/*.h", "csrc/**/*.cuh")
# torch adds a standard where no flag names one, and before 2.13 it adds C++17; the CPU's sources need C++20. nvcc gets
# torch's, since the CUDA sources compile under both.
STANDARD = "/std:c++20" if sys.platform == "win32" else "-std=c++20"
# NaN has to work, so not -ffast-math: only errno and traps, which prevent vectorised code, are given up.
# Nothing links against the extension: hidden symbols are a fiftieth of a wheel less.
CXX_FLAGS = [STANDARD, "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"]
CXX_FLAGS += ["-fvisibility=hidden"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
if SANITIZE:
    # gcc makes fused multiply-adds among its expensive optimisations: without them the tests would judge other numbers.
    EXPENSIVE = ["-fexpensive-optimizations"] if sys.platform == "linux" else []
    CXX_FLAGS = [STANDARD, "-O1", *EXPENSIVE, "-g", "-fno-omit-frame-pointer", *CXX_FLAGS[3:], *SANITIZE_FLAGS]
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []
ARCHITECTURES = {"8.0": 80, "9.0": 90, "10.0": 100}
CPUINFO = Path("/proc/cpuinfo")
# Features of x86-64 that a compiler may use without intrinsics: its macro → Linux's name, None if that is the macro in
# lower case.
FEATURES = {
    "SSE3": "pni", "SSSE3": None, "SSE4_1": None, "SSE4_2": None, "SSE4A": None, "AVX": None, "AVX2": None, "FMA": None,
    "FMA4": None, "XOP": None, "F16C": None, "BMI": "bmi1", "BMI2": None, "TBM": None, "LZCNT": "abm", "POPCNT": None,
    "MOVBE": None, "GFNI": None, "AVXVNNI": "avx_vnni", "AVX512F": None, "AVX512CD": None, "AVX512BW": None,
    "AVX512DQ": None, "AVX512VL": None, "AVX512IFMA": None, "AVX512VBMI": None, "AVX512VBMI2": "avx512_vbmi2",
    "AVX512VNNI": "avx512_vnni", "AVX512BF16": "avx512_bf16", "AVX512FP16": "avx512_fp16",
    "AVX512BITALG": "avx512_bitalg", "AVX512VPOPCNTDQ": "avx512_vpopcntdq",
}  # fmt: skip

info = {"mode": MODE, "built": [], "reason": None, "cuda_left_out": None}
info |= {"sanitized": SANITIZE, "emulated_avx512": EMULATE_AVX512}


def run_nvcc(nvcc: str, *args: str) -> str:
    result = subprocess.run([nvcc, *args], capture_output=True, text=True)
    return result.stdout + result.stderr


def find_toolkit() -> Path | None:
    """CUDA_HOME, else the home that the nvcc on PATH (which may be a wrapper) speaks of, else /usr/local/cuda."""
    candidates = [os.environ.get("CUDA_HOME")]
    if not candidates[0]:
        nvcc = shutil.which("nvcc")
        dryrun = run_nvcc(nvcc, "--dryrun", "x.cu") if nvcc else ""
        candidates = [*re.findall(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE), "/usr/local/cuda"]
    homes = [Path(candidate.strip()).resolve() for candidate in candidates]
    return next((home for home in homes if (home / "bin" / "nvcc").exists()), None)


def why_no_cuda(torch, toolkit: Path | None) -> str | None:
    """One clause, or None where the CUDA sources can be built."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if toolkit is None:
        return "no nvcc was found (in CUDA_HOME; where that is not set, on PATH and in /usr/local/cuda)"
    release = re.search(r"release (\d+)\.(\d+)", run_nvcc(str(toolkit / "bin" / "nvcc"), "--version"))
    if release is None:
        return "nvcc --version does not say its release"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc is release {release[1]}.{release[2]} and torch was built with CUDA {torch.version.cuda}"
    return None


def set_architectures(torch, toolkit: Path) -> None:
    """The user's choice, else the visible GPU, else the data-centre GPUs that this nvcc knows."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available():
        return
    known = {int(n) for n in re.findall(r"compute_(\d+)", run_nvcc(str(toolkit / "bin" / "nvcc"), "--list-gpu-arch"))}
    chosen = [name for name, number in ARCHITECTURES.items() if number in known]
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen) + "+PTX"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def cpu_features() -> list[str]:
    """The features beyond x86-64 that -march=native enables on this processor, by Linux's names."""
    if platform.machine() != "x86_64" or not CPUINFO.exists():
        return []

    def macros(*flags: str) -> set[str]:
        command = [*compiler(), *flags, "-dM", "-E", "-x", "c++", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"^#define __(\w+?)__ 1$", text, re.MULTILINE))

    flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    wanted = {FEATURES[name] or name.lower() for name in (macros("-march=native") - macros()) & FEATURES.keys()}
    return sorted(wanted & present)


def set_march(extension, stays: bool) -> None:
    """Compile for this processor where the extension stays on it, or as asked; fills `info`."""
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    march = MARCH or ("native" if here and stays and not SANITIZE else "portable")
    info.update(march=march, cpu_features=cpu_features() if march == "native" else [])
    if march == "native":
        extension.define_macros = [*extension.define_macros, ("DDPM_FAST_NATIVE", None)]
        arguments = extension.extra_compile_args
        extension.extra_compile_args = {**arguments, "cxx": [*arguments["cxx"], "-march=native"]}


def extensions() -> list:
    """The extension to build first and its fallbacks; fills the fields of `info` that are known before compiling."""
    if MODE not in MODES:
        raise SystemExit(f"DDPM_FAST_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")
    if MARCH not in (None, *MARCHES):
        raise SystemExit(f"DDPM_FAST_MARCH must be one of {', '.join(MARCHES)}, got {MARCH!r}")
    if MODE == "none":
        info["reason"] = "DDPM_FAST_BUILD=none asked for pure Python"
        return []
    toolkit = None if MODE == "cpu" else find_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)  # torch.utils.cpp_extension reads it when it is imported
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError as error:
        if MODE != "auto":
            message = f"DDPM_FAST_BUILD={MODE} needs torch at build time ({error}): use --no-build-isolation"
            raise SystemExit(message) from error
        info["reason"] = f"torch could not be imported when the package was built ({error})"
        return []
    info.update(torch=torch.__version__, torch_cuda=torch.version.cuda)
    info["cuda_left_out"] = "DDPM_FAST_BUILD=cpu" if MODE == "cpu" else why_no_cuda(torch, toolkit)
    cpu = make_extension(CppExtension, CPU_SOURCES)
    if info["cuda_left_out"] is None:
        set_architectures(torch, toolkit)
        cuda = make_extension(CUDAExtension, CPU_SOURCES + CUDA_SOURCES, [("DDPM_FAST_WITH_CUDA", None)])
        return [cuda, cpu] if MODE == "auto" else [cuda]
    if MODE == "cuda":
        raise SystemExit(f"DDPM_FAST_BUILD=cuda cannot be done: {info['cuda_left_out']}")
    return [cpu]


def make_extension(kind: type, sources: list[str], macros: list[tuple] = ()):
    return kind(
        name="ddpm_fast._C",
        sources=list(sources),
        depends=HEADERS,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[*macros, *([("DDPM_FAST_EMULATE_AVX512", None)] if EMULATE_AVX512 else [])],
        extra_compile_args={"cxx": CXX_FLAGS + OPENMP_FLAGS, "nvcc": ["-O3"]},
        extra_link_args=[*OPENMP_FLAGS, *(SANITIZE_FLAGS[:1] if SANITIZE else [])],
    )


def built_otherwise(package: Path) -> bool:
    """True if the existing extension was built with other flags, which file times do not show."""
    file = package / "_build_info.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    return any(before.get(name) != info[name] for name in ("march", "sanitized", "emulated_avx512"))


def write_info(package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
    for what, reason in (("extension", info["reason"]), ("CUDA part", info["cuda_left_out"])):
        if reason:
            print(f"ddpm_fast: WARNING: built without the {what}: {reason}", file=sys.stderr)


class BuildPy(build_py):
    """Writes the build information of a pure Python build; of any other, BuildExt does."""

    def run(self):
        super().run()
        if not self.distribution.ext_modules:
            write_info((ROOT if self.editable_mode else Path(self.build_lib)) / "ddpm_fast")


def with_fallback(base: type) -> type:
    """torch's BuildExtension, which under `auto` tries the next candidate where one does not compile."""

    class BuildExt(base):
        def run(self):
            (extension,) = self.extensions
            fresh = self.compiler
            stays = self.inplace or getattr(self, "editable_mode", False)
            package = (ROOT if self.inplace else Path(self.build_lib)) / "ddpm_fast"
            for candidate in CANDIDATES:
                # In place, since setuptools has left its own marks on the object; a run leaves its compiler behind.
                vars(extension).update(vars(candidate))
                self.compiler = fresh
                try:
                    set_march(extension, stays)
                    self.force = self.force or built_otherwise(package)
                    super().run()
                except (CompileError, LinkError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
                    if MODE != "auto":
                        raise
                    self.record_failure(extension, error)
                else:
                    self.record_success(extension)
                    break
            else:
                self.extensions = []
            write_info(package)

        def record_success(self, extension):
            with_cuda = any(source.endswith(".cu") for source in extension.sources)
            version = [*compiler(), "--version"]
            info.update(
                built=["cpu", "cuda"] if with_cuda else ["cpu"],
                reason=None,
                bytes=Path(self.get_ext_fullpath(extension.name)).stat().st_size,
                compiler=subprocess.run(version, capture_output=True, text=True).stdout.partition("\n")[0],
                architectures=os.environ.get("TORCH_CUDA_ARCH_LIST", "the visible GPU") if with_cuda else None,
            )

        def record_failure(self, extension, error):
            first_line = str(error).strip().partition("\n")[0]
            reason = f"it did not compile ({type(error).__name__}: {first_line})"
            info["reason"] = reason
            if any(source.endswith(".cu") for source in extension.sources):
                info["cuda_left_out"] = reason

    return BuildExt


CANDIDATES = extensions()
commands = {"build_py": BuildPy}
if CANDIDATES:
    from torch.utils.cpp_extension import BuildExtension

    commands["build_ext"] = with_fallback(BuildExtension)

setup(ext_modules=CANDIDATES[:1], cmdclass=commands)
