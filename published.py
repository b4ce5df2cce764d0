"""Reads checkpoints of the older published form, whole pickled modules, without running them.

Unpickling such a file would run whatever it says. Here its pickle may build numbers, texts,
containers and tensors; the modules in it become `_Inert` objects that only hold what they are
given, and any other name in it is refused. Both layouts of torch.save are read: archives, and the
stream of pickles that came before them.
"""

import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import torch
from torch import Tensor

MAGIC = 0x1950A86A20F9469CFC6C  # the number that the older layout begins with
DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "BFloat16": torch.bfloat16,
}  # fmt: skip


def read(path):
    """The checkpoint as train.py would have saved it, without a word map: see `checkpoints`.

    Raises:
        ValueError and others, of nearly any class: the file is damaged, is no such checkpoint, or
            names what such a checkpoint needs not.
    """
    contents = _read_archive(path) if zipfile.is_zipfile(path) else _read_stream(path)
    if not isinstance(contents, dict) or not {"encoder", "decoder"} <= contents.keys():
        raise ValueError("it holds no encoder and decoder")
    encoder, decoder = (_state(contents[name]) for name in ("encoder", "decoder"))
    name = Path(path).name.removesuffix(".pth.tar").removeprefix("BEST_")
    return {
        "encoder_name": "resnet101",  # all of them, trained on squares of 256 pixels
        "encoded_image_size": vars(contents["encoder"]).get("enc_image_size", 14),
        "image_size": 256,
        "encoder": encoder,
        "decoder": decoder,
        "base": name.removeprefix("checkpoint_") if name.startswith("checkpoint_") else "",
        "options": {"data_folder": "data"},
        "stage": "decoder" if contents.get("encoder_optimizer") is None else "finetune",
        "epoch": contents.get("epoch", 0),
        "scores": {"bleu4": float(contents.get("bleu-4", math.nan))},
    }


def _state(module):
    """The state dict of an `_Inert` module."""
    if not isinstance(module, _Inert):
        raise ValueError("its encoder and decoder are no modules")
    parts = {"_parameters": {}, "_buffers": {}, "_modules": {}} | vars(module)
    state = {
        name: tensor
        for kind in ("_parameters", "_buffers")
        for name, tensor in parts[kind].items()
        if isinstance(tensor, Tensor)
    }
    for name, child in parts["_modules"].items():
        state |= {f"{name}.{key}": tensor for key, tensor in _state(child).items()}
    return state


class _Inert:
    """Stands for any module, optimizer or function of PyTorch: takes all and does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass


def _tensor(storage, offset, size, stride, *_):
    if math.prod(size) > storage.numel():  # one number for many places: no weights are like that
        raise ValueError("a tensor is larger than its storage")
    return storage.as_strided(size, stride, offset)


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{(builtin, "set"): set for builtin in ("builtins", "__builtin__")},
    **{(builtin, "dict"): dict for builtin in ("builtins", "__builtin__")},
    **{("torch", f"{name}Storage"): dtype for name, dtype in DTYPES.items()},
}
INERT = ("torch.nn.", "torch.optim.", "torchvision.models.")


class _Unpickler(pickle.Unpickler):
    """Builds what `ALLOWED` and `INERT` name; `storage` gives the tensor of a storage's key."""

    def __init__(self, file, storage=None):
        start = file.tell()
        _check_memo(file)
        file.seek(start)
        super().__init__(file, encoding="latin1")
        self.storage = storage

    def find_class(self, module, name):
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module in ("models", "__main__") or f"{module}.".startswith(INERT):
            return _Inert
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid):
        kind, *rest = pid
        if kind == "module":  # with its source, which nothing is done with
            return rest[0]
        dtype, key, _, count, *view = rest
        storage = self.storage(key, dtype, count)
        if view and view[0] is not None:
            _, offset, size = view[0]
            storage = storage.narrow(0, offset, size)
        return storage


def _check_memo(file):
    """Refuses a pickle that numbers its objects with gaps: Python makes room for all numbers."""
    for count, (operation, number, _) in enumerate(pickletools.genops(file)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and number > count:
            raise pickle.UnpicklingError("its objects are numbered with gaps")


def _read_archive(path):
    with zipfile.ZipFile(path) as archive:
        check_archive(archive, path)
        [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder, known = pickled.removesuffix("data.pkl"), {}

        def storage(key, dtype, count):
            if key not in known:
                known[key] = torch.frombuffer(
                    bytearray(archive.read(f"{folder}data/{key}")), dtype=dtype, count=count
                )
            return known[key]

        with archive.open(pickled) as file:
            return _Unpickler(file, storage).load()


def check_archive(archive, path):
    """Raises ValueError for an archive whose contents are larger than itself."""
    if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
        raise ValueError("its contents are larger than the file")


def _read_stream(path):
    size, known = Path(path).stat().st_size, {}

    def storage(key, dtype, count):  # filled below: the numbers follow after the pickles
        if key not in known:
            if not 0 <= count * dtype.itemsize <= size:
                raise ValueError("a tensor is larger than the file")
            known[key] = torch.empty(count, dtype=dtype)
        return known[key]

    with open(path, "rb") as file:
        if _Unpickler(file).load() != MAGIC:
            raise ValueError("it was not written by torch.save")
        for _ in ("version", "system"):
            _Unpickler(file).load()
        contents = _Unpickler(file, storage).load()
        for key in _Unpickler(file).load():
            [count] = struct.unpack("<q", file.read(8))
            if count != known[key].numel():
                raise ValueError("a tensor has another size than announced")
            numbers = file.read(count * known[key].itemsize)
            known[key].copy_(torch.frombuffer(bytearray(numbers), dtype=known[key].dtype))
    return contents
