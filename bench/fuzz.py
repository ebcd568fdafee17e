"""Damages small checkpoints at random: reading one ends well, or with an error of our own.

python bench/fuzz.py --count 10000
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from flagscale.errors import CheckpointError

_SLOW = 10.0  # seconds: a small file must not keep a reader busy for longer


def main() -> int:
    """Run the mutations; the exit code says whether any was met badly."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from harness.mutate import mutate, read_everything, write_small_checkpoints

    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = [path.parent for path in write_small_checkpoints(Path(scratch) / "sources")]
        target = Path(scratch) / "mutated"
        for number in range(options.seed, options.seed + options.count):
            rng = random.Random(number)
            source = rng.choice(checkpoints)
            done = mutate(source, target, rng)
            start = time.perf_counter()
            try:
                read_everything(target)
                outcomes["read"] += 1
            except CheckpointError as error:
                outcomes["refused"] += 1
                str(error).encode()  # a message that cannot be printed is no message
            except Exception:
                outcomes["FAILED"] += 1
                print(f"seed {number}, {source.name}, {done}")
                traceback.print_exc(limit=-3)
            seconds = time.perf_counter() - start
            if seconds > _SLOW:
                outcomes["SLOW"] += 1
                print(f"seed {number}, {source.name}, {done}: {seconds:.1f} s")
            slowest = max(slowest, seconds)
            shutil.rmtree(target)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    print(f"slowest {slowest:.2f} s")
    return 1 if outcomes["FAILED"] or outcomes["SLOW"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
