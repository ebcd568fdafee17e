"""The tables of model families, held to the models and files of transformers themselves."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from harness.hf_models import configs, fields_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging

from flagscale.ckpt_convert.families import (
    FAMILIES,
    Family,
    family_of_arguments,
    family_of_config,
    llama,
    named_family,
    qwen2,
    qwen3,
)
from flagscale.ckpt_convert.features import _NOT, _ON, Arguments, features
from flagscale.ckpt_convert.proof.transforms import cut, take
from flagscale.ckpt_convert.tensors import HFTensor, Part, Shape, Take, hf_tensors
from flagscale.errors import CheckpointError, ConfigError
from flagscale.launch.options import known_options
from flagscale.layout.model import canonical_tensors, model_spec
from flagscale.layout.rows import EMBEDDING, OUTPUT

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
few = settings(max_examples=10, deadline=None)
SEQUENCE = 16


@pytest.fixture(autouse=True)
def _no_progress_bar() -> None:
    logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------
# Models


def job_of(family: Family, config: PreTrainedConfig, pad: int = 0) -> dict[str, Any]:
    """The arguments of a job that trains such a model."""
    return family.arguments(config.to_dict()) | {
        "bf16": True,
        "seq_length": SEQUENCE,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size + pad,
    }


def shape_of(args: Mapping[str, Any]) -> Shape:
    return Shape.of(args, model_spec(args), args["vocab_size"])


def table(family: Family, shape: Shape) -> list[HFTensor]:
    return list(hf_tensors(family.rows, shape))


def saved(config: PreTrainedConfig) -> tuple[dict[str, str], dict[str, tuple[Any, str]]]:
    """File, and shape and type, of each tensor as transformers saves a model.

    Each tensor has a file of its own, but for experts, which are parts of one in memory: only so is
    their order seen.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as directory:
        # Only of a model that was loaded: types and the order of files become what they stay.
        model.save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        model.save_pretrained(directory, max_shard_size=1)
        index = json.loads((Path(directory) / "model.safetensors.index.json").read_text())
        found = {}
        for name, file in index["weight_map"].items():
            with safe_open(Path(directory) / file, "pt") as opened:
                tensor = opened.get_tensor(name)
                found[name] = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return index["weight_map"], found


@every_family
def test_names_shapes_and_order_are_those_of_a_saved_model(family: Family) -> None:
    @few
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        config, _ = data.draw(configs(family))
        files, found = saved(config)
        tensors = table(family, shape_of(job_of(family, config, pad=data.draw(st.integers(0, 9)))))
        assert {t.name: (t.shape, t.dtype or "bfloat16") for t in tensors} == found
        assert [*dict.fromkeys(files[t.name] for t in tensors)] == sorted({*files.values()})

    holds()


def test_a_head_size_that_the_class_of_qwen2_has_no_field_for_is_kept() -> None:
    config = CONFIG_MAPPING["qwen2"](
        hidden_size=12, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=8, head_dim=4,
    )  # fmt: skip
    args = job_of(qwen2.FAMILY, config)
    assert qwen2.FAMILY.config(Arguments(args))["head_dim"] == 4
    tensors = {tensor.name: tensor.shape for tensor in table(qwen2.FAMILY, shape_of(args))}
    assert tensors["model.layers.0.self_attn.q_proj.weight"] == (8, 12)
    assert tensors == {name: shape for name, (shape, _) in saved(config)[1].items()}


# ---------------------------------------------------------------------------------------------
# Parts and transforms


def strided(content: np.ndarray, part: Part) -> np.ndarray:
    """The place of a part in the elements of a Hugging Face tensor; bounds are checked."""
    steps = [step * content.itemsize for step in part.strides]
    start = part.offset * content.itemsize
    return np.ndarray(part.box.shape, content.dtype, content, start, steps)


def inside(part: Part) -> tuple[slice, ...]:
    return tuple(map(slice, part.box.offset, part.box.stop))


@st.composite
def shapes(draw: st.DrawFn, family: Family) -> tuple[Shape, bool]:
    """A model of a family; whether it is one whose rotary pairs are neighbours."""
    config, _ = draw(configs(family))
    shape = shape_of(job_of(family, config, pad=draw(st.integers(0, 9))))
    interleaved = "rotary_interleaved" in family.may and draw(st.booleans())
    return replace(shape, interleaved=interleaved), interleaved


@every_family
def test_parts_hold_every_element_once_and_pad_rows_never(family: Family) -> None:
    @few
    @given(shapes(family))
    def holds(drawn: tuple[Shape, bool]) -> None:
        shape, _ = drawn
        whole = canonical_tensors(shape.model)
        used = {name: np.zeros(tensor.shape, np.int32) for name, tensor in whole.items()}
        for tensor in table(family, shape):
            filled = np.zeros(prod(tensor.shape), np.int32)
            for part in tensor.parts:
                strided(filled, part)[...] += 1
                used[tensor.canonical][inside(part)] += 1
            assert (filled == 1).all(), tensor.name
        for name, count in used.items():
            if name in (EMBEDDING, OUTPUT):
                assert not count[shape.vocab_size :].any()
                count = count[: shape.vocab_size]
            assert (count == 1).all(), name

    holds()


