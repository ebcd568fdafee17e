"""Multi-latent attention on upstream's own modules: it trains, saves and is resharded."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import train
from harness.checkpoint import read_tensors
from harness.corpus import model_argv
from harness.families import megatron_arguments
from harness.reshard import STOPPED_AT, Layout, Source, reshard, resume, train_source
from harness.states import GlobalState, differences, read_fully_reshardable

_BIAS = "router.expert_bias"

SMALL = {"num_layers": 2, "moe_layer_freq": "[0,1]", "global_batch_size": 4}
V2, V3 = (megatron_arguments(family) | SMALL for family in ("deepseek_v2", "deepseek_v3"))
DENSE = megatron_arguments("deepseek_v2", experts=False) | {"num_layers": 2, "global_batch_size": 4}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def _losses(corpus: Path, work: Path, nproc: int, **arguments: object) -> list[float]:
    argv = model_argv(corpus, bf16=False, **arguments)
    return list(train(argv, work, nproc).require_success().losses.values())


@pytest.mark.parametrize(
    ("model", "nproc", "layout"),
    [
        pytest.param(DENSE, 4, TP2_PP2, id="dense-TP2xPP2"),
        pytest.param(V2, 4, TP2_PP2 | {"sequence_parallel": True}, id="V2-TP2xPP2+SP"),
        pytest.param(V3, 2, {"expert_model_parallel_size": 2}, id="V3-EP2"),
    ],
)
def test_losses_do_not_depend_on_the_layout(
    corpus: Path, tmp_path: Path, model: dict[str, object], nproc: int, layout: dict[str, object]
) -> None:
    start = tmp_path / "start"
    _losses(corpus, tmp_path / "0", 1, **model, train_iters=1, save=start, save_interval=1)
    load = {"load": start, "finetune": True, "no_load_optim": True, "no_load_rng": True}
    one_rank = _losses(corpus, tmp_path / "1", 1, **model, **load)
    several = _losses(corpus, tmp_path / "2", nproc, **model, **load, **layout)
    assert len(one_rank) == len(several) == 6
    assert max(abs(a - b) for a, b in zip(one_rank, several, strict=True)) < 2e-6
    assert one_rank[0] != one_rank[-1]


@pytest.mark.parametrize(
    ("source", "form"),
    [
        pytest.param(Source("v2", Layout(tp=2, pp=2), V2), "dp_reshardable", id="V2-TP2xPP2"),
        pytest.param(Source("v3", Layout(dp=2, ep=2), V3), "legacy", id="V3-EP2"),
    ],
)
def test_it_is_resharded_to_one_rank(
    corpus: Path, tmp_path: Path, source: Source, form: str
) -> None:
    trained = train_source(source, corpus, tmp_path / "source", [form])
    target, save = Layout(), tmp_path / "resharded"

    def convert(load: Path, save: Path) -> GlobalState:
        reshard(load, save, target, "fully_reshardable", has_experts=True, in_process=True)
        return read_fully_reshardable(save / f"iter_{STOPPED_AT:07d}")

    got = convert(trained.checkpoint(form), save)
    # With named states no proof of an order tells the layer spec.
    assert not differences(got, convert(save, tmp_path / "again"))
    after = save / f"iter_{STOPPED_AT:07d}"
    # What is no parameter is not in the truth, which the ranks tell of their parameters.
    parameters = {key: bits for key, bits in got.tensors.items() if _BIAS not in key[1]}
    assert not differences(trained.truth, GlobalState(parameters))
    old = read_tensors(trained.checkpoint("fully_reshardable") / after.name)
    new = read_tensors(after)
    biases = [key for key in old if _BIAS in key]
    assert len(biases) == (source.name == "v3")
    assert all((old[key] == new[key]).all() and old[key].any() for key in biases)

    resumed = resume(source, save, "torch_dist", target, corpus, tmp_path / "upstream")
    assert not differences(trained.truth, resumed.state)
    same = trained.losses[form]
    assert max(abs(resumed.losses[i] - same[i]) for i in same) < 5e-4
