"""Each upstream fix, with its patch on and off.

The half with the patch off shows the defect as it is in the megatron-core installed: the day it
turns red, upstream has repaired it and the patch can go.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from harness import RunResult, train
from harness.checkpoint import read_tensors
from harness.corpus import model_argv
from harness.families import megatron_arguments

from flagscale.patches import mla_local
from flagscale.patches.fused_adam import FusedAdam
from flagscale.runs.complete import BEGUN_MARKER, MARKER

_TRACKER = "latest_checkpointed_iteration.txt"


def _without(group: str) -> dict[str, str]:
    return {"FLAGSCALE_DISABLE_PATCHES": group}


def test_compile_helpers(corpus: Path, tmp_path: Path) -> None:
    argv = model_argv(corpus, train_iters=1)
    off = train(argv, tmp_path / "off", environ=_without("compile-helpers"))
    assert off.exit_codes == [1]
    assert "No targets specified and no makefile found" in off.ranks[0].log
    train(argv, tmp_path / "on").require_success()


def test_torch_norms(corpus: Path, tmp_path: Path) -> None:
    # That it also computes the right thing: test_losses_do_not_depend_on_the_layout[TP2xDP2+SP].
    argv = model_argv(corpus, train_iters=1, tensor_model_parallel_size=2, sequence_parallel=True)
    off = train(argv, tmp_path / "off", 2, environ=_without("torch-norms"))
    assert all(off.exit_codes)
    assert "sequence parallel not supported by torch LayerNorm" in off.ranks[0].log
    train(argv, tmp_path / "on", 2).require_success()


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_fused_adam_is_torch_adam(adam_w_mode: bool) -> None:
    torch.manual_seed(0)
    ours = [torch.randn(7, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    theirs = [p.clone() for p in ours]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = FusedAdam(ours, adam_w_mode=adam_w_mode, **options)
    cls = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    reference = cls(theirs, **options)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert [group["step"] for group in optimizer.param_groups] == [20]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("ckpt_format", "defect"), [("torch_dist", "AssertionError"), ("torch", "KeyError: 'step'")]
)
def test_adam(corpus: Path, tmp_path: Path, ckpt_format: str, defect: str) -> None:
    def run(name: str, last: int, environ: dict[str, str] | None = None) -> RunResult:
        save = tmp_path / (name.split("_")[0])
        argv = model_argv(
            corpus, save=save, load=save, save_interval=2, exit_interval=last,
            ckpt_format=ckpt_format,
        )  # fmt: skip
        return train(argv, tmp_path / name, environ=environ)

    run("off_0", 2, _without("adam")).require_success()
    off = run("off_1", 4, _without("adam"))
    assert off.exit_codes == [1]
    assert defect in off.ranks[0].log

    run("on_0", 2).require_success()
    resumed = run("on_1", 4).require_success()
    whole = run("whole_0", 4).require_success()
    assert resumed.losses == {i: whole.losses[i] for i in (3, 4)}


def test_fully_reshardable(corpus: Path, tmp_path: Path) -> None:
    def run(
        name: str, nproc: int, environ: dict[str, str] | None = None, **more: object
    ) -> RunResult:
        argv = model_argv(
            corpus,
            load=tmp_path / name,
            save=tmp_path / name,
            save_interval=3,
            overlap_grad_reduce=True,
            ddp_bucket_size=20000,
            dist_ckpt_optim_fully_reshardable=True,
            **more,
        )
        work = tmp_path / f"{name}.{more['exit_interval']}.{nproc}"
        return train(argv, work, nproc, environ=environ).require_success()

    def wrong_elements(name: str) -> int:
        """How many fp32 main parameters, rounded to bf16, are not the weight."""
        tensors = read_tensors(tmp_path / name / "iter_0000003")
        prefix = "optimizer.state.param."
        mains = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        assert len(mains) == 9
        return sum(
            int((main.to(torch.bfloat16) != tensors[name]).sum()) for name, main in mains.items()
        )

    run("off", 3, _without("fully-reshardable"), exit_interval=3)
    assert wrong_elements("off") > 10_000
    run("on", 3, exit_interval=3)
    assert wrong_elements("on") == 0

    # It loads what it saved: at the same layout to the bit, on one rank up to summation order.
    shutil.copytree(tmp_path / "on", tmp_path / "alone")
    resumed = run("on", 3, exit_interval=6).losses
    alone = run("alone", 1, exit_interval=6).losses
    whole = run("whole", 3, exit_interval=6).losses
    assert resumed == {i: whole[i] for i in (4, 5, 6)}
    assert max(abs(alone[i] - whole[i]) for i in (4, 5, 6)) < 2e-3


@pytest.mark.parametrize(
    ("nproc", "layout", "defect"),
    [
        pytest.param(
            4,
            {"pipeline_model_parallel_size": 4},
            "'NoneType' object is not an iterator",
            id="PP4",
        ),
        pytest.param(
            2,
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            "'list' object is not an iterator",
            id="PP2xVPP2",
        ),
    ],
)
def test_dummy_step(
    corpus: Path,
    fp32_checkpoint: Path,
    tmp_path: Path,
    nproc: int,
    layout: dict[str, object],
    defect: str,
) -> None:
    def run(
        name: str, nproc: int, environ: dict[str, str] | None = None, **layout: object
    ) -> RunResult:
        argv = model_argv(
            corpus, bf16=False, train_iters=4, iterations_to_skip=2, load=fp32_checkpoint,
            finetune=True, no_load_optim=True, no_load_rng=True, **layout,
        )  # fmt: skip
        return train(argv, tmp_path / name, nproc, environ=environ)

    off = run("off", nproc, _without("dummy-step"), **layout)
    assert any(off.exit_codes)
    assert any(defect in rank.log for rank in off.ranks)

    one_rank = run("one_rank", 1).require_success().losses
    skipped = run("on", nproc, **layout).require_success().losses
    assert sorted(skipped) == [1, 3, 4]
    assert all(abs(skipped[i] - one_rank[i]) < 2e-6 for i in skipped)


def test_log_interval(corpus: Path, tmp_path: Path) -> None:
    def logged_and_true(
        name: str, environ: dict[str, str] | None = None
    ) -> tuple[float, list[float]]:
        result = train(
            model_argv(corpus, train_iters=2, lr=1e-2), tmp_path / name, environ=environ
        ).require_success()
        printed = re.findall(r"lm loss: (\S+)", result.ranks[0].log)
        assert len(printed) == 2
        return float(printed[1]), [result.losses[1], result.losses[2]]

    printed, (first, second) = logged_and_true("off", _without("log-interval"))
    assert printed == pytest.approx((first + second) / 2, abs=2e-6)
    printed, (first, second) = logged_and_true("on")
    assert printed == pytest.approx(second, abs=2e-6)
    assert abs(first - second) > 1e-4


def _latent_argv(corpus: Path, **more: object) -> list[str]:
    """A DeepSeek-shaped model of one layer without experts, in fp32."""
    latent = megatron_arguments("deepseek_v2", experts=False)
    return model_argv(corpus, **{**latent, "num_layers": 1, "bf16": False, **more})


def test_mla_local(corpus: Path, tmp_path: Path) -> None:
    argv = _latent_argv(corpus, train_iters=2)
    off = train(argv, tmp_path / "off", environ=_without("mla-local"))
    assert off.exit_codes == [1]
    assert "got an unexpected keyword argument 'k_channels'" in off.ranks[0].log
    assert len(train(argv, tmp_path / "on").require_success().losses) == 2


@pytest.mark.parametrize("v_head_dim", [3, 8])
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_mla_local_is_attention(v_head_dim: int, softmax_scale: float | None) -> None:
    """The heads of queries and keys have 6 numbers, and the hidden size would give them 4."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.transformer import MLATransformerConfig
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.enums import AttnMaskType
    (patch,) = mla_local.GROUP.patches
    one_rank = SimpleNamespace(size=lambda: 1)
    attention = DotProductAttention.__new__(DotProductAttention)
    patch.replacement(DotProductAttention.__init__)(
        attention,
        MLATransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, attention_dropout=0.0
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=SimpleNamespace(tp=one_rank),
        softmax_scale=softmax_scale,
        k_channels=6,
        v_channels=v_head_dim,
    )
    attention.config.sequence_parallel = True  # no random state of a tensor parallel rank
    torch.manual_seed(0)
    query, key, value = (torch.randn(5, 3, 2, size) for size in (6, 6, v_head_dim))
    buffer = SimpleNamespace(get_tensor=lambda shape, dtype, name: torch.empty(shape, dtype=dtype))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).triu(1)
    with mock.patch.object(parallel_state, "get_global_memory_buffer", return_value=buffer):
        found = attention(query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),
        is_causal=True,
        scale=softmax_scale,
    )
    assert found.shape == (5, 3, 2 * v_head_dim)
    torch.testing.assert_close(found, expected.permute(2, 0, 1, 3).flatten(2))


