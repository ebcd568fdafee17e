from __future__ import annotations

import builtins
import enum
import pickle
import pickletools
import signal
import struct
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import RerunDiagnostic, RerunMode, RerunState
from megatron.core.transformer.enums import AttnBackend, InferenceCudaGraphScope
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from flagscale.ckpt_io.allowed import FOREIGN
from flagscale.ckpt_io.pickling import dump_tree
from flagscale.ckpt_io.unpickle import MAX_DEPTH, unpickle
from flagscale.ckpt_io.values import Foreign, TensorSlot
from flagscale.errors import CheckpointError, ConfigError

_SCALARS = (
    st.none() | st.booleans() | st.integers(-(1 << 2000), 1 << 2000) | st.floats(allow_nan=False)
    | st.text() | st.binary(max_size=300) | st.sampled_from([torch.bfloat16, torch.float32])
    | st.sampled_from(list(signal.Signals)) | st.just(torch.device("cuda", 1))
    | st.lists(st.integers(0, 9), max_size=4).map(torch.Size)
)  # fmt: skip
_KEYS = st.text() | st.integers(-9, 9) | st.just((torch.bfloat16, torch.float32))
_TREES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(_KEYS, inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
        | st.dictionaries(st.from_regex("[a-z]+", fullmatch=True), inner).map(
            lambda state: Namespace(**state))
        | st.sets(st.text() | st.integers(-9, 9)) | st.frozensets(st.binary())
    ),
    max_leaves=20,
)  # fmt: skip


@given(_TREES, st.integers(2, 5))
def test_reads_what_python_writes(tree: Any, protocol: int) -> None:
    assert unpickle(pickle.dumps(tree, protocol), "a.pt") == tree


@given(_TREES)
def test_written_again_it_is_the_same(tree: Any) -> None:
    written, leaves = dump_tree(tree)
    assert leaves == ()
    assert pickle.loads(written) == tree
    assert unpickle(written, "a.pt") == tree


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=np.uint32),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.ones((), np.bool_),
        np.float32(1.5),
        np.random.RandomState(3).get_state(),
    ],
    ids=["row", "column", "empty-shape", "scalar", "generator"],
)
def test_numpy(value: Any, protocol: int) -> None:
    got = unpickle(pickle.dumps(value, protocol), "a.pt")
    np.testing.assert_equal(got, value)
    assert type(got) is type(value)


def test_order_and_attributes_of_a_state_dict() -> None:
    module = torch.nn.Linear(2, 2).state_dict()
    state = OrderedDict((name, index) for index, name in enumerate(module))
    vars(state)["_metadata"] = OrderedDict({"": {"version": 1}})
    got = unpickle(pickle.dumps(state, 2), "a.pt")
    assert list(got) == ["weight", "bias"]
    assert got._metadata == {"": {"version": 1}}


_MEGATRON: list[Any] = [
    AttnBackend.auto, InferenceCudaGraphScope.block, ModelType.encoder_or_decoder,
    RerunMode.DISABLED, RerunState.NOT_RUNNING_YET, RerunDiagnostic.CORRECT_RESULT,
]  # fmt: skip


@pytest.mark.parametrize("value", _MEGATRON, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", [2, 4])
def test_enums_of_megatron_survive_unseen(value: enum.Enum, protocol: int) -> None:
    tree = {"args": Namespace(a=value, b=[value, value])}
    read = unpickle(pickle.dumps(tree, protocol), "a.pt")
    kind = type(value)
    stand_in = Foreign(kind.__module__, kind.__qualname__, (value.value,))
    assert read == {"args": Namespace(a=stand_in, b=[stand_in, stand_in])}
    assert pickle.loads(dump_tree(read)[0]) == tree


def test_pipeline_layout_survives_unseen() -> None:
    layout = PipelineParallelLayerLayout("Et|tttL", 2)
    read = unpickle(pickle.dumps(layout, 2), "a.pt")
    assert read.state["input_data"] == "Et|tttL"
    again = pickle.loads(dump_tree(read)[0])
    assert vars(again) == vars(layout)


def test_every_class_on_the_list_exists() -> None:
    for each in FOREIGN:
        if each.module == "pathlib._local":
            continue  # Python 3.13
        module = __import__(each.module, fromlist=["x"])
        if each.qualname not in ("ModelType",):
            assert isinstance(getattr(module, each.qualname), type), each


# What must never run. Each would create a file named in it.


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _calls(path: Path) -> dict[str, bytes]:
    command = f"touch {path}".encode()
    text = _text(command.decode())
    call = b"\x85R."
    code = _text(f"open({str(path)!r}, 'w')")

    class Reduce:
        def __reduce__(self) -> Any:
            return __import__("os").system, (command.decode(),)

    reduced = Reduce()
    return {
        "reduce": b"\x80\x02cos\nsystem\n" + text + call,
        "posix": b"\x80\x02cposix\nsystem\n" + text + call,
        "eval": b"\x80\x02c__builtin__\neval\n" + code + call,
        "builtins": b"\x80\x02cbuiltins\nexec\n" + code + call,
        "stack-global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + call,
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + text + call,
        "dotted-foreign": (
            b"\x80\x04" + _text("megatron.core.transformer.enums") + _text("enum.sys") + b"\x93"
            + text + call
        ),
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cos\npath\n" + _text("sys") + b"tR" + text + call,
        "import": b"\x80\x02cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R.",
        "torch-load": b"\x80\x02ctorch\nload\n" + text + call,
        "inst": b"\x80\x02(" + text + b"ios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\n" + text + b"o.",
        "text-inst": b"(S'" + command + b"'\nios\nsystem\n.",
        "newobj": b"\x80\x02csubprocess\nPopen\n" + text + b"\x85\x81.",
        "newobj-ex": b"\x80\x04csubprocess\nPopen\n" + text + b"\x85}\x92.",
        "build": (
            b"\x80\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb"
            + text + b"b."
        ),
        "extension": b"\x80\x02\x82\x01" + text + call,
        "in-a-list": pickle.dumps([1, {"a": (reduced,)}], 2),
        "in-a-list-4": pickle.dumps([1, {"a": (reduced,)}], 4),
        "as-a-key": pickle.dumps({reduced: 1}, 2),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(_calls(Path("x"))))
def test_hostile_pickles_do_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _calls(tmp_path / "done")[name]
    if name == "reduce":  # that the payload works at all
        pickle.loads(data)
        assert (tmp_path / "done").exists()
        (tmp_path / "done").unlink()

    def no_import(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("something was imported")

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", no_import)
        with pytest.raises(CheckpointError) as caught:
            unpickle(data, "iter_0000001/.metadata")
    assert not (tmp_path / "done").exists()
    assert caught.value.where == "iter_0000001/.metadata"


@pytest.mark.parametrize(
    ("name", "shown"),
    [("reduce", "os.system"), ("eval", "__builtin__.eval"), ("dotted", "torch.os")],
)
def test_refusal_names_the_class(name: str, shown: str) -> None:
    with pytest.raises(CheckpointError, match=shown):
        unpickle(_calls(Path("x"))[name], "a.pt")


_ENDS = "ends before its end"
_HUGE: dict[str, tuple[bytes, str]] = {
    "billion-laughs": (b"\x80\x02(]q\x00" + b"".join(
        b"]q%c(h%ch%ch%ch%ch%ch%ch%ch%ch%ch%ce" % (n + 1, *[n] * 10) for n in range(20)
    ) + b"t.", "stands for a huge tree"),
    "laughing-key": (b"\x80\x02})" + b"q\x00h\x00\x86" * 200 + b"Ns.", "a key that is a tuple"),
    "deep-list": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "inside one another"),
    "deep-tuple": (b"\x80\x02)" + b"\x85" * 100_000 + b".", "inside one another"),
    "deep-state": (b"\x80\x02" + (b"cargparse\nNamespace\n)\x81}" + _text("a")) * 200
                   + b"N" + b"sb" * 200 + b".", "inside one another"),
    "in-itself": (b"\x80\x02]q\x00h\x00a.", "contains itself"),
    "in-itself-by-state": (b"\x80\x02cmegatron.core.enums\nModelType\n)\x81q\x00h\x00b.",
                           "contains itself"),
    "long": (b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 100 + b".", "operation 0x8b"),
    "text": (b"\x80\x02X\xff\xff\xff\xff.", _ENDS),
    "text8": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "operation 0x8d"),
    "bytes8": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", _ENDS),
    "frame": (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", _ENDS),
    "bytearray": (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "operation 0x96"),
    "copies": (b"\x80\x02(c_codecs\nencode\nq\x00" + _text("a" * 10_000) + b"q\x01"
               + _text("latin1") + b"q\x02" + b"h\x00h\x01h\x02\x86R" * 1000 + b"t.",
               "copies more than it holds"),
    "set-copies": (b"\x80\x02(cbuiltins\nset\nq\x00](" + b"K\x01" * 10_000 + b"eq\x01"
                   + b"h\x00h\x01\x85R" * 1000 + b"t.", "copies more than it holds"),
    "array": (b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R"
              b"(K\x01J\xff\xff\xff\x7f\x85cnumpy\ndtype\n" + _text("f8")
              + b"\x85R\x89B\x01\x00\x00\x00atb.", "in 1 bytes"),
    "size": (b"\x80\x02ctorch\nSize\n(" + b"J\xff\xff\xff\x7f" * 1000 + b"t\x85R.", "out of range"),
    "integer-keys": (b"\x80\x02}(" + b"".join(
        b"\x8a\x0b" + (n * ((1 << 61) - 1)).to_bytes(11, "little") + b"N" for n in range(1, 99)
    ) + b"u.", "a key out of range"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(_HUGE))
def test_small_files_that_ask_for_much(name: str) -> None:
    data, message = _HUGE[name]
    with pytest.raises(CheckpointError, match=rf"where: +a\.pt[^$]*{message}"):
        unpickle(data, "a.pt")


def test_a_large_index_into_the_memo_costs_nothing() -> None:
    assert unpickle(b"\x80\x02Nr\xff\xff\xff\xff.", "a.pt") is None


def test_depth_up_to_the_limit() -> None:
    tree: Any = None
    for _ in range(MAX_DEPTH - 1):
        tree = [tree]
    assert unpickle(pickle.dumps(tree, 2), "a.pt") == tree
    with pytest.raises(CheckpointError, match="inside one another"):
        unpickle(pickle.dumps([[tree]], 2), "a.pt")


def test_shared_objects_are_no_laughs() -> None:
    shared = list(range(50))
    tree = [shared] * 100
    read = unpickle(pickle.dumps(tree, 2), "a.pt")
    assert read == tree
    assert read[0] is read[99]


@pytest.mark.parametrize("protocol", [2, 4])
def test_cut_short_anywhere(protocol: int) -> None:
    tree = {"a": [1, 2.5, "x", b"y", (torch.bfloat16,), Namespace(b={3: None})], "n": np.arange(3)}
    data = pickle.dumps(tree, protocol)
    unpickle(data, "a.pt")
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            unpickle(data[:length], "a.pt")
    with pytest.raises(CheckpointError, match="bytes after its end"):
        unpickle(data + b"\0", "a.pt")


@given(st.binary(max_size=200))
def test_noise(data: bytes) -> None:
    for start in (b"", b"\x80\x02", b"\x80\x04"):
        try:
            unpickle(start + data, "a.pt")
        except CheckpointError as error:
            str(error).encode()


@given(st.lists(st.sampled_from([op.code for op in pickletools.opcodes]), max_size=40), st.data())
def test_any_opcodes_in_any_order(codes: list[str], data: st.DataObject) -> None:
    body = "".join(codes).encode("latin1")
    arguments = data.draw(st.binary(max_size=20))
    at = data.draw(st.integers(0, len(body)))
    try:
        unpickle(b"\x80\x02" + body[:at] + arguments + body[at:] + b".", "a.pt")
    except CheckpointError as error:
        str(error).encode()


def test_tensors_need_an_archive() -> None:
    tensor = (
        b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x01tQ"
    )
    with pytest.raises(CheckpointError, match="a tensor where none belongs"):
        unpickle(b"\x80\x02" + tensor + b".", ".metadata")


@pytest.mark.parametrize(
    "value",
    [lambda: 1, object(), np.array([object()]), 1j],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_written(value: Any) -> None:
    if isinstance(value, complex | np.ndarray) or type(value) is object:
        with pytest.raises(CheckpointError):  # ours writes it, and ours refuses it again
            unpickle(dump_tree([value])[0], "a.pt")
    else:
        with pytest.raises(ConfigError, match="cannot be written"):
            dump_tree([value])


def test_one_slot_twice_is_one_tensor() -> None:
    slot = TensorSlot("float32", (2,), "a")
    _, leaves = dump_tree({"x": slot, "y": slot})
    assert [leaf.content for leaf in leaves] == [slot]
