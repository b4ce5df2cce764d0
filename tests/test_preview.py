"""The page about a data set as a reader meets it, and images that look the same."""

import io
import json
import re

import numpy as np
import pytest
from conftest import failure, least_contrast, run_here
from PIL import Image

import duplicates

TEXTS = {"red": "A red <b>ball</b> .", "blue": "A blue ball, one ball .", "odd": "One kite ."}


def photograph(seed, size=(120, 90)):
    """A picture that no other seed's is like."""
    fields = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize(size, Image.Resampling.BICUBIC)


def saved_anew(image, scale, quality):
    contents = io.BytesIO()
    size = [round(scale * side) for side in image.size]
    image.resize(size).save(contents, "JPEG", quality=quality)
    return Image.open(contents).convert("RGB")


def test_copies_are_found_and_nothing_else_is():
    images = [photograph(seed) for seed in range(600)]  # more than are compared at once
    mirror = images[3].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    brighter = images[4].point(lambda value: value // 2)
    images += [saved_anew(images[7], 0.5, 40), saved_anew(images[500], 2, 30), mirror, brighter]
    images += [images[7], images[599]]
    hashes = np.array([duplicates.image_hash(image) for image in images])
    assert duplicates.groups_of(hashes) == [[7, 600, 604], [500, 601], [599, 605]]
    assert duplicates.groups_of(hashes[:100]) == []
    assert duplicates.groups_of(np.empty((0, hashes.shape[1]), np.uint8)) == []


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Twenty images of which some stand in several splits, and one is no image."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "images").mkdir()
    images = {f"train_{i}.png": photograph(i) for i in range(12)}
    images |= {f"val_{i}.png": photograph(50 + i) for i in range(3)}
    images |= {"test_0.png": photograph(3), "test_1.png": saved_anew(photograph(4), 0.6, 60)}
    images |= {"test_2.png": photograph(51), "test_3.png": photograph(99)}
    images["train_11.png"] = photograph(10)
    entries = []
    for i, (name, image) in enumerate(images.items()):
        image.save(folder / "images" / name)
        texts = [TEXTS["odd" if i == 5 else ("red", "blue")[i % 2]]] * (1 + i % 2)
        split = name.partition("_")[0]
        sentences = [{"raw": text} for text in texts]
        entries.append({"filename": name, "split": split, "sentences": sentences})
    (folder / "images" / "train_9.png").write_bytes(b"none")
    (folder / "data.json").write_text(json.dumps({"images": entries}))
    return folder


def look(folder, *options):
    return run_here(
        "create_input_files.py", "--dataset", "own", "--karpathy_json", folder / "data.json",
        "--image_folder", folder / "images", "--output_folder", folder / "out", "--preview",
        *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(data_set):
    process = look(data_set, "--min_word_freq", 2)
    assert process.returncode == 0, process.stderr
    [path] = (data_set / "out").iterdir()  # nothing else is made
    assert path.name == "preview_own_5_cap_per_img_2_min_word_freq.html"
    return path, process.stdout


@pytest.fixture
def opened(written, page):
    """The page in a browser without network, which asks for nothing but the page."""
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.context.set_offline(True)
    page.goto(written[0].as_uri())
    page.locator("#count", has_text="of").wait_for()
    assert [url for url in asked if not url.startswith("data:")] == [page.url]
    return page


def test_it_says_how_many_test_images_stand_in_training(written, opened):
    lines = [
        "within train 1 image looks like another",
        "2 of 4 test images look like one in train, 50.0%",
        "1 of 4 test images looks like one in val, 25.0%",
        "0 of 3 val images look like one in train",
    ]
    assert opened.locator("#leaks li").all_inner_texts() == lines
    assert all(line in written[1] for line in lines)
    groups = opened.locator(".group")
    names = [groups.nth(i).locator("h4").all_inner_texts() for i in range(groups.count())]
    assert names == [
        ["train_3.png", "test_0.png"], ["train_4.png", "test_1.png"], ["val_1.png", "test_2.png"],
        ["train_10.png", "train_11.png"],
    ]  # fmt: skip
    assert "cannot read image" in opened.locator(".fault").inner_text()


def test_it_counts_captions_and_words(opened):
    heads = opened.locator(".figures th").all_inner_texts()
    rows = [
        row.locator("td").all_inner_texts() for row in opened.locator(".figures tbody tr").all()
    ]
    train, val, test = (dict(zip(heads, row, strict=True)) for row in rows)
    assert [train[""], val[""], test[""]] == ["train", "val", "test"]
    assert (train["images"], train["captions"]) == ("12", "18")
    assert train["captions an image"] == "1.5 (1 to 2)"
    # six captions «a red bballb», ten of five words, and two of two
    assert train["words a caption"] == f"{(6 * 3 + 10 * 5 + 2 * 2) / 18:.1f} (2 to 5)"
    assert train["<unk>"] == f"{2 / 72:.2%}"  # kite comes twice, and more than twice is asked for
    assert opened.locator("#frequent b").first.inner_text() == "ball"
    rare = opened.locator(".rare").first.inner_text()
    assert re.sub(r"\s+", " ", rare) == "1 word, 2 times: kite"
    assert opened.locator("#lengths").evaluate("image => image.naturalWidth") > 300


def test_images_are_searched_by_their_captions(opened):
    shown = opened.locator("#images .image:visible")
    assert shown.count() == 19
    opened.locator("#search").fill("KITE")
    assert shown.locator("h4").all_inner_texts() == ["train_5.png"]
    assert shown.locator("li").all_inner_texts() == ["One kite ."] * 2
    assert opened.locator("#count").inner_text() == "1 of 19"
    opened.locator("#search").fill("<b>ball</b> train_2")  # as it is written, no markup
    assert shown.locator("h4").all_inner_texts() == ["train_2.png"]
    widths = shown.locator("img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert widths == [120]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    assert least_contrast(opened, "body") > 4.5


def test_what_cannot_be_looked_at_is_one_line(data_set, tmp_path):
    assert "no image with captions" in failure(look_at_nothing(tmp_path))
    assert "no word more than 99 times" in failure(look(data_set, "--min_word_freq", 99))


def look_at_nothing(folder):
    (folder / "images").mkdir()
    (folder / "data.json").write_text(json.dumps({"images": []}))
    return look(folder)
