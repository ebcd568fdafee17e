"""What is asked of Slurm's own programs, each bounded in time."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from typing import Final

from flagscale.errors import ConfigError

__all__ = ["job_state", "read_state", "requeue", "submit"]

_SECONDS: Final = 60.0
_OVER: Final = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
        "PREEMPTED", "REVOKED", "TIMEOUT",
    }
)  # fmt: skip
"""States from which a job does not come back, and in which none of its processes is left."""


def submit(command: Sequence[str]) -> tuple[str, str | None]:
    """Run sbatch, which has ``--parsable`` among its options; the job's id, and its cluster.

    Raises:
        ConfigError: sbatch refuses: the partition, the account or the number of machines, say.
    """
    code, output, errors = _run(command)
    if code:
        said = [line.partition("error: ")[2] or line for line in errors.splitlines() if line]
        raise ConfigError(
            "Slurm does not take the job",
            where=" ".join(command),
            got="; ".join(said) or f"exit code {code}",
            cure="sinfo lists the partitions; --sbatch=--partition=NAME and the like go before "
            "what the script says",
        )
    job_id, _, cluster = output.strip().splitlines()[-1].partition(";")
    return job_id, cluster or None


def job_state(job_id: str) -> str | None:
    """The state of a job, such as ``PENDING``; "" if it is gone, ``None`` if nobody can tell."""
    command = ("squeue", "--noheader", f"--jobs={job_id}", "--states=all", "--format=%T")
    return read_state(*_run(command))


def read_state(code: int, output: str, errors: str) -> str | None:
    """What squeue's answer means, as :func:`job_state` gives it."""
    if code and not re.search(r"invalid job id", errors, re.IGNORECASE):
        return None
    states = [word for word in output.split() if word.isupper()]
    return next((state for state in states if state not in _OVER), "")


def requeue(job_id: str) -> str | None:
    """Have Slurm queue this job again; ``None``, or why it does not."""
    code, _, errors = _run(("scontrol", "requeue", job_id))
    return None if code == 0 else errors.strip() or f"scontrol ended with code {code}"


def _run(command: Sequence[str]) -> tuple[int, str, str]:
    """A program's exit code, output and errors; 1 also when it does not run or answer."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return 1, "", f"{command[0]} does not answer in {_SECONDS:.0f} s"
    except OSError as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr
