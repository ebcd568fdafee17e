"""What Aquila asks of a model, in real process groups and real training runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import RunResult, train, worker
from harness.checkpoint import read_tensors
from harness.corpus import model_argv, write_corpus

from flagscale.train.aquila import look_up_in_fp32

_TP = "tensor_model_parallel_size"
_PP = "pipeline_model_parallel_size"
_ALL_ON = {
    "norm_init_weight": 0.3,
    "embedding_lookup_in_fp32": True,
    "rotary_in_fp32": True,
    "rotary_interleaved": True,
}
_BF16_ROUNDOFF = 2.0**-8


def _run_on_ranks(function: Callable[..., None], nproc: int, work_dir: Path, *args: Any) -> None:
    """Run a function of this module, instead of a training, in a process group."""
    target = functools.partial(_run_rank, function, args)
    with mock.patch.object(worker, "run_rank", target):
        train([], work_dir, nproc).require_success()


def _run_rank(
    function: Callable[..., None],
    args: tuple[Any, ...],
    _argv: object,
    environ: Mapping[str, str],
    work_dir: str,
    _kill: object,
) -> None:
    os.setsid()
    log = os.open(f"{work_dir}/rank_{environ['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    os.environ.update(environ)
    torch.distributed.init_process_group("gloo")
    function(*args)
    torch.distributed.destroy_process_group()


def _look_up(tp_size: int, sequence_parallel: bool, deterministic_mode: bool) -> None:
    """Compare output and weight gradient with tables in float64, with and without the hook."""
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    parallel_state.initialize_model_parallel(tp_size)
    rank = parallel_state.get_tensor_model_parallel_rank()
    vocab_size, hidden_size, batch_size, seq_length = 8, 16, 4, 256
    torch.manual_seed(0)
    table = torch.randn(vocab_size, hidden_size).bfloat16()
    ids = torch.randint(vocab_size, (batch_size, seq_length))
    grad = torch.rand(batch_size, seq_length, hidden_size).bfloat16()

    rows = slice(rank * vocab_size // tp_size, (rank + 1) * vocab_size // tp_size)
    exact_grad = torch.zeros(vocab_size, hidden_size, dtype=torch.float64)
    exact_grad.index_add_(0, ids.flatten(), grad.double().flatten(0, 1))
    expected, output_grad = table[ids], grad
    if sequence_parallel:  # [b, s, h] becomes [s / tp, b, h]
        expected, output_grad = (
            tensor.transpose(0, 1).chunk(tp_size)[rank] for tensor in (expected, grad)
        )

    def build() -> torch.nn.Module:
        chunk = torch.nn.Module()
        chunk.pre_process = True
        chunk.embedding = VocabParallelEmbedding(
            vocab_size,
            hidden_size,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=sequence_parallel,
            config=ModelParallelConfig(
                tensor_model_parallel_size=tp_size,
                sequence_parallel=sequence_parallel,
                params_dtype=torch.bfloat16,
                deterministic_mode=deterministic_mode,
                perform_initialization=False,
            ),
        )
        chunk.embedding.weight.data.copy_(table[rows])
        return chunk

    def relative_error(chunk: torch.nn.Module) -> float:
        output = chunk.embedding(ids)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, expected), "a look-up has no error"
        output.backward(output_grad)
        found = chunk.embedding.weight.grad
        assert found.dtype == torch.bfloat16
        return float((found.double() / exact_grad[rows] - 1).abs().max())

    stock, chunk, again = build(), build(), build()
    names = list(chunk.state_dict())
    look_up_in_fp32([chunk, again])
    assert relative_error(stock) > 4 * _BF16_ROUNDOFF, "upstream sums in bf16"
    assert relative_error(chunk) < 1.001 * _BF16_ROUNDOFF, "one rounding, at the end"
    relative_error(again)
    assert torch.equal(chunk.embedding.weight.grad, again.embedding.weight.grad)
    assert list(chunk.state_dict()) == names
    assert chunk.embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("deterministic_mode", [False, True])
@pytest.mark.parametrize(
    ("tp_size", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["TP1", "TP2", "SP"]
)
def test_look_up_in_fp32(
    tp_size: int, sequence_parallel: bool, deterministic_mode: bool, tmp_path: Path
) -> None:
    _run_on_ranks(_look_up, tp_size, tmp_path, tp_size, sequence_parallel, deterministic_mode)


def _rotate(interleaved: bool) -> None:
    """Compare upstream's rotary embeddings, from positions to products, with complex numbers."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import RotaryEmbedding, apply_rotary_pos_emb
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel()
    seq_length, head_dim = 32, 8
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, rotary_interleaved=interleaved
    )
    embedding = RotaryEmbedding(head_dim, rotary_percent=1.0, rotary_interleaved=interleaved)
    torch.manual_seed(0)
    query = torch.randn(seq_length, 1, 2, head_dim)
    rotated = apply_rotary_pos_emb(query, embedding(seq_length), config)

    angles = torch.outer(
        torch.arange(seq_length, dtype=torch.float64),
        10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim),
    )
    pairs = (-1, 2) if interleaved else (2, -1)
    parts = query.double().unflatten(-1, pairs).movedim(-1 if interleaved else -2, 0)
    turned = torch.complex(*parts) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    dim = -1 if interleaved else -2
    expected = torch.stack([turned.real, turned.imag], dim).flatten(-2)
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_pairs(interleaved: bool, tmp_path: Path) -> None:
    _run_on_ranks(_rotate, 1, tmp_path, interleaved)


