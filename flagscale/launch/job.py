"""Inside of a Slurm job: take the run over, look at the machines, train, and decide what follows.

The order matters. The attempt comes first, so that what an earlier one has left alive stops and
lets go of its devices; then the machines are looked at, the layout is chosen, checkpoints are put
in order, and srun starts the ranks.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, TextIO

import flagscale
from flagscale.errors import ConfigError, FlagScaleError
from flagscale.launch import slurm
from flagscale.launch.copies import attempt_directory, write_copies
from flagscale.launch.elastic import (
    choose_layout,
    describe_change,
    needs_reshard,
    reshard_words,
)
from flagscale.launch.ending import (
    Action,
    Cause,
    Decision,
    Ending,
    TaskEnd,
    cause_of,
    decide,
    read_srun_line,
)
from flagscale.launch.local import signals_told, verify_paths, write_run_dir
from flagscale.launch.node_check import Check, execute_check
from flagscale.launch.ownership import (
    error_records,
    last_iteration,
    refuse_second_job,
    slurm_holder,
    take_finished,
)
from flagscale.launch.plan import LaunchPlan
from flagscale.launch.queue import requeue
from flagscale.launch.settings import LayoutChoice, Settings
from flagscale.layout.parallel import raise_problems
from flagscale.runs.attempt import (
    ATTEMPT_VARIABLE,
    Attempt,
    PastAttempt,
    begin_attempt,
    current,
    end_attempt,
    history,
)
from flagscale.runs.complete import (
    MARKER,
    iteration_directory,
    recover,
)
from flagscale.runs.exit_codes import SAVED, SUPERSEDED
from flagscale.runs.finished import read_finished
from flagscale.runs.records import read_record

__all__ = ["ATTEMPT_DIRECTORY_VARIABLE", "Job", "execute_job", "fruitless_attempts"]

ATTEMPT_DIRECTORY_VARIABLE: Final = "FLAGSCALE_ATTEMPT_DIR"
"""Environment variable of each task: where its attempt's files go."""

_AFTER_TERM: Final = 3.0  # seconds; Slurm kills after KillWait
_AFTER_REQUEUE: Final = 60.0


@dataclass(frozen=True)
class Job:
    """What runs inside of an allocation, as far as it is known before the machines are.

    Args:
        run_dir: The run directory.
        recipe: The recipe without a layout's changes, for the next start.
        hosts: The machines of the allocation.
        nodes: Machines the recipe is for.
        choices: Layouts, the largest first.
        settings: How the job is run.
        check: The health check; its directory is set for each attempt.
        plan_for: The plan of a layout on machines, with further words of Megatron's command line.
        job_id: Slurm's.
        restarts: How often Slurm has started the job again.
    """

    run_dir: Path
    recipe: str
    hosts: tuple[str, ...]
    nodes: int
    choices: tuple[LayoutChoice, ...]
    settings: Settings
    check: Check
    plan_for: Callable[[LayoutChoice, Sequence[str], Sequence[str]], LaunchPlan]
    job_id: str
    restarts: int

    @property
    def own_choice(self) -> LayoutChoice:
        """The layout of the recipe itself."""
        return next((c for c in self.choices if not c.words), self.choices[0])


def execute_job(
    job: Job, plan: LaunchPlan, environ: Mapping[str, str], console: TextIO | None = None
) -> int:
    """Run one attempt of the job; the exit code.

    Args:
        job: The job.
        plan: Its layout if all machines are sound.
        environ: The environment of the batch script.
        console: Where it is told.

    Raises:
        ConfigError: A path is missing or cannot be written, another job works here, or the machines
            are not fit; no rank was started.
    """
    raise_problems(verify_paths(plan))
    return _Attempts(job, plan, environ, console or sys.stdout).run()


