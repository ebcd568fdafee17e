"""The layer's own arguments, added to upstream's parser. Imports neither torch nor megatron."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from flagscale.plugins import Plugin, load_plugins
from flagscale.plugins import add_arguments as plugin_arguments

__all__ = ["add_flagscale_arguments"]


def add_flagscale_arguments(
    parser: argparse.ArgumentParser, plugins: Iterable[Plugin] | None = None
) -> argparse.ArgumentParser:
    """Add what the entry itself needs, and what the plugins want.

    Args:
        parser: Upstream's.
        plugins: Whose arguments to add; all that :func:`flagscale.plugins.load_plugins` allows
            unless given.

    Returns:
        ``parser``, as upstream's argument providers do.
    """
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
    plugin_arguments(load_plugins() if plugins is None else plugins, parser)
    return parser
