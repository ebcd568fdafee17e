"""Speed of tools/preprocess_data.py beside a plain loop over upstream's tokenizer.

The text is the tiny recipe's corpus, its documents drawn over and over in a seeded order. The time
to start, most of it imports, is told apart from the rate.

Example:
    python bench/preprocess.py --megabytes 100
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flagscale.data.corpus import prepare_tiny_data
from flagscale.data.tokenizer import TokenizerChoice, build_tokenizer

TOOL = Path(__file__).parents[1] / "tools" / "preprocess_data.py"


def write_text(corpus: Path, path: Path, size: int) -> int:
    """Write documents of the corpus until there are ``size`` bytes; returns how many."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    order = random.Random(0)
    written = 0
    with path.open("wb") as stream:
        while written < size:
            written += stream.write(order.choice(lines))
    return written


def plain_loop(path: Path, choice: TokenizerChoice) -> float:
    """Seconds to parse and tokenise every line in this process, and keep nothing."""
    tokenizer = build_tokenizer(choice)
    started = time.perf_counter()
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            tokenizer.tokenize(json.loads(line)["text"])
    return time.perf_counter() - started


def tool(path: Path, choice: TokenizerChoice, workers: int) -> float:
    """Seconds of the whole program, from start to published files."""
    command = [sys.executable, str(TOOL), "--input", str(path), "--append-eod"]
    command += ["--output-prefix", str(path.with_name(f"out-{path.stem}-{workers}"))]
    command += ["--tokenizer-type", choice.type, "--tokenizer-model", choice.model]
    started = time.perf_counter()
    subprocess.run([*command, "--workers", str(workers)], check=True, capture_output=True)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description="Speed of preprocessing in MB of text a second.")
    parser.add_argument("--megabytes", type=float, default=100, help="default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        prepare_tiny_data(Path(work, "tiny"))
        choice = TokenizerChoice("HuggingFaceTokenizer", str(Path(work, "tiny", "tokenizer")))
        text, nothing = Path(work, "text.jsonl"), Path(work, "nothing.jsonl")
        megabytes = (
            write_text(Path(work, "tiny", "corpus.jsonl"), text, int(arguments.megabytes * 1e6))
            / 1e6
        )
        nothing.write_text('{"text": "a"}\n')

        table = Table(title=f"{megabytes:.1f} MB of English and Chinese text")
        for heading in ("", "seconds", "of them start-up", "MB/s", "of the plain loop"):
            table.add_column(heading, justify="right")
        plain = plain_loop(text, choice)
        table.add_row("plain tokenise loop", f"{plain:.1f}", "", f"{megabytes / plain:.2f}", "1.00")
        for workers in arguments.workers:
            start_up = tool(nothing, choice, workers)
            total = tool(text, choice, workers)
            rate = megabytes / (total - start_up)
            table.add_row(
                f"{workers} process{'es' * (workers > 1)}",
                f"{total:.1f}",
                f"{start_up:.1f}",
                f"{rate:.2f}",
                f"{rate * plain / megabytes:.2f}",
            )
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
