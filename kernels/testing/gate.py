"""Compiled Triton kernels for absent GPUs: registers, spills, shared memory, access widths.

`with compiling(SM_90) as compiled:` lets the real launchers run on CPU tensors. Each launch is
compiled for the target with the specialisation that it would have at run time, and none is
executed: torch operations around it do run. The compilers are those in Triton's wheel, and results
lie in Triton's normal cache.

Where the figures come from: shared memory from Triton's metadata; registers and spills (the stack
frame, which Triton kernels use for nothing else) from `cuobjdump -res-usage`, or from the metadata
in AMD's assembly; access widths from PTX or AMD assembly, whose line numbers lead back to the loads
and stores of Triton's GPU dialect and to the loops around them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from .access import Access, find_accesses
from .interpreter import AbsentDevice, patched

# Tiles of less than one warp of 128-bit accesses cannot fill such accesses: row statistics, labels.
WIDE_TILE_BYTES = 512


@dataclass(frozen=True)
class Target:
    """A chip: its name, Triton's name for it, and the bytes of shared memory of a program."""

    name: str
    triton: GPUTarget
    shared_limit: int


SM_80 = Target("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024)
SM_90 = Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024)
SM_100 = Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024)
GFX942 = Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024)
TARGETS = (SM_80, SM_90, SM_100, GFX942)


@dataclass(frozen=True)
class Compiled:
    """Figures of one compiled kernel. Registers are 32 bits wide and counted per thread."""

    kernel: str
    target: Target
    warps: int
    registers: int
    spills: int  # bytes per thread
    shared: int  # bytes per program
    accesses: tuple[Access, ...]

    @property
    def main_accesses(self) -> tuple[Access, ...]:
        """Tiles in loops, or all tiles of a kernel without a loop over global memory."""
        tiles = tuple(a for a in self.accesses if a.tile_bytes >= WIDE_TILE_BYTES)
        return tuple(a for a in tiles if a.in_loop) or tiles


class GateFailure(AssertionError):
    """A compiled kernel misses a bar."""

    def __init__(self, compiled: Compiled, figure: str, value: object, bar: object) -> None:
        self.kernel, self.target = compiled.kernel, compiled.target.name
        self.figure, self.value, self.bar = figure, value, bar
        super().__init__(f"{self.kernel} on {self.target}: {figure} is {value}, the bar is {bar}")


@contextmanager
def compiling(target: Target) -> Iterator[list[Compiled]]:
    """Compile every launch in the block for `target`; the list holds each distinct kernel once."""
    found: dict[str, Compiled] = {}
    results: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        binary = launch(kernel, *args, **(kwargs | {"warmup": True}))
        if binary.hash not in found:
            found[binary.hash] = _inspect(binary, target)
            results.append(found[binary.hash])

    with ExitStack() as stack:
        stack.enter_context(patched(driver, "_active", AbsentDevice(target.name, target.triton)))
        stack.enter_context(patched(JITFunction, "run", compile_only))
        yield results


def check_registers(compiled: Compiled, cap: int) -> None:
    """Raise GateFailure if a thread needs more than `cap` registers."""
    if compiled.registers > cap:
        raise GateFailure(compiled, "registers", compiled.registers, cap)


def check_no_spills(compiled: Compiled) -> None:
    """Raise GateFailure if a thread keeps registers in memory."""
    if compiled.spills:
        raise GateFailure(compiled, "bytes spilled per thread", compiled.spills, 0)


def check_shared(compiled: Compiled) -> None:
    """Raise GateFailure if a program needs more shared memory than the chip has."""
    if compiled.shared > compiled.target.shared_limit:
        raise GateFailure(
            compiled, "bytes of shared memory", compiled.shared, compiled.target.shared_limit
        )


def check_wide(compiled: Compiled, bits: int = 128) -> None:
    """Raise GateFailure if a tile in the main loops is accessed in pieces narrower than `bits`."""
    for access in compiled.main_accesses:
        if access.bits < bits:
            raise GateFailure(compiled, f"width of the {access}", access.bits, bits)


def check(compiled: Compiled, register_cap: int) -> None:
    """All four checks."""
    check_registers(compiled, register_cap)
    check_no_spills(compiled)
    check_shared(compiled)
    check_wide(compiled)


def _inspect(binary: Any, target: Target) -> Compiled:
    is_amd = target.triton.backend == "hip"
    assembly = binary.asm["amdgcn" if is_amd else "ptx"]
    registers, spills = _amd_usage(assembly) if is_amd else _nvidia_usage(binary.asm["cubin"])
    return Compiled(
        kernel=binary.name,
        target=target,
        warps=binary.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared=binary.metadata.shared,
        accesses=find_accesses(binary.asm["ttgir"], assembly),
    )


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, f"cuobjdump told no resource usage: {text}"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch memory) of a lane."""

    def value(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert found, f"AMD assembly without .{key}"
        return int(found[1])

    return value("vgpr_count"), max(
        value("private_segment_fixed_size"), 4 * value("vgpr_spill_count")
    )
