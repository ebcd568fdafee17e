"""A -> B -> A over layouts, models and formats: each element is the right one, by its value.

What every element has to be, :mod:`harness.elements` says; torch reads what was written.
``RESHARD_EXAMPLES`` asks for more examples than the test command has time for.
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import pytest
from harness.saved_job import job_args
from harness.synthetic import FORMS, Synthetic, read_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.layout.model import LayerSpec
from flagscale.optim import reshard
from flagscale.optim.carry import Request
from flagscale.optim.opening import open_source

EXAMPLES = int(os.environ.get("RESHARD_EXAMPLES", "10"))
DP_SIZES = (1, 3, 5, 6, 8, 20, 40)
PRECISIONS = (
    {"bf16": True},
    {"bf16": True},
    {"bf16": False},
    {"bf16": False, "fp16": True},
)


@dataclass(frozen=True)
class Place:
    """A layout: its arguments, and how it is asked for as a target."""

    sizes: dict[str, Any]
    request: Request


@dataclass(frozen=True)
class Draw:
    """A source, a target, and the model and optimizer they share."""

    model: dict[str, Any]
    spec: LayerSpec
    source: Place
    source_form: str
    target: Place
    target_form: str

    def args(self, place: Place) -> Namespace:
        """Of the job at a place."""
        return job_args(**self.model, **place.sizes)


def write_and_reshard(draw: Draw, work: Path) -> None:
    """Write A, make B of it and A of that; each as it has to be, and the second A as the first."""
    source = Synthetic(draw.args(draw.source), draw.source_form, draw.spec)
    target = Synthetic(draw.args(draw.target), draw.target_form, draw.spec)
    first = source.write(work / "a")
    there = run(work / "a", work / "b", draw.target.request, draw.target_form)
    assert not target.differences(there)
    back = run(work / "b", work / "back", draw.source.request, draw.source_form)
    before, after = read_bits(first), read_bits(back)
    assert before.keys() == after.keys()
    for key, bits in before.items():
        assert bits.tobytes() == after[key].tobytes(), key


def run(load_dir: Path, save_dir: Path, request: Request, form: str) -> Path:
    """Reshard in this process."""
    source = open_source(load_dir)
    ckpt_format = "torch" if form == "legacy" else "torch_dist"
    optim_format = "fully_reshardable" if form == "legacy" else form
    planned = reshard.plan(source, request, ckpt_format, optim_format, unit_bytes=4096)
    return reshard.run(planned, save_dir, workers=1)[0].directory


# ---------------------------------------------------------------------------------------------
# What is drawn


def stage_sizes(draw: st.DrawFn, layers: int, stages: int) -> list[int]:
    """Layers of each stage, none here and there."""
    cuts = sorted(draw(st.integers(0, layers)) for _ in range(stages - 1))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, layers], strict=True)]


def pipelines(draw: st.DrawFn, layers: int, pp: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A placement of the layers: as arguments, and as a request."""
    kinds = ["layout"] if pp > 1 else []
    kinds += ["even"] if layers % pp == 0 else []
    kinds += ["chunks"] if pp > 1 and layers % (2 * pp) == 0 else []
    kinds += ["first"] if pp > 1 and layers > pp else []
    kinds += ["last"] if pp > 1 and layers > pp else []
    kind = draw(st.sampled_from(sorted(kinds)))
    if kind == "chunks":
        return {"num_virtual_stages_per_pipeline_rank": 2}, {"vpp_size": 2}
    if kind == "layout":
        chunks = draw(st.integers(1, 2))
        parts = ["t" * size for size in stage_sizes(draw, layers, pp * chunks)]
        layout = f"E{'|'.join(parts)}L"
        asked = {"vpp_size": chunks} if chunks > 1 else {}
        return {
            "pipeline_model_parallel_layout": layout,
            "num_virtual_stages_per_pipeline_rank": None,
        }, {"pipeline_layout": layout, **asked}
    if kind in ("first", "last"):
        middle = (layers - 1) // (pp - 1)
        own = layers - middle * (pp - 1)
        return {f"decoder_{kind}_pipeline_num_layers": own}, {f"{kind}_layers": own}
    return {}, {"vpp_size": 1} if pp > 1 else {}


def places(draw: st.DrawFn, tp: int, cp: int, ep: int, layers: int) -> Place:
    """A layout with these sizes."""
    pp = draw(st.integers(1, min(4, layers)))
    etp = draw(st.sampled_from([1, tp])) if ep > 1 else tp
    etp = etp if tp % (etp * ep) == 0 or etp * ep % tp == 0 else tp  # else upstream saves not all
    # The expert grid has to fit into the ranks of a stage.
    fit = [dp for dp in DP_SIZES if tp * cp * dp % (etp * ep) == 0]
    dp = draw(st.sampled_from(fit or [ep * 3]))
    placed, asked = pipelines(draw, layers, pp)
    sizes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "expert_model_parallel_size": ep, **placed}
    if ep > 1:
        sizes["expert_tensor_parallel_size"] = etp
    request = Request(tp, pp, dp, ep_size=ep, etp_size=etp, **asked)
    return Place(sizes, request)


