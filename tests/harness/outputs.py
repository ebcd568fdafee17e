"""Writes planned files in the plainest way, for tests of the plans."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from zlib import crc32

import torch

from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.ckpt_io.pickling import tensor_bytes

__all__ = ["write_outputs"]


def write_outputs(
    directory: Path, files: Iterable[OutputFile], tensors: Mapping[tuple[str, Hole], torch.Tensor]
) -> None:
    """Write files, with the tensors by file and hole."""
    for file in files:
        parts = [*file.literals]
        for hole in file.holes:
            tensor = tensors[file.path, hole]
            assert (tuple(tensor.shape), f"torch.{hole.dtype}") == (hole.shape, str(tensor.dtype))
            data = tensor_bytes(tensor)
            assert len(data) == hole.nbytes
            parts.append((hole.offset, data))
            parts += [(at, struct.pack("<I", crc32(data))) for at in hole.crc_offsets]
        parts.sort()
        end = 0
        path = directory / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            for at, data in parts:
                assert at >= end, f"two parts of {file.path} overlap at byte {at}"
                stream.seek(at)
                stream.write(data)
                end = at + len(data)
            assert end <= file.size
            stream.truncate(file.size)
