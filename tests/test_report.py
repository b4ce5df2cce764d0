"""The report as a reader meets it: opened from disk in a browser that has no network."""

import base64
import io
import json
import re

import numpy as np
import pytest
from conftest import attention_in_pixels, failure, least_contrast, needs_java, run_here
from PIL import Image

import evaluation
import input_files
import report
import utils
import word_rules
from captioner import Caption
from datasets import CaptionDataset
from groundwork import files

PAGE = '<!DOCTYPE html><body style="width: {width}px"><script>{viewer}</script>{views}</body>'


@pytest.fixture(scope="module")
def written(checkpoint, tiny_data, tmp_path_factory):
    """A report of the model that knows its data by heart: its page and what was printed."""
    folder = tmp_path_factory.mktemp("report")
    process = run_here(
        "eval.py", "--checkpoint", checkpoint, "--data_folder", tiny_data[0], "--beam_size", 3, 1,
        "--results_folder", folder / "results", "--report", folder / "page", "--device", "cpu",
        "--attention_report", 2,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert [path.name for path in (folder / "page").iterdir()] == ["index.html"]
    return folder, process.stdout


@pytest.fixture
def opened(written, page):
    """The page in a browser without network, which asks for nothing but the page."""
    folder, printed = written
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.context.set_offline(True)
    page.goto((folder / "page" / "index.html").as_uri())
    page.locator("attention-view .word").first.wait_for()
    assert [url for url in asked if not url.startswith("data:")] == [page.url]
    return page, printed


def contents(page):
    return json.loads(page.locator("#contents").text_content())


def rows(page):
    """Texts of the rows of the captions' table, below their heads."""
    heads = page.locator("#captions th").all_inner_texts()
    heads = [re.sub(" [▲▼]$", "", head.strip()) for head in heads]
    return [
        dict(zip(heads, row.locator("td").all_inner_texts(), strict=True))
        for row in page.locator("#captions tr.row").all()
    ]


def test_the_page_has_the_figures_that_are_printed(opened):
    page, printed = opened
    printed_rows = [
        [cell.strip() for cell in line[1:-1].split("|")]
        for line in printed.splitlines()
        if line.startswith("|") and not line.startswith("|-")
    ]
    shown = [
        row.locator("th, td").all_inner_texts() for row in page.locator("table.figures tr").all()
    ]
    assert len(shown) > 3
    assert shown == printed_rows
    assert {row[0] for row in shown[1:]} >= {"beam 1", "beam 3"}
    assert page.locator("h2:text('Scores') ~ .note", has_text="they are not the means").count() == 1
    about = " ".join(page.locator(".about").all_inner_texts())
    assert all(part in about for part in ("stage ", "seed 0", "length penalty 0"))


@needs_java
def test_its_captions_are_the_widest_beams(opened):
    page, printed = opened
    assert page.locator("h1").inner_text().endswith("8 captions, beam 3")
    _, coco, *_ = [line for line in printed.splitlines() if line.startswith("| beam 3")]
    cider = float(coco.split("|")[-2])
    scores = [example["scores"]["CIDEr-D"] for example in contents(page)["examples"]]
    assert np.mean(scores) == pytest.approx(cider, abs=0.06)  # both are rounded


def test_its_pictures_are_there(opened):
    page, _ = opened
    for name in ("curves", "deletion", "lengths"):
        assert page.locator(f"#{name}").evaluate("image => image.naturalWidth") > 300
    load = "async all => { await Promise.all(all.map(i => i.decode()));"
    load += " return all.map(i => i.naturalWidth) }"
    widths = page.locator("#captions img").evaluate_all(load)
    assert widths == [96] * 8  # the images are 96 × 96, and thumbnails are never larger


def test_the_table_is_sorted_by_what_is_clicked(opened):
    page, _ = opened
    examples = contents(page)["examples"]
    for name, key in [
        ("smoothed BLEU-4", lambda e: e["scores"]["smoothed BLEU-4"]),
        ("log p", lambda e: e["beams"][0][1]),
        ("caption", lambda e: e["caption"]),
        ("words", lambda e: len(e["caption"].split())),
    ]:
        values = sorted(map(key, examples))
        directions = []
        for _ in range(2):
            page.locator("#captions th button", has_text=name).click()
            captions = [row["caption"] for row in rows(page)]
            by_caption = {e["caption"]: key(e) for e in examples}
            assert len(captions) == 8
            found = [by_caption[caption] for caption in captions]
            directions.append([found == values, found == values[::-1]])
            sort = page.locator("th[aria-sort]")
            assert sort.count() == 1 and name in sort.inner_text()
        assert np.any(directions, axis=0).all(), (name, directions)


def test_searching_leaves_the_rows_that_have_all_words(opened):
    page, _ = opened
    examples = contents(page)["examples"]
    word = examples[2]["caption"].split()[1]
    page.locator("#search").fill(f"{word.upper()} {examples[2]['file']}")
    assert [row["caption"] for row in rows(page)] == [examples[2]["caption"]]
    page.locator("#search").fill("nowhere to be found")
    assert rows(page) == []
    assert "0 of 8" in page.locator("#count").inner_text()


def test_opened_rows_stay_open(opened):
    """As they are, whatever is sorted and searched."""
    page, _ = opened
    file = contents(page)["examples"][5]["file"]
    for i in (1, 4):
        page.locator("#captions tr.row").nth(i).click()
    open_rows = page.locator("#captions tr.open")
    open_rows.nth(1).locator(".word").nth(2).click()

    def above():
        texts = open_rows.evaluate_all("all => all.map(e => e.previousSibling.innerText)")
        return sorted(text.split("\t")[1] for text in texts)

    before = above()
    assert len(before) == 2
    page.locator("#captions th button", has_text="caption").click()
    assert above() == before
    page.locator("#search").fill(file)
    assert set(above()) <= {"5"}
    page.locator("#search").fill("")
    assert above() == before
    assert open_rows.locator(".word.pinned").count() == 1
    page.locator("#captions tr.row", has=page.locator(f"td:text-is('{before[0]}')")).click()
    assert above() == before[1:]
    page.locator("#captions th button", has_text="words").click()
    assert above() == before[1:]


def test_images_are_counted_as_files_and_results_are(opened, tiny_data):
    page, _ = opened
    page.locator("#captions th button", has_text="#").click()
    references = files.read_json(input_files.input_path(*tiny_data, "REFERENCES", "TEST"))
    assert [row["#"] for row in rows(page)] == [str(i) for i in range(len(references))]
    page.locator("#captions tr.row").nth(3).click()
    names = page.locator("#captions tr.open h4").all_inner_texts()
    assert names[-1] == f"3: {references[3]['filename']}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(opened, scheme):
    page, _ = opened
    page.emulate_media(color_scheme=scheme)
    page.locator("#captions tr.row").first.click()
    page.locator("attention-view .word").first.hover()
    page.locator("#captions tr.open .word").first.wait_for()
    assert least_contrast(page, "body") > 4.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 22)"}[scheme]
    # curves and lengths: letters in the page's colour on its ground
    for name in ("curves", "lengths"):
        shot = page.locator(f"#{name}").screenshot()
        pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("L")).astype(int)
        ground = np.bincount(pixels.ravel()).argmax()
        assert abs(ground - {"light": 255, "dark": 22}[scheme]) < 3
        assert abs(pixels - ground).max() > 180


