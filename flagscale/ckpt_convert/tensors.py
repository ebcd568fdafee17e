"""Hugging Face tensors in Megatron's coordinates: which box of which canonical tensor goes where.

A family's table names each tensor of a Hugging Face model, the canonical tensor it comes from, and
what is taken of it. From that follow *parts*: boxes of canonical tensors with their places in the
Hugging Face tensor. Both directions of a conversion are read off the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Literal, NamedTuple

from flagscale.ckpt_convert.features import features
from flagscale.errors import ConfigError
from flagscale.layout.boxes import Box
from flagscale.layout.model import canonical_tensors
from flagscale.layout.pieces import DTYPE_BYTES, Piece, Region, TensorKey, dense_strides
from flagscale.layout.rows import ModelSpec

__all__ = ["HFTensor", "Part", "Row", "Shape", "Take", "hf_tensors", "pieces_in"]

Take = Literal["whole", "query", "key", "value", "gate", "up", "vocab"]
"""What of a canonical tensor a Hugging Face tensor is: all of it, one of the three projections of
its query groups, a half of a gated layer's rows, or the rows of real tokens."""

LAYER: Final = "{layer}"
EXPERT: Final = "{expert}"


class Row(NamedTuple):
    """A tensor of a Hugging Face model, or one for each layer and expert.

    Args:
        hf: Its name; ``{layer}`` and ``{expert}`` stand for every number.
        canonical: Of the canonical tensor it comes from; ``{layer}`` likewise. Experts share one.
        take: What of it.
        when: A feature of the model without which there is no such row; with ``"not "`` in front,
            with which there is none. A layer without experts has not the feature ``"experts"``.
        dtype: Torch's name of its element type, where it is not the model's.
    """

    hf: str
    canonical: str
    take: Take = "whole"
    when: str | None = None
    dtype: str | None = None

    def is_there(self, features: frozenset[str]) -> bool:
        """Whether a model, or a layer, with these features has it."""
        if self.when is None:
            return True
        return (self.when.removeprefix("not ") in features) != self.when.startswith("not ")


@dataclass(frozen=True)
class Shape:
    """What decides how tensors are cut, beside their own shapes.

    Args:
        model: The model.
        vocab_size: Real tokens; the rest of the padded vocabulary stays behind.
        interleaved: Whether Megatron rotates pairs of neighbours (``--rotary-interleaved``) where
            Hugging Face rotates the two halves of a head.
        features: What the model has, as :mod:`flagscale.ckpt_convert.features` names it.
    """

    model: ModelSpec
    vocab_size: int
    interleaved: bool = False
    features: frozenset[str] = frozenset()

    @classmethod
    def of(cls, args: Mapping[str, Any], model: ModelSpec, vocab_size: int) -> Shape:
        """As the arguments of a job have it, by attribute."""
        seen = frozenset(features(args))
        return cls(model, vocab_size, "rotary_interleaved" in seen, seen)


class Part(NamedTuple):
    """A box of a canonical tensor in a Hugging Face tensor.

    Args:
        box: In the canonical tensor.
        offset: Elements from the start of the Hugging Face tensor to the first of the box.
        strides: Elements of the Hugging Face tensor from one index of the box to the next.
    """

    box: Box
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class HFTensor:
    """A tensor of a Hugging Face model.

    Args:
        name: In its ``state_dict``.
        shape: Of the whole tensor.
        canonical: The canonical tensor that it comes from.
        parts: What it consists of; they cover it.
        take: What of the canonical tensor it is.
        expert: Index of the expert; ``None``: not one expert's.
        dtype: Torch's name of its element type, where it is not the model's.
    """

    name: str
    shape: tuple[int, ...]
    canonical: str
    parts: tuple[Part, ...]
    take: Take = "whole"
    expert: int | None = None
    dtype: str | None = None

    @property
    def block(self) -> str | None:
        """Shared by the experts that transformers cuts out of one tensor.

        ``save_pretrained`` never divides them between two files.
        """
        return None if self.expert is None else f"{self.canonical} {self.take}"

    def pieces(self, kind: str, dtype: str, file: str, offset: int) -> Iterator[Piece]:
        """The parts as pieces of a file.

        Args:
            kind: Of the canonical tensor: the weight, or a state of the optimizer.
            dtype: Torch's name of the element type in the file.
            file: Path of the file.
            offset: Bytes from its start to the tensor, which lies there densely.
        """
        itemsize = DTYPE_BYTES[dtype]
        for part in self.parts:
            strides = tuple(step * itemsize for step in part.strides)
            region = Region(file, offset + part.offset * itemsize, strides)
            yield Piece(TensorKey(kind, self.canonical), part.box, dtype, region)


def hf_tensors(rows: Iterable[Row], shape: Shape) -> Iterator[HFTensor]:
    """The tensors of a model, in the order in which ``save_pretrained`` divides them into files.

    Args:
        rows: A family's table: rows without a layer, those of all layers in one run, and rows
            without a layer again.
        shape: The model.

    Raises:
        ConfigError: A row speaks of a tensor that the model does not have.
    """
    known = {name: tensor.shape for name, tensor in canonical_tensors(shape.model).items()}
    run: list[Row] = []
    for row in rows:
        if LAYER in row.hf:
            run.append(row)
            continue
        yield from _layers(run, shape, known)
        run = []
        if row.is_there(shape.features):
            yield _tensor(row, shape, known, row.hf, row.canonical)
    yield from _layers(run, shape, known)


