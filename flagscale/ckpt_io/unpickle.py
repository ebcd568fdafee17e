"""The only unpickling in the project: a machine that builds data and calls nothing it is told to.

Python's own unpickler runs what a pickle names. This one knows the opcodes that torch's pickles
need and a list of names, each with a builder written here; any other name ends the reading. Classes
of megatron and of torch's distributed checkpoints become :class:`Foreign`. A tensor becomes a
:class:`StoredTensor`: its bytes stay in the file.

A hostile pickle can also be merely large. What is built grows no faster than the pickle: copies are
counted, keys of dicts are simple, and the finished tree is neither cyclic, nor deep, nor huge when
written out in full, so that whoever walks it may recurse.

Source: the opcodes are those of Python's ``pickletools``; what torch writes is in
``torch/serialization.py`` and ``torch/_utils.py`` of torch 2.11 to 2.14.
"""

from __future__ import annotations

import struct
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

from flagscale.ckpt_io.allowed import (
    INDEX,
    NAMES,
    Budget,
    Builder,
    Index,
    Storage,
    StorageType,
    TypedStorage,
    set_state,
    simple_key,
)
from flagscale.ckpt_io.values import Foreign, Global
from flagscale.errors import CheckpointError
from flagscale.layout.pieces import DTYPE_BYTES

__all__ = ["MAX_DEPTH", "unpickle"]

MAX_DEPTH: Final = 128
"""Containers inside one another, at most."""

_MAX_EXPANSION: Final = 64
"""Nodes of a tree, counted as often as they are reached, for each byte of its pickle."""

FindStorage = Callable[[str], Storage]


def unpickle(data: bytes, where: str, find_storage: FindStorage | None = None) -> Any:
    """Build the object that a pickle describes.

    Args:
        data: The pickle, of protocol 2 or later, and nothing after it.
        where: File, and what in it, for the error.
        find_storage: Finds the bytes of a tensor by the key that the pickle gives; without it,
            tensors are refused. It may raise :class:`CheckpointError`.

    Raises:
        CheckpointError: The pickle is damaged, or names what is not allowed.
    """
    machine = _Machine(data, where, find_storage)
    try:
        tree = machine.run()
        _verify_extent(tree, max(_MAX_EXPANSION * len(data), 1 << 16))
    except _Refusal as refusal:
        raise CheckpointError(
            "a pickle names what may not be opened",
            where=where,
            expected="plain values, tensors, and the classes that checkpoints of Megatron hold",
            got=refusal.args[0],
            cure="if the file comes from a source you trust, name the class in an issue",
        ) from None
    except _DAMAGE as error:
        raise CheckpointError(
            "a pickle is damaged, or made to do harm",
            where=where,
            got=f"{error or type(error).__name__} (at byte {machine.position} of {len(data)})",
            cure="take another copy of the checkpoint",
        ) from None
    return tree


class _Refusal(Exception):  # noqa: N818  (not an error of ours: it never leaves this module)
    """A name that is not on the list."""


_DAMAGE: Final = (
    AttributeError, IndexError, KeyError, MemoryError, OverflowError, RuntimeError, TypeError,
    ValueError, struct.error,
)  # fmt: skip
"""What a damaged pickle can make the machine raise; ``UnicodeError`` is a ``ValueError``."""


def _shown(text: object) -> str:
    return ascii(str(text))[1:-1][:200]


_MARK: Final = object()


