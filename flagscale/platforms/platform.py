"""What a device platform is: frozen data, so that a vendor's plugin can bring one.

The patches a device needs are ordinary patch groups whose ``enabled_if`` asks for the active
platform (:mod:`flagscale.patches.cpu_device` is the example).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Platform"]


@dataclass(frozen=True)
class Platform:
    """How upstream is made to run on one kind of device.

    Args:
        name: What ``--platform`` takes.
        description: One line for people.
        detect: Whether this machine has such a device. Must not import torch: it is asked before
            torch may be imported.
        verify: Called once torch may be imported; returns what is wrong, or ``None``.
        priority: Of several detected platforms the highest is chosen.
        megatron_arguments: Put before the user's arguments, so that the user's win.
        environment: Set before torch is imported, unless already set.
        device_name: The device's name as its vendor spells it, for the log.
        peak_tflops: Dense peak of one device at the given dtype (``"bf16"``, ``"fp16"``,
            ``"fp32"``) in TFLOP/s, or ``None`` where unknown.
    """

    name: str
    description: str
    detect: Callable[[], bool]
    verify: Callable[[], str | None]
    device_name: Callable[[], str]
    peak_tflops: Callable[[str], float | None]
    priority: int = 0
    megatron_arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
