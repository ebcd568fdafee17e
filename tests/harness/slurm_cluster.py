"""A real Slurm on this one machine: munged, slurmctld and a slurmd for each emulated node.

From Debian's packages (``apt-get install slurmctld slurmd slurm-client munge``), with everything
they write below one private directory and ports of its own. All nodes are this machine, so their
clocks, disks and devices are the same; what differs is the slurmd that can be killed.

By hand, from the folder ``tests``:

    python -m harness.slurm_cluster up DIR [NODES]     prints what to export
    python -m harness.slurm_cluster kill DIR NODE      kill -9 of a slurmd; 1-based
    python -m harness.slurm_cluster start DIR NODE
    python -m harness.slurm_cluster down DIR           ends all of it, ranks without a node too
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from harness import free_port

__all__ = ["Process", "SlurmCluster", "owned_cluster", "why_not"]

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"  # not on everybody's PATH
_MARK = "FLAGSCALE_TEST_CLUSTER"
"""In the environment of every process of a cluster, ranks included: the cluster's directory."""

# cred_expire is also how long a job that is queued again must wait: two minutes by default.
# PriorityType and the backfill are as installed; the intervals are short so that tests are.
_PROLOG = """\
#!/bin/sh
if [ -e {directory}/spoiled-$SLURMD_NODENAME ]; then echo export PYTHONHOME=/nonexistent; fi
"""
"""What each task runs first: on a spoiled node, no Python starts."""

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge/sock,cred_expire={requeue_s}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/slurmd-%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd-%n.log
JobCompType=jobcomp/filetxt
JobCompLoc={directory}/log/jobcomp.txt
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={directory}/task_prolog.sh
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
FirstJobId={first_job}
ReturnToService=2
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout={node_timeout_s}
MailProg=/bin/true
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Process:
    """A process of a cluster: one of its daemons, a job's script, or a rank.

    Args:
        pid: Its number.
        command: Its words.
        environ: Its environment when it was started.
    """

    pid: int
    command: tuple[str, ...]
    environ: Mapping[str, str]

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send it a signal; nothing happens if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)


