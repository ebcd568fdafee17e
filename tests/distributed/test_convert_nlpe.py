"""A model trained with a method for far keys, converted: the same numbers, beyond its length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import train
from harness.conversion import convert
from harness.corpus import VOCAB_SIZE, model_argv
from harness.hf_decoding import decoded, left_padded, logits_of
from transformers import AutoModelForCausalLM

from flagattention.hf import IMPLEMENTATION, ROPE_TYPE
from flagscale.ckpt_convert.opening import open_hf
from flagscale.ckpt_convert.to_megatron import plan_import
from flagscale.launch.options import known_options
from flagscale.optim.carry import Request

LENGTH = 64
METHOD = {"nlpe_method": "rerope", "nlpe_window": 12, "nlpe_log_length": 20}


@pytest.fixture(scope="module")
def converted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The Hugging Face directory, and what was proved of it on the way."""
    work = tmp_path_factory.mktemp("nlpe")
    argv = model_argv(
        corpus, save=work / "megatron", save_interval=3, train_iters=3, lr=1e-2, seq_length=LENGTH,
        init_method_std=0.1, rotary_seq_len_interpolation_factor=2, **METHOD,
    )  # fmt: skip
    train(argv, work / "logs", 1).require_success()
    _, proof = convert(work / "megatron", work / "hf", level="auto", dtype="fp32")
    return work / "hf", proof


@pytest.fixture(scope="module")
def model(converted: tuple[Path, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(converted[0], dtype=torch.float32).eval()


def tokens(*shape: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(1, VOCAB_SIZE, shape)


def test_megatron_and_transformers_give_the_same_logits(converted: tuple[Path, Any]) -> None:
    parity = converted[1].parities[0]
    assert parity.dtype == "float32"
    assert parity.passed, "\n".join(parity.report())
    assert parity.relative < 2e-6
    assert parity.logit_range > 1


def test_the_settings_are_in_the_configuration(converted: tuple[Path, Any], model: Any) -> None:
    rope = json.loads((converted[0] / "config.json").read_text())["rope_parameters"]
    assert rope == {
        "rope_type": ROPE_TYPE, "rope_theta": 10000.0, "method": "rerope", "window": 12,
        "log_length": 20, "scaling": {"rope_type": "linear", "factor": 2.0},
    }  # fmt: skip
    assert model.config._attn_implementation == IMPLEMENTATION


def test_a_text_four_times_as_long(model: Any) -> None:
    ids = tokens(2, 4 * LENGTH)
    whole = logits_of(model, ids)
    assert (decoded(model, ids, 4 * LENGTH - 10) - whole).abs().max() <= 1e-5
    model.config.max_position_embeddings = 4 * LENGTH  # or transformers warns
    # A stop that no token is, so that the text becomes that long.
    options = {"max_new_tokens": 4 * LENGTH - 40, "do_sample": False, "eos_token_id": -1}
    found = model.generate(ids[:1, :40], attention_mask=torch.ones(1, 40).long(), **options)
    assert found.shape == (1, 4 * LENGTH)
    wanted = logits_of(model, found)[0, 39:-1]
    chosen = wanted.gather(1, found[0, 40:, None])[:, 0]
    assert (wanted.amax(1) - chosen).max() <= 1e-5


def test_a_left_padded_batch_is_each_row_alone(model: Any) -> None:
    ids, mask = left_padded(tokens(3, 2 * LENGTH), (0, 37, 100))
    found = decoded(model, ids, 2 * LENGTH - 10, mask)
    for row in range(3):
        alone = ids[row, mask[row].bool()][None]
        wanted = decoded(model, alone, alone.shape[1] - 10)[0]
        assert (found[row, mask[row].bool()] - wanted).abs().max() <= 1e-5


def test_the_way_back_has_the_arguments(converted: tuple[Path, Any]) -> None:
    planned = plan_import(open_hf(converted[0]), Request(), known_options())
    told = {name.replace("_", "-"): value for name, value in METHOD.items()}
    assert {key: planned.section.get(key) for key in told} == told
    assert planned.section["rotary-seq-len-interpolation-factor"] == 2
