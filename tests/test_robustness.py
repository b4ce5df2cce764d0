"""Perturbations, their table and their picture, against computations of the test's own."""

import base64
import io
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import OFFLINE, failure, run_here, tiny_checkpoint
from nltk.translate.bleu_score import corpus_bleu
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from test_distributed import run_two
from test_scripts import tables
from torch.nn import functional as F

import checkpoints
import robustness
import word_rules
from captioner import Captioner
from choosing import Search
from config import SearchConfig
from datasets import CaptionDataset, read_word_map
from encoders import Encoder
from models import DecoderWithAttention, LSTMConfig
from objectives import caption_loss


def first(data, count):
    """The first images of a data set with their captions and lengths, stacked."""
    items = [data[i] for i in range(count)]
    return [torch.stack(tensors) for tensors in zip(*items, strict=True)]


@pytest.fixture(scope="module")
def checkpoint(tiny_data, tmp_path_factory):
    """Path of a small model that has learned most of the tiny data set's words."""
    folder, base = tiny_data
    torch.manual_seed(0)
    word_map = read_word_map(folder, base)
    encoder = Encoder(OFFLINE, 3)
    decoder = DecoderWithAttention(
        LSTMConfig(len(word_map), encoder.dim, 64, 64, 64, 0, encoded_image_size=3)
    )
    data = CaptionDataset(folder, base, "TEST")
    images, captions, lengths = first(data, 8)
    with torch.no_grad():
        features = encoder.features(images)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(100):
        loss = caption_loss(*decoder(features, captions[:, 0], lengths[:, 0]), alpha_c=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    path = tmp_path_factory.mktemp("run") / f"BEST_checkpoint_{base}.pth.tar"
    models = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    sizes = {"encoder_name": OFFLINE, "encoded_image_size": 3, "image_size": 96}
    options = {"data_folder": str(folder)}
    checkpoints.save_checkpoint(
        path, tiny_checkpoint(**models, **sizes, base=base, word_map=word_map, options=options)
    )
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return Captioner.load(checkpoint, "cpu", amp="off")


@pytest.fixture(scope="module")
def batch(tiny_data):
    """The first five test images with all their captions."""
    return first(CaptionDataset(*tiny_data, "TEST"), 5)


@pytest.fixture(scope="module")
def source(model, batch):
    return robustness.prepare(model, *batch, range(5))


def to_bytes(image):
    """(S, S, 3) uint8 of a float image (3, S, S)."""
    return np.rint(255 * image.permute(1, 2, 0).numpy()).astype(np.uint8)


# --------------------------------------------------------------------------- the gradient's sign


def textbook_loss(model, image, caption):
    """-log p of each word of one caption, by the plain modules, a step at a time."""
    decoder = model.decoder
    annotations = model.encoder(image[None]).flatten(1, 2)
    h, c = decoder.init_h(annotations.mean(1)), decoder.init_c(annotations.mean(1))
    losses = []
    for word, target in pairwise(caption):
        attention = decoder.attention
        hidden = torch.relu(attention.encoder_att(annotations) + attention.decoder_att(h)[:, None])
        alphas = attention.full_att(hidden).softmax(dim=1)
        context = torch.sigmoid(decoder.f_beta(h)) * (alphas * annotations).sum(dim=1)
        h, c = decoder.decode_step(torch.cat([decoder.embedding(word[None]), context], 1), (h, c))
        losses.append(F.cross_entropy(decoder.fc(h), target[None]))
    return torch.stack(losses)


def textbook_gradient(model, image, captions, lengths):
    image = (image / 255).requires_grad_()
    ends = zip(captions, lengths, strict=True)
    loss = torch.cat([textbook_loss(model, image, caption[:n]) for caption, n in ends]).mean()
    return torch.autograd.grad(loss, image)[0]


def test_ascent_is_the_sign_of_each_images_own_gradient(model, batch, source):
    # captions of different lengths in a batch: those of each image alone decide
    images, captions, lengths = (tensor[:3].clone() for tensor in batch)
    captions, lengths = captions[:, :3], lengths[:, :3]
    lengths[1, 0] -= 3
    found = robustness.ascent(model, images / 255, captions, lengths)
    for i in range(3):
        gradient = textbook_gradient(model, images[i], captions[i], lengths[i])
        clear = gradient.abs() > 1e-3 * gradient.abs().max()  # more than rounding
        assert clear.float().mean() > 0.9
        assert torch.equal(found[i][clear], gradient.sign()[clear])
    assert not any(p.grad is not None for p in model.decoder.parameters())


def test_ascent_raises_the_loss_and_more_so_than_random_signs(model, batch, source):
    _, captions, lengths = batch

    def loss(name):
        with torch.inference_mode():
            features = model.encoder.features(robustness.perturb(source, name))
            return robustness._loss(model, features, captions, lengths).item()

    for epsilon in (0.005, 0.01, 0.02):
        rise, by_chance = (
            loss(f"{name}, ε = {epsilon}") - loss("none") for name in ("FGSM", "random signs")
        )
        assert rise > 0.1 and rise > 2 * by_chance


@pytest.mark.parametrize("epsilon", [0.005, 0.05, 0.2])
@pytest.mark.parametrize("name", ["FGSM", "random signs"])
def test_signs_go_epsilon_far_and_stay_inside_the_range(source, epsilon, name):
    found = robustness.perturb(source, f"{name}, ε = {epsilon}")
    assert found.min() >= 0 and found.max() <= 1
    change = found - source.images
    assert change.abs().max() <= epsilon + 1e-6
    inside = (found > 0) & (found < 1) & (source.ascent != 0)
    assert inside.float().mean() > 0.3
    expected = torch.full_like(change, epsilon)
    torch.testing.assert_close(change.abs()[inside], expected[inside], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------- other perturbations


def test_nothing_is_nothing_and_a_mirror_image_is_turned(source, batch):
    assert torch.equal(robustness.perturb(source, "none"), batch[0] / 255)
    mirrored = robustness.perturb(source, "mirror image").numpy()
    np.testing.assert_array_equal(mirrored, np.flip(source.images.numpy(), axis=3))


@pytest.mark.parametrize("quality", [50, 20, 10, 5])
def test_jpeg_is_pillows(source, quality):
    found = robustness.perturb(source, f"JPEG, quality {quality}")
    for before, after in zip(source.images, found, strict=True):
        file = io.BytesIO()
        Image.fromarray(to_bytes(before)).save(file, "JPEG", quality=quality)
        np.testing.assert_array_equal(to_bytes(after), np.asarray(Image.open(file)))


@pytest.mark.parametrize("sigma", [1, 2, 4])
def test_blur_is_a_gaussian_with_mirrored_edges(source, sigma):
    found = robustness.perturb(source, f"blur, σ = {sigma} pixels")
    expected = source.images.numpy()
    for axis in (2, 3):
        expected = gaussian_filter1d(expected, sigma, axis, mode="mirror", truncate=3)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_crop_is_the_middle_blown_up(source, share):
    found = robustness.perturb(source, f"crop, {share} of the side")
    side = source.images.shape[-1]
    edge = round(side * (1 - share) / 2)
    for before, after in zip(source.images, found, strict=True):
        middle = Image.fromarray(to_bytes(before)[edge : side - edge, edge : side - edge])
        expected = np.asarray(middle.resize((side, side), Image.Resampling.BILINEAR))
        assert abs(to_bytes(after) - expected.astype(int)).max() <= 1


def test_grayscale_is_luma_in_all_channels(source):
    found = robustness.perturb(source, "grayscale").numpy()
    for before, after in zip(source.images, found, strict=True):
        luma = np.asarray(Image.fromarray(to_bytes(before)).convert("L")) / 255
        assert abs(after - luma).max() < 1.5 / 255


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_noise_has_its_deviation_and_its_image(source, sigma):
    noise = source.noise
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(noise[0], noise[1])
    found = robustness.perturb(source, f"noise, σ = {sigma}")
    expected = np.clip(source.images.numpy() + sigma * noise.numpy(), 0, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_perturbations_do_not_depend_on_the_batch(model, batch, source):
    alone = [
        robustness.prepare(model, *(tensor[i : i + 1] for tensor in batch), [i]) for i in range(5)
    ]
    for field in ("images", "noise", "coins"):
        parts = torch.cat([getattr(one, field) for one in alone])
        assert torch.equal(parts, getattr(source, field)), field
    # where the gradient is nothing but rounding its sign may differ
    agree = torch.cat([one.ascent for one in alone]) == source.ascent
    assert agree.float().mean() > 0.999


# -------------------------------------------------------------------------------------- report


def test_the_image_drawn_is_that_whose_caption_the_attack_spoils_most():
    references = [["a red circle on a striped background"]] * 3
    good, fair = "a red circle on a striped background", "a red circle on a plain background"
    captions = {"none": [good, good, fair], robustness.ATTACK: [fair, "a cat", "a cat"]}
    assert robustness.choose(captions, references) == 1


def test_perturbations_without_effect_leave_captions_and_scores():
    references = [["a red circle on a striped background"], ["two small shapes in the picture"]]
    captions = [text for [text] in references]
    others = ["a red circle on a gray background", captions[1]]
    outcome = robustness.Outcome(
        {"none": captions, "same": captions, "other": others},
        {"none": 0.5, "same": 0.5, "other": 1.25},
    )
    none, same, other = robustness.table(outcome, references)
    assert none | {"": "same"} == same
    assert none["BLEU-4"] == "100.0" and none["Δ BLEU-4"] == "+0.0" and none["same"] == "100%"
    words = [[text.split() for text in texts] for texts in references]
    expected = corpus_bleu(words, [text.split() for text in others])
    assert other["BLEU-4"] == f"{100 * expected:.1f}"
    assert other["Δ BLEU-4"] == f"−{100 - 100 * expected:.1f}"
    assert other["same"] == "50%" and other["loss"] == "1.25"


@pytest.fixture(scope="module")
def evaluated(tiny_data, checkpoint, tmp_path_factory):
    """Results folder and output of eval.py --robustness, without Java, which takes its time."""
    output = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        process = run_here("eval.py", *arguments(tiny_data, checkpoint, output))
    assert process.returncode == 0, process.stderr
    return output, process.stdout


def arguments(tiny_data, checkpoint, output):
    return (
        *("--data_folder", tiny_data[0], "--checkpoint", checkpoint, "--results_folder", output),
        *("--beam_size", 2, 1, "--max_words", 12, "--batch_size", 3, "--robustness", 5),
        *("--report", output / "page"),
        *("--device", "cpu", "--amp", "off"),
    )


def test_the_table_has_a_row_a_perturbation_and_starts_from_the_captions_of_the_split(
    evaluated, tiny_data
):
    output, printed = evaluated
    *_, table = tables(printed)
    assert list(table) == list(robustness.PERTURBATIONS)
    assert "the first 5 of 8 images of the test split, 96×96 pixels, beam 2" in printed
    folder, base = tiny_data
    path = output / f"results_test_beam2_BEST_checkpoint_{base}.json"
    results = json.loads(path.read_text())[:5]
    references = json.loads((folder / f"TEST_REFERENCES_{base}.json").read_text())[:5]
    expected = corpus_bleu(
        [[word_rules.tokenize(text) for text in r["captions"]] for r in references],
        [r["caption"].split() for r in results],
    )
    assert table["none"]["BLEU-4"] == f"{100 * expected:.1f}"
    assert table["none"]["same"] == "100%"
    for row in table.values():
        change = float(row["Δ BLEU-4"].replace("−", "-"))
        before, after = float(table["none"]["BLEU-4"]), float(row["BLEU-4"])
        assert after == pytest.approx(before + change, abs=0.11)


@pytest.mark.slow
def test_the_report_has_table_and_picture(evaluated, tiny_data, page):
    output, printed = evaluated
    assert "report, with these: " in printed.splitlines()[-1]
    page.goto((output / "page" / "index.html").as_uri())
    rows = page.locator("table.figures").last.locator("tr").all()
    shown = [row.locator("th, td").all_inner_texts() for row in rows]
    expected = tables(printed)[-1]
    assert shown[0][1:] == list(expected["none"])
    assert {name: values for name, *values in shown[1:]} == {
        name: list(row.values()) for name, row in expected.items()
    }
    assert "the first 5 of 8 images" in page.locator(".note", has_text="robustness").inner_text()
    address = page.locator("#changed").get_attribute("src")
    picture = output / f"robustness_test_BEST_checkpoint_{tiny_data[1]}.png"
    assert base64.b64decode(address.partition("base64,")[2]) == picture.read_bytes()


@pytest.mark.parametrize("size", [(400, 300), (200, 400), None])
def test_the_picture_has_the_photographs_proportions(source, tmp_path, size):
    red = torch.zeros_like(source.images[:1])
    red[:, 0] = 1
    one = robustness.Source(red, *(tensor[:1] for tensor in source[1:]))
    captions = dict.fromkeys(robustness.PERTURBATIONS, "a dog")
    reference = {"captions": ["a dog"]} | dict(zip(("width", "height"), size or (), strict=False))
    robustness.draw(one, captions, reference, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    is_red = (pixels == [255, 0, 0]).all(axis=2)[:, : pixels.shape[1] // 3]
    top = is_red.any(axis=1).argmax()
    height = (~is_red[top:].any(axis=1)).argmax()
    width = is_red[top : top + height].any(axis=0).sum()
    wide, high = size or (1, 1)
    assert width / height == pytest.approx(wide / high, rel=0.05)
    assert max(width, height) == pytest.approx(145, abs=3)


def test_batches_of_another_size_give_the_same_captions(model, tiny_data, monkeypatch):
    names = ["none", "noise, σ = 0.1", "FGSM, ε = 0.02", "random signs, ε = 0.02"]
    few = {name: robustness.PERTURBATIONS[name] for name in names}
    monkeypatch.setattr(robustness, "PERTURBATIONS", few)
    found = []
    for batch_size in (2, 8):
        search = SearchConfig(Search(max_words=12), batch_size, workers=0)
        found.append(robustness.caption(model, CaptionDataset(*tiny_data, "TEST"), 5, 2, search))
    one, two = found
    assert one.captions == two.captions
    assert len(one.captions["none"]) == 5 and one.captions["none"] != one.captions[names[1]]
    # FGSM's signs differ where a gradient is nothing but rounding
    assert one.losses == pytest.approx(two.losses, rel=1e-2)


def test_the_picture_is_drawn(evaluated, tiny_data):
    output, printed = evaluated
    path = output / f"robustness_test_BEST_checkpoint_{tiny_data[1]}.png"
    assert f"picture: {path}, of " in printed
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert 900 <= image.width <= 1100 and 600 <= image.height <= 1000
        assert np.asarray(image.convert("RGB")).std() > 20


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(evaluated, tiny_data, checkpoint, tmp_path):
    process = run_two("eval.py", *arguments(tiny_data, checkpoint, tmp_path))
    assert process.returncode == 0, process.stderr
    one, two = tables(evaluated[1])[-1], tables(process.stdout)[-1]
    for name, row in one.items():
        assert float(two[name]["loss"]) == pytest.approx(float(row["loss"]), abs=0.02)
        for column in ("BLEU-1", "BLEU-4", "same"):
            assert two[name][column] == row[column], name
    assert (tmp_path / f"robustness_test_BEST_checkpoint_{tiny_data[1]}.png").exists()


def test_robustness_is_refused_for_captions_of_other_systems():
    line = failure(run_here("eval.py", "--results", "a", "--references", "b", "--robustness"))
    assert "--robustness" in line and "--results" in line


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_robustness_takes_a_number_of_images(count):
    assert "--robustness" in failure(run_here("eval.py", f"--robustness={count}"))
