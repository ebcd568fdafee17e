"""One forward pass of a model in a process of its own, and what it is asked and answers.

Megatron's process groups and global variables end with that process, and so does the memory: two
models are never there at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from flagscale.errors import CheckpointError, FlagScaleError
from flagscale.platforms.cpu import CPU

__all__ = ["DTYPES", "Array", "Request", "answer", "run"]

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES: Final = {"float32": 4, "bfloat16": 2}
"""Types that models compute in, and bytes of an element."""

_STDERR_LINES: Final = 15


@dataclass(frozen=True)
class Request:
    """What a process is asked.

    Args:
        directory: Of the model: an iteration of a Megatron checkpoint, or a Hugging Face one.
        vocab_size: Tokens of the true vocabulary; Megatron's may be padded.
        dtype: In which the model computes.
        trace: Whether to tell, besides logits, what the parts of each layer give.
    """

    directory: str
    vocab_size: int
    dtype: str
    trace: bool = False


def run(module: str, request: Request, tokens: Array) -> dict[str, Array]:
    """Ask a module of this package for a forward pass, in a new process.

    Args:
        module: Its name in the package; it is a program that calls :func:`answer`.
        request: What is asked.
        tokens: [B, S] int64.

    Returns:
        ``"logits"``, [B, S, V] float32, and what was traced, by place.

    Raises:
        CheckpointError: The process failed.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-parity-") as scratch:
        given, told = Path(scratch, "tokens.npy"), Path(scratch, "told.npz")
        np.save(given, tokens)
        child = subprocess.run(
            [
                *(sys.executable, "-m", f"{__package__}.{module}"),
                *(json.dumps(asdict(request)), str(given), str(told)),
            ],
            env={
                **CPU.environment,
                **os.environ,
                "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_OFFLINE": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if child.returncode:
            raise CheckpointError(
                "the model could not be run to compare its logits",
                where=request.directory,
                got=_told(child),
                cure="free memory, or verify the weights alone"
                if child.returncode < 0
                else "see above; the weights can be verified without running the model",
            )
        with np.load(told) as arrays:
            return dict(arrays)


def _told(child: subprocess.CompletedProcess[str]) -> str:
    """How a process ended, and its last lines."""
    lines = child.stderr.rstrip().splitlines()[-_STDERR_LINES:]
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return "\n    ".join([how, *lines])


def answer(argv: Sequence[str], forward: Callable[[Request, Array], Mapping[str, Array]]) -> int:
    """The other side of :func:`run`.

    Args:
        argv: As :func:`run` gives it.
        forward: Runs the model.

    Returns:
        An exit code.
    """
    request, given, told = argv
    try:
        arrays = forward(Request(**json.loads(request)), np.load(given))
    except FlagScaleError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    np.savez(told, allow_pickle=False, **arrays)
    return 0
