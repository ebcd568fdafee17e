"""Tokenizers: Aquila's layout of ids, upstream's own view of it, and round trips of any text."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flagscale.data.tokenizer import (
    PAD_TOKEN,
    SPECIAL_TOKENS,
    TokenizerChoice,
    build_tokenizer,
    texts_of,
    train_tokenizer,
)
from flagscale.errors import ConfigError, DataError

VOCAB_SIZE = 320
TEXTS = [
    "The rain in Spain stays mainly in the plain; the train in the rain remains mainly plain.",
    "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。",
] * 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, VOCAB_SIZE, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return build_tokenizer(TokenizerChoice("HuggingFaceTokenizer", str(directory)))


def test_upstream_sees_the_ids_of_aquila(tokenizer: Any) -> None:
    vocabulary = tokenizer.inv_vocab
    assert tokenizer.vocab_size == VOCAB_SIZE == len(vocabulary)
    assert tokenizer.eod == VOCAB_SIZE - 1
    assert tokenizer.bos == VOCAB_SIZE - 2
    assert tokenizer.pad == 0
    assert vocabulary[0] == PAD_TOKEN
    last = range(VOCAB_SIZE - 8, VOCAB_SIZE)
    assert tuple(vocabulary[token] for token in last) == SPECIAL_TOKENS
    assert SPECIAL_TOKENS == (
        "<|startofpiece|>", "<|endofpiece|>", "<|LDWANG|>", "[MASK]", "[gMASK]", "[sMASK]",
        "[CLS]", "</s>",
    )  # fmt: skip


def test_transformers_loads_it_and_no_token_is_added(directory: Path, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(directory)
    assert len(loaded) == VOCAB_SIZE
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("[CLS]", "</s>", PAD_TOKEN)
    assert loaded(TEXTS[0]).input_ids == tokenizer.tokenize(TEXTS[0])


@given(st.text())
@example("</s>")
@example("one[MASK] two<|endoftext|>")
def test_any_text_survives_a_round_trip(tokenizer: Any, text: str) -> None:
    tokens = tokenizer.tokenize(text)
    assert tokenizer.detokenize(tokens) == text
    # Text that spells out a special token gets its id, as from upstream (docs/data.md).
    spells_one = any(special in text for special in (PAD_TOKEN, *SPECIAL_TOKENS))
    ordinary = [0 < token < VOCAB_SIZE - len(SPECIAL_TOKENS) for token in tokens]
    assert all(ordinary) == (not spells_one)


def test_merges_were_learnt(tokenizer: Any) -> None:
    for text in TEXTS[:2]:
        assert len(tokenizer.tokenize(text)) < 0.75 * len(text.encode())


def test_training_twice_gives_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), VOCAB_SIZE, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_too_small_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 265"):
        train_tokenizer(TEXTS, 264, tmp_path / "none")
    train_tokenizer(TEXTS, 265, tmp_path)


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected: +6000\n +got: +\d+ entries"):
        train_tokenizer(TEXTS, 6000, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the output\n.*file"):
        train_tokenizer(TEXTS, VOCAB_SIZE, tmp_path / "file" / "tokenizer")


def test_texts_of_every_kind_of_file(tmp_path: Path) -> None:
    lines = b'{"text": "one"}\n\n{"text": "\xe4\xba\x8c"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "a.txt").write_text("one\n二\n")
    assert list(texts_of(tmp_path / "a.jsonl")) == ["one", "二"]
    assert list(texts_of(tmp_path / "a.jsonl.gz")) == ["one", "二"]
    assert list(texts_of(tmp_path / "bom.jsonl")) == ["one", "二"]
    assert list(texts_of(tmp_path / "a.txt")) == ["one\n", "二\n"]


def test_a_malformed_line_reaches_through_the_trainer(tmp_path: Path) -> None:
    """The trainer is compiled code that calls our generator: the error must come out whole."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": TEXTS[0]}) + "\n{oops\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        train_tokenizer(texts_of(path), VOCAB_SIZE, tmp_path / "none")
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:2"):
        list(texts_of(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("NoSuchTokenizer", "."), "unknown type of tokenizer"),
        (("HuggingFaceTokenizer", "no/such/folder"), "does not exist"),
    ],
)
def test_a_wrong_choice_is_refused(choice: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerChoice(*choice)


def test_what_upstream_cannot_load_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_tokenizer(TokenizerChoice("HuggingFaceTokenizer", str(tmp_path)))
