"""``report``: all of it as one HTML file."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

import numpy as np

from flagscale.data_inspect.answers import DocumentSpan, Label, StepAnswer
from flagscale.data_inspect.commands import Output, add_run_arguments, ordinal, to_stderr
from flagscale.data_inspect.commands.rank import rank_losses
from flagscale.data_inspect.commands.show import (
    add_tokenizer_argument,
    decoder_of,
    texts_of,
    worst_first,
)
from flagscale.data_inspect.commands.spikes import add_detector_arguments, detector_settings
from flagscale.data_inspect.curve import Curve, surviving
from flagscale.data_inspect.decoder import Decoder
from flagscale.data_inspect.locate import locate
from flagscale.data_inspect.losses import open_losses
from flagscale.data_inspect.report import write_report
from flagscale.data_inspect.report.model import (
    AttemptMark,
    Command,
    CurveArrays,
    DocumentText,
    RankedDocument,
    Report,
    SpikeStep,
)
from flagscale.data_inspect.run import Run, open_run
from flagscale.data_inspect.spikes import Spike, find_spikes
from flagscale.errors import ConfigError, DataError

__all__ = ["add_arguments", "build_report", "run"]

_PROGRAM = "python tools/inspect_data.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR``, where to write, and what."""
    add_run_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the HTML file")
    parser.add_argument("--overwrite", action="store_true", help="also a file that is not ours")
    parser.add_argument(
        "--iteration",
        type=ordinal,
        nargs="+",
        default=[],
        metavar="N",
        help="show these steps, too, whether or not they stand out",
    )
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N", help="of the highest score (default: 10)"
    )
    parser.add_argument(
        "--worst",
        type=int,
        default=8,
        metavar="N",
        help="samples whose texts are shown (default: 8)",
    )
    parser.add_argument(
        "--top", type=int, default=20, metavar="N", help="documents ranked; 0: none (default: 20)"
    )
    add_tokenizer_argument(parser)
    add_detector_arguments(parser)


def run(args: argparse.Namespace) -> Output:
    """Write it.

    Raises:
        ConfigError: Something is missing on this machine, or the file is not ours.
        DataError: What is needed of the run is missing or damaged.
    """
    report = build_report(args)
    write_report(report, args.output, overwrite=args.overwrite)
    size = args.output.stat().st_size
    return Output(
        f"{args.output}: {len(report.spikes)} step(s), {size / 1e6:.1f} MB",
        {"output": str(args.output), "bytes": size, "steps": len(report.spikes)},
    )


