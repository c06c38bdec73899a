"""Compiles Triton kernels ahead of time, without a GPU or driver, and reads their machine code."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = [80, 90, 100]
# Of kernels without matrix products, whose instructions differ most; a quick test of another torch compiles for sm_90.
ON_SM_90 = [pytest.param(80, marks=pytest.mark.release), 90, pytest.param(100, marks=pytest.mark.release)]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(eq=False)
class Machine:
    """The resources and the code of a compiled kernel.

    The first look at the code of one disassembles all that were compiled until then: nvdisasm starts in 0.4 seconds
    and reads fifty kernels in another one, so a test of several compiles all of them first.

    Args:
        registers: per thread.
        stack, local: bytes per thread; spilled registers would be there, and every access to local memory.
        shared: bytes per program, Triton's own allocation.
        code: its instructions, of 16 bytes each.
        architecture: as nvdisasm names it.
        ptx, ttgir: what Triton made it of.
    """

    registers: int
    stack: int
    local: int
    shared: int
    code: bytes
    architecture: str
    ptx: str
    ttgir: str

    @cached_property
    def sass(self) -> str:
        """The machine code."""
        disassemble()
        return self.__dict__["sass"]

    @cached_property
    def accesses(self) -> dict[tuple[str, int], int]:
        """Instructions by kind and width in bits, such as {("LDG", 128): 4, ("STG", 32): 1}, LDL and STL as well."""
        found: dict[tuple[str, int], int] = {}
        for kind, modifiers in re.findall(r"\b(LDGSTS|LDG|STG|LDS|STS|LDL|STL)((?:\.\w+)*)\b", self.sass):
            width = next((int(w) for w in re.findall(r"\.[US]?(8|16|64|128)\b", modifiers)), 32)
            found[kind, width] = found.get((kind, width), 0) + 1
        assert self.spills or not {"LDL", "STL"} & {kind for kind, _ in found}, found
        return found

    @property
    def spills(self) -> bool:
        return self.stack + self.local > 0

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
    file = tmp_path / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    usage = _run("cuobjdump", "-res-usage", str(file))
    numbers = (int(re.findall(rf"\b{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
    architecture = f"SM{capability}{'a' * (capability >= 90)}"
    shared, texts = compiled.metadata.shared, (compiled.asm["ptx"], compiled.asm["ttgir"])
    machine = Machine(*numbers, shared, code_of(file.read_bytes()), architecture, *texts)
    _unread.add(machine)
    return machine


_unread: WeakSet[Machine] = WeakSet()  # those that a test still has


def disassemble() -> None:
    """Read the code of all machines that were compiled and not read, in one call for each architecture."""
    unread = list(_unread)
    _unread.clear()
    for architecture in {machine.architecture for machine in unread}:
        machines = [machine for machine in unread if machine.architecture == architecture]
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(machine.code for machine in machines))
            file.flush()
            printed = _run("nvdisasm", "-b", architecture, file.name)
        lines = re.findall(r"^\s*(/\*\w+\*/.*)", printed, re.MULTILINE)  # an address and an instruction
        for machine in machines:
            count = len(machine.code) // 16
            machine.sass, lines = "\n".join(lines[:count]), lines[count:]
        assert not lines, lines


def code_of(cubin: bytes) -> bytes:
    """The one section .text.NAME of an ELF file of 64 bits."""
    (start,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + size * i) for i in range(count)]
    code = [s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0])]
    ((*_, offset, length),) = code
    return cubin[offset : offset + length]


def _run(tool: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr
