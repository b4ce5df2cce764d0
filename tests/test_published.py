"""Checkpoints of the older published form: whole pickled modules, benign and malicious."""

import io
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
from conftest import WORDS, failure, run_here
from torch import nn

import checkpoints
import published
from utils import UserError

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
    optimizer = torch.optim.Adam(decoder.parameters())
    return {
        "epoch": 7, "epochs_since_improvement": 0, "bleu-4": np.float64(0.24).item(),
        "encoder": encoder, "decoder": decoder,
        "encoder_optimizer": None, "decoder_optimizer": optimizer,
    }  # fmt: skip


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
    assert (found["epoch"], found["stage"], found["scores"]["bleu4"]) == (7, "decoder", 0.24)
    with pytest.raises(UserError, match="it has no best_bleu4"):
        checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)


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
    with pytest.raises(UserError, match=r"bomb.pth.tar is damaged or .*: it names .*mkdir"):
        checkpoints.load_checkpoint(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the bomb was live


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "os.system", "torch.load", "torch.hub.load", "models.torch.hub.load",
     "torch._utils.os.system", "collections.abc", "numpy.load", "subprocess.Popen"],
)  # fmt: skip
def test_names_that_it_needs_not_are_refused(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    pickled = f"c{module}\n{attribute}\n(S'x'\ntR.".encode()
    path = tmp_path / "names.pth.tar"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        published.read(path)


def stream(*pickles):
    """The older layout of some pickled bytes."""
    head = [pickle.dumps(value, 2) for value in (published.MAGIC, 1001, {"little_endian": True})]
    return b"".join([*head, *pickles])


def tensor(count, size, stride, offset=0):
    """The pickle of a tensor on a storage of `count` numbers."""
    buffer, storage = io.BytesIO(), object()
    persistent = ("storage", torch.FloatStorage, "0", "cpu", count, None)
    pickler = pickle.Pickler(buffer, 2)
    pickler.persistent_id = lambda value: persistent if value is storage else None
    pickler.dump(Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (tensor(10**12, (1,), (1,)), "larger than the file"),
        (tensor(-1, (1,), (1,)), "larger than the file"),
        (tensor(4, (10**6, 10**6), (0, 0)), "larger than its storage"),
        (tensor(4, (2, 2), (2, 1), offset=3), "out of bounds"),
        (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "numbered with gaps"),
        (pickle.dumps({"encoder": 1, "decoder": 2}, 2) + pickle.dumps([], 2), "are no modules"),
        (pickle.dumps([1], 2) + pickle.dumps([], 2), "no encoder and decoder"),
    ],
)
def test_what_would_take_memory_is_refused(tmp_path, contents, words):
    path = tmp_path / "large.pth.tar"
    path.write_bytes(stream(contents))
    with pytest.raises(UserError, match=f"large.pth.tar .*{words}"):
        checkpoints.load_checkpoint(path)


def test_numbers_that_end_too_early_are_refused(tmp_path):
    path = tmp_path / "short.pth.tar"
    path.write_bytes(
        stream(tensor(4, (4,), (1,)), pickle.dumps(["0"], 2), struct.pack("<q", 4), bytes(15))
    )
    with pytest.raises(UserError, match="short.pth.tar is damaged"):
        checkpoints.load_checkpoint(path)
