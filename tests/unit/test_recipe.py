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
    "nodes": ("flagscale:\n  nodes: 0", r"(?s)nodes.*:2\n.*above 0"),
    "nproc": ("flagscale: {nproc: [8]}", "(?s)nproc.*a collection"),
    "rule outside of its section": ("a: {ramp: {start: 1}}", "unknown argument 'ramp'"),
    "rule without numbers": ("flagscale:\n  ramp: 32", "(?s):2\n.*start, end, increment, samples"),
    "rule with a number missing": (
        "flagscale: {ramp: {start: 1, end: 2, samples: 3}}",
        "(?s)ramp takes other numbers.*got: +start, end, samples",
    ),
    "rule with an unknown number": ("flagscale: {ffn: {multiple_of: 1, k: 1}}", "other numbers"),
    "rule with a fraction": ("flagscale:\n  ffn: {multiple_of: 1.5}", "(?s):2\n.*whole number"),
    "rule and value": (
        "a: {ffn-hidden-size: 4}\nflagscale: {ffn: {multiple_of: 4}}",
        "(?s)--ffn-hidden-size is set twice.*:2\n.*:1\n",
    ),
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


RULES = """
flagscale:
  ffn: {multiple_of: 4096, hidden_dim_multiplier: 1.3}
  ramp: {start: 4, end: 12, increment: 4, samples: 101}
  nodes: 2
a: {hidden-size: 6144, seq-length: 10, load: null, save: null, tensorboard-dir: null}
"""


@pytest.mark.parametrize(
    ("overrides", "ffn_hidden_size", "schedule"),
    [
        ([], "24576", "0:4,510:8,1010:12"),
        (["--seq-length", "20"], "24576", "0:4,1020:8,2020:12"),
        (["--hidden-size", "8192"], "28672", "0:4,510:8,1010:12"),
        (["--ffn-hidden-size", "5"], "5", "0:4,510:8,1010:12"),
        (["--step-batch-size-schedule", "0:1"], "24576", "0:1"),
        (["--step-batch-size-schedule=null"], "24576", None),
    ],
)
def test_rules_are_computed_from_what_the_command_line_leaves(
    tmp_path: Path,
    options: OptionTable,
    overrides: list[str],
    ffn_hidden_size: str,
    schedule: str | None,
) -> None:
    recipe = read(tmp_path, options, RULES)
    assert (recipe.nodes, recipe.nproc) == (2, None)
    resolved = resolve_recipe(recipe, options, overrides, tmp_path)
    words = iter(resolved.argv)
    given = dict(zip(words, words, strict=True))
    assert given["--ffn-hidden-size"] == ffn_hidden_size
    assert given.get("--step-batch-size-schedule") == schedule
    again = read(tmp_path, options, dump_recipe(resolved))
    assert (again.argv, again.nodes) == (resolved.argv, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flagscale: {ffn: {multiple_of: 4}}", "computed from --hidden-size, which is not given"),
        (
            "flagscale:\n  ramp: {start: 1, end: 4, increment: 2, samples: 9}\na: {seq-length: 1}",
            r"(?s)ramp cannot be.*:2\n.*whole number of increments",
        ),
    ],
)
def test_rules_that_cannot_be_computed(
    tmp_path: Path, options: OptionTable, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_recipe(read(tmp_path, options, text), options, [], tmp_path)


# The published training scripts, argument by argument; what is not named is common to all three.
PUBLISHED = """
--num-layers              32          60          80
--hidden-size             4096        6144        8192
--num-attention-heads     32          48          64
--num-query-groups        -           8           8
--ffn-hidden-size         11008       24576       28672
--padded-vocab-size       100096      100096      100352
--seq-length              2048        4096        4096
--max-position-embeddings 2048        4096        4096
--norm-epsilon            1e-5        1e-5        1e-5
--norm-init-weight        -           0.3         0.25
--init-method-std         0.02        0.0165      0.0149
--seed                    1234        42          42
--lr                      2e-5        1.5e-4      1.5e-4
--min-lr                  2e-6        1.5e-5      1.5e-5
--lr-decay-style          cosine      cosine      cosine
--lr-warmup-samples       3076172     500000      500000
--train-samples           1002539063  488281250   488281250
--micro-batch-size        2           1           2
--global-batch-size       1728        -           -
--tensor-model-parallel-size   1      4           8
--pipeline-model-parallel-size 1      4           4
--initial-loss-scale      522893      -           -
--save-interval           2000        1000        500
--ramp-save-interval      -           5000        5000
--rotary-base             10000       10000       10000
--attention-dropout       0.0         0.0         0.0
--hidden-dropout          0.0         0.0         0.0
--weight-decay            0.1         0.1         0.1
--adam-beta1              0.9         0.9         0.9
--adam-beta2              0.95        0.95        0.95
--clip-grad               1.0         1.0         1.0
--normalization           RMSNorm     RMSNorm     RMSNorm
--position-embedding-type rope        rope        rope
--attention-backend       flash       flash       flash
--eval-iters              0           0           0
--split                   100,0,0     100,0,0     100,0,0
--fp16                    on          -           -
--bf16                    -           on          on
--rotary-interleaved      on          -           -
--rotary-in-fp32          -           -           -
--group-query-attention   -           on          on
--sequence-parallel       -           on          on
--swiglu                  on          on          on
--disable-bias-linear     on          on          on
--untie-embeddings-and-output-weights on  on      on
--use-distributed-optimizer           on  on      on
--attention-softmax-in-fp32           on  on      on
--accumulate-allreduce-grads-in-fp32  on  on      on
--embedding-lookup-in-fp32            on  on      on
--recompute-granularity   -           -           -
"""
# What today's program needs, or the project chose.
ADDED = {
    *("--data-path", "--eval-interval", "--tokenizer-type", "--tokenizer-model", "--optimizer"),
    *("--ckpt-format", "--log-interval", "--save", "--load", "--tensorboard-dir"),
    "--step-batch-size-schedule",  # tests/unit/test_ramp.py
    "--hang-minutes",
}


@pytest.mark.parametrize(
    ("column", "name", "nodes"), [(0, "7b", 12), (1, "34b", 64), (2, "70b", 96)]
)
def test_the_recipes_are_the_published_ones(
    options: OptionTable, column: int, name: str, nodes: int
) -> None:
    rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    published = {option: values[column] for option, *values in rows if values[column] != "-"}
    recipe = read_recipe(TINY.with_name(f"{name}.yaml"), options)
    assert (recipe.name, recipe.nodes, recipe.nproc) == (name, nodes, 8)
    resolved = resolve_recipe(recipe, options, [], Path("/run"), Path("/data"))
    ours = {
        entry.argv[0]: " ".join(entry.argv[1:]) or "on" for entry in resolved.entries if entry.argv
    }
    assert {option: value for option, value in ours.items() if option not in ADDED} == published
    assert ("--step-batch-size-schedule" in ours) == (name != "7b")


@pytest.mark.parametrize("name", ["7b", "34b", "70b"])
def test_every_value_of_the_recipes_has_its_source(name: str) -> None:
    lines = TINY.with_name(f"{name}.yaml").read_text().splitlines()
    values = [i for i, line in enumerate(lines) if line.startswith("  ") and ": " in line
              and not line.lstrip().startswith("#")]  # fmt: skip
    for i in values:
        above = [j for j in range(i) if not lines[j].lstrip().startswith("#")]
        comment = "".join(lines[above[-1] + 1 : i]) + lines[i].partition(" #")[2]
        own = lines[i].split(":")[0].strip() == "name"
        assert own or any(f"[{source}]" in comment for source in "PRTM"), lines[i]


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
