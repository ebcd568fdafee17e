"""The sidecar of a preprocessed dataset: which line of which file each document came from.

Beside ``<dataset>.bin`` and ``<dataset>.idx`` lie

    <dataset>.source.npy    one packed row of 24 bytes a document, in document order
    <dataset>.source.json   the source files, and how the dataset was made

Needs numpy, neither torch nor megatron. A look-up is one ``pread`` of 24 bytes, so it costs the
same in a dataset of a thousand documents and of a thousand million.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tokenize import TokenError
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from flagscale.data.sources import SourceFile, SourceStamp
from flagscale.errors import DataError

__all__ = ["ROW_DTYPE", "SourceLocation", "SourceMap", "write_sidecar"]

ROW_DTYPE = np.dtype([("file", "<u4"), ("length", "<u4"), ("line", "<u8"), ("offset", "<u8")])
"""``file`` indexes the list in ``.source.json``; ``line`` is 0-based; ``offset`` and ``length`` are
bytes of the uncompressed stream, the line's end not counted."""


@dataclass(frozen=True)
class SourceLocation:
    """Where a document was read.

    Args:
        path: The source file.
        line: 0-based line number.
        offset: First byte of the line, in the uncompressed stream.
        length: Bytes of the line, without its end.
    """

    path: Path
    line: int
    offset: int
    length: int


class SourceMap:
    """Document ordinal -> source line, for one preprocessed dataset.

    Args:
        prefix: The dataset without its ending, as given to ``--data-path``.

    Raises:
        DataError: The sidecar is missing or is not one of ours.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self._prefix = Path(prefix)
        rows_path, about_path = sidecar_paths(self._prefix)
        try:
            self.about: dict[str, Any] = json.loads(about_path.read_text(encoding="utf-8"))
            self._rows = rows_path.open("rb")
        except (OSError, ValueError) as error:
            raise DataError(
                "the dataset has no readable sidecar",
                where=str(about_path),
                got=str(error),
                cure="preprocess the source again with tools/preprocess_data.py",
            ) from error
        try:
            self._header_bytes, self._documents = self._read_header(rows_path)
            folder = self._prefix.absolute().parent
            self.files = tuple(
                SourceStamp(str(folder / entry["path"]), entry["size"], entry["mtime_ns"])
                for entry in self.about["files"]
            )
        except BaseException:
            self._rows.close()
            raise

    def _read_header(self, path: Path) -> tuple[int, int]:
        """``(bytes before the first row, number of rows)``."""
        try:
            npy_format.read_magic(self._rows)
            shape, _, dtype = npy_format.read_array_header_1_0(self._rows)
            start = self._rows.tell()
            if dtype != ROW_DTYPE or path.stat().st_size != start + shape[0] * dtype.itemsize:
                raise ValueError(f"shape {shape}, dtype {dtype}, {path.stat().st_size} bytes")
        # numpy parses a header as Python, and raises what that raises.
        except (ValueError, TypeError, IndexError, SyntaxError, TokenError) as error:
            raise DataError(
                "the sidecar is not one of ours, or was cut short",
                where=str(path),
                expected=f"whole rows of {ROW_DTYPE}",
                got=str(error),
                cure="preprocess the source again with tools/preprocess_data.py",
            ) from error
        return start, shape[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file of rows."""
        self._rows.close()

    def __len__(self) -> int:
        """The number of documents."""
        return self._documents

    def locate(self, document: int) -> SourceLocation:
        """Where a document was read.

        Args:
            document: 0-based document ordinal in the dataset.

        Raises:
            DataError: There is no such document.
        """
        if not 0 <= document < self._documents:
            raise DataError(
                "no such document",
                where=str(self._prefix),
                expected=f"0 <= document < {self._documents}",
                got=document,
                cure="check that the document ordinal is of this dataset",
            )
        start = self._header_bytes + document * ROW_DTYPE.itemsize
        packed = os.pread(self._rows.fileno(), ROW_DTYPE.itemsize, start)
        file, length, line, offset = np.frombuffer(packed, ROW_DTYPE)[0].item()
        return SourceLocation(Path(self.files[file].path), line, offset, length)

    def read_line(self, document: int) -> bytes:
        """The source line of a document, without its end.

        A plain file is read in place; a compressed one is decompressed up to the line.

        Raises:
            DataError: There is no such document, or its file is gone or of another size.
        """
        location = self.locate(document)
        stamp = SourceStamp.of(location.path)
        recorded = next(file for file in self.files if file.path == str(location.path))
        if stamp.size != recorded.size:
            raise DataError(
                "a source file has changed since it was preprocessed",
                where=str(location.path),
                expected=f"{recorded.size} bytes",
                got=f"{stamp.size} bytes",
                cure="restore the file, or preprocess it again",
            )
        if location.path.suffix in (".gz", ".zst"):
            with SourceFile(location.path) as source:
                _, line = next(islice(source.lines(), location.line, None))
            return line[: location.length]
        with location.path.open("rb") as stream:
            return os.pread(stream.fileno(), location.length, location.offset)


def sidecar_paths(prefix: Path) -> tuple[Path, Path]:
    """``(rows, description)`` of a dataset."""
    return Path(f"{prefix}.source.npy"), Path(f"{prefix}.source.json")


def write_sidecar(
    staged: tuple[Path, Path],
    prefix: Path,
    documents: int,
    rows: Iterable[npt.NDArray[np.void]],
    files: Sequence[SourceStamp],
    about: Mapping[str, object],
) -> None:
    """Write rows and description to where they wait to be published.

    Args:
        staged: The two files to write.
        prefix: The dataset they will belong to. Source files in its folder, or below, are recorded
            relative to it, so that the folder can be moved as a whole; others are absolute.
        documents: How many rows there are in all.
        rows: Runs of :data:`ROW_DTYPE` in document order, so that no more than one is in memory.
        files: What the ``file`` field of a row indexes.
        about: Further entries of the description.
    """
    folder = prefix.absolute().parent
    entries = []
    for stamp in files:
        path = Path(stamp.path)
        inside = path.is_relative_to(folder)
        entries.append(asdict(stamp) | {"path": str(path.relative_to(folder) if inside else path)})
    with staged[0].open("wb") as stream:
        npy_format.write_array_header_1_0(
            stream,
            {
                "descr": npy_format.dtype_to_descr(ROW_DTYPE),
                "fortran_order": False,
                "shape": (documents,),
            },
        )
        for run in rows:
            stream.write(run.tobytes())
    description = {"files": entries, **about}
    staged[1].write_text(
        json.dumps(description, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