def pieces_in(
    tensors: Iterable[HFTensor],
    places: Mapping[str, tuple[str, int, str]],
    kind: str = "weight",
) -> Iterator[Piece]:
    """The pieces of tensors in files.

    Args:
        tensors: The tensors.
        places: File, offset in bytes and element type of each, by name.
        kind: Of the canonical tensors: the weights, or a state of the optimizer.
    """
    for tensor in tensors:
        file, offset, dtype = places[tensor.name]
        yield from tensor.pieces(kind, dtype, file, offset)


def _layers(
    rows: Iterable[Row], shape: Shape, known: Mapping[str, tuple[int, ...]]
) -> Iterator[HFTensor]:
    rows = list(rows)
    for layer in range(shape.model.dims.num_layers if rows else 0):
        present = shape.features
        if layer not in shape.model.dims.moe_layers:
            present -= {"experts", "shared_experts", "expert_bias"}
        here = [row for row in rows if row.is_there(present)]
        yield from _layer(here, layer, shape, known)


def _layer(
    rows: list[Row], layer: int, shape: Shape, known: Mapping[str, tuple[int, ...]]
) -> Iterator[HFTensor]:
    """Row by row, and a row's experts one after another, as ``save_pretrained`` unfolds them."""
    for row in rows:
        canonical = row.canonical.format(layer=layer)
        if EXPERT not in row.hf:
            yield _tensor(row, shape, known, row.hf.format(layer=layer), canonical)
            continue
        for expert in range(shape.model.dims.num_experts or 0):
            name = row.hf.format(layer=layer, expert=expert)
            yield _tensor(row, shape, known, name, canonical, expert)


def _tensor(
    row: Row,
    shape: Shape,
    known: Mapping[str, tuple[int, ...]],
    name: str,
    canonical: str,
    expert: int | None = None,
) -> HFTensor:
    if canonical not in known:
        raise ConfigError(
            "a model does not have what its family's table names",
            where=name,
            expected=canonical,
            got="no such tensor",
        )
    whole = known[canonical] if expert is None else known[canonical][1:]
    runs = list(_RUNS[row.take](whole, shape))
    rows = sum(run.rows for run in runs)
    if expert is None and row.take == "whole":
        all_of_it = Part(Box.whole(whole), 0, dense_strides(whole))
        return HFTensor(name, whole, canonical, (all_of_it,), row.take, None, row.dtype)
    parts = tuple(_part(whole, run, expert) for run in runs)
    return HFTensor(name, (rows, *whole[1:]), canonical, parts, row.take, expert, row.dtype)


class _Run(NamedTuple):
    """Neighbouring rows of a canonical tensor, and where they go: every ``step``-th row."""

    start: int
    rows: int
    at: int
    step: int = 1


def _part(shape: tuple[int, ...], run: _Run, expert: int | None) -> Part:
    tail = shape[1:]
    width = prod(tail)
    offset, size = (run.start, *(0 for _ in tail)), (run.rows, *tail)
    strides = (run.step * width, *dense_strides(tail))
    if expert is not None:
        offset, size = (expert, *offset), (1, *size)
        strides = (shape[0] * width, *strides)
    return Part(Box(offset, size), run.at * width, strides)


def _whole(shape: tuple[int, ...], _: Shape) -> Iterator[_Run]:
    yield _Run(0, shape[0] if shape else 1, 0)


def _vocab(shape: tuple[int, ...], of: Shape) -> Iterator[_Run]:
    if not 0 < of.vocab_size <= shape[0]:
        raise ConfigError(
            "the vocabulary is larger than the model's",
            where="vocab_size",
            expected=f"1 to {shape[0]}",
            got=of.vocab_size,
        )
    yield _Run(0, of.vocab_size, 0)


def _gate(shape: tuple[int, ...], _: Shape) -> Iterator[_Run]:
    yield _Run(0, shape[0] // 2, 0)


def _up(shape: tuple[int, ...], _: Shape) -> Iterator[_Run]:
    yield _Run(shape[0] // 2, shape[0] // 2, 0)


def _query(_: tuple[int, ...], of: Shape) -> Iterator[_Run]:
    yield from _projection(of, 0, _queries(of), rotated=True)


def _key(_: tuple[int, ...], of: Shape) -> Iterator[_Run]:
    yield from _projection(of, _queries(of), 1, rotated=True)


def _value(_: tuple[int, ...], of: Shape) -> Iterator[_Run]:
    yield from _projection(of, _queries(of) + 1, 1, rotated=False)


def _queries(of: Shape) -> int:
    """Query heads of a group."""
    return of.model.dims.num_attention_heads // of.model.dims.num_query_groups


def _projection(of: Shape, first: int, heads: int, *, rotated: bool) -> Iterator[_Run]:
    """Some heads of each query group; a group is its query heads, its key head, its value head."""
    dims = of.model.dims
    size, per_group = dims.head_dim, _queries(of) + 2
    for group in range(dims.num_query_groups):
        start, at = (group * per_group + first) * size, group * heads * size
        if not (rotated and of.interleaved):
            yield _Run(start, heads * size, at)
            continue
        for head in range(heads):
            for pair in range(size // 2):
                row = head * size
                yield _Run(start + row + 2 * pair, 2, at + row + pair, size // 2)


_RUNS: Final[Mapping[Take, Callable[[tuple[int, ...], Shape], Iterator[_Run]]]] = {
    "whole": _whole,
    "vocab": _vocab,
    "gate": _gate,
    "up": _up,
    "query": _query,
    "key": _key,
    "value": _value,
}
