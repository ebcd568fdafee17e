"""There and back: what ``save_pretrained`` writes comes back byte for byte, whatever the layout."""

from __future__ import annotations

import filecmp
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.hf_models import configs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from flagscale.ckpt_convert.families import FAMILIES, Family
from flagscale.ckpt_convert.opening import open_hf
from flagscale.ckpt_convert.proof.claim import prove
from flagscale.ckpt_convert.to_hf import plan_export
from flagscale.ckpt_convert.to_megatron import plan_import
from flagscale.ckpt_copy.run import Copy, run
from flagscale.launch.options import known_options
from flagscale.optim.carry import Request
from flagscale.optim.opening import open_source

OURS = {"README.md", "flagscale.json", "integrity.json"}


@pytest.fixture(autouse=True)
def _no_progress_bar() -> None:
    logging.disable_progress_bar()


def written(copy: Copy, place: Path, claim: Any, tracker: str | None = None) -> Path:
    """Carry out a copy, and prove its weights."""

    def proved(staged: Path) -> None:
        prove(claim(staged), "weights")

    run(copy, place, tracker=tracker, prove=proved, workers=1)
    return place


def imported(hf_dir: Path, save_dir: Path, request: Request, **options: Any) -> Path:
    """A Hugging Face model as a Megatron checkpoint."""
    planned = plan_import(open_hf(hf_dir), request, known_options(), **options)
    written(planned.copy, save_dir / "release", planned.claim, "release")
    return save_dir


def exported(save_dir: Path, hf_dir: Path, **options: Any) -> Path:
    """A Megatron checkpoint as a Hugging Face model."""
    export = plan_export(open_source(save_dir, weights_only=True), **options)
    return written(export.copy, hf_dir, export.claim)


def layouts(draw: st.DrawFn, model: Any) -> tuple[Request, str]:
    """A layout that the model fits, and a format."""
    dims = model.source.job.model.dims
    ckpt_format = draw(st.sampled_from(["torch_dist", "torch"]))
    heads = dims.num_attention_heads
    sizes = {heads, dims.ffn_hidden_size, dims.moe_ffn_hidden_size or heads}
    sizes.add(dims.shared_expert_ffn_hidden_size or heads)
    if dims.latent:
        sizes |= {dims.latent.q_lora_rank or heads, dims.latent.kv_lora_rank}
        sizes.add(dims.latent.kv_lora_rank + dims.latent.qk_pos_emb_head_dim)
    else:  # with fewer groups than ranks, rows are divided in the middle of a group
        sizes.add((heads + 2 * dims.num_query_groups) * dims.head_dim)
    tp = draw(st.sampled_from([n for n in (1, 2, 3) if not any(size % n for size in sizes)]))
    if max(dims.num_query_groups, tp) % min(dims.num_query_groups, tp):
        tp = 1
    stages = [n for n in (1, 2, 3) if n <= dims.num_layers]
    pp = draw(st.sampled_from(stages))
    first = last = None
    if dims.num_layers % pp:  # whatever remains is divided between the stages in the middle
        first, last = (1, dims.num_layers - 1) if pp == 2 else (None, None)
        pp = pp if pp == 2 else 1
    experts = dims.num_experts or 1
    ep = draw(st.sampled_from([n for n in (1, 2) if experts % n == 0]))
    etp = 1 if ep > 1 else None
    return Request(
        tp, pp, ep_size=ep, etp_size=etp, first_layers=first, last_layers=last
    ), ckpt_format


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_there_and_back(family: Family) -> None:
    @settings(
        max_examples=8,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        config, _ = data.draw(configs(family))
        config.architectures = [family.architecture]
        shard = data.draw(st.sampled_from(["2KB", "20KB", "5GB"]), label="shard")
        divisible_by = data.draw(st.sampled_from([1, 4, 128]), label="divisible by")
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            torch.manual_seed(0)
            first = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            first.save_pretrained(work / "first")
            loaded = AutoModelForCausalLM.from_pretrained(work / "first", local_files_only=True)
            loaded.save_pretrained(work / "before", max_shard_size=shard)
            request, ckpt_format = data.draw(
                st.composite(layouts)(open_hf(work / "before")), label="layout"
            )
            imported(
                work / "before",
                work / "megatron",
                request,
                ckpt_format=ckpt_format,
                divisible_by=divisible_by,
            )
            exported(work / "megatron", work / "after", max_shard_size=shard)
            names = sorted(path.name for path in (work / "before").iterdir())
            after = sorted(path.name for path in (work / "after").iterdir())
            assert sorted({*after} - OURS) == names
            _, differ, absent = filecmp.cmpfiles(
                work / "before", work / "after", names, shallow=False
            )
            assert (differ, absent) == ([], [])

    check()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.fused], ids=lambda family: family.name)
@settings(max_examples=2, deadline=None)
@given(st.data())
def test_fused_experts_are_read(family: Family, data: st.DataObject) -> None:
    """As the model holds them in memory, so do some files; they become the same checkpoint."""
    config, _ = data.draw(configs(family))
    config.architectures = [family.architecture]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(work / "single")
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del state["lm_head.weight"]
        (work / "fused").mkdir()
        save_file(state, work / "fused" / "model.safetensors", {"format": "pt"})
        for name in ("config.json", "generation_config.json"):
            (work / "fused" / name).write_bytes((work / "single" / name).read_bytes())
        for name in ("single", "fused"):
            imported(work / name, work / f"{name}-mg", Request(), divisible_by=1)
            exported(work / f"{name}-mg", work / f"{name}-hf")
        with (
            safe_open(work / "single-hf" / "model.safetensors", "pt") as one,
            safe_open(work / "fused-hf" / "model.safetensors", "pt") as other,
        ):
            assert {*one.keys()} == {*other.keys()}
            for name in one.keys():  # noqa: SIM118 - not a mapping
                assert torch.equal(one.get_tensor(name), other.get_tensor(name)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_are_converted_as_torch_does(tmp_path: Path, dtype: str) -> None:
    config = {
        "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(tmp_path / "before")
    planned = plan_import(
        open_hf(tmp_path / "before", dtype), Request(tp_size=2), known_options(), divisible_by=1
    )
    written(planned.copy, tmp_path / "mg" / "release", planned.claim, "release")
    wider = {"bfloat16": "fp32", "float16": "as-saved", "float32": "bf16"}[dtype]
    exported(tmp_path / "mg", tmp_path / "after", dtype=wider)
    through = getattr(torch, dtype)
    last = {"fp32": torch.float32, "bf16": torch.bfloat16, "as-saved": through}[wider]
    with safe_open(tmp_path / "after" / "model.safetensors", "pt") as file:
        for name, tensor in model.state_dict().items():
            assert torch.equal(file.get_tensor(name), tensor.to(through).to(last)), name
