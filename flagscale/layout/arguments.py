"""What Megatron's arguments say about ranks, sizes and batches, and whether that can work.

The launcher asks before it starts anything, and every process asks again before it joins a group,
since torchrun or srun may have started it. Values are by attribute, as argparse stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from math import ceil
from typing import Any, Final

from flagscale.errors import ConfigError
from flagscale.layout.memory import TrainingMode
from flagscale.layout.parallel import (
    BatchSizes,
    LatentDims,
    ModelDims,
    ParallelLayout,
    Problem,
    verify_evaluation,
    verify_layout,
    verify_local_attention,
)
from flagscale.layout.ramp import verify_schedule

__all__ = [
    "OTHER_MODELS",
    "batch_sizes",
    "model_dims",
    "parallel_layout",
    "training_mode",
    "uncounted",
    "verify_arguments",
    "whole_number",
]

_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
)
_DATA_SOURCES = (
    "data_path",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "data_args_path",
    "per_split_data_args_path",
)
_UNEVEN_PIPELINE = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "hybrid_layer_pattern",
)
OTHER_MODELS: Final = (
    "mtp_num_layers",
    "hybrid_layer_pattern",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "experimental_attention_variant",
    "attention_output_gate",
    "moe_latent_size",
)
"""The arguments that ask for a model whose parameters are not known here."""

_OTHER_MEMORY = (
    "multi_latent_attention",
    "use_megatron_fsdp",
    "use_torch_fsdp2",
    "use_precision_aware_optimizer",
)


def verify_arguments(values: Mapping[str, Any], world_size: int) -> list[Problem]:
    """What cannot work about these arguments on so many ranks; best empty."""
    missing = [dest for dest in _REQUIRED if values[dest] is None]
    if missing:  # the rest is computed from these
        options = ", ".join(f"--{dest.replace('_', '-')}" for dest in missing)
        return [
            Problem(
                "the arguments do not say how large the model or its batches are",
                options,
                "a value for each",
                "none",
                f"give {options}",
            )
        ]
    layout, dims = parallel_layout(values, world_size), model_dims(values)
    local = values["transformer_impl"] == "local" and layout.tp_size > 0
    problems = [
        *_verify_virtual_stages(values, layout),
        *verify_layout(layout, dims, batch_sizes(values, layout)),
        *(verify_local_attention(dims, layout.tp_size) if local else ()),
        *_verify_schedule(values, layout),
        *_verify_data_source(values),
        *_verify_intervals(values),
    ]
    if values["data_path"] and values["split"] is not None and not values["full_validation"]:
        problems += verify_evaluation(values["split"], values["eval_iters"])
    return problems


def parallel_layout(values: Mapping[str, Any], world_size: int) -> ParallelLayout:
    """How the arguments divide ``world_size`` ranks."""
    pp_size = values["pipeline_model_parallel_size"]
    vpp_size = values["num_virtual_stages_per_pipeline_rank"]
    chunk = values["num_layers_per_virtual_pipeline_stage"]
    if vpp_size is None and chunk and pp_size:
        vpp_size = max(1, values["num_layers"] // (pp_size * chunk))
    return ParallelLayout(
        world_size=world_size,
        tp_size=values["tensor_model_parallel_size"],
        pp_size=pp_size,
        cp_size=values["context_parallel_size"],
        ep_size=values["expert_model_parallel_size"],
        etp_size=values["expert_tensor_parallel_size"],
        vpp_size=None if vpp_size == 1 else vpp_size,
        sequence_parallel=values["sequence_parallel"],
        uneven_pipeline=any(values[dest] for dest in _UNEVEN_PIPELINE),
        order="tp-cp-ep-pp-dp" if values["use_tp_pp_dp_mapping"] else "tp-cp-ep-dp-pp",
    )


def model_dims(values: Mapping[str, Any]) -> ModelDims:
    """The sizes of the model, by upstream's rules where the arguments leave one out."""
    hidden_size, heads = values["hidden_size"], values["num_attention_heads"]
    ffn_hidden_size = values["ffn_hidden_size"]
    if ffn_hidden_size is None:
        gated = int(4 * hidden_size * 2 / 3 / 64) * 64
        ffn_hidden_size = gated if values["swiglu"] else 4 * hidden_size
    padded = values["padded_vocab_size"]
    if padded is None and values["vocab_size"] and values["pad_vocab_size"]:
        multiple = values["make_vocab_size_divisible_by"] * values["tensor_model_parallel_size"]
        # A size of 0 is told by verify_layout.
        padded = ceil(values["vocab_size"] / multiple) * multiple if multiple > 0 else None
    return ModelDims(
        num_layers=values["num_layers"],
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=values["num_query_groups"] if values["group_query_attention"] else heads,
        seq_length=values["seq_length"],
        kv_channels=values["kv_channels"],
        padded_vocab_size=padded,
        num_experts=values["num_experts"] or None,
        moe_ffn_hidden_size=values["moe_ffn_hidden_size"],
        moe_layers=_moe_layers(values),
        moe_topk=values["moe_router_topk"],
        shared_expert_ffn_hidden_size=values["moe_shared_expert_intermediate_size"],
        shared_expert_gate=values["moe_shared_expert_gate"],
        gated=values["swiglu"] or values["quick_geglu"],
        linear_bias=values["add_bias_linear"],
        qkv_bias=values["add_qkv_bias"],
        norm_bias=values["normalization"] == "LayerNorm",
        qk_norm=values["qk_layernorm"],
        tied_embeddings=not values["untie_embeddings_and_output_weights"],
        learned_positions=values["max_position_embeddings"]
        if values["position_embedding_type"] == "learned_absolute"
        else None,
        latent=_latent_dims(values),
    )


