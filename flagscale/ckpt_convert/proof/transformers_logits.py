"""A program: a forward pass of transformers' own model on the tokens that it is asked about.

Attention is the eager one: its products and its softmax in fp32 are those of Megatron's own local
attention, and no kernel is chosen by the machine. A model with a method for far keys has an
attention of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from flagscale.ckpt_convert import companions, nlpe
from flagscale.ckpt_convert.proof.forward import Array, Request, answer
from flagscale.errors import CheckpointError

__all__ = ["forward"]


def forward(request: Request, tokens: Array) -> Mapping[str, Array]:
    """Logits of the model in a Hugging Face directory, and what was traced.

    Raises:
        CheckpointError: The directory does not hold exactly the tensors of its model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from flagscale.ckpt_convert.proof.trace import trace_transformers

    config = companions.read_json(Path(request.directory) / companions.CONFIG)
    nlpe.register(config)
    model, loaded = AutoModelForCausalLM.from_pretrained(
        request.directory,
        dtype=getattr(torch, request.dtype),
        attn_implementation=None if nlpe.has_method(config) else "eager",
        local_files_only=True,
        output_loading_info=True,
    )
    _verify_loaded(loaded, request.directory)
    model.eval()
    told = trace_transformers(model) if request.trace else {}
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
    return {**told, "logits": logits.float().numpy()}


def _verify_loaded(loaded: Mapping[str, object], directory: str) -> None:
    wrong = {kind: keys for kind, keys in loaded.items() if keys}
    if wrong:
        raise CheckpointError(
            "transformers does not find exactly the tensors of the model",
            where=directory,
            got="; ".join(f"{kind}: {keys!s}"[:500] for kind, keys in wrong.items()),
        )


if __name__ == "__main__":
    raise SystemExit(answer(sys.argv[1:], forward))
