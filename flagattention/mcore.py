"""Piecewise attention in Megatron: ``--spec flagattention.mcore gpt``.

The layer spec is upstream's own, with another core attention. Upstream rotates queries and keys
(``--position-embedding-type rope``); the second pair is derived from what it rotated, so that
nothing of upstream is changed, and checkpoints hold what those of stock attention hold. A model
built from the spec must be given a method before it runs::

    model_config.pre_wrap_hooks.append(lambda chunks: bind(chunks, Method("rerope", window=2048)))

``bind`` also proves that every attention layer of the model is ours: upstream logs a spec that
cannot be imported, and goes on to train ordinary attention.

``--spec flagattention.mcore hybrid`` serves upstream's HybridModel in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import get_submodules
from megatron.training.models.gpt import default_layer_spec

from flagattention.errors import AttentionError
from flagattention.mcore_attention import PiecewiseCoreAttention
from flagattention.mcore_hybrid import PiecewiseHybridStack
from flagattention.mcore_refusals import raise_refusals
from flagattention.nlpe import Rotary

if TYPE_CHECKING:
    from flagattention.nlpe import Method

__all__ = ["bind", "gpt", "hybrid"]

hybrid = PiecewiseHybridStack
"""What ``--spec flagattention.mcore hybrid`` names; upstream builds a class as it stands."""


def gpt(config: Any, vp_stage: int | None = None) -> Any:
    """What ``--spec flagattention.mcore gpt`` names: called by upstream's model builder.

    Args:
        config: Upstream's ``GPTModelConfig``. Its ``transformer_impl`` decides whether the layers
            are Megatron's own or Transformer Engine's (untested).
        vp_stage: The model chunk, under a virtual pipeline.

    Returns:
        The spec that upstream would choose itself, but for the core attention.

    Raises:
        AttentionError: The configuration asks for what is not served.
    """
    raise_refusals(config)
    spec = default_layer_spec(config, vp_stage)
    for layer in getattr(spec, "layer_specs", [spec]):
        attention = get_submodules(get_submodules(layer).self_attention)
        attention.core_attention = PiecewiseCoreAttention
    return spec


def bind(chunks: Sequence[Any], method: Method) -> Sequence[Any]:
    """Give the attention layers of a model their method, after proof that all of them are ours.

    To be called on every pipeline stage with the model that upstream built, before it is wrapped.

    Args:
        chunks: This rank's model chunks.
        method: Which pairs to make.

    Returns:
        ``chunks``, as upstream's hooks do.

    Raises:
        AttentionError: A layer has another core attention, or the model does not rotate by rope.
    """
    for chunk in chunks:
        layers = list(_attention_layers(chunk))
        rotary = _rotary(chunk) if layers else None
        for name, attention in layers:
            core = getattr(attention, "core_attention", None)
            if rotary is None or not isinstance(core, PiecewiseCoreAttention):
                raise AttentionError(
                    "the model was built with another attention than the one asked for",
                    where=name,
                    expected=PiecewiseCoreAttention.__name__,
                    got=type(core or attention).__name__,
                    cure="give --spec flagattention.mcore gpt; if it is given, look above for why "
                    "upstream could not import it",
                )
            core.use(method, rotary)
            attention.register_forward_pre_hook(_refuse_other_paths, with_kwargs=True)
    return chunks


def _attention_layers(chunk: Any) -> Iterator[tuple[str, Any]]:
    """Every module that attends, by name, in whatever layers: the decoder's, or others."""
    for name, module in chunk.named_modules():
        for part in ("self_attention", "cross_attention"):
            attention = getattr(module, part, None)
            if attention is not None and not isinstance(attention, IdentityOp):
                yield f"{name}.{part}", attention


def _rotary(chunk: Any) -> Rotary:
    embedding = getattr(chunk, "rotary_pos_emb", None)
    if not isinstance(embedding, RotaryEmbedding):
        raise AttentionError(
            "the model does not rotate queries and keys by rope",
            where="--position-embedding-type",
            expected="rope",
            got=type(embedding).__name__,
            cure="give --position-embedding-type rope",
        )
    # Upstream scales positions; angles are products, so that frequencies may be scaled instead.
    factor = embedding.seq_len_interpolation_factor or 1.0
    return Rotary(embedding.inv_freq / factor, interleaved=embedding.rotary_interleaved)


def _refuse_other_paths(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook: upstream's dynamic batching attends without its core attention."""
    context = kwargs.get("inference_context") or kwargs.get("inference_params")
    if context is not None and context.is_dynamic_batching():
        raise AttentionError(
            "dynamic batching attends past the core attention",
            where=f"layer {attention.layer_number}",
            expected="StaticInferenceContext",
            got=type(context).__name__,
            cure="generate with static batching",
        )
