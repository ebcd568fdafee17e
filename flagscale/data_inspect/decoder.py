"""Tokens back to text, by the libraries of the tokenizers themselves: no torch, no megatron."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.errors import ConfigError, DataError

__all__ = ["Decoder", "open_decoder"]


@dataclass(frozen=True)
class Decoder:
    """A tokenizer, as far as it is needed here.

    Args:
        name: Where it was read from.
        vocab_size: Token ids are below it.
        decode_ids: From ids to text, special tokens included.
    """

    name: str
    vocab_size: int
    decode_ids: Callable[[list[int]], str]

    def decode(self, tokens: Sequence[int], where: str) -> str:
        """The text of some tokens.

        Args:
            tokens: Their ids.
            where: What they are of, for errors.

        Raises:
            DataError: The vocabulary has no such token.
        """
        ids = [int(token) for token in tokens]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise DataError(
                "the tokenizer is not the one the dataset was made with",
                where=where,
                expected=f"token ids below {self.vocab_size}, of {self.name}",
                got=max(ids) if max(ids) >= self.vocab_size else min(ids),
                cure="give --tokenizer, the one that preprocessed the data",
            )
        return self.decode_ids(ids)


def open_decoder(arguments: Mapping[str, Any], tokenizer: Path | None = None) -> Decoder:
    """The tokenizer of a run.

    Args:
        arguments: Megatron's, by name.
        tokenizer: To use instead: a directory with ``tokenizer.json``, that file, or a
            SentencePiece model.

    Raises:
        ConfigError: It cannot be loaded, or is of a type that only Megatron can load.
    """
    kind, model = arguments.get("tokenizer_type"), arguments.get("tokenizer_model")
    if tokenizer is None and kind == "NullTokenizer":
        return Decoder(kind, 1 << 62, lambda ids: " ".join(map(str, ids)))
    path = tokenizer or Path(model or "")
    for file in (path / "tokenizer.json", path):
        if file.suffix == ".json" and file.is_file():
            return _fast(file)
    for file in (path / "tokenizer.model", path):
        if file.suffix == ".model" and file.is_file():
            return _sentencepiece(file)
    raise ConfigError(
        "the tokenizer cannot be loaded here",
        where=f"--tokenizer-type {kind} --tokenizer-model {model}" if not tokenizer else str(path),
        expected="a directory with tokenizer.json or tokenizer.model, or one of the two",
        cure="give --tokenizer",
    )


def _fast(file: Path) -> Decoder:
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise _unreadable(file, error) from error
    return Decoder(
        name=str(file),
        vocab_size=loaded.get_vocab_size(with_added_tokens=True),
        decode_ids=lambda ids: str(loaded.decode(ids, skip_special_tokens=False)),
    )


def _sentencepiece(file: Path) -> Decoder:
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(
            "this tokenizer needs a library that is not installed",
            where=str(file),
            cure="pip install 'flagscale[data]'",
        ) from error
    try:
        loaded = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise _unreadable(file, error) from error
    return Decoder(str(file), loaded.vocab_size(), lambda ids: str(loaded.decode(ids)))


def _unreadable(file: Path, error: Exception) -> ConfigError:
    return ConfigError(
        "the tokenizer cannot be read", where=str(file), got=str(error), cure="give --tokenizer"
    )
