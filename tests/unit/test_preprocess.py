"""Preprocessing: the same bytes as upstream's builder in a plain loop, whatever happens on the way,
and a sidecar that leads every document back to its line.
"""

import contextlib
import fcntl
import functools
import gzip
import importlib.util
import io
import json
import operator
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data.preprocess import plan_preprocess, preprocess
from flagscale.data.shards import Counts, PreprocessSettings
from flagscale.data.sidecar import SourceMap
from flagscale.data.sources import SourceFile
from flagscale.data.tokenizer import TokenizerChoice, build_tokenizer, train_tokenizer
from flagscale.data.workers import run_in_order
from flagscale.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
OUTPUTS = (".bin", ".idx", ".source.npy")
TEXTS = [
    f"Document {number}: "
    + "the moon is a harsh mistress. 明月几时有？把酒问青天。" * (number % 7 + 1)
    for number in range(60)
]


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> TokenizerChoice:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, directory)
    return TokenizerChoice("HuggingFaceTokenizer", str(directory))


@pytest.fixture(scope="module")
def tokenizer(choice: TokenizerChoice) -> Any:
    return build_tokenizer(choice)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(path: Path | list[Path], prefix: Path, choice: TokenizerChoice, **options: Any) -> Counts:
    """Plan and preprocess, with small shards so that there are many."""
    paths = path if isinstance(path, list) else [path]
    ours = PreprocessSettings(choice, append_eod=True, shard_bytes=options.pop("shard_bytes", 1000))
    return preprocess(plan_preprocess(paths, prefix, ours), **options)


def outputs(prefix: Path) -> dict[str, bytes]:
    return {ending: Path(f"{prefix}_text_document{ending}").read_bytes() for ending in OUTPUTS}


