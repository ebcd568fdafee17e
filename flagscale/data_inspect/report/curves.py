"""The curves of a report, made with plotly as plain data; the page draws and colours them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.report.excerpt import escape
from flagscale.data_inspect.report.model import AttemptMark, CurveArrays, Limits, Report, SpikeStep
from flagscale.errors import ConfigError

__all__ = ["curve_figure", "import_plotly", "plain", "thin"]

# They must stand out from a white page and from a black one.
_LOSS: Final = "#3b82f6"
_GRAD: Final = "#12a594"
_SPIKE: Final = "#e5484d"
_DIM: Final = "rgba(139,143,152,0.5)"
_LABELLED_RESTARTS: Final = 12


def import_plotly() -> Any:
    """The plotting library, which is optional.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import plotly.graph_objects
        import plotly.offline
        import plotly.subplots
    except ImportError as error:
        raise ConfigError(
            "a report needs plotly, which is not installed",
            got=str(error),
            cure="pip install 'flagscale[report]'",
        ) from error
    return plotly


def thin(
    x: npt.NDArray[Any], y: npt.NDArray[np.float64], points: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """A curve in at most ``points`` points: of each stretch the lowest and the highest.

    A stretch of NaN stays a gap; NaN beside numbers gives way to them.
    """
    if len(x) <= points:
        return x, y
    keep: list[int] = []
    for part in np.array_split(np.arange(len(x)), max(points // 2, 1)):
        finite = part[np.isfinite(y[part])]
        if len(finite) == 0:
            keep.append(int(part[0]))
            continue
        keep += sorted({int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])})
    return x[keep], y[keep]


def curve_figure(report: Report, limits: Limits) -> dict[str, Any]:
    """Loss above gradient norm over the iterations, as plotly's ``data`` and ``layout``.

    The trace named ``spikes`` has the ordinal of each spike as its custom data.
    """
    plotly = import_plotly()
    figure = plotly.subplots.make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.64, 0.36], vertical_spacing=0.05
    )
    curve = report.curve
    for row, (name, values, colour) in enumerate(
        (("loss", curve.loss, _LOSS), ("gradient norm", curve.grad_norm, _GRAD)), start=1
    ):
        for trace in _curves(name, values, colour, curve, limits.points):
            figure.add_trace(trace, row=row, col=1)
    figure.add_trace(_spike_markers(report.spikes, curve), row=1, col=1)
    _mark_restarts(figure, report.attempts)
    figure.update_xaxes(title_text="iteration", row=2, col=1)
    figure.update_yaxes(title_text="loss", row=1, col=1)
    figure.update_yaxes(title_text="gradient norm", row=2, col=1)
    figure.update_layout(
        hovermode="closest",
        hoverdistance=30,
        margin={"l": 58, "r": 14, "t": 44, "b": 44},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    return plain(figure)


def _curves(
    name: str, values: npt.NDArray[np.float64], colour: str, curve: CurveArrays, points: int
) -> list[Any]:
    """What a later attempt ran again, dimmed, and what counts, on top of it."""
    scatter = import_plotly().graph_objects.Scatter
    old_x, old_y = _with_gaps(curve, values)
    traces = []
    for x, y, line, suffix in (
        (old_x, old_y, {"color": _DIM, "width": 4}, ", rolled back"),
        (*_survivors(curve, values), {"color": colour, "width": 1.6}, ""),
    ):
        if len(x):
            drawn_x, drawn_y = thin(x, y, points)
            hover = f"{name} %{{y:.4g}}{suffix}<br>iteration %{{x}}<extra></extra>"
            traces.append(
                scatter(
                    x=drawn_x,
                    y=drawn_y,
                    name=name + suffix,
                    mode="lines" if len(x) > 1 else "markers",
                    line=line,
                    hovertemplate=hover,
                    showlegend=name == "loss" or not suffix,
                )
            )
    return traces


def _survivors(
    curve: CurveArrays, values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    chosen = np.flatnonzero(~curve.superseded)
    chosen = chosen[np.argsort(curve.iteration[chosen], kind="stable")]
    return curve.iteration[chosen], values[chosen]


def _with_gaps(
    curve: CurveArrays, values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """The superseded points, with a NaN where one attempt ends and another begins."""
    chosen = np.flatnonzero(curve.superseded)
    ends = np.flatnonzero(np.diff(curve.attempt[chosen])) + 1
    x = curve.iteration[chosen]
    return np.insert(x, ends, x[ends]), np.insert(values[chosen], ends, np.nan)


def _spike_markers(spikes: Sequence[SpikeStep], curve: CurveArrays) -> Any:
    """One marker a spike; one without a number stands where the loss should have been."""
    finite = curve.loss[np.isfinite(curve.loss)]
    middle = float(np.median(finite)) if len(finite) else 0.0

    def height(spike: SpikeStep) -> float:
        known = (v for v in (spike.peak, spike.baseline) if v is not None and np.isfinite(v))
        return next(known, middle)

    return import_plotly().graph_objects.Scatter(
        x=[spike.iteration for spike in spikes],
        y=[height(spike) for spike in spikes],
        name="spikes",
        mode="markers",
        marker={
            "color": _SPIKE,
            "size": [12] * len(spikes),
            "symbol": ["circle" if _is_number(spike.peak) else "x" for spike in spikes],
            "line": {"width": 2, "color": "white"},
        },
        text=[escape(spike.kind) for spike in spikes],
        customdata=list(range(len(spikes))),
        hovertemplate="spike (%{text})<br>iteration %{x}<br>click to see it<extra></extra>",
    )


def _is_number(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))


def _mark_restarts(figure: Any, attempts: Sequence[AttemptMark]) -> None:
    """A line through both plots where each later attempt began, a band over what was lost."""
    starts = [(n, mark.first_iteration - 0.5) for n, mark in enumerate(attempts, start=1)][1:]
    ends = [max(mark.last_iteration for mark in attempts[:n]) for n in range(1, len(attempts))]
    every = -(-len(attempts) // _LABELLED_RESTARTS) or 1
    full = {"yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    line = {"color": "#8b8f98", "width": 1, "dash": "dash"}
    band = {"fillcolor": "rgba(139,143,152,0.16)", "line": {"width": 0}}
    at_top = {"y": 0.995, "yref": "paper", "xref": "x", "xanchor": "left", "yanchor": "top"}
    figure.update_layout(
        shapes=[
            *({"type": "line", "x0": x, "x1": x, "line": line, **full} for _, x in starts),
            *(
                {"type": "rect", "x0": x, "x1": end, **band, **full}
                for (_, x), end in zip(starts, ends, strict=True)
                if end > x
            ),
        ],
        annotations=[
            {"text": f"attempt {n}", "x": x, "showarrow": False, "font": {"size": 11}, **at_top}
            for n, x in starts
            if n % every == 0
        ],
    )


def plain(figure: Any) -> dict[str, Any]:
    """Data and layout alone: the template would be 7 KB of colours that the page replaces."""
    figure.update_layout(template="none")
    plain: dict[str, Any] = json.loads(figure.to_json())
    plain["layout"].pop("template", None)
    return plain
