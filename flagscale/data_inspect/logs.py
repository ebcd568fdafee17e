"""Training logs, of any release of Megatron-LM, as a curve.

A step is a line of ``iteration N/ M | key: value | ...``. What the fields mean:

- The loss is the mean since the line before, over the steps whose update was applied.
- A loss that is no number is not printed at all, and the count of NaN iterations may stay 0. Nor is
  a loss printed while every step so far was skipped. A printed 0 means that no token counted, or
  that every step was skipped; older releases print no 0.
- The first line of a start comes out of turn, after one step, and upstream then forgets to clear
  its sums: the next line averages that step again. Our own log says that it does clear them.
- Passed-over iterations (``--iterations-to-skip``) print no line, but count as skipped samples.

Source: megatron-core 0.19.2, training/training.py, ``training_log``.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from flagscale.data_inspect.attempts import StepLine, build_curve
from flagscale.data_inspect.curve import Curve, Place
from flagscale.errors import DataError

__all__ = ["is_log_name", "read_log"]

_STEP = re.compile(r"\biteration\s+(\d{1,12})\s*/\s*(\d{1,12})\s*\|")
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d{1,5})?|inf|nan)"
# Some forks print two numbers, of this and of all steps.
_FIELD = re.compile(rf"\s*([a-z][\w \-/().,%+]*?)\s*:\s*({_NUMBER})(?:/\S+)?\s*", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_TIME = re.compile(r"\[?(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d+)?)[^\]\s]*\]?")
_LOADED = re.compile(r"\bload(?:ed|ing)\b.{0,40}\bcheckpoint\b.*\bat iteration\s+(\d{1,12})\b")
_CLEARS = re.compile(r"^\s*(?:\S+\s+)?on\s+log-interval\b")
_LOG_NAME = re.compile(r"(\.(log|txt|out|err)|(^|[._-])(stdout|stderr))([._-]?\d+)?(\.gz)?$")

_LOSSES = ("lm loss", "loss", "train loss", "training loss")
_NOT_THE_LOSS = ("scale", "balancing", "aux", "z loss", "mtp", "indexer")
_BEFORE_THE_LOSS = ("learning rate", "global batch size")
_AFTER_THE_LOSS = ("loss scale", "grad norm", "number of skipped iterations")
_LONGEST_LINE = 1 << 20
_LARGEST_COUNT = 2**62


@dataclass
class _Scan:
    """What is found in files."""

    lines: list[StepLine] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    damaged: list[Place] = field(default_factory=list)
    other_losses: set[str] = field(default_factory=set)
    clears_first: bool = False

    def drop_misspelt(self, names: set[str]) -> None:
        """Note lines as damaged that lack a loss, and more than that of what lines have there.

        Args:
            names: Of the fields of lines with a loss, in all files.
        """
        always = names.intersection((*_BEFORE_THE_LOSS, *_AFTER_THE_LOSS)) - {"grad norm"}

        def is_whole(line: StepLine) -> bool:
            return line.beside is None or always <= set(line.beside) <= names

        self.damaged += [line.source for line in self.lines if not is_whole(line)]
        self.lines = [line for line in self.lines if is_whole(line)]


def is_log_name(name: str) -> bool:
    """Whether a file of a folder is taken for a log: ``rank_0.log``, ``stdout``, ``x.out.gz``."""
    return _LOG_NAME.search(name) is not None


def read_log(*paths: Path) -> Curve:
    """The curve of a training log, or of several of one run.

    Args:
        paths: Files, plain or gzip, and folders, in which every file that is named like a log is
            read. A line that stands in several of them counts once. Where the lines have no times,
            the starts are in the order of ``paths``, and in a folder in that of the names.

    Raises:
        DataError: A file cannot be read, none of them has a step in it, or their loss is under a
            name that is not known.
    """
    scans = [_scan(file) for path in paths for file in _files(path)]
    if names := set[str]().union(*(scan.names for scan in scans)):
        for scan in scans:
            scan.drop_misspelt(names)
    files = [scan.lines for scan in scans if scan.lines]
    if not files:
        raise DataError(
            "no training step is logged there",
            where=", ".join(map(str, paths)),
            expected="lines such as ' iteration  100/  1000 | ... | lm loss: 2.345678E+00 | ...'",
            got=f"{len(scans)} file(s) without one",
            cure="give the log of the last rank, which prints the steps",
        )
    _require_losses(scans, paths)
    damaged = tuple(place for scan in scans for place in scan.damaged)
    curve = build_curve(files, any(scan.clears_first for scan in scans))
    return Curve(curve.points, curve.attempts, damaged)


def _require_losses(scans: Sequence[_Scan], paths: Sequence[Path]) -> None:
    if any(line.loss is not None for scan in scans for line in scan.lines):
        return
    others = sorted(name for scan in scans for name in scan.other_losses)
    if others:
        raise DataError(
            "the loss is logged under a name that is not known",
            where=", ".join(map(str, paths)),
            expected=" or ".join(_LOSSES),
            got=", ".join(dict.fromkeys(others)),
            cure="rename the field in a copy of the log",
        )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = (file for file in path.rglob("*") if is_log_name(file.name) and file.is_file())
        return sorted(found, key=lambda file: _natural(str(file)))
    if not path.is_file():
        raise DataError(
            "there is no such log",
            where=str(path),
            expected="a file, or a folder of logs",
            cure="check the path",
        )
    return [path]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which 9 comes before 10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _scan(path: Path) -> _Scan:
    scan = _Scan()
    loaded: re.Match[str] | None = None
    for number, raw in _raw_lines(path, scan):
        if b"iteration" not in raw and b"log-interval" not in raw:
            continue
        text = _COLOURS.sub("", raw.decode("utf-8", "replace"))
        scan.clears_first |= _CLEARS.match(text) is not None
        loaded = _LOADED.search(text) or loaded
        for origin, head, body in _steps(text):
            place = Place(str(path), number)
            line = _read_step(head, body, scan, place)
            if line is None:
                scan.damaged.append(place)
                continue
            scan.lines.append(_with_surroundings(line, origin, loaded))
            loaded = None
    return scan


def _with_surroundings(line: StepLine, origin: str, loaded: re.Match[str] | None) -> StepLine:
    """A step line, with what stands in front of it, and the checkpoint loaded before it."""
    resumed_from = int(loaded[1]) if loaded else None
    if resumed_from is not None and resumed_from >= line.iteration:  # --finetune counts from 0
        resumed_from = None
    times = list(_TIME.finditer(origin))
    return replace(
        line,
        origin=_TIME.sub("", origin).strip(),
        time=times[-1][1].replace("T", " ") if times else None,
        restarted=loaded is not None,
        resumed_from=resumed_from,
    )


def _raw_lines(path: Path, scan: _Scan) -> Iterator[tuple[int, bytes]]:
    """The lines, from 1; the rest of a compressed file that was cut off is noted as damaged."""
    number = 0
    try:
        opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
        with cast(BinaryIO, opened) as stream:
            while raw := stream.readline(_LONGEST_LINE):
                number += 1
                yield number, raw
    except EOFError:
        scan.damaged.append(Place(str(path), number + 1))
    except (OSError, zlib.error) as error:
        raise DataError(
            "a log cannot be read",
            where=f"{path}:{number + 1}",
            got=str(error),
            cure="restore the file, or leave it out",
        ) from error


def _steps(text: str) -> Iterator[tuple[str, re.Match[str], str]]:
    """What stands before each step of a line, its head, and its fields: two ranks may share one."""
    heads = list(_STEP.finditer(text))
    begin = 0
    ends = [head.start() for head in heads[1:]] + [len(text)]
    for head, end in zip(heads, ends, strict=False):
        yield text[begin : head.start()], head, text[head.end() : end]
        begin = max(head.end(), text.rfind("|", head.end(), end) + 1)


def _read_step(step: re.Match[str], body: str, scan: _Scan, source: Place) -> StepLine | None:
    """The step of a line; ``None`` if the line is damaged where the loss should be."""
    parts = [_FIELD.fullmatch(part) for part in body.split("|")[:-1]]
    names = ["" if part is None else _plain(part[1]) for part in parts]
    texts = {_plain(part[1]): part[2] for part in parts if part}
    fields = {name: float(text) for name, text in texts.items()}
    loss_name = next((name for name in _LOSSES if name in fields), None)
    iteration = int(step[1])
    beside = None
    if loss_name:
        scan.names.update(fields)
    else:
        scan.other_losses.update(filter(_sounds_like_the_loss, names))
        beside = _around_the_loss(names)
        # Half a loss that runs on from the field before it makes that no whole number.
        runs_on = not texts.get("global batch size", "1").isdecimal()
        if not beside or not all(beside) or runs_on:
            return None
    if iteration == 0:
        return None
    return StepLine(
        iteration=iteration,
        train_iters=int(step[2]),
        loss=fields[loss_name] if loss_name else None,
        skipped=_count(fields, "number of skipped iterations") or 0,
        nans=_count(fields, "number of nan iterations") or 0,
        consumed_after=_count(fields, "consumed samples"),
        skipped_samples=_count(fields, "skipped samples") or 0,
        batch_size=_count(fields, "global batch size") or None,
        grad_norm=_finite(fields, "grad norm"),
        learning_rate=_finite(fields, "learning rate"),
        loss_scale=_finite(fields, "loss scale"),
        text=f"{iteration}/{step[2]}|{body.rstrip()}",
        source=source,
        beside=beside,
    )


def _sounds_like_the_loss(name: str) -> bool:
    return "loss" in name and not any(word in name for word in _NOT_THE_LOSS)


def _around_the_loss(names: Sequence[str]) -> tuple[str, ...]:
    """The fields among which the loss stands; empty if the line does not reach that far."""
    before = [names.index(name) for name in _BEFORE_THE_LOSS if name in names]
    after = [names.index(name) for name in _AFTER_THE_LOSS if name in names]
    return tuple(names[min(before) : max(after) + 1]) if before and after else ()


@lru_cache(maxsize=1024)
def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_\-]+", name.lower()))


def _count(fields: Mapping[str, float], name: str) -> int | None:
    value = fields.get(name)
    whole = value is not None and 0 <= value < _LARGEST_COUNT and value == int(value)
    return int(value) if value is not None and whole else None


def _finite(fields: Mapping[str, float], name: str) -> float | None:
    value = fields.get(name)
    return value if value is not None and math.isfinite(value) else None
