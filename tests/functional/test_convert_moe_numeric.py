"""Families with experts: transformers' model computes what upstream's does, from the tables alone.

No training and no checkpoint: random weights of upstream's model are cut as the rows say, saved,
and loaded by transformers with the configuration that the arguments make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.corpus import VOCAB_SIZE
from harness.families import megatron_words
from harness.upstream_logits import random_models
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from flagscale.ckpt_convert.families import Family, family_of_arguments
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.proof.transforms import take
from flagscale.ckpt_convert.tensors import Shape, hf_tensors
from flagscale.layout.model import canonical_shapes, model_spec

_YARN = "--rope-type yarn --max-position-embeddings 4096 --rotary-scaling-factor"

CASES = {
    "mixtral": "",
    "mixtral-window": "--moe-router-topk 3 --kv-channels 32 --window-size 7,0 --rotary-interleaved",
    "mixtral-tied": "--num-query-groups 4",
    "qwen3_moe": "",
    "qwen3_moe-not-normalized": "--moe-router-pre-softmax --moe-layer-freq 2 --window-size 9,0",
    "qwen3_moe-one-expert": "--moe-router-pre-softmax --moe-router-topk 1 --moe-layer-freq 1",
    "deepseek_v2": "",
    "deepseek_v2-groups": "--num-experts 12 --moe-router-topk 3 --moe-router-num-groups 4 "
    "--moe-router-group-topk 2 --moe-router-topk-scaling-factor 1.7 --moe-layer-freq 1",
    "deepseek_v2-yarn": f"{_YARN} 40 --mscale 0.707 --mscale-all-dim 0.707",
    "deepseek_v2-one-scale": f"{_YARN} 8 --mscale 1.3 --moe-layer-freq [0,0,1,1]",
    "deepseek_v3": "",
    "deepseek_v3-no-groups": "--moe-router-num-groups 0 --moe-router-group-topk 0 "
    "--moe-router-topk 3 --rope-type rope --rotary-scaling-factor 1 --mscale-all-dim 0",
    "deepseek_v3-groups": f"{_YARN} 40 --moe-router-topk 5 --moe-router-num-groups 8 "
    "--moe-router-topk-scaling-factor 1 --mscale 0.5 --mscale-all-dim 1.3",
    "deepseek_v3-one-expert": "--moe-router-num-groups 0 --moe-router-group-topk 0 "
    f"--moe-router-topk 1 {_YARN} 40 --mscale 0 --mscale-all-dim 1",
}
"""Words beside those of the family that the name begins with."""

Models = dict[str, dict[str, Any]]


def words(case: str) -> list[str]:
    line = [*megatron_words(case.split("-")[0]), *CASES[case].split()]
    dropped = {"--bf16"}
    if case.endswith("tied"):
        dropped.add("--untie-embeddings-and-output-weights")
    return [word for word in line if word not in dropped]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Every case's arguments, tensors and logits."""
    tokens = torch.randint(0, VOCAB_SIZE, (2, 48), generator=torch.Generator().manual_seed(1))
    work = tmp_path_factory.mktemp("upstream")
    found = random_models({case: words(case) for case in CASES}, tokens, work)
    return {case: {**model, "tokens": tokens} for case, model in found.items()}


def export(model: Mapping[str, Any], family: Family, directory: Path) -> None:
    args, spec = model["args"], model_spec(model["args"])
    assert {name: tuple(t.shape) for name, t in model["tensors"].items()} == canonical_shapes(spec)
    shape = Shape.of(args, spec, VOCAB_SIZE)
    tensors = {
        one.name: take(one, model["tensors"][one.canonical], shape).contiguous()
        for one in hf_tensors(family.rows, shape)
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fields = {
        **family.config(Arguments(args)),
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": VOCAB_SIZE,
    }
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_upstreams(case: str, models: Models, tmp_path: Path) -> None:
    model = models[case]
    family = family_of_arguments(model["args"])
    assert family.name == case.split("-")[0]
    export(model, family, tmp_path / "hf")
    loaded, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf",
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    assert not any(told.values()), told
    with torch.no_grad():
        logits = loaded.eval()(input_ids=model["tokens"], use_cache=False).logits
    expected = model["logits"][..., :VOCAB_SIZE]
    spread = expected.max() - expected.min()
    assert spread > 1
    assert (logits - expected).abs().max() <= 1e-5 * spread
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
