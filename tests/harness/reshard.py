"""Real trained checkpoints in every layout and format, and what is in them, found without us.

A *source* is trained by the project's own entry and stopped by ``--exit-interval``; at that moment
upstream's ``save_checkpoint`` is called once for each format, and each rank writes what it holds
(:mod:`harness.observe`). The parts of all ranks, put together (:mod:`harness.states`), are the
truth to which a resharded checkpoint is held: read by torch's own reader, or loaded by stock
upstream at the target's layout and written out by its ranks again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

from flagscale.ckpt_io.buffer_map import BUFFER_MAP_DIR
from harness import RunResult, train, worker
from harness.corpus import model_argv
from harness.observe import FORMATS, ORDERS, run_observed_rank
from harness.states import GlobalState, assemble, differences

__all__ = [
    "FORMATS",
    "GROWTH",
    "SOURCES",
    "STOPPED_AT",
    "TARGETS",
    "Layout",
    "Resumed",
    "Source",
    "Target",
    "TrainedSource",
    "in_fp32",
    "reshard",
    "reshard_online",
    "resume",
    "run_stock",
    "stock_environ",
    "targets_of",
    "train_source",
]

STOPPED_AT = 3
LAST_ITERATION = 6
_REPOSITORY = Path(__file__).parents[2]
_TOOL = _REPOSITORY / "tools" / "reshard_optimizer.py"

_MODEL: dict[str, object] = {
    # 251 tokens make 256 rows at TP1 and TP2, and would make 512 at TP4: the padded size is kept
    # there only if it is asked for.
    "make_vocab_size_divisible_by": 128,
    "train_iters": LAST_ITERATION,
}
_EXPERTS: dict[str, object] = {
    "num_experts": 4,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
}


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of a job; ``vpp`` and ``first_layers`` are ``None`` where not asked for."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    vpp: int | None = None
    first_layers: int | None = None

    @property
    def nproc(self) -> int:
        """World size."""
        return self.dp * self.tp * self.pp

    @property
    def arguments(self) -> dict[str, object]:
        """Upstream's names."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "expert_model_parallel_size": self.ep,
            "num_virtual_stages_per_pipeline_rank": self.vpp,
            "decoder_first_pipeline_num_layers": self.first_layers,
        }


@dataclass(frozen=True)
class Source:
    """A job to train and stop: its layout, and its arguments beyond those of every other."""

    name: str
    layout: Layout
    arguments: Mapping[str, object] = field(default_factory=dict)
    maps: bool = False
    """Whether the flat formats come with the buffer map that our save hook writes."""

    @property
    def is_fp32(self) -> bool:
        """Whether it trains in fp32; in bf16 if not."""
        return "bf16" in self.arguments

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return "num_experts" in self.arguments

    def argv(self, corpus: Path, layout: Layout, **more: object) -> list[str]:
        """Arguments of this model at any layout."""
        arguments = {**_MODEL, **self.arguments, **layout.arguments, **more}
        if self.has_experts and layout.tp > 1:
            arguments["sequence_parallel"] = True  # upstream trains no experts at TP without it
        return model_argv(corpus, **arguments)


SOURCES = {
    source.name: source
    for source in (
        Source("dp2", Layout(dp=2)),
        Source("dp3", Layout(dp=3)),
        Source("tp2", Layout(tp=2), maps=True),
        Source("pp2", Layout(pp=2)),
        Source("tp2-pp2", Layout(tp=2, pp=2)),
        Source("pp2-vpp2", Layout(pp=2, vpp=2)),
        Source("uneven-pp2", Layout(pp=2, first_layers=1), maps=True),
        Source("tied-pp2", Layout(pp=2), {"untie_embeddings_and_output_weights": None}),
        Source("moe-ep2", Layout(dp=2, ep=2), _EXPERTS),
        Source(
            "buckets-dp3", Layout(dp=3), {"overlap_grad_reduce": True, "ddp_bucket_size": 20000}
        ),
    )
}

"""What the matrix of issue 4 asks for."""

GROWTH = Source("growth-dp2", Layout(dp=2), {"make_vocab_size_divisible_by": 5})
"""251 tokens make 255 rows, of which the last are padding, and which TP2 does not divide."""


def in_fp32(source: Source) -> Source:
    """The same job in fp32, where losses do not depend on the layout by more than 2e-6."""
    return replace(source, name=f"{source.name}-fp32", arguments={**source.arguments, "bf16": None})


@dataclass(frozen=True)
class Target:
    """A layout to reshard to."""

    name: str
    layout: Layout


