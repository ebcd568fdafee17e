"""Upstream's own model with random weights, in a process of its own: its tensors and its logits.

transformers must not share the process: with upstream's device calls answered by a CPU, tensors
that transformers makes while it loads a model are never filled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["random_models"]

_LOGITS = "logits"


def random_models(
    words: Mapping[str, Sequence[str]], tokens: torch.Tensor, work_dir: Path
) -> dict[str, dict[str, Any]]:
    """Build models, give them random weights, and run them.

    Args:
        words: The command line of a job, for each name.
        tokens: [B, S] int64.
        work_dir: Where files go; must exist.

    Returns:
        For each name ``"args"`` by attribute, ``"tensors"`` by canonical name, and
        ``"logits"``, [B, S, padded vocabulary].
    """
    save_file({"tokens": tokens}, work_dir / "tokens.safetensors")
    (work_dir / "words.json").write_text(json.dumps({key: [*line] for key, line in words.items()}))
    environ = {
        **os.environ,
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"), "1"),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        "FLAGSCALE_PLATFORM": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "harness.upstream_logits", str(work_dir)]
    child = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if child.returncode:
        raise AssertionError(child.stderr[-5000:])
    return {name: _read(work_dir / name) for name in words}


def _read(base: Path) -> dict[str, Any]:
    tensors = load_file(f"{base}.safetensors")
    args = json.loads(Path(f"{base}.json").read_text())
    return {"args": args, "logits": tensors.pop(_LOGITS), "tensors": tensors}


def _main(directory: Path) -> None:
    import harness.preload  # noqa: F401 - a CPU answers upstream's device calls

    _initialize()
    tokens = load_file(directory / "tokens.safetensors")["tokens"]
    for name, line in json.loads((directory / "words.json").read_text()).items():
        args, tensors = _model(line, tokens)
        save_file(tensors, directory / f"{name}.safetensors")
        (directory / f"{name}.json").write_text(json.dumps(vars(args), default=str))


def _initialize() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from flagscale.patches.apply import apply
    from flagscale.patches.mla_local import GROUP

    apply([GROUP])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def _model(line: Sequence[str], tokens: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    from megatron.core import num_microbatches_calculator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import destroy_global_vars

    from flagscale.platforms.cpu import CPU

    destroy_global_vars()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    # Nothing is loaded or saved: a data set that needs no file will do.
    sys.argv = ["train", *line, "--mock-data", *CPU.megatron_arguments]
    args = parse_and_validate_args()
    config = gpt_config_from_args(args)
    builder = config.get_builder_cls()(config)
    model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()
    _fill(model)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        logits = model(tokens, positions, None)
    return args, {**_canonical(model), _LOGITS: logits}


def _fill(model: torch.nn.Module) -> None:
    """Weights large enough that every part of the model matters, and norms that differ."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor is None or name.endswith("_extra_state"):
                continue
            tensor.normal_(std=0.15 if tensor.dim() > 1 else 0.3)
            if name.endswith("norm.weight"):
                tensor.add_(1)


def _canonical(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_extra_state"):
            continue
        if expert := re.fullmatch(r"(.*\.experts\.)local_experts\.\d+\.(.*)", name):
            experts.setdefault(f"{expert[1]}experts.{expert[2]}", []).append(tensor)
            continue
        name = re.sub(r"\.input_layernorm\.", ".self_attention.linear_qkv.layer_norm_", name)
        found[re.sub(r"\.pre_mlp_layernorm\.", ".mlp.linear_fc1.layer_norm_", name)] = tensor
    return found | {name: torch.stack(tensors) for name, tensors in experts.items()}


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
