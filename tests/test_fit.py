"""How a picture becomes a square: in the input files, for training, and for whatever captions."""

import json

import h5py
import numpy as np
import pytest
import torch
from conftest import failure, run_here, small_checkpoint
from PIL import Image

import app
import checkpoints
import datasets
import input_files
import regions
from captioner import Caption, Captioner
from datasets import as_photographed, proportions
from groundwork.errors import UserError
from groundwork.images import GROUND, frame, framed, square

WIDE, TALL = (60, 40), (40, 60)


def photograph(size):
    """Red on the left or at the top, blue on the other end, and green in the middle."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 1] = 255
    long = pixels if height > width else pixels.swapaxes(0, 1)
    long[:10], long[-10:] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(pixels)


def by_hand(image, fit):
    """The square in its own size, by slices alone."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    if fit == "crop":
        apart = abs(width - height) // 2
        return pixels[:, apart:-apart] if width > height else pixels[apart:-apart]
    ground = np.full((60, 60, 3), GROUND, np.uint8)
    if width > height:
        ground[10:50] = pixels
    else:
        ground[:, 10:50] = pixels
    return ground


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_crop_and_pad_keep_proportions(size, fit):
    image = photograph(size)
    expected = by_hand(image, fit)
    side = len(expected)
    found = square(image, side, fit)
    assert np.array_equal(found.transpose(1, 2, 0), expected)
    assert np.array_equal(np.asarray(framed(image, fit)), expected)
    half = square(image, side // 2, fit).transpose(1, 2, 0).astype(int)
    shrunk = np.asarray(Image.fromarray(expected).resize((side // 2, side // 2), 2)).astype(int)
    assert np.abs(half - shrunk).mean() < 2
    for again in ("squeeze", "crop", "pad"):  # a square is as it is
        assert np.array_equal(square(Image.fromarray(expected), side, again), found)


def test_squeezing_shows_all_of_it():
    image = photograph(WIDE)
    assert framed(image) is image and frame(60, 40) == (0, 0, 1, 1)
    assert np.array_equal(
        square(image, 20), np.asarray(image.resize((20, 20), 2)).transpose(2, 0, 1)
    )


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("size", [(3, 1), (1, 3), (200, 2), (5, 4)])
def test_odd_sizes_become_squares(fit, size):
    assert square(Image.new("RGB", size), 7, fit).shape == (3, 7, 7)
    seen = framed(Image.new("RGB", size), fit)
    assert seen.width == seen.height == (min if fit == "crop" else max)(size)


def test_a_long_line_takes_no_more_memory_than_its_frame():
    seen = framed(Image.new("RGB", (80_000, 800)), "pad")
    assert seen.size == (2048, 2048)


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_regions_are_where_the_square_shows_them(size, fit):
    """Against a mask of the same box that is made a square as the image is."""
    width, height = size
    reference = {"width": width, "height": height, "fit": fit, "filename": "a.jpg"}
    for box in ([0, 0, 1, 1], [0.1, 0.2, 0.6, 0.7], [0, 0, 0.5, 1], [0.7, 0.1, 1, 0.9]):
        region = regions.Region.of_boxes([box])
        mask = np.zeros((height, width), bool)
        x0, y0, x1, y1 = (round(v * n) for v, n in zip(box, (width, height) * 2, strict=True))
        mask[y0:y1, x0:x1] = True
        pixels = np.asarray(framed(Image.fromarray(mask).convert("RGB"), fit))
        if fit == "pad":  # the ground is no part of it
            apart = 10
            inside = np.zeros((60, 60), bool)
            rows, columns = slice(apart, -apart), slice(None)
            inside[(rows, columns) if width > height else (columns, rows)] = True
            shown = (pixels[..., 0] == 255) & inside
        else:
            shown = pixels[..., 0] == 255
        n = len(shown) // 10
        expected = shown.reshape(10, n, 10, n).mean(axis=(1, 3)).ravel()
        found = region.framed(reference)
        np.testing.assert_allclose(found.shares(10), expected, atol=1e-9)
        for y, x in ((0.05, 0.05), (0.51, 0.51), (0.51, 0.95), (0.95, 0.51)):
            assert found.contains(x, y) == bool(
                shown[int(60 * y * len(shown) / 60), int(x * len(shown))]
            )


def test_a_thing_that_is_cropped_away_is_not_in_the_picture():
    reference = {"width": 100, "height": 10, "fit": "crop", "filename": "a.jpg"}
    found = {"a.jpg": {"cup": regions.Region.of_boxes([[0, 0, 0.2, 1]])}}
    assert regions.of_split([reference], found, "x").of_images == [{}]
    boxes = {"circle": [0, 0, 0.2, 1], "square": [0.45, 0, 0.6, 1]}
    [own] = regions.complete([reference | {"boxes": boxes}], ["circle", "square"]).of_images
    assert own.keys() == {"square"}


# ------------------------------------------------------------------------------- the input files


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """fit -> folder and base name of input files of three wide photographs."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "images").mkdir()
    lines = ["image,caption,split"]
    for i, split in enumerate(("train", "val", "test")):
        photograph(WIDE).save(folder / "images" / f"{i}.png")
        lines.append(f"{i}.png,a red dog,{split}")
    (folder / "captions.csv").write_text("\n".join(lines))
    made = {}
    for fit in ("squeeze", "crop", "pad"):
        process = run_here(
            "create_input_files.py", "--dataset", "wide", "--captions", folder / "captions.csv",
            "--image_folder", folder / "images", "--output_folder", folder / fit,
            "--fit", fit, "--image_size", 60, "--min_word_freq", 0, "--captions_per_image", 1,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        made[fit] = folder / fit, "wide_1_cap_per_img_0_min_word_freq"
    return made


@pytest.mark.parametrize("fit", ["squeeze", "crop", "pad"])
def test_the_files_say_how_their_images_were_made(data, fit):
    folder, base = data[fit]
    expected = square(photograph(WIDE), 60, fit)
    with h5py.File(input_files.input_path(folder, base, "IMAGES", "VAL")) as file:
        assert file.attrs["fit"] == fit
        assert np.array_equal(file["images"][0], expected)
    found = datasets.CaptionDataset(folder, base, "VAL")
    [reference] = found.references
    assert found.fit == fit and (reference["width"], reference["height"]) == WIDE
    assert proportions(reference) == (WIDE if fit == "squeeze" else (1, 1))
    shown = as_photographed(expected, reference)
    assert shown.size == ((60, 40) if fit == "squeeze" else (60, 60))


def test_files_of_before_are_of_squeezed_images(data, tmp_path):
    folder, base = data["squeeze"]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with h5py.File(input_files.input_path(tmp_path, base, "IMAGES", "VAL"), "r+") as file:
        del file.attrs["fit"]
    assert datasets.CaptionDataset(tmp_path, base, "VAL").fit == "squeeze"


# ------------------------------------------------------------------------------- the captioning


@pytest.fixture
def models(tmp_path):
    """fit -> path of one model that is told to be of images made so; None: of before."""
    paths, whole = {}, small_checkpoint()
    for fit in ("squeeze", "crop", "pad", None):
        paths[fit] = tmp_path / f"{fit}.pth.tar"
        changed = {key: value for key, value in whole.items() if key != "fit"}
        checkpoints.save_checkpoint(paths[fit], changed | ({"fit": fit} if fit else {}))
    return paths


@pytest.mark.parametrize("fit", ["squeeze", "crop", "pad", None])
def test_a_picture_is_captioned_as_its_square_is(models, fit, tmp_path):
    """By the library and by caption.py, which draws what the model sees."""
    model = Captioner.load(models[fit], "cpu", amp="off")
    assert model.fit == (fit or "squeeze")
    image = photograph(WIDE)
    [caption] = model.caption(image, beam_size=2)
    [same] = model.caption(square(image, 64, model.fit).transpose(1, 2, 0), beam_size=2)
    assert caption.words == same.words and torch.equal(caption.alphas, same.alphas)
    seen = framed(image, model.fit)
    expected = Caption(caption.words, 0.0, caption.alphas).draw(seen)
    assert np.array_equal(np.asarray(caption.draw(image)), np.asarray(expected))
    image.save(tmp_path / "wide.png")
    run = ["caption.py", "--img", tmp_path / "wide.png", "--model", models[fit]]
    run += ["--beam_size", 2, "--output_folder", tmp_path, "--device", "cpu", "--amp", "off"]
    process = run_here(*run)
    assert process.returncode == 0, process.stderr
    assert caption.text in process.stdout
    drawn = Image.open(tmp_path / "wide.png_attention.png")
    assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_the_web_page_shows_what_the_model_sees(models, monkeypatch, tmp_path):
    import report

    shown = []
    monkeypatch.setattr(report, "attention_view", lambda image, *_: shown.append(image.size) or {})
    photograph(WIDE).save(tmp_path / "wide.png")
    loaded = {str(f): Captioner.load(models[f], "cpu", amp="off") for f in ("crop", "pad", None)}
    app.render(tmp_path / "wide.png", loaded, 2, 0, 5, 0.0)
    assert shown == [(40, 40), (60, 60), (60, 40)]


def test_models_of_several_fits_do_not_caption_together(models):
    with pytest.raises(UserError, match=r"pad.pth.tar is for images of --fit pad, and .*--fit cro"):
        Captioner.load([models["crop"], models["pad"]], "cpu")


def test_eval_takes_data_of_the_models_own_fit(data, models, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    folder, _ = data["crop"]
    run = ["eval.py", "--data_folder", folder, "--beam_size", 1, "--device", "cpu", "--amp", "off"]
    run += ["--output_folder", tmp_path]
    line = failure(run_here(*run, "--model", models["squeeze"]))
    assert "made by --fit crop" in line and "for --fit squeeze" in line
    process = run_here(*run, "--model", models["crop"])
    assert process.returncode == 0, process.stderr
    [path] = tmp_path.glob("results_*.json")
    [result] = json.loads(path.read_text())
    [caption] = Captioner.load(models["crop"], "cpu", amp="off").caption(photograph(WIDE), 1)
    assert result["caption"] == caption.text


def test_training_keeps_the_fit_in_its_checkpoints(data, tmp_path):
    folder, base = data["pad"]
    process = run_here(
        "train.py", "--data_folder", folder, "--output_folder", tmp_path, "--epochs", 1,
        "--encoder", "timm:test_resnet", "--encoder_weights", weights(tmp_path), "--stage",
        "decoder", "--embed_dim", 8, "--decoder_dim", 8, "--attention_dim", 8, "--device", "cpu",
        "--encoded_image_size", 2,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    path = checkpoints.checkpoint_path(tmp_path, base)
    assert checkpoints.load_checkpoint(path)["fit"] == "pad"
    assert Captioner.load(path, "cpu").fit == "pad"


def weights(folder):
    import timm

    path = folder / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return path


@pytest.mark.parametrize("fit", ["round", 3, None])
def test_a_checkpoint_of_an_unknown_fit_is_refused(fit, tmp_path):
    checkpoints.save_checkpoint(tmp_path / "m.pth.tar", small_checkpoint() | {"fit": fit})
    with pytest.raises(UserError, match="its fit cannot be one"):
        checkpoints.load_checkpoint(tmp_path / "m.pth.tar")
