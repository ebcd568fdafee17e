"""``replay``: a step's samples once more, from checkpoints: bad data, or a bad state?"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flagscale.data_inspect.answers import Label, StepAnswer
from flagscale.data_inspect.commands import (
    Output,
    add_run_arguments,
    format_table,
    ordinal,
    to_stderr,
)
from flagscale.data_inspect.locate import locate
from flagscale.data_inspect.replay import (
    Replay,
    Score,
    Verdict,
    checkpoints_of,
    execute_replay,
    judge,
    plan_replay,
)
from flagscale.data_inspect.run import Run, open_run
from flagscale.data_inspect.steps import phase_of
from flagscale.errors import ConfigError, DataError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR``, the step, and from where."""
    add_run_arguments(parser)
    parser.add_argument("--iteration", type=ordinal, required=True, help="1-based, as logged")
    parser.add_argument(
        "--checkpoint",
        type=int,
        nargs="+",
        metavar="ITERATION",
        help="default: the nearest before the step, and the one before that",
    )
    parser.add_argument(
        "--calm-iteration",
        type=ordinal,
        metavar="N",
        help="an ordinary step to compare with (default: 10 before)",
    )
    parser.add_argument("--platform", help="as for training (default: as the run was started)")
    parser.add_argument(
        "--work-dir", type=Path, help="keep samples, logs and ledgers here (default: thrown away)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the jobs and start none")


def run(args: argparse.Namespace) -> Output:
    """Replay.

    Raises:
        ConfigError: There is no checkpoint, or a job failed.
        DataError: The step's samples are not known.
        VerificationError: A job did not read what it was to read.
    """
    found = open_run(args.run_dir, args.arguments)
    answer = _known(found, args.iteration)
    calm = _known(found, args.calm_iteration or max(1, args.iteration - 10))
    with tempfile.TemporaryDirectory(prefix="flagscale-replay-") as scratch:
        work_dir = args.work_dir or Path(scratch)
        replays = {
            checkpoint: _plan(found, answer, calm, checkpoint, work_dir / f"iter_{checkpoint}")
            for checkpoint in _checkpoints(found, args)
        }
        if args.dry_run:
            return _planned(replays)
        scores: dict[int, list[Score]] = {}
        for checkpoint, replay in replays.items():
            to_stderr(f"replaying {len(replay.samples)} samples from iteration {checkpoint}")
            scores[checkpoint] = execute_replay(replay, platform=args.platform)
    number = len(answer.samples)
    verdicts = {at: judge(both[:number], both[number:]) for at, both in scores.items()}
    mine = {at: both[:number] for at, both in scores.items()}
    return Output(_text(answer, mine, verdicts), _json(answer, mine, verdicts))


def _known(found: Run, iteration: int) -> StepAnswer:
    answer = locate(found, iteration, progress=to_stderr)
    if answer.label is not Label.EXACT:
        raise DataError(
            "the samples of a step are not known for certain",
            where=f"iteration {iteration}: {answer.label}",
            got="; ".join(answer.reasons),
            cure="see `locate`",
        )
    return answer


def _checkpoints(found: Run, args: argparse.Namespace) -> list[int]:
    there = [] if found.checkpoints is None else checkpoints_of(found.checkpoints)
    before = [checkpoint for checkpoint in there if checkpoint < args.iteration]
    wanted = args.checkpoint or before[-2:]
    missing = sorted(set(wanted) - set(there))
    if missing or not wanted:
        raise ConfigError(
            "there is no such checkpoint to replay from",
            where=str(found.checkpoints or found.directory),
            expected=", ".join(map(str, there)) or "a checkpoint before the step",
            got=", ".join(map(str, missing)) or f"none before iteration {args.iteration}",
            cure="give --checkpoint",
        )
    return list(wanted)


def _plan(
    found: Run, answer: StepAnswer, calm: StepAnswer, checkpoint: int, work_dir: Path
) -> Replay:
    record = found.start_of(answer.iteration)
    if record.attempt is None or found.checkpoints is None:
        raise DataError("a replay needs a ledger and checkpoints", where=str(found.directory))
    samples = [(one.dataset, one.sample_index) for one in (*answer.samples, *calm.samples)]
    return plan_replay(
        record.attempt.segment,
        samples,
        phase_of(record.args, record.start).num_samples,
        found.checkpoints.resolve(),
        checkpoint,
        work_dir.resolve(),
    )


def _planned(replays: dict[int, Replay]) -> Output:
    lines = []
    for checkpoint, one in replays.items():
        lines.append(f"from iteration {checkpoint}, on {one.num_ranks} rank(s):")
        lines.append(f"  python -m flagscale.train {shlex.join(one.argv)}")
    json = {str(at): {"ranks": one.num_ranks, "argv": one.argv} for at, one in replays.items()}
    return Output("\n".join(lines), json)


def _conclusion(answer: StepAnswer, verdicts: dict[int, Verdict]) -> str:
    out = [at for at, verdict in verdicts.items() if verdict.stands_out]
    if len(out) == len(verdicts):
        return "bad data: the samples are hard for the weights of every checkpoint tried"
    if not out:
        return (
            "bad state, or nothing: to these weights the samples are ordinary; if the loss of "
            f"iteration {answer.iteration} stood out, look at what happened between checkpoint and "
            "step"
        )
    return (
        f"data and state: the samples are hard for the weights of {', '.join(map(str, out))} only"
    )


def _text(answer: StepAnswer, scores: dict[int, list[Score]], verdicts: dict[int, Verdict]) -> str:
    lines = [f"iteration {answer.iteration}: {_conclusion(answer, verdicts)}"]
    for at, verdict in verdicts.items():
        lines.append(
            f"  from {at}: mean loss {verdict.mean:.4f}, calm step {verdict.calm_mean:.4f}: "
            f"{verdict.excess:+.1f} standard errors"
        )
    rows: list[tuple[object, ...]] = []
    for index, sample in enumerate(answer.samples):
        cells: list[object] = [sample.rank, sample.micro_batch, sample.position]
        cells += [sample.dataset, sample.sample_index, _rounded(sample.loss)]
        for of in scores.values():
            cells += [_rounded(of[index].loss), _rounded(of[index].grad_norm)]
        rows.append(tuple(cells))
    header = ["rank", "micro batch", "position", "dataset", "sample", "loss then"]
    for at in scores:
        header += [f"loss at {at}", f"grad norm at {at}"]
    return "\n".join([*lines, format_table(tuple(header), rows)])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _json(
    answer: StepAnswer, scores: dict[int, list[Score]], verdicts: dict[int, Verdict]
) -> dict[str, Any]:
    samples = []
    for index, sample in enumerate(answer.samples):
        replayed = {str(at): asdict(of[index]) for at, of in scores.items()}
        place = {"rank": sample.rank, "micro_batch": sample.micro_batch}
        place |= {"position": sample.position, "dataset": sample.dataset}
        samples.append({**place, "sample_index": sample.sample_index, "replayed": replayed})
    return {
        "iteration": answer.iteration,
        "conclusion": _conclusion(answer, verdicts),
        "verdicts": {
            str(at): {**asdict(verdict), "stands_out": verdict.stands_out}
            for at, verdict in verdicts.items()
        },
        "samples": samples,
    }
