"""``drift``: whether new arguments change which samples are read, before a resume."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from flagscale.data_inspect.arguments import DataArguments, parse_blend
from flagscale.data_inspect.blend import plan_blend
from flagscale.data_inspect.commands import Output, add_run_arguments, format_table
from flagscale.data_inspect.drift import Drift, Effect, drift
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.order import OrderPlan, plan_order, split_range
from flagscale.data_inspect.run import Run, open_run
from flagscale.data_inspect.steps import Start, num_train_samples, plan_schedule
from flagscale.errors import ConfigError, DataError

__all__ = ["add_arguments", "run"]

_HARMLESS = (Effect.NONE, Effect.SAME_SAMPLES_OTHER_RANKS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR``, where to resume, and the new arguments."""
    add_run_arguments(parser)
    parser.add_argument("--iteration", type=int, help="resume after it; default: last checkpoint")
    parser.add_argument(
        "new",
        nargs=argparse.REMAINDER,
        metavar="-- NEW ARGUMENTS",
        help="Megatron's, as the resume will have them: all, or those that change. Of the number "
        "of ranks say --data-parallel-size N",
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="the new arguments", cure="give them as Megatron has them")


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    for name in ("seed", "seq-length", "train-iters", "train-samples", "global-batch-size"):
        add(f"--{name}", type=int)
    for name in ("micro-batch-size", "data-parallel-size"):
        add(f"--{name}", type=int)
    for name in ("split", "dataloader-type", "step-batch-size-schedule", "data-cache-path"):
        add(f"--{name}")
    add("--mid-level-dataset-surplus", type=float)
    for name in ("iterations-to-skip", "phase-transition-iterations"):
        add(f"--{name}", type=int, nargs="*")
    for name in ("data-path", "train-data-path"):
        add(f"--{name}", nargs="*")
    for name in ("data-args-path", "per-split-data-args-path"):
        add(f"--{name}")
    add("--decrease-batch-size-if-needed", action="store_true")
    add("--no-data-sharding", dest="data_sharding", action="store_false")
    return parser


def run(args: argparse.Namespace) -> Output:
    """Compare; exit code 1 if the order changes, or may.

    Raises:
        ConfigError: The new arguments make no sense.
        DataError: What is needed is missing or damaged.
    """
    found = open_run(args.run_dir, args.arguments)
    start = _resume(found, args.iteration)
    old = found.start_of(max(start.iteration, 1)).args
    words = [word for word in args.new if word != "--"]
    given, others = _parser().parse_known_args(words)
    new = _changed(old, vars(given))
    result = drift(old, new, start, _orders(old, start), _orders(new, start))
    harmless = result.effect in _HARMLESS
    text = [
        f"resume after iteration {start.iteration}, {start.consumed} samples consumed: "
        + _verdict(result)
    ]
    if result.findings:
        text.append(_table(result))
    options = [word for word in others if word.startswith("--")]
    if options:
        text.append(f"do not decide the order: {' '.join(options)}")
    return Output("\n".join(text), _json(result), int(not harmless))


def _verdict(result: Drift) -> str:
    if result.effect is Effect.NONE:
        return "the same samples, steps and ranks"
    if result.first_sample is None:
        return result.effect.value
    return f"{result.effect.value}, from consumed sample {result.first_sample} on"


def _table(result: Drift) -> str:
    rows: list[tuple[object, ...]] = [
        (one.flag, one.was, one.now, one.effect.value, one.first_iteration, one.explanation)
        for one in result.findings
    ]
    return format_table(("argument", "was", "now", "effect", "from iteration", ""), rows)


def _json(result: Drift) -> dict[str, Any]:
    return {
        "start": asdict(result.start),
        "effect": result.effect,
        "first_sample": result.first_sample,
        "findings": [
            {**asdict(one), "was": str(one.was), "now": str(one.now)} for one in result.findings
        ],
    }


def _resume(found: Run, iteration: int | None) -> Start:
    """The state that a resume begins from."""
    if iteration is None:
        iteration = _last_checkpoint(found)
    if iteration == 0:
        return Start(0, 0)
    rows = None if found.ledger is None else found.ledger.step(iteration)
    record = found.start_of(iteration)
    if rows is None:
        return Start(
            iteration, plan_schedule(record.args).step_range(record.start, iteration).consumed_after
        )
    row = rows.any_row
    batch = row.micro_batches * row.micro_batch_size * record.args.dp_size
    return Start(iteration, row.consumed_before + batch)


def _last_checkpoint(found: Run) -> int:
    tracker = (found.checkpoints or Path()) / "latest_checkpointed_iteration.txt"
    try:
        return int(tracker.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            "the run's last checkpoint is not known",
            where=str(tracker),
            got=str(error),
            cure="say where to resume: --iteration N",
        ) from error


def _changed(old: DataArguments, given: dict[str, Any]) -> DataArguments:
    values = dict(given)
    if "data_parallel_size" in values:
        values["dp_size"] = values.pop("data_parallel_size")
    for name in ("iterations_to_skip", "phase_transition_iterations"):
        if name in values:
            values[name] = tuple(sorted(values[name]))
    paths: dict[str, Any] = {
        name: values.pop(name)
        for name in ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
        if name in values
    }
    if "data_path" in paths:
        values["blend"] = parse_blend(paths["data_path"])
    elif paths:
        sizes = ("seed", "seq_length", "global_batch_size", "micro_batch_size")
        known = {name: getattr(old, name) for name in sizes} | {"data_parallel_size": old.dp_size}
        read = DataArguments.read({**known, **paths})
        values["blend"] = read.blend
        if read.split is None and "data_args_path" not in paths:
            values["split"] = None
    # Upstream knows one of the two.
    if "train_iters" in values:
        values.setdefault("train_samples", None)
    elif "train_samples" in values:
        values.setdefault("train_iters", None)
    return replace(old, **values)


def _orders(args: DataArguments, start: Start) -> list[OrderPlan] | None:
    """How each dataset is read; ``None`` if its files are not there."""
    plan = plan_blend(args, num_train_samples(args, start))
    orders = []
    for prefix, samples in zip(args.blend.prefixes, plan.num_samples, strict=True):
        try:
            with IndexedFile(prefix) as index:
                tokens = index.tokens_in(*split_range(args.split, index.num_sequences))
        except DataError:
            return None
        orders.append(plan_order(tokens, samples, args.seq_length))
    return orders
