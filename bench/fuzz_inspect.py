"""Damages the files of a small run at random: what reads them is right, or says that it is not.

Each mutation is met as tools/inspect_data.py would meet it: two steps are looked up, and one
document; of a log or an event file, the curve and its spikes, and of a log also a step.

Example:
    python bench/fuzz_inspect.py --count 10000
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

_SLOW = 10.0  # seconds: a small file must not keep a reader busy for longer
_COLUMNS = (
    *("own error", "UNKNOWN", "RECONSTRUCTED", "EXACT and right", "EXACT without source lines"),
    *("a curve", "FALSE EXACT", "other exception", "slow"),
)


def main() -> int:
    """Run the mutations; the exit code says whether any was met badly."""
    from harness.inspect_damage import KINDS, FalseExactError, Truth, damaged, meet
    from harness.inspect_run import write_run

    parser = argparse.ArgumentParser(description="Only errors of our own, and no false EXACT.")
    parser.add_argument("--count", type=int, default=10_000, help="mutations of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["ledger", "idx", "log"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in options.kinds}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        truth = Truth.of(write_run(Path(scratch)))
        for kind in options.kinds:
            for number in range(options.seed, options.seed + options.count):
                rng = random.Random(f"{kind} {number}")
                done = ""
                start = time.perf_counter()
                try:
                    with damaged(truth, kind, rng) as done:
                        outcome = meet(truth, kind, rng)
                except Exception as error:
                    false = isinstance(error, FalseExactError)
                    outcome = "FALSE EXACT" if false else "other exception"
                    print(f"{kind} {number}, {done}: {error}")
                    if not false:
                        traceback.print_exc(limit=-3, file=sys.stdout)
                outcomes[kind][outcome] += 1
                seconds = time.perf_counter() - start
                if seconds > _SLOW:
                    outcomes[kind]["slow"] += 1
                    print(f"{kind} {number}, {done}: {seconds:.1f} s")
                slowest = max(slowest, seconds)
    shown = [name for name in _COLUMNS if any(counts[name] for counts in outcomes.values())]
    shown += [name for name in ("FALSE EXACT", "other exception") if name not in shown]
    print("| damaged | " + " | ".join(shown) + " |")
    print("|---|" + "--:|" * len(shown))
    for kind, counts in outcomes.items():
        print(f"| {kind} | " + " | ".join(str(counts[name]) for name in shown) + " |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"slowest {slowest:.2f} s, peak memory {peak:.0f} MiB (with upstream's builder)")
    bad = ("FALSE EXACT", "other exception", "slow")
    return int(any(counts[name] for counts in outcomes.values() for name in bad))


if __name__ == "__main__":
    raise SystemExit(main())
