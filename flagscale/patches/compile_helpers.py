"""The dataset index builder comes built; upstream compiles it again, with no Makefile there."""

from __future__ import annotations

from collections.abc import Callable

from flagscale.errors import PlatformError
from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _import_the_built_helper(_original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        try:
            from megatron.core.datasets import helpers_cpp  # noqa: F401
        except ImportError as error:
            raise PlatformError(
                "megatron-core's compiled dataset helper cannot be imported",
                where="megatron.core.datasets.helpers_cpp",
                expected="the extension module that the megatron-core wheel ships",
                got=str(error),
                cure="reinstall megatron-core from a wheel built for this Python version",
            ) from error

    return compile_helpers


GROUP = PatchGroup(
    name="compile-helpers",
    patches=(
        Patch(
            target="megatron.core.datasets.utils:compile_helpers",
            kind=Kind.FUNCTION,
            replacement=_import_the_built_helper,
            fingerprint="f9208223394645b2",
        ),
    ),
    reason="upstream runs make where the wheel has no Makefile, and exits with code 1",
    upstream="megatron-core 0.19.2, core/datasets/utils.py:20",
)