def models(draw: st.DrawFn, tp_sizes: tuple[int, int], ep: int) -> dict[str, Any]:
    """A model that divides over tensor parallel ranks, however many of two, and expert ranks."""
    flag, tp = st.booleans(), lcm(*tp_sizes)
    heads = tp * draw(st.integers(1, 2))
    fit = [n for n in range(1, heads + 1) if all(n % t == 0 or t % n == 0 for t in tp_sizes)]
    groups = draw(st.sampled_from([n for n in fit if heads % n == 0]))
    channels = next(n for n in range(2, 99, 2) if 2 * groups * n % tp == 0)
    rows = tp * draw(st.integers(3, 9))
    model: dict[str, Any] = {
        "num_layers": draw(st.sampled_from([2, 3, 4, 8])),
        "hidden_size": draw(st.sampled_from([5, 16, 48])),
        "ffn_hidden_size": tp * draw(st.sampled_from([3, 7, 16])),
        "num_attention_heads": heads,
        "group_query_attention": groups < heads,
        "num_query_groups": groups,
        "kv_channels": channels,
        "vocab_size": rows - draw(st.integers(0, 2)),
        "padded_vocab_size": rows,
        "swiglu": draw(flag),
        "normalization": draw(st.sampled_from(["RMSNorm", "LayerNorm"])),
        "add_bias_linear": draw(flag),
        "add_qkv_bias": draw(flag),
        "qk_layernorm": draw(flag),
        "untie_embeddings_and_output_weights": draw(flag),
        "position_embedding_type": draw(st.sampled_from(["rope", "learned_absolute"])),
        **draw(st.sampled_from(PRECISIONS)),
    }
    if ep > 1 or draw(st.integers(0, 3)) == 0:
        model |= {
            "num_experts": ep * draw(st.integers(1, 2)),
            "moe_ffn_hidden_size": tp * draw(st.sampled_from([2, 5])),
            "moe_shared_expert_intermediate_size": draw(st.sampled_from([None, tp * 3])),
            "moe_router_enable_expert_bias": draw(flag),
            "moe_grouped_gemm": draw(flag),
            "add_bias_linear": False,
            "moe_layer_freq": draw(st.sampled_from([1, 2])),
        }
    return model


def buffers(draw: st.DrawFn) -> dict[str, Any]:
    """How gradients are bucketed."""
    overlap = draw(st.booleans())
    return {
        "overlap_grad_reduce": overlap,
        "ddp_bucket_size": draw(st.sampled_from([None, 1, 300, 1500])),
        "ddp_num_buckets": draw(st.sampled_from([None, None, 3])),
        "ddp_pad_buckets_for_high_nccl_busbw": draw(st.booleans()),
    }


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Everything at once."""
    source_tp, target_tp = draw(st.sampled_from([(1, 2), (2, 1), (2, 4), (4, 1), (3, 2), (1, 1)]))
    source_ep, target_ep = draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (2, 1), (2, 4), (2, 2)]))
    spec = draw(st.sampled_from(["local", "transformer_engine"]))
    model = models(draw, (source_tp, target_tp), max(source_ep, target_ep))
    model |= buffers(draw) | {"transformer_impl": spec}
    layers, cp = model["num_layers"], draw(st.sampled_from([1, 1, 2]))
    return Draw(
        model,
        spec,
        places(draw, source_tp, cp, source_ep, layers),
        draw(st.sampled_from(FORMS)),
        places(draw, target_tp, cp, target_ep, layers),
        draw(st.sampled_from(FORMS)),
    )


DENSE = {"num_layers": 2, "hidden_size": 5, "kv_channels": 2, "ffn_hidden_size": 12}
EXPERTS = {**DENSE, "num_experts": 2, "moe_ffn_hidden_size": 4}
ONE = Place({"dp": 1}, Request(1, 1, 1, ep_size=1, etp_size=1))
CASES = {
    # Experts among the dense parameters, divided like these.
    "experts-tp2": (EXPERTS, ONE, Place({"tp": 2}, Request(2, 1, 1, ep_size=1, etp_size=2))),
    # The second stage has no experts, so their optimizer has no buffer there.
    "experts-on-one-stage": (
        {**EXPERTS, "moe_layer_freq": 2},
        ONE,
        Place(
            {"pp": 2, "dp": 2, "expert_model_parallel_size": 2},
            Request(1, 2, 2, ep_size=2, etp_size=1, vpp_size=1),
        ),
    ),
    # How large a bucket is depends on the parameters in all chunks of a rank.
    "buckets-by-number": (
        {**DENSE, "overlap_grad_reduce": True, "ddp_num_buckets": 3},
        ONE,
        Place({"pp": 2, "pipeline_model_parallel_layout": "Et|t||L"},
              Request(1, 2, 1, vpp_size=2, pipeline_layout="Et|t||L")),
    ),
    # Which rank saves what: the first with tensor rank 1 has experts 1.
    "expert-ranks-beside-tensor-ranks": (
        {**EXPERTS, "num_experts": 4},
        ONE,
        Place(
            {"tp": 2, "dp": 2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
            Request(2, 1, 2, ep_size=4, etp_size=1),
        ),
    ),
    "instances": (
        {**DENSE, "num_distributed_optimizer_instances": 2, "overlap_grad_reduce": True,
         "ddp_bucket_size": 100},
        Place({"dp": 6}, Request(1, 1, 6)),
        Place({"dp": 10, "tp": 4}, Request(4, 1, 10)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_corners(case: str, form: str, tmp_path: Path) -> None:
    model, source, target = CASES[case]
    write_and_reshard(Draw(model, "local", source, form, target, form), tmp_path)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(draws())
def test_there_and_back(draw: Draw) -> None:
    with tempfile.TemporaryDirectory() as work:
        write_and_reshard(draw, Path(work))