@every_family
def test_parts_and_transforms_agree(family: Family) -> None:
    @few
    @given(shapes(family))
    def holds(drawn: tuple[Shape, bool]) -> None:
        shape, _ = drawn
        numbers = {
            name: torch.arange(prod(tensor.shape)).reshape(tensor.shape)
            for name, tensor in canonical_tensors(shape.model).items()
        }
        for tensor in table(family, shape):
            content = np.full(prod(tensor.shape), -1)
            for part in tensor.parts:
                strided(content, part)[...] = numbers[tensor.canonical].numpy()[inside(part)]
            expected = take(tensor, numbers[tensor.canonical], shape)
            assert torch.equal(torch.from_numpy(content).reshape(tensor.shape), expected)

    holds()


@every_family
def test_fused_files_hold_what_single_experts_do(family: Family) -> None:
    @few
    @given(configs(family))
    def holds(generated: tuple[PreTrainedConfig, dict[str, Any]]) -> None:
        config, _ = generated
        shape = shape_of(job_of(family, config))
        fused = {tensor.name: tensor for tensor in hf_tensors(family.fused, shape)}
        whole = canonical_tensors(shape.model)
        assert {t.canonical for t in table(family, shape) if t.expert is not None} <= {
            t.canonical for t in fused.values() if t.shape == whole[t.canonical].shape
        }
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(config).state_dict()
        assert {name: tensor.shape for name, tensor in fused.items()} == {
            name: tuple(state[name].shape) for name in fused
        }

    holds()


def test_every_way_to_take_is_known_to_the_transforms() -> None:
    shape = shape_of(job_of(llama.FAMILY, CONFIG_MAPPING["llama"](**TINY)))
    rows = 4 * 8 + 2 * 2 * 8
    for what in get_args(Take):
        assert len(cut(what, torch.arange(rows), shape)) > 0
    with pytest.raises(ConfigError, match="not known how a part"):
        cut("nothing", torch.arange(rows), shape)  # type: ignore[arg-type]


TINY = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 13,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Configurations


def texts(fields: Mapping[str, Any]) -> dict[str, str]:
    """Values as a file has them, where 1 is not 1.0."""
    return {field: json.dumps(value, sort_keys=True) for field, value in fields.items()}


@every_family
def test_a_configuration_comes_back_from_arguments(family: Family) -> None:
    @few
    @given(configs(family))
    def holds(generated: tuple[PreTrainedConfig, dict[str, Any]]) -> None:
        config, drawn = generated
        args = job_of(family, config)
        fields = family.config(Arguments(args))
        whole = {"vocab_size": config.vocab_size, **fields}
        again = AutoConfig.for_model(family.model_type, **whole)
        assert family.arguments(again.to_dict()) == family.arguments(config.to_dict())
        assert texts(drawn) == texts({field: again.to_dict()[field] for field in drawn})

    holds()


@every_family
def test_the_class_keeps_every_field_as_it_is_given(family: Family) -> None:
    @few
    @given(configs(family))
    def holds(generated: tuple[PreTrainedConfig, dict[str, Any]]) -> None:
        fields = family.config(Arguments(job_of(family, generated[0])))
        with tempfile.TemporaryDirectory() as name:
            first, second = Path(name) / "first", Path(name) / "second"
            AutoConfig.for_model(family.model_type, **fields).save_pretrained(first)
            AutoConfig.from_pretrained(first).save_pretrained(second)
            text = (first / "config.json").read_bytes()
            assert (second / "config.json").read_bytes() == text
        stored = json.loads(text)
        assert texts(fields) == texts({field: stored[field] for field in fields})

    holds()


def without_features(family: Family, args: Mapping[str, Any]) -> bool:
    """Whether nothing about a model tells that it is of this family, and not Llama."""
    return {*features(args)} <= llama.FAMILY.may


@every_family
def test_arguments_find_the_family_again(family: Family) -> None:
    @few
    @given(configs(family))
    def holds(generated: tuple[PreTrainedConfig, dict[str, Any]]) -> None:
        config, _ = generated
        args = job_of(family, config)
        assert family_of_arguments(args, family.name) is family
        expected = llama.FAMILY if without_features(family, args) else family
        assert family_of_arguments(args).name == expected.name
        config.architectures = [(*family.other_architectures, family.architecture)[0]]
        assert family_of_config(config.to_dict()).name == family.name

    holds()


