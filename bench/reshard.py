"""Resharding beside copying the files, PyTorch's own load and save, and upstream's online reshard.

One job is trained for a moment at two sizes, four times apart, and saved by upstream. Then, each in
a process of its own, timed from its start to its end:

    cp          the checkpoint is copied, and every file of the copy flushed
    ours        tools/reshard_optimizer.py, DP2 to TP2 x PP2, with one worker and with two
    DCP         torch.distributed.checkpoint loads and saves all tensors in one process
    upstream    loads at TP2 and saves, in two ranks: its own timers, without start and training

Peak memory is that of the process, or of the larger rank. Every variant writes to the same disk and
reads what was just written, so from the page cache if that is large enough.

Example:
    python bench/reshard.py --work-dir outputs/bench-reshard
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness import train  # noqa: E402
from harness.corpus import write_corpus  # noqa: E402
from harness.measure import Measured, copy, run  # noqa: E402
from harness.reshard import STOPPED_AT, Layout, Source, train_source  # noqa: E402

SIZES = {"small": (512, 12), "large": (1280, 8)}
"""Hidden size and layers; about 0.5 and 2.2 GB a checkpoint."""

_DCP = """
import sys, warnings
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
import torch
warnings.simplefilter("ignore")
reader = FileSystemReader(sys.argv[1])
state = {
    key: torch.empty(entry.size, dtype=entry.properties.dtype)
    for key, entry in reader.read_metadata().state_dict_metadata.items()
    if isinstance(entry, TensorStorageMetadata)
}
dcp.load(state, storage_reader=FileSystemReader(sys.argv[1]), no_dist=True)
writer = FileSystemWriter(sys.argv[2], single_file_per_rank=True)
dcp.save(state, storage_writer=writer, no_dist=True)
"""


def source_of(hidden_size: int, num_layers: int) -> Source:
    """A job of a given size."""
    return Source(
        f"bench-{hidden_size}-{num_layers}",
        Layout(dp=2),
        {
            "hidden_size": hidden_size,
            "ffn_hidden_size": 3 * hidden_size,
            "num_layers": num_layers,
            "num_attention_heads": hidden_size // 64,
            "num_query_groups": hidden_size // 128,
        },
    )


def ours(source: Path, destination: Path, workers: int) -> Measured:
    """The project's tool."""
    argv = [
        *(sys.executable, ROOT / "tools" / "reshard_optimizer.py"),
        *("--load-dir", source, "--save-dir", destination, "--workers", str(workers)),
        *("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"),
        *("--target-data-parallel-size", "1"),
    ]
    measured, text = run(argv)
    found = re.search(r"read, write +([\d,]+) and ([\d,]+) bytes", text)
    if found is None:
        raise SystemExit(f"no figures in\n{text}")
    own = re.search(r"bytes in ([\d.]+) s", text)
    read = int(found[1].replace(",", ""))
    return Measured(measured.seconds, measured.peak_bytes, read, float(own[1]) if own else None)


def dcp(source: Path, destination: Path) -> Measured:
    """PyTorch's distributed checkpoint in one process."""
    iteration = f"iter_{STOPPED_AT:07d}"
    return run([sys.executable, "-c", _DCP, source / iteration, destination / iteration])[0]


def upstream(job: Source, corpus: Path, source: Path, destination: Path) -> Measured:
    """Upstream's online reshard, by its own timers."""
    target = Layout(tp=2)
    argv = job.argv(
        corpus, target, load=source, save=destination, save_interval=1000,
        exit_interval=STOPPED_AT + 1, dist_ckpt_optim_fully_reshardable=True,
        padded_vocab_size=256, no_load_rng=True,
    )  # fmt: skip
    logs = destination.with_name(f"{destination.name}-logs")
    result = train(argv, logs, nproc=target.nproc, timeout_s=1200.0).require_success()
    log = "\n".join(rank.log for rank in result.ranks)
    times = [
        float(found[1]) / 1000
        for name in ("load-checkpoint", "save-checkpoint")
        if (found := re.search(name + r" \.+: \([\d.]+, ([\d.]+)\)", log))
    ]
    if len(times) != 2:
        raise SystemExit(f"no times in\n{log[-3000:]}")
    return Measured(sum(times), 0)


def measure(work_dir: Path, name: str, corpus: Path) -> list[tuple[str, str, int, Measured]]:
    """All variants at one size: size, variant, bytes of the source, figures."""
    job = source_of(*SIZES[name])
    trained = train_source(job, corpus, work_dir / name, formats=())
    flat, named = trained.checkpoint("dp_reshardable"), trained.checkpoint("fully_reshardable")
    variants: dict[str, tuple[Path, Callable[[Path, Path], Measured]]] = {
        "cp, flushed": (flat, copy),
        "ours, dp_reshardable, 1 worker": (flat, lambda a, b: ours(a, b, 1)),
        "ours, dp_reshardable, 2 workers": (flat, lambda a, b: ours(a, b, 2)),
        "ours, fully_reshardable, 2 workers": (named, lambda a, b: ours(a, b, 2)),
        "DCP load and save, 1 process": (named, dcp),
        "upstream online, 2 ranks": (named, lambda a, b: upstream(job, corpus, a, b)),
    }
    rows = []
    for title, (source, variant) in variants.items():
        destination = work_dir / "out"
        shutil.rmtree(destination, ignore_errors=True)
        size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
        os.sync()
        rows.append((name, title, size, variant(source, destination)))
        print_row(*rows[-1])
        shutil.rmtree(destination, ignore_errors=True)
    return rows


def print_row(name: str, title: str, size: int, got: Measured) -> None:
    """One line of the table."""
    peak = f"{got.peak_bytes / 2**20:8.0f}" if got.peak_bytes else "       -"
    moved = f"{got.read_bytes / size:6.3f}" if got.read_bytes else "     -"
    own = f"; {got.own_seconds:.1f} s of them its work" if got.own_seconds is not None else ""
    print(
        f"{name:6} {size / 1e9:6.2f} GB  {title:36}{got.seconds:8.1f} s"
        f"{size / got.seconds / 1e9:8.2f} GB/s {peak} MiB   read {moved} x{own}",
        flush=True,
    )


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Resharding beside cp, DCP and upstream.")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs" / "bench-reshard")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    corpus = arguments.work_dir / "text_document"
    if not corpus.with_suffix(".idx").exists():
        write_corpus(corpus)
    for name in arguments.sizes:
        rows = measure(arguments.work_dir, name, corpus)
        seconds = {title: got.seconds for _, title, _, got in rows}
        best = seconds["ours, dp_reshardable, 2 workers"]
        print(
            f"{name}: ours with 2 workers is {seconds['cp, flushed'] / best:.2f} x as fast as cp, "
            f"{seconds['DCP load and save, 1 process'] / best:.2f} x as DCP"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
