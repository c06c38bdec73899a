"""The machine: its description, and its measured ceilings of bandwidth and arithmetic."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddpm_fast import __version__
from ddpm_fast.measure.timing import Interleaved
from ddpm_fast.runtime import extension

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Ceilings:
    """Measured ceilings of a device.

    Args:
        copy: bytes per second of a large copy, those read and those written.
        matmul: dtype name → floating point operations per second of a large matrix product, a multiply-add being two.
            On CUDA fp32 is the precision that convolutions run in, TF32 unless torch was told otherwise.
    """

    copy: float
    matmul: dict[str, float]

    def as_dict(self) -> dict:
        return asdict(self)


def why_absent(device: torch.device) -> str | None:
    """Why torch cannot use a device, in one clause; None where it can."""
    if torch.device(device).type != "cuda":
        return None
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # torch without CUDA; no driver or no GPU
        return str(error).partition(". ")[0]
    return None


def describe(device: torch.device) -> dict:
    """Machine, driver and versions, for the head of a report. Nothing here identifies a user or a host."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "ddpm_fast": __version__,
        "extension": extension.info() if extension.load() is not None else f"not loaded: {extension.reason()}",
        "instruction_set": extension.instruction_set(),
        "device": str(device.type),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_cache_mib": properties.L2_cache_size / 2**20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return facts


def name(facts: dict) -> str:
    """One short name for a machine from `describe`."""
    if "gpu" in facts:
        return facts["gpu"]
    return f"{facts['cores']}-core {facts['processor']} ({facts['vector']}), {facts['threads']} thread" + (
        "s" if facts["threads"] != 1 else ""
    )


def measure_ceilings(device: torch.device, *, quick: bool = False, seconds: float = 1.0) -> Ceilings:
    """Copy bandwidth and matrix peak of a device, each the best of interleaved rounds of `seconds` in all.

    Args:
        quick: small sizes, to try the code out; the numbers are then worth nothing.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    source = torch.randn((2**16 if quick else 2**28 if on_cuda else 2**25), device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    n = 64 if quick else 8192 if on_cuda else 1024
    dtypes = _DTYPES if on_cuda else {"fp32": torch.float32}
    for label, dtype in dtypes.items():
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        calls[label] = partial(torch.matmul, a, b)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        timings = Interleaved(calls, device).run(seconds, least=5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    best = {label: min(timing.seconds) for label, timing in timings.items()}
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(copy=moved / best["copy"], matmul={label: 2 * n**3 / best[label] for label in dtypes})


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The driver's version by nvidia-smi, where that is installed."""
    import shutil

    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip().splitlines()[0] if result.returncode == 0 and result.stdout.strip() else None
