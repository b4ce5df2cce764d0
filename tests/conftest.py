"""Small data sets and trained models that several test files share."""

import contextlib
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from playwright.sync_api import Error, sync_playwright

import checkpoints
import decoding
import demo
import utils
from encoders import Encoder
from groundwork import errors, provenance
from models import DecoderWithAttention, LSTMConfig

settings.register_profile("suite", deadline=None, derandomize=True)  # the same on any machine
settings.load_profile("suite")

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
ROOT = Path(__file__).parent.parent
OFFLINE = "timm:tf_efficientnet_lite2"
SMALL = [f"--{name}_dim=128" for name in ("attention", "embed", "decoder")]
LEARN = [*SMALL, "--encoded_image_size", 3, "--dropout", 0, "--decoder_lr", 4e-3, "--amp", "off"]
LEARN += ["--encoder", OFFLINE, "--batch_size", 10, "--device", "cpu"]


WORDS = {"<pad>": 0, "a": 1, "dog": 2, "<unk>": 3, "<start>": 4, "<end>": 5}


def tiny_checkpoint(**changes):
    """Has all keys of a checkpoint, but no models."""
    return {
        "encoder_name": "none",
        "encoder_stages": ("last",),
        "encoded_image_size": 3,
        "image_size": 64,
        "fit": "squeeze",
        "encoder": {"weight": torch.arange(6.0).view(2, 3)},
        "decoder_name": "lstm",
        "decoder_config": None,
        "decoder": {"weight": torch.ones(2, dtype=torch.bfloat16)},
        "base": "tiny",
        "options": {"data_folder": "data", "views": None},
        "stage": "decoder",
        "epoch": 2,
        "scores": {"bleu4": 0.5},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "schedule": {"best": 0.5},
        "random": [[torch.zeros(3, dtype=torch.uint8), None]],
        "best_bleu4": -1.0,
        "epochs_without_improvement": 0,
        "step": 3,
        "partial": {"count": 2, "sums": {"loss": 1.0, "top5": 0.5}},
        "seconds": 1.5,
        "order": {"seed": 0},
        "log": [
            {"stage": "decoder", "epoch": 1, "lr": 0.1, "loss": 1.0, "val_loss": 1.0}
            | {f"bleu{n}": 0.5 for n in range(1, 5)}
        ],
        "records": [dict.fromkeys(provenance.KEYS, "x") | {"seconds": 1.5}],
        "word_map": WORDS,
        "best_record": None,
    } | changes


def small_checkpoint():
    """A checkpoint of a model, and of a run that can be continued."""
    torch.manual_seed(0)
    encoder = Encoder("squeezenet1_1", 3, weights=None)
    decoder = DecoderWithAttention(
        LSTMConfig(len(WORDS), encoder.dim, 4, 4, 4, encoded_image_size=3)
    )
    return tiny_checkpoint(
        encoder_name="squeezenet1_1", encoder=encoder.state_dict(), decoder=decoder.state_dict()
    )


def run_here(script, *arguments):
    """What `run_script` gives, from calling the script's main() in this process: no start-up."""
    out, err = io.StringIO(), io.StringIO()
    module = importlib.import_module(script.removesuffix(".py"))
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            errors.run(module.main)
        except SystemExit as exit_:  # of a text Python prints it and exits with status 1
            code = exit_.code if isinstance(exit_.code, int) else 1
            err.write(exit_.code if isinstance(exit_.code, str) else "")
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def run_script(*arguments, cwd=None, env=None):
    """Runs `python SCRIPT …` as a user would; the completed process, its output as text."""
    script, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def close(actual, expected, tolerance=1e-5):
    """Asserts that a tensor is near another, in the other's dtype."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


def attention_in_pixels(alphas, shape):
    """What the pictures of attention show at each pixel of panels of `shape`, by their formula.

    Args:
        alphas: (T, L) array, rows that sum to one.

    Returns:
        how many times as strong as if it were even the attention is, and how far the panel is as
        photographed, 0 to 1; both (T, height, width).
    """
    size = round(alphas.shape[1] ** 0.5)
    near = []
    for length in shape:
        places = (np.arange(length) + 0.5) * size / length - 0.5
        distances = places[:, None] - np.arange(size)
        weights = np.exp(-0.5 * (distances / 0.65) ** 2)
        near.append(weights / weights.sum(axis=1, keepdims=True))
    times = size**2 * np.einsum("yi,xj,tij->tyx", *near, alphas.reshape(-1, size, size))
    return times, np.log(1 + times) / np.log(1 + times.max())


def failure(process):
    """The one line with which a script refused bad input; fails where it did anything else."""
    assert process.returncode not in (0, None), process.stdout
    assert "Traceback" not in process.stderr, process.stderr
    line = process.stderr.strip().splitlines()[-1]
    assert "error: " in line, process.stderr
    return line


def short_captions(patch, words):
    """Validation's captions end after so many words: those of a model that has learned little
    seldom end, and fifty words take their time."""

    def short(*arguments, max_length=decoding.MAX_LENGTH, search=decoding.greedy, **options):
        return search(*arguments, max_length=min(max_length, words), **options)

    patch.setattr(decoding, "greedy", short)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Eight drawn scenes, each one in the training, validation and test split alike, with one
    caption of its own, so that a model that learns them by heart scores BLEU 1."""
    folder = tmp_path_factory.mktemp("scenes")
    drawn = json.loads(demo.make_demo(folder, {"train": 8}, image_size=96, seed=3).read_text())
    images = []
    for split in ("train", "val", "test"):
        for image in drawn["images"]:
            longest = max(image["sentences"], key=lambda sentence: len(sentence["tokens"]))
            images.append(image | {"split": split, "sentences": [longest]})
    (folder / "karpathy.json").write_text(json.dumps({"images": images}))
    return folder


