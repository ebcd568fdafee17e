"""Files to be written: their fixed bytes, and the holes that tensors will fill.

A format plans its files without knowing where the elements come from; who fills the holes does not
know the format. Bytes that are neither a literal nor in a hole nor a checksum are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Hole", "OutputFile"]


@dataclass(frozen=True, slots=True)
class Hole:
    """A dense row-major tensor in an output file, still to be filled.

    Args:
        offset: Bytes from the start of the file.
        nbytes: Bytes of the tensor.
        dtype: Torch's name of the element type, without ``torch.``.
        shape: Elements in each dimension.
        crc_offsets: Bytes from the start of the file to each four-byte place for the little-endian
            CRC-32 of the hole's bytes, as the zip format wants it; may be empty. Places behind the
            hole, such as a data descriptor, let the file's digest be taken while it is written.
    """

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    crc_offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to be written.

    Args:
        path: Relative to the checkpoint's iteration directory, with forward slashes.
        size: Bytes of the file.
        literals: ``(offset, bytes)`` of what is fixed already, in the order of their offsets;
            disjoint, and disjoint from the holes.
        holes: In the order of their offsets; disjoint.
    """

    path: str
    size: int
    literals: tuple[tuple[int, bytes], ...] = ()
    holes: tuple[Hole, ...] = ()
