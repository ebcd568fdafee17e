"""Torch's zip archives, as ``torch.save`` writes them, read in place.

An archive is a zip file, uncompressed, with records ``NAME/data.pkl`` (the pickle), ``NAME/data/N``
(the storages, aligned to 64 bytes), ``NAME/byteorder`` and some of no consequence. It may be a
whole file or lie inside one, as those of a ``.distcp`` file do; its offsets count from its own
start.

Source: torch 2.14, ``caffe2/serialize/inline_container.cc`` by its output; PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple
from zlib import crc32

import torch

from flagscale.ckpt_io.allowed import Storage
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.unpickle import unpickle
from flagscale.ckpt_io.values import StoredTensor
from flagscale.errors import CheckpointError
from flagscale.layout.pieces import DTYPE_BYTES

__all__ = [
    "CENTRAL",
    "END",
    "END64",
    "FULL32",
    "LOCAL",
    "LOCATOR",
    "Archive",
    "Record",
    "load_tree",
    "open_archive",
    "read_tensor",
    "read_tree",
]

LOCAL: Final = struct.Struct("<4s5H3I2H")
CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
END: Final = struct.Struct("<4s4H2IH")
END64: Final = struct.Struct("<4sQ2H2I4Q")
LOCATOR: Final = struct.Struct("<4sIQI")
FULL32: Final = 0xFFFFFFFF
"""What a 32-bit field says when the number is in zip64's extra field."""


class Record(NamedTuple):
    """A member of an archive.

    Args:
        header: Bytes from the start of the file to its local header.
        nbytes: Of its content.
        crc: CRC-32 of its content; 0 where the writer was told not to compute it.
    """

    header: int
    nbytes: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """An opened archive.

    Args:
        file: Relative path of the file that holds it.
        prefix: Name of the archive inside itself, with a slash.
        records: By name without the prefix.
    """

    file: str
    prefix: str
    records: Mapping[str, Record]

    def offset(self, sources: Sources, name: str) -> int:
        """Bytes from the start of the file to the content of a record.

        Raises:
            CheckpointError: There is no such record, or its header is damaged.
        """
        where = f"{sources.directory}/{self.file}"
        record = self.records.get(name)
        if record is None:
            raise CheckpointError(
                "a record of an archive is missing", where=where, expected=self.prefix + name
            )
        path = (self.prefix + name).encode()
        header = sources.read(self.file, record.header, LOCAL.size + len(path))
        signature, *_, name_size, extra_size = LOCAL.unpack_from(header)
        if signature != b"PK\3\4" or header[LOCAL.size :] != path:
            raise CheckpointError(
                "a record of an archive does not lie where the table of contents says",
                where=where,
                expected=f"{self.prefix}{name} at byte {record.header}",
                cure="the file is damaged: take another copy",
            )
        return int(record.header + LOCAL.size + name_size + extra_size)

    def read(self, sources: Sources, name: str) -> bytes:
        """The content of a record, checked against its checksum.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        offset = self.offset(sources, name)
        record = self.records[name]
        content = sources.read(self.file, offset, record.nbytes)
        if record.crc and crc32(content) != record.crc:
            raise CheckpointError(
                "a record of an archive does not have the checksum the archive gives",
                where=f"{sources.directory / self.file}, {self.prefix}{name}",
                expected=f"CRC-32 {record.crc:#010x}",
                got=f"{crc32(content):#010x}",
                cure="the file is damaged: take another copy",
            )
        return content

    def storage(self, sources: Sources, key: str) -> Storage:
        """Where the storage ``data/<key>`` lies.

        Raises:
            CheckpointError: There is none.
        """
        offset = self.offset(sources, f"data/{key}")
        nbytes = self.records[f"data/{key}"].nbytes
        if offset + nbytes > sources.size(self.file):
            raise CheckpointError(
                "a tensor ends after the end of its file",
                where=str(sources.directory / self.file),
                expected=f"{nbytes} bytes at {offset}",
                got=f"a file of {sources.size(self.file)} bytes",
            )
        return Storage(self.file, offset, nbytes)

    def tree(self, sources: Sources) -> Any:
        """What the archive holds, with :class:`StoredTensor` for every tensor.

        Raises:
            CheckpointError: It is damaged, or holds what may not be opened.
        """
        pickled = self.read(sources, "data.pkl")
        where = f"{sources.directory / self.file}, {self.prefix}data.pkl"
        return unpickle(pickled, where, lambda key: self.storage(sources, key))


def open_archive(sources: Sources, file: str, base: int = 0, length: int | None = None) -> Archive:
    """Read the table of contents of an archive.

    Args:
        sources: The directory's files.
        file: Relative path of the file that holds the archive.
        base: Bytes from the start of the file to the archive.
        length: Bytes of the archive; by default, to the end of the file.

    Raises:
        CheckpointError: It is no archive of torch's, or is damaged.
    """
    length = sources.size(file) - base if length is None else length
    where = f"{sources.directory}/{file} at byte {base}"
    try:
        count, start, nbytes = _directory_extent(sources, file, base, length)
        table = sources.read(file, base + start, nbytes)
        records = _records(table, count, base, start)
    except (struct.error, ValueError) as error:
        raise CheckpointError(
            "this is not an archive of torch's",
            where=where,
            expected=f"a zip file of {length} bytes, as torch.save writes it",
            got=f"{error}; {_kind(sources.read(file, base, min(length, 2)))}",
            cure="take another copy; files of torch before 1.6 must be saved again with it",
        ) from None
    prefixes = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(prefixes) != 1 or prefixes[0].count("/") != 1:
        raise CheckpointError(
            "an archive does not hold one pickle", where=where, got=f"{len(prefixes)} of them"
        )
    prefix = prefixes[0]
    archive = Archive(
        file,
        prefix,
        {
            name.removeprefix(prefix): record
            for name, record in records.items()
            if name.startswith(prefix)
        },
    )
    if "byteorder" in archive.records and archive.read(sources, "byteorder") != b"little":
        raise CheckpointError(
            "an archive of another byte order", where=where, expected="little", got="big"
        )
    return archive


def _kind(start: bytes) -> str:
    kinds = {b"PK": "it begins as a zip file does", b"\x80\x02": "it begins as a pickle does"}
    return kinds.get(start, "it does not begin as a zip file does")


def _directory_extent(sources: Sources, file: str, base: int, length: int) -> tuple[int, int, int]:
    """Records, and first byte and length of the table of contents, from the archive's start."""
    if base < 0 or length < END.size:
        raise ValueError(f"{length} bytes")
    tail_size = min(length, END.size + LOCATOR.size)
    tail = sources.read(file, base + length - tail_size, tail_size)
    signature, *_, count, nbytes, start, comment = END.unpack(tail[-END.size :])
    if signature != b"PK\5\6" or comment:
        raise ValueError("it does not end as a zip file does")
    limit = length - END.size
    if tail_size > END.size and tail.startswith(b"PK\6\7"):
        end64 = LOCATOR.unpack(tail[: LOCATOR.size])[2]
        if end64 + END64.size > length:
            raise ValueError("its end lies outside itself")
        signature, *_, count, nbytes, start = END64.unpack(
            sources.read(file, base + end64, END64.size)
        )
        if signature != b"PK\6\6":
            raise ValueError("its end is damaged")
        limit = end64
    if start + nbytes > limit:
        raise ValueError("its table of contents lies outside itself")
    return count, start, nbytes


