"""Compiles Triton kernels ahead of time, without a GPU or driver, and reads their machine code."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = [80, 90, 100]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Machine:
    """The resources and the code of a compiled kernel.

    Args:
        registers: per thread.
        stack, local: bytes per thread; spilled registers would be there.
        shared: bytes per program, Triton's own allocation.
        accesses: instructions by kind and width in bits, such as {("LDG", 128): 4, ("STG", 32): 1}; LDL and STL, the
            accesses to local memory, are counted too.
        sass: the machine code.
        ptx, ttgir: what Triton made it of, where Triton did.
    """

    registers: int
    stack: int
    local: int
    shared: int
    accesses: dict[tuple[str, int], int]
    sass: str
    ptx: str = ""
    ttgir: str = ""

    @property
    def spills(self) -> bool:
        return self.stack + self.local > 0 or any(kind in ("LDL", "STL") for kind, _ in self.accesses)

    def widths(self, kind: str) -> dict[int, int]:
        """Instructions of a kind by width in bits: "LDG", "LDGSTS" (to shared memory), "STG", "LDS", "STS"."""
        return {width: n for (k, width), n in sorted(self.accesses.items()) if k == kind}

    def arithmetic(self) -> set[str]:
        """Float32 instructions of PTX without their operands, such as "div.full.f32" and "sqrt.rn.f32"."""
        return set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z]\w*(?:\.\w+)*\.f32)\s", self.ptx, re.MULTILINE))

    def accumulators(self) -> list[str]:
        """The initial accumulator of each product on float32 tensors: "zero" or a name, without continued products.

        On sm_100 an accumulator may be in tensor memory, where it is stored before the product that adds to it.
        """
        defined = dict(re.findall(r"(%[\w]+)(?::\d+)? = (.*)", self.ttgir))
        operands = re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) (.*)", self.ttgir)
        starts = [text.split(",")[2].split()[0].split("#")[0] for text in operands]
        names = []
        for memory, adds in re.findall(r"ttng\.tc_gen5_mma %\w+, %\w+, (%\w+), (%\w+),", self.ttgir):
            stored = re.search(rf"ttng\.tmem_store (%\w+), {memory}, ", self.ttgir)
            if adds == "%false":
                names.append("zero")
            else:
                starts.append(stored[1] if stored else memory)
        for name in starts:
            while match := re.match(
                r"(?:arith\.select %\w+, %\w+, |ttg\.convert_layout )(%\w+)", defined.get(name, "")
            ):
                name = match[1].split("#")[0]
            value = defined.get(name, "")
            if not re.match(r"tt\.dot|ttng\.warp_group_dot|ttng\.tmem_load", value):
                names.append("zero" if "dense<0.000000e+00>" in value else name)
        return names


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, object],
    capability: int,
    tmp_path: Path,
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    unaligned: tuple[str, ...] = (),
    enable_fp_fusion: bool = True,
    maxnreg: int | None = None,
) -> Machine:
    """Compile a `@triton.jit` kernel for one architecture and read its machine code.

    Args:
        signature: type of every argument that is no constant, such as {"x_ptr": "*bf16", "n": "i32"}.
        constants: value of every other argument; None is a pointer that is not given.
        capability: 80, 90 or 100.
        enable_fp_fusion: the compiler may fuse products with sums.
        maxnreg: most registers per thread; None: the compiler chooses.
        unaligned: pointers and integers not to be assumed multiples of 16; every other one is, as a launch would see.
    """
    names = kernel.arg_names
    assert set(names) == set(signature) | set(constants), set(names) ^ (set(signature) | set(constants))
    types = {name: signature.get(name, "constexpr") for name in names}
    aligned = [n for n, kind in signature.items() if n not in unaligned and (kind[0] == "*" or kind[0] in "iu")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constants, attrs)
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": enable_fp_fusion,
        "maxnreg": maxnreg,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    machine = read_machine(compiled.asm["cubin"], compiled.metadata.shared, tmp_path)
    return replace(machine, ptx=compiled.asm["ptx"], ttgir=compiled.asm["ttgir"])


def read_machine(cubin: bytes, shared: int, tmp_path: Path) -> Machine:
    """Disassemble a cubin with the tools of Triton's package."""
    file = tmp_path / "kernel.cubin"
    file.write_bytes(cubin)
    usage = _run("-res-usage", file)
    sass = _run("-sass", file)
    numbers = {key: int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL")}
    accesses: dict[tuple[str, int], int] = {}
    for kind, modifiers in re.findall(r"\b(LDGSTS|LDG|STG|LDS|STS|LDL|STL)((?:\.\w+)*)\b", sass):
        width = next((int(w) for w in re.findall(r"\.[US]?(8|16|64|128)\b", modifiers)), 32)
        accesses[kind, width] = accesses.get((kind, width), 0) + 1
    return Machine(numbers["REG"], numbers["STACK"], numbers["LOCAL"], shared, accesses, sass)


def _run(flag: str, file: Path) -> str:
    result = subprocess.run([TOOLS / "cuobjdump", flag, file], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr
