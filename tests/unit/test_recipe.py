from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flagscale.errors import ConfigError
from flagscale.launch import options as options_module
from flagscale.launch.options import OptionTable, known_options
from flagscale.launch.recipe import (
    Recipe,
    argument_values,
    dump_recipe,
    plan_argv,
    read_recipe,
    resolve_recipe,
)
from flagscale.train.arguments import add_flagscale_arguments

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.training.arguments import add_megatron_arguments

TINY = Path(__file__).parents[2] / "examples" / "aquila" / "tiny.yaml"
SOUND = """
flagscale: {name: my-run}
model:
  num_layers: 4           # underscores do as well
  swiglu: true
  bf16: false
optimizer:
  lr: 1e-3
data:
  data-path: [30, "{data_dir}/a", 70, b]
  split: 100,0,0
empty:
"""


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def options(cache_home: Path) -> OptionTable:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        return known_options()


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return add_flagscale_arguments(add_megatron_arguments(parser))


def read(tmp_path: Path, options: OptionTable, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path, options)


def test_a_recipe_becomes_a_command_line(tmp_path: Path, options: OptionTable) -> None:
    recipe = read(tmp_path, options, SOUND)
    assert recipe.name == "my-run"
    assert plan_argv(recipe, options, [], Path("/run"), Path("/data")) == [
        *("--num-layers", "4", "--swiglu", "--lr", "1e-3"),
        *("--data-path", "30", "/data/a", "70", "b", "--split", "100,0,0"),
        *("--save", "/run/checkpoints", "--load", "/run/checkpoints"),
        *("--tensorboard-dir", "/run/tensorboard"),
    ]


def test_without_a_name_the_file_names_the_run(tmp_path: Path, options: OptionTable) -> None:
    assert read(tmp_path, options, "model: {swiglu: true}").name == "recipe"


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["--lr", "2"], "--num-layers 4 --swiglu --lr 2 --split 1"),
        (["--lr=2", "--lr=3"], "--num-layers 4 --swiglu --lr 3 --split 1"),
        (["--num_layers", "2", "--bf16"], "--num-layers 2 --swiglu --lr 1e-3 --split 1 --bf16"),
        (["--swiglu=false"], "--num-layers 4 --lr 1e-3 --split 1"),
        (["--split=null"], "--num-layers 4 --swiglu --lr 1e-3"),
    ],
)
def test_overrides_take_the_place_of_the_recipes_entry(
    tmp_path: Path, options: OptionTable, overrides: list[str], changed: str
) -> None:
    text = "a: {num-layers: 4, swiglu: true, lr: 1e-3, split: 1, load: null, save: null}"
    recipe = read(tmp_path, options, text)
    argv = plan_argv(recipe, options, [*overrides, "--tensorboard-dir=null"], tmp_path)
    assert argv == changed.split()


def test_an_override_replaces_another_option_of_the_same_attribute(
    tmp_path: Path, options: OptionTable
) -> None:
    recipe = read(tmp_path, options, "rl: {rl-skip-bos-token: true, load: null, save: null}")
    overrides = ["--no-rl-skip-bos-token", "--tensorboard-dir=null"]
    assert plan_argv(recipe, options, overrides, tmp_path) == ["--no-rl-skip-bos-token"]


MISTAKES = {
    "unknown": ("model:\n  num-layer: 4", r"(?s)'num-layer'.*:2\n.*'num-layers'"),
    "twice": ("a:\n  lr: 1\nb:\n\n  lr: 2", r"(?s)--lr is set twice.*:5\n.*:2\n"),
    "twice by another name": (
        "a: {yarn-correction-range-round-to-int: true}\n"
        "b: {no-yarn-correction-range-round-to-int: true}",
        "is set twice",
    ),
    "flag with a value": ("a:\n  swiglu: 3", r"(?s)--swiglu.*:2\n.*true or false.*3"),
    "flag with a list": ("a: {swiglu: [true]}", "true or false"),
    "yes is not true": ("a: {swiglu: yes}", "true or false"),
    "value without one": ("a: {lr: true}", "(?s)one float.*no value"),
    "not an integer": ("a: {num-layers: 4.5}", r"(?s)one int.*4\.5"),
    "not a number": ("a: {lr: fast}", "(?s)one float.*fast"),
    "not a choice": ("a: {lr-decay-style: cosin}", "(?s)constant, linear, cosine.*cosin"),
    "not an upstream enumeration": ("a: {attention-backend: fast}", "(?s)flash, fused.*fast"),
    "too many": ("a: {lr: [1, 2]}", "one float"),
    "too few": ("a: {rampup-batch-size: [1, 2]}", "3 ints"),
    "a mapping": ("a: {tokenizer-model: {data_dir}}", "a collection"),
    "no section": ("lr: 1", "outside of any section"),
    "no mapping": ("- lr", "no sections"),
    "empty": ("", "no sections"),
    "not YAML": ("a:\n  b: [", r"(?s)not YAML.*:2"),
    "bad name": ("flagscale: {name: a/b}", "cannot name a directory"),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_named_with_their_place(
    tmp_path: Path, options: OptionTable, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, options, text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stray"], "belongs to no argument"),
        (["--lr"], "no value"),
        (["--lr", "1", "2"], "one float"),
        (["--swiglu=true"], "true or false"),
        (["--leraning-rate", "1"], "unknown argument"),
    ],
)
def test_wrong_overrides(
    tmp_path: Path, options: OptionTable, overrides: list[str], message: str
) -> None:
    recipe = read(tmp_path, options, SOUND)
    with pytest.raises(ConfigError, match=message):
        resolve_recipe(recipe, options, overrides, tmp_path, tmp_path)


