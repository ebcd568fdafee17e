"""What a target holds besides moved tensors: grown vocabularies, arguments, groups, generators."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.saved_job import ITERATION, job_args, rng_state
from harness.synthetic import FORMS, Synthetic, read_bits

from flagscale.ckpt_io import legacy, torch_dist
from flagscale.errors import CheckpointError, ConfigError
from flagscale.optim import reshard, target
from flagscale.optim.carry import Request
from flagscale.optim.opening import open_source
from flagscale.optim.reshard import Reshard

SMALL = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "kv_channels": 2}
PAIRS = [*zip(FORMS, [*FORMS[1:], FORMS[0]], strict=True), ("legacy", "fully_reshardable")]
"""Formats of source and target: each of both, and where nothing but the layout is alike."""

EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 6, "dp": 2}


def made(form: str = "fully_reshardable", **edits: Any) -> Synthetic:
    """A checkpoint of a small model."""
    return Synthetic(job_args(**{**SMALL, **edits}), form)


def planned(load_dir: Path, request: Request, form: str = "fully_reshardable") -> Reshard:
    """Open and plan."""
    if form == "legacy":
        return reshard.plan(open_source(load_dir), request, "torch")
    return reshard.plan(open_source(load_dir), request, "torch_dist", form)  # type: ignore[arg-type]


def done(load_dir: Path, save_dir: Path, request: Request, form: str = "fully_reshardable") -> Path:
    """Open, plan and run."""
    return reshard.run(planned(load_dir, request, form), save_dir, workers=1)[0].directory


def states_of(directory: Path) -> tuple[Namespace, Mapping[str, Any], list[dict[str, Any]], Any]:
    """Arguments, common state, states of the optimizers and of the generators, as read back."""
    source = open_source(directory)
    return source.args, source.common, [dict(one) for one in source.optimizers], source.rng


# ---------------------------------------------------------------------------------------------
# The vocabulary


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("source_form", "form"), PAIRS)
def test_new_rows_are_copies_of_the_trained_pad_row(
    source_form: str, form: str, tied: bool, tmp_path: Path
) -> None:
    edits = {
        "vocab_size": 61, "make_vocab_size_divisible_by": 1, "num_attention_heads": 12,
        "untie_embeddings_and_output_weights": not tied,
    }  # fmt: skip
    made(source_form, padded_vocab_size=62, tp=2, pp=2, **edits).write(tmp_path / "a")
    request = Request(tp_size=3, pp_size=1, dp_size=1, allow_vocab_growth=True)
    grown = made(form, padded_vocab_size=63, tp=3, **edits)
    with pytest.raises(ConfigError, match="allow-vocab-growth, which makes it 63"):
        planned(tmp_path / "a", replace(request, allow_vocab_growth=False), form)
    plan = planned(tmp_path / "a", request, form)
    assert any("copies of the trained pad row 61" in note for note in plan.target.notes)
    assert any("--padded-vocab-size 63" in note for note in plan.target.notes)
    reshard.run(plan, tmp_path / "b", workers=1)
    directory = tmp_path / "b" / f"iter_{ITERATION:07d}"
    assert not replace(grown, grown_from=62).differences(directory)
    assert grown.differences(directory)  # so this can fail
    assert open_source(directory).args.padded_vocab_size == 63


@pytest.mark.parametrize("form", FORMS)
def test_new_rows_are_zero_where_no_pad_row_was_trained(form: str, tmp_path: Path) -> None:
    edits = {"vocab_size": 62, "make_vocab_size_divisible_by": 1, "num_attention_heads": 12}
    made(padded_vocab_size=62, **edits).write(tmp_path / "a")
    plan = planned(tmp_path / "a", Request(tp_size=3, allow_vocab_growth=True), form)
    assert any("the new ones are zeros" in note for note in plan.target.notes)
    reshard.run(plan, tmp_path / "b", workers=1)
    done(tmp_path / "b", tmp_path / "c", Request(tp_size=1))
    old, new = (
        read_bits(tmp_path / "a" / "iter_0000007"),
        read_bits(tmp_path / "c" / "iter_0000007"),
    )
    assert old.keys() == new.keys()
    for key, bits in old.items():
        assert (new[key][: len(bits)] == bits).all()
        assert not new[key][len(bits) :].any()
        assert len(new[key]) - len(bits) == (bits.shape[:1] == (62,))


@pytest.mark.parametrize("form", FORMS)
def test_a_vocabulary_that_divides_is_kept(form: str, tmp_path: Path) -> None:
    # Upstream would make 128 of 64 at TP 2 with these arguments.
    made(make_vocab_size_divisible_by=64).write(tmp_path / "a")
    plan = planned(tmp_path / "a", Request(tp_size=2, allow_vocab_growth=True), form)
    assert plan.target.args.padded_vocab_size == 64
    assert not plan.target.grown
    assert any("--padded-vocab-size 64" in note for note in plan.target.notes)


# ---------------------------------------------------------------------------------------------
# What does not divide


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (Request(tp_size=3), "a divisor of 64|divide"),
        (Request(tp_size=8), "divi"),
        (Request(pp_size=3), "layers do not divide"),
        (Request(pp_size=2, vpp_size=2), "layers do not divide"),
        (Request(pp_size=2, first_layers=2), "layers do not divide"),
        (Request(pp_size=2, pipeline_layout="Et|tt|L"), "pipeline layout does not fit"),
        (Request(ep_size=3), "experts|ranks|divi"),
        (Request(dp_size=1, ep_size=2), "ranks|divi"),
        (Request(tp_size=0), "a parallel size is none"),
        (Request(pp_size=-1), "a parallel size is none"),
        (Request(dp_size=0), "a parallel size is none"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_target_that_does_not_divide(
    form: str, request_: Request, named: str, tmp_path: Path
) -> None:
    made(**EXPERTS).write(tmp_path)
    with pytest.raises(ConfigError, match=named):
        planned(tmp_path, request_, form)


# ---------------------------------------------------------------------------------------------
# Arguments and what all ranks share


@pytest.mark.parametrize("form", FORMS)
def test_arguments_are_those_of_a_job_of_that_layout(form: str, tmp_path: Path) -> None:
    edits = {"num_layers": 4, "consumed_train_samples": 4321, "seed": 99, "num_experts": 2}
    made(tp=2, dp=2, pp=2, decoder_first_pipeline_num_layers=1, **edits).write(tmp_path / "a")
    request = Request(tp_size=1, pp_size=2, dp_size=6, vpp_size=2, ep_size=2)
    directory = done(tmp_path / "a", tmp_path / "b", request, form)
    args, common, _, _ = states_of(directory)
    asked = {"num_virtual_stages_per_pipeline_rank": 2, "expert_model_parallel_size": 2}
    expected = made(tp=1, pp=2, dp=6, **edits, **asked).args
    expected.no_save_rng = True
    assert vars(args) == vars(expected)
    assert common["iteration"] == ITERATION
    assert common["opt_param_scheduler"]["num_steps"] == 84
    assert common["num_floating_point_operations_so_far"] == 1.5e9
    assert "rerun_state_machine" not in common


def test_sizes_that_are_not_asked_for_are_kept_where_they_fit(tmp_path: Path) -> None:
    made(tp=2, pp=2, dp=3, num_layers=4, num_virtual_stages_per_pipeline_rank=2).write(tmp_path)
    for request, sizes in (
        (Request(), (2, 2, 3, 2)),
        (Request(tp_size=4), (4, 2, 3, 2)),  # twelve ranks do not make four
        (Request(tp_size=1), (1, 2, 6, 2)),
        (Request(pp_size=1), (2, 1, 6, 1)),
        (Request(tp_size=1, dp_size=2, pp_size=4), (1, 4, 2, 1)),
        (Request(vpp_size=1), (2, 2, 3, 1)),
    ):
        job = planned(tmp_path, request).target.job
        at = job.layout
        assert (at.tp_size, at.pp_size, at.dp_size, job.pipeline.num_chunks) == sizes, request


@pytest.mark.parametrize(("source_form", "form"), PAIRS)
@pytest.mark.parametrize("state", [None, torch.arange(5, dtype=torch.uint8)], ids=["none", "fp8"])
def test_extra_states_come_along(source_form: str, form: str, state: Any, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "moe_ffn_hidden_size": 6, "moe_layer_freq": 2}
    one = replace(
        made(source_form, tp=2, dp=2, expert_model_parallel_size=2, **experts), extra_state=state
    )
    one.write(tmp_path / "a")
    request = Request(tp_size=1, pp_size=2, dp_size=4, ep_size=4)
    expected = made(form, tp=1, pp=2, dp=4, expert_model_parallel_size=4, **experts)
    directory = done(tmp_path / "a", tmp_path / "b", request, form)
    written = replace(expected, extra_state=state).write(tmp_path / "c")
    got, want = extra_states(directory), extra_states(written)
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value) if value is not None else got[key] is None, key


def extra_states(directory: Path) -> dict[str, Any]:
    """Every extra state of a checkpoint: by its key, or by its rank and name."""
    if (directory / "metadata.json").exists():
        keys = torch_dist.read(directory).objects
        values = open_source(directory).extra_states
        assert len(values) == len([key for key in keys if "_extra_state" in key])
        return {str(state): value for state, value in values.items()}
    found: dict[str, Any] = {}
    for rank in legacy.read(directory).ranks.values():
        state = torch.load(  # noqa: TID251  (our own)
            directory / rank.directory / "model_optim_rng.pt", weights_only=False
        )
        for key, value in state["model"].items():
            if key.endswith("_extra_state"):
                found[f"{rank.directory} {key}"] = value
    return found


# ---------------------------------------------------------------------------------------------
# Groups of the optimizers


def flags_of(states: list[dict[str, Any]]) -> list[list[tuple[bool, float]]]:
    """Of each optimizer's groups: whether it is of experts, and its weight decay."""
    return [
        [
            (group["is_expert_parallel"], group["wd_mult"])
            for group in one["optimizer"]["param_groups"]
        ]
        for one in states
    ]


DENSE, OF_EXPERTS = [(False, 1.0), (False, 0.0)], [(True, 1.0)]


@pytest.mark.parametrize(("source_form", "form"), PAIRS)
@pytest.mark.parametrize(("old", "new"), [(2, 4), (2, 1), (1, 2), (1, 1)])
def test_groups_are_those_of_the_target(
    source_form: str, form: str, old: int, new: int, tmp_path: Path
) -> None:
    one = made(source_form, **{**EXPERTS, "dp": 4}, expert_model_parallel_size=old)
    one.write(tmp_path / "a")
    directory = done(tmp_path / "a", tmp_path / "b", Request(ep_size=new), form)
    _, _, states, _ = states_of(directory)
    flags = flags_of(states)
    assert flags[0] == DENSE
    assert len(flags) == 1 + (new > 1)
    if new > 1:
        assert all(is_expert for is_expert, _ in flags[1])
        if old > 1:
            assert flags[1] == OF_EXPERTS
    for state in states:
        for group in state["optimizer"]["param_groups"]:
            assert group["step"] == ITERATION
            assert group["lr"] == 5.5e-4
    assert not made(form, **{**EXPERTS, "dp": 4}, expert_model_parallel_size=new).differences(
        directory
    )


@pytest.mark.parametrize("form", FORMS)
def test_the_first_chunk_may_have_an_optimizer_of_its_own(form: str, tmp_path: Path) -> None:
    edits = {
        "num_layers": 4, "overlap_param_gather_with_optimizer_step": True,
        "overlap_grad_reduce": True, "num_virtual_stages_per_pipeline_rank": 2,
    }  # fmt: skip
    made(form, pp=2, **edits).write(tmp_path / "a")
    directory = done(tmp_path / "a", tmp_path / "b", Request(tp_size=2), form)
    assert flags_of(states_of(directory)[2]) == [DENSE, DENSE]
    assert not made(form, tp=2, pp=2, **edits).differences(directory)


def test_the_loss_scale_of_fp16_comes_along(tmp_path: Path) -> None:
    for source_form in FORMS:
        made(source_form, bf16=False, fp16=True).write(tmp_path / source_form)
        for form in FORMS:
            save_dir = tmp_path / f"{source_form}-{form}"
            (state,) = states_of(done(tmp_path / source_form, save_dir, Request(tp_size=2), form))[
                2
            ]
            assert state["grad_scaler"]["scale"].tolist() == [4096.0]
            assert state["grad_scaler"]["growth_tracker"] == 3


def edited_groups(change: Any) -> Any:
    """An edit of the common state that changes the groups of the one optimizer."""

    def edit(state: dict[str, Any]) -> dict[str, Any]:
        groups = change(state["optimizer"]["optimizer"]["param_groups"])
        return {**state, "optimizer": {**state["optimizer"], "optimizer": {"param_groups": groups}}}

    return edit


def test_groups_that_disagree_on_the_step_are_refused(tmp_path: Path) -> None:
    def change(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**group, "step": step} for step, group in enumerate(groups)]

    replace(made(), edit=edited_groups(change)).write(tmp_path)
    with pytest.raises(CheckpointError, match="do not agree on how many steps"):
        planned(tmp_path, Request())


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_parameters_count_is_written_for_each_group(form: str, tmp_path: Path) -> None:
    def change(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in group.items() if key != "step"} for group in groups]

    one = replace(made("fully_sharded_model_space"), edit=edited_groups(change))
    one.write(tmp_path / "none")
    with pytest.raises(CheckpointError, match="does not say how many steps"):
        planned(tmp_path / "none", Request(), form)
    replace(one, kinds=(*one.kinds, "step")).write(tmp_path / "a")
    directory = done(tmp_path / "a", tmp_path / "b", Request(tp_size=2), form)
    (state,) = states_of(directory)[2]
    assert [group["step"] for group in state["optimizer"]["param_groups"]] == [ITERATION] * 2
    assert not made(form, tp=2).differences(directory)


@pytest.mark.parametrize("groups", [None, [], [{"is_expert_parallel": True, "step": 7}]])
def test_no_groups_of_dense_parameters(groups: Any, tmp_path: Path) -> None:
    replace(made(), edit=edited_groups(lambda _: groups)).write(tmp_path)
    with pytest.raises(CheckpointError):
        planned(tmp_path, Request())


# ---------------------------------------------------------------------------------------------
# Random generators


@pytest.mark.parametrize(("source_form", "form"), PAIRS)
def test_generators_are_kept_where_their_places_are(
    source_form: str, form: str, tmp_path: Path
) -> None:
    made(source_form, tp=2, pp=2, dp=2).write(tmp_path / "a")
    request = Request(dp_size=3)
    assert planned(tmp_path / "a", request, form).target.rng == "kept"
    args, _, _, rng = states_of(done(tmp_path / "a", tmp_path / "b", request, form))
    assert not args.no_save_rng
    assert rng.keys() == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for (pp_rank, tp_rank), ((state,)) in rng.items():
        (expected,) = rng_state(pp_rank, tp_rank)
        assert torch.equal(state["torch_rng_state"], expected["torch_rng_state"])
        assert state["np_rng_state"] == expected["np_rng_state"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("request_", [Request(tp_size=1), Request(pp_size=1)], ids=["tp", "pp"])
def test_generators_are_left_out_where_their_places_are_gone(
    form: str, request_: Request, tmp_path: Path
) -> None:
    made(tp=2, pp=2).write(tmp_path / "a")
    plan = planned(tmp_path / "a", request_, form)
    assert plan.target.rng.startswith("left out: the tensor or pipeline size")
    assert any("--no-load-rng" in note for note in plan.target.notes) == (form == "legacy")
    args, _, _, rng = states_of(done(tmp_path / "a", tmp_path / "b", request_, form))
    assert args.no_save_rng
    assert not rng


def test_generators_of_each_replica_are_left_out(tmp_path: Path) -> None:
    made(dp=2, data_parallel_random_init=True).write(tmp_path)
    assert planned(tmp_path, Request()).target.rng == "kept"
    assert planned(tmp_path, Request(dp_size=3)).target.rng.startswith("left out: each replica")


# ---------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("form", FORMS)
def test_chunks_and_files_are_bounded(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(**EXPERTS, expert_model_parallel_size=2).write(tmp_path / "a")
    monkeypatch.setattr(target, "CHUNK_BYTES", 200)
    monkeypatch.setattr(target, "FILE_BYTES", 4000)
    plan = planned(tmp_path / "a", Request(tp_size=2, ep_size=1, dp_size=3), form)
    if form != "legacy":
        data = [file for file in plan.target.files if file.path.endswith(".distcp")]
        assert len(data) > 8
        for file in data:
            assert sum(hole.nbytes for hole in file.holes) <= 4000
            # A row of a matrix is not cut, and the longest has 8 x 12 elements of four bytes.
            assert all(hole.nbytes <= 384 for hole in file.holes)
    reshard.run(plan, tmp_path / "b", workers=1)
    expected = made(form, **{**EXPERTS, "dp": 3}, tp=2)
    assert not expected.differences(tmp_path / "b" / f"iter_{ITERATION:07d}")


@pytest.mark.parametrize("source_form", ["legacy", "dp_reshardable"])
@pytest.mark.parametrize("form", FORMS)
def test_what_lies_between_parameters_is_zero_whatever_it_was(
    source_form: str, form: str, tmp_path: Path
) -> None:
    edits = {"hidden_size": 5, "kv_channels": 2}
    one = replace(made(source_form, **edits), gap=0x7FC00001)  # a NaN
    one.write(tmp_path / "a")
    directory = done(tmp_path / "a", tmp_path / "b", Request(tp_size=2), form)
    assert not made(form, tp=2, **edits).differences(directory)
