"""Tiny models of public families, as the arguments with which upstream trains them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from harness.corpus import VOCAB_SIZE

__all__ = ["FAMILIES", "megatron_arguments", "megatron_words"]

_TRAINING = (
    "--seq-length 64 --max-position-embeddings 64 --attention-dropout 0 --hidden-dropout 0 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 6 --lr 5e-3 --min-lr 1e-4 "
    "--lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --bf16 --use-distributed-optimizer "
    "--split 100,0,0 --eval-iters 0 --eval-interval 1000 --tokenizer-type NullTokenizer "
    f"--vocab-size {VOCAB_SIZE} --make-vocab-size-divisible-by 64 --log-interval 1 "
    "--num-workers 0 --ckpt-format torch_dist"
)
_LLAMA = (
    "--hidden-size 64 --num-attention-heads 4 --normalization RMSNorm --position-embedding-type "
    "rope --swiglu --disable-bias-linear --untie-embeddings-and-output-weights"
)
# The local spec has no norm for keys and values unless queries have a low rank as well.
_LATENT = (
    "--multi-latent-attention --kv-lora-rank 24 --q-lora-rank 32 --qk-layernorm --qk-head-dim 16 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 12 --no-rope-fusion --norm-epsilon 1e-6"
)
_EXPERTS = (
    "--ffn-hidden-size 96 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 64 "
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none"
)
_GROUPS = "--group-query-attention --num-query-groups 2 --num-layers 4 --ffn-hidden-size 192"
_ROUTED = (
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2"
)

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "llama": (*_LLAMA.split(), *_GROUPS.split()),
    "llama3": tuple(
        f"{_LLAMA} {_GROUPS} --use-rope-scaling --rotary-base 500000 "
        "--max-position-embeddings 16384".split()  # above the 8192 that the scaling begins from
    ),
    "aquila": tuple(
        f"{_LLAMA} {_GROUPS} --norm-epsilon 1e-5 --rotary-interleaved --no-rope-fusion "
        "--norm-init-weight 0.3 --embedding-lookup-in-fp32".split()
    ),
    "qwen2": tuple(f"{_LLAMA} {_GROUPS} --add-qkv-bias".split()),
    "qwen3": tuple(f"{_LLAMA} {_GROUPS} --qk-layernorm --kv-channels 32".split()),
    "mistral": tuple(f"{_LLAMA} {_GROUPS} --window-size 15,0".split()),
    "mixtral": tuple(f"{_LLAMA} {_GROUPS} {_ROUTED} --num-experts 4 --moe-router-topk 2".split()),
    "qwen3_moe": tuple(
        f"{_LLAMA} {_GROUPS} {_ROUTED} --qk-layernorm --kv-channels 32 --num-experts 8 "
        "--moe-router-topk 3 --moe-ffn-hidden-size 48 --moe-layer-freq [0]+[1]*3".split()
    ),
    "deepseek_v2": tuple(
        f"{_LLAMA} {_LATENT} {_EXPERTS} --num-layers 4 --moe-layer-freq [0,1,1,1] --num-experts 4 "
        "--moe-router-topk 2 --moe-router-pre-softmax --rope-type rope".split()
    ),
    "deepseek_v3": tuple(
        f"{_LLAMA} {_LATENT} {_EXPERTS} --num-layers 4 --moe-layer-freq [0]+[1]*3 --num-experts 16 "
        "--moe-router-topk 4 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5 "
        "--rope-type yarn --rotary-scaling-factor 4 --mscale 1 --mscale-all-dim 1".split()
    ),
}
"""By family: the words that make the model."""


def megatron_words(family: str) -> list[str]:
    """Arguments of a short run, all but the data, parallel sizes and checkpoint directories.

    Args:
        family: A key of :data:`FAMILIES`. Words added at the end override its values.
    """
    return [*_TRAINING.split(), *FAMILIES[family]]


def megatron_arguments(family: str, *, experts: bool = True) -> dict[str, object]:
    """What makes the model, as changes to the arguments of :func:`harness.corpus.model_argv`.

    Args:
        family: A key of :data:`FAMILIES`.
        experts: Without, every layer has a dense feed-forward network.
    """
    arguments: dict[str, object] = {"group_query_attention": None, "num_query_groups": None}
    for word in FAMILIES[family]:
        if word.startswith("--"):
            name = word.removeprefix("--").replace("-", "_")
            arguments[name] = True
        else:
            arguments[name] = word
    return {
        name: value if experts or not re.match("moe_|num_experts", name) else None
        for name, value in arguments.items()
    }