class _Machine:
    """Runs the opcodes of one pickle, over a stack and a memo."""

    def __init__(self, data: bytes, where: str, find_storage: FindStorage | None) -> None:
        self._data = data
        self._where = where
        self._find_storage = find_storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._budget = Budget(2 * len(data) + 4096)
        self.position = 0

    def run(self) -> Any:
        operations = {code: getattr(self, name) for code, name in _OPERATIONS.items()}
        data, stop = self._data, len(self._data)
        if data[:1] != b"\x80":
            raise ValueError("not a pickle of protocol 2 or later")
        while self.position < stop:
            code = data[self.position]
            self.position += 1
            if code == _STOP:
                return self._finished()
            operation = operations.get(code)
            if operation is None:
                raise ValueError(f"the operation {code:#04x}, which no checkpoint needs")
            operation()
        raise ValueError("it ends before its end")

    def _finished(self) -> Any:
        if self.position != len(self._data):
            raise ValueError("bytes after its end")
        tree = self._stack.pop()
        if self._stack or tree is _MARK:
            raise ValueError("values that are not used")
        return tree

    def _take(self, count: int) -> bytes:
        start = self.position
        if count > len(self._data) - start:
            raise ValueError("it ends before its end")
        self.position = start + count
        return self._data[start : self.position]

    def _unsigned(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _line(self) -> str:
        end = self._data.index(b"\n", self.position, self.position + 512)
        line = self._take(end - self.position)
        self.position += 1
        return line.decode("ascii")

    def _pop_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a list without a beginning")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    # Values.

    def proto(self) -> None:
        if not 2 <= self._unsigned(1) <= 5:
            raise ValueError("an unknown protocol")

    def frame(self) -> None:
        if self._unsigned(8) > len(self._data) - self.position:
            raise ValueError("it ends before its end")

    def mark(self) -> None:
        self._stack.append(_MARK)

    def none(self) -> None:
        self._stack.append(None)

    def true(self) -> None:
        self._stack.append(True)

    def false(self) -> None:
        self._stack.append(False)

    def int1(self) -> None:
        self._stack.append(self._unsigned(1))

    def int2(self) -> None:
        self._stack.append(self._unsigned(2))

    def int4(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def long1(self) -> None:
        self._stack.append(int.from_bytes(self._take(self._unsigned(1)), "little", signed=True))

    def float8(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def text1(self) -> None:
        self._stack.append(self._take(self._unsigned(1)).decode())

    def text4(self) -> None:
        self._stack.append(self._take(self._unsigned(4)).decode())

    def bytes1(self) -> None:
        self._stack.append(self._take(self._unsigned(1)))

    def bytes4(self) -> None:
        self._stack.append(self._take(self._unsigned(4)))

    def bytes8(self) -> None:
        self._stack.append(self._take(self._unsigned(8)))

    # Containers.

    def empty_tuple(self) -> None:
        self._stack.append(())

    def empty_list(self) -> None:
        self._stack.append([])

    def empty_dict(self) -> None:
        self._stack.append({})

    def empty_set(self) -> None:
        self._stack.append(set())

    def tuple_marked(self) -> None:
        self._stack.append(tuple(self._pop_mark()))

    def _tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) < count:
            raise IndexError("a tuple of values that are not there")
        self._stack[-count:] = [items]

    def tuple1(self) -> None:
        self._tuple(1)

    def tuple2(self) -> None:
        self._tuple(2)

    def tuple3(self) -> None:
        self._tuple(3)

    def append(self) -> None:
        value = self._stack.pop()
        self._top(list).append(value)

    def appends(self) -> None:
        items = self._pop_mark()
        self._top(list).extend(items)

    def _top(self, *kinds: type) -> Any:
        if type(self._stack[-1]) not in kinds:
            raise TypeError(f"a {type(self._stack[-1]).__name__} for a {kinds[0].__name__}")
        return self._stack[-1]

    def setitem(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        self._top(dict, OrderedDict)[simple_key(key)] = value

    def setitems(self) -> None:
        items = self._pop_mark()
        if len(items) % 2:
            raise ValueError("a key without a value")
        target = self._top(dict, OrderedDict)
        for at in range(0, len(items), 2):
            target[simple_key(items[at])] = items[at + 1]

    def additems(self) -> None:
        items = self._pop_mark()
        self._top(set).update(simple_key(item) for item in items)

    def frozenset_marked(self) -> None:
        self._stack.append(frozenset(simple_key(item) for item in self._pop_mark()))

    # The memo.

    def get1(self) -> None:
        self._stack.append(self._memo[self._unsigned(1)])

    def get4(self) -> None:
        self._stack.append(self._memo[self._unsigned(4)])

    def put1(self) -> None:
        self._memo[self._unsigned(1)] = self._remembered()

    def put4(self) -> None:
        self._memo[self._unsigned(4)] = self._remembered()

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._remembered()

    def _remembered(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a list without a beginning")
        return self._stack[-1]

    # Names and objects.

    def global_lines(self) -> None:
        module = self._line()
        self._stack.append(_named(module, self._line()))

    def global_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(name) is not str:
            raise TypeError("a class whose name is not text")
        self._stack.append(_named(module, name))

    def reduce(self) -> None:
        function, args = self._function_and_args()
        if isinstance(function, Global):
            self._stack.append(Foreign(function.module, function.qualname, args))
        elif isinstance(function, Builder) and function.call is not None:
            self._stack.append(function.call(self._budget, *args))
        else:
            raise TypeError("a call of what cannot be called")

    def newobj(self) -> None:
        kind, args = self._function_and_args()
        if isinstance(kind, Global):
            make = Index if kind == INDEX else Foreign
            self._stack.append(make(kind.module, kind.qualname, args, None, True))
        elif isinstance(kind, Builder) and kind.new is not None:
            self._stack.append(kind.new(self._budget, *args))
        else:
            raise TypeError("an object of what is not a class")

    def _function_and_args(self) -> tuple[Any, tuple[Any, ...]]:
        args, function = self._stack.pop(), self._stack.pop()
        if type(args) is not tuple or _MARK in map(_identity, args):
            raise TypeError("arguments that are not a tuple")
        return function, args

    def build(self) -> None:
        state = self._stack.pop()
        set_state(self._budget, self._stack[-1], state)

    def persistent(self) -> None:
        tag, kind, key, _location, numel = self._stack.pop()
        if tag != "storage" or type(kind) is not StorageType or type(key) is not str:
            raise TypeError("a reference to what is not a tensor's storage")
        if self._find_storage is None:
            raise ValueError("a tensor where none belongs")
        storage = self._find_storage(key)
        itemsize = 1 if kind.dtype is None else DTYPE_BYTES[kind.dtype]
        if storage.nbytes != itemsize * numel:
            raise ValueError(
                f"{_shown(numel)} elements of {itemsize} bytes for a storage that holds"
                f" {storage.nbytes} bytes (storage {_shown(key)})"
            )
        self._stack.append(TypedStorage(storage, kind.dtype))


def _identity(value: Any) -> Any:
    return value if value is _MARK else None


def _named(module: str, name: str) -> Any:
    try:
        return NAMES[module, name]
    except KeyError:
        raise _Refusal(_shown(f"{module}.{name}")) from None


_STOP: Final = ord(".")
_OPERATIONS: Final = {
    0x80: "proto", 0x95: "frame", 0x28: "mark",
    0x4E: "none", 0x88: "true", 0x89: "false",
    0x4B: "int1", 0x4D: "int2", 0x4A: "int4", 0x8A: "long1", 0x47: "float8",
    0x8C: "text1", 0x58: "text4", 0x43: "bytes1", 0x42: "bytes4", 0x8E: "bytes8",
    0x29: "empty_tuple", 0x5D: "empty_list", 0x7D: "empty_dict", 0x8F: "empty_set",
    0x74: "tuple_marked", 0x85: "tuple1", 0x86: "tuple2", 0x87: "tuple3",
    0x61: "append", 0x65: "appends", 0x73: "setitem", 0x75: "setitems",
    0x90: "additems", 0x91: "frozenset_marked",
    0x68: "get1", 0x6A: "get4", 0x71: "put1", 0x72: "put4", 0x94: "memoize",
    0x63: "global_lines", 0x93: "global_stack",
    0x52: "reduce", 0x81: "newobj", 0x62: "build", 0x51: "persistent",
}  # fmt: skip


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        yield from (key for key in node if type(key) is Index)
        yield from node.values()
        yield from getattr(node, "__dict__", {}).values()
    elif isinstance(node, Foreign):
        yield node.args
        yield node.state
    elif isinstance(node, (Namespace, types.SimpleNamespace)):
        yield from vars(node).values()
    else:
        yield from node


_CONTAINERS: Final = (
    dict, list, tuple, set, frozenset, Foreign, Namespace, types.SimpleNamespace,
)  # fmt: skip


def _verify_extent(tree: Any, limit: int) -> None:
    """Refuse a tree that contains itself, is deep, or is huge when written out in full."""
    sizes: dict[int, int | None] = {}  # None while the node is being looked at
    path: list[tuple[int, Any, int]] = []
    node: Any = (tree,)
    path.append((id(node), iter(node), 1))
    while path:
        identity, children, size = path.pop()
        for child in children:
            if not isinstance(child, _CONTAINERS):
                if type(child) in _INTERNAL or child is _MARK:
                    raise TypeError("a value that is no data")
                size += 1
                continue
            known = sizes.get(id(child), 0)
            if known is None:
                raise ValueError("an object that contains itself")
            if known:
                size += known
                continue
            if len(path) >= MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} objects inside one another")
            path.append((identity, children, size))
            sizes[id(child)] = None
            path.append((id(child), iter(_children(child)), 1))
            break
        else:
            sizes[identity] = size
            if path:
                above, rest, so_far = path.pop()
                path.append((above, rest, so_far + size))
        if size > limit:
            raise ValueError("a small file that stands for a huge tree")


_INTERNAL: Final = (TypedStorage, StorageType, Builder)
