"""A stack for upstream's HybridModel whose attention layers are ours, without Transformer Engine.

Upstream's own stack ends in Transformer Engine's norm whatever its spec says, and upstream's spec
names Transformer Engine's layers throughout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer

from flagattention.errors import AttentionError
from flagattention.mcore_attention import PiecewiseCoreAttention

__all__ = ["PiecewiseHybridStack"]

_SERVED = "*-"


class PiecewiseHybridStack(HybridStack):  # type: ignore[misc]
    """Attention layers (``*``) and MLP layers (``-``) of Megatron's own modules.

    Args:
        config: Upstream's; ``transformer_impl`` must be local.
        layer_type_list: The layers of this pipeline stage.
        post_layer_norm: Whether the last stage ends in a norm.
        others: As for upstream's ``HybridStack``.

    Raises:
        AttentionError: A layer is neither, or the configuration asks for what is not served.
    """

    def __init__(
        self,
        config: Any,
        layer_type_list: list[str],
        post_layer_norm: bool = True,
        **others: Any,
    ) -> None:
        unserved = sorted(set(layer_type_list) - set(_SERVED))
        if unserved or config.transformer_impl != "local":
            raise AttentionError(
                "this stack has attention and MLP layers of Megatron's own only",
                where="--hybrid-layer-pattern, --transformer-impl",
                expected=f"{' and '.join(_SERVED)}, local",
                got=f"{' '.join(unserved) or ' '.join(_SERVED)}, {config.transformer_impl}",
                cure="use upstream's stack, with PiecewiseCoreAttention in its attention layers",
            )
        super().__init__(
            config,
            _submodules(config),
            layer_type_list=layer_type_list,
            post_layer_norm=False,  # that would be Transformer Engine's
            **others,
        )
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = WrappedTorchNorm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )


def _submodules(config: Any) -> Any:
    """Upstream's GPT layer, taken apart."""
    layer = get_gpt_layer_local_submodules(
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    get_submodules(layer.self_attention).core_attention = PiecewiseCoreAttention
    attention = replace(layer, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    mlp = replace(
        layer,
        input_layernorm=IdentityOp,
        self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp,
    )
    return HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
