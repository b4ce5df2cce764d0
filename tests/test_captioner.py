"""The library: the README's example as it stands, what it takes, and other projects beside it."""

import json
import re
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, best, run_here
from PIL import Image

from captioner import Captioner
from groundwork.errors import UserError
from groundwork.isolation import own_modules

EXAMPLE = re.compile(r"```python\n(from captioner import Captioner\n.*?)```", re.S)


@pytest.fixture(scope="module")
def model(checkpoint):
    return Captioner.load(checkpoint, "cpu", amp="off")


@pytest.fixture(scope="module")
def paths(scenes):
    return sorted((scenes / "images").iterdir())


def run_python(code, cwd, path=()):
    """Runs code in a process of its own whose path begins with the folders."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n{code}"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.parametrize("place", ["here", pytest.param("elsewhere", marks=pytest.mark.slow)])
def test_the_example_of_the_readme_runs(place, trained, paths, tmp_path):
    [example] = EXAMPLE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(list(filter(None, example.splitlines()))) == 4
    name = re.search(r'load\("(.*?)"\)', example).group(1)
    path = best(trained)
    if place == "here":
        shutil.copy(path, tmp_path / name)
        shutil.copy(paths[0], tmp_path / "x.jpg")
        folder = tmp_path
    else:  # as a reader changes it: paths from another folder
        folder = tmp_path / "other"
        folder.mkdir()
        example = example.replace(name, str(path)).replace('"x.jpg"', repr(str(paths[0])))
    head = f"""
import numpy as np
from PIL import Image
image = Image.open({str(paths[1])!r})
array = np.asarray(Image.open({str(paths[2])!r}))
"""
    printed = run_python(head + example, folder, [ROOT]).splitlines()
    expected = Captioner.load(path).caption(paths[:3], beam_size=5)
    for line, caption in zip(printed, expected, strict=True):
        text, log_prob = line.rsplit(" ", 1)
        assert text == caption.text
        assert float(log_prob) == pytest.approx(caption.log_prob, abs=1e-3)


# ----------------------------------------------------------------------------------- what it takes


def test_images_of_any_kind_get_the_same_caption(model, paths):
    picture = Image.open(paths[0])
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [paths[0], str(paths[0]), picture, array, tensor]
    captions = list(model.caption(kinds, beam_size=3))
    alone = [caption for kind in kinds for caption in model.caption(kind, beam_size=3)]
    for caption in captions + alone:
        assert caption.words == captions[0].words
        assert caption.log_prob == pytest.approx(captions[0].log_prob, abs=1e-4)
        assert caption.text == " ".join(caption.words)
        assert caption.alphas.shape == (len(caption.words), 9)
    together = model.caption(np.stack([array, array]), beam_size=3)
    assert [caption.text for caption in together] == [captions[0].text] * 2
    assert captions[0].draw(tensor).size == captions[0].draw(paths[0]).size


def test_transparent_and_16_bit_pictures_are_read_as_files_are(model, paths, tmp_path):
    rgba = Image.open(paths[0]).convert("RGBA")
    rgba.putalpha(120)
    gray = Image.fromarray(np.asarray(Image.open(paths[1]).convert("L"), np.uint16) * 257)
    for image, name in ((rgba, "a.png"), (gray, "b.png")):
        image.save(tmp_path / name)
        ours, files = model.caption([image, tmp_path / name], beam_size=2)
        assert ours.words == files.words and ours.log_prob == pytest.approx(files.log_prob)


def test_a_generator_is_captioned_a_batch_at_a_time(model, paths):
    taken = []

    def images():
        for path in paths:
            taken.append(path)
            yield path

    captions = model.caption(images(), beam_size=1, batch_size=3)
    next(captions)
    assert len(taken) == 3
    assert len(list(captions)) == len(paths) - 1
    assert taken == paths


def test_n_captions_are_those_of_the_beam_the_best_first(model, paths):
    ones = list(model.caption(paths[:2], beam_size=4))
    for one, beam in zip(ones, model.caption(paths[:2], beam_size=4, n=3), strict=True):
        assert len(beam) == 3 and len({caption.text for caption in beam}) == 3
        assert beam[0].words == one.words
        assert [c.log_prob for c in beam] == sorted((c.log_prob for c in beam), reverse=True)


def test_drawn_captions_follow_from_the_seed(model, paths):
    def draw(seed, temperature=1.5):
        found = model.caption(paths[:2], n=6, temperature=temperature, seed=seed)
        return [[caption.text for caption in captions] for captions in found]

    assert draw(1) == draw(1) != draw(2)
    assert all(len(set(texts)) > 1 for texts in draw(1))
    [cold] = model.caption(paths[:1], temperature=1e-3)
    [greedy] = model.caption(paths[:1], beam_size=1)
    assert cold.words == greedy.words


def test_bounds_of_the_search_are_kept(model, paths):
    [short] = model.caption(paths[0], max_words=2)
    assert len(short.words) <= 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": "missing.jpg"}, "no image missing.jpg"),
        ({"images": [np.zeros((4, 4, 3))]}, "uint8 array"),
        ({"images": [np.zeros((4, 4), np.uint8)]}, r"uint8 \(4, 4\)"),
        ({"images": [torch.zeros(4, 5, 3, dtype=torch.uint8)]}, r"tensor \(3, H, W\)"),
        ({"images": [None]}, "not <class 'NoneType'>"),
        ({"beam_size": 10**6}, "larger than the vocabulary"),
        ({"beam_size": 0}, "beam_size 0 is not a whole number of 1 or more"),
        ({"beam_size": "5"}, "beam_size '5' is not a whole number"),
        ({"beam_size": True}, "beam_size True"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 1.5}, "batch_size 1.5"),
        ({"max_words": 0}, "max_words 0 is not a whole number from 1 to 1000"),
        ({"length_penalty": float("nan")}, "length_penalty nan is not a number from 0 to 10"),
        ({"length_penalty": 1e9}, "length_penalty"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": "1"}, "temperature '1'"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 3}, "seed is for what is drawn"),
        ({"n": "3"}, "n '3'"),
        ({"images": 5}, "not <class 'int'>"),
        ({"images": b"x.jpg"}, "not <class 'bytes'>"),
        ({"images": np.zeros((4, 4), np.uint8)}, r"uint8 \(4, 4\)"),
        ({"images": np.zeros((0, 4, 3), np.uint8)}, "cannot read an image"),
        ({"images": Image.new("RGB", (0, 5))}, "cannot read an image"),
        ({"images": np.zeros((1, 400, 3), np.uint8)}, "a line, not a picture"),
        ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta")}, "uint8 tensor"),
        ({"n": 9, "beam_size": 3}, "9 captions"),
        ({"n": 0}, "n 0 is not"),
        ({"temperature": -1}, "temperature -1 is not"),
    ],
)
def test_what_cannot_be_is_one_line(model, paths, arguments, words):
    with pytest.raises(UserError, match=words) as error:
        list(model.caption(**({"images": paths[0]} | arguments)))
    assert "\n" not in str(error.value)


def test_what_was_read_before_an_unreadable_image_is_captioned(model, paths):
    found = []
    with pytest.raises(UserError, match="no image missing.jpg"):
        for caption in model.caption([*paths[:2], "missing.jpg", paths[3]], beam_size=1):
            found.append(caption)
    assert len(found) == 2


def test_a_truncated_picture_and_a_wrong_name_are_one_line(model, paths, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(paths[0].read_bytes()[:2000])
    with Image.open(tmp_path / "cut.jpg") as picture, pytest.raises(UserError, match="cannot read"):
        list(model.caption(picture))
    for arguments in ({"path": 5}, {"path": paths[0], "amp": "on"}, {"path": "x", "device": []}):
        with pytest.raises(UserError):
            Captioner.load(**arguments)


# ------------------------------------------------------------------------- other projects beside it

# A project with modules of our names, which uses them before and after.
OTHERS = """
import utils, models, datasets
assert utils.mine and models.mine and datasets.mine
{load}
for caption in model.caption([{image!r}], beam_size=2):
    print(caption.text)
