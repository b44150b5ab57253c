"""CRC-32 of bytes that were summed in parts, as zlib's `crc32_combine` has it, which Python hides.

A CRC is the rest of a division of polynomials over GF(2); zlib writes the coefficient of x^0 as the
highest bit. Bytes that follow shift the earlier ones: they multiply them by x^8 each.
"""

_DIVISOR = 0xEDB88320
_ONE, _BYTE = 1 << 31, 1 << 23  # x^0 and x^8


def joined(first: int, second: int, length: int) -> int:
    """CRC-32 of A + B from those of A and of B, which has `length` bytes."""
    shift, power = _ONE, _BYTE  # x^(8 · length) by its binary digits
    while length:
        if length & 1:
            shift = _product(shift, power)
        power = _product(power, power)
        length >>= 1
    return _product(shift, first) ^ second


def _product(a: int, b: int) -> int:
    """a · b modulo the divisor."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_DIVISOR if b & 1 else 0)  # times x
    return product
