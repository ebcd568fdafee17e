"""The tensors of a checkpoint, one after another: what their values and copies tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flagscale.ckpt_io.sources import Sources
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import OPTIMIZER_KINDS, Piece
from flagscale.optim.doctor.findings import Finding, Kind
from flagscale.optim.doctor.progress import param_groups
from flagscale.optim.doctor.scan import (
    Agreement,
    MomentScan,
    Values,
    compare_copies,
    copies,
    momentum_bound,
    scan_agreement,
    scan_moments,
    scan_values,
)
from flagscale.optim.source import Source

__all__ = ["Copy", "Scanner", "Tensor"]

Copy = Sequence[Piece]
"""Pieces of which no two hold the same element."""

_GARBAGE_SHARE: Final = 0.5  # of the elements that are not zero
_GARBAGE_LEAST: Final = 16
_SPARSE: Final = ("embedding.", "output_layer.", ".experts.", ".router.")


@dataclass
class Tensor:
    """A trained parameter, examined.

    Args:
        name: Canonical name.
        copies: By kind: its copies.
        numel: Elements.
        agreements: Each copy of the main copies held to each copy of the weights that holds some of
            the same elements.
        moments: Each copy of the moments.
    """

    name: str
    copies: Mapping[str, tuple[Copy, ...]]
    numel: int
    agreements: dict[tuple[int, int], Agreement]
    moments: list[MomentScan]

    @property
    def differs(self) -> bool:
        """Whether any main copy is not any weight."""
        return any(one.differing for one in self.agreements.values())


class Scanner:
    """Scans tensors, and finds what needs no comparison with others."""

    def __init__(self, source: Source, lost: Mapping[str, tuple[Box, ...]]) -> None:
        self._source = source
        self._lost = lost
        self._bound = _bound(source)
        self.findings: list[Finding] = []

    def scan(self, files: Sources, name: str, kinds: Mapping[str, list[Piece]]) -> Iterator[Tensor]:
        """Scan a tensor; yields it if it is trained."""
        held = {kind: copies(pieces) for kind, pieces in kinds.items()}
        numel = Box.whole(self._source.job.tensors[name].shape).numel
        if "param" not in held:
            for copy in held["weight"]:
                self._add_values("weight", name, scan_values(files, copy, "weight"))
            self._compare_copies(files, "weight", name, held["weight"])
            return
        agreements = {
            (i, j): agreement
            for i, main in enumerate(held["param"])
            for j, weight in enumerate(held["weight"])
            if (agreement := scan_agreement(files, main, weight)).compared
        }
        for agreement in agreements.values():
            self._add_values("param", name, agreement.main)
            self._add_values("weight", name, agreement.weight)
        sparse = any(part in name for part in _SPARSE)
        moments = [
            scan_moments(
                files,
                first,
                second,
                bound=self._bound,
                sparse_rows=sparse,
                lost=self._lost.get(name, ()),
            )
            for first, second in zip(held["exp_avg"], held["exp_avg_sq"], strict=False)
        ]
        for scan in moments:
            for kind, values in scan.values.items():
                self._add_values(kind, name, values)
        for kind in OPTIMIZER_KINDS[1:]:
            self._compare_copies(files, kind, name, held[kind])
        yield Tensor(name, held, numel, agreements, moments)

    def _add_values(self, kind: str, name: str, values: Values) -> None:
        where, numel = f"{kind} {name}", values.numel

        def add(kind: Kind, count: int, what: str) -> None:
            finding = Finding(kind, where, f"{count:,} of {numel:,} elements {what}", count, numel)
            if count and finding not in self.findings:
                self.findings.append(finding)

        add(Kind.NOT_FINITE, values.not_finite, "are NaN or infinite")
        add(Kind.NEGATIVE, values.negative, "are negative, and squares are not")
        add(Kind.IMPOSSIBLE, values.huge, "are larger than any gradient makes them")
        shown = max(1, numel - values.zeros)
        if values.denormal >= _GARBAGE_LEAST and values.denormal > _GARBAGE_SHARE * shown:
            add(Kind.DENORMAL, values.denormal, "are denormal: no numbers, by their look")

    def _compare_copies(self, files: Sources, kind: str, name: str, held: Sequence[Copy]) -> None:
        for index, other in enumerate(held[1:], 2):
            differing, compared, places = compare_copies(files, held[0], other)
            if differing:
                what = (
                    f"{differing:,} of {compared:,} elements of copy {index} are not those of "
                    f"copy 1 ({', '.join(sorted(places))})"
                )
                where = f"{kind} {name}"
                self.findings.append(Finding(Kind.STALE, where, what, differing, compared))


def _bound(source: Source) -> float:
    """Largest ratio of the moments under any of the betas that are in use."""
    args = vars(source.args)
    pairs: list[Any] = [(args.get("adam_beta1"), args.get("adam_beta2"))]
    pairs += [group.get("betas") for group in param_groups(source)]
    known = [pair for pair in pairs if isinstance(pair, tuple) and len(pair) == 2]
    bounds = [momentum_bound(*pair) for pair in known if {*map(type, pair)} == {float}]
    return max(bounds, default=float("inf"))
