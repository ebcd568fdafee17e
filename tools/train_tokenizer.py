r"""Train a byte-level BPE with Aquila's special tokens, as a Hugging Face directory.

Example:
    python tools/train_tokenizer.py --input a.jsonl.zst notes.txt --vocab-size 100008 \
        --output-dir data/tokenizer
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flagscale.data.sources import SourceStamp
from flagscale.data.tokenizer import texts_of, train_tokenizer
from flagscale.errors import FlagScaleError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE with Aquila's special tokens at its end."
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, type=Path, help="JSONL or text; .gz and .zst as well")
    add("--vocab-size", required=True, type=int, help="entries in all, special tokens included")
    add("--output-dir", required=True, type=Path, help="for --tokenizer-model")
    add("--json-key", default="text", help="the field of a JSONL file (default: text)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = parse_arguments(argv)
    try:
        for path in arguments.input:
            SourceStamp.of(path)
        texts = (text for path in arguments.input for text in texts_of(path, arguments.json_key))
        train_tokenizer(texts, arguments.vocab_size, arguments.output_dir)
    except FlagScaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{arguments.output_dir}: {arguments.vocab_size} entries")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
