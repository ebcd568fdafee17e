"""Converting beside copying the files, and beside loading the whole model and saving it.

A Llama of about a billion parameters with random weights (2.1 GB in bf16) is made once. Then, each
in a process of its own, timed from its start to its end:

    cp              the checkpoint is copied, and every file of the copy flushed
    from HF         tools/convert_from_hf.py, to torch_dist and to the legacy format at TP2 x PP2
    to HF           tools/convert_to_hf.py, with one worker and with two, with and without the proof
    whole model     torch's DCP loads all weights, torch cuts them, transformers' model takes them
                    and saves itself with save_pretrained

Peak memory is that of the process. Every variant writes to the same disk and reads what was just
written, so from the page cache if that is large enough. At the end the files of every export are
held against those of the model it all began with: byte for byte.

Example:
    python bench/convert.py --work-dir outputs/bench-convert
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness.measure import Measured, copy, run  # noqa: E402

LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB = 16, 2048, 5632, 16, 4, 64000

_WHOLE_MODEL = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig, AutoModelForCausalLM
reader = FileSystemReader(sys.argv[1] + "/release")
state = {
    key: torch.empty(entry.size, dtype=entry.properties.dtype)
    for key, entry in reader.read_metadata().state_dict_metadata.items()
    if isinstance(entry, TensorStorageMetadata)
}
dcp.load(state, storage_reader=reader, no_dist=True)
config = AutoConfig.from_pretrained(sys.argv[1] + "/release/hf")
heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
vocab, layers = config.vocab_size, "decoder.layers."
model = {
    "model.embed_tokens.weight": state["embedding.word_embeddings.weight"][:vocab],
    "model.norm.weight": state["decoder.final_layernorm.weight"],
    "lm_head.weight": state["output_layer.weight"][:vocab],
}
for layer in range(config.num_hidden_layers):
    def of(name):
        return state[layers + name][layer]
    qkv = of("self_attention.linear_qkv.weight").view(groups, -1, size, config.hidden_size)
    q, k, v = qkv.split([heads // groups, 1, 1], dim=1)
    gate, up = of("mlp.linear_fc1.weight").chunk(2)
    model |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in {
        "self_attn.q_proj": q.reshape(-1, config.hidden_size),
        "self_attn.k_proj": k.reshape(-1, config.hidden_size),
        "self_attn.v_proj": v.reshape(-1, config.hidden_size),
        "self_attn.o_proj": of("self_attention.linear_proj.weight"),
        "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": of("mlp.linear_fc2.weight"),
        "input_layernorm": of("self_attention.linear_qkv.layer_norm_weight"),
        "post_attention_layernorm": of("mlp.linear_fc1.layer_norm_weight"),
    }.items()}
with torch.device("meta"):
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
whole.load_state_dict(model, assign=True)
whole.save_pretrained(sys.argv[2], max_shard_size="5GB")
"""

_MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
layers, hidden, ffn, heads, groups, vocab = map(int, sys.argv[2:])
torch.manual_seed(1)
config = LlamaConfig(
    num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads,
    num_key_value_heads=groups, head_dim=hidden // heads, vocab_size=vocab,
    bos_token_id=None, eos_token_id=None,
)
with torch.device("meta"):
    model = LlamaForCausalLM(config).bfloat16()
state = {name: torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0, 0.02)
         for name, tensor in model.state_dict().items()}
model.load_state_dict(state, assign=True)
model.save_pretrained(sys.argv[1], max_shard_size="5GB")
"""


def tool(name: str, source: Path, destination: Path, *words: str) -> Measured:
    """One of the project's programs, with its own seconds."""
    argv = [sys.executable, ROOT / "tools" / name, "--load-dir", source, "--save-dir", destination]
    measured, text = run([*argv, *words])
    found = re.search(r"read, write +([\d,]+) and", text)
    own = re.search(r"bytes in ([\d.]+) s", text)
    if found is None or own is None:
        raise SystemExit(f"no figures in\n{text}")
    read = int(found[1].replace(",", ""))
    return Measured(measured.seconds, measured.peak_bytes, read, float(own[1]))


def size_of(directory: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def show(title: str, size: int, got: Measured) -> None:
    """One line of the table."""
    own = f"; {got.own_seconds:.1f} s of them its work" if got.own_seconds is not None else ""
    print(
        f"{title:44}{got.seconds:8.1f} s{size / got.seconds / 1e9:8.2f} GB/s"
        f"{got.peak_bytes / 2**20:9.0f} MiB{own}",
        flush=True,
    )


def differing(one: Path, other: Path) -> list[str]:
    """Weights and configuration files that are not the same bytes."""
    names = sorted(
        path.name
        for path in one.iterdir()
        if path.suffix == ".safetensors" or path.name.endswith((".index.json", "config.json"))
    )
    return (
        filecmp.cmpfiles(one, other, names, shallow=False)[1]
        + filecmp.cmpfiles(one, other, names, shallow=False)[2]
    )


def measure(work_dir: Path) -> int:
    """All variants; returns how many exports are not what they should be."""
    model, megatron, out = work_dir / "model", work_dir / "megatron", work_dir / "out"
    if not model.is_dir():
        run(
            [
                sys.executable,
                "-c",
                _MAKE,
                model,
                *map(str, (LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB)),
            ]
        )
    exports = ("--max-shard-size", "5GB", "--verify")
    imports = ("--make-vocab-size-divisible-by", "1", "--verify")
    spread = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
    legacy = ("--target-ckpt-format", "torch", *spread)
    shutil.rmtree(megatron, ignore_errors=True)
    show("from HF, torch_dist, proof of the weights", size_of(model),
         tool("convert_from_hf.py", model, megatron, *imports, "weights"))  # fmt: skip
    variants = {
        "cp, flushed": lambda: copy(megatron, out),
        "from HF, legacy TP2 x PP2, no proof": lambda: tool(
            "convert_from_hf.py", model, out, *legacy, *imports, "none"
        ),
        "to HF, 1 worker, no proof": lambda: tool(
            "convert_to_hf.py", megatron, out, *exports, "none", "--workers", "1"
        ),
        "to HF, 2 workers, no proof": lambda: tool(
            "convert_to_hf.py", megatron, out, *exports, "none"
        ),
        "to HF, 2 workers, proof of the weights": lambda: tool(
            "convert_to_hf.py", megatron, out, *exports, "weights"
        ),
        "whole model, save_pretrained": lambda: run(
            [sys.executable, "-c", _WHOLE_MODEL, megatron, out]
        )[0],
    }
    wrong, got = 0, {}
    for title, variant in variants.items():
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        got[title] = variant()
        show(title, size_of(megatron), got[title])
        if title.startswith(("to HF", "whole")) and (differ := differing(model, out)):
            wrong += 1
            print(f"    differs from the model: {', '.join(differ)}")
    shutil.rmtree(out, ignore_errors=True)
    cp, ours = got["cp, flushed"].seconds, got["to HF, 2 workers, no proof"]
    whole = got["whole model, save_pretrained"].seconds
    print(
        f"to HF with 2 workers is {cp / ours.seconds:.2f} x as fast as cp "
        f"({cp / (ours.own_seconds or ours.seconds):.2f} x without the start of the process) and "
        f"{whole / ours.seconds:.2f} x as fast as the whole model"
    )
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="Converting beside cp and beside a whole model.")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs" / "bench-convert")
    arguments = parser.parse_args(argv)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    return 1 if measure(arguments.work_dir) else 0


if __name__ == "__main__":
    raise SystemExit(main())