def test_a_row_opens_on_beams_people_and_attention(opened):
    page, _ = opened
    example = contents(page)["examples"][0]
    assert len(example["beams"]) == 3
    assert example["beams"][0][0] == example["caption"]
    assert example["beams"] == sorted(example["beams"], key=lambda beam: -beam[1])
    page.locator("#search").fill(example["file"])
    page.locator("#captions tr.row").click()
    details = page.locator("#captions tr.open")
    assert details.locator("figcaption").all_inner_texts() == example["caption"].split()
    beams = details.locator("ol li").all_inner_texts()
    assert beams == [f"{t} {p:.2f}".replace("-", "−") for t, p in example["beams"]]
    assert details.locator("ul li").count() == len(example["human"])
    page.locator("#captions tr.row").click()
    assert details.count() == 0


def test_best_and_worst_are_by_score(opened):
    page, _ = opened
    rank, examples = (contents(page)[key] for key in ("rank", "examples"))
    scores = [example["scores"][rank] for example in examples]
    best, worst, chance = page.locator(".examples").all()
    for group, expected in ((best, sorted(scores)[-3:]), (worst, sorted(scores)[:3])):
        indices = map(int, group.get_attribute("data-indices").split())
        assert sorted(scores[i] for i in indices) == expected
    assert len(set(chance.get_attribute("data-indices").split())) == 3


