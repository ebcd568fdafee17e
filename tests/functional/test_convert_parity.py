"""The two real models give the same logits, and where they do not, it is said where.

The Hugging Face directories are made here, from canonical tensors by plain slicing and by
``save_pretrained``: nothing of the converter has a part in them.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from harness import train
from harness.corpus import VOCAB_SIZE, model_argv
from harness.families import FAMILIES
from safetensors.torch import load_file, save_file

from flagattention.hf import rope_parameters
from flagattention.nlpe import Method
from flagscale.ckpt_convert.proof import megatron_logits, transformers_logits
from flagscale.ckpt_convert.proof.forward import Array, Request, run
from flagscale.ckpt_convert.proof.parity import (
    Parity,
    compare,
    first_departure,
    fits_in_memory,
    free_memory,
    measure,
    tokens,
)
from flagscale.ckpt_io.sources import Sources
from flagscale.errors import CheckpointError, ConfigError
from flagscale.optim.opening import open_source
from flagscale.optim.proof import read_box
from flagscale.plugins import load_plugins

Tensors = dict[str, torch.Tensor]

_TP, _PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
_TP2_PP2 = {_TP: 2, _PP: 2}
_EXPERTS: dict[str, object] = {
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}


@dataclass(frozen=True)
class Case:
    """A job, and transformers' class and configuration of the same model."""

    family: str = "Llama"
    nproc: int = 1
    words: tuple[str, ...] = ()
    arguments: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)


