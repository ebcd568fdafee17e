"""Changes to upstream as declared, checked, reversible data.

``registry`` says what a patch is, ``source`` and ``check`` hold patches against a source tree
without importing it, ``apply`` puts them in place, and ``python -m flagscale.patches`` shows it.
"""

from __future__ import annotations

from flagscale.patches.registry import Condition, Kind, Patch, PatchGroup, always

__all__ = ["Condition", "Kind", "Patch", "PatchGroup", "always"]
