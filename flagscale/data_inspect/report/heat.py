"""The samples of a step as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from flagscale.data_inspect.answers import SampleAnswer
from flagscale.data_inspect.report.curves import import_plotly, plain
from flagscale.data_inspect.report.excerpt import escape

__all__ = ["Grid", "step_figure"]

_COLOURS: Final = ("#2f4b7c", "#665191", "#a05195", "#d45087", "#f95d6a", "#ff7c43", "#ffa600")
_GREY: Final = "#8b8f98"

_ROW_SAMPLES: Final = 64
"""Cells of a row before it goes on in the next: what a finger can still hit."""


@dataclass(frozen=True)
class Grid:
    """Where each sample of a step has its cell: a row a rank, or more where it has many samples.

    Args:
        places: Row and column of each sample.
        rows: What stands beside each row.
        micro_batch_size: Columns of a micro batch.
        micro_batches: How many of them a row holds.
        wrapped: Whether a rank has more than one row.
    """

    places: tuple[tuple[int, int], ...]
    rows: tuple[str, ...]
    micro_batch_size: int
    micro_batches: int
    wrapped: bool

    @classmethod
    def of(cls, samples: Sequence[SampleAnswer]) -> Grid:
        """The grid of at least one sample."""
        size = 1 + max(sample.position for sample in samples)
        count = 1 + max(sample.micro_batch for sample in samples)
        together = max(1, min(count, _ROW_SAMPLES // size))
        keys = sorted({(s.rank, s.micro_batch // together) for s in samples})
        row_of = {key: row for row, key in enumerate(keys)}
        places = tuple(
            (
                row_of[s.rank, s.micro_batch // together],
                s.micro_batch % together * size + s.position,
            )
            for s in samples
        )
        wrapped = together < count
        rows = tuple(
            f"rank {rank}" + (f", from {part * together}" if wrapped else "") for rank, part in keys
        )
        return cls(places, rows, size, together, wrapped)


def step_figure(samples: Sequence[SampleAnswer], grid: Grid) -> dict[str, Any]:
    """The mean loss of each sample, as plotly's ``data`` and ``layout``.

    Custom data of a cell is the sample's ordinal in ``samples``; -1 where there is no sample.
    """
    graph = import_plotly().graph_objects
    shape = (len(grid.rows), grid.micro_batches * grid.micro_batch_size)
    ordinals = np.full(shape, -1)
    losses = np.full(shape, np.nan)
    hover = np.full(shape, "", dtype=object)
    for ordinal, (place, sample) in enumerate(zip(grid.places, samples, strict=True)):
        ordinals[place], hover[place] = ordinal, _hover(sample)
        losses[place] = np.nan if sample.loss is None else sample.loss
    losses[~np.isfinite(losses)] = np.nan
    cells = {
        "customdata": ordinals,
        "text": hover,
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": False,
        "xgap": 1,
        "ygap": 1,
    }
    figure = graph.Figure(
        [
            graph.Heatmap(
                z=np.where((ordinals >= 0) & np.isnan(losses), 0.0, np.nan),
                colorscale=[[0, _GREY], [1, _GREY]],
                showscale=False,
                **cells,
            ),
            graph.Heatmap(
                z=losses,
                colorscale=_COLOURS,
                showscale=bool(np.isfinite(losses).any()),
                colorbar={"title": {"text": "loss"}, "thickness": 10, "outlinewidth": 0},
                **cells,
            ),
        ]
    )
    bare = {"showgrid": False, "zeroline": False, "ticks": "", "automargin": True}
    figure.update_xaxes(**_column_ticks(grid), **bare)
    figure.update_yaxes(**_row_ticks(grid), **bare, autorange="reversed")
    figure.update_layout(
        height=int(np.clip(26 * len(grid.rows), 80, 560)) + 64,
        margin={"l": 10, "r": 10, "t": 12, "b": 46},
    )
    return plain(figure)


def _column_ticks(grid: Grid) -> dict[str, Any]:
    """A tick in the middle of each micro batch, thinned to what a row has room for."""
    shown = range(0, grid.micro_batches, -(-grid.micro_batches // 16))
    size = grid.micro_batch_size
    return {
        "title": {
            "text": "micro batch, counted from the row's first" if grid.wrapped else "micro batch"
        },
        "tickvals": [batch * size + (size - 1) / 2 for batch in shown],
        "ticktext": [f"+{batch}" if grid.wrapped else str(batch) for batch in shown],
    }


def _row_ticks(grid: Grid) -> dict[str, Any]:
    shown = range(0, len(grid.rows), -(-len(grid.rows) // 32))
    return {"tickvals": list(shown), "ticktext": [grid.rows[row] for row in shown]}


def _hover(sample: SampleAnswer) -> str:
    """Plotly reads a small HTML in its texts, and fills in what stands in ``%{}``."""
    loss = "not recorded" if sample.loss is None else f"{sample.loss:.4f}"
    name = escape(sample.prefix).replace("%", "&#37;")
    return (
        f"<b>loss {loss}</b><br>{name}<br>sample {sample.sample_index}<br>"
        f"rank {sample.rank}, micro batch {sample.micro_batch}, position {sample.position}"
    )
