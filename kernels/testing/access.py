"""Widths of global memory accesses, read from compiler output.

Triton's GPU dialect tells which loads and stores there are, how large their tiles are, and whether
they stand in a loop. PTX or AMD assembly tells how wide the instructions are. Source positions
connect the two. The position of an inlined function's access includes its call, which may be in a
loop or not.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

# ("file:line:column", "line:column" of the call that was inlined, or ""): PTX tells no more of
# callers.
Position = tuple[str, str]

_ELEMENT_BITS = {
    "f64": 64,
    "i64": 64,
    "f32": 32,
    "i32": 32,
    "bf16": 16,
    "f16": 16,
    "i16": 16,
    "i8": 8,
}
_OPERATION = re.compile(
    r"(?:tt\.|amdg\.|amdgpu\.|ttg\.)"
    r"(load|store|buffer_load|buffer_store|async_copy_global_to_local|buffer_load_to_local)\b"
)
_TILE = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)")
_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_CALLER = re.compile(r"(?:inlined_at \d+ |@\[ [\w.-]+:)(\d+)[ :](\d+)")
_PTX = re.compile(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_PTX_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]")
_AMD = re.compile(r"\b(?:global|buffer|flat)_(?:load|store)_(?:lds_)?(\w+)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}


@dataclass(frozen=True)
class Access:
    """A load or store of a tile: where, how many bytes, and the narrowest instruction it became."""

    verb: str
    source_line: str
    in_loop: bool
    tile_bytes: int
    bits: int

    def __str__(self) -> str:
        return f"{self.verb} of {self.tile_bytes} bytes at {self.source_line}"


def find_accesses(dialect: str, assembly: str) -> tuple[Access, ...]:
    """Every tile access in Triton's GPU dialect, with its width in the assembly made from it.

    An access that became no instruction (the compiler found it to be superfluous) is left out.
    """
    aliases = {m[1]: m[2] for line in dialect.splitlines() if (m := _ALIAS.match(line))}
    widths = _instruction_widths(assembly)
    found = []
    for line, in_loop in _lines_with_loops(dialect):
        operation, tile = _OPERATION.search(line), _TILE.search(line)
        location = re.search(r"loc\((#loc\d*)\)$", line)
        if not operation or not tile or not location:
            continue
        position = _position(location[1], aliases)
        if position in widths:
            elements = math.prod(int(size) for size in tile[1].rstrip("x").split("x"))
            found.append(
                Access(
                    verb="store" if "store" in operation[1] else "load",
                    source_line=position[0].rsplit(":", 1)[0],
                    in_loop=in_loop,
                    tile_bytes=elements * _ELEMENT_BITS.get(tile[2], 8) // 8,
                    bits=min(widths[position]),
                )
            )
    return tuple(found)


def _lines_with_loops(dialect: str) -> list[tuple[str, bool]]:
    """Each line, and whether it stands in a loop."""
    regions = [False]
    lines = []
    for line in dialect.splitlines():
        if line.lstrip().startswith("}"):
            regions.pop()
        lines.append((line, regions[-1]))
        if line.rstrip().endswith("{"):
            regions.append(regions[-1] or "scf.for" in line or "scf.while" in line)
    return lines


def _position(alias: str, aliases: dict[str, str]) -> Position:
    """The source position behind a location alias."""
    chain = _call_chain(alias, aliases)
    return chain[0], chain[1].split(":", 1)[1] if len(chain) > 1 else ""


def _call_chain(alias: str, aliases: dict[str, str]) -> list[str]:
    """ "file:line:column" of an operation, then of the calls around it, innermost first."""
    text = aliases.get(alias, "")
    if source_line := re.match(r'"([^"]*)":(\d+):(\d+)', text):
        return [f"{source_line[1].rsplit('/', 1)[-1]}:{source_line[2]}:{source_line[3]}"]
    return [
        source_line
        for part in re.findall(r"#loc\d*", text)
        for source_line in _call_chain(part, aliases)
    ]


def _instruction_widths(assembly: str) -> dict[Position, set[int]]:
    """Bits of every global memory instruction, by the source position it was made from."""
    widths: dict[Position, set[int]] = defaultdict(set)
    position: Position = ("", "")
    inline = False
    for line in assembly.splitlines():
        if "inline asm" in line:
            inline = "begin" in line
        elif line.lstrip().startswith(".loc"):
            # Within inline assembly LLVM adds one to the line number for every instruction.
            if not inline:
                source_line = re.search(r"(?://|;) ([\w.-]+:\d+:\d+)", line)
                caller = _CALLER.search(line)
                position = (
                    source_line[1] if source_line else "",
                    f"{caller[1]}:{caller[2]}" if caller else "",
                )
        elif bits := _bits(line):
            widths[position].add(bits)
    return widths


def _bits(line: str) -> int:
    """Bits that a line of PTX or AMD assembly loads or stores per thread; 0 for other lines."""
    if found := _PTX.search(line):
        return int(found[1] or 1) * int(found[2])
    if found := _PTX_ASYNC.search(line):
        return int(found[1], 0) * 8
    if found := _AMD.search(line):
        return next((bits for name, bits in _AMD_BITS.items() if name in found[1]), 0)
    return 0
