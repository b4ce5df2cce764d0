"""The captioning command: what it takes, prints and writes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, failure, run_here
from PIL import Image
from square_font import make_font

import caption as script
import fused
from captioner import Caption, Captioner
from coco_results import image_ids


@pytest.fixture
def photographs(scenes, tmp_path, monkeypatch):
    """A folder with two pictures, one in a folder of it, and what is no picture; the current
    folder is the one that it lies in."""
    monkeypatch.chdir(tmp_path)
    first, second, third, *_ = sorted((scenes / "images").iterdir())
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(first, tmp_path / "in" / "a.jpg")
    Image.open(second).save(tmp_path / "in" / "a.bmp")
    shutil.copy(third, tmp_path / "in" / "deep" / "a.jpg")
    for name in ("notes.txt", "more.txt", "README", ".hidden", "phone.raw"):
        (tmp_path / "in" / name).write_text("no picture")
    return Path("in")


@pytest.fixture(scope="module")
def model(checkpoint):
    return Captioner.load(checkpoint, "cpu", amp="off")


@pytest.fixture
def caption(checkpoint):
    """Runs the script on the shared checkpoint, in this process."""
    return lambda *arguments: run_here(
        "caption.py", "--model", checkpoint, "--device", "cpu", "--amp", "off", *arguments
    )


def records_of(process):
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


# ------------------------------------------------------------------------------------- images


def test_who_captions_a_photograph_waits_for_no_compiler(caption, photographs, monkeypatch):
    def build(device):
        raise AssertionError("built")

    monkeypatch.setattr(fused, "build", build)
    process = caption("--img", photographs / "a.jpg", "--no_pictures")
    assert process.returncode == 0, process.stderr


def test_a_folder_is_taken_alone_or_with_its_folders_and_the_rest_is_counted(caption, photographs):
    process = caption("--img", photographs, "--no_pictures", "--json")
    assert [r["image"] for r in records_of(process)] == ["in/a.bmp", "in/a.jpg"]
    [line] = process.stderr.strip().splitlines()
    assert line.startswith("in: passed over 2 .txt, ")
    for part in ("1 without an ending", "1 .raw", "1 folder (--recursive"):
        assert part in line
    process = caption("--img", photographs, "--no_pictures", "--json", "--recursive")
    images = [r["image"] for r in records_of(process)]
    assert images == ["in/a.bmp", "in/a.jpg", "in/deep/a.jpg"]
    assert "--recursive" not in process.stderr
    (photographs / "deep" / "up").symlink_to("..")
    process = caption("--img", photographs, "./in/a.jpg", "--no_pictures", "--json", "--recursive")
    assert [Path(r["image"]).as_posix() for r in records_of(process)] == images
    assert "1 link to a folder" in process.stderr


def test_a_folder_without_images_says_what_it_holds(caption, photographs):
    (photographs / "phone").mkdir()
    (photographs / "phone" / "x.HEIC").write_bytes(b"....ftypheic")
    sys.modules["pillow_heif"], before = None, sys.modules.get("pillow_heif")
    try:
        line = failure(caption("--img", photographs / "phone"))
    finally:
        sys.modules.pop("pillow_heif")
        if before:
            sys.modules["pillow_heif"] = before
    assert "no image in this folder, but 1 .heic (HEIC: pip install pillow-heif)" in line


def test_an_address_costs_its_own_line(caption, photographs):
    process = caption("--img", "https://example.org/x.jpg", photographs / "a.jpg", "--no_pictures")
    assert "1 of 2 images" in failure(process)
    assert "https://example.org/x.jpg: addresses are not fetched" in process.stderr
    assert "in/a.jpg: " in process.stdout


def test_paths_on_standard_input(caption, photographs, monkeypatch):
    os.rename(os.fsencode(photographs / "a.bmp"), b"in/\xff a.bmp")

    def given(lines):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        return caption("--img", "-", "--no_pictures")

    process = given(b"in/\xff a.bmp\r\n\nin/deep\n")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["in/\\udcff a.bmp", "in/deep/a.jpg"]
    assert "standard input names no image" in failure(given(b"\n"))


@pytest.mark.slow
def test_behind_head_it_ends_quietly(photographs, checkpoint):
    """Of many images, one line is read, then none."""
    images = [f"in/{i}.jpg" for i in range(400)]
    for image in images:
        Path(image).symlink_to("a.jpg")
    command = [sys.executable, ROOT / "caption.py", "--img", *images, "--no_pictures"]
    with subprocess.Popen(
        [*command, "--model", checkpoint, "--beam_size", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline().startswith("in/0.jpg: ")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def run_main(code, stdout):
    code = f"from groundwork.errors import run\n{code}\nrun(main)"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, check=False
    )


def test_any_script_behind_head_ends_quietly():
    """Of little that is printed, which Python would write at its end, and of much."""
    for text in ("'a line'", "'x' * 10**6"):
        reader, writer = os.pipe()
        os.close(reader)
        process = run_main(f"def main():\n    print({text})", writer)
        os.close(writer)
        assert (process.returncode, process.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_no_quiet_end():
    process = run_main("def main():\n    raise BrokenPipeError('of Java')", subprocess.PIPE)
    assert process.returncode == 1 and b"BrokenPipeError: of Java" in process.stderr


# ----------------------------------------------------------------------------------- pictures


def test_no_picture_takes_the_place_of_another(caption, photographs):
    """Of the same stem, of the same name in two folders, or of a run before."""
    first = records_of(caption("--img", photographs, "--recursive", "--json"))
    pictures = [Path(r["picture"]) for r in first]
    assert [p.name for p in pictures] == [
        "a.bmp_attention.png", "a.jpg_attention.png", "a.jpg_attention_2.png",
    ]  # fmt: skip
    before = [p.read_bytes() for p in pictures]
    assert len(set(before)) == 3
    again = records_of(caption("--img", photographs / "a.jpg", "--json", "--beam_size", 1))
    assert again[0]["picture"] == "captions/a.jpg_attention_3.png"
    assert [p.read_bytes() for p in pictures] == before


def test_without_pictures_no_file_is_written(caption, photographs):
    [record] = records_of(caption("--img", "in/a.jpg", "--no_pictures", "--json"))
    assert record["picture"] is None and not Path("captions").exists()
    for option in ("--show", "--numbers"):
        line = failure_of_options(caption("--img", "in/a.jpg", "--no_pictures", option))
        assert option in line


def test_numbers_are_drawn_when_they_are_asked_for(caption, photographs, model):
    [record] = records_of(caption("--img", "in/a.jpg", "--numbers", "--json"))
    [expected] = model.caption("in/a.jpg")
    picture = np.asarray(Image.open(record["picture"]))
    assert np.array_equal(picture, np.asarray(expected.draw("in/a.jpg", numbers=True)))
    assert not np.array_equal(picture, np.asarray(expected.draw("in/a.jpg")))


def failure_of_options(process):
    assert process.returncode == 2
    return process.stderr.strip().splitlines()[-1]


def test_a_name_as_long_as_can_be_gets_its_picture(caption, photographs):
    name = "長" * 80 + ".jpg"  # 244 bytes
    shutil.copy(photographs / "a.jpg", photographs / name)
    [record] = records_of(caption("--img", photographs / name, "--json"))
    Image.open(record["picture"]).verify()


# ----------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("alphas", "what"), [(torch.full((2, 9), 1 / 9), "attention in "), (None, "picture in ")]
)
def test_of_a_decoder_without_attention_it_is_a_picture_alone(tmp_path, capsys, alphas, what):
    options = SimpleNamespace(output_folder=tmp_path, json=None, show=False)
    script.keep("a.jpg", Caption(["a", "dog"], -1.5, alphas), b"png", options)
    picture = tmp_path / "a.jpg_attention.png"
    assert capsys.readouterr().out == f"a.jpg: a dog (log p -1.50, {what}{picture})\n"


def test_n_captions_an_image_in_lines_and_in_json(caption, photographs, model):
    process = caption("--img", "in/a.jpg", "--n", 3, "--json", "all.json")
    assert process.returncode == 0, process.stderr
    [record] = json.loads(Path("all.json").read_text())
    [expected] = model.caption("in/a.jpg", n=3)
    for found, line, c in zip(
        record["captions"], process.stdout.splitlines(), expected, strict=True
    ):
        assert (found["caption"], found["words"]) == (c.text, c.words)
        assert found["log_prob"] == pytest.approx(c.log_prob, abs=1e-3)
        assert (
            line == f"in/a.jpg: {c.text} (log p {c.log_prob:.2f}, attention in {found['picture']})"
        )
        picture = np.asarray(Image.open(found["picture"]))
        assert np.array_equal(picture, np.asarray(c.draw("in/a.jpg")))
    assert {key: record[key] for key in found} == record["captions"][0]
    assert "6 captions" in failure(caption("--img", "in/a.jpg", "--n", 6))


def test_drawn_captions_follow_the_seed(caption, photographs):
    def texts(*arguments):
        run = ["--img", photographs, "--no_pictures", "--json", "--n", 8, "--beam_size", 1]
        records = records_of(caption(*run, "--temperature", 2, *arguments))
        return [c["caption"] for r in records for c in r["captions"]]

    one = texts("--seed", 1)
    assert one == texts("--seed", 1) != texts("--seed", 2)
    assert len(one) == 16 and len(set(one)) > 8


# ------------------------------------------------------------------------------------ results


def test_results_are_scored_by_evaluation(caption, scenes, photographs, monkeypatch):
    """A Karpathy JSON gives the ids that its references have."""
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    process = caption(
        "--img", scenes / "images", "--no_pictures", "--results", "results.json",
        "--ids", scenes / "karpathy.json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    results = json.loads(Path("results.json").read_text())
    assert [r["caption"] for r in results] == re.findall(r": (.*) \(log p", process.stdout)
    scored = run_here(
        "eval.py", "--results", "results.json", "--references", scenes / "karpathy.json"
    )
    assert scored.returncode == 0, scored.stderr
    [row] = re.findall(r"\| results \|(.*)\|", scored.stdout)[:1]
    assert float(row.split("|")[0]) > 75  # BLEU-1 of captions learned by heart


@pytest.mark.parametrize(
    ("names", "ids", "expected"),
    [
        (["a.jpg", "b.jpg"], None, ["a.jpg", "b.jpg"]),
        (["COCO_val2014_000000391895.jpg", "000000000007.png"], None, [391895, 7]),
        (["a.jpg"], {"images": [{"file_name": "a.jpg", "id": 5}]}, [5]),
        (["a.jpg"], {"a.jpg": "x", "b.jpg": 3}, ["x"]),
        (["a.jpg"], {"images": [{"file_name": "a.jpg", "id": 7.0}]}, [7]),
        (["a.jpg", "deep/a.jpg"], {"a.jpg": 1, "in/deep/a.jpg": 2}, [1, 2]),
    ],
)
def test_ids_of_results(tmp_path, names, ids, expected):
    source = None
    if ids is not None:
        source = tmp_path / "ids.json"
        source.write_text(json.dumps(ids))
    paths = [f"in/{name}" for name in names]
    assert image_ids(paths, source) == dict(zip(paths, expected, strict=True))


@pytest.mark.parametrize(
    ("images", "ids", "words"),
    [
        (["in/a.jpg", "in/deep/a.jpg"], None, "in/deep/a.jpg and in/a.jpg have the same id, a.jpg"),
        (["in/a.jpg"], {"b.jpg": 1}, "ids.json has no id for in/a.jpg"),
        (["in/a.jpg"], {"images": [{"file_name": "a.jpg", "id": 1.5}]}, "ids.json is no list"),
        (["in/a.jpg"], {"images": [7]}, "ids.json is no"),
        (["in/a.jpg"], [], "ids.json is no list"),
        (
            ["in/a.jpg"],
            {"images": [{"file_name": "a.jpg", "id": i} for i in (1, 2)]},
            "two ids for a.jpg, 1 and 2",
        ),
    ],
)
def test_ids_that_do_not_fit_are_refused_before_anything_is_captioned(
    caption, photographs, images, ids, words
):
    more = []
    if ids is not None:
        Path("ids.json").write_text(json.dumps(ids))
        more = ["--ids", "ids.json"]
    process = caption("--img", *images, "--results", "r.json", *more)
    assert words in failure(process)
    assert process.stdout == "" and not Path("r.json").exists()


@pytest.mark.parametrize("option", ["--json", "--results"])
def test_a_file_that_cannot_be_written_is_found_out_first(caption, photographs, option):
    for path, words in (("in/a.jpg/x.json", "cannot make the folder in/a.jpg"), ("in", "write in")):
        process = caption("--img", "in/a.jpg", option, path)
        assert words in failure(process)
        assert process.stdout == "" and not Path("captions").exists()


# ----------------------------------------------------------------------------- first caption


@pytest.mark.slow
def test_a_caption_without_pictures_imports_nothing_heavy(checkpoint, photographs):
    """A network of torchvision, timm, torch's compiler and matplotlib take seconds each."""
    heavy = ["torchvision", "timm", "torch._dynamo", "torch.onnx", "sympy", "matplotlib", "scipy"]
    code = f"""
import runpy, sys
sys.argv = ["caption.py", "--img", "in/a.jpg", "--no_pictures", "--model", {str(checkpoint)!r}]
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path({str(ROOT / "caption.py")!r}, run_name="__main__")
print(*(name for name in {heavy} if name in sys.modules))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    line, imported = process.stdout.splitlines()
    assert line.startswith("in/a.jpg: ") and imported == ""


# ----------------------------------------------------------------------------------- fonts

KNOWN, UNKNOWN = "\U0010f000", "\U0010f001"  # for private use: no other font has them


DRAW = """
import sys
import numpy as np
from PIL import Image
from attention_pictures import draw_attention
for i, word in enumerate({words!r}):
    picture = draw_attention(Image.new("RGB", (90, 60), "white"), ["dog", word], np.ones((2, 9)))
    picture.save(f"{{i}}.png")
