"""What a job saves besides tensors: arguments, groups of the optimizer, random generators."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from flagscale.launch.options import known_options

__all__ = ["ITERATION", "job_args", "optimizer_state", "rng_state"]

ITERATION = 7


def job_args(*, tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1, **edits: Any) -> Namespace:
    """The arguments of a job, as upstream saves them: its parser's, and what it sets itself.

    Args:
        tp: Tensor parallel size.
        pp: Pipeline parallel size.
        dp: Data parallel size, without context parallelism.
        cp: Context parallel size.
        edits: Other arguments, by attribute.
    """
    args = Namespace(**{**_defaults(), **_TRAINED, **edits})
    world_size = tp * pp * dp * cp
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "tensor_parallel_num_weight_shards": tp,
        "transformer_pipeline_model_parallel_size": pp,
        "data_parallel_size": dp,
        "world_size": world_size,
    }
    vars(args).update(sizes)
    if args.expert_tensor_parallel_size is None:
        args.expert_tensor_parallel_size = tp
    args.expert_tensor_parallel_num_weight_shards = args.expert_tensor_parallel_size
    half = torch.float16 if args.fp16 else torch.float32
    args.params_dtype = torch.bfloat16 if args.bf16 else half
    args.accumulate_allreduce_grads_in_fp32 |= args.bf16
    args.virtual_pipeline_model_parallel_size = args.num_virtual_stages_per_pipeline_rank
    return args


_TRAINED: Mapping[str, Any] = {
    # What a small model has.
    "num_layers": 4,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "kv_channels": 4,
    "seq_length": 8,
    "max_position_embeddings": 8,
    "vocab_size": 61,
    "padded_vocab_size": 64,
    "make_vocab_size_divisible_by": 1,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "swiglu": True,
    "untie_embeddings_and_output_weights": True,
    "transformer_impl": "local",
    "bf16": True,
    "use_distributed_optimizer": True,
    # What upstream sets itself.
    "rank": 0,
    "use_dist_ckpt": True,
    "gtp_weight_remat_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "variable_seq_lengths": False,
    "use_layer_wise_distributed_optimizer": False,
    "consumed_train_samples": 84,
    "skipped_train_samples": 0,
    "consumed_valid_samples": 0,
    "iteration": 0,
    "curr_iteration": ITERATION - 1,
    "num_floating_point_operations_so_far": 0,
    "do_train": 1,
    "do_valid": 0,
    "do_test": 0,
}

_GROUP = {
    "default_config": True, "lr_mult": 1.0, "is_decoupled_lr": False, "max_lr": 1e-3,
    "min_lr": 1e-4, "lr": 5.5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "step": ITERATION,
}  # fmt: skip


def optimizer_state(args: Namespace, *, is_expert: bool = False) -> dict[str, Any]:
    """State of an optimizer, but for its tensors: groups, and the loss scale of fp16."""
    groups = [
        {"is_expert_parallel": is_expert, **_GROUP, "wd_mult": wd, "weight_decay": 0.1 * wd}
        for wd in ((1.0,) if is_expert else (1.0, 0.0))
    ]
    state: dict[str, Any] = {"optimizer": {"param_groups": groups}}
    if args.fp16:
        state["grad_scaler"] = {"scale": torch.tensor([4096.0]), "growth_tracker": 3}
    return state


def rng_state(pp_rank: int, tp_rank: int) -> list[dict[str, Any]]:
    """The random generators of a rank, as upstream saves them."""
    seed = 100 * pp_rank + tp_rank
    return [
        {
            "random_rng_state": (3, (seed, 1, 2), None),
            "np_rng_state": ("MT19937", seed, 624, 0, 0.0),
            "torch_rng_state": (torch.arange(40) + seed).to(torch.uint8),
            "cuda_rng_state": (torch.arange(16) + seed).to(torch.uint8),
            "rng_tracker_states": {
                "model-parallel-rng": torch.full((16,), seed % 256, dtype=torch.uint8)
            },
        }
    ]


@cache
def _defaults() -> dict[str, Any]:
    return known_options().defaults()
