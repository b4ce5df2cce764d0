"""Readers of data sets: the same from every format, and one line where something is wrong."""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import data_sets
import pytest
from conftest import ROOT, failure, run_here, small_checkpoint
from data_sets import WRITERS, Photograph, write_images

import checkpoints
import datasets
import formats
import utils
import word_rules
from downloads import file_name
from groundwork.errors import UserError
from groundwork.images import open_image

PHOTOGRAPHS = data_sets.draw()
CASES = [(name, writer) for name, writers in WRITERS.items() for writer in writers]


def create(files, images, output, **reading):
    return utils.create_input_files(
        "mine", files, images, 2, 0, 20, output, 8, 1, reading=formats.Options(**reading)
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(files, images=None, seed=0, **options):
    return formats.read(files, images, formats.Options(**options), seed)


@pytest.fixture
def photographs(tmp_path):
    return write_images(tmp_path / "images", PHOTOGRAPHS)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The input files made of Karpathy's JSON with words, by whether names are hashes."""
    made = {}
    for hashed in (False, True):
        folder = tmp_path_factory.mktemp("expected")
        drawn = data_sets.draw(hashed=hashed)
        images = write_images(folder / "images", drawn)
        [path] = data_sets.karpathy(folder, drawn)
        data = json.loads(path.read_text())
        for image in data["images"]:
            for sentence in image["sentences"]:
                sentence["tokens"] = word_rules.tokenize(sentence["raw"])
        path.write_text(json.dumps(data))
        create(path, images, folder / "data")
        made[hashed] = contents(folder / "data")
    assert len(made[False]) == 13
    return made


def test_every_format_of_the_registry_is_tested():
    assert WRITERS.keys() == formats.FORMATS.keys()


@pytest.mark.parametrize(("name", "writer"), CASES)
def test_every_format_makes_the_same_input_files(name, writer, expected, tmp_path, capsys):
    hashed = name == "conceptual"
    drawn = data_sets.draw(hashed=hashed)
    files = writer(tmp_path, drawn)
    images = None
    if not formats.FORMATS[name].holds_images:
        images = write_images(tmp_path / "images", drawn)
    create(files, images, tmp_path / "found")
    assert f"format: {name}, by its look" in capsys.readouterr().out
    create(files, images, tmp_path / "told", format=name)
    assert contents(tmp_path / "found") == contents(tmp_path / "told") == expected[hashed]


# ---------------------------------------------------------------------------- tables, columns


def gzipped(data):
    """Without the time, so that processes that share tests out call them alike."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "file,says\na000.jpg,one dog\na000.jpg,\"a \"\"red\"\" one,\nhere\"\n"),
        ("a.csv", "says;file\r\none dog;a000.jpg\r\n\"a \"\"red\"\" one,\nhere\";a000.jpg\r\n"),
        ("a.tsv", 'file\tsays\na000.jpg\tone dog\na000.jpg\t"a ""red"" one,\nhere"\n'),
        ("a.txt", 'file,says\na000.jpg,"[""one dog"", ""a \\""red\\"" one,\\nhere""]"\n'),
        ("a.csv", "file;says\na000.jpg;['one dog', 'a \"red\" one,\\nhere']\n"),
        ("a.json", '{"file": "a000.jpg", "says": "one dog"}\n\n{"file": "./a000.jpg", "says": '
         '["a \\"red\\" one,\\nhere"]}\n'),
    ],
)  # fmt: skip
def test_tables_have_columns_of_any_name_and_captions_or_lists(
    name, text, packed, photographs, tmp_path
):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzipped(text.encode()) if packed else text.encode())
    columns = {"image_column": "file", "caption_column": "says"}
    if name == "a.json" and not packed:
        text = text.replace("\n\n", "\n")
        path.write_text(text)
    chosen = "jsonl" if name == "a.json" else None
    [image] = read(path, photographs, format=chosen, **columns).images
    assert [c.raw for c in image.captions] == ["one dog", 'a "red" one,\nhere']
    assert image.source == photographs / "a000.jpg"
    with pytest.raises(UserError, match=r"'image'.*--image_column"):
        read(path, photographs, format=chosen)


def test_the_split_column_may_be_named(photographs, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("image,caption,part\na000.jpg,a dog,dev\na001.jpg,a dog,Train\n")
    found = read(path, photographs, split_column="part").images
    assert [image.split for image in found] == ["VAL", "TRAIN"]
    with pytest.raises(UserError, match="no column 'half', only image, caption, part.*--split_col"):
        read(path, photographs, split_column="half")


def test_the_published_row_without_a_bar_is_read(photographs, tmp_path):
    path = tmp_path / "results.csv"
    path.write_text(
        "image_name| comment_number| comment\na000.jpg| 0| A dog .\na000.jpg| 4   A dog runs .\n"
    )
    [image] = read(path, photographs).images
    assert [caption.raw for caption in image.captions] == ["A dog .", "A dog runs ."]


def test_images_in_no_list_of_flickr8k_are_left_out(photographs, tmp_path):
    [path] = data_sets.flickr8k(tmp_path, PHOTOGRAPHS)
    lists = sorted(tmp_path.glob("*Images.txt"))
    lines = lists[2].read_text().splitlines()
    lists[2].write_text("\n".join(lines[1:]))
    beside, told = read(path, photographs), read([*lists[::-1], path], photographs)
    for data in (beside, told):
        assert data.left_out["images of no split"] == 1
        assert [image.name for image in data.images] == [p.name for p in PHOTOGRAPHS[1:]]
    assert "Flickr_8k.devImages.txt" in beside.notes[1]
    lists[0].write_text(lines[1])
    with pytest.raises(UserError, match=r"trainImages.txt cannot be used: line 1 has .*val"):
        read(path, photographs)
    lists[0].write_text("nowhere.jpg")
    with pytest.raises(UserError, match=r"no captions of nowhere.jpg"):
        read(path, photographs)


def test_coco_finds_images_in_the_folder_named_as_the_annotations(photographs, tmp_path):
    files = data_sets.coco(tmp_path, PHOTOGRAPHS)
    for photograph in PHOTOGRAPHS:
        place = tmp_path / "coco" / f"{photograph.split}2014"
        place.mkdir(parents=True, exist_ok=True)
        shutil.move(photographs / photograph.name, place)
    found = read(files, tmp_path / "coco").images
    assert all(image.source.exists() for image in found)


def test_captions_in_another_file_of_coco_are_joined(photographs, tmp_path):
    images, captions = tmp_path / "images.json", tmp_path / "captions.json"
    images.write_text(json.dumps({"images": [{"id": 7.0, "file_name": "a000.jpg"}]}))
    annotations = [{"image_id": 7, "caption": "a dog"}]
    captions.write_text(json.dumps({"annotations": annotations, "images": []}))
    [image] = read([captions, images], photographs).images
    assert (image.id, image.name, image.captions[0].raw) == (7, "a000.jpg", "a dog")
    with pytest.raises(UserError, match=r"captions.json .*annotations\[0\] has the image_id 7"):
        read(captions, photographs)


def test_addresses_without_a_file_were_not_fetched(tmp_path):
    drawn = data_sets.draw(hashed=True)
    images = write_images(tmp_path / "images", drawn[1:])
    files = data_sets.conceptual(tmp_path, drawn)
    data = read(files, images)
    assert data.left_out["images not fetched"] == len(drawn[0].captions)
    assert [image.name for image in data.images] == [p.name for p in drawn[1:]]
    assert data.images[0].name == file_name(data_sets.address(1))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none of the images .*--image_folder"):
        read(files, tmp_path / "none")


def test_images_in_archives_are_read_where_they_are(tmp_path):
    """By their places, in any order."""
    [shards] = data_sets.webdataset(tmp_path, PHOTOGRAPHS)
    found = read(shards).images
    for photograph, image in reversed(list(zip(PHOTOGRAPHS, found, strict=True))):
        assert image.source.read() == photograph.contents
        assert open_image(image.source).size == (14, 10)
    damaged = found[3].source._replace(size=100)
    with pytest.raises(UserError, match=rf"a003.jpg in .*{damaged.archive.name}"):
        open_image(damaged)


@pytest.mark.parametrize("named", [True, False])
def test_rows_of_one_image_of_parquet_are_its_captions(named, tmp_path):
    """In one file or several, with a name or without."""
    pyarrow = pytest.importorskip("pyarrow.parquet")
    first, second = PHOTOGRAPHS[:2]
    same = [Photograph("x.jpg", "", [text], first.contents) for text in ("a dog", "a cat")]
    other = Photograph("x.jpg", "", ["a bird"], second.contents)
    again = [other._replace(captions=["birds"]), same[0]._replace(captions=["a fox"])]
    for name, photographs in (("a", [*same, other]), ("b", again)):
        rows = data_sets._arrow(photographs, lambda captions: captions[0])
        if not named:
            image = [{"bytes": p.contents, "path": None} for p in photographs]
            place = rows.schema.get_field_index("image")
            rows = rows.set_column(place, "image", [image])
        pyarrow.write_table(rows, tmp_path / f"{name}.parquet")
    one, two = read([tmp_path / "a.parquet", tmp_path / "b.parquet"]).images
    assert [c.raw for c in one.captions] == ["a dog", "a cat", "a fox"]
    assert [c.raw for c in two.captions] == ["a bird", "birds"]
    assert two.source.read() == second.contents


# ------------------------------------------------------------------------------ splits, subset


@pytest.fixture
def plain(tmp_path):
    """A CSV without splits of 40 images, and the folder."""
    drawn = [p._replace(name=f"{i}.jpg") for i, p in enumerate(data_sets.draw(40))]
    images = write_images(tmp_path / "images", drawn)
    lines = [f'{p.name},"{text}"' for p, text in data_sets.rows(drawn)]
    (tmp_path / "a.csv").write_text("\n".join(["image,caption", *lines]))
    return tmp_path / "a.csv", images


def splits_of(data):
    return [image.split for image in data.images]


def test_without_splits_images_are_shared_out_at_random_by_the_seed(plain):
    data = read(*plain)
    splits = splits_of(data)
    assert [splits.count(s) for s in utils.SPLITS] == [32, 4, 4]
    assert len({image.name for image in data.images}) == 40
    assert "splits: drawn at random, 32, 4 and 4 images, seed 0" in data.notes
    assert splits == splits_of(read(*plain)) != splits_of(read(*plain, seed=1))
    halves = splits_of(read(*plain, split_sizes=(1, 1, 0)))
    assert [halves.count(s) for s in utils.SPLITS] == [20, 20, 0]


def test_a_subset_keeps_order_and_proportions(plain, tmp_path, photographs):
    names = [image.name for image in read(*plain).images]
    few = read(*plain, max_images=10)
    kept = [image.name for image in few.images]
    assert kept == sorted(kept, key=names.index) and len(set(kept)) == 10
    assert [splits_of(few).count(s) for s in utils.SPLITS] == [8, 1, 1]
    other = [image.name for image in read(*plain, seed=1, max_images=10).images]
    assert kept == [image.name for image in read(*plain, max_images=10).images] != other
    assert [image.id for image in few.images] == [names.index(name) for name in kept]
    [path] = data_sets.jsonl(tmp_path, PHOTOGRAPHS)  # 6, 3 and 3 images
    some = splits_of(read(path, photographs, max_images=4))
    assert [some.count(s) for s in utils.SPLITS] == [2, 1, 1]
    assert len(read(path, photographs, max_images=99).images) == 12
    with pytest.raises(UserError, match="splits of its own.*--split_sizes"):
        read(path, photographs, split_sizes=(1, 1, 1))


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [(10, (0.8, 0.1, 0.1), [8, 1, 1]), (3, (0.98, 0.01, 0.01), [1, 1, 1]), (0, (), []),
     (7, (1, 1, 1), [3, 2, 2]), (2, (5, 1, 0), [1, 1, 0]), (1, (1, 1, 1), [1, 0, 0])],
)  # fmt: skip
def test_shares(total, weights, expected):
    found = formats.shares(total, weights)
    assert sum(found) == total and sorted(found) == sorted(expected)
    assert {type(part) for part in found} <= {int}


def test_file_names_tell_splits_where_all_do_and_differ(plain, tmp_path):
    path, images = plain
    shutil.copy(path, tmp_path / "my_test.csv")
    assert "TRAIN" in splits_of(read(tmp_path / "my_test.csv", images))
    lines = path.read_text().splitlines()
    for name, own in (("train_a.csv", lines[:30]), ("dev.csv", [lines[0], *lines[32:]])):
        (tmp_path / name).write_text("\n".join(own))
    found = splits_of(read([tmp_path / "train_a.csv", tmp_path / "dev.csv"], images))
    assert found == sorted(found) and set(found) == {"TRAIN", "VAL"}


def test_an_image_in_several_splits_of_karpathys_is_told(photographs, tmp_path):
    twice = [PHOTOGRAPHS[0], PHOTOGRAPHS[0]._replace(split="validation")]
    [path] = data_sets.karpathy(tmp_path, twice)
    note = "1 image stands in several splits (a000.jpg: images[0] and images[1])"
    assert note in read(path, photographs).notes


# ----------------------------------------------------------------------------------- bad input

LONG = "word " * 10_000
GOOD = [{"image": p.name, "caption": "a dog", "split": p.split} for p in PHOTOGRAPHS]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"caption": None}, "no caption"),
        ({"caption": 3.5}, "a caption that is no text, 3.5"),
        ({"caption": LONG}, "a caption of 10000 words"),
        ({"caption": ["a dog", LONG]}, "a caption of 10000 words"),
        ({"caption": ["a dog", None]}, "no caption"),
        ({"image": "../../etc/x.jpg"}, "outside the folder"),
        ({"image": "/etc/passwd"}, "outside the folder"),
        ({"image": "..\\..\\x.jpg"}, "outside the folder"),
        ({"image": ""}, "no name of an image"),
        ({"split": "half"}, "an unknown split 'half'"),
        ({"image": "a000.jpg", "split": "val"}, "captions.jsonl, line 1, has in train"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "csv", "huggingface"])
def test_a_bad_row_is_named(kind, change, words, photographs, tmp_path):
    rows = [dict(row) for row in GOOD]
    rows[4] |= change
    if kind == "jsonl":
        path, row = tmp_path / "captions.jsonl", "line 5"
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        path, row = tmp_path / "captions.jsonl", "line 6"  # the name is of no matter
        text = [f'{r["image"]},"{"" if r["caption"] is None else r["caption"]}",{r["split"]}'
                for r in rows]  # fmt: skip
        path.write_text("\n".join(["image,caption,split", *text]))
        words = words.replace("line 1,", "line 2,")
        if isinstance(change.get("caption"), list) and None in change["caption"]:
            words = "no caption"
    else:
        pyarrow = pytest.importorskip("pyarrow.parquet")
        if isinstance(change.get("caption"), float | list):
            pytest.skip("a column of Parquet has one type")
        path, row = tmp_path / "captions.parquet", "row 4"
        columns = {key: [r[key] for r in rows] for key in rows[0]}
        pyarrow.write_table(pytest.importorskip("pyarrow").table(columns), path)
        if words.startswith("captions"):
            words = "another split than captions.parquet, row 0,"
        words = words.replace("no name of an image", "no image")
    with pytest.raises(UserError) as error:
        create(path, photographs, tmp_path / "data", format=kind)
    line = str(error.value)
    assert line.startswith(f"{path} cannot be used: {row} has ") and words in line, line
    assert "\n" not in line and len(line) < 400 and not (tmp_path / "data").exists()


def fails(files, images, output):
    """The line with which a data set is refused, of which nothing is written."""
    with pytest.raises(UserError) as error:
        create(files, images, output)
    line = str(error.value)
    assert "\n" not in line and len(line) < 1000 and not output.exists()
    return line


AS_TEXT = ("flickr8k", "flickr30k", "conceptual", "csv", "tsv", "folder", "webdataset")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        (None, "no caption"),
        ("3.5", "a caption that is "),
        (LONG, "a caption of 10000 words"),
        ("word" * 6000, "a caption of 1 word, 24000 characters"),
    ],
)
@pytest.mark.parametrize(("name", "writer"), CASES)
def test_a_caption_that_is_none_is_named_in_every_format(name, writer, caption, words, tmp_path):
    drawn = data_sets.draw(hashed=name == "conceptual")
    as_text = caption or ("" if name in AS_TEXT and writer is not data_sets.webdataset else caption)
    if caption is None and name == "webdataset":
        drawn[4] = drawn[4]._replace(captions=[""])
    else:
        drawn[5] = drawn[5]._replace(captions=[as_text])
    files = writer(tmp_path, drawn)
    images = None
    if not formats.FORMATS[name].holds_images:
        images = write_images(tmp_path / "images", drawn)
    line = fails(files, images, tmp_path / "made")
    assert str(tmp_path) in line and words in line and re.search(r"\d", line.split(" has ")[0])


@pytest.mark.parametrize(
    "writer",
    [data_sets.karpathy, data_sets.coco, data_sets.flickr8k, data_sets.flickr30k, data_sets.table]
    + [data_sets.tsv, data_sets.jsonl, data_sets.webdataset],
)
@pytest.mark.parametrize("name", ["../out.jpg", "/etc/out.jpg", "a/../../out.jpg"])
def test_a_path_that_leaves_the_folder_is_named_in_every_format(
    writer, name, photographs, tmp_path
):  # fmt: skip
    drawn = [*PHOTOGRAPHS[:4], PHOTOGRAPHS[4]._replace(name=name), *PHOTOGRAPHS[5:]]
    files = writer(tmp_path, drawn)
    line = fails(files, None if writer is data_sets.webdataset else photographs, tmp_path / "made")
    assert "has a path outside the folder" in line and "out.jpg" in line and str(tmp_path) in line


@pytest.mark.parametrize(
    "writer",
    [data_sets.flickr8k, data_sets.flickr30k, data_sets.table, data_sets.tsv, data_sets.jsonl]
    + [data_sets.parquet, data_sets.saved_to_disk],
)
def test_an_image_of_two_splits_is_named_by_both_rows(writer, photographs, tmp_path):
    drawn = [*PHOTOGRAPHS, PHOTOGRAPHS[0]._replace(split="test")]
    holds = writer in (data_sets.parquet, data_sets.saved_to_disk)
    images = None if holds else photographs
    line = fails(writer(tmp_path, drawn), images, tmp_path / "made")
    assert "a000" in line and re.search("line|row", line)


def all_but(*without):
    return [writer for _, writer in CASES if writer not in without]


@pytest.mark.parametrize("writer", all_but(data_sets.parquet, data_sets.saved_to_disk))
def test_text_of_another_encoding_is_named_in_every_format(writer, photographs, tmp_path):
    """Latin-1's é; Parquet and Arrow have no other than UTF-8."""
    hashed = writer is data_sets.conceptual
    drawn = data_sets.draw(hashed=hashed)
    images = write_images(tmp_path / "more", drawn) if hashed else photographs
    files = writer(tmp_path, drawn)
    changed = 0
    for path in (inner for file in files for inner in data_sets.files_below(file)):
        contents = path.read_bytes()
        if b"sleeps" in contents and path.suffix != ".jpg":
            path.write_bytes(contents.replace(b"sleeps", b"sl\xe9eps"))
            changed += 1
    holds = writer in (data_sets.folder_, data_sets.webdataset)
    line = fails(files, None if holds else images, tmp_path / "made")
    assert changed and ("UTF-8" in line or "utf-8" in line) and str(tmp_path) in line


@pytest.mark.parametrize("writer", all_but(data_sets.folder_))
def test_files_cut_short_are_named_in_every_format(writer, tmp_path):
    """In the middle, texts packed by gzip; one beside an image may be of any length."""
    hashed = writer is data_sets.conceptual
    drawn = data_sets.draw(hashed=hashed)
    images = write_images(tmp_path / "images", drawn)
    files = writer(tmp_path, drawn)
    paths = [inner for file in files for inner in data_sets.files_below(file)]
    path = max((p for p in paths if p.suffix != ".jpg"), key=lambda p: p.stat().st_size)
    if path.suffix not in (".tar", ".parquet", ".arrow"):
        path.write_bytes(gzipped(path.read_bytes()))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    holds = path.suffix in (".tar", ".parquet", ".arrow")
    assert str(path) in fails(files, None if holds else images, tmp_path / "made")


def test_an_arrow_file_cut_off_anywhere_is_refused(tmp_path):
    [saved] = data_sets.saved_to_disk(tmp_path, PHOTOGRAPHS[:8])
    path = saved / "train" / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), *range(len(whole) - 40, len(whole) - 8)]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=path.name):
            read(saved)


