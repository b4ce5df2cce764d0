"""The web demo as a visitor meets it: photographs uploaded in a browser."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, failure, least_contrast, run_here, run_script

import app
import checkpoints

TIMEOUT = 120  # seconds, after which a demo that has not started is a failure


@pytest.fixture(scope="module")
def models(checkpoint, trained):
    """Paths of two checkpoints of the run, as `--model` takes them."""
    output, base, _ = trained
    return [str(checkpoint), str(checkpoints.checkpoint_path(output, base))]


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    """A demo of both models, one of them named twice, from its start as a user sees it: the line
    that it prints, and the file of what it complains of."""
    folder = tmp_path_factory.mktemp("app")
    again = os.path.relpath(models[0])
    with open(folder / "stderr", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--model", *models, again, "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"GRADIO_TEMP_DIR": str(folder)},
        )
    try:
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), line
        yield line, folder / "stderr"
    finally:
        process.terminate()
        process.wait(TIMEOUT)


@pytest.fixture(scope="module")
def address(served):
    line, _ = served
    return line.split()[1]


@pytest.fixture
def photograph(scenes):
    return sorted((scenes / "images").iterdir())[0]


@pytest.fixture
def demo(address, page):
    """The page, which asks for nothing from elsewhere."""
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.locator("input[type=file]").wait_for(state="attached")
    yield page
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def upload(page, path):
    page.locator("input[type=file]").set_input_files(path)
    page.locator("attention-view .word").first.wait_for()


def captions_of(view):
    """(text, log p) of the captions that a view has to choose from."""
    lines = view.locator(".captions li").all_inner_texts()
    return [(text, float(p.replace("−", "-"))) for text, _, p in (x.rpartition(" ") for x in lines)]


@pytest.mark.slow
def test_an_uploaded_photograph_gets_the_captions_of_all_models(
    demo, models, photograph, tmp_path, checkpoint
):
    upload(demo, photograph)
    views = demo.locator("attention-view")
    assert views.count() == 2
    assert demo.locator(".models h3").all_inner_texts() == [
        os.path.basename(path).removesuffix(".pth.tar") for path in models
    ]
    left, right = (views.nth(i).bounding_box() for i in range(2))
    assert left["y"] == pytest.approx(right["y"], abs=30) and right["x"] > left["x"] + 300
    for i, model in enumerate(models):
        process = run_here(
            "caption.py", "--img", photograph, "--model", model, "--json", "--device", "cpu",
            "--output_folder", tmp_path,
        )  # fmt: skip
        [expected] = json.loads(process.stdout)
        words = views.nth(i).locator(".word").all_inner_texts()
        assert " ".join(words) == expected["caption"]
        captions = captions_of(views.nth(i))
        assert len(captions) == 5
        assert captions[0] == (expected["caption"], pytest.approx(expected["log_prob"], abs=0.006))
        assert captions == sorted(captions, key=lambda caption: -caption[1])


@pytest.mark.slow
def test_stepping_through_the_words_shows_where_the_model_looked(demo, photograph):
    upload(demo, photograph)
    view = demo.locator("attention-view").first
    words = view.locator(".word").all_inner_texts()
    pictures = set()
    for t, word in enumerate(words):
        view.locator(".steps button").nth(1).click()
        assert view.locator(".word.shown").all_inner_texts() == [word]
        assert view.locator(".steps span").inner_text() == f"word {t + 1} of {len(words)}: {word}"
        pictures.add(view.locator(".photo canvas").evaluate("canvas => canvas.toDataURL()"))
    assert len(pictures) == len(words) > 3


@pytest.mark.slow
def test_beam_temperature_and_models_are_obeyed(demo, photograph):
    upload(demo, photograph)
    demo.get_by_role("checkbox").nth(1).uncheck()
    views = demo.locator("attention-view")
    demo.wait_for_function("document.querySelectorAll('attention-view').length === 1")
    demo.get_by_label("number input for beam size").fill("2")
    demo.get_by_role("button", name="caption", exact=True).click()
    two = views.first.locator(".captions li")
    two.nth(2).wait_for(state="detached")
    assert two.count() == 2
    found = set()
    demo.get_by_label("number input for temperature").fill("2")
    shown = "document.querySelector('attention-view')?.shadowRoot.querySelector('.view')"
    for _ in range(3):
        demo.evaluate(f"Object.assign({shown}, {{old: true}})")
        demo.get_by_role("button", name="caption", exact=True).click()
        demo.wait_for_function(f"{shown} && !{shown}.old")
        found |= {text for text, _ in captions_of(views.first)}
    assert len(found) > 3  # drawn at random: the model knows its data by heart


def count(page, expected):
    """Waits until the first model has so many captions to choose from."""
    items = "document.querySelector('attention-view').shadowRoot.querySelectorAll('.captions li')"
    page.wait_for_function(f"{items}.length === {expected}")


@pytest.mark.slow
def test_a_slider_is_obeyed_by_its_keys_and_its_field(demo, photograph, served):
    upload(demo, photograph)
    field = demo.get_by_label("number input for beam size")
    demo.get_by_label("range slider for beam size").focus()
    for left in (4, 3):
        demo.keyboard.press("ArrowLeft")
        count(demo, left)
    field.fill("99")
    message = demo.locator(".toast-body")
    message.wait_for()
    assert "beam size 99 is not from 1 to 20" in message.inner_text()
    field.blur()
    count(demo, 20)
    field.fill("")
    count(demo, 0)  # the minimum, a single caption, as the line below the field says
    assert "an empty field is 1" in demo.locator(".gradio-container").inner_text()
    field.blur()
    assert field.input_value() == "1"
    log_p = demo.locator("attention-view .caption .p").first.inner_text()
    assert re.fullmatch(r"log p (−\d+|0)\.\d\d", log_p)
    _, complaints = served
    assert "Traceback" not in complaints.read_text()


FADED_IN = """() => {
  for (let at = document.querySelector(".models"); at; at = at.parentElement) {
    if (getComputedStyle(at).opacity !== "1") return false;
  }
  return true;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_light_and_dark(demo, photograph, scheme):
    demo.emulate_media(color_scheme=scheme)
    demo.reload()
    upload(demo, photograph)
    demo.wait_for_function(FADED_IN)  # Gradio fades in what it shows anew
    assert least_contrast(demo, "attention-view, .models h3, label span") > 4.5
    background = demo.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128
    assert dark == (scheme == "dark")
    assert (
        "Full colour: the caption's strongest attention"
        in demo.locator(".legend").first.inner_text()
    )


def test_what_is_no_image_is_said_to_be_none(demo, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    demo.locator("input[type=file]").set_input_files(tmp_path / "text.jpg")
    message = demo.locator(".toast-body")
    message.wait_for()
    assert "cannot read image text.jpg" in message.inner_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "missing.pth.tar"], ["missing.pth.tar"]),
        (["--port", "70000"], ["--port", "70000"]),
        (["--host", "192.0.2.1"], ["--host 192.0.2.1"]),  # of no machine, RFC 5737
        (["--model", __file__], ["test_app.py", "no checkpoint"]),
    ],
)
def test_bad_arguments_are_one_line(arguments, words):
    line = failure(run_here("app.py", *arguments))
    assert all(word in line for word in words), line


