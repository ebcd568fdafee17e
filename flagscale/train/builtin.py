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
    completeness,
    fencing,
    ledger,
    piecewise,
    preemption,
    quarantine,
    replay,
    restart,
    run_dir,
    saving,
    throughput,
    watchdog,
)

__all__ = [
    "AQUILA",
    "BUFFER_MAP",
    "COMPLETENESS",
    "FENCING",
    "LEDGER",
    "PATCHES",
    "PIECEWISE",
    "PLATFORMS",
    "PREEMPTION",
    "QUARANTINE",
    "REPLAY",
    "RESTART",
    "RUN_DIR",
    "SAVING",
    "THROUGHPUT",
    "WATCHDOG",
]

AQUILA = Plugin(
    name="aquila",
    add_arguments=aquila.add_arguments,
    verify_arguments=aquila.verify_arguments,
    pre_wrap_hooks=aquila.pre_wrap_hooks,
)
BUFFER_MAP = Plugin(name="buffer-map", connect=buffer_map.connect)
COMPLETENESS = Plugin(
    name="completeness",
    verify_arguments=completeness.verify_arguments,
    connect=completeness.connect,
)
FENCING = Plugin(name="fencing", connect=fencing.connect)
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
PREEMPTION = Plugin(name="preemption", connect=preemption.connect)
QUARANTINE = Plugin(
    name="quarantine",
    add_arguments=quarantine.add_arguments,
    verify_arguments=quarantine.verify_arguments,
    connect=quarantine.connect,
)
REPLAY = Plugin(name="replay", add_arguments=replay.add_arguments)
RESTART = Plugin(name="restart", connect=restart.connect)
RUN_DIR = Plugin(name="run-dir", connect=run_dir.connect)
SAVING = Plugin(name="saving", add_arguments=saving.add_arguments, connect=saving.connect)
THROUGHPUT = Plugin(
    name="throughput", add_arguments=throughput.add_arguments, connect=throughput.connect
)
WATCHDOG = Plugin(
    name="watchdog",
    add_arguments=watchdog.add_arguments,
    verify_arguments=watchdog.verify_arguments,
    connect=watchdog.connect,
)
