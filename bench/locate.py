"""What it costs to name the documents of one step of 1024 samples among a thousand million.

Sparse files stand for a dataset of 1e9 documents of 4096 tokens and upstream's caches of its order
and its blend; only what the step looks up is really written, a few tens of megabytes. Each way is
measured in a process of its own: ours by pread, first with nothing of the files in memory and then
again, and for comparison numpy's memory maps, indexed as upstream does. Then an order of 1e8
samples is computed without a cache.

Example:
    python bench/locate.py
    python bench/locate.py --sequences 1e7 --rebuild 1e6
"""

from __future__ import annotations

import argparse
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

STEP = 1024
SEQ_LENGTH = 4096
PARTS = {
    "dataset_index": ("<i2", 1),
    "dataset_sample_index": ("<i8", 1),
    "shuffle_index": ("<u4", 1),
    "sample_index": ("<i4", 2),
    "document_index": ("<i4", 1),
}
PAGE_ROWS = 512
"""Document bounds that are written around each that is looked up."""


class SparseRun:
    """A dataset and its caches, of which only one step is filled in.

    Args:
        folder: Where the files are.
        sequences: Of the dataset, each a document and as long as a sample.
    """

    def __init__(self, folder: Path, sequences: int) -> None:
        self.folder, self.sequences = folder, sequences
        # The last sequence gives only the label behind the last sample.
        self.samples = sequences - 1
        self.first = self.samples // 8
        self.prefix = folder / "text"
        self._starts: dict[str, int] = {}

    def path(self, part: str) -> Path:
        """The file of a cached array."""
        return self.folder / f"{part}.npy"

    def write(self) -> None:
        """Write the files, and all that a look-up of the step reads."""
        for part, (dtype, columns) in PARTS.items():
            rows = self.samples
            rows += {"sample_index": 1, "document_index": 1}.get(part, 0)
            self._starts[part] = _write_sparse(self.path(part), dtype, rows, columns)
        self._write_dataset()
        rng = np.random.default_rng(0)
        pieces = rng.integers(0, self.samples - 1, STEP)
        positions = np.unique(np.concatenate([pieces, pieces + 1]))
        chosen = rng.choice(self.sequences - 2, len(positions), replace=False) + 1
        steps = np.arange(self.first, self.first + STEP)
        self._put("dataset_sample_index", steps, steps)
        self._put("shuffle_index", steps, pieces)
        self._put("document_index", positions, chosen)
        bounds = np.append(positions, self.samples)
        self._put("sample_index", bounds, np.stack([bounds, np.zeros_like(bounds)], 1))
        for sequence in (0, *chosen.tolist(), self.sequences - 1):
            self._put_sequence(sequence)

    def _put(self, part: str, rows: Any, values: Any) -> None:
        dtype, columns = PARTS[part]
        width = np.dtype(dtype).itemsize * columns
        with self.path(part).open("r+b") as file:
            for row, value in zip(rows.tolist(), values.astype(dtype), strict=True):
                os.pwrite(file.fileno(), value.tobytes(), self._starts[part] + row * width)

    def _write_dataset(self) -> None:
        count = self.sequences
        with Path(f"{self.prefix}.idx").open("wb") as file:
            file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1))
            file.truncate(34 + 12 * count + 8 * (count + 1))
        with Path(f"{self.prefix}.bin").open("wb") as file:
            file.truncate(2 * SEQ_LENGTH * count)

    def _put_sequence(self, sequence: int) -> None:
        count = self.sequences
        with Path(f"{self.prefix}.idx").open("r+b") as file:
            os.pwrite(file.fileno(), struct.pack("<i", SEQ_LENGTH), 34 + 4 * sequence)
            places = np.arange(sequence, min(sequence + 2, count)) * 2 * SEQ_LENGTH
            os.pwrite(file.fileno(), places.astype("<i8").tobytes(), 34 + 4 * count + 8 * sequence)
            low, high = max(0, sequence - PAGE_ROWS), min(count + 1, sequence + PAGE_ROWS)
            bounds = np.arange(low, high).astype("<i8")
            os.pwrite(file.fileno(), bounds.tobytes(), 34 + 12 * count + 8 * low)

    def forget(self) -> None:
        """Drop the files from the page cache."""
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_sparse(path: Path, dtype: str, rows: int, columns: int) -> int:
    """The byte at which the elements begin."""
    shape = (rows,) if columns == 1 else (rows, columns)
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        npy_format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + rows * columns * np.dtype(dtype).itemsize)
    return start


def resident(name: str = "VmRSS") -> float:
    """Memory of this process in MB; ``VmHWM`` for the most it ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {name}")


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def measure_pread(run: SparseRun) -> None:
    """Open everything and look up a step, cold and warm."""
    before = resident()
    from flagscale.data_inspect.cache_search import DatasetKey
    from flagscale.data_inspect.caches import CachedBlend
    from flagscale.data_inspect.dataset import TrainingDataset
    from flagscale.data_inspect.indexed import IndexedFile

    key = DatasetKey(str(run.prefix), run.samples, SEQ_LENGTH, 1, None)
    paths = tuple(map(run.path, ("document_index", "sample_index", "shuffle_index")))
    step = np.arange(run.first, run.first + STEP)

    def look_up(documents: bool) -> None:
        blends = (run.path("dataset_index"), run.path("dataset_sample_index"))
        index = IndexedFile(run.prefix)
        with CachedBlend(blends, (1.0,), run.samples) as blend:
            dataset = TrainingDataset(key, (0, run.sequences), index, paths)  # type: ignore[arg-type]
            _, samples = blend.locate(step)
            if documents:
                if {len(spans) for spans in dataset.documents(samples)} != {2}:
                    raise RuntimeError("a sample is not a document and the label behind it")
            else:
                pieces = dataset.order.shuffle(samples)
                positions, _ = dataset.order.boundaries(np.concatenate([pieces, pieces + 1]))
                dataset.order.sequences(positions)
            dataset.close()

    for what, documents in (("sequences", False), ("documents, bytes", True)):
        run.forget()
        cold = timed(lambda documents=documents: look_up(documents))
        warm = min(timed(lambda documents=documents: look_up(documents)) for _ in range(5))
        print(f"pread, {what:17} cold {cold:8.1f} ms, again {warm:6.1f} ms")
    print(f"pread, memory above numpy's     {resident('VmHWM') - before:8.1f} MB")


def measure_mmap(run: SparseRun) -> None:
    """The same sequences from memory maps."""
    before = resident()
    step = np.arange(run.first, run.first + STEP)

    def look_up() -> None:
        maps = {part: np.load(run.path(part), mmap_mode="r") for part in PARTS}
        pieces = maps["shuffle_index"][maps["dataset_sample_index"][step]]
        for bound in (pieces, pieces + 1):
            maps["document_index"][maps["sample_index"][bound][:, 0]]

    run.forget()
    cold, warm = timed(look_up), timed(look_up)
    print(f"mmap,  sequences         cold {cold:8.1f} ms, again {warm:6.1f} ms")
    print(f"mmap,  memory above numpy's     {resident('VmHWM') - before:8.1f} MB")


def measure_rebuild(samples: int, tokens_each: int) -> None:
    """An order without a cache.

    Args:
        samples: Of the order.
        tokens_each: Mean length of a document.
    """
    before = resident()
    from flagscale.data_inspect.order import build_order, plan_order, spans_of

    count = samples * SEQ_LENGTH // tokens_each
    lengths = np.random.default_rng(0).integers(
        tokens_each // 2, tokens_each * 3 // 2, count, dtype=np.int32
    )
    plan = plan_order(int(lengths.sum(dtype=np.int64)), samples * 99 // 100, SEQ_LENGTH)
    start = time.perf_counter()
    order = build_order(lengths, 0, count, plan, 1, seq_length=SEQ_LENGTH)
    seconds = time.perf_counter() - start
    step = np.random.default_rng(1).integers(0, plan.num_samples_total, STEP)
    look_up = timed(
        lambda: spans_of(order, step, lambda s: (lengths[s].astype(np.int64), s), "text")
    )
    print(
        f"no cache, {plan.num_samples_total:.2e} samples of {count:.1e} documents: "
        f"{seconds:.1f} s, peak {resident('VmHWM') - before:.0f} MB, a step then {look_up:.1f} ms"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=float, default=1e9)
    parser.add_argument("--rebuild", type=float, default=1e8, help="samples of the order computed")
    parser.add_argument("--folder", type=Path, help="where to write; must hold sparse files")
    parser.add_argument("--only", choices=["pread", "mmap", "rebuild"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens-each", type=int, default=SEQ_LENGTH, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.only == "rebuild":
        measure_rebuild(int(args.rebuild), args.tokens_each)
        return 0
    if args.only:
        run = SparseRun(args.folder, int(args.sequences))
        {"pread": measure_pread, "mmap": measure_mmap}[args.only](run)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        SparseRun(Path(folder), int(args.sequences)).write()
        for only in ("pread", "mmap"):
            _run_again("--only", only, "--folder", folder, "--sequences", str(args.sequences))
    for tokens in (SEQ_LENGTH, SEQ_LENGTH // 4):
        more = ("--rebuild", str(args.rebuild), "--tokens-each", str(tokens))
        _run_again("--only", "rebuild", *more)
    return 0


def _run_again(*argv: str) -> None:
    subprocess.run([sys.executable, __file__, *argv], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
