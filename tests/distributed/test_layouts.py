"""The same model in every parallel layout: it trains, saves, and computes the same thing."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import train
from harness.corpus import model_argv

_TP = "tensor_model_parallel_size"
_PP = "pipeline_model_parallel_size"


def _losses(
    corpus: Path, checkpoint: Path, work: Path, nproc: int, **layout: object
) -> list[float]:
    argv = model_argv(
        corpus, bf16=False, load=checkpoint, finetune=True, no_load_optim=True, no_load_rng=True,
        **layout,
    )  # fmt: skip
    result = train(argv, work, nproc).require_success()
    assert sorted(result.losses) == [1, 2, 3, 4, 5, 6]
    return [result.losses[iteration] for iteration in sorted(result.losses)]


@pytest.fixture(scope="module")
def reference(
    corpus: Path, fp32_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Six losses of one rank."""
    return _losses(corpus, fp32_checkpoint, tmp_path_factory.mktemp("dp1"), 1)


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        pytest.param(2, {}, id="DP2"),
        pytest.param(3, {}, id="DP3"),
        pytest.param(2, {_TP: 2}, id="TP2"),
        pytest.param(2, {_PP: 2}, id="PP2"),
        pytest.param(4, {_TP: 2, _PP: 2}, id="TP2xPP2"),
        pytest.param(4, {_TP: 2, "sequence_parallel": True}, id="TP2xDP2+SP"),
    ],
)
def test_losses_do_not_depend_on_the_layout(
    corpus: Path,
    fp32_checkpoint: Path,
    reference: list[float],
    tmp_path: Path,
    nproc: int,
    layout: dict[str, object],
) -> None:
    losses = _losses(corpus, fp32_checkpoint, tmp_path, nproc, **layout)
    assert max(abs(a - b) for a, b in zip(losses, reference, strict=True)) < 2e-6
    assert losses[0] != losses[-1]


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        pytest.param(4, {_TP: 2, _PP: 2}, id="TP2xPP2"),
        pytest.param(4, {_TP: 2, "sequence_parallel": True}, id="TP2xDP2+SP"),
        pytest.param(2, {_PP: 2, "num_virtual_stages_per_pipeline_rank": 2}, id="PP2xVPP2"),
        pytest.param(
            2,
            {
                "num_experts": 4,
                "expert_model_parallel_size": 2,
                "moe_token_dispatcher_type": "alltoall",
                "moe_router_topk": 2,
                "moe_ffn_hidden_size": 96,
            },
            id="MoE+EP2",
        ),
    ],
)
def test_trains_and_saves_with_the_distributed_optimizer(
    corpus: Path, tmp_path: Path, nproc: int, layout: dict[str, object]
) -> None:
    save = tmp_path / "checkpoints"
    argv = model_argv(corpus, save=save, save_interval=6, lr=5e-3, **layout)
    result = train(argv, tmp_path / "logs", nproc).require_success()
    assert result.losses[6] < result.losses[1] - 0.02
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert (save / "iter_0000006" / ".metadata").exists()
