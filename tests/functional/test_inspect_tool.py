"""tools/inspect_data.py as the engineer on call meets it: what it prints, refuses, leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.inspect_run import LAST, WrittenRun, write_run
from harness.program import TOOLS, Ended, content, run_program

from flagscale.data_inspect.commands import COMMANDS

SPIKE = LAST - 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenRun:
    return write_run(tmp_path_factory.mktemp("tool"))


def run(*words: object) -> Ended:
    return run_program("inspect_data", *words)


def strictly(text: str) -> Any:
    """JSON as the standard has it, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def answer(*words: object, code: int = 0) -> Any:
    ended = run(*words, "--json")
    assert (ended.code, ended.err) == (code, ""), ended
    return strictly(ended.out)


def test_help_and_look_ups_import_no_torch(written: WrittenRun) -> None:
    program = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "heavy = {'torch', 'megatron', 'transformers', 'pandas', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    commands = [
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
        ["spikes", written.directory],
        ["locate", written.directory, "--iteration", SPIKE],
        ["rank", written.directory],
        ["drift", written.directory, "--", "--micro-batch-size", 4],
    ]
    for words in commands:
        argv = [str(TOOLS / "inspect_data.py"), *map(str, words)]
        started = [sys.executable, "-c", f"import sys; sys.argv = {argv!r}\n{program}"]
        environ = os.environ | {"PYTHONPATH": str(TOOLS.parent)}
        ended = subprocess.run(started, env=environ, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, (words, ended.stderr)


def test_the_road_from_a_spike_to_a_quarantine(written: WrittenRun, tmp_path: Path) -> None:
    run_dir = written.directory
    found = answer("spikes", run_dir)
    assert [spike["first_iteration"] for spike in found["spikes"]] == [SPIKE]
    step = answer("locate", run_dir, "--iteration", SPIKE)
    assert step["label"] == "EXACT"
    for rank, drawn in written.drawn[SPIKE].items():
        mine = [sample for sample in step["samples"] if sample["rank"] == rank]
        assert [(sample["dataset"], sample["sample_index"]) for sample in mine] == drawn
    first = step["samples"][0]
    keys = {"sequence", "document", "token_start", "token_end", "byte_offset"}
    assert keys | {"source_file", "source_line"} < set(first["documents"][0])
    name = f"{first['dataset']}:{first['documents'][0]['document']}"
    when = answer("locate", run_dir, "--document", name)
    assert SPIKE in [reading["iteration"] for reading in when["readings"]]
    shown = answer("show", run_dir, "--iteration", SPIKE, "--worst", 1)
    losses = {sample["sample_index"]: sample["loss"] for sample in step["samples"]}
    assert {losses[text["sample"]] for text in shown["texts"]} == {max(losses.values())}
    ranked = answer("rank", run_dir, "--top", 3)
    assert len(ranked["hard"]) == 3
    listed = tmp_path / "bad.json"
    made = answer("quarantine", run_dir, "--add", name, "--output", listed)
    assert made["added"] == 1
    assert SPIKE in [one["iteration"] for one in made["iterations_to_skip"]]
    again = answer("quarantine", run_dir, "--remove", name, "--output", listed)
    assert (again["removed"], again["entries"]) == (1, [])
    assert answer("verify", run_dir)["labels"] == {"EXACT": LAST}
    page = tmp_path / "report.html"
    assert answer("report", run_dir, "--output", page)["bytes"] == page.stat().st_size


def test_the_same_in_words(written: WrittenRun) -> None:
    run_dir = written.directory
    for words, expected in (
        (("spikes", run_dir), f"SPIKE  {SPIKE}-{LAST}"),
        (("locate", run_dir, "--iteration", 3), "iteration 3: EXACT"),
        (("locate", run_dir, "--document", "web:3"), "document 3 of dataset 0 is read"),
        (("show", run_dir, "--document", "books:2"), "-- document 2 of "),
        (("rank", run_dir), "hard:"),
        (("quarantine", run_dir, "--add", "web:3"), "1 entry (not written"),
        (("verify", run_dir, "--steps", 5), "5 steps: 5 EXACT"),
        (("drift", run_dir, "--", "--micro-batch-size", 1), "SAME_SAMPLES_OTHER_RANKS"),
    ):
        ended = run(*words)
        assert ended.code == 0, (words, ended.err)
        assert ended.err == ""  # a run this small is not worth a progress message
        assert expected in ended.out, (words, ended.out)


def test_nothing_in_the_run_is_changed(written: WrittenRun) -> None:
    before = content(written.directory), content(written.prefixes[0].parent), content(written.cache)
    for words in (
        ("spikes",),
        ("locate", "--iteration", 3),
        ("locate", "--document", "web:3"),
        ("show", "--iteration", 3),
        ("rank",),
        ("verify", "--caches"),
        ("drift", "--", "--seed", 7),
    ):
        run(words[0], written.directory, *words[1:])
    after = content(written.directory), content(written.prefixes[0].parent), content(written.cache)
    assert after == before


def test_a_job_that_is_running(written: WrittenRun, tmp_path: Path) -> None:
    """One rank is behind the other, and its last row is half on the disk."""
    shutil.copytree(written.directory, tmp_path / "run")
    behind = sorted((tmp_path / "run/checkpoints/ledger").glob("*bbbbbb/*.ledger"))[0]
    os.truncate(behind, behind.stat().st_size - 7)
    whole = answer("locate", tmp_path / "run", "--iteration", LAST - 1)
    assert whole["label"] == "EXACT"
    last = answer("locate", tmp_path / "run", "--iteration", LAST)
    assert last["label"] == "RECONSTRUCTED"
    assert "3 of 4 data-parallel rank(s) agree" in last["reasons"][0]
    verified = answer("verify", tmp_path / "run", code=1)
    assert verified["labels"] == {"EXACT": LAST - 1, "RECONSTRUCTED": 1}
    assert list(verified["torn"]) == [str(behind)]


def test_what_cannot_be_vouched_for_ends_with_1(written: WrittenRun) -> None:
    run_dir = written.directory
    assert run("drift", run_dir, "--", "--seed", 7).code == 1
    ahead = answer("locate", run_dir, "--iteration", LAST + 1, code=1)
    assert ahead["label"] == "UNKNOWN"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "drift"])
