"""A planted burst, from the curve to its documents and past them, by the commands a user types."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import train
from harness.browser import open_page, start_browser
from harness.corpus import model_argv, write_corpus

from flagscale.data_inspect.arguments import Blend, DataArguments
from flagscale.data_inspect.corpus import TrainingCorpus
from flagscale.data_inspect.ledger import Ledger
from flagscale.data_inspect.run import open_run
from flagscale.data_inspect.spikes import find_spikes

ROOT = Path(__file__).parents[2]
BATCH, LAST, SAVED, BURST = 8, 100, 60, 70
FACTS: dict[str, Any] = {
    "num_layers": 2,
    "global_batch_size": BATCH,
    "micro_batch_size": 2,
    "train_iters": LAST,
    "save_interval": SAVED,
    "lr": 4e-3,
    "min_lr": 4e-4,
    "ledger_blocks": 16,
}


@pytest.fixture(scope="module")
def burst(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, set[int]]:
    """A trained run, its data, and the documents that fill half of one step with noise."""
    folder = tmp_path_factory.mktemp("burst")
    prefix = write_corpus(folder / "text_document", num_documents=400)
    arguments = DataArguments(
        Blend((str(prefix),), None), split="100,0,0", seed=1234, seq_length=64, train_samples=None,
        train_iters=LAST, global_batch_size=BATCH, micro_batch_size=2, dp_size=1,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    documents = set()
    with TrainingCorpus.open(arguments, LAST * BATCH) as corpus:
        first = (BURST - 1) * BATCH
        for spans in corpus.documents_of([0] * (BATCH // 2), range(first, first + BATCH // 2)):
            for span in spans:
                # The last token of a sample is the first of another: that one is left alone.
                count = min(span.token_end - span.token_start, 64 - span.sample_start)
                noise = rng.integers(250, size=max(count, 0), dtype=np.uint16)
                with open(f"{prefix}.bin", "r+b") as stream:
                    stream.seek(span.byte_offset)
                    stream.write(noise.tobytes())
                if count > 8:
                    documents.add(span.document)
    run = folder / "run"
    train(argv(prefix, run), folder / "logs").require_success()
    return run, prefix, documents


def argv(prefix: Path, run: Path, **more: Any) -> list[str]:
    return model_argv(prefix, **FACTS, save=run, load=run, **more)


def ask(*words: object) -> Any:
    command = [sys.executable, ROOT / "tools" / "inspect_data.py", *words, "--json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_from_the_curve_to_the_documents_and_past_them(
    burst: tuple[Path, Path, set[int]], tmp_path: Path
) -> None:
    original, prefix, planted = burst
    run = tmp_path / "run"
    shutil.copytree(original, run)

    (spike,) = ask("spikes", run)["spikes"]
    assert spike["suspects"] == [BURST, BURST]
    listed = tmp_path / "bad.json"
    made = ask("quarantine", run, "--iteration", BURST, "--min-score", 2, "--output", listed)
    named = {entry["document"] for entry in made["entries"]}
    assert named <= planted
    assert len(named) >= len(planted) / 2
    assert [one["iteration"] for one in made["iterations_to_skip"]].count(BURST) == 1

    # Everything of the step that is bad, whoever found it: the rest of this test is about masking.
    words = [f"{document}" for document in sorted(planted - named)]
    if words:
        ask("quarantine", run, "--output", listed, "--no-iterations", "--add", *words)
    resumed = argv(prefix, run, ckpt_step=SAVED, quarantine=listed)
    train(resumed, tmp_path / "logs").require_success()

    before, after = Ledger(run / "ledger").attempts
    assert after.start_iteration == SAVED
    for iteration in range(SAVED + 1, LAST + 1):
        old, new = before.files[0].row(iteration), after.files[0].row(iteration)
        assert old is not None
        assert new is not None
        assert (new.ids_crc, new.tokens_crc) == (old.ids_crc, old.tokens_crc)
        assert new.consumed_before == old.consumed_before
        assert new.counted_tokens + new.quarantined_tokens == old.counted_tokens
        assert not new.nan
    row = after.files[0].row(BURST)
    assert row is not None
    assert row.quarantined_tokens >= 0.8 * BATCH // 2 * 64
    curve, _ = open_run(run).curve()
    assert [point.iteration for point in curve.points[-1:]] == [LAST]
    assert find_spikes(curve) == ()


def test_its_report_in_a_browser(burst: tuple[Path, Path, set[int]], tmp_path: Path) -> None:
    run, _, planted = burst
    ask("report", run, "--output", tmp_path / "report.html", "--iteration", BURST - 3)
    with start_browser() as browser, open_page(browser, tmp_path / "report.html") as opened:
        page = opened.page
        assert page.inner_text(".verdict h2") == f"1 spike, at iteration {BURST}"
        box = page.locator(".curves path.point").last.bounding_box()
        page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_selector(f"#step h2:text('Iteration {BURST}')")
        assert page.inner_text("#step .label") == "EXACT"
        texts = page.locator(".document").all_inner_texts()
        shown = [int(re.findall(r"document (\d+)", text)[0]) for text in texts]
        assert set(shown[: len(planted)]) <= planted
        assert (opened.errors, opened.requests) == ([], [])


def test_a_replay_tells_bad_data(burst: tuple[Path, Path, set[int]], tmp_path: Path) -> None:
    run = burst[0]
    answer = ask(
        "replay", run, "--iteration", BURST, "--checkpoint", SAVED, LAST, "--platform", "cpu"
    )
    assert "bad data" in answer["conclusion"]
    calm = ask(
        "replay", run, "--iteration", BURST - 3, "--calm-iteration", BURST - 6, "--checkpoint",
        SAVED, "--platform", "cpu",
    )  # fmt: skip
    assert not calm["verdicts"][str(SAVED)]["stands_out"]


def test_a_replayed_sample_costs_what_it_cost(burst: tuple[Path, Path, set[int]]) -> None:
    run = burst[0]
    step = SAVED + 1  # the first after the checkpoint: the weights are the same
    answer = ask("replay", run, "--iteration", step, "--checkpoint", SAVED, "--platform", "cpu")
    recorded = ask("locate", run, "--iteration", step)["samples"]
    replayed = [sample["replayed"][str(SAVED)]["loss"] for sample in answer["samples"]]
    assert len(replayed) == BATCH
    # Not to the bit: a micro batch of one sample is another matrix product than one of two.
    np.testing.assert_allclose(replayed, [sample["loss"] for sample in recorded], rtol=5e-3)
