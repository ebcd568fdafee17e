"""A job as its saved arguments describe it, and the groups of its optimizers."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flagscale.errors import CheckpointError, ConfigError
from flagscale.layout.buffers import BufferLayout, bucket_size, buffer_rules, plan_buffers
from flagscale.layout.model import (
    CanonicalTensor,
    LayerSpec,
    LocalParam,
    ModelSpec,
    canonical_tensors,
    local_params,
    local_weights,
    model_spec,
)
from flagscale.layout.parallel import ParallelLayout
from flagscale.layout.pipeline import Pipeline, pipeline_from_arguments

__all__ = ["Group", "Job"]


@dataclass(frozen=True)
class Group:
    """The ranks that share the flat buffers of one optimizer.

    Args:
        optimizer: Index among the chained optimizers; 0 where there is one.
        index: Upstream's ``dp_group_idx``.
        pp_rank: Pipeline rank of its members.
        tp_rank: Tensor parallel rank; 0 for experts.
        ep_rank: Expert parallel rank; 0 for dense parameters.
        etp_rank: Expert tensor parallel rank; of a dense group whose members have experts among
            its parameters, that of these.
        expert: Whether it holds the experts' parameters.
        chunks: Model chunks whose parameters it holds.
    """

    optimizer: int
    index: int
    pp_rank: int
    tp_rank: int
    ep_rank: int
    etp_rank: int
    expert: bool
    chunks: tuple[int, ...]

    def __str__(self) -> str:
        """As upstream's keys name it."""
        return f"optimizer {self.optimizer}, dp_group_idx {self.index}"