TARGETS = {
    target.name: target
    for target in (
        Target("dp1", Layout()),
        Target("dp3", Layout(dp=3)),
        Target("tp2", Layout(tp=2)),
        Target("tp4", Layout(tp=4)),
        Target("pp2", Layout(pp=2)),
        Target("tp2-pp2", Layout(tp=2, pp=2)),
        Target("ep1", Layout(dp=2)),
    )
}


def targets_of(source: Source) -> list[Target]:
    """Every target, ``ep1`` (two ranks that had half of the experts each) where there are any."""
    return [target for target in TARGETS.values() if target.name != "ep1" or source.has_experts]


_STOCK = (
    "cpu-device", "cpu-initialize", "compile-helpers", "torch-norms", "adam", "mla-local",
)  # fmt: skip
"""The patch groups of a stock upstream on a CPU: its shim, what the wheel cannot start without,
its norms, its Adam and its multi-latent attention."""


def stock_environ() -> dict[str, str]:
    """Environment under which a rank is stock upstream on a CPU, and nothing else."""
    from flagscale.patches.catalogue import builtin_groups

    others = [group.name for group in builtin_groups() if group.name not in _STOCK]
    return {"FLAGSCALE_DISABLE_PATCHES": ",".join(others), "FLAGSCALE_PLUGINS": ""}


def _run(
    argv: Sequence[object], work_dir: Path, nproc: int, orders: Mapping[str, object],
    environ: Mapping[str, str], timeout_s: float,
) -> RunResult:  # fmt: skip
    with mock.patch.object(worker, "run_rank", run_observed_rank):
        orders_environ = {ORDERS: json.dumps(orders, default=str), **environ}
        return train(argv, work_dir, nproc, environ=orders_environ, timeout_s=timeout_s)


def run_stock(argv: Sequence[object], work_dir: Path, nproc: int) -> RunResult:
    """Let stock upstream train; as :func:`harness.train`, and only its losses are watched."""
    return _run(argv, work_dir, nproc, {"watch": True}, stock_environ(), 120.0)


@dataclass(frozen=True)
class Resumed:
    """What stock upstream held after a load, and the losses of the steps it then made."""

    state: GlobalState
    losses: Mapping[int, float]


def resume(
    source: Source,
    load: Path,
    ckpt_format: str,
    layout: Layout,
    corpus: Path,
    work_dir: Path,
    *,
    padded_vocab_size: int | None = None,
    timeout_s: float = 300.0,
    **more: object,
) -> Resumed:
    """Let stock upstream load a checkpoint at a layout, tell what it holds, and train on.

    Args:
        source: Whose model it is.
        load: Directory with the tracker file.
        ckpt_format: Upstream's ``--ckpt-format``: ``torch_dist`` finds a legacy checkpoint too,
            ``torch`` refuses any other.
        layout: To load at.
        corpus: The data's prefix.
        work_dir: Of this run alone.
        padded_vocab_size: Rows of the embedding, where upstream would choose others.
        timeout_s: Of the whole run.
        more: Further arguments of upstream's.

    Raises:
        AssertionError: It did not load, or the ranks do not hold one whole state.
    """
    argv = source.argv(
        corpus, layout, load=load, ckpt_format=ckpt_format, padded_vocab_size=padded_vocab_size,
        exit_on_missing_checkpoint=True, **more,
    )  # fmt: skip
    orders = {"dump": work_dir / "dump", "watch": True}
    result = _run(argv, work_dir, layout.nproc, orders, stock_environ(), timeout_s)
    losses = result.require_success().losses
    # A load that fails may end a run with code 0, and a load of nothing trains from random.
    assert sorted(losses) == list(range(STOPPED_AT + 1, LAST_ITERATION + 1)), result.ranks[0].log
    state = assemble(work_dir / "dump")
    shutil.rmtree(work_dir / "dump")
    return Resumed(state, losses)


@dataclass(frozen=True)
class TrainedSource:
    """A source on disk.

    Args:
        source: What was trained.
        root: Holds a checkpoint directory named after each format.
        truth: What its ranks held when they saved.
        losses: By format, those of the steps after a resume at the same layout.
    """

    source: Source
    root: Path
    truth: GlobalState
    losses: Mapping[str, Mapping[int, float]]

    def checkpoint(self, form: str) -> Path:
        """Directory with the tracker file, of a format."""
        return self.root / form


def train_source(
    source: Source, corpus: Path, root: Path, formats: Iterable[str] = FORMATS
) -> TrainedSource:
    """Train a source, unless ``root`` has it, and resume each format wanted at the same layout.

    Raises:
        AssertionError: A run failed, or upstream does not read back what it saved.
    """
    truth = root / "truth"
    if not truth.with_suffix(".json").exists():  # the last file written
        argv = source.argv(
            corpus, source.layout, save=root / "all", save_interval=1000, exit_interval=STOPPED_AT
        )
        orders = {"save_all": root}
        _run(argv, root / "logs", source.layout.nproc, orders, {}, 300.0).require_success()
        _share_maps(source, root)
        assemble(root / "dump").save(truth)
        shutil.rmtree(root / "dump")
    state = GlobalState.load(truth)
    losses = {form: _same_layout_losses(source, form, state, corpus, root) for form in formats}
    return TrainedSource(source, root, state, losses)