def test_documents_may_be_packed(photographs, tmp_path):
    for writer in (data_sets.karpathy, data_sets.coco):
        files = writer(tmp_path, PHOTOGRAPHS)
        expected = [image.name for image in read(files, photographs).images]
        packed = [path.with_name(f"{path.name}.gz") for path in files]
        for path, other in zip(files, packed, strict=True):
            other.write_bytes(gzipped(path.read_bytes()))
        assert [image.name for image in read(packed, photographs).images] == expected
        packed[0].write_bytes(packed[0].read_bytes()[:-9])
        with pytest.raises(UserError, match=f"{packed[0].name} is damaged"):
            read(packed, photographs)


def test_a_missing_column_is_named_in_shards(tmp_path):
    [shards] = data_sets.webdataset(tmp_path, PHOTOGRAPHS)
    with pytest.raises(UserError, match=r"tar cannot be used: a001.json has no 'says'.*--caption_"):
        read(shards, caption_column="says")
    with pytest.raises(UserError, match=r"tar cannot be used: a001.json has no 'part'.*--split_c"):
        read(shards, split_column="part")


@pytest.mark.slow
def test_of_many_bad_rows_ten_are_named_and_the_others_counted(photographs, tmp_path):
    path = tmp_path / "a.csv"
    lines = [f"a{i % 12:03}.jpg,a dog {i}" for i in range(100_000)]
    for i in range(500, 550):
        lines[i] = "a000.jpg,"
    path.write_text("\n".join(["image,caption", *lines]))
    with pytest.raises(UserError) as error:
        read(path, photographs)
    named = "; ".join(f"line {i} has no caption" for i in range(502, 512))
    assert str(error.value) == f"{path} cannot be used: {named}; and 40 more"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", b"image,caption\na000.jpg,caf\xe9\n", "a.csv cannot be used: line 2 .*UTF-8"),
        ("a.jsonl", '{"image": "é"}'.encode("utf-16"), "a.jsonl cannot be used: line 1 .*UTF-8"),
        ("a.csv", b"image,text\na000.jpg,a dog\n", "no column 'caption'.*image, text.*--caption_c"),
        ("a.csv", b"image,caption,image\na000.jpg,a dog,b\n", "two columns"),
        ("a.csv", b"image,caption\na000.jpg,a dog, brown\n", "line 2 has 3 columns, not the 2"),
        ("a.csv", b'image,caption\na000.jpg,"a dog\n', "line 2 has cells that cannot be told"),
        ("a.csv", b"", "no known format"),
        ("a.csv", b"image,caption\n", "a.csv has no image with captions"),
        ("a.csv", b"image,caption\r0.jpg,a dog\r", "no column 'image'.*first line names none"),
        ("a.jsonl", b"", "a.jsonl has no image with captions"),
        ("a.tar", bytes(10240), "a.tar has no image with captions"),
        ("a.token", b"a000.jpg#0\ta dog\na001.jpg#0\t\n", "line 2 has no caption"),
        ("a.jsonl", b'{"image": "a000.jpg",\n', "line 1 has no valid JSON"),
        ("a.jsonl", b"[1]\n" + b"[" * 10**6, "line 1 has no keys; line 2 has no valid JSON"),
        ("a.csv.gz", gzipped(b"image,caption\n" + b"a000.jpg,a dog\n" * 99)[:-9], "damaged"),
        ("a.token", b"a000.jpg#0\ta dog\na000.jpg a cat\n", "line 2 has no image, number and cap"),
        ("a.tsv", b"a dog\thttps://x.example/1\na cat\tfile:///x\n", "line 2 has no caption<tab>"),
        ("a.parquet", b"PAR1", "a.parquet"),
        ("a.tar", b"no archive", "a.tar is damaged or cut off"),
        ("a.tar", gzipped(b"x"), "a.tar is packed.*gunzip"),
        ("a.json", b'{"images": [{"file_name": "a", "id": 1.5}]}', r"images\[0\] has the id 1.5"),
        ("a.json", b'{"annotations": [{"image_id": 1, "caption": 2}]}', r"annotations\[0\] has"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(name, text, words, photographs, tmp_path):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=words) as error:
        read(tmp_path / name, photographs)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_an_archive_cut_off_anywhere_is_refused(tmp_path):
    [shards] = data_sets.webdataset(tmp_path, PHOTOGRAPHS[:4])
    path = sorted(shards.iterdir())[0]
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in [*range(512, end, 512), *range(1, end, 709)]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{path.name}"):
            read(shards)


