"""
Reading the values of a pickle without unpickling: a small machine that knows a closed set of opcodes and names.

A pickle is a program. Python's own unpickler runs any that it is given: it imports what the file names, and calls it.
This one does neither. A name is looked up in a table that the caller gives, and what stands there is a function of ours
that makes plain data; a name that is not in the table ends the reading, and the error says it. Attributes are never
set, and no method is called but that of `Unbuilt`, which is ours too.

``pickletools`` cuts the bytes into opcodes: it decodes arguments, and runs nothing.
"""

from __future__ import annotations

import pickletools
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

from ckptman.errors import FormatError, UnsupportedState

MAX_NODES = 50_000_000
"""What a tree may grow to where every shared part is written out: references make small pickles of huge trees."""

MAX_DEPTH = 200

MAX_REPEATED = 32
"""How many values and bytes may be handed to calls, or hashed as keys, for each byte of the pickle, at most."""

_SPARE = 1 << 20


class Make:
    """A function of ours that stands for a global of the file. Only called, with what the file gives as arguments."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)


class Unbuilt(Protocol):
    """What a `Make` may return for an object whose state follows."""

    keys: list[int]

    def built(self, state: object) -> object:
        """The object itself."""


Table = Mapping[str, object]
"""``module.name`` → a `Make`, or the value that the name stands for."""


Value = TypeVar("Value")


def _as_it_is(value: Any) -> Any:
    return value


def read_pickle(
    data: bytes,
    table: Table,
    persistent: Callable[[object], object],
    where: str,
    checked: Callable[[Any], Value] = _as_it_is,
) -> Value:
    """
    The value that the pickle *data* describes.

    Args:
        data: All of it.
        table: The names that it may use.
        persistent: What its persistent ids stand for.
        where: The file, for messages.
        checked: Returns the value if it is what the caller wants; raises TypeError or ValueError if not.

    Raises:
        UnsupportedState: It needs a name that is not in *table*, or an opcode that plain data does not need.
        FormatError: It is damaged.
    """
    machine = _Machine(table, persistent, where, left=MAX_REPEATED * len(data) + _SPARE)
    try:
        value = machine.run(data)
        if _nodes(value, {}, 1) > MAX_NODES:
            raise FormatError("its values are too many to be plausible: it repeats itself on purpose")
        return checked(value)
    except UnsupportedState:
        raise  # it is a TypeError, too
    except _MALFORMED as error:
        raise FormatError(f"{where} is damaged, or no pickle of plain data: {error}") from error


_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, EOFError, struct.error)


def _nodes(value: object, known: dict[int, int | None], depth: int) -> int:
    """How many values a tree has where every shared part is counted in each of its places."""
    if type(value) not in (dict, OrderedDict, list, tuple, set):
        return 1
    if id(value) in known:
        count = known[id(value)]
        if count is None:
            raise FormatError("a value contains itself")
        return count
    if depth > MAX_DEPTH:
        raise FormatError(f"its values are nested more than {MAX_DEPTH} deep")
    known[id(value)] = None
    children = value.values() if isinstance(value, dict) else cast("list[Any]", value)
    known[id(value)] = total = 1 + sum(_nodes(child, known, depth + 1) for child in children)
    return total


class _Machine:
    """A stack, a memo, and a method for each opcode."""

    def __init__(self, table: Table, persistent: Callable[[object], object], where: str, *, left: int) -> None:
        self._left = left
        self._table = table
        self._persistent = persistent
        self._where = where
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> object:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                (value,) = self._stack
                return value
            if name in _IGNORED:
                continue
            if name in _LITERALS:
                self._stack.append(argument)
                continue
            step = _STEPS.get(name)
            if step is None:
                named = f" {str(argument).replace(' ', '.')}" if name == "INST" else ""
                raise self._refused(f"the opcode {name}{named}")
            step(self, argument)
        raise EOFError("it has no end")

    def _refused(self, what: str) -> UnsupportedState:
        return UnsupportedState(
            f"{self._where} cannot be read without unpickling, which would run what the file says: it needs {what}. "
            "Nothing of it was run. If you trust the file, load it yourself, and save its plain values and tensors",
            path=self._where,
        )

    def _named(self, name: str) -> None:
        if name not in self._table:
            raise self._refused(name)
        self._stack.append(self._table[name])

    def global_(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._named(f"{module}.{name}")

    def stack_global(self, _: object) -> None:
        name, module = _exactly(str, self._stack.pop()), _exactly(str, self._stack.pop())
        self._named(f"{module}.{name}")

    def call(self, _: object) -> None:
        arguments, make = self._stack.pop(), self._stack.pop()
        if type(make) is not Make or type(arguments) is not tuple:
            raise self._refused(f"a call of a {type(make).__name__}")
        self._spend(arguments)
        self._stack.append(make(*arguments))

    def build(self, _: object) -> None:
        state = self._stack.pop()
        if type(self._stack[-1]) is OrderedDict:
            return  # attributes of a state_dict (``_metadata``), of which nothing is taken over
        unbuilt = self._stack.pop()
        self._spend(state)
        value = unbuilt.built(state)
        for key in unbuilt.keys:
            self._memo[key] = value
        self._stack.append(value)

    def _spend(self, value: Any) -> None:
        """
        Before *value* is copied, hashed or shown: a small pickle can make one that takes for ever, or all memory.

        Each of these costs what the tree has where every shared part is written out.
        """
        self._left -= _nodes(value, {}, 1)
        if type(value) is tuple:
            self._left -= sum(len(part) for part in value if type(part) in (bytes, str))
        if self._left < 0:
            raise FormatError("it repeats itself on purpose: its values are out of all proportion to its size")

    def persistent(self, _: object) -> None:
        self._stack.append(self._persistent(self._stack.pop()))

    def mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def put(self, key: object) -> None:
        number = len(self._memo) if key is None else cast("int", key)
        self._memo[number] = value = self._stack[-1]
        keys = getattr(value, "keys", None)
        if type(keys) is list:
            keys.append(number)

    def get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def last(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise IndexError("its stack is empty")
        del self._stack[-count:]
        self._stack.append(items)

    def tuple_(self, _: object) -> None:
        self._stack.append(tuple(self._since_mark()))

    def list_(self, _: object) -> None:
        self._stack.append(self._since_mark())

    def dict_(self, _: object) -> None:
        items = self._since_mark()
        self._stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def append(self, _: object) -> None:
        item = self._stack.pop()
        _exactly(list, self._stack[-1]).append(item)

    def appends(self, _: object) -> None:
        items = self._since_mark()
        _exactly(list, self._stack[-1]).extend(items)

    def add_items(self, _: object) -> None:
        items = self._since_mark()
        self._spend(items)
        _exactly(set, self._stack[-1]).update(items)

    def set_item(self, _: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([(key, value)])

    def set_items(self, _: object) -> None:
        items = self._since_mark()
        self._set(zip(items[::2], items[1::2], strict=True))

    def _set(self, pairs: Any) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise TypeError(f"it sets an item of a {type(target).__name__}")
        for key, value in pairs:
            if type(key) is tuple:
                self._spend(key)
            target[key] = value


def _exactly(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"it takes a {type(value).__name__} for a {kind.__name__}")
    return value


_IGNORED = frozenset({"PROTO", "FRAME"})
_LITERALS = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_,
    "LIST": _Machine.list_,
    "DICT": _Machine.dict_,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "TUPLE1": lambda machine, _: machine.last(1),
    "TUPLE2": lambda machine, _: machine.last(2),
    "TUPLE3": lambda machine, _: machine.last(3),
    "EMPTY_TUPLE": lambda machine, _: machine._stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine._stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "EMPTY_SET": lambda machine, _: machine._stack.append(set()),
    "NONE": lambda machine, _: machine._stack.append(None),
    "NEWTRUE": lambda machine, _: machine._stack.append(True),
    "NEWFALSE": lambda machine, _: machine._stack.append(False),
}


def plain(value: object) -> Counter[object]:
    """A Counter from the dict *value*."""
    counter: Counter[object] = Counter()
    for key, count in cast("dict[object, int]", value).items():
        counter[key] = count
    return counter
