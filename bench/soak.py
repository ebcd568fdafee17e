"""Kills a training run on a real Slurm again and again, and looks for what was lost.

The cluster is that of ``tests/slurm``. One run of the tests' small model at DP 2 is killed at
random moments, also while it saves: one rank or all, the slurmd of a node whose ranks live on, a
node with all that runs on it; and it is asked by signal to save and go. Each time Slurm or the
launcher must bring it back. Every kill is a line of ``results.jsonl`` in the work directory: a
bench that was interrupted itself goes on where it was.

Example:
    python bench/soak.py --work-dir outputs/soak --kills 20 --table docs/slurm-soak.md
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness.slurm_cluster import Process, SlurmCluster, owned_cluster, why_not  # noqa: E402
from harness.slurm_job import SlurmRun, losses_of, write_recipe  # noqa: E402
from harness.slurm_rank import StepRow  # noqa: E402

KINDS = {
    "rank": "kill -9 of a rank",
    "rank in a save": "kill -9 of a rank while it saves",
    "ranks in a save": "kill -9 of all ranks while they save",
    "slurmd": "kill -9 of a slurmd; its ranks live on",
    "node": "a node and all that runs on it",
    "signal": "scancel --signal=USR1",
}
_WEIGHTS = (6, 4, 4, 3, 3, 2)
_PACE = 1.0  # seconds that a step takes longer
_SAVE_INTERVAL = 5
_TIMEOUT = 900.0  # seconds; of a start on a machine that does other things too


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it.

    Args:
        number: 1-based.
        kind: Of :data:`KINDS`.
        attempt: That was killed.
        step: The last one done.
        saved: The newest whole checkpoint when it was killed, 0 without; ranks that live on may
            have saved more.
        resumed: The first step of the next attempt.
        seconds: From the kill to the end of that step.
    """

    number: int
    kind: str
    attempt: int
    step: int
    saved: int
    resumed: int
    seconds: float

    @property
    def lost(self) -> int:
        """Steps that had to be done again."""
        return max(0, self.step - self.resumed + 1)


class Soak:
    """The run, and the hand that kills it."""

    def __init__(self, cluster: SlurmCluster, work_dir: Path, train_iters: int, seed: int) -> None:
        from harness.corpus import model_argv, write_corpus

        self.cluster = cluster
        self.work_dir = work_dir
        self.seed = seed
        corpus = work_dir / "corpus"
        if not corpus.with_suffix(".idx").exists():
            write_corpus(corpus)
        self.argv = model_argv(corpus, train_iters=train_iters, save_interval=_SAVE_INTERVAL)
        keys = {"health_check": "none", "max_restarts": 1000, "nodes": 2, "nproc": 1}
        recipe = write_recipe(work_dir / "soak.yaml", self.argv, **keys)
        self.run = SlurmRun(cluster, recipe, work_dir / "run")

    # --- the run ------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether its last iteration is done and saved."""
        return (self.run.run_dir / "finished.json").exists()

    def submit(self) -> None:
        """Start it, or go on."""
        if not self.finished:
            self.run.submit(pace=_PACE)

    def attempt(self) -> tuple[int, str]:
        """Number and token of the attempt that owns the run; zero before the job's first."""
        path = self.run.run_dir / "attempt.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("job_id") != str(self.run.job_id):
            return 0, ""
        return record["number"], record["token"]

    def rows(self, token: str) -> list[StepRow]:
        """The steps of an attempt, in order of time; of one rank."""
        return [row for row in self.run.steps().get(1, []) if row.token == token]

    def saved(self) -> int:
        """The newest whole checkpoint."""
        whole = (self.work_dir / "run/checkpoints").glob("iter_*/COMPLETE.json")
        return max((int(path.parent.name[5:]) for path in whole), default=0)

    # --- the kills ----------------------------------------------------------------------------

    def kill(self, number: int) -> Kill | None:
        """Wait for the moment, kill, and wait until it goes on; ``None`` if it is over before."""
        rng = random.Random(f"{self.seed} {number}")
        kind = rng.choices([*KINDS], _WEIGHTS)[0]
        steps = rng.randint(1, 2 * _SAVE_INTERVAL)
        self.wait(lambda: len(self.rows(self.attempt()[1])) >= steps, f"{steps} steps")
        attempt, token = self.attempt()
        ranks = self.cluster.ranks(self.run.job_id)  # before the moment: to look takes time
        if kind.endswith("save"):
            self._wait_save()
        else:
            time.sleep(rng.uniform(0, _PACE))
        if self.finished:
            return None
        self._strike(kind, ranks, rng)
        killed = time.time()
        saved = self.saved()
        self.wait(lambda: self._goes_on(token), f"end of attempt {attempt}")
        step = max(row.iteration for row in self.rows(token))
        if self.finished:
            return None
        self.wait(lambda: len(self.rows(self.attempt()[1])) > 0, f"a step after kill {number}")
        first = self.rows(self.attempt()[1])[0]
        self._repair()
        return Kill(number, kind, attempt, step, saved, first.iteration, first.time - killed)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition, or for the end of the run."""
        self.run.wait(lambda: self.finished or condition(), what, _TIMEOUT)

    def _goes_on(self, token: str) -> bool:
        if self.attempt()[1] != token:
            return True
        state = self.cluster.state(self.run.job_id)
        if state in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"):
            raise RuntimeError(f"the job was not brought back: {state}\n{self.run.log()[-2000:]}")
        return False

    def _wait_save(self) -> None:
        """Wait until a checkpoint is being written, which takes a fraction of a second."""
        saves = self.work_dir / "run/checkpoints"
        before = {path.name for path in saves.glob("iter_*")}
        deadline = time.monotonic() + _TIMEOUT
        while time.monotonic() < deadline and not self.finished:
            if any(path.name not in before for path in saves.glob("iter_*")):
                return
            time.sleep(0.01)

    def _strike(self, kind: str, ranks: Mapping[int, Process], rng: random.Random) -> None:
        victim = ranks[rng.choice(sorted(ranks))]
        if kind == "signal":
            self.cluster.ask("scancel", "--signal=USR1", self.run.job_id)
        elif kind == "ranks in a save":
            for process in ranks.values():
                process.kill()
        elif kind.startswith("rank"):
            victim.kill()
        else:
            node = 1 + self.cluster.nodes.index(victim.environ["SLURMD_NODENAME"])
            self.cluster.kill_node(node, ranks=kind == "node")

    def _repair(self) -> None:
        """Have every slurmd back."""
        names = {p.command[-1] for p in self.cluster.processes() if "-N" in p.command}
        for number, name in enumerate(self.cluster.nodes, 1):
            if name not in names:
                self.cluster.start_node(number)

    # --- what must hold -----------------------------------------------------------------------

    def problems(self, kills: Sequence[Kill]) -> list[str]:
        """What was lost, or is not as it would have been without any kill."""
        from harness import train

        found = [
            f"kill {kill.number}: {kill.resumed} follows step {kill.step}, {kill.saved} was saved"
            for kill in kills
            if kill.resumed <= kill.saved or kill.lost > _SAVE_INTERVAL
        ]
        if not self.finished:
            return [*found, "the run is not finished"]
        once = train(self.argv, self.work_dir / "undisturbed", 2, timeout_s=_TIMEOUT)
        rows = [r for rows in self.run.steps().values() for r in rows if r.loss is not None]
        losses = once.require_success().losses
        if wrong := {row.iteration for row in rows if row.loss != losses[row.iteration]}:
            found.append(f"losses of iterations {sorted(wrong)} are not those of a run at rest")
        if missing := losses.keys() - losses_of(self.run.steps()).keys():
            found.append(f"iterations {sorted(missing)} were never done")
        command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "verify"]
        command += [str(self.run.run_dir), "--json"]
        verified = subprocess.run(command, capture_output=True, text=True, check=False)
        labels = json.loads(verified.stdout or "{}").get("labels")
        if labels != {"EXACT": len(losses)}:
            found.append(f"the ledger: {labels} {verified.stderr[-500:]}")
        return found


def read_results(file: Path) -> list[Kill]:
    """The kills so far."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [Kill(**json.loads(line)) for line in lines]


