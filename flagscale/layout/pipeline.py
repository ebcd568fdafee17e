"""Which layers, and which end of the model, lie on which stage of a pipeline.

A stage is a model chunk of a pipeline rank; a rank has several where stages are interleaved
(virtual pipeline). In every arrangement the layers run through chunk 0 of all ranks, then through
chunk 1 of all ranks, and so on: the arrangements differ in nothing but how many each stage takes.

Source: megatron-core 0.19.2, core/transformer/transformer_block.py (``get_num_layers_to_build``),
transformer_layer.py (``get_transformer_layer_offset``), pipeline_parallel_layer_layout.py, and
``validate_args`` for the number of chunks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale.errors import ConfigError
from flagscale.layout.arguments import whole_number

__all__ = [
    "Pipeline",
    "Stage",
    "even_pipeline",
    "parse_layout",
    "pipeline_from_arguments",
    "pipeline_from_layout",
    "uneven_pipeline",
]

_LETTERS = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
_LONGEST_LAYOUT = 100_000  # characters; a checkpoint may ask for any number of them
_FLAG_OF_LAYOUT = "--pipeline-model-parallel-layout"
_FLAG_OF_CHUNKS = "--num-virtual-stages-per-pipeline-rank"
# Something in parentheses or one character, and how often; in parentheses may be such items again.
_ITEM = re.compile(r"(?:\(([^()]+)\)(?=\*)|(.))(?:\*(\d{1,9}))?", re.DOTALL)


@dataclass(frozen=True)
class Stage:
    """One model chunk of one pipeline rank.

    Args:
        layers: Its transformer layers, numbered through the model from 0; may be empty.
        first: Whether it holds the embedding.
        last: Whether it holds the final norm and the output layer, or the copy of the embedding
            that serves as one where the two are tied.
    """

    layers: range
    first: bool
    last: bool


@dataclass(frozen=True)
class Pipeline:
    """All stages.

    Args:
        stages: By pipeline rank, then by chunk; every rank has as many chunks.
    """

    stages: tuple[tuple[Stage, ...], ...]

    @property
    def pp_size(self) -> int:
        """Pipeline ranks."""
        return len(self.stages)

    @property
    def num_chunks(self) -> int:
        """Model chunks of each rank: 1 without a virtual pipeline."""
        return len(self.stages[0])

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return sum(len(stage.layers) for chunks in self.stages for stage in chunks)

    def stage(self, pp_rank: int, chunk: int = 0) -> Stage:
        """The stage at a place.

        Raises:
            ValueError: There is no such place.
        """
        if not (0 <= pp_rank < self.pp_size and 0 <= chunk < self.num_chunks):
            raise ValueError(f"no chunk {chunk} of pipeline rank {pp_rank} in {self}")
        return self.stages[pp_rank][chunk]

    def locate(self, layer: int) -> tuple[int, int, int]:
        """Pipeline rank, chunk, and index within the chunk, of a layer of the model.

        Raises:
            ValueError: There is no such layer.
        """
        for pp_rank, chunks in enumerate(self.stages):
            for chunk, stage in enumerate(chunks):
                if layer in stage.layers:
                    return pp_rank, chunk, layer - stage.layers.start
        raise ValueError(f"no layer {layer} among {self.num_layers}")


def even_pipeline(
    num_layers: int,
    pp_size: int,
    num_chunks: int = 1,
    *,
    count_embedding: bool = False,
    count_loss: bool = False,
) -> Pipeline:
    """Every stage takes as many layers.

    Args:
        num_layers: Layers of the model.
        pp_size: Pipeline ranks.
        num_chunks: Model chunks a rank.
        count_embedding: Whether the embedding takes the place of a layer.
        count_loss: Whether the output layer does.

    Raises:
        ConfigError: The layers do not divide.
    """
    _require_sizes(num_layers, pp_size, num_chunks)
    total, stages = num_layers + count_embedding + count_loss, pp_size * num_chunks
    if total % stages:
        counted = "layers, embedding and loss as asked for" if total > num_layers else "layers"
        raise ConfigError(
            "the layers do not divide between the pipeline stages",
            where="--num-layers, --pipeline-model-parallel-size",
            expected=f"a multiple of {stages} (PP {pp_size} x {num_chunks} chunks)",
            got=f"{total} ({counted})",
            cure="another pipeline size or number of chunks, the sizes of the first and last "
            f"stage, or a {_FLAG_OF_LAYOUT}",
        )
    sizes = [total // stages] * stages
    sizes[0] -= count_embedding
    sizes[-1] -= count_loss
    if min(sizes) < 0:  # embedding and loss counted on a single stage of one
        raise ConfigError(
            "embedding and loss leave no place for a layer",
            where="--account-for-embedding-in-pipeline-split, --account-for-loss-in-pipeline-split",
            expected="a stage that takes at least the parts counted on it",
            got=f"{total // stages} a stage",
            cure="fewer stages",
        )
    return _pipeline(sizes, pp_size)


def uneven_pipeline(
    num_layers: int,
    pp_size: int,
    num_chunks: int = 1,
    *,
    first: int | None = None,
    last: int | None = None,
) -> Pipeline:
    """The first rank, the last rank, or both, take a number of their own.

    Args:
        num_layers: Layers of the model.
        pp_size: Pipeline ranks.
        num_chunks: Model chunks a rank.
        first: Layers of the first rank, in all its chunks; ``None``: as many as one in the middle.
        last: The same of the last rank.

    Raises:
        ConfigError: The layers do not divide so.
    """
    _require_sizes(num_layers, pp_size, num_chunks)
    given = [size for size in (first, last) if size is not None]
    middle_layers, middle_ranks = num_layers - sum(given), pp_size - len(given)
    if (
        any(size < 1 for size in given)
        or middle_ranks < 0
        or middle_layers < 0
        or bool(middle_layers) != bool(middle_ranks)
        or (middle_ranks and middle_layers % middle_ranks)
    ):
        raise ConfigError(
            "the layers do not divide between the pipeline ranks in the middle",
            where="--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers",
            expected=f"a multiple of {middle_ranks} left of {num_layers} layers"
            if middle_ranks > 0
            else f"{num_layers} layers in all on {pp_size} ranks",
            got=f"first {first}, last {last}",
            cure="other sizes, or another --pipeline-model-parallel-size",
        )
    middle = middle_layers // middle_ranks if middle_ranks else 0
    ranks = [middle] * pp_size
    if first is not None:
        ranks[0] = first
    if last is not None:
        ranks[-1] = last
    if any(size % num_chunks for size in ranks):
        raise ConfigError(
            "the layers of a pipeline rank do not divide between its model chunks",
            where=_FLAG_OF_CHUNKS,
            expected=f"multiples of {num_chunks}",
            got=f"{', '.join(map(str, ranks))} layers",
            cure="another number of chunks, or other sizes of the first and last stage",
        )
    return _pipeline([size // num_chunks for size in ranks] * num_chunks, pp_size)


def pipeline_from_layout(
    layout: str | Sequence[Sequence[Any]], num_layers: int, pp_size: int
) -> Pipeline:
    """The pipeline that a layout writes out.

    The embedding is on the first stage and the output layer on the last, whatever the layout says:
    upstream reads only the layers from it.

    Args:
        layout: As :func:`parse_layout` takes it.
        num_layers: Layers of the model.
        pp_size: Pipeline ranks.

    Raises:
        ConfigError: The layout cannot be read, or does not fit.
    """
    stages = parse_layout(layout)
    flat = [kind for stage in stages for kind in stage]
    counts = Counter(flat)
    if counts["mtp"]:
        raise ConfigError(
            "multi-token prediction is not supported",
            where=_FLAG_OF_LAYOUT,
            expected="no m",
            got=str(layout),
        )
    _require_sizes(num_layers, pp_size, 1)
    if (
        len(stages) % pp_size
        or len(stages) > pp_size == 1  # a single rank is not interleaved
        or flat[:1] != ["embedding"]
        or flat[-1:] != ["loss"]
        or counts != Counter(embedding=1, loss=1, decoder=num_layers)
    ):
        raise ConfigError(
            "the pipeline layout does not fit the model",
            where=_FLAG_OF_LAYOUT,
            expected=f"{'a multiple of ' * (pp_size > 1)}{pp_size} stages; "
            f"first E, then {num_layers} t, last L",
            got=f"{layout}: {len(stages)} stages, {counts['decoder']} t",
            cure="correct it",
        )
    return _pipeline([list(stage).count("decoder") for stage in stages], pp_size)


def parse_layout(layout: str | Sequence[Sequence[Any]]) -> tuple[tuple[str, ...], ...]:
    """The kinds of layer of each stage, in the order in which a batch goes through them.

    Args:
        layout: As ``--pipeline-model-parallel-layout`` takes it (``Et*3|(tt|)*2L``), or a list of
            lists of kinds: ``embedding``, ``decoder``, ``mtp``, ``loss``, or upstream's enum.

    Raises:
        ConfigError: It cannot be read.
    """
    if isinstance(layout, str):
        unrolled = _unroll(layout.replace(",", ""))
        stages = [[_LETTERS.get(letter, "") for letter in part] for part in unrolled.split("|")]
    elif isinstance(layout, Sequence) and all(isinstance(part, Sequence) for part in layout):
        stages = [[_kind(item) for item in part] for part in layout]
    else:
        stages = [[""]]
    if not all(kind for stage in stages for kind in stage):
        raise ConfigError(
            "the pipeline layout cannot be read",
            where=_FLAG_OF_LAYOUT,
            expected="stages of E, t, m and L between |, with x*N or (...)*N for repetitions",
            got=str(layout),
            cure="correct it",
        )
    return tuple(map(tuple, stages))


def pipeline_from_arguments(args: Mapping[str, Any]) -> Pipeline:
    """The pipeline of a job.

    Args:
        args: By attribute, as argparse stores them or a checkpoint holds them; what an older
            release did not know may be missing.

    Raises:
        ConfigError: They do not fit.
    """
    num_layers = whole_number(args, "num_layers") or 0
    pp_size = whole_number(args, "pipeline_model_parallel_size") or 1
    layout = args.get("pipeline_model_parallel_layout")
    if layout:
        # The object that upstream parses it to keeps what it was made of.
        pipeline = pipeline_from_layout(getattr(layout, "input_data", layout), num_layers, pp_size)
        _require_chunks(args, pipeline.num_chunks)
        return pipeline
    _require_sizes(num_layers, pp_size, 1)
    first = whole_number(args, "decoder_first_pipeline_num_layers")
    last = whole_number(args, "decoder_last_pipeline_num_layers")
    counted = {
        "count_embedding": bool(args.get("account_for_embedding_in_pipeline_split")),
        "count_loss": bool(args.get("account_for_loss_in_pipeline_split")),
    }
    num_chunks = _num_chunks(args, num_layers + sum(counted.values()), pp_size)
    if first is None and last is None:
        return even_pipeline(num_layers, pp_size, num_chunks, **counted)
    if any(counted.values()):
        raise ConfigError(
            "the sizes of the first and last stage, and counting embedding or loss as a layer, "
            "exclude each other",
            where="--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers",
            expected="one of the two",
            got=f"first {first}, last {last}, {counted}",
            cure="drop one",
        )
    return uneven_pipeline(num_layers, pp_size, num_chunks, first=first, last=last)


def _pipeline(sizes: Sequence[int], pp_size: int) -> Pipeline:
    """Stages of these numbers of layers, in the order in which a batch goes through them."""
    stages, start = [], 0
    for index, size in enumerate(sizes):
        stages.append(Stage(range(start, start + size), index == 0, index == len(sizes) - 1))
        start += size
    return Pipeline(tuple(tuple(stages[rank::pp_size]) for rank in range(pp_size)))


def _num_chunks(args: Mapping[str, Any], counted_layers: int, pp_size: int) -> int:
    """Model chunks a rank; upstream interleaves only where there is more than one rank."""
    if pp_size == 1:
        return 1
    for dest in ("num_virtual_stages_per_pipeline_rank", "virtual_pipeline_model_parallel_size"):
        if num_chunks := whole_number(args, dest):
            return num_chunks
    chunk_layers = whole_number(args, "num_layers_per_virtual_pipeline_stage")
    if not chunk_layers:
        return 1
    if counted_layers % (pp_size * chunk_layers):
        raise ConfigError(
            "the layers do not divide into virtual pipeline stages",
            where="--num-layers-per-virtual-pipeline-stage",
            expected=f"a multiple of PP {pp_size} x {chunk_layers}",
            got=f"{counted_layers} layers",
            cure=f"another number, or {_FLAG_OF_CHUNKS}",
        )
    return counted_layers // (pp_size * chunk_layers)


def _require_chunks(args: Mapping[str, Any], num_chunks: int) -> None:
    said = whole_number(args, "virtual_pipeline_model_parallel_size") or num_chunks
    if said != num_chunks:
        raise ConfigError(
            "the pipeline layout has another number of stages than the arguments",
            where=_FLAG_OF_LAYOUT,
            expected=f"{said} chunks a rank",
            got=f"{num_chunks}",
            cure="correct the layout",
        )


def _require_sizes(num_layers: int, pp_size: int, num_chunks: int) -> None:
    sizes = {
        "--num-layers": num_layers,
        "--pipeline-model-parallel-size": pp_size,
        _FLAG_OF_CHUNKS: num_chunks,
    }
    for where, size in sizes.items():
        if size < 1:
            raise ConfigError(
                "a size is not positive", where=where, expected="at least 1", got=size
            )


def _unroll(text: str) -> str:
    """Write out all repetitions; something unreadable where they have no end."""
    unrolled = ""
    for group, character, count in _ITEM.findall(text):
        item = _unroll(group) if group else character
        if len(unrolled) + len(item) * int(count or 1) > _LONGEST_LAYOUT:
            return "?"
        unrolled += item * int(count or 1)
    return unrolled


def _kind(item: Any) -> str:
    """The kind that a member of upstream's enum, or its name, stands for; empty if none does."""
    name = str(getattr(item, "name", item)).strip().lower()
    return name if name in _LETTERS.values() else ""
