"""Files of ``torch.save`` (.pt, .pth, .ckpt, .bin) without ``pickle``: no code of a file ever runs.

A pickle is a program for a small stack machine. The one here knows the instructions that torch writes, and may build
what ``BUILDERS`` lists and nothing else: dictionaries, and descriptions of tensors whose numbers stay in the mapped
file. A file that asks for any other global is refused, and the refusal says which.

Source: the documentation of ``pickletools`` and the layout that ``torch.save`` writes. Loads no torch.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedCheckpointError
from .checkpoint import DTYPES, MAX_NAME, MAX_TENSORS, Checkpoint, TensorInfo, corrupt
from .zip_entries import Entry, read_entries

MAX_PROGRAM = 16 << 20
MAX_STEPS = 1_000_000  # about half a second; a checkpoint of 2,350 tensors takes 75,000
MAX_VALUE = 1024  # characters of a value that is kept as metadata
MAX_ARGUMENTS = 16
MAX_DIMENSIONS = 8

# What may stand in an archive, below its one folder.
ENTRY = re.compile(r"^(?:[^/]+/)?(data\.pkl|data/\d+|version|byteorder|\.data/serialization_id|\.format_version|"
                   r"\.storage_alignment)$")  # fmt: skip

# Where training programs and upscalers put the tensors.
STATE_KEYS = ("model_state_dict", "state_dict", "model", "module", "params_ema", "params-ema", "params", "net")

# torch's name of a storage class or dtype -> ours.
STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "BoolStorage": "BOOL",
    "UntypedStorage": "U8",
}
DTYPE_NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}


class Refused(Exception):
    """What is wrong with a program, without the name of its file."""


@dataclass(frozen=True)
class Global:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    dtype: str
    entry: str
    count: int


@dataclass(frozen=True)
class Tensor:
    """Unchecked until ``tensor_info``."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """A value that holds no weights and is not looked into (numpy's scalars in training states)."""


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """``torch._utils._rebuild_tensor_v2``; what follows are flags of autograd."""
    return Tensor(storage, storage.dtype, offset, shape, strides)


def _tensor_of_dtype(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any) -> Tensor:
    """``torch._utils._rebuild_tensor_v3``, for dtypes that have no storage class."""
    return Tensor(storage, DTYPE_NAMES[dtype.name], offset, shape, strides)


def opaque(*_: Any) -> Opaque:
    return Opaque()


# None of these copies what it is given, so that a short program cannot ask for much memory.
BUILDERS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes: sizes,
    "numpy.dtype": opaque,
    "numpy.ndarray": opaque,
    "numpy.core.multiarray.scalar": opaque,
    "numpy._core.multiarray.scalar": opaque,
    "numpy.core.multiarray._reconstruct": opaque,
    "numpy._core.multiarray._reconstruct": opaque,
    "_codecs.encode": opaque,
}


def _is_name(name: Global) -> bool:
    """Whether a global only names a storage class or a dtype."""
    storage = name.module in ("torch", "torch.storage") and name.name in STORAGES
    return storage or (name.module == "torch" and name.name in DTYPE_NAMES)


class Machine:
    """The stack machine of pickle, for the instructions that torch writes.

    ``steps`` and ``builders`` are what it knows and may build; a machine that may build more has tables of its own.
    """

    @property
    def steps(self) -> Mapping[bytes, Callable[[Any], Any]]:
        return STEPS

    @property
    def builders(self) -> Mapping[str, Callable[..., Any]]:
        return BUILDERS

    def __init__(self, program: bytes, at: int = 0) -> None:
        self.program = program
        self.at = at
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        steps = self.steps
        for _ in range(MAX_STEPS):
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            step = steps.get(code)
            if step is None:
                raise Refused(f"it has the instruction {code!r}, which torch does not write")
            step(self)
        raise Refused(f"it has more than {MAX_STEPS:,} instructions")

    def take(self, count: int) -> bytes:
        start = self.at
        self.at += count
        if self.at > len(self.program):
            raise Refused("it ends too soon")
        return self.program[start : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def line(self) -> str:
        end = self.program.index(b"\n", self.at)
        text = self.take(end - self.at).decode("utf-8")
        self.at += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def tuple_of(self, count: int) -> None:
        values = tuple(self.stack[len(self.stack) - count :]) if count else ()
        if len(values) != count:
            raise Refused("it takes from an empty stack")
        del self.stack[len(self.stack) - count :]
        self.push(values)

    def name(self, module: Any, name: Any) -> None:
        found = Global(str(module)[:MAX_NAME], str(name)[:MAX_NAME])
        if str(found) not in self.builders and not _is_name(found):
            raise Refused(f"it asks for {found}, and could run code with it")
        self.push(found)

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or str(function) not in self.builders:
            raise Refused(f"it calls {function if isinstance(function, Global) else 'what is no function'}")
        if not isinstance(arguments, tuple) or len(arguments) > MAX_ARGUMENTS:
            raise Refused(f"it calls {function} with arguments that torch does not write")
        self.push(self.builders[str(function)](*arguments))

    def persistent(self) -> None:
        """A storage: ('storage', class, key, device, count), and None in the format before torch 1.6."""
        kind, storage, key, _, count, *view = self.stack.pop()
        if (
            view not in ([], [None])
            or kind != "storage"
            or not isinstance(storage, Global)
            or storage.name not in STORAGES
            or type(key) is not str
        ):
            raise Refused("it refers to something that is no storage of torch")
        found = self.storages[key] = Storage(STORAGES[storage.name], f"data/{key}", count)
        self.push(found)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise Refused("it puts entries into what is no dictionary")
        # The hash of nested tuples takes time without bound.
        if not all(isinstance(key, str | int) for key in values[::2]):
            raise Refused("its dictionaries have keys that are neither texts nor numbers")
        target.update(zip(values[::2], values[1::2], strict=True))

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Refused("it appends to what is no list")
        self.stack[-1].extend(values)

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def build(self) -> None:
        """Attributes of an object (``_metadata`` of a state dict): objects here have none."""
        self.stack.pop()


def _text(code: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.take(m.number(code)).decode("utf-8", "surrogatepass"))


def _bytes(code: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.take(m.number(code)))


def _const(make: Callable[[], Any]) -> Callable[[Machine], None]:
    return lambda m: m.push(make())


def _number(code: str) -> Callable[[Machine], None]:
    return lambda m: m.push(m.number(code))


STEPS: Mapping[bytes, Callable[[Machine], Any]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"0": lambda m: m.stack.pop(),
    b"N": _const(lambda: None),
    b"\x88": _const(lambda: True),
    b"\x89": _const(lambda: False),
    b"}": _const(dict),
    b"]": _const(list),
    b")": _const(tuple),
    b"K": _number("B"),
    b"M": _number("H"),
    b"J": _number("i"),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("B")), "little", signed=True)),  # LONG1
    b"X": _text("I"),
    b"\x8c": _text("B"),
    b"\x8d": _text("Q"),
    b"B": _bytes("I"),
    b"C": _bytes("B"),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"l": lambda m: m.push(m.since_mark()),
    b"s": Machine.set_item,
    b"u": lambda m: m.set_items(m.since_mark()),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.since_mark()),
    b"q": lambda m: m.remember(m.number("B")),
    b"r": lambda m: m.remember(m.number("I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.number("B")]),
    b"j": lambda m: m.push(m.memo[m.number("I")]),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": Machine.stack_name,
    b"R": Machine.call,
    b"Q": Machine.persistent,
    b"b": Machine.build,
}


def open_pickle(path: Path) -> Checkpoint:
    """The tensors of a file of ``torch.save``, as places in the file.

    Raises:
        UnsupportedCheckpointError: it asks for a class or function that is not plain data, or is a TorchScript archive.
        CorruptCheckpointError: the archive or its program does not add up.
    """
    with refusals(path):
        entries = entries_of(path)
        tensors, values = state_dict(Machine(read_entry(path, entries["data.pkl"])).run())
        infos = {name: tensor_info(name, tensor, entries) for name, tensor in tensors.items()}
    return Checkpoint(path, infos, values, container="pickle")


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Typed errors for what goes wrong with the program of a file."""
    try:
        yield
    except Refused as error:
        raise UnsupportedCheckpointError(
            f"{path.name}: its pickle is refused: {error}; use the safetensors file of the model"
        ) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise corrupt(path, f"its pickle is damaged ({type(error).__name__}: {str(error)[:100]})") from None


def entries_of(path: Path) -> dict[str, Entry]:
    """The entries by their names below the archive's folder."""
    entries: dict[str, Entry] = {}
    for name, entry in read_entries(path).items():
        match = ENTRY.match(name)
        if match is None:
            raise UnsupportedCheckpointError(
                f"{path.name} holds {name[:100]!r}, so it is no file of torch.save; use a safetensors file"
            )
        if match[1] in entries:
            raise corrupt(path, f"the archive has {match[1]!r} twice")
        entries[match[1]] = entry
    if "data.pkl" not in entries:
        raise corrupt(path, "the archive has no data.pkl, so it is no file of torch.save")
    program = entries["data.pkl"]
    if program.end - program.start > MAX_PROGRAM:
        raise corrupt(path, f"its data.pkl has {program.end - program.start:,} bytes, which cannot be")
    order = entries.get("byteorder")
    if order is not None and (order.end - order.start > 16 or read_entry(path, order).strip() != b"little"):
        raise UnsupportedCheckpointError(f"{path.name} is big-endian; use the safetensors file of the model")
    return entries


def read_entry(path: Path, entry: Entry) -> bytes:
    with path.open("rb") as file:
        file.seek(entry.start)
        return file.read(entry.end - entry.start)


def state_dict(state: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a saved object, and its small values as text."""
    values: dict[str, str] = {}
    for _ in range(len(STATE_KEYS)):
        if not isinstance(state, dict):
            raise Refused("it holds no dictionary of tensors")
        values |= {
            str(key): str(value)
            for key, value in state.items()
            if isinstance(value, str | int | float) and len(str(key)) + len(str(value)) <= MAX_VALUE
        }
        inner = next((state[key] for key in STATE_KEYS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise Refused("it holds no dictionary of tensors")
    if len(tensors) > MAX_TENSORS or any(not isinstance(key, str) or len(key) > MAX_NAME for key in tensors):
        raise Refused(f"its tensors are not named, or more than {MAX_TENSORS:,}")
    return tensors, values


def tensor_info(name: str, tensor: Tensor, entries: Mapping[str, Entry]) -> TensorInfo:
    if not all(isinstance(n, tuple) and len(n) <= MAX_DIMENSIONS for n in (tensor.shape, tensor.strides)):
        raise ValueError(f"{name!r} has more than {MAX_DIMENSIONS} dimensions")
    sizes = (tensor.offset, *tensor.shape, *tensor.strides)
    if any(type(n) is not int or n < 0 for n in sizes) or len(tensor.shape) != len(tensor.strides):
        raise ValueError(f"{name!r} has a size that is not a whole number")
    width = DTYPES[tensor.dtype][0]
    count = math.prod(tensor.shape)
    spread = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True)) if count else 0
    entry = entries[tensor.storage.entry]
    start = entry.start + tensor.offset * DTYPES[tensor.storage.dtype][0]
    if start + spread * width > entry.end:
        raise ValueError(f"{name!r} {list(tensor.shape)} does not fit its storage of {entry.end - entry.start:,} bytes")
    if count > spread:
        raise ValueError(f"{name!r} repeats its numbers")
    plain = tuple(math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape)))
    moved = any(size > 1 and a != b for size, a, b in zip(tensor.shape, tensor.strides, plain, strict=True))
    return TensorInfo(
        tensor.dtype, tensor.shape, start, start + spread * width, strides=tensor.strides if moved else None
    )