@pytest.mark.parametrize(
    ("nproc", "layout"),
    [
        pytest.param(4, {_TP: 2, _PP: 2, "sequence_parallel": True}, id="TP2xPP2+SP"),
        pytest.param(2, {_PP: 2, "num_virtual_stages_per_pipeline_rank": 2}, id="PP2xVPP2"),
    ],
)
def test_norms_start_at_the_weight_asked_for(
    corpus: Path, tmp_path: Path, nproc: int, layout: dict[str, object]
) -> None:
    argv = model_argv(
        corpus, norm_init_weight=0.3, qk_layernorm=True, lr=1e-30, min_lr=0.0, train_iters=1,
        save=tmp_path / "checkpoints", save_interval=1, **layout,
    )  # fmt: skip
    train(argv, tmp_path / "logs", nproc).require_success()
    tensors = read_tensors(tmp_path / "checkpoints" / "iter_0000001")
    norms = {
        name.removeprefix("decoder.").removeprefix("layers."): tensor.unique().tolist()
        for name, tensor in tensors.items()
        if "norm" in name and not name.startswith("optimizer")
    }
    bf16 = float(torch.tensor(0.3).bfloat16())
    assert norms == {  # by the names of fused norms, whichever the model has
        "self_attention.linear_qkv.layer_norm_weight": [bf16],
        "mlp.linear_fc1.layer_norm_weight": [bf16],
        "final_layernorm.weight": [bf16],
        "self_attention.q_layernorm.weight": [1.0],
        "self_attention.k_layernorm.weight": [1.0],
    }


def test_everything_at_once_trains(corpus: Path, tmp_path: Path) -> None:
    layout = {_TP: 2, _PP: 2, "sequence_parallel": True}

    def run(name: str, **more: object) -> tuple[RunResult, dict[str, torch.dtype]]:
        argv = model_argv(corpus, lr=5e-3, save=tmp_path / name, save_interval=6, **layout, **more)
        result = train(argv, tmp_path / f"{name}.log", 4).require_success()
        tensors = read_tensors(tmp_path / name / "iter_0000006")
        return result, {key: tensor.dtype for key, tensor in tensors.items()}

    result, stored = run("on", **_ALL_ON)
    assert result.losses[6] < result.losses[1] - 0.02
    assert stored == run("off")[1]  # names and types in the checkpoint stay what they are