def test_a_missing_data_directory_is_told(tmp_path: Path, options: OptionTable) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--data-path.*recipe\.yaml:10.*--data-dir"):
        plan_argv(read(tmp_path, options, SOUND), options, [], tmp_path)


def test_files_that_cannot_be_read(tmp_path: Path, options: OptionTable) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    for name in ("binary.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_recipe(tmp_path / name, options)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=12)
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "--num-layers": st.integers().map(str),
        "--lr": st.floats(allow_nan=False).map(str) | st.sampled_from(["1e-5", "1E3", ".5"]),
        "--split": WORDS.filter(lambda word: not word.startswith("--")),
        "--data-path": st.lists(WORDS.filter(lambda word: not word.startswith("--"))),
        "--swiglu": st.just([]),
        "--bf16=false": st.just([]),
    },
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@example(values={"--split": "true"})
@example(values={"--split": "null"})
@given(values=VALUES)
def test_a_resolved_recipe_reads_back_to_the_same_command_line(
    tmp_path: Path, options: OptionTable, values: dict[str, str | list[str]]
) -> None:
    overrides: list[str] = []
    for name, value in values.items():
        overrides += [name, *([value] if isinstance(value, str) else value)]
    recipe = read(tmp_path, options, SOUND)
    resolved = resolve_recipe(recipe, options, overrides, Path("/run"), Path("/data"))
    again = read(tmp_path, options, dump_recipe(resolved))
    assert again.name == resolved.name
    assert again.argv == resolved.argv
    # The defaults and the placeholders have been settled: they must not be settled again.
    assert plan_argv(again, options, [], Path("/elsewhere"), Path("/elsewhere")) == again.argv


def test_values_are_those_of_the_real_parser(
    options: OptionTable, parser: argparse.ArgumentParser
) -> None:
    recipe = resolve_recipe(
        read_recipe(TINY, options),
        options,
        ["--lr", "1", "--no-rope-fusion", "--profile-ranks", "0", "1", "--no-rl-skip-bos-token"],
        Path("/run"),
        Path("/data"),
    )
    real = vars(parser.parse_args(recipe.argv))
    ours = argument_values(recipe, options)
    plain = {dest: v for dest, v in real.items() if v is None or type(v) in (bool, int, float, str)}
    assert {dest: ours[dest] for dest in plain} == plain
    assert ours["profile_ranks"] == real["profile_ranks"]
    assert ours.keys() == real.keys()


def test_the_cache_is_used_and_a_broken_one_is_rebuilt(
    options: OptionTable, cache_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (cache,) = (cache_home / "flagscale").iterdir()
    whole = cache.read_text()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = tmp_path / "flagscale" / cache.name
    copy.parent.mkdir()
    copy.write_text(whole)
    # This interpreter knows no megatron: only the cache can answer.
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert known_options().defaults() == options.defaults()
    for broken in ("", "[{}]", whole[:-9]):
        copy.write_text(broken)
        with pytest.raises(ConfigError, match="cannot be built"):
            known_options()
    child = tmp_path / "python"
    child.write_text(f'#!/bin/sh\ncp "{cache}" "$3"\n')
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    assert known_options().defaults() == options.defaults()
    assert copy.read_text() == whole
    assert [path.name for path in copy.parent.iterdir()] == [cache.name]


def test_without_megatron_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="megatron-core is not installed"):
        known_options()