CASES = {
    "TP1": Case(),
    "TP2xPP2, legacy": Case(nproc=4, arguments={**_TP2_PP2, "ckpt_format": "torch"}),
    "interleaved, our own arguments": Case(
        nproc=2,
        arguments={
            _TP: 2,
            "rotary_interleaved": True,
            "norm_init_weight": 0.3,
            "embedding_lookup_in_fp32": True,
            "rotary_in_fp32": True,
        },
    ),
    "QKV bias, tied": Case(
        family="Qwen2",
        nproc=2,
        arguments={_PP: 2, "add_qkv_bias": True, "untie_embeddings_and_output_weights": None},
        config={"tie_word_embeddings": True},
    ),
    "experts, EP2, legacy": Case(
        family="Mixtral",
        nproc=2,
        arguments={**_EXPERTS, "expert_model_parallel_size": 2, "ckpt_format": "torch"},
        config={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}

_LATENT = {
    "head_dim": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
CASES |= {
    "latent attention, TP2xPP2": Case(
        family="DeepseekV2",
        nproc=4,
        words=FAMILIES["deepseek_v2"],
        arguments={**_TP2_PP2, "sequence_parallel": True, "group_query_attention": None},
        config={**_LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2},
    ),
}


_EXTEND = {"nlpe_method": "self-extend", "nlpe_window": 12, "nlpe_group": 3}
CASES |= {
    "Self-Extend, QKV bias, interleaved": Case(
        family="Qwen2",
        arguments={**_EXTEND, "add_qkv_bias": True, "rotary_interleaved": True},
        config={
            "rope_parameters": rope_parameters(
                Method("self-extend", 12, group=3), {"rope_theta": 10000.0}
            )
        },
    ),
}


@dataclass(frozen=True)
class Trained:
    """A checkpoint of Megatron and the same model of transformers."""

    megatron: Path
    hf: Path

    def compare(self, **more: Any) -> Parity:
        return compare(self.megatron, None, self.hf, vocab_size=VOCAB_SIZE, **more)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Train a case, once, and make its Hugging Face directory."""
    made: dict[str, Trained] = {}

    def trained(name: str) -> Trained:
        if name not in made:
            case, work = CASES[name], tmp_path_factory.mktemp("parity")
            argv = model_argv(
                corpus, save=work / "megatron", save_interval=3, train_iters=3, lr=1e-2,
                init_method_std=0.1, **case.arguments,
            )  # fmt: skip
            argv += case.words
            train(argv, work / "logs", case.nproc).require_success()
            write_hf(case, work / "megatron", work / "hf")
            made[name] = Trained(work / "megatron", work / "hf")
        return made[name]

    return trained


def write_hf(case: Case, megatron: Path, hf: Path) -> None:
    args, tensors = read_whole(megatron)
    config: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.moe_ffn_hidden_size or args.ffn_hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_query_groups,
        "head_dim": args.kv_channels,
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(args.rotary_base)},
        "tie_word_embeddings": False,
        **case.config,
    }
    own = getattr(transformers, f"{case.family}Config")(**config)
    model = getattr(transformers, f"{case.family}ForCausalLM")(own).to(torch.bfloat16)
    state = {"model.norm.weight": tensors["decoder.final_layernorm.weight"]}
    state["model.embed_tokens.weight"] = tensors["embedding.word_embeddings.weight"][:VOCAB_SIZE]
    head = tensors.get("output_layer.weight", tensors["embedding.word_embeddings.weight"])
    state["lm_head.weight"] = head[:VOCAB_SIZE]
    for layer in range(args.num_layers):
        part = {
            name.removeprefix(f"decoder.layers.{layer}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        for name, tensor in layer_of_hf(args, part).items():
            state[f"model.layers.{layer}.{name}"] = tensor
    model.load_state_dict(state)
    model.save_pretrained(hf)


def read_whole(directory: Path) -> tuple[Namespace, Tensors]:
    """The canonical tensors of a checkpoint."""
    source = open_source(directory, weights_only=True)
    whole: Tensors = {}
    with Sources(source.directory) as files:
        for piece in source.of_kind("weight"):
            shape, _ = source.tensors[piece.tensor]
            dtype = getattr(torch, piece.dtype)
            tensor = whole.setdefault(piece.tensor.name, torch.empty(shape, dtype=dtype))
            bits = torch.from_numpy(read_box(files, piece, piece.box))
            tensor[tuple(map(slice, piece.box.offset, piece.box.stop))] = bits.view(dtype)
    return source.args, whole


def layer_of_hf(args: Namespace, part: Tensors) -> Tensors:
    state = {
        "self_attn.o_proj.weight": part["self_attention.linear_proj.weight"],
        "input_layernorm.weight": part["self_attention.linear_qkv.layer_norm_weight"],
        "post_attention_layernorm.weight": part["mlp.linear_fc1.layer_norm_weight"],
    }
    for kind in ("weight", "bias"):
        if (fused := part.get(f"self_attention.linear_qkv.{kind}")) is not None:
            for name, rows in split_qkv(args, fused).items():
                state[f"self_attn.{name}_proj.{kind}"] = rows
    renamed = {**RENAMED, **(RENAMED_LATENT if args.multi_latent_attention else {})}
    state |= {name: part[ours] for ours, name in renamed.items() if ours in part}
    for ours, name in (("mlp.", "mlp."), ("mlp.shared_experts.", "mlp.shared_experts.")):
        if (first := part.get(f"{ours}linear_fc1.weight")) is not None:
            gate, up = first.chunk(2)
            state |= {f"{name}gate_proj.weight": gate, f"{name}up_proj.weight": up}
            state[f"{name}down_proj.weight"] = part[f"{ours}linear_fc2.weight"]
    return state


RENAMED = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.experts.experts.linear_fc1.weight": "mlp.experts.gate_up_proj",
    "mlp.experts.experts.linear_fc2.weight": "mlp.experts.down_proj",
}
RENAMED_LATENT = {
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
}


def split_qkv(args: Namespace, fused: torch.Tensor) -> Tensors:
    groups = fused.view(args.num_query_groups, -1, args.kv_channels, *fused.shape[1:])
    parts = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}
    if args.rotary_interleaved:
        for name in ("q", "k"):
            first, second = parts[name][:, :, 0::2], parts[name][:, :, 1::2]
            parts[name] = torch.cat((first, second), dim=2)
    return {name: rows.reshape(-1, *fused.shape[1:]) for name, rows in parts.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_has_the_same_logits(trained: Callable[[str], Trained], name: str) -> None:
    parity = trained(name).compare()
    assert parity.passed, "\n".join(parity.report())
    assert parity.relative < 2e-6
    assert parity.positions == 128
    assert parity.vocab_size == VOCAB_SIZE
    assert parity.logit_range > 1


def test_bf16_is_reported_and_not_gated(trained: Callable[[str], Trained]) -> None:
    parity = trained("TP2xPP2, legacy").compare(dtype="bfloat16", sequences=1, length=1000)
    assert 1e-4 < parity.relative < 5e-2
    assert parity.passed
    assert parity.positions == 64
    assert any("reported only" in line for line in parity.report())


def swapped(one: str, other: str) -> Callable[[Tensors], None]:
    def fault(state: Tensors) -> None:
        state[one], state[other] = state[other], state[one]

    return fault


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def fault(state: Tensors) -> None:
        state[name] = change(state[name])

    return fault


def interleaved_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows in the order that interleaved rotary wants, of heads of 16."""
    return rows.view(-1, 2, 8, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def rows_not_by_group(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(2, -1, rows.shape[-1]).transpose(0, 1).reshape(rows.shape)


def vocabulary_off_by_one(state: Tensors) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name].roll(1, 0)


_L = "model.layers."
_FAULTS: dict[str, tuple[str, Callable[[Tensors], None], str]] = {
    "gate and up swapped": (
        "TP2xPP2, legacy",
        swapped(f"{_L}2.mlp.gate_proj.weight", f"{_L}2.mlp.up_proj.weight"),
        "layer 2: mlp.gate_proj,",
    ),
    "QKV rows permuted": (
        "TP2xPP2, legacy",
        replaced(f"{_L}1.self_attn.k_proj.weight", rows_not_by_group),
        "layer 1: self_attn.k_proj,",
    ),
    "rotary not taken apart": (
        "interleaved, our own arguments",
        replaced(f"{_L}3.self_attn.q_proj.weight", interleaved_rows),
        "layer 3: self_attn.q_proj,",
    ),
    "vocabulary off by one": ("TP2xPP2, legacy", vocabulary_off_by_one, "embed_tokens,"),
    "head off by one": (
        "TP2xPP2, legacy",
        replaced("lm_head.weight", lambda rows: rows.roll(1, 0)),
        "logits,",
    ),
    "one number": (
        "TP2xPP2, legacy",
        replaced(f"{_L}2.self_attn.o_proj.weight", lambda rows: rows + 0.01 * (rows == rows[3, 3])),
        "layer 2: self_attn.o_proj,",
    ),
    "a norm": (
        "TP2xPP2, legacy",
        replaced(f"{_L}3.post_attention_layernorm.weight", lambda rows: rows * 1.01),
        "layer 3: post_attention_layernorm,",
    ),
    "two experts swapped": (
        "experts, EP2, legacy",
        swapped(
            f"{_L}1.block_sparse_moe.experts.0.w1.weight",
            f"{_L}1.block_sparse_moe.experts.2.w1.weight",
        ),
        "layer 1: mlp (experts 0, 2),",
    ),
    "the router": (
        "experts, EP2, legacy",
        replaced(f"{_L}2.block_sparse_moe.gate.weight", lambda rows: rows.roll(1, 0)),
        "layer 2: mlp.experts,",
    ),
}


def damaged(hf: Path, fault: Callable[[Tensors], None], into: Path) -> Path:
    shutil.copytree(hf, into)
    file = into / "model.safetensors"
    state = load_file(file)
    fault(state)
    dense = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(dense, file, metadata={"format": "pt"})
    return into


@pytest.fixture(scope="module")
def megatron_trace(
    trained: Callable[[str], Trained],
) -> Callable[[str], tuple[Array, dict[str, Array]]]:
    """Tokens, and the trace of Megatron's model on them: the same for every fault."""
    made: dict[str, tuple[Array, dict[str, Array]]] = {}

    def megatron_trace(name: str) -> tuple[Array, dict[str, Array]]:
        if name not in made:
            ids = tokens(VOCAB_SIZE, 1, 64)
            directory = trained(name).megatron / "iter_0000003"
            asked = Request(str(directory), VOCAB_SIZE, "float32", trace=True)
            made[name] = ids, run("megatron_logits", asked, ids)
        return made[name]

    return megatron_trace


@pytest.mark.parametrize("name", _FAULTS)
def test_a_fault_is_found_and_placed(
    trained: Callable[[str], Trained],
    megatron_trace: Callable[[str], tuple[Array, dict[str, Array]]],
    tmp_path: Path,
    name: str,
) -> None:
    case, fault, where = _FAULTS[name]
    ids, ours = megatron_trace(case)
    sound = Request(str(trained(case).hf), VOCAB_SIZE, "float32", trace=True)
    theirs = transformers_logits.forward(sound, ids)
    assert measure(ours["logits"], theirs["logits"], "float32").passed
    assert "nowhere by more than" in first_departure(ours, theirs)
    broken = replace(sound, directory=str(damaged(trained(case).hf, fault, tmp_path / "hf")))
    theirs = transformers_logits.forward(broken, ids)
    assert not measure(ours["logits"], theirs["logits"], "float32").passed
    assert first_departure(ours, theirs).startswith(where)


def test_every_place_is_compared(
    trained: Callable[[str], Trained],
    megatron_trace: Callable[[str], tuple[Array, dict[str, Array]]],
) -> None:
    ids, ours = megatron_trace("TP2xPP2, legacy")
    asked = Request(str(trained("TP2xPP2, legacy").hf), VOCAB_SIZE, "float32", trace=True)
    theirs = transformers_logits.forward(asked, ids)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if key.startswith("3/")] == [
        "3/input_layernorm", "3/self_attn.q_proj", "3/self_attn.k_proj", "3/self_attn.v_proj",
        "3/input of self_attn.o_proj", "3/self_attn.o_proj", "3/post_attention_layernorm",
        "3/mlp.gate_proj", "3/mlp.up_proj", "3/input of mlp.down_proj", "3/mlp", "3/",
    ]  # fmt: skip


def test_a_fault_from_end_to_end(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    sound = trained("TP1")
    fault = swapped(f"{_L}0.mlp.gate_proj.weight", f"{_L}0.mlp.up_proj.weight")
    broken = damaged(sound.hf, fault, tmp_path / "hf")
    parity = compare(sound.megatron, 3, broken, vocab_size=VOCAB_SIZE)
    assert not parity.passed
    assert parity.report()[-1].startswith("first departs in    layer 0: mlp.gate_proj, by ")


def test_what_cannot_be_compared_is_an_error(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    sound = trained("TP1")
    with pytest.raises(ConfigError, match="not compared in this type"):
        sound.compare(dtype="float16")
    with pytest.raises(CheckpointError, match="configuration of the model"):
        compare(sound.megatron, None, tmp_path, vocab_size=VOCAB_SIZE)
    missing = damaged(sound.hf, lambda state: state.pop("model.norm.weight"), tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"(?s)missing_keys: .*model\.norm\.weight"):
        compare(sound.megatron, None, missing, vocab_size=VOCAB_SIZE)
    with pytest.raises(CheckpointError, match="true vocabulary"):
        compare(sound.megatron, None, sound.hf, vocab_size=VOCAB_SIZE + 1)


def test_ties_are_told_and_nothing_else_counts_as_one() -> None:
    left = np.zeros((1, 3, 4), np.float32)
    left[..., 0], left[..., 1], left[..., 3] = 1.0, 1.0, -1.0
    right = left.copy()
    right[0, 0, 1] += 1e-6  # within 1e-6 of the range, which is 2
    parity = measure(left, right, "float32")
    assert (parity.top1_agreement, parity.ties, parity.passed) == (1.0, 1, True)
    assert "100.00% of the positions, 1 by rounding" in "\n".join(parity.report())
    right[0, 1, 1] += 1e-5
    parity = measure(left, right, "float32")
    assert (parity.ties, parity.passed) == (1, False)
    assert parity.top1_agreement == pytest.approx(2 / 3)
    assert parity.relative < 1e-4


def test_the_gate() -> None:
    left = np.array([[[0.0, 1.0, 2.0]]], np.float32)
    assert measure(left, left + np.float32([0.0, 1.9e-4, 0.0]), "float32").passed
    assert not measure(left, left + np.float32([0.0, 2.1e-4, 0.0]), "float32").passed
    assert not measure(left, left * np.float32("nan"), "float32").passed
    assert not measure(left * np.float32("nan"), left, "float32").passed
    assert not measure(left * 0, left, "float32").passed


def test_tokens_are_of_the_whole_vocabulary(tmp_path: Path) -> None:
    ids = tokens(50, 4, 1000, seed=3)
    assert (ids.shape, ids.dtype) == ((4, 1000), np.dtype(np.int64))
    assert set(ids.flat) == set(range(50))
    np.testing.assert_array_equal(ids, tokens(50, 4, 1000, seed=3, tokenizer_dir=tmp_path))
    assert (ids != tokens(50, 4, 1000, seed=4)).any()


def test_the_first_tokens_are_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.BPE({"a": 0, "e": 1, "[UNK]": 9}, [], unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    ids = tokens(50, 2, 2000, tokenizer_dir=tmp_path)
    assert set(ids[0]) == {0, 1, 9}
    assert set(ids[1]) == set(range(50))
    with pytest.raises(CheckpointError, match="does not fit"):
        tokens(9, 2, 10, tokenizer_dir=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokens(50, 2, 10, tokenizer_dir=tmp_path)


def test_memory_is_what_the_machine_and_the_control_groups_leave(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    16777216 kB\n")
    assert [*free_memory(tmp_path)] == [16 << 30]
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    group = tmp_path / "sys/fs/cgroup/job"
    (group / "step").mkdir(parents=True)
    (group / "step/memory.max").write_text("max\n")
    (group / "memory.max").write_text(f"{8 << 30}\n")
    (group / "memory.current").write_text(f"{5 << 30}\n")
    (group / "memory.stat").write_text(f"anon 7\nactive_file {1 << 30}\ninactive_file {2 << 30}\n")
    assert [*free_memory(tmp_path)] == [16 << 30, 6 << 30]
    assert fits_in_memory(800_000_000, root=tmp_path)
    assert not fits_in_memory(900_000_000, root=tmp_path)
    assert fits_in_memory(900_000_000, "bfloat16", root=tmp_path)
    assert fits_in_memory(1)
    assert not fits_in_memory(10**15)


def test_options_that_ask_for_patches_are_given_again() -> None:
    saved = Namespace(rotary_in_fp32=True, embedding_lookup_in_fp32=False, norm_init_weight=0.3)
    words = megatron_logits.as_given(saved, load_plugins())
    assert words == ["--norm-init-weight", "0.3", "--rotary-in-fp32"]
