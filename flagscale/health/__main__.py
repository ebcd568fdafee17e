"""``python -m flagscale.health node|reduce FILE``: one machine's, or one rank's, part of a check.

The launcher starts it through srun, and reads what it leaves. ``FILE`` holds the request as JSON.
Answers are written by rename beside it, one file each.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flagscale.health.facts import collect


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Do one part of a check; the exit code."""
    what, path = argv[0], Path(argv[1])
    request = json.loads(path.read_text())
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    if what == "node":
        clock = request["clock"]
        facts = collect(
            host,
            platform=request["platform"],
            directory=Path(request["directory"]),
            probe=Path(request["probe"]),
            token=request["token"],
            hosts=request["hosts"],
            clock=None if clock is None else (clock[0], clock[1]),
        )
        _answer(path.parent / f"node-{host}.json", facts.record())
        return 0
    return _reduce(path, request, host, environ)


def _reduce(path: Path, request: dict[str, Any], host: str, environ: Mapping[str, str]) -> int:
    from flagscale.health.collective import all_reduce

    rank = int(environ["SLURM_PROCID"])
    answer: dict[str, Any] = {"host": host, "rank": rank}
    try:
        answer["seconds"] = all_reduce(
            backend=request["backend"],
            rank=rank,
            world_size=int(environ["SLURM_NTASKS"]),
            device=int(environ.get("SLURM_LOCALID", "0")),
            address=request["address"],
            port=request["port"],
            seconds=request["seconds"],
        )
    except Exception as error:  # whatever it is, it is what the launcher wants to know
        answer["error"] = f"{type(error).__name__}: {error}"
    _answer(path.with_name(f"{path.stem}-{rank}.json"), answer)
    # With a rank gone, an orderly end would wait for it.
    sys.stdout.flush()
    os._exit(1 if "error" in answer else 0)


def _answer(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(content) + "\n")
    partial.rename(path)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
