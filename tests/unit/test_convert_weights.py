"""The verification of converted weights: silent where all is well, and by name where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.elements import Bits, Ranges, box_ranges
from harness.saved_job import job_args
from harness.synthetic import FORMS, Synthetic
from safetensors.torch import save_file

from flagscale.ckpt_convert.families import family_of_arguments
from flagscale.ckpt_convert.proof import hf_directory, wholes
from flagscale.ckpt_convert.proof.weights import verify_weights
from flagscale.ckpt_convert.tensors import HFTensor, Shape, hf_tensors
from flagscale.errors import CheckpointError
from flagscale.layout.boxes import Box
from flagscale.layout.model import model_spec
from flagscale.optim.opening import open_source

State = dict[str, torch.Tensor]

HEADS, GROUPS, SIZE, HIDDEN, LAYERS, EXPERTS = 4, 2, 4, 16, 2, 4
JOB = {"num_layers": LAYERS, "group_query_attention": True, "num_query_groups": GROUPS}
MOE = {"num_experts": EXPERTS, "moe_ffn_hidden_size": 6, "expert_model_parallel_size": 2, "dp": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "interleaved": {"rotary_interleaved": True},
    "tied": {"untie_embeddings_and_output_weights": False},
    "qwen2": {"add_qkv_bias": True},
    "mixtral": MOE,
}


class Case:
    """A checkpoint of a model, and what Hugging Face's tensors of it are, by plain reshaping."""

    def __init__(self, name: str, form: str = "fully_reshardable", **edits: Any) -> None:
        self.synthetic = Synthetic(job_args(**{**JOB, **MODELS[name], **edits}), form)
        self.args = vars(self.synthetic.args)
        self.shape = Shape.of(self.args, model_spec(self.args), self.args["vocab_size"])
        self.tensors: list[HFTensor] = list(
            hf_tensors(family_of_arguments(self.args).rows, self.shape)
        )

    def canonical(self, name: str) -> torch.Tensor:
        shape = self.synthetic.whole[name].shape
        bits = self.synthetic.part("weight", name, box_ranges(Box.whole(shape)))
        return torch.from_numpy(bits.astype("uint16")).view(torch.bfloat16)

    def state(self, interleaved: bool | None = None) -> State:
        """The tensors by name; with rotary pairs as the model has them, or in another way."""
        if interleaved is None:
            interleaved = self.shape.interleaved
        vocab, tied = self.args["vocab_size"], "tied" in self.shape.features
        state = {
            "model.embed_tokens.weight": self.canonical("embedding.word_embeddings.weight")[:vocab],
            "model.norm.weight": self.canonical("decoder.final_layernorm.weight"),
        }
        if not tied:
            state["lm_head.weight"] = self.canonical("output_layer.weight")[:vocab]
        for layer in range(LAYERS):
            state |= self._layer(f"model.layers.{layer}.", f"decoder.layers.{layer}.", interleaved)
        return {name: tensor.contiguous() for name, tensor in state.items()}

    def _layer(self, to: str, of: str, interleaved: bool) -> State:
        qkv, per_group = f"{of}self_attention.linear_qkv.", HEADS // GROUPS + 2
        state = {
            f"{to}input_layernorm.weight": self.canonical(f"{qkv}layer_norm_weight"),
            f"{to}post_attention_layernorm.weight": self.canonical(
                f"{of}mlp.linear_fc1.layer_norm_weight"
            ),
            f"{to}self_attn.o_proj.weight": self.canonical(
                f"{of}self_attention.linear_proj.weight"
            ),
        }
        for kind in ("weight", "bias") if "qkv_bias" in self.shape.features else ("weight",):
            rows = self.canonical(f"{qkv}{kind}").view(GROUPS, per_group, SIZE, -1)
            parts = {"q": rows[:, : per_group - 2], "k": rows[:, -2:-1], "v": rows[:, -1:]}
            for name, part in parts.items():
                if interleaved and name != "v":
                    part = torch.cat((part[:, :, 0::2], part[:, :, 1::2]), 2)
                part = part.flatten() if kind == "bias" else part.flatten(0, 2)
                state[f"{to}self_attn.{name}_proj.{kind}"] = part
        if "experts" not in self.shape.features:
            gate, up = self.canonical(f"{of}mlp.linear_fc1.weight").chunk(2)
            down = self.canonical(f"{of}mlp.linear_fc2.weight")
            names = ("gate_proj", gate), ("up_proj", up), ("down_proj", down)
            return state | {f"{to}mlp.{name}.weight": tensor for name, tensor in names}
        fc1 = self.canonical(f"{of}mlp.experts.experts.linear_fc1.weight")
        fc2 = self.canonical(f"{of}mlp.experts.experts.linear_fc2.weight")
        moe = f"{to}block_sparse_moe."
        for expert in range(EXPERTS):
            gate, up = fc1[expert].chunk(2)
            for name, tensor in ("w1", gate), ("w2", fc2[expert]), ("w3", up):
                state[f"{moe}experts.{expert}.{name}.weight"] = tensor
        return state | {f"{moe}gate.weight": self.canonical(f"{of}mlp.router.weight")}

    def verify(self, directory: Path, state: State, **kwargs: Any) -> list[str]:
        """What is told about a directory with these tensors."""
        source = open_source(self.synthetic.write(directory / "megatron"))
        write(directory / "hf", state)
        return verify_weights(source, directory / "hf", self.tensors, self.shape, **kwargs)