def _share_maps(source: Source, root: Path) -> None:
    """Give the flat formats the buffer map, which our hook wrote once, or make sure they have none.

    Args:
        source: Says which.
        root: Holds a checkpoint directory named after each format; the last saved has the map.
    """
    iteration = f"iter_{STOPPED_AT:07d}"
    (written,) = root.glob(f"*/{iteration}/{BUFFER_MAP_DIR}")
    for form in FORMATS:
        directory = root / form / iteration / BUFFER_MAP_DIR
        if source.maps and directory != written:
            shutil.copytree(written, directory)
    if not source.maps:
        shutil.rmtree(written)


def _same_layout_losses(
    source: Source, form: str, truth: GlobalState, corpus: Path, root: Path
) -> dict[int, float]:
    file = root / f"{form}.losses.json"
    if not file.exists():
        resumed = resume(
            source, root / form, FORMATS[form].ckpt_format, source.layout, corpus,
            root / f"resume-{form}",
        )  # fmt: skip
        wrong = differences(truth, resumed.state)
        assert not wrong, f"upstream does not read back its own {form}: {wrong}"
        file.write_text(json.dumps(resumed.losses))
    return {int(step): loss for step, loss in json.loads(file.read_text()).items()}


def reshard_online(
    source: Source, load: Path, ckpt_format: str, target: Layout, corpus: Path, save_dir: Path,
    *, padded_vocab_size: int | None = None,
) -> None:  # fmt: skip
    """Let upstream itself load a checkpoint at another layout, where it can, and save it there.

    With the layer's patches: stock upstream saves some ``fully_reshardable`` ones damaged.

    Args:
        source: Whose model it is.
        load: Directory with the tracker file.
        ckpt_format: Upstream's ``--ckpt-format``.
        target: To load and save at.
        corpus: The data's prefix.
        save_dir: Gets a checkpoint directory named after each format, and the ranks' states.
        padded_vocab_size: Rows of the embedding, where upstream would choose others.
    """
    argv = source.argv(
        corpus, target, load=load, ckpt_format=ckpt_format, padded_vocab_size=padded_vocab_size,
        save=save_dir / "all", save_interval=1000,
    )  # fmt: skip
    environ = {"FLAGSCALE_DISABLE_PATCHES": "training-events"}  # it has the place we need
    orders = {"resave": save_dir}
    _run(argv, save_dir / "logs", target.nproc, orders, environ, 300.0).require_success()


def reshard(
    load_dir: Path,
    save_dir: Path,
    target: Layout,
    form: str,
    *,
    has_experts: bool = False,
    options: Sequence[object] = (),
    in_process: bool = False,
    timeout_s: float = 300.0,
) -> str:
    """Run the project's own tool.

    Args:
        load_dir: Of the source, with the tracker file.
        save_dir: Where the tool publishes; must not exist.
        target: Layout to write for.
        form: One of :data:`FORMATS`.
        has_experts: Whether to name the target's expert parallel size.
        options: More of the tool's options.
        in_process: Call the tool's ``main`` here, which saves the start of a process.
        timeout_s: Of the process.

    Returns:
        What it printed.

    Raises:
        AssertionError: It failed.
    """
    options = [
        *("--load-dir", load_dir, "--save-dir", save_dir),
        *("--target-tensor-parallel-size", target.tp),
        *("--target-pipeline-parallel-size", target.pp),
        *("--target-data-parallel-size", target.dp),
        *("--target-virtual-pipeline-parallel-size", target.vpp or 1),  # else that of the source
        *("--target-ckpt-format", FORMATS[form].ckpt_format),
        *(("--target-expert-parallel-size", target.ep) if has_experts else ()),
        *(("--target-optim-format", form) if form != "legacy" else ()),
        *options,
    ]
    argv = [str(word) for word in options]
    code, printed = _call_tool(argv) if in_process else _start_tool(argv, timeout_s)
    assert code == 0, f"{_TOOL.name} {' '.join(argv)}\nexit code {code}\n{printed[-4000:]}"
    return printed


def _start_tool(argv: Sequence[str], timeout_s: float) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(_TOOL), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout


def _call_tool(argv: Sequence[str]) -> tuple[int, str]:
    spec = importlib.util.spec_from_file_location(_TOOL.stem, _TOOL)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = tool.main(argv)
    return code, out.getvalue()
