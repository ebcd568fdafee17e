"""Upstream's GPT dataset, which also says which sample an item is and masks quarantined tokens.

The classes keep upstream's names: a cache file, and the description whose hash names it, hold the
name of the dataset's class, and caches must be the same with this layer and without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.utils import Split

from flagscale.data_inspect.quarantine import Spans

__all__ = ["NO_SAMPLE", "QUARANTINED", "GPTDataset", "GPTDatasetConfig"]

NO_SAMPLE = -1
"""``sample_index`` of upstream's batch padding, which is no sample of the dataset."""

QUARANTINED = -1.0
"""In the ``loss_mask`` of an item: a token that would count, if it were not quarantined.

In the mask it takes the way of the mask: upstream's broadcast to the other tensor-parallel ranks
and its slices for context parallelism carry it, and nothing else has to be sent."""


@dataclass
class GPTDatasetConfig(gpt_dataset.GPTDatasetConfig):  # type: ignore[misc]
    """Upstream's configuration and what is quarantined.

    Args:
        quarantined: By dataset prefix. It is no part of what names a cache.
    """

    quarantined: Mapping[str, Spans] = field(default_factory=dict, repr=False)


class GPTDataset(gpt_dataset.GPTDataset):  # type: ignore[misc]
    """Upstream's dataset; each item has ``sample_index`` besides, a scalar int64.

    It is the index that the item was asked for by: of this dataset's shuffled order, whatever a
    blend above makes of it. In the training split the ``loss_mask`` of a quarantined token is
    :data:`QUARANTINED`; in the others nothing is masked, so that validation losses compare.
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """The sample ``idx`` of this dataset's order; padding, which never counts, for ``None``."""
        item: dict[str, torch.Tensor] = super().__getitem__(idx)
        item["sample_index"] = torch.tensor(NO_SAMPLE if idx is None else int(idx))
        if idx is not None and (spans := self._spans()):
            self._mask_quarantined(item, int(idx), spans)
        return item

    def _spans(self) -> Spans:
        if self.index_split is not Split.train:
            return {}
        spans: Spans = self.config.quarantined.get(self.dataset_path, {})
        return spans

    def _mask_quarantined(self, item: dict[str, torch.Tensor], idx: int, spans: Spans) -> None:
        place = self.shuffle_index[idx]
        (first, offset), (last, _) = self.sample_index[place], self.sample_index[place + 1]
        drawn = self.document_index[first : last + 1].tolist()  # sequences, whatever the name says
        if spans.keys().isdisjoint(drawn):
            return
        text = np.zeros(self.config.sequence_length + 1, dtype=np.bool_)
        start = -int(offset)  # of the sequence, in the text drawn
        for sequence in drawn:
            for begin, end in spans.get(sequence, ()):
                text[max(start + begin, 0) : max(start + end, 0)] = True
            start += int(self.dataset.sequence_lengths[sequence])
        mask, labels = item["loss_mask"], torch.from_numpy(text[1:])
        # A new tensor: upstream hands out its cached mask itself with the first sample.
        item["loss_mask"] = torch.where(labels & (mask > 0), QUARANTINED, mask)
