"""Annotation files that are no UTF-8 text: recognised once, instead of a complaint a line."""

import re
from pathlib import Path

GZIP_MAGIC = b"\x1f\x8b"
PACKED = {
    GZIP_MAGIC: "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
    b"PK\x03\x04": "a ZIP archive",
    b"PAR1": "a Parquet file",  # without the ending that says so
}
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Chinese, Japanese and Korean ones: what is not UTF-8 and yet reads as one of them is no accident.
MULTIBYTE = {"GB18030 (GBK)": "gb18030", "Big5": "big5", "Shift JIS": "shift_jis", "EUC": "euc_kr"}
ONE_BYTE = "ISO-8859-1 (Latin-1)"
CONTROLS = re.compile(rb"[\0-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f]")  # in no Latin-1 text
MANY = 3  # lines that are no accident
PROBED_LINES = 1000


def check_encoding(beginning: bytes, file: Path) -> None:
    """Raises ValueError that names the encoding of a file that is not UTF-8 as a whole. A record
    that alone is damaged is none of its business."""
    for magic, kind in PACKED.items():
        if beginning.startswith(magic):
            remedy = "name it .parquet" if magic == b"PAR1" else "unpack it"
            raise ValueError(f"{file} is {kind}; {remedy}")
    found = next((n for mark, n in BYTE_ORDER_MARKS.items() if beginning.startswith(mark)), None)
    if found is None and beginning[:64].count(0) > len(beginning[:64]) // 4:
        found = "UTF-16 or binary"
    guesses = [found] if found is not None else _other_encodings(beginning)
    if guesses:
        raise ValueError(
            f"{file} is {' or '.join(guesses)}, not UTF-8; convert it, for example with "
            f"iconv -f {guesses[0].split()[0]} -t UTF-8, and look at the result"
        )


def _other_encodings(beginning: bytes) -> list[str]:
    """Encodings that a text may have of which no line is UTF-8; none for lines that are damaged."""
    lines = beginning.split(b"\n")[:PROBED_LINES]
    foreign = [line for line in lines if not line.isascii()]
    # The last line may be cut in the middle of a character.
    foreign = foreign if len(foreign) < 2 else foreign[:-1]
    if not foreign or any(_reads_as(line, "utf-8") for line in foreign):
        return []
    text = b"\n".join(foreign)
    fitting = [name for name, code in MULTIBYTE.items() if _reads_as(text, code)]
    is_latin = len(foreign) >= MANY and not CONTROLS.search(text)
    return [*fitting, ONE_BYTE] if fitting or is_latin else []


def _reads_as(text: bytes, code: str) -> bool:
    try:
        text.decode(code)
    except UnicodeDecodeError as error:
        return error.start > len(text) - 4 and len(text) > 64  # only the end is cut
    return True
