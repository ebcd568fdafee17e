"""Imported once by the fork server: everything slow, and nothing that a test may want to vary."""

from __future__ import annotations

import gc

from flagscale.patches.apply import apply, installed_source
from flagscale.patches.check import check
from flagscale.patches.cpu_device import DEVICE_GROUP, INITIALIZE_GROUP
from flagscale.platforms import activate
from flagscale.platforms.cpu import CPU
from flagscale.plugins import load_plugins

activate(CPU)
apply([DEVICE_GROUP, INITIALIZE_GROUP])

# Upstream imports its tokenizers, and with them transformers, where it builds the first of them:
# that is a third of what a rank of a short training would do.
import megatron.core.tokenizers.text  # noqa: E402, F401

import flagscale.train.pretraining  # noqa: E402, F401

# What every rank would read again to judge its patches.
check([group for plugin in load_plugins() for group in plugin.patch_groups], installed_source())
# A rank's collector would walk, and so copy, all that is loaded here.
gc.freeze()

LOADED = True
