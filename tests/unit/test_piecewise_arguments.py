"""The arguments of piecewise attention: what they make, and every combination that is refused."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from flagattention import AttentionError
from flagattention.mcore_refusals import raise_refusals, refusals
from flagscale.errors import ConfigError
from flagscale.launch.options import known_options
from flagscale.layout.arguments import training_mode
from flagscale.train.piecewise import SPEC, add_arguments, pre_wrap_hooks, verify_arguments

SOUND = {"attention_dropout": 0.0, "position_embedding_type": "rope", "transformer_impl": "local"}


def parse(*argv: str, **upstream: object) -> argparse.Namespace:
    """What upstream's parser would make of it, its other arguments sound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", nargs="*", default=None)
    add_arguments(parser)
    namespace = argparse.Namespace(**known_options().defaults() | SOUND | {"spec": None})
    args = parser.parse_args(argv, namespace)
    vars(args).update(upstream)
    return args


METHOD = ("--nlpe-method", "rerope", "--nlpe-window", "12")


def test_nothing_is_done_unless_asked_for() -> None:
    args = parse()
    verify_arguments(args)
    assert pre_wrap_hooks(args) == []
    assert args.spec is None
    assert args.create_attention_mask_in_dataloader


def test_a_method_brings_the_spec_and_needs_no_mask() -> None:
    args = parse(*METHOD)
    verify_arguments(args)
    assert tuple(args.spec) == SPEC
    assert not args.create_attention_mask_in_dataloader


@pytest.mark.parametrize(
    "argv",
    [
        "--nlpe-method leaky-rerope --nlpe-window 12 --nlpe-leak 4.5",
        "--nlpe-method self-extend --nlpe-window 12 --nlpe-group 3 --nlpe-log-length 64",
        "--nlpe-method streaming --nlpe-window 12 --nlpe-sinks 4",
        "--spec flagattention.mcore gpt --nlpe-method rerope --nlpe-window 12",
        "--nlpe-method rerope --nlpe-window 12 --spec flagattention.mcore gpt",
    ],
)
def test_what_is_accepted(argv: str) -> None:
    verify_arguments(parse(*argv.split()))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--nlpe-window 12", "--nlpe-window needs piecewise attention"),
        ("--nlpe-sinks 0", "--nlpe-sinks needs piecewise attention"),
        ("--spec flagattention.mcore gpt", "--spec flagattention.mcore gpt needs"),
        ("--nlpe-method rerope", "(?s)window is missing.*--nlpe-window"),
        ("--nlpe-method rerope --nlpe-window 0", "(?s)out of range.*--nlpe-window"),
        ("--nlpe-method nlpe --nlpe-window 9", "(?s)no such method.*--nlpe-method.*rerope"),
        ("--nlpe-method rerope --nlpe-window 9 --nlpe-leak 2", "(?s)does not use.*--nlpe-leak"),
        ("--nlpe-method streaming --nlpe-window 9", "(?s)--nlpe-sinks"),
        ("--nlpe-method self-extend --nlpe-window 9 --nlpe-group 0", "--nlpe-group"),
        ("--nlpe-method rerope --nlpe-window 9 --nlpe-log-length 1", "--nlpe-log-length"),
        ("--nlpe-method rerope --nlpe-window 9 --spec my.spec x", "(?s)spec.*got: *my.spec x"),
    ],
)
def test_methods_that_are_refused(argv: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        verify_arguments(parse(*argv.split()))


REFUSED: dict[str, Any] = {
    "attention_backend": "local",
    "attention_dropout": 0.1,
    "batch_invariant_mode": True,
    "context_parallel_size": 2,
    "experimental_attention_variant": "dsa",
    "flash_decode": True,
    "heterogeneous_layers_config_encoded_json": "{}",
    "heterogeneous_layers_config_path": "layers.json",
    "inference_dynamic_batching": True,
    "log_max_attention_logit": True,
    "mtp_num_layers": 1,
    "multi_latent_attention": True,
    "no_rope_freq": 4,
    "position_embedding_type": "yarn",
    "qk_clip": True,
    "reset_attention_mask": True,
    "softmax_type": "learnable",
    "transformer_impl": "inference_optimized",
    "use_kitchen_attention": True,
    "window_size": (64, 0),
}


@pytest.mark.parametrize("attribute", REFUSED)
def test_what_does_not_go_with_it_is_refused_by_name(attribute: str) -> None:
    args = parse(*METHOD, **{attribute: REFUSED[attribute]})
    options = {option.name for option in known_options() if option.dest == attribute}
    with pytest.raises(ConfigError, match="does not go with") as refused:
        verify_arguments(args)
    assert refused.value.where in options
    verify_arguments(parse(**{attribute: REFUSED[attribute]}))


def test_only_piecewise_attention_takes_packed_documents() -> None:
    packed = {"dataloader_inter_document_masking": True}
    verify_arguments(parse(*METHOD, **packed))
    with pytest.raises(ConfigError, match="--dataloader-inter-document-masking needs"):
        verify_arguments(parse(**packed))
    with pytest.raises(ConfigError, match="--micro-batch-size"):
        verify_arguments(
            parse(*METHOD, **packed, micro_batch_size=2, pipeline_model_parallel_size=2)
        )


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="3 things are wrong"):
        verify_arguments(parse(*METHOD, "--nlpe-leak=2", window_size=(64, 0), qk_clip=True))


def test_a_configuration_is_judged_by_what_it_has() -> None:
    raise_refusals(argparse.Namespace())
    raise_refusals(argparse.Namespace(**SOUND, heterogeneous_block_specs=False))
    for attribute in ("heterogeneous_block_specs", "fp8_dot_product_attention"):
        assert len(refusals(argparse.Namespace(**{attribute: True}, qk_clip=True))) == 2
    with pytest.raises(AttentionError, match="--transformer-impl"):
        raise_refusals(argparse.Namespace(transformer_impl="transformer_engine"))


def test_the_memory_that_is_predicted_has_no_scores_in_it() -> None:
    values = known_options().defaults() | SOUND
    assert not training_mode(values).flash_attention
    assert training_mode(values | {"nlpe_method": "rerope"}).flash_attention
