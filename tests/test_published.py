"""Checkpoints of the older published form: whole pickled modules, benign and malicious."""

import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import WORDS, failure, run_here, tiny_checkpoint
from torch import nn

import checkpoints
from captioner import Captioner
from groundwork import published, torch_files
from groundwork.errors import UserError

VOCABULARY = len(WORDS)


class Encoder(nn.Module):
    """As the tutorial's module of that name: its attributes and their names."""

    def __init__(self):
        super().__init__()
        self.enc_image_size = 14
        resnet = torchvision.models.resnet101(weights=None)
        self.resnet = nn.Sequential(*list(resnet.children())[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d((14, 14))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_att, self.decoder_att = nn.Linear(2048, 6), nn.Linear(8, 6)
        self.full_att, self.relu, self.softmax = nn.Linear(6, 1), nn.ReLU(), nn.Softmax(dim=1)


class DecoderWithAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.vocab_size = VOCABULARY
        self.attention, self.embedding = Attention(), nn.Embedding(VOCABULARY, 7)
        self.dropout, self.decode_step = nn.Dropout(0.5), nn.LSTMCell(7 + 2048, 8)
        self.init_h, self.init_c = nn.Linear(2048, 8), nn.Linear(2048, 8)
        self.f_beta, self.sigmoid = nn.Linear(8, 2048), nn.Sigmoid()
        self.fc = nn.Linear(8, VOCABULARY)


@pytest.fixture(scope="module")
def modules():
    """What the published file holds; the classes are found in a module `models`, as there."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(), DecoderWithAttention()
    # fine-tuned: its last stage alone, which keeps the file small
    return {
        "epoch": 7, "epochs_since_improvement": 0, "bleu-4": np.float64(0.24).item(),
        "encoder": encoder, "decoder": decoder,
        "encoder_optimizer": stepped(encoder.resnet[7]), "decoder_optimizer": stepped(decoder),
    }  # fmt: skip


def stepped(module):
    """An Adam of the module's parameters after a step: its state has parameters as keys."""
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.fixture
def named_models(monkeypatch):
    theirs = types.ModuleType("models")
    for cls in (Encoder, Attention, DecoderWithAttention):
        monkeypatch.setattr(cls, "__module__", "models")
        setattr(theirs, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "models", theirs)


def write(contents, path, layout):
    if layout == "archive":
        torch.save(contents, path)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=False)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("layout", ["archive", "stream"])
def test_its_weights_are_those_of_the_modules(modules, named_models, tmp_path, layout):
    path = tmp_path / "BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar"
    write(modules, path, layout)
    found = checkpoints.load_checkpoint(path)
    for name in ("encoder", "decoder"):
        expected = modules[name].state_dict()
        assert found[name].keys() == expected.keys()
        assert all(torch.equal(found[name][key], value) for key, value in expected.items())
    assert found["base"] == "coco_5_cap_per_img_5_min_word_freq"
    assert (found["epoch"], found["stage"], found["scores"]["bleu4"]) == (7, "finetune", 0.24)
    with pytest.raises(UserError, match="it has no best_bleu4"):
        checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)


