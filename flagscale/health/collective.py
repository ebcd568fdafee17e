"""A small all-reduce over the devices of some machines: torch's own, on the platform's backend."""

from __future__ import annotations

import datetime
import time
from typing import Final

import torch
import torch.distributed as dist

__all__ = ["all_reduce"]

_ELEMENTS: Final = 1 << 20


def all_reduce(
    *,
    backend: str,
    rank: int,
    world_size: int,
    device: int,
    address: str,
    port: int,
    seconds: float,
) -> float:
    """Sum numbers over all ranks, and see that the sum is right.

    Args:
        backend: ``gloo`` or ``nccl``.
        rank: Of this process.
        world_size: Ranks in all.
        device: Number of this rank's on its machine, for ``nccl``.
        address: Of the first rank's machine.
        port: There.
        seconds: Limit for each wait.

    Returns:
        Seconds that the second of two sums took; the first makes the connections.

    Raises:
        RuntimeError: The group cannot be made, or the sum is wrong.
    """
    where = torch.device("cpu")
    if backend == "nccl":
        where = torch.device("cuda", device)
        torch.cuda.set_device(where)
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    taken = 0.0
    for _ in range(2):
        numbers = torch.full((_ELEMENTS,), float(rank + 1), device=where)
        started = time.monotonic()
        dist.all_reduce(numbers)
        total = numbers.double().sum().item() / _ELEMENTS  # waits for the device
        taken = time.monotonic() - started
        if total != world_size * (world_size + 1) / 2:
            raise RuntimeError(f"the sum over {world_size} ranks is {total}")
    dist.barrier()
    dist.destroy_process_group()
    return taken
