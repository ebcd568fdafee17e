"""The grid of ranks, and whether a model and its batches fit on it.

Pure arithmetic: nothing here imports torch or megatron, or touches a file. The rules are those of
megatron-core 0.19.2, which applies most of them only after every process has started.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from flagscale.errors import ConfigError

__all__ = [
    "BatchSizes",
    "Coordinates",
    "ExpertCoordinates",
    "LatentDims",
    "ModelDims",
    "ParallelLayout",
    "Problem",
    "raise_problems",
    "verify_evaluation",
    "verify_layout",
    "verify_local_attention",
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in the terms of :class:`flagscale.errors.FlagScaleError`."""

    what: str
    where: str
    expected: str
    got: str
    cure: str

    def __str__(self) -> str:
        """The problem as a person reads it."""
        return str(self.as_error())

    def as_error(self) -> ConfigError:
        """The same facts as an exception."""
        return ConfigError(
            self.what, where=self.where, expected=self.expected, got=self.got, cure=self.cure
        )


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise all problems as one error; do nothing when there are none.

    Raises:
        ConfigError: There is at least one problem.
    """
    if len(problems) == 1:
        raise problems[0].as_error()
    if problems:
        listed = "\n".join(f"{i}. {problem}" for i, problem in enumerate(problems, start=1))
        raise ConfigError(f"{len(problems)} things are wrong; nothing has been started.\n{listed}")


class Coordinates(NamedTuple):
    """Where a rank stands in the grid of the attention and dense layers (all 0-based)."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int


class ExpertCoordinates(NamedTuple):
    """Where a rank stands in the grid of the expert layers (all 0-based)."""

    etp_rank: int
    ep_rank: int
    expert_dp_rank: int
    pp_rank: int


@dataclass(frozen=True)
class ParallelLayout:
    """How ``world_size`` ranks are divided.

    Two grids share the ranks: tp x cp x dp x pp for dense layers, etp x ep x expert_dp x pp for
    experts. In both, the axis named first in ``order`` changes fastest from rank to rank.

    Args:
        world_size: Ranks in all.
        tp_size: Tensor parallel size.
        pp_size: Pipeline parallel size.
        cp_size: Context parallel size.
        ep_size: Expert parallel size.
        etp_size: Tensor parallel size of experts; ``None`` means ``tp_size``.
        vpp_size: Model chunks per pipeline rank; ``None`` means no interleaving.
        sequence_parallel: Whether activations are split along the sequence between TP ranks.
        uneven_pipeline: Whether other arguments place the layers on the stages (first and last
            stage sizes, a layout string), so that layers need not divide evenly.
        order: The axes, fastest first.

    Source: ``initialize_model_parallel`` in megatron-core 0.19.2, parallel_state.py.
    """

    world_size: int
    tp_size: int
    pp_size: int
    cp_size: int = 1
    ep_size: int = 1
    etp_size: int | None = None
    vpp_size: int | None = None
    sequence_parallel: bool = False
    uneven_pipeline: bool = False
    order: str = "tp-cp-ep-dp-pp"

    @property
    def expert_tp_size(self) -> int:
        """Tensor parallel size of the expert layers."""
        return self.tp_size if self.etp_size is None else self.etp_size

    @property
    def dp_size(self) -> int:
        """Replicas of the dense layers, each with data of its own."""
        return self.world_size // (self.tp_size * self.cp_size * self.pp_size)

    @property
    def expert_dp_size(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.expert_tp_size * self.ep_size * self.pp_size)

    def coordinates(self, rank: int) -> Coordinates:
        """The place of a rank in the dense grid."""
        at = self._unravel(rank, self._dense_sizes())
        return Coordinates(at["tp"], at["cp"], at["dp"], at["pp"])

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """The place of a rank in the expert grid."""
        at = self._unravel(rank, self._expert_sizes())
        return ExpertCoordinates(at["tp"], at["ep"], at["dp"], at["pp"])

    def rank_of(self, place: Coordinates | ExpertCoordinates) -> int:
        """The rank at a place of either grid."""
        if isinstance(place, Coordinates):
            sizes = self._dense_sizes()
            at = dict(zip(("tp", "cp", "dp", "pp"), place, strict=True))
        else:
            sizes = self._expert_sizes()
            at = dict(zip(("tp", "ep", "dp", "pp"), place, strict=True))
        rank, stride = 0, 1
        for axis in self.order.split("-"):
            if not 0 <= at.get(axis, 0) < sizes[axis]:
                raise ValueError(f"{place} is outside the grid {sizes}")
            rank += at.get(axis, 0) * stride
            stride *= sizes[axis]
        return rank

    def _dense_sizes(self) -> dict[str, int]:
        sizes = {"tp": self.tp_size, "cp": self.cp_size, "ep": 1}
        return sizes | {"dp": self.dp_size, "pp": self.pp_size}

    def _expert_sizes(self) -> dict[str, int]:
        sizes = {"tp": self.expert_tp_size, "cp": 1, "ep": self.ep_size}
        return sizes | {"dp": self.expert_dp_size, "pp": self.pp_size}

    def _unravel(self, rank: int, sizes: dict[str, int]) -> dict[str, int]:
        if not 0 <= rank < prod(sizes.values()):
            raise ValueError(f"rank {rank} is outside the grid {sizes}")
        at = {}
        for axis in self.order.split("-"):
            rank, at[axis] = divmod(rank, sizes[axis])
        return at


