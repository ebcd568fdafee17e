"""Every family, trained at every layout, converted, and judged by transformers: a table.

Each cell trains a tiny model for three steps by the real entry (megatron.training.pretrain, the
distributed optimizer, bf16), converts the checkpoint, proves it, and lets transformers load it and
generate from it. A cell that is done is kept: a run that was stopped goes on.

Example:
    python bench/convert_families.py --table docs/convert-families.md
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness.conversion import LAYOUTS, convert, judge, train_family, write_tokenizer  # noqa: E402
from harness.corpus import write_corpus  # noqa: E402
from harness.families import FAMILIES  # noqa: E402

_DENSE = ("TP1", "TP2", "TP2xPP2")


def cells() -> list[tuple[str, str]]:
    """Family and layout."""
    return [
        (family, layout)
        for family, words in FAMILIES.items()
        for layout in (LAYOUTS if "--num-experts" in words else _DENSE)
    ]


def check(
    family: str, layout: str, work_dir: Path, corpus: Path, tokenizer: Path
) -> dict[str, Any]:
    """One cell."""
    work = work_dir / f"{family}-{layout}"
    shutil.rmtree(work, ignore_errors=True)
    begun = time.perf_counter()
    checkpoint = train_family(family, layout, corpus, work)
    export, proof = convert(checkpoint, work / "hf", tokenizer=tokenizer)
    judged = judge(work / "hf")
    shutil.rmtree(work)
    parities = {parity.dtype: parity for parity in proof.parities}
    return {
        "family": family,
        "layout": layout,
        "as": export.family.name,
        "architecture": judged.architecture,
        "tensors": proof.tensors,
        "fp32": parities["float32"].relative,
        "fp32_top1": parities["float32"].top1_agreement,
        "bf16": parities["bfloat16"].relative,
        "bf16_top1": parities["bfloat16"].top1_agreement,
        "text": judged.text,
        "problems": [*judged.complaints, *judged.misfits],
        "seconds": time.perf_counter() - begun,
    }


def table(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The results as a page."""
    lines = [
        "# Families that were converted",
        "",
        "Written by `python bench/convert_families.py --table docs/convert-families.md`. Each",
        "model",
        "was trained for three steps by the real entry in bf16 with the distributed optimizer,",
        "converted, loaded by transformers without a warning, and generated text. *fp32*, *bf16*:",
        "the largest difference of two logits, megatron-core's and transformers', as a share of",
        "their range (gate in fp32: 1e-4), and the share of positions with the same first token.",
        "",
        "| family | layout | loaded as | tensors, bit-equal | fp32 | bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for (family, layout), row in results.items():
        told = f"{row['tensors']}" if not row["problems"] else f"**{row['problems'][0]}**"
        if "fp32" in row:
            fp32 = f"{row['fp32']:.1e}, {row['fp32_top1']:.0%}"
            bf16 = f"{row['bf16']:.1e}, {row['bf16_top1']:.1%}"
            loaded = row["architecture"]
        else:
            fp32 = bf16 = loaded = "-"
        lines.append(f"| {family} | {layout} | {loaded} | {told} | {fp32} | {bf16} |")
    failed = sum(bool(row["problems"]) for row in results.values())
    return "\n".join([*lines, "", f"{len(results)} cells, {failed} failed.", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet; returns 1 if any cell failed."""
    parser = argparse.ArgumentParser(description="Convert every family from every layout.")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs" / "convert-families")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", choices=FAMILIES)
    parser.add_argument("--table", type=Path, help="write the results there")
    parser.add_argument("--fresh", action="store_true", help="forget what is done")
    arguments = parser.parse_args(argv)
    work_dir = arguments.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    corpus, file = work_dir / "text_document", work_dir / "results.jsonl"
    if not corpus.with_suffix(".idx").exists():
        write_corpus(corpus)
    tokenizer = write_tokenizer(work_dir / "tokenizer")
    if arguments.fresh:
        file.unlink(missing_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    done = {(row["family"], row["layout"]): row for row in map(json.loads, lines)}
    done = {cell: row for cell, row in done.items() if not row["problems"]}
    wanted = [cell for cell in cells() if not arguments.only or cell[0] in arguments.only]
    for number, (family, layout) in enumerate(wanted, 1):
        if (family, layout) in done:
            continue
        try:
            row = check(family, layout, work_dir, corpus, tokenizer)
        except Exception as error:  # a cell that fails must not end the others
            row = {
                "family": family,
                "layout": layout,
                "tensors": 0,
                "problems": [str(error)[:2000]],
            }
        done[family, layout] = row
        with file.open("a") as results:
            results.write(json.dumps(row) + "\n")
        told = row["problems"] or f"fp32 {row['fp32']:.1e}, {row['seconds']:.0f} s, {row['text']}"
        print(f"[{number}/{len(wanted)}] {family} {layout}: {told}", flush=True)
    ordered = {cell: done[cell] for cell in wanted if cell in done}
    if arguments.table:
        arguments.table.write_text(table(ordered), encoding="utf-8")
    return 1 if any(row["problems"] for row in ordered.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