class _Attempts:
    """One start of a job, which is one attempt, or two where the machines turn out to be others."""

    def __init__(
        self, job: Job, plan: LaunchPlan, environ: Mapping[str, str], console: TextIO
    ) -> None:
        self._job = job
        self._plan = plan
        self._environ = environ
        self._console = console
        self._received: list[int] = []
        self._srun: subprocess.Popen[str] | None = None
        self._attempt: Attempt | None = None

    def run(self) -> int:
        """Take over, check, train, decide; the exit code."""
        job = self._job
        job.run_dir.mkdir(parents=True, exist_ok=True)
        refuse_second_job(job.run_dir, slurm_holder(job.job_id))
        write_run_dir(replace(self._plan, resolved_recipe=job.recipe))
        if take_finished(job.run_dir, self._plan, self._say):
            return 0
        with signals_told(self._hear):
            self._begin(self._plan, job.hosts[: self._nodes(self._plan)])
            try:
                if job.restarts > job.settings.max_restarts:
                    raise ConfigError(
                        f"the job has been queued again {job.restarts} times",
                        where="flagscale: max-restarts",
                        expected=f"at most {job.settings.max_restarts}",
                        got=job.restarts,
                        cure="`python -m flagscale.launch status` lists the reasons; then submit "
                        "it again",
                    )
                ending = self._train(*self._choose())
            except FlagScaleError as error:
                self._end(Ending(Cause.FAILED, error.exit_code, str(error).split("\n")[0]))
                raise
            except _EndedFromOutside:
                ending = cause_of(128 + signal.SIGTERM, False, received=signal.SIGTERM)
            # A script whose machine was taken for lost may live on beside the next attempt.
            if not self._owns():
                self._say("another attempt has taken this run over: this one ends")
                return SUPERSEDED
            decision = self._decision(ending)
            self._end(replace(ending, reason=decision.reason))
        return self._follow(decision, ending)

    def _say(self, text: str) -> None:
        self._console.write(text.rstrip("\n") + "\n")
        self._console.flush()

    @staticmethod
    def _nodes(plan: LaunchPlan) -> int:
        return plan.layout.world_size // len(plan.workers)

    # --- the attempt ------------------------------------------------------------------------------

    def _begin(self, plan: LaunchPlan, hosts: Sequence[str]) -> Attempt:
        self._attempt = begin_attempt(
            self._job.run_dir,
            hosts=hosts,
            layout=plan.checkpoint_layout,
            world_size=plan.layout.world_size,
            job_id=self._job.job_id,
            restart=self._job.restarts,
        )
        return self._attempt

    def _owns(self) -> bool:
        owner = current(self._job.run_dir)
        return owner is None or self._attempt is None or owner.token == self._attempt.token

    def _end(self, ending: Ending) -> None:
        if self._attempt is None or not self._owns():
            return
        end_attempt(
            self._job.run_dir,
            self._attempt.number,
            exit_code=ending.exit_code,
            reason=ending.reason,
            iteration=self._iteration(),
        )

    def _iteration(self) -> int | None:
        """The last one that this attempt has logged or saved."""
        if self._attempt is None:
            return None
        return last_iteration(self._job.run_dir, self._plan.save_dir, self._attempt)

    # --- machines and layout ----------------------------------------------------------------------

    def _choose(self) -> tuple[LayoutChoice, tuple[str, ...]]:
        """The layout, and the machines."""
        job, hosts = self._job, self._job.hosts
        number = self._attempt.number if self._attempt else 0
        most = job.choices[0].nodes
        if job.settings.health_check == "none":
            self._say("health check: skipped, as --no-health-check or the recipe says")
        else:
            check = replace(job.check, directory=job.run_dir / "health" / f"{number:04d}")
            started = time.monotonic()
            problems = execute_check(check, hosts, most)
            for host, found in problems.items():
                for problem in found:
                    self._say(f"health check: {host}: {problem}")
            hosts = tuple(host for host in hosts if not problems[host])
            self._say(
                f"health check: {len(hosts)} of {len(problems)} machines are fit "
                f"({time.monotonic() - started:.0f} s)"
            )
            if len(hosts) < len(problems):
                self._require_enough(hosts, problems)
        self._give_up_if_ended()
        choice = choose_layout(job.choices, len(hosts), lambda choice: self._problem(choice, hosts))
        chosen = hosts[: choice.nodes]
        unused = [host for host in job.hosts if host not in chosen]
        if unused:
            self._say(f"machines not used: {', '.join(unused)}")
        return choice, chosen

    def _require_enough(self, hosts: Sequence[str], problems: Mapping[str, Sequence[str]]) -> None:
        least = min(choice.nodes for choice in self._job.choices)
        if len(hosts) >= least:
            return
        raise ConfigError(
            "too few machines are fit for this job",
            where=f"{self._job.run_dir}/health",
            expected=f"at least {least} of {len(problems)}",
            got="; ".join(f"{host}: {', '.join(p)}" for host, p in problems.items() if p),
            cure="ask for spare machines (spares: in the recipe, --spares N), exclude these "
            "(--sbatch=--exclude=NAME), or --no-health-check",
        )

    def _problem(self, choice: LayoutChoice, hosts: Sequence[str]) -> str | None:
        try:
            self._job.plan_for(choice, hosts[: choice.nodes], ())
        except ConfigError as error:
            return str(error).replace("\n", " ")
        return None

    # --- training ---------------------------------------------------------------------------------

    def _train(self, choice: LayoutChoice, hosts: tuple[str, ...]) -> Ending:
        """Put checkpoints in order, and run the ranks to their end."""
        job = self._job
        plan = job.plan_for(choice, hosts, ())
        attempt = self._attempt
        if attempt is None or (attempt.hosts, attempt.world_size) != (
            hosts,
            plan.layout.world_size,
        ):
            left_out = [host for host in job.hosts if host not in hosts]
            reason = f"begun again without {', '.join(left_out)}" if left_out else "begun again"
            self._end(Ending(Cause.STOPPED, 0, reason))
            attempt = self._begin(plan, hosts)
        resume, saved = self._recover(plan.save_dir)
        if choice != job.own_choice or (saved and saved != plan.checkpoint_layout):
            batch = f"{plan.batch.global_batch_size} samples a step"
            self._say(describe_change(job.nodes, choice, plan.checkpoint_layout, saved, batch))
        words = self._reshard(choice, hosts, plan, resume, saved)
        if words:
            plan = job.plan_for(choice, hosts, words)
        self._plan = plan
        slurm.require_address(hosts[0])
        directory = attempt_directory(job.run_dir, attempt.number)
        command = self._step(plan, hosts, directory)
        write_copies(directory, recipe=plan.resolved_recipe, command=command, environ=self._environ)
        environ = {
            **self._environ,
            ATTEMPT_VARIABLE: attempt.token,
            ATTEMPT_DIRECTORY_VARIABLE: str(directory),
        }
        self._say(
            f"attempt {attempt.number} (restart {job.restarts} of at most "
            f"{job.settings.max_restarts}) on {', '.join(hosts)}\n{shlex.join(command)}"
        )
        code, ends = self._run(command, environ)
        received = signal.SIGTERM if signal.SIGTERM in self._received else None
        finished = read_finished(job.run_dir) is not None
        return cause_of(code, finished, ends, error_records(directory), received)

    def _step(self, plan: LaunchPlan, hosts: Sequence[str], directory: Path) -> tuple[str, ...]:
        nproc = len(plan.workers)
        launcher = slurm.task_command(
            self._job.check.python, directory / "recipe.yaml", len(hosts), nproc, self._job.run_dir
        )
        return slurm.plan_step(
            launcher,
            self._job.run_dir,
            len(hosts),
            nproc,
            hosts=hosts if len(hosts) < len(self._job.hosts) else (),
            options=self._job.settings.container,
        )

    def _recover(self, save_dir: Path | None) -> tuple[int | None, dict[str, Any] | None]:
        """The iteration to go on from, and the layout it was saved at, where that is known."""
        if save_dir is None:
            return None, None
        recovery = recover(save_dir)
        for line in recovery.lines:
            self._say(f"checkpoints: {line}")
        if not recovery.resume:
            return None, None
        marker = read_record(iteration_directory(save_dir, recovery.resume) / MARKER) or {}
        layouts = {
            past.attempt.number: dict(past.attempt.layout) for past in history(self._job.run_dir)
        }
        return recovery.resume, layouts.get(marker.get("attempt") or 0)

    def _reshard(
        self,
        choice: LayoutChoice,
        hosts: Sequence[str],
        plan: LaunchPlan,
        resume: int | None,
        saved: Mapping[str, Any] | None,
    ) -> tuple[str, ...]:
        """Bring the checkpoint to the layout, where needed; the arguments that load it then."""
        wanted, save_dir = plan.checkpoint_layout, plan.save_dir
        if resume is None or save_dir is None or not plan.loads_own_checkpoints:
            return ()
        if saved is None and choice == self._job.own_choice:
            return ()  # of a time before layouts were recorded: none was ever changed
        why = needs_reshard(saved, wanted)
        if why is None:
            return ()
        name = "-".join(f"{key}{wanted[key]}" for key in ("tp", "pp", "dp", "cp", "ep", "vpp"))
        target = self._job.run_dir / "resharded" / f"iter_{resume:07d}-{name}"
        if not (target / "latest_checkpointed_iteration.txt").exists():
            self._say(f"resharding iteration {resume} into {target}: {why}")
            command = _reshard_command(
                self._job, hosts, save_dir, resume, target, reshard_words(wanted, saved)
            )
            code, _ = self._run(command, self._environ)
            self._give_up_if_ended()
            if code:
                raise ConfigError(
                    "the checkpoint cannot be brought to this layout",
                    where=str(save_dir),
                    got=f"exit code {code}; see above",
                    cure=f"repeat it by hand: {shlex.join(command)}",
                )
        self._say(f"loading iteration {resume} from {target}")
        words = ["--load", str(target)]
        moved = saved is None or any(saved.get(size) != wanted[size] for size in ("tp", "pp"))
        if wanted["format"] == "torch" and moved:
            words.append("--no-load-rng")  # there is no state for ranks that were not there
        return tuple(words)

    def _run(
        self, command: Sequence[str], environ: Mapping[str, str]
    ) -> tuple[int, tuple[TaskEnd, ...]]:
        """Run srun to its end; its exit code, and what it said of tasks."""
        ends: list[TaskEnd] = []
        try:
            srun = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
        except OSError as error:
            raise ConfigError("srun cannot be started", where=command[0], got=error) from error
        self._srun = srun

        def read(stream: IO[str] | None) -> None:
            if stream is None:
                return
            with stream:
                for line in stream:
                    self._say(line)
                    if (end := read_srun_line(line)) is not None:
                        ends.append(end)

        reader = threading.Thread(target=read, args=(srun.stderr,), daemon=True)
        reader.start()
        give_up: float | None = None
        while srun.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                srun.wait(0.2)
            if give_up is None and signal.SIGTERM in self._received:
                give_up = time.monotonic() + _AFTER_TERM
            if give_up is not None and time.monotonic() > give_up:
                srun.kill()  # there is little time left to write down why
                break
        self._srun = None
        code = srun.wait()
        reader.join(5)
        return (code if code >= 0 else 128 - code), tuple(ends)

    # --- signals ----------------------------------------------------------------------------------

    def _hear(self, signum: int) -> None:
        """Note a signal, and hand it on to srun while it runs."""
        self._received.append(signum)
        if self._srun is not None:
            self._srun.send_signal(signum)

    def _give_up_if_ended(self) -> None:
        if signal.SIGTERM in self._received:
            raise _EndedFromOutside

    # --- what follows -----------------------------------------------------------------------------

    def _decision(self, ending: Ending) -> Decision:
        fruitless = 0
        if self._iteration() is None:
            # This one has no end yet, and is not among them.
            fruitless = 1 + fruitless_attempts(history(self._job.run_dir), self._job.job_id)
        decision = decide(
            ending,
            restarts=self._job.restarts,
            max_restarts=self._job.settings.max_restarts,
            fruitless=fruitless,
        )
        if decision.action is Action.AGAIN and signal.SIGTERM in self._received:
            # A cancelled job must not come back; one that Slurm queues again needs no help.
            return Decision(Action.END, decision.exit_code, f"{ending.reason}; ended from outside")
        return decision

    def _follow(self, decision: Decision, ending: Ending) -> int:
        if ending.detail:
            self._say(f"\n{ending.detail}\n")
        self._say(f"attempt {self._attempt.number if self._attempt else 0}: {decision.reason}")
        if decision.action is Action.END:
            return decision.exit_code
        refusal = requeue(self._job.job_id)
        if refusal is not None:
            self._say(f"the job cannot be queued again: {refusal}")
            return decision.exit_code
        # Slurm ends this script as a part of queueing the job again.
        time.sleep(_AFTER_REQUEUE)
        return decision.exit_code