@dataclass(frozen=True)
class LatentDims:
    """The sizes of multi-latent attention, whose queries, keys and values come from low ranks.

    Args:
        kv_lora_rank: Of the latent vector that keys and values are made from.
        qk_head_dim: Of a query or key head, the part without a position.
        qk_pos_emb_head_dim: The part with one, which all key heads share.
        v_head_dim: Of a value head.
        q_lora_rank: Of the latent vector that queries are made from; ``None``: they are made from
            the hidden state.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    """

    kv_lora_rank: int
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    @property
    def query_dim(self) -> int:
        """Size of a query or key head."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim


@dataclass(frozen=True)
class ModelDims:
    """The sizes of a model, and what decides how many parameters it has.

    Args:
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream.
        ffn_hidden_size: Rows of a dense feed-forward network (of one half, when gated).
        num_attention_heads: Query heads.
        num_query_groups: Key and value heads.
        seq_length: Tokens a sample.
        kv_channels: Size of a head; ``None`` means hidden size / heads.
        padded_vocab_size: Rows of the embedding; ``None`` where only the tokenizer knows.
        num_experts: Routed experts of a layer that has them.
        moe_ffn_hidden_size: Rows of one expert; ``None`` means ``ffn_hidden_size``.
        moe_layers: The layers (0-based) that have experts.
        moe_topk: Experts a token goes through.
        shared_expert_ffn_hidden_size: Rows of the expert that every token goes through.
        shared_expert_gate: Whether that expert is gated by a row of its own.
        gated: Whether the activation multiplies two halves (SwiGLU).
        linear_bias: Whether linear layers have biases (the output layer never has).
        qkv_bias: Whether the query-key-value projection has one all the same.
        norm_bias: Whether norms have one (LayerNorm).
        qk_norm: Whether queries and keys are normalized.
        tied_embeddings: Whether the output layer is the embedding.
        learned_positions: Rows of the position embedding; ``None`` without one.
        latent: The sizes of multi-latent attention, which then take the place of query groups and
            ``kv_channels``; ``None``: attention is of the usual kind.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    seq_length: int
    kv_channels: int | None = None
    padded_vocab_size: int | None = None
    num_experts: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_layers: frozenset[int] = frozenset()
    moe_topk: int = 1
    shared_expert_ffn_hidden_size: int | None = None
    shared_expert_gate: bool = False
    gated: bool = False
    linear_bias: bool = False
    qkv_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    learned_positions: int | None = None
    latent: LatentDims | None = None

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class BatchSizes:
    """Samples per forward pass of one replica, and per optimizer step of all of them.

    Args:
        micro_batch_size: Samples in one forward pass.
        global_batch_size: Samples in one optimizer step.
        microbatch_group_size: Contiguous micro-batches of a virtual pipeline stage; ``None`` means
            the pipeline size.
    """

    micro_batch_size: int
    global_batch_size: int
    microbatch_group_size: int | None = None


def verify_layout(layout: ParallelLayout, dims: ModelDims, batch: BatchSizes) -> list[Problem]:
    """What upstream would refuse, or do wrong, about this model on these ranks; best empty."""
    problems = [*_verify_positive(layout, dims, batch)]
    if problems:  # the rest divides by these
        return problems
    problems += _verify_tensor_parallel(layout, dims)
    problems += _verify_sequence(layout, dims)
    problems += _verify_experts(layout, dims)
    problems += _verify_pipeline(layout, dims)
    grid = _verify_grid(layout)
    # Without a whole number of replicas the batch rules have no meaning.
    return grid + problems if grid else problems + _verify_batch(layout, batch)