def write(directory: Path, state: State, files: int = 1) -> None:
    """Tensors in one file, or in more with an index."""
    directory.mkdir(exist_ok=True)
    names = sorted(state)
    if files == 1:
        save_file({name: state[name].clone() for name in names}, directory / "model.safetensors")
        return
    file_of = {
        name: f"model-{index % files + 1:05}-of-{files:05}.safetensors"
        for index, name in enumerate(names)
    }
    for file in {*file_of.values()}:
        save_file({n: state[n].clone() for n in names if file_of[n] == file}, directory / file)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": file_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@cache
def case(name: str) -> Case:
    return Case(name, tp=2, pp=2)


# ---------------------------------------------------------------------------------------------
# All is well


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_a_faithful_conversion_has_no_problem(name: str, form: str, tmp_path: Path) -> None:
    one, done = Case(name, form, tp=2, pp=2), []
    assert one.verify(tmp_path, one.state(), on_progress=done.append) == []
    assert done == sorted(done)
    assert done[-1] == sum(2 * prod(tensor.shape) for tensor in one.tensors)


def test_blocks_of_rows_are_compared_like_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wholes, "_BLOCK", 3 * 2 * HIDDEN)
    monkeypatch.setattr(hf_directory, "_MAPPED", 0)
    one = case("mixtral")
    state = one.state()
    assert one.verify(tmp_path, state) == []
    state["lm_head.weight"].view(torch.int16)[-1, 5:8] ^= 1
    state["model.layers.1.self_attn.q_proj.weight"].view(torch.int16)[-2, 3] ^= 1
    first, second = sorted(one.verify(tmp_path, state))
    assert "lm_head.weight, from output_layer.weight: 3 of 976 elements differ" in first
    assert "the first at [60, 5]" in first
    assert "q_proj.weight" in second
    assert "the first at [14, 3]" in second