@pytest.mark.parametrize("size", [14, 7])
def test_wrapped_and_resized_modules_are_read(modules, named_models, tmp_path, size, monkeypatch):
    """As several GPUs and `encoded_image_size` leave them."""
    path = tmp_path / "wrapped.pth.tar"
    monkeypatch.setattr(modules["encoder"], "enc_image_size", size)
    wrapped = {name: nn.DataParallel(modules[name]) for name in ("encoder", "decoder")}
    for module in wrapped.values():
        module.src_device_obj, module.device_ids = torch.device("cuda", 0), [0, 1]
    write({**modules, **wrapped, "encoder_optimizer": None}, path, "archive")
    found = checkpoints.load_checkpoint(path)
    assert found["encoded_image_size"] == size
    for name in ("encoder", "decoder"):
        assert found[name].keys() == modules[name].state_dict().keys()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_it_captions_as_the_same_weights_saved_by_us(modules, named_models, scenes, tmp_path):
    published, ours = tmp_path / "published.pth.tar", tmp_path / "ours.pth.tar"
    write(modules, published, "stream")
    weights = {name: modules[name].state_dict() for name in ("encoder", "decoder")}
    sizes = {"encoder_name": "resnet101", "encoded_image_size": 14, "image_size": 256}
    checkpoints.save_checkpoint(ours, tiny_checkpoint(**weights, **sizes, word_map=WORDS))
    words = tmp_path / "WORDMAP_x.json"
    words.write_text(json.dumps(WORDS))
    image = next((scenes / "images").iterdir())
    found, expected = (
        next(Captioner.load(path, "cpu", "off", words).caption(image, beam_size=2))
        for path in (published, ours)
    )
    assert found.words == expected.words and found.log_prob == expected.log_prob
    assert torch.equal(found.alphas, expected.alphas)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_the_scripts_use_it_with_a_word_map(modules, named_models, scenes, tmp_path, monkeypatch):
    path, words = tmp_path / "published.pth.tar", tmp_path / "WORDMAP_x.json"
    write(modules, path, "stream")
    words.write_text(str(WORDS).replace("'", '"'))
    monkeypatch.undo()  # ours again
    image = next((scenes / "images").iterdir())
    arguments = ["--img", image, "--model", path, "--output_folder", tmp_path, "--beam_size", 2]
    line = failure(run_here("caption.py", *arguments))
    assert "--word_map" in line
    process = run_here("caption.py", *arguments, "--word_map", words)
    assert process.returncode == 0, process.stderr
    assert set(process.stdout.split(":")[-1].split("(")[0].split()) <= {"a", "dog"}
    line = failure(run_here("eval.py", "--checkpoint", path, "--word_map", words,
                            "--data_folder", tmp_path, "--beam_size", 2))  # fmt: skip
    assert "WORDMAP_x" not in line and "x" in line  # the folder's only data set, without images


# ---------------------------------------------------------------------------------- malicious


