"""Pickles read as data: nothing in a file is imported or executed.

A pickle is a program for a small stack machine that may name any Python function and call it. Here is the machine
without the calls. A global becomes an inert `Symbol`. A call is looked up, by name, in a table of this program's own
functions that only arrange data; any other call refuses the file. Objects of unknown classes, such as the callbacks
in a training checkpoint, become `Opaque`: known to be there, their state dropped.
"""

import mmap
import pickletools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mlx_cm.errors import ModelError

MOST_OPERATIONS = 1_000_000  # torch.save writes 38 a tensor
LARGEST_PICKLE = 64 << 20  # bytes; tensors lie outside the pickle
LARGEST_OPERAND = 16 << 20
LONGEST_LINE = 1 << 16
LONGEST_INTEGER = 256  # bytes
LONGEST_GLOBAL = 256  # characters
NEWEST_PROTOCOL = 5

SAFER = "use a .safetensors file, or one from a source you trust"


@dataclass(frozen=True)
class Symbol:
    """A global that a pickle names, never looked up."""

    path: str  # "module.name"


@dataclass(frozen=True, eq=False)
class Opaque:
    """Something that is no weight and is passed over."""

    what: str


BYTES = Opaque("bytes")

# Python 2 names of modules whose Python 3 names the tables below use.
RENAMED_MODULES = {"__builtin__": "builtins"}

# Whatever Python ships has functions that run programs, touch files or load code, so its modules are refused by
# default, those that some Python version has dropped or renamed included.
# fmt: off
PYTHON_MODULES = frozenset(sys.stdlib_module_names) | {
    "asynchat", "asyncore", "cPickle", "cStringIO", "cgi", "cgitb", "commands", "copy_reg", "crypt", "distutils", "dl",
    "dummy_thread", "exceptions", "httplib", "ihooks", "imp", "imputil", "lib2to3", "nis", "os2", "os2emxpath", "pipes",
    "popen2", "rexec", "smtpd", "StringIO", "telnetlib", "thread", "urllib2", "xmlrpclib",
}
# fmt: on


class _ForbiddenError(Exception):
    """A call within the tables, with arguments that no checkpoint needs."""


def _opaque(what: str) -> Callable[..., Opaque]:
    return lambda *arguments: Opaque(what)


def _dictionary(pairs: Any = ()) -> dict:
    if not isinstance(pairs, (list, tuple)) or any(not isinstance(p, (list, tuple)) or len(p) != 2 for p in pairs):
        raise ValueError("an ordered dictionary is not made of pairs")
    return {_key(key): value for key, value in pairs}


def _numpy_dtype(code: Any, *flags: Any) -> Opaque:
    # An object array is a pickle of arbitrary objects.
    if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?[?bBhHiIlLqQefdgFDGSUVmMucs]\d{0,9}", code):
        raise _ForbiddenError("its pickle holds a numpy array of arbitrary objects")
    return Opaque("numpy dtype")


# Calls that occur in ordinary checkpoints beside the tensors, and what stands for their result.
DATA_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda factory=None: {},
    "collections.Counter": _opaque("counter"),
    "collections.deque": _opaque("deque"),
    "builtins.set": _opaque("set"),
    "builtins.frozenset": _opaque("frozenset"),
    "builtins.complex": _opaque("complex"),
    "builtins.bytearray": _opaque("bytes"),
    "builtins.slice": _opaque("slice"),
    "_codecs.encode": _opaque("bytes"),  # bytes, in protocol 2
    "datetime.date": _opaque("date"),
    "datetime.datetime": _opaque("date"),
    "datetime.timedelta": _opaque("time span"),
    "types.SimpleNamespace": _opaque("namespace"),
    "numpy.dtype": _numpy_dtype,
} | {
    f"{module}.{name}": _opaque("path")
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")
}
DATA_CALLS |= {
    f"numpy.{core}.{name}": _opaque(what)
    for core in ("core", "_core")
    for name, what in (
        ("multiarray.scalar", "numpy scalar"),
        ("multiarray._reconstruct", "numpy array"),
        ("numeric._frombuffer", "numpy array"),
    )
}

# Names of Python's own that may stand in a file as data, though not be called.
# fmt: off
DATA_NAMES = {
    "argparse.Namespace", "builtins.bool", "builtins.bytes", "builtins.dict", "builtins.float", "builtins.int",
    "builtins.list", "builtins.object", "builtins.str", "builtins.tuple", "typing.Any", "uuid.UUID",
}
# fmt: on


