"""Imported once by the fork server: everything slow, and nothing that a test may want to vary."""

from __future__ import annotations

from flagscale.patches.apply import apply
from flagscale.patches.cpu_device import DEVICE_GROUP, INITIALIZE_GROUP
from flagscale.platforms import activate
from flagscale.platforms.cpu import CPU

activate(CPU)
apply([DEVICE_GROUP, INITIALIZE_GROUP])

import flagscale.train.pretraining  # noqa: E402, F401

LOADED = True
