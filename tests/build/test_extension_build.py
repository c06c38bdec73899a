"""The build of the package and the loading of its extension: modes, messages, and a broken extension.

Builds here are of a stub: tests/build/stub has a C++ module of the same shape with no operators, which compiles in
seconds. What is tested of them is setup.py: modes, fallbacks, messages, the wheel's contents, _build_info.json, and
when something is compiled again.

The real sources are built once, by `make test` for its environment. The tests that take the fixture `package` load a
copy of that build and run its operators, and its size has a bound. The other operators' tests run it, too. A real
portable wheel is built and measured by `make release-tests`, which has the ways in which a build fails, too, and by
tests/build/sanitize.py with sanitizers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gate as regression_gate
import pytest
import torch
from forks import run_code

from ddpm_fast.runtime import extension

ROOT = Path(__file__).parents[2]
PACKAGE = Path(extension.__file__).parents[1]
CPUINFO = Path("/proc/cpuinfo")
FLAGS = re.findall(r"^flags\s*:(.*)$", CPUINFO.read_text() if CPUINFO.exists() else "", re.MULTILINE)

STUB = Path(__file__).parent / "stub" / "csrc"

# Imports the package, loads a stub or says why not.
STUB_PROBE = """
import json, sys
import ddpm_fast
assert "ddpm_fast._C" not in sys.modules, "importing the package loaded the extension"
from ddpm_fast.runtime import extension
module = extension.load()
print(json.dumps({
    "file": ddpm_fast.__file__,
    "reason": extension.reason(),
    "has_cuda": extension.has_cuda(),
    "instruction_set": extension.instruction_set(),
    "answer": module and module.answer(),
}))
"""

# The same of a real extension, or of none, and runs a step: natively, or in the reference.
PROBE = """
import json, sys
import ddpm_fast
assert "ddpm_fast._C" not in sys.modules, "importing the package loaded the extension"
import torch
from ddpm_fast.runtime import extension
from ddpm_fast.ops.sampler_step.op import sampler_step
x = torch.ones(2, 3, 4, 4)
table = torch.tensor([[0.5, 0.25, 2.0, 1.0, 0.0, 0.0]])
x_next, _ = sampler_step(x, x, table, torch.tensor([0]), torch.tensor([0]))
assert torch.equal(x_next, torch.full_like(x, 2.5)), x_next
print(json.dumps({
    "file": ddpm_fast.__file__,
    "reason": extension.reason(),
    "loaded": extension.load() is not None,
    "has_cuda": extension.has_cuda(),
    "explain": ddpm_fast.explain(devices=[torch.device("cpu")]),
}))
"""


def run(*command: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    ours = ("PYTHONPATH", "DDPM_FAST_BUILD", "DDPM_FAST_MARCH", "DDPM_FAST_SANITIZE")
    environ = {k: v for k, v in os.environ.items() if k not in ours}
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**environ, **environment})
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def probe(folder: Path, code: str = PROBE) -> dict:
    """The output of `code` in a process of its own that imports the package from `folder`."""
    return json.loads(run_code(code, folder).stdout)


def run_setup(source: Path, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    code = f"import runpy, sys; sys.argv = {['setup.py', *arguments]}; runpy.run_path('setup.py', run_name='__main__')"
    return run_code(code, source, check, **environment)


def copy_of_sources(folder: Path, csrc: Path = STUB) -> Path:
    """The source tree without anything built, with the stub's C++."""
    folder.mkdir()
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "ddpm_fast", folder / "ddpm_fast", ignore=built)
    shutil.copytree(csrc, folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(tmp_path: Path, mode: str, csrc: Path = STUB, **environment: str) -> tuple[Path, dict, str]:
    """(folder where the wheel is installed, its build information, the build's output)."""
    source = copy_of_sources(tmp_path / "source", csrc)
    output = run(
        sys.executable,
        *("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)),
        cwd=source,
        DDPM_FAST_BUILD=mode,
        MAX_JOBS="2",
        **environment,
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    run(
        sys.executable,
        *("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed), str(wheel)),
        cwd=tmp_path,
    )
    with zipfile.ZipFile(wheel) as archive:
        info = json.loads(archive.read("ddpm_fast/_build_info.json"))
    return installed, info, output.stdout + output.stderr


def wheel_bytes(folder: Path) -> int:
    (wheel,) = folder.glob("*.whl")
    return wheel.stat().st_size


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package with its extension, to break."""
    return copy_of_package(tmp_path)


def copy_of_package(folder: Path) -> Path:
    assert extension.load() is not None, extension.reason()
    shutil.copytree(PACKAGE, folder / "ddpm_fast", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "ddpm_fast"


def edit_info(package: Path, **changes) -> None:
    file = package / "_build_info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def remove_module(package):
    for file in package.glob("_C*"):
        file.unlink()


def damage_module(package):
    for file in package.glob("_C*"):
        file.write_bytes(b"x" * file.stat().st_size)


def truncate_module(package):
    for file in package.glob("_C*"):
        file.write_bytes(file.read_bytes()[:4096])


BROKEN = {
    "no shared object": (remove_module, "the extension's file is missing from the package"),
    "garbage": (damage_module, "the extension could not be loaded"),
    "truncated": (truncate_module, "the extension's file is damaged: it has 4096 of"),
    "no build information": (
        lambda package: (package / "_build_info.json").unlink(),
        "the extension was not built (there is no _build_info.json in the package)",
    ),
    "damaged build information": (
        lambda package: (package / "_build_info.json").write_text("{"),
        "the extension's _build_info.json is damaged",
    ),
    "another torch": (
        lambda package: edit_info(package, torch="1.13.1"),
        f"the extension was built for torch 1.13.1, and this is torch {torch.__version__}",
    ),
    "another CUDA": (
        lambda package: edit_info(package, torch_cuda="9.2"),
        "the extension was built for a CUDA 9.2 build of torch",
    ),
    "another processor": (
        lambda package: edit_info(package, cpu_features=["fpu", "warp9", "hyperdrive"]),
        "the extension was built for a processor with warp9, hyperdrive, which this one lacks: build it again",
    ),
    "not built": (
        lambda package: edit_info(package, built=[], reason="the compiler was on holiday"),
        "the extension was not built: the compiler was on holiday",
    ),
}


major, minor = torch.__version__.split(".")[:2]
WHOLE = {
    "intact": lambda package: None,
    "another patch release of torch": lambda package: edit_info(package, torch=f"{major}.{minor}.99+cpu"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What `PROBE` finds in a copy of the package, whole and broken."""
    changes = WHOLE | {case: change for case, (change, _) in BROKEN.items()}
    packages = [copy_of_package(tmp_path_factory.mktemp("copy")) for _ in changes]
    for change, package in zip(changes.values(), packages, strict=True):
        change(package)
    results = {case: probe(package.parent) for case, package in zip(changes, packages, strict=True)}
    assert [Path(result["file"]).parent for result in results.values()] == packages
    return results


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_copy_loads(found, case):
    result = found[case]
    assert result["loaded"] and result["reason"] is None
    assert "* native" in result["explain"]
    assert f"on the CPU uses the instruction set {extension.instruction_set()}" in result["explain"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.skipif(not FLAGS, reason="Linux on x86-64 alone lists these flags"))
        if case == "another processor"
        else case
        for case in BROKEN
    ],
)
def test_a_broken_extension_leaves_the_reference_and_a_reason(found, case):
    _, reason = BROKEN[case]
    result = found[case]
    assert not result["loaded"] and not result["has_cuda"]
    assert result["reason"].startswith(reason)
    assert "* reference" in result["explain"] and reason in result["explain"]


def test_forcing_native_without_the_extension_raises_its_reason(package):
    remove_module(package)
    code = PROBE.replace("x = torch.ones", "ddpm_fast.use_backend('native')\nx = torch.ones")
    result = run_code(code, package.parent, check=False)
    assert result.returncode != 0
    assert "backend 'native' was forced and refuses: the extension's file is missing" in result.stderr


def test_the_first_load_may_happen_while_compiling(package):
    code = PROBE.replace("= sampler_step(", "= torch.compile(sampler_step, fullgraph=True, backend='aot_eager')(")
    assert probe(package.parent, code)["loaded"]


def test_the_environments_build_left_out_nothing_that_did_not_compile():
    """CUDA's sources, for every architecture; `auto` builds without what does not compile."""
    info = extension.info()
    assert "did not compile" not in f"{info['reason']} {info['cuda_left_out']}", info


def test_the_size_of_the_environments_package_is_bounded(tmp_path, gate):
    """The bound depends on the parts that were built; `make release-tests` holds that of a portable wheel."""
    info = extension.info()
    assert extension.load() is not None, extension.reason()
    name = f"{' + '.join(info['built'])}, {info['march']}, {extension.instruction_set()}"
    if name not in regression_gate.table("wheel bytes", regression_gate.bounds()):
        pytest.skip(f"bounds.json has no bound for a build of {name}")
    wheel = tmp_path / "package.zip"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(PACKAGE.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                archive.write(file, file.relative_to(PACKAGE))
    gate("wheel bytes", name, wheel.stat().st_size)


def test_a_wheel_works_outside_the_source_tree(tmp_path):
    installed, info, _ = build_wheel(tmp_path, "cpu")
    assert info["built"] == ["cpu"] and info["cuda_left_out"] == "DDPM_FAST_BUILD=cpu"
    assert info["torch"] == torch.__version__ and info["torch_cuda"] == torch.version.cuda and info["compiler"]
    assert info["march"] == "portable" and info["cpu_features"] == [], "a wheel may travel"
    found = probe(installed, STUB_PROBE)
    assert Path(found["file"]).parent == installed / "ddpm_fast"
    assert found["answer"] == 42 and found["instruction_set"] == "portable" and not found["has_cuda"]
    assert not list(installed.rglob("*.cpp")) and not list(installed.rglob("tests"))


@pytest.mark.release
def test_a_real_wheel_works_outside_the_source_tree(tmp_path, gate):
    installed, info, _ = build_wheel(tmp_path, "cpu", csrc=ROOT / "csrc")
    gate("wheel bytes", "cpu", wheel_bytes(tmp_path))
    assert info["built"] == ["cpu"] and info["march"] == "portable"
    found = probe(installed)
    assert found["loaded"] and not found["has_cuda"] and "* native" in found["explain"]


def test_an_editable_build_puts_the_extension_beside_its_sources(tmp_path):
    source = copy_of_sources(tmp_path / "source")
    run(
        sys.executable,
        *("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"),
        # Without --ignore-installed pip would take the package out of the environment that runs the tests.
        *("--ignore-installed", "--prefix", str(tmp_path / "env")),
        *("-e", "."),
        cwd=source,
        DDPM_FAST_BUILD="cpu",
        MAX_JOBS="2",
    )
    found = probe(source, STUB_PROBE)
    info = json.loads((source / "ddpm_fast" / "_build_info.json").read_text())
    assert found["answer"] == 42 and Path(found["file"]).parent == source / "ddpm_fast"
    assert found["instruction_set"] == info["march"] == ("native" if FLAGS else "portable"), "it stays on this machine"
    assert info["march"] == "portable" or set(info["cpu_features"]) <= set(FLAGS[0].split())
    assert (info["march"] == "native" and "avx2" in FLAGS[0].split()) == ("avx2" in info["cpu_features"])


def build_in_place(source: Path, **environment: str) -> None:
    run_setup(source, "--quiet", "build_ext", "--inplace", DDPM_FAST_BUILD="cpu", MAX_JOBS="2", **environment)


def test_what_changed_is_compiled_again(tmp_path):
    """A header's age or another march; nothing where nothing changed."""
    source = copy_of_sources(tmp_path / "source")
    objects = ("python/module.o", "cpu/kernels/sets.o")

    def ages() -> list[int]:
        (build,) = (source / "build").glob("temp.*")
        return [(build / "csrc" / name).stat().st_mtime_ns for name in objects]

    build_in_place(source, DDPM_FAST_MARCH="portable")
    first = ages()
    build_in_place(source, DDPM_FAST_MARCH="portable")
    assert ages() == first
    header = source / "csrc" / "core" / "answer.h"
    header.write_text(header.read_text().replace("42", "43"))
    build_in_place(source, DDPM_FAST_MARCH="portable")
    second = ages()
    assert second[0] > first[0] and second[1] == first[1], "what includes the header, and nothing else"
    assert probe(source, STUB_PROBE)["answer"] == 43
    if FLAGS:
        build_in_place(source, DDPM_FAST_MARCH="native")
        assert all(new > old for new, old in zip(ages(), second, strict=True))
        assert probe(source, STUB_PROBE)["instruction_set"] == "native"


@pytest.mark.release
@pytest.mark.skipif(shutil.which("nvcc") is None or torch.version.cuda is None, reason="needs nvcc and torch for CUDA")
def test_a_cuda_build_has_both_parts(tmp_path):
    """Two files of one base name in two folders are two objects."""
    installed, info, _ = build_wheel(tmp_path, "cuda", TORCH_CUDA_ARCH_LIST="9.0")
    assert info["built"] == ["cpu", "cuda"] and info["cuda_left_out"] is None and info["architectures"] == "9.0"
    found = probe(installed, STUB_PROBE)
    assert found["answer"] == 42 and found["has_cuda"]


def test_no_two_sources_share_an_object():
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cpp", ".cu")]
    assert len({file.with_suffix("") for file in sources}) == len(sources)


def test_demo_and_test_build_the_package_once(tmp_path):
    """`make test` after `make demo` installs what the tests need, and compiles nothing."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    listed = run("make", "-n", f"VENV={tmp_path}/venv", "demo", "test", cwd=ROOT).stdout
    assert listed.count("--editable") == 1 and listed.count("setup.py") == 0
    assert "ddpm_fast[demo]" in listed and "ddpm_fast[test]" in listed


@pytest.mark.slow
def test_none_makes_a_pure_python_wheel(tmp_path, gate):
    installed, info, _ = build_wheel(tmp_path, "none")
    gate("wheel bytes", "none", wheel_bytes(tmp_path))
    assert info["built"] == []
    assert list(tmp_path.glob("*-py3-none-any.whl"))
    assert probe(installed)["reason"] == "the extension was not built: DDPM_FAST_BUILD=none asked for pure Python"


@pytest.mark.slow
@pytest.mark.release
def test_auto_installs_pure_python_and_says_so_where_nothing_compiles(tmp_path):
    installed, info, output = build_wheel(tmp_path, "auto", CXX="false", CC="false")
    assert info["built"] == [] and "it did not compile" in info["reason"]
    assert "WARNING: built without the extension: it did not compile" in output
    assert probe(installed)["reason"] == f"the extension was not built: {info['reason']}"


@pytest.mark.slow
@pytest.mark.release
def test_auto_builds_the_cpu_part_and_says_so_where_cuda_does_not_compile(tmp_path):
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {torch.version.cuda or 0}" && exit\n'
        '[ "$1" = --list-gpu-arch ] && echo compute_80 && exit\n'
        "exit 1\n"
    )
    nvcc.chmod(0o755)
    toolkit = {"CUDA_HOME": str(tmp_path / "toolkit")}
    installed, info, output = build_wheel(tmp_path, "auto", **toolkit)
    reason = "it did not compile" if torch.version.cuda else "is not a CUDA build"
    assert info["built"] == ["cpu"] and reason in info["cuda_left_out"] and info["reason"] is None
    assert f"WARNING: built without the CUDA part: {info['cuda_left_out']}" in output
    assert probe(installed, STUB_PROBE)["answer"] == 42


@pytest.mark.slow
@pytest.mark.release
def test_another_cuda_release_is_named(tmp_path):
    if torch.version.cuda is None:
        pytest.skip("needs a CUDA build of torch")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho release 9.2\n")
    nvcc.chmod(0o755)
    source = copy_of_sources(tmp_path / "source")
    environment = {"DDPM_FAST_BUILD": "cuda", "CUDA_HOME": str(tmp_path / "toolkit")}
    result = run_setup(source, "build_ext", "--inplace", check=False, **environment)
    assert result.returncode != 0
    assert f"nvcc is release 9.2 and torch was built with CUDA {torch.version.cuda}" in result.stderr


@pytest.mark.slow
@pytest.mark.release(but=lambda environment, **_: "everything" in environment.values())
@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"DDPM_FAST_BUILD": "everything"}, "DDPM_FAST_BUILD must be one of auto, cpu, cuda, none, got 'everything'"),
        ({"DDPM_FAST_MARCH": "zen"}, "DDPM_FAST_MARCH must be one of native, portable, got 'zen'"),
        ({"DDPM_FAST_BUILD": "cuda", "CUDA_HOME": os.devnull}, "DDPM_FAST_BUILD=cuda cannot be done: "),
        ({"DDPM_FAST_BUILD": "cpu", "CXX": "false", "CC": "false"}, "rror"),
    ],
)
def test_what_cannot_be_built_as_asked_is_an_error(tmp_path, environment, sentence):
    source = copy_of_sources(tmp_path / "source")
    result = run_setup(source, "build_ext", "--inplace", check=False, **environment)
    assert result.returncode != 0
    assert sentence in result.stderr + result.stdout
