"""Upstream's own model, built on the meta device for any rank of any job, in one process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.extensions import transformer_engine_spec_provider
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer import (
        MLATransformerConfig,
        TransformerConfig,
        multi_latent_attention,
    )
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import (
        GroupedMLPSubmodules,
        SequentialMLP,
        TEGroupedMLP,
    )
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

__all__ = ["build_chunk", "one_rank", "transformer_config"]

_CONFIG_NAMES = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels",
    "normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_layer_freq",
    "moe_grouped_gemm", "moe_router_enable_expert_bias", "moe_router_score_function",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
    "transformer_impl",
)  # fmt: skip
_LATENT_NAMES = (
    "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type",
)  # fmt: skip


class _NormLinear(ColumnParallelLinear):
    """Registers what Transformer Engine's ``LayerNormLinear`` registers, in its order."""

    def __init__(
        self, input_size: int, *args: Any, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)
        own = dict(self._parameters)
        self._parameters.clear()
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.empty(input_size))
        self._parameters.update(own)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """The norm whole on every rank, the rest divided: as Transformer Engine's stores it."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0, "bias": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip


class _GroupedLinear(torch.nn.Module):
    """Registers what Transformer Engine's ``GroupedLinear`` registers, in its order."""

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        dim: int,
        config: TransformerConfig,
        bias: bool,
        **others: Any,
    ) -> None:
        super().__init__()
        own_grid = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        sizes = [output_size, input_size]
        sizes[dim] //= config.expert_tensor_parallel_size
        for index in range(num_gemms):
            for name, shape in [("weight", sizes)] + [("bias", sizes[:1])] * bias:
                parameter = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
                parameter.allreduce = not own_grid
                setattr(self, f"{name}{index}", parameter)


class _WholeLinear(torch.nn.Module):
    """Registers what Transformer Engine's ``Linear`` does where every rank has all of it."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool,
        parallel_mode: str, **others: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert parallel_mode == "duplicated"
        assert not bias
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype)
        )


class _CoreAttention(torch.nn.Module):
    """Stands in for what has no parameters; upstream's own takes no sizes of heads."""

    def __init__(self, *, k_channels: int = 0, v_channels: int = 0, **others: Any) -> None:
        super().__init__()


class _FusedProvider(LocalSpecProvider):
    """Stands in for the provider of Transformer Engine's modules, which is not installed."""

    def linear(self) -> type:
        return _WholeLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return _NormLinear

    def layer_norm(self, rms_norm: bool = False, **others: Any) -> Any:
        return WrappedTorchNorm  # by the configuration, as TENorm is

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        if not moe_use_grouped_gemm:
            modules = MLPSubmodules(
                linear_fc1=self.column_parallel_linear(), linear_fc2=self.row_parallel_linear()
            )
            return partial(SequentialMLP, submodules=modules)
        return partial(
            TEGroupedMLP,
            submodules=GroupedMLPSubmodules(
                linear_fc1=partial(_GroupedLinear, dim=0), linear_fc2=partial(_GroupedLinear, dim=1)
            ),
        )


@contextlib.contextmanager
def one_rank(values: Mapping[str, Any], rank: int, world_size: int) -> Iterator[None]:
    """A rank of a job whose other ranks do not exist: enough to build its model."""
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    parallel_state.initialize_model_parallel(
        values["tensor_model_parallel_size"],
        values["pipeline_model_parallel_size"],
        values["num_virtual_stages_per_pipeline_rank"],
        expert_model_parallel_size=values["expert_model_parallel_size"],
        expert_tensor_parallel_size=values["expert_tensor_parallel_size"],
        create_gloo_process_groups=False,  # those need the other ranks
    )
    try:
        # Some tensors are moved to the device, and a dispatcher wants a stream; there is none.
        with (
            mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
            mock.patch.object(torch.cuda, "Stream"),
            mock.patch.object(torch.cuda, "current_device", return_value="meta"),
            torch.device("meta"),
        ):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def transformer_config(values: Mapping[str, Any]) -> TransformerConfig:
    """Upstream's configuration of the model that these arguments describe."""
    latent = values["multi_latent_attention"]
    cls = MLATransformerConfig if latent else TransformerConfig
    return cls(
        **{name: values[name] for name in (*_CONFIG_NAMES, *(_LATENT_NAMES if latent else ()))},
        params_dtype=torch.bfloat16,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
        num_query_groups=values["num_query_groups"] if values["group_query_attention"] else None,
        num_moe_experts=values["num_experts"],
        num_layers_in_first_pipeline_stage=values["decoder_first_pipeline_num_layers"],
        num_layers_in_last_pipeline_stage=values["decoder_last_pipeline_num_layers"],
        virtual_pipeline_model_parallel_size=values["num_virtual_stages_per_pipeline_rank"],
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=values["swiglu"],
        activation_func=torch.nn.functional.silu,
        bias_dropout_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        cuda_graph_modules=[],
        gradient_accumulation_fusion=False,
    )


def build_chunk(values: Mapping[str, Any], config: TransformerConfig, chunk: int) -> GPTModel:
    """A model chunk of the rank that :func:`one_rank` pretends to be.

    With ``transformer_impl`` other than local it is made by upstream's specs for Transformer
    Engine, from modules that register the same parameters.
    """
    fused = values["transformer_impl"] != "local"
    vp_size = values["num_virtual_stages_per_pipeline_rank"]
    vp_stage = None if vp_size is None else chunk
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    last_rank = pp_rank == values["pipeline_model_parallel_size"] - 1
    with (
        mock.patch.object(gpt_layer_specs, "TESpecProvider", _FusedProvider),
        mock.patch.object(transformer_engine_spec_provider, "TESpecProvider", _FusedProvider),
        mock.patch.object(multi_latent_attention, "TELinear", _WholeLinear),
        mock.patch.object(LocalSpecProvider, "core_attention", return_value=_CoreAttention),
        mock.patch.object(gpt_layer_specs, "TENorm", WrappedTorchNorm),
    ):
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=fused,
            normalization=config.normalization,
            vp_stage=vp_stage,
        )
        return GPTModel(
            config,
            spec,
            vocab_size=values["padded_vocab_size"],
            max_sequence_length=values["max_position_embeddings"],
            pre_process=pp_rank == 0 and chunk == 0,
            post_process=last_rank and chunk == (vp_size or 1) - 1,
            share_embeddings_and_output_weights=not values["untie_embeddings_and_output_weights"],
            position_embedding_type=values["position_embedding_type"],
            vp_stage=vp_stage,
        )
