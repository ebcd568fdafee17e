"""Whether the files of a checkpoint are there, whole, and as they were written."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final
from zlib import crc32

from flagscale.ckpt_io.archive import Archive, open_archive, read_tree
from flagscale.ckpt_io.legacy import RankKey, rank_directory
from flagscale.ckpt_io.manifest import MANIFEST, digest_file, read_manifest
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.torch_dist import METADATA_FILE, read_metadata
from flagscale.errors import CheckpointError, FlagScaleError
from flagscale.layout.pieces import Piece
from flagscale.optim.doctor.findings import Finding, Kind
from flagscale.optim.job import Job

__all__ = ["check_archives", "check_files", "check_manifest"]

Advance = Callable[[int], None]

_BLOCK: Final = 4 << 20  # bytes
_MODEL: Final = "model_optim_rng.pt"
_OPTIMIZER: Final = "distrib_optim.pt"


def check_files(directory: Path, ckpt_format: str) -> list[Finding]:
    """Every file that is missing, too short or not readable, of a checkpoint that does not open.

    Args:
        directory: Of the iteration.
        ckpt_format: Upstream's name of the format.
    """
    check = _check_torch_dist if ckpt_format == "torch_dist" else _check_legacy
    with Sources(directory) as sources:
        return list(check(sources))


def _check_torch_dist(sources: Sources) -> Iterator[Finding]:
    try:
        table = read_metadata(sources)
    except CheckpointError as error:
        yield _unreadable(METADATA_FILE, error)
        return
    by_file: dict[str, list[tuple[int, str]]] = {}
    for (key, _), place in table.places.items():
        by_file.setdefault(place.file, []).append((place.offset + place.nbytes, key))
    for file, ends in sorted(by_file.items()):
        try:
            size = sources.size(file)
        except CheckpointError as error:
            needed = max(ends)[0]
            kind = Kind.SHORT if _is_there(sources.directory, file) else Kind.MISSING
            what = f"{error.what}: {needed:,} bytes or more, of {_names(key for _, key in ends)}"
            yield Finding(kind, file, what, needed, needed)
            continue
        cut = [(end, key) for end, key in ends if end > size]
        if cut:
            needed = max(cut)[0]
            what = (
                f"{size:,} of at least {needed:,} bytes: it ends before or in "
                f"{_names(key for _, key in cut)}"
            )
            yield Finding(Kind.SHORT, file, what, needed - size, needed)
            continue
    for (key, _), place in table.places.items():
        try:
            read_tree(sources, place.file, place.offset, place.nbytes)
        except CheckpointError as error:
            if place.offset + place.nbytes <= _size(sources, place.file):
                yield _unreadable(f"{place.file}, {key}", error)


def _check_legacy(sources: Sources) -> Iterator[Finding]:
    names = sorted(path.name for path in sources.directory.glob("mp_rank_*") if path.is_dir())
    job = None
    for name in names:
        for file in (f"{name}/{_MODEL}", f"{name}/{_OPTIMIZER}"):
            try:
                tree = read_tree(sources, file)
            except CheckpointError as error:
                there = _is_there(sources.directory, file)
                yield _unreadable(file, error, Kind.SHORT if there else Kind.MISSING)
                continue
            if job is None and file.endswith(_MODEL) and isinstance(tree, dict):
                try:
                    job = Job.saved(tree.get("args"), file)
                except FlagScaleError:
                    continue
    for name in _rank_names(job) if job else ():
        if name not in names:
            yield Finding(Kind.MISSING, name, "the directory of a rank is missing")


def _rank_names(job: Job) -> list[str]:
    at = job.layout
    places = {
        RankKey(
            at.coordinates(rank).tp_rank,
            at.coordinates(rank).pp_rank,
            at.expert_coordinates(rank).ep_rank,
        )
        for rank in range(at.world_size)
    }
    return [
        rank_directory(place, pipeline=at.pp_size > 1, experts=at.ep_size > 1)
        for place in sorted(places)
    ]


def _unreadable(where: str, error: CheckpointError, kind: Kind = Kind.SHORT) -> Finding:
    got = "" if error.got is None else f": {error.got}"
    return Finding(kind, where, f"{error.what}{got}")


def _names(keys: Iterator[str] | Sequence[str]) -> str:
    names = list(dict.fromkeys(keys))
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def _is_there(directory: Path, file: str) -> bool:
    return os.path.exists(os.path.join(directory, file))  # of any name, however long


def _size(sources: Sources, file: str) -> int:
    try:
        return sources.size(file)
    except CheckpointError:
        return -1


def check_manifest(directory: Path, advance: Advance) -> tuple[list[Finding], str]:
    """Hold every file to the manifest: what is wrong, and what was looked at."""
    findings: list[Finding] = []
    try:
        digests = read_manifest(directory)
    except CheckpointError as error:
        return [_unreadable(MANIFEST, error)], ""
    with Sources(directory) as sources:
        for file, expected in digests.items():
            try:
                got = digest_file(sources, file)
            except CheckpointError as error:
                there = _is_there(directory, file)
                findings.append(_unreadable(file, error, Kind.SHORT if there else Kind.MISSING))
                continue
            advance(sources.size(file))
            if got != expected:
                what = (
                    f"its SHA-256 is {got[:16]}..., not {expected[:16]}... as when it was written"
                )
                findings.append(Finding(Kind.CHANGED, file, what))
    return findings, f"SHA-256 of {len(digests)} files, by {MANIFEST}"


def check_archives(
    directory: Path, ckpt_format: str, pieces: Sequence[Piece], advance: Advance
) -> tuple[list[Finding], str]:
    """Hold every record of every archive to its checksum: what is wrong, and what was looked at.

    Args:
        directory: Of the iteration.
        ckpt_format: Upstream's name of the format.
        pieces: Of the checkpoint, for the names; empty where it does not open.
        advance: Called with the bytes of each record.
    """
    findings: list[Finding] = []
    count = 0
    names = _Names(pieces)
    with Sources(directory) as sources:
        for file, base, length, key in _archives(sources, ckpt_format):
            try:
                archive = open_archive(sources, file, base, length)
                for record in archive.records:
                    good = _verify_record(sources, archive, record, advance)
                    count += good is not None
                    if good is False:
                        start = archive.offset(sources, record)
                        nbytes = archive.records[record].nbytes
                        inside = names.within(file, start, start + nbytes)
                        what = f"{key or record}: {nbytes:,} bytes do not have their checksum"
                        what += f" ({_names(inside)})" if inside else ""
                        findings.append(Finding(Kind.CHANGED, file, what, nbytes, nbytes))
            except CheckpointError as error:
                if pieces:  # else it was reported as a file that cannot be read
                    findings.append(_unreadable(file, error))
    return findings, f"CRC-32 of {count:,} records of archives"


def _archives(sources: Sources, ckpt_format: str) -> Iterator[tuple[str, int, int | None, str]]:
    if ckpt_format != "torch_dist":
        for path in sorted(sources.directory.glob("mp_rank_*/*.pt")):
            yield path.relative_to(sources.directory).as_posix(), 0, None, ""
        return
    try:
        table = read_metadata(sources)
    except CheckpointError:
        return
    for (key, _), place in table.places.items():
        if place.offset + place.nbytes <= _size(sources, place.file):
            yield place.file, place.offset, place.nbytes, key


def _verify_record(sources: Sources, archive: Archive, name: str, advance: Advance) -> bool | None:
    """Whether a record has its checksum; ``None`` where the archive gives none."""
    record = archive.records[name]
    advance(record.nbytes)
    if not record.crc:
        return None
    start, crc = archive.offset(sources, name), 0
    for at in range(0, record.nbytes, _BLOCK):
        size = min(_BLOCK, record.nbytes - at)
        crc = crc32(sources.read(archive.file, start + at, size), crc)
    return crc == record.crc


class _Names:
    """Which tensors lie in a part of a file."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._by_file: dict[str, list[tuple[int, str]]] = {}
        for piece in pieces:
            place = (piece.region.offset, f"{piece.tensor.kind} {piece.tensor.name}")
            self._by_file.setdefault(piece.region.file, []).append(place)
        for places in self._by_file.values():
            places.sort()

    def within(self, file: str, start: int, stop: int) -> list[str]:
        """The tensors that begin there."""
        places = self._by_file.get(file, [])
        low, high = bisect_left(places, (start, "")), bisect_left(places, (stop, ""))
        return [name for _, name in places[low:high]]
