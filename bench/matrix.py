"""The reshard matrix: every source in every format to every target in every format.

What a cell must show, and which cells stock upstream is asked about, stands in
``tests/harness/cells.py``. Sources are trained when a cell first wants them. Every finished cell is
a line of ``results.jsonl`` in the work directory, and is not run again.

Example:
    python bench/matrix.py --table docs/reshard-matrix.md
    python bench/matrix.py --only 'moe-ep2/*' --keep
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness.cells import (  # noqa: E402
    ALL_SOURCES,
    FP32_BOUND,
    Cell,
    Outcome,
    Workshop,
    covering_set,
    fp32_cells,
    growth_cells,
    matrix_cells,
)
from harness.reshard import FORMATS, GROWTH, SOURCES, TARGETS, Layout  # noqa: E402


def plan() -> dict[Cell, bool]:
    """All cells in the order they run, and whether upstream is asked about them."""
    cells = matrix_cells()
    asked = [*covering_set(cells), *fp32_cells(), *growth_cells()]
    return {**dict.fromkeys(cells, False), **dict.fromkeys(asked, True)}


def read_results(file: Path, *, retry: bool) -> dict[str, Outcome]:
    """Finished cells by name, the last line of each; without those that failed, if ``retry``."""
    lines = file.read_text().splitlines() if file.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    return {o.cell: o for o in outcomes if not (retry and o.problems)}


def run(work_dir: Path, todo: Mapping[Cell, bool], workshop: Workshop) -> int:
    """Run cells; returns how many failed."""
    started, failed = time.monotonic(), 0
    with (work_dir / "results.jsonl").open("a") as results:
        for number, (cell, asked) in enumerate(todo.items(), 1):
            outcome = workshop.check(cell, upstream=asked)
            results.write(outcome.to_json() + "\n")
            results.flush()
            failed += bool(outcome.problems)
            left = (time.monotonic() - started) / number * (len(todo) - number)
            parts = ", ".join(f"{name} {value:.1f} s" for name, value in outcome.seconds.items())
            print(f"[{number}/{len(todo)}, {left / 60:.0f} min left] {cell.name}: {parts}")
            for problem in outcome.problems:
                print(f"    {problem}")
            sys.stdout.flush()
    return failed


def describe(layout: Layout) -> str:
    """As in ``TP2 x PP2``."""
    sizes = {"DP": layout.dp, "TP": layout.tp, "PP": layout.pp, "EP": layout.ep}
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["one rank"]
    words += [f"VPP{layout.vpp}"] if layout.vpp else []
    words += [f"first stage {layout.first_layers} layer"] if layout.first_layers else []
    return " x ".join(words)


def mark(outcome: Outcome | None) -> str:
    """How a cell looks in the table."""
    if outcome is None:
        return "·"
    if outcome.problems:
        return "✗"
    return "✓" if outcome.upstream is None else "●"


def table_of(outcomes: Mapping[str, Outcome], sources: Iterable[str]) -> list[str]:
    """Rows: sources and their formats; columns: targets; a mark for each format written."""
    rows = [
        "| source | format | " + " | ".join(TARGETS) + " |",
        "|---|---|" + ":-:|" * len(TARGETS),
    ]
    for source in sources:
        for form in FORMATS:
            marks = [
                "".join(mark(outcomes.get(f"{source}/{form}/{target}/{to}")) for to in FORMATS)
                for target in TARGETS
            ]
            marks = ["" if set(text) == {"·"} else text for text in marks]
            rows.append(f"| {source} | {form} | {' | '.join(marks)} |")
    return rows


def fp32_table(outcomes: Mapping[Cell, Outcome]) -> list[str]:
    """Rows: sources; columns: targets; a mark and the format that was read."""
    marks = {(cell.source, cell.target): (cell, o) for cell, o in outcomes.items()}
    rows = ["| source | " + " | ".join(TARGETS) + " |", "|---|" + ":-:|" * len(TARGETS)]
    for source in dict.fromkeys(cell.source for cell in fp32_cells()):
        texts = []
        for target in TARGETS:
            cell, outcome = marks.get((source, target), (None, None))
            texts.append(f"{mark(outcome)} {cell.source_format}" if cell else "")
        rows.append(f"| {source} | {' | '.join(texts)} |")
    return rows


def worst(outcomes: Iterable[Outcome], gap: str) -> str:
    """Largest gap of its kind."""
    gaps = [o.loss_gaps[gap] for o in outcomes if gap in o.loss_gaps]
    return f"{max(gaps):.2g} (over {len(gaps)} cells)" if gaps else "not measured"


def render(outcomes: Mapping[str, Outcome]) -> str:
    """The page with the table."""
    cells = plan()
    done = {cell: outcomes[cell.name] for cell in cells if cell.name in outcomes}
    in_matrix = {cell: o for cell, o in done.items() if cell.source in SOURCES}
    in_fp32 = {cell: o for cell, o in done.items() if ALL_SOURCES[cell.source].is_fp32}
    asked = [o for o in in_matrix.values() if o.upstream is not None]
    same = [o for c, o in in_matrix.items() if SOURCES[c.source].layout == TARGETS[c.target].layout]
    grown = [o for cell, o in done.items() if cell.source == GROWTH.name]
    failed = [o for o in done.values() if o.problems]
    lines = [
        "# The reshard matrix",
        "",
        "Written by `python bench/matrix.py --table docs/reshard-matrix.md`; what a cell must show "
        "is in `tests/harness/cells.py`.",
        "",
        f"megatron-core {version('megatron-core')}, torch {version('torch')}, "
        f"Python {platform.python_version()}. {len(in_matrix)} of {len(matrix_cells())} cells of "
        f"the matrix run, and {len(done) - len(in_matrix)} beside it; {len(failed)} failed; "
        f"{sum(o.elements for o in done.values()):,} elements of weights and states compared.",
        "",
        "Three marks a cell, one for each format written: legacy, dp_reshardable, "
        "fully_reshardable.",
        "",
        "- ✓ all weights and states are bit-equal in global coordinates, by the files",
        "- ● the same, and stock upstream loads it, its ranks hold bit-equal weights and states, "
        "and the losses of the next three steps are equal to those of upstream's own online "
        "reshard to that layout, where it can",
        "- ✗ not so; · not run",
        "",
        *table_of(outcomes, SOURCES),
        "",
        "| source | layout | beyond the rest |",
        "|---|---|---|",
        *(
            f"| {s.name} | {describe(s.layout)} | "
            + (", ".join(f"{k}={v}" for k, v in s.arguments.items()) or "")
            + " |"
            for s in SOURCES.values()
        ),
        "",
        "## Losses",
        "",
        "Largest differences of the next three losses:",
        "",
        "| to | largest |",
        "|---|---|",
        f"| upstream's own online reshard, bf16 (equal asked) | {worst(asked, 'online')} |",
        f"| the same layout's resume, target of the same layout (equal asked) "
        f"| {worst(same, 'same-layout')} |",
        f"| the same layout's resume, bf16, any target | {worst(asked, 'same-layout')} |",
        f"| the same layout's resume, fp32, any target (at most {FP32_BOUND:g} asked) "
        f"| {worst(in_fp32.values(), 'same-layout')} |",
        "",
        "In bf16 losses differ by layout whatever holds the states: sums are rounded in another "
        "order. In fp32 stock upstream loads `fully_reshardable` alone, so that is what is written "
        "of these, from the format named:",
        "",
        *fp32_table(in_fp32),
        "",
        "## A vocabulary that grows",
        "",
        "255 rows, which TP2 does not divide. Old rows are bit-equal, new ones copies of a trained "
        "pad row; the losses include them.",
        "",
        "| cell | by the files | by upstream | largest difference of the losses |",
        "|---|---|---|---|",
        *(
            f"| {o.cell} | {'✗' if o.files else '✓'} | {'✓' if o.upstream == [] else '✗'} "
            f"| {worst([o], 'same-layout')} |"
            for o in grown
        ),
    ]
    if failed:
        lines += ["", "## Failed", "", *(f"- {o.cell}: {o.problems[0][:300]}" for o in failed)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left of the matrix and write its table."""
    parser = argparse.ArgumentParser(description="The reshard matrix, resumable.")
    add = parser.add_argument
    add("--work-dir", type=Path, default=ROOT / "outputs" / "matrix", help="default: %(default)s")
    add("--only", action="append", metavar="PATTERN", help="cells by name, with * and ?")
    add("--list", action="store_true", help="print the cells, a * at those upstream is asked about")
    add("--train", action="store_true", help="only train and resume the sources")
    add("--retry", action="store_true", help="run the cells that failed again")
    add("--fresh", action="store_true", help="forget finished cells; sources are kept")
    add("--keep", action="store_true", help="keep what the cells write")
    add("--table", type=Path, metavar="FILE", help="write the table of all cells run so far")
    args = parser.parse_args(argv)
    cells = {
        cell: asked
        for cell, asked in plan().items()
        if not args.only or any(fnmatch.fnmatchcase(cell.name, p) for p in args.only)
    }
    if args.list:
        print(*(f"{'*' if asked else ' '} {cell.name}" for cell, asked in cells.items()), sep="\n")
        return 0
    args.work_dir.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(args.work_dir.resolve(), keep=args.keep)
    if args.train:
        train(workshop, cells)
        return 0
    if args.fresh:
        (args.work_dir / "results.jsonl").unlink(missing_ok=True)
    finished = read_results(args.work_dir / "results.jsonl", retry=args.retry)
    todo = {cell: asked for cell, asked in cells.items() if cell.name not in finished}
    failed = run(args.work_dir, todo, workshop)
    if args.table:
        outcomes = read_results(args.work_dir / "results.jsonl", retry=False)
        args.table.write_text(render(outcomes))
    return int(failed > 0)


def train(workshop: Workshop, cells: Iterable[Cell]) -> None:
    """Train every source of the cells, and make the references for the losses."""
    for name in dict.fromkeys(cell.source for cell in cells):
        started = time.monotonic()
        source = ALL_SOURCES[name]
        trained = workshop.source(name, ["fully_reshardable"] if source.is_fp32 else FORMATS)
        print(f"{name}: {time.monotonic() - started:.0f} s, losses {trained.losses}", flush=True)
        if name in SOURCES:
            for target in dict.fromkeys(cell.target for cell in cells if cell.source == name):
                print(f"  {target}: {workshop.online_losses(trained, target)}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
