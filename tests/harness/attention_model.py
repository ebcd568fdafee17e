"""Megatron models with piecewise attention, run in a process of their own and measured there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["METHODS", "SETTINGS", "measure_models"]

SETTINGS = "HARNESS_REFERENCE_ATTENTION"
"""Environment variable of ``reference_attention``: JSON with ``name``, ``window`` and the like."""

WINDOW = 12
LENGTH = 40
METHODS: dict[str, dict[str, Any]] = {
    "rerope": {},
    "leaky-rerope": {"leak": 4.0},
    "self-extend": {"group": 3, "log_length": 16},
    "streaming": {"n_sink": 3},
}


def measure_models(words: Sequence[str], work_dir: Path) -> dict[str, Any]:
    """Run every function of this module whose name begins with ``measure``, save this one.

    Args:
        words: The command line of a job without piecewise attention.
        work_dir: Where files go; must exist.

    Returns:
        What each function returned, by the rest of its name.
    """
    (work_dir / "words.json").write_text(json.dumps([*words]))
    environ = {
        **os.environ,
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"), "1"),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        "FLAGSCALE_PLATFORM": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-m", "harness.attention_model", str(work_dir)]
    child = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if child.returncode:
        raise AssertionError(child.stderr[-5000:])
    found: dict[str, Any] = json.loads((work_dir / "found.json").read_text())
    return found


def _main(directory: Path) -> None:
    import harness.preload  # noqa: F401 - a CPU answers upstream's device calls
    from harness.upstream_logits import _initialize

    _initialize()
    words = json.loads((directory / "words.json").read_text())
    measures = {
        name.removeprefix("_measure_"): function
        for name, function in globals().items()
        if name.startswith("_measure_")
    }
    found = {name: measure(words) for name, measure in measures.items()}
    (directory / "found.json").write_text(json.dumps(found))


def _build(words: Sequence[str], kind: str = "gpt") -> Any:
    from megatron.core import num_microbatches_calculator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import destroy_global_vars

    from flagscale.platforms.cpu import CPU

    destroy_global_vars()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    sys.argv = ["train", *words, "--mock-data", *CPU.megatron_arguments]
    config = getattr(argument_utils, f"{kind}_config_from_args")(parse_and_validate_args())
    builder = config.get_builder_cls()(config)
    model = builder.build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.15).add_("norm" in name)
    return model


def _ours(words: Sequence[str], *more: str, **settings: Any) -> Any:
    from flagattention.mcore import bind
    from flagattention.nlpe import Method

    model = _build([*words, "--spec", "flagattention.mcore", "gpt", *more])
    bind([model], Method(**{"name": "rerope", "window": WINDOW, **settings}))
    return model


def _tokens(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 250, (batch, LENGTH), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(LENGTH).expand(batch, -1)


def _error(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _measure_definition(words: Sequence[str]) -> dict[str, dict[str, float]]:
    """Logits and gradients of each method, against its definition."""
    tokens, positions = _tokens(2)
    hidden = torch.ones(LENGTH, LENGTH).triu(1).bool().expand(2, 1, -1, -1)
    weight = torch.randn(2, LENGTH, 1, generator=torch.Generator().manual_seed(2))
    stock = _build(words)(tokens, positions, hidden)
    none = ("--position-embedding-type", "none", "--spec", "harness.reference_attention", "gpt")
    found = {}
    for name, settings in METHODS.items():
        os.environ[SETTINGS] = json.dumps({"name": name, "window": WINDOW, **settings})
        results = []
        for model in (_ours(words, name=name, **settings), _build([*words, *none])):
            logits = model(tokens, positions, hidden)
            loss = (logits.sigmoid() * weight).sum()
            results.append((logits, torch.autograd.grad(loss, list(model.parameters()))))
        (ours, our_grads), (wanted, grads) = results
        found[name] = {
            "logits": _distance(ours, wanted),
            "gradients": _relative(our_grads, grads),
            "without it": _distance(ours, stock),
        }
    return found


def _relative(grads: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    pairs = zip(grads, wanted, strict=True)
    return max(_distance(a, b) / float(b.abs().max()) for a, b in pairs)


@torch.no_grad()
def _measure_cache(words: Sequence[str]) -> dict[str, float]:
    """Prefill, steps of one token and a step of several, against the whole text at once."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.utils import InferenceMode

    model = _ours(words, name="self-extend", **METHODS["self-extend"])
    tokens, positions = _tokens(2)
    whole = model(tokens, positions, None)
    context = StaticInferenceContext(2, LENGTH)
    distances: dict[str, float] = {"logits": float(whole.abs().max())}
    begin = 0
    for name, size in [("prefill", 25), *[("steps", 1)] * 10, ("chunk", 5)]:
        part = slice(begin, begin + size)
        with InferenceMode.active():
            if begin:
                context.enable_decode_mode()
            logits = model(
                tokens[:, part], positions[:, part], None,
                inference_context=context, runtime_gather_output=True,
            )  # fmt: skip
        begin = context.sequence_len_offset = begin + size
        last = whole[:, begin - logits.shape[1] : begin]
        distances[name] = max(distances.get(name, 0.0), _distance(logits, last))
    return distances


