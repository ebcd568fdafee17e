"""Feeds a job chosen samples instead of the training order: one after another, as a list says.

With a learning rate of 0 and one sample a step, a stock training run then scores samples: the
ledger has the loss of each, and the gradient norm of each step is that of its sample.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.errors import DataError

__all__ = ["ReplayedSamples", "add_arguments", "read_samples"]


def add_arguments(parser: ArgumentParser) -> None:
    """``--replay-samples``."""
    parser.add_argument_group(title="FlagScale: replay").add_argument(
        "--replay-samples",
        default=None,
        metavar="FILE",
        help="Train on these samples only, in this order, as `tools/inspect_data.py replay` has "
        "written them.",
    )


@dataclass(frozen=True)
class ReplayedSamples:
    """Samples of a training dataset, which stand in for it.

    Args:
        num_samples: For which the datasets are built: their order depends on it.
        samples: ``(dataset, its own index of the sample)`` of each, in the order they are read.
    """

    num_samples: int
    samples: tuple[tuple[int, int], ...]

    def of(self, train: Any) -> Any:
        """The samples as a dataset (``torch.utils.data.Dataset``).

        Args:
            train: Upstream's training dataset, blended or not.
        """
        from torch.utils.data import Dataset

        samples = self.samples

        class Replayed(Dataset[Any]):
            """What upstream asks of a training dataset, over a list."""

            split = getattr(train, "split", None) or getattr(train, "index_split", None)
            datasets = getattr(train, "datasets", [train])

            def __len__(self) -> int:
                return len(samples)

            def __getitem__(self, index: int) -> dict[str, Any]:
                dataset, sample = samples[index]
                return {"dataset_id": dataset, **self.datasets[dataset][sample]}

        return Replayed()


def read_samples(path: str) -> ReplayedSamples:
    """Read the file of ``--replay-samples``.

    Raises:
        DataError: It cannot be read, or is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        samples = tuple((int(dataset), int(sample)) for dataset, sample in content["samples"])
        return ReplayedSamples(int(content["num_samples"]), samples)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "the samples to replay cannot be read",
            where=path,
            expected='{"num_samples": N, "samples": [[DATASET, SAMPLE], ...]}',
            got=str(error),
            cure="let `tools/inspect_data.py replay` write the file",
        ) from error
