"""The tensors of a Hugging Face directory, as safetensors' own reader gives them.

For the verification of conversions, so nothing here is what makes them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from flagscale.ckpt_convert.tensors import HFTensor
from flagscale.errors import CheckpointError

__all__ = ["HFDirectory"]

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_MAPPED: Final = 64 << 20  # bytes read from a file before it is opened anew, which frees its pages


class HFDirectory:
    """The tensors of a directory.

    Args:
        path: The directory.

    Raises:
        CheckpointError: It has a file that is none of safetensors, or an index that is no JSON.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: tuple[str, Any] = ("", None)
        self._read = 0
        self._index = self._read_index() if (path / _INDEX).exists() else None
        self._stored = {
            file: self._keys(file) for file in sorted(at.name for at in path.glob("*.safetensors"))
        }
        self.files = {name: file for file, names in self._stored.items() for name in names}

    def _read_index(self) -> Mapping[str, Any]:
        try:
            index = json.loads((self._path / _INDEX).read_text(encoding="utf-8"))
            return {"files": dict(index["weight_map"]), **index["metadata"]}
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                "this is no index of safetensors",
                where=str(self._path / _INDEX),
                expected="weight_map, and total_size in metadata",
                got=repr(error),
            ) from error

    def _keys(self, file: str) -> list[str]:
        try:
            with safe_open(self._path / file, "pt") as opened:
                return list(opened.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "this is no file of safetensors", where=str(self._path / file), got=str(error)
            ) from error

    def verify_names(self, tensors: Sequence[HFTensor]) -> Iterator[str]:
        """Tensors missing, too many, in several files, or elsewhere than the index has them."""
        wanted = {tensor.name for tensor in tensors}
        stored = Counter(chain.from_iterable(self._stored.values()))
        yield from (f"{name}: missing" for name in sorted(wanted) if not stored[name])
        yield from (
            f"{name}: unexpected, in {self.files[name]}" for name in stored if name not in wanted
        )
        yield from (f"{name}: in more than one file" for name in stored if stored[name] > 1)
        if self._index is not None:
            yield from self._verify_index(self._index)
        elif [*self._stored] != [_SINGLE]:
            files = ", ".join(self._stored) or "none"
            yield f"{_INDEX}: missing, though the files are not just {_SINGLE}: {files}"

    def _verify_index(self, index: Mapping[str, Any]) -> Iterator[str]:
        listed = index["files"]
        for name in sorted(listed.keys() | self.files.keys()):
            if (said := listed.get(name, "no file")) != (has := self.files.get(name, "no file")):
                yield f"{name}: {_INDEX} says {said}, and it is in {has}"
        size = sum(map(self._nbytes, self.files))
        if index.get("total_size") != size:
            said = index.get("total_size")
            yield f"{_INDEX}: total_size is {said}, and the tensors have {size} bytes"

    def _nbytes(self, name: str) -> int:
        return prod(self.shape(name)) * self.rows(name, 0, 0).element_size()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._open(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Torch's name of a tensor's element type."""
        return str(self.rows(name, 0, 0).dtype).removeprefix("torch.")

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor."""
        scalar = not self.shape(name)  # of which no slice can be had
        opened = self._open(name)
        rows: torch.Tensor = (
            opened.get_tensor(name) if scalar else opened.get_slice(name)[start:stop]
        )
        self._read += rows.nbytes
        return rows

    def _open(self, name: str) -> Any:
        if self._opened[0] != self.files[name] or self._read > _MAPPED:
            self._read = 0
            self._opened = (self.files[name], safe_open(self._path / self.files[name], "pt"))
        return self._opened[1]
