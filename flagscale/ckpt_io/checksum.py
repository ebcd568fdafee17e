"""CRC-32 of a whole from the CRC-32 of its parts.

Source: zlib's documentation of ``crc32_combine``; the arithmetic is that of polynomials over GF(2).
"""

from __future__ import annotations

from typing import Final

__all__ = ["combine_crc32"]

_POLYNOMIAL: Final = 0xEDB88320  # of CRC-32, lowest power in the highest bit
_ONE: Final = 1 << 31
_BYTE: Final = 1 << 23  # x to the power of 8


def combine_crc32(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of two byte strings joined, of which the second has ``second_nbytes`` bytes."""
    shift, power = _ONE, _BYTE
    while second_nbytes:
        if second_nbytes & 1:
            shift = _multiply(shift, power)
        power = _multiply(power, power)
        second_nbytes >>= 1
    return _multiply(shift, first) ^ second


def _multiply(a: int, b: int) -> int:
    product, bit = 0, _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product
