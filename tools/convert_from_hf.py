r"""Write a Hugging Face model as a Megatron checkpoint: files to files, and the proof of it.

Examples:
    python tools/convert_from_hf.py --load-dir Qwen3-8B --save-dir qwen3-8b
    python tools/convert_from_hf.py --load-dir Qwen3-8B --save-dir qwen3-8b-tp8 \
        --target-tensor-parallel-size 8 --make-vocab-size-divisible-by 1 --target-ckpt-format torch

Start a job from it with --load SAVE_DIR --finetune and the model's arguments, which are printed and
written as a section of a recipe. By default the result is torch_dist, which loads at any layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.console import (
    add_copy_arguments,
    add_layout_arguments,
    exit_code,
    refuse_inside,
)

if TYPE_CHECKING:
    from flagscale.ckpt_convert.to_megatron import Import

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "as-saved": None}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description="Write a Hugging Face model as a Megatron checkpoint, and prove it.",
        epilog="Sizes that are left out are 1.",
    )
    add = parser.add_argument
    add("--load-dir", type=Path, required=True, help="the directory of the model")
    add("--save-dir", type=Path, required=True, help="where to write, as for --save")
    add_layout_arguments(parser)
    add("--target-ckpt-format", choices=("torch_dist", "torch"), default="torch_dist")
    add("--dtype", choices=tuple(_DTYPES), default="as-saved")
    add(
        "--transformer-impl",
        choices=("transformer_engine", "local"),
        default="transformer_engine" if find_spec("transformer_engine") else "local",
        help="of the job, as upstream calls it; torch_dist serves either (default here: "
        "%(default)s)",
    )
    add(
        "--make-vocab-size-divisible-by",
        dest="divisible_by",
        type=int,
        default=128,
        help="times the tensor parallel size; the vocabulary is padded with rows of zeros "
        "(default: %(default)s, as upstream's)",
    )
    add("--tokenizer", type=Path, metavar="DIR", help="default: the model's own")
    add("--verify", choices=("auto", "logits", "weights", "none"), default="auto")
    add_copy_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = parse_arguments(argv)
    return exit_code(lambda: _convert(arguments))


def _convert(arguments: argparse.Namespace) -> int:
    from flagscale.ckpt_convert.opening import open_hf
    from flagscale.ckpt_convert.to_megatron import plan_import
    from flagscale.launch.options import known_options
    from flagscale.optim.carry import Request

    refuse_inside(arguments.load_dir, arguments.save_dir)
    told = vars(arguments)
    planned = plan_import(
        open_hf(arguments.load_dir, _DTYPES[arguments.dtype], arguments.transformer_impl),
        Request(**{name: told[name] for name in Request.__annotations__ if name in told}),
        known_options(),
        ckpt_format=arguments.target_ckpt_format,
        divisible_by=arguments.divisible_by,
        tokenizer=arguments.tokenizer,
    )
    print("\n".join(_described(planned, arguments)))
    return 0 if arguments.dry_run else _write(planned, arguments)


def _write(planned: Import, arguments: argparse.Namespace) -> int:
    from flagscale.ckpt_convert.program import proved, written

    def proof(staged: Path) -> Iterator[str]:
        return proved(planned.claim(staged), (), arguments.verify)

    place = arguments.save_dir / "release"
    print("\n".join(written(planned.copy, place, "release", proof, arguments)))
    return 0


def _described(planned: Import, arguments: argparse.Namespace) -> Iterator[str]:
    from flagscale.ckpt_copy.run import measure_speed

    model, at = planned.model, planned.target.job.layout
    total = planned.copy.plan.total_bytes
    yield f"source            {arguments.load_dir}"
    yield f"                  {model.family.name}, {len(model.tensors):,} tensors"
    yield f"target            {arguments.save_dir}"
    yield (
        f"                  {planned.target.ckpt_format}, TP {at.tp_size} x PP {at.pp_size}, "
        f"EP {at.ep_size}, {planned.target.job.model.dtype}"
    )
    padded = planned.target.job.model.dims.padded_vocab_size
    yield f"vocabulary        {model.shape.vocab_size:,} tokens, {padded:,} rows"
    yield f"read, write       {planned.copy.bytes_read:,} and {total:,} bytes"
    if arguments.dry_run and (speed := measure_speed(arguments.load_dir, arguments.save_dir)):
        yield f"time              about {total / speed:,.0f} s at {speed / 1e9:.2f} GB/s"
    yield "arguments         " + " ".join(_words(planned))


def _words(planned: Import) -> Iterator[str]:
    """The model's arguments as a command line has them."""
    for name, value in planned.section.items():
        yield f"--{name}" if value is True else f"--{name} {value}"


if __name__ == "__main__":
    raise SystemExit(main())
