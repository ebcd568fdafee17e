"""Piecewise attention in real training: against stock attention, and against its definition."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from harness import RunResult, train
from harness.attention_model import METHODS, SETTINGS, measure_models
from harness.corpus import model_argv
from harness.worker import BLOCKED

SMALL = {"hidden_size": 32, "ffn_hidden_size": 64, "bf16": False, "init_method_std": 0.15}
SHORT = {"global_batch_size": 2, "train_iters": 4, "adam_eps": 1e-3}
"""With the usual eps the first steps go by the sign of gradients, even of those that are noise."""
BEYOND = {"nlpe_method": "rerope", "nlpe_window": 64}  # the length: no distance reaches it
EXTEND = {
    "nlpe_method": "self-extend", "nlpe_window": 12, "nlpe_group": 3, "nlpe_log_length": 16,
}  # fmt: skip
"""A method that would notice if positions began elsewhere."""
DEFINITION = {"name": "self-extend", "window": 12, "group": 3, "log_length": 16}

SEVEN_DIGITS = 5e-7
"""Of losses between 5 and 6: one bit of an fp32."""
CLOSE = 5e-6


def _run(
    corpus: Path,
    work: Path,
    nproc: int = 1,
    environ: Mapping[str, str] | None = None,
    **arguments: object,
) -> RunResult:
    argv = model_argv(corpus, **{**SMALL, **SHORT, **arguments})
    return train(argv, work, nproc, environ=environ).require_success()


def _losses(*args: Any, **arguments: Any) -> list[float]:
    return list(_run(*args, **arguments).losses.values())


def _distance(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def start(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Arguments that begin from one checkpoint of stock attention, in any layout."""
    work = tmp_path_factory.mktemp("start")
    _run(corpus, work / "logs", train_iters=1, save=work / "saved", save_interval=1)
    return {
        "load": work / "saved", "finetune": True, "no_load_optim": True, "no_load_rng": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def one_rank(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, start: dict[str, object]
) -> list[float]:
    return _losses(corpus, tmp_path_factory.mktemp("one") / "rank", **start, **EXTEND)


def test_beyond_the_length_it_is_stock_attention_and_checkpoints_go_both_ways(
    corpus: Path, tmp_path: Path
) -> None:
    """Four steps of each attention, then the last two again, by the other one."""
    # Upstream's distributed optimizer cannot load what it saved of a model in fp32.
    plain = {"use_distributed_optimizer": None}
    both = {"stock": plain, "ours": {**plain, **BEYOND}}
    whole = {}
    for name, own in both.items():
        save = {"save": tmp_path / f"{name}.saved", "save_interval": 2}
        whole[name] = _losses(corpus, tmp_path / name, **own, **save)
    assert _distance(whole["stock"], whole["ours"]) < SEVEN_DIGITS
    for name, other in (("stock", "ours"), ("ours", "stock")):
        load = {"load": tmp_path / f"{name}.saved", "ckpt_step": 2}
        rest = _losses(corpus, tmp_path / f"{name}.rest", **both[other], **load)
        assert len(rest) == 2
        assert _distance(rest, whole[name][2:]) < CLOSE


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        pytest.param(2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, id="TP2+SP"),
        pytest.param(4, {"tensor_model_parallel_size": 4}, id="TP4-of-2-groups"),
        pytest.param(
            2,
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
            id="PP2+VPP2",
        ),
    ],
)
def test_losses_do_not_depend_on_the_layout(
    corpus: Path,
    tmp_path: Path,
    start: dict[str, object],
    one_rank: list[float],
    nproc: int,
    layout: dict[str, object],
) -> None:
    several = _losses(corpus, tmp_path, nproc, **start, **EXTEND, **layout)
    assert _distance(one_rank, several) < CLOSE


@pytest.mark.parametrize(
    "recompute",
    [
        pytest.param({"recompute_granularity": "selective"}, id="selective"),
        pytest.param(
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            id="full",
        ),
    ],
)
def test_recomputing_changes_nothing(
    corpus: Path,
    tmp_path: Path,
    start: dict[str, object],
    one_rank: list[float],
    recompute: dict[str, object],
) -> None:
    assert _losses(corpus, tmp_path / "run", **start, **EXTEND, **recompute) == one_rank


