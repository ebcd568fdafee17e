"""scripts/bootstrap.sh, run for real in a copy of the project with its own PATH and HOME.

Only the part that takes minutes is played: an interpreter whose environments carry a pip that notes
how it was called and does what it is told. What pip says without a network comes from the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# fmt: off
TOOLS = (
    "awk", "bash", "cat", "cksum", "dirname", "env", "flock", "grep", "ls", "mkdir", "mv", "rm",
    "sed", "tail", "tee", "touch",
)
# fmt: on

FAKE_PIP = """
import json, pathlib, sys, time
folder = pathlib.Path({folder!r})
if sys.argv[1] == "--version":
    sys.exit(0)
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
what = (folder / "does").read_text()
if what == "hang":
    time.sleep(60)
if what == "slow":
    time.sleep(1)
if what == "out of space":
    print("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    sys.exit(1)
if what == "fail":
    print("ERROR: something else")
    sys.exit(1)
"""

FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
  *" -c "*) echo {version} ;;
  *" -m venv "*)
    {real} -I -m venv --without-pip "$4" || exit
    for packages in "$4"/lib/python3*/site-packages; do
      mkdir "$packages/pip"
      cat {pip} > "$packages/pip/__main__.py"
    done ;;
esac
"""


@dataclass
class Project:
    """A copy of what the bootstrap reads, in a world of its own."""

    root: Path
    env: dict[str, str]

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "scripts/bootstrap.sh", *arguments],
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def pip(self) -> Path:
        """The folder by which the fake pip is told what to do, and tells how it was called."""
        return self.root.parent / "pip"

    def pip_calls(self) -> list[list[str]]:
        calls = self.pip / "calls"
        return (
            [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        )

    def add_program(self, path: Path | str, text: str) -> Path:
        """Put a program somewhere; a bare name goes to the PATH."""
        path = Path(self.env["PATH"]) / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def add_python(self, path: Path | str, version: str) -> Path:
        real, pip = sys.executable, self.pip / "__main__.py"
        return self.add_program(path, FAKE_PYTHON.format(version=version, real=real, pip=pip))


def df_says(free_kib: int) -> str:
    return f"#!/usr/bin/env bash\necho header\necho disk 0 0 {free_kib} 0% /\n"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "a project"
    (root / "scripts").mkdir(parents=True)
    for name in ("scripts/bootstrap.sh", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    path, home = tmp_path / "bin", tmp_path / "home"
    path.mkdir()
    home.mkdir()
    for tool in TOOLS:
        (path / tool).symlink_to(shutil.which(tool) or f"/missing/{tool}")
    project = Project(root, {"PATH": str(path), "HOME": str(home), "LC_ALL": "C"})
    project.add_program("df", df_says(free_kib=100 * 2**20))
    project.pip.mkdir()
    (project.pip / "does").write_text("nothing")
    (project.pip / "__main__.py").write_text(FAKE_PIP.format(folder=str(project.pip)))
    return project


@pytest.fixture
def ready(project: Project) -> Project:
    """A project whose environment is made, for `run`."""
    project.add_python("python3.12", "3 12")
    result = project.run("run")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{project.venv}/bin/python\n"
    return project


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- which Python ---------------------------------------------------------------------------------


def test_no_python_is_an_error_with_its_cure(project: Project) -> None:
    result = project.run("run")
    assert (result.returncode, result.stdout) == (2, "")
    assert "no usable Python >= 3.12; found: none" in result.stderr
    assert "uv python install 3.12" in result.stderr
    assert not project.venv.exists()


def test_old_and_broken_pythons_are_passed_over_and_named(project: Project) -> None:
    project.add_program("python3.12", "#!/usr/bin/env bash\nexit 127\n")  # as a pyenv shim does
    old = project.add_python("python3", "3 11")
    two = project.add_python("python", "2 99")
    result = project.run("run")
    assert result.returncode == 2
    assert f"found: {old} (3.11) {two} (2.99)\n" in result.stderr


@pytest.mark.parametrize(
    "home", [".pyenv/versions/3.12.9/bin/python", ".local/share/uv/python/cpython-3.12/bin/python3"]
)
def test_pythons_off_the_path_are_found_and_312_goes_first(project: Project, home: str) -> None:
    project.add_python("python3", "3 13")
    python = project.add_python(Path(project.env["HOME"]) / home, "3 12")
    result = project.run("run")
    assert result.returncode == 0, result.stderr
    assert f"making {project.venv} with {python}\n" in result.stderr


def test_a_newer_python_serves_where_there_is_no_312(project: Project) -> None:
    project.add_python("python3", "3 14")
    python = project.add_python("python3.13", "3 13")
    assert f"with {python}\n" in project.run("run").stderr


def test_the_python_asked_for_is_used_or_refused(project: Project) -> None:
    project.add_python("python3.12", "3 12")
    old = project.add_python("elsewhere/python", "3 11")
    result = project.run("run", PYTHON=str(old))
    assert result.returncode == 2
    assert f"PYTHON={old} is not a usable Python >= 3.12 (it says: 3 11)" in result.stderr
    new = project.add_python("elsewhere/python", "3 13")
    assert f"with {new}\n" in project.run("run", PYTHON=str(new)).stderr


# --- when there is work to do ---------------------------------------------------------------------


def test_nothing_to_do_takes_no_time(ready: Project) -> None:
    start = time.monotonic()
    result = ready.run("run")
    assert time.monotonic() - start < 2
    assert (result.returncode, result.stderr) == (0, "")
    assert [" ".join(call) for call in ready.pip_calls()] == [
        "install --progress-bar off -c constraints.txt -e ."
    ]


def test_what_suffices_for_the_tests_suffices_to_run(ready: Project) -> None:
    for mode in ("test", "run", "test"):
        assert ready.run(mode).returncode == 0
    assert [call[-1] for call in ready.pip_calls()] == [".", ".[test]"]


def test_a_changed_pin_or_a_moved_project_is_installed_again(ready: Project) -> None:
    with (ready.root / "constraints.txt").open("a") as constraints:
        constraints.write("six==1.17.0\n")
    assert ready.run("run").returncode == 0
    assert len(ready.pip_calls()) == 2
    moved = Project(ready.root.rename(ready.root.with_name("moved")), ready.env)
    assert moved.run("run").stdout == f"{moved.venv}/bin/python\n"
    assert len(moved.pip_calls()) == 3


@pytest.mark.parametrize("there_before", [False, True])
def test_an_interrupted_install_starts_afresh(project: Project, there_before: bool) -> None:
    project.add_python("python3.12", "3 12")
    if there_before:
        assert project.run("run").returncode == 0
    (project.pip / "does").write_text("hang")
    with project.start("test") as process:
        try:
            wait_for(lambda: [".[test]"] in [call[-1:] for call in project.pip_calls()])
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    half_installed = project.venv / "half-installed"
    half_installed.touch()
    (project.pip / "does").write_text("nothing")
    result = project.run("run")
    assert result.returncode == 0, result.stderr
    assert "is incomplete: starting afresh" in result.stderr
    assert not half_installed.exists()


def test_a_failed_update_keeps_the_environment(ready: Project) -> None:
    (ready.pip / "does").write_text("fail")
    result = ready.run("test")
    assert result.returncode == 2
    assert "ERROR: something else" in result.stderr
    assert (ready.run("run").returncode, len(ready.pip_calls())) == (0, 2)


def test_an_environment_whose_python_is_gone_is_made_again(ready: Project) -> None:
    (ready.venv / "bin/python").unlink()
    assert "is incomplete: starting afresh" in ready.run("run").stderr
    assert ready.run("run").stderr == ""


def test_two_starts_at_once_install_once(project: Project) -> None:
    project.add_python("python3.12", "3 12")
    (project.pip / "does").write_text("slow")
    processes = [project.start("run") for _ in range(2)]
    output = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in output] == [f"{project.venv}/bin/python\n"] * 2
    assert "another bootstrap is at work: waiting" in "".join(err for _, err in output)
    assert len(project.pip_calls()) == 1


def test_a_folder_that_is_not_ours_is_left_alone(project: Project) -> None:
    project.add_python("python3.12", "3 12")
    precious = project.root / "folder/precious"
    precious.parent.mkdir()
    precious.touch()
    result = project.run("run", FLAGSCALE_VENV=str(precious.parent))
    assert result.returncode == 2
    assert "was not made by this script" in result.stderr
    assert precious.exists()


# --- programs that are no Python packages ---------------------------------------------------------

SLURM = "slurmctld slurmd slurm-client munge"
APT_GET = """#!/usr/bin/env bash
echo "$*" >> "$HOME/apt-calls"
if [[ " $* " == *" ${APT_FAILS-nothing} "* ]]; then echo "E: no such package"; exit 100; fi
for name in chromium slurmctld; do
  if [[ " $* " == *" $name "* ]]; then echo > "$PATH/$name"; chmod +x "$PATH/$name"; fi
done
"""


def make_root(project: Project) -> Path:
    """Give a user called root an apt-get that installs. Returns where it notes its calls."""
    project.add_program("id", "#!/usr/bin/env bash\necho 0\n")
    project.add_program("chmod", f'#!/usr/bin/env bash\nexec {shutil.which("chmod")} "$@"\n')
    project.add_program("apt-get", APT_GET)
    return Path(project.env["HOME"]) / "apt-calls"


@pytest.mark.parametrize("fails", ["nothing", "update"])
def test_the_tests_get_a_browser_and_a_slurm_once(ready: Project, fails: str) -> None:
    calls = make_root(ready)
    assert ready.run("run").stderr == ""
    assert not calls.exists()
    first = ready.run("test", APT_FAILS=fails)
    assert first.stdout == f"{ready.venv}/bin/python\n"
    assert first.stderr.endswith(f"installing chromium {SLURM}\n")
    lines = calls.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["update", "install", "install"]
    assert lines[1].endswith(" chromium")
    assert lines[2].endswith(f" {SLURM}")
    assert ready.run("test").stderr == ""
    assert len(calls.read_text().splitlines()) == 3


def test_only_what_is_missing_is_installed(ready: Project) -> None:
    calls = make_root(ready)
    ready.add_program("chromium", "")
    assert ready.run("test").stderr.endswith(f"installing {SLURM}\n")
    assert "chromium" not in calls.read_text()


def test_daemons_off_the_path_count(ready: Project) -> None:
    calls = make_root(ready)
    ready.add_program("chromium", "")
    ready.add_program("../sbin/slurmctld", "")
    assert ready.run("test").returncode == 0
    assert not calls.exists()


@pytest.mark.parametrize(("fails", "other"), [("chromium", "slurmctld"), ("munge", "chromium")])
def test_without_one_of_them_the_rest_is_installed(ready: Project, fails: str, other: str) -> None:
    make_root(ready)
    result = ready.run("test", APT_FAILS=fails)
    assert (result.returncode, result.stdout) == (0, f"{ready.venv}/bin/python\n")
    log = ready.venv / "flagscale.apt.log"
    names = SLURM if fails == "munge" else fails
    assert f"could not install {names}, so some tests cannot run (log: {log})" in result.stderr
    assert log.read_text() == "E: no such package\n"
    assert (Path(ready.env["PATH"]) / other).exists()


def test_who_is_not_root_is_told_what_to_ask_for(ready: Project) -> None:
    result = ready.run("test")
    assert result.returncode == 0
    assert f"an administrator: apt-get install chromium {SLURM}\n" in result.stderr


# --- what can be missing --------------------------------------------------------------------------


def test_too_little_space_is_an_error_with_its_cure(project: Project) -> None:
    project.add_python("python3.12", "3 12")
    project.add_program("df", df_says(free_kib=2**20))
    result = project.run("run")
    assert result.returncode == 2
    assert f"too little space in {project.root}: 1024 MiB free, 9216 MiB needed" in result.stderr
    assert "FLAGSCALE_VENV=" in result.stderr
    assert not project.venv.exists()


def test_pip_out_of_space_is_an_error_with_its_cure(project: Project) -> None:
    project.add_python("python3.12", "3 12")
    (project.pip / "does").write_text("out of space")
    result = project.run("run")
    assert result.returncode == 2
    assert "pip ran out of space" in result.stderr
    assert "Errno 28" in result.stderr


def test_no_network_is_an_error_with_its_cure(project: Project) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    result = project.run(
        "run",
        PYTHON=sys.executable,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL=f"http://127.0.0.1:{port}/simple",
        PIP_RETRIES="1",
    )
    assert result.returncode == 2
    assert "pip could not reach its package index" in result.stderr
    assert "PIP_FIND_LINKS" in result.stderr


@pytest.mark.parametrize("arguments", [(), ("everything",), ("run", "test")])
def test_wrong_arguments_are_an_error(project: Project, arguments: tuple[str, ...]) -> None:
    result = project.run(*arguments)
    assert result.returncode == 2
    assert "expected one argument, run or test" in result.stderr
