"""What a job on a real Slurm must survive, and takes too long for the tests: a case each.

The cluster is that of ``tests/slurm``. Every finished case is a line of ``results.jsonl`` in the
work directory, and is not run again.

Example:
    python bench/slurm_cases.py
    python bench/slurm_cases.py --only time-limit --retry
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness.slurm_cluster import SlurmCluster, owned_cluster, why_not  # noqa: E402
from harness.slurm_job import SlurmRun, losses_of, write_recipe  # noqa: E402

_TIMEOUT = 900.0  # seconds, of a start on a machine that does other things too
_NOISE = 2e-5  # of a loss in fp32, from another order of sums


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Args:
        case: Its name.
        problems: What did not hold.
        restarts: Of the job.
        seconds: From the failure to the end of the next step; ``None`` where there is none.
        loss_gap: The largest, to a run that nothing disturbs.
    """

    case: str
    problems: list[str]
    restarts: int
    seconds: float | None
    loss_gap: float


@dataclass(frozen=True)
class Case:
    """A case.

    Args:
        what: In a few words.
        nodes: Of the cluster, all of which the job takes.
        nproc: Ranks a node.
        recipe: Keys of the section ``flagscale``.
        arguments: Of Megatron, over those of the tests' small model.
        words: Of the launcher's command line.
        strike: Does the harm; told the cluster and the run, which has done its third step.
        restarts: How often the job must have come back, at least and at most.
        bound: For the losses; 0 is bit-equal.
    """

    what: str
    nodes: int
    nproc: int
    recipe: Mapping[str, object]
    arguments: Mapping[str, object]
    words: Sequence[str]
    strike: Callable[[SlurmCluster, SlurmRun], None]
    restarts: tuple[int, float]
    bound: float


def _nothing(_cluster: SlurmCluster, _run: SlurmRun) -> None:
    """Slurm itself does the harm."""


def _lose_the_last_node(cluster: SlurmCluster, _run: SlurmRun) -> None:
    cluster.kill_node(len(cluster.nodes), ranks=True)


def _restart_a_slurmd(cluster: SlurmCluster, _run: SlurmRun) -> None:
    cluster.kill_node(2)
    time.sleep(3)
    cluster.start_node(2)


def _restart_the_controller(cluster: SlurmCluster, run: SlurmRun) -> None:
    for process in cluster.processes():
        if "slurmctld" in process.command[0]:
            process.kill()
    time.sleep(3)
    cluster.start_controller()
    cluster.wait(lambda: cluster.run("scontrol", "ping").returncode == 0, "slurmctld")
    cluster.job(run.job_id)


CASES = {
    "time-limit": Case(
        "the time limit, again and again: USR1, saved, queued again",
        nodes=2,
        nproc=1,
        recipe={},
        arguments={"train_iters": 100},
        words=("--sbatch=--time=3", "--sbatch=--signal=USR1@60"),
        strike=_nothing,
        restarts=(1, math.inf),
        bound=0.0,
    ),
    "dp4-to-dp2": Case(
        "one of two nodes loses power: DP 4 goes on as DP 2",
        nodes=2,
        nproc=2,
        recipe={"layouts": [{"nodes": 1}]},
        # In fp32, upstream loads no other states than these.
        arguments={"train_iters": 12, "bf16": None, "dist_ckpt_optim_fully_reshardable": True},
        words=(),
        strike=_lose_the_last_node,
        restarts=(1, 1),
        bound=_NOISE,
    ),
    "slurmd-back": Case(
        "a slurmd dies and is back 3 s later: the job does not notice",
        nodes=2,
        nproc=1,
        recipe={},
        arguments={"train_iters": 12},
        words=(),
        strike=_restart_a_slurmd,
        restarts=(0, 0),
        bound=0.0,
    ),
    "slurmctld-back": Case(
        "slurmctld dies and is back 3 s later: the job does not notice",
        nodes=2,
        nproc=1,
        recipe={},
        arguments={"train_iters": 12},
        words=(),
        strike=_restart_the_controller,
        restarts=(0, 0),
        bound=0.0,
    ),
}


