"""Diagnosis of a checkpoint: all that is wrong with it, by tensor and amount.

What can be proved is that the main copy of every parameter, rounded to the type of the model, is
its weight: both are stored, and upstream makes one from the other. Moments have no second copy;
they are held to what an Adam can make of them. Files are held to the manifest, or else to the
checksums that their archives carry. Nothing is written, and memory does not grow with the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flagscale.ckpt_io.buffer_map import read_maps
from flagscale.ckpt_io.location import detect_format, find_iteration
from flagscale.ckpt_io.manifest import MANIFEST
from flagscale.ckpt_io.sources import Sources
from flagscale.errors import CheckpointError, FlagScaleError
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import DTYPE_BYTES, Piece
from flagscale.optim.doctor.examine import Scanner, Tensor
from flagscale.optim.doctor.files import check_archives, check_files, check_manifest
from flagscale.optim.doctor.findings import Diagnosis, Finding, Kind
from flagscale.optim.doctor.judge import Judge
from flagscale.optim.doctor.progress import check_common
from flagscale.optim.flat import flat_pieces
from flagscale.optim.opening import open_source
from flagscale.optim.order import candidates
from flagscale.optim.proof import compare
from flagscale.optim.repair import RECORD, read_record
from flagscale.optim.source import Source

__all__ = ["diagnose"]

Progress = Callable[[int, int], None]


def diagnose(
    load_dir: Path, iteration: int | None = None, *, on_progress: Progress | None = None
) -> Diagnosis:
    """Look at everything in a checkpoint.

    Args:
        load_dir: As ``--load`` takes it, or the directory of an iteration.
        iteration: The one wanted, counted from 1; ``None``: the last complete one.
        on_progress: Called with the bytes looked at, and those to look at in all.

    Raises:
        CheckpointError: There is no checkpoint of a known format.
    """
    iteration, directory = find_iteration(load_dir, iteration)
    ckpt_format = detect_format(directory)
    report = _Report(directory, on_progress or (lambda _done, _all: None))
    try:
        source = _opened(directory)
    except FlagScaleError as error:
        report.findings += check_files(directory, ckpt_format)
        if not report.findings:
            where = error.where or str(directory)
            found = f"{error.what}; expected {error.expected}; got {error.got}"
            report.findings.append(Finding(Kind.UNREADABLE, where, found))
        report.unchecked.append("tensors and common state: the checkpoint does not open")
        report.check_bytes(ckpt_format, None)
        return report.diagnosis(iteration, ckpt_format)
    report.size += sum(piece.box.numel * DTYPE_BYTES[piece.dtype] for piece in source.pieces)
    report.check_bytes(ckpt_format, source)
    findings, notes = check_common(source, iteration)
    report.findings += findings
    report.notes += notes
    report.checked.append("iteration, samples, scheduler and steps agree" * (not findings))
    report.check_tensors(source)
    return report.diagnosis(iteration, f"{ckpt_format}, {source.optim_format}")


def _opened(directory: Path) -> Source:
    """The checkpoint, its flat buffers in the order that fits the weights best."""
    source = open_source(directory, prove=False)
    if not source.buffers:
        return source
    weights = source.of_kind("weight")

    def wrong(one: Source) -> int:
        return len(list(compare(directory, weights, one.of_kind("param"))))

    best, least = source, wrong(source)
    others = candidates(source.job, source.buffers, read_maps(directory), {}) if least else ()
    for candidate in others:
        if isinstance(candidate, CheckpointError):
            continue
        states = [
            piece
            for buffer, params in zip(source.buffers, candidate.params, strict=True)
            for kind, runs in buffer.runs.items()
            for piece in flat_pieces(kind, "float32", params, runs)
        ]
        other = replace(source, pieces=(*weights, *states), order=candidate.name)
        if (count := wrong(other)) < least:
            best, least = other, count
    return best


@dataclass
class _Report:
    """A diagnosis in the making."""

    directory: Path
    on_progress: Progress
    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    size: int = 0
    done: int = 0

    def diagnosis(self, iteration: int, form: str) -> Diagnosis:
        self.on_progress(self.size, self.size)
        return Diagnosis(
            self.directory,
            iteration,
            form,
            tuple(self.findings),
            tuple(filter(None, self.checked)),
            tuple(self.notes),
            tuple(self.unchecked),
        )

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        self.on_progress(min(self.done, self.size), self.size)

    def check_bytes(self, ckpt_format: str, source: Source | None) -> None:
        """Hold the files to digests made when they were written."""
        self.size += sum(p.stat().st_size for p in self.directory.rglob("*") if p.is_file())
        has_manifest = (self.directory / MANIFEST).exists()
        known = {finding.where for finding in self.findings}
        if has_manifest:
            found, what = check_manifest(self.directory, self.advance)
        else:
            pieces = source.pieces if source else ()
            found, what = check_archives(self.directory, ckpt_format, pieces, self.advance)
        self.findings += [finding for finding in found if finding.where not in known]
        self.checked.append(what)
        if not has_manifest:
            self.unchecked.append(f"SHA-256 digests: there is no {MANIFEST}")

    def check_tensors(self, source: Source) -> None:
        """Scan every tensor, then say what is wrong with those that are not right."""
        table: dict[str, dict[str, list[Piece]]] = {}
        for piece in source.pieces:
            kinds = table.setdefault(piece.tensor.name, {})
            kinds.setdefault(piece.tensor.kind, []).append(piece)
        lost: Mapping[str, tuple[Box, ...]] = {}
        try:
            lost = read_record(self.directory)
        except CheckpointError as error:
            self.findings.append(Finding(Kind.UNREADABLE, RECORD, f"{error.what}: {error.got}"))
        if lost:
            numel = sum(box.numel for boxes in lost.values() for box in boxes)
            self.notes.append(
                f"repaired from #5077: {numel:,} elements of both moments were lost and set to "
                "zero; their main copies were made from the weights"
            )
        scanner = Scanner(source, lost)
        tensors: list[Tensor] = []
        with Sources(self.directory) as files:
            for name, kinds in table.items():
                before = files.bytes_read
                tensors += scanner.scan(files, name, kinds)
                self.advance(files.bytes_read - before)
            self.findings += scanner.findings
            judge = Judge.of(source, files, tensors)
            for tensor in tensors:
                self.findings += judge.judge(tensor)
        self._summarize(source, tensors)

    def _summarize(self, source: Source, tensors: Sequence[Tensor]) -> None:
        equal = sum(not tensor.differs for tensor in tensors)
        compared = sum(a.compared for tensor in tensors for a in tensor.agreements.values())
        dtype = source.job.model.dtype
        how = "is the weight" if dtype == "float32" else f"rounded to {dtype}, is the weight"
        self.checked.append(
            f"main copy, {how}: {equal} of {len(tensors)} parameters, {compared:,} elements, all"
        )
        numel = sum(scan.values["exp_avg"].numel for t in tensors for scan in t.moments)
        self.checked.append(
            f"moments finite, exp_avg_sq not negative, possible for Adam: {numel:,} elements"
        )
        self.unchecked.append("moments: that they are the right ones (they have no second copy)")
        if dtype != "float32":
            self.unchecked.append(
                f"main copies: the bits that {dtype} does not have (they have no second copy)"
            )
        self.unchecked.append("random generators: their states have no second copy")
