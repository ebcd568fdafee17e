"""Which machines a collective fails for, found by trying pairs. Pure but for the trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["find_bad"]


def find_bad(
    hosts: Sequence[str], try_groups: Callable[[Sequence[tuple[str, ...]]], Sequence[bool]]
) -> tuple[str, ...]:
    """The machines that work with no other, given that all of them together do not work.

    Args:
        hosts: The machines.
        try_groups: Tries disjoint groups at the same time; whether each works.

    Returns:
        The machines to leave out; empty when every pair works, and only all together do not.
    """
    groups = [tuple(hosts[i : i + 2]) for i in range(0, len(hosts), 2)]
    works = try_groups(groups)
    good = [host for group, well in zip(groups, works, strict=True) if well for host in group]
    suspects = [
        host for group, well in zip(groups, works, strict=True) if not well for host in group
    ]
    if not good:
        return tuple(suspects)
    bad: list[str] = []
    while suspects:  # each beside a machine that is known to work
        now, suspects = suspects[: len(good)], suspects[len(good) :]
        pairs = [(host, partner) for host, partner in zip(now, good, strict=False)]
        results = try_groups(pairs)
        bad += [host for host, well in zip(now, results, strict=True) if not well]
    return tuple(host for host in hosts if host in bad)