def test_words_are_shown_on_the_photograph_by_mouse_and_keys(opened):
    page, _ = opened
    view = page.locator("attention-view").first
    words = view.locator(".word")

    def state():
        picture = view.locator(".photo canvas").evaluate("canvas => canvas.toDataURL()")
        return view.locator(".word.shown").all_inner_texts(), picture

    _, plain = state()
    words.nth(1).hover()
    assert state()[0] == [words.nth(1).inner_text()] and state()[1] != plain
    page.mouse.move(0, 0)
    assert state() == ([], plain)
    view.locator(".view").focus()
    count = words.count()
    for key, expected in [("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0),
                          ("ArrowLeft", count - 1)]:  # fmt: skip
        page.keyboard.press(key)
        assert state()[0] == [words.nth(expected).inner_text()]
    assert f"word {count} of {count}" in view.locator(".steps").inner_text()
    page.keyboard.press("Escape")
    assert state() == ([], plain)
    view.locator("figure").nth(2).click()
    page.mouse.move(0, 0)
    assert state()[0] == [words.nth(2).inner_text()]  # a click keeps it


def image_of(view):
    return Image.open(io.BytesIO(base64.b64decode(view["image"].partition(",")[2])))


def open_views(page, tmp_path, *views, width=1100):
    """<attention-view>s on a page of their own."""
    elements = [page_element(view) for view in views]
    text = PAGE.format(width=width, viewer=report.VIEWER.read_text(), views="".join(elements))
    (tmp_path / "views.html").write_text(text)
    page.goto((tmp_path / "views.html").as_uri())
    page.locator("attention-view .word").first.wait_for()


def page_element(view):
    return f"<attention-view data='{json.dumps(view)}'></attention-view>"


def noise(seed, size, mean):
    """A smooth picture of any brightness, which JPEG keeps nearly."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), float)
    return Image.fromarray((pixels * mean / pixels.mean()).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("size", "mean"), [((220, 220), 140), ((220, 130), 30), ((90, 220), 90)])
def test_panels_show_where_the_attention_is(page, tmp_path, size, mean):
    """The formula of caption.py's pictures, pixel by pixel, away from the line at half and from the
    ring; that of weak words, too."""
    rng = np.random.default_rng(0)
    alphas = np.stack([*rng.dirichlet(np.full(36, 0.3), size=2), np.eye(36)[15]])
    alphas = np.stack([*alphas, 0.999 / 36 + 0.001 * alphas[2], np.full(36, 1 / 36)])
    words = ["a", "dog", "sharp", "nearly", "even"]
    view = report.attention_view(noise(1, size, mean), [Caption(words, -1.0, alphas)], 220)
    open_views(page, tmp_path, view)
    photo = np.asarray(image_of(view), float) / 255
    photo = photo ** np.clip(np.log(0.4) / np.log(photo.mean()), 0.45, 1)
    dim = 0.4 * photo @ np.array([[0.299], [0.587], [0.114]])
    width, height = size
    ys, xs = np.indices((height, width)) + 0.5
    times, light = attention_in_pixels(alphas, (height, width))
    for t, canvas in enumerate(page.locator("figure canvas").all()):
        url = canvas.evaluate("canvas => canvas.toDataURL()")
        drawn = np.asarray(image_of({"image": url}).convert("RGB"), float) / 255
        assert drawn.shape == (height, width, 3)
        expected = dim + light[t][..., None] * (photo - dim)
        away = abs(times[t] / times[t].max() - 0.5) > 0.12
        amber = abs(drawn * 255 - [255, 184, 28]).max(axis=2) < 3
        assert amber.any() == (t < 3) and not (amber & away).any()
        if t < 4:
            row, column = divmod(int(alphas[t].argmax()), 6)
            x, y = (column + 0.5) / 6 * width, (row + 0.5) / 6 * height
            distance = np.hypot(xs - x, ys - y)
            for radius, level in ((6, 1), (4, 0), (8, 0)):  # white in black
                assert abs(drawn[abs(distance - radius) < 0.3] - level).max() < 0.5
            away &= distance > 10
        assert 0.5 < away.mean() <= 1
        assert abs(drawn - expected)[away].max() < 0.03


def test_even_attention_leaves_the_photograph_as_it_is(page, tmp_path):
    view = report.attention_view(
        noise(2, (220, 220), 150), [Caption(["a"], 0.0, np.ones((1, 9)))], 220
    )
    open_views(page, tmp_path, view)
    url = page.locator("figure canvas").evaluate("canvas => canvas.toDataURL()")
    drawn, photo = image_of({"image": url}).convert("RGB"), image_of(view)
    assert abs(np.asarray(drawn, float) - np.asarray(photo, float)).max() <= 2


@pytest.mark.parametrize("width", [1100, 380])
@pytest.mark.parametrize("count", [1, 12, 40])
def test_captions_of_any_length_are_legible(page, tmp_path, count, width):
    words = ["internationalisation" if t % 7 == 3 else "word" * (t % 3 + 1) for t in range(count)]
    rng = np.random.default_rng(0)
    captions = [Caption(words, -12.3, rng.dirichlet(np.ones(9), size=count))] * 2
    open_views(page, tmp_path, report.attention_view(noise(3, (300, 200), 120), captions, 256),
               width=width)  # fmt: skip
    outside = "all => all.map(e => { const b = e.getBoundingClientRect();"
    outside += " return [b.left, b.top, b.right, b.bottom] })"
    for parts in (".word", "figure", ".photo, .side"):
        boxes = page.locator(parts).evaluate_all(outside)
        assert len(boxes) == (2 if parts == ".photo, .side" else count)
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 and right <= width + 10, parts
            for other in boxes[:i]:
                assert (
                    right <= other[0] + 1 or other[2] <= left + 1
                    or bottom <= other[1] + 1 or other[3] <= top + 1
                ), parts  # fmt: skip
    assert page.locator(".captions li").count() == 2


@pytest.mark.parametrize("size", [(2000, 40), (30, 2500)])
def test_long_pictures_leave_room_for_the_words(page, tmp_path, size):
    captions = [Caption(["a", "dog"], -1.0, np.ones((2, 9)))]
    open_views(page, tmp_path, report.attention_view(Image.new("RGB", size), captions, 640))
    assert page.locator("attention-view").bounding_box()["height"] < 700
    for canvas in page.locator("canvas").all():
        box = canvas.bounding_box()
        assert box["width"] <= 300 and box["height"] <= 480
        drawn = canvas.evaluate("canvas => canvas.width / canvas.height")
        assert box["width"] / box["height"] == pytest.approx(drawn, rel=0.1)


def test_on_a_narrow_screen_nothing_is_cut_off(opened):
    page, _ = opened
    page.set_viewport_size({"width": 420, "height": 900})
    page.locator("#captions tr.row").first.click()
    details = page.locator("#captions tr.open")
    details.locator(".word").first.wait_for()
    for part in (page.locator("#captions"), details, details.locator("attention-view")):
        box = part.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 420
    heads = page.locator("#captions th:visible").all_inner_texts()
    assert len(heads) == 4 and heads[3].endswith(" ▼")  # of the figures the one that sorts


def test_one_of_several_captions_is_chosen_by_a_click(page, tmp_path):
    rng = np.random.default_rng(0)
    captions = [
        Caption(["a", "dog"], -1.5, rng.random((2, 9))),
        Caption(["cats"], -2.25, rng.random((1, 9))),
    ]
    open_views(page, tmp_path, report.attention_view(noise(3, (300, 200), 120), captions, 256))
    assert page.locator(".captions li").all_inner_texts() == ["a dog −1.50", "cats −2.25"]
    assert page.locator(".captions .chosen").inner_text() == "a dog −1.50"
    assert page.locator(".caption .p").inner_text() == "log p −1.50"
    page.locator(".captions button").nth(1).click()
    assert page.locator("figcaption").all_inner_texts() == ["cats"]
    assert page.locator(".captions .chosen").inner_text() == "cats −2.25"
    assert page.locator(".caption .p").inner_text() == "log p −2.25"


def test_a_legend_says_what_the_panels_show(page, tmp_path):
    image = noise(3, (300, 200), 120)
    looked = Caption(["a", "dog"], -1.5, np.ones((2, 9)))
    open_views(page, tmp_path, report.attention_view(image, [looked], 256))
    legend, strip = page.locator(".legend"), page.locator(".strip").bounding_box()
    assert all(
        word in legend.inner_text() for word in ("Full colour", "gray", "Line", "half", "Ring")
    )
    box = legend.bounding_box()
    assert 0 <= strip["y"] - box["y"] - box["height"] < 20
    blind = Caption(["a", "dog"], -1.5, None)
    open_views(page, tmp_path, report.attention_view(image, [blind], 256))
    page.locator(".word").first.hover()
    assert legend.count() == 0 and page.locator(".numbers").inner_text() == ""
    assert page.locator(".caption .p").inner_text() == "log p −1.50"


@pytest.mark.parametrize("width", [1100, 380])
def test_numbers_under_the_photograph_say_how_spread_the_attention_is(page, tmp_path, width):
    """And nothing moves away from under the mouse as they come and go."""
    alphas = np.zeros((3, 16))
    alphas[0], alphas[1, 5], alphas[2, :4] = 1 / 16, 1, 1 / 4
    captions = [Caption(["a", "big", "dog"], -1.0, alphas)]
    open_views(page, tmp_path, report.attention_view(noise(3, (300, 200), 120), captions, 256),
               width=width)  # fmt: skip
    numbers, strip = page.locator(".numbers"), page.locator(".strip")
    before = strip.bounding_box()
    assert numbers.inner_text() == ""
    for t, (spread, most) in enumerate([("100%", "6.3%"), ("6.3%", "100%"), ("25%", "25%")]):
        page.locator(".word").nth(t).hover()
        expected = f"Attention: spread over {spread} of the image, {most} at its strongest place"
        assert numbers.inner_text() == expected
        assert strip.bounding_box() == before


@pytest.mark.parametrize("width", [1100, 380])
def test_panels_say_how_much_a_word_does_not_look(page, tmp_path, width):
    alphas = np.full((3, 16), 1 / 16) * np.array([[0.37], [1], [0]])
    captions = [Caption(["of", "the", "dog"], -1.0, alphas)]
    view = report.attention_view(noise(3, (300, 200), 120), captions, 256)
    assert view["captions"][0]["away"] == [0.63, 0, 1]
    open_views(page, tmp_path, view, width=width)
    notes = page.locator("figure .away")
    assert notes.all_inner_texts() == [f"does not look: {p}" for p in ("63%", "0.0%", "100%")]
    assert notes.evaluate_all("all => all.every((e) => e.scrollWidth <= e.clientWidth)")
    assert "Does not look" in page.locator(".legend").inner_text()
    before = page.locator(".strip").bounding_box()
    page.locator(".word").first.hover()
    assert page.locator(".numbers").inner_text() == (
        "Attention: 63% at no place, the rest spread over 100% of the image, 6.3% of it at its "
        "strongest place"
    )
    assert page.locator(".strip").bounding_box() == before

    always = [Caption(["of", "the", "dog"], -1.0, np.full((3, 16), 1 / 16))]
    open_views(page, tmp_path, report.attention_view(noise(3, (300, 200), 120), always, 256))
    assert page.locator(".away").count() == 0
    assert "Does not look" not in page.locator(".legend").inner_text()


def write_by_hand(tiny_data, folder, texts, references=None):
    """A report of given captions on the tiny data, without a model."""
    data = CaptionDataset(*tiny_data, "TEST")
    data.path = input_files.input_path(*tiny_data, "IMAGES", "TEST")  # as `EvaluationData` has it
    for reference, captions in zip(data.references, references or [], strict=False):
        reference["captions"] = captions
    rng = np.random.default_rng(0)
    captions = [
        Caption(text.split(), -1.0, rng.dirichlet(np.ones(9), len(text.split()))) for text in texts
    ]
    scores = evaluation.score({"beam 1": texts}, [r["captions"] for r in data.references])

    word_map = json.loads(input_files.input_path(*tiny_data, "WORDMAP").read_text())
    beams, path = [[caption] for caption in captions], report.page_path(folder)
    report.write(path, word_map, data, {1: captions}, beams, ["by hand"], scores, {})
    return path


def test_text_in_the_data_is_shown_and_not_run(tiny_data, tmp_path, page, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java: the ranking has to do without CIDEr-D
    nasty = "</script><script>document.title = 'taken'</script><img src=x onerror='alert(1)'> &amp;"
    path = write_by_hand(tiny_data, tmp_path / "page", ["a <b>dog</b> 'barks' &lt;"] * 8, [[nasty]])
    page.goto(path.as_uri())
    page.locator("attention-view .word").first.wait_for()
    assert "taken" not in page.title()
    page.locator("#search").fill("document.title")
    page.locator("#captions tr.row").click()
    assert page.locator("#captions tr.open ul li").inner_text() == nasty
    assert page.locator("#captions tr.open figcaption").all_inner_texts()[1] == "<b>dog</b>"
    assert page.locator("#captions td.text").inner_text() == "a <b>dog</b> 'barks' &lt;"
    note = page.locator(".note", has_text="Java")
    assert note.count() == 1 and page.locator("#captions th", has_text="CIDEr").count() == 0
    assert page.locator("[id^=curves]").count() == 0  # there is no log to draw
    said = page.locator("#captions tr.open .caption .p").inner_text()
    assert said == "log p −1.00"  # of a beam of 1, too


@pytest.mark.slow
def test_photographs_keep_their_proportions(tmp_path, page, monkeypatch):
    """As they stand upright; squares where the references do not tell, as older ones."""
    monkeypatch.setenv("PATH", "")
    sizes = [(120, 60), (50, 100), (64, 64), (90, 30)]
    turned = Image.Exif()
    turned[0x0112] = 6  # by a quarter
    for i, (width, height) in enumerate(sizes):
        exif = turned if i == 3 else None
        Image.effect_noise((width, height), 90).save(tmp_path / f"{i}.png", exif=exif)
    words = [{"tokens": ["a", "dog"], "raw": "A dog ."}]
    entries = [
        {"filename": f"{i}.png", "split": split, "sentences": words}
        for split in ("train", "val", "test")
        for i in range(len(sizes))
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": entries}))
    summary = utils.create_input_files(
        *("demo", tmp_path / "karpathy.json", tmp_path),
        min_word_freq=0, output_folder=tmp_path / "data", image_size=128, workers=1,
    )  # fmt: skip
    data = tmp_path / "data", summary["base"]
    upright = [(128, 64), (64, 128), (128, 128), (round(128 / 3), 128)]
    path = input_files.input_path(*data, "REFERENCES", "TEST")
    for known in (True, False):
        page.goto(write_by_hand(data, tmp_path / "page", ["a dog"] * 4).as_uri())
        page.locator("#captions th button", has_text="#").click()
        load = "async all => { await Promise.all(all.map(i => i.decode()));"
        load += " return all.map(i => [i.naturalWidth, i.naturalHeight]) }"
        found = page.locator("#captions img").evaluate_all(load)
        assert list(map(tuple, found)) == (upright if known else [(128, 128)] * 4)
        for i, (width, height) in enumerate(found):
            box = page.locator("#captions img").nth(i).bounding_box()
            assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.03)
            page.locator("#captions tr.row").nth(i).click()
            canvases = page.locator("#captions tr.open canvas")
            assert canvases.nth(2).evaluate("c => c.width / c.height") == pytest.approx(
                width / height, rel=0.03
            )
            page.locator("#captions tr.row").nth(i).click()
        kept = ("filename", "id", "captions")
        older = [{key: reference[key] for key in kept} for reference in files.read_json(path)]
        path.write_text(json.dumps(older))


@pytest.mark.slow
@needs_java
def test_the_page_says_which_scores_of_a_split_are_means(tiny_data, tmp_path, page):
    references = files.read_json(input_files.input_path(*tiny_data, "REFERENCES", "TEST"))
    texts = [
        r["captions"][0].split(",")[0].rstrip(" .")[: 12 + 7 * i] for i, r in enumerate(references)
    ]
    page.goto(write_by_hand(tiny_data, tmp_path, texts).as_uri())
    [line] = [text for text in page.locator(".note").all_inner_texts() if "means" in text]
    counted, means = line.split(": they are not the means")
    heads, row = page.locator("table.figures").nth(1).locator("tr").all()
    cells = zip(heads.locator("th").all(), row.locator("td").all(), strict=True)
    total = {head.inner_text(): cell.inner_text() for head, cell in cells}
    columns = contents(page)["columns"]
    for name in ("CIDEr-D", "ROUGE-L", "METEOR"):
        assert name in columns
        mean = np.mean([example["scores"][name] for example in contents(page)["examples"]])
        assert (abs(mean - float(total[name])) < 0.06) == (name in means) == (name not in counted)
    assert "BLEU" in counted


def test_language_of_captions_worked_by_hand(tiny_data, tmp_path, page, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java: the test takes a second instead of ten
    known = list(files.read_json(input_files.input_path(*tiny_data, "WORDMAP")))[:2]
    first, second = known
    train = files.read_json(input_files.input_path(*tiny_data, "REFERENCES", "TRAIN"))
    learned = train[0]["captions"][0]
    texts = [f"{first} {second}"] * 3 + [f"{second} zebra"] * 2 + [learned, first, second]
    path = write_by_hand(tiny_data, tmp_path, texts)
    page.goto(path.as_uri())
    lines = page.locator("table.words tr").all_inner_texts()
    said = {first, second, *word_rules.tokenize(learned)}
    vocabulary = len(files.read_json(input_files.input_path(*tiny_data, "WORDMAP"))) - 4
    assert f"{len(said)} of {vocabulary}" in lines[0]
    assert "100.0% of all their words" in lines[1]
    assert "62.5%" in lines[2]  # five of eight
    assert f"3 × “{first} {second}”; 2 × “{second} zebra”" in lines[2]
    assert "87.5%" in lines[3]  # all but one


@pytest.mark.slow
def test_what_cannot_be_written_is_named_and_costs_no_scores(
    checkpoint, tiny_data, tmp_path, monkeypatch
):
    """A folder that is a file, a page that is a folder, a picture that is one."""
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    picture = f"robustness_test_{checkpoint.name.removesuffix('.pth.tar')}.png"
    (tmp_path / "file").write_text("")
    (tmp_path / "page" / "index.html").mkdir(parents=True)
    (tmp_path / "results" / picture).mkdir(parents=True)
    run = ["eval.py", "--model", checkpoint, "--data_folder", tiny_data[0]]
    run += ["--output_folder", tmp_path / "results"]
    for options, path, reason in (
        (["--report", tmp_path / "file"], tmp_path / "file", "Not a directory|File exists"),
        (["--report", tmp_path / "page"], tmp_path / "page" / "index.html", "Is a directory"),
        (["--robustness", 2], tmp_path / "results" / picture, "Is a directory"),
    ):
        process = run_here(*run, *options)
        assert re.search(f"{re.escape(str(path))}.*({reason})", failure(process))
        assert "BLEU-4" in process.stdout


def test_a_damaged_log_is_named_before_captioning(checkpoint, tiny_data, tmp_path):
    copy = tmp_path / checkpoint.name
    copy.write_bytes(checkpoint.read_bytes())
    log = tmp_path / f"log_{tiny_data[1]}.jsonl"
    log.write_bytes(b"\xff\xfe no text")
    run = ["eval.py", "--checkpoint", copy, "--data_folder", tiny_data[0]]
    assert log.name in failure(run_here(*run, "--report", tmp_path / "page"))
    assert not list(tmp_path.glob("results*"))


def test_a_report_needs_a_model():
    process = run_here("eval.py", "--results", "x", "--references", "y", "--report", "z")
    assert "--report" in failure(process)
