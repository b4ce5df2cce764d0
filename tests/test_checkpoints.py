"""What is written into a model's file and what is believed of one that is read."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, failure, tiny_checkpoint

import checkpoints
import decoding
from captioner import Captioner, _in_words
from checkpoints import RUN_KEYS, load_checkpoint, save_checkpoint
from encoders import Encoder, EncoderError
from groundwork.errors import UserError
from models import DecoderWithAttention, LSTMConfig


@pytest.fixture(scope="module")
def checkpoint():
    """Of a small encoder and decoder with random weights."""
    torch.manual_seed(0)
    encoder = Encoder("squeezenet1_1", 3, weights=None)
    decoder = DecoderWithAttention(
        LSTMConfig(len(WORDS), encoder.dim, 8, 6, 10, encoded_image_size=3)
    )
    return tiny_checkpoint(
        encoder_name="squeezenet1_1",
        encoder=encoder.state_dict(),
        decoder_config=dataclasses.asdict(decoder.config),
        decoder=decoder.state_dict(),
        word_map=WORDS,
    )


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, tiny_checkpoint())
    assert list(tmp_path.iterdir()) == [path]
    assert_same(torch.load(path, weights_only=True), tiny_checkpoint())
    assert_same(load_checkpoint(path), tiny_checkpoint())


def test_a_checkpoint_that_cannot_be_saved_leaves_the_old_one(tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, tiny_checkpoint())
    with pytest.raises(AttributeError):
        save_checkpoint(path, tiny_checkpoint(best=lambda: "local functions cannot be pickled"))
    assert_same(load_checkpoint(path), tiny_checkpoint())
    assert list(tmp_path.iterdir()) == [path]


def assert_refused(path):
    with pytest.raises(UserError, match=path.name) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_checkpoint(tmp_path, share):
    path = tmp_path / "cut.pth.tar"
    save_checkpoint(path, tiny_checkpoint())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert_refused(path)


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path):
    """The weights would still load, as other numbers."""
    path = tmp_path / "flipped.pth.tar"
    weights = torch.arange(1000.0)
    save_checkpoint(path, tiny_checkpoint(decoder={"weight": weights}))
    whole = bytearray(path.read_bytes())
    place = whole.index(weights.numpy().tobytes()) + 2000
    whole[place] ^= 1
    path.write_bytes(whole)
    assert not torch.equal(torch.load(path, weights_only=True)["decoder"]["weight"], weights)
    assert_refused(path)
    with pytest.raises(UserError, match="is not as it was written"):
        load_checkpoint(path)


@pytest.mark.parametrize("size", [1, 50, 5000])
def test_random_bytes_are_no_checkpoint(tmp_path, size):
    path = tmp_path / "random.pth.tar"
    path.write_bytes(np.random.default_rng(size).bytes(size))
    assert_refused(path)


def test_missing_checkpoint(tmp_path):
    assert_refused(tmp_path / "missing.pth.tar")
    assert_refused(tmp_path)  # a folder


class Bomb:
    """Makes a folder when it is unpickled as pickle does it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, protocol):
    path, trace = tmp_path / "bomb.pth.tar", tmp_path / "trace"
    contents = tiny_checkpoint(best=Bomb(trace))
    if protocol == "torch":
        torch.save(contents, path)
    else:
        path.write_bytes(pickle.dumps(contents))
    assert_refused(path)
    assert not trace.exists()
    torch.load(path, weights_only=False) if protocol == "torch" else pickle.loads(path.read_bytes())
    assert trace.exists()  # the bomb was live


@pytest.mark.parametrize(
    "contents",
    [
        {"layer.weight": torch.ones(2)},
        {k: v for k, v in tiny_checkpoint().items() if k != "image_size"},
        [tiny_checkpoint()],
        torch.ones(3),
    ],
)
def test_a_file_of_another_kind_is_no_checkpoint(tmp_path, contents):
    path = tmp_path / "other.pth.tar"
    torch.save(contents, path)
    assert_refused(path)
    with pytest.raises(UserError, match="image_size"):
        load_checkpoint(path)


def test_build_models(checkpoint):
    encoder, decoder = checkpoints.build_models(checkpoint, dropout=0.25)
    assert_same(dict(encoder.state_dict()), dict(checkpoint["encoder"]))
    assert_same(dict(decoder.state_dict()), dict(checkpoint["decoder"]))
    assert not encoder.training and not decoder.training and decoder.dropout.p == 0.25
    grid = encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert grid.shape == (1, 3, 3, encoder.dim)
    _, _, alphas, _ = decoder(grid, torch.tensor([[4, 1, 5]]), torch.tensor([3]))
    assert alphas.shape[-1] == 9


def test_an_older_file_without_a_configuration_tells_it_by_its_shapes(tmp_path, checkpoint):
    path = tmp_path / "older.pth.tar"
    older = {k: v for k, v in checkpoint.items() if k not in ("decoder_name", "decoder_config")}
    save_checkpoint(path, older)
    _, expected = checkpoints.build_models(checkpoint)
    _, decoder = checkpoints.build_models(load_checkpoint(path))
    assert decoder.config == expected.config
    assert_same(dict(decoder.state_dict()), dict(expected.state_dict()))


def test_weights_of_other_models(checkpoint):
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        with pytest.raises(UserError, match="do not fit") as error:
            checkpoints.build_models(checkpoint | {part: checkpoint[other]})
        assert "\n" not in str(error.value)
    short = {k: v for k, v in checkpoint["decoder"].items() if k != "fc.bias"}
    with pytest.raises(UserError, match="fc.bias"):
        checkpoints.build_models(checkpoint | {"decoder": short})
    with pytest.raises(EncoderError, match="squeezenet9"):
        checkpoints.build_models(checkpoint | {"encoder_name": "squeezenet9"})


def test_weights_are_compared_before_models_take_memory(checkpoint):
    """Built in full, these would take gigabytes."""
    wide = {"f_beta.weight": torch.zeros(1, 300_000), "embedding.weight": torch.zeros(300_000, 1)}
    with pytest.raises(UserError, match="do not fit"):
        checkpoints.build_models(checkpoint | {"decoder": checkpoint["decoder"] | wide})
    with pytest.raises(UserError, match="do not fit"):
        checkpoints.build_models(checkpoint | {"encoder_name": "resnet152"})
    config = LSTMConfig(len(WORDS), 7, 8, 6, 10, encoded_image_size=3)
    other = DecoderWithAttention(config).state_dict()
    with pytest.raises(UserError, match="not for the features of 'squeezenet1_1'"):
        of_other = {"decoder": other, "decoder_config": dataclasses.asdict(config)}
        checkpoints.build_models(checkpoint | of_other)


def test_load_model(tmp_path, checkpoint):
    path, bare = tmp_path / "with.pth.tar", tmp_path / "bare.pth.tar"
    shuffled = dict(reversed(WORDS.items()))
    save_checkpoint(path, checkpoint | {"word_map": shuffled})
    save_checkpoint(bare, {k: v for k, v in checkpoint.items() if k != "word_map"})
    model = Captioner.load(path, "cpu", amp="off")
    assert model.device.type == "cpu" and not model.amp
    assert list(model.word_map.items()) == list(WORDS.items())  # in the order of the indices
    caption = decoding.Caption([1, 2], -1.0, None)
    found = _in_words(caption, list(model.word_map), model.rule, "pad")
    assert found.words == ["a", "dog"] and found.text == "a dog" and found.fit == "pad"
    with pytest.raises(UserError, match="bare.pth.tar .*--word_map"):
        Captioner.load(bare, "cpu")
    named = tmp_path / "WORDMAP.json"
    named.write_text(json.dumps(WORDS))
    assert Captioner.load(bare, "cpu", word_map=named).word_map == WORDS
    assert Captioner.load(path, "cpu", word_map=named).word_map == WORDS  # the same as its own
    named.write_text(json.dumps(WORDS | {"a": 2, "dog": 1}))
    with pytest.raises(UserError, match=r"WORDMAP.json is of another .*with.pth.tar.*leave it out"):
        Captioner.load(path, "cpu", word_map=named)
    named.write_text(json.dumps(WORDS | {"cat": 6}))
    with pytest.raises(UserError, match=r"WORDMAP.json is of another vocabulary \(7 words\)"):
        Captioner.load(bare, "cpu", word_map=named)
    with pytest.raises(UserError, match="^beam_size 7 is larger than the vocabulary of 2 words"):
        Captioner.load(path, "cpu").caption([], beam_size=7)
    run = tmp_path / "run"
    run.mkdir()
    path.rename(checkpoints.checkpoint_path(run, "a", best=True))
    assert Captioner.load(run, "cpu").word_map == WORDS


def test_a_folder_is_the_best_checkpoint_in_it_or_below(tmp_path):
    def touch(folder, base, best=True):
        folder.mkdir(exist_ok=True)
        path = checkpoints.checkpoint_path(folder, base, best=best)
        path.touch()
        return path

    find = checkpoints.find_checkpoint
    file = touch(tmp_path, "a", best=False)
    assert find(file) == file and find(str(file)) == file
    assert find(tmp_path / "missing") == tmp_path / "missing"  # loading it says so
    with pytest.raises(UserError, match="no BEST checkpoint in the folder"):
        find(tmp_path)
    deep = touch(tmp_path / "deep", "a")
    assert find(tmp_path) == deep
    other = touch(tmp_path / "other", "a")
    with pytest.raises(UserError, match="holds 2 models, name one: ") as error:
        find(tmp_path)
    assert str(deep) in str(error.value) and str(other) in str(error.value)
    own = touch(tmp_path, "a")
    assert find(tmp_path) == own
    for i in range(30):
        touch(tmp_path, f"b{i}")
    with pytest.raises(UserError, match="holds 31 models, name one: .* and 21 more$"):
        find(tmp_path)


