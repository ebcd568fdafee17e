"""Plans a file or a part of one as ``torch.save`` would write it, before its tensors are there.

A planned archive is byte for byte what ``torch.save`` writes of the same tensors, but for the 40
digits of the serialization id, which torch derives from the checksums and never reads.

Source: torch 2.14, ``caffe2/serialize/inline_container.cc`` by its output; PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from zlib import crc32

from flagscale.ckpt_io.archive import CENTRAL, END, END64, FULL32, LOCAL, LOCATOR
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.ckpt_io.pickling import Leaf, dump_tree, tensor_bytes
from flagscale.ckpt_io.values import TensorSlot
from flagscale.errors import ConfigError
from flagscale.layout.pieces import DTYPE_BYTES

__all__ = ["PlannedArchive", "PlannedFile", "plan_archive", "plan_file"]

_ALIGNMENT: Final = 64
_UTF8, _DESCRIPTOR = 0x800, 0x008


@dataclass(frozen=True)
class PlannedArchive:
    """The bytes of an archive, but for its slots.

    Args:
        size: Bytes of the archive.
        literals: ``(offset, bytes)`` of what is fixed.
        holes: By the key of the slot, in the order of their offsets.
    """

    size: int
    literals: tuple[tuple[int, bytes], ...]
    holes: Mapping[str, Hole]

    def shifted(self, by: int) -> PlannedArchive:
        """The same, ``by`` bytes further on in a larger file."""
        return PlannedArchive(
            self.size,
            tuple((at + by, data) for at, data in self.literals),
            {
                key: replace(
                    hole,
                    offset=hole.offset + by,
                    crc_offsets=tuple(at + by for at in hole.crc_offsets),
                )
                for key, hole in self.holes.items()
            },
        )


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written, and which hole each slot became.

    Args:
        output: The file.
        holes: By the key of the slot.
    """

    output: OutputFile
    holes: Mapping[str, Hole]


def plan_file(path: str, tree: Any) -> PlannedFile:
    """Plan a file that holds one archive, such as ``model_optim_rng.pt``.

    Args:
        path: Relative path; the archive inside is named after the file, as torch does.
        tree: As for :func:`plan_archive`.

    Raises:
        ConfigError: The tree cannot be written.
    """
    planned = plan_archive(tree, path.rpartition("/")[2].removesuffix(".pt"))
    holes = tuple(planned.holes.values())
    return PlannedFile(OutputFile(path, planned.size, planned.literals, holes), planned.holes)


def plan_archive(tree: Any, name: str = "archive") -> PlannedArchive:
    """Plan an archive.

    Args:
        tree: Of plain values, :class:`Foreign`, tensors (small ones: their bytes become part of the
            plan) and :class:`TensorSlot`.
        name: Of the archive inside itself.

    Raises:
        ConfigError: The tree cannot be written, or two slots have the same key.
    """
    pickled, leaves = dump_tree(tree)
    writer = _Writer(name)
    writer.add("data.pkl", pickled)
    writer.add(".format_version", b"1")
    writer.add(".storage_alignment", b"%d" % _ALIGNMENT)
    writer.add("byteorder", b"little")
    for leaf in leaves:
        if isinstance(leaf.content, TensorSlot) and leaf.numel:
            writer.add_hole(leaf, leaf.content.key)
        elif isinstance(leaf.content, TensorSlot):
            writer.add(f"data/{leaf.key}", b"")
        else:
            writer.add(f"data/{leaf.key}", tensor_bytes(leaf.content))
    writer.add("version", b"3\n")
    digest = int.from_bytes(hashlib.sha256(pickled).digest()[:16], "little")
    writer.add(".data/serialization_id", b"%040d" % digest)
    return writer.finish()