def test_members_of_no_use_are_named_and_links_passed_over(tmp_path):
    [shards] = data_sets.webdataset(tmp_path, PHOTOGRAPHS)
    with tarfile.open(sorted(shards.iterdir())[0], "a") as archive:
        (tmp_path / "x").write_text("{}")
        for name in ("b.txt", "c.json", "../d.jpg", "a000.png"):
            archive.add(tmp_path / "x", name)
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UserError) as error:
        read(shards)
    assert str(error.value).partition("used: ")[2] == (
        f"../d.jpg has a path outside the folder {sorted(shards.iterdir())[0]}, {shards}/d.jpg; "
        "a000.png has an image beside a000.jpg: one is the most; "
        "b.txt has no image beside it; c.json has no image beside it"
    )


def test_a_texts_ending_may_be_in_capitals(photographs):
    (photographs / "a001.TXT").write_text("a dog")
    [image] = [image for image in read(photographs).images if image.name == "a001.jpg"]
    assert [caption.raw for caption in image.captions] == ["a dog"]


def test_a_folder_with_a_damaged_text_and_one_alone(photographs):
    (photographs / "a001.txt").write_text("a dog\n\n  a cat \n")
    (photographs / "alone.txt").write_text("a dog")
    data = read(photographs)
    assert [c.raw for c in data.images[0].captions] == ["a dog", "a cat"]
    left_out = {"texts without an image": 1, "images without captions": 11}
    assert data.left_out == left_out and data.images[0].name == "a001.jpg"
    (photographs / "a002.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"images cannot be used: a002.txt has .*UTF-8"):
        read(photographs)


def test_some_rows_with_a_split_and_some_without(photographs, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "a000.jpg", "caption": "a", "split": "val"}\n'
                    '{"image": "a001.jpg", "caption": "a"}\n')  # fmt: skip
    with pytest.raises(UserError, match=r"a.jsonl, line 2, has no split and others have"):
        read(path, photographs)


def test_images_of_two_files_under_one_id(photographs, tmp_path):
    for name, file in (("train", "a000.jpg"), ("val", "a001.jpg")):
        images = [{"id": 1, "file_name": file}]
        (tmp_path / f"captions_{name}.json").write_text(json.dumps({"images": images}))
    files = [tmp_path / "captions_train.json", tmp_path / "captions_val.json"]
    with pytest.raises(UserError, match=r"captions_val.json .*images\[0\] has the id 1 for a001"):
        read(files, photographs)


# ---------------------------------------------------------------------------- the command line


def script(*arguments):
    return run_here("create_input_files.py", "--min_word_freq", 0, "--image_size", 8, *arguments)


def test_a_folder_is_enough(photographs, tmp_path):
    for photograph in PHOTOGRAPHS:
        (photographs / photograph.name).with_suffix(".txt").write_text(photograph.captions[0])
    run = ["--dataset", "мои.photos-1", "--image_folder", photographs, "--output_folder"]
    process = script(*run, tmp_path / "data", "--split_sizes", 1, 1, 0, "--max_images", 6)
    assert process.returncode == 0, process.stderr
    assert "format: folder, by its look" in process.stdout
    assert "drawn at random, 3, 3 and 0 images" in process.stdout
    assert (tmp_path / "data" / "WORDMAP_мои.photos-1_5_cap_per_img_0_min_word_freq.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "a/b", "--captions", "x"], "--dataset a/b: give a name"),
        (["--dataset", ".a", "--captions", "x"], "--dataset .a: give a name"),
        (["--dataset", "é" * 60, "--captions", "x"], "100 bytes"),
        (["--dataset", "mine"], "--captions and --image_folder"),
        (["--dataset", "mine", "--captions", "x", "--karpathy_json", "y"], "give either"),
        (["--dataset", "mine", "--captions", "x", "--format", "xml"], "known are webdataset, hu"),
        (["--dataset", "mine", "--captions", "x"], "cannot read x: No such file"),
        (["--dataset", "mine", "--captions", "a.csv"], "give --image_folder"),
        (["--dataset", "mine", "--captions", "a.csv", "--image_folder", "x"], "no folder x"),
        (
            ["--dataset", "mine", "--captions", "a.csv", "--image_folder", ".", "--split_sizes"]
            + ["1", "0", "1"],
            "--split_sizes: training and validation",
        ),
    ],
)
def test_options_that_cannot_be(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("image,caption\n0.jpg,a dog\n")
    line = failure(script(*arguments))
    assert words in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


# ------------------------------------------------------------------------------------ the pages


PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = [text for text in PAGE.split("\n## ") if text.startswith("`")]


@pytest.mark.parametrize("text", SECTIONS, ids=[text.split("\n")[0] for text in SECTIONS])
def test_the_examples_of_the_page_on_data_work_as_they_stand(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in (1, 2, 3):
        for name in (f"{i}.jpg", file_name(data_sets.address(i))):
            path = tmp_path / "photographs" / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(PHOTOGRAPHS[i].contents)
    if text.startswith(("`folder`", "`webdataset`")):
        for path in Path("photographs").glob("*/*.jpg"):
            path.unlink()
    if text.startswith("`webdataset`"):
        for i in (1, 2, 3):
            Path(f"photographs/{i}.txt").write_text("A dog runs.\nTwo children play.")
    for name, lines in re.findall(r"^`(\S+)`:\n\n((?:    .*\n)+)", text, re.M):
        Path(name).write_text(textwrap.dedent(lines), encoding="utf-8")
    for program in re.findall(r"```python\n(.*?)```", text, re.S):
        process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        if "No module named 'datasets'" in process.stderr:
            pytest.skip("no package datasets")
        assert process.returncode == 0, process.stderr
    for line in re.findall(r"^    (cd .*)", text, re.M):
        subprocess.run(line, shell=True, check=True)
    found = set()
    for command in re.findall(r"^    python (.*)", text, re.M):
        process = run_here(*shlex.split(command), "--image_size", 8, "--workers", 1)
        assert process.returncode == 0, process.stderr
        found |= set(re.findall("format: (.*), by its look", process.stdout))
        [word_map] = (tmp_path / "data" / "mine").glob("WORDMAP*")
        assert {"dog", "runs", "children"} <= json.loads(word_map.read_text()).keys()
        word_map.unlink()
    assert found == set(re.findall("`(.*?)`", text.split("\n")[0]))


def test_the_example_of_the_readme_works_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own photographs")[2]
    [table] = re.findall(r"^    image,caption\n(?:    .*\n)+", text, re.M)
    Path("captions.csv").write_text(textwrap.dedent(table))
    write_images(
        tmp_path / "photographs", [PHOTOGRAPHS[i]._replace(name=f"{i}.jpg") for i in (1, 2)]
    )
    command = re.search(r"^    python (create_input_files.py (?:.*\\\n)*.*)", text, re.M)[1]
    words = shlex.split(command.replace("\\\n", " "))
    process = run_here(*words, "--image_size", 8, "--workers", 1)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "data" / "mine").is_dir()


def test_every_format_has_a_section():
    titles = re.findall("`(.*?)`", " ".join(text.split("\n")[0] for text in SECTIONS))
    assert sorted(titles) == sorted(formats.FORMATS)


# -------------------------------------------------------------------------------- references


@pytest.mark.parametrize("writer", [data_sets.table, data_sets.flickr8k, data_sets.coco])
def test_results_are_scored_by_references_of_any_format(writer, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java
    path = writer(tmp_path, PHOTOGRAPHS)[-1]  # of COCO's the test
    test = [(i, p) for i, p in enumerate(PHOTOGRAPHS) if p.split == "test"]
    results = [{"image_id": p.name, "caption": p.captions[-1]} for _, p in test]
    (tmp_path / "results.json").write_text(json.dumps(results))
    process = run_here("eval.py", "--results", tmp_path / "results.json", "--references", path)
    assert process.returncode == 0, process.stderr
    assert "3 images" in process.stdout and " 100.0 |" in process.stdout


def test_a_test_without_captions_is_captioned_for_a_server(tmp_path, photographs):
    """Images and references alone; the results have its ids, and there are no scores."""
    *files, test = data_sets.coco(tmp_path, PHOTOGRAPHS)
    images = json.loads(test.read_text())["images"]
    test.write_text(json.dumps({"images": images}))
    process = script(
        "--dataset", "coco", "--captions", *files, test, "--image_folder", photographs,
        "--output_folder", tmp_path / "data", "--image_size", 64,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "TEST: 3 images without captions" in process.stdout
    made = {path.name.split("_coco")[0] for path in (tmp_path / "data").glob("TEST*")}
    assert made == {"TEST_IMAGES", "TEST_REFERENCES"}
    checkpoints.save_checkpoint(tmp_path / "m.pth.tar", small_checkpoint())
    run = ["eval.py", "--model", tmp_path / "m.pth.tar", "--data_folder", tmp_path / "data"]
    run += ["--beam_size", 1, 2, "--device", "cpu", "--amp", "off"]
    for name in ("robustness", "report"):
        value = tmp_path / "page" if name == "report" else 2
        line = failure(run_here(*run, f"--{name}", value, "--output_folder", tmp_path / "out"))
        assert f"--{name} compares with people's captions" in line
        assert not list(tmp_path.glob("out/*")) and not (tmp_path / "page").exists()
    process = run_here(*run, "--output_folder", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert "no scores: TEST_IMAGES_coco" in process.stdout and "BLEU" not in process.stdout
    paths = sorted((tmp_path / "out").glob("*.json"))
    assert [path.name.split("_")[2] for path in paths] == ["beam1", "beam2"]
    for path in paths:
        results = json.loads(path.read_text())
        assert [result["image_id"] for result in results] == [image["id"] for image in images]
        assert all(isinstance(result["caption"], str) for result in results)
    (tmp_path / "closed").write_text("no folder")
    line = failure(run_here(*run, "--output_folder", tmp_path / "closed"))
    assert "closed" in line and "scores" not in line


def test_some_captions_of_a_test_are_no_split_without(tmp_path, photographs):
    """REFERENCES of which some lack captions are no file of ours."""
    create(data_sets.jsonl(tmp_path, PHOTOGRAPHS), photographs, tmp_path / "data")
    [path] = (tmp_path / "data").glob("TEST_REFERENCES*")
    references = json.loads(path.read_text())
    references[1]["captions"] = []
    path.write_text(json.dumps(references))
    with pytest.raises(UserError, match="TEST_REFERENCES.* has no captions of 1 image of 3"):
        datasets.read_references(path, may_lack_captions=True)
    path.write_text(json.dumps([reference | {"captions": []} for reference in references]))
    assert len(datasets.read_references(path, may_lack_captions=True)) == 3
    with pytest.raises(UserError, match="has no captions of 3 images of 3"):
        datasets.read_references(path)
