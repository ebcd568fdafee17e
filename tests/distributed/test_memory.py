"""Predicted memory against the measured peak of real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.corpus import model_argv
from harness.memory import TINY_SIZES, measure_peaks, predict_ranks

_TP = "tensor_model_parallel_size"
_PP = "pipeline_model_parallel_size"
_EXPERTS = {
    "num_experts": 4,
    "expert_model_parallel_size": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_ffn_hidden_size": 96,
}


@pytest.mark.parametrize(
    ("nproc", "changes"),
    [
        pytest.param(2, {}, id="DP2"),
        pytest.param(2, {_TP: 2, "sequence_parallel": True}, id="TP2+SP"),
        pytest.param(4, {_TP: 2, _PP: 2}, id="TP2xPP2"),
        pytest.param(2, {_PP: 2, "num_virtual_stages_per_pipeline_rank": 2}, id="PP2xVPP2"),
        pytest.param(1, {"recompute_granularity": "selective"}, id="selective"),
        pytest.param(
            1,
            {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
            id="full",
        ),
        pytest.param(2, _EXPERTS, id="MoE+EP2"),
    ],
)
def test_the_prediction_is_within_a_tenth(
    corpus: Path, tmp_path: Path, nproc: int, changes: dict[str, object]
) -> None:
    argv = model_argv(corpus, **{**TINY_SIZES, **changes})
    predicted = [terms.total for terms in predict_ranks(argv, nproc)]
    measured = measure_peaks(argv, tmp_path, nproc)
    ratios = [p / m for p, m in zip(predicted, measured, strict=True)]
    assert all(0.9 < ratio < 1.1 for ratio in ratios), ratios
