"""The proof that two directories hold the same model: the logits of the two real models.

megatron-core's own model runs on the Megatron checkpoint, transformers' own on the Hugging Face
directory, on a CPU, one after the other and each in a process of its own, on the same tokens.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from flagscale.ckpt_convert.proof.forward import DTYPES, Array, Request, run
from flagscale.ckpt_io.location import find_iteration
from flagscale.errors import CheckpointError, ConfigError

__all__ = [
    "GATE",
    "Parity",
    "compare",
    "first_departure",
    "fits_in_memory",
    "free_memory",
    "measure",
    "tokens",
]

GATE: Final = 1e-4
"""In fp32, of the range of the logits."""

_TIE: Final = 1e-6
_TEXT: Final = (
    "A checkpoint is only as good as what can be done with it afterwards. In 2023 the model had "
    "read 2.0 trillion tokens, and nobody could say which of them it had forgotten.\n"
    "训练结束之后，模型要能在别处继续使用：同样的词，同样的概率，一个也不能少。\n"
    "def area(radius):\n    return 3.14159 * radius ** 2  # in square metres\n"
)


@dataclass(frozen=True)
class Parity:
    """How far the two models agree.

    Args:
        dtype: In which both computed; only ``float32`` is a gate.
        positions: At which logits were compared.
        vocab_size: Logits at each position, without those of padding.
        max_abs_difference: Of two logits.
        logit_range: From the smallest to the largest logit of Megatron's model.
        top1_agreement: Share of the positions at which both models put the same token first.
        ties: Positions counted as agreeing though the first tokens differ: in both models the two
            tokens are less than a millionth of the range apart, so that rounding decides.
        departs: Where in the model the two first differ; ``None`` if it was not looked for.
    """

    dtype: str
    positions: int
    vocab_size: int
    max_abs_difference: float
    logit_range: float
    top1_agreement: float
    ties: int
    departs: str | None = None

    @property
    def relative(self) -> float:
        """The largest difference as a share of the range."""
        if not self.max_abs_difference:
            return 0.0
        return self.max_abs_difference / self.logit_range if self.logit_range else float("inf")

    @property
    def passed(self) -> bool:
        """Whether they are the same model; bf16 is reported, and never refused.

        In bf16 the two round in other places: a norm multiplies by its weight before or after.
        """
        if self.dtype != "float32":
            return True
        return self.relative <= GATE and self.top1_agreement == 1.0  # false of NaN

    def report(self) -> tuple[str, ...]:
        """A short table, line by line."""
        gate = f"gate {GATE:.0e}" if self.dtype == "float32" else "reported only"
        tied = f", {self.ties} by rounding" if self.ties else ""
        rows = [
            ("logits", f"{self.positions} positions x {self.vocab_size} tokens, {self.dtype}"),
            ("max |difference|", f"{self.max_abs_difference:.3g}"),
            ("of the logit range", f"{self.relative:.3g} of {self.logit_range:.4g} ({gate})"),
            ("same first token", f"{self.top1_agreement:.2%} of the positions{tied}"),
            ("result", "the same model" if self.passed else "NOT the same model"),
        ]
        if self.departs:
            rows.append(("first departs in", self.departs))
        return tuple(f"{label:<20}{value}" for label, value in rows)


def compare(
    source_dir: Path,
    iteration: int | None,
    hf_dir: Path,
    *,
    vocab_size: int,
    dtype: str = "float32",
    sequences: int = 2,
    length: int = 64,
    seed: int = 0,
) -> Parity:
    """Run both models on the same tokens, and compare their logits.

    Args:
        source_dir: Megatron checkpoint of any layout, as ``--load`` takes it.
        iteration: The one wanted, counted from 1; ``None``: the last complete one.
        hf_dir: Hugging Face directory.
        vocab_size: Tokens of the true vocabulary; logits of padding are left out.
        dtype: In which the models compute, whatever the type of the weights: ``"float32"`` or
            ``"bfloat16"``.
        sequences: Of tokens; each is a sample of its own.
        length: Of a sequence; fewer where the model has fewer positions. A sliding window that is
            as long has no effect, and so is not compared.
        seed: Of the tokens.

    Raises:
        CheckpointError: One of the two cannot be run; that they differ is a result, not an error.
        ConfigError: ``dtype`` is another.
    """
    if dtype not in DTYPES:
        raise ConfigError(
            "the models are not compared in this type",
            where="dtype",
            expected=" or ".join(DTYPES),
            got=dtype,
        )
    directory = find_iteration(source_dir, iteration)[1]
    length = min(length, _positions(hf_dir, vocab_size))
    ids = tokens(vocab_size, sequences, length, seed=seed, tokenizer_dir=hf_dir)
    ours = Request(str(directory), vocab_size, dtype)
    theirs = Request(str(hf_dir), vocab_size, dtype)
    left = run("megatron_logits", ours, ids)["logits"]
    right = run("transformers_logits", theirs, ids)["logits"]
    if left.shape != right.shape:
        raise CheckpointError(
            "the two models do not have vocabularies of one size",
            where=str(hf_dir),
            expected=f"logits for {vocab_size} tokens",
            got=f"{left.shape[-1]} of Megatron's model, {right.shape[-1]} of transformers'",
        )
    parity = measure(left, right, dtype)
    if parity.passed:
        return parity
    worst = int(np.argmax(np.nan_to_num(np.abs(left - right), nan=np.inf).max(axis=(1, 2))))
    traced = [
        run(module, Request(of.directory, vocab_size, dtype, trace=True), ids[worst : worst + 1])
        for module, of in (("megatron_logits", ours), ("transformers_logits", theirs))
    ]
    return Parity(**{**vars(parity), "departs": first_departure(*traced)})


def measure(left: Array, right: Array, dtype: str) -> Parity:
    """Compare logits.

    Args:
        left: Of Megatron's model, [B, S, V].
        right: Of transformers', the same.
        dtype: In which they were computed.
    """
    reach = float(np.ptp(left))
    first, second = left.argmax(-1), right.argmax(-1)
    differ = first != second
    gaps = [
        np.abs(np.subtract(*(np.take_along_axis(of, at[..., None], -1) for at in (first, second))))
        for of in (left, right)
    ]
    tied = differ & (np.maximum(*gaps)[..., 0] <= _TIE * reach)
    return Parity(
        dtype=dtype,
        positions=differ.size,
        vocab_size=left.shape[-1],
        max_abs_difference=float(np.abs(left - right).max()),
        logit_range=reach,
        top1_agreement=1.0 - float((differ & ~tied).mean()),
        ties=int(tied.sum()),
    )


def first_departure(left: Mapping[str, Array], right: Mapping[str, Array]) -> str:
    """The first place, in the order of the computation, in which two models differ.

    Args:
        left: What Megatron's model gives in each place, and its logits.
        right: The same of transformers'.
    """
    apart = {key: _relative(left[key], right[key]) for key in left if key in right}
    key = next((key for key in apart if not apart[key] <= GATE), None)
    if key is not None:
        return _described(key, apart[key], left, right)
    grown = {key: apart[key] / max(apart[last], _TIE) for last, key in itertools.pairwise(apart)}
    key = max(grown, key=lambda key: grown[key])
    described = _described(key, apart[key], left, right)
    return f"{described} (where it grows most; nowhere by more than {GATE:.0e})"


def _relative(left: Array, right: Array) -> float:
    if left.shape != right.shape:
        return float("inf")
    reach = float(np.ptp(left))
    return float(np.abs(left - right).max()) / reach if reach else float(np.abs(right - left).max())


def _described(
    key: str, relative: float, left: Mapping[str, Array], right: Mapping[str, Array]
) -> str:
    layer, _, place = key.rpartition("/")
    by = f"by {relative:.2g} of its range"
    if not layer:
        return f"{key}, {by}"
    experts = ""
    if place == "mlp" and (routes := left.get(f"{layer}/mlp.experts")) is not None:
        guilty = _guilty_experts(routes, left[key], right[key])
        experts = f" (experts {', '.join(map(str, guilty))})" if guilty else ""
    return f"layer {layer}: {place or 'its output'}{experts}, {by}"


def _guilty_experts(routes: Array, left: Array, right: Array) -> list[int]:
    """The experts that only tokens which differ went to.

    Args:
        routes: [tokens, experts], 1 where a token went to an expert.
        left: [tokens, H].
        right: [tokens, H].
    """
    if left.shape != right.shape:
        return []
    differs = np.abs(left - right).max(axis=1) > GATE * np.ptp(left)
    innocent = routes[~differs].any(axis=0)
    return [int(expert) for expert in np.flatnonzero(routes[differs].any(axis=0) & ~innocent)]


def tokens(
    vocab_size: int,
    sequences: int,
    length: int,
    *,
    seed: int = 0,
    tokenizer_dir: Path | None = None,
) -> Array:
    """Tokens to run models on.

    The first sequence is text, where there is a tokenizer; the others are drawn evenly from the
    whole vocabulary, so that no part of it goes unseen.

    Args:
        vocab_size: Tokens of the true vocabulary.
        sequences: How many.
        length: Of each.
        seed: Of what is drawn.
        tokenizer_dir: May hold ``tokenizer.json``.

    Returns:
        [sequences, length] int64.

    Raises:
        CheckpointError: The tokenizer has tokens that the vocabulary has not, or cannot be read.
    """
    drawn = np.random.default_rng(seed).integers(vocab_size, size=(sequences, length))
    file = None if tokenizer_dir is None else tokenizer_dir / "tokenizer.json"
    if file is not None and file.exists():
        drawn[0] = np.resize(_encoded(file, vocab_size), length)
    return drawn.astype(np.int64)


def _encoded(file: Path, vocab_size: int) -> list[int]:
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(file)).encode(_TEXT, add_special_tokens=False).ids
    except Exception as error:  # the library raises no narrower type
        raise CheckpointError(
            "the tokenizer cannot be read", where=str(file), got=str(error)
        ) from error
    if not ids or max(ids) >= vocab_size:
        raise CheckpointError(
            "the tokenizer does not fit the vocabulary",
            where=str(file),
            expected=f"tokens below {vocab_size}",
            got=f"token {max(ids)}" if ids else "no token of a text",
        )
    return list(ids)


def _positions(hf_dir: Path, vocab_size: int) -> int:
    """Positions that the model has, whose vocabulary must be the true one."""
    file = hf_dir / "config.json"
    try:
        config = json.loads(file.read_text())
        positions, found = int(config["max_position_embeddings"]), int(config["vocab_size"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the configuration of the model cannot be read",
            where=str(file),
            expected="max_position_embeddings and vocab_size",
            got=f"{type(error).__name__}: {error}",
        ) from error
    if found != vocab_size:
        raise CheckpointError(
            "the model does not have the true vocabulary",
            where=f"{file}, vocab_size",
            expected=vocab_size,
            got=found,
        )
    return positions


def fits_in_memory(parameters: int, dtype: str = "float32", *, root: Path = Path("/")) -> bool:
    """Whether either model, one at a time, can be expected to run here.

    Args:
        parameters: Of the model.
        dtype: In which it computes.
        root: Of the file system in which the kernel tells.
    """
    needed = parameters * DTYPES[dtype] * 5 // 4 + (2 << 30)
    return needed <= min(free_memory(root))


def free_memory(root: Path) -> Iterator[int]:
    """Bytes that the machine has left, and that each control group of this process has.

    Args:
        root: Of the file system in which the kernel tells.
    """
    found = re.search(r"MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text())
    yield int(found[1]) << 10 if found else 0
    own, mount = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    path = re.search(r"^0::/(.*)$", own.read_text(), re.MULTILINE) if own.exists() else None
    for name in Path(path[1], "_").parents if path else ():
        group = mount / name
        limit = group / "memory.max"
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            used = int((group / "memory.current").read_text())
            stat = (group / "memory.stat").read_text()
            # The kernel drops what it keeps of files when memory runs short.
            cached = re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE)
            yield int(most) - used + sum(map(int, cached))
