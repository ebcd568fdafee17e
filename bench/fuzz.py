"""Damages small checkpoints at random: what reads them ends well, or with an error of our own.

Each mutation is met by the readers alone (every tree in every file), or by the whole way of
tools/reshard_optimizer.py up to the plan, with the check for damage.

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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from flagscale.errors import FlagScaleError

_SLOW = 10.0  # seconds: a small file must not keep a reader busy for longer


def subjects(scratch: Path) -> list[tuple[Path, Callable[[Path], None]]]:
    """Checkpoints, each with what is to meet its mutations."""
    from harness.mutate import read_everything, write_small_checkpoints
    from harness.saved_job import job_args
    from harness.synthetic import FORMS, Synthetic

    from flagscale.optim import doctor, reshard
    from flagscale.optim.carry import Request
    from flagscale.optim.opening import open_source

    def plan(load_dir: Path) -> None:
        doctor.diagnose(load_dir)
        reshard.plan(open_source(load_dir), Request(tp_size=1, pp_size=1), "torch")

    found: list[tuple[Path, Callable[[Path], None]]] = [
        (path.parent, read_everything) for path in write_small_checkpoints(scratch / "files")
    ]
    for form in FORMS:
        save_dir = scratch / form
        Synthetic(job_args(tp=2, pp=2), form, "local").write(save_dir)
        found.append((save_dir, plan))
    return found


def main() -> int:
    """Run the mutations; the exit code says whether any was met badly."""
    parser = argparse.ArgumentParser(description="Only errors of our own, whatever the damage.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from harness.mutate import mutate

    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = subjects(Path(scratch))
        target = Path(scratch) / "mutated"
        for number in range(options.seed, options.seed + options.count):
            rng = random.Random(number)
            source, meet = rng.choice(checkpoints)
            done = mutate(source, target, rng)
            start = time.perf_counter()
            try:
                meet(target)
                outcomes[f"{meet.__name__}: done"] += 1
            except FlagScaleError as error:
                outcomes[f"{meet.__name__}: refused"] += 1
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
    print(", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items())))
    print(f"slowest {slowest:.2f} s")
    return 1 if outcomes["FAILED"] or outcomes["SLOW"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
