r"""Write a Megatron checkpoint as a Hugging Face model: files to files, and the proof of it.

Examples:
    python tools/convert_to_hf.py --load-dir ckpt --save-dir aquila2-34b --dry-run
    python tools/convert_to_hf.py --load-dir ckpt --save-dir aquila2-34b --tokenizer data/tokenizer
    python tools/convert_to_hf.py --load-dir ckpt --check aquila2-34b

No GPU and no process group are needed. The source, of any layout and format, is only read. A run
that was stopped goes on where it was when it is started again. Nothing is published before what was
written is proved: every tensor bit-equal to what it came from and, where the model fits in memory,
the logits of transformers equal to those of megatron-core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.console import (
    add_copy_arguments,
    exit_code,
    progress,
    refuse_inside,
)

if TYPE_CHECKING:
    from flagscale.ckpt_convert.to_hf import Export


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description="Write a Megatron checkpoint as a Hugging Face model, and prove it.",
    )
    add = parser.add_argument
    add("--load-dir", type=Path, required=True, help="the checkpoint, as for --load")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--save-dir", type=Path, help="the directory of the model; not there yet")
    where.add_argument("--check", type=Path, metavar="DIR", help="prove a model that is there")
    add("--iteration", type=int, help="of the source (default: the last complete one)")
    add("--family", default="auto", help="of the model (default: by its features)")
    add("--architectures", help="another name for the model class, such as AquilaForCausalLM")
    add("--dtype", choices=("bf16", "fp16", "fp32", "as-saved"), default="as-saved")
    add("--max-shard-size", default="5GB", help="of a file (default: %(default)s)")
    add("--tokenizer", type=Path, metavar="DIR", help="default: the one it was trained with")
    add(
        "--like",
        type=Path,
        metavar="DIR",
        help="a Hugging Face model to take from what a checkpoint does not know: the rest of "
        "config.json, generation_config.json, the tokenizer",
    )
    add(
        "--verify",
        choices=("auto", "logits", "weights", "none"),
        default="auto",
        help="logits, and weights, where the model fits in memory; else weights (default: auto)",
    )
    add(
        "--with-optimizer",
        action="store_true",
        help="write the optimizer's states too, as safetensors in optimizer/",
    )
    add_copy_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = parse_arguments(argv)
    return exit_code(lambda: _convert(arguments))


def _convert(arguments: argparse.Namespace) -> int:
    from flagscale.ckpt_convert.to_hf import plan_export
    from flagscale.optim.opening import open_source

    source = open_source(
        arguments.load_dir, arguments.iteration, weights_only=not arguments.with_optimizer
    )
    export = plan_export(
        source,
        family=arguments.family,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        tokenizer=arguments.tokenizer,
        like=arguments.like,
        architectures=arguments.architectures,
        with_optimizer=arguments.with_optimizer,
    )
    print("\n".join(_described(export, arguments)))
    if arguments.check is None:
        refuse_inside(source.directory, arguments.save_dir)
    if arguments.dry_run:
        return 0
    return _check(export, arguments) if arguments.check else _write(export, arguments)


def _check(export: Export, arguments: argparse.Namespace) -> int:
    from flagscale.ckpt_convert.program import proved

    place, level = arguments.check, arguments.verify
    with progress("checking") as on_progress:
        told = [*proved(export.claim(place), export.state_claims(place), level, on_progress)]
    print("\n".join(told))
    return 0


def _write(export: Export, arguments: argparse.Namespace) -> int:
    from flagscale.ckpt_convert.program import proved, written

    def proof(staged: Path) -> Iterator[str]:
        return proved(export.claim(staged), export.state_claims(staged), arguments.verify)

    print("\n".join(written(export.copy, arguments.save_dir, None, proof, arguments)))
    return 0


def _described(export: Export, arguments: argparse.Namespace) -> Iterator[str]:
    from flagscale.ckpt_copy.run import measure_speed

    source, at = export.source, export.source.job.layout
    total, claim = export.copy.plan.total_bytes, export.claim(arguments.check)
    weights = [file for file in export.files if file.holes]
    sizes = f"TP {at.tp_size} x PP {at.pp_size} x DP {at.dp_size}, EP {at.ep_size}"
    yield f"source            {source.directory}, iteration {source.iteration}"
    yield f"                  {source.ckpt_format}, {sizes}"
    yield f"model             {export.family.name}, {claim.parameters:,} parameters"
    yield f"                  {export.dtype}, {export.shape.vocab_size:,} tokens"
    yield f"target            {arguments.check or arguments.save_dir}"
    yield f"                  {len(export.tensors):,} tensors in {len(weights)} files"
    yield f"read, write       {export.copy.bytes_read:,} and {total:,} bytes"
    for note in export.notes:
        yield f"note              {note}"
    if arguments.dry_run and arguments.save_dir:
        if speed := measure_speed(source.directory, arguments.save_dir):
            yield f"time              about {total / speed:,.0f} s at {speed / 1e9:.2f} GB/s"
        for file in export.files:
            yield f"file              {file.path}, {file.size:,} bytes"


if __name__ == "__main__":
    raise SystemExit(main())