def verify_local_attention(dims: ModelDims, tp_size: int) -> Iterator[Problem]:
    """What upstream's own modules cannot make of multi-latent attention; Transformer Engine's can.

    Args:
        dims: The model.
        tp_size: Tensor parallel size, at least 1.
    """
    latent = dims.latent
    if latent is None:
        return
    if dims.qk_norm and latent.q_lora_rank is None:
        yield Problem(
            "upstream's local modules have no norm for queries made from the hidden state",
            "--qk-layernorm, --q-lora-rank",
            "--q-lora-rank where --qk-layernorm is given, with --transformer-impl local",
            "--qk-layernorm alone",
            "give --q-lora-rank, or leave --qk-layernorm out",
        )
    for flag, rank in (
        ("--q-lora-rank", latent.q_lora_rank or 0),
        (
            "--kv-lora-rank + --qk-pos-emb-head-dim",
            latent.kv_lora_rank + latent.qk_pos_emb_head_dim,
        ),
    ):
        if rank % tp_size:
            yield Problem(
                "a low rank of attention does not divide between tensor parallel ranks",
                "--tensor-model-parallel-size",
                f"a divisor of {rank} ({flag}), with --transformer-impl local",
                str(tp_size),
                f"another {flag}, or --tensor-model-parallel-size "
                f"{_choices(_near(_divisors(rank), tp_size))}",
            )


def verify_evaluation(split: str, eval_iters: int) -> list[Problem]:
    """Whether the data split leaves something to evaluate on exactly when evaluation is asked for.

    With ``eval_iters`` 0 and a share for validation upstream asks its blend for 0 samples and dies
    after the processes have started; without a share it evaluates on nothing.

    Args:
        split: Shares of training, validation and test data, as in ``--split 98,1,1``.
        eval_iters: Iterations per evaluation.
    """
    shares = [float(share) for share in re.findall(r"\d+\.?\d*|\.\d+", split)]
    if not 1 <= len(shares) <= 3 or not shares[0]:
        return [
            Problem(
                "the data split cannot be read",
                "--split",
                "one to three numbers, the first above 0: training, validation, test",
                split,
                "--split 98,1,1, or --split 100,0,0 without evaluation",
            )
        ]
    held_out = any(shares[1:])
    if eval_iters == 0 and held_out:
        return [
            Problem(
                "the data split keeps data for evaluation, but there is none",
                "--split, --eval-iters",
                "no validation and test share when --eval-iters is 0",
                f"--split {split} --eval-iters 0",
                "--split 100,0,0, or --eval-iters above 0",
            )
        ]
    if eval_iters > 0 and not all([*shares, 0, 0][1:3]):
        return [
            Problem(
                "evaluation is asked for, but the data split keeps no data for it",
                "--split, --eval-iters",
                "validation and test shares above 0 when --eval-iters is above 0",
                f"--split {split} --eval-iters {eval_iters}",
                "--eval-iters 0, or --split 98,1,1",
            )
        ]
    return []


def _verify_positive(
    layout: ParallelLayout, dims: ModelDims, batch: BatchSizes
) -> Iterable[Problem]:
    sizes = {
        "world size": layout.world_size,
        "--tensor-model-parallel-size": layout.tp_size,
        "--pipeline-model-parallel-size": layout.pp_size,
        "--context-parallel-size": layout.cp_size,
        "--expert-model-parallel-size": layout.ep_size,
        "--expert-tensor-parallel-size": 1 if layout.etp_size is None else layout.etp_size,
        "--num-virtual-stages-per-pipeline-rank": 1 if layout.vpp_size is None else layout.vpp_size,
        "--num-layers": dims.num_layers,
        "--hidden-size": dims.hidden_size,
        "--ffn-hidden-size": dims.ffn_hidden_size,
        "--num-attention-heads": dims.num_attention_heads,
        "--num-query-groups": dims.num_query_groups,
        "--seq-length": dims.seq_length,
        "--micro-batch-size": batch.micro_batch_size,
        "--global-batch-size": batch.global_batch_size,
    }
    for where, size in sizes.items():
        if size < 1:
            yield Problem(
                "a size is not positive", where, "at least 1", str(size), f"raise {where}"
            )


