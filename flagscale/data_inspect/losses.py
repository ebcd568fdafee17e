"""The ledger's losses with the samples they are of, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from flagscale.data_inspect.checksums import ids_crc
from flagscale.data_inspect.excess import StepLosses
from flagscale.data_inspect.ledger import StepRows
from flagscale.data_inspect.mapping import StartMapping
from flagscale.data_inspect.run import Run, StartRecord
from flagscale.errors import DataError

__all__ = ["Losses", "open_losses"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Losses:
    """The steps of a run that read the same datasets in the same order.

    Args:
        mapping: Of the newest start.
        first_iteration: Before it the run had read other orders; 1 if it never did.
        last_iteration: The last step that is done.
    """

    mapping: StartMapping
    first_iteration: int
    last_iteration: int
    _run: Run
    _records: tuple[StartRecord, ...]

    def steps(self, first: int, last: int) -> Iterator[StepLosses]:
        """Those steps that the ledger has, in order, each held against its checksum of the ids.

        Raises:
            DataError: The ledger is damaged, or what is computed is not what the job drew.
        """
        ledger = self._run.ledger
        if ledger is None:
            return
        mappings = {self.mapping.record.name: self.mapping}
        try:
            for attempt, iterations in ledger.surviving():
                wanted = [i for i in iterations if first <= i <= last]
                if not wanted or attempt.name not in {one.name for one in self._records}:
                    continue
                if attempt.name not in mappings:
                    mappings[attempt.name] = StartMapping(StartRecord.of_attempt(attempt))
                for iteration in wanted:
                    rows = ledger.step(iteration)
                    if rows is not None:
                        yield _losses(mappings[attempt.name], iteration, rows)
        finally:
            for name, mapping in mappings.items():
                if name != self.mapping.record.name:
                    mapping.corpus.close()


@contextmanager
def open_losses(run: Run, progress: Progress | None = None) -> Iterator[Losses]:
    """Open the ledger's losses, as far back as the order of the data is that of the newest start.

    Raises:
        ConfigError: The arguments of a start make no sense.
        DataError: There is no ledger, or data are missing or damaged.
    """
    if run.ledger is None:
        raise DataError(
            "there is no ledger, and so no loss of single samples",
            where=str(run.directory),
            cure="train with the ledger, which a run that saves writes by default",
        )
    started = [one for one in run.starts if one.attempt is not None and one.attempt.iterations]
    if not started:
        raise DataError(
            "no step is in the ledger yet", where=str(run.ledger_directory), cure="wait for some"
        )
    newest = started[-1]
    alike = [one for one in started if _order(one) == _order(newest)]
    others = [one for one in started if one.start.iteration < newest.start.iteration]
    other_orders = [one for one in others if one not in alike]
    first = 1
    if other_orders:
        after = [one for one in alike if one.name > other_orders[-1].name]
        alike, first = after, after[0].start.iteration + 1
    with StartMapping(newest, progress=progress) as mapping:
        last = max(i for _, iterations in run.ledger.surviving() for i in iterations)
        yield Losses(mapping, first, last, run, tuple(alike))


def _order(record: StartRecord) -> object:
    """Equal where a dataset's own index means the same sample."""
    if record.attempt is None:
        return None
    return [
        (one["prefix"], one.get("description_hash")) for one in record.attempt.segment["datasets"]
    ]


def _losses(mapping: StartMapping, iteration: int, rows: StepRows) -> StepLosses:
    micro_batches = max(row.micro_batches for row in rows.rows.values())
    drawn = mapping.drawn(rows.any_row.consumed_before, micro_batches)
    datasets, samples, losses, blocks = [], [], [], []
    for rank, row in rows.rows.items():
        mine = drawn.first(row.micro_batches)
        datasets.append(mine.datasets[rank].ravel())
        samples.append(mine.samples[rank].ravel())
        losses.append(row.sample_losses)
        blocks.append(row.block_losses)
        if ids_crc(datasets[-1], samples[-1]) != row.ids_crc:
            raise DataError(
                "what is computed is not what the job drew",
                where=f"iteration {iteration}, data-parallel rank {rank}",
                expected=f"checksum of the ids {row.ids_crc:08x}, as the ledger has it",
                cure="see `verify`: datasets, caches or ledger are not those of the run",
            )
    return StepLosses(
        iteration=iteration,
        datasets=np.concatenate(datasets),
        samples=np.concatenate(samples),
        losses=np.concatenate(losses),
        block_losses=np.concatenate(blocks),
    )
