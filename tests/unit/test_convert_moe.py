"""Families with experts: their routers and positions are upstream's, their files transformers'.

What all families have in common is held in ``test_convert_tables.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3TopkRouter,
    yarn_apply_mscale,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from flagscale.ckpt_convert.families import named_family
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.tensors import Row, Shape, hf_tensors
from flagscale.ckpt_io.safetensors_plan import PlannedTensor, plan_files
from flagscale.errors import CheckpointError
from flagscale.layout.model import model_spec

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        YarnRotaryEmbedding,
        _yarn_get_mscale,
    )
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

ROUTERS = {
    "mixtral": MixtralTopKRouter,
    "qwen3_moe": Qwen3MoeTopKRouter,
    "deepseek_v2": DeepseekV2TopkRouter,
    "deepseek_v3": DeepseekV3TopkRouter,
}
every_family = pytest.mark.parametrize("name", ROUTERS)
TOKENS = 32

DENSE = {
    "num_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 1,
    "group_query_attention": True, "ffn_hidden_size": 12, "kv_channels": 4,
    "max_position_embeddings": 64, "seq_length": 64, "padded_vocab_size": 32, "swiglu": True,
    "normalization": "RMSNorm", "layernorm_epsilon": 1e-6, "position_embedding_type": "rope",
    "rotary_base": 10000, "rotary_percent": 1.0, "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.02, "num_experts": 8, "moe_ffn_hidden_size": 6, "moe_layer_freq": 1,
    "moe_router_topk": 2, "moe_router_score_function": "softmax",
    "moe_router_load_balancing_type": "aux_loss",
}  # fmt: skip
LATENT = {
    **DENSE, "group_query_attention": False, "num_query_groups": 1, "qk_layernorm": True,
    "multi_latent_attention": True, "q_lora_rank": 5, "kv_lora_rank": 6, "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 8, "v_head_dim": 3, "rope_type": "rope", "rotary_scaling_factor": 1.0,
    "mscale": 1.0, "mscale_all_dim": 0.0, "moe_shared_expert_intermediate_size": 12,
}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {
    "mixtral": DENSE,
    "qwen3_moe": {**DENSE, "qk_layernorm": True},
    "deepseek_v2": {**LATENT, "moe_router_pre_softmax": True},
    "deepseek_v3": {
        **LATENT,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}


def config_of(name: str, **edits: Any) -> PreTrainedConfig:
    """What a job of the family becomes."""
    fields = named_family(name).config(Arguments(JOBS[name] | edits))
    return CONFIG_MAPPING[name](vocab_size=30, **fields)


# ---------------------------------------------------------------------------------------------
# Routers


@st.composite
def routings(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Arguments of routers that can be converted."""
    topk = draw(st.integers(2 if name == "mixtral" else 1, 6))
    found: dict[str, Any] = {"moe_router_topk": topk, "num_experts": draw(st.sampled_from([8, 24]))}
    if name == "qwen3_moe":
        found["moe_router_pre_softmax"] = topk == 1 or draw(st.booleans())
    if "deepseek" in name:
        scales = st.sampled_from([None, 1.0, 2.5, 0.3])
        found["moe_router_topk_scaling_factor"] = draw(scales)
        of_a_group = 2 if name == "deepseek_v3" else 1
        chosen = [n for n in (1, 2, 3, 4) if topk // n == of_a_group]
        if chosen and draw(st.booleans()):
            found["moe_router_num_groups"] = 4
            found["moe_router_group_topk"] = draw(st.sampled_from(chosen))
            found["num_experts"] = 24  # so that the chosen groups hold enough
    return found


def upstreams(args: Mapping[str, Any], logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[tokens, experts]: weights by upstream's router."""
    probs, _ = topk_routing_with_score_function(
        logits,
        args["moe_router_topk"],
        use_pre_softmax=args["moe_router_pre_softmax"],
        num_groups=args["moe_router_num_groups"],
        group_topk=args["moe_router_group_topk"],
        scaling_factor=args["moe_router_topk_scaling_factor"],
        score_function=args["moe_router_score_function"],
        expert_bias=bias if args["moe_router_enable_expert_bias"] else None,
    )
    return probs


def transformers_weights(
    name: str, config: PreTrainedConfig, logits: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """[tokens, experts]: weights by transformers' router, whose hidden states are the logits."""
    experts = logits.shape[1]
    config.hidden_size = experts
    router = ROUTERS[name](config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
        if name == "deepseek_v3":
            router.e_score_correction_bias.copy_(bias)
        _, weights, chosen = router(logits)
    return torch.zeros_like(logits).scatter(1, chosen, weights)


@every_family
def test_routers_give_the_weights_of_upstreams(name: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(routings(name), st.integers(0, 1 << 20))
    def holds(routing: dict[str, Any], seed: int) -> None:
        args = Arguments(JOBS[name] | routing)
        config = config_of(name, **routing)
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(TOKENS, args["num_experts"], generator=generator) * 2
        bias = torch.randn(args["num_experts"], generator=generator) * 0.3
        expected = upstreams(args, logits, bias)
        got = transformers_weights(name, config, logits, bias)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

        again = Arguments(named_family(name).arguments(config.to_dict()))
        assert torch.equal(upstreams(again, logits, bias), expected)

    holds()


def test_groups_that_are_refused_would_be_others_upstream() -> None:
    """DeepSeek-V2 itself: 6 experts of 3 of 8 groups."""
    routing = {
        "num_experts": 160, "moe_router_topk": 6, "moe_router_num_groups": 8,
        "moe_router_group_topk": 3,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="other groups"):
        config_of("deepseek_v2", **routing)
    config = config_of("deepseek_v2", num_experts=160, moe_router_topk=6)
    config.update({"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"})
    logits, bias = torch.randn(TOKENS, 160), torch.zeros(160)
    theirs = upstreams(Arguments(JOBS["deepseek_v2"] | routing), logits, bias)
    assert not torch.allclose(theirs, transformers_weights("deepseek_v2", config, logits, bias))
    with pytest.raises(CheckpointError, match="other groups"):
        named_family("deepseek_v2").arguments(config.to_dict())


# ---------------------------------------------------------------------------------------------
# Positions of latent attention


YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 4096,
}  # fmt: skip


@st.composite
def yarn_arguments(draw: st.DrawFn) -> dict[str, Any]:
    scales = st.sampled_from([0.0, 0.5, 0.707, 1.0, 1.3])
    return {
        "rope_type": draw(st.sampled_from(["yarn", None])),
        "rotary_base": draw(st.sampled_from([10000, 50000, 1000000])),
        "rotary_scaling_factor": draw(st.sampled_from([1.0, 4.0, 32.0, 40.0])),
        "mscale": draw(scales),
        "mscale_all_dim": draw(scales),
        "max_position_embeddings": draw(st.sampled_from([64, 4096, 163840])),
        "qk_pos_emb_head_dim": draw(st.sampled_from([8, 64])),
    }


def upstreams_yarn(args: Mapping[str, Any]) -> tuple[torch.Tensor, float, float]:
    """Angles of position 1, the factor of sines and cosines, the scale of scores."""
    with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
        return _upstreams_yarn(args)


def _upstreams_yarn(args: Mapping[str, Any]) -> tuple[torch.Tensor, float, float]:
    rotary = YarnRotaryEmbedding(
        args["qk_pos_emb_head_dim"],
        rotary_base=args["rotary_base"],
        scaling_factor=args["rotary_scaling_factor"],
        original_max_position_embeddings=4096,
        mscale=args["mscale"],
        mscale_all_dim=args["mscale_all_dim"],
        use_cpu_initialization=True,
    )
    angles, factor = rotary.get_emb(2)
    size = args["qk_head_dim"] + args["qk_pos_emb_head_dim"]
    scale = _yarn_get_mscale(args["rotary_scaling_factor"], args["mscale_all_dim"]) ** 2
    return angles[1, 0, 0, : args["qk_pos_emb_head_dim"] // 2], factor, scale * size**-0.5


def transformers_yarn(config: PreTrainedConfig) -> tuple[torch.Tensor, float, float]:
    scale = yarn_apply_mscale(config.rope_parameters, config.qk_head_dim**-0.5)
    if config.rope_parameters["rope_type"] == "default":
        steps = torch.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim
        return config.rope_parameters["rope_theta"] ** -steps, 1.0, scale
    return *ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu")), scale


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What transformers has to say about a configuration."""
    from transformers import modeling_rope_utils

    found: list[str] = []
    for level in ("warning", "warning_once"):
        monkeypatch.setattr(modeling_rope_utils.logger, level, found.append)
    return found


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_positions_stretched_by_yarn_are_upstreams(name: str, warned: list[str]) -> None:
    @settings(max_examples=60, deadline=None)
    @given(yarn_arguments())
    def holds(rope: dict[str, Any]) -> None:
        args = Arguments(JOBS[name] | rope)
        config = config_of(name, **rope)
        expected, got = upstreams_yarn(args), transformers_yarn(config)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
        assert got[1:] == pytest.approx(expected[1:], rel=1e-9)

        again = named_family(name).arguments(config.to_dict())
        if again["rope_type"] == "yarn":
            kept = ("rotary_base", "rotary_scaling_factor", "mscale", "mscale_all_dim")
            assert {key: again[key] for key in kept} == {key: rope[key] for key in kept}
        assert not warned

    holds()


@pytest.mark.parametrize(
    "told",
    [
        {"factor": 8.0},
        {"factor": 8.0, "mscale": 0.7},
        {"factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.0},
        {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
        {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707, "truncate": True},
    ],
)
def test_positions_of_a_configuration_become_upstreams(told: dict[str, Any]) -> None:
    config = config_of("deepseek_v3")
    config.rope_parameters = YARN | told
    args = named_family("deepseek_v3").arguments(config.to_dict())
    expected, got = transformers_yarn(config), upstreams_yarn(args)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
    assert got[1:] == pytest.approx(expected[1:], rel=1e-9)


# ---------------------------------------------------------------------------------------------
# Files


def load(config: PreTrainedConfig, directory: Path) -> Any:
    """A model with the element types that transformers keeps: those of one that it has loaded."""
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def table(name: str, config: PreTrainedConfig, rows: tuple[Row, ...]) -> list[PlannedTensor]:
    args = named_family(name).arguments(config.to_dict()) | {
        "bf16": True, "seq_length": 64, "padded_vocab_size": 32,
    }  # fmt: skip
    shape = Shape.of(args, model_spec(args), config.vocab_size)
    return [
        PlannedTensor(one.name, one.dtype or "bfloat16", one.shape, one.block)
        for one in hf_tensors(rows, shape)
    ]


def in_files(directory: Path) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """File, element type and shape of each tensor."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_tensor(name)
                dtype = str(tensor.dtype).removeprefix("torch.")
                found[name] = (file.name, dtype, tuple(tensor.shape))
    return found


@every_family
@pytest.mark.parametrize("limit", [200, 700, 3000])
def test_tensors_are_divided_into_files_as_transformers_divides_them(
    name: str, limit: int, tmp_path: Path
) -> None:
    # More than ten of both, as "10" sorts before "2".
    dense = 1 if name != "mixtral" else 0
    pattern = [0] * dense + [1] * (11 - dense)
    config = config_of(name, num_layers=11, num_experts=11, moe_layer_freq=pattern)
    load(config, tmp_path / "made").save_pretrained(tmp_path / "saved", max_shard_size=limit)
    tensors = table(name, config, named_family(name).rows)
    holes = plan_files(tensors, limit).holes
    ours = {one.name: (holes[one.name][0], one.dtype, one.shape) for one in tensors}
    assert ours == in_files(tmp_path / "saved")
    kinds = {dtype for _, dtype, _ in ours.values()}
    assert kinds == {"bfloat16"} | ({"float32"} if name == "deepseek_v3" else set())


@every_family
def test_fused_rows_are_what_a_model_has_in_memory(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    model = load(config, tmp_path / "made")
    model.save_pretrained(tmp_path / "1", save_original_format=False)
    fused, unfolded = in_files(tmp_path / "1"), in_files(tmp_path / "made")
    tensors = table(name, config, named_family(name).fused)
    assert {one.name: one.shape for one in tensors} == {
        key: fused[key][2] for key in fused.keys() - unfolded.keys()
    }


# ---------------------------------------------------------------------------------------------
# Layers


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.integers(0, 5), max_size=3), st.integers(1, 6), st.booleans())
def test_layers_of_qwen_that_have_experts(
    step: int, dense: list[int], layers: int, old: bool
) -> None:
    config = config_of("qwen3_moe", num_layers=layers).to_dict()
    config |= {"decoder_sparse_step": step, "mlp_only_layers": dense}
    if old:
        config["num_experts"] = config.pop("num_local_experts")
    # As Qwen3MoeDecoderLayer decides it.
    has_experts = [n not in dense and (n + 1) % step == 0 for n in range(layers)]
    args = named_family("qwen3_moe").arguments(config)
    assert args["num_experts"] == 8
    moe = model_spec(args | {"padded_vocab_size": 32, "seq_length": 64}).dims.moe_layers
    assert moe == {n for n, has in enumerate(has_experts) if has}
    again = named_family("qwen3_moe").config(Arguments(args))
    assert again["mlp_only_layers"] == [n for n, has in enumerate(has_experts) if not has]
    assert (args["moe_layer_freq"] == 1) == all(has_experts)


def test_a_model_with_latent_attention_may_have_dense_layers_first() -> None:
    for dense in range(4):
        frequency = [0] * dense + [1] * (3 - dense)
        config = config_of("deepseek_v3", moe_layer_freq=frequency)
        assert config.first_k_dense_replace == dense
        args = named_family("deepseek_v3").arguments(config.to_dict())
        assert args["moe_layer_freq"] == (frequency if dense else 1)


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("name", "edits", "where"),
    [
        *((name, edits, where) for name in ROUTERS for edits, where in (
            ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor"),
            ({"moe_input_jitter_eps": 0.01}, "--moe-input-jitter-eps"),
            ({"moe_router_force_load_balancing": True}, "--moe-router-force-load-balancing"),
            ({"moe_router_force_biased": 0.1}, "--moe-router-force-biased"),
            ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type"),
            ({"moe_router_load_balancing_type": ["aux_loss", "quantile_balancing"]},
             "--moe-router-load-balancing-type"),
        )),
        ("mixtral", {"moe_router_pre_softmax": True}, "--moe-router-pre-softmax"),
        ("mixtral", {"moe_router_topk_scaling_factor": 2.0}, "--moe-router-topk-scaling-factor"),
        ("mixtral", {"moe_layer_freq": [0, 1, 1]}, "--moe-layer-freq"),
        ("qwen3_moe", {"moe_router_topk_scaling_factor": 2.0}, "--moe-router-topk-scaling-factor"),
        ("deepseek_v2", {"moe_router_pre_softmax": False}, "--moe-router-pre-softmax"),
        ("deepseek_v3", {"moe_router_score_function": "sqrtsoftplus"},
         "--moe-router-score-function"),
        ("deepseek_v3", {"moe_router_topk": 6, "moe_router_num_groups": 4,
                         "moe_router_group_topk": 2}, "--moe-router-group-topk"),
        *((name, edits, where) for name in ("deepseek_v2", "deepseek_v3") for edits, where in (
            ({"layernorm_epsilon": 1e-5}, "--norm-epsilon"),
            ({"moe_layer_freq": [1, 0, 1]}, "--moe-layer-freq"),
            ({"moe_layer_freq": 2}, "--moe-layer-freq"),
            ({"moe_shared_expert_intermediate_size": 9}, "--moe-shared-expert-intermediate-size"),
            ({"rotary_scaling_factor": 4.0, "mscale_all_dim": 1.0}, "--mscale-all-dim"),
        )),
    ],
)  # fmt: skip
def test_what_no_class_of_transformers_computes_is_refused(
    name: str, edits: dict[str, Any], where: str
) -> None:
    config_of(name)
    with pytest.raises(CheckpointError) as caught:
        config_of(name, **edits)
    assert where in str(caught.value.where)


@pytest.mark.parametrize(
    ("name", "edits", "where"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("deepseek_v3", {"num_experts_per_tok": 1}, "norm_topk_prob"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2}, "topk_group"),
        *((name, edits, where) for name in ("deepseek_v2", "deepseek_v3") for edits, where in (
            ({"attention_bias": True}, "attention_bias"),
            ({"q_lora_rank": None}, "q_lora_rank"),
            ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
            ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
            ({"rope_parameters": {**YARN, "rope_type": "linear"}}, "rope_type"),
            ({"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast"),
            ({"rope_parameters": {**YARN, "truncate": False}}, "truncate"),
            ({"rope_parameters": {**YARN, "original_max_position_embeddings": 8192}},
             "original_max_position_embeddings"),
            ({"rope_parameters": {**YARN, "attention_factor": 1.1}}, "rope_parameters"),
            ({"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}, "rope_parameters"),
        )),
    ],
)  # fmt: skip
def test_what_megatron_does_not_compute_is_refused(
    name: str, edits: dict[str, Any], where: str
) -> None:
    config = config_of(name).to_dict()
    named_family(name).arguments(config)
    with pytest.raises(CheckpointError) as caught:
        named_family(name).arguments(config | edits)
    assert where in str(caught.value.where)
