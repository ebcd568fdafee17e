"""What this project itself brings to a run, by the door that is open to all: its plugins.

``pyproject.toml`` names them as entry points. Imports neither torch nor megatron.
"""

from __future__ import annotations

from flagscale.patches.catalogue import builtin_groups
from flagscale.platforms.cpu import CPU
from flagscale.platforms.cuda import CUDA
from flagscale.plugins import Plugin
from flagscale.train import (
    aquila,
    buffer_map,
    ledger,
    piecewise,
    quarantine,
    replay,
    restart,
    saving,
    throughput,
)

__all__ = [
    "AQUILA",
    "BUFFER_MAP",
    "LEDGER",
    "PATCHES",
    "PIECEWISE",
    "PLATFORMS",
    "QUARANTINE",
    "REPLAY",
    "RESTART",
    "SAVING",
    "THROUGHPUT",
]

AQUILA = Plugin(
    name="aquila",
    add_arguments=aquila.add_arguments,
    verify_arguments=aquila.verify_arguments,
    pre_wrap_hooks=aquila.pre_wrap_hooks,
)
BUFFER_MAP = Plugin(name="buffer-map", connect=buffer_map.connect)
LEDGER = Plugin(
    name="ledger",
    add_arguments=ledger.add_arguments,
    verify_arguments=ledger.verify_arguments,
    connect=ledger.connect,
)
PLATFORMS = Plugin(name="platforms", platforms=(CUDA, CPU))
PATCHES = Plugin(name="patches", patch_groups=builtin_groups())
PIECEWISE = Plugin(
    name="piecewise",
    add_arguments=piecewise.add_arguments,
    verify_arguments=piecewise.verify_arguments,
    pre_wrap_hooks=piecewise.pre_wrap_hooks,
)
QUARANTINE = Plugin(
    name="quarantine",
    add_arguments=quarantine.add_arguments,
    verify_arguments=quarantine.verify_arguments,
    connect=quarantine.connect,
)
REPLAY = Plugin(name="replay", add_arguments=replay.add_arguments)
RESTART = Plugin(name="restart", connect=restart.connect)
SAVING = Plugin(name="saving", add_arguments=saving.add_arguments, connect=saving.connect)
THROUGHPUT = Plugin(
    name="throughput", add_arguments=throughput.add_arguments, connect=throughput.connect
)
