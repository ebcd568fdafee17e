"""The settings of a method for far keys, from a Megatron job to ``config.json`` and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from flagattention import hf
from flagattention.nlpe import METHODS
from flagscale.ckpt_convert import companions, nlpe
from flagscale.ckpt_convert.families import FAMILIES, Family, family_of_arguments
from flagscale.ckpt_convert.features import Arguments
from flagscale.errors import CheckpointError
from flagscale.launch.options import known_options
from flagscale.train import piecewise

SETTINGS: dict[str, dict[str, Any]] = {
    "rerope": {"nlpe_window": 8},
    "leaky-rerope": {"nlpe_window": 8, "nlpe_leak": 2.5, "nlpe_log_length": 64},
    "self-extend": {"nlpe_window": 8, "nlpe_group": 4},
    "streaming": {"nlpe_window": 8, "nlpe_sinks": 2, "nlpe_log_length": 32},
}
POSITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "interpolated": {"rotary_seq_len_interpolation_factor": 4},
    "llama3": {"use_rope_scaling": True, "rope_scaling_factor": 8.0},
}
SERVED = [family for family in FAMILIES if "nlpe" in family.may]


def job(family: Family, **edits: Any) -> dict[str, Any]:
    config = CONFIG_MAPPING[family.model_type](
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=32, sliding_window=None,
        max_position_embeddings=64,
    )  # fmt: skip
    return family.arguments(config.to_dict()) | {"bf16": True, "vocab_size": 32, **edits}


def with_method(name: str, **edits: Any) -> dict[str, Any]:
    return {"nlpe_method": name, "spec": [*nlpe.SPEC], **SETTINGS[name], **edits}


def written(family: Family, args: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a job's model."""
    fields = family.config(Arguments(args)) | {"vocab_size": 32}
    text = companions.config_files(family.model_type, fields, {}, None, {})[companions.CONFIG]
    found: dict[str, Any] = json.loads(text)
    return found


def test_names_are_those_of_the_other_packages() -> None:
    assert nlpe.ROPE_TYPE == hf.ROPE_TYPE
    assert nlpe.SPEC == piecewise.SPEC
    assert {*SETTINGS} == {*METHODS}
    assert {*nlpe._ARGUMENTS.values()} == {
        name for name in known_options().defaults() if name.startswith("nlpe_")
    }
    assert {family.model_type for family in SERVED} == {*hf.MODEL_TYPES}


@pytest.mark.parametrize("family", SERVED, ids=lambda family: family.name)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_there_and_back(family: Family, name: str, positions: dict[str, Any]) -> None:
    args = job(family, **with_method(name, **positions))
    assert family_of_arguments(args, family.name) is family
    config = written(family, args)
    rope = config["rope_parameters"]
    assert rope["rope_type"] == nlpe.ROPE_TYPE
    assert rope["method"] == name
    found = family.arguments(companions.completed_config(config))
    told = {key: args.get(key) for key in (*nlpe._ARGUMENTS.values(), "spec", *positions)}
    assert {key: found.get(key) for key in told} == told
    again = family.config(Arguments(args | found))
    assert again["rope_parameters"] == rope


def test_a_model_without_a_method_is_as_before() -> None:
    family = SERVED[0]
    args = job(family)
    assert all(args[dest] is None for dest in nlpe._ARGUMENTS.values())
    assert "spec" not in args
    config = written(family, args)
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert not nlpe.has_method(config)


def test_the_spec_is_known_with_its_method_only() -> None:
    args = job(SERVED[0], **with_method("rerope"))
    for edits in ({"nlpe_method": None}, {"spec": ["some.other", "spec"]}):
        with pytest.raises(CheckpointError, match="of no family") as caught:
            family_of_arguments(args | edits)
        assert "--spec" in str(caught.value.where)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in SERVED], ids=lambda family: family.name
)
def test_other_families_refuse_a_method(family: Family) -> None:
    args = job(SERVED[0], **with_method("rerope"))
    with pytest.raises(CheckpointError, match="does not have nlpe") as caught:
        family_of_arguments(args, family.name)
    assert "--nlpe-method" in str(caught.value.where)


@pytest.mark.parametrize(
    ("edits", "where"),
    [
        ({"nlpe_window": None}, "nlpe_window"),
        ({"nlpe_method": "nlpe"}, "nlpe_method"),
        ({"nlpe_leak": 2.0}, "nlpe_leak"),
    ],
    ids=str,
)
def test_settings_that_are_none(edits: dict[str, Any], where: str) -> None:
    family = SERVED[0]
    with pytest.raises(CheckpointError) as caught:
        family.config(Arguments(job(family, **with_method("rerope") | edits)))
    assert where in str(caught.value.where)
    config = CONFIG_MAPPING["llama"]().to_dict()
    config["rope_parameters"] = {"rope_type": nlpe.ROPE_TYPE, "rope_theta": 1e4, "method": "nlpe"}
    with pytest.raises(CheckpointError, match="no such method"):
        family.arguments(config)


IMPORTS = """
import sys
from flagscale.ckpt_convert import companions, nlpe
from flagscale.ckpt_convert.families import FAMILIES
companions.completed_config({"model_type": "llama"})
print("flagattention" in sys.modules)
nlpe.register({"rope_parameters": {"rope_type": nlpe.ROPE_TYPE}})
print("flagattention.hf" in sys.modules)
"""


def test_our_attention_is_imported_for_such_a_model_only(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["False", "True"]
