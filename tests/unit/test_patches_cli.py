"""``python -m flagscale.patches``: what it prints, returns, and does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flagscale.patches.__main__ import main
from flagscale.patches.source import SourceTree

LINES = "import sys\nimport flagscale.patches.__main__ as m\ntry:\n    m.main(sys.argv[1:])\n"
GUARD = LINES + "except SystemExit: pass\nprint({'torch', 'megatron'} & set(sys.modules))\n"


@pytest.mark.parametrize("arguments", [["list"], ["check"], ["diff"], ["--help"]])
def test_neither_torch_nor_megatron_is_imported(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", GUARD, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.stderr == ""


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the installed sources that patches aim at, one of them edited."""
    installed = SourceTree.installed()
    for module in installed.modules:
        path = tmp_path / (
            module.replace(".", "/") + ("/__init__.py" * installed.is_package(module) or ".py")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(installed.read_bytes(module))
    target = tmp_path / "megatron/core/datasets/utils.py"
    source = target.read_text()
    assert source.count("def compile_helpers():") == 1
    target.write_text(source.replace("def compile_helpers():", "def compile_helpers(force=False):"))
    return tmp_path


def test_check_of_the_installed_megatron(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  unchanged  megatron.core.datasets.utils:compile_helpers" in lines
    assert " unchanged, 0 changed, 0 missing against megatron-core 0.19." in lines[-1]
    assert max(map(len, lines)) <= 100


def test_a_mutated_upstream_fails_and_names_the_patch(
    changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--source", str(changed)]) == 1
    text = capsys.readouterr().out
    assert "  CHANGED    megatron.core.datasets.utils:compile_helpers\n             line " in text
    assert " unchanged, 1 changed, 0 missing " in text

    assert main(["diff", "--source", str(changed)]) == 1
    text = capsys.readouterr().out
    assert "\n-def compile_helpers():\n+def compile_helpers(force=False):\n" in text
    assert text.endswith(": 1\n")

    assert main(["check", "--json", "--group", "compile-helpers", "--source", str(changed)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [patch["status"] for patch in report["patches"]] == ["changed"]


def test_diff_needs_a_base_that_the_patches_were_written_for(
    changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", "--base", str(changed)]) == 2
    error = capsys.readouterr().err
    assert "compile_helpers" in error
    assert "pip download megatron-core==" in error


def test_diff_against_itself_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}


def test_list_shows_every_group_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "\ncompile-helpers: active (always)\n  reason     " in text
    assert "  method     megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__\n" in text
    assert max(map(len, text.splitlines())) <= 100

    assert main(["list", "--json", "--group", "compile-helpers"]) == 0
    (group,) = json.loads(capsys.readouterr().out)
    assert (group["group"], group["active"], group["why"]) == ("compile-helpers", True, "always")
    assert group["patches"] == [
        {"target": "megatron.core.datasets.utils:compile_helpers", "kind": "function"}
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "--wheel", "absent.whl"], "absent.whl"),
        (["check", "--source", "absent"], "absent"),
        (["check", "--group", "compile-helper"], "did you mean 'compile-helpers'?"),
        (["diff", "--base", "absent.whl"], "absent.whl"),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert says in captured.err


@pytest.mark.parametrize("arguments", [[], ["undo"], ["check", "--wheel", "a", "--source", "b"]])
def test_bad_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
