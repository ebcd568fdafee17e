"""The health check: facts of a machine, the judgement of them, and the search for a bad machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.health.facts import Device, Facts, TimeServer, clock_skew, collect, write_speed
from flagscale.health.judge import Limits, judge, judge_all
from flagscale.health.pairs import find_bad

GIB = 2**30
SOUND = Facts(
    host="a",
    devices=tuple(Device(i, "GPU", 80 * GIB, GIB // 2, 0.0) for i in range(8)),
    device_error="",
    cores=64,
    load=3.0,
    memory=1024 * GIB,
    memory_free=900 * GIB,
    clock_skew=0.01,
    disk_free=10**13,
    write_speed=2e9,
    write_error="",
    sees_probe=True,
    unresolved=(),
)


def test_a_sound_machine_passes() -> None:
    assert list(judge(SOUND, 8, "cuda", Limits())) == []
    assert Facts.read(json.loads(json.dumps(SOUND.record()))) == SOUND


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": SOUND.devices[:7]}, "7 devices, 8 are needed"),  # type: ignore[index]
        ({"devices": None, "device_error": "no driver"}, "no driver"),
        (
            {"devices": (Device(0, "GPU", 80 * GIB, 70 * GIB, 0.0), *SOUND.devices[1:])},  # type: ignore[index]
            "device 0 is in use: 70.0 GiB",
        ),
        ({"load": 5000.0}, "it is busy"),
        ({"memory_free": 20 * GIB}, "memory free 20.0 GiB of 1024.0 GiB"),
        ({"clock_skew": -61.0}, "its clock is off by -61.0 s"),
        ({"sees_probe": False}, "it is not shared"),
        ({"write_speed": None, "write_error": "read-only"}, "cannot be written: read-only"),
        ({"write_speed": 1e5}, "takes 0.1 MB/s"),
        ({"disk_free": 1000}, "disk space"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], words: str) -> None:
    (problem,) = judge(replace(SOUND, **change), 8, "cuda", Limits())  # type: ignore[arg-type]
    assert words in problem


def test_on_a_cpu_devices_do_not_count() -> None:
    assert list(judge(replace(SOUND, devices=None, clock_skew=None), 8, "cpu", Limits())) == []


def test_names_are_the_fault_of_whom_most_do_not_find() -> None:
    found = {
        "a": replace(SOUND, unresolved=("c",)),
        "b": replace(SOUND, unresolved=("c",)),
        "c": replace(SOUND, unresolved=("a",)),
    }
    problems = judge_all(["a", "b", "c", "d"], found, devices=8, platform="cuda")
    assert problems["a"] == problems["b"] == ()
    assert problems["c"] == (
        "its name has no address on the other machines",
        "it finds no address of a",
    )
    assert problems["d"] == ("it did not answer in time",)


@given(count=st.integers(3, 12), data=st.data())
def test_bad_machines_are_found_among_pairs(count: int, data: st.DataObject) -> None:
    hosts = [f"n{i}" for i in range(count)]
    bad = data.draw(st.sets(st.sampled_from(hosts), max_size=(count - 1) // 2))

    def try_groups(groups: Sequence[tuple[str, ...]]) -> list[bool]:
        named = [host for group in groups for host in group]
        assert len(named) == len(set(named))  # none works for two at a time
        return [bad.isdisjoint(group) for group in groups]

    found = find_bad(hosts, try_groups)
    pairs = [set(hosts[i : i + 2]) for i in range(0, count, 2)]
    if any(pair.isdisjoint(bad) for pair in pairs):
        assert set(found) == bad
    else:
        assert set(found) == set(hosts)  # nobody is known to work


def test_a_clock_is_compared_whatever_a_start_takes() -> None:
    server = TimeServer()
    threading.Thread(target=server.serve, daemon=True).start()
    skew = clock_skew("127.0.0.1", server.port)
    server.close()
    assert skew is not None
    assert abs(skew) < 0.5
    assert clock_skew("127.0.0.1", server.port) is None


def test_what_is_found_here(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.write_text("t")
    facts = collect(
        "here",
        platform="cpu",
        directory=tmp_path,
        probe=probe,
        token="t",
        hosts=["localhost", "no-such-host.invalid"],
        clock=None,
    )
    assert facts.sees_probe
    assert facts.memory > facts.memory_free > 0
    assert facts.write_speed
    assert facts.unresolved == ("no-such-host.invalid",)
    assert list(tmp_path.iterdir()) == [probe]
    assert write_speed(tmp_path / "missing")[0] is None


def test_the_program_needs_no_torch(tmp_path: Path) -> None:
    request: dict[str, object] = {
        "platform": "cpu", "directory": str(tmp_path), "probe": str(tmp_path / "p"), "token": "t",
        "hosts": [], "clock": None,
    }  # fmt: skip
    (tmp_path / "nodes.json").write_text(json.dumps(request))
    code = (
        "import sys; from flagscale.health.__main__ import main\n"
        f"main(['node', {str(tmp_path / 'nodes.json')!r}])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SLURMD_NODENAME": "n7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
    answer = Facts.read(json.loads((tmp_path / "node-n7.json").read_text()))
    assert (answer.host, answer.sees_probe) == ("n7", False)
