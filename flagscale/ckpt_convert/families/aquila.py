"""Aquila2: Llama's tensors and positions, under a name of its own.

No class in transformers has that name, and ``model_type: aquila`` would ask for code from the
network, so a model is written as Llama. ``--architectures AquilaForCausalLM`` names it for serving
engines, which map it onto their Llama class; transformers loads it as Llama all the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from flagscale.ckpt_convert.families import llama

__all__ = ["FAMILY"]

FAMILY: Final = replace(llama.FAMILY, name="aquila", other_architectures=("AquilaForCausalLM",))
