"""Readers of files meet damaged ones: each is read, or refused in one line that names it."""

import io
import json
import shutil
from datetime import timedelta

import data_sets
import numpy as np
import pytest
import torch
from conftest import small_checkpoint, tiny_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import checkpoints
import decoding
import formats
import utils
from captioner import Captioner
from datasets import CaptionDataset, read_word_map
from encoders import EncoderError
from groundwork import files, images, provenance, timing
from groundwork.errors import UserError
from groundwork.images import read_images
from input_files import input_path

MEMORY = 2**30  # bytes that reading may take


@st.composite
def edits(draw):
    """A function that damages bytes: places are fractions of their length."""
    places = st.floats(0, 1)
    kinds = ["cut", "set", "flip", "drop", "repeat", "insert", "fill", "digit"]
    chosen = draw(
        st.lists(
            st.tuples(st.sampled_from(kinds), places, places, st.binary(min_size=1, max_size=9)),
            min_size=1,
            max_size=4,
        )
    )

    def damage(data):
        for kind, place, length, new in chosen:
            data = bytearray(data)
            i = int(place * len(data))
            end = i + 1 + int(length**4 * (len(data) - i))  # short stretches more often
            if kind == "cut":
                del data[i:]
            elif kind == "set":
                data[i : i + len(new)] = new
            elif kind == "flip" and i < len(data):
                data[i] ^= 1 << new[0] % 8
            elif kind == "drop":
                del data[i:end]
            elif kind == "repeat":
                data[i:i] = data[i:end]
            elif kind == "insert":
                data[i:i] = new
            elif kind == "fill":
                data[i:end] = new[:1] * (end - i)
            elif digits := [j for j in range(i, min(end, len(data))) if chr(data[j]).isdigit()]:
                data[digits[0]] = ord("0") + new[0] % 10
        return bytes(data)

    return damage


# ------------------------------------------------------------------------------------- readers


def image_files(_, folder):
    """Pictures in many formats, and what reads them."""
    pixels = np.random.default_rng(0).integers(256, size=(12, 10, 4), dtype=np.uint8)
    image, files = Image.fromarray(pixels), []
    for name in ("PNG", "GIF", "TIFF", "WEBP", "JPEG", "BMP", "PPM", "TGA", "ICO"):
        buffer = io.BytesIO()
        options = {"save_all": True, "append_images": [image]} if name in ("GIF", "TIFF") else {}
        if name == "ICO":  # whose usual sizes begin at 16 pixels
            options["sizes"] = [image.size]
        picture = image if name in ("PNG", "TIFF", "WEBP", "ICO") else image.convert("RGB")
        picture.save(buffer, name, **options)
        files.append((folder / f"picture.{name.lower()}", buffer.getvalue()))
    return files, lambda path: images.read_image(path, 16)


def karpathy_files(_, folder):
    image = {"filename": "0.png", "sentences": [{"tokens": ["a", "dog"], "raw": "A dog."}]}
    Image.new("RGB", (9, 9)).save(folder / "0.png")
    contents = {"images": [image | {"split": split} for split in ("train", "val", "test")]}

    def read(path):
        utils.create_input_files(
            "flickr8k", path, folder, 1, 0, output_folder=folder / "out", image_size=8, workers=1
        )

    return [(folder / "karpathy.json", json.dumps(contents).encode())], read


def data_set_files(writer):
    """A data set in one of the formats beside Karpathy's, and what reads it."""

    def files(_, folder):
        photographs = data_sets.draw(4, hashed=writer is data_sets.conceptual)
        images = data_sets.write_images(folder / "images", photographs)
        told = writer(folder, photographs)
        paths = [inner for path in told for inner in data_sets.files_below(path)]
        paths += folder.glob("*Images.txt")

        def read(_):
            found = formats.read(told, images).images
            for outcome in read_images([image.source for image in found], 8, 1):
                if isinstance(outcome, str):
                    raise UserError(outcome)

        return [(path, path.read_bytes()) for path in paths], read

    return files


def input_files(kinds):
    def files(tiny_data, folder):
        source, base = tiny_data
        for path in source.glob(f"*{base}*"):
            shutil.copy(path, folder)
        paths = [input_path(folder, base, kind, "VAL") for kind in kinds]
        if "CAPTIONS" in kinds:
            paths.append(input_path(folder, base, "WORDMAP"))

        def read(path):
            read_word_map(folder, base)
            data = CaptionDataset(folder, base, "VAL")
            for i in range(len(data)):
                data[i]

        return [(path, path.read_bytes()) for path in paths], read

    return files


def jpeg_shards(_, folder):
    """Training images as JPEGs in two shards, and what reads them."""
    drawn = data_sets.draw(4)
    images = data_sets.write_images(folder / "images", drawn)
    options = {"workers": 1, "store": "jpeg", "shards": 2}
    made = utils.create_input_files(
        "mine", data_sets.table(folder, drawn), images, 2, 0, 20, folder / "data", 32, **options
    )

    def read(_):
        data = CaptionDataset(folder / "data", made["base"], "TRAIN")
        for i in range(len(data)):
            data[i]

    paths = (folder / "data").glob("TRAIN_*_00000-of-00002.*")
    return [(path, path.read_bytes()) for path in paths if "REFERENCES" not in path.name], read