caption.draw({image!r})
import checkpoints  # not imported before: their own
assert utils.mine and models.mine and datasets.mine and checkpoints.mine
assert sys.modules["utils"] is utils and sys.modules["models"] is models
"""
LOADS = {
    "path": "sys.path.append({root!r})\nfrom captioner import Captioner\n"
    "model = Captioner.load({checkpoint!r}, device='cpu')",
    "hub": "import torch\n"
    "model = torch.hub.load({root!r}, 'captioner', {checkpoint!r}, 'cpu', source='local')\n"
    "assert 'captioner' not in sys.modules and {root!r} not in sys.path",
}


@pytest.mark.parametrize("way", ["hub", pytest.param("path", marks=pytest.mark.slow)])
def test_beside_another_project_of_the_same_names(way, checkpoint, paths, tmp_path):
    for name in ("utils", "models", "datasets", "checkpoints"):
        (tmp_path / f"{name}.py").write_text("mine = True")
    load = LOADS[way].format(root=str(ROOT), checkpoint=str(checkpoint))
    code = OTHERS.format(load=load, image=str(paths[0]))
    [caption] = Captioner.load(checkpoint, "cpu").caption(paths[0], beam_size=2)
    assert run_python(code, tmp_path, [tmp_path]).splitlines()[-1] == caption.text


def test_names_mean_what_the_path_says(monkeypatch, tmp_path):
    """Ours stay where the path leads to them, others' come back, and no others appear."""
    others = type(sys)("features")
    monkeypatch.setitem(sys.modules, "features", others)
    monkeypatch.delitem(sys.modules, "textbook", raising=False)
    with own_modules():
        import features
        import textbook

        assert features is not others and features.cache_features and textbook.SIZE
    assert sys.modules["features"] is others
    assert sys.modules["textbook"] is textbook  # the repository is on the tests' path
    monkeypatch.delitem(sys.modules, "textbook")
    with own_modules(keep=False):
        import textbook

        assert textbook.SIZE
    assert "textbook" not in sys.modules
    assert sys.modules["captioner"].Captioner is Captioner


@pytest.mark.slow
def test_the_scripts_caption_as_the_library_does(model, checkpoint, paths, tmp_path):
    process = run_here(
        "caption.py", "--img", *paths, "--model", checkpoint, "--json", "--device", "cpu",
        "--amp", "off", "--beam_size", 3, "--batch_size", 3, "--output_folder", tmp_path,
    )  # fmt: skip
    records = json.loads(process.stdout)
    for record, caption in zip(records, model.caption(paths, 3, batch_size=3), strict=True):
        assert record["caption"] == caption.text
        drawn = np.asarray(caption.draw(record["image"]))
        assert np.array_equal(np.asarray(Image.open(record["picture"])), drawn)


class Photographs:
    """Stands for a batch of images that can be moved to a GPU."""

    def __init__(self, number):
        self.number = number

    def to(self, device, non_blocking):
        return self


@pytest.fixture
def without_a_gpu(monkeypatch):
    """What `encode_ahead` asks of a captioner on a GPU, and which batches are encoded, and whether
    by the caller's thread."""
    main, encoded = threading.get_ident(), []

    def features(images):
        encoded.append((images.number, threading.get_ident() == main))
        return images.number

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None)
    model = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        encoder=SimpleNamespace(features=features),
        autocast=nullcontext,
        _aside=stream,
    )
    return model, encoded


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_a_gpu_encodes_a_batch_while_the_one_before_is_in_use(count, without_a_gpu):
    model, encoded = without_a_gpu
    found = []
    for number in Captioner.encode_ahead(model, map(Photographs, range(count))):
        found.append(number)
        assert len(encoded) <= number + 2
    assert found == list(range(count))
    assert encoded == [(number, number == 0) for number in range(count)]


def test_batches_before_images_that_cannot_be_read_come_first(without_a_gpu):
    def batches():
        yield from map(Photographs, range(3))
        raise UserError("no image")

    found = []
    with pytest.raises(UserError, match="no image"):
        for number in Captioner.encode_ahead(without_a_gpu[0], batches()):
            found.append(number)
    assert found == [0, 1, 2]
