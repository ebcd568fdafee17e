"""The map written beside a checkpoint, held to the checkpoint: what it points at is the weight."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from harness import train
from harness.checkpoint import read_tensors
from harness.corpus import model_argv

from flagscale.ckpt_io.buffer_map import read_maps

_LAYERS = {"pp2": (2, 0), "pp2-vpp2": (1, 2)}
"""Layers a stage, and from one chunk of a rank to its next, by the name of the layout."""


@pytest.mark.parametrize(
    ("name", "nproc", "arguments"),
    [
        ("plain", 2, {}),
        ("pp2", 2, {"pipeline_model_parallel_size": 2,
                    "untie_embeddings_and_output_weights": None}),
        (
            "pp2-vpp2",
            2,
            {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
        ),
        ("many-buckets", 3, {"overlap_grad_reduce": True, "ddp_bucket_size": 20000}),
        (
            "ep2",
            2,
            {"num_experts": 4, "expert_model_parallel_size": 2, "moe_ffn_hidden_size": 96,
             "moe_token_dispatcher_type": "alltoall"},
        ),
    ],
)  # fmt: skip
def test_the_map_points_at_the_weights(
    corpus: Path, tmp_path: Path, name: str, nproc: int, arguments: dict[str, object]
) -> None:
    argv = model_argv(corpus, save=tmp_path / "ck", train_iters=2, save_interval=2, **arguments)
    train(argv, tmp_path / "logs", nproc=nproc).require_success()
    directory = tmp_path / "ck" / "iter_0000002"
    tensors = read_tensors(directory)
    found = 0
    for optimizer_map in read_maps(directory):
        prefix = "optimizer.distributed."
        if name == "ep2":
            prefix = f"chained_{optimizer_map.optimizer}.{prefix}"
        for index, buffer in enumerate(optimizer_map.buffers):
            dtypes = f"(torch.{buffer.param_dtype}, torch.{buffer.grad_dtype})"
            for parameter in buffer.parameters:
                bucket = buffer.buckets[parameter.bucket]
                key = (
                    f"{prefix}dp_group_idx_{optimizer_map.group}.gbuf_idx_{index}.dtype_{dtypes}"
                    f".bucket_idx_{parameter.bucket}.param"
                )
                assert tensors[key].numel() == bucket.numel_unpadded
                start, end = parameter.start - bucket.start, parameter.end - bucket.start
                main = tensors[key][start:end].view(parameter.shape)
                expected = _weight(tensors, name, optimizer_map.pp_rank, optimizer_map.ep_rank,
                                   buffer.chunk, parameter.name)  # fmt: skip
                assert torch.equal(main.to(expected.dtype), expected), parameter.name
                found += main.numel()
    weights = {key: value for key, value in tensors.items() if key.startswith(_MODEL)}
    tied = weights["embedding.word_embeddings.weight"].numel() if name == "pp2" else 0
    assert found == sum(value.numel() for value in weights.values()) + tied


_MODEL = ("embedding.", "decoder.", "output_layer.")


def _weight(
    tensors: dict[str, torch.Tensor],
    name: str,
    pp_rank: int,
    ep_rank: int,
    chunk: int,
    parameter: str,
) -> torch.Tensor:
    """The rank's part of the weight, from what upstream saved of the model."""
    if parameter == "output_layer.weight" and parameter not in tensors:
        parameter = "embedding.word_embeddings.weight"  # tied
    layer = re.match(r"decoder\.layers\.(\d+)\.(.*)", parameter)
    if layer is None:
        return tensors[parameter]
    a_stage, a_chunk = _LAYERS.get(name, (0, 0))
    key = layer[2].replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    key = re.sub(r"pre_mlp_layernorm\.weight", "mlp.linear_fc1.layer_norm_weight", key)
    if f"decoder.layers.{key}" not in tensors:  # a MoE layer keeps the norm's own name
        key = "pre_mlp_layernorm.weight" if "layer_norm" in key else key
    expert = re.match(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", key)
    number = int(layer[1]) + pp_rank * a_stage + chunk * a_chunk
    if expert is None:
        return tensors[f"decoder.layers.{key}"][number]
    stacked = tensors[f"decoder.layers.mlp.experts.experts.{expert[2]}"]
    return stacked[number, 2 * ep_rank + int(expert[1])]
