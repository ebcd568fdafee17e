"""Tile sizes: which configuration a kernel takes on which chip at which head size.

The numbers were chosen by compiling: no local memory inside a loop that multiplies matrices, as
many matrix instructions in each loop as plain flash attention has at the same tile, shared memory
under the chip's limit (``bench/attention_static.py`` prints all of that). No clock had a say yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from flagattention.errors import BackendError

__all__ = ["KERNELS", "TABLE", "Tiles", "choose"]

KERNELS = ("forward", "backward_kv", "backward_q", "total")


@dataclass(frozen=True)
class Tiles:
    """How a kernel is compiled.

    Attributes:
        block_m: Query rows of a tile.
        block_n: Keys of a tile.
        warps: Warps of a program.
        stages: Tiles in flight in a loop; 1 does not pipeline.
        tma: The tensors walked in loops are read through tensor descriptors, where their strides
            allow.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False


def _row(
    forward: Tiles, backward_kv: Tiles, backward_q: Tiles, total: Tiles | None = None
) -> dict[str, Tiles]:
    # The total attention walks queries under a tile of keys, as dk/dv does, and needs less room.
    return dict(zip(KERNELS, (forward, backward_kv, backward_q, total or backward_kv), strict=True))


_HOPPER = {
    64: _row(
        Tiles(128, 64, 8, 2, tma=True),
        Tiles(64, 64, 8, 2, tma=True),
        Tiles(128, 64, 8, 2, tma=True),
    ),
    128: _row(
        Tiles(128, 64, 8, 2, tma=True),
        Tiles(64, 64, 8, 2, tma=True),
        Tiles(128, 64, 8, 2, tma=True),
    ),
    256: _row(
        Tiles(128, 64, 8, 2, tma=True),
        Tiles(64, 64, 8, 1, tma=True),
        Tiles(64, 64, 8, 2, tma=True),
    ),
}

TABLE: dict[str, dict[int, dict[str, Tiles]]] = {
    "sm_80": {
        64: _row(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2)),
        128: _row(Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2)),
        256: _row(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 1)),
    },
    "sm_90": _HOPPER,
    # Three accumulators of 256 columns do not fit into the tensor memory: there dk/dv multiplies by
    # the older instructions, whose accumulators are registers.
    "sm_100": _HOPPER
    | {
        256: _row(
            Tiles(128, 64, 8, 2, tma=True),
            Tiles(64, 32, 8, 1, tma=True),
            Tiles(64, 64, 8, 2, tma=True),
            Tiles(64, 64, 8, 1, tma=True),
        )
    },
    "gfx942": {
        64: _row(Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1)),
        128: _row(Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1)),
        256: _row(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(64, 32, 4, 1)),
    },
    # CPU tensors under TRITON_INTERPRET=1: few tiles, for every one costs milliseconds.
    "interpreter": {256: _row(*[Tiles(64, 64, 4, 1)] * 3)},
}
"""Architecture, then the largest head size a row is for, then the kernel."""


def choose(arch: str, head_dim: int, kernel: str, itemsize: int = 2) -> Tiles:
    """The configuration of a kernel.

    An NVIDIA chip that the table lacks takes the nearest lower one of it; sm_120 and later, whose
    matrix instructions and shared memory are those of consumer chips, take sm_80's.

    Args:
        arch: "sm_90", "gfx942", or "interpreter".
        head_dim: 16 to 256.
        kernel: One of ``KERNELS``.
        itemsize: Bytes of an element; 4-byte elements take half the tile and one stage.

    Raises:
        BackendError: The table has nothing for this chip.
    """
    sizes = TABLE[_nearest(arch)]
    tiles = sizes[min(size for size in sizes if size >= head_dim)][kernel]
    if itemsize <= 2 or arch == "interpreter":
        return tiles
    half = replace(tiles, block_m=max(tiles.block_m // 2, 16), stages=1)
    return replace(half, block_n=max(half.block_n // 2, 16)) if head_dim > 128 else half


def _nearest(arch: str) -> str:
    if arch in TABLE:
        return arch
    if found := re.fullmatch(r"sm_(\d+)", arch):
        number = int(found[1])
        known = [int(name[3:]) for name in TABLE if name.startswith("sm_")]
        lower = [x for x in known if x <= number]
        if lower:
            return "sm_80" if number >= 120 else f"sm_{max(lower)}"
    raise BackendError(
        "there is no configuration of the kernels for this chip",
        where="device",
        expected=f"one of {', '.join(TABLE)}, or an NVIDIA chip above sm_80",
        got=arch,
        cure="backend='reference' runs on any device",
    )