class _EndedFromOutside(Exception):  # noqa: N818  (not an error: the job was cancelled)
    """Slurm ends the job."""


def fruitless_attempts(past: Sequence[PastAttempt], job_id: str | None) -> int:
    """Attempts of a job in a row, up to the last, that died with nothing to show for it.

    One whose end nobody wrote down is passed over: its machine was lost, or it still runs.
    """
    count = 0
    for one in reversed(past):
        if one.attempt.job_id != job_id or one.end is None:
            continue
        if one.end.exit_code == 0 and one.end.reason.startswith("begun again"):
            continue
        if one.end.iteration is not None or one.end.exit_code in (0, SAVED):
            break
        count += 1
    return count


def _reshard_command(
    job: Job,
    hosts: Sequence[str],
    save_dir: Path,
    iteration: int,
    target: Path,
    words: Sequence[str],
) -> tuple[str, ...]:
    """The resharder, once a machine; its tasks share the work."""
    program = Path(flagscale.__file__).parents[1] / "tools" / "reshard_optimizer.py"
    if not program.exists():
        raise ConfigError(
            "the resharder is not installed",
            where=str(program),
            expected="the project's source tree: pip install -e .",
        )
    return (
        "srun",
        f"--nodes={len(hosts)}",
        f"--nodelist={','.join(hosts)}",
        f"--ntasks={len(hosts)}",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        *job.settings.container,
        f"--output={job.run_dir}/logs/reshard_%t.log",
        "--open-mode=append",
        job.check.python,
        str(program),
        f"--load-dir={save_dir}",
        f"--iteration={iteration}",
        f"--save-dir={target}",
        *words,
    )