def _records(table: bytes, count: int, base: int, limit: int) -> dict[str, Record]:
    records: dict[str, Record] = {}
    at = 0
    while at < len(table):
        fields = CENTRAL.unpack_from(table, at)
        signature, flags, method, crc = fields[0], fields[3], fields[4], fields[7]
        packed, nbytes, name_size, extra_size, comment_size = fields[8:13]
        header = fields[16]
        name_at = at + CENTRAL.size
        extra_at = name_at + name_size
        name = table[name_at:extra_at].decode()
        extra = table[extra_at : extra_at + extra_size]
        at = extra_at + extra_size + comment_size
        packed, nbytes, header = _large(extra, [nbytes, packed, header])
        if signature != b"PK\1\2" or at > len(table) or name in records:
            raise ValueError("its table of contents is damaged")
        if method or packed != nbytes or flags & 1:
            raise ValueError(f"the record {name!a} is compressed or encrypted")
        if header + nbytes > limit:
            raise ValueError(f"the record {name!a} lies outside it")
        records[name] = Record(base + header, nbytes, crc)
    if len(records) != count:
        raise ValueError(f"its table of contents holds {len(records)} records, not {count}")
    return records


def _large(extra: bytes, sizes: list[int]) -> tuple[int, int, int]:
    """Packed size, size and offset, from zip64's extra field where 32 bits did not suffice."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    for index, value in enumerate(sizes):
        if value == FULL32 and wide:
            sizes[index] = struct.unpack_from("<Q", wide)[0]
            wide = wide[8:]
    return sizes[1], sizes[0], sizes[2]


def read_tree(sources: Sources, file: str, base: int = 0, length: int | None = None) -> Any:
    """What an archive holds; see :func:`open_archive` and :meth:`Archive.tree`."""
    return open_archive(sources, file, base, length).tree(sources)


def read_tensor(sources: Sources, stored: StoredTensor) -> torch.Tensor:
    """Load a tensor; for small ones, such as the states of random generators.

    Raises:
        CheckpointError: The file ends before the tensor does.
    """
    itemsize = DTYPE_BYTES[stored.dtype]
    dtype = getattr(torch, stored.dtype)
    if not stored.numel:
        return torch.empty(stored.shape, dtype=dtype)
    last = sum((n - 1) * step for n, step in zip(stored.shape, stored.strides, strict=True))
    raw = bytearray(sources.read(stored.file, stored.offset, last + itemsize))
    flat = torch.frombuffer(raw, dtype=dtype)
    strides = [step // itemsize for step in stored.strides]
    return flat.as_strided(stored.shape, strides).clone(memory_format=torch.contiguous_format)


def load_tree(directory: Path, tree: Any) -> Any:
    """A small tree with its tensors loaded.

    Args:
        directory: That the tensors' files are relative to.
        tree: As it was read, with :class:`StoredTensor` for its tensors.

    Raises:
        CheckpointError: A file ends before a tensor does.
    """
    if isinstance(tree, StoredTensor):
        with Sources(directory) as sources:
            return read_tensor(sources, tree)
    if isinstance(tree, dict):
        return type(tree)((key, load_tree(directory, value)) for key, value in tree.items())
    if type(tree) in (list, tuple):
        return type(tree)(load_tree(directory, value) for value in tree)
    return tree
