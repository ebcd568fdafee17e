"""Which layout a job takes, and when its checkpoint has to be resharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.errors import ConfigError
from flagscale.launch.elastic import (
    choose_layout,
    describe_change,
    layout_choices,
    needs_reshard,
    nodes_to_ask_for,
    reshard_words,
)
from flagscale.launch.options import OptionTable, known_options
from flagscale.launch.recipe import dump_recipe, read_recipe, resolve_recipe
from flagscale.launch.settings import LayoutChoice, Settings

SIZES = {"tp": 4, "pp": 4, "dp": 8, "cp": 1, "ep": 1, "etp": 1, "vpp": 1, "bucket": 0}


def at(storage: str, **sizes: int) -> dict[str, Any]:
    return {**SIZES, **sizes, "format": storage}


@pytest.mark.parametrize(
    ("storage", "change", "has_to"),
    [
        ("torch_dist/fully_reshardable", {"tp": 8, "pp": 1}, False),
        ("torch_dist/dp_reshardable", {}, False),
        ("torch_dist/dp_reshardable", {"dp": 2}, False),
        ("torch_dist/dp_reshardable", {"tp": 8}, True),
        ("torch_dist/dp_reshardable", {"pp": 8}, True),
        ("torch_dist/dp_reshardable", {"vpp": 2}, True),
        ("torch_dist/dp_reshardable", {"bucket": 40_000_000}, True),
        ("torch", {}, False),
        ("torch", {"dp": 2}, True),
        ("torch", {"tp": 8}, True),
    ],
)
def test_what_a_change_needs(storage: str, change: dict[str, int], has_to: bool) -> None:
    assert (needs_reshard(at(storage), at(storage, **change)) is not None) == has_to
    assert needs_reshard(None, at(storage)) is not None


def test_the_resharders_arguments() -> None:
    words = reshard_words(at("torch", tp=2, vpp=2), None)
    assert words == (
        "--target-tensor-parallel-size=2",
        "--target-pipeline-parallel-size=4",
        "--target-data-parallel-size=8",
        "--target-virtual-pipeline-parallel-size=2",
        "--target-ckpt-format=torch",
    )
    # Told also where it goes away.
    words = reshard_words(at("torch_dist/dp_reshardable"), at("torch_dist/dp_reshardable", vpp=2))
    assert "--target-virtual-pipeline-parallel-size=1" in words


def test_a_change_is_told_in_one_line() -> None:
    line = describe_change(64, LayoutChoice(32), at("torch", dp=4), SIZES, "1024 samples a step")
    assert line == (
        "layout: 32 of 64 machines, TP 4 PP 4 DP 8 -> TP 4 PP 4 DP 4; 1024 samples a step and the "
        "order of the data stay"
    )


@given(
    sizes=st.lists(st.integers(1, 70), max_size=6, unique=True),
    nodes=st.integers(1, 70),
    spares=st.integers(0, 4),
    available=st.integers(0, 80),
    broken=st.sets(st.integers(1, 70)),
)
def test_the_largest_valid_layout_that_fits_is_taken(
    sizes: list[int], nodes: int, spares: int, available: int, broken: set[int]
) -> None:
    settings = Settings(spares=spares, layouts=tuple(LayoutChoice(size) for size in sizes))
    choices = layout_choices(settings, nodes)
    asked = nodes_to_ask_for(settings, nodes)
    usable = {nodes, *(size for size in sizes if size <= nodes)}
    assert (asked.least, asked.most) == (min(usable), nodes + spares)
    valid = [n for n in usable if n <= available and n not in broken]

    def problem_of(choice: LayoutChoice) -> str | None:
        return "no" if choice.nodes in broken else None

    if valid:
        assert choose_layout(choices, available, problem_of).nodes == max(valid)
    else:
        with pytest.raises(ConfigError, match="no layout of the recipe fits"):
            choose_layout(choices, available, problem_of)


# --- what a recipe says of it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def options() -> OptionTable:
    return known_options()


RECIPE = """\
flagscale:
  name: x
  nodes: 4
  max-restarts: 0
  spares: 2
  health-check: nodes
  layouts:
    - {nodes: 2, tensor-model-parallel-size: 2, sequence-parallel: true}
    - {nodes: 1, sequence-parallel: false}
  container: [--container-image=i, --container-mounts=/a:/a]
  env: {NCCL_DEBUG: WARN, X: 1}
model:
  num-layers: 2
"""


def test_settings_are_read_and_written_back(options: OptionTable, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE)
    recipe = read_recipe(path, options)
    settings = recipe.settings
    assert (settings.max_restarts, settings.spares, settings.health_check) == (0, 2, "nodes")
    assert settings.env == {"NCCL_DEBUG": "WARN", "X": "1"}
    first, second = settings.layouts
    assert (first.nodes, first.words) == (
        2,
        ("--tensor-model-parallel-size=2", "--sequence-parallel"),
    )
    assert (second.words, second.where) == (("--sequence-parallel=false",), f"{path}:9")
    path.write_text(dump_recipe(resolve_recipe(recipe, options, (), tmp_path)))
    again = read_recipe(path, options).settings
    assert [choice.words for choice in again.layouts] == [first.words, second.words]
    assert (again.container, again.env) == (settings.container, settings.env)
    assert again.max_restarts == 0


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("max-restarts: x", "whole number"),
        ("spares: -1", "whole number"),
        ("health-check: some", "full or nodes or none"),
        ("layouts: [{tensor-model-parallel-size: 2}]", "no number of machines"),
        ("layouts: [{nodes: 0}]", "at least 1"),
        ("layouts: [{nodes: 2, global-batch-size: 8}]", "cannot change this argument"),
        ("layouts: [{nodes: 2, micro-batch-size: [1]}]", "takes one value"),
        ("layouts: 3", "keys and values"),
        ("container: --container-image=x", "list of options"),
        ("env: [A]", "keys and values"),
        ("env: {A B: 1}", "list of variables"),
        ("env: {A: 1, A: 2}", "set twice"),
    ],
)
def test_wrong_settings_are_told_with_their_place(
    options: OptionTable, tmp_path: Path, key: str, message: str
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"flagscale:\n  {key}\n")
    with pytest.raises(ConfigError, match=rf"(?s){message}.*x\.yaml:2|x\.yaml:2.*{message}"):
        read_recipe(path, options)
