"""The layer's own arguments, added to upstream's parser. Imports neither torch nor megatron."""

from __future__ import annotations

import argparse

__all__ = ["add_flagscale_arguments"]


def add_flagscale_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group ``FlagScale``; returns ``parser``, as upstream's argument providers do."""
    group = parser.add_argument_group(title="FlagScale")
    group.add_argument(
        "--platform",
        default=None,
        help="Device platform (cuda, cpu, or one a plugin brings); otherwise FLAGSCALE_PLATFORM, "
        "otherwise what is detected.",
    )
    group.add_argument(
        "--allow-changed-patches",
        nargs="*",
        default=[],
        metavar="GROUP",
        help="Apply these patch groups although the upstream source they were written against has "
        "changed. See `python -m flagscale.patches check`.",
    )
    group.add_argument(
        "--device-peak-tflops",
        type=float,
        default=None,
        help="Dense peak of one device at the dtype trained in, in TFLOP/s, for model FLOPs "
        "utilisation; otherwise the platform's own figure.",
    )
    return parser