def test_no_run_is_named(command: str, tmp_path: Path) -> None:
    more: dict[str, tuple[object, ...]] = {
        "locate": ("--iteration", 1),
        "show": ("--iteration", 1),
        "replay": ("--iteration", 1),
        "quarantine": ("--add", "1"),
        "report": ("--output", tmp_path / "report.html"),
    }
    for directory in (tmp_path, tmp_path / "nowhere"):
        ended = run(command, directory, *more.get(command, ()))
        assert ended.code == 2, ended
        assert ended.out == ""
        assert str(directory) in ended.err
        assert "Traceback" not in ended.err
    assert not (tmp_path / "report.html").exists()


def test_wrong_words_are_named(written: WrittenRun, tmp_path: Path) -> None:
    run_dir = written.directory
    foreign = tmp_path / "mine.html"
    foreign.write_text("my own page")
    for words, named in (
        (("locate", run_dir, "--iteration", 0), "iteration"),
        (("locate", run_dir, "--document", "poems:3"), "poems"),
        (("locate", run_dir, "--document", "web"), "web"),
        (("locate", run_dir, "--document", "web:4000"), "4000"),
        (("spikes", run_dir, "--threshold", -1), "threshold"),
        (("spikes", run_dir, "--log", tmp_path / "none.log"), "none.log"),
        (("spikes", run_dir, "--events", tmp_path), str(tmp_path)),
        (("rank", run_dir, "--first-iteration", 9, "--last-iteration", 3), "9"),
        (("quarantine", run_dir), "--add"),
        (("quarantine", run_dir, "--iteration", 3, "--min-score", 99), "--min-score"),
        (("verify", run_dir, "--steps", 0), "--steps"),
        (("drift", run_dir, "--", "--seed", "seven"), "seed"),
        (("report", run_dir, "--output", foreign), str(foreign)),
        (("replay", run_dir, "--iteration", SPIKE), "checkpoint"),
        (("show", run_dir, "--iteration", 3, "--tokenizer", tmp_path / "none"), "none"),
    ):
        ended = run(*words)
        assert ended.code == 2, (words, ended)
        assert named in ended.err, (words, ended.err)
        assert "Traceback" not in ended.err
    assert foreign.read_text() == "my own page"


def test_a_damaged_list_is_left_as_it_is(written: WrittenRun, tmp_path: Path) -> None:
    listed = tmp_path / "bad.json"
    listed.write_text('{"entries": [')
    ended = run("quarantine", written.directory, "--add", "web:3", "--output", listed)
    assert ended.code == 2
    assert str(listed) in ended.err
    assert listed.read_text() == '{"entries": ['


def test_a_missing_dataset_is_named(written: WrittenRun, tmp_path: Path) -> None:
    gone = written.prefixes[1].with_suffix(".idx")
    gone.rename(tmp_path / "idx")
    try:
        step = answer("locate", written.directory, "--iteration", 3, code=1)
        assert step["label"] == "UNKNOWN"
        assert str(gone) in step["reasons"][0]
        assert step["samples"] == []
    finally:
        (tmp_path / "idx").rename(gone)


def test_a_reader_that_has_seen_enough(written: WrittenRun) -> None:
    words = [sys.executable, TOOLS / "inspect_data.py", "locate", written.directory]
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as pipe:
        ended = subprocess.run(
            [*words, "--iteration", "3"], stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")