class Call:
    """Calls a function with arguments when it is unpickled as pickle does it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("layout", ["archive", "stream"])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_its_code_does_not_run(modules, named_models, tmp_path, layout, place):
    path, trace = tmp_path / "bomb.pth.tar", tmp_path / "trace"
    bomb = Call(os.mkdir, str(trace))
    if place == "beside":
        write(modules | {"epoch": bomb}, path, layout)
    else:
        modules["decoder"].hidden = bomb
        write(modules, path, layout)
        del modules["decoder"].hidden
    with pytest.raises(UserError, match=r"bomb.pth.tar is damaged or .*: it names posix.mkdir"):
        checkpoints.load_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the bomb was live


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "os.system", "torch.load", "torch.hub.load", "torch._utils.os.system",
     "collections.abc", "numpy.load", "subprocess.Popen", "builtins.bytearray", "torch.Tensor"],
)  # fmt: skip
def test_names_that_it_needs_not_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "names.pth.tar"
    path.write_bytes(stream(f"\x80\x02c{module}\n{attribute}\nK\x05\x85R.".encode("latin1")))
    with pytest.raises(ValueError, match=f"it names {name}"):
        published.read(path)


def stream(*pickles):
    """The older layout of some pickled bytes."""
    head = [pickle.dumps(value, 2) for value in (torch_files.MAGIC, 1001, {"little_endian": True})]
    return b"".join([*head, *pickles])


def tensors(count, *views, key="0"):
    """The pickle of a list of tensors (size, stride, offset) on a storage of `count` numbers."""
    buffer, storage = io.BytesIO(), object()
    persistent = ("storage", torch.FloatStorage, key, "cpu", count, None)
    pickler = pickle.Pickler(buffer, 2)
    pickler.persistent_id = lambda value: persistent if value is storage else None
    rebuild = torch._utils._rebuild_tensor_v2
    pickler.dump(
        [Call(rebuild, storage, offset, size, stride, False, {}) for size, stride, offset in views]
    )
    return buffer.getvalue()


def exponential_key():
    """A dict whose key takes 2^60 steps to hash, as every tuple holds the one before it twice."""
    operations = [b"\x80\x02}K\x01\x85q\x00"]
    for _ in range(60):
        operations.append(b"h\x00h\x00\x86q\x00")
    return b"".join([*operations, b"K\x00s."])


def exponential_modules():
    """Modules that each hold the one before it twice, 40 deep."""
    module = nn.Module()
    for _ in range(40):
        parent = nn.Module()
        parent.a = parent.b = module
        module = parent
    return pickle.dumps({"encoder": module, "decoder": module}, 2)


EMPTY = pickle.dumps([], 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (tensors(10**12, ((1,), (1,), 0)), "larger than the file"),
        (tensors(-1, ((1,), (1,), 0)), "larger than the file"),
        (tensors(4, ((10**6, 10**6), (0, 0), 0)), "larger than its storage"),
        (tensors(4, ((2, 2), (2, 1), 3)), "larger than its storage"),
        (tensors(4, ((2,), (-1,), 3)), "negative sizes"),
        (tensors(2000, *[((2000,), (1,), 0)] * 999), "larger than the file"),
        (tensors(4, ((4,), (1,), 0), key=7), "int where none can be"),
        (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "an int"),
        (exponential_key(), "tuple where none can be"),
        (exponential_modules() + EMPTY, "no modules of the published form"),
        (b"\x80\x02ctorch.nn.modules\nModule\n}b." + EMPTY, "holds no encoder"),
        (pickle.dumps({"encoder": 1, "decoder": 2}, 2) + EMPTY, "has no attribute"),
        (pickle.dumps([1], 2) + EMPTY, "no encoder and decoder"),
        (tensors(4, ((4,), (1,), 0)) + EMPTY, "no values for some"),
        (b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.", "which no checkpoint needs"),
        (b"\x80\x020.", "which no checkpoint needs"),
        (b"\x80\x02R.", "takes what is not there"),
    ],
)
def test_what_would_harm_is_refused(tmp_path, contents, words):
    path = tmp_path / "large.pth.tar"
    path.write_bytes(stream(contents))
    with pytest.raises(UserError, match="large.pth.tar") as error:
        checkpoints.load_checkpoint(path)
    assert words in str(error.value) or words == "an int"


@pytest.mark.parametrize("contents", [exponential_key(), tensors(4, ((4,), (1,), 0), key=7)])
def test_archives_are_looked_through_before_they_are_loaded(tmp_path, contents, monkeypatch):
    path = tmp_path / "archive.pth.tar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", contents)
        archive.writestr("archive/data/7", bytes(16))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match=r"archive.pth.tar is damaged or .* where none can be"):
        checkpoints.load_checkpoint(path)


def test_a_stream_with_an_archive_behind_it_is_a_stream(tmp_path):
    path = tmp_path / "both.pth.tar"
    path.write_bytes(stream(tensors(10**9, ((1,), (1,), 0))))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(UserError, match=r"both.pth.tar .*larger than the file"):
        checkpoints.load_checkpoint(path)


@pytest.mark.slow
def test_a_flood_of_objects_is_refused(tmp_path):
    """Twenty million empty dicts would take gigabytes."""
    path = tmp_path / "flood.pth.tar"
    path.write_bytes(stream(b"\x80\x02" + b"}" * 20_000_000 + b"."))
    with pytest.raises(UserError, match=r"flood.pth.tar .*too many objects"):
        checkpoints.load_checkpoint(path)
    path.write_bytes(stream(b"\x80\x02" + b"(" * 5000 + b"."))
    with pytest.raises(UserError, match=r"flood.pth.tar .*nested too deeply"):
        checkpoints.load_checkpoint(path)


def test_numbers_that_end_too_early_are_refused(tmp_path):
    path = tmp_path / "short.pth.tar"
    whole = tensors(4, ((4,), (1,), 0)), pickle.dumps(["0"], 2), struct.pack("<q", 4)
    path.write_bytes(stream(*whole, bytes(16)))
    [tensor] = torch_files.read(path)
    assert torch.equal(tensor, torch.zeros(4))
    path.write_bytes(stream(*whole, bytes(15)))
    with pytest.raises(UserError, match=r"short.pth.tar .*fewer values"):
        checkpoints.load_checkpoint(path)


@pytest.mark.parametrize("layout", ["archive", "stream"])
def test_reading_gives_what_torch_load_gives(tmp_path, layout):
    contents = {
        "numbers": [1, -2, 2**40, 0.5, True, None, "text ü", (3, (4,))],
        1: {"w": torch.randn(3, 4).T, "b": torch.randn(5)[2:], "i": torch.arange(4)},
        "half": torch.randn(2, 2).bfloat16(),
        "none": torch.empty(0, 3),
    }
    write(contents, tmp_path / "file", layout)
    found, expected = torch_files.read(tmp_path / "file"), torch.load(tmp_path / "file")
    assert found["numbers"] == expected["numbers"]
    for name, tensor in [*expected[1].items(), ("half", expected["half"])]:
        mine = found[1][name] if name in found[1] else found[name]
        assert torch.equal(mine, tensor) and mine.dtype == tensor.dtype
        assert mine.stride() == tensor.stride()
    assert found["none"].shape == (0, 3)