def test_in_an_fp32_model_nothing_changes(
    corpus: Path, fp32_checkpoint: Path, tmp_path: Path
) -> None:
    def run(name: str, **more: object) -> list[tuple[float, float]]:
        """Loss and gradient norm of two steps."""
        argv = model_argv(
            corpus, load=fp32_checkpoint, finetune=True, no_load_optim=True, no_load_rng=True,
            **{_TP: 2, "sequence_parallel": True, "train_iters": 2, **more},
        )  # fmt: skip
        steps = train(argv, tmp_path / name, 2).require_success().ranks[-1].steps
        return [(step.losses["lm loss"], step.grad_norm) for step in steps]

    look_up, rotary = {"embedding_lookup_in_fp32": True}, {"rotary_in_fp32": True}
    assert run("fp32+", bf16=False, **look_up, **rotary) == run("fp32", bf16=False)

    # A look-up has no error, its gradient has; a rotation has both.
    (loss, grad_norm), _ = run("bf16")
    assert run("rotary", **rotary)[0][0] != loss
    (same_loss, other_grad_norm), _ = run("look_up", **look_up)
    assert same_loss == loss
    assert other_grad_norm != grad_norm


def test_rotary_in_fp32_without_its_patch_is_refused(corpus: Path, tmp_path: Path) -> None:
    refused = train(
        model_argv(corpus, rotary_in_fp32=True),
        tmp_path,
        environ={"FLAGSCALE_DISABLE_PATCHES": "rotary-fp32"},
    )
    assert refused.exit_codes == [2]
    assert "the patch that rotates in fp32 is not in place" in refused.ranks[0].log


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("blend")
    first, second = (write_corpus(directory / str(seed), seed=seed) for seed in (1, 2))
    return ["0.6", str(first), "0.4", str(second)]


# In samples of 64 tokens: 4 x 4, from 16 on 3 x 8, from 40 on 2 x 12. Of 70, 6 are left over.
_SCHEDULE = f"0:4,{16 * 64}:8,{40 * 64}:12"
_STEPS = 4 + 3 + 2


def _train_ramp(
    blend: list[str], work: Path, environ: Mapping[str, str] | None = None, **more: object
) -> RunResult:
    arguments = {"train_samples": 70, "step_batch_size_schedule": _SCHEDULE, **more}
    arguments |= dict.fromkeys(("global_batch_size", "train_iters", "data_path"))
    argv = [*model_argv(Path(), **arguments), "--data-path", *blend]
    return train(argv, work, 2, environ=environ)


def test_the_last_partial_batch_is_dropped(blend: list[str], tmp_path: Path) -> None:
    without = {"FLAGSCALE_DISABLE_PATCHES": "last-batch"}
    off = _train_ramp(blend, tmp_path / "off", without)
    assert all(off.exit_codes)
    assert any("StopIteration" in rank.log for rank in off.ranks)
    assert sorted(off.losses) == list(range(1, _STEPS + 1))
    on = _train_ramp(blend, tmp_path / "on").require_success()
    assert on.losses == off.losses
    assert "consumed samples:           64" in on.ranks[-1].log


def test_a_resume_in_the_ramp_changes_nothing(blend: list[str], tmp_path: Path) -> None:
    def run(name: str, attempt: int, **more: object) -> dict[int, float]:
        saving = {"save": tmp_path / name, "load": tmp_path / name, "save_interval": 100}
        work = tmp_path / f"{name}.{attempt}"
        return _train_ramp(blend, work, **saving, **more).require_success().losses

    whole = run("whole", 0)
    first, second = run("broken", 0, exit_interval=6), run("broken", 1)
    assert sorted(first) == [1, 2, 3, 4, 5, 6]
    assert first | second == whole


def test_less_than_one_batch_is_refused(blend: list[str], tmp_path: Path) -> None:
    refused = _train_ramp(blend, tmp_path, train_samples=3)
    assert refused.exit_codes == [2, 2]
    assert "fewer samples than the first step takes" in refused.ranks[0].log
