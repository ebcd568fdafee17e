"""Checkpoints too large to train: planned at full size, and moved there and back at less.

Each element of a synthetic checkpoint is a function of what it is an element of
(``tests/harness/elements.py``), so what was written is held to that, read by torch.

- ``plan``: 34 billion parameters, TP 4 x PP 4 x DP 32 to TP 8 x PP 2 x DP 40, on files of the right
  size without data (sparse). Opened, planned, and verified to the last element. With all data zero
  the proof that main copies are the weights is read and compared, but shows nothing.
- ``scaled``: the same ranks, layers, heads and number of buckets, all widths divided by 16; there
  and back, every element compared.
- ``experts``: a mixture of experts, Transformer Engine's spec, TP 2 x EP 4 to PP 2 x EP 2.

Example:
    nice python bench/reshard_large.py --work-dir /tmp/large
    python bench/reshard_large.py --work-dir /tmp/large --only plan
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness.saved_job import ITERATION, job_args  # noqa: E402
from harness.synthetic import FORMS, Synthetic  # noqa: E402

from flagscale.layout.model import LayerSpec  # noqa: E402
from flagscale.optim import reshard  # noqa: E402
from flagscale.optim.carry import Request  # noqa: E402
from flagscale.optim.opening import open_source  # noqa: E402

AQUILA_34B = {
    "num_layers": 60,
    "hidden_size": 6144,
    "ffn_hidden_size": 24576,
    "num_attention_heads": 48,
    "group_query_attention": True,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 100008,
    "padded_vocab_size": 100096,
    "seq_length": 4096,
    "max_position_embeddings": 4096,
    "overlap_grad_reduce": True,
}
SCALED = AQUILA_34B | {
    "hidden_size": 384,
    "ffn_hidden_size": 1536,
    "kv_channels": 8,
    "vocab_size": 6251,
    "padded_vocab_size": 6256,
    "ddp_bucket_size": 40_000_000 // 256,
}
EXPERTS = {
    "num_layers": 12,
    "hidden_size": 512,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "vocab_size": 16001,
    "padded_vocab_size": 16004,
    "num_experts": 8,
    "moe_ffn_hidden_size": 640,
    "moe_shared_expert_intermediate_size": 1024,
    "moe_grouped_gemm": True,
    "transformer_impl": "transformer_engine",
    "untie_embeddings_and_output_weights": False,
    "ddp_pad_buckets_for_high_nccl_busbw": True,
    "overlap_grad_reduce": True,
    "ddp_bucket_size": 2_000_000,
}


@dataclass(frozen=True)
class Job:
    """A layout of a model in a format."""

    model: dict[str, Any]
    sizes: dict[str, Any]
    form: str
    request: Request
    spec: LayerSpec = "local"

    @property
    def checkpoint(self) -> Synthetic:
        """Its checkpoint."""
        return Synthetic(job_args(**self.model, **self.sizes), self.form, self.spec)


def wide(model: dict[str, Any], form: str) -> Job:
    """TP 4 x PP 4 x DP 32."""
    return Job(model, {"tp": 4, "pp": 4, "dp": 32}, form, Request(4, 4, 32))


def deep(model: dict[str, Any], form: str) -> Job:
    """TP 8 x PP 2 x DP 40."""
    return Job(model, {"tp": 8, "pp": 2, "dp": 40}, form, Request(8, 2, 40))


def spread(form: str) -> Job:
    """Experts over four ranks, tensors over two."""
    sizes = {"tp": 2, "dp": 20, "expert_model_parallel_size": 4}
    request = Request(2, 1, 20, ep_size=4, etp_size=2)
    return Job(EXPERTS, sizes, form, request, "transformer_engine")


def gathered(form: str) -> Job:
    """Experts over two ranks, layers over two stages."""
    sizes = {"pp": 2, "dp": 6, "expert_model_parallel_size": 2}
    request = Request(1, 2, 6, ep_size=2, etp_size=1)
    return Job(EXPERTS, sizes, form, request, "transformer_engine")


# ---------------------------------------------------------------------------------------------
# Steps, each in a process of its own, whose memory is measured


@dataclass(frozen=True)
class Row:
    """What a step took.

    Args:
        what: The step.
        seconds: Of each of its parts.
        peak_mib: Largest resident memory of the process.
        notes: Counts.
        problems: What is not as it has to be.
    """

    what: str
    seconds: dict[str, float]
    peak_mib: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Watch:
    """Measures the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def lap(self, name: str) -> None:
        """A part is done."""
        now = time.perf_counter()
        self.seconds[name], self._at = now - self._at, now


def nothing() -> Row:
    """What a process has that has only imported the program."""
    return Row("imports alone", {})


