"""The files of a Hugging Face model beside its weights: configuration, tokenizer, model card.

Configurations are written by transformers' own classes, so that a file is what ``save_pretrained``
of the same release would write.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flagscale.ckpt_convert.nlpe import register
from flagscale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CONFIG",
    "GENERATION_CONFIG",
    "companion_files",
    "completed_config",
    "config_files",
    "is_read_alike",
    "load_tokenizer",
    "read_json",
    "special_ids",
    "verify_tokenizer",
]

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"

_TOKENIZER: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
_MAX_BYTES: Final = 256 << 20  # of a companion; the largest tokenizers have about 30 MB
_TEXT: Final = "What did the model read? 3.5 tokens,\n\tand 训练 <|endoftext|></s> it's so."
_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: There is none.
    """
    try:
        content = json.loads(_read(path))
    except (RecursionError, ValueError) as error:
        raise CheckpointError(
            "a file is not JSON", where=str(path), got=f"{type(error).__name__}: {error}"[:200]
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            "a file holds no JSON object", where=str(path), got=type(content).__name__
        )
    return content


def companion_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer's files in a directory, by relative path."""
    found = {path for pattern in _TOKENIZER for path in directory.glob(pattern) if path.is_file()}
    return {path.relative_to(directory).as_posix(): _read(path) for path in sorted(found)}


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, by transformers; no code of its own is run.

    Raises:
        ConfigError: There is none.
    """
    from transformers import AutoTokenizer

    if not companion_files(directory):
        raise ConfigError(
            "there is no tokenizer",
            where=str(directory),
            expected="tokenizer.json and tokenizer_config.json, or the like",
            cure="--tokenizer DIR",
        )
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # it raises whatever its many readers do
        raise ConfigError(
            "a tokenizer cannot be loaded",
            where=str(directory),
            got=f"{type(error).__name__}: {error}"[:300],
        ) from error


def verify_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Hold a tokenizer to the model's vocabulary, which may be the larger one.

    Raises:
        ConfigError: It has tokens that the model does not.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            "the tokenizer does not fit the vocabulary of the model",
            where=where,
            expected=f"token ids below {vocab_size}",
            got=f"{largest}, of {len(tokenizer)} tokens",
            cure="give the tokenizer that the model was trained with",
        )


def is_read_alike(files: Mapping[str, bytes], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model's directory gives back the tokenizer that it was written with.

    Not always: for some types of model transformers takes a class of its own, whatever the
    tokenizer's files say, and that may split text in another way.

    Args:
        files: Of the directory, without weights, by path.
        tokenizer: The right one.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            path = Path(scratch, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        again = AutoTokenizer.from_pretrained(scratch, local_files_only=True)
        return bool(again(_TEXT)["input_ids"] == tokenizer(_TEXT)["input_ids"])


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The ids that a configuration names: of the beginning, the end and padding."""
    return {name: getattr(tokenizer, name) for name in _IDS}


def config_files(
    model_type: str,
    fields: Mapping[str, Any],
    like: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    ids: Mapping[str, int | None],
) -> dict[str, bytes]:
    """``config.json`` and ``generation_config.json``.

    Args:
        model_type: Hugging Face's name of the configuration's class.
        fields: What the checkpoint decides.
        like: Fields of another configuration, for whatever the checkpoint does not know.
        generation: Content of a ``generation_config.json`` to keep; ``None``: as the model says.
        ids: Of special tokens, where the tokenizer is known.

    Raises:
        ConfigError: transformers does not take the configuration.
    """
    from transformers import AutoConfig, GenerationConfig

    known = {key: value for key, value in like.items() if key != "model_type"}
    unknown: dict[str, int | None] = {} if known else dict.fromkeys(_IDS)
    # Where both say the same, as it was written: 10000 and 10000.0 are equal, and not alike.
    decided = {key: value for key, value in fields.items() if known.get(key, ...) != value}
    register(known | decided)
    with _refusals(model_type):
        config = AutoConfig.for_model(model_type, **unknown | known | dict(ids) | decided)
        if generation is None:
            generating = GenerationConfig.from_model_config(config)
        else:
            generating = GenerationConfig.from_dict(dict(generation))
    return {
        CONFIG: config.to_json_string(use_diff=True).encode(),
        GENERATION_CONFIG: generating.to_json_string(use_diff=True).encode(),
    }


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every field, in this release's form, whichever wrote it.

    Args:
        config: Content of a ``config.json``; its ``model_type`` is one that transformers knows.

    Raises:
        ConfigError: transformers does not take it.
    """
    from transformers import AutoConfig

    register(config)
    with _refusals(str(config.get("model_type"))):
        told = AutoConfig.for_model(**config)
        return dict(told.to_dict())


@contextlib.contextmanager
def _refusals(model_type: str) -> Iterator[None]:
    """Call it ours, whatever library's error a configuration is refused with."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            "transformers refuses the configuration of the model",
            where=f"{CONFIG}, model_type {model_type}",
            got=f"{type(error).__name__}: {error}"[:300],
        ) from error


def _read(path: Path) -> bytes:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise CheckpointError(
                "a file is too large to be what its name says",
                where=str(path),
                expected=f"at most {_MAX_BYTES:,} bytes",
                got=f"{size:,}",
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            "a file cannot be read", where=str(path), got=error.strerror
        ) from error
