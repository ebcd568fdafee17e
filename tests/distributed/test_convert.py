"""What was converted trains: stock upstream loads it, and its first loss is transformers' own."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.conversion import convert, judge, train_family, write_tokenizer
from harness.corpus import model_argv
from harness.program import run_program
from harness.reshard import run_stock
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flagscale.ckpt_convert.opening import open_hf
from flagscale.ckpt_convert.proof.claim import prove
from flagscale.ckpt_convert.to_megatron import Import, plan_import
from flagscale.ckpt_copy.run import run
from flagscale.launch.options import known_options
from flagscale.optim.carry import Request

LENGTH = 32
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "initializer_range": 0.2,
    "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "head_dim": 8, "rms_norm_eps": 1e-5,
}  # fmt: skip


def a_model(directory: Path, family: str, vocab_size: int, **more: object) -> None:
    kind = CONFIG_MAPPING[family]
    known = {**SMALL, "vocab_size": vocab_size, **more}
    fields = kind().to_dict()
    torch.manual_seed(1)
    config = kind(**{key: value for key, value in known.items() if key in fields})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


def imported(
    hf_dir: Path, save_dir: Path, request: Request, level: str, **options: object
) -> Import:
    planned = plan_import(open_hf(hf_dir, spec="local"), request, known_options(), **options)  # type: ignore[arg-type]
    run(
        planned.copy,
        save_dir / "release",
        tracker="release",
        prove=lambda staged: print(prove(planned.claim(staged), level)),  # type: ignore[arg-type]
    )
    return planned


@pytest.fixture(scope="module")
def periodic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A corpus of which every sample, wherever it begins, is the same; and that sample."""
    prefix = tmp_path_factory.mktemp("periodic") / "text_document"
    sample = np.random.default_rng(0).integers(0, 250, LENGTH).tolist()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(torch.tensor(sample * 64), [LENGTH * 64])
    builder.finalize(f"{prefix}.idx")
    return prefix, sample


@pytest.mark.parametrize(
    ("family", "more", "ckpt_format", "request_", "words"),
    [
        pytest.param(
            "llama", {}, "torch_dist", Request(), {"tensor_model_parallel_size": 2}, id="llama-TP2"
        ),
        pytest.param(
            "qwen2",
            {"tie_word_embeddings": True},
            "torch",
            Request(tp_size=2, pp_size=2),
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            id="qwen2-tied-legacy-TP2xPP2",
        ),
        pytest.param(
            "qwen3_moe",
            {},
            "torch_dist",
            Request(),
            {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
            id="qwen3_moe-EP2",
        ),
    ],
)
def test_stock_upstream_starts_from_it(
    periodic: tuple[Path, list[int]],
    tmp_path: Path,
    family: str,
    more: dict[str, object],
    ckpt_format: str,
    request_: Request,
    words: dict[str, object],
) -> None:
    prefix, sample = periodic
    a_model(tmp_path / "hf", family, 256, **more)
    planned = imported(
        tmp_path / "hf", tmp_path / "mg", request_, "weights",
        ckpt_format=ckpt_format, divisible_by=1,
    )  # fmt: skip
    model = {name.replace("-", "_"): value for name, value in planned.section.items()}
    # What the usual tiny model has, and this one only if its section says so.
    usual = ("num_query_groups", "group_query_attention", "untie_embeddings_and_output_weights")
    argv = _argv(prefix, tmp_path / "mg", ckpt_format, {**dict.fromkeys(usual), **model, **words})
    nproc = 4 if "pipeline_model_parallel_size" in words else 2
    result = run_stock(argv, tmp_path / "train", nproc).require_success()
    ids = torch.tensor([sample])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(ids).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, ids[0].roll(-1)).item()
    assert abs(loss - math.log(256)) > 0.2  # so a model that was left at its start shows
    assert result.losses[1] == pytest.approx(loss, rel=1e-5)


def _argv(prefix: Path, load: Path, ckpt_format: str, model: dict[str, object]) -> list[str]:
    fixed: dict[str, object] = {
        "bf16": False, "vocab_size": 255, "make_vocab_size_divisible_by": 1, "global_batch_size": 4,
        "seq_length": LENGTH, "train_iters": 1, "load": load, "finetune": True,
        "exit_on_missing_checkpoint": True, "ckpt_format": ckpt_format,
    }  # fmt: skip
    return model_argv(prefix, **{**model, **fixed})


def test_an_odd_vocabulary_is_padded_and_its_logits_agree(tmp_path: Path) -> None:
    a_model(tmp_path / "hf", "llama", 61)
    planned = imported(tmp_path / "hf", tmp_path / "mg", Request(tp_size=2), "logits")
    assert planned.target.job.model.dims.padded_vocab_size == 256


def test_a_wrong_configuration_is_found_by_the_logits(corpus: Path, tmp_path: Path) -> None:
    """The weights are equal to the bit, and the model is another one all the same."""
    checkpoint, place = train_family("llama", "TP1", corpus, tmp_path), tmp_path / "hf"
    convert(checkpoint, place, "weights", tokenizer=write_tokenizer(tmp_path / "tokenizer"))
    config = (place / "config.json").read_text()
    assert '"rope_theta": 10000.0' in config
    (place / "config.json").write_text(config.replace("10000.0", "100.0"))
    check = ("convert_to_hf", "--load-dir", checkpoint, "--check", place, "--verify")
    assert run_program(*check, "weights").code == 0
    wrong = run_program(*check, "auto")
    assert wrong.code == 1
    assert "do not compute the same logits" in wrong.err
    assert "first departs in    layer 0: " in wrong.err


CELLS = [("qwen2", "TP2xPP2"), ("deepseek_v3", "EP2xPP2")]


@pytest.mark.parametrize(("family", "layout"), CELLS, ids=map("-".join, CELLS))
def test_a_trained_model_is_converted_loaded_and_generates(
    corpus: Path, tmp_path: Path, family: str, layout: str
) -> None:
    """A subset of docs/convert-families.md."""
    checkpoint = train_family(family, layout, corpus, tmp_path)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    export, proof = convert(checkpoint, tmp_path / "hf", "auto", tokenizer=tokenizer)
    assert export.family.name == family
    assert proof.tensors == len(export.tensors)
    (parity,) = proof.parities
    assert parity.passed
    assert parity.relative < 5e-6
    judged = judge(tmp_path / "hf")
    assert (judged.complaints, judged.misfits) == ((), ())
    assert judged.architecture == export.family.architecture
    assert judged.text.startswith("What did the model")
    assert len(judged.text) > len("What did the model")
