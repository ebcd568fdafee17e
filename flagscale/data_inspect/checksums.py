"""Checksums by which a training job and an answer about it prove to mean the same samples.

Both are crc32, both can be taken piece by piece: pass the last result as ``crc``. Order counts.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from flagscale.errors import DataError

__all__ = ["ids_crc", "tokens_crc"]

_LITTLE_ENDIAN = np.dtype("<i8")


def ids_crc(dataset_ids: npt.ArrayLike | int, sample_indices: npt.ArrayLike, crc: int = 0) -> int:
    """The crc32 of which samples were drawn.

    Args:
        dataset_ids: [n] ordinals in the blend, or one for all; 0 where nothing is blended.
        sample_indices: [n] indices in each sample's own dataset, in the order drawn.
        crc: Of what was drawn before.

    Returns:
        Over the little-endian int64 pairs (dataset id, sample index).
    """
    indices = np.asarray(sample_indices)
    pairs = np.empty((indices.size, 2), _LITTLE_ENDIAN)
    pairs[:, 0] = dataset_ids
    pairs[:, 1] = indices
    return zlib.crc32(pairs, crc)


def tokens_crc(tokens: npt.ArrayLike, crc: int = 0) -> int:
    """The crc32 of what the model was given to read.

    Args:
        tokens: [n, seq_length + 1]: each sample's tokens and the label behind the last, after
            padding ids were replaced, in the order drawn. A batch of tokens and labels is
            ``concatenate([tokens, labels[:, -1:]], axis=1)``.
        crc: Of what was drawn before.

    Returns:
        Over the little-endian int64 of each sample in turn.

    Raises:
        DataError: The shape is another.
    """
    array = np.ascontiguousarray(tokens, _LITTLE_ENDIAN)
    if array.ndim != 2:
        raise DataError(
            "a checksum of tokens needs whole samples",
            expected="[n, seq_length + 1]",
            got=list(array.shape),
            cure="pass the tokens of a batch, each with its last label",
        )
    return zlib.crc32(array, crc)
