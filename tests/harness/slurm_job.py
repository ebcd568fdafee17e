"""A training run on the tests' Slurm: submitted as people do it, and looked at in its directory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml

from harness.slurm_cluster import SlurmCluster
from harness.slurm_rank import Fault, StepRow, environ_for, read_steps

__all__ = ["SlurmRun", "losses_of", "write_recipe"]


def write_recipe(path: Path, argv: Sequence[str], **flagscale: object) -> Path:
    """A recipe of Megatron arguments, and of keys of the section ``flagscale``."""
    arguments: dict[str, object] = {}
    for word in argv:
        if word.startswith("--"):
            arguments[word.removeprefix("--")] = True
        else:
            arguments[list(arguments)[-1]] = word
    keys = {name.replace("_", "-"): value for name, value in flagscale.items()}
    path.write_text(yaml.safe_dump({"flagscale": {"name": path.stem, **keys}, "model": arguments}))
    return path


class SlurmRun:
    """One run directory, and the jobs that work in it, one after another."""

    def __init__(self, cluster: SlurmCluster, recipe: Path, run_dir: Path) -> None:
        self.cluster = cluster
        self.recipe = recipe
        self.run_dir = run_dir
        self.job_id = 0

    def launch(
        self, *words: object, faults: Iterable[Fault] = (), pace: float = 0.0
    ) -> subprocess.CompletedProcess[str]:
        """Run the launcher to its end, which is soon: it submits a job."""
        command = [sys.executable, "-m", "flagscale.launch", str(self.recipe)]
        command += ["--output-dir", str(self.run_dir), *map(str, words)]
        site, steps = self.run_dir.parent / "site", self.steps_dir
        environ = environ_for(site, steps, tuple(faults), pace)
        return subprocess.run(
            command,
            env=self.cluster.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )

    def submit(self, *words: object, faults: Iterable[Fault] = (), pace: float = 0.0) -> int:
        """Submit a job; its number."""
        done = self.launch(*words, faults=faults, pace=pace)
        match = re.search(r"Submitted batch job (\d+)", done.stdout)
        if done.returncode or match is None:
            raise AssertionError(f"exit code {done.returncode}\n{done.stdout}")
        self.job_id = int(match[1])
        return self.job_id

    # --- while it runs ----------------------------------------------------------------------------

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 240.0) -> None:
        """Wait for a condition; the failure shows the logs. A job that waits is hurried on."""

        def holds() -> bool:
            self.cluster.hurry(self.job_id)
            return condition()

        try:
            self.cluster.wait(holds, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.tell()}") from None

    def wait_end(self, timeout_s: float = 240.0) -> dict[str, str]:
        """Wait until the job is over; what ``scontrol show job`` says."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(lambda: self.cluster.state(self.job_id) in over, "end of the job", timeout_s)
        return self.cluster.job(self.job_id)

    def wait_step(self, iteration: int, restart: int = 0, timeout_s: float = 240.0) -> None:
        """Wait until the job has done a step in one of its attempts."""

        def done() -> bool:
            rows = [row for rows in self.steps().values() for row in rows]
            return any((r.iteration, r.restart) == (iteration, restart) for r in rows)

        self.wait(done, f"step {iteration} after {restart} restarts", timeout_s)

    # --- what it leaves ---------------------------------------------------------------------------

    @property
    def steps_dir(self) -> Path:
        """Where the ranks note their steps."""
        return self.run_dir.parent / f"{self.run_dir.name}.steps"

    def steps(self) -> dict[int, list[StepRow]]:
        """What the ranks saw, by rank."""
        return read_steps(self.steps_dir)

    def log(self) -> str:
        """The output of the run's jobs, in order."""
        logs = sorted((self.run_dir / "logs").glob("slurm_*.log"))
        return "".join(path.read_text(errors="replace") for path in logs)

    def rank_log(self, rank: int) -> str:
        """The output of a rank in all attempts."""
        return (self.run_dir / "logs" / f"rank_{rank}.log").read_text(errors="replace")

    def tell(self) -> str:
        """The ends of all logs, for a failure."""
        logs = sorted((self.run_dir / "logs").glob("*.log"))
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in logs)


def losses_of(steps: dict[int, list[StepRow]]) -> dict[int, float]:
    """The loss of each iteration, as the attempt that did it last had it."""
    rows = [row for rows in steps.values() for row in rows if row.loss is not None]
    return {row.iteration: row.loss for row in sorted(rows, key=lambda r: r.time) if row.loss}
