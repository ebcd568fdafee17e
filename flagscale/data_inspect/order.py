"""In which order one dataset is read: epochs, two shuffles, and where each sample begins.

The chosen sequences are written down once an epoch and shuffled; read in that order they are one
long stream of tokens, which is cut every ``seq_length`` tokens; the pieces are shuffled again.
Sample ``j`` is piece ``k = shuffle[j]``: tokens ``[k * S, k * S + S + extra)`` of the stream, where
the ``extra`` one, which the next piece begins with, is the label behind the last token.
A *position* is a place in the shuffled list of sequences.

Source: megatron-core 0.19.2, core/datasets/gpt_dataset.py, helpers.cpp and
blended_megatron_dataset_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.arrays import Indices
from flagscale.errors import ConfigError, DataError

__all__ = [
    "BuiltOrder",
    "Order",
    "OrderPlan",
    "Spans",
    "build_order",
    "plan_order",
    "samples_of",
    "spans_of",
    "split_matrix",
    "split_range",
]

SPLITS = ("train", "valid", "test")
SEPARATE_BELOW = 0.80
"""A last epoch is shuffled by itself when it contributes less than this share of its samples."""
BLOCK = 64
"""Positions between two remembered places in the stream: an eighth of a byte each, not eight."""
CHUNK = 1 << 22
LONG = 1 << 23
"""So many elements take long enough to be told of."""
MOST = 1 << 32
"""So many are not shuffled in memory."""

Progress = Callable[[str], None]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class OrderPlan:
    """How often a dataset is read, and how that is shuffled.

    Args:
        num_epochs: How often each sequence is in the stream.
        separate_final_epoch: Whether the last of them is shuffled by itself.
        samples_sans_final_epoch: Samples before it, which are shuffled by themselves then; all,
            if it is not separate.
        num_samples_total: Samples there are, at least those that were asked for.
    """

    num_epochs: int
    separate_final_epoch: bool
    samples_sans_final_epoch: int
    num_samples_total: int


def plan_order(
    tokens_per_epoch: int, num_samples: int | None, seq_length: int, add_extra: int = 1
) -> OrderPlan:
    """Plan as many epochs as the samples asked for need.

    Args:
        tokens_per_epoch: Tokens of all chosen sequences.
        num_samples: At least that many; ``None`` for one epoch.
        seq_length: Tokens a sample, the extra one not counted.
        add_extra: Whether a sample is read with the token behind it: 1 or 0.

    Raises:
        DataError: There are no tokens.
    """
    if tokens_per_epoch < 1:
        raise DataError(
            "a dataset has no tokens to train on",
            expected="tokens in the sequences of the training split",
            got=tokens_per_epoch,
            cure="check the dataset and --split",
        )
    wanted = tokens_per_epoch if num_samples is None else num_samples * seq_length + add_extra
    epochs = max(1, -(-wanted // tokens_per_epoch))
    total = (epochs * tokens_per_epoch - add_extra) // seq_length
    if epochs == 1 or num_samples is None:
        return OrderPlan(epochs, False, total, total)
    before = ((epochs - 1) * tokens_per_epoch - add_extra) // seq_length
    per_epoch = (tokens_per_epoch - add_extra) // seq_length
    separate = num_samples - before < int(SEPARATE_BELOW * per_epoch)
    return OrderPlan(epochs, separate, before if separate else total, total)


def split_matrix(split: str | None) -> list[tuple[float, float] | None] | None:
    """The shares ``[begin, end)`` of training, validation and test; ``None`` for an empty one.

    Args:
        split: ``--split``; ``None`` where each has datasets of its own.

    Raises:
        ConfigError: It is not three shares at most.
    """
    if split is None:
        return None
    try:
        shares = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        shares = []
    if not 0 < len(shares) <= len(SPLITS) or not 0 < sum(shares) < float("inf"):
        raise ConfigError(
            "the split is not one",
            where="--split",
            expected="up to three numbers, as in 98,1,1",
            got=split,
            cure="give the argument of the run",
        )
    vector = np.array(shares + [0.0] * (len(SPLITS) - len(shares)))
    # Upstream adds the shares up in this order, and the last bit can decide a rounding.
    ends = list(accumulate((vector / np.sum(vector)).tolist(), initial=0))
    return [(begin, end) if end > begin else None for begin, end in pairwise(ends)]


def split_range(split: str | None, num_sequences: int, which: str = "train") -> tuple[int, int]:
    """``(first, one past the last)`` sequence of a split.

    Args:
        split: ``--split``; ``None`` for all sequences.
        num_sequences: Of the dataset.
        which: ``train``, ``valid`` or ``test``.

    Raises:
        ConfigError: It is not a split, or leaves nothing there.
    """
    matrix = split_matrix(split)
    shares = (0.0, 1.0) if matrix is None else matrix[SPLITS.index(which)]
    if shares is None:
        raise ConfigError(
            f"the split leaves nothing for {which}",
            where="--split",
            got=split,
            cure="give the argument of the run",
        )
    begin, end = (round(share * float(num_sequences)) for share in shares)
    return begin, end


class Order(Protocol):
    """A dataset's order, cached or built; arrays in, arrays out.

    ``first`` and ``stop`` bound the sequences it may name, ``extra`` is 1 where a sample is read
    with the token behind it.
    """

    seq_length: int
    extra: int
    num_samples: int
    num_positions: int

    def shuffle(self, samples: Indices) -> Indices:
        """The piece of the stream that each sample is."""
        ...

    def unshuffle(self, pieces: Indices) -> Indices:
        """All samples that are one of these pieces, rising."""
        ...

    def boundaries(self, pieces: Indices) -> tuple[Indices, Indices]:
        """``(position, token in its sequence)`` where each piece begins; piece n is the end."""
        ...

    def sequences(self, positions: Indices) -> Indices:
        """The sequence at each position."""
        ...

    def positions(self, first: int, stop: int) -> Indices:
        """All positions that hold a sequence in ``[first, stop)``, rising."""
        ...

    def pieces_at(self, positions: Indices, offsets: Indices) -> Indices:
        """The last piece that begins at or before each token."""
        ...


class BuiltOrder:
    """An order computed anew.

    Args:
        lengths: [n] tokens of the sequences from ``first`` on, int32.
        first: The first chosen sequence.
        document_index: [positions] int32 sequences, as shuffled.
        shuffle_index: [samples] pieces, as shuffled.
        plan: What both were made by.
        seq_length: Tokens a sample, the extra one not counted.
        extra: Whether a sample is read with the token behind it.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int32],
        first: int,
        document_index: npt.NDArray[np.int32],
        shuffle_index: Array,
        plan: OrderPlan,
        seq_length: int,
        extra: int = 1,
    ) -> None:
        self.plan = plan
        self.seq_length, self.extra = seq_length, extra
        self.num_samples = len(shuffle_index)
        self.num_positions = len(document_index)
        self.document_index, self.shuffle_index = document_index, shuffle_index
        self._lengths, self._first = lengths, first
        self._begins = self._block_begins()

    def _block_begins(self) -> Indices:
        """[blocks + 1] where in the stream each block of positions begins, and the stream ends."""
        sums = []
        for start in range(0, self.num_positions, CHUNK):
            chunk = self._lengths_at(slice(start, start + CHUNK))
            sums.append(np.add.reduceat(chunk, np.arange(0, len(chunk), BLOCK), dtype=np.int64))
        return np.concatenate([[0], np.cumsum(np.concatenate(sums))])

    def _lengths_at(self, positions: Any) -> npt.NDArray[np.int32]:
        lengths: npt.NDArray[np.int32] = self._lengths[self.document_index[positions] - self._first]
        return lengths

    def shuffle(self, samples: Indices) -> Indices:
        """The piece of the stream that each sample is."""
        return self.shuffle_index[samples].astype(np.int64)

    def unshuffle(self, pieces: Indices) -> Indices:
        """All samples that are one of these pieces, rising."""
        return find_in(chunks_of(self.shuffle_index), pieces)

    def sequences(self, positions: Indices) -> Indices:
        """The sequence at each position."""
        return self.document_index[positions].astype(np.int64)

    def positions(self, first: int, stop: int) -> Indices:
        """All positions that hold a sequence in ``[first, stop)``, rising."""
        return find_between(chunks_of(self.document_index), first, stop)

    def boundaries(self, pieces: Indices) -> tuple[Indices, Indices]:
        """``(position, token in its sequence)`` where each piece begins; piece n is the end."""
        tokens = np.asarray(pieces, np.int64) * self.seq_length
        block = np.searchsorted(self._begins, tokens, "right") - 1
        # Only without an extra token can a piece begin where the stream ends.
        block = np.minimum(block, len(self._begins) - 2)
        rows = block[:, None] * BLOCK + np.arange(BLOCK)
        inside = rows < self.num_positions
        lengths = self._lengths_at(np.minimum(rows, self.num_positions - 1)) * inside
        ends = self._begins[block][:, None] + np.cumsum(lengths, axis=1, dtype=np.int64)
        place = np.minimum((ends <= tokens[:, None]).sum(axis=1), inside.sum(axis=1) - 1)
        row = np.arange(len(tokens))
        begins = (ends - lengths)[row, place]
        return rows[row, place], tokens - begins

    def pieces_at(self, positions: Indices, offsets: Indices) -> Indices:
        """The last piece that begins at or before each token."""
        block = positions // BLOCK
        rows = block[:, None] * BLOCK + np.arange(BLOCK)
        before = rows < positions[:, None]
        lengths = self._lengths_at(np.minimum(rows, self.num_positions - 1)) * before
        tokens = self._begins[block] + lengths.sum(axis=1, dtype=np.int64) + offsets
        pieces: Indices = np.minimum(tokens // self.seq_length, self.num_samples)
        return pieces


def build_order(
    lengths: npt.NDArray[np.int32],
    first: int,
    last: int,
    plan: OrderPlan,
    seed: int,
    *,
    seq_length: int,
    add_extra: int = 1,
    progress: Progress | None = None,
) -> BuiltOrder:
    """Shuffle as upstream does: sequences first, then samples, a separate last epoch each time.

    Args:
        lengths: [last - first] tokens of the chosen sequences.
        first: The first chosen sequence.
        last: One past the last.
        plan: From :func:`plan_order`.
        seed: ``--seed``.
        seq_length: Tokens a sample, the extra one not counted.
        add_extra: Whether a sample is read with the token behind it.
        progress: Told what is about to be done, where it takes long.

    Raises:
        DataError: There are more sequences or samples than anyone shuffles in memory.
    """
    positions = plan.num_epochs * (last - first)
    if max(positions, plan.num_samples_total) >= MOST:
        raise DataError(
            "an order is too large to be made again",
            expected=f"less than {MOST} sequences and samples",
            got=f"{positions} sequences, {plan.num_samples_total} samples",
            cure="check the number of samples, or give the run's --data-cache-path",
        )
    say = progress if progress and positions + plan.num_samples_total > LONG else lambda _: None
    random = np.random.RandomState(seed)
    together = plan.num_epochs - plan.separate_final_epoch
    document_index = np.empty(positions, np.int32)
    for start in range(first, last, CHUNK):
        stop = min(start + CHUNK, last)
        epochs = document_index.reshape(plan.num_epochs, last - first)
        epochs[:, start - first : stop - first] = np.arange(start, stop)
    say(f"shuffling {positions} sequences")
    cut = together * (last - first)
    random.shuffle(document_index[:cut])
    if plan.separate_final_epoch:
        random.shuffle(document_index[cut:])
    total, cut = plan.num_samples_total, plan.samples_sans_final_epoch
    say(f"shuffling {total} samples")
    wide = total >= np.iinfo(np.uint32).max - 1
    shuffle_index = np.arange(total, dtype=np.int64 if wide else np.uint32)
    random.shuffle(shuffle_index[:cut])
    if cut < total:
        random.shuffle(shuffle_index[cut:])
    say(f"adding up {positions} lengths")
    return BuiltOrder(lengths, first, document_index, shuffle_index, plan, seq_length, add_extra)


def chunks_of(array: Array) -> Iterator[Array]:
    """An array, a few million elements at a time."""
    return (array[start : start + CHUNK] for start in range(0, len(array), CHUNK))


def find_in(chunks: Iterator[Array], wanted: Indices) -> Indices:
    """Places in an array, given in chunks, that hold one of the wanted values, rising."""
    return _places(chunks, lambda chunk: np.isin(chunk, wanted.astype(chunk.dtype)))


def find_between(chunks: Iterator[Array], first: int, stop: int) -> Indices:
    """Places in an array, given in chunks, that hold a value in ``[first, stop)``, rising."""
    return _places(chunks, lambda chunk: (chunk >= first) & (chunk < stop))


def _places(chunks: Iterator[Array], holds: Callable[[Array], npt.NDArray[np.bool_]]) -> Indices:
    found, start = [np.empty(0, np.int64)], 0
    for chunk in chunks:
        found.append(np.flatnonzero(holds(chunk)) + start)
        start += len(chunk)
    return np.concatenate(found)


@dataclass(frozen=True)
class Spans:
    """The parts of sequences that some samples are made of, in order; all arrays are [m] int64.

    Args:
        sample: Which of the samples asked for, from 0, rising.
        sequence: Ordinal in the ``.idx``.
        offset: First token, counted in the sequence.
        length: Tokens, at least one.
        start: Where in the sample they lie.
        place: First byte of the sequence in the ``.bin``.
    """

    sample: Indices
    sequence: Indices
    offset: Indices
    length: Indices
    start: Indices
    place: Indices


def spans_of(
    order: Order,
    samples: npt.ArrayLike,
    extents_of: Callable[[Indices], tuple[Indices, Indices]],
    name: str,
) -> Spans:
    """What some samples are made of; parts without tokens are left out.

    Args:
        order: Of the dataset.
        samples: [n] indices in its shuffled order.
        extents_of: Tokens and first bytes of sequences.
        name: The dataset, for errors.

    Raises:
        DataError: There is no such sample, or order and sequences do not fit each other.
    """
    wanted = np.asarray(samples, np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= order.num_samples):
        raise DataError(
            "no such sample",
            where=name,
            expected=f"0 <= sample index < {order.num_samples}",
            got=[int(wanted.min()), int(wanted.max())],
            cure="check that the dataset and the arguments are those of the run",
        )
    pieces = order.shuffle(wanted)
    position, offset = order.boundaries(pieces)
    end_position, end_offset = order.boundaries(pieces + 1)
    counts = end_position - position + 1
    # Sequences without tokens may lie between, but hardly a million of them.
    if wanted.size and (counts.min() < 1 or counts.sum() > wanted.size * order.seq_length + 2**20):
        raise _unfit(name, "the boundaries of a sample are out of order")
    sample = np.repeat(np.arange(len(wanted)), counts)
    begins = np.cumsum(counts) - counts
    within = np.arange(len(sample)) - begins[sample]
    sequence = order.sequences(position[sample] + within)
    lengths, places = extents_of(sequence)
    start = np.where(within == 0, offset[sample], 0)
    stop = np.where(within == counts[sample] - 1, end_offset[sample] + order.extra, lengths)
    size = stop - start
    totals = np.bincount(sample, size, len(wanted)).astype(np.int64)
    if (start < 0).any() or (stop > lengths).any() or (size < 0).any():
        raise _unfit(name, "a sample reaches beyond a sequence")
    if (totals != order.seq_length + order.extra).any():
        raise _unfit(name, "a sample is not as long as the others")
    before = np.cumsum(size) - size
    starts = before - before[begins][sample] if len(wanted) else before
    kept = size > 0
    columns = (sample, sequence, start, size, starts, places)
    return Spans(*(column[kept] for column in columns))


def _unfit(name: str, what: str) -> DataError:
    return DataError(
        f"the order of a dataset does not fit its sequences: {what}",
        where=name,
        expected="the cached order was made from this very dataset",
        cure="look whether the dataset was rewritten after its cache, or the cache damaged",
    )


def samples_of(
    order: Order,
    sequences: tuple[int, int],
    lengths_of: Callable[[Indices], Indices],
    tokens: tuple[int, int],
) -> Indices:
    """Every sample that holds one of a run of tokens, in every epoch, rising.

    Args:
        order: Of the dataset.
        sequences: ``(first, one past the last)``: the sequences, one after the other, of one
            document, say.
        lengths_of: The tokens of sequences.
        tokens: ``(first, one past the last)``, counted from the first token of the first sequence.
    """
    numbers = np.arange(*sequences)
    ends = np.cumsum(lengths_of(numbers))
    begins = ends - np.diff(ends, prepend=0)
    start = np.clip(tokens[0] - begins, 0, ends - begins)
    stop = np.clip(tokens[1] - begins, 0, ends - begins)
    positions = order.positions(*sequences)
    which = order.sequences(positions) - sequences[0]
    some = start[which] < stop[which]
    positions, which = positions[some], which[some]
    low = order.pieces_at(positions, start[which])
    high = order.pieces_at(positions, stop[which] - 1)
    if order.extra:
        # A piece's first token is also the one behind the last of the piece before.
        at, offset = order.boundaries(low)
        low = low - ((at == positions) & (offset == start[which]))
    pieces = np.concatenate(
        [np.empty(0, np.int64), *(np.arange(a, b + 1) for a, b in zip(low, high, strict=True))]
    )
    pieces = np.unique(pieces[(pieces >= 0) & (pieces < order.num_samples)])
    return order.unshuffle(pieces)