def test_arguments_of_older_releases_have_upstreams_defaults() -> None:
    args = {
        "num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 12,
        "seq_length": 32, "normalization": "RMSNorm", "swiglu": True, "norm_epsilon": 1e-6,
        "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True,
    }  # fmt: skip
    family = family_of_arguments(args)
    assert family is llama.FAMILY
    assert family.config(Arguments(args)) == {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 4,
        "hidden_act": "silu",
        "hidden_size": 8,
        "initializer_range": 0.02,
        "intermediate_size": 12,
        "max_position_embeddings": 32,
        "mlp_bias": False,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
    }


def test_upstream_has_every_argument_by_which_features_are_told() -> None:
    known = known_options().defaults()
    assert {*_ON.values(), *(dest for dest, _ in _NOT.values())} <= known.keys()


# ---------------------------------------------------------------------------------------------
# What is refused


def tiny_job(**edits: Any) -> dict[str, Any]:
    return {**job_of(llama.FAMILY, CONFIG_MAPPING["llama"](**TINY)), **edits}


@pytest.mark.parametrize(
    ("edits", "where", "nearest"),
    [
        ({"qk_l2_norm": True}, "--qk-l2-norm", "llama"),
        ({"add_bias_linear": True}, "--add-bias-linear", "llama"),
        ({"normalization": "LayerNorm"}, "--normalization", "llama"),
        ({"swiglu": False}, "--swiglu", "llama"),
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type", "llama"),
        ({"add_qkv_bias": True, "softmax_type": "off-by-one"}, "--softmax-type", "qwen2"),
        ({"qk_layernorm": True, "rotary_interleaved": True}, "--rotary-interleaved", "qwen3"),
        ({"window_size": (7, 0), "rotary_percent": 0.5}, "--rotary-percent", "mistral"),
        ({"window_size": (7, 0), "window_attn_skip_freq": 2}, "--window-attn-skip-freq", "mistral"),
    ],
)  # fmt: skip
def test_an_unknown_model_is_told_by_its_arguments(
    edits: dict[str, Any], where: str, nearest: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        family_of_arguments(tiny_job(**edits))
    assert where in str(caught.value.where)
    assert f"{nearest}, the nearest" in str(caught.value.expected)
    assert {
        name for name in features(tiny_job(**edits)) if name not in str(caught.value.got)
    } == set()


def test_two_families_in_one_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match="of no family"):
        family_of_arguments(tiny_job(add_qkv_bias=True, qk_layernorm=True))
    with pytest.raises(CheckpointError, match="qwen3, the nearest, needs qk_norm"):
        family_of_arguments(tiny_job(), "qwen3")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        named_family("llama2")
    assert "llama, aquila, qwen2, qwen3, mistral" in str(caught.value.expected)
    with pytest.raises(CheckpointError) as error:
        family_of_config({"model_type": "aquila"})
    assert error.value.got == "'aquila'"
    assert "llama" in str(error.value.expected)


def test_aquila_is_told_by_the_name_of_its_class() -> None:
    for name, family in (("AquilaForCausalLM", "aquila"), ("LlamaForCausalLM", "llama")):
        assert family_of_config({"model_type": "llama", "architectures": [name]}).name == family
    assert family_of_config({"model_type": "llama"}).name == "llama"


@pytest.mark.parametrize(
    ("family", "edits", "where"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}},
         "rope_type"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 1.5}},
         "rope_type"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4 + 0.5, "rope_type": "default"}},
         "rope_theta"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default",
                                       "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {
            "rope_theta": 5e5, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, "factor"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
    ],
)  # fmt: skip
def test_what_megatron_does_not_have_is_refused(
    family: str, edits: dict[str, Any], where: str
) -> None:
    one = named_family(family)
    drawn = {key: value for key, value in TINY.items() if key in fields_of(one.model_type)}
    config = CONFIG_MAPPING[one.model_type](**drawn, max_position_embeddings=1 << 17).to_dict()
    one.arguments(config)
    with pytest.raises(CheckpointError) as caught:
        one.arguments(config | edits)
    assert where in str(caught.value.where)