def _verify_grid(layout: ParallelLayout) -> list[Problem]:
    problems = []
    grids = {"TP x CP x PP": layout.tp_size * layout.cp_size * layout.pp_size}
    if layout.ep_size > 1 or layout.etp_size is not None:
        grids["ETP x EP x PP"] = layout.expert_tp_size * layout.ep_size * layout.pp_size
    for name, model_size in grids.items():
        if layout.world_size % model_size:
            fitting = _choices(_near_multiples(model_size, layout.world_size))
            problems.append(
                Problem(
                    "the ranks do not divide into whole replicas of the model",
                    f"world size, {name}",
                    f"a world size that is a multiple of {model_size} ({name})",
                    str(layout.world_size),
                    f"run {fitting} processes, or lower the parallel sizes",
                )
            )
    return problems


def _verify_tensor_parallel(layout: ParallelLayout, dims: ModelDims) -> list[Problem]:
    tp = layout.tp_size
    where = "--tensor-model-parallel-size"
    cure = f"{where} {_choices(_near(_tp_sizes(dims), tp))}"
    heads, groups = dims.num_attention_heads, dims.num_query_groups
    problems = []
    if dims.kv_channels is None and dims.hidden_size % heads:
        problems.append(
            Problem(
                "the hidden size does not divide into attention heads",
                "--hidden-size, --num-attention-heads",
                f"a multiple of {heads}",
                str(dims.hidden_size),
                f"--hidden-size {_choices(_near_multiples(heads, dims.hidden_size))}"
                ", or give --kv-channels",
            )
        )
    if heads % groups:
        problems.append(
            Problem(
                "the attention heads do not divide into query groups",
                "--num-attention-heads, --num-query-groups",
                f"a divisor of {heads}",
                str(groups),
                f"--num-query-groups {_choices(_near(_divisors(heads), groups))}",
            )
        )
    if heads % tp:
        problems.append(
            Problem(
                "the attention heads do not divide between tensor parallel ranks",
                where,
                f"a divisor of {heads} (--num-attention-heads)",
                str(tp),
                cure,
            )
        )
    if groups % tp and tp % groups:
        problems.append(
            Problem(
                "the query groups do not divide between tensor parallel ranks",
                where,
                f"a divisor or a multiple of {groups} (--num-query-groups)",
                str(tp),
                cure,
            )
        )
    if dims.num_experts is None and dims.ffn_hidden_size % tp:
        problems.append(
            Problem(
                "the feed-forward rows do not divide between tensor parallel ranks",
                where,
                f"a divisor of {dims.ffn_hidden_size} (--ffn-hidden-size)",
                str(tp),
                cure,
            )
        )
    if dims.padded_vocab_size is not None and dims.padded_vocab_size % tp:
        problems.append(
            Problem(
                "the padded vocabulary does not divide between tensor parallel ranks",
                where,
                f"a divisor of {dims.padded_vocab_size} (padded vocabulary)",
                str(tp),
                cure,
            )
        )
    return problems


def _verify_sequence(layout: ParallelLayout, dims: ModelDims) -> list[Problem]:
    if layout.sequence_parallel and layout.tp_size == 1:
        return [
            Problem(
                "sequence parallelism needs tensor parallelism (upstream would switch it off)",
                "--sequence-parallel",
                "--tensor-model-parallel-size above 1",
                "1",
                "--sequence-parallel=false, or a larger --tensor-model-parallel-size",
            )
        ]
    parts = layout.tp_size if layout.sequence_parallel else 1
    if layout.cp_size > 1:
        # Each context parallel rank takes two pieces of the sequence, one from either end.
        parts = layout.cp_size * max(2, parts)
    if dims.seq_length % parts:
        return [
            Problem(
                "the sequence does not divide between ranks",
                "--seq-length",
                f"a multiple of {parts}",
                str(dims.seq_length),
                f"--seq-length {_choices(_near_multiples(parts, dims.seq_length))}",
            )
        ]
    return []


