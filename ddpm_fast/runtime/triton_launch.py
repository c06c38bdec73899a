"""Launch configurations of the Triton kernels, and where those can run.

A configuration is a plain function of sizes: the same call always gets the same one, nothing is timed or cached on
disk, and kernels compile ahead of time with exactly what they run with. `triton.autotune` would need a driver.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Launch:
    """Options of a launch: elements per program, warps, pipeline stages."""

    block: int
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch that are the compiler's."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# The interpreter runs one numpy call per operation and program, so small blocks only add programs.
INTERPRETER = Launch(block=1024, num_warps=1)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n ≥ 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, divisor: int) -> int:
    """n / divisor, rounded up; triton.cdiv takes microseconds."""
    return -(-n // divisor)


@cache
def elementwise(elements: int, interpreted: bool) -> Launch:
    """The launch of a kernel that reads `elements` numbers once: 16 numbers of any width per thread."""
    if interpreted:
        return INTERPRETER
    block = min(2048, max(128, next_power_of_2(elements)))
    return Launch(block, num_warps=max(1, block // 512))


@cache
def image_tiles(elements: int, channels: int, interpreted: bool) -> Launch:
    """For tiles of images of `elements` numbers: `channels` (a power of two) side by side, 8 pixels of each or more."""
    launch = elementwise(elements, interpreted)
    return Launch(max(launch.block, 8 * channels), launch.num_warps, launch.num_stages)


@cache
def row_sum(columns: int) -> Launch:
    """For one program per row that sums a few partial results."""
    return Launch(min(1024, max(32, next_power_of_2(columns))), num_warps=1)


def register_bound(registers: int | None) -> dict[str, int]:
    """The option of a launch that bounds the registers of a thread; None lets the compiler choose.

    ptxas aims below what a kernel needs, and spills a few loop invariants to get there, unless it is given a bound.
    """
    # Only NVIDIA's compiler has the option.
    return {} if registers is None or torch.version.hip else {"maxnreg": registers}


@cache
def is_triton_before(major: int, minor: int) -> bool:
    """Whether the installed Triton is older than a release."""
    version = importlib.import_module("triton").__version__
    return tuple(map(int, version.split(".")[:2])) < (major, minor)


@cache
def installed() -> bool:
    """Whether there is a Triton to import; looked for once."""
    return importlib.util.find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when Triton was imported).

    The first answer holds for the life of the process, as the kernels' own does.
    """
    if "triton" not in sys.modules and "TRITON_INTERPRET" not in os.environ:
        return False  # what Triton would answer, without the 0.13 s of its import in a process on the CPU
    return installed() and importlib.import_module("triton").knobs.runtime.interpret


def hash_functions(module: dict[str, object]) -> None:
    """Have Triton hash a module's functions now, callees before callers; called where all of them are defined.

    In Triton 3.6 a kernel's hash, part of its name in the cache, depends on which of its callees have been hashed
    before it, and so on what the process has launched before.
    """
    jitted = importlib.import_module("triton").JITFunction
    for function in module.values():
        if isinstance(function, jitted):  # none in the interpreter
            _ = function.cache_key


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of a device, in one clause; None where they can."""
    if not installed():
        return "Triton is not installed"
    kind = device.type
    if interpreted():
        return None if kind == "cpu" else f"Triton's interpreter is active, and tensors are on {kind}"
    return None if kind == "cuda" else f"tensors are on {kind}, and Triton kernels need CUDA"


def is_captured(device: torch.device) -> bool:
    """Whether launches on a device go into a CUDA graph now, whose replays read the same memory."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# Under torch.compile the answer is computed while tracing; see extension.why_not.
why_not_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


# dynamo cannot trace torch.backends.
def convolution_precision() -> str:
    """How float32 products replace those of torch's convolution: "tf32" where cuDNN may use it, else "ieee"."""
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"


convolution_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