def test_an_index_and_its_files(tmp_path: Path) -> None:
    one = case("llama")
    source = open_source(one.synthetic.write(tmp_path / "megatron"))
    directory = tmp_path / "hf"
    write(directory, one.state(), files=3)

    def problems() -> list[str]:
        return verify_weights(source, directory, one.tensors, one.shape)

    assert problems() == []
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    size, first = index["metadata"]["total_size"], index["weight_map"]["lm_head.weight"]
    index["metadata"]["total_size"] += 2
    index["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
    index_file.write_text(json.dumps(index))
    assert problems() == [
        "lm_head.weight: model.safetensors.index.json says model-00003-of-00003.safetensors, "
        f"and it is in {first}",
        "model.safetensors.index.json: "
        f"total_size is {size + 2}, and the tensors have {size} bytes",
    ]
    index_file.write_text("{}")
    with pytest.raises(CheckpointError, match="no index of safetensors"):
        problems()
    index_file.unlink()
    assert "model.safetensors.index.json: missing" in problems()[0]
    (directory / "model-00002-of-00003.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no file of safetensors"):
        problems()


def test_another_element_type_is_compared_after_the_conversion(tmp_path: Path) -> None:
    one = Case("llama", bf16=False)
    whole = {name: tensor.float() for name, tensor in case("llama").state().items()}
    source = open_source(one.synthetic.write(tmp_path / "megatron"))
    directory = tmp_path / "hf"
    canonical = wholes.Wholes(source)
    want = {t.name: one_tensor(canonical, t, one.shape) for t in one.tensors}
    assert {name: tensor.shape for name, tensor in want.items()} == {
        name: tensor.shape for name, tensor in whole.items()
    }
    write(directory, {name: tensor.bfloat16() for name, tensor in want.items()})

    def problems(dtype: str | None) -> list[str]:
        return verify_weights(source, directory, one.tensors, one.shape, dtype=dtype)

    assert problems("bfloat16") == []
    assert len(problems(None)) == len(one.tensors)
    assert problems(None)[0].endswith("bfloat16 (61, 16), not float32 (61, 16)")
    # Cut off, where the nearest was asked for.
    cut_off = {n: (t.view(torch.int32) & -65536).view(torch.float32) for n, t in want.items()}
    write(directory, {name: tensor.bfloat16() for name, tensor in cut_off.items()})
    assert len(problems("bfloat16")) == len(one.tensors)


def one_tensor(canonical: wholes.Wholes, tensor: HFTensor, shape: Shape) -> torch.Tensor:
    """From the checkpoint's own reader: only the conversion of types is looked at."""
    from flagscale.ckpt_convert.proof.transforms import take

    rows = canonical.num_rows(tensor.canonical, None)
    return take(tensor, canonical.rows(tensor.canonical, None, 0, rows), shape).contiguous()


# ---------------------------------------------------------------------------------------------
# Faults

Q, K, V = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv")
GATE, UP = (f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up"))
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"


def swapped(first: str, second: str) -> Callable[[Case, State], State]:
    return lambda _, state: state | {first: state[second], second: state[first]}


def ungrouped(one: Case, state: State) -> State:
    """The rows of the fused tensor cut as if all queries came first."""
    rows = one.canonical("decoder.layers.0.self_attention.linear_qkv.weight")
    query, key, value = rows.split([HEADS * SIZE, GROUPS * SIZE, GROUPS * SIZE])
    return state | {Q: query, K: key, V: value}


def other_pairs(one: Case, state: State) -> State:
    return state | one.state(interleaved=not one.shape.interleaved)


def shifted(by: int) -> Callable[[Case, State], State]:
    def fault(one: Case, state: State) -> State:
        name = "model.embed_tokens.weight"
        rows = one.canonical("embedding.word_embeddings.weight").roll(-by, 0)
        return state | {name: rows[: len(state[name])]}

    return fault


def flipped(_: Case, state: State) -> State:
    bits = state["model.norm.weight"].view(torch.int16).clone()
    bits[7] ^= 1
    return state | {"model.norm.weight": bits.view(torch.bfloat16)}


def without(name: str) -> Callable[[Case, State], State]:
    return lambda _, state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("name", "fault", "expected"),
    [
        ("llama", swapped(GATE, UP), {GATE: f"it is what {UP} should be",
                                      UP: f"it is what {GATE} should be"}),
        ("llama", swapped(K, V), {K: f"it is what {V} should be", V: f"it is what {K} should be"}),
        ("llama", ungrouped, dict.fromkeys((Q, K, V), "its rows were not gathered by query group")),
        ("interleaved", other_pairs, {
            f"model.layers.{layer}.self_attn.{kind}_proj.weight": "its rotary pairs were left as"
            for layer in range(LAYERS) for kind in "qk"}),
        ("llama", other_pairs, {
            f"model.layers.{layer}.self_attn.{kind}_proj.weight": "its rotary pairs were reordered"
            for layer in range(LAYERS) for kind in "qk"}),
        ("llama", shifted(1), {"model.embed_tokens.weight": "each of its rows is the next"}),
        ("llama", shifted(-1), {"model.embed_tokens.weight": "each of its rows is the previous"}),
        ("llama", swapped("model.embed_tokens.weight", "lm_head.weight"), {
            "model.embed_tokens.weight": "it is what lm_head.weight should be",
            "lm_head.weight": "it is what model.embed_tokens.weight should be"}),
        ("llama", swapped(Q, Q.replace("0", "1")), {
            Q: f"it is what {Q.replace('0', '1')} should be",
            Q.replace("0", "1"): f"it is what {Q} should be"}),
        ("qwen2", swapped(K.replace("weight", "bias"), V.replace("weight", "bias")), {
            K.replace("weight", "bias"): f"it is what {V.replace('weight', 'bias')} should be",
            V.replace("weight", "bias"): f"it is what {K.replace('weight', 'bias')} should be"}),
        ("mixtral", swapped(EXPERT.format(1, "w1"), EXPERT.format(2, "w1")), {
            EXPERT.format(1, "w1"): f"it is what {EXPERT.format(2, 'w1')} should be",
            EXPERT.format(2, "w1"): f"it is what {EXPERT.format(1, 'w1')} should be"}),
        ("mixtral", swapped(EXPERT.format(0, "w1"), EXPERT.format(0, "w3")), {
            EXPERT.format(0, "w1"): f"it is what {EXPERT.format(0, 'w3')} should be",
            EXPERT.format(0, "w3"): f"it is what {EXPERT.format(0, 'w1')} should be"}),
        ("llama", flipped, {"model.norm.weight": "1 of 16 elements differ, the first at [7]"}),
        ("llama", without(UP), {UP: "missing"}),
        ("llama", lambda _, state: state | {"model.layers.2.x": state[Q]},
         {"model.layers.2.x": "unexpected, in model.safetensors"}),
        ("tied", lambda _, state: state | {"lm_head.weight": state["model.embed_tokens.weight"]},
         {"lm_head.weight": "unexpected, in model.safetensors"}),
        ("llama", lambda _, state: state | {Q: state[Q][:-1]}, {Q: "(15, 16), not bfloat16 (16,"}),
        ("llama", lambda _, state: state | {Q: state[Q].half()}, {Q: "float16 (16, 16), not bfl"}),
    ],
)  # fmt: skip
def test_a_fault_is_named(
    name: str,
    fault: Callable[[Case, State], State],
    expected: dict[str, str],
    tmp_path: Path,
) -> None:
    one = case(name)
    problems = one.verify(tmp_path, fault(one, one.state()))
    assert len(problems) == len(expected)
    for tensor, words in expected.items():
        (problem,) = (p for p in problems if p.startswith((f"{tensor}:", f"{tensor}, from")))
        assert words in problem
        canonical = [known.canonical for known in one.tensors if known.name == tensor]
        assert "missing" in words or all(known in problem for known in canonical)


class SameNorms(Synthetic):
    """All norms alike, as before any training."""

    def part(self, kind: str, name: str, ranges: Ranges) -> Bits:
        bits = super().part(kind, name, ranges)
        return np.zeros_like(bits) if "norm" in name else bits


def test_a_flipped_bit_among_equal_tensors_is_no_exchange(tmp_path: Path) -> None:
    one = Case("llama", hidden_size=160)
    one.synthetic = SameNorms(one.synthetic.args, one.synthetic.form)
    state, name = one.state(), "model.layers.0.input_layernorm.weight"
    state[name].view(torch.int16)[7] ^= 1
    (problem,) = one.verify(tmp_path, state)
    assert problem.startswith(f"{name}, from decoder.layers.0.self_attention.linear_qkv.layer_norm")
    assert "1 of 160 elements differ, the first at [7]: " in problem
    assert ";" not in problem


# ---------------------------------------------------------------------------------------------
# A table that is wrong itself


def changed(tensors: list[HFTensor], name: str, **edits: Any) -> list[HFTensor]:
    return [replace(t, **edits) if t.name == name else t for t in tensors]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: [t for t in tensors if t.name != UP],
         "decoder.layers.1.mlp.linear_fc1.weight: 24 of 48 rows are in no tensor, the first [24]"),
        (lambda tensors: changed(tensors, UP, take="gate"),
         "decoder.layers.1.mlp.linear_fc1.weight: 24 of 48 rows are in more than one place, the"),
        (lambda tensors: changed(tensors, "lm_head.weight", take="whole"),
         "lm_head.weight: of output_layer.weight comes (64, 16), not (61, 16)"),
        (lambda tensors: changed(tensors, "lm_head.weight", canonical="head"),
         "lm_head.weight: the checkpoint has no head"),
        (lambda tensors: changed(tensors, "lm_head.weight", canonical="head"),
         "output_layer.weight: 64 of 64 rows are in no tensor, the first [0]"),
    ],
)  # fmt: skip
def test_rows_in_no_tensor_or_in_two_are_told(
    edit: Callable[[list[HFTensor]], list[HFTensor]], words: str, tmp_path: Path
) -> None:
    one = case("llama")
    source = open_source(one.synthetic.write(tmp_path / "megatron"))
    write(tmp_path / "hf", one.state())
    problems = verify_weights(source, tmp_path / "hf", edit(one.tensors), one.shape)
    assert [problem for problem in problems if words in problem]


