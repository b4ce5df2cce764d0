"""Whole data sets from a server on this machine, and what the command line says of them."""

import hashlib
import io
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, failure, run_here
from local_server import serving
from PIL import Image

import downloads
from downloads import Archive, fetch, file_name
from groundwork import web
from groundwork.errors import UserError
from groundwork.files import sole_writer
from groundwork.transfers import Published

SENTENCES = ["a dog runs", "a cat sleeps"]


def picture(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 100, 30)).save(file, "JPEG")
    return file.getvalue()


def karpathy(folder=None):
    """A data set of two images, in Karpathy's format."""
    entries = [
        {"filename": f"{n}.jpg", "split": split, "imgid": n}
        | {"sentences": [{"tokens": text.split(), "raw": text} for text in SENTENCES]}
        | ({"filepath": folder} if folder else {})
        for n, split in enumerate(["train", "val"])
    ]
    return json.dumps({"images": entries}).encode()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Serves all data sets, in small, which are published at its addresses. It counts as public."""
    with serving() as server:
        monkeypatch.setattr(web, "is_public", lambda address: True)

        def publish(path, data, kind="application/zip"):
            server.answers[path] = lambda handler: handler.give(data, Content_Type=kind)
            digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
            return Published(server.address(path), len(data), digest)

        names = downloads.KARPATHY.wanted
        captions = {name: karpathy("train2014" if "coco" in name else None) for name in names}
        photographs = {f"{n}.jpg": picture(40 * n) for n in range(2)}
        archives = {}
        for top in ("train2014", "val2014", "Flicker8k_Dataset"):
            members = {f"{top}/{name}": data for name, data in photographs.items()}
            data = zipped(members | {"__MACOSX/x": b"x"})
            archives[top] = Archive(publish(f"/{top}.zip", data), (top,), len(data))
        data = zipped(captions)
        splits = Archive(publish("/caption_datasets.zip", data), names, len(data))
        monkeypatch.setattr(downloads, "KARPATHY", splits)
        coco = [archives["train2014"], archives["val2014"]]
        flickr8k = [archives["Flicker8k_Dataset"]]
        monkeypatch.setitem(downloads.IMAGES, "coco", (coco, ""))
        monkeypatch.setitem(downloads.IMAGES, "flickr8k", (flickr8k, "Flicker8k_Dataset"))
        tables = []
        for split, numbers in (("train", range(4)), ("val", range(3, 6))):
            rows = (f"a caption\t{server.address(f'/image/{n}')}\n" for n in numbers)
            data = "".join(rows).encode()
            tables.append(publish(f"/{split}.tsv", data, "text/tab-separated-values"))
        for n in range(5):  # the sixth is missing
            publish(f"/image/{n}", picture(n), "image/jpeg")
        monkeypatch.setattr(downloads, "CONCEPTUAL", tables)
        yield server


def test_a_file_has_the_name_of_its_address():
    address = "http://example.org/a.png"
    digest = hashlib.sha256(address.encode()).hexdigest()[:32]
    assert file_name(address) == file_name(f" {address}\r\n") == f"{digest[:2]}/{digest}.jpg"
    assert file_name("http://example.org/é") != file_name("http://example.org/e")


def test_what_is_published_where():
    """The addresses, sizes and digests that the page names are those that are fetched."""
    archives = [downloads.KARPATHY]
    archives += [archive for found, _ in downloads.IMAGES.values() for archive in found]
    files = [archive.published for archive in archives] + list(downloads.CONCEPTUAL)
    assert len(files) == 6
    page = (ROOT / "docs" / "downloads.md").read_text()
    for published in files:
        kind, _, digest = published.digest.partition(":")
        assert len(digest) == {"sha256": 64, "md5": 32}[kind]
        assert published.address in page and f"{published.size:,}" in page and kind in page


@pytest.mark.parametrize("name, images", [("coco", ""), ("flickr8k", "Flicker8k_Dataset")])
def test_a_data_set_is_fetched_once(server, tmp_path, name, images):
    found = fetch(name, tmp_path)
    own = tmp_path / name
    assert found == ([tmp_path / f"dataset_{name}.json"], own / images)
    for archive in downloads.IMAGES[name][0]:
        [top] = archive.wanted
        assert (own / top / "1.jpg").read_bytes() == picture(40)
    asked = len(server.requests)
    assert fetch(name, tmp_path) == found
    assert len(server.requests) == asked == 1 + len(downloads.IMAGES[name][0])


def test_a_refused_download_leaves_no_folder(server, tmp_path):
    """Where it is refused before anything has come, and where an earlier folder is in use."""
    for name in ("coco", "flickr8k", "flickr30k"):
        server.answers.clear()
        with pytest.raises(UserError):
            fetch(name, tmp_path / "new" / "downloads")
        assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError):
        fetch("flickr30k", tmp_path / "old")
    assert list(tmp_path.iterdir()) == [tmp_path / "old"] and not list((tmp_path / "old").iterdir())


def test_what_is_unpacked_needs_its_archive_no_more(server, tmp_path):
    fetch("coco", tmp_path)
    (tmp_path / "coco" / "train2014.zip").unlink()
    shutil.rmtree(tmp_path / "coco" / "val2014")
    fetch("coco", tmp_path)
    assert (tmp_path / "coco" / "val2014" / "0.jpg").exists()
    assert len(server.requests) == 3  # the archive of the other one was there still
    fetch("flickr8k", tmp_path)  # the captions are those of all
    assert len(server.requests) == 4


def test_without_room_for_archives_and_images_nothing_is_fetched(server, tmp_path, monkeypatch):
    sizes = [a.published.size + a.unpacked for a in downloads.IMAGES["coco"][0]]
    free = sum(sizes) + downloads.KARPATHY.published.size + downloads.KARPATHY.unpacked
    usage = type("usage", (), {"free": free - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"the archives and what they hold take .*download_folder"):
        fetch("coco", tmp_path)
    assert server.requests == []
    usage.free = free
    fetch("coco", tmp_path)


def test_a_second_process_waits_its_turn(server, tmp_path):
    with (
        sole_writer(tmp_path / "downloads", "wait"),
        pytest.raises(UserError, match="another run is writing .*--download_folder"),
    ):
        fetch("coco", tmp_path)


def test_flickr30k_says_where_its_form_is_and_goes_on_with_the_images(server, tmp_path):
    with pytest.raises(UserError) as error:
        fetch("flickr30k", tmp_path)
    images = tmp_path / "flickr30k" / "flickr30k-images"
    assert downloads.FLICKR30K_FORM in str(error.value) and str(images) in str(error.value)
    assert server.requests == []
    images.mkdir(parents=True)
    (images / "0.jpg").write_bytes(picture(0))
    found = fetch("flickr30k", tmp_path)
    assert found == ([tmp_path / "dataset_flickr30k.json"], images) and found.captions[0].exists()


def test_conceptual_captions_are_fetched_with_their_images(server, tmp_path, capsys):
    found = fetch("conceptual", tmp_path, connections=2)
    own = tmp_path / "conceptual"
    assert found == ([own / "train.tsv", own / "val.tsv"], own / "images")
    for n in range(5):
        path = found.image_folder / file_name(server.address(f"/image/{n}"))
        assert path.read_bytes() == picture(n)
    out = capsys.readouterr().out
    assert "6 captions with an image in" in out and "5 of them new; 1 without" in out
    asked = len(server.requests)
    fetch("conceptual", tmp_path)
    assert len(server.requests) == asked
    assert "0 of them new; 1 without" in capsys.readouterr().out
    fetch("conceptual", tmp_path, retry_failed=True)
    assert len(server.requests) == asked + 1


# ------------------------------------------------------------------------------ the command line


def script(tmp_path, *arguments):
    folders = ["--download_folder", tmp_path / "got", "--output_folder", tmp_path / "data"]
    sizes = ["--image_size", 16, "--min_word_freq", 0, "--workers", 1]
    return run_here("create_input_files.py", *folders, *sizes, *arguments)


def test_the_script_fetches_and_makes_the_input_files(server, tmp_path):
    process = script(tmp_path, "--download", "flickr8k")
    assert process.returncode == 0, process.stderr
    names = sorted(path.name for path in (tmp_path / "data").glob("*.hdf5"))
    base = "flickr8k_5_cap_per_img_0_min_word_freq"
    assert names == [f"TRAIN_IMAGES_{base}.hdf5", f"VAL_IMAGES_{base}.hdf5"]
    asked = len(server.requests)
    process = script(tmp_path, "--download", "coco", "--dataset", "flickr30k")
    assert (tmp_path / "data" / "WORDMAP_flickr30k_5_cap_per_img_0_min_word_freq.json").exists()
    assert len(server.requests) == asked + 2


def test_the_script_fetches_conceptual_captions_until_it_is_stopped(server, tmp_path):
    def interrupt(handler):
        os.kill(os.getpid(), signal.SIGINT)
        handler.give(status=503)

    good, server.answers["/image/3"] = server.answers["/image/3"], interrupt
    options = ["--download", "conceptual", "--connections", 1]
    process = script(tmp_path, *options)
    assert process.returncode == 130
    assert process.stdout.endswith("stopped by SIGINT: the same command goes on\n")
    server.answers["/image/3"] = good
    process = script(tmp_path, *options)
    assert process.returncode == 0 and "2 of them new; 1 without" in process.stdout
    base = "conceptual_5_cap_per_img_0_min_word_freq"
    for split, count in ("TRAIN", 4), ("VAL", 1):  # an image of both stays in the first
        path = tmp_path / "data" / f"{split}_REFERENCES_{base}.json"
        assert len(json.loads(path.read_text())) == count


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--download", "flickr30k"], "Flickr30k is given out by a form"),
        (["--download", "imagenet"], "invalid choice: 'imagenet'"),
        (["--download", "coco", "--karpathy_json", "x"], "goes without --download"),
        (["--download", "coco", "--image_folder", "x"], "goes without --download"),
        (["--download", "coco", "--connections", "3"], "goes with --download conceptual"),
        (["--download", "conceptual", "--connections", "0"], "is not above 0"),
        (["--dataset", "coco", "--retry_failed"], "--retry_failed goes with --download"),
        ([], "--dataset names the data set, or --download fetches it"),
    ],
)
def test_what_the_script_cannot_do_is_one_line(server, tmp_path, arguments, said):
    assert said in failure(script(tmp_path, *arguments))
    assert server.requests == [] and not (tmp_path / "data").exists()


def test_a_download_that_fails_leaves_no_input_files(server, tmp_path):
    server.answers["/Flicker8k_Dataset.zip"] = lambda handler: handler.give(status=404)
    said = failure(script(tmp_path, "--download", "flickr8k"))
    assert "404 Not Found" in said and str(Path("flickr8k") / "Flicker8k_Dataset.zip") in said
    assert not (tmp_path / "data").exists()