class PickleStream:
    """A window of a mapped file that hands out no more than a pickle may need."""

    def __init__(self, data: mmap.mmap, start: int, end: int):
        self.data, self.position, self.end = data, start, end
        self.limit = min(end, start + LARGEST_PICKLE)

    def read(self, count: int) -> bytes:
        if count > LARGEST_OPERAND:
            raise ValueError(f"an operand of {count} bytes")
        piece = self.data[self.position : min(self.position + count, self.limit)]
        self.position += len(piece)
        return piece

    def readline(self) -> bytes:
        newline = self.data.find(b"\n", self.position, min(self.position + LONGEST_LINE, self.limit))
        if newline < 0:
            raise ValueError("a line without an end")
        return self.read(newline + 1 - self.position)

    def tell(self) -> int:
        return self.position


def load_pickle(
    stream: PickleStream,
    where: str,
    calls: Mapping[str, Callable[..., Any]] | None = None,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Interprets one pickle and leaves the stream behind it.

    Args:
        stream: positioned at the pickle.
        where: the file's name, for messages.
        calls: functions that stand in for globals, beside `DATA_CALLS`.
        persistent: makes a value of a persistent id; without it there may be none.

    Returns:
        Dicts, lists, tuples, strings, numbers, None, what `calls` and `persistent` make, `Symbol` and `Opaque`.
        The value may share parts with itself, or contain itself.

    Raises:
        ModelError: malformed, too large, or asking for anything beyond data.
    """
    machine = _Machine(where, DATA_CALLS | (calls or {}), persistent)
    try:
        return machine.run(stream)
    except _ForbiddenError as error:
        machine.refuse(str(error))
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        why = f"its pickle is truncated or corrupt (byte {stream.tell()}: {str(error)[:200]})"
        raise ModelError(where, why, "download the file again") from None


class _Machine:
    """The stack machine. Each method of OPERATIONS carries out one opcode."""

    def __init__(self, where: str, calls: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None):
        self.where, self.calls, self.persistent = where, calls, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.symbols: dict[str, Symbol] = {}
        self.operations = 0

    def run(self, stream: PickleStream) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            self.spend(1)
            if opcode.name in ARGUMENT_OPCODES:
                self.stack.append(argument)
            elif opcode.name in CONSTANT_OPCODES:
                self.stack.append(CONSTANT_OPCODES[opcode.name])
            elif opcode.name in OPERATIONS:
                OPERATIONS[opcode.name](self, argument)
            elif opcode.name == "FRAME" and argument > stream.limit - stream.tell():
                raise ValueError("a frame beyond the end")
            elif opcode.name == "PROTO" and argument > NEWEST_PROTOCOL:
                raise ValueError(f"protocol {argument}")
            elif opcode.name not in {"PROTO", "FRAME", "STOP"}:
                self.refuse(f"its pickle has a {opcode.name} opcode, which no checkpoint needs")
        (value,) = self.stack
        if self.marked:
            raise ValueError("a mark is left over")
        return value

    def spend(self, operations: int) -> None:
        self.operations += operations
        if self.operations > MOST_OPERATIONS:
            raise ModelError(self.where, f"its pickle takes more than {MOST_OPERATIONS} operations", SAFER)

    def refuse(self, why: str) -> NoReturn:
        raise ModelError(self.where, f"{why}; the file is refused and nothing in it was executed", SAFER)

    def integer(self, value: int) -> None:
        if value.bit_length() > 8 * LONGEST_INTEGER:
            raise ValueError(f"an integer of {value.bit_length()} bits")
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def pop(self, _: None = None) -> Any:
        return self.stack.pop()

    def pop_mark(self, _: None) -> None:
        self.since_mark()

    def duplicate(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"nothing is remembered under {index}")
        self.stack.append(self.memo[index])

    def tuple_since_mark(self, _: None) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def short_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("a tuple of more than there is")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def empty_list(self, _: None) -> None:
        self.stack.append([])

    def empty_dict(self, _: None) -> None:
        self.stack.append({})

    def list_since_mark(self, _: None) -> None:
        items = self.since_mark()
        self.stack.append(items)

    def dict_since_mark(self, _: None) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.set_items(items)

    def append(self, _: None) -> None:
        self.extend([self.stack.pop()])

    def appends(self, _: None) -> None:
        self.extend(self.since_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise ValueError(f"items for a {type(target).__name__}")

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def set_items_since_mark(self, _: None) -> None:
        self.set_items(self.since_mark())

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif not isinstance(target, Opaque):
            raise ValueError(f"entries for a {type(target).__name__}")

    def add_items(self, _: None) -> None:
        self.since_mark()
        if not isinstance(self.stack[-1], Opaque):
            raise ValueError(f"members for a {type(self.stack[-1]).__name__}")

    def frozen_set(self, _: None) -> None:
        self.since_mark()
        self.stack.append(Opaque("frozenset"))

    def name_global(self, argument: str) -> None:
        module, name = argument.split(" ", 1)
        self.symbol(module, name)

    def name_global_from_stack(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global whose name is no text")
        self.symbol(module, name)

    def symbol(self, module: str, name: str) -> None:
        if len(module) + len(name) > LONGEST_GLOBAL:
            raise ValueError(f"a global with a name of {len(module) + len(name)} characters")
        path = f"{RENAMED_MODULES.get(module, module)}.{name}"
        if not path.isprintable():
            raise ValueError("a global with an unprintable name")
        if path not in self.symbols:
            self.check_global(path, module, name)
            self.symbols[path] = Symbol(path)
        self.stack.append(self.symbols[path])

    def check_global(self, path: str, module: str, name: str) -> None:
        if path in self.calls or path in DATA_NAMES:
            return
        # A dotted name reaches through a module to whatever that module has imported.
        if "." in name or module.partition(".")[0] in PYTHON_MODULES:
            self.refuse(f"its pickle asks for {path!r}, which has no place in a checkpoint")

    def call(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise ValueError("a call whose arguments are no tuple")
        if not isinstance(function, Symbol) or function.path not in self.calls:
            named = repr(function.path) if isinstance(function, Symbol) else f"a {type(function).__name__}"
            self.refuse(f"its pickle asks to call {named}, which is not among the calls that make up tensors and data")
        # The same long list may be passed again and again.
        self.spend(sum(len(argument) for argument in arguments if isinstance(argument, (list, tuple))))
        self.stack.append(self.calls[function.path](*arguments))

    def new_object(self, _: None) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Symbol) or not isinstance(arguments, tuple):
            raise ValueError("an object without a class")
        if kind.path in self.calls:
            self.stack += [kind, arguments]
            self.call(None)
        else:
            self.stack.append(Opaque(f"{kind.path} object"))

    def set_state(self, _: None) -> None:
        """Drops the state: an ordered dictionary's attributes, a parameter's, an unknown object's."""
        self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, (Symbol, str, bytes, int, float, tuple, list)) or target is None:
            named = repr(target.path) if isinstance(target, Symbol) else f"a {type(target).__name__}"
            self.refuse(f"its pickle asks to change {named} itself")

    def persistent_id(self, _: None) -> None:
        if self.persistent is None:
            raise ValueError("a reference to something outside")
        self.stack.append(self.persistent(self.stack.pop()))


