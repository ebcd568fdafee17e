"""Text files as a stream of lines, each with its place; plain, gzip or zstd. And JSON lines."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from flagscale.errors import DataError

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

__all__ = ["MalformedLineError", "SourceFile", "SourceStamp", "json_texts", "uncompressed_suffix"]

_CHUNK_BYTES = 1 << 20
_COMPRESSED_SUFFIXES = (".gz", ".zst")


@dataclass(frozen=True)
class SourceStamp:
    """What tells one state of a file from another without reading it.

    Args:
        path: Absolute path.
        size: Bytes on disk.
        mtime_ns: Modification time in nanoseconds.
    """

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Self:
        """Stamp an existing file.

        Raises:
            DataError: There is no such regular file.
        """
        absolute = Path(path).absolute()
        if not absolute.is_file():
            raise DataError(
                "input is not a readable file",
                where=str(path),
                expected="an existing file",
                got="a directory" if absolute.is_dir() else "nothing there",
                cure="check the path",
            )
        status = absolute.stat()
        return cls(str(absolute), status.st_size, status.st_mtime_ns)


class SourceFile:
    """An open text file, read once from start to end; compression is told by the name's ending.

    Args:
        path: A file, ``.gz`` and ``.zst`` (of any number of frames) decompressed on the way.

    Raises:
        DataError: The file is missing, damaged or cut short, or zstd support is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        if self._path.suffix == ".zst":
            _require_zstandard(self._path)
        try:
            self._raw: BinaryIO = self._path.open("rb")
        except OSError as error:
            raise DataError(
                "cannot open the input", where=str(path), got=error.strerror, cure="check the path"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._raw.close()

    @property
    def disk_bytes_read(self) -> int:
        """Bytes read so far as they lie on disk; for progress only."""
        return self._raw.tell()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line with its end, and its byte offset in the uncompressed stream.

        Only a line feed ends a line, so that offsets are the same for every reader.

        Yields:
            ``(offset, line)``; all lines joined are the stream, byte for byte.
        """
        offset = 0
        pending: list[bytes] = []
        for chunk in self.chunks():
            first, *rest = chunk.split(b"\n")
            pending.append(first)
            for piece in rest:
                line = b"".join([*pending, b"\n"])
                yield offset, line
                offset += len(line)
                pending = [piece]
        if last := b"".join(pending):
            yield offset, last

    def chunks(self) -> Iterator[bytes]:
        """The uncompressed stream in pieces of no particular size."""
        try:
            match self._path.suffix:
                case ".gz":
                    stream = cast("BinaryIO", gzip.GzipFile(fileobj=self._raw, mode="rb"))
                    yield from iter(lambda: stream.read(_CHUNK_BYTES), b"")
                case ".zst":
                    yield from _zstd_chunks(self._raw)
                case _:
                    yield from iter(lambda: self._raw.read(_CHUNK_BYTES), b"")
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                "the compressed input is damaged or cut short",
                where=str(self._path),
                got=str(error),
                cure="copy or download the file again",
            ) from error


def uncompressed_suffix(path: str | os.PathLike[str]) -> str:
    """The ending that tells the content: ``.jsonl`` for ``a.jsonl`` and for ``a.jsonl.zst``."""
    name = Path(path)
    return name.with_suffix("").suffix if name.suffix in _COMPRESSED_SUFFIXES else name.suffix


class MalformedLineError(ValueError):
    """A line is not what it should be; the caller knows which line and raises a DataError."""


def json_texts(line: bytes, keys: Sequence[str]) -> list[str]:
    """The named string fields of one JSON line, in the order of the keys.

    Raises:
        MalformedLineError: Not UTF-8, not JSON, not an object, or a field that is missing, is no
            string, or holds half a surrogate pair, which no tokenizer accepts.
    """
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise MalformedLineError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise MalformedLineError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise MalformedLineError("not JSON we can read: nested too deeply") from error
    if not isinstance(record, dict):
        raise MalformedLineError(f"a JSON object is expected, this is a {type(record).__name__}")
    texts = []
    for key in keys:
        text = record.get(key)
        if not isinstance(text, str):
            found = f"is a {type(text).__name__}" if key in record else "is missing"
            raise MalformedLineError(f"the field {key!r} {found}, a string is expected")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MalformedLineError(
                f"the field {key!r} holds half a surrogate pair at character {error.start}"
            ) from error
        texts.append(text)
    return texts


def _require_zstandard(path: Path) -> None:
    try:
        import zstandard  # noqa: F401  # optional, so found out before any work is done
    except ImportError as error:
        raise DataError(
            "reading .zst needs the zstandard package",
            where=str(path),
            cure="pip install zstandard, or decompress the file first",
        ) from error


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    """Decompress frame after frame.

    zstandard's own stream reader stops without a word at the end of a truncated file (and, by
    default, after the first of several frames), which would lose documents silently.
    """
    import zstandard

    # Files made with `zstd --long=31` need a window beyond the default limit.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame: ZstdDecompressionObj | None = None
    try:
        while data := raw.read(_CHUNK_BYTES):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise OSError(str(error)) from error
    if frame is not None:
        raise EOFError("the last frame has no end")
