"""Triton kernels compiled ahead of time, without a GPU or driver, and what their machine code says."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = [80, 90, 100]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Machine:
    """What a compiled kernel uses.

    Args:
        registers: per thread.
        stack, local: bytes per thread; spilled registers would be there.
        shared: bytes per program, Triton's own allocation.
        accesses: instructions by kind and width in bits, such as {("LDG", 128): 4, ("STG", 32): 1}; LDL and STL, the
            accesses to local memory, are counted too.
        sass: the machine code.
    """

    registers: int
    stack: int
    local: int
    shared: int
    accesses: dict[tuple[str, int], int]
    sass: str

    @property
    def spills(self) -> bool:
        return self.stack + self.local > 0 or any(kind in ("LDL", "STL") for kind, _ in self.accesses)

    def widths(self, kind: str) -> dict[int, int]:
        """Instructions of a kind by width in bits: "LDG", "LDGSTS" (to shared memory), "STG", "LDS", "STS"."""
        return {width: n for (k, width), n in sorted(self.accesses.items()) if k == kind}


def compile_kernel(
    kernel: Callable,
    signature: dict[str, str],
    constants: dict[str, object],
    capability: int,
    tmp_path: Path,
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    unaligned: tuple[str, ...] = (),
) -> Machine:
    """Compile a `@triton.jit` kernel for one architecture and read its machine code.

    Args:
        signature: type of every argument that is no constant, such as {"x_ptr": "*bf16", "n": "i32"}.
        constants: value of every other argument; None stands for a pointer that is not given.
        capability: 80, 90 or 100.
        unaligned: pointers and integers not to be assumed multiples of 16; every other one is, as a launch would see.
    """
    names = kernel.arg_names
    assert set(names) == set(signature) | set(constants), set(names) ^ (set(signature) | set(constants))
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = [n for n, kind in signature.items() if n not in unaligned and (kind[0] == "*" or kind[0] in "iu")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constants, attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read_machine(compiled.asm["cubin"], compiled.metadata.shared, tmp_path)


def read_machine(cubin: bytes, shared: int, tmp_path: Path) -> Machine:
    """Disassemble a cubin with the tools of Triton's package."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    usage = _run("-res-usage", file)
    sass = _run("-sass", file)
    numbers = {key: int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    accesses: dict[tuple[str, int], int] = {}
    for kind, modifiers in re.findall(r"\b(LDGSTS|LDG|STG|LDS|STS|LDL|STL)((?:\.\w+)*)\b", sass):
        width = next((int(w) for w in re.findall(r"\.[US]?(8|16|64|128)\b", modifiers)), 32)
        accesses[kind, width] = accesses.get((kind, width), 0) + 1
    return Machine(numbers["REG"], numbers["STACK"], numbers["LOCAL"], shared, accesses, sass)


def _run(flag: str, file: Path) -> str:
    result = subprocess.run([TOOLS / "cuobjdump", flag, file], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr
