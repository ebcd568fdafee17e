"""Every kind of damage, put into a checkpoint on purpose, is named: tensor, kind and amount."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from math import lcm, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.damage import Compacted, Damage, Damaged, overwrite
from harness.elements import Bits
from harness.saved_job import ITERATION, job_args
from harness.synthetic import FORMS, Synthetic, read_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.ckpt_io.manifest import MANIFEST, write_manifest
from flagscale.errors import CheckpointError
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import Piece
from flagscale.optim import reshard
from flagscale.optim.doctor import diagnose
from flagscale.optim.doctor.findings import Diagnosis, Kind
from flagscale.optim.doctor.scan import momentum_bound
from flagscale.optim.mend import subtract
from flagscale.optim.opening import open_source
from flagscale.optim.repair import RECORD, plan_repair

EXAMPLES = int(os.environ.get("RESHARD_EXAMPLES", "12"))

_LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "dp3": {"dp": 3, "overlap_grad_reduce": True, "ddp_bucket_size": 1500},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "tied-pp2": {"pp": 2, "dp": 3, "untie_embeddings_and_output_weights": False},
    "moe-ep2": {"dp": 2, "expert_model_parallel_size": 2, "num_experts": 4},
    "fp32": {"dp": 2, "bf16": False},
}
_FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
_QKV = "decoder.layers.2.self_attention.linear_qkv.weight"
_FC2 = "decoder.layers.3.mlp.linear_fc2.weight"
_NORM = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
_EMBEDDING = "embedding.word_embeddings.weight"


def _args(layout: str = "dp3", **more: Any) -> Namespace:
    return job_args(**{"hidden_size": 32, "ffn_hidden_size": 48, **_LAYOUTS[layout], **more})


def _found(diagnosis: Diagnosis) -> dict[tuple[Kind, str], tuple[int, int]]:
    """By kind and place: the amount, and of how many; each named once."""
    found = {(one.kind, one.where): (one.elements, one.of) for one in diagnosis.findings}
    assert len(found) == len(diagnosis.findings), "\n".join(diagnosis.report())
    return found


def _without(found: Mapping[tuple[Kind, str], Any], kind: Kind) -> dict[tuple[Kind, str], Any]:
    return {key: amount for key, amount in found.items() if key[0] != kind}


def _diagnose(directory: Path) -> dict[tuple[Kind, str], tuple[int, int]]:
    diagnosis = diagnose(directory)
    assert diagnosis.sound == (not diagnosis.findings)
    return _found(diagnosis)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_sound(layout: str, form: str, tmp_path: Path) -> None:
    Synthetic(_args(layout), form).write(tmp_path)
    steps: list[tuple[int, int]] = []
    diagnosis = diagnose(tmp_path, on_progress=lambda done, of: steps.append((done, of)))
    assert diagnosis.sound, "\n".join(diagnosis.report())
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] > 0
    assert any("no second copy" in line for line in diagnosis.unchecked)


# ---------------------------------------------------------------------------------------------
# Damage in tensors, written with all checksums right


def _last(count: int, bits: int) -> Damage:
    """The last elements all the same."""

    def damage(whole: Bits) -> Bits:
        whole.reshape(-1)[-count:] = bits
        return whole

    return damage


def _all(bits: int) -> Damage:
    return lambda whole: np.full_like(whole, bits)


def _shifted(by: int) -> Damage:
    """Element i is what i + by was; zeros where there is none."""

    def damage(whole: Bits) -> Bits:
        flat = whole.reshape(-1)
        moved = np.zeros_like(flat)
        low, high = max(0, -by), min(flat.size, flat.size - by)
        moved[low:high] = flat[low + by : high + by]
        return moved.reshape(whole.shape)

    return damage


def _swapped(whole: Bits) -> Bits:
    return np.roll(whole, whole.shape[-2] // 2, axis=-2)


def _reordered(whole: Bits) -> Bits:
    """The queries of the first group behind its key and value: 4 + 4 rows behind 4."""
    rows = [*range(4, 12), *range(4), *range(12, whole.shape[0])]
    return np.ascontiguousarray(whole[rows])


def _older(whole: Bits) -> Bits:
    """As it was some steps ago: a tenth or less away."""
    values = whole.view(np.float32)
    return (
        values * np.linspace(0.9, 0.97, values.size, dtype=np.float32).reshape(values.shape)
    ).view(np.uint32)


def _garbage(whole: Bits) -> Bits:
    values = np.random.default_rng(0).normal(0, 0.02, whole.shape).astype(np.float32)
    return values.view(np.uint32)


_NAN, _INF, _HUGE = 0x7FC00000, 0xFF800000, 0x7F000000


def _counting(whole: Bits) -> Bits:
    """Whole numbers, which are denormal as floating-point ones."""
    return np.arange(1, whole.size + 1, dtype=np.uint32).reshape(whole.shape)


def _larger(whole: Bits) -> Bits:
    return whole + np.uint32(8 << 23)


_FC1S, _FC2S = "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"
_QKVS, _NORMS = "self_attention.linear_qkv.weight", "mlp.linear_fc1.layer_norm_weight"
_NUMEL = {_FC1S: 3072, _QKVS: 1536, _FC2S: 1536, _NORMS: 32, _EMBEDDING: 2048}

_ALL, _MANY = -1, -2
_CASES: list[tuple[str, str, Damage, dict[tuple[Kind, str], int]]] = [
    # What is damaged, how, and what has to be found: kind, where, and the amount; ``_ALL`` is every
    # element of which main copy and weight differ.
    ("param", _FC2S, _last(100, 0), {(Kind.ZEROED, "param"): 100}),
    ("param", _NORMS, _all(0), {(Kind.ZEROED, "param"): 32}),
    ("weight", _QKVS, _last(77, 0), {(Kind.ZEROED, "weight"): 77}),
    ("exp_avg", _FC1S, _last(50, 0), {(Kind.ZEROED, "exp_avg"): 50}),
    ("exp_avg_sq", _FC1S, _last(50, 0), {(Kind.ZEROED, "exp_avg_sq"): 50}),
    ("exp_avg", _EMBEDDING, _last(50, 0), {(Kind.ZEROED, "exp_avg"): 50}),
    ("param", _FC2S, _last(3, _NAN), {(Kind.NOT_FINITE, "param"): 3}),
    ("weight", _FC2S, _last(5, 0xFF80), {(Kind.NOT_FINITE, "weight"): 5}),
    ("exp_avg", _NORMS, _last(1, _NAN), {(Kind.NOT_FINITE, "exp_avg"): 1}),
    ("exp_avg_sq", _QKVS, _last(9, _INF), {(Kind.NOT_FINITE, "exp_avg_sq"): 9}),
    ("exp_avg_sq", _QKVS, _last(4, 0xA8000000), {(Kind.NEGATIVE, "exp_avg_sq"): 4}),
    ("exp_avg", _QKVS, _counting, {(Kind.DENORMAL, "exp_avg"): 1536}),
    (
        "param", _QKVS, _counting,
        {(Kind.DENORMAL, "param"): 1536, (Kind.DIFFERS, "param"): _ALL},
    ),
    ("exp_avg", _FC2S, _last(6, _HUGE), {(Kind.IMPOSSIBLE, "exp_avg"): 6}),
    ("exp_avg", _FC2S, _larger, {(Kind.IMPOSSIBLE, "exp_avg, exp_avg_sq"): _MANY}),
    ("param", _FC2S, _shifted(64), {(Kind.SHIFTED, "param"): _ALL}),
    ("param", _QKVS, _shifted(-7), {(Kind.SHIFTED, "param"): _ALL}),
    ("weight", _QKVS, _shifted(33), {(Kind.SHIFTED, "param"): _ALL}),
    ("param", _FC1S, _swapped, {(Kind.SWAPPED, "param"): _ALL}),
    ("weight", _FC1S, _swapped, {(Kind.SWAPPED, "param"): _ALL}),
    ("param", _FC1S, _shifted(5), {(Kind.SHIFTED, "param"): _ALL}),
    ("param", _FC1S, _garbage, {(Kind.DIFFERS, "param"): _ALL}),
    ("param", _QKVS, _reordered, {(Kind.PERMUTED, "param"): _ALL}),
    ("weight", _QKVS, _reordered, {(Kind.PERMUTED, "param"): _ALL}),
    ("param", _FC2S, _older, {(Kind.STALE, "param"): _ALL}),
    ("param", _FC2S, _garbage, {(Kind.DIFFERS, "param"): _ALL}),
]  # fmt: skip


def _differing(damaged: Damaged, name: str) -> int:
    """Elements of which the main copy, rounded by torch, is not the weight."""
    ranges = tuple((range(n),) for n in damaged.whole[name].shape)
    main, weight = (damaged.part(kind, name, ranges) for kind in ("param", "weight"))
    rounded = torch.from_numpy(main.view(np.float32).copy()).to(torch.bfloat16)
    return int((rounded.view(torch.int16).numpy().view(np.uint16) != weight).sum())


@pytest.mark.parametrize("form", FORMS)
def test_damaged_tensors(form: str, tmp_path: Path) -> None:
    """All at once, each in a layer of its own: nothing more is found and nothing less."""
    layers: dict[str, int] = {}
    damage: dict[tuple[str, str], Damage] = {}
    expected: dict[tuple[Kind, str], tuple[int, int]] = {}
    for kind, module, change, findings in _CASES:
        layer = layers[module] = layers.get(module, -1) + 1
        name = module if module == _EMBEDDING else f"decoder.layers.{layer}.{module}"
        damage[kind, name] = change
        for (what, where), amount in findings.items():
            expected[what, f"{where} {name}"] = amount, _NUMEL[module]
    args = _args(num_layers=1 + max(layers.values()))
    damaged = Damaged(args, form, whole_damage=damage)
    damaged.write(tmp_path)
    found = _diagnose(tmp_path)
    assert found.keys() == expected.keys()
    for (what, where), (amount, of) in expected.items():
        count = _differing(damaged, where.split()[-1]) if amount == _ALL else amount
        if amount == _MANY:  # of random numbers, most of the time
            count = max(of // 4, found[what, where][0])
        assert found[what, where] == (count, of), (what, where)


@pytest.mark.parametrize("form", FORMS)
def test_moments_that_are_all_zero(form: str, tmp_path: Path) -> None:
    damage = {(kind, _QKV): _all(0) for kind in ("exp_avg", "exp_avg_sq")}
    Damaged(_args(), form, whole_damage=damage).write(tmp_path)
    found = _diagnose(tmp_path)
    assert found == {(Kind.NO_MOMENTS, f"exp_avg, exp_avg_sq {_QKV}"): (1536, 1536)}


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_gradient_are_no_damage(form: str, tmp_path: Path) -> None:
    """Tokens that never occur, and experts that are never chosen."""

    def rows(whole: Bits) -> Bits:
        whole[3:9] = whole[-2:] = 0
        return whole

    def expert(whole: Bits) -> Bits:
        whole[1] = 0
        return whole

    fc2 = "decoder.layers.0.mlp.experts.experts.linear_fc2.weight"
    kinds = ("exp_avg", "exp_avg_sq")
    damage = {(kind, _EMBEDDING): rows for kind in kinds} | {(kind, fc2): expert for kind in kinds}
    Damaged(_args("moe-ep2"), form, whole_damage=damage).write(tmp_path)
    assert diagnose(tmp_path).sound


_SOME: Mapping[tuple[str, str], Damage] = {
    ("param", _FC1): _swapped,
    ("weight", _QKV): _reordered,
    ("param", _FC2): _last(3, _NAN),
    ("param", _NORM): _all(0),
}
_SOME_FOUND = {
    (Kind.SWAPPED, f"param {_FC1}"),
    (Kind.PERMUTED, f"param {_QKV}"),
    (Kind.NOT_FINITE, f"param {_FC2}"),
    (Kind.ZEROED, f"param {_NORM}"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["tp2-pp2", "tied-pp2", "fp32"])
def test_damaged_tensors_in_other_layouts(layout: str, form: str, tmp_path: Path) -> None:
    """Parts on different ranks: what one tensor's rows are is still seen."""
    Damaged(_args(layout), form, whole_damage=_SOME).write(tmp_path)
    assert _diagnose(tmp_path).keys() == _SOME_FOUND


def test_damage_does_not_hide_the_order(tmp_path: Path) -> None:
    """The layer spec that the arguments suggest is another one, and no order proves itself."""
    args = _args(transformer_impl="transformer_engine")
    Damaged(args, "dp_reshardable", "local", whole_damage=_SOME).write(tmp_path)
    assert _diagnose(tmp_path).keys() == _SOME_FOUND


def test_the_first_problem_is_not_the_last(tmp_path: Path) -> None:
    def edit(state: dict[str, Any]) -> dict[str, Any]:
        return state | {"iteration": ITERATION + 1}

    directory = Damaged(_args(), "legacy", edit=edit, whole_damage=_SOME).write(tmp_path)
    (directory / MANIFEST).write_text(json.dumps({"files": {"gone": "0" * 64}}))
    others = {(Kind.COMMON, "iteration"), (Kind.MISSING, "gone")}
    assert _diagnose(tmp_path).keys() == _SOME_FOUND | others


def test_the_bound_of_the_moments_holds() -> None:
    """For gradients of any kind, and closely: the worst ones are found by Cauchy and Schwarz."""
    rng = np.random.default_rng(0)
    for beta1, beta2 in ((0.9, 0.999), (0.9, 0.95), (0.5, 0.9)):
        bound = momentum_bound(beta1, beta2)
        worst = (beta1 / beta2) ** np.arange(400)[::-1]
        kinds = [worst, rng.normal(size=400), rng.random(400), np.ones(400), np.eye(400)[-1]]
        ratios = []
        for gradients in kinds:
            m = v = 0.0
            for gradient in gradients:
                m = beta1 * m + (1 - beta1) * gradient
                v = beta2 * v + (1 - beta2) * gradient**2
            ratios.append(m / np.sqrt(v))
        assert max(ratios) <= bound * (1 + 1e-9)
        assert max(ratios) > 0.99 * bound
    assert momentum_bound(0.99, 0.9) == np.inf


# ---------------------------------------------------------------------------------------------
# Copies that should be the same


def _copies(directory: Path, kind: str, name: str) -> list[Piece]:
    source = open_source(directory, prove=False)
    return [p for p in source.of_kind(kind) if p.tensor.name == name and p.box.numel > 64]


@pytest.mark.parametrize("form", ["legacy", "dp_reshardable"])
@pytest.mark.parametrize("kind", ["param", "exp_avg", "exp_avg_sq", "weight"])
def test_stale_tied_copy(form: str, kind: str, tmp_path: Path) -> None:
    if (form, kind) == ("dp_reshardable", "weight"):
        return  # it is stored once
    directory = Synthetic(_args("tied-pp2"), form).write(tmp_path)
    last = _copies(directory, kind, _EMBEDDING)[-1]
    dtype = np.uint16 if last.dtype == "bfloat16" else np.uint32
    stale = np.full(20, 0x3C23 if dtype == np.uint16 else 0x36230000, dtype)
    overwrite(directory, last, stale, start=11)
    found = _without(_diagnose(tmp_path), Kind.CHANGED)
    assert found.keys() - {(Kind.IMPOSSIBLE, f"exp_avg, exp_avg_sq {_EMBEDDING}")} == {
        (Kind.STALE, f"{kind} {_EMBEDDING}")
    }
    assert found[Kind.STALE, f"{kind} {_EMBEDDING}"] == (20, 2048)


def test_stale_weight_of_tied_embeddings(tmp_path: Path) -> None:
    """torch_dist holds one copy of the weight and, by name, one of the states."""
    damage = {("param", _EMBEDDING): _older}
    Damaged(_args("tied-pp2"), "fully_reshardable", whole_damage=damage).write(tmp_path)
    assert _diagnose(tmp_path).keys() == {(Kind.STALE, f"param {_EMBEDDING}")}


def test_replica_of_another_tensor_rank(tmp_path: Path) -> None:
    directory = Synthetic(_args("tp2-pp2"), "legacy").write(tmp_path)
    norm = [p for p in open_source(directory).of_kind("weight") if p.tensor.name == _NORM]
    assert len(norm) == 2
    overwrite(directory, norm[1], np.full(2, 0x3F80, np.uint16))
    found = _without(_diagnose(tmp_path), Kind.CHANGED)
    assert found == {(Kind.STALE, f"weight {_NORM}"): (2, 32)}


# ---------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["missing", "short"])
def test_every_lost_file_is_named(form: str, how: str, tmp_path: Path) -> None:
    directory = Synthetic(_args("tp2-pp2"), form).write(tmp_path / "whole")
    files = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.suffix in (".distcp", ".pt")
    )
    assert len(files) > 3
    for lost in (files[:1], files[1:3], files):
        shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        for file in lost:
            path = tmp_path / "copy" / directory.name / file
            size = path.stat().st_size
            path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[: size // 2])
        found = _diagnose(tmp_path / "copy")
        kind = Kind.MISSING if how == "missing" else Kind.SHORT
        assert found.keys() == {(kind, file) for file in lost}
        if form != "legacy":
            assert all(amount > 0 for amount, _ in found.values())
        shutil.rmtree(tmp_path / "copy")


def test_a_lost_rank_is_named(tmp_path: Path) -> None:
    directory = Synthetic(_args("tp2-pp2"), "legacy").write(tmp_path)
    shutil.rmtree(directory / "mp_rank_01_001")
    shutil.rmtree(directory / "mp_rank_00_001")
    assert _diagnose(tmp_path).keys() == {
        (Kind.MISSING, "mp_rank_00_001"),
        (Kind.MISSING, "mp_rank_01_001"),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("manifest", [True, False])
def test_a_changed_byte_is_found(form: str, manifest: bool, tmp_path: Path) -> None:
    """Also where no number tells: in the middle of a moment."""
    directory = Synthetic(_args(), form).write(tmp_path)
    if manifest:
        write_manifest(directory)
        assert diagnose(tmp_path).sound
    piece = max(
        (p for p in open_source(directory).of_kind("exp_avg") if p.tensor.name == _FC2),
        key=lambda piece: piece.box.numel,
    )
    path = directory / piece.region.file
    data = bytearray(path.read_bytes())
    data[piece.region.offset + 40] ^= 1
    path.write_bytes(data)
    diagnosis = diagnose(tmp_path)
    assert _found(diagnosis).keys() == {(Kind.CHANGED, piece.region.file)}
    if form == "fully_reshardable" and not manifest:
        assert f"exp_avg {_FC2}" in diagnosis.findings[0].what


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not say which checkpoint"):
        diagnose(tmp_path)
    directory = Synthetic(_args(), "fully_reshardable").write(tmp_path)
    (directory / ".metadata").write_bytes(b"junk")
    assert _diagnose(tmp_path).keys() == {(Kind.SHORT, ".metadata")}
    with pytest.raises(CheckpointError, match="no checkpoint of this iteration"):
        diagnose(tmp_path, 99)


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    def edit(state: dict[str, Any]) -> dict[str, Any]:
        return state | {"args": Namespace(**{**vars(state["args"]), "ffn_hidden_size": 50})}

    Synthetic(_args(), "fully_reshardable", edit=edit).write(tmp_path)
    (finding,) = diagnose(tmp_path).findings
    assert finding.kind == Kind.UNREADABLE
    assert "linear_fc1.weight" in finding.where


# ---------------------------------------------------------------------------------------------
# What all ranks share


def _edited(**edits: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Arguments by their names; ``iteration``, ``num_steps`` and ``step`` where they are."""

    def edit(state: dict[str, Any]) -> dict[str, Any]:
        state = json.loads(json.dumps({k: v for k, v in state.items() if k != "args"})) | {
            "args": state["args"], "optimizer": state["optimizer"]
        }  # fmt: skip
        values = dict(edits)
        state["iteration"] = values.pop("iteration", state["iteration"])
        scheduler = state["opt_param_scheduler"]
        scheduler["num_steps"] = values.pop("num_steps", scheduler["num_steps"])
        if "step" in values:
            groups = state["optimizer"]["optimizer"]["param_groups"]
            groups = [{**group, "step": values["step"]} for group in groups]
            if values.pop("one_group", False):
                groups[0] = {**groups[0], "step": ITERATION}
            state["optimizer"] = {"optimizer": {"param_groups": groups}}
            del values["step"]
        state["args"] = Namespace(**{**vars(state["args"]), **values})
        return state

    return edit


@pytest.mark.parametrize(
    ("edits", "where"),
    [
        ({"iteration": 8}, "iteration"),
        ({"step": 9}, "optimizer, step"),
        ({"step": 6}, "optimizer, step"),
        ({"step": 6, "one_group": True}, "optimizer, step"),
        ({"step": None}, "optimizer, step"),
        ({"num_steps": 85}, "opt_param_scheduler, num_steps"),
        ({"num_steps": 72}, "opt_param_scheduler, num_steps"),
        ({"num_steps": 90, "step": 5}, "opt_param_scheduler, num_steps"),
        ({"num_steps": None}, "opt_param_scheduler"),
        ({"consumed_train_samples": 96}, "opt_param_scheduler, num_steps"),
        ({"consumed_train_samples": 72}, "opt_param_scheduler, num_steps"),
        ({"skipped_train_samples": 12}, "opt_param_scheduler, num_steps"),
    ],
    ids=str,
)
def test_common_state(edits: dict[str, Any], where: str, tmp_path: Path) -> None:
    Synthetic(_args(), "legacy", edit=_edited(**edits)).write(tmp_path)
    assert (Kind.COMMON, where) in _diagnose(tmp_path)


@pytest.mark.parametrize(
    "edits",
    [
        {"step": 5, "num_steps": 60},  # two overflows of fp16, or a start without the states
        {"step": 6, "num_steps": 72, "skipped_train_samples": 12},
        {"global_batch_size": 24},  # another batch size once
    ],
    ids=str,
)
def test_odd_is_not_damaged(edits: dict[str, Any], tmp_path: Path) -> None:
    Synthetic(_args(), "legacy", edit=_edited(**edits)).write(tmp_path)
    diagnosis = diagnose(tmp_path)
    assert diagnosis.sound, "\n".join(diagnosis.report())
    assert diagnosis.notes


# ---------------------------------------------------------------------------------------------
# #5077


@st.composite
def _jobs(draw: st.DrawFn) -> dict[str, Any]:
    """Jobs whose buffers have padding between their buckets, mostly."""
    tp = draw(st.sampled_from([1, 1, 2]))
    pp = draw(st.sampled_from([1, 1, 2]))
    ep = draw(st.sampled_from([1, 1, 1, 2]))
    etp = draw(st.sampled_from(sorted({1, tp}))) if ep > 1 else tp
    job: dict[str, Any] = {
        "tp": tp,
        "pp": pp,
        "dp": draw(st.sampled_from([n for n in (3, 5, 6, 20) if tp * n % (etp * ep) == 0] or [6])),
        "overlap_grad_reduce": draw(st.booleans()),
        "ddp_bucket_size": draw(st.sampled_from([1, 700, 2500])),
        "ddp_pad_buckets_for_high_nccl_busbw": draw(st.sampled_from([False, False, True])),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
        "num_layers": 2 * pp,
        "num_virtual_stages_per_pipeline_rank": 2 if pp > 1 and draw(st.booleans()) else None,
        "swiglu": draw(st.booleans()),
        "bf16": draw(st.sampled_from([True, True, False])),
        "transformer_impl": draw(st.sampled_from(["local", "transformer_engine"])),
        "ffn_hidden_size": 2 * lcm(tp, 12),
    }
    if ep > 1:
        job |= {
            "num_experts": 2 * ep,
            "expert_model_parallel_size": ep,
            "expert_tensor_parallel_size": etp,
            "moe_ffn_hidden_size": 2 * lcm(tp, 4),
        }
    return job


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(job=_jobs())
def test_what_5077_did_is_found_and_mended(
    job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = tmp_path_factory.mktemp("5077")
    spec = job["transformer_impl"]
    damaged = Compacted(job_args(**job), "fully_reshardable", spec)
    damaged.write(work / "damaged")
    good = Synthetic(damaged.args, "fully_reshardable", spec)
    wrong = {
        name
        for (kind, name), bits in damaged.saved.items()
        if kind == "param" and (bits != _true(good, kind, name)).any()
    }
    diagnosis = diagnose(work / "damaged")
    found = _found(diagnosis)
    if not wrong:
        assert diagnosis.sound
        with pytest.raises(CheckpointError, match="nothing to mend"):
            plan_repair(open_source(work / "damaged"))
        return
    assert found.keys() == {(Kind.COMPACT, f"param {name}") for name in wrong}
    repair = plan_repair(open_source(work / "damaged"))
    done, _ = reshard.run(repair.reshard, work / "mended", workers=1, verify="full")
    assert set(repair.mending.shifted) == wrong
    _verify_mended(good, repair, done.directory)
    # What it could not bring back it has written down, and so nothing is amiss.
    after = diagnose(work / "mended")
    assert after.sound, "\n".join(after.report())
    assert bool(after.notes) == bool(repair.numel_lost)
    shutil.rmtree(work)


def _true(good: Synthetic, kind: str, name: str) -> Bits:
    return good.part(kind, name, tuple((range(n),) for n in good.whole[name].shape))


def _verify_mended(good: Synthetic, repair: Any, directory: Path) -> None:
    """Equal to the bit, but for what the report names as lost, element by element."""
    got = read_bits(directory)
    masks = {
        name: _mask(tensor.shape, repair.mending.lost.get(name, ()))
        for name, tensor in good.whole.items()
        if tensor.trained
    }
    for key, names in good._stored().items():
        for layer, name in enumerate(names):
            if name not in masks:
                continue
            stacked = len(got[key].shape) > len(good.whole[name].shape)
            lost, weight = masks[name], got[key][layer] if stacked else got[key]
            for kind in ("param", "exp_avg", "exp_avg_sq"):
                bits = got[f"optimizer.state.{kind}.{key}"]
                bits = bits[layer] if stacked else bits
                true = _true(good, kind, name)
                assert (bits == true)[~lost].all(), (kind, name)
                if kind != "param":
                    assert not bits[lost].any()
                elif weight.itemsize == 4:
                    assert (bits == true).all()
                else:
                    assert (bits[lost] == weight[lost].astype(np.uint32) << 16).all()
    lines = list(repair.report())
    for name, lost in masks.items():
        if lost.any():
            assert any(
                line.startswith(name) and f" {lost.sum():,} of {lost.size:,} " in line
                for line in lines
            )


def _mask(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> Bits:
    mask = np.zeros(shape, bool)
    for box in boxes:
        where = tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))
        assert not mask[where].any()
        mask[where] = True
    return mask


def test_5077_and_other_damage(tmp_path: Path) -> None:
    """Both are named, and a repair refuses, for it would publish the other."""
    directory = Compacted(_args(), "fully_reshardable").write(tmp_path)
    piece = next(p for p in open_source(directory).of_kind("param") if p.tensor.name == _NORM)
    overwrite(directory, piece, np.full(2, _NAN, np.uint32))
    found = _without(_diagnose(tmp_path), Kind.CHANGED)
    assert found[Kind.NOT_FINITE, f"param {_NORM}"] == (2, 32)
    assert sum(kind == Kind.COMPACT for kind, _ in found) > 10
    put_back = [amount for (kind, _), (amount, _) in found.items() if kind == Kind.DIFFERS]
    assert put_back == [2]
    with pytest.raises(CheckpointError, match="or not that alone"):
        plan_repair(open_source(tmp_path))


@pytest.mark.parametrize("form", FORMS)
def test_repair_refuses_what_it_cannot_mend(form: str, tmp_path: Path) -> None:
    Damaged(_args(), form, whole_damage=_SOME).write(tmp_path)
    expected = "not the damage that can be mended" if form == "fully_reshardable" else "only fully"
    with pytest.raises(CheckpointError, match=expected):
        plan_repair(open_source(tmp_path, prove=False))


def test_a_damaged_record_of_a_repair(tmp_path: Path) -> None:
    directory = Synthetic(_args(), "fully_reshardable").write(tmp_path)
    (directory / RECORD).write_text("{}")
    assert _diagnose(tmp_path).keys() == {(Kind.UNREADABLE, RECORD)}


@given(st.lists(st.integers(0, 5), min_size=4, max_size=24))
def test_subtract(numbers: list[int]) -> None:
    """What is left and what was taken away are the whole, each element once."""
    whole = Box((1, 0), (4, 5))
    parts = [Box((a, b), (c, d)) for a, b, c, d in zip(*(iter(numbers),) * 4, strict=False)]
    left = subtract(whole, parts)
    count = np.zeros((12, 12), int)
    for box in left:
        count[box.offset[0] : box.stop[0], box.offset[1] : box.stop[1]] += 1
    taken = np.zeros((12, 12), bool)
    for box in parts:
        taken[box.offset[0] : box.stop[0], box.offset[1] : box.stop[1]] = True
    inside = np.zeros((12, 12), bool)
    inside[1:5, 0:5] = True
    assert (count == (inside & ~taken)).all()
    assert sum(box.numel for box in left) <= prod(whole.shape)
