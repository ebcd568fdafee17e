"""Memory of the ranks of a real run, measured and predicted.

Measured are the storages of all tensors that live at one time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from flagscale.layout.arguments import batch_sizes, model_dims, parallel_layout, training_mode
from flagscale.layout.memory import MemoryTerms, predict_memory
from harness import train, worker

__all__ = ["LAYOUTS", "TINY_SIZES", "measure_peaks", "predict_ranks"]

TINY_SIZES: dict[str, object] = {
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "micro_batch_size": 4,
    "global_batch_size": 32,
    "train_iters": 2,
    "padded_vocab_size": 6000,
    "attention_softmax_in_fp32": True,
}
"""Arguments of the tiny recipe's sizes, at which no term is lost beside the others."""

_TP, _PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
_EXPERTS = {
    "num_experts": 4,
    "expert_model_parallel_size": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_ffn_hidden_size": 96,
}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "DP1": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {_TP: 2}),
    "TP2+SP": (2, {_TP: 2, "sequence_parallel": True}),
    "PP2": (2, {_PP: 2}),
    "PP2xVPP2": (2, {_PP: 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "TP2xPP2": (4, {_TP: 2, _PP: 2}),
    "selective": (1, {"recompute_granularity": "selective"}),
    "full": (
        1,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
    "MoE+EP2": (2, _EXPERTS),
}
"""By name: processes, and arguments beside those of the tiny recipe."""


def predict_ranks(argv: Sequence[object], nproc: int = 1) -> list[MemoryTerms]:
    """What is predicted for each rank of such a run on the CPU platform."""
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from flagscale.platforms.cpu import CPU

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's own
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    words = [*CPU.megatron_arguments, *map(str, argv)]
    values = vars(parser.parse_args(words))
    layout = parallel_layout(values, nproc)
    facts = model_dims(values), layout, batch_sizes(values, layout), training_mode(values)
    stages = [layout.coordinates(rank).pp_rank for rank in range(nproc)]
    return [predict_memory(*facts, stage) for stage in stages]


def measure_peaks(argv: Sequence[object], work_dir: Path, nproc: int = 1) -> list[int]:
    """Train as :func:`harness.train` does; the peak of each rank, in bytes.

    Counted from before the model is built, so weights, buffers and states are in it. What an
    operator allocates and frees inside of itself is not.
    """
    with mock.patch.object(worker, "run_rank", run_measured_rank):
        train(argv, work_dir, nproc).require_success()
    return [int((work_dir / f"rank_{rank}.peak").read_text()) for rank in range(nproc)]


def run_measured_rank(
    argv: Sequence[str], environ: Mapping[str, str], work_dir: str, kill: Any
) -> None:
    """Entry of the forked process; never returns."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from flagscale.hooks import HOOKS

    class StorageCounter(TorchDispatchMode):
        """Counts the storages that operators make, as long as anything holds them.

        The allocator's own events will not do: a free in a thread of the communication library,
        where the profiler is not on, is not reported.
        """

        def __init__(self) -> None:
            super().__init__()
            self.live: dict[int, tuple[StorageWeakRef, int]] = {}
            self.total = self.peak = 0

        def __torch_dispatch__(
            self,
            func: Callable[..., Any],
            types: object,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.count(leaf.untyped_storage())
            return result

        def count(self, storage: torch.UntypedStorage) -> None:
            address = storage._cdata
            if address in self.live and not self.live[address][0].expired():
                return
            self.total -= self.live[address][1] if address in self.live else 0
            self.live[address] = StorageWeakRef(storage), storage.nbytes()
            self.total += storage.nbytes()
            if self.total > self.peak:
                for gone in [key for key, (ref, _) in self.live.items() if ref.expired()]:
                    self.total -= self.live.pop(gone)[1]
                self.peak = max(self.peak, self.total)

    counter = StorageCounter()
    peak_file = Path(work_dir, f"rank_{environ['RANK']}.peak")
    HOOKS.on_exit.append(lambda _: peak_file.write_text(str(counter.peak)))
    with counter:
        worker.run_rank(argv, environ, work_dir, kill)
