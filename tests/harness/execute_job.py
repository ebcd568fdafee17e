"""Execute and publish a pickled plan in a process of its own, noting each unit as it is begun."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from flagscale.ckpt_copy import execute
from flagscale.ckpt_copy.plan import plan_copy
from flagscale.ckpt_io.publish import publish


def main() -> None:
    job, source, destination, log = map(Path, sys.argv[1:])
    sources, files, targets, unit_bytes, workers = pickle.loads(job.read_bytes())
    plan = plan_copy(sources, files, targets, unit_bytes=unit_bytes)
    begun = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    make = execute._Run._make

    def noted(run: Any, output: Any, unit: Any, *rest: Any) -> int:
        os.write(begun, f"{output.index} {unit.index}\n".encode())
        return make(run, output, unit, *rest)

    execute._Run._make = noted  # type: ignore[method-assign]
    print("ready", flush=True)
    execution = execute.execute_plan(plan, source, destination, workers=workers, stale_after=2.0)
    ours = publish(execution.staging, 7, dict(execution.digests), stale_after=2.0)
    print(json.dumps({"units": execution.units, "published": ours}), flush=True)


if __name__ == "__main__":
    main()
