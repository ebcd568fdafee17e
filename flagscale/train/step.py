"""One forward step of a GPT model: draw a micro batch, run the model, hand upstream the loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers
from megatron.training.utils.common_utils import is_first_or_last_pipeline_stage

from flagscale.hooks import HOOKS, BatchDrawn, ForwardLoss, ForwardStart

__all__ = ["forward_step", "get_batch", "masked_loss"]

_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
_PACKED_KEYS = ("cu_seqlens", "max_seqlen")

# The factor over the largest loss seen that upstream's rerun engine is asked to call a spike.
_SPIKY_LOSS_FACTOR = 10.0

# Tokens reported by a micro batch in which none counts: lost in the sum with any that has one.
_NOTHING_COUNTED = 2.0**-40


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None
) -> dict[str, Any]:
    """This rank's part of the next micro batch.

    Returns:
        ``tokens``, ``labels``, ``position_ids`` [b, s] int64, ``loss_mask`` [b, s] float32,
        ``attention_mask`` [b, 1, s, s] bool, ``quarantined`` [b, s] bool, ``cu_seqlens`` [b, s + 1]
        and ``max_seqlen`` [b] int32; ``None`` for what this pipeline stage does not need,
        ``quarantined`` without a quarantine list, and the last two where documents are not packed
        (``--dataloader-inter-document-masking``).
    """
    args = get_args()
    packed = args.dataloader_inter_document_masking
    layout = args.pipeline_model_parallel_layout
    has_mtp = args.mtp_num_layers is not None and mtp_on_this_rank(
        layout=layout, mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage
    )
    has_tokens = is_first_or_last_pipeline_stage(vp_stage) or has_mtp
    if not (has_tokens or packed):
        return dict.fromkeys((*_KEYS, *_PACKED_KEYS, "quarantined"))

    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        if data_iterator is None:
            raise RuntimeError("this pipeline stage reads data but was given no data iterator")
        drawn = next(data_iterator)
        if has_tokens:
            for listener in HOOKS.on_batch:
                listener(BatchDrawn(drawn))
        batch = {
            key: drawn[key].cuda(non_blocking=True) if key in drawn else None
            for key in (*_KEYS, *_PACKED_KEYS)
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=packed,
    )
    coded = None if args.quarantine is None else batch["loss_mask"]
    return {key: batch[key] for key in (*_KEYS, *_PACKED_KEYS)} | _decode_mask(coded)


def _decode_mask(loss_mask: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """Take what :data:`flagscale.train.dataset.QUARANTINED` says out of a mask, if there is one."""
    if loss_mask is None:
        return {"quarantined": None}
    return {"quarantined": loss_mask < 0, "loss_mask": loss_mask.clamp(min=0)}


def masked_loss(
    loss_mask: torch.Tensor, quarantined: torch.Tensor | None, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the losses of the tokens that count.

    Args:
        loss_mask: [b, s] float32, 1 where a token counts.
        quarantined: [b, s] bool, true where one would count if it were not quarantined; ``None``
            where no quarantine list is in force.
        token_losses: [b, s] cross entropies; [1, b * s] where documents are packed.

    Returns:
        The summed loss; the number of tokens (int32) by which upstream divides, the quarantined
        included, so that the others keep the weight they have without a list; and the report of
        what was summed and how many, which upstream sums over micro batches and data-parallel
        ranks.
    """
    args = get_args()
    token_losses = token_losses.view(loss_mask.shape)
    mask = loss_mask.view(-1).float()
    losses = token_losses.view(-1).float()
    if quarantined is not None:
        losses = losses.masked_fill(quarantined.view(-1), 0.0)  # even if it is infinite
    loss = torch.sum(losses * mask)
    for listener in HOOKS.on_forward_loss:
        listener(ForwardLoss(token_losses, loss_mask, quarantined))
    counted = mask.sum().to(torch.int)
    num_tokens, reported = counted, counted.to(loss.dtype)
    if quarantined is not None:
        num_tokens = counted + quarantined.sum().to(torch.int)
        # Upstream divides by the sum of these: a step in which nothing counts reports 0, not NaN.
        reported = reported.clamp(min=_NOTHING_COUNTED)

    rerun = get_rerun_state_machine()
    checks: list[tuple[Any, str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks = [
            (torch.isnan, "the loss is NaN", True),
            (torch.isinf, "the loss is infinite", True),
        ]
    if args.check_for_spiky_loss:
        is_spike = partial(
            rerun.is_unexpectedly_large, threshold=_SPIKY_LOSS_FACTOR, context="loss"
        )
        checks.append((is_spike, "the loss spiked", False))
    for rejection_func, message, fatal in checks:
        rerun.validate_result(
            result=loss, rejection_func=rejection_func, message=message, tolerance=0.0, fatal=fatal
        )

    report = torch.stack([loss.detach(), reported])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Upstream's ``forward_step_func``.

    Returns:
        The model's output ([b, s] token losses on the last stage, hidden states before it) and the
        function that turns token losses into a loss.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    for listener in HOOKS.on_forward:
        listener(ForwardStart())
    fed = flatten_batch_for_packed_sequences(dict(batch))
    output = model(
        fed["tokens"],
        fed["position_ids"],
        fed["attention_mask"],
        labels=fed["labels"],
        loss_mask=fed["loss_mask"],
        packed_seq_params=_packed_seq_params(fed),
    )
    return output, partial(masked_loss, batch["loss_mask"], batch["quarantined"])


def _packed_seq_params(batch: dict[str, Any]) -> PackedSeqParams | None:
    """Where the documents of a flattened batch begin, as upstream's layers take it."""
    if batch["cu_seqlens"] is None:
        return None
    cu_seqlens, longest = batch["cu_seqlens"][0], int(batch["max_seqlen"])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