@pytest.fixture(scope="session")
def tiny_data(scenes, tmp_path_factory):
    """Input files of the scenes: folder and base name."""
    folder = tmp_path_factory.mktemp("tiny")
    summary = utils.create_input_files(
        "demo",
        scenes / "karpathy.json",
        scenes / "images",
        captions_per_image=10,  # copies: more steps an epoch
        min_word_freq=0,
        max_len=20,
        output_folder=folder,
        image_size=96,
        workers=1,
    )
    return folder, summary["base"]


@pytest.fixture(scope="session")
def trained(tiny_data, tmp_path_factory):
    """A model that has learned the tiny data set by heart, then fine-tuned; what was printed."""
    folder, base = tiny_data
    output = tmp_path_factory.mktemp("run")
    run = ["train.py", "--data_folder", folder, "--output_folder", output, *LEARN]
    tune = ["--finetune_batch_size", 40, "--encoder_lr", 1e-5, "--decoder_lr", 1e-4]
    decoder = run_here(*run, "--stage", "decoder", "--epochs", 25)
    assert decoder.returncode == 0, decoder.stderr
    finetune = run_here(*run, *tune, "--stage", "finetune", "--epochs", 2)
    assert finetune.returncode == 0, finetune.stderr
    return output, base, decoder.stdout + finetune.stdout


def best(trained):
    output, base, _ = trained
    return checkpoints.checkpoint_path(output, base, best=True)


@pytest.fixture(scope="session")
def checkpoint(trained):
    return best(trained)


@pytest.fixture(scope="session")
def chromium():
    """A headless browser, the system's Chromium or Playwright's own."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            # root's browser has no sandbox; updates and telemetry are not for tests
            flags = ["--no-sandbox", "--disable-background-networking", "--disable-quic"]
            flags += ["--disable-component-update", "--disable-sync", "--no-first-run"]
            browser = playwright.chromium.launch(executable_path=path, args=flags)
        except Error as error:
            pytest.skip(f"no Chromium: playwright install chromium ({str(error)[:60]})")
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """An empty page; fails where the browser complains about what the page does."""
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(20_000)
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    page.close()
    assert not complaints, complaints


# Of each element that has text of its own: the contrast of WCAG 2 between its colour, made fainter
# by opacity, and what lies behind it.
CONTRASTS = """selector => {
  const all = (root) => [...root.querySelectorAll("*")].flatMap((e) =>
    [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
  const parent = (e) => e.parentElement ?? e.getRootNode().host;
  const rgba = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((x, i) => a * x + (1 - a) * under[i]);
  const behind = (e) => {
    if (!e) return [255, 255, 255];
    const own = rgba(getComputedStyle(e).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, behind(parent(e)));
  };
  const light = (colour) => {
    const [r, g, b] = colour.map((x) => x / 255).map((x) =>
      x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const within = (e) => {
    for (let at = e; at; at = parent(at)) if (at.matches(selector)) return true;
    return false;
  };
  return all(document)
    .filter((e) => within(e) && e.offsetParent && !["STYLE", "SCRIPT"].includes(e.tagName))
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => {
      const under = behind(e), [r, g, b, a] = rgba(getComputedStyle(e).color);
      let opacity = a;
      for (let at = e; at; at = parent(at)) opacity *= getComputedStyle(at).opacity;
      const [x, y] = [light(over([r, g, b, opacity], under)), light(under)];
      return [(Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05), e.outerHTML.slice(0, 200)];
    });
}"""


def least_contrast(page, selector):
    """The least contrast of text and ground, 1 to 21, within the elements of a page that a selector
    of CSS finds; 4.5 is legible."""
    found = page.evaluate(CONTRASTS, selector)
    assert len(found) > 5
    contrast, element = min(found)
    print(f"contrast {contrast:.1f}: {element}")
    return contrast
