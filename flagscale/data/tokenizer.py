"""Tokenizers: upstream's own, built from two arguments; and the training of Aquila's kind.

A trained one is a byte-level BPE in a Hugging Face directory. Its vocabulary of ``V`` entries is

    0           <|endoftext|>, the padding
    1 ...       the 256 bytes, then the merges
    V-8 ...     <|startofpiece|> <|endofpiece|> <|LDWANG|> [MASK] [gMASK] [sMASK] [CLS] </s>

so that the end of a document is the last id, ``V-1``, and the beginning ``V-2``: 100007 and 100006
at Aquila's own V of 100008. Every byte has an entry, hence no unknown token.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.data.output import writing_to
from flagscale.data.sources import SourceFile, json_texts, uncompressed_suffix
from flagscale.errors import ConfigError, DataError

__all__ = [
    "BOS_TOKEN",
    "EOD_TOKEN",
    "PAD_TOKEN",
    "SPECIAL_TOKENS",
    "TOKENIZER_TYPES",
    "TokenizerChoice",
    "build_tokenizer",
    "texts_of",
    "train_tokenizer",
]

TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
)

PAD_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = (
    "<|startofpiece|>",
    "<|endofpiece|>",
    "<|LDWANG|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "[CLS]",
    "</s>",
)
"""In the order of their ids, at the end of the vocabulary."""
BOS_TOKEN = "[CLS]"
EOD_TOKEN = "</s>"

_SMALLEST_VOCAB = 1 + 256 + len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer by upstream's own two arguments.

    Args:
        type: One of :data:`TOKENIZER_TYPES`, as for ``--tokenizer-type``.
        model: A local directory (Hugging Face) or file (SentencePiece), as for
            ``--tokenizer-model``.

    Raises:
        ConfigError: The type is unknown, or nothing is at the path.
    """

    type: str
    model: str

    def __post_init__(self) -> None:
        if self.type not in TOKENIZER_TYPES:
            raise ConfigError(
                "unknown type of tokenizer",
                where="--tokenizer-type",
                expected=", ".join(TOKENIZER_TYPES),
                got=self.type,
                cure="give one of these",
            )
        if not Path(self.model).exists():
            raise ConfigError(
                "the tokenizer model does not exist",
                where="--tokenizer-model",
                expected="a local directory (Hugging Face) or file (SentencePiece)",
                got=self.model,
                cure="train one with tools/train_tokenizer.py, or give another path",
            )

    def files(self) -> list[Path]:
        """The files of the model, sorted."""
        model = Path(self.model).absolute()
        if model.is_dir():
            return sorted(path for path in model.iterdir() if path.is_file())
        return [model]


def build_tokenizer(choice: TokenizerChoice) -> Any:  # upstream's class is untyped
    """Upstream's own tokenizer for these arguments.

    Raises:
        ConfigError: Upstream cannot load it, or it has no end-of-document token.
    """
    from flagscale.data import upstream

    arguments = argparse.Namespace(
        tokenizer_type=choice.type,
        tokenizer_model=choice.model,
        metadata_path=None,
        vocab_file=None,
        merge_file=None,
        special_tokens=None,
        chat_template=None,
        trust_remote_code=False,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        tokenizer_sentencepiece_legacy=False,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        pad_vocab_size=False,
    )
    try:
        with upstream.missing_rank_ignored():
            tokenizer = upstream.build_tokenizer(arguments)
    except Exception as error:  # upstream and two tokenizer libraries raise whatever they like
        raise ConfigError(
            "the tokenizer cannot be loaded",
            where=f"--tokenizer-type {choice.type} --tokenizer-model {choice.model}",
            got=f"{type(error).__name__}: {error}",
            cure="check that the type fits the model, and that its library is installed",
        ) from error
    if tokenizer.eod is None:
        raise ConfigError(
            "the tokenizer has no end-of-document token",
            where=choice.model,
            expected="an eos_token",
            cure="set eos_token in its tokenizer_config.json",
        )
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output_dir: str | os.PathLike[str]
) -> None:
    """Train on texts and write ``tokenizer.json`` and ``tokenizer_config.json``.

    The same texts in the same order give the same bytes.

    Args:
        texts: Documents or lines; held by the trainer only as counts of their words.
        vocab_size: Entries in all, the special tokens included.
        output_dir: Made if need be.

    Raises:
        ConfigError: The vocabulary cannot hold the bytes and the special tokens.
        DataError: The texts are too few for that many entries, or the output cannot be written.
    """
    if vocab_size < _SMALLEST_VOCAB:
        raise ConfigError(
            "the vocabulary is too small for a byte-level BPE",
            where="--vocab-size",
            expected=f"at least {_SMALLEST_VOCAB}: padding, 256 bytes, {len(SPECIAL_TOKENS)} "
            "special tokens",
            got=vocab_size,
            cure="give a larger --vocab-size",
        )
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        special_tokens=[PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    if (got := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(
            "the text is too small, or too repetitive, for that many entries",
            where="--vocab-size",
            expected=vocab_size,
            got=f"{got} entries, after which no pair of tokens occurs twice",
            cure=f"train on more text, or give --vocab-size {got}",
        )

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOD_TOKEN,
        "pad_token": PAD_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    directory = Path(output_dir)
    with writing_to(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def texts_of(path: str | os.PathLike[str], json_key: str = "text") -> Iterator[str]:
    """The texts of a file: one field of each JSON line of a ``.jsonl``, else the lines themselves.

    Args:
        path: Plain, ``.gz`` or ``.zst``.
        json_key: The field of a ``.jsonl``.

    Raises:
        DataError: The file cannot be read, or a line is malformed.
    """
    is_json = uncompressed_suffix(path) in (".jsonl", ".json")
    with SourceFile(path) as source:
        for number, (_, line) in enumerate(source.lines(), start=1):
            try:
                if not is_json:
                    yield line.decode()
                elif line.strip():
                    yield from json_texts(line, (json_key,))
            except ValueError as error:
                raise DataError(
                    "malformed line",
                    where=f"{path}:{number}",
                    got=str(error),
                    cure="mend or remove the line",
                ) from error
