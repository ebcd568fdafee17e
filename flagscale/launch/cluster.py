"""The machines of a job: how many, and which. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flagscale.errors import ConfigError

__all__ = ["Cluster", "expand_nodelist", "node_rank_of", "slurm_port"]


@dataclass(frozen=True)
class Cluster:
    """Machines with equally many devices.

    Args:
        nodes: Machines.
        nproc: Processes a machine, one a device.
        hosts: The machines' names in order of node rank, where they are known.
        port: TCP port of the rendezvous on the first machine.
    """

    nodes: int
    nproc: int
    hosts: tuple[str, ...] = ()
    port: int = 29500

    def __post_init__(self) -> None:
        for name, size in (("--nodes", self.nodes), ("--nproc", self.nproc)):
            if size < 1:
                raise ConfigError(
                    "there is nothing to start", where=name, expected="at least 1", got=size
                )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.nproc


def node_rank_of(hosts: Sequence[str], given: int | None, hostname: str) -> int:
    """This machine's place among the hosts.

    Raises:
        ConfigError: It is not among them, or the given place is not.
    """
    if given is not None:
        if not 0 <= given < len(hosts):
            raise ConfigError(
                "there is no such host",
                where="--node-rank",
                expected=f"0 to {len(hosts) - 1}",
                got=given,
            )
        return given
    short = hostname.partition(".")[0]
    for rank, host in enumerate(hosts):
        if host in (hostname, short):
            return rank
    raise ConfigError(
        "this machine is not in the list of hosts",
        where="--hosts",
        expected=f"{hostname} among them",
        got=",".join(hosts),
        cure="start this command on each of the hosts, or say --node-rank N",
    )


def expand_nodelist(text: str) -> tuple[str, ...]:
    """The names in a Slurm node list, such as ``gpu[001-003,7],login``, in order.

    Raises:
        ConfigError: The text is no such list.
    """
    hosts: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        hosts += _expand(word)
    if not hosts or text.count("[") != text.count("]"):
        raise ConfigError("the node list cannot be read", where="SLURM_JOB_NODELIST", got=text)
    return tuple(hosts)


def _expand(word: str) -> list[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", word)
    if match is None:
        return [word]
    prefix, ranges, rest = match.groups()
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ConfigError("the node list cannot be read", where="SLURM_JOB_NODELIST", got=word)
        numbers += [f"{i:0{len(first)}}" for i in range(int(first), int(last or first) + 1)]
    return [prefix + number + tail for number in numbers for tail in _expand(rest)]


def slurm_port(job_id: int, restart: int = 0) -> int:
    """A port for a start of a job, below those the kernel hands out itself.

    It is another than its neighbours', and than that of the start before, whose ranks may live on.
    """
    return 10_000 + (job_id + 7919 * restart) % 20_000