def build_report(args: argparse.Namespace) -> Report:
    """All that the page shows.

    Raises:
        ConfigError: The arguments make no sense.
        DataError: What is needed of the run is missing or damaged.
    """
    found = open_run(args.run_dir, args.arguments)
    curve, source = found.curve()
    spikes = find_spikes(curve, detector_settings(args))
    notes = [f"could not be read: {place}" for place in curve.damaged]
    decoder = None
    try:
        decoder = decoder_of(found, args.tokenizer)
    except (ConfigError, DataError) as error:
        notes.append(f"no texts: {error.what}")
    chosen = sorted(spikes, key=lambda spike: -spike.score)[: args.steps]
    steps = [
        _spike_step(found, spike, decoder, args)
        for spike in sorted(chosen, key=lambda spike: spike.first_iteration)
    ]
    steps += [_asked_step(found, curve, iteration, decoder, args) for iteration in args.iteration]
    if len(spikes) > len(chosen):
        notes.append(f"{len(spikes)} spikes were found; the {len(chosen)} highest are shown")
    return Report(
        title=found.directory.resolve().name,
        generated_for=str(args.run_dir),
        sources=(source,),
        attempts=tuple(
            AttemptMark(_attempt_name(found, one.ordinal), one.first_iteration, one.last_iteration)
            for one in curve.attempts
        ),
        curve=_arrays(curve),
        spikes=tuple(sorted(steps, key=lambda step: step.iteration)),
        ranking=tuple(_ranking(found, args, decoder, notes)),
        commands=(
            Command("find the spikes again", f"{_PROGRAM} spikes {_quoted(args.run_dir)}"),
            Command(
                "hold every step against the ledger", f"{_PROGRAM} verify {_quoted(args.run_dir)}"
            ),
        ),
        notes=tuple(notes),
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _attempt_name(found: Run, ordinal: int) -> str:
    if found.ledger is None:
        return f"start {ordinal + 1}"
    return [one for one in found.ledger.attempts if one.iterations][ordinal].name


def _arrays(curve: Curve) -> CurveArrays:
    kept = {(point.attempt, point.iteration) for point in surviving(curve).points}
    nan = float("nan")
    points = curve.points
    return CurveArrays(
        iteration=np.array([p.iteration for p in points], np.int64),
        loss=np.array([nan if p.loss is None else p.loss for p in points]),
        grad_norm=np.array([nan if p.grad_norm is None else p.grad_norm for p in points]),
        attempt=np.array([p.attempt for p in points], np.int64),
        superseded=np.array([(p.attempt, p.iteration) not in kept for p in points], np.bool_),
    )


def _spike_step(
    found: Run, spike: Spike, decoder: Decoder | None, args: argparse.Namespace
) -> SpikeStep:
    answer, reason = _answer(found, spike.suspects[1])
    return SpikeStep(
        first_iteration=spike.first_iteration,
        last_iteration=spike.last_iteration,
        peak=spike.peak,
        baseline=spike.baseline,
        score=spike.score if isfinite(spike.score) else None,
        kind=spike.kind.value,
        evidence=spike.evidence,
        step=answer,
        reason=reason,
        texts=_texts(found, answer, decoder, args.worst),
        commands=_commands(args.run_dir, spike.suspects[1]),
    )


def _asked_step(
    found: Run, curve: Curve, iteration: int, decoder: Decoder | None, args: argparse.Namespace
) -> SpikeStep:
    answer, reason = _answer(found, iteration)
    losses = {point.iteration: point.loss for point in surviving(curve).points}
    return SpikeStep(
        first_iteration=iteration,
        last_iteration=iteration,
        peak=losses.get(iteration),
        baseline=None,
        score=None,
        kind="asked for",
        found=False,
        step=answer,
        reason=reason,
        texts=_texts(found, answer, decoder, args.worst),
        commands=_commands(args.run_dir, iteration),
    )


def _answer(found: Run, iteration: int) -> tuple[StepAnswer | None, str]:
    try:
        answer = locate(found, iteration, progress=to_stderr)
    except (ConfigError, DataError) as error:
        return None, str(error)
    if answer.label is Label.UNKNOWN:
        return None, "; ".join(answer.reasons)
    return answer, ""


def _texts(
    found: Run, answer: StepAnswer | None, decoder: Decoder | None, worst: int
) -> dict[tuple[int, DocumentSpan], DocumentText]:
    if answer is None or decoder is None:
        return {}
    return {
        (sample.dataset, span): text
        for sample in worst_first(answer)[:worst]
        for span, text in texts_of(found, answer, sample, decoder)
    }


def _commands(run_dir: Path, iteration: int) -> tuple[Command, ...]:
    step = f"{_quoted(run_dir)} --iteration {iteration}"
    return (
        Command("its samples and documents", f"{_PROGRAM} locate {step} --json"),
        Command("their text", f"{_PROGRAM} show {step} --worst 5"),
        Command("bad data, or a bad state?", f"{_PROGRAM} replay {step}"),
        Command(
            "mask what stands out in it from now on",
            f"{_PROGRAM} quarantine {step} --output quarantine.json",
        ),
    )


def _ranking(
    found: Run, args: argparse.Namespace, decoder: Decoder | None, notes: list[str]
) -> Iterator[RankedDocument]:
    if not args.top:
        return
    try:
        with open_losses(found, to_stderr) as losses:
            everything = (losses.first_iteration, losses.last_iteration)
            ranking = rank_losses(losses, *everything, blocks=True, limit=args.top)
            corpus = losses.mapping.corpus
            for one in ranking.hard:
                spans = corpus.documents(one.dataset, int(one.samples[0]))
                span = next(span for span in spans if span.document == one.document)
                yield RankedDocument(
                    dataset=one.dataset,
                    prefix=corpus.prefixes[one.dataset],
                    document=one.document,
                    score=one.score,
                    uncertainty=one.uncertainty,
                    loss=one.loss,
                    visits=one.visits,
                    tokens=one.tokens,
                    source_file=span.source_file,
                    source_line=span.source_line,
                )
    except (ConfigError, DataError) as error:
        notes.append(f"no ranking: {error.what}")
