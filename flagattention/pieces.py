"""Cuts the near and the far region of an attention matrix into pieces that need no mask.

Pure geometry: whole numbers in, pieces out. In the M x N matrix of scores, with
P = q_offset - k_offset and the threshold w, key n is seen by row m

- with pair 2 (far) where n - m <= P - w;
- with pair 1 (near) where n - m > P - w and, if causal, n - m <= P.

So every border is a diagonal. A region below a diagonal is a rectangle and a triangle whose first
row sees one key: plain causal attention on slices. A region above a diagonal is the same after both
axes are turned round. A band of the height w is a row of such triangles on either side of its
blocks' diagonals, and all of one size, so that they go into one call as a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

__all__ = ["Kind", "Piece", "lower", "plan", "upper"]

NARROW = 32
"""Bands of fewer diagonals are cheaper under a mask than as triangles."""

BAND_ROWS = 64
"""Rows of a masked block of a narrow band, at least NARROW."""

_TILE = 512
"""Columns torch's kernel computes at once: of a triangle no wider it skips nothing, so that two
triangles of half the size, and a rectangle, are less work."""


class Kind(Enum):
    """Which cells (row i, column j) of a piece of h x w cells are seen."""

    FULL = "all"
    LOWER = "j <= i"
    UPPER = "w - j <= h - i"
    BAND = "lo < j - i <= hi"


@dataclass(frozen=True)
class Piece:
    """Equal rectangles of the matrix of scores, each a step down and to the right of the last.

    Attributes:
        pair: 1 (near) or 2 (far).
        kind: Which of its cells are seen.
        row: First row.
        height: Rows of one rectangle, at least 1.
        col: First column.
        width: Columns of one rectangle, at least 1.
        count: How many rectangles.
        step: How far apart they are, in rows and in columns. Neither overlap.
        lo: Kind BAND only.
        hi: Kind BAND only.
    """

    pair: int
    kind: Kind
    row: int
    height: int
    col: int
    width: int
    count: int = 1
    step: int = 0
    lo: int = 0
    hi: int = 0


def lower(pair: int, rows: range, cols: range, c: int) -> list[Piece]:
    """The cells of a rectangle with n - m <= c."""
    shift = c - cols.start + rows.start
    if shift < 0:
        rows, shift = rows[-shift:], 0
    height, width = len(rows), min(len(cols), len(rows) + shift)
    if height == 0 or width <= 0:
        return []
    if shift >= width - 1:
        return [Piece(pair, Kind.FULL, rows.start, height, cols.start, width)]
    triangle = Piece(pair, Kind.LOWER, rows.start, height, cols.start + shift, width - shift)
    if shift == 0:
        return [triangle]
    return [triangle, Piece(pair, Kind.FULL, rows.start, height, cols.start, shift)]


def upper(pair: int, rows: range, cols: range, c: int) -> list[Piece]:
    """The cells of a rectangle with n - m >= c: ``lower`` with both axes turned round."""
    turned = lower(pair, range(len(rows)), range(len(cols)), cols.stop - rows.stop - c)
    kinds = {Kind.FULL: Kind.FULL, Kind.LOWER: Kind.UPPER}
    return [
        replace(
            piece,
            kind=kinds[piece.kind],
            row=rows.stop - piece.row - piece.height,
            col=cols.stop - piece.col - piece.width,
        )
        for piece in turned
    ]


def band(pair: int, rows: range, cols: range, lo: int, hi: int) -> list[Piece]:
    """The cells of a rectangle with lo < n - m <= hi."""
    rows = range(max(rows.start, cols.start - hi), min(rows.stop, cols.stop - 1 - lo))
    if not rows:
        return []
    if lo + rows.stop <= cols.start:
        return lower(pair, rows, cols, hi)
    width = hi - lo
    step = width if width >= NARROW else BAND_ROWS
    if _TILE // 2 < width <= _TILE:
        step = -(-width // 2)
    pieces = []
    for start in range(rows.start, rows.stop, step):
        block = range(start, min(start + step, rows.stop))
        left = range(max(cols.start, lo + 1 + start), cols.stop)
        if width < NARROW or len(block) == 1:
            pieces += _masked(pair, block, left, lo, hi)
        else:
            middle = min(max(hi + start, cols.start), cols.stop)
            pieces += lower(pair, block, range(middle, cols.stop), hi)
            pieces += upper(pair, block, range(left.start, middle), lo + 1)
    return _batched(pieces)


def _masked(pair: int, rows: range, cols: range, lo: int, hi: int) -> list[Piece]:
    width = min(cols.stop, hi + rows.stop) - cols.start
    shift = cols.start - rows.start
    piece = Piece(pair, Kind.BAND, rows.start, len(rows), cols.start, width)
    if len(rows) == 1:
        return [replace(piece, kind=Kind.FULL)]
    return [replace(piece, lo=lo - shift, hi=hi - shift)]


def _batched(pieces: list[Piece]) -> list[Piece]:
    """Joins equal pieces along one diagonal; where neighbours overlap, every second, and so on."""
    runs: dict[tuple[Piece, int], list[Piece]] = {}
    for piece in pieces:
        runs.setdefault((replace(piece, row=0, col=0), piece.col - piece.row), []).append(piece)
    found = []
    for run in runs.values():
        step = run[1].row - run[0].row if len(run) > 1 else 0
        every = -(-run[0].width // step) if step else 1
        for first in range(min(every, len(run))):
            members = run[first::every]
            found.append(replace(members[0], count=len(members), step=step * every))
    return found


@lru_cache(maxsize=256)
def plan(
    n_rows: int, n_cols: int, causal: bool, threshold: int, offset: int, n_far_cols: int
) -> tuple[Piece, ...]:
    """Pieces that hold every seen cell of an M x N matrix once.

    Args:
        n_rows: M.
        n_cols: N.
        causal: Keys behind the query only.
        threshold: w: far keys are at least so far away.
        offset: P, the position of the first query less that of the first key.
        n_far_cols: Far keys are dropped from this column on; N for none.

    Returns:
        The pieces, those of the near region first.
    """
    rows, cols = range(n_rows), range(n_cols)
    border = offset - threshold
    if not causal:
        near = upper(1, rows, cols, border + 1)
    else:
        near = band(1, rows, cols, border, offset) if threshold > 0 else []
    far = lower(2, rows, range(n_far_cols), min(border, offset) if causal else border)
    return (*near, *far)
