"""A program: a forward pass of megatron-core's own model on the tokens that it is asked about.

It is built on a CPU, by upstream's builder, from the arguments that the checkpoint holds, with the
patches and plugins of a training process. A ``torch_dist`` checkpoint is loaded by upstream's own
reader, a legacy one by ours, since upstream's loads it only at the layout that saved it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flagscale.ckpt_convert.proof.forward import Array, Request, answer
from flagscale.ckpt_io.location import detect_format
from flagscale.errors import CheckpointError
from flagscale.patches.apply import apply
from flagscale.platforms import activate
from flagscale.platforms.cpu import CPU
from flagscale.plugins import Plugin, add_arguments, collect_pre_wrap_hooks, load_plugins

if TYPE_CHECKING:
    from flagscale.optim.source import Source

__all__ = ["as_given", "forward"]

_NOT_THE_MODEL: Final = re.compile(
    r"fp[48].*|recompute_.*|.*cuda_graph.*|cp_comm_type|.*offload.*|flash_.*|inference_.*"
    r"|attention_backend|moe_(?!mlp_)\w*(fusion|dispatcher|deepep|hybridep|ncclep|overlap|stash|force)\w*"
    r"|moe_(grouped_gemm|single_grouped|router_padding|enable_routing_replay|layer_recompute)\w*"
    r"|\w*kitchen\w*|te_\w+|use_te_\w+|\w*op_fuser|use_grouped_gemm_\w+|mla_down_proj_fusion"
    r"|(masked_softmax|fused|persist|memory_efficient)_\w+|no_persist_layer_norm|apply_rope_fusion"
    r"|\w*_bf16|batch_invariant_mode|symmetric_ar_type|init_model_with_meta_device"
    r"|decoder_(first|last)_pipeline_num_layers|account_for_\w+|pipeline_model_parallel_layout"
    r"|transformer_impl|config_logger_dir|heterogeneous_layers_config_path|yaml_cfg|spec"
    r"|mtp_num_layers|hetereogenous_dist_checkpoint|use_inference_\w+|high_priority_a2a_\w+"
)
"""Arguments that say how a job computes, or where, or name files; each is as it would be if it had
not been given."""

_WEIGHTS: Final = ("embedding.", "decoder.", "output_layer.")
_FUSED_NORM, _NORM = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."


def forward(request: Request, tokens: Array) -> Mapping[str, Array]:
    """Logits of the model of a Megatron checkpoint, and what was traced.

    Raises:
        CheckpointError: The checkpoint does not hold exactly the tensors of its model, or its model
            cannot be built here.
    """
    activate(CPU)
    directory = Path(request.directory)
    plugins = load_plugins()
    saved, source = _open(directory)
    # What asks for a patch is asked on the command line; here it is in the arguments.
    sys.argv[1:] = as_given(saved, plugins)
    disabled = filter(None, os.environ.get("FLAGSCALE_DISABLE_PATCHES", "").split(","))
    apply(
        [group for plugin in plugins for group in plugin.patch_groups], disabled=frozenset(disabled)
    )

    import torch
    from megatron.core.transformer.module import Float16Module

    from flagscale.ckpt_convert.proof.trace import trace_megatron

    _initialize()
    args = _here(saved, plugins, getattr(torch, request.dtype))
    model = _build(args, plugins, directory)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(float("nan"))  # so that one that is not loaded shows
    if source is None:
        _load_torch_dist(model, directory)
    else:
        _load_pieces(model, source)
    told = trace_megatron(model) if request.trace else {}
    chunk = Float16Module(model.config, model) if args.bf16 else model
    chunk.eval()
    input_ids = torch.from_numpy(tokens)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        logits = chunk(input_ids, positions, None)
    return {**told, "logits": logits[..., : request.vocab_size].float().numpy()}


def _open(directory: Path) -> tuple[Namespace, Source | None]:
    """The saved arguments, and the checkpoint itself where it is ours to read.

    The restricted reader has the pickles of a checkpoint first: upstream's trusts them.
    """
    if detect_format(directory) == "torch_dist":
        from flagscale.ckpt_io import torch_dist
        from flagscale.optim.job import Job

        args: Any = torch_dist.read(directory).common.get("args")
        Job.saved(args, str(directory))
        return args, None
    from flagscale.optim.opening import open_source

    source = open_source(directory, weights_only=True)
    return source.args, source


def as_given(saved: Namespace, plugins: Sequence[Plugin]) -> list[str]:
    """The options of plugins, as the command line of a job must have had them.

    Args:
        saved: Its arguments.
        plugins: Those loaded here.
    """
    parser = ArgumentParser(add_help=False)
    add_arguments(plugins, parser)
    words: list[str] = []
    for action in parser._actions:
        value = getattr(saved, action.dest, action.default)
        if value != action.default:
            words += [action.option_strings[0], *([] if value is True else [str(value)])]
    return words


def _initialize() -> None:
    """A process group of this process alone, and upstream's groups and generators in it."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def _here(saved: Namespace, plugins: Sequence[Plugin], dtype: Any) -> Namespace:
    """The arguments of the same model in this process.

    Args:
        saved: As the checkpoint holds them.
        plugins: Whose arguments it may not have, since it is older.
        dtype: In which the model computes.
    """
    import torch
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    add_arguments(plugins, parser)
    fresh = vars(parser.parse_args(list(CPU.megatron_arguments)))
    layout = {
        field.name: field.default
        for field in dataclasses.fields(ModelParallelConfig)
        if field.default is not dataclasses.MISSING
    }
    other = {name: value for name, value in fresh.items() if _NOT_THE_MODEL.fullmatch(name)}
    if getattr(saved, "nlpe_method", None) is not None:
        del other["spec"]  # whose attention is a part of the model
    return Namespace(
        **{
            **fresh,
            **vars(saved),
            **layout,
            **other,
            "params_dtype": dtype,
            "bf16": dtype is torch.bfloat16,
            "fp16": False,
            "use_cpu_initialization": True,
            "perform_initialization": False,
        }
    )


