"""Read back what was written: the holes of output files against their checksums.

Whole files are held against their digests by :func:`flagscale.ckpt_io.manifest.verify_manifest`.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.ckpt_io.raw import disk_errors
from flagscale.ckpt_io.sources import Sources

__all__ = ["read_back_holes"]

_BLOCK_BYTES: Final = 512 << 10


def read_back_holes(
    directory: Path,
    files: Sequence[OutputFile],
    hole_crcs: Mapping[str, tuple[int, ...]],
    *,
    sample_bytes: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Read holes from the disk, not from the caches as far as the kernel lets go of them.

    Args:
        directory: Holds the files, which have reached the disk.
        files: As they were planned.
        hole_crcs: CRC-32 of the holes of each file, as the execution reports them.
        sample_bytes: Stop after holes of so many bytes, drawn at random; default: read all.
        seed: Of the draw.

    Returns:
        The holes that hold something else, in words.

    Raises:
        CheckpointError: A file cannot be read or is too short.
    """
    holes = [
        (file.path, hole, crc)
        for file in files
        for hole, crc in zip(file.holes, hole_crcs[file.path], strict=True)
    ]
    if sample_bytes is not None:
        random.Random(seed).shuffle(holes)
    wrong, done = [], 0
    with Sources(directory) as sources:
        for path, hole, crc in holes:
            if sample_bytes is not None and done >= sample_bytes:
                break
            found = _crc_on_disk(sources, directory, path, hole)
            if found != crc:
                wrong.append(
                    f"{path}: the {hole.nbytes} bytes at {hole.offset} have CRC-32 {found:08x} "
                    f"instead of {crc:08x}"
                )
            done += hole.nbytes
    return wrong


def _crc_on_disk(sources: Sources, directory: Path, path: str, hole: Hole) -> int:
    with disk_errors(directory / path), (directory / path).open("rb") as stream:
        os.posix_fadvise(stream.fileno(), hole.offset, hole.nbytes, os.POSIX_FADV_DONTNEED)
    block = memoryview(bytearray(min(_BLOCK_BYTES, hole.nbytes)))
    crc = 0
    for start in range(0, hole.nbytes, _BLOCK_BYTES):
        part = block[: hole.nbytes - start]
        sources.read_into(path, hole.offset + start, part)
        crc = zlib.crc32(part, crc)
    return crc
