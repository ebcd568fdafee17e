"""Triton kernels of piecewise attention: forward, dk/dv, dq, and the attention each key gets.

Nothing here is imported before a GPU tensor comes or somebody asks for it: Triton decides between
compiler and interpreter (``TRITON_INTERPRET``) while these modules are imported.
"""

from __future__ import annotations

__all__: list[str] = []
