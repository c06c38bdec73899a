"""Loads the compiled module `ddpm_fast._C` on first need, and remembers why it could not.

Loading registers the native implementations of the package's torch operators. Nothing is opened at import; a module
built against another torch, or for a processor with instructions that this one lacks, is refused before the loader sees
it, since opening or running it could crash the process.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).parents[1]
_INFO = _PACKAGE / "_build_info.json"
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class _Outcome:
    module: ModuleType | None
    reason: str | None
    info: dict


_outcome: _Outcome | None = None


def load() -> ModuleType | None:
    """The compiled module, or None; the first call decides for the life of the process."""
    return _decide().module


def reason() -> str | None:
    """Why there is no compiled module, in one clause; None where there is one."""
    return _decide().reason


def info() -> dict:
    """The build's record by setup.py: torch, torch_cuda, built, cuda_left_out, compiler, march, ...; may be empty."""
    return _decide().info


def has_cuda() -> bool:
    """Whether the compiled module is loaded and has the CUDA kernels."""
    return load() is not None and "cuda" in info()["built"]


def instruction_set() -> str | None:
    """What the CPU's kernels use: "avx512_bf16", "avx512", "avx2" or "portable"; None without a compiled module.

    With "avx512_bf16" products of bfloat16 maps are made of bfloat16; all else is as with "avx512".
    """
    module = load()
    return None if module is None else module.instruction_set()


def empty_cache() -> int:
    """Return the CPU pool's unused memory, of freed maps and gradients of the native operators, to the system.

    Returns:
        bytes returned. Memory that no training or sampling step has used for a minute returns without this call.
    """
    return 0 if _outcome is None or _outcome.module is None else _outcome.module.empty_cache()


def why_not(device: torch.device) -> str | None:
    """Why the compiled module cannot run on a device, in one clause; None where it can."""
    if load() is None:
        return reason()
    if device.type == "cpu" or (device.type == "cuda" and has_cuda()):
        return None
    if device.type == "cuda":
        return f"the extension was built without CUDA: {info()['cuda_left_out']}"
    return f"the extension has no kernels for {device.type}"


# The effect of torch.compiler.assume_constant_result without its import of dynamo: under torch.compile tracing computes
# the answer, so the first load may happen there.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide() -> _Outcome:
    global _outcome
    if _outcome is None:
        _outcome = _try_to_load()
    return _outcome


def _try_to_load() -> _Outcome:
    if not _INFO.exists():
        return _Outcome(None, "the extension was not built (there is no _build_info.json in the package)", {})
    try:
        recorded = json.loads(_INFO.read_text())
    except ValueError as error:
        return _Outcome(None, f"the extension's _build_info.json is damaged: {error}", {})
    refusal = _why_unfit(recorded)
    if refusal is not None:
        return _Outcome(None, refusal, recorded)
    try:
        return _Outcome(importlib.import_module("ddpm_fast._C"), None, recorded)
    except ImportError as error:
        return _Outcome(None, f"the extension could not be loaded: {error}", recorded)


def _why_unfit(recorded: dict) -> str | None:
    if not recorded["built"]:
        return f"the extension was not built: {recorded['reason']}"
    if _minor(recorded["torch"]) != _minor(torch.__version__):
        return f"the extension was built for torch {recorded['torch']}, and this is torch {torch.__version__}"
    if recorded["torch_cuda"] != torch.version.cuda:
        return (
            f"the extension was built for {_flavour(recorded['torch_cuda'])} torch, "
            f"and this is {_flavour(torch.version.cuda)} torch"
        )
    lacking = _lacking_features(recorded.get("cpu_features", []))
    if lacking:
        return (
            f"the extension was built for a processor with {', '.join(lacking)}, which this one lacks: build it again, "
            "here or with DDPM_FAST_MARCH=portable"
        )
    candidates = [_PACKAGE / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    module = next((file for file in candidates if file.exists()), None)
    if module is None:
        return "the extension's file is missing from the package (_C of this Python version)"
    if module.stat().st_size != recorded["bytes"]:
        # Opening a truncated file kills the process.
        return f"the extension's file is damaged: it has {module.stat().st_size} of {recorded['bytes']} bytes"
    return None


def _lacking_features(features: list[str]) -> list[str]:
    """Those that this processor does not have, by Linux's names; none where nothing can be read."""
    if not features or not _CPUINFO.exists():
        return []
    flags = re.search(r"^flags\s*:(.*)$", _CPUINFO.read_text(), re.MULTILINE)
    present = set(flags[1].split()) if flags else set(features)
    return [feature for feature in features if feature not in present]


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _flavour(cuda: str | None) -> str:
    return "a CPU build of" if cuda is None else f"a CUDA {cuda} build of"
