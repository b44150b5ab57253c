"""Image cells of a benchmark's table: base64, a reference to another row, or a list of them."""

import ast
import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.check import locate, read_image
from megatron_gmai.data.sources.mixture import Source

MAX_REFERENCE = 64  # characters; VLMEvalKit takes longer cells for base64
MAX_IMAGE_BYTES = 64 * 1024**2
MAX_IMAGES = 64
# One text of a list literal. Possessive: nothing is kept for a way back, however long the cell is.
_ENTRY = re.compile(r"""\s*('(?:[^'\\]++|\\.)*+'|"(?:[^"\\]++|\\.)*+")\s*(?:,\s*|\Z)""", re.DOTALL)


def split_cell(cell: str) -> list[str]:
    """The entries of a cell: those of a Python list literal, else the cell itself.

    Of Python's syntax only texts are known, one after the other: a parser of all of it would take
    a hundred bytes of memory for each of the cell. Raises BadSample for lists of anything else.
    """
    if not (len(cell) > 1 and cell[0] == "[" and cell[-1] == "]"):
        return [cell] if cell else []
    entries: list[str] = []
    for entry in _literals(cell[1:-1]):
        if len(entries) == MAX_IMAGES:
            raise BadSample(f"more than {MAX_IMAGES} images")
        try:
            entries.append(ast.literal_eval(entry))
        except (ValueError, SyntaxError, MemoryError) as error:
            raise BadSample("the image cell is not a list of texts") from error
    if not entries or not all(entries):
        raise BadSample("the image cell is not a list of texts")
    return entries


def _literals(listed: str) -> Iterator[str]:
    """The literals between the brackets of a list."""
    position = 0
    while position < len(listed):
        found = _ENTRY.match(listed, position)
        if found is None:
            raise BadSample("the image cell is not a list of texts")
        yield found[1]
        position = found.end()


def to_bytes(cell: str) -> bytes:
    """Decodes base64, which may be broken into lines. Raises BadSample."""
    if len(cell) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise BadSample(f"an image of more than {MAX_IMAGE_BYTES} bytes")
    try:
        return base64.b64decode("".join(cell.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("the image cell is not base64") from error


def to_cell(images: list[bytes]) -> str:
    """The cell that holds these image files."""
    texts = [base64.b64encode(data).decode() for data in images]
    return texts[0] if len(texts) == 1 else repr(texts)


def read_file(name: str, *folders: Path) -> bytes:
    """The image file of this name in one of the folders, of bounded size. Raises BadSample, also
    for names that lead out of the folder."""
    source = Source("", (), folders)
    found = locate(name, source)
    if found.size > MAX_IMAGE_BYTES:
        raise BadSample(f"image {name}: larger than {MAX_IMAGE_BYTES} bytes")
    return read_image(name, source, found)