def _reference(corpus: Path, work: Path, **arguments: object) -> list[float]:
    """What the definition of the method trains."""
    more = {"spec": "harness.reference_attention", "position_embedding_type": "none"}
    argv = model_argv(corpus, **{**SMALL, **SHORT, **arguments, **more})
    argv.insert(argv.index("--spec") + 2, "gpt")
    run = train(argv, work, environ={SETTINGS: json.dumps(DEFINITION)}).require_success()
    return list(run.losses.values())


def test_it_trains_as_its_definition_does(
    corpus: Path, tmp_path: Path, start: dict[str, object], one_rank: list[float]
) -> None:
    assert _distance(_reference(corpus, tmp_path, **start), one_rank) < CLOSE


@pytest.fixture(scope="module")
def by_documents(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, start: dict[str, object]
) -> list[float]:
    """The definition, where a mask tells documents apart."""
    work = tmp_path_factory.mktemp("documents") / "reference"
    return _reference(corpus, work, **start, reset_attention_mask=True)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 2},
            id="TP2+SP",
        ),
        pytest.param(
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
            id="PP2+VPP2",
        ),
    ],
)
def test_packed_documents_do_not_see_each_other(
    corpus: Path,
    tmp_path: Path,
    start: dict[str, object],
    one_rank: list[float],
    by_documents: list[float],
    layout: dict[str, object],
) -> None:
    packed = {**EXTEND, "dataloader_inter_document_masking": True}
    losses = _losses(corpus, tmp_path, 2, **start, **packed, **layout)
    assert _distance(by_documents, losses) < CLOSE
    assert _distance(one_rank, losses) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ({}, {BLOCKED: "flagattention.mcore_attention"}, "import of flagattention.mcore_attention"),
        ({"window_size": "16,0"}, {}, "--window-size"),
    ],
)
def test_a_job_that_would_train_something_else_stops(
    corpus: Path,
    tmp_path: Path,
    arguments: dict[str, object],
    environ: dict[str, str],
    message: str,
) -> None:
    argv = model_argv(corpus, **{**SMALL, **SHORT, **EXTEND, **arguments})
    (rank,) = train(argv, tmp_path, environ=environ).ranks
    assert rank.exit_code == 2
    assert not rank.steps
    assert rank.error
    assert message in str(rank.error["message"])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("measured")
    return measure_models(model_argv(Path("none"), **SMALL, data_path=None), work)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_what_its_definition_says(measured: dict[str, Any], name: str) -> None:
    distances = measured["definition"][name]
    assert distances.pop("without it") > 1e-1
    assert max(distances.values()) < 1e-5


def test_a_cache_gives_what_the_whole_text_gives(measured: dict[str, Any]) -> None:
    distances = measured["cache"]
    assert distances.pop("logits") > 0.1
    assert len(distances) == 3
    assert max(distances.values()) < 2e-6


def test_packed_documents_equal_a_loop_over_them(measured: dict[str, Any]) -> None:
    distances = measured["packed"]
    assert distances.pop("without packing") > 1e-2
    assert max(distances.values()) < 2e-5


def test_far_keys_are_rotated_as_the_model_rotates(measured: dict[str, Any]) -> None:
    assert len(measured["rotations"]) == 5
    assert max(measured["rotations"].values()) < 5e-6


def test_a_hybrid_model_is_the_gpt_model_with_its_weights(measured: dict[str, Any]) -> None:
    assert measured["hybrid"]["distance"] < 1e-5
    assert "attention and MLP layers" in measured["hybrid"]["mamba"]


def test_layers_that_upstream_describes_one_by_one_are_ours(measured: dict[str, Any]) -> None:
    assert measured["experts"] == {"kinds": 2, "ours": 4}


def test_checkpoints_hold_what_stock_attention_holds(measured: dict[str, Any]) -> None:
    assert measured["state"] == {"same": True, "same sharded": True}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("stock", "(?s)AttentionError: the model was built with another.*layers.0.self_attention"),
        ("half", "(?s)AttentionError: the model was built with another.*layers.1.self_attention"),
        ("unbound", "AttentionError: .*no method"),
        ("dynamic", "AttentionError: dynamic batching"),
        ("bias", "AttentionError: .*without a bias"),
        ("mask", "AttentionError: .*causal"),
        ("no rope", "AttentionError: .*--position-embedding-type"),
        ("no rope, bound", "AttentionError: .*rope"),
        ("dropout", "AttentionError: .*--attention-dropout"),
    ],
)
def test_models_that_are_refused(measured: dict[str, Any], case: str, message: str) -> None:
    assert re.match(message, measured["refused"][case])
