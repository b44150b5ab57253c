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
    parts, offset, piece = [], 0, 0
    while offset < len(model):
        start = offset
        tag, offset = _varint(model, offset)
        content, offset = _skip(model, tag & 7, offset)
        if tag == 1 << 3 | BYTES:
            if piece in numbers:
                body = _without_type(model[content:offset]) + bytes([3 << 3 | VARINT, CONTROL])
                parts.append(bytes([tag]) + _to_varint(len(body)) + body)
                start = offset
            piece += 1
        parts.append(model[start:offset])
    return b"".join(parts)


def _without_type(message: bytes) -> bytes:
    parts, offset = [], 0
    while offset < len(message):
        start = offset
        tag, offset = _varint(message, offset)
        _, offset = _skip(message, tag & 7, offset)
        if tag >> 3 != 3:
            parts.append(message[start:offset])
    return b"".join(parts)


def _skip(data: bytes, kind: int, offset: int) -> tuple[int, int]:
    """First byte of a field's content, and of what follows it."""
    if kind == BYTES:
        size, offset = _varint(data, offset)
        return offset, offset + size
    if kind == VARINT:
        return offset, _varint(data, offset)[1]
    if kind not in (FIXED32, FIXED64):
        raise RuntimeError(f"a field of wire type {kind}")
    return offset, offset + (4 if kind == FIXED32 else 8)


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset


def _to_varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
