"""Time of ``python -m flagscale.patches check``, interpreter start included: best and median of N.

Usage: python bench/patches_check.py [N]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def main() -> None:
    """Run the command N times (default 10) and print seconds of wall-clock."""
    seconds = []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 10):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "flagscale.patches", "check"],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        seconds.append(time.perf_counter() - start)
    print(f"patches check: best {min(seconds):.2f} s, median {statistics.median(seconds):.2f} s")


if __name__ == "__main__":
    main()
