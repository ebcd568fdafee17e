"""Random checkpoints of raw bytes: tensors, boxes, regions, holes, and what must come out."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.layout.boxes import Box, flat_boxes
from flagscale.layout.pieces import DTYPE_BYTES, Piece, Region, TensorKey

KINDS: dict[str, Any] = {"float32": "<u4", "bfloat16": "<u2", "uint8": "u1", "int64": "<u8"}
PLACE = b"?crc"


@dataclass
class Case:
    """A reshard and its answer."""

    sources: list[Piece] = field(default_factory=list)
    source_bytes: dict[str, bytearray] = field(default_factory=dict)
    files: list[OutputFile] = field(default_factory=list)
    targets: list[Piece] = field(default_factory=list)
    expected: dict[str, bytes] = field(default_factory=dict)

    def write_sources(self, root: Path) -> Path:
        for name, data in self.source_bytes.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        return root

    @property
    def source_sizes(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.source_bytes.items()}


def partition(rng: random.Random, shape: tuple[int, ...], parts: int) -> list[Box]:
    """Cut a tensor into boxes."""
    boxes = [Box.whole(shape)]
    for _ in range(parts):
        box = boxes.pop(rng.randrange(len(boxes)))
        dims = [dim for dim, size in enumerate(box.shape) if size > 1]
        if not dims:
            boxes.append(box)
            continue
        dim = rng.choice(dims)
        at = rng.randrange(1, box.shape[dim])
        low, high = list(box.shape), list(box.shape)
        low[dim], high[dim] = at, box.shape[dim] - at
        shift = [at if each == dim else 0 for each in range(len(shape))]
        boxes += [Box(box.offset, tuple(low)), Box(box.offset, tuple(high)).shifted(tuple(shift))]
    rng.shuffle(boxes)
    return boxes


def strides_of(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(size * prod(shape[dim + 1 :]) for dim in range(len(shape)))


def part_of(values: np.ndarray, box: Box) -> np.ndarray:
    slices = zip(box.offset, box.stop, strict=True)
    return values[tuple(slice(first, last) for first, last in slices)]


def draw_tensor(rng: random.Random) -> tuple[np.ndarray, str]:
    dtype = rng.choice(list(KINDS))
    shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 4)))
    high = 1 << (8 * DTYPE_BYTES[dtype])
    values = [rng.randrange(high) for _ in range(prod(shape))]
    return np.array(values, dtype=KINDS[dtype]).reshape(shape), dtype


def add_source(
    case: Case, rng: random.Random, key: TensorKey, values: np.ndarray, dtype: str
) -> None:
    """Lay a tensor out in source files, in boxes or in shards of a flat buffer."""
    size = DTYPE_BYTES[dtype]

    def room(nbytes: int) -> tuple[str, int]:
        name = f"{rng.choice('abc')}.bin"
        data = case.source_bytes.setdefault(name, bytearray())
        data += rng.randbytes(rng.randrange(5))  # not aligned to anything
        offset = len(data)
        data += rng.randbytes(nbytes)
        return name, offset

    def lay(box: Box, name: str, offset: int, strides: tuple[int, ...]) -> None:
        data = case.source_bytes[name]
        view = np.ndarray(box.shape, values.dtype, data, offset, strides)
        view[...] = part_of(values, box)
        case.sources.append(Piece(key, box, dtype, Region(name, offset, strides)))

    if rng.random() < 0.4:
        cuts = sorted({0, values.size, *(rng.randint(0, values.size) for _ in range(3))})
        for start, stop in itertools.pairwise(cuts):
            name, offset = room((stop - start) * size)
            for box in flat_boxes(values.shape, start, stop):
                lay(box, name, offset, strides_of(box.shape, size))
                offset += box.numel * size
    else:
        for box in partition(rng, values.shape, rng.randrange(6)):
            wider = tuple(count + rng.choice((0, 0, 2)) for count in box.shape)
            name, offset = room(prod(wider) * size)
            lay(box, name, offset, strides_of(wider, size))
    for _ in range(rng.randrange(2)):  # a replica that must not be read: it holds something else
        piece = rng.choice(case.sources)
        name, offset = room(piece.box.numel * DTYPE_BYTES[piece.dtype])
        strides = strides_of(piece.box.shape, DTYPE_BYTES[piece.dtype])
        region = Region(name, offset, strides)
        case.sources.append(Piece(piece.tensor, piece.box, piece.dtype, region))


def add_target(
    case: Case,
    rng: random.Random,
    tensors: list[tuple[TensorKey, np.ndarray, str]],
    path: str,
    crc_first: bool,
) -> None:
    """Lay tensors out in the holes of one file, between literals."""
    literals: list[tuple[int, bytes]] = []
    holes: list[Hole] = []
    pieces: list[Piece] = []
    data = bytearray()

    def literal(places: int) -> tuple[int, ...]:
        """Some fixed bytes, zeros, and room for checksums; where that is."""
        text = rng.randbytes(rng.randrange(9))
        if text:
            literals.append((len(data), text))
        data.extend(text + bytes(rng.randrange(4)))
        start = len(data)
        data.extend(PLACE * places)
        return tuple(start + 4 * index for index in range(places))

    def hole(shape: tuple[int, ...], dtype: str, fill: Callable[[Any, int], None]) -> None:
        nbytes = prod(shape) * DTYPE_BYTES[dtype]
        before = literal(1) if crc_first else literal(0)
        offset = len(data)
        content = np.zeros(shape, KINDS[dtype])
        fill(content, offset)
        data.extend(content.tobytes())
        places = before + literal(rng.randrange(3))
        holes.append(Hole(offset, nbytes, dtype, shape, places))
        for at in places:
            data[at : at + 4] = zlib.crc32(content.tobytes()).to_bytes(4, "little")

    for key, values, dtype in tensors:
        size = DTYPE_BYTES[dtype]

        def boxes(
            content: Any,
            offset: int,
            key: TensorKey = key,
            values: np.ndarray = values,
            dtype: str = dtype,
            size: int = size,
        ) -> None:
            """The tensor twice, stacked, in boxes: strided regions of the hole."""
            for layer in range(2):
                content[layer] = values
                start = offset + layer * values.nbytes
                strides = strides_of(values.shape, size)
                for box in partition(rng, values.shape, rng.randrange(4)):
                    steps = zip(box.offset, strides, strict=True)
                    at = start + sum(first * step for first, step in steps)
                    pieces.append(Piece(key, box, dtype, Region(path, at, strides)))

        if rng.random() < 0.5:
            hole((2, *values.shape), dtype, boxes)
            continue
        start = rng.randrange(values.size)
        stop = rng.randint(start + 1, values.size)

        def shard(
            content: Any,
            offset: int,
            key: TensorKey = key,
            values: np.ndarray = values,
            dtype: str = dtype,
            span: tuple[int, int] = (start, stop),
            size: int = size,
        ) -> None:
            content[...] = values.ravel()[slice(*span)]
            for box in flat_boxes(values.shape, *span):
                region = Region(path, offset, strides_of(box.shape, size))
                pieces.append(Piece(key, box, dtype, region))
                offset += box.numel * size

        hole((stop - start,), dtype, shard)
    literal(0)
    rng.shuffle(pieces)
    case.targets += pieces
    case.files.append(OutputFile(path, len(data), tuple(literals), tuple(holes)))
    case.expected[path] = bytes(data)


def draw_case(rng: random.Random, files: int = 3, crc_first: bool | None = None) -> Case:
    """A reshard of a few small tensors."""
    case = Case()
    tensors = [
        (TensorKey("param", f"layers.{index}.weight"), *draw_tensor(rng))
        for index in range(rng.randint(1, 4))
    ]
    for key, values, dtype in tensors:
        add_source(case, rng, key, values, dtype)
    for index in range(rng.randint(1, files)):
        chosen = [rng.choice(tensors) for _ in range(rng.randrange(4))]
        first = rng.random() < 0.3 if crc_first is None else crc_first
        add_target(case, rng, chosen, f"rank_{index}/file.bin", first)
    return case


def apply_items(case: Case, file: OutputFile, units: Any) -> bytes:
    """What a plan makes of a file, element by element, in plain Python."""
    out = bytearray(file.size)
    for offset, data in file.literals:
        out[offset : offset + len(data)] = data
    for unit in units:
        for item in unit.items:
            size = DTYPE_BYTES[item.dtype]
            for index in np.ndindex(*item.shape):
                steps = zip(index, item.strides, strict=True)
                to = unit.start + item.offset + sum(i * step for i, step in steps)
                steps = zip(index, item.source_strides, strict=True)
                at = item.source_offset + sum(i * step for i, step in steps)
                source = case.source_bytes[item.source][at : at + size] if item.source else b""
                out[to : to + size] = source or bytes(size)
    for hole in file.holes:
        crc = zlib.crc32(out[hole.offset : hole.offset + hole.nbytes]).to_bytes(4, "little")
        for at in hole.crc_offsets:
            out[at : at + 4] = crc
    return bytes(out)