def test_an_expert_that_is_used_twice_is_told(tmp_path: Path) -> None:
    one, name = case("mixtral"), EXPERT.format(1, "w2")
    source = open_source(one.synthetic.write(tmp_path / "megatron"))
    write(tmp_path / "hf", one.state())
    problems = verify_weights(
        source, tmp_path / "hf", changed(one.tensors, name, expert=2), one.shape
    )
    canonical = "decoder.layers.0.mlp.experts.experts.linear_fc2.weight"
    assert f"{canonical}: 16 of 64 rows are in no tensor, the first [1, 0]" in problems
    assert f"{canonical}: 16 of 64 rows are in more than one place, the first [2, 0]" in problems
    (wrong,) = (problem for problem in problems if problem.startswith(name))
    assert "of expert 2" in wrong


def test_a_source_that_lacks_a_part_is_an_error(tmp_path: Path) -> None:
    one = case("llama")
    source = open_source(one.synthetic.write(tmp_path / "megatron"))
    write(tmp_path / "hf", one.state())
    lost = next(p for p in source.pieces if p.tensor == ("weight", "output_layer.weight"))
    pieces = tuple(piece for piece in source.pieces if piece is not lost)
    with pytest.raises(CheckpointError, match="not hold a tensor exactly once") as caught:
        verify_weights(replace(source, pieces=pieces), tmp_path / "hf", one.tensors, one.shape)
    assert "output_layer.weight" in str(caught.value.where)
    path = source.directory / lost.region.file
    path.write_bytes(path.read_bytes()[: lost.region.offset])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        verify_weights(source, tmp_path / "hf", one.tensors, one.shape)
    assert str(caught.value.where) == str(path)
