"""A model of transformers that reads with a method: what it gives, and that no other process may.

No CPU patches of ours are active here: these are transformers' own models.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.hf_decoding import decoded, left_padded, logits_of
from harness.nlpe_scores import by_distances
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    StaticCache,
)

from flagattention import AttentionError, hf
from flagattention.hf_rope import frequencies, settings_of
from flagattention.nlpe import Method, Rotary

METHODS = {
    "rerope": Method("rerope", 12),
    "leaky-rerope": Method("leaky-rerope", 12, leak=3.5),
    "self-extend": Method("self-extend", 12, group=4),
    "streaming": Method("streaming", 12, n_sink=3),
    "logarithm": Method("rerope", 12, log_length=20),
}
DEFAULT = {"rope_theta": 10000.0, "rope_type": "default"}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
TRAINED = 32


def config_of(model_type: str, rope: dict[str, Any] | None, **changes: Any) -> Any:
    experts = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 48}
    fields: dict[str, Any] = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None,
        "max_position_embeddings": TRAINED, "rope_parameters": rope, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None, "num_experts_per_tok": 2, "initializer_range": 0.1,
        **(experts if model_type in ("mixtral", "qwen3_moe") else {}),
    }  # fmt: skip
    return AutoConfig.for_model(model_type, **fields | changes)


def model_of(model_type: str, rope: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(model_type, rope), **options).eval()


def nlpe_model(method: Method, model_type: str = "llama", **scaling: Any) -> Any:
    return model_of(model_type, hf.rope_parameters(method, {**DEFAULT, **scaling}))


def tokens(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(2, 96, shape)


@pytest.mark.parametrize("model_type", hf.MODEL_TYPES)
def test_a_window_beyond_the_text_is_the_stock_model(model_type: str) -> None:
    ids = tokens(2, 40)
    stock = model_of(model_type, dict(DEFAULT), attn_implementation="sdpa")
    wide = nlpe_model(Method("rerope", 40), model_type)
    assert wide.config._attn_implementation == hf.IMPLEMENTATION
    wanted = logits_of(stock, ids)
    torch.testing.assert_close(logits_of(wide, ids), wanted, atol=1e-5, rtol=0)
    narrow = logits_of(nlpe_model(Method("rerope", 12), model_type), ids)
    torch.testing.assert_close(narrow[:, :13], wanted[:, :13], atol=1e-5, rtol=0)
    assert (narrow[:, 13:] - wanted[:, 13:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_the_model_attends_by_the_distances(method: Method, scaling: dict[str, Any]) -> None:
    rope = {**DEFAULT, **scaling}
    stock = model_of("llama", dict(rope), attn_implementation="sdpa")
    embedding = stock.model.rotary_emb
    rotary = Rotary(embedding.inv_freq, attention_scaling=embedding.attention_scaling)

    def truth(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Takes the rotation of the stock model back, as complex numbers."""
        angle = torch.arange(query.shape[2]).unsqueeze(1) * rotary.inv_freq.double()
        back = torch.polar(torch.full_like(angle, 1 / rotary.attention_scaling), -angle)
        plain = []
        for x in (query.double(), key.double()):
            a, b = x.chunk(2, -1)
            turned = torch.complex(a, b) * back
            plain.append(torch.cat((turned.real, turned.imag), -1))
        out, _ = by_distances(plain[0], plain[1], value.double(), method, rotary, 0)
        return out.transpose(1, 2).to(query.dtype), None

    AttentionInterface.register("truth_of_a_test", truth)
    stock.set_attn_implementation("truth_of_a_test")
    ids = tokens(2, 48)
    found = logits_of(nlpe_model(method, **scaling), ids)
    torch.testing.assert_close(found, logits_of(stock, ids), atol=2e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_cached_decoding_is_prefill(method: Method, model_type: str) -> None:
    model, ids = nlpe_model(method, model_type), tokens(2, 40)
    whole = logits_of(model, ids)
    for n_first in (1, 30):
        assert (decoded(model, ids, n_first) - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_left_padded_batch_is_each_row_alone(method: Method, model_type: str) -> None:
    model, n_first, n_steps = nlpe_model(method, model_type), 40, 10
    ids, mask = left_padded(tokens(4, n_first + n_steps), (0, 5, 25, 39))
    found = decoded(model, ids, n_first, mask)
    # A caller who tells no positions gets those of all places, padding included.
    placed = logits_of(model, ids, attention_mask=mask)
    for row in range(4):
        kept = mask[row].bool()
        alone = ids[row, kept][None]
        n_alone = alone.shape[1] - n_steps
        assert (found[row, kept] - decoded(model, alone, n_alone)[0]).abs().max() <= 1e-5
        assert (placed[row, kept] - logits_of(model, alone)[0]).abs().max() <= 1e-5


def test_padding_behind_the_tokens() -> None:
    model, ids, lengths = nlpe_model(METHODS["streaming"]), tokens(3, 40), (40, 17, 30)
    mask = torch.stack([(torch.arange(40) < length).long() for length in lengths])
    found = logits_of(model, ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = logits_of(model, ids[row : row + 1, :length])
        torch.testing.assert_close(found[row, :length], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_generates_four_times_the_trained_length(model_type: str) -> None:
    model = nlpe_model(Method("rerope", TRAINED // 2), model_type)
    model.config.max_position_embeddings = 4 * TRAINED  # or transformers warns
    ids, mask = left_padded(tokens(2, 24), (0, 9))
    options = {"max_new_tokens": 4 * TRAINED - 24, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, **options)
    assert found.shape == (2, 4 * TRAINED)
    alone = model.generate(ids[1:, 9:], **options)
    assert torch.equal(found[1, 9:], alone[0])
    # Each token is the one that a pass over the whole text gives.
    whole = logits_of(model, found[:1])[0]
    assert torch.equal(whole[23:-1].argmax(-1), found[0, 24:])


def test_a_padded_batch_can_be_trained() -> None:
    model, ids = nlpe_model(METHODS["rerope"]), tokens(2, 30)
    model.train()
    mask = torch.ones_like(ids)
    mask[1, :14] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 14] = -100  # padding would have to foretell it
    model(ids * mask, attention_mask=mask, labels=labels).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    # The mean is over the labels of both rows.
    sums = [
        model(row[None], labels=row[None]).loss * (len(row) - 1) for row in (ids[0], ids[1, 14:])
    ]
    (sum(sums) / (29 + 15)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)


# Settings and their way through files.


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_a_saved_model_is_the_same_model(
    method: Method, scaling: dict[str, Any], tmp_path: Path
) -> None:
    model, ids = nlpe_model(method, **scaling), tokens(1, 40)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["rope_parameters"]["rope_type"] == hf.ROPE_TYPE
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == hf.IMPLEMENTATION
    assert settings_of(again.config, ids.device).method == method
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_are_the_stock_models(scaling: dict[str, Any]) -> None:
    stock = model_of("llama", {**DEFAULT, **scaling}).model.rotary_emb
    inv_freq, factor = frequencies(nlpe_model(METHODS["rerope"], **scaling).config)
    assert torch.equal(inv_freq, stock.inv_freq)
    assert factor == stock.attention_scaling


def test_settings_may_change_and_be_copied() -> None:
    model, ids = nlpe_model(METHODS["rerope"]), tokens(1, 40)
    narrow = logits_of(model, ids)
    other = copy.deepcopy(model)
    other.config.rope_parameters["window"] = 40
    assert torch.equal(logits_of(model, ids), narrow)
    assert (logits_of(other, ids) - narrow).abs().max() > 1e-3


LOADS = """
import sys
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

transformers.logging.set_verbosity_error()
*directories, again = sys.argv[1:]
AutoConfig.from_pretrained(directories[0]).save_pretrained(again)

def tried():
    for directory in (*directories, again):
        for loader in (AutoModelForCausalLM, LlamaForCausalLM):
            for options in ({}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}):
                try:
                    loader.from_pretrained(directory, **options)
                    print("loaded", sorted(options.values()))
                except Exception as error:
                    print(type(error).__name__, str(error).splitlines()[0])

tried()
print("now with our module")
import flagattention.hf
tried()
"""


def test_a_process_without_our_module_loads_no_such_model(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    nlpe_model(METHODS["rerope"]).save_pretrained(first)
    AutoModelForCausalLM.from_pretrained(first).save_pretrained(second)
    third.mkdir()
    shutil.copy(first / "model.safetensors", third)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, first, second, third],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    without, _, within = done.stdout.partition("now with our module\n")
    assert without.splitlines() == [f"KeyError '{hf.ROPE_TYPE}'"] * 18
    refused = "BackendError the model's far keys need an attention of their own"
    assert within.splitlines() == ["loaded []", refused, refused] * 6


# What is refused.


@pytest.mark.parametrize("other", ["sdpa", "eager", "flex_attention"])
def test_another_attention_is_refused(other: str) -> None:
    rope = hf.rope_parameters(METHODS["rerope"], DEFAULT)
    with pytest.raises(AttentionError, match="attention of their own"):
        model_of("llama", rope, attn_implementation=other)
    model, ids = nlpe_model(METHODS["rerope"]), tokens(1, 20)
    model.set_attn_implementation(other)
    with pytest.raises(AttentionError, match="attention of their own"):
        logits_of(model, ids)
    model.set_attn_implementation(hf.IMPLEMENTATION)
    logits_of(model, ids)


def test_a_model_without_a_method_is_left_alone() -> None:
    ids = tokens(1, 20)
    for implementation in ("sdpa", "eager"):
        logits_of(model_of("llama", dict(DEFAULT), attn_implementation=implementation), ids)
    plain = model_of("llama", dict(DEFAULT), attn_implementation=hf.IMPLEMENTATION)
    with pytest.raises(AttentionError, match="needs settings of a method"):
        logits_of(plain, ids)


@pytest.mark.parametrize(
    "positions",
    [
        [0, 1, 2, 4, 5, 6], [0, 1, 2, 0, 1, 2], [1, 2, 3, 4, 5, 6], [5, 4, 3, 2, 1, 0],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_positions_that_are_not_consecutive(positions: list[int], masked: bool) -> None:
    model, ids = nlpe_model(METHODS["rerope"]), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    options = {"attention_mask": mask} if masked else {}
    with pytest.raises(AttentionError, match=r"consecutive|only a causal mask") as caught:
        logits_of(model, ids, position_ids=torch.tensor([positions]), **options)
    assert caught.value.where is not None
    assert "position_ids" in caught.value.where


@torch.no_grad()
def test_positions_that_do_not_go_on_from_the_cache() -> None:
    model, ids = nlpe_model(METHODS["rerope"]), tokens(1, 20)
    for wrong in (9, 11):
        cache = model(ids[:, :10]).past_key_values
        with pytest.raises(AttentionError, match="not consecutive"):
            model(ids[:, 10:11], past_key_values=cache, position_ids=torch.tensor([[wrong]]))


@torch.no_grad()
def test_masks_and_caches_refused() -> None:
    model, ids = nlpe_model(METHODS["rerope"]), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    with pytest.raises(AttentionError, match="do not follow each other"):
        model(ids, attention_mask=mask)
    with pytest.raises(AttentionError, match="mask of the caller's own"):
        model(ids, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(AttentionError, match="cache cannot be served"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_what_the_model_may_not_ask_for() -> None:
    rope = hf.rope_parameters(METHODS["rerope"], DEFAULT)
    ids = tokens(1, 8)
    torch.manual_seed(0)
    sliding = AutoModelForCausalLM.from_config(config_of("mistral", rope, sliding_window=4))
    with pytest.raises(AttentionError, match="only a causal mask"):
        logits_of(sliding, ids)
    dropping = AutoModelForCausalLM.from_config(config_of("llama", rope, attention_dropout=0.1))
    logits_of(dropping.eval(), ids)
    with pytest.raises(AttentionError, match="does not do what the model asks for") as caught:
        logits_of(dropping.train(), ids)
    assert caught.value.where == "dropout"
    model = nlpe_model(METHODS["rerope"])
    layer = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    for name, value in (
        ("softcap", 30.0), ("s_aux", torch.ones(4)), ("sliding_window", 4), ("is_causal", False),
        ("cache", object()), ("position_bias", torch.ones(3)),
    ):  # fmt: skip
        with pytest.raises(AttentionError, match="does not do what the model asks for") as caught:
            hf.attention(layer, query, key, key, None, **{name: value})
        assert caught.value.where == name
    with pytest.raises(AttentionError, match="does not tell its positions"):
        hf.attention(layer, query, key, key, None)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"method": "nlpe"}, "there is no such method"),
        ({"method": None}, "there is no such method"),
        ({"window": None}, "window is missing"),
        ({"window": "12"}, "window is out of range"),
        ({"leak": 2.0}, "does not use leak"),
        ({"windows": 3}, "a setting that no method has"),
        ({"scaling": {"rope_type": "dynamic", "factor": 2.0}}, "cannot be combined"),
        ({"scaling": {"rope_type": "longrope"}}, "cannot be combined"),
        ({"scaling": {"rope_type": "linear"}}, "Missing required keys"),
    ],
    ids=str,
)
def test_settings_refused(change: dict[str, Any], what: str) -> None:
    rope = hf.rope_parameters(METHODS["rerope"], DEFAULT) | change
    with pytest.raises(Exception, match=what):
        config_of("llama", rope)


def test_models_that_may_rotate_otherwise_are_refused() -> None:
    rope = hf.rope_parameters(METHODS["rerope"], DEFAULT)
    for model_type in ("cohere", "glm"):
        with pytest.raises(Exception, match="not known how this type of model rotates"):
            config_of(model_type, dict(rope))


def test_rope_parameters_keep_what_is_below() -> None:
    method = Method("leaky-rerope", 8, leak=2.0, log_length=16)
    below = SCALINGS["yarn"]
    assert hf.rope_parameters(method, {"rope_theta": 5e5, **below}) == {
        "rope_type": "flagattention_nlpe", "rope_theta": 5e5, "method": "leaky-rerope",
        "window": 8, "leak": 2.0, "log_length": 16, "scaling": below,
    }  # fmt: skip
    assert "scaling" not in hf.rope_parameters(method, DEFAULT)
