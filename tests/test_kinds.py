"""Files that are not what was asked for are called what they are, and what may not be read is not
called damaged."""

import contextlib
import gzip
import json
import os
import tarfile
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from PIL import Image
from safetensors.torch import save_file

from checkpoints import load_checkpoint, save_checkpoint
from encoders import Encoder, EncoderError
from groundwork import files, images, kinds, logs
from groundwork.errors import UserError
from groundwork.hdf5 import open_hdf5


def write(kind, path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    if kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF"):
        Image.fromarray(pixels).save(path, kind)
    elif kind == "HEIC":
        path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    elif kind == "safetensors":
        save_file({"fc.weight": torch.zeros(3, 3)}, path)
    elif kind == "HDF5":
        with h5py.File(path, "w") as file:
            file["images"] = pixels
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("photo.txt", "x")
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "x")
    elif kind == "gzip":
        path.write_bytes(gzip.compress(b"x" * 100))
    elif kind == "NumPy":
        np.save(path.with_suffix(".npy"), pixels)
        path.with_suffix(".npy").rename(path)
    else:
        contents = {"JSON": json.dumps([{"a": 1}]), "web page": "<!DOCTYPE html>\n<p>", "empty": ""}
        path.write_text(contents[kind])


KINDS = {
    "JPEG": "a picture (JPEG), no checkpoint",
    "PNG": "a picture (PNG)",
    "WEBP": "a picture (WEBP)",
    "TIFF": "a picture (TIFF)",
    "GIF": "a picture (GIF)",
    "HEIC": "a picture (HEIC)",
    "safetensors": "a file of safetensors",
    "HDF5": "an HDF5 file",
    "zip": "a zip archive of another kind",
    "tar": "a tar archive",
    "gzip": "a file packed by gzip",
    "NumPy": "a NumPy array",
    "JSON": "JSON",
    "web page": "a text, '<!DOCTYPE html>' …",
    "empty": "empty",
}
WAYS_OUT = {"JPEG": "--img", "safetensors": "--encoder_weights", "gzip": "unpack", "empty": "copy"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_called_what_it_is(kind, tmp_path):
    path = tmp_path / "model.pth.tar"
    write(kind, path)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert f"{path} is {KINDS[kind]}" in str(error.value)
    assert WAYS_OUT.get(kind, "checkpoint_….pth.tar") in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_damaged_checkpoint_is_of_no_other_kind(share, tmp_path):
    path = tmp_path / "cut.pth.tar"
    save_checkpoint(path, tiny_checkpoint())
    whole = path.read_bytes()
    assert kinds.kind_of(path) is None
    path.write_bytes(whole[: int(share * len(whole))])
    assert kinds.kind_of(path) is None
    torch.save(tiny_checkpoint(), path, _use_new_zipfile_serialization=False)
    assert kinds.kind_of(path) is None


# ------------------------------------------------------------------------ weights as safetensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A whole network's weights as safetensors, and the network's own state dict."""
    torch.manual_seed(0)
    import torchvision

    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(state, path)
    return path, state


def test_an_encoder_takes_its_weights_as_safetensors(weights):
    path, state = weights
    encoder = Encoder("squeezenet1_1", 3, str(path)).state_dict()
    for name, tensor in encoder.items():
        assert tensor.equal(state[name.replace("resnet.", "features.")]), name


@pytest.mark.parametrize("damage", ["cut", "beginning cut", "missing", "picture", "folder"])
def test_weights_that_cannot_be_read_are_one_line(weights, damage, tmp_path):
    path = tmp_path / "w.safetensors"
    whole = weights[0].read_bytes()
    if damage == "picture":
        write("PNG", path.with_suffix(".pth"))
        path = path.with_suffix(".pth")
    elif damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(whole[: {"cut": len(whole) // 2, "beginning cut": 5}[damage]])
    words = {"missing": "no file of weights", "picture": "is a picture", "folder": "no file"}
    with pytest.raises(UserError, match=words.get(damage, "damaged, or no state dict of")) as error:
        Encoder("squeezenet1_1", 3, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_without_the_package_safetensors_the_line_says_so(weights, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(EncoderError, match="model.safetensors needs the package safetensors"):
        Encoder("squeezenet1_1", 3, str(weights[0]))


# ----------------------------------------------------------------------------------- permission


@contextlib.contextmanager
def as_nobody():
    """Without root's rights, which no permission binds."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that any user may look into."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


READERS = {
    "checkpoint.pth.tar": load_checkpoint,
    "data.json": files.read_json,
    "x.jpg": images.open_image,
    "images.hdf5": lambda path: open_hdf5(path, "images"),
    "log.jsonl": logs.read_log,
    "w.pth": lambda path: Encoder("squeezenet1_1", 3, str(path)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("closed", ["file", "folder"])
def test_what_may_not_be_read_is_not_called_damaged_or_missing(name, closed, open_folder):
    path = open_folder / "in" / name
    path.parent.mkdir(mode=0o755)
    path.write_text("{}")
    (path if closed == "file" else path.parent).chmod(0)
    with as_nobody(), pytest.raises(UserError) as error:
        READERS[name](path)
    path.parent.chmod(0o755)
    assert str(error.value) == f"cannot read {path}: Permission denied"


def test_a_folder_that_may_not_be_looked_into_is_not_called_empty(open_folder):
    from checkpoints import find_checkpoint, newest_best_checkpoint
    from datasets import find_data

    folder = open_folder / "closed"
    folder.mkdir(mode=0)
    for find in (find_checkpoint, newest_best_checkpoint, find_data):
        with as_nobody(), pytest.raises(UserError, match="closed: Permission denied"):
            find(folder)
