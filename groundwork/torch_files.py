"""Reads what torch.save wrote without unpickling it, so that hostile files can do no harm.

A pickle is a program, and even one that may call nothing dangerous can run for ever or fill the
memory. The interpreter here knows the few operations that torch.save needs, builds numbers, texts,
lists, tuples, dicts and tensors, and puts an `Inert` object in the place of everything else. Both
layouts of torch.save are read: archives, and the stream of pickles that came before them.
"""

import math
import pickletools
import struct
import zipfile
from pathlib import Path

import torch

MAGIC = 0x1950A86A20F9469CFC6C  # the number that the older layout begins with
DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "BFloat16": torch.bfloat16,
}  # fmt: skip
STORAGES = {
    f"{module}.{name}Storage": dtype
    for module in ("torch", "torch.cuda")
    for name, dtype in DTYPES.items()
}
DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER, SIZE = "torch._utils._rebuild_parameter", "torch.Size"
KNOWN = {*STORAGES, *DICTS, *TENSORS, PARAMETER, SIZE}
INERT = ("torch.nn.", "torch.optim.", "torchvision.models.", "models.", "__main__.")
INERT_NAMES = ("builtins.set", "__builtin__.set", "torch.device")
OPERATIONS, DEPTH = 2**21, 1000  # of a pickle, at most: a word map of 100,000 words takes 300,000


class Inert:
    """Stands for a module, an optimizer or a function: holds its state and does nothing."""

    def __init__(self):
        self.state = {}


class _Name(str):
    """A global name in a pickle, of something that is known."""


def read(path, inert=False, load=True):
    """The contents of a file of torch.save.

    Args:
        inert: whether it may hold modules and optimizers, which become `Inert`.
        load: whether to read the tensors' values; without, tensors are on the device "meta".

    Raises:
        ValueError, and others of many classes: the file is damaged, names what it may not, or
            would take more memory than its own size.
    """
    if is_archive(path):
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, path, inert, load).contents()
    with open(path, "rb") as file:
        return _Stream(file, path, inert, load).contents()


def is_archive(path):
    """Whether torch.load takes the file for an archive."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


class _Stack(list):
    """The values that a pickle's operations take and leave, with marks between some."""

    def __init__(self):
        super().__init__()
        self.marks = []

    def take(self, count):
        """The last values, down to the last mark at most."""
        if len(self) - (self.marks[-1] if self.marks else 0) < count:
            raise ValueError("its pickle takes what is not there")
        taken = self[len(self) - count :]
        del self[len(self) - count :]
        return taken

    def take_marked(self):
        """All values after the last mark, which goes, too."""
        taken = self.take(len(self) - self.marks[-1])
        self.marks.pop()
        return taken

    def build(self, operation, argument):
        """Does an operation that makes plain values, or puts them together."""
        match operation:
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation])
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE"
                | "BINSTRING" | "SHORT_BINSTRING" | "SHORT_BINUNICODE"
            ):  # fmt: skip
                self.append(argument)
            case "MARK":
                if len(self.marks) == DEPTH:
                    raise ValueError("its pickle is nested too deeply")
                self.marks.append(len(self))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self.append({"DICT": {}, "LIST": [], "TUPLE": ()}[operation[6:]])
            case "TUPLE":
                self.append(tuple(self.take_marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.append(tuple(self.take(int(operation[5:]))))
            case "APPEND" | "APPENDS":
                items = self.take(1) if operation == "APPEND" else self.take_marked()
                _expect(self[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self.take(2) if operation == "SETITEM" else self.take_marked()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    # an optimizer's state has parameters as keys, which are told apart by identity
                    _expect(self[-1], dict)[_expect(key, str, int, torch.Tensor)] = value
            case _:
                raise ValueError(f"its pickle holds {operation}, which no checkpoint needs")


class _Reader:
    """Interprets pickles; its subclasses know where the tensors' values are."""

    def __init__(self, file, path, inert, load):
        self.file, self.inert, self.load = file, inert, load
        self.storages, self.size, self.spent = {}, Path(path).stat().st_size, 0

    def interpret(self, file):
        """What a pickle builds. Raises ValueError for an operation that torch.save never needs."""
        stack, memo = _Stack(), {}
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count == OPERATIONS:  # each takes up to a hundred bytes of memory
                raise ValueError("its pickle holds too many objects")
            match operation.name:
                case "PROTO":
                    pass
                case "GLOBAL":
                    stack.append(self.name(argument.replace(" ", ".")))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "REDUCE" | "NEWOBJ":
                    function, arguments = stack.take(2)
                    stack.append(self.call(_expect(function, _Name), _expect(arguments, tuple)))
                case "BUILD":
                    [state] = stack.take(1)
                    if isinstance(stack[-1], Inert):
                        stack[-1].state = _expect(state, dict)
                case "BINPERSID":
                    stack.append(self.persistent(*_expect(*stack.take(1), tuple)))
                case "STOP":
                    return stack[-1]
                case name:
                    stack.build(name, argument)

    def name(self, name):
        inert = self.inert and (name.startswith(INERT) or name in INERT_NAMES)
        if name not in KNOWN and not inert:
            raise ValueError(f"it names {name}")
        return _Name(name)

    def call(self, function, arguments):
        if function in DICTS:
            return {}
        if function in TENSORS:
            return self.tensor(*arguments[:4])
        if function == PARAMETER:
            return _expect(arguments[0], torch.Tensor)
        if function == SIZE:
            return _expect(arguments[0], tuple)
        if function in STORAGES:
            raise ValueError(f"it makes a {function} without values")
        return Inert()

    def persistent(self, kind, name, *rest):
        """What a persistent id stands for: a class with its source, or a storage's values."""
        if kind == "module":
            return _expect(name, _Name)
        key, _, count, *view = rest
        dtype, key, count = STORAGES[name], _expect(key, str), _expect(count, int)
        if key not in self.storages:
            self.spend(count * dtype.itemsize)
            self.storages[key] = self.storage(key, dtype, count)
        storage = self.storages[key]
        if view and view[0] is not None:
            _, offset, size = view[0]
            storage = storage.narrow(0, offset, size)
        return storage

    def spend(self, size):
        """Counts bytes of memory, of which the file may take twice its own size."""
        self.spent += size
        if size < 0 or self.spent > 2 * self.size:
            raise ValueError("its tensors are larger than the file")

    def tensor(self, storage, offset, size, stride):
        for numbers in ((offset,), size, stride):
            if any(_expect(number, int) < 0 for number in numbers):
                raise ValueError("a tensor has negative sizes")
        count = math.prod(size)
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if count > storage.numel() or (count and end > storage.numel()):
            raise ValueError("a tensor is larger than its storage")
        self.spend(count * storage.itemsize)
        return storage.as_strided(size, stride, offset)


class _Archive(_Reader):
    """The layout of today: a zip file of a pickle and a file of values for each storage."""

    def contents(self):
        entries = self.file.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("it holds files of the same name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > self.size:
            raise ValueError("its contents are larger than the file")
        if changed := self.file.testzip():  # by the checksum that the archive keeps of each file
            raise zipfile.BadZipFile(f"{changed} is not as it was written")
        [pickled] = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        self.folder = pickled.removesuffix("data.pkl")
        with self.file.open(pickled) as file:
            return self.interpret(file)

    def storage(self, key, dtype, count):
        name = f"{self.folder}data/{key}"
        if self.file.getinfo(name).file_size < count * dtype.itemsize:
            raise ValueError("a tensor is larger than its file")
        if not self.load or not count:
            return torch.empty(count, dtype=dtype, device="cpu" if self.load else "meta")
        values = bytearray(self.file.read(name))
        return torch.frombuffer(values, dtype=dtype, count=count)


class _Stream(_Reader):
    """The older layout: pickles, one after the other, then the values of all storages."""

    def contents(self):
        if self.interpret(self.file) != MAGIC:
            raise ValueError("it was not written by torch.save")
        for _ in ("version", "system"):
            self.interpret(self.file)
        contents = self.interpret(self.file)
        keys = _expect(self.interpret(self.file), list)
        if sorted(keys) != sorted(self.storages):
            raise ValueError("it has no values for some tensors")
        for key in keys:
            storage = self.storages[key]
            [count] = struct.unpack("<q", self.file.read(8))
            values = self.file.read(storage.nbytes)
            if count != storage.numel() or len(values) != storage.nbytes:
                raise ValueError("a tensor has fewer values than announced")
            if self.load and count:
                storage.copy_(torch.frombuffer(bytearray(values), dtype=storage.dtype))
        return contents

    def storage(self, key, dtype, count):  # filled later
        return torch.empty(count, dtype=dtype, device="cpu" if self.load else "meta")


def _expect(value, *kinds):
    if type(value) not in kinds and not (kinds == (torch.Tensor,) and torch.is_tensor(value)):
        raise ValueError(f"its pickle has a {type(value).__name__} where none can be")
    return value
