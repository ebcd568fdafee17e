"""Opening checkpoints: orders that prove themselves or not, old forms, and what is refused."""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.outputs import write_outputs
from harness.saved_job import ITERATION, job_args
from harness.synthetic import FORMS, Synthetic

from flagscale.ckpt_io.archive_plan import plan_file
from flagscale.ckpt_io.buffer_map import BUFFER_MAP_DIR
from flagscale.errors import CheckpointError
from flagscale.layout.model import LayerSpec, LocalParam
from flagscale.layout.pieces import OPTIMIZER_KINDS
from flagscale.optim.opening import open_source
from flagscale.optim.proof import compare
from flagscale.optim.source import Source

SPECS: tuple[LayerSpec, ...] = ("local", "transformer_engine")
FLAT = ("legacy", "dp_reshardable")
NAMED = ("fully_reshardable", "fully_sharded_model_space")
SMALL = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "kv_channels": 2}
EXPERTS = {"num_experts": 2, "moe_ffn_hidden_size": 6, "expert_model_parallel_size": 2, "dp": 2}


def made(form: str, spec: LayerSpec = "local", **edits: Any) -> Synthetic:
    """A checkpoint of a small model."""
    return Synthetic(job_args(**{**SMALL, "transformer_impl": spec, **edits}), form, spec)


def refusal(directory: Path) -> CheckpointError:
    """The error that opening a checkpoint gives."""
    with pytest.raises(CheckpointError) as caught:
        open_source(directory)
    return caught.value


def mains_are_weights(source: Source) -> bool:
    """Whether every element of every main copy, rounded, is the weight."""
    weights, mains = source.of_kind("weight"), source.of_kind("param")
    assert {piece.tensor.name for piece in mains} <= {piece.tensor.name for piece in weights}
    return not list(compare(source.directory, weights, mains, full=True))


# ---------------------------------------------------------------------------------------------
# What is found


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("form", [*FORMS, "fully_sharded_model_space"])
def test_everything_is_found(
    form: str, spec: LayerSpec, experts: dict[str, Any], tmp_path: Path
) -> None:
    one = made(form, spec, tp=2, pp=2, **experts)
    one.write(tmp_path)
    source = open_source(tmp_path)
    assert (source.iteration, source.spec) == (ITERATION, spec)
    assert source.optim_format == form
    assert vars(source.args) == vars(one.args)
    assert {key.name for key in source.tensors} == {*one.whole}
    assert {key.kind for key in source.tensors} == {"weight", *OPTIMIZER_KINDS}
    assert source.rng.keys() == {(pp, tp) for pp in range(2) for tp in range(2)}
    modules = 2 * (2 + 2 * (one.model.dims.num_experts or 1))
    assert len(source.extra_states) == modules
    optimizers = 1 + bool(experts)
    assert [len(o["optimizer"]["param_groups"]) for o in source.optimizers] == [2, 1][:optimizers]
    assert mains_are_weights(source)


def test_a_source_is_left_as_it_was(tmp_path: Path) -> None:
    for form in FORMS:
        directory = made(form, tp=2).write(tmp_path / form)
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
        open_source(directory)
        assert paths == sorted(path for path in directory.rglob("*") if path.is_file())
        assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths] == before


# ---------------------------------------------------------------------------------------------
# The order of the parameters


@pytest.mark.parametrize("spec", SPECS)
def test_the_proof_finds_the_layer_spec_that_arguments_deny(
    spec: LayerSpec, tmp_path: Path
) -> None:
    other = SPECS[1 - SPECS.index(spec)]
    one = made("dp_reshardable", spec)
    replace(one, args=job_args(**SMALL, transformer_impl=other)).write(tmp_path)
    source = open_source(tmp_path)
    assert source.spec == spec
    assert source.order.startswith(f"layer spec {spec}, proved")
    assert mains_are_weights(source)
    # As many elements fit: only the proof tells.
    guessed = open_source(tmp_path, prove=False)
    assert guessed.spec == other
    assert not mains_are_weights(guessed)


def swapped(first: str, second: str) -> Callable[[Sequence[LocalParam]], list[LocalParam]]:
    """Two parameters in each other's place."""

    def order(params: Sequence[LocalParam]) -> list[LocalParam]:
        names = [param.canonical for param in params]
        at, to = names.index(first), names.index(second)
        result = list(params)
        result[at], result[to] = params[to], params[at]
        return result

    return order


PROJ = "decoder.layers.{}.self_attention.linear_proj.weight"


@pytest.mark.parametrize("form", FLAT)
@pytest.mark.parametrize("bf16", [True, False])
def test_two_parameters_of_a_size_in_each_others_place_are_refused(
    form: str, bf16: bool, tmp_path: Path
) -> None:
    order = swapped(PROJ.format(0), PROJ.format(1))
    replace(made(form, bf16=bf16), registered=order).write(tmp_path)
    error = refusal(tmp_path)
    assert error.what == "no order of the parameters fits the optimizer's buffers"
    assert f"layer spec local: 2 parameters are not their weights; {PROJ.format(1)}" in str(error)
    assert "elements differ" in str(error)


@pytest.mark.parametrize("form", FLAT)
def test_an_order_in_which_sizes_do_not_fit_is_refused(form: str, tmp_path: Path) -> None:
    order = swapped("decoder.final_layernorm.weight", PROJ.format(1))
    bucketed = {"overlap_grad_reduce": True, "ddp_bucket_size": 100}
    replace(made(form, **bucketed), registered=order).write(tmp_path)
    error = refusal(tmp_path)
    assert error.what == "no order of the parameters fits the optimizer's buffers"
    assert "layer spec local" in str(error)
    assert "layer spec transformer_engine" in str(error)


@pytest.mark.parametrize("form", FLAT)
@pytest.mark.parametrize(
    "edits",
    [
        {"tp": 2, "pp": 2},
        {"overlap_grad_reduce": True, "ddp_bucket_size": 100, "dp": 5},
        {"pp": 2, "num_virtual_stages_per_pipeline_rank": 2, "num_layers": 4},
        EXPERTS,
    ],
    ids=["grid", "buckets", "chunks", "experts"],
)
def test_a_map_tells_what_no_rule_does(form: str, edits: dict[str, Any], tmp_path: Path) -> None:
    one = replace(made(form, **edits), registered=lambda params: [*params[1::2], *params[::2]])
    directory = one.write(tmp_path)
    one.write_maps(directory)
    source = open_source(tmp_path)
    assert source.order.startswith(f"the map in {BUFFER_MAP_DIR}")
    assert mains_are_weights(source)


def spoil_bucket(one: Synthetic) -> Synthetic:
    return replace(one, args=job_args(**SMALL, dp=1, overlap_grad_reduce=True, ddp_bucket_size=99))


def spoil_names(one: Synthetic) -> Synthetic:
    return replace(one, spec="transformer_engine", args=job_args(**SMALL, qk_layernorm=True))


def spoil_order(one: Synthetic) -> Synthetic:
    return replace(one, registered=swapped(PROJ.format(0), PROJ.format(1)))


@pytest.mark.parametrize("form", FLAT)
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (spoil_bucket, "the map of the buffers is of another checkpoint"),
        (spoil_names, "the map of the buffers is of another checkpoint"),
        (spoil_order, "parameters are not their weights"),
    ],
)
def test_the_map_of_another_checkpoint_is_refused(
    form: str, spoil: Callable[[Synthetic], Synthetic], why: str, tmp_path: Path
) -> None:
    one = made(form)
    directory = one.write(tmp_path)
    spoil(one).write_maps(directory)
    if form == "legacy" and spoil is spoil_bucket:
        # One run without the sizes of its buckets, and the last has no padding: the same elements.
        why = "is of another checkpoint|are not their weights"
    with pytest.raises(CheckpointError, match=why):
        open_source(tmp_path)
    for path in (directory / BUFFER_MAP_DIR).iterdir():
        path.unlink()
    assert "proved" in open_source(tmp_path).order


def test_a_map_that_names_unknown_parameters_or_lacks_a_buffer_is_refused(tmp_path: Path) -> None:
    one = made("dp_reshardable", tp=2)
    directory = one.write(tmp_path)
    one.write_maps(directory)
    path = directory / BUFFER_MAP_DIR / "optimizer_0_group_1.json"
    text = path.read_text()
    path.write_text(text.replace("linear_proj", "linear_proi"))
    assert "names a parameter that the model has not" in str(refusal(tmp_path))
    path.unlink()
    assert "does not know a buffer of the checkpoint" in str(refusal(tmp_path))
    path.write_text(text[:100])
    assert refusal(tmp_path).what == "a buffer map cannot be read"


# ---------------------------------------------------------------------------------------------
# Older forms


def without_steps(state: dict[str, Any]) -> dict[str, Any]:
    """The common state as it was when every parameter counted its own steps."""
    groups = [
        {key: value for key, value in group.items() if key != "step"}
        for group in state["optimizer"]["optimizer"]["param_groups"]
    ]
    return {**state, "optimizer": {**state["optimizer"], "optimizer": {"param_groups": groups}}}


@pytest.mark.parametrize("form", NAMED)
def test_steps_may_be_counted_by_parameter(form: str, tmp_path: Path) -> None:
    one = replace(made(form), edit=without_steps)
    replace(one, kinds=(*one.kinds, "step")).write(tmp_path / "tensors")
    assert open_source(tmp_path / "tensors").steps == ITERATION

    def in_common_state(state: dict[str, Any]) -> dict[str, Any]:
        state = without_steps(state)
        steps = {index: {"step": torch.tensor(float(ITERATION))} for index in range(3)}
        return {**state, "optimizer": {**state["optimizer"], "param_state": steps}}

    replace(one, edit=in_common_state).write(tmp_path / "common")
    assert open_source(tmp_path / "common").steps == ITERATION


@pytest.mark.parametrize("form", ["dp_reshardable", *NAMED])
def test_the_common_state_may_be_a_file(form: str, tmp_path: Path) -> None:
    one = made(form, pp=2)
    directory = one.write(tmp_path)
    new = open_source(tmp_path)
    remove_from_metadata(directory, "common_state/shard_0_1")
    with pytest.raises(CheckpointError, match=r"the common state .* is missing"):
        open_source(tmp_path)
    planned = plan_file("common.pt", one.common())
    write_outputs(directory, [planned.output], {})
    old = open_source(tmp_path)
    assert old.pieces == new.pieces
    assert (old.common, old.optimizers, vars(old.args)) == (
        new.common, new.optimizers, vars(new.args),
    )  # fmt: skip


