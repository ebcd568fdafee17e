"""The model card: what a Hugging Face model was trained on, and made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import flagscale
from flagscale.ckpt_convert.families import Family
from flagscale.optim.source import Source

__all__ = ["fingerprint", "model_card"]

_HASHED: Final = (".metadata", "metadata.json", "common.pt", "integrity.json")


def model_card(source: Source, family: Family, config: Mapping[str, Any]) -> str:
    """The text of ``README.md``; the same for the same source and configuration."""
    rows = "\n".join(f"| {what} | {value} |" for what, value in _facts(source, config))
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {config['architectures'][0]}, {family.name}\n\n"
        "Converted from a Megatron checkpoint by FlagScale.\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def _facts(source: Source, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    args, at = vars(source.args), source.job.layout
    samples = args.get("consumed_train_samples") or 0
    yield "iteration", f"{source.iteration:,}"
    if samples:
        length = args.get("seq_length") or 0
        yield "trained on", f"{samples * length:,} tokens: {samples:,} samples of {length:,}"
    yield "element type", f"{config['dtype']}; {source.job.model.dtype} in the source"
    yield (
        "layout it was saved at",
        f"TP {at.tp_size} x CP {at.cp_size} x DP {at.dp_size} x PP {at.pp_size}, EP {at.ep_size}; "
        f"{source.ckpt_format}",
    )
    yield (
        "vocabulary",
        f"{config['vocab_size']:,} tokens; {source.job.model.dims.padded_vocab_size:,} rows there",
    )
    yield "FlagScale", flagscale.__version__
    yield "checkpoint version", str(source.common.get("checkpoint_version", "not told"))
    yield "SHA-256 of the source", fingerprint(source)


def fingerprint(source: Source) -> str:
    """SHA-256 of what tells a source from others, without reading its tensors.

    That is its metadata, its manifest of digests where it has one, and the name and size of every
    file.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in source.directory.rglob("*") if path.is_file()):
        name = path.relative_to(source.directory).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        if path.name in _HASHED:
            digest.update(path.read_bytes())
    return digest.hexdigest()