@dataclass(frozen=True)
class Job:
    """A job, saved or to come.

    Args:
        args: Its arguments, by attribute.
        model: Its model.
        layout: Its grid of ranks.
        pipeline: Which layers lie where.
        tensors: The model's tensors, by canonical name.
    """

    args: Mapping[str, Any]
    model: ModelSpec
    layout: ParallelLayout
    pipeline: Pipeline
    tensors: Mapping[str, CanonicalTensor]

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Job:
        """The job that arguments describe.

        Args:
            args: By attribute, as a checkpoint holds them.

        Raises:
            ConfigError: They describe a model or a layout that is not known here, or none.
        """
        model, pipeline = model_spec(args), pipeline_from_arguments(args)
        try:
            layout = _layout(args, pipeline)
            if layout.world_size % (layout.tp_size * layout.cp_size * layout.pp_size):
                raise ValueError(f"{layout.world_size} ranks")
            if layout.world_size % (layout.expert_tp_size * layout.ep_size * layout.pp_size):
                raise ValueError(f"{layout.world_size} ranks")
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                "the arguments do not describe a grid of ranks",
                where="world_size, *_parallel_size",
                got=f"{type(error).__name__}: {error}",
            ) from error
        return cls(args, model, layout, pipeline, canonical_tensors(model))

    @classmethod
    def saved(cls, args: Any, where: str) -> Job:
        """The job whose arguments a checkpoint holds.

        Raises:
            CheckpointError: They are not there, or describe a job that is not known here.
        """
        if not isinstance(args, Namespace):
            raise CheckpointError(
                "a checkpoint does not hold the arguments of its job",
                where=where,
                expected="args, as Megatron saves them",
                got=type(args).__name__,
            )
        try:
            return cls.of(vars(args))
        except ConfigError as error:
            raise CheckpointError(
                f"the saved arguments describe no job that is known here: {error.what}",
                where=f"{where}, {error.where}",
                expected=error.expected,
                got=error.got,
                cure=error.cure,
            ) from error

    @property
    def has_expert_grid(self) -> bool:
        """Whether experts have an optimizer, and a data-parallel group, of their own."""
        own = self.layout.ep_size > 1 or self.layout.expert_tp_size != self.layout.tp_size
        return bool(self.model.dims.moe_layers) and own

    @property
    def dense_optimizers(self) -> int:
        """Chained optimizers of dense parameters: two where the first chunk has its own."""
        return 2 if self.args.get("overlap_param_gather_with_optimizer_step") else 1

    def groups(self) -> Iterator[Group]:
        """Every group of every optimizer, in upstream's numbering of the model-parallel ranks."""
        at, chunks = self.layout, tuple(range(self.pipeline.num_chunks))
        parts = (chunks[:1], chunks[1:]) if self.dense_optimizers > 1 else (chunks,)
        for pp_rank in range(at.pp_size):
            for tp_rank in range(at.tp_size):
                index = pp_rank * at.tp_size + tp_rank
                etp_rank = tp_rank if at.expert_tp_size == at.tp_size else 0
                for optimizer, part in enumerate(parts):
                    yield Group(optimizer, index, pp_rank, tp_rank, 0, etp_rank, False, part)
        if not self.has_expert_grid:
            return
        for pp_rank in range(at.pp_size):
            for ep_rank in range(at.ep_size):
                for etp_rank in range(at.expert_tp_size):
                    index = (pp_rank * at.ep_size + ep_rank) * at.expert_tp_size + etp_rank
                    yield Group(len(parts), index, pp_rank, 0, ep_rank, etp_rank, True, chunks)

    def params(self, group: Group, chunk: int, spec: LayerSpec) -> tuple[LocalParam, ...]:
        """The parameters of a model chunk as a group's members have it, as they are registered."""
        return local_params(
            self.model,
            self.layout,
            self.pipeline,
            group.pp_rank,
            chunk,
            group.tp_rank,
            group.ep_rank,
            spec,
            group.etp_rank,
        )

    def numel(self, group: Group, spec: LayerSpec) -> int:
        """Elements of all parameters of a member, in all its chunks."""
        chunks = range(self.pipeline.num_chunks)
        return sum(p.numel for chunk in chunks for p in self.params(group, chunk, spec))

    def weights(
        self, pp_rank: int, chunk: int, tp_rank: int, ep_rank: int, spec: LayerSpec
    ) -> tuple[LocalParam, ...]:
        """What the state dict of a rank's model chunk holds, in its order."""
        return local_weights(
            self.model, self.layout, self.pipeline, pp_rank, chunk, tp_rank, ep_rank, spec
        )

    def buffers(
        self, group: Group, spec: LayerSpec
    ) -> Iterator[tuple[BufferLayout, tuple[LocalParam, ...]]]:
        """The buffers of a group by ``gbuf_idx``, each with the parameters that its slots count."""
        chunks = [self.params(group, chunk, spec) for chunk in range(self.pipeline.num_chunks)]
        numel = self.numel(group, spec)
        rules = buffer_rules(self.args, self.layout)
        for chunk in group.chunks:
            size = bucket_size(self.args, self.layout, group.pp_rank, chunk, numel)
            for buffer in plan_buffers(chunks[chunk], rules, size):
                if buffer.key.expert == group.expert:
                    yield buffer, chunks[chunk]


def _layout(args: Mapping[str, Any], pipeline: Pipeline) -> ParallelLayout:
    return ParallelLayout(
        world_size=int(args["world_size"]),
        tp_size=int(args["tensor_model_parallel_size"]),
        pp_size=pipeline.pp_size,
        cp_size=int(args.get("context_parallel_size") or 1),
        ep_size=int(args.get("expert_model_parallel_size") or 1),
        etp_size=args.get("expert_tensor_parallel_size"),
        vpp_size=pipeline.num_chunks if pipeline.num_chunks > 1 else None,
        sequence_parallel=bool(args.get("sequence_parallel")),
        uneven_pipeline=True,  # the pipeline says where the layers are
        order="tp-cp-ep-pp-dp" if args.get("use_tp_pp_dp_mapping") else "tp-cp-ep-dp-pp",
    )