def batch_sizes(values: Mapping[str, Any], layout: ParallelLayout) -> BatchSizes:
    """Samples a forward pass and a step."""
    micro_batch_size = values["micro_batch_size"]
    model_size = layout.tp_size * layout.cp_size * layout.pp_size
    dp_size = layout.world_size // model_size if model_size else 1
    return BatchSizes(
        micro_batch_size=micro_batch_size,
        # Without it upstream takes one micro-batch a replica.
        global_batch_size=values["global_batch_size"] or micro_batch_size * max(1, dp_size),
        microbatch_group_size=values["microbatch_group_size_per_vp_stage"],
    )


def training_mode(values: Mapping[str, Any]) -> TrainingMode:
    """What decides how many bytes a rank needs."""
    half = values["bf16"] or values["fp16"]
    # Upstream accumulates bf16 gradients in fp32 whether asked to or not.
    fp32_gradients = values["bf16"] or values["accumulate_allreduce_grads_in_fp32"] or not half
    fused = values["transformer_impl"] == "transformer_engine"
    fused_attention = fused and "unfused" not in str(values["attention_backend"])
    recompute = values["recompute_granularity"]
    if values.get("recompute_activations"):
        recompute = "selective"
    return TrainingMode(
        param_bytes=2 if half else 4,
        grad_bytes=4 if fp32_gradients and not values["grad_reduce_in_bf16"] else 2,
        distributed_optimizer=values["use_distributed_optimizer"],
        fused_norms=fused,
        flash_attention=fused_attention or values.get("nlpe_method") is not None,
        softmax_in_fp32=values["attention_softmax_in_fp32"],
        fused_loss=values["cross_entropy_loss_fusion"],
        recompute=recompute,
        recompute_modules=tuple(values["recompute_modules"] or ("core_attn",)),
        recompute_method=values["recompute_method"],
        recompute_num_layers=values["recompute_num_layers"] or 1,
    )


def uncounted(values: Mapping[str, Any]) -> str | None:
    """The argument because of which parameters and memory are not known beforehand, if any."""
    for dest in (*OTHER_MODELS, *_OTHER_MEMORY, *_UNEVEN_PIPELINE):
        if values.get(dest):
            return f"--{dest.replace('_', '-')}"
    if values["num_experts"] and "[" in str(values["moe_layer_freq"]):
        return "--moe-layer-freq"
    if model_dims(values).padded_vocab_size is None:
        return "only the tokenizer knows the vocabulary; --padded-vocab-size tells"
    return None