def _measure_packed(words: Sequence[str]) -> dict[str, float]:
    """Documents one behind the other, against each alone: logits, and gradients of all weights."""
    from megatron.core.packed_seq_params import PackedSeqParams

    model = _ours(words, name="self-extend", **METHODS["self-extend"])
    tokens, positions = _tokens(1)
    cuts = torch.tensor([0, 1, 17, 40], dtype=torch.int32)
    longest = int(cuts.diff().max())
    packed = PackedSeqParams("thd", cuts, cuts, max_seqlen_q=longest, max_seqlen_kv=longest)
    weight = torch.randn(1, LENGTH, 1, generator=torch.Generator().manual_seed(2))

    def run(parts: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = torch.cat(parts, 1)
        grads = torch.autograd.grad((logits.sigmoid() * weight).sum(), list(model.parameters()))
        return logits, list(grads)

    ours, our_grads = run([model(tokens, positions, None, packed_seq_params=packed)])
    bounds = list(zip(cuts.tolist(), cuts.tolist()[1:], strict=False))
    loop, loop_grads = run([model(tokens[:, a:b], positions[:, : b - a], None) for a, b in bounds])
    unpacked = model(tokens, positions, None)
    return {
        "logits": _distance(ours, loop),
        "gradients": _relative(our_grads, loop_grads),
        "without packing": _distance(ours, unpacked),
    }


@torch.no_grad()
def _measure_rotations(words: Sequence[str]) -> dict[str, float]:
    """One layer's attention, against masks over what upstream rotates itself."""
    variants = {
        "halves": (),
        "interleaved": ("--rotary-interleaved",),
        "half of a head": ("--rotary-percent", "0.5"),
        "scaled": ("--use-rope-scaling", "--rotary-base", "500000"),
        "interpolated": ("--rotary-seq-len-interpolation-factor", "4"),
    }
    return {name: _rotation_distance(_ours(words, *more)) for name, more in variants.items()}


def _rotation_distance(model: Any) -> float:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    embedding, attention = model.rotary_pos_emb, model.decoder.layers[0].self_attention
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(LENGTH, 2, attention.config.hidden_size, generator=generator)
    ours, _ = attention(hidden, attention_mask=None, rotary_pos_emb=embedding(LENGTH))

    def rotated(x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return apply_rotary_pos_emb(x, emb, config=attention.config)

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        return torch.einsum("mbhd,nbhd->bhmn", q, k) * q.shape[-1] ** -0.5

    q, k, v = attention.get_query_key_value_tensors(hidden, None)
    near = scores(rotated(q, embedding(LENGTH)), rotated(k, embedding(LENGTH)))
    far = scores(rotated(q, embedding.get_emb(1, offset=WINDOW).expand(LENGTH, 1, 1, -1)), k)
    distance = torch.arange(LENGTH).unsqueeze(1) - torch.arange(LENGTH)
    score = torch.where(distance >= WINDOW, far, near).masked_fill(distance < 0, -torch.inf)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    out = torch.einsum("bhmn,nbhd->mbhd", score.softmax(-1), values)
    wanted, _ = attention.linear_proj(out.flatten(2))
    return _distance(ours, wanted) / float(wanted.abs().max())


@torch.no_grad()
def _measure_hybrid(words: Sequence[str]) -> dict[str, Any]:
    """A hybrid model of attention and MLP layers, against the GPT model with its weights."""
    from flagattention.mcore import bind
    from flagattention.nlpe import Method

    def build(pattern: str) -> Any:
        more = ("--hybrid-layer-pattern", pattern, "--spec", "flagattention.mcore", "hybrid")
        where = words.index("--num-layers")
        return _build([*words[:where], *words[where + 2 :], *more], "hybrid")

    ours, hybrid = _ours(words), build("*-" * 4)
    bind([hybrid], Method("rerope", WINDOW))
    weights = {}
    for name, weight in ours.state_dict().items():
        if found := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
            part = 2 * int(found[1]) + ("mlp" in found[2])
            weights[f"decoder.layers.{part}.{found[2]}"] = weight
        else:
            weights[name.replace("final_layernorm", "final_norm")] = weight
    hybrid.load_state_dict(weights)
    tokens, positions = _tokens(2)
    return {
        "distance": _distance(ours(tokens, positions, None), hybrid(tokens, positions, None)),
        "mamba": _error(build, "M*-"),
    }


@torch.no_grad()
def _measure_refused(words: Sequence[str]) -> dict[str, str]:
    """The errors of a model that is not what it should be, or is used as it must not."""
    from megatron.core.transformer.enums import AttnMaskType

    from flagattention.mcore import bind
    from flagattention.nlpe import Method

    method = Method("rerope", WINDOW)
    tokens = _tokens(1)
    stock = _build(words)
    half = _ours(words)
    half.decoder.layers[1].self_attention.core_attention = stock.decoder.layers[
        1
    ].self_attention.core_attention
    spec = ("--spec", "flagattention.mcore", "gpt")
    unbound = _build([*words, *spec])
    ours = _ours(words)

    class Dynamic:
        def is_dynamic_batching(self) -> bool:
            return True

    attention = ours.decoder.layers[0].self_attention
    core, x = attention.core_attention, torch.zeros(4, 1, 2, 8)
    no_rope = ("--position-embedding-type", "learned_absolute")
    return {
        "stock": _error(bind, [stock], method),
        "half": _error(bind, [half], method),
        "unbound": _error(unbound, *tokens, None),
        "dynamic": _error(attention, x, attention_mask=None, inference_context=Dynamic()),
        "bias": _error(core, x, x, x, None, attention_bias=x),
        "mask": _error(core, x, x, x, None, attn_mask_type=AttnMaskType.no_mask),
        "no rope": _error(_build, [*words, *no_rope, *spec]),
        "no rope, bound": _error(bind, [_build([*words, *no_rope])], method),
        "dropout": _error(_build, [*words, *spec, "--attention-dropout", "0.1"]),
    }


def _measure_experts(words: Sequence[str]) -> dict[str, int]:
    """A model whose layers upstream describes one by one."""
    model = _ours(words, "--num-experts", "2", "--moe-layer-freq", "[0,1,0,1]")
    kinds = [type(layer.mlp).__name__ for layer in model.decoder.layers]
    cores = [layer.self_attention.core_attention for layer in model.decoder.layers]
    return {
        "kinds": len(set(kinds)),
        "ours": sum(type(core).__name__ == "PiecewiseCoreAttention" for core in cores),
    }


def _measure_state(words: Sequence[str]) -> dict[str, bool]:
    """What checkpoints would hold."""
    stock, ours = _build(words), _ours(words)
    kept = [{key: _shape(x) for key, x in model.state_dict().items()} for model in (stock, ours)]
    sharded = [model.sharded_state_dict() for model in (stock, ours)]
    return {"same": kept[0] == kept[1], "same sharded": sharded[0].keys() == sharded[1].keys()}


def _shape(x: Any) -> list[int] | None:
    return None if x is None else list(x.shape)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