def write(job: Job, save_dir: Path, sparse: bool) -> Row:
    """Write a checkpoint."""
    watch = Watch()
    directory = job.checkpoint.write(save_dir, sparse=sparse)
    watch.lap("write")
    size = sum(path.stat().st_size for path in directory.rglob("*"))
    return Row(f"write {job.form}", watch.seconds, notes={"GB": size / 1e9})


def plan(load_dir: Path, job: Job, save_dir: Path, execute: bool) -> Row:
    """Open, plan, verify, count, and do it where asked."""
    watch = Watch()
    source = open_source(load_dir)
    watch.lap("open")
    ckpt_format = "torch" if job.form == "legacy" else "torch_dist"
    optim_format = "fully_reshardable" if job.form == "legacy" else job.form
    planned = reshard.plan(source, job.request, ckpt_format, optim_format)  # type: ignore[arg-type]
    watch.lap("plan")
    notes = {
        "source pieces": len(source.pieces),
        "target pieces": len(planned.target.pieces),
        "files": len(planned.target.files),
        "GB": planned.copy.plan.total_bytes / 1e9,
    }
    if execute:
        reshard.run(planned, save_dir, workers=2)
        watch.lap("run")
    else:
        files = range(len(planned.copy.plan.files))
        units = [len(unit.items) for index in files for unit in planned.copy.plan.units(index)]
        notes |= {"units": len(units), "items": sum(units)}
    return Row(f"{source.optim_format} to {job.form}", watch.seconds, notes=notes)


def check(job: Job, save_dir: Path) -> Row:
    """Compare every element with what it has to be."""
    watch = Watch()
    problems = job.checkpoint.differences(save_dir / f"iter_{ITERATION:07d}")
    watch.lap("check")
    elements = sum(_numel(content.shape) for content in job.checkpoint.contents().values())
    return Row(f"compare {job.form}", watch.seconds, 0.0, {"elements": elements}, problems)


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def measured(step: Callable[..., Row], *args: Any) -> Row:
    """Run a step in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, step, args))
    process.start()
    theirs.close()
    try:
        row, peak = ours.recv()
    except EOFError:
        raise SystemExit(f"{step.__name__} failed") from None
    process.join()
    return Row(row.what, row.seconds, peak / 1024, row.notes, row.problems)


def _measure(connection: Connection, step: Callable[..., Row], args: tuple[Any, ...]) -> None:
    row = step(*args)
    connection.send((row, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


# ---------------------------------------------------------------------------------------------


def full_size(work: Path) -> Iterator[Row]:
    """34 billion parameters, planned."""
    yield measured(nothing)
    for form in FORMS:
        yield measured(write, wide(AQUILA_34B, form), work / form, True)
        for to in FORMS:
            yield measured(plan, work / form, deep(AQUILA_34B, to), work / "none", False)
        shutil.rmtree(work / form)


def there_and_back(
    work: Path, here: Callable[[str], Job], there: Callable[[str], Job]
) -> Iterator[Row]:
    """Each format once as a source and once as a target."""
    for form, to in zip(FORMS, (*FORMS[1:], FORMS[0]), strict=True):
        source, target = here(form), there(to)
        yield measured(write, source, work / "a", False)
        yield measured(plan, work / "a", target, work / "b", True)
        yield measured(check, target, work / "b")
        yield measured(plan, work / "b", source, work / "back", True)
        yield measured(check, source, work / "back")
        shutil.rmtree(work)


CASES: dict[str, Callable[[Path], Iterator[Row]]] = {
    "plan": full_size,
    "scaled": lambda work: there_and_back(
        work, lambda form: wide(SCALED, form), lambda form: deep(SCALED, form)
    ),
    "experts": lambda work: there_and_back(work, spread, gathered),
}


def main() -> int:
    """Run the cases asked for, and print what they took; fails if any element is wrong."""
    parser = argparse.ArgumentParser(description="Reshard what is too large to train.")
    parser.add_argument("--work-dir", type=Path, required=True, help="needs about 6 GB")
    parser.add_argument("--only", choices=[*CASES], action="append")
    arguments = parser.parse_args()
    failed = False
    print("| case | step | seconds | peak MiB | |")
    print("|---|---|---|--:|---|")
    for name in arguments.only or CASES:
        work = arguments.work_dir / name
        shutil.rmtree(work, ignore_errors=True)
        for row in CASES[name](work):
            seconds = ", ".join(f"{part} {took:.1f}" for part, took in row.seconds.items())
            notes = ", ".join(
                f"{value:.2f} {key}" if isinstance(value, float) else f"{value:,} {key}"
                for key, value in row.notes.items()
            )
            if row.what.startswith("compare"):
                notes += f", {len(row.problems)} tensors differ"
            print(
                f"| {name} | {row.what} | {seconds} | {row.peak_mib:,.0f} | {notes} |", flush=True
            )
            for problem in row.problems[:10]:
                print(f"    {problem}")
            failed |= bool(row.problems)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
