"""The cells of the reshard matrix, which of them upstream is asked about, and what each must show.

A cell takes one source in one format to one target in one format. *Files*: all weights and states
are bit-equal to the truth in global coordinates. A flat output (legacy, ``dp_reshardable``) is, for
this, resharded back to ``fully_reshardable`` by our tool and read by torch: cheap enough for every
cell, but an error that the way back undoes would not show. *Upstream*: stock upstream loads the
output at the target's layout, what its ranks hold is bit-equal to the truth, and so are the losses
of the next steps to those of upstream's own online reshard to that layout. This needs nothing of
ours to read, and is done for a set of cells that covers all pairs.

In bf16 the losses of two layouts differ by some 1e-5 whatever holds the states, since sums are
rounded in another order. So the bound of 2e-6 between layouts is for the same sources in fp32.
There stock upstream loads ``fully_reshardable`` alone: its loaders of the flat formats write in
place into parameters that require a gradient, and raise.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.corpus import VOCAB_SIZE, write_corpus
from harness.reshard import (
    FORMATS,
    GROWTH,
    SOURCES,
    STOPPED_AT,
    TARGETS,
    Source,
    TrainedSource,
    in_fp32,
    reshard,
    resume,
    targets_of,
    train_source,
)
from harness.states import GlobalState, differences, read_fully_reshardable

__all__ = [
    "ALL_SOURCES",
    "FP32_BOUND",
    "TEST_CELLS",
    "Cell",
    "Outcome",
    "Workshop",
    "covering_set",
    "fp32_cells",
    "growth_cells",
    "matrix_cells",
]

FP32_BOUND = 2e-6
"""Between the losses of two layouts in fp32."""

BF16_BOUND = 5e-4
"""Between the losses of two layouts in bf16: against gross errors alone."""

_NO_RNG = "--no-load-rng"
_EMBEDDING = "embedding.word_embeddings.weight"

ALL_SOURCES: Mapping[str, Source] = {
    **SOURCES,
    **{fp32.name: fp32 for fp32 in map(in_fp32, SOURCES.values())},
    GROWTH.name: GROWTH,
}
"""By name: those of the matrix, the same in fp32, and the one whose vocabulary grows."""


@dataclass(frozen=True, order=True)
class Cell:
    """One conversion; all four are names."""

    source: str
    source_format: str
    target: str
    target_format: str

    @property
    def name(self) -> str:
        """As in ``dp2/legacy/tp2/dp_reshardable``."""
        return f"{self.source}/{self.source_format}/{self.target}/{self.target_format}"

    @property
    def pairs(self) -> frozenset[tuple[str, ...]]:
        """What of the covering set's demands this cell meets."""
        return frozenset(
            {
                ("source, format", self.source, self.source_format),
                ("target, format", self.target, self.target_format),
                ("source, target", self.source, self.target),
                ("format, format", self.source_format, self.target_format),
            }
        )


def matrix_cells() -> list[Cell]:
    """Every source x format x target x format."""
    return [
        Cell(source.name, source_format, target.name, target_format)
        for source in SOURCES.values()
        for source_format in FORMATS
        for target in targets_of(source)
        for target_format in FORMATS
    ]


