"""What the ledger costs a training step of 1024 samples: bytes, and time over a step without it.

One process trains by the real entry. Before each step the ledger's listeners are taken out of the
hooks or put back; each pair of steps has one of each, in random order. A row is written one step
late; here that is at the end of the next step with the ledger, so that it counts where it belongs.

Example:
    python bench/ledger.py --pairs 30
    python bench/ledger.py --pairs 30 --ledger-blocks 64
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from overhead import MODEL, median_interval, write_data

from flagscale.data_inspect.ledger import Ledger
from flagscale.hooks import HOOKS
from flagscale.patches.apply import apply
from flagscale.patches.registry import Kind, Patch, PatchGroup
from flagscale.platforms import activate
from flagscale.platforms.cpu import CPU
from flagscale.plugins import load_plugins

WARM_UP_STEPS = 3
GLOBAL_BATCH = 1024
# Short samples of a small model: what the ledger costs is by sample, and shows most here.
_SHAPE = {"--num-layers": "2", "--hidden-size": "64", "--ffn-hidden-size": "176"}
_SHAPE |= {"--seq-length": "32", "--max-position-embeddings": "32"}
_BATCH = {"--micro-batch-size": "16", "--global-batch-size": str(GLOBAL_BATCH)}


class Switch:
    """Takes the ledger's listeners out and puts them back, and times the turns of the loop."""

    def __init__(self, order: Sequence[bool]) -> None:
        self._order = order
        self.seconds: list[float] = []
        self._turn = -WARM_UP_STEPS
        self._start = 0.0
        self._with: dict[str, list[Any]] = {}

    def top_of_loop(self) -> None:
        """End the last turn, set the switch for the next, and start it."""
        if self._turn > 0:
            self.seconds.append(time.perf_counter() - self._start)
        if not self._with:
            self._with = {name: list(listeners) for name, listeners in vars(HOOKS).items()}
        on = self._order[self._turn] if 0 <= self._turn < len(self._order) else True
        for name, listeners in self._with.items():
            kept = [one for one in listeners if on or one.__module__ != "flagscale.train.ledger"]
            getattr(HOOKS, name)[:] = kept
        self._turn += 1
        self._start = time.perf_counter()

    def patch(self) -> PatchGroup:
        """What calls :meth:`top_of_loop`; upstream calls this there, and at the end."""

        def observe(original: Callable[..., Any]) -> Callable[..., Any]:
            def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                self.top_of_loop()
                return result

            return maybe_finalize_async_save

        target = "megatron.training.training:maybe_finalize_async_save"
        return PatchGroup(
            "bench", (Patch(target, Kind.BUILTIN, observe),), "to time steps", "0.19.2"
        )


def train(pairs: int, seed: int, work: Path, more: Sequence[str]) -> list[tuple[float, float]]:
    """Seconds of a step ``(with the ledger, without)`` for each pair."""
    coin = random.Random(seed)
    order = [on for _ in range(pairs) for on in coin.sample([True, False], 2)]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    plugins = load_plugins()
    activate(CPU)
    switch = Switch(order)
    groups = [group for plugin in plugins for group in plugin.patch_groups]
    apply([*groups, switch.patch()])
    write_data(work / "data", seed)
    words = MODEL.split()
    words.remove("--bf16")  # which a CPU without units for it computes many times slower
    for option, value in {**_SHAPE, **_BATCH}.items():
        words[words.index(option) + 1] = value
    sys.argv = ["ledger", *CPU.megatron_arguments, *words, "--data-path", str(work / "data")]
    sys.argv += ["--train-iters", str(WARM_UP_STEPS + len(order) + 1)]
    sys.argv += ["--ledger-dir", str(work / "ledger"), *more]
    from flagscale.train.pretraining import run

    with contextlib.redirect_stdout(io.StringIO()):
        run(plugins)
    timed = switch.seconds[: len(order)]
    halves = [(timed[i], timed[i + 1]) for i in range(0, len(timed), 2)]
    return [pair if order[2 * i] else pair[::-1] for i, pair in enumerate(halves)]


def bytes_a_step(ledger: Path) -> tuple[int, int]:
    """Rows and their bytes, less the segment."""
    (attempt,) = Ledger(ledger).attempts
    (file,) = attempt.files.values()
    offsets = file.offsets
    return len(offsets), (file.path.stat().st_size - offsets[0]) // len(offsets)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description="What the ledger costs a training step.")
    parser.add_argument("--pairs", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order; default: %(default)s")
    parser.add_argument("--ledger-blocks", type=int, default=None)
    args = parser.parse_args(argv)
    more = [] if args.ledger_blocks is None else ["--ledger-blocks", str(args.ledger_blocks)]
    with tempfile.TemporaryDirectory() as work:
        pairs = train(args.pairs, args.seed, Path(work), more)
        rows, size = bytes_a_step(Path(work, "ledger"))
    ratio, low, high = median_interval(on / off for on, off in pairs)
    milliseconds = [1e3 * statistics.median(side) for side in zip(*pairs, strict=True)]
    print(
        f"machine   {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"thread(s), load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
    print(f"steps     {len(pairs)} with the ledger, {len(pairs)} without, interleaved")
    print(f"median    {milliseconds[0]:.1f} ms with, {milliseconds[1]:.1f} ms without")
    print(f"ratio     {ratio:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    print(f"bytes     {size} a step of {GLOBAL_BATCH} samples on one rank ({rows} rows)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
