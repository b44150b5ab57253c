"""The serialized sentencepiece model (protobuf), as far as the kinds of its pieces go.

`ModelProto.pieces` is field 1, each a message of piece (1, string), score (2, float) and type (3,
enum); see sentencepiece_model.proto.
"""

from collections.abc import Collection

CONTROL = 3  # a type whose pieces have ids and are never matched in a text
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def as_control(model: bytes, numbers: Collection[int]) -> bytes:
    """The model with these pieces declared control pieces.

    That is what keeps them out of texts: cutting a text apart inside of them would not, because
    the model normalises characters before it looks for them, and would change the ids around.
    """
    parts, place, piece = [], 0, 0
    while place < len(model):
        start = place
        tag, place = _varint(model, place)
        content, place = _skip(model, tag & 7, place)
        if tag == 1 << 3 | BYTES:
            if piece in numbers:
                body = _without_type(model[content:place]) + bytes([3 << 3 | VARINT, CONTROL])
                parts.append(bytes([tag]) + _to_varint(len(body)) + body)
                start = place
            piece += 1
        parts.append(model[start:place])
    return b"".join(parts)


def _without_type(message: bytes) -> bytes:
    parts, place = [], 0
    while place < len(message):
        start = place
        tag, place = _varint(message, place)
        _, place = _skip(message, tag & 7, place)
        if tag >> 3 != 3:
            parts.append(message[start:place])
    return b"".join(parts)


def _skip(data: bytes, kind: int, place: int) -> tuple[int, int]:
    """First byte of a field's content, and of what follows it."""
    if kind == BYTES:
        size, place = _varint(data, place)
        return place, place + size
    if kind == VARINT:
        return place, _varint(data, place)[1]
    if kind not in (FIXED32, FIXED64):
        raise RuntimeError(f"a field of wire type {kind}")
    return place, place + (4 if kind == FIXED32 else 8)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _to_varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