def why_not() -> str | None:
    """Why there can be no cluster here; ``None`` when there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return (
            f"no Slurm to test with ({', '.join(missing)} missing): scripts/bootstrap.sh test, "
            "as root, or apt-get install slurmctld slurmd slurm-client munge"
        )
    return None


class SlurmCluster:
    """A cluster by the directory it lies in, which need not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    # --- its life -----------------------------------------------------------------------------

    def start(self, nodes: int = 4, *, node_timeout_s: int = 10, requeue_s: int = 10) -> None:
        """Bring it up, and wait until every node is idle.

        Args:
            nodes: How many.
            node_timeout_s: A node that is silent for so long is down.
            requeue_s: How long a job that is queued again waits at least.
        """
        for name in ("munge", "state", "spool", "run", "log"):
            (self.directory / name).mkdir(parents=True)
            (self.directory / name).chmod(0o755)
        key = self.directory / "munge/key"
        key.touch(0o600)
        key.write_bytes(random.randbytes(128))
        ports = [free_port() for _ in range(nodes + 1)]
        names = [
            f"NodeName={node_name(i)} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 "
            f"Port={ports[i]} CPUs=16 State=UNKNOWN"
            for i in range(1, nodes + 1)
        ]
        text = _CONF.format(
            directory=self.directory,
            host=socket.gethostname().partition(".")[0],
            user=getpass.getuser(),
            ctld_port=ports[0],
            # A job's port follows from its number: not those of another cluster of this machine.
            first_job=random.randrange(1000, 18_000),
            requeue_s=requeue_s,
            node_timeout_s=node_timeout_s,
            nodes="\n".join(names),
        )
        (self.directory / "slurm.conf").write_text(text)
        prolog = self.directory / "task_prolog.sh"
        prolog.write_text(_PROLOG.format(directory=self.directory))
        prolog.chmod(0o755)
        self._start_munged()
        self.start_controller()
        for node in range(1, nodes + 1):
            self.start_node(node)
        self.wait(lambda: self.node_states() == dict.fromkeys(self.nodes, "IDLE"), "idle nodes", 30)

    def stop(self) -> None:
        """End every process of it, and remove nothing but what runs."""
        # Daemons first: they would start others, and each may be between fork and exec.
        for _ in range(20):
            processes = self.processes()
            if not processes:
                return
            for process in processes:
                process.kill()
            time.sleep(0.05)
        raise RuntimeError(f"processes of {self.directory} do not end: {self.processes()}")

    def _start_munged(self) -> None:
        munge = self.directory / "munge"
        options = [
            f"--{name}={munge / name.partition('-')[0]}" for name in ("key-file", "pid-file")
        ]
        options += [f"--socket={munge}/sock", f"--seed-file={munge}/seed"]
        self._daemon("munged", *options, f"--log-file={munge}/log", "--num-threads=2")

    def start_controller(self) -> None:
        """Start slurmctld."""
        self._daemon("slurmctld", "-i")

    def start_node(self, node: int) -> None:
        """Start the slurmd of a node, 1-based."""
        self._daemon("slurmd", "-N", node_name(node))

    def kill_node(self, node: int, signum: int = signal.SIGKILL, *, ranks: bool = False) -> None:
        """Kill the slurmd of a node, 1-based; what it has started lives on, unless ``ranks``."""
        name = node_name(node)
        for process in self.processes():
            if "slurmd" in Path(process.command[0]).name and process.command[-1] == name:
                process.kill(signum)
        if ranks:
            # Without their stepds first, which would report how the ranks ended: a node that loses
            # power reports nothing.
            for process in self.stepds(name) + self.on_node(name):
                process.kill()

    def _daemon(self, program: str, *options: str) -> None:
        """Start a daemon; it detaches itself."""
        found = shutil.which(program, path=_path())
        log = self.directory / "log" / f"start-{program}.log"
        with log.open("ab") as out:
            code = subprocess.run(
                [found or program, *options],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=60,
                check=False,
            ).returncode
        if code:
            raise RuntimeError(f"{program} does not start (exit code {code}):\n{log.read_text()}")

    # --- its processes ------------------------------------------------------------------------

    @property
    def environ(self) -> dict[str, str]:
        """The environment in which Slurm's programs speak to this cluster."""
        kept = {
            name: v for name, v in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
        }
        return kept | self.settings | {"PATH": _path()}

    @property
    def settings(self) -> dict[str, str]:
        """What is to be exported to speak to this cluster."""
        return {"SLURM_CONF": f"{self.directory}/slurm.conf", _MARK: str(self.directory)}

    def processes(self) -> list[Process]:
        """Every process of the cluster but this one."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                text = (path / "environ").read_bytes().decode(errors="replace")
                environ = {w.partition("=")[0]: w.partition("=")[2] for w in text.split("\0")}
                # A slurmstepd writes its title where its environment was; it stays in the folder.
                ours = environ.get(_MARK) == str(self.directory)
                ours = ours or (path / "cwd").readlink() == self.directory / "log"
                command = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                # Without words it has ended, and nobody has asked how.
                if ours and command and path.name != str(os.getpid()):
                    found.append(Process(int(path.name), tuple(command), environ))
        return found

    def stepds(self, name: str) -> list[Process]:
        """The processes that stand between a node's slurmd and what it runs."""
        log = self.directory / "log" / f"slurmd-{name}.log"
        found = [p for p in self.processes() if p.command[0].startswith("slurmstepd")]
        return [p for p in found if log in _open_files(p.pid)]

    def on_node(self, name: str) -> list[Process]:
        """What jobs run on a node: scripts, launchers, ranks and what those have started."""
        return [p for p in self.processes() if p.environ.get("SLURMD_NODENAME") == name]

    def ranks(self, job_id: int) -> dict[int, Process]:
        """The training processes of a job, by rank; of its latest attempt where several live."""
        found = [
            p
            for p in self.processes()
            if p.environ.get("SLURM_JOB_ID") == str(job_id)
            and p.command[1:3] == ("-m", "flagscale.train")
            and "RANK" in p.environ
        ]
        found.sort(key=lambda p: int(p.environ.get("SLURM_RESTART_COUNT", "0")))
        return {int(p.environ["RANK"]): p for p in found}

    # --- its jobs -----------------------------------------------------------------------------

    @property
    def nodes(self) -> list[str]:
        """The names of its nodes."""
        text = (self.directory / "slurm.conf").read_text()
        return re.findall(r"^NodeName=(\S+)", text, re.MULTILINE)

    def run(self, *command: object, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a program against this cluster."""
        return subprocess.run(
            [str(word) for word in command],
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def ask(self, *command: object) -> str:
        """What a program prints that must succeed."""
        done = self.run(*command)
        if done.returncode:
            raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}")
        return done.stdout

    def node_states(self) -> dict[str, str]:
        """By node: IDLE, ALLOCATED, DOWN, ...; without the marks for what is about to change."""
        lines = self.ask("sinfo", "-h", "-N", "-o", "%N %T").splitlines()
        return {name: re.sub(r"\W", "", state).upper() for name, state in map(str.split, lines)}

    def job(self, job_id: int) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        text = self.ask("scontrol", "-o", "show", "job", job_id)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job_id: int) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.job(job_id)["JobState"]

    def wait_state(self, job_id: int, *states: str, timeout_s: float = 90.0) -> dict[str, str]:
        """Wait until a job is in one of the states; what ``scontrol show job`` then says."""
        self.wait(lambda: self.state(job_id) in states, f"job {job_id} in {states}", timeout_s)
        return self.job(job_id)

    def wait_restart(self, job_id: int, restarts: int, timeout_s: float = 90.0) -> None:
        """Wait until a job runs again; what it would wait for in the queue is left out."""

        def runs() -> bool:
            job = self.job(job_id)
            self.hurry(job_id)
            return int(job["Restarts"]) >= restarts and job["JobState"] == "RUNNING"

        self.wait(runs, f"restart {restarts} of job {job_id}", timeout_s)

    def hurry(self, job_id: int) -> None:
        """Let a job that was queued again start soon.

        Not at once: a node that has just revoked the job's credential refuses a new one made in the
        same moment, and the job fails with "Job credential revoked".
        """
        job = self.job(job_id)
        if job["JobState"] == "PENDING" and job["Restarts"] != "0":
            queued = datetime.fromisoformat(job["SubmitTime"])  # anew, when it was queued again
            if datetime.now() - queued > timedelta(seconds=4):
                self.run("scontrol", "update", f"jobid={job_id}", "StartTime=now")

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Wait for a condition; the failure names it and shows the queue."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                queue = self.run("squeue").stdout + self.run("sinfo", "-N").stdout
                raise AssertionError(f"no {what} after {timeout_s} s\n{queue}")
            time.sleep(0.2)

    def spoil(self, number: int) -> None:
        """Let no Python start on a node, counted from 1, until the cluster is cleared."""
        (self.directory / f"spoiled-{self.nodes[number - 1]}").touch()

    def clear(self) -> None:
        """End all jobs, and what is left of them; have every node back."""
        for spoiled in self.directory.glob("spoiled-*"):
            spoiled.unlink()
        self.run("scancel", f"--user={getpass.getuser()}")
        running = {p.command[-1] for p in self.processes() if Path(p.command[0]).name == "slurmd"}
        for number, name in enumerate(self.nodes, 1):
            if name not in running:
                self.start_node(number)

        def calm() -> bool:
            for process in self.processes():
                if "SLURM_JOB_ID" in process.environ:
                    process.kill()
            for name in self.nodes:
                if self.node_states()[name] in ("DOWN", "DRAINED", "DRAINING"):
                    self.run("scontrol", "update", f"nodename={name}", "state=resume")
            idle = self.node_states() == dict.fromkeys(self.nodes, "IDLE")
            return idle and not self.ask("squeue", "-h")

        self.wait(calm, "idle cluster", 60)


def node_name(node: int) -> str:
    """Of a node, 1-based: an address of this machine, so that it needs no name service."""
    return f"127.0.0.{node}"


@contextlib.contextmanager
def owned_cluster(nodes: int = 4, **settings: int) -> Iterator[SlurmCluster]:
    """A cluster that ends with the ``with`` block, or with this process however it ends."""
    # Not below a test's directory: the path of a socket can have 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    directory.chmod(0o755)
    cluster = SlurmCluster(directory)
    command = [sys.executable, "-m", "harness.slurm_cluster", "guard", str(directory)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1], start_new_session=True
    ) as guard:
        try:
            cluster.start(nodes, **settings)
            yield cluster
        finally:
            guard.communicate(timeout=30)  # its input ends, and it ends the cluster


def _open_files(pid: int) -> set[Path]:
    found = set()
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.add(path.readlink())
    return found


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), _SBIN])


def main(argv: list[str]) -> int:
    """By hand; the exit code."""
    if len(argv) not in (2, 3) or argv[0] not in ("up", "down", "kill", "start", "guard"):
        print(__doc__, file=sys.stderr)
        return 2
    cluster = SlurmCluster(Path(argv[1]).absolute())
    if argv[0] == "up":
        if reason := why_not():
            print(reason, file=sys.stderr)
            return 2
        cluster.start(int(argv[2]) if len(argv) > 2 else 4)
        for name, value in cluster.settings.items():
            print(f"export {name}={value}")
    elif argv[0] in ("kill", "start"):
        (cluster.kill_node if argv[0] == "kill" else cluster.start_node)(int(argv[2]))
    else:
        if argv[0] == "guard":
            sys.stdin.read()
        cluster.stop()
        if argv[0] == "guard":
            shutil.rmtree(cluster.directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
