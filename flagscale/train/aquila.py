"""What Aquila2's training scripts ask of a model and upstream has no argument for.

Imports neither torch nor megatron: the launcher, too, looks at the arguments.
"""

from __future__ import annotations

import functools
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from flagscale.errors import ConfigError
from flagscale.layout.parallel import Problem, raise_problems
from flagscale.patches.apply import active
from flagscale.patches.rotary_fp32 import GROUP as ROTARY_FP32

__all__ = [
    "add_arguments",
    "init_norm_weights",
    "look_up_in_fp32",
    "pre_wrap_hooks",
    "verify_arguments",
]

# The norms before attention, before the MLP and after the last layer; the second form is that of
# Transformer Engine, which fuses a norm with the linear layer behind it. Norms of queries and keys
# are called otherwise, and keep the value they have.
_NORM_WEIGHTS = (
    *(".input_layernorm.weight", ".linear_qkv.layer_norm_weight"),
    *(".pre_mlp_layernorm.weight", ".linear_fc1.layer_norm_weight"),
    ".final_layernorm.weight",
)


def add_arguments(parser: ArgumentParser) -> None:
    """``--norm-init-weight``, ``--embedding-lookup-in-fp32`` and ``--rotary-in-fp32``."""
    group = parser.add_argument_group(title="Aquila")
    group.add_argument(
        "--norm-init-weight",
        type=float,
        default=None,
        help="Initial weight of the norms before attention, before the MLP and after the last "
        "layer (Aquila2-34B: 0.3), instead of 1. A loaded checkpoint has its own.",
    )
    group.add_argument(
        "--embedding-lookup-in-fp32",
        action="store_true",
        help="Look word embeddings up in an fp32 copy of their weight, so that its gradient is "
        "summed in fp32. The weight, its gradient and the output keep their types.",
    )
    group.add_argument(
        "--rotary-in-fp32",
        action="store_true",
        help="Rotate queries and keys in fp32. The output keeps its type. Needs --no-rope-fusion.",
    )


def verify_arguments(args: Namespace) -> None:
    """Refuse what could not take effect.

    Raises:
        ConfigError: All that is wrong.
    """
    problems = []
    if args.norm_init_weight is not None:
        problems += _verify_norm_init_weight(args)
    if args.rotary_in_fp32:
        problems += _verify_rotary(args)
    raise_problems(problems)


def _verify_norm_init_weight(args: Namespace) -> list[Problem]:
    where, value = "--norm-init-weight", args.norm_init_weight
    problems = []
    if not 0 < value < math.inf:
        problems.append(
            Problem("a norm cannot start at this weight", where, "> 0", str(value), "correct it")
        )
    if args.layernorm_zero_centered_gamma:
        problems.append(
            Problem(
                "the norms store their weight less 1, and would not start at the weight asked for",
                f"{where}, --apply-layernorm-1p",
                "one of the two",
                "both",
                "drop --apply-layernorm-1p",
            )
        )
    if args.init_model_with_meta_device:
        problems.append(
            Problem(
                "on the meta device weights are initialised later, which would undo it",
                f"{where}, --init-model-with-meta-device",
                "one of the two",
                "both",
                "drop --init-model-with-meta-device",
            )
        )
    return problems


def _verify_rotary(args: Namespace) -> list[Problem]:
    where = "--rotary-in-fp32"
    problems = []
    if args.apply_rope_fusion:
        problems.append(
            Problem(
                "the fused rotary kernel computes in a type of its own",
                where,
                "--no-rope-fusion",
                "rope fusion, which is upstream's default",
                "add --no-rope-fusion",
            )
        )
    if ROTARY_FP32.name not in {patch.group for patch in active()}:
        problems.append(
            Problem(
                "the patch that rotates in fp32 is not in place",
                where,
                f"patch group {ROTARY_FP32.name}",
                "not applied",
                f"take {ROTARY_FP32.name} out of FLAGSCALE_DISABLE_PATCHES, or drop {where}",
            )
        )
    return problems


def pre_wrap_hooks(args: Namespace) -> list[Callable[[list[Any]], list[Any]]]:
    """What is to be done to the model chunks (``MegatronModule``) before they are wrapped."""
    hooks: list[Callable[[list[Any]], list[Any]]] = []
    if args.norm_init_weight is not None:
        hooks.append(functools.partial(init_norm_weights, value=args.norm_init_weight))
    if args.embedding_lookup_in_fp32:
        hooks.append(look_up_in_fp32)
    return hooks


def init_norm_weights(chunks: list[Any], value: float) -> list[Any]:
    """Set the weights of the norms before attention, before the MLP and after the last layer.

    Args:
        chunks: This rank's GPT models.
        value: What each weight becomes, rounded to its type.

    Raises:
        ConfigError: A chunk has fewer norms than its layers should.
    """
    for chunk in chunks:
        weights = {
            name: param for name, param in chunk.named_parameters() if name.endswith(_NORM_WEIGHTS)
        }
        decoder = chunk.decoder
        expected = 2 * len(decoder.layers) + (decoder.final_layernorm is not None)
        if len(weights) < expected:
            raise ConfigError(
                "the model has norms of other names than GPT layers have",
                where="--norm-init-weight",
                expected=f"{expected} of *{', *'.join(_NORM_WEIGHTS)}",
                got=", ".join(weights) or "none",
                cure="drop --norm-init-weight, or --spec",
            )
        for param in weights.values():
            param.data.fill_(value)
    return chunks


def look_up_in_fp32(chunks: list[Any]) -> list[Any]:
    """Make word embeddings look up in an fp32 copy of their weight.

    Raises:
        ConfigError: A chunk that should have word embeddings has none.
    """
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    for chunk in chunks:
        embeddings = [m for m in chunk.modules() if isinstance(m, VocabParallelEmbedding)]
        if chunk.pre_process and not embeddings:
            raise ConfigError(
                "the model has no word embeddings that the look-up in fp32 could apply to",
                where="--embedding-lookup-in-fp32",
                cure="drop --embedding-lookup-in-fp32, or --spec",
            )
        for embedding in embeddings:
            _look_up_in_fp32(embedding)
    return chunks


def _look_up_in_fp32(embedding: Any) -> None:
    look_up = embedding.forward

    def forward(input_: Any) -> Any:
        weight = embedding.weight
        # An attribute of the instance hides the parameter of that name, here from upstream's
        # forward alone: checkpoints, the optimizer and the gradient buffers have the parameter.
        vars(embedding)["weight"] = weight.float()
        try:
            return look_up(input_).to(weight.dtype)
        finally:
            del vars(embedding)["weight"]

    embedding.forward = forward