def _verify_experts(layout: ParallelLayout, dims: ModelDims) -> list[Problem]:
    where = "--expert-model-parallel-size"
    if dims.num_experts is None:
        if layout.ep_size == 1:
            return []
        return [
            Problem(
                "expert parallelism in a model without experts",
                where,
                "1",
                str(layout.ep_size),
                f"{where} 1, or give --num-experts",
            )
        ]
    problems = []
    if dims.num_experts % layout.ep_size:
        problems.append(
            Problem(
                "the experts do not divide between expert parallel ranks",
                where,
                f"a divisor of {dims.num_experts} (--num-experts)",
                str(layout.ep_size),
                f"{where} {_choices(_near(_divisors(dims.num_experts), layout.ep_size))}",
            )
        )
    rows = dims.moe_ffn_hidden_size or dims.ffn_hidden_size
    if rows % layout.expert_tp_size:
        where = "--expert-tensor-parallel-size"
        problems.append(
            Problem(
                "the feed-forward rows of an expert do not divide between its ranks",
                where,
                f"a divisor of {rows} (--moe-ffn-hidden-size)",
                str(layout.expert_tp_size),
                f"{where} {_choices(_near(_divisors(rows), layout.expert_tp_size))}",
            )
        )
    return problems


def _verify_pipeline(layout: ParallelLayout, dims: ModelDims) -> list[Problem]:
    problems = []
    vpp_size = layout.vpp_size or 1
    if vpp_size > 1 and layout.pp_size == 1:
        problems.append(
            Problem(
                "virtual pipeline stages need pipeline parallelism",
                "--pipeline-model-parallel-size",
                "above 1",
                "1",
                "raise it, or leave virtual stages out",
            )
        )
    stages = layout.pp_size * vpp_size
    if not layout.uneven_pipeline and dims.num_layers % stages:
        fitting = [pp for pp in _divisors(dims.num_layers) if not dims.num_layers % (pp * vpp_size)]
        cure = "fewer virtual stages"
        if fitting:
            cure = f"--pipeline-model-parallel-size {_choices(_near(fitting, layout.pp_size))}"
        problems.append(
            Problem(
                "the layers do not divide between pipeline stages",
                "--num-layers",
                f"a multiple of {stages} (PP {layout.pp_size} x VPP {vpp_size})",
                str(dims.num_layers),
                f"{cure}, or place the layers with --decoder-first-pipeline-num-layers",
            )
        )
    return problems


def _verify_batch(layout: ParallelLayout, batch: BatchSizes) -> list[Problem]:
    where = "--global-batch-size"
    samples = batch.micro_batch_size * layout.dp_size
    if batch.global_batch_size % samples:
        return [
            Problem(
                "the global batch does not divide into micro-batches of the replicas",
                where,
                f"a multiple of {samples} (--micro-batch-size {batch.micro_batch_size} x "
                f"DP {layout.dp_size})",
                str(batch.global_batch_size),
                f"{where} {_choices(_near_multiples(samples, batch.global_batch_size))}",
            )
        ]
    if (layout.vpp_size or 1) == 1 or layout.pp_size == 1:
        return []
    microbatches = batch.global_batch_size // samples
    group = batch.microbatch_group_size or layout.pp_size
    if layout.pp_size <= group <= microbatches and not (0 < microbatches % group < layout.pp_size):
        return []
    sizes = _near_multiples(samples * layout.pp_size, batch.global_batch_size)
    return [
        Problem(
            "interleaved pipeline stages do not divide the micro-batches of a step",
            where,
            f"a multiple of {layout.pp_size} micro-batches (PP) in groups of {group}",
            f"{microbatches} micro-batches",
            f"{where} {_choices(sizes)}",
        )
    ]


def _tp_sizes(dims: ModelDims) -> list[int]:
    """Tensor parallel sizes that satisfy every rule of the model at once."""
    groups = dims.num_query_groups
    rows = dims.num_attention_heads if dims.num_experts else dims.ffn_hidden_size
    vocab = dims.padded_vocab_size or 0  # 0 divides by anything
    return [
        tp
        for tp in _divisors(dims.num_attention_heads)
        if not rows % tp and not vocab % tp and (not groups % tp or not tp % groups)
    ]


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if not number % i]


def _near(values: Iterable[int], target: int) -> list[int]:
    """The at most three values closest to ``target``, in order."""
    return sorted(sorted(values, key=lambda value: abs(value - target))[:3])


def _near_multiples(of: int, target: int) -> list[int]:
    """The multiples of ``of`` on both sides of ``target``, without 0."""
    lower = target // of * of
    return [lower, lower + of] if lower else [of]


def _choices(values: Sequence[int]) -> str:
    """``2``, ``2 or 4``, ``1, 2 or 4``."""
    *rest, last = (str(value) for value in values)
    return f"{', '.join(rest)} or {last}" if rest else last
