"""The health check of a job's machines: started by srun on each of them, judged here.

Each machine has a srun of its own, so that one that does not answer holds up nothing but itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flagscale.errors import ConfigError
from flagscale.health.facts import Facts, TimeServer
from flagscale.health.judge import judge_all
from flagscale.health.pairs import find_bad

__all__ = ["Check", "describe_check", "execute_check"]

_NODE_SECONDS: Final = 120.0
_REDUCE_SECONDS: Final = 180.0
_ANY: Final = "NODE"


@dataclass(frozen=True)
class Check:
    """A check of machines.

    Args:
        kind: ``full``, with an all-reduce, or ``nodes``.
        directory: Where requests and answers lie; on a file system that all machines share.
        checkpoints: Where checkpoints go.
        python: The interpreter, on every machine.
        platform: ``cuda`` or ``cpu``.
        devices: Of each machine that the job uses.
        port: For the rendezvous of the all-reduce.
        srun_options: Such as those for a container.
        node_seconds: Limit for the answer of a machine.
        reduce_seconds: Limit for an all-reduce.
    """

    kind: str
    directory: Path
    checkpoints: Path
    python: str
    platform: str
    devices: int
    port: int
    srun_options: tuple[str, ...] = ()
    node_seconds: float = _NODE_SECONDS
    reduce_seconds: float = _REDUCE_SECONDS

    def node_command(self, host: str) -> tuple[str, ...]:
        """What looks at one machine."""
        return (
            "srun",
            "--nodes=1",
            f"--nodelist={host}",
            "--ntasks=1",
            "--ntasks-per-node=1",
            "--overlap",
            "--cpu-bind=none",
            *self.srun_options,
            f"--output={self.directory}/node-{host}.log",
            self.python,
            "-m",
            "flagscale.health",
            "node",
            f"{self.directory}/nodes.json",
        )

    def reduce_command(self, hosts: Sequence[str], name: str) -> tuple[str, ...]:
        """What sums numbers over machines: on all devices, or once a machine without any."""
        tasks = self.devices if self.platform == "cuda" else 1
        return (
            "srun",
            f"--nodes={len(hosts)}",
            f"--nodelist={','.join(hosts)}",
            f"--ntasks={len(hosts) * tasks}",
            f"--ntasks-per-node={tasks}",
            "--distribution=block",
            "--overlap",
            "--cpu-bind=none",
            "--kill-on-bad-exit=1",
            *self.srun_options,
            f"--output={self.directory}/{name}-%t.log",
            self.python,
            "-m",
            "flagscale.health",
            "reduce",
            f"{self.directory}/{name}.json",
        )


@dataclass
class _Trial:
    """An all-reduce that runs."""

    hosts: tuple[str, ...]
    name: str
    process: subprocess.Popen[bytes] = field(repr=False)


def describe_check(check: Check, nodes: int) -> list[str]:
    """What will be run on so many machines, for people."""
    lines = [f"each machine, within {check.node_seconds:.0f} s"]
    lines.append(f"  {shlex.join(check.node_command(_ANY))}")
    if check.kind == "full" and nodes > 1:
        lines.append(f"those that are chosen, all together, within {check.reduce_seconds:.0f} s")
        lines.append(f"  {shlex.join(check.reduce_command([_ANY] * nodes, 'reduce'))}")
        lines[-1] = lines[-1].replace(",".join([_ANY] * nodes), f"{_ANY},...")
    return lines


def execute_check(check: Check, hosts: Sequence[str], needed: int) -> dict[str, tuple[str, ...]]:
    """Look at machines, and sum numbers over the first ``needed`` of the sound ones.

    Args:
        check: How.
        hosts: The machines of the job.
        needed: How many it wants to use.

    Returns:
        What is wrong with each machine; nothing, if all is well.

    Raises:
        ConfigError: The directory cannot be written, or the sum fails although every pair of
            machines works.
    """
    try:
        check.directory.mkdir(parents=True, exist_ok=True)
        check.checkpoints.mkdir(parents=True, exist_ok=True)
        problems = _look_at_nodes(check, hosts)
    except OSError as error:
        raise ConfigError(
            "the health check cannot be written",
            where=str(error.filename or check.directory),
            got=error,
            cure="--output-dir and --save must be on a file system that all machines share",
        ) from error
    rounds = itertools.count(1)
    while check.kind == "full":
        sound = [host for host in hosts if not problems[host]][:needed]
        failures = _reduce(check, sound, rounds) if len(sound) > 1 else {}
        problems |= {host: (problem,) for host, problem in failures.items()}
        if not failures:  # else spares have moved up, which have not been tried
            break
    return problems


def _look_at_nodes(check: Check, hosts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    token = secrets.token_hex(8)
    probe = check.checkpoints / f".probe-{token}"
    server = TimeServer()
    threading.Thread(target=server.serve, daemon=True).start()
    request = {
        "platform": check.platform,
        "directory": str(check.checkpoints),
        "probe": str(probe),
        "token": token,
        "hosts": [*hosts],
        "clock": [socket.gethostname(), server.port],
    }
    try:
        probe.write_text(token)
        (check.directory / "nodes.json").write_text(json.dumps(request) + "\n")
        started = [_started(check.node_command(host)) for host in hosts]
        _wait(started, check.node_seconds)
    finally:
        server.close()
        with contextlib.suppress(OSError):
            probe.unlink()
    found = dict(_answers(check.directory, hosts))
    return judge_all(hosts, found, devices=check.devices, platform=check.platform)


def _answers(directory: Path, hosts: Sequence[str]) -> Iterator[tuple[str, Facts]]:
    for host in hosts:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((directory / f"node-{host}.json").read_text())
            yield host, Facts.read(record)


def _reduce(check: Check, hosts: Sequence[str], rounds: Iterator[int]) -> dict[str, str]:
    """Which machines an all-reduce fails for, and what it said."""
    said: dict[str, str] = {}

    def try_groups(groups: Sequence[tuple[str, ...]]) -> list[bool]:
        number = next(rounds)
        names = [f"reduce-{number}-{i}" for i in range(len(groups))]
        trials = [
            _trial(check, group, name, port=check.port + i)
            for i, (group, name) in enumerate(zip(groups, names, strict=True))
        ]
        _wait([trial.process for trial in trials], check.reduce_seconds)
        results = []
        for trial in trials:
            problems = _reduce_problems(check, trial)
            said.update(problems)
            results.append(not problems)
        return results

    if try_groups([tuple(hosts)])[0]:
        return {}
    if len(hosts) == 2:
        bad: tuple[str, ...] = tuple(hosts)
    else:
        bad = find_bad(hosts, try_groups)
    if not bad:
        raise ConfigError(
            "an all-reduce over all machines fails, though every pair of them works",
            where=str(check.directory),
            got="; ".join(sorted(set(said.values()))),
            cure="the logs there have more; --health-check nodes starts without it",
        )
    return {host: f"all-reduce: {said.get(host, 'no answer')}" for host in bad}


def _trial(check: Check, hosts: tuple[str, ...], name: str, port: int) -> _Trial:
    request = {
        "backend": "nccl" if check.platform == "cuda" else "gloo",
        "address": hosts[0],
        "port": port,
        "seconds": check.reduce_seconds / 2,
    }
    (check.directory / f"{name}.json").write_text(json.dumps(request) + "\n")
    return _Trial(hosts, name, _started(check.reduce_command(hosts, name)))


def _reduce_problems(check: Check, trial: _Trial) -> dict[str, str]:
    """What each machine of a trial said; nothing if all is well."""
    problems = dict.fromkeys(trial.hosts, "no answer in time")
    for path in check.directory.glob(f"{trial.name}-*.json"):
        with contextlib.suppress(OSError, ValueError):
            answer: Mapping[str, Any] = json.loads(path.read_text())
            host = answer.get("host", "")
            if "error" in answer:
                problems[host] = str(answer["error"]).split("\n")[0]
            elif problems.get(host) == "no answer in time":
                problems[host] = ""
    if trial.process.returncode == 0:
        return {}
    return {host: problem or "another machine failed" for host, problem in problems.items()}


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ConfigError("srun cannot be started", where=command[0], got=error) from error


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait for all, and end those that take too long."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    late = [process for process in processes if process.poll() is None]
    for process in late:
        process.terminate()
    for process in late:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