"""


@pytest.mark.slow
def test_words_are_drawn_in_a_font_that_has_them_or_a_line_says_which_none_has(tmp_path):
    make_font(tmp_path / "fonts" / "square.ttf", KNOWN)
    (tmp_path / "fonts" / "broken.ttf").write_text("no font")
    process = subprocess.run(
        [sys.executable, "-c", DRAW.format(words=[KNOWN, UNKNOWN, f"x{UNKNOWN}"])],
        cwd=tmp_path,
        env=os.environ | {"XDG_DATA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    [line] = process.stderr.splitlines()
    assert line.startswith(r"no installed font has \U0010f001 (unknown): boxes stand for them")
    square, box = (np.asarray(Image.open(tmp_path / name)).max(-1) for name in ("0.png", "1.png"))
    # the caption's square is as high and wide as its size in points says; a box is hollow
    side = 17 / 72 * 110
    full, hollow = (((p[: int(0.7 * 110)] < 128).sum(1) >= side - 2).sum() for p in (square, box))
    assert full == pytest.approx(side, abs=2) and hollow < 8


def test_a_caption_as_long_as_it_may_be_is_told(checkpoint, scenes):
    image = sorted((scenes / "images").iterdir())[0]
    ask = ["caption.py", "--img", image, "--model", checkpoint, "--no_pictures", "--max_words"]
    assert "1 caption ends at --max_words 2" in run_here(*ask, 2).stderr
    assert "max_words" not in run_here(*ask, 50).stderr