def test_a_port_that_is_taken_is_one_line(checkpoint, address):
    port = address.rstrip("/").rpartition(":")[2]
    line = failure(run_here("app.py", "--model", checkpoint, "--port", port, "--device", "cpu"))
    assert "--port" in line and port in line


def test_without_gradio_the_way_out_is_named(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('not installed')")
    line = failure(run_script("app.py", env={"PYTHONPATH": str(tmp_path)}))
    assert "requirements-dev.txt" in line


def test_models_are_named_by_the_shortest_ends_that_tell_them_apart():
    paths = ["/a/long/way/first/BEST.pth.tar", "/a/long/way/second/BEST.pth.tar"]
    assert app.names(paths) == ["first/BEST", "second/BEST"]
    assert app.names(paths[:1]) == ["BEST"]
    assert app.names([*paths, "/elsewhere/other.pth.tar"]) == ["first/BEST", "second/BEST", "other"]
    assert app.names([*paths, "/b/first/BEST.pth.tar"]) == [
        "way/first/BEST", "second/BEST", "b/first/BEST"
    ]  # fmt: skip
    assert app.names(["/x/run", "/a/x/run", "/run"]) == ["/x/run", "a/x/run", "/run"]
    assert app.names(["/a/x", "/a/x.pth.tar"]) == ["x", "x.pth.tar"]


def test_a_model_named_twice_is_shown_once(served, models, tmp_path, capsys):
    _, complaints = served
    line = f"--model {os.path.relpath(models[0])} is the same file as {models[0]}: it is shown once"
    assert line in complaints.read_text().splitlines()
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("")
    other.write_text("")
    (tmp_path / "link").symlink_to(one)
    assert app.distinct([one, other, tmp_path / "link", one]) == [one, other]
    assert len(capsys.readouterr().err.splitlines()) == 2
