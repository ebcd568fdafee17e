r"""The loss spiked: which documents did it, and how to go on without them.

Examples:
    python tools/inspect_data.py spikes RUN_DIR
    python tools/inspect_data.py locate RUN_DIR --iteration 12345 --json
    python tools/inspect_data.py show RUN_DIR --iteration 12345 --worst 3
    python tools/inspect_data.py rank RUN_DIR --top 20
    python tools/inspect_data.py quarantine RUN_DIR --list bad.json --add data/web:123
    python tools/inspect_data.py report RUN_DIR --output report.html

RUN_DIR is the launcher's run directory, or what --save names; the job may still be running. Nothing
in it is changed. No GPU and no torch are needed, but for replay.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence
from types import ModuleType

from flagscale.console import exit_code
from flagscale.data_inspect.commands import COMMANDS, Output


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"flagscale.data_inspect.commands.{command}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse itself exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for command, purpose in COMMANDS.items():
        one = commands.add_parser(command, help=purpose, description=purpose)
        if command == asked:  # so that only its module is imported
            _module(command).add_arguments(one)
            one.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is asked for; returns the exit code."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    output: Output = _module(args.command).run(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(output.json_text() if args.json else output.text)
    return output.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
