"""What a diagnosis is made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

__all__ = ["Diagnosis", "Finding", "Kind"]


class Kind(StrEnum):
    """Of damage."""

    MISSING = "missing file"
    SHORT = "short or unreadable file"
    CHANGED = "changed bytes"
    UNREADABLE = "cannot be opened"
    COMPACT = "slices of #5077"
    ZEROED = "zeroed"
    SHIFTED = "shifted"
    SWAPPED = "swapped gate and up"
    PERMUTED = "permuted rows"
    STALE = "stale copy"
    DIFFERS = "main copy is not the weight"
    NOT_FINITE = "not finite"
    NEGATIVE = "negative"
    DENORMAL = "denormal"
    IMPOSSIBLE = "impossible moments"
    NO_MOMENTS = "no moments"
    COMMON = "common state"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        kind: What it is.
        where: ``param NAME`` and the like for a tensor, else a file or an entry.
        what: A sentence with the amount.
        elements: That are wrong, of a tensor; bytes, of a file; 0 where neither says anything.
        of: Elements or bytes in all.
    """

    kind: Kind
    where: str
    what: str
    elements: int = 0
    of: int = 0

    def __str__(self) -> str:
        """As a report says it."""
        return f"{self.kind}: {self.where}: {self.what}"


@dataclass(frozen=True)
class Diagnosis:
    """What was found, and what was not looked at.

    Args:
        directory: Of the iteration.
        iteration: Counted from 1.
        form: Format, and how the optimizer is stored.
        findings: All that is wrong.
        checked: What was looked at, with figures.
        notes: What is odd, and no damage.
        unchecked: What nothing in the checkpoint can prove.
    """

    directory: Path
    iteration: int
    form: str
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    notes: tuple[str, ...]
    unchecked: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def report(self) -> Iterator[str]:
        """As a person reads it, line by line."""
        yield f"checkpoint  {self.directory}, iteration {self.iteration}; {self.form}"
        for label, lines in (
            ("checked", self.checked),
            ("note", self.notes),
            ("not checked", self.unchecked),
            ("DAMAGE", tuple(map(str, self.findings))),
        ):
            for line in lines:
                yield f"{label:<11} {line}"
        verdict = "sound" if self.sound else f"DAMAGED: {len(self.findings)} findings"
        yield f"verdict     {verdict}"