def render(kills: Sequence[Kill], problems: Sequence[str], options: argparse.Namespace) -> str:
    """The page with the table."""
    rows = ["| kind | kills | steps done again, most | seconds to the next step, median, most |"]
    rows.append("|---|--:|--:|--:|")
    for kind, meaning in KINDS.items():
        mine = [kill for kill in kills if kill.kind == kind]
        if mine:
            seconds = sorted(kill.seconds for kill in mine)
            rows.append(
                f"| {meaning} | {len(mine)} | {max(kill.lost for kill in mine)} | "
                f"{seconds[len(seconds) // 2]:.0f}, {seconds[-1]:.0f} |"
            )
    lines = [
        "# A run that was killed again and again",
        "",
        f"Written by `python bench/soak.py --kills {options.kills} --seed {options.seed}`.",
        "",
        f"{os.cpu_count()} cores ({platform.machine()}), megatron-core {version('megatron-core')}, "
        f"torch {version('torch')}; {options.train_iters} iterations at DP 2 on two of three "
        f"emulated nodes, a save each {_SAVE_INTERVAL}; a node counts as lost after 30 s (Slurm's "
        "default: minutes), and a requeued job does not wait (two minutes).",
        "",
        *rows,
        "",
        f"{len(kills)} kills. "
        + ("Problems:" if problems else "Every loss, of steps done again too, is bit-equal to that "
        "of a run at rest; every step of the ledger is EXACT; nothing but the steps since the last "
        "whole checkpoint was done again."),
        *(f"- {problem}" for problem in problems),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Kill; the exit code says whether anything was lost."""
    parser = argparse.ArgumentParser(description="Kills one training run on Slurm, many times.")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs/soak")
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--train-iters", type=int, default=240, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--table", type=Path, help="write the page with the figures here")
    options = parser.parse_args(argv)
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    work_dir = options.work_dir.absolute()
    work_dir.mkdir(parents=True, exist_ok=True)
    results = work_dir / "results.jsonl"
    with owned_cluster(nodes=3) as cluster:
        soak = Soak(cluster, work_dir, options.train_iters, options.seed)
        soak.submit()
        while len(kills := read_results(results)) < options.kills and not soak.finished:
            kill = soak.kill(len(kills) + 1)
            if kill is None:
                break
            with results.open("a") as file:
                file.write(json.dumps(asdict(kill)) + "\n")
            print(
                f"[{kill.number}/{options.kills}] {kill.kind}: attempt {kill.attempt} after step "
                f"{kill.step}, saved {kill.saved}; step {kill.resumed} after {kill.seconds:.0f} s",
                flush=True,
            )
        soak.wait(lambda: False, "end of the run")
        kills = read_results(results)
        problems = soak.problems(kills)
    if len(kills) < options.kills:
        problems.append(f"the run was over after {len(kills)} kills: more --train-iters")
    page = render(kills, problems, options)
    print(page)
    if options.table:
        options.table.write_text(page)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