def checkpoint_files(_, folder):
    whole, files = {"encoder": nn.BatchNorm2d(2), "decoder": nn.Linear(2, 3)}, []
    for name, contents, archive in (
        ("ours", tiny_checkpoint(), True),
        ("published", whole, True),
        ("stream", whole, False),
    ):
        buffer = io.BytesIO()
        torch.save(contents, buffer, _use_new_zipfile_serialization=archive)
        files.append((folder / f"{name}.pth.tar", buffer.getvalue()))
    return files, checkpoints.load_checkpoint


READERS = {
    "images": image_files,
    **{
        writer.__name__: data_set_files(writer)
        for writers in data_sets.WRITERS.values()
        for writer in writers
    },
    "karpathy": karpathy_files,  # with words
    "json": input_files(["CAPTIONS", "CAPLENS", "REFERENCES"]),
    "hdf5": input_files(["IMAGES"]),
    "jpeg": jpeg_shards,
    "checkpoints": checkpoint_files,
}


@pytest.mark.filterwarnings("ignore")  # Pillow and PyTorch warn of damage, too
@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(reader, count, tiny_data, tmp_path):
    files, read = READERS[reader](tiny_data, tmp_path)
    for path, whole in files:
        path.write_bytes(whole)
    for path, _ in files:
        read(path)  # undamaged, they can be read
    timing.forget_peak()
    before, tried, refused = timing.process_peak(), 0, 0

    @settings(
        max_examples=count,
        deadline=timedelta(seconds=20),
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(st.sampled_from(files), edits())
    def read_damaged(file, damage):
        nonlocal tried, refused
        path, whole = file
        path.write_bytes(damage(whole))
        tried += 1
        try:
            read(path)
        except UserError as error:
            assert str(error) and "\n" not in str(error)
            named = (path.name, str(path.parent), "named above")  # the images of a JSON, on stderr
            assert any(name in str(error) for name in named), error
            refused += 1
        finally:
            path.write_bytes(whole)

    read_damaged()
    print(f"{reader}: {tried} damaged files, {refused} refused")
    assert tried >= count * 0.99 and refused > count / 3
    assert timing.process_peak() - before < MEMORY


# What may stand anywhere in a checkpoint that is made by hand
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([[], {}, [[]], {"": {}}, {0: 1}]),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.int64, torch.bool, torch.float16, torch.uint8]),
    ),
)


@pytest.fixture(scope="module")
def small():
    return small_checkpoint()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_checkpoints_with_odd_contents_are_used_or_refused_in_one_line(count, small, tmp_path):
    path = tmp_path / "odd.pth.tar"
    refused = 0

    @settings(max_examples=count, deadline=None, database=None)
    @given(st.data())
    def use(data):
        nonlocal refused
        contents, place = dict(small), None
        key = data.draw(st.sampled_from(sorted(contents)))
        place, holder = key, contents
        while isinstance(holder[place], dict | list) and holder[place] and data.draw(st.booleans()):
            inner = holder[place]
            holder[place] = inner = type(inner)(inner)  # a copy
            holder, place = (
                inner,
                data.draw(
                    st.sampled_from(sorted(inner, key=str) if isinstance(inner, dict) else [0])
                ),
            )
        holder[place] = data.draw(ODD)
        torch.save(contents, path)
        try:
            checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)
            model = Captioner.load(path, "cpu", amp="off")
            images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
            features = model.encoder.features(images)
            decoding.beam_search(model.decoder, features, model.word_map, 1, 3)
            list(provenance.lines(model.about.get("records", [])))
        except (UserError, EncoderError) as error:
            assert str(error) and "\n" not in str(error)
            refused += 1

    use()
    print(f"{count} odd checkpoints, {refused} refused")
    assert refused > count / 3


# ---------------------------------------------------------------------------------- every length


@pytest.mark.parametrize("name", ["PNG", "GIF", "TIFF", "WEBP", "JPEG", "BMP"])
def test_pictures_cut_off_anywhere(name, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(12, 10, 3), dtype=np.uint8)).save(
        buffer, name
    )
    whole, path = buffer.getvalue(), tmp_path / f"cut.{name.lower()}"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        try:
            image = images.read_image(path, 8)
        except UserError as error:
            assert "cut" in str(error)
        else:  # the end of a file may hold nothing that is needed
            assert image.shape == (3, 8, 8) and length > len(whole) / 2


@pytest.mark.parametrize("kind", ["CAPTIONS", "CAPLENS", "REFERENCES", "WORDMAP", "IMAGES"])
def test_input_files_cut_off_anywhere(kind, tiny_data, tmp_path):
    files, read = input_files(["CAPTIONS", "CAPLENS", "REFERENCES", "IMAGES"])(tiny_data, tmp_path)
    [(path, whole)] = [file for file in files if kind in file[0].name]
    for length in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=path.name):
            read(path)


def test_a_checkpoint_cut_off_anywhere(tmp_path):
    path = tmp_path / "cut.pth.tar"
    checkpoints.save_checkpoint(path, tiny_checkpoint())
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cut.pth.tar"):
            checkpoints.load_checkpoint(path)


def test_endless_nesting_is_no_json(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 10**6)
    with pytest.raises(UserError, match="deep.json is not valid JSON"):
        files.read_json(tmp_path / "deep.json")