def run_case(name: str, case: Case, work_dir: Path) -> Result:
    """Run a case from the beginning."""
    from harness import train
    from harness.corpus import model_argv, write_corpus

    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    corpus = write_corpus(work_dir / "corpus")
    argv = model_argv(corpus, save_interval=4, **case.arguments)
    keys = {"health_check": "none", "nodes": case.nodes, "nproc": case.nproc, **case.recipe}
    recipe = write_recipe(work_dir / f"{name}.yaml", argv, **keys)
    ranks = case.nodes * case.nproc
    once = train(argv, work_dir / "undisturbed", ranks, timeout_s=_TIMEOUT).require_success()
    with owned_cluster(case.nodes) as cluster:
        run = SlurmRun(cluster, recipe, work_dir / "run")
        run.submit(*case.words, pace=1.0)
        run.wait_step(3, timeout_s=_TIMEOUT)
        struck = time.time()
        case.strike(cluster, run)
        job = run.wait_end(_TIMEOUT)
    restarts = int(job["Restarts"])
    problems = []
    if (job["JobState"], job["ExitCode"]) != ("COMPLETED", "0:0"):
        problems.append(f"the job ended as {job['JobState']} {job['ExitCode']}: {run.log()[-500:]}")
    if not case.restarts[0] <= restarts <= case.restarts[1]:
        problems.append(f"{restarts} restarts")
    losses = losses_of(run.steps())
    missing = sorted(once.losses.keys() - losses.keys())
    problems += [f"iterations {missing} were never done"] * bool(missing)
    gap = max((abs(loss - once.losses[i]) for i, loss in losses.items()), default=math.inf)
    problems += [f"losses differ by {gap:g}"] * (gap > case.bound)
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "verify"]
    command += [str(run.run_dir), "--json"]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    if json.loads(verified.stdout or "{}").get("labels") != {"EXACT": len(once.losses)}:
        problems.append(f"the ledger: {verified.stdout[-300:]} {verified.stderr[-300:]}")
    later = [r.time for rows in run.steps().values() for r in rows if r.restart]
    waited = min(later) - struck if later and case.strike is not _nothing else None
    return Result(name, problems, restarts, waited, gap)


def read_results(file: Path, *, retry: bool) -> dict[str, Result]:
    """Finished cases, the last line of each; without those that failed, if ``retry``."""
    lines = file.read_text().splitlines() if file.exists() else []
    results = {result.case: result for result in (Result(**json.loads(line)) for line in lines)}
    return {name: r for name, r in results.items() if not (retry and r.problems)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done; the exit code says whether all of it holds."""
    parser = argparse.ArgumentParser(description="Cases of a job on Slurm, one by one.")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs/slurm_cases")
    parser.add_argument("--only", choices=[*CASES], help="one of them")
    parser.add_argument("--retry", action="store_true", help="those that failed, again")
    options = parser.parse_args(argv)
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    work_dir = options.work_dir.absolute()
    work_dir.mkdir(parents=True, exist_ok=True)
    file = work_dir / "results.jsonl"
    results = read_results(file, retry=options.retry)
    for name, case in CASES.items():
        if name in results or options.only not in (None, name):
            continue
        results[name] = run_case(name, case, work_dir / name)
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(results[name])) + "\n")
    print("| case | restarts | seconds from failure to next step | largest loss gap | |")
    print("|---|--:|--:|--:|---|")
    for name, result in results.items():
        waited = "" if result.seconds is None else f"{result.seconds:.0f}"
        verdict = "; ".join(result.problems) or "✓"
        gap = f"{result.loss_gap:.2g}"
        print(f"| {CASES[name].what} | {result.restarts} | {waited} | {gap} | {verdict} |")
    return 1 if any(result.problems for result in results.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
