"""Damage done to the files of a run; what must come of it: never a wrong answer called EXACT."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.data_inspect.answers import DocumentSpan, Label, SampleAnswer, StepAnswer
from flagscale.data_inspect.checksums import tokens_crc
from flagscale.data_inspect.events import read_events
from flagscale.data_inspect.locate import find_readings, locate
from flagscale.data_inspect.logs import read_log
from flagscale.data_inspect.run import Run, open_run
from flagscale.data_inspect.spikes import find_spikes
from flagscale.errors import FlagScaleError
from harness.inspect_run import LAST, WrittenRun

__all__ = ["KINDS", "FalseExactError", "Truth", "damaged", "meet"]

KINDS = ("ledger", "idx", "bin", "cache", "description", "sidecar", "log", "events")


class FalseExactError(AssertionError):
    """An answer is called EXACT, and is wrong."""


@dataclass(frozen=True)
class Truth:
    """What is answered of the run as it was written.

    Args:
        run: The run.
        steps: By iteration.
        tokens: By iteration, a checksum of the bytes that its spans point to.
        files: By kind.
    """

    run: WrittenRun
    steps: dict[int, StepAnswer]
    tokens: dict[int, int]
    files: dict[str, list[Path]]

    @classmethod
    def of(cls, written: WrittenRun) -> Truth:
        """Of a run that nothing was done to; each step must be EXACT and as it was drawn."""
        run = open_run(written.directory)
        steps = {i: locate(run, i) for i in range(1, LAST + 1)}
        for iteration, answer in steps.items():
            assert answer.label is Label.EXACT, answer
            for rank, drawn in written.drawn[iteration].items():
                mine = [sample for sample in answer.samples if sample.rank == rank]
                assert [(s.dataset, s.sample_index) for s in mine] == drawn
                for sample in mine:
                    expected = written.tokens[sample.dataset, sample.sample_index]
                    np.testing.assert_array_equal(_text(sample), expected)
        tokens = {i: _text_crc(answer) for i, answer in steps.items()}
        return cls(written, steps, tokens, {kind: written.files(kind) for kind in KINDS})


def _text(sample: SampleAnswer) -> np.ndarray[Any, Any]:
    """The tokens of a sample, from the bytes of the ``.bin``."""
    parts = []
    for span in sample.documents:
        count = span.token_end - span.token_start
        parts.append(np.fromfile(f"{sample.prefix}.bin", "<u2", count, offset=span.byte_offset))
    return np.concatenate(parts)


def _text_crc(answer: StepAnswer) -> int:
    crc = 0
    for sample in answer.samples:
        crc = tokens_crc(_text(sample)[None], crc)
    return crc


def _facts(answer: StepAnswer, *, sources: bool) -> object:
    """All that an answer says of the data."""
    samples = tuple(
        replace(sample, loss=None, documents=tuple(_span(s, sources) for s in sample.documents))
        for sample in answer.samples
    )
    return answer.iteration, answer.consumed_before, answer.consumed_after, samples


def _span(span: DocumentSpan, sources: bool) -> DocumentSpan:
    return span if sources else replace(span, source_file=None, source_line=None)


def meet(truth: Truth, kind: str, rng: random.Random) -> str:
    """Ask a damaged run, as the tools do.

    Args:
        truth: Of the run before.
        kind: What was damaged.
        rng: Decides which steps are asked for.

    Returns:
        The outcome, in a word.

    Raises:
        FalseExactError: A wrong answer is called EXACT.
    """
    if kind in ("log", "events"):
        return _meet_curve(truth, kind, rng)
    outcomes = []
    try:
        run = open_run(truth.run.directory)
        asked = rng.sample(range(1, LAST + 1), 2)
        outcomes += [_meet_step(truth, run, i, sources=kind != "sidecar") for i in asked]
        outcomes.append(_meet_document(truth, run, rng))
    except FlagScaleError as error:
        str(error).encode()  # a message that cannot be printed is no message
        return "own error"
    for worst in ("UNKNOWN", "RECONSTRUCTED", "EXACT without source lines"):
        if worst in outcomes:
            return worst
    return "EXACT and right"


def _meet_step(truth: Truth, run: Run, iteration: int, *, sources: bool) -> str:
    answer = locate(run, iteration)
    if answer.label is not Label.EXACT:
        return answer.label.value
    known = truth.steps[iteration]
    # A sidecar is in no checksum and in no fingerprint: the label is not about source lines.
    for source in (False, True) if sources else (False,):
        told = any(span.source_file for s in answer.samples for span in s.documents)
        if source and not told:
            return "EXACT without source lines"
        if _facts(answer, sources=source) != _facts(known, sources=source):
            raise FalseExactError(f"iteration {iteration}{' (source lines)' * source}")
    if _text_crc(answer) != truth.tokens[iteration]:
        raise FalseExactError(f"the tokens of iteration {iteration}")
    return "EXACT and right"


def _meet_document(truth: Truth, run: Run, rng: random.Random) -> str:
    dataset = rng.randrange(2)
    document = rng.randrange((40, 15)[dataset])
    found = list(find_readings(run, dataset, document))
    true = {
        (i, s.rank, s.micro_batch, s.position, s.sample_index)
        for i, answer in truth.steps.items()
        for s in answer.samples
        if s.dataset == dataset and any(span.document == document for span in s.documents)
    }
    exact = [one for one in found if one.label is Label.EXACT]
    for one in exact:
        if (one.iteration, one.rank, one.micro_batch, one.position, one.sample_index) not in true:
            raise FalseExactError(f"document {document} of dataset {dataset}: {one}")
    labels = {one.label for one in found}
    if labels == {Label.EXACT} and len(found) != len(true):
        raise FalseExactError(f"document {document} of dataset {dataset}: {len(found)} reads")
    return "EXACT and right" if labels <= {Label.EXACT} else max(labels).value


def _meet_curve(truth: Truth, kind: str, rng: random.Random) -> str:
    (path,) = truth.files[kind]
    try:
        curve = read_log(path) if kind == "log" else read_events(path)
        find_spikes(curve)
        if kind == "log":
            run = open_run(path.parent)
            answer = locate(run, rng.randint(1, LAST))
            if answer.label is Label.EXACT:
                raise FalseExactError("without a ledger")
            return answer.label.value
    except FlagScaleError as error:
        str(error).encode()
        return "own error"
    return "a curve"


# --- damage --------------------------------------------------------------------------------------


@contextmanager
def damaged(truth: Truth, kind: str, rng: random.Random) -> Iterator[str]:
    """One file of a kind, damaged in its place, and afterwards as it was.

    Yields:
        What was done.
    """
    files = truth.files[kind]
    victim = rng.choice(files)
    content, stat = victim.read_bytes(), victim.stat()
    changes = [*_BYTES, *_MEANT.get(kind, ()), *_MEANT.get(kind, ())]
    change = rng.choice(changes)
    try:
        done = change(victim, content, rng, files)
        yield f"{victim.name}: {change.__name__} {done}"
    finally:
        _remove_whatever(victim)
        victim.write_bytes(content)
        os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _remove_whatever(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


Change = Callable[[Path, bytes, random.Random, list[Path]], object]
NUMBERS = (0, 1, 2, 3, 8, 32, 255, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
           1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip


def _flip(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    changed = bytearray(content)
    places = [rng.randrange(len(changed)) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for at in places:
        changed[at] ^= 1 << rng.randrange(8)
    victim.write_bytes(changed)
    return places


def _number(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    width = rng.choice((2, 4, 8))
    at = rng.randrange(max(1, min(len(content) - width, rng.choice((100, len(content))))))
    value = rng.choice(NUMBERS) % (1 << (8 * width))
    victim.write_bytes(content[:at] + value.to_bytes(width, "little") + content[at + width :])
    return at, width, value


def _overwrite(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    at, count = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64, 512))
    fill = rng.choice((b"\0" * count, b"\xff" * count, rng.randbytes(count)))
    victim.write_bytes((content[:at] + fill + content[at + count :])[: len(content)])
    return at, count


def _truncate(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    length = rng.choice((0, len(content) - 1, rng.randrange(len(content))))
    victim.write_bytes(content[:length])
    return length


def _extend(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    tail = rng.choice((b"\0" * 100, rng.randbytes(rng.choice((1, 8, 100))), content[-200:]))
    victim.write_bytes(content + tail)
    return len(tail)


def _insert(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    at, count = rng.choice((0, rng.randrange(len(content)))), rng.choice((1, 8, 100))
    victim.write_bytes(content[:at] + rng.randbytes(count) + content[at:])
    return at, count


def _delete(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    at, count = rng.randrange(len(content)), rng.choice((1, 2, 8, 100))
    victim.write_bytes(content[:at] + content[at + count :])
    return at, count


def _swap(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    """Two parts change places."""
    width = rng.choice((2, 4, 8, 24, 64))
    units = len(content) // width
    one, other = sorted(rng.randrange(max(1, units)) for _ in range(2))
    parts = [content[i * width : (i + 1) * width] for i in range(units)]
    if parts:
        parts[one], parts[other] = parts[other], parts[one]
    victim.write_bytes(b"".join(parts) + content[units * width :])
    return width, one, other


def _replace(victim: Path, content: bytes, rng: random.Random, files: list[Path]) -> object:
    """The file is gone, or something else is in its place."""
    del content
    other = rng.choice(files)
    kind = rng.choice(("nothing", "folder", "another", "link to itself", "unreadable text"))
    data = other.read_bytes()
    victim.unlink()
    if kind == "folder":
        victim.mkdir()
    elif kind == "another":
        victim.write_bytes(data)
    elif kind == "link to itself":
        victim.symlink_to(victim.name)
    elif kind == "unreadable text":
        victim.write_bytes(b"\xff\xfe[[[[" * 1000)
    return kind


_BYTES: tuple[Change, ...] = (
    _flip, _flip, _number, _overwrite, _truncate, _extend, _insert, _delete, _swap, _replace,
)  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 3, 1 << 40, 1 << 70, 1.5, float("inf"), float("nan"), "", "x", "-1",
    "9" * 30, "\0", "\ud800", [], [1], ["x"], [None], {}, {"a": 1}, [[]], "0:4,64:8", "99,1,0",
    "cyclic",
)  # fmt: skip


def _edited(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """A JSON value with one leaf or branch changed, and where."""
    path, node = "", tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        path += f"/{key}"
        inner = node[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.15:
            break
        node = inner
    if rng.random() < 0.15:
        del node[key]
        return tree, f"{path} deleted"
    near = isinstance(inner, int) and not isinstance(inner, bool) and rng.random() < 0.6
    node[key] = inner + rng.choice((-8, -1, 1, 8, 100)) if near else rng.choice(_ODD)
    return tree, f"{path} = {node[key]!r}"


def _json_edit(victim: Path, content: bytes, rng: random.Random, files: list[Path]) -> object:
    if victim.suffix not in (".json", ".txt"):
        return _flip(victim, content, rng, files)
    tree, done = _edited(json.loads(content), rng)
    victim.write_bytes(json.dumps(tree).encode("utf-8", "replace"))
    return done


def _records(content: bytes) -> tuple[bytes, list[bytes]]:
    """The beginning of a ledger, and its payloads."""
    payloads, at = [], 8
    while at < len(content):
        (length,) = struct.unpack_from("<I", content, at)
        payloads.append(content[at + 8 : at + 8 + length])
        at += 8 + length
    return content[:8], payloads


def _framed(head: bytes, payloads: list[bytes]) -> bytes:
    return head + b"".join(struct.pack("<II", len(p), zlib.crc32(p)) + p for p in payloads)


def _segment_edit(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    """Another segment, of a right checksum."""
    head, payloads = _records(content)
    tree, done = _edited(json.loads(payloads[0]), rng)
    payloads[0] = json.dumps(tree).encode("utf-8", "replace")
    victim.write_bytes(_framed(head, payloads))
    return done


def _row_edit(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    """Another head of a row, of a right checksum."""
    head, payloads = _records(content)
    row = rng.randrange(1, len(payloads))
    at, width = rng.choice(((0, 4), (4, 8), (12, 2), (14, 2), (16, 2), (18, 2), (32, 4), (36, 4)))
    changed = bytearray(payloads[row])
    old = int.from_bytes(changed[at : at + width], "little")
    new = rng.choice((rng.choice(NUMBERS), old + rng.choice((-8, -1, 1, 8)))) % (1 << (8 * width))
    changed[at : at + width] = new.to_bytes(width, "little")
    payloads[row] = bytes(changed)
    victim.write_bytes(_framed(head, payloads))
    return row, at, old, new


def _rows_moved(victim: Path, content: bytes, rng: random.Random, files: list[Path]) -> object:
    """Rows lost, repeated, exchanged, or of another file."""
    head, payloads = _records(content)
    one, other = (rng.randrange(1, len(payloads)) for _ in range(2))
    kind = rng.choice(("lost", "repeated", "exchanged", "foreign", "foreign segment"))
    foreign = _records(rng.choice(files).read_bytes())[1]
    if kind == "lost":
        del payloads[one]
    elif kind == "repeated":
        payloads.insert(one, payloads[one])
    elif kind == "exchanged":
        payloads[one], payloads[other] = payloads[other], payloads[one]
    elif kind == "foreign":
        payloads[one] = foreign[min(one, len(foreign) - 1)]
    else:
        payloads[0] = foreign[0]
    victim.write_bytes(_framed(head, payloads))
    return kind, one, other


def _array_edit(victim: Path, content: bytes, rng: random.Random, files: list[Path]) -> object:
    """An array of the same or another form, whole."""
    if victim.suffix != ".npy":
        return _json_edit(victim, content, rng, files)
    array = np.load(io.BytesIO(content)).copy()
    flat = array.reshape(-1)
    kind = rng.choice(("exchanged", "one", "all", "shorter", "type", "shape", "reversed"))
    one, other = (rng.randrange(len(flat)) for _ in range(2))
    if kind == "exchanged":
        flat[[one, other]] = flat[[other, one]]
    elif kind == "one" and flat.dtype.names is None:
        flat[one] = rng.choice(NUMBERS) % (1 << (8 * flat.itemsize - 1))
    elif kind == "all":
        np.random.default_rng(rng.randrange(1 << 30)).shuffle(flat)
    elif kind == "shorter":
        array = array[:-1]
    elif kind == "type" and flat.dtype.names is None:
        array = array.astype(rng.choice(("<f4", "<i8", "<i4", "<u4", "<i2", "|u1", ">i4")))
    elif kind == "shape":
        array = array[None]
    else:
        array = array[::-1].copy()
    np.save(victim, array)
    return kind, one, other


def _index_edit(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    """An index that agrees with itself: other documents, or other sequences of the same tokens."""
    _, _, code, count, bounds = struct.unpack_from("<9sQBQQ", content)
    assert code == 8
    lengths = np.frombuffer(content, "<i4", count, 34).copy()
    documents = np.frombuffer(content, "<i8", bounds, 34 + 12 * count).copy()
    kind = rng.choice(("documents", "sequences", "both"))
    if kind != "sequences":
        documents[rng.randrange(1, bounds - 1)] += rng.choice((-1, 1))
        documents.sort()
    if kind != "documents":
        at, by = rng.randrange(count - 1), rng.choice((-2, -1, 1, 2))
        lengths[at] += by
        lengths[at + 1] -= by
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * 2
    arrays = lengths.tobytes() + pointers.astype("<i8").tobytes() + documents.tobytes()
    victim.write_bytes(content[:34] + arrays)
    return kind


_LINES = (
    b"iteration", b"| lm loss: nan |", b"| lm loss: 1E+99999 |", b"\x1b[31m", b"\0", b"\r",
    b"iteration 99999999999999999999/ 1 |", b"------------------------ arguments ---------------",
    b"  seed ... [[[[", b"  seq_length ........ 0", b"  train_iters ..... 1000000000000000",
    b"  global_batch_size ..... 67108864", b"  data_path ........ ['\\0']", b"  split .... 0,0,0",
    b"  successfully loaded checkpoint from x at iteration 999999999", b"| consumed samples: -1 |",
    b"  iterations_to_skip ..... [1, 2]", b"  step_batch_size_schedule ...... 0:8,x", b"\xff\xfe",
    b"  micro_batch_size .... 0", b"  dataloader_type .... cyclic", b"  seed ..... -1",
)  # fmt: skip


def _line_edit(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    """Lines exchanged, repeated or spliced, or words of another run put among them."""
    lines = content.split(b"\n")
    one, other = (rng.randrange(len(lines)) for _ in range(2))
    kind = rng.choice(("exchanged", "repeated", "joined", "word", "word", "argument", "argument"))
    word = rng.choice(_LINES)
    if kind == "exchanged":
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == "repeated":
        lines[one:one] = lines[other : other + 5]
    elif kind == "joined":
        lines[one : one + 2] = [b"".join(lines[one : one + 2])]
    elif kind == "argument":
        ours = [i for i, line in enumerate(lines) if line.startswith(b"  ") and b" ... " in line]
        at = rng.choice(ours or [one])
        lines[at] = lines[at].split(b" ..")[0] + b" .... " + repr(rng.choice(_ODD)).encode()
    else:
        at = rng.randrange(len(lines[one]) + 1)
        lines[one] = lines[one][:at] + word + lines[one][at:]
    victim.write_bytes(b"\n".join(lines))
    return kind, one, other, word if kind == "word" else ""


_MEANT: dict[str, tuple[Change, ...]] = {
    "ledger": (_segment_edit, _segment_edit, _row_edit, _rows_moved),
    "idx": (_index_edit, _index_edit),
    "cache": (_array_edit, _array_edit),
    "description": (_json_edit,),
    "sidecar": (_array_edit, _json_edit),
    "log": (_line_edit, _line_edit, _line_edit),
}