def _build(args: Namespace, plugins: Sequence[Plugin], directory: Path) -> Any:
    """The whole model, in one chunk, as a training process would have it before it is wrapped."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    try:
        config = gpt_config_from_args(args)
        builder = config.get_builder_cls()(config)
        chunks = [builder.build_model(ProcessGroupCollection.use_mpu_process_groups())]
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise CheckpointError(
            "megatron-core does not build this model on a CPU",
            where=str(directory),
            got=f"{type(error).__name__}: {error}",
        ) from error
    for hook in collect_pre_wrap_hooks(plugins, args):
        chunks = hook(chunks)
    return chunks[0]


def _load_torch_dist(model: Any, directory: Path) -> None:
    """Fill the model by upstream's reader; types are converted on the way."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from flagscale.ckpt_io import torch_dist

    stored = torch_dist.read(directory)
    wanted = model.sharded_state_dict(metadata=stored.common.get("content_metadata"))
    if any(_NORM in key for key in stored.tensors):
        # Where Transformer Engine has a norm in front of experts that it fuses with nothing, the
        # local modules store it as if it were fused.
        for shard in nested_values(wanted):
            if shard.key not in stored.tensors:
                shard.key = shard.key.replace(_FUSED_NORM, _NORM)
    loaded, missing, unexpected = dist_checkpointing.load(
        {"model": wanted}, str(directory), strict="return_all"
    )
    _verify(
        directory,
        in_excess=[key for key in missing if key.startswith(_WEIGHTS)],
        missing=unexpected,
    )
    model.load_state_dict(loaded["model"])


def _verify(directory: Path, *, in_excess: Iterable[str], missing: Iterable[str]) -> None:
    """Refuse to compare a part of a model; what modules keep besides tensors is none."""
    for what, keys in (("has no place for", in_excess), ("misses", missing)):
        if wrong := sorted(key for key in keys if "_extra_state" not in key):
            raise CheckpointError(
                f"megatron-core's model {what} tensors of the checkpoint",
                where=str(directory),
                got=", ".join(wrong[:4]),
            )


def _load_pieces(model: Any, source: Source) -> None:
    """Fill the model from a checkpoint that our reader has opened."""
    import torch

    from flagscale.ckpt_io.sources import Sources
    from flagscale.layout.model import local_weights
    from flagscale.layout.parallel import ParallelLayout
    from flagscale.layout.pieces import Piece
    from flagscale.layout.pipeline import even_pipeline
    from flagscale.optim.proof import read_box

    spec = source.job.model
    pipeline = even_pipeline(spec.dims.num_layers, 1)
    params = local_weights(spec, ParallelLayout(1, 1, 1), pipeline, 0, 0, 0, 0, "local")
    pieces: dict[str, list[Piece]] = {}
    for piece in source.of_kind("weight"):
        pieces.setdefault(piece.tensor.name, []).append(piece)
    state = {name: value for name, value in model.state_dict().items() if value is not None}
    names = {param.name for param in params}
    _verify(source.directory, in_excess=names - state.keys(), missing=state.keys() - names)
    with Sources(source.directory) as files:
        for param in params:
            flat = state[param.name].view(-1)
            for box, first in param.boxes():
                into = flat[first : first + box.numel].view(box.shape)
                for piece in pieces[param.canonical]:
                    if (common := piece.box.intersection(box)) is None:
                        continue
                    at = common.shifted(tuple(-start for start in box.offset))
                    bits = torch.from_numpy(read_box(files, piece, common))
                    index = tuple(map(slice, at.offset, at.stop))
                    into[index].copy_(bits.view(getattr(torch, piece.dtype)))


if __name__ == "__main__":
    raise SystemExit(answer(sys.argv[1:], forward))
