"""Does the spike detector keep quiet on clean runs, and find a burst? At its default settings.

Trains tiny models by the real entry (megatron.training.pretrain) on clean data, on this machine's
CPU: five that differ in their seed only, and four with other noise (batches of 2 and 32, a batch
size that grows, a high constant learning rate). Prints, of each run, at log interval 1 and 10:
alarms, the highest score, and what z > 5 on the gradient norm would have raised instead. Then adds
bursts of one step to the same curves, and prints the share of them that is found at its iteration.
A run that is done is kept: a bench that was stopped goes on.

Example:
    python bench/spikes.py
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness import train  # noqa: E402
from harness.corpus import model_argv, write_corpus  # noqa: E402

from flagscale.data_inspect.baseline import SpikeSettings, robust_score  # noqa: E402
from flagscale.data_inspect.curve import Curve, average  # noqa: E402
from flagscale.data_inspect.logs import read_log  # noqa: E402
from flagscale.data_inspect.spikes import Spike, find_spikes  # noqa: E402

_STEPS = 1500
_COMMON: dict[str, object] = {
    "num_layers": 2,
    "train_iters": _STEPS,
    "micro_batch_size": 8,
    "global_batch_size": 8,
    "lr": 4e-3,
    "min_lr": 4e-4,
    "lr_warmup_fraction": 0.05,
}
RUNS: dict[str, dict[str, object]] = {
    **{f"seed-{seed}": {} for seed in range(5)},
    "batch-2": {"micro_batch_size": 2, "global_batch_size": 2},
    "batch-32": {"global_batch_size": 32},
    "growing-batch": {
        "micro_batch_size": 4,
        "global_batch_size": None,
        "train_iters": None,
        "train_samples": 32000,
        "step_batch_size_schedule": "0:4 64000:8 256000:32",  # tokens: batch size
    },
    "constant-lr": {"lr": 2e-2, "min_lr": 2e-2, "lr_decay_style": "constant"},
}
_INTERVALS = (1, 10)
_BURSTS = (1.47, 0.75, 0.4)  # the first is that of a step half of which was bad documents
_PLACES = 40


def run(name: str, work_dir: Path) -> Curve:
    """The curve of a run, which is trained if it was not yet."""
    work = work_dir / name
    if not (work / "done").exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        seed = list(RUNS).index(name)
        corpus = write_corpus(work / "text_document", 3000, seed)
        argv = model_argv(corpus, **{**_COMMON, "seed": seed + 1, **RUNS[name]})
        train(argv, work / "logs", timeout_s=3600).require_success()
        (work / "done").touch()
    return read_log(work / "logs")


def highest_score(curve: Curve) -> float:
    """The least threshold, in steps of 0.25, at which nothing is an alarm."""
    settings = SpikeSettings()
    quiet = settings.threshold
    while quiet > settings.calm + 0.25 and not find_spikes(
        curve, replace(settings, threshold=quiet)
    ):
        quiet -= 0.25
    while find_spikes(curve, replace(settings, threshold=quiet)):
        quiet += 0.25
    return quiet


def norm_alarms(curve: Curve) -> tuple[int, int]:
    """Steps whose gradient norm has z > 5 over the 100 before: by mean and by median."""
    norms = [point.grad_norm for point in curve.points if point.grad_norm is not None]
    plain = robust = 0
    for index in range(20, len(norms)):
        before = norms[max(0, index - 100) : index]
        deviation = statistics.stdev(before)
        plain += norms[index] > statistics.fmean(before) + 5 * deviation
        robust += robust_score(norms[index], before) > 5
    return plain, robust


def bursts(curve: Curve, height: float, seed: int) -> Iterator[tuple[int, Curve]]:
    """The curve with one step's loss raised, at places spread over it."""
    rng = random.Random(seed)
    for index in rng.sample(range(300, len(curve.points)), _PLACES):
        point = curve.points[index]
        if point.loss is None:
            continue
        raised = replace(point, loss=point.loss + height)
        points = (*curve.points[:index], raised, *curve.points[index + 1 :])
        yield point.iteration, replace(curve, points=points)


def is_found(spikes: Sequence[Spike], iteration: int) -> bool:
    """Whether the only finding names the iteration."""
    return len(spikes) == 1 and spikes[0].suspects[0] <= iteration <= spikes[0].suspects[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, judge all; returns 1 on an alarm or a large burst that is missed."""
    parser = argparse.ArgumentParser(description="False alarms and bursts of the spike detector.")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs" / "spikes")
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=RUNS)
    arguments = parser.parse_args(argv)
    print(f"{SpikeSettings()}\n")
    alarms = missed = 0
    for name in arguments.only or RUNS:
        curve = run(name, arguments.work_dir)
        plain, robust = norm_alarms(curve)
        last = curve.points[-1]
        print(
            f"{name}: {len(curve.points)} steps to loss {last.loss:.3f}; z > 5 on the gradient "
            f"norm: {plain} by mean and deviation, {robust} by median and MAD"
        )
        for interval in _INTERVALS:
            coarse = average(curve, interval) if interval > 1 else curve
            found = find_spikes(coarse)
            alarms += len(found)
            shares = []
            for height in _BURSTS:
                results = [
                    is_found(find_spikes(average(raised, interval)), iteration)
                    for iteration, raised in bursts(curve, height, seed=interval)
                ]
                missed += height == _BURSTS[0] and interval == 1 and not all(results)
                shares.append(f"+{height}: {sum(results)} of {len(results)}")
            print(
                f"  log interval {interval:>2}: {len(found)} alarms, quiet from threshold "
                f"{highest_score(coarse):.2f}; bursts of one step found: {', '.join(shares)}",
                flush=True,
            )
    print(f"\n{alarms} alarms on clean runs")
    return 1 if alarms or missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
