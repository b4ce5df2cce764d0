"""create_input_files against what its sources say, file by file."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import create_input_files as create_input_files_script
import demo
import input_files
import utils
import word_rules
from groundwork.errors import UserError
from groundwork.files import read_json, sole_writer
from utils import create_input_files

SCRIPT = Path(__file__).parents[1] / "create_input_files.py"
SIZE = 16
BASE = "demo_2_cap_per_img_1_min_word_freq"


def sentence(text, **more):
    return {"tokens": text.lower().rstrip(" .").split(), "raw": text, **more}


class Source:
    """A data set's folder of random PNGs, exactly SIZE pixels wide, and its JSON."""

    def __init__(self, folder):
        self.images, self.output = folder / "images", folder / "data"
        self.json = folder / "dataset.json"
        self.entries, self.pixels = [], {}
        self.images.mkdir()
        self.rng = np.random.default_rng(7)

    def add(self, filename, split, *texts, filepath="", **more):
        pixels = self.rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        path = self.images / filepath / filename
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        self.pixels[filename] = pixels.transpose(2, 0, 1)
        sentences = [sentence(text) for text in texts]
        entry = {"filename": filename, "split": split, "sentences": sentences, **more}
        self.entries.append(entry | ({"filepath": filepath} if filepath else {}))

    def create(self, **options):
        self.json.write_text(json.dumps({"images": self.entries, "dataset": "demo"}))
        options = {"captions_per_image": 2, "min_word_freq": 1, "max_len": 6} | options
        options = {"output_folder": self.output, "image_size": SIZE, "workers": 1} | options
        return create_input_files("demo", self.json, self.images, **options)

    def run_script(self, *arguments):
        self.json.write_text(json.dumps({"images": self.entries}))
        command = [sys.executable, SCRIPT, "--dataset", "flickr8k", "--karpathy_json", self.json]
        command += ["--image_folder", self.images, "--output_folder", self.output]
        command += ["--image_size", str(SIZE), "--workers", "2", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    def read(self, kind, split=None):
        name = f"{split}_{kind}_{BASE}" if split else f"{kind}_{BASE}"
        if kind == "IMAGES":
            with h5py.File(self.output / f"{name}.hdf5") as file:
                assert file["images"].dtype == np.uint8
                return file["images"][:], file.attrs["captions_per_image"]
        return json.loads((self.output / f"{name}.json").read_text())

    def listing(self):
        return sorted(path.name for path in self.output.glob("*"))


@pytest.fixture
def source(tmp_path):
    """Four images in three splits; the words seen more than once are a, dog, runs, cat, the."""
    source = Source(tmp_path)
    source.add("0.png", "train", "A dog runs .", "The dog .", imgid=10)
    source.add("1.png", "val", "A cat", "cat runs fast", imgid=11)
    source.add("2.png", "train", "the cat sleeps", "a bird", imgid=12)
    source.add("3.png", "test", "one zebra", "A dog", imgid=13)
    return source


EXPECTED_WORDS = ["a", "dog", "runs", "the", "cat"]


# ------------------------------------------------------------------------ the files of a data set


def test_files_hold_what_the_source_says(source):
    summary = source.create()
    word_map = source.read("WORDMAP")
    words = {index: word for word, index in word_map.items()}
    assert len(words) == len(word_map)
    for split, files in {"TRAIN": ["0.png", "2.png"], "VAL": ["1.png"], "TEST": ["3.png"]}.items():
        images, captions_per_image = source.read("IMAGES", split)
        assert captions_per_image == 2
        np.testing.assert_array_equal(images, [source.pixels[name] for name in files])
        captions, lengths = source.read("CAPTIONS", split), source.read("CAPLENS", split)
        references = source.read("REFERENCES", split)
        assert len(captions) == len(lengths) == 2 * len(files)
        entries = [next(e for e in source.entries if e["filename"] == name) for name in files]
        for i, (caption, length) in enumerate(zip(captions, lengths, strict=True)):
            decoded = [words[index] for index in caption]
            truth = entries[i // 2]["sentences"][i % 2]["tokens"]
            known = [word if word in EXPECTED_WORDS else "<unk>" for word in truth]
            assert decoded == ["<start>", *known, "<end>"] + ["<pad>"] * (6 - len(truth))
            assert length == len(truth) + 2
        assert references == [
            {
                "filename": entry["filename"],
                "id": entry["imgid"],
                "captions": [s["raw"] for s in entry["sentences"]],
                "width": SIZE,
                "height": SIZE,
            }
            for entry in entries
        ]
    assert summary["splits"]["VAL"] == {"images": 1, "captions": 2, "unknown": 1 / 5}
    assert summary["splits"]["TRAIN"] == {"images": 2, "captions": 4, "unknown": 2 / 10}
    assert summary["vocabulary"] == 5 + 4
    assert set(summary["left_out"].values()) == {0}
    assert len(source.listing()) == 3 * 4 + 1


def test_word_map_counted_by_hand(source):
    source.create()
    assert list(source.read("WORDMAP").items()) == [
        ("a", 1),
        ("dog", 2),
        ("runs", 3),
        ("the", 4),
        ("cat", 5),
        ("<unk>", 6),
        ("<start>", 7),
        ("<end>", 8),
        ("<pad>", 0),
    ]


def test_word_map_counts_captions_that_are_left_out(source):
    source.add("4.png", "train", "fine", "long long long long long long long")
    source.create()
    assert source.read("WORDMAP")["long"] == 6


def test_restval_is_train_and_filepath_is_joined(source):
    source.add("4.png", "restval", "a dog", filepath="val2014", cocoid=77)
    source.create()
    images, _ = source.read("IMAGES", "TRAIN")
    np.testing.assert_array_equal(images[2], source.pixels["4.png"])
    assert source.read("REFERENCES", "TRAIN")[2]["id"] == 77


def test_other_names_of_splits_and_captions_as_written_alone_are_taken(source, tmp_path):
    """As in other people's versions of Karpathy's files."""
    source.create()
    expected = {path.name: path.read_bytes() for path in source.output.iterdir()}
    for i, name in enumerate(["validation", "dev", "VAL"]):
        for entry in source.entries:
            entry["split"] = name if entry["filename"] == "1.png" else entry["split"]
            for own in entry["sentences"]:
                own.pop("tokens", None)
        source.create(output_folder=tmp_path / str(i))
        found = {path.name: path.read_bytes() for path in (tmp_path / str(i)).iterdir()}
        assert found == expected


def test_references_keep_boxes_and_do_without_raw_and_id(source):
    boxes = {"dog": [0, 1, 2, 3]}
    source.add("4.png", "val", "a dog", boxes=boxes)
    del source.entries[-1]["sentences"][0]["raw"]
    source.create()
    reference = {"filename": "4.png", "id": 4, "captions": ["a dog"], "boxes": boxes}
    assert source.read("REFERENCES", "VAL")[1] == reference | {"width": SIZE, "height": SIZE}


def test_references_have_the_photographs_sizes_as_they_stand_upright(source):
    """Whatever the JSON says, and without the images that are left out."""
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter
    Image.new("RGB", (30, 20)).save(source.images / "0.png", exif=turned)
    Image.new("RGB", (40, 10)).save(source.images / "2.png")
    source.entries[2] |= {"width": 1, "height": 1}
    source.add("4.png", "train", "a dog")
    (source.images / "4.png").write_text("no image")
    source.add("5.png", "train", "a dog")
    source.create(skip_bad_images=True)
    found = {r["filename"]: (r["width"], r["height"]) for r in source.read("REFERENCES", "TRAIN")}
    assert found == {"0.png": (20, 30), "2.png": (40, 10), "5.png": (SIZE, SIZE)}


@pytest.mark.parametrize("ids", [(7.0, 8.0), (None, None), ("a", "7")])
def test_ids_are_made_usable(source, ids):
    """Whole numbers that pandas wrote, none, text."""
    for entry, id_ in zip(source.entries, ids, strict=False):
        entry["imgid"] = id_
    source.create()
    found = [reference["id"] for reference in source.read("REFERENCES", "TRAIN")]
    expected = [i if e.get("imgid") is None else e["imgid"] for i, e in enumerate(source.entries)]
    assert found == [expected[i] for i, e in enumerate(source.entries) if e["split"] == "train"]
    assert all(type(id_) in (int, str) for id_ in found)


@pytest.mark.parametrize("id_", [1.5, True, [3], float("nan")])
def test_ids_that_cannot_be_are_named_by_their_entry(source, id_):
    source.entries[1]["imgid"] = id_
    with pytest.raises(UserError, match=r"images\[1\] has imgid"):
        source.create()
    assert source.listing() == []


def test_an_id_of_two_images_is_refused(source):
    source.entries[0]["cocoid"] = source.entries[2]["cocoid"] = 9
    with pytest.raises(UserError, match=r"the id 9 twice, of images\[0\] and images\[2\]"):
        source.create()
    assert source.listing() == []
    source.entries[0]["cocoid"] = "9"  # by value: results are compared by it
    with pytest.raises(UserError, match=r"the id 9 twice, of images\[0\] and images\[2\]"):
        source.create()


def test_boxes_of_another_form_are_left_out(source):
    for entry in source.entries:
        entry["boxes"] = [[1, 2, 3, 4]]
    source.create()
    assert all("boxes" not in reference for reference in source.read("REFERENCES", "TRAIN"))


def test_captions_that_the_rule_does_not_split_are_scored_by_their_tokens(source, capsys):
    """Other languages without blanks, no words, nothing, tokens made otherwise."""
    sentences = [
        {"raw": "一个黄色方块。", "tokens": ["一个", "黄色", "方块"]},
        {"raw": ".", "tokens": ["a", "dog"]},
        {"raw": "", "tokens": ["a", "cat"]},
        {"raw": None, "tokens": ["the", "cat"]},
        {"raw": "Well-known, the dog!", "tokens": ["wellknown", "the", "dog"]},
    ]
    source.entries[1]["sentences"] = sentences
    source.create()
    (reference,) = source.read("REFERENCES", "VAL")
    texts = ["一个 黄色 方块", "a dog", "a cat", "the cat", "Well-known, the dog!"]
    assert reference["captions"] == texts
    assert [word_rules.tokenize(text) for text in texts] == [s["tokens"] for s in sentences]
    assert "2 captions are scored by their tokens" in capsys.readouterr().out


def test_one_of_a_thing_is_no_plural(source, capsys):
    source.entries = [e for e in source.entries if e["filename"] in ("0.png", "1.png", "3.png")]
    source.entries[2]["sentences"] = [{"raw": "?", "tokens": ["a", "zebra"]}, sentence("...")]
    source.add("4.png", "train")
    source.create(captions_per_image=1)
    printed = capsys.readouterr().out
    assert "VAL: 1 image, 1 caption, " in printed
    assert "1 caption is scored by its tokens" in printed
    left_out = "1 wordless caption, 0 too long captions, 1 image without captions, 0 unreadable im"
    assert f"left out: {left_out}" in printed


def test_a_vocabulary_of_no_word_is_refused(source):
    with pytest.raises(UserError, match="more than 1000 times.*--min_word_freq"):
        source.create(min_word_freq=1000)
    assert source.listing() == []


def test_left_out_captions_and_images_are_counted(source, capsys):
    source.add("4.png", "train", "a dog runs a dog runs cat", "...", "a dog runs a dog runs")
    source.add("5.png", "train", "...", "the the the the the the the")
    source.add("6.png", "train")
    summary = source.create()
    assert summary["left_out"] == {
        "wordless captions": 2,
        "too long captions": 2,
        "images without captions": 2,
        "unreadable images": 0,
    }
    assert summary["splits"]["TRAIN"]["images"] == 3
    assert source.read("CAPLENS", "TRAIN")[4:] == [8, 8]
    kept = ["a dog runs a dog runs cat", "a dog runs a dog runs"]
    assert source.read("REFERENCES", "TRAIN")[2]["captions"] == kept
    printed = capsys.readouterr().out
    assert "2 wordless captions, 2 too long captions, 2 images without captions" in printed
    assert "TRAIN: 3 images, 6 captions" in printed


@given(
    st.lists(st.text(), min_size=1, max_size=8, unique=True),
    st.integers(1, 9),
    st.integers(0, 2**32),
)
def test_sampling(captions, count, seed):
    captions = [[caption] for caption in captions]
    sample = utils.sample_captions(captions, count, random.Random(seed))
    assert sample == utils.sample_captions(captions, count, random.Random(seed))
    times = Counter(map(tuple, sample))
    assert len(sample) == count and set(times) <= set(map(tuple, captions))
    assert len(times) == min(count, len(captions))  # no repetition, or every caption is there


def test_the_seed_decides_the_sample(source, tmp_path):
    source.add("4.png", "train", *("a " * n for n in range(1, 7)))
    samples = []
    for seed in (0, 0, 1, 2, 3):
        source.create(seed=seed)
        samples.append(source.read("CAPTIONS", "TRAIN"))
    assert samples[0] == samples[1]
    assert len({json.dumps(sample) for sample in samples}) > 1


def test_workers_change_nothing(source):
    for i in range(4, 20):
        source.add(f"{i}.png", ["train", "val", "test"][i % 3], "a dog")
    source.create(workers=1)
    first = {name: (source.output / name).read_bytes() for name in source.listing()}
    images = source.read("IMAGES", "TRAIN")[0]
    source.create(workers=2)
    np.testing.assert_array_equal(source.read("IMAGES", "TRAIN")[0], images)
    assert source.listing() == list(first)
    for name in first:
        if name.endswith(".json"):
            assert (source.output / name).read_bytes() == first[name]


# -------------------------------------------------------------------------- splits, overwriting


def test_without_a_test_split_older_test_files_go(source, capsys):
    source.create()
    other = source.output / "TEST_CAPTIONS_coco_5_cap_per_img_5_min_word_freq.json"
    other.write_text("[]")
    source.entries = [entry for entry in source.entries if entry["split"] != "test"]
    capsys.readouterr()
    source.create()
    assert [name for name in source.listing() if "TEST" in name] == [other.name]
    assert "TEST: no images" in capsys.readouterr().out


def test_a_failed_run_leaves_the_older_data_set_whole(source):
    source.create()
    before = {name: (source.output / name).read_bytes() for name in source.listing()}
    source.entries = [entry for entry in source.entries if entry["split"] != "test"]
    source.add("4.png", "train", "a dog")
    (source.images / "4.png").write_bytes(b"")
    with pytest.raises(UserError):
        source.create()
    assert {name: (source.output / name).read_bytes() for name in source.listing()} == before


def test_a_crash_amid_the_renames_leaves_no_word_map(source, monkeypatch):
    source.create()
    renamed = []

    def crash(temporary, path):
        if len(renamed) == 3:
            raise OSError(5, "Input/output error")
        renamed.append(path)

    monkeypatch.setattr(utils.os, "replace", crash)
    with pytest.raises(UserError, match="Input/output error"):
        source.create()
    assert not (source.output / f"WORDMAP_{BASE}.json").exists()
    assert not list(source.output.glob("*.tmp"))


def test_captions_that_are_all_too_long_are_said_to_be(source):
    long = sum(len(entry["sentences"]) for entry in source.entries)
    with pytest.raises(UserError, match=f"learn from: {long} captions have more .* --max_len 1$"):
        source.create(max_len=1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_train_and_val_are_needed(source, split):
    source.entries = [entry for entry in source.entries if entry["split"] != split]
    with pytest.raises(UserError, match=f"no {split.upper()} image"):
        source.create()
    assert not source.output.exists()


# ------------------------------------------------------------------------------------- bad images


def spoil(source):
    """Adds an image of each kind that cannot be read, among good ones; returns their names."""
    for name in ("missing.png", "empty.png", "cut.png", "text.png", "good.png"):
        source.add(name, "train", "a dog", "the cat")
    (source.images / "missing.png").unlink()
    (source.images / "empty.png").write_bytes(b"")
    whole = (source.images / "cut.png").read_bytes()
    (source.images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (source.images / "text.png").write_text("no picture")
    return ["missing.png", "empty.png", "cut.png", "text.png"]


@pytest.mark.slow
def test_script_names_every_bad_image_and_writes_nothing(source):
    bad = spoil(source)
    result = source.run_script()
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and len(lines) == len(bad) + 1
    for name, line in zip(bad, lines, strict=False):
        assert name in line
    assert lines[-1].startswith("error: 4 of 9 images") and "--skip_bad_images" in lines[-1]
    assert source.listing() == []


def test_bad_images_can_be_skipped(source, capsys):
    bad = spoil(source)
    summary = source.create(skip_bad_images=True)
    assert summary["left_out"]["unreadable images"] == 4
    images, _ = source.read("IMAGES", "TRAIN")
    kept = ["0.png", "2.png", "good.png"]
    np.testing.assert_array_equal(images, [source.pixels[name] for name in kept])
    assert [r["filename"] for r in source.read("REFERENCES", "TRAIN")] == kept
    assert len(source.read("CAPTIONS", "TRAIN")) == 6
    printed = capsys.readouterr().err
    assert all(name in printed for name in bad)


@pytest.mark.slow
def test_an_image_folder_without_any_of_the_images_is_one_line(source, tmp_path):
    for i in range(30):
        source.add(f"more{i}.png", "train", "a dog", filepath="train2014")
    other = tmp_path / "other"
    source.images.rename(other)
    source.images.mkdir()
    result = source.run_script()
    [line] = result.stderr.splitlines()
    assert result.returncode == 1 and source.listing() == []
    assert line.startswith(f"error: none of the 34 images of {source.json} is there")
    assert str(source.images / "0.png") in line and "--image_folder" in line


@pytest.mark.slow
def test_of_many_bad_images_ten_are_named_and_the_others_counted(source):
    for i in range(25):
        source.add(f"bad{i:02}.png", ["train", "val", "test"][i % 3], "a dog")
        (source.images / f"bad{i:02}.png").unlink()
    result = source.run_script()
    lines = result.stderr.splitlines()
    assert [line.rpartition("/")[2] for line in lines[:10]] == [
        f"bad{i:02}.png" for i in range(0, 25, 3)
    ] + ["bad01.png"]
    assert lines[10] == "… and 15 more"
    assert lines[11].startswith("error: 25 of 29 images cannot be read")
    assert len(lines) == 12


def test_names_written_on_windows_are_found(source):
    source.add("4.png", "train", "a dog", filepath="train2014")
    source.entries[-1]["filename"] = "train2014\\4.png"
    del source.entries[-1]["filepath"]
    source.add("5.png", "train", "a dog", filepath="deep")
    source.entries[-1]["filepath"] = "..\\images\\deep"
    source.add("back\\slash.png", "train", "a dog")  # a name of its own where it is one
    source.create()
    images, _ = source.read("IMAGES", "TRAIN")
    names = ["0.png", "2.png", "4.png", "5.png", "back\\slash.png"]
    np.testing.assert_array_equal(images, [source.pixels[name] for name in names])
    assert source.read("REFERENCES", "TRAIN")[2]["filename"] == "train2014\\4.png"


def test_a_split_of_bad_images_only_is_an_error(source):
    (source.images / "3.png").unlink()
    with pytest.raises(UserError, match="TEST"):
        source.create(skip_bad_images=True)
    assert source.listing() == []


# ---------------------------------------------------------------------- errors that a user can mend


GOOD = {"filename": "0.png", "split": "train", "sentences": [sentence("a dog")]}


@pytest.mark.parametrize(
    "contents",
    [
        [],
        "text",
        {},
        {"images": {}},
        {"images": ["0.png"]},
        {"images": [GOOD, {**GOOD, "split": "training"}]},
        {"images": [GOOD, {**GOOD, "filename": 3}]},
        {"images": [GOOD, {**GOOD, "filepath": None}]},
        {"images": [GOOD, {**GOOD, "sentences": "a dog"}]},
        {"images": [GOOD, {**GOOD, "sentences": ["a dog"]}]},
        {"images": [GOOD, {**GOOD, "sentences": [{}]}]},
        {"images": [GOOD, {**GOOD, "sentences": [{"raw": None}]}]},
        {"images": [GOOD, {**GOOD, "sentences": [{"raw": "a dog " * 5000}]}]},
        {"images": [GOOD, {**GOOD, "filename": "../0.png"}]},
        {"images": [GOOD, {**GOOD, "filepath": "/etc"}]},
        {"images": [GOOD, {**GOOD, "sentences": [{"tokens": "dog"}]}]},
        {"images": [GOOD, {**GOOD, "sentences": [{"tokens": [1]}]}]},
        {"images": [GOOD, {**GOOD, "sentences": [{"tokens": ["a"], "raw": 1}]}]},
        {"images": [GOOD, {**GOOD, "sentences": [{"tokens": ["<end>"]}]}]},
        *({"images": [GOOD, {k: v for k, v in GOOD.items() if k != key}]} for key in GOOD),
    ],
)
def test_json_of_another_format(tmp_path, contents):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(UserError, match="wrong.json is not in Karpathy's format") as error:
        create_input_files("demo", path, tmp_path, output_folder=tmp_path / "data")
    assert "\n" not in str(error.value)
    if isinstance(contents, dict) and len(contents.get("images", [])) == 2:
        assert "images[1]" in str(error.value)
    assert not (tmp_path / "data").exists()


def test_json_that_is_missing_or_broken(tmp_path):
    path = tmp_path / "captions.json"
    with pytest.raises(UserError, match="captions.json: No such file"):
        read_json(path)
    path.write_text('{"images": [\n1,, 2]}')
    with pytest.raises(UserError, match="captions.json is not valid JSON.*line 2 column 3"):
        read_json(path)
    path.write_bytes(b'{"images": "\xff"}')
    with pytest.raises(UserError, match="captions.json is not valid JSON"):
        read_json(path)


def test_missing_image_folder(source):
    for path in source.images.iterdir():
        path.unlink()
    source.images.rmdir()
    with pytest.raises(UserError, match="no folder .*images"):
        source.create()


def test_a_second_run_into_the_folder_is_refused(source):
    source.create()
    before = source.listing()
    wordmap = input_files.input_path(source.output, BASE, "WORDMAP")
    with (
        sole_writer(wordmap, "wait"),
        pytest.raises(UserError, match=f"another run is writing .*{wordmap.name}"),
    ):
        source.create()
    assert source.listing() == before


def test_too_little_room_on_the_disk(source, monkeypatch):
    usage = type("usage", (), {"free": 4 * 3 * SIZE**2 - 100})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    words = r"the images take 3.07 kB and .*data has 2.97 kB free: .*--output_folder"
    with pytest.raises(UserError, match=words):
        source.create()
    assert source.listing() == []


def test_output_folder_that_cannot_be(source):
    source.output.write_text("a file")
    with pytest.raises(UserError, match="cannot make the folder .*data"):
        source.create()


def test_script_prints_one_line_for_an_error(source):
    source.entries[1]["split"] = "training"
    result = source.run_script()
    assert result.returncode == 1 and result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and "images[1]" in line and "'training'" in line


def call_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["create_input_files.py", *map(str, arguments)])
    create_input_files_script.main()


@pytest.mark.parametrize("captions", ["--karpathy_json", "--captions"])
def test_script_needs_its_sources(monkeypatch, captions, source):
    source.json.write_text("{}")
    with pytest.raises(UserError, match="dataset.json names images.*--image_folder"):
        call_main(monkeypatch, "--dataset", "coco", captions, source.json)
    with pytest.raises(UserError, match="--dataset coco needs .*--captions and --image_folder"):
        call_main(monkeypatch, "--dataset", "coco")


@pytest.mark.parametrize("option", ["--captions_per_image=0", "--workers=-1", "--max_len=x"])
def test_script_checks_its_numbers(monkeypatch, capsys, option):
    with pytest.raises(SystemExit) as stop:
        call_main(monkeypatch, "--dataset", "demo", option)
    assert stop.value.code == 2
    assert f"error: argument {option.split('=')[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_script_makes_the_demo_once(source, monkeypatch):
    made = []

    def make_demo(folder):
        made.append(folder)
        folder.mkdir(parents=True)
        source.images.rename(folder / "images")
        (folder / "dataset_demo.json").write_text(json.dumps({"images": source.entries}))

    monkeypatch.setattr(demo, "make_demo", make_demo)
    options = ["--captions_per_image", 2, "--min_word_freq", 1, "--image_size", SIZE]
    for _ in range(2):
        call_main(monkeypatch, "--dataset=demo", "--output_folder", source.output, *options)
    assert made == [source.output / "demo"]
    np.testing.assert_array_equal(source.read("IMAGES", "VAL")[0], [source.pixels["1.png"]])
