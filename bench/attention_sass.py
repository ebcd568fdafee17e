"""Reads what the assembler made of a kernel: its loops, and what is in them.

``nvdisasm -c`` prints labels (``.L_x_3:``) and instructions (``/*0a10*/ @P0 BRA `(.L_x_3) ;``). A
branch to a label that stands before it closes a loop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Loop", "Usage", "innermost_loops", "matrix_loops", "read_usage"]

_LABEL = re.compile(r"^\s*(\.L_[\w.$]+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_TARGET = re.compile(r"`\((\.L_[\w.$]+)\)")
_MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Loop:
    """What stands between the label a loop begins at and the branch back to it.

    Attributes:
        begin: Number of its first instruction in the kernel, from 0.
        end: Number of the branch that closes it.
        matrix: Matrix instructions.
        local: Loads and stores of local memory, which is what was spilled.
    """

    begin: int
    end: int
    matrix: int
    local: int


@dataclass(frozen=True)
class Usage:
    """What ``ptxas -v`` says of a kernel: registers of a thread, bytes spilled."""

    registers: int
    spill_stores: int
    spill_loads: int

    @property
    def spilled(self) -> int:
        """Bytes stored and loaded, in all."""
        return self.spill_stores + self.spill_loads


def innermost_loops(listing: str) -> list[Loop]:
    """The loops of a kernel that hold no other loop, in their order.

    Args:
        listing: ``nvdisasm -c`` of a file with one kernel.

    Raises:
        ValueError: There is no instruction in the listing, or a branch goes to no label.
    """
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[2], found[3]))
    if not instructions:
        raise ValueError("the listing has no instruction")
    spans = [
        (begin, end)
        for end, (name, operands) in enumerate(instructions)
        if name.startswith("BRA") and (begin := _begin(labels, operands)) <= end
    ]
    # A branch to itself is the trap behind the end of every kernel.
    spans = sorted({(begin, end) for begin, end in spans if begin < end})
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [_counted(instructions, begin, end) for begin, end in inner]


def matrix_loops(listing: str, expected: int) -> list[Loop]:
    """The innermost loops that multiply matrices.

    Args:
        listing: As above.
        expected: How many there must be.

    Raises:
        ValueError: There are more or fewer: the listing was not understood, or the compiler
            unrolled a loop, joined two or dropped one.
    """
    found = [loop for loop in innermost_loops(listing) if loop.matrix]
    if len(found) != expected:
        raise ValueError(f"{len(found)} loops with matrix instructions, not {expected}: {found}")
    return found


def read_usage(text: str) -> Usage:
    """The numbers in the output of ``ptxas -v`` for one kernel.

    Raises:
        ValueError: A number is not there.
    """
    patterns = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    numbers = []
    for pattern in patterns:
        found = re.findall(pattern, text)
        if len(found) != 1:
            raise ValueError(f"ptxas says {pattern!r} {len(found)} times:\n{text}")
        numbers.append(int(found[0]))
    return Usage(*numbers)


def _begin(labels: dict[str, int], operands: str) -> int:
    target = _TARGET.search(operands)
    if target is None or target[1] not in labels:
        raise ValueError(f"a branch to no known label: BRA{operands}")
    return labels[target[1]]


def _counted(instructions: list[tuple[str, str]], begin: int, end: int) -> Loop:
    names = [name.split(".")[0] for name, _ in instructions[begin : end + 1]]
    return Loop(
        begin,
        end,
        matrix=sum(name in _MATRIX for name in names),
        local=sum(name in ("LDL", "STL") for name in names),
    )