def test_mla_rope_gradient(corpus: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    argv = _latent_argv(corpus, train_iters=1, save=start, save_interval=1)
    train(argv, tmp_path / "save").require_success()

    def gaps(name: str, **more: object) -> list[float]:
        """To the losses of one rank."""
        argv = _latent_argv(
            corpus, train_iters=4, load=start, finetune=True, no_load_optim=True, no_load_rng=True,
            **more,
        )  # fmt: skip
        environ = _without("mla-rope-gradient") if name == "off" else None
        nproc = 2 if more else 1
        losses = train(argv, tmp_path / name, nproc, environ=environ).require_success().losses
        one_rank.update({} if one_rank else losses)
        return [abs(losses[i] - one_rank[i]) for i in (1, 2, 3, 4)]

    one_rank: dict[int, float] = {}
    gaps("one_rank")
    off = gaps("off", tensor_model_parallel_size=2)
    assert off[0] < 2e-6  # before the first gradient
    assert max(off) > 4e-6
    assert max(gaps("on", tensor_model_parallel_size=2)) < 2e-6
    assert max(gaps("on+SP", tensor_model_parallel_size=2, sequence_parallel=True)) < 2e-6


def test_rampup_batch_size(corpus: Path, tmp_path: Path) -> None:
    argv = [*model_argv(corpus, train_iters=2), "--rampup-batch-size", "4", "4", "24"]
    off = train(argv, tmp_path / "off", environ=_without("rampup-batch-size")).require_success()
    assert "global batch size:    12" in off.ranks[0].log  # from the first step on: no ramp
    on = train(argv, tmp_path / "on")
    assert on.exit_codes == [2]
    assert "--step-batch-size-schedule" in on.ranks[0].log


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A legacy checkpoint of one rank, two iterations into a run of four; without a marker."""
    work = tmp_path_factory.mktemp("legacy")
    argv = model_argv(
        corpus,
        train_iters=4,
        exit_interval=2,
        save=work / "checkpoints",
        save_interval=100,
        ckpt_format="torch",
    )
    train(argv, work / "logs", environ=_without("tracker")).require_success()
    assert (work / "checkpoints" / BEGUN_MARKER).exists()
    return work / "checkpoints"


def test_tracker(corpus: Path, tmp_path: Path) -> None:
    def run(name: str, environ: dict[str, str] | None = None) -> str:
        """What another name of the tracker file holds after a save."""
        directory = tmp_path / name
        directory.mkdir()
        (directory / "old").write_text("0")
        os.link(directory / "old", directory / _TRACKER)
        argv = model_argv(corpus, train_iters=1, save=directory, save_interval=1)
        train(argv, tmp_path / f"{name}.log", environ=environ).require_success()
        assert (directory / _TRACKER).read_text() == "1"
        assert (directory / "iter_0000001" / MARKER).exists() == (environ is None)
        return (directory / "old").read_text()

    assert run("off", _without("tracker")) == "1"  # written in its place
    assert run("on") == "0"


def test_help(tmp_path: Path) -> None:
    # Upstream's help texts have a bare per cent sign; see flagscale.train.preflight.
    shown = train(["--help"], tmp_path)
    assert shown.exit_codes == [0]
    assert "--platform" in shown.ranks[0].log
    assert "--num-layers" in shown.ranks[0].log


class TestLoadCheckpoint:
    """Failed loads end with our error on every rank, where upstream ends with 0 or trains on."""

    @pytest.fixture
    def run(
        self, corpus: Path, saved: Path, tmp_path: Path
    ) -> Callable[[Callable[[Path], object], bool], RunResult]:
        """Damage a copy of the checkpoint, then resume from it with the patch on or off."""

        def run(damage: Callable[[Path], object], patched: bool, **more: object) -> RunResult:
            name = "on" if patched else "off"
            directory = tmp_path / name
            shutil.copytree(saved, directory)
            damage(directory)
            arguments = {"load": directory, "save": directory, "save_interval": 100, **more}
            nproc = 2 if "pipeline_model_parallel_size" in more else 1
            argv = model_argv(corpus, train_iters=4, ckpt_format="torch", **arguments)
            environ = None if patched else _without("load-checkpoint")
            return train(argv, tmp_path / f"{name}.log", nproc, environ=environ)

        return run

    @staticmethod
    def _edit(key: str) -> Callable[[Path], None]:
        def edit(directory: Path) -> None:
            file = directory / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt"
            state = torch.load(file, weights_only=False)  # noqa: TID251 - written by this test
            del state[key]
            torch.save(state, file)

        return edit

    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda d: (d / _TRACKER).write_text(""), id="empty-tracker"),
            pytest.param(
                lambda d: (d / "iter_0000002/mp_rank_00/model_optim_rng.pt").write_bytes(b"junk"),
                id="unreadable-file",
            ),
            pytest.param(_edit("iteration"), id="no-iteration"),
            pytest.param(_edit("rng_state"), id="no-rng-state"),
        ],
    )
    def test_damaged(self, run: Callable[..., RunResult], damage: Callable[[Path], object]) -> None:
        off = run(damage, patched=False)
        assert off.exit_codes == [0]
        assert not off.losses
        on = run(damage, patched=True)
        assert on.exit_codes == [3]
        assert "upstream could not load the checkpoint" in on.ranks[0].log
        assert on.ranks[0].error is not None

    def test_asked_to_exit_on_a_missing_checkpoint(self, run: Callable[..., RunResult]) -> None:
        def damage(directory: Path) -> None:
            (directory / _TRACKER).unlink()
            (directory / BEGUN_MARKER).unlink()

        off = run(damage, patched=False, exit_on_missing_checkpoint=True)
        assert off.exit_codes == [0]
        assert not off.losses
        assert run(damage, patched=True, exit_on_missing_checkpoint=True).exit_codes == [3]

    def test_another_pipeline_size(self, run: Callable[..., RunResult]) -> None:
        off = run(lambda _d: None, patched=False, pipeline_model_parallel_size=2)
        assert off.exit_codes == [0, 0]
        assert not off.losses
        on = run(lambda _d: None, patched=True, pipeline_model_parallel_size=2)
        assert on.exit_codes == [3, 3]

    def test_a_begun_run_without_a_tracker(self, run: Callable[..., RunResult]) -> None:
        off = run(lambda d: (d / _TRACKER).unlink(), patched=False)
        assert off.exit_codes == [0]
        assert sorted(off.losses) == [1, 2, 3, 4]  # from random, after two iterations were saved
        on = run(lambda d: (d / _TRACKER).unlink(), patched=True)
        assert on.exit_codes == [3]
        assert not on.losses
        assert BEGUN_MARKER in on.ranks[0].log

    def test_a_directory_without_a_checkpoint(
        self, run: Callable[..., RunResult], tmp_path: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        off = run(lambda _d: None, patched=False, load=tmp_path / "empty")
        assert off.exit_codes == [0]
        assert sorted(off.losses) == [1, 2, 3, 4]
        on = run(lambda _d: None, patched=True, load=tmp_path / "empty")
        assert on.exit_codes == [3]
        assert "holds no checkpoint" in on.ranks[0].log
