"""Datasets for pretraining: a GPT dataset, built by upstream's builder from the arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split
from megatron.training.utils.common_utils import is_first_or_last_pipeline_stage

from flagscale.data_inspect.quarantine import Spans
from flagscale.hooks import HOOKS, DatasetsBuilt
from flagscale.train.dataset import GPTDataset, GPTDatasetConfig
from flagscale.train.quarantine import quarantined_spans, verify_ranks_agree
from flagscale.train.replay import read_samples

__all__ = ["gpt_dataset_config", "provide_datasets"]


def gpt_dataset_config(
    args: Any, quarantined: Mapping[str, Spans] | None = None
) -> GPTDatasetConfig:
    """The dataset configuration for upstream's own command line, and what is quarantined."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        inter_document_masking=args.dataloader_inter_document_masking,
        quarantined=quarantined or {},
    )


def provide_datasets(
    train_valid_test_num_samples: Sequence[int | None], vp_stage: int | None = None
) -> list[Any]:
    """Build the train, validation and test datasets where this rank reads data, else ``None``.

    Args:
        train_valid_test_num_samples: How many samples training will draw of each split.
        vp_stage: The model chunk asked for, under a virtual pipeline.

    Must be called on every rank: upstream's builder joins barriers.
    """

    def reads_data() -> bool:
        # Where documents begin, every stage must know.
        reads = is_first_or_last_pipeline_stage(vp_stage) or args.dataloader_inter_document_masking
        return mpu.get_tensor_model_parallel_rank() == 0 and bool(reads)

    args = get_args()
    verify_ranks_agree(args)
    config = gpt_dataset_config(args, quarantined_spans(args) if reads_data() else {})
    sizes = list(train_valid_test_num_samples)
    replayed = read_samples(args.replay_samples) if args.replay_samples else None
    if replayed is not None:
        sizes[0] = replayed.num_samples
    builder = BlendedMegatronDatasetBuilder(GPTDataset, sizes, reads_data, config)
    datasets: list[Any] = builder.build()
    for listener in HOOKS.on_datasets:
        listener(DatasetsBuilt(datasets[0]))
    if replayed is not None and datasets[0] is not None:
        datasets[0] = replayed.of(datasets[0])
    return datasets


# Upstream then calls it on every rank, and not only where the tensor-parallel rank is 0.
provide_datasets.is_distributed = True  # type: ignore[attr-defined]