def covering_set(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that together have every pair which ``cells`` have, few of them: a greedy choice."""
    missing = frozenset().union(*(cell.pairs for cell in cells))
    chosen: list[Cell] = []
    while missing:
        # Of equals the one whose formats were chosen least, so that all conversions occur.
        def merit(cell: Cell, missing: frozenset[tuple[str, ...]] = missing) -> tuple[int, int]:
            forms = cell.source_format, cell.target_format
            used = sum(forms == (other.source_format, other.target_format) for other in chosen)
            return len(cell.pairs & missing), -used

        chosen.append(max(cells, key=merit))
        missing -= chosen[-1].pairs
    return chosen


def fp32_cells() -> list[Cell]:
    """Every source x target in fp32, to the one format that upstream loads, from each in turn."""
    forms = list(FORMATS)
    pairs = [(in_fp32(s).name, t.name) for s in SOURCES.values() for t in targets_of(s)]
    return [
        Cell(source, forms[i % len(forms)], target, "fully_reshardable")
        for i, (source, target) in enumerate(pairs)
    ]


def growth_cells() -> list[Cell]:
    """The row in which the vocabulary must grow."""
    return [Cell(GROWTH.name, form, "tp2", form) for form in FORMATS]


TEST_CELLS = (
    Cell("dp2", "dp_reshardable", "tp2", "fully_reshardable"),
    Cell("tp2-pp2", "legacy", "dp3", "dp_reshardable"),
    Cell("tied-pp2", "fully_reshardable", "tp2-pp2", "legacy"),
    Cell("pp2-vpp2", "dp_reshardable", "tp4", "fully_reshardable"),
    Cell("moe-ep2", "legacy", "ep1", "dp_reshardable"),
)
"""What the test command runs of the matrix."""


@dataclass
class Outcome:
    """What a cell showed.

    Args:
        cell: Its name.
        files: What was wrong by the files; empty if nothing was.
        upstream: The same by stock upstream; ``None`` if it was not asked.
        elements: Compared by the files.
        losses: Of the steps after the load, by iteration.
        loss_gaps: Largest difference of the losses to those of ``same-layout`` and ``online``.
        seconds: Wall time by part.
        told: Options with which the tool said to resume.
    """

    cell: str
    files: list[str] = field(default_factory=list)
    upstream: list[str] | None = None
    elements: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    loss_gaps: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """All that was wrong."""
        return [*self.files, *(self.upstream or [])]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def _gap(left: Mapping[int, float], right: Mapping[int, float]) -> float:
    return max(abs(left[step] - right[step]) for step in left)


def _growth_problems(truth: GlobalState, got: GlobalState, rows: int) -> list[str]:
    """New rows that are not copies of one trained pad row, in weight and states alike."""
    lines = []
    for key in sorted({key for kind, key in truth.tensors if truth.tensors[kind, key].ndim == 2}):
        kinds = [kind for kind, name in truth.tensors if name == key]
        if got.tensors["weight", key].shape[0] == truth.tensors["weight", key].shape[0]:
            continue
        copied = [
            row
            for row in range(VOCAB_SIZE, rows)
            if all(
                (got.tensors[kind, key][rows:] == truth.tensors[kind, key][row]).all()
                for kind in kinds
            )
        ]
        if not copied:
            lines.append(f"{key}: the new rows are not copies of one trained pad row")
    return lines


@dataclass
class Workshop:
    """Trains sources when they are wanted, and checks cells.

    Args:
        work_dir: Sources are kept here and found again.
        in_process: Call the tool's ``main`` instead of starting a process each time.
        online: Hold bf16 losses to those of upstream's own online reshard, which must be equal.
        keep: Leave the outputs of cells in place.
    """

    work_dir: Path
    in_process: bool = True
    online: bool = True
    keep: bool = False
    _trained: dict[str, TrainedSource] = field(default_factory=dict)

    @property
    def corpus(self) -> Path:
        """Prefix of the data all jobs train on."""
        prefix = self.work_dir / "corpus" / "text_document"
        if not prefix.with_suffix(".idx").exists():
            prefix.parent.mkdir(parents=True, exist_ok=True)
            write_corpus(prefix)
        return prefix

    def source(self, name: str, formats: Iterable[str]) -> TrainedSource:
        """A source, trained by now, with the losses of a same-layout resume for each format."""
        known = self._trained.get(name)
        if known is None or not {*formats} <= {*known.losses}:
            forms = [*(known.losses if known else ()), *formats]
            root = self.work_dir / "sources" / name
            known = train_source(ALL_SOURCES[name], self.corpus, root, forms)
            self._trained[name] = known
        return known

    def check(self, cell: Cell, *, upstream: bool) -> Outcome:
        """Reshard, compare, and let upstream judge where asked; a failure is an outcome too."""
        outcome = Outcome(cell.name)
        # In fp32 stock upstream resumes from one format alone.
        form = cell.source_format if cell.source in SOURCES else "fully_reshardable"
        trained = self.source(cell.source, [form])
        work = self.work_dir / "cells" / cell.name.replace("/", ".")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        rows = int(trained.truth.progress["padded_vocab_size"])
        try:
            rows = self._check_files(cell, trained, work, outcome)
        except Exception as error:  # whatever the tool raises is this cell's, not the matrix's
            outcome.files.append(f"{type(error).__name__}: {error}")
        # Where only the way back failed, upstream can still judge the output.
        if upstream and (work / "reshard").exists():
            outcome.upstream = []
            try:
                same = trained.losses[form]
                outcome.upstream += self._check_upstream(cell, trained, same, rows, work, outcome)
            except AssertionError as error:
                outcome.upstream.append(str(error)[-2000:])
        if not self.keep and not outcome.problems:
            shutil.rmtree(work)
        return outcome

    def _check_files(self, cell: Cell, trained: TrainedSource, work: Path, outcome: Outcome) -> int:
        """Returns the rows of the embedding in the output."""
        target, experts = TARGETS[cell.target].layout, trained.source.has_experts
        may_grow = cell.source == GROWTH.name

        def convert(source: Path, name: str, form: str, *options: object) -> Path:
            start = time.perf_counter()
            printed = reshard(
                source, work / name, target, form, has_experts=experts, options=options,
                in_process=self.in_process,
            )  # fmt: skip
            outcome.seconds[name] = round(time.perf_counter() - start, 3)
            if name == "reshard" and _NO_RNG in printed:
                outcome.told.append(_NO_RNG)
            return work / name

        options = ["--allow-vocab-growth"] if may_grow else []
        read = convert(
            trained.checkpoint(cell.source_format), "reshard", cell.target_format, *options
        )
        if cell.target_format != "fully_reshardable":
            read = convert(read, "reshard-back", "fully_reshardable")
        got = read_fully_reshardable(read / f"iter_{STOPPED_AT:07d}")
        outcome.elements = sum(bits.size for bits in got.tensors.values())
        old_rows = int(trained.truth.progress["padded_vocab_size"])
        grown_from = old_rows if may_grow else None
        outcome.files += differences(trained.truth, got, grown_from=grown_from)
        if may_grow:
            outcome.files += _growth_problems(trained.truth, got, old_rows)
        return int(got.tensors["weight", _EMBEDDING].shape[0])

    def _check_upstream(
        self,
        cell: Cell,
        trained: TrainedSource,
        same: Mapping[int, float],
        rows: int,
        work: Path,
        outcome: Outcome,
    ) -> list[str]:
        source, target = trained.source, TARGETS[cell.target].layout
        start = time.perf_counter()
        resumed = resume(
            source, work / "reshard", FORMATS[cell.target_format].ckpt_format, target,
            self.corpus, work / "upstream", padded_vocab_size=rows,
            no_load_rng=_NO_RNG in outcome.told,
        )  # fmt: skip
        outcome.seconds["upstream"] = round(time.perf_counter() - start, 3)
        outcome.losses = {str(step): loss for step, loss in resumed.losses.items()}
        outcome.loss_gaps["same-layout"] = gap = _gap(resumed.losses, same)
        old_rows = int(trained.truth.progress["padded_vocab_size"])
        if rows != old_rows:  # then the new rows are in the softmax, and the losses others
            return differences(trained.truth, resumed.state, grown_from=old_rows)
        problems = differences(trained.truth, resumed.state)
        bound = FP32_BOUND if source.is_fp32 else BF16_BOUND
        if gap > (0.0 if source.layout == target else bound):
            problems.append(f"losses are {gap:.3g} from those of the same layout")
        online = self.online_losses(trained, cell.target) if self.online else ""
        if isinstance(online, dict):  # else upstream cannot, and there is nothing to be equal to
            outcome.loss_gaps["online"] = gap = _gap(resumed.losses, online)
            if gap:
                problems.append(f"losses are {gap:.3g} from upstream's own reshard")
        return problems

    def online_losses(self, trained: TrainedSource, target: str) -> dict[int, float] | str:
        """Losses after stock upstream has itself loaded the source at a target's layout.

        Returns:
            By iteration; or, where it cannot, the last line of its error.
        """
        work = self.work_dir / "online" / f"{trained.source.name}.{target}"
        file = work / "losses.json"
        if not file.exists():
            shutil.rmtree(work, ignore_errors=True)
            try:
                resumed = resume(
                    trained.source, trained.checkpoint("fully_reshardable"), "torch_dist",
                    TARGETS[target].layout, self.corpus, work,
                    padded_vocab_size=trained.truth.progress["padded_vocab_size"],
                )  # fmt: skip
                wrong = differences(trained.truth, resumed.state)
                assert not wrong, f"upstream's own reshard differs: {wrong}"
                answer: dict[str, Any] = {"losses": resumed.losses}
            except AssertionError as error:
                answer = {"error": str(error).strip().splitlines()[-1]}
            work.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(answer))
        answer = json.loads(file.read_text())
        if "error" in answer:
            return str(answer["error"])
        return {int(step): loss for step, loss in answer["losses"].items()}