def whole_number(values: Mapping[str, Any], dest: str) -> int | None:
    """An argument of a checkpoint that is a whole number; ``None`` where it was not given.

    Raises:
        ConfigError: It is something else, or negative.
    """
    value = values.get(dest)
    if value is None or (isinstance(value, int) and value >= 0):
        return value
    raise ConfigError(
        "an argument is not a whole number",
        where=f"--{dest.replace('_', '-')}",
        expected="a number from 0 on",
        got=repr(value),
    )


def _moe_layers(values: Mapping[str, Any]) -> frozenset[int]:
    if not values["num_experts"]:
        return frozenset()
    frequency = values["moe_layer_freq"]
    if isinstance(frequency, list):
        return frozenset(layer for layer, is_moe in enumerate(frequency) if is_moe)
    # The launcher has the text, and leaves a pattern to upstream's parser: see uncounted().
    step = 1 if "[" in str(frequency) else int(frequency)
    return frozenset(range(0, values["num_layers"], step))


def _latent_dims(values: Mapping[str, Any]) -> LatentDims | None:
    if not values["multi_latent_attention"]:
        return None
    return LatentDims(**{field.name: values[field.name] for field in fields(LatentDims)})


def _verify_schedule(values: Mapping[str, Any], layout: ParallelLayout) -> Iterator[Problem]:
    schedule = values["step_batch_size_schedule"]
    if schedule is None:
        return
    where = "--step-batch-size-schedule"
    if values["global_batch_size"] is not None:
        yield Problem(
            "a batch-size schedule and a fixed batch size exclude each other",
            f"{where}, --global-batch-size",
            "one of the two",
            f"--global-batch-size {values['global_batch_size']}",
            f"drop --global-batch-size, or {where}=null for a fixed batch",
        )
    if values["train_iters"]:
        yield Problem(
            "with --train-iters the learning rate would end its decay long before the run "
            "(upstream counts every step as the smallest batch)",
            f"{where}, --train-iters",
            "--train-samples",
            f"--train-iters {values['train_iters']}",
            "--train-iters=null --train-samples N",
        )
    sizes = (values["micro_batch_size"], layout.tp_size, layout.cp_size, layout.pp_size)
    # Where these do not fit, verify_layout says so.
    if min(sizes) > 0 and layout.dp_size > 0 and values["seq_length"] > 0:
        yield from verify_schedule(
            schedule, values["micro_batch_size"], layout.dp_size, values["seq_length"]
        )


def _verify_virtual_stages(values: Mapping[str, Any], layout: ParallelLayout) -> Iterator[Problem]:
    chunk = values["num_layers_per_virtual_pipeline_stage"]
    if chunk and layout.pp_size and values["num_layers"] % (layout.pp_size * chunk):
        yield Problem(
            "the layers do not divide into virtual pipeline stages",
            "--num-layers-per-virtual-pipeline-stage",
            f"{values['num_layers']} layers = a multiple of PP {layout.pp_size} x {chunk}",
            str(chunk),
            "another number, or --num-virtual-stages-per-pipeline-rank",
        )


def _verify_data_source(values: Mapping[str, Any]) -> Iterator[Problem]:
    if not any(values[dest] for dest in _DATA_SOURCES):
        yield Problem(
            "there is nothing to train on",
            "--data-path",
            "a prefix of .bin and .idx files",
            "none",
            "--data-path PREFIX; tools/preprocess_data.py makes the files",
        )


def _verify_intervals(values: Mapping[str, Any]) -> Iterator[Problem]:
    if not values["eval_interval"]:
        yield Problem(
            "there is no evaluation interval (upstream divides by it even without evaluation)",
            "--eval-interval",
            "at least 1",
            str(values["eval_interval"]),
            "--eval-interval 1000",
        )
    if values["save"] and not values["save_interval"]:
        yield Problem(
            "there is a directory for checkpoints, but no interval for saving them",
            "--save-interval",
            "at least 1",
            str(values["save_interval"]),
            "--save-interval 1000",
        )
