"""Captions in Chinese, from a table to scores, pictures and report."""

import json
import random
from itertools import product

import numpy as np
import pytest
from conftest import LEARN, run_here, run_script
from PIL import Image, ImageDraw
from square_font import make_font
from test_word_rules import NEW

from groundwork.files import read_json

COLOURS = {"红色": "#c22", "绿色": "#2a2", "蓝色": "#22c", "黄色": "#cc2"}
SHAPES = {"圆形": ImageDraw.ImageDraw.ellipse, "方块": ImageDraw.ImageDraw.rectangle}
FORMS = ["一个{c}{s}。", "图片里有一个{c}的{s}。", "这个{s}是{c}的。", "一个{s}，{c}。"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A table of captions without blanks, four an image, of 60, 12 and 8 pictures."""
    folder, rng = tmp_path_factory.mktemp("chinese"), random.Random(0)
    rows = ["image\tcaption\tsplit"]
    things = list(product(COLOURS, SHAPES))
    for split, count in {"train": 60, "val": 12, "test": 8}.items():
        for i in range(count):
            colour, shape = things[i % len(things)]
            picture, (x, y) = Image.new("RGB", (96, 96), "#ddd"), rng.choices(range(10, 50), k=2)
            draw = SHAPES[shape]
            draw(ImageDraw.Draw(picture), [x, y, x + 34, y + 34], fill=COLOURS[colour])
            name = f"{split}_{i}.png"
            picture.save(folder / name)
            rows += [f"{name}\t{form.format(c=colour, s=shape)}\t{split}" for form in FORMS]
    (folder / "captions.tsv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["characters", pytest.param("unicode", marks=NEW)])
def test_chinese_is_learned_scored_drawn_and_reported(rule, drawn, page, tmp_path):
    data = ["--data_folder", tmp_path]
    for command in [
        ["create_input_files.py", "--dataset", "zh", "--captions", drawn / "captions.tsv",
         "--image_folder", drawn, "--output_folder", tmp_path, "--image_size", 96,
         "--words", rule, "--min_word_freq", 0],
        ["train.py", *data, *LEARN, "--batch_size", 50, "--stage", "decoder", "--epochs", 12],
    ]:  # fmt: skip
        process = run_here(*command)
        assert process.returncode == 0, process.stderr
    scored = run_here(
        "eval.py", *data, "--beam_size", 3, "--device", "cpu", "--attention_report", 2,
        "--report", tmp_path / "report",
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    heads, _, figures = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in scored.stdout.splitlines()
        if line.startswith("|")
    ][:3]
    assert float(figures[heads.index("BLEU-4")]) > 50
    assert f"nltk corpus_bleu on {'lower-cased characters' if rule == 'characters' else ''}" in (
        scored.stdout
    )
    [results] = tmp_path.glob("results_test_beam3_*.json")
    captions = [entry["caption"] for entry in read_json(results)]
    assert not any(" " in text for text in captions)
    references = read_json(next(tmp_path.glob("TEST_REFERENCES_*.json")))
    right = [
        any(text == human.replace("。", "").replace("，", "") for human in reference["captions"])
        for text, reference in zip(captions, references, strict=True)
    ]
    assert np.mean(right) >= 0.5
    make_font(tmp_path / "fonts" / "square.ttf", "".join([*FORMS, *COLOURS, *SHAPES]))
    shown = run_script(
        "caption.py", "--img", drawn / "test_0.png", "--model", tmp_path, "--device", "cpu",
        "--output_folder", tmp_path / "pictures", "--must_include", "图片", "--json",
        env={"XDG_DATA_HOME": str(tmp_path)},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    [found] = json.loads(shown.stdout)
    assert "图片" in found["caption"] == "".join(found["words"])
    [picture] = (tmp_path / "pictures").iterdir()
    assert "no installed font" not in shown.stderr and Image.open(picture).width > 400
    page.goto((tmp_path / "report" / "index.html").as_uri())
    page.locator("attention-view .word").first.wait_for()
    rows = page.locator("#captions td.text").all_inner_texts()
    assert sorted(rows) == sorted(captions)
    page.locator("#search").fill("蓝色")
    assert 0 < page.locator("#captions tr.row").count() < len(captions)
