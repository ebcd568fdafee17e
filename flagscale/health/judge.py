"""Which machines are fit, by what was found on them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flagscale.health.facts import Device, Facts

__all__ = ["Limits", "judge", "judge_all"]

_GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What a machine must hold to; chosen so that a sound machine never fails.

    Args:
        max_device_used: Bytes that a device without a job may have in use.
        max_device_busy: Share of the time that it may seem to work.
        max_load_per_core: Processes a core that run or wait to.
        min_memory_free: Share of the machine's memory.
        max_clock_skew: Seconds.
        min_disk_free: Bytes.
        min_write_speed: Bytes a second.
    """

    max_device_used: int = 2 * _GIB
    max_device_busy: float = 0.5
    max_load_per_core: float = 16.0
    min_memory_free: float = 0.1
    max_clock_skew: float = 5.0
    min_disk_free: int = 1 * _GIB
    min_write_speed: float = 1e6


def judge_all(
    hosts: Sequence[str],
    found: Mapping[str, Facts],
    *,
    devices: int,
    platform: str,
    limits: Limits | None = None,
) -> dict[str, tuple[str, ...]]:
    """What is wrong with each machine; nothing, if all is well.

    Args:
        hosts: All machines.
        found: By machine; one that is not there has not answered.
        devices: That each must have.
        platform: ``cuda``, or another.
        limits: What they must hold to.
    """
    # A name that most machines cannot resolve is that machine's fault, else it is theirs.
    unknown = [name for facts in found.values() for name in facts.unresolved]
    nameless = {name for name in unknown if 2 * unknown.count(name) > len(found)}
    problems: dict[str, tuple[str, ...]] = {}
    for host in hosts:
        if host not in found:
            problems[host] = ("it did not answer in time",)
            continue
        wrong = [*judge(found[host], devices, platform, limits or Limits())]
        if host in nameless:
            wrong.append("its name has no address on the other machines")
        if mine := [name for name in found[host].unresolved if name not in nameless]:
            wrong.append(f"it finds no address of {', '.join(mine)}")
        problems[host] = tuple(wrong)
    return problems


def judge(facts: Facts, devices: int, platform: str, limits: Limits) -> Iterator[str]:
    """What is wrong with a machine, each in one line."""
    if platform == "cuda":
        yield from _judge_devices(facts, devices, limits)
    if facts.load > limits.max_load_per_core * max(1, facts.cores):
        yield f"it is busy: load {facts.load:.0f} on {facts.cores} cores"
    if facts.memory and facts.memory_free < limits.min_memory_free * facts.memory:
        yield f"memory free {_gib(facts.memory_free)} of {_gib(facts.memory)}"
    if facts.clock_skew is not None and abs(facts.clock_skew) > limits.max_clock_skew:
        yield f"its clock is off by {facts.clock_skew:+.1f} s"
    if not facts.sees_probe:
        yield "the checkpoint directory is not the one of the first machine: it is not shared"
    if facts.write_speed is None:
        yield f"the checkpoint directory cannot be written: {facts.write_error}"
    elif facts.write_speed < limits.min_write_speed:
        yield f"the checkpoint directory takes {facts.write_speed / 1e6:.1f} MB/s"
    if facts.disk_free is not None and facts.disk_free < limits.min_disk_free:
        yield f"disk space for checkpoints: {_gib(facts.disk_free)}"


def _judge_devices(facts: Facts, devices: int, limits: Limits) -> Iterator[str]:
    if facts.devices is None:
        yield f"its devices cannot be asked about: {facts.device_error}"
        return
    if len(facts.devices) < devices:
        yield f"{len(facts.devices)} devices, {devices} are needed"
    yield from (
        f"device {device.index} is in use: {_gib(device.memory_used)}, {device.busy:.0%} busy"
        for device in facts.devices
        if _in_use(device, limits)
    )


def _in_use(device: Device, limits: Limits) -> bool:
    return device.memory_used > limits.max_device_used or device.busy > limits.max_device_busy


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
