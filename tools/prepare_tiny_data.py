"""Make the data of the tiny recipe: a corpus, a tokenizer and a tokenised dataset.

Example:
    python tools/prepare_tiny_data.py --output-dir data/tiny
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from flagscale.data.corpus import prepare_tiny_data
from flagscale.errors import FlagScaleError


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description="Make a few MB of real English and Chinese text ready for training."
    )
    parser.add_argument("--output-dir", required=True, type=Path, help="appears whole or not")
    parser.add_argument("--vocab-size", type=int, default=6000, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    try:
        made = prepare_tiny_data(arguments.output_dir, arguments.vocab_size)
    except FlagScaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{arguments.output_dir}: {'made' if made else 'is there already'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
