from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import ConfigError
from flagscale.launch.options import known_options
from flagscale.train.preflight import parse_arguments, verify_arguments


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--shares", type=float, nargs="*")
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--bf16", action="store_true")
    exclusive.add_argument("--fp16", action="store_true")
    return parser


def test_parsing_gives_what_the_parser_itself_gives(parser: argparse.ArgumentParser) -> None:
    argv = ["--num-layers=3", "--shares", "1", "-2.5", "--fp16"]
    assert parse_arguments(parser, argv) == parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--num-layer 3", "(?s)no option --num-layer.*did you mean --num-layers"),
        ("--num-layer=3", "(?s)no option --num-layer.*did you mean --num-layers"),
        ("--zzz", "(?s)no option --zzz.*see --help"),
        ("--num-layers two", "--num-layers: invalid int value: 'two'"),
        ("--num-layers", "--num-layers: expected one argument"),
        ("--bf16 --fp16", "not allowed with argument"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_parsing_refuses(parser: argparse.ArgumentParser, argv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(parser, argv.split())


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A model that fits on two ranks, in the real parser's attributes."""
    for suffix in ("bin", "idx"):
        (tmp_path / f"data.{suffix}").touch()
    return known_options().defaults() | {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 64,
        "micro_batch_size": 1,
        "data_path": [str(tmp_path / "data")],
        "split": "100,0,0",
        "eval_iters": 0,
        "eval_interval": 10,
    }


def _verify(values: dict[str, Any], **changes: Any) -> None:
    verify_arguments(argparse.Namespace(**values | changes), 2)


def test_sound_arguments(values: dict[str, Any], tmp_path: Path) -> None:
    _verify(values)
    _verify(values, data_path=["3", str(tmp_path / "data"), "1", str(tmp_path / "data")])
    # A first start loads from where it will save; names without a path may be a hub's.
    run = str(tmp_path / "run")
    _verify(values, load=run, save=run, save_interval=5, tokenizer_model="org/name")
    _verify(values, use_checkpoint_args=True, num_layers=None, hidden_size=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": None}, "nothing to train on"),
        ({"data_path": ["/no/data"]}, "(?s)--data-path.*/no/data.bin.*/no/data.idx"),
        ({"tokenizer_model": "./no"}, "(?s)does not exist.*--tokenizer-model"),
        ({"load": "/no", "save": "/tmp", "save_interval": 5}, "(?s)does not exist.*--load"),
        ({"pretrained_checkpoint": "/no"}, "(?s)does not exist.*--pretrained-checkpoint"),
        ({"save": "/dev/null", "save_interval": 5}, "(?s)--save.*/dev/null is not a writable"),
        ({"save": "/dev/null/a", "save_interval": 5}, "/dev/null is not a writable"),
        ({"tensorboard_dir": "/dev/null"}, "--tensorboard-dir"),
        ({"save": "run"}, "--save-interval"),
        ({"eval_interval": None}, "--eval-interval"),
        ({"eval_iters": 5}, "keeps no data for it"),
        ({"num_layers": None, "seq_length": None}, "give --num-layers, --seq-length"),
        ({"tensor_model_parallel_size": 3}, "(?s)whole replicas.*heads do not divide"),
        ({"tensor_model_parallel_size": 0, "vocab_size": 9}, "a size is not positive"),
        ({"num_layers_per_virtual_pipeline_stage": 3}, "virtual pipeline stages"),
        ({"sequence_parallel": True}, "needs tensor parallelism"),
        ({"global_batch_size": 3}, "2 or 4"),
        ({"sft": True}, "--sft is not supported"),
        ({"mock_data": True}, "--mock-data is not supported"),
    ],
)
def test_arguments_that_cannot_train(
    values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _verify(values, **changes)


def test_everything_wrong_is_told_at_once(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="3 things are wrong") as raised:
        _verify(values, sft=True, global_batch_size=3, load="/no")
    assert all(option in str(raised.value) for option in ("--sft", "--global-batch-size", "--load"))