def _key(key: Any) -> Any:
    """A key that hashes in constant time: tuples that share parts with themselves take forever."""
    return key if key is None or isinstance(key, (str, int, float, Symbol)) else Opaque(type(key).__name__)


# fmt: off
ARGUMENT_OPCODES = {
    "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}
# fmt: on
CONSTANT_OPCODES = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "EMPTY_SET": Opaque("set"),
    "BINBYTES": BYTES,
    "SHORT_BINBYTES": BYTES,
    "BINBYTES8": BYTES,
    "BYTEARRAY8": BYTES,
}
OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "INT": _Machine.integer,
    "LONG": _Machine.integer,
    "LONG1": _Machine.integer,
    "LONG4": _Machine.integer,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.duplicate,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine, _: machine.short_tuple(1),
    "TUPLE2": lambda machine, _: machine.short_tuple(2),
    "TUPLE3": lambda machine, _: machine.short_tuple(3),
    "EMPTY_LIST": _Machine.empty_list,
    "LIST": _Machine.list_since_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "EMPTY_DICT": _Machine.empty_dict,
    "DICT": _Machine.dict_since_mark,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items_since_mark,
    "ADDITEMS": _Machine.add_items,
    "FROZENSET": _Machine.frozen_set,
    "GLOBAL": _Machine.name_global,
    "STACK_GLOBAL": _Machine.name_global_from_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.persistent_id,
}