def plain_loop(
    prefix: Path, texts: list[str], tokenize: Callable[[str], list[int]], eod: int
) -> list[bytes]:
    """What upstream's own builder makes of the texts, one after the other."""
    import torch

    from flagscale.data.upstream import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(300))
    for text in texts:
        if tokens := tokenize(text):
            builder.add_item(torch.tensor([*tokens, eod]))
            builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return [Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx")]


def main(*arguments: object) -> int:
    """The program's main() in this process."""
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def test_same_bytes_as_upstreams_builder(
    tmp_path: Path, choice: TokenizerChoice, tokenizer: Any
) -> None:
    texts = [*TEXTS[:30], "", *TEXTS[30:]]
    middle = 17
    paths = [
        write_jsonl(tmp_path / "a.jsonl", texts[:middle]),
        write_jsonl(tmp_path / "b.jsonl", texts[middle:]),
    ]
    counts = run(paths, tmp_path / "out", choice)
    ours = outputs(tmp_path / "out")
    expected = plain_loop(tmp_path / "plain", texts, tokenizer.tokenize, tokenizer.eod)
    assert [ours[".bin"], ours[".idx"]] == expected
    assert (counts.lines, counts.documents, counts.empty) == (61, {"text": 60}, {"text": 1})
    assert counts.tokens == {"text": len(ours[".bin"]) // 2}
    assert not list(tmp_path.glob("*.partial"))


def test_output_does_not_depend_on_workers_or_shards(
    tmp_path: Path, choice: TokenizerChoice
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run(path, tmp_path / "one", choice)
    run(path, tmp_path / "two", choice, workers=2)
    run(path, tmp_path / "whole", choice, shard_bytes=1 << 20)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two") == outputs(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_in_the_middle_and_started_again(
    tmp_path: Path, choice: TokenizerChoice, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    run(path, tmp_path / "whole", choice, shard_bytes=1 << 20)
    prefix = tmp_path / "out"
    command = [sys.executable, TOOL, "--input", path, "--output-prefix", prefix, "--append-eod"]
    command += ["--tokenizer-type", choice.type, "--tokenizer-model", choice.model]
    command += ["--workers", str(workers), "--shard-bytes", "3000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        # Far enough in to have work to keep, far enough from the end to have work left.
        deadline = time.monotonic() + 300
        while len(list(prefix.parent.glob("out.partial/*/[0-9]*"))) < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("out_text_document*"))
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "workers outlive a killed run"

    run(path, prefix, choice, workers=workers, shard_bytes=3000)
    assert outputs(prefix) == outputs(tmp_path / "whole")
    kept = re.search(r"going on after (\d+) finished shards", caplog.text)
    assert kept is not None
    assert int(kept[1]) >= 5


def test_finished_shards_are_not_done_again(
    tmp_path: Path, choice: TokenizerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted by a malformed line; the tokenizer then sees only what was left."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, TEXTS)
    with path.open("a") as stream:
        stream.write("{\n")
    with pytest.raises(DataError, match="work that is done is kept"):
        run(path, tmp_path / "out", choice)
    monkeypatch.setattr("flagscale.data.shards.json_texts", lambda *_: pytest.fail("done again"))
    counts = run(path, tmp_path / "out", choice, skip_malformed=True)
    assert counts.documents == {"text": 60}
    assert [line[1] for line in counts.malformed] == [61]


@pytest.mark.parametrize("change", ["input", "setting"])
def test_a_change_starts_afresh(
    tmp_path: Path, choice: TokenizerChoice, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, TEXTS)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError, match="malformed"):
        run(path, tmp_path / "out", choice)
    if change == "input":
        write_jsonl(path, TEXTS[::-1])
    size = {"input": 1000, "setting": 1001}[change]
    run(path, tmp_path / "out", choice, skip_malformed=True, shard_bytes=size)
    assert "starting afresh" in caplog.text
    assert "going on" not in caplog.text
    texts = TEXTS[::-1] if change == "input" else TEXTS
    run(write_jsonl(tmp_path / "b.jsonl", texts), tmp_path / "clean", choice)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "clean")


def test_an_input_that_grows_while_it_is_read(tmp_path: Path, choice: TokenizerChoice) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def append(_: int) -> None:
        with path.open("a") as stream:
            stream.write("\n")

    with pytest.raises(DataError, match="changed while it was read"):
        run(path, tmp_path / "out", choice, on_progress=append)
    assert not list(tmp_path.glob("out_text_document*"))


def test_two_runs_cannot_share_a_prefix(tmp_path: Path, choice: TokenizerChoice) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run"):
            run(path, tmp_path / "out", choice)
    run(path, tmp_path / "out", choice)


def test_without_an_index_until_all_is_there(
    tmp_path: Path, choice: TokenizerChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rewrite that stops half-way must not leave an old index beside new tokens."""
    prefix = tmp_path / "out"
    run(write_jsonl(tmp_path / "a.jsonl", TEXTS), prefix, choice)
    renames = []

    def fail_at_the_tokens(source: Path, target: Path) -> None:
        if target.name.endswith("_document.bin"):
            raise KeyboardInterrupt
        renames.append(target.name)
        os.rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_at_the_tokens)
    with pytest.raises(KeyboardInterrupt):
        run(write_jsonl(tmp_path / "a.jsonl", TEXTS[::-1]), prefix, choice)
    monkeypatch.undo()
    assert renames[-2:] == ["out_text_document.source.npy", "out_text_document.source.json"]
    assert not Path(f"{prefix}_text_document.idx").exists()


def test_several_keys(tmp_path: Path, choice: TokenizerChoice, tokenizer: Any) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"title": f"t{n}", "text": "" if n % 3 else f"body {n}"} for n in range(9)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    ours = PreprocessSettings(choice, json_keys=("text", "title"), shard_bytes=50)
    counts = preprocess(plan_preprocess([path], tmp_path / "out", ours))
    assert counts.documents == {"text": 3, "title": 9}
    for key, lines in (("text", [0, 3, 6]), ("title", list(range(9)))):
        with SourceMap(tmp_path / f"out_{key}_document") as sources:
            assert [sources.locate(n).line for n in range(len(sources))] == lines
        tokens = np.fromfile(tmp_path / f"out_{key}_document.bin", np.uint16).tolist()
        assert tokenizer.detokenize(tokens) == "".join(record[key] for record in records)


# ---------------------------------------------------------------- the sidecar

LINES = st.lists(
    st.one_of(
        st.just(b""),
        st.just(b" \t"),
        st.builds(
            lambda text, escape: json.dumps({"id": 1, "text": text}, ensure_ascii=escape).encode(),
            st.one_of(
                st.text(max_size=30), st.sampled_from(["", "\u2028\x85", "\ufeff", "一" * 40])
            ),
            st.booleans(),
        ),
    ),
    max_size=12,
)
FILE = st.tuples(
    LINES,
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]),
)


@settings(max_examples=40, deadline=None)
@given(files=st.lists(FILE, min_size=1, max_size=3), shard_bytes=st.integers(1, 400))
def test_the_sidecar_finds_the_line_of_any_document(
    tmp_path_factory: pytest.TempPathFactory,
    choice: TokenizerChoice,
    tokenizer: Any,
    files: Any,
    shard_bytes: int,
) -> None:
    from flagscale.data.upstream import missing_rank_ignored

    folder = tmp_path_factory.mktemp("sources")
    expected: list[tuple[Path, int, bytes, bytes]] = []
    paths = []
    for ordinal, (lines, end, ended, name) in enumerate(files):
        stream = end.join(lines) + (end if ended and lines else b"")
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        path = folder / f"{ordinal}-{name}"
        path.write_bytes(pack(stream))
        paths.append(path)
        expected.extend(
            (path, number, line, stream)
            for number, line in enumerate(lines)
            if line.strip() and json.loads(line)["text"]
        )
    if not expected:
        with pytest.raises(DataError, match="no document"):
            run(paths, folder / "out", choice, shard_bytes=shard_bytes)
        return
    run(paths, folder / "out", choice, shard_bytes=shard_bytes)
    with missing_rank_ignored():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(f"{folder}/out_text_document", multimodal=False)
    with SourceMap(folder / "out_text_document") as sources:
        assert len(sources) == len(expected) == len(dataset)
        for document, (path, number, line, stream) in enumerate(expected):
            place = sources.locate(document)
            assert (place.path, place.line, place.length) == (path, number, len(line))
            assert stream[place.offset : place.offset + place.length] == line
            assert sources.read_line(document) == line
            *tokens, eod = dataset[document].tolist()
            assert eod == tokenizer.eod
            assert tokenizer.detokenize(tokens) == json.loads(line)["text"]


def test_the_sidecar_moves_with_its_folder(tmp_path: Path, choice: TokenizerChoice) -> None:
    elsewhere = write_jsonl(tmp_path / "elsewhere.jsonl", TEXTS[:2])
    folder = tmp_path / "before"
    folder.mkdir()
    run([write_jsonl(folder / "a.jsonl", TEXTS[:2]), elsewhere], folder / "out", choice)
    folder.rename(tmp_path / "after")
    with SourceMap(tmp_path / "after" / "out_text_document") as sources:
        assert sources.locate(0).path == tmp_path / "after" / "a.jsonl"
        assert json.loads(sources.read_line(1))["text"] == TEXTS[1]
        assert sources.locate(2).path == elsewhere
        for document in (-1, 4):
            with pytest.raises(DataError, match="no such document"):
                sources.locate(document)
        elsewhere.write_text("something else")
        with pytest.raises(DataError, match="changed since"):
            sources.read_line(2)


def test_a_sidecar_that_is_missing_or_cut_short(tmp_path: Path, choice: TokenizerChoice) -> None:
    prefix = tmp_path / "out_text_document"
    with pytest.raises(DataError, match="no readable sidecar"):
        SourceMap(prefix)
    run(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", choice)
    rows = Path(f"{prefix}.source.npy")
    os.truncate(rows, rows.stat().st_size - 1)
    with pytest.raises(DataError, match="cut short"):
        SourceMap(prefix)


def test_the_sidecar_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, flagscale.data.sidecar; assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- bad input

MALFORMED = [
    (b"{", "not JSON"),
    (b"[1]", "this is a list"),
    (b'{"txt": "a"}', "'text' is missing"),
    (b'{"text": 1}', "'text' is a int"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "\\ud800"}', "surrogate"),
    (b"[" * 200_000, "nested too deeply"),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_malformed_line_is_named(
    tmp_path: Path, choice: TokenizerChoice, workers: int
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[20:20] = [b"{\n"]
    lines[50:50] = [b"[]\n"]
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:21\n(.*\n)*.*not JSON.*\n.*--skip-malformed"):
        run(path, tmp_path / "out", choice, workers=workers)
    assert not list(tmp_path.glob("out_text_document*"))


def test_malformed_lines_are_left_out_and_named(
    tmp_path: Path, choice: TokenizerChoice, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [line for bad, _ in MALFORMED for line in (b'{"text": "fine"}', bad, b"")]
    path.write_bytes(b"\n".join(lines) + b"\n")
    arguments = ["--input", path, "--output-prefix", tmp_path / "out", "--skip-malformed"]
    arguments += ["--tokenizer-type", choice.type, "--tokenizer-model", choice.model]
    assert main(*arguments) == 0
    printed = capsys.readouterr().out
    assert "7 documents" in printed
    assert "21 lines, 7 blank, 7 malformed" in printed
    for ordinal, (_, problem) in enumerate(MALFORMED):
        assert re.search(rf"a\.jsonl:{3 * ordinal + 2}: .*{problem}", printed)
    with SourceMap(tmp_path / "out_text_document") as sources:
        assert [sources.locate(n).line for n in range(7)] == list(range(0, 21, 3))
        assert len(sources.about["counts"]["malformed"]) == 7


@pytest.mark.parametrize("cut", [1, 5, 200])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_input_cut_short(
    tmp_path: Path, choice: TokenizerChoice, name: str, cut: int
) -> None:
    pack = gzip.compress if name.endswith("gz") else zstandard.compress
    packed = pack(write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes())
    (tmp_path / name).write_bytes(packed[:-cut])
    with pytest.raises(DataError, match=r"damaged or cut short\n.*" + re.escape(name)):
        run(tmp_path / name, tmp_path / "out", choice)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_what_its_name_says(
    tmp_path: Path, choice: TokenizerChoice, name: str
) -> None:
    write_jsonl(tmp_path / name, TEXTS)
    with pytest.raises(DataError, match="damaged"):
        run(tmp_path / name, tmp_path / "out", choice)


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_concatenated_compressed_files(
    tmp_path: Path, choice: TokenizerChoice, pack: Callable[[bytes], bytes]
) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    path = tmp_path / ("b.jsonl.gz" if pack is gzip.compress else "b.jsonl.zst")
    path.write_bytes(pack(plain) + pack(plain))
    counts = run(path, tmp_path / "out", choice)
    assert counts.documents == {"text": 120}


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_lines_longer_than_what_is_read_at_once(tmp_path: Path, ending: str) -> None:
    lines = [
        bytes([65 + n]) * size
        for n, size in enumerate([5, 1 << 20, 0, 3_000_000, (1 << 20) - 1, 7])
    ]
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(ending, bytes)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(b"\n".join(lines)))
    offsets = [sum(len(line) + 1 for line in lines[:n]) for n in range(len(lines))]
    with SourceFile(path) as source:
        assert [(at, line.removesuffix(b"\n")) for at, line in source.lines()] == list(
            zip(offsets, lines, strict=True)
        )


def test_results_come_in_the_order_of_the_tasks() -> None:
    """The first task is the last to finish. A task here is a call; a worker makes it."""
    tasks = [
        functools.partial(subprocess.check_output, f"sleep {seconds}; echo {seconds}", shell=True)
        for seconds in (0.5, 0, 0.1)
    ]
    start = functools.partial(functools.partial, operator.call)
    assert list(run_in_order(tasks, start, 2)) == [b"0.5\n", b"0\n", b"0.1\n"]


def test_wrong_arguments(
    tmp_path: Path, choice: TokenizerChoice, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenizer = ["--tokenizer-type", choice.type, "--tokenizer-model", choice.model]
    prefix = tmp_path / "out"
    given_path = ["--input", path, "--output-prefix", prefix]
    for arguments, message in (
        (
            ["--input", tmp_path / "no", "--output-prefix", prefix, *tokenizer],
            "not a readable file",
        ),
        ([*given_path, *tokenizer[:3], tmp_path / "no"], "model does not exist"),
        (["--input", path, "--output-prefix", path / "out", *tokenizer], "cannot write"),
        ([*given_path, *tokenizer, "--workers", "0"], "--workers"),
        ([*given_path, *tokenizer, "--shard-bytes", "0"], "--shard-bytes"),
        ([*given_path, *tokenizer, "--json-keys", "text", "text"], "--json-keys"),
    ):
        assert main(*arguments) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert "cure:" in printed.err
        assert printed.out == ""
    assert not list(tmp_path.glob("out*"))


def test_a_dry_run_writes_nothing(
    tmp_path: Path, choice: TokenizerChoice, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    arguments = ["--input", path, "--output-prefix", tmp_path / "out", "--dry-run"]
    arguments += ["--tokenizer-type", choice.type, "--tokenizer-model", choice.model]
    assert main(*arguments) == 0
    assert "300 entries, eod 299" in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("tool", ["preprocess_data", "train_tokenizer", "prepare_tiny_data"])
def test_help_does_not_import_torch(tool: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{tool!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path('tools/{tool}.py', run_name='__main__')\n"
        "finally:\n"
        "    assert not {'torch', 'megatron', 'tokenizers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout


# ---------------------------------------------------------------- SentencePiece


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=48, minloglevel=2
    )
    (tmp_path / "sp.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    texts = [*TEXTS, " "]  # the last has no piece at all
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    choice = TokenizerChoice("SentencePieceTokenizer", str(tmp_path / "sp.model"))
    counts = run(path, tmp_path / "out", choice)
    assert counts.empty == {"text": 1}
    ours = outputs(tmp_path / "out")
    expected = plain_loop(tmp_path / "plain", texts, processor.encode, processor.eos_id())
    assert [ours[".bin"], ours[".idx"]] == expected


def test_a_dead_worker_is_reported(tmp_path: Path, choice: TokenizerChoice) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 20)

    def kill_the_workers(_: int) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "multiprocessing" in " ".join(child.cmdline()):
                    for worker in child.children():
                        worker.kill()

    with pytest.raises(DataError, match="a worker process died"):
        run(path, tmp_path / "out", choice, workers=2, on_progress=kill_the_workers)
    run(path, tmp_path / "out", choice)


def test_workers_must_be_positive(tmp_path: Path, choice: TokenizerChoice) -> None:
    with pytest.raises(ConfigError, match="--workers"):
        run(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out", choice, workers=0)
