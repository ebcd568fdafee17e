"""tools/convert_to_hf.py and tools/convert_from_hf.py as their users meet them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.conversion import write_tokenizer
from harness.program import TOOLS, Ended, content, run_program
from harness.saved_job import ITERATION, job_args
from harness.synthetic import Synthetic
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHTS = "model.safetensors"
VOCAB = 61  # of job_args, which pads it to 64


def to_hf(*words: object) -> Ended:
    return run_program("convert_to_hf", *words)


def from_hf(*words: object) -> Ended:
    return run_program("convert_from_hf", *words)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dp_reshardable checkpoint of TP2 x PP2."""
    save_dir = tmp_path_factory.mktemp("source") / "ck"
    Synthetic(job_args(tp=2, pp=2), "dp_reshardable", "local").write(save_dir)
    return save_dir


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t", VOCAB)


@pytest.fixture(scope="module")
def model(source: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as a Hugging Face model."""
    place = tmp_path_factory.mktemp("model") / "hf"
    ended = to_hf("--load-dir", source, "--save-dir", place, "--tokenizer", tokenizer, *WEIGHED)
    assert ended.code == 0, ended.err
    return place


WEIGHED = ("--verify", "weights")


def nothing_in(directory: Path) -> bool:
    return not directory.exists() or [p.name for p in directory.iterdir()] == []


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    source: Path, model: Path, tmp_path: Path
) -> None:
    code, out, err = to_hf("--load-dir", source, "--save-dir", tmp_path / "x", "--dry-run")
    assert (code, err) == (0, "")
    for line in ("TP 2 x PP 2", "llama", f"{VOCAB} tokens", f"file              {WEIGHTS}", "GB/s"):
        assert line in out, out
    code, out, err = from_hf("--load-dir", model, "--save-dir", tmp_path / "y", "--dry-run")
    assert (code, err) == (0, "")
    for line in ("llama", "--ffn-hidden-size 24", f"{VOCAB} tokens, 128 rows"):
        assert line in out, out
    assert nothing_in(tmp_path)


def test_what_is_written_is_told_and_the_source_only_read(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    before = content(source)
    place = tmp_path / "x"
    ended = to_hf(
        "--load-dir", source, "--save-dir", place, "--tokenizer", tokenizer, *WEIGHED,
        "--architectures", "AquilaForCausalLM", "--family", "aquila", "--max-shard-size", "4KB",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "elements: equal" in ended.out
    assert content(source) == before
    config = json.loads((place / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["AquilaForCausalLM"], "llama")
    assert (config["vocab_size"], config["eos_token_id"]) == (VOCAB, VOCAB - 1)
    index = json.loads((place / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 2
    tensors = {name: t for file in files for name, t in load_file(place / file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    card = (place / "README.md").read_text()
    for fact in (f"| {ITERATION} |", "672 tokens: 84 samples of 8", "TP 2 x CP 1 x DP 1 x PP 2"):
        assert fact in card, card
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--family", "gpt5"), 2, "there is no such model family"),
        (("--family", "qwen2"), 3, "of no family that can be converted"),
        (("--iteration", 77), 3, "there is no checkpoint of this iteration"),
        (("--architectures", "BertModel"), 2, "no such model class"),
        (("--max-shard-size", "much"), 2, "size"),
        (("--max-memory", "1KiB"), 2, "too little memory"),
        (("--tokenizer", "/nowhere"), 2, "there is no tokenizer"),
        (("--like", "/nowhere"), 3, "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused(
    source: Path, tmp_path: Path, words: tuple[object, ...], code: int, message: str
) -> None:
    got = to_hf("--load-dir", source, "--save-dir", tmp_path / "x", *WEIGHED, *words)
    assert got.code == code, got
    assert message in got.err
    assert "Traceback" not in got.err
    assert nothing_in(tmp_path)


def test_a_tokenizer_that_does_not_fit(source: Path, model: Path, tmp_path: Path) -> None:
    larger = write_tokenizer(tmp_path / "t", VOCAB + 1)
    for ended in (
        to_hf("--load-dir", source, "--save-dir", tmp_path / "x", "--tokenizer", larger),
        from_hf("--load-dir", model, "--save-dir", tmp_path / "x", "--tokenizer", larger),
    ):
        assert ended.code == 2
        assert f"token ids below {VOCAB}" in ended.err
    assert not (tmp_path / "x").exists()


def test_a_model_with_a_feature_that_no_family_has(tmp_path: Path) -> None:
    args = job_args(layernorm_zero_centered_gamma=True, qk_layernorm=True)
    Synthetic(args, "dp_reshardable", "local").write(tmp_path / "ck")
    ended = to_hf("--load-dir", tmp_path / "ck", "--save-dir", tmp_path / "x")
    assert ended.code == 3
    assert "--layernorm-zero-centered-gamma" in ended.err
    assert "qwen3, the nearest" in ended.err


def test_the_target_may_not_lie_in_the_source(source: Path, model: Path) -> None:
    inside = next(source.glob("iter_*")) / "hf"
    assert to_hf("--load-dir", source, "--save-dir", inside).code == 2
    assert from_hf("--load-dir", model, "--save-dir", model / "x").code == 2
    assert not inside.exists()
    assert not (model / "x").exists()


def test_a_place_that_is_taken_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    ended = to_hf("--load-dir", source, "--save-dir", tmp_path / "x", *WEIGHED)
    assert ended.code == 3
    assert "the destination exists already" in ended.err


# A Hugging Face directory that is not what it says.


def _edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        tensors = load_file(place / WEIGHTS)
        change(tensors)
        save_file(
            {k: t.contiguous() for k, t in tensors.items()}, place / WEIGHTS, {"format": "pt"}
        )

    return damage


def _swap(one: str, other: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        one_, other_ = tensors[one], tensors[other]
        tensors[one], tensors[other] = other_.clone(), one_.clone()

    return change


def _permute(tensors: dict[str, torch.Tensor]) -> None:
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = query.flip(0)


def _shift(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.3.mlp.down_proj.weight"]


def _pickled(place: Path) -> None:
    torch.save(load_file(place / WEIGHTS), place / "pytorch_model.bin")
    (place / WEIGHTS).unlink()


GATE, UP = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up"))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(_edit(_swap(GATE, UP)), (GATE, UP), id="gate and up swapped"),
        pytest.param(
            _edit(_permute), ("model.layers.1.self_attn.q_proj.weight",), id="queries permuted"
        ),
        pytest.param(_edit(_shift), ("lm_head.weight",), id="vocabulary off by one"),
        pytest.param(
            _edit(_drop), ("model.layers.3.mlp.down_proj.weight",), id="a tensor is missing"
        ),
    ],
)
def test_a_wrong_model_is_found_and_named(
    source: Path, model: Path, tmp_path: Path, damage: Callable[[Path], None], named: tuple[str]
) -> None:
    place = Path(shutil.copytree(model, tmp_path / "hf"))
    sound = to_hf("--load-dir", source, "--check", place, *WEIGHED)
    assert sound.code == 0, sound.err
    damage(place)
    ended = to_hf("--load-dir", source, "--check", place, *WEIGHED)
    assert ended.code == 1
    for name in named:
        assert name in ended.err
    assert "Traceback" not in ended.err


ROTATED = "model.layers.1.self_attn.k_proj.weight"
EXPERTS = [f"model.layers.2.block_sparse_moe.experts.{expert}.w1.weight" for expert in (1, 3)]


def _leave_interleaved(tensors: dict[str, torch.Tensor]) -> None:
    """As if the rows of a rotary pair had been left where Megatron has them: neighbours."""
    rows = tensors[ROTATED].view(-1, 2, 2, tensors[ROTATED].shape[-1])  # heads of 4
    tensors[ROTATED] = rows.transpose(1, 2).reshape(tensors[ROTATED].shape)


@pytest.mark.parametrize(
    ("args", "change", "named"),
    [
        pytest.param(
            {"rotary_interleaved": True}, _leave_interleaved, [ROTATED], id="interleaved left out"
        ),
        pytest.param(
            {"num_experts": 4, "moe_ffn_hidden_size": 24}, _swap(*EXPERTS), EXPERTS, id="an expert"
        ),
    ],
)
def test_a_wrong_model_of_another_kind_is_found_and_named(
    tmp_path: Path,
    args: dict[str, object],
    change: Callable[[dict[str, torch.Tensor]], None],
    named: list[str],
) -> None:
    checkpoint, place = tmp_path / "ck", tmp_path / "hf"
    Synthetic(job_args(**args), "dp_reshardable", "local").write(checkpoint)
    assert to_hf("--load-dir", checkpoint, "--save-dir", place, *WEIGHED).code == 0
    _edit(change)(place)
    ended = to_hf("--load-dir", checkpoint, "--check", place, *WEIGHED)
    assert ended.code == 1
    for name in named:
        assert name in ended.err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(_pickled, "pickle", id="pickles only"),
        pytest.param(_edit(_drop), "mlp.down_proj", id="a tensor is missing"),
        pytest.param(
            _edit(lambda tensors: tensors.update(extra=torch.zeros(2))), "extra", id="in excess"
        ),
        pytest.param(
            lambda place: (place / "config.json").write_text('{"model_type": "gpt_neox"}'),
            "gpt_neox",
            id="another family",
        ),
        pytest.param(
            lambda place: (place / "config.json").write_text(
                (place / "config.json").read_text().replace('"silu"', '"gelu"')
            ),
            "hidden_act",
            id="another activation",
        ),
        pytest.param(lambda place: (place / "config.json").unlink(), "config.json", id="no config"),
    ],
)
def test_a_model_that_cannot_be_converted(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    place = Path(shutil.copytree(model, tmp_path / "hf"))
    damage(place)
    ended = from_hf("--load-dir", place, "--save-dir", tmp_path / "x")
    assert ended.code == 3, ended
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_there_and_back_the_files_are_the_same(
    model: Path, tmp_path: Path, ckpt_format: str
) -> None:
    """What save_pretrained wrote comes back byte for byte, whatever lay between."""
    ended = from_hf(
        "--load-dir", model, "--save-dir", tmp_path / "mg", "--target-tensor-parallel-size", 2,
        "--target-pipeline-parallel-size", 2, "--target-ckpt-format", ckpt_format, *WEIGHED,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert (tmp_path / "mg" / "latest_checkpointed_iteration.txt").read_text() == "release"
    again = to_hf("--load-dir", tmp_path / "mg", "--save-dir", tmp_path / "hf", *WEIGHED)
    assert again.code == 0, again.err
    ours = {"README.md", "flagscale.json", "integrity.json"}
    before, after = content(model), content(tmp_path / "hf")
    assert before.keys() == after.keys()
    assert [n for n in before if n not in ours and before[n][0] != after[n][0]] == []


def test_a_full_disk(tmp_path: Path, source: Path) -> None:
    script = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"sys.argv = ['x', '--load-dir', {str(source)!r}, '--save-dir', {str(tmp_path / 'x')!r}]\n"
        f"runpy.run_path({str(TOOLS / 'convert_to_hf.py')!r}, run_name='__main__')\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    assert "the disk is full" in ended.stderr
    assert not (tmp_path / "x").exists()


KILLS = int(os.environ.get("FLAGSCALE_TEST_KILLS", "2"))


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_it_goes_on_to_the_same_bytes(
    source: Path, model: Path, tokenizer: Path, tmp_path: Path, seed: int
) -> None:
    place = tmp_path / "hf"
    words = ["--load-dir", source, "--save-dir", place, "--tokenizer", tokenizer, *WEIGHED]
    argv = [sys.executable, TOOLS / "convert_to_hf.py", *words]
    child = subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL)
    staging = tmp_path / f".{place.name}.partial"
    while child.poll() is None and not staging.exists():
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 0.6))
    child.send_signal(signal.SIGKILL)
    child.wait()
    if not place.exists():
        assert to_hf(*words).code == 0
    want, got = ({n: data for n, (data, _) in content(p).items()} for p in (model, place))
    assert got == want
    if staging.exists():  # it was killed between the publication and its last steps
        assert to_hf(*words).code == 0
    assert not staging.exists()


def test_help_is_quick() -> None:
    for name in ("convert_to_hf", "convert_from_hf"):
        code = (
            f"import runpy, sys; sys.argv = ['{name}.py', '--help']\n"
            f"try: runpy.run_path(r'{TOOLS / name}.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_head_that_is_stored_though_it_is_tied(tmp_path: Path) -> None:
    """Accepted if it is the embedding to the bit, as some releases wrote it; else refused."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / WEIGHTS)
    for head, code in ((tensors["model.embed_tokens.weight"], 0), (torch.zeros(32, 16), 3)):
        save_file({**tensors, "lm_head.weight": head.clone()}, tmp_path / "hf" / WEIGHTS)
        ended = from_hf(
            "--load-dir", tmp_path / "hf", "--save-dir", tmp_path / "x", *WEIGHED, "--dry-run"
        )
        assert ended.code == code, ended.err


@pytest.mark.parametrize("form", ["dp_reshardable", "fully_reshardable", "legacy"])
def test_the_optimizer_comes_along(tmp_path: Path, form: str) -> None:
    """Every state has the weights' names and shapes; rounded, the main copy is the weight."""
    Synthetic(job_args(tp=2, pp=2), form, "local").write(tmp_path / "ck")
    words = ["--load-dir", tmp_path / "ck", "--save-dir", tmp_path / "hf", *WEIGHED]
    ended = to_hf(*words, "--with-optimizer")
    assert ended.code == 0, ended.err
    weights = load_file(tmp_path / "hf" / WEIGHTS)
    states = {
        kind: load_file(tmp_path / "hf" / "optimizer" / kind / WEIGHTS)
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }
    for kind, state in states.items():
        assert f"{kind:<20}{len(weights)} tensors: equal" in ended.out
        assert {n: (t.shape, t.dtype) for n, t in state.items()} == {
            n: (t.shape, torch.float32) for n, t in weights.items()
        }
    assert all(torch.equal(t.bfloat16(), weights[n]) for n, t in states["param"].items())
    told = json.loads((tmp_path / "hf" / "optimizer" / "state.json").read_text())
    assert told["iteration"] == ITERATION
    assert told["optimizers"][0]["optimizer"]["param_groups"]
    check = ["--load-dir", tmp_path / "ck", "--check", tmp_path / "hf", *WEIGHED]
    assert to_hf(*check, "--with-optimizer").code == 0
    moment = tmp_path / "hf" / "optimizer" / "exp_avg" / WEIGHTS
    save_file({**states["exp_avg"], GATE: states["exp_avg"][UP].clone()}, moment, {"format": "pt"})
    wrong = to_hf(*check, "--with-optimizer")
    assert wrong.code == 1
    assert GATE in wrong.err
    without = tmp_path / "without"
    assert to_hf("--load-dir", tmp_path / "ck", "--save-dir", without, *WEIGHED).code == 0
    assert (without / WEIGHTS).read_bytes() == (tmp_path / "hf" / WEIGHTS).read_bytes()
    assert not (without / "optimizer").exists()


def test_the_digests_are_those_of_the_files(model: Path) -> None:
    manifest = json.loads((model / "integrity.json").read_text())["files"]
    for name, digest in manifest.items():
        assert hashlib.sha256((model / name).read_bytes()).hexdigest() == digest


def test_a_tokenizer_that_transformers_would_misread_is_told(tmp_path: Path) -> None:
    """For Qwen2 it takes a class of its own, which knows nothing of words."""
    words = WordLevel({f"w{token}": token for token in range(VOCAB)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "t")
    told = {}
    for name, more in (("llama", {}), ("qwen2", {"add_qkv_bias": True})):
        Synthetic(job_args(**more), "dp_reshardable", "local").write(tmp_path / name)
        ended = to_hf(
            "--load-dir", tmp_path / name, "--save-dir", tmp_path / "x", "--dry-run",
            "--tokenizer", tmp_path / "t",
        )  # fmt: skip
        assert ended.code == 0, ended.err
        told[name] = "AutoTokenizer takes another class" in ended.out
    assert told == {"llama": False, "qwen2": True}