def remove_from_metadata(directory: Path, *keys: str) -> None:
    """Let ``.metadata`` say nothing of some keys."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for key in keys:
        del metadata.state_dict_metadata[key]
    metadata.storage_data = {
        index: info for index, info in metadata.storage_data.items() if index.fqn not in keys
    }
    path.write_bytes(pickle.dumps(metadata))


def test_a_checkpoint_without_content_metadata_tells_its_kind_by_its_keys(tmp_path: Path) -> None:
    def edit(state: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state.items() if key != "content_metadata"}

    for form in ("dp_reshardable", "fully_sharded_model_space"):
        replace(made(form), edit=edit).write(tmp_path / form)
        assert open_source(tmp_path / form).optim_format == form


@pytest.mark.parametrize("buckets", [{}, {"overlap_grad_reduce": True, "ddp_bucket_size": 100}])
def test_legacy_buckets_may_be_a_list_and_types_of_parameters_unknown(
    buckets: dict[str, Any], tmp_path: Path
) -> None:
    one = made("legacy", dp=3, **buckets)
    directory = one.write(tmp_path)
    path = directory / "mp_rank_00" / "distrib_optim.pt"
    state = torch.load(path, weights_only=False)  # noqa: TID251  (our own)
    (buffer,) = state[0].values()
    (group,) = one.groups()
    ((_, layout, _),) = group.buffers
    sizes = [bucket.numel_unpadded for bucket in layout.buckets]
    old = {kind: list(buffer[kind].split(sizes)) for kind in OPTIMIZER_KINDS}
    torch.save({0: {torch.float32: old}}, path)
    source = open_source(tmp_path)
    assert mains_are_weights(source)
    assert source.buffers[0].bucket_numels == (tuple(sizes) if len(sizes) > 1 else None)


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"ffn_hidden_size": 16}, "linear_fc"),
        ({"padded_vocab_size": 72}, "word_embeddings|output_layer"),
        ({"num_layers": 3}, "layers.2|no layer|layer"),
        ({"qk_layernorm": True}, "q_layernorm|k_layernorm"),
        ({"normalization": "LayerNorm"}, "norm"),
        ({"untie_embeddings_and_output_weights": False}, "output_layer"),
        ({"bf16": False}, "float32"),
        ({"swiglu": False}, "linear_fc1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_disagree_with_the_tensors(
    form: str, wrong: dict[str, Any], named: str, tmp_path: Path
) -> None:
    told = job_args(**{**SMALL, **wrong})
    replace(made(form), edit=lambda state: {**state, "args": told}).write(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        open_source(tmp_path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wrong", [{"tp": 2}, {"pp": 2}, {"dp": 2, "expert_model_parallel_size": 2, "num_experts": 2}]
)
def test_a_layout_that_disagrees_with_the_states(
    form: str, wrong: dict[str, Any], tmp_path: Path
) -> None:
    told = job_args(**{**SMALL, **wrong})
    replace(made(form), edit=lambda state: {**state, "args": told}).write(tmp_path)
    if form == "fully_reshardable" and "num_experts" not in wrong:
        open_source(tmp_path)  # nothing in it depends on the layout
    else:
        refusal(tmp_path)


@pytest.mark.parametrize("args", [None, {"num_layers": 2}, Namespace(), Namespace(num_layers=2)])
@pytest.mark.parametrize("form", FORMS)
def test_arguments_that_are_none(form: str, args: Any, tmp_path: Path) -> None:
    replace(made(form), edit=lambda state: {**state, "args": args}).write(tmp_path)
    refusal(tmp_path)


@pytest.mark.parametrize("form", [*FORMS, "fully_sharded_model_space"])
@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (("param", "exp_avg"), "exp_avg_sq"),
        (("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "max_exp_avg_sq"),
        (("param", "momentum_buffer"), "momentum_buffer|exp_avg"),
    ],
)
def test_optimizers_that_are_no_adam(
    form: str, kinds: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    replace(made(form), kinds=kinds).write(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        open_source(tmp_path)


def test_a_sharding_type_that_is_not_known(tmp_path: Path) -> None:
    def edit(state: dict[str, Any]) -> dict[str, Any]:
        kind = {"distrib_optim_sharding_type": "dp_zero_gather_scatter"}
        return {**state, "content_metadata": kind}

    replace(made("dp_reshardable"), edit=edit).write(tmp_path)
    assert refusal(tmp_path).got == "dp_zero_gather_scatter"


@pytest.mark.parametrize("form", FORMS)
def test_no_optimizer_at_all(form: str, tmp_path: Path) -> None:
    def edit(state: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value
            for key, value in state.items()
            if key not in ("optimizer", "content_metadata")
        }

    directory = replace(made(form), edit=edit, kinds=()).write(tmp_path)
    for path in directory.glob("mp_rank_*/distrib_optim.pt"):
        path.unlink()
    assert "no state of an optimizer" in str(refusal(tmp_path))


def test_the_states_of_a_rank_are_missing(tmp_path: Path) -> None:
    directory = made("dp_reshardable", tp=2).write(tmp_path / "a")
    keys = [*pickle.loads((directory / ".metadata").read_bytes()).state_dict_metadata]
    remove_from_metadata(directory, *(key for key in keys if "dp_group_idx_1.gbuf" in key))
    error = refusal(tmp_path / "a")
    assert error.what == "the states of a part of the optimizer are missing"
    assert "dp_group_idx 1" in str(error)
    directory = made("legacy", tp=2).write(tmp_path / "b")
    (directory / "mp_rank_01" / "distrib_optim.pt").unlink()
    error = refusal(tmp_path / "b")
    assert error.what == "the states of a part of the optimizer are missing"
    assert "dp_group_idx 1" in str(error)


def test_a_stage_without_layers_has_no_buffer(tmp_path: Path) -> None:
    for form in FLAT:
        made(form, pp=3, pipeline_model_parallel_layout="Ett||L").write(tmp_path / form)
        assert mains_are_weights(open_source(tmp_path / form))


def test_a_format_that_is_not_read(tmp_path: Path) -> None:
    directory = tmp_path / f"iter_{ITERATION:07d}"
    directory.mkdir()
    (directory / ".metadata").write_bytes(b"")
    assert refusal(directory).got == "fsdp_dtensor"
