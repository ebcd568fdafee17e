"""What can be known to be wrong before any process group exists. Imports no megatron."""

from __future__ import annotations

import difflib
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

from flagscale.errors import ConfigError

__all__ = ["verify_arguments", "verify_options"]


def verify_options(argv: Sequence[str], known: Iterable[str]) -> None:
    """Refuse an option nobody knows, naming the nearest one that is known.

    Raises:
        ConfigError: See above.
    """
    options = set(known)
    for word in argv:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in options:
            near = difflib.get_close_matches(option, options, n=1)
            raise ConfigError(
                f"there is no option {option}",
                where="command line",
                got=word,
                cure=f"did you mean {near[0]}?" if near else "see --help",
            )


def verify_arguments(args: Namespace) -> None:
    """Refuse what cannot train: unsupported data modes and missing files.

    Raises:
        ConfigError: See above.
    """
    _verify_data_mode(args)
    _verify_paths(args)


# The forward step here feeds dense [b, s] batches; each of these asks for something else, and
# training on without it would be a silent fallback.
_UNSUPPORTED = {
    "sft": "--sft",
    "fim_data": "--fim-data",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "perform_rl_step": "--perform-rl-step",
    "vision_pretraining": "--vision-pretraining",
    "per_dataset_sequences_path": "--per-dataset-sequences-path",
    "yaml_cfg": "--yaml-cfg",
}


def _verify_data_mode(args: Namespace) -> None:
    for attribute, option in _UNSUPPORTED.items():
        if getattr(args, attribute, None):
            raise ConfigError(
                f"{option} is not supported by this pretraining entry",
                where=option,
                cure="drop it; the entry trains GPT models on dense, packed sequences",
            )


def _data_prefixes(args: Namespace) -> list[str]:
    words: list[str] = []
    for attribute in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words += getattr(args, attribute, None) or []
    return [word for word in words if not _is_number(word)]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _verify_paths(args: Namespace) -> None:
    for prefix in _data_prefixes(args):
        for suffix in (".bin", ".idx"):
            _require_file(f"{prefix}{suffix}", "--data-path", "run tools/preprocess_data.py first")
    tokenizer = getattr(args, "tokenizer_model", None)
    # A name without a slash may be one in a hub's cache, which only the tokenizer library knows.
    if tokenizer and os.sep in tokenizer:
        _require_file(tokenizer, "--tokenizer-model", "train one with tools/train_tokenizer.py")
    load, save = getattr(args, "load", None), getattr(args, "save", None)
    if load and load != save:
        _require_file(load, "--load", "correct the path, or drop --load to train from random")
    if save:
        _require_writable(Path(save))


def _require_file(path: str, option: str, cure: str) -> None:
    if not Path(path).exists():
        raise ConfigError("a path does not exist", where=option, expected=path, cure=cure)


def _require_writable(directory: Path) -> None:
    existing = directory
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            "checkpoints cannot be written here",
            where="--save",
            got=f"{existing} is not a writable directory",
            cure="choose another directory, or change its permissions",
        )