def test_newest_best_checkpoint(tmp_path, capsys):
    with pytest.raises(UserError, match=f"{tmp_path.name}.*train.py"):
        checkpoints.newest_best_checkpoint(tmp_path)
    (tmp_path / "deep").mkdir()
    paths = [
        checkpoints.checkpoint_path(tmp_path / "deep", "a", best=True),
        checkpoints.checkpoint_path(tmp_path, "b", best=True),
        checkpoints.checkpoint_path(tmp_path, "c"),
    ]
    for age, path in zip((1, 2, 0), paths, strict=True):
        path.touch()
        os.utime(path, (10**9 - age, 10**9 - age))
    assert paths[2].name == "checkpoint_c.pth.tar"
    assert checkpoints.newest_best_checkpoint(tmp_path) == paths[0]
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"taking {paths[0]}; 1 older one, for --model: {paths[1]}"
    paths[1].unlink()
    assert checkpoints.newest_best_checkpoint(tmp_path) == paths[0]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------- hostile contents


def spoilt(key, name, tensor):
    return {key: tiny_checkpoint()[key] | {name: tensor}}


def endless():
    items = []
    items.append(items)
    return items


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (spoilt("decoder", "weight", torch.tensor([1.0, torch.nan])), "decoder holds values"),
        (spoilt("encoder", "weight", torch.tensor([torch.inf])), "encoder holds values"),
        (spoilt("optimizer", "state", {0: {"exp_avg": torch.tensor(torch.nan)}}), "optimizer hold"),
        (spoilt("decoder", "weight", torch.zeros(1).expand(10**9)), "larger than its storage"),
        (spoilt("decoder", "weight", torch.eye(3).to_sparse()), "names torch._utils._rebuild_sp"),
        (
            spoilt("decoder", "weight", torch.zeros(3, device="meta")),
            "names torch._utils._rebuild",
        ),
        (spoilt("decoder", "weight", torch.ones(3, dtype=torch.bool)), "decoder holds torch.bool"),
        (spoilt("decoder", "weight", [1.0]), "decoder cannot be"),
        ({"decoder": {}}, "decoder cannot be"),
        ({"encoder_name": 101}, "encoder_name cannot be"),
        ({"encoded_image_size": 10**6}, "encoded_image_size cannot be"),
        ({"image_size": True}, "image_size cannot be"),
        ({"base": "../../other"}, "base cannot be"),
        ({"options": {"data_folder": None}}, "options cannot be"),
        ({"stage": "third"}, "stage cannot be"),
        ({"epoch": -1}, "epoch cannot be"),
        ({"scores": {"bleu4": [0.5]}}, "scores cannot be"),
        ({"random": [torch.zeros(3)]}, "random cannot be"),
        ({"partial": {"count": 2, "sums": {"loss": "1"}}}, "partial cannot be"),
        ({"log": endless()}, "log cannot be"),
        ({"log": [{}]}, "log cannot be"),
        ({"log": [tiny_checkpoint()["log"][0] | {"encoder_lr": "x"}]}, "log cannot be"),
        ({"records": [{}]}, "records cannot be"),
        ({"word_map": None}, "word_map cannot be"),
    ],
)
def test_contents_of_no_use_are_refused_by_name(tmp_path, changes, words):
    path = tmp_path / "unfit.pth.tar"
    torch.save(tiny_checkpoint(**changes), path)
    with pytest.raises(UserError, match=f"unfit.pth.tar .*{words}"):
        load_checkpoint(path, RUN_KEYS)


def test_an_archive_larger_than_its_file_is_refused(tmp_path):
    path = tmp_path / "bomb.pth.tar"
    save_checkpoint(tmp_path / "good.pth.tar", tiny_checkpoint(decoder={"w": torch.zeros(10**6)}))
    with (
        zipfile.ZipFile(tmp_path / "good.pth.tar") as good,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in good.namelist():
            packed.writestr(name, good.read(name))
    assert path.stat().st_size < 10**5
    with pytest.raises(UserError, match=r"bomb.pth.tar .*compressed"):
        load_checkpoint(path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """The largest file that the process may write stands for the room on the disk."""
    path = tmp_path / "checkpoint.pth.tar"
    save_checkpoint(path, tiny_checkpoint())
    script = f"""
import resource, torch, checkpoints
from groundwork import errors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
errors.run(lambda: checkpoints.save_checkpoint({str(path)!r}, {{"w": torch.zeros(10**6)}}))
"""
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert failure(process).startswith(f"error: cannot write {path}: File too large")
    assert list(tmp_path.iterdir()) == [path]
    assert_same(load_checkpoint(path), tiny_checkpoint())
