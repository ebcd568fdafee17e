"""Step time through the layer over that of plain upstream, on the CPU platform.

One process trains one model by the real entry. At the top of upstream's loop, before each step,
the layer is switched on or off: its patches are applied or undone, by which its listeners hear of
steps or do not. Each pair of steps has one of each, in random order; the figure is the median ratio
within the pairs, and its interval is that of order statistics (no assumption on the distribution).

What stays in both: the CPU shim, and what upstream cannot start without here (the built dataset
helper) or would be another program without (the Adam, which is chosen once). The forward step and
the dataset provider are the layer's in both, since upstream's wheel brings none. A step is a whole
turn of upstream's loop: its log line, at every step, is in both, and the layer's in its own.

Example:
    python bench/overhead.py --pairs 500
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flagscale.patches.apply import Applied, apply
from flagscale.patches.registry import Kind, Patch, PatchGroup
from flagscale.patches.source import SourceTree
from flagscale.platforms import activate
from flagscale.platforms.cpu import CPU
from flagscale.plugins import load_plugins

PLAIN = ("cpu-device", "cpu-initialize", "compile-helpers", "adam")
WARM_UP_STEPS = 10
LAYER_LINE = " | tokens/s/device: "
MODEL = (
    "--num-layers 4 --hidden-size 128 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --ffn-hidden-size 352 --seq-length 128 --max-position-embeddings 128 "
    "--normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --bf16 "
    "--use-distributed-optimizer --micro-batch-size 4 --global-batch-size 8 --lr 1e-4 "
    "--tokenizer-type NullTokenizer --vocab-size 5999 --make-vocab-size-divisible-by 4 "
    "--split 100,0,0 --eval-iters 0 --eval-interval 1000 --num-workers 0 --log-interval 1"
)
"""The shape of the tiny recipe, which is where overhead shows: a larger model has longer steps."""


@dataclass
class Switch:
    """Times the turns of upstream's loop, with the layer on and off.

    Args:
        groups: The patches that are the layer.
        order: Whether the layer is on, step by step, after the warm-up.
    """

    groups: Sequence[PatchGroup]
    order: Sequence[bool]
    seconds: list[float] = field(default_factory=list)
    _turn: int = -WARM_UP_STEPS
    _start: float = 0.0
    _applied: Applied | None = None
    _tree: SourceTree = field(default_factory=SourceTree.installed)

    def top_of_loop(self) -> None:
        """End the last turn, set the switch for the next, and start it."""
        if self._turn > 0:
            self.seconds.append(time.perf_counter() - self._start)
        if 0 <= self._turn < len(self.order):
            self.set_layer(self.order[self._turn])
        self._turn += 1
        self._start = time.perf_counter()

    def set_layer(self, on: bool) -> None:
        """Apply or undo the patches."""
        # The same work for either, so that both find the machine's caches in the same state.
        if self._applied:
            self._applied.undo()
        self._applied = apply(self.groups, tree=self._tree)
        if not on:
            self._applied.undo()
        gc.collect()

    def patch(self) -> PatchGroup:
        """What calls :meth:`top_of_loop`; upstream calls this there, and at the end."""

        def observe(original: Callable[..., Any]) -> Callable[..., Any]:
            def maybe_finalize_async_save(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                self.top_of_loop()
                return result

            return maybe_finalize_async_save

        target = "megatron.training.training:maybe_finalize_async_save"
        patch = Patch(target, Kind.BUILTIN, observe)
        return PatchGroup("bench", (patch,), reason="to time steps", upstream="0.19.2")


def median_interval(values: Iterable[float], z: float = 1.96) -> tuple[float, float, float]:
    """Median with its distribution-free 95 % interval, as ``(median, low, high)``."""
    ranked = sorted(values)
    reach = z * math.sqrt(len(ranked)) / 2
    low = max(0, math.floor(len(ranked) / 2 - reach) - 1)
    high = min(len(ranked) - 1, math.ceil(len(ranked) / 2 + reach))
    return statistics.median(ranked), ranked[low], ranked[high]


def write_data(prefix: Path, seed: int) -> None:
    """A document of random tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    builder.add_document(torch.randint(5999, (100_000,), generator=generator), [100_000])
    builder.finalize(f"{prefix}.idx")


def train(pairs: int, seed: int, data: Path) -> list[tuple[float, float]]:
    """Seconds of a step ``(through the layer, plain)`` for each pair; ``data`` is a prefix."""
    coin = random.Random(seed)
    order = [on for _ in range(pairs) for on in coin.sample([True, False], 2)]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    plugins = load_plugins()
    activate(CPU)
    groups = [group for plugin in plugins for group in plugin.patch_groups]
    switch = Switch([group for group in groups if group.name not in PLAIN], order)
    apply([*(group for group in groups if group.name in PLAIN), switch.patch()])
    switch.set_layer(True)  # from the start: some patches act when the model is built
    steps = str(WARM_UP_STEPS + len(order) + 1)
    write_data(data, seed)
    sys.argv = ["overhead", *CPU.megatron_arguments, *MODEL.split(), "--train-iters", steps]
    sys.argv += ["--data-path", str(data)]
    from flagscale.train.pretraining import run

    gc.freeze()  # what is there already, so that each collection is short
    with contextlib.redirect_stdout(io.StringIO()) as log:
        run(plugins)
    lines, expected = log.getvalue().count(LAYER_LINE), WARM_UP_STEPS + pairs + order[-1]
    if lines != expected:
        raise RuntimeError(f"the switch does not switch: {lines} lines, not {expected}")
    timed = switch.seconds[: len(order)]
    halves = [(timed[i], timed[i + 1]) for i in range(0, len(timed), 2)]
    return [pair if order[2 * i] else pair[::-1] for i, pair in enumerate(halves)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description="The layer's overhead on a training step.")
    parser.add_argument("--pairs", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order; default: %(default)s")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        pairs = train(args.pairs, args.seed, Path(work, "data"))
    ratio, low, high = median_interval(layer / plain for layer, plain in pairs)
    milliseconds = [1e3 * statistics.median(side) for side in zip(*pairs, strict=True)]
    print(
        f"machine   {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
        f"thread(s), load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )
    print(f"steps     {len(pairs)} through the layer, {len(pairs)} plain, interleaved")
    print(f"median    {milliseconds[0]:.2f} ms through the layer, {milliseconds[1]:.2f} ms plain")
    print(f"ratio     {ratio:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
