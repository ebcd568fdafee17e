"""Trains a tiny model of a family, converts it, and lets transformers judge the result."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flagscale.ckpt_convert.proof.claim import Proof, prove
from flagscale.ckpt_convert.to_hf import Export, plan_export
from flagscale.ckpt_copy.run import run
from flagscale.optim.opening import open_source
from harness import train
from harness.corpus import VOCAB_SIZE
from harness.families import megatron_words

__all__ = ["LAYOUTS", "Judged", "convert", "judge", "train_family", "write_tokenizer"]

LAYOUTS = {
    "TP1": (1, ()),
    "TP2": (2, ("--tensor-model-parallel-size", "2")),
    "TP2xPP2": (
        4,
        ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    ),
    "EP2": (2, ("--expert-model-parallel-size", "2")),
    "EP2xPP2": (
        4,
        ("--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    ),
}
"""By name: ranks, and the arguments that spread a model over them."""


_END = "<|end|>"


@dataclass(frozen=True)
class Judged:
    """What transformers made of a converted model.

    Args:
        architecture: The class it was loaded as.
        text: That it generated.
        complaints: What was logged or warned of meanwhile; best empty.
        misfits: Names of weights that were missing, unexpected or of another shape.
    """

    architecture: str
    text: str
    complaints: tuple[str, ...]
    misfits: tuple[str, ...]


def train_family(
    family: str, layout: str, corpus: Path, work: Path, *more: object, iterations: int = 3
) -> Path:
    """Train a few steps with the real entry; returns the checkpoint's directory."""
    nproc, words = LAYOUTS[layout]
    save = work / "checkpoints"
    argv = [
        *megatron_words(family), *words, *more, "--data-path", corpus, "--save", save,
        "--save-interval", iterations, "--train-iters", iterations,
    ]  # fmt: skip
    if layout.startswith("TP2") and "--num-experts" in argv:
        argv.append("--sequence-parallel")  # upstream asks for it with experts
    train(argv, work / "train", nproc, timeout_s=300).require_success()
    return save


def write_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A tokenizer of single bytes, of which it knows as many as there is room for.

    Byte-level, as whatever class transformers chooses by the type of the model can read it.
    """
    alphabet = sorted(ByteLevel.alphabet())[: vocab_size - 1]
    model = Tokenizer(BPE({symbol: token for token, symbol in enumerate(alphabet)}, []))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=_END, pad_token=_END)
    tokenizer.save_pretrained(directory)
    return directory


def convert(
    checkpoint: Path, hf_dir: Path, level: str = "logits", **options: object
) -> tuple[Export, Proof]:
    """Export a checkpoint with its proof, as the program does."""
    export = plan_export(open_source(checkpoint, weights_only=True), **options)  # type: ignore[arg-type]
    proofs: list[Proof] = []
    run(
        export.copy,
        hf_dir,
        tracker=None,
        prove=lambda staged: proofs.append(prove(export.claim(staged), level)),  # type: ignore[arg-type]
        workers=1,
    )
    return export, proofs[0]


def judge(hf_dir: Path) -> Judged:
    """Load a model as any user does, and generate from it."""
    with _complaints() as complaints:
        model, told = AutoModelForCausalLM.from_pretrained(
            hf_dir, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
        prompt = tokenizer("What did the model", return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(ids[0])
    misfits = [str(name) for names in told.values() for name in names]
    return Judged(type(model).__name__, text, tuple(complaints), tuple(misfits))


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collects what transformers logs from WARNING on, and warnings of any library."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler, logger = Handler(logging.WARNING), logging.getLogger("transformers")
    verbosity = transformers.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield told
        told += [str(warning.message) for warning in caught]
    finally:
        logger.removeHandler(handler)
        transformers.logging.set_verbosity(verbosity)
