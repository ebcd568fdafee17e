"""What this project itself brings to a run, by the door that is open to all: its plugins.

``pyproject.toml`` names them as entry points. Imports neither torch nor megatron.
"""

from __future__ import annotations

from flagscale.patches.catalogue import builtin_groups
from flagscale.platforms.cpu import CPU
from flagscale.platforms.cuda import CUDA
from flagscale.plugins import Plugin
from flagscale.train import restart, saving, throughput

__all__ = ["PATCHES", "PLATFORMS", "RESTART", "SAVING", "THROUGHPUT"]

PLATFORMS = Plugin(name="platforms", platforms=(CUDA, CPU))
PATCHES = Plugin(name="patches", patch_groups=builtin_groups())
RESTART = Plugin(name="restart", connect=restart.connect)
SAVING = Plugin(name="saving", add_arguments=saving.add_arguments, connect=saving.connect)
THROUGHPUT = Plugin(
    name="throughput", add_arguments=throughput.add_arguments, connect=throughput.connect
)