@pytest.mark.parametrize(
    ("family", "edits", "where"),
    [
        ("llama", {"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "--rope-scaling-factor"),
        ("llama", {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2},
         "--rotary-seq-len-interpolation-factor"),
        ("llama", {"hidden_size": 30}, "--hidden-size"),
        ("mistral", {"window_size": (7, -1)}, "--window-size"),
        ("mistral", {"window_size": (-1, 0)}, "--window-size"),
    ],
)  # fmt: skip
def test_what_hugging_face_does_not_have_is_refused(
    family: str, edits: dict[str, Any], where: str
) -> None:
    one = named_family(family)
    one.config(Arguments(tiny_job()))
    with pytest.raises(CheckpointError) as caught:
        one.config(Arguments(tiny_job(**edits)))
    assert where in str(caught.value.where)


def test_upstream_still_takes_no_notice_of_the_factor_of_rope_scaling() -> None:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    source = Path(spec.submodule_search_locations[0]) / "training/argument_utils.py"
    text = source.read_text()
    assert 'kwargs["rope_scaling"] = args.use_rope_scaling' in text
    assert "rope_scaling_factor" not in text


def test_a_frequency_of_layers_without_a_window() -> None:
    edits = {"qk_layernorm": True, "num_layers": 4, "window_size": (7, 0)}
    config = qwen3.FAMILY.config(Arguments(tiny_job(**edits, window_attn_skip_freq=2)))
    full, window = "full_attention", "sliding_attention"
    assert config["layer_types"] == [window, full, window, full]
    assert (config["sliding_window"], config["max_window_layers"]) == (8, 0)
    args = qwen3.FAMILY.arguments(CONFIG_MAPPING["qwen3"](**config).to_dict())
    assert (args["window_size"], args["window_attn_skip_freq"]) == ((7, 0), [1, 0, 1, 0])


# ---------------------------------------------------------------------------------------------
# Against upstream's own arithmetic


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_positions_are_upstreams(rope: dict[str, Any]) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = CONFIG_MAPPING["llama"](
        **TINY | {"head_dim": 64}, max_position_embeddings=1 << 17, rope_parameters=rope
    )
    args = Arguments(llama.FAMILY.arguments(config.to_dict()))
    theirs = RotaryEmbedding(
        args["kv_channels"],
        args["rotary_percent"],
        seq_len_interpolation_factor=args["rotary_seq_len_interpolation_factor"],
        rotary_base=args["rotary_base"],
        rope_scaling=args["use_rope_scaling"],
        use_cpu_initialization=True,
    )
    positions = torch.arange(9000, 9000 + SEQUENCE)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    freqs = theirs.get_freqs_non_repeated(SEQUENCE, 9000)
    torch.testing.assert_close(freqs.cos(), cos[0, :, :32], rtol=0, atol=2e-3)
    torch.testing.assert_close(freqs.sin(), sin[0, :, :32], rtol=0, atol=2e-3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_of_queries_and_keys_are_upstreams(interleaved: bool) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = CONFIG_MAPPING["llama"](**TINY)
    args = job_of(llama.FAMILY, config) | {"rotary_interleaved": interleaved}
    shape = shape_of(args)
    tensors = {tensor.name: tensor for tensor in table(llama.FAMILY, shape)}
    torch.manual_seed(0)
    hidden, qkv = torch.randn(SEQUENCE, 32), torch.randn(64, 32)

    # Upstream: [sequence, batch, heads, head_dim], a group's queries before its key.
    groups = (hidden @ qkv.T).view(SEQUENCE, 2, 4, 8)
    inv_freq = 10000 ** (-torch.arange(0, 8, 2) / 8)
    angles = torch.arange(SEQUENCE)[:, None] * inv_freq
    angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)

    def rotated(heads: torch.Tensor) -> torch.Tensor:
        heads = heads.reshape(SEQUENCE, 1, -1, 8)
        return _apply_rotary_pos_emb_bshd(heads, angles[:, None, None], interleaved)[:, 0]

    query, key = rotated(groups[:, :, :2]), rotated(groups[:, :, 2:3])
    expected = torch.einsum("shd,thd->hst", query, key.repeat_interleave(2, 1))

    # transformers: [batch, heads, sequence, head_dim].
    def projected(name: str) -> torch.Tensor:
        weight = take(tensors[f"model.layers.0.self_attn.{name}.weight"], qkv, shape)
        return (hidden @ weight.T).view(1, SEQUENCE, -1, 8).transpose(1, 2)

    cos, sin = LlamaRotaryEmbedding(config)(hidden, torch.arange(SEQUENCE)[None])
    query, key = apply_rotary_pos_emb(projected("q_proj"), projected("k_proj"), cos, sin)
    got = (query @ key.repeat_interleave(2, 1).transpose(2, 3))[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("window", [1, 2, 5, SEQUENCE])
def test_a_window_masks_what_it_masks_upstream(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer import utils
    from transformers.masking_utils import sliding_window_causal_mask_function

    drawn = {key: value for key, value in TINY.items() if key in fields_of("mistral")}
    config = CONFIG_MAPPING["mistral"](**drawn, sliding_window=window)
    args = job_of(named_family("mistral"), config)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *a, device, **k: ones(*a, **k))  # no GPU here
    masked = utils.get_sliding_window_causal_mask(SEQUENCE, SEQUENCE, args["window_size"])
    monkeypatch.undo()
    seen = sliding_window_causal_mask_function(window)
    row, column = torch.arange(SEQUENCE)[:, None], torch.arange(SEQUENCE)[None]
    assert torch.equal(~masked, seen(0, 0, row, column))
