"""Annotation files that are no UTF-8 text: recognised once, instead of a complaint a line."""

from pathlib import Path

GZIP_MAGIC = b"\x1f\x8b"
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Chinese, Japanese and Korean ones: what is not UTF-8 and yet reads as one of them is no accident.
MULTIBYTE = {"GB18030 (GBK)": "gb18030", "Big5": "big5", "Shift JIS": "shift_jis", "EUC": "euc_kr"}
PROBED_LINES = 1000


def check_encoding(beginning: bytes, file: Path) -> None:
    """Raises ValueError that names the encoding of a file that is not UTF-8 as a whole. A record
    that alone is damaged is none of its business."""
    if beginning.startswith(GZIP_MAGIC):
        raise ValueError(f"{file} is compressed with gzip; unpack it")
    found = next((n for mark, n in BYTE_ORDER_MARKS.items() if beginning.startswith(mark)), None)
    if found is None and beginning[:64].count(0) > len(beginning[:64]) // 4:
        found = "UTF-16 or binary"
    found = found or _multibyte(beginning)
    if found is not None:
        raise ValueError(
            f"{file} is {found}, not UTF-8; convert it, for example with "
            f"iconv -f {found.split()[0]} -t UTF-8"
        )


def _multibyte(beginning: bytes) -> str | None:
    lines = beginning.split(b"\n")[:PROBED_LINES]
    foreign = [line for line in lines if not line.isascii()]
    # The last line may be cut in the middle of a character.
    foreign = foreign if len(foreign) < 2 else foreign[:-1]
    if not foreign or any(_reads_as(line, "utf-8") for line in foreign):
        return None
    text = b"\n".join(foreign)
    return next((name for name, code in MULTIBYTE.items() if _reads_as(text, code)), None)


def _reads_as(text: bytes, code: str) -> bool:
    try:
        text.decode(code)
    except UnicodeDecodeError as error:
        return error.start > len(text) - 4 and len(text) > 64  # only the end is cut
    return True