class _Writer:
    """Lays out the records of an archive one after another."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._at = 0
        self._literals: list[tuple[int, bytes]] = []
        self._pending: list[bytes] = []  # the literal that ends at ``_at``
        self._holes: dict[str, Hole] = {}
        # Central headers: those up to a checksum that is still to come, and the key of its hole.
        self._central: list[tuple[bytes, str | None]] = []

    def add(self, record: str, content: bytes) -> None:
        wide = self._begin(record, len(content), crc32(content), None)
        self._put(content)
        if content:
            self._put(b"PK\7\x08" + struct.pack("<I", crc32(content)))
            self._put(struct.pack("<2Q" if wide else "<2I", len(content), len(content)))

    def add_hole(self, leaf: Leaf, key: str) -> None:
        if key in self._holes:
            raise ConfigError("two slots of a tree have the same key", got=key)
        nbytes = leaf.numel * DTYPE_BYTES[leaf.dtype]
        wide = self._begin(f"data/{leaf.key}", nbytes, 0, key)
        self._flush()
        offset = self._at
        self._at += nbytes
        self._put(b"PK\7\x08")
        self._flush()
        self._holes[key] = Hole(offset, nbytes, leaf.dtype, leaf.shape, (self._at,))
        self._at += 4
        self._put(struct.pack("<2Q" if wide else "<2I", nbytes, nbytes))

    def finish(self) -> PlannedArchive:
        start = self._at
        for header, key in self._central:
            self._put(header)
            if key is not None:
                self._flush()
                hole = self._holes[key]
                self._holes[key] = replace(hole, crc_offsets=(*hole.crc_offsets, self._at))
                self._at += 4
        size, end = self._at - start, self._at
        count = sum(header.startswith(b"PK\1\2") for header, _ in self._central)
        self._put(END64.pack(b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, size, start))
        self._put(LOCATOR.pack(b"PK\6\7", 0, end, 1))
        count16 = min(count, 0xFFFF)
        size32, start32 = min(size, FULL32), min(start, FULL32)
        self._put(END.pack(b"PK\5\6", 0, 0, count16, count16, size32, start32, 0))
        self._flush()
        return PlannedArchive(self._at, tuple(self._literals), self._holes)

    def _put(self, data: bytes) -> None:
        self._pending.append(data)
        self._at += len(data)

    def _flush(self) -> None:
        if data := b"".join(self._pending):
            self._literals.append((self._at - len(data), data))
        self._pending = []

    def _begin(self, record: str, nbytes: int, crc: int, key: str | None) -> bool:
        """Write the local header; whether the record needs 64-bit sizes."""
        header = self._at
        path = f"{self._name}/{record}".encode()
        flags = _UTF8 | _DESCRIPTOR if nbytes else _UTF8
        large = nbytes >= FULL32
        wide = large or header >= FULL32
        # Torch leaves the sizes to the descriptor behind the content; zip64 has one of them here.
        local_extra = _zip64([nbytes, 0] if large else [], header) if wide else b""
        local_extra += _padding(header, len(path), large)
        self._put(LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(path), len(local_extra)))
        self._put(path + local_extra)
        extra = _zip64([nbytes, nbytes] if large else [], header) if wide else b""
        entry = CENTRAL.pack(
            b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, min(nbytes, FULL32), min(nbytes, FULL32),
            len(path), len(extra), 0, 0, 0, 0, min(header, FULL32),
        )  # fmt: skip
        if key is None:
            self._central.append((entry + path + extra, None))
        else:
            self._central.append((entry[:16], key))
            self._central.append((entry[20:] + path + extra, None))
        return wide


def _zip64(sizes: list[int], header: int) -> bytes:
    values = [*sizes, header] if header >= FULL32 else sizes
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def _padding(header: int, name_size: int, large: bool) -> bytes:
    """The extra field that puts the content of a record at a multiple of 64 bytes."""
    start = header + LOCAL.size + name_size + 4
    if large or header >= FULL32:
        start += 4 + (16 if large else 0) + (8 if header >= FULL32 else 0)
    fill = -start % _ALIGNMENT
    return b"FB" + struct.pack("<H", fill) + b"Z" * fill
