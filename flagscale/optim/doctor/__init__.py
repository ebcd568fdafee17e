"""Is a checkpoint damaged, and how: every finding with its tensor and the number of elements.

``diagnosis`` goes through all of it; ``files``, ``progress`` and ``examine`` look at files, common
state and tensors, which ``scan`` reads; ``suspects`` and ``judge`` tell one damage from another.
"""

from flagscale.optim.doctor.diagnosis import diagnose

__all__ = ["diagnose"]
