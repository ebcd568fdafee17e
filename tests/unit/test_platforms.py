from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from flagscale import platforms
from flagscale.errors import PlatformError
from flagscale.platforms import activate, active_platform, register, select
from flagscale.platforms.cpu import CPU
from flagscale.platforms.cuda import CUDA

ACME = replace(CPU, name="acme", description="ACME devices", priority=20, environment={})


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that knows two platforms, and has activated none."""
    monkeypatch.setattr(platforms, "_REGISTERED", {"cuda": CUDA, "cpu": CPU})
    monkeypatch.setattr(platforms, "_ACTIVE", [])
    # Of other tests in this process.
    for name in [name for name in sys.modules if name.startswith("megatron")]:
        monkeypatch.delitem(sys.modules, name)


def test_registering_the_same_platform_twice_is_harmless() -> None:
    register(ACME)
    register(ACME)
    assert [platform.name for platform in platforms.platforms()] == ["acme", "cuda", "cpu"]


def test_two_platforms_of_one_name() -> None:
    with pytest.raises(PlatformError, match=r"(?s)'cpu'.*FLAGSCALE_PLUGINS"):
        register(replace(CPU, description="another"))


def test_selection_by_argument_then_environment_then_detection() -> None:
    environ = {"FLAGSCALE_PLATFORM": "cuda"}
    assert select("cpu", environ) == (CPU, "--platform")
    assert select(None, environ) == (CUDA, "FLAGSCALE_PLATFORM")
    register(ACME)
    assert select(None, {"FLAGSCALE_PLATFORM": ""}) == (ACME, "detected")


def test_detection_takes_the_highest_priority_that_is_there() -> None:
    register(replace(ACME, detect=lambda: False))
    register(replace(ACME, name="low", priority=-20))
    detected, _ = select(None, {})
    assert detected is (CUDA if CUDA.detect() else CPU)


@pytest.mark.parametrize(
    ("name", "environ", "message"),
    [
        ("cpuu", {}, "(?s)'cpuu'.*--platform.*cpu or cuda.*did you mean 'cpu'"),
        (
            None,
            {"FLAGSCALE_PLATFORM": "acme"},
            "(?s)where: +FLAGSCALE_PLATFORM.*install the plugin",
        ),
    ],
)
def test_unknown_names(name: str | None, environ: dict[str, str], message: str) -> None:
    with pytest.raises(PlatformError, match=message):
        select(name, environ)


def test_nothing_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_REGISTERED", {"acme": replace(ACME, detect=lambda: False)})
    with pytest.raises(PlatformError, match="no device platform was detected"):
        select(None, {})


def test_activation_sets_the_environment_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_SET", "mine")
    monkeypatch.setenv("ACME_UNSET", "")
    monkeypatch.delenv("ACME_UNSET")
    acme = replace(ACME, environment={"ACME_SET": "1", "ACME_UNSET": "1"})
    activate(acme)
    activate(acme)
    assert (os.environ["ACME_SET"], os.environ["ACME_UNSET"]) == ("mine", "1")
    assert active_platform() is acme


def test_a_process_has_one_platform() -> None:
    activate(ACME)
    with pytest.raises(PlatformError, match=r"(?s)one device platform.*acme.*cpu"):
        activate(CPU)


def test_a_device_that_cannot_be_used_is_not_activated() -> None:
    with pytest.raises(PlatformError, match="the driver is asleep"):
        activate(replace(ACME, verify=lambda: "the driver is asleep"))
    activate(ACME)


@pytest.mark.parametrize("early", ["megatron.core", "megatron.training"])
def test_megatron_imported_first(early: str) -> None:
    code = (
        "import sys, types\n"
        f"sys.modules[{early!r}] = types.ModuleType({early!r})\n"  # the import itself takes seconds
        "from flagscale.errors import PlatformError\n"
        "from flagscale.platforms import activate\n"
        "from flagscale.platforms.cpu import CPU\n"
        "try: activate(CPU)\n"
        "except PlatformError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "megatron was imported before" in done.stdout
    assert early in done.stdout
