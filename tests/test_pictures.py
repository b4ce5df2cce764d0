"""Training curves and pictures of attention, measured in their pixels."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import attention_in_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import attention_metrics
from attention_pictures import draw_attention
from groundwork.errors import UserError
from pictures import curves, draw_curves
from regions import Region, Regions

# ----------------------------------------------------------------------------------------- curves


def write_log(path, *stages):
    """A log with these epochs."""
    rng = np.random.default_rng(0)
    keys = ["loss", "val_loss", "bleu1", "bleu2", "bleu3", "bleu4"]
    records = [{"stage": s, "epoch": i, "lr": 4e-4} for i, s in enumerate(stages, start=1)]
    lines = [json.dumps(r | dict(zip(keys, rng.random(6), strict=True))) for r in records]
    path.write_text("\n".join(lines) + "\n")


def shaded(path):
    """How many pixels have the gray of the fine-tuning epochs."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return (abs(pixels - 0.92 * 255) < 1.5).all(-1).sum()


def test_curves_are_drawn_beside_the_log(tmp_path):
    log = tmp_path / "log_demo_5.0_log_cap.jsonl"
    write_log(log, "decoder")
    before = log.read_bytes()
    draw_curves(log)
    draw_curves(str(log))  # over the old picture
    picture = tmp_path / "curves_demo_5.0_log_cap.png"
    assert sorted(tmp_path.iterdir()) == [picture, log]
    assert log.read_bytes() == before
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width > 2 * image.height


def test_curves_shade_the_epochs_of_fine_tuning(tmp_path):
    log, areas = tmp_path / "log_x.jsonl", []
    for decoder, finetune in ((4, 0), (0, 4), (3, 1), (1, 3)):
        write_log(log, *["decoder"] * decoder, *["finetune"] * finetune)
        draw_curves(log)
        areas.append(shaded(tmp_path / "curves_x.png"))
    none, only, *areas = areas
    assert none == only  # nothing to tell apart; the pixels are those of the grid and of letters
    shares = np.array(areas) - none
    np.testing.assert_allclose(shares / shares[0], [1, 3], rtol=0.1)


@pytest.mark.parametrize("older", [0, 2])
def test_curves_show_both_learning_rates_of_fine_tuning(older):
    """Of the encoder from where it is trained on; logs of older runs have none."""
    scores = dict.fromkeys(["loss", "val_loss", "bleu1", "bleu2", "bleu3", "bleu4"], 0.5)
    log = [scores | {"stage": "decoder", "epoch": 1, "lr": 4e-4}]
    log += [scores | {"stage": "finetune", "epoch": i, "lr": 3e-4} for i in range(1, 4)]
    for record in log[1 + older :]:
        record["encoder_lr"] = 1e-4 / record["epoch"]
    *_, rates = curves(log).axes
    decoder, encoder = rates.get_lines()
    assert (decoder.get_label(), encoder.get_label()) == ("decoder", "encoder")
    np.testing.assert_allclose(decoder.get_ydata(), [4, 3, 3, 3])
    expected = [np.nan, 1, 1 / 2, 1 / 3]
    expected[1 : 1 + older] = [np.nan] * older
    np.testing.assert_allclose(encoder.get_ydata(), expected)
    assert rates.get_ylim() == pytest.approx((0, 4.2))
    labels = [text.get_text() for text in rates.get_legend().get_texts()]
    assert labels == ["decoder", "encoder", "fine-tuning"]
    for record in log:
        record.pop("encoder_lr", None)
    assert len(curves(log).axes[-1].get_lines()) == 1


def test_curves_that_cannot_be_written(tmp_path):
    log = tmp_path / "log_x.jsonl"
    write_log(log, "decoder")
    (tmp_path / "curves_x.png").mkdir()
    with pytest.raises(UserError, match="curves_x.png"):
        draw_curves(log)


# -------------------------------------------------------------------------------------- attention

COLOUR = (90, 220, 140)  # neither gray nor dark


def draw(path, alphas, size=(300, 200), words=None, colour=COLOUR, numbers=False):
    """The picture that draw_attention makes of a plain photograph: uint8 (H, W, 3)."""
    words = words or ["word"] * len(alphas)
    draw_attention(Image.new("RGB", size, colour), words, alphas, numbers).save(path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def rectangles(pixels, colour=COLOUR):
    """(left, top, width, height) of the rectangles of one colour, row by row."""
    left_over = (abs(pixels - colour) <= 2).all(-1)
    found = []
    while left_over.any():
        top, left = np.argwhere(left_over)[0]
        row = left_over[top, left:]
        width = len(row) if row.all() else row.argmin()
        column = left_over[top:, left : left + width].all(1)
        height = len(column) if column.all() else column.argmin()
        left_over[top : top + height, left : left + width] = False
        found.append((left, top, width, height))
    return found


def even(count, size=7):
    return np.full((count, size**2), 1 / size**2)


def panels(path, count, size=(300, 200)):
    """Where the panels of `count` words are."""
    found = rectangles(draw(path, even(count), size))
    assert len(found) == 1 + count
    return found[1:]


def peaks(places, size=8):
    """Attention on one place (row, column) of a grid a word."""
    alphas = np.full((len(places), size, size), 1e-4)
    for alpha, place in zip(alphas, places, strict=True):
        alpha[place] = 1
    return alphas.reshape(len(places), -1)


@pytest.mark.parametrize(
    ("count", "size"),
    [
        *((count, (640, 480)) for count in (1, 2, 5, 12, 50)),
        *((12, size) for size in [(256, 256), (600, 200), (200, 300)]),
    ],
)
def test_the_photograph_and_a_panel_a_word_in_its_proportions(tmp_path, count, size):
    pixels = draw(tmp_path / "a.png", even(count), size)
    found = rectangles(pixels)
    assert len(found) == 1 + count
    aspect = size[0] / size[1]
    for _, _, width, height in found:
        assert abs(width - height * aspect) <= 1.5 * (1 + aspect)  # up to the rounding of edges
    widths = [width for _, _, width, _ in found]
    assert max(widths[1:]) - min(widths[1:]) <= 1
    assert widths[0] >= max(widths) - 1 and (widths[0] > 1.5 * widths[1] or count < 8)
    height, width, _ = pixels.shape
    assert 1.1 < width / height < 2.5
    pictures = sum(w * h for _, _, w, h in found) / (width * height)
    assert pictures > (0.5 if count <= 12 else 0.4)


def test_a_very_tall_photograph_makes_no_endless_picture(tmp_path):
    pixels = draw(tmp_path / "a.png", even(1), (100, 400))
    assert len(rectangles(pixels)) == 2 and max(pixels.shape) < 1500


@pytest.mark.parametrize("size", [7, 8, 14])
def test_the_attended_place_stands_out_where_it_is(tmp_path, size):
    last = size - 1
    corners = [(0, 0), (0, last), (last, 0), (last, last)]
    boxes = panels(tmp_path / "even.png", 4)
    pixels = draw(tmp_path / "peaks.png", peaks(corners, size))
    for k, (left, top, width, height) in enumerate(boxes):
        panel = pixels[top : top + height, left : left + width]
        # near the very corners, away from the line around the attended place
        seen = [panel[y, x] for y in (2, height - 3) for x in (2, width - 3)]
        for j, colour in enumerate(seen):
            if j == k:
                np.testing.assert_allclose(colour, COLOUR, atol=12)
            else:
                assert np.ptp(colour) <= 4 and colour.max() < 0.6 * np.mean(COLOUR)


def centre(panel):
    """Mean place (across, down; 0 to 1) of what has colour in a panel."""
    weight = np.ptp(panel, axis=-1) ** 2
    ys, xs = (np.indices(weight.shape) + 0.5) / np.array(weight.shape)[:, None, None]
    return np.average(xs, weights=weight), np.average(ys, weights=weight)


@pytest.mark.parametrize("shape", [(300, 200), (150, 300)])
def test_attention_is_not_shifted(tmp_path, shape):
    places = [(4, 4), (2, 5), (5, 3), (4, 2)]
    boxes = panels(tmp_path / "even.png", 4, shape)
    pixels = draw(tmp_path / "peaks.png", peaks(places, 9), shape)
    for (row, column), (left, top, width, height) in zip(places, boxes, strict=True):
        x, y = centre(pixels[top : top + height, left : left + width])
        assert (x, y) == pytest.approx(((column + 0.5) / 9, (row + 0.5) / 9), abs=0.015)


def test_nearly_even_attention_looks_nearly_even(tmp_path):
    noise = np.random.default_rng(1).uniform(0.9, 1.1, (3, 196))
    boxes = panels(tmp_path / "even.png", 3)
    pixels = draw(tmp_path / "noise.png", noise / noise.sum(1, keepdims=True))
    for left, top, width, height in boxes:
        panel = pixels[top : top + height, left : left + width]
        other = np.argwhere((abs(panel - COLOUR) >= 0.15 * 255).any(-1))
        assert (np.ptp(other, axis=0) < 25).all()  # but for the ring


def test_attention_shows_on_a_dark_photograph(tmp_path):
    boxes = panels(tmp_path / "even.png", 2)
    pixels = draw(tmp_path / "dark.png", peaks([(0, 0), (7, 7)]), colour=(12, 10, 14))
    for (left, top, width, height), sign in zip(boxes, (1, -1), strict=True):
        first, last = pixels[top + 2, left + 2], pixels[top + height - 3, left + width - 3]
        assert sign * (first.mean() - last.mean()) > 25


def test_the_scale_of_alphas_does_not_matter_and_their_type_neither(tmp_path):
    alphas = torch.rand(1, 49, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = draw(tmp_path / "a.png", alphas.float().numpy())
    for same in (alphas, alphas.float().requires_grad_(), (alphas.double() * 1024).numpy()):
        assert (draw(tmp_path / "b.png", same) == expected).all()
    assert (draw(tmp_path / "b.png", alphas.flip(1)) != expected).any()


def test_each_panel_says_how_much_its_word_does_not_look_and_shows_the_rest_as_ever(monkeypatch):
    """Of attention with a sentinel; a word that looks nowhere is as one that looks everywhere."""
    texts, draw_text = [], ImageDraw.ImageDraw.text

    def note(self, place, text, *rest, **options):
        texts.append(text)
        return draw_text(self, place, text, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    whole, photograph = mixed(), Image.new("RGB", (300, 200), COLOUR)
    whole[3] = 1 / 64
    alphas = whole * np.array([[0.37], [0.995], [1], [0]])
    words = ["of", "the", "big", "dog"]
    pictures = []
    for own, numbers in ((whole, False), (alphas, False), (alphas, True)):
        texts.clear()
        pictures.append(np.asarray(draw_attention(photograph, words, own, numbers)).astype(int))
        found = [text for text in texts if text.startswith("does not look")]
        shares = ["63%", "0.5%", "0.0%", "100%"] if own is alphas else []
        assert found == [f"does not look: {share}" for share in shares]
        assert sum(" · " in text for text in texts) == 4 * numbers
        assert ("Does not look" in " ".join(texts)) == (own is alphas)
    boxes = rectangles(np.asarray(draw_attention(photograph, words, even(4))).astype(int))[1:]
    for picture, most in zip(pictures[1:], (0.15, 0.3), strict=True):
        for box in boxes:
            changed = (crop(pictures[0], box) != crop(picture, box)).any(-1)
            assert 0 < changed.mean() < most  # the note alone, in a corner
            assert np.ptp(np.argwhere(changed), axis=0).max() < 0.9 * max(changed.shape)


def test_words_are_not_formulas(tmp_path):
    words = ["$\\frac$", "$x_1$", "a_b^{", "\\", "%", "<unk>", "слово", "x" * 300]
    draw(tmp_path / "a.png", even(len(words)), words=words)
    one, other = (draw(tmp_path / "b.png", even(1), words=[word]) for word in ("$x$", "xxx"))
    dark = [(pixels.max(-1) < 100).sum() for pixels in (one, other)]
    assert dark[0] > dark[1]  # two dollars have more ink than two x: they are on paper


def test_long_words_stay_off_the_next_panel_and_the_edge(tmp_path):
    words = ["i", "donaudampfschifffahrtsgesellschaftskapitän"] * 4
    pixels = draw(tmp_path / "a.png", even(8), words=words)
    boxes = rectangles(pixels)[1:]
    assert len(boxes) == 8
    for left, top, width, _ in boxes:
        above = pixels[top - 25 : top - 2]
        inked = np.flatnonzero((above.max(-1) < 200).any(0))
        inked = inked[(inked > left - 10) & (inked < left + width + 40)]
        assert len(inked) and inked.min() >= left - 2
    for left, top, width, _ in boxes[1::2]:
        beyond = pixels[top - 25 : top - 2, left + width + 15 : left + width + 25]
        assert (beyond > 250).all()
    assert (pixels[:, -10:] > 250).all()


def test_a_photograph_of_50_megapixels(tmp_path):
    pixels = draw(tmp_path / "a.png", even(3), (8640, 5760))
    assert len(rectangles(pixels)) == 4


def test_what_does_not_fit_is_refused(tmp_path):
    for words, alphas in ((["a"], even(2)), (["a", "b"], even(1)), (["a"], np.ones((1, 50)))):
        with pytest.raises(ValueError):
            draw(tmp_path / "a.png", alphas, words=words)
    assert not list(tmp_path.iterdir())


def crop(pixels, box):
    left, top, width, height = box
    return pixels[top : top + height, left : left + width]


def ring(panel):
    """Centre (x, y) of the white in a panel, fractions of width and height, and how many pixels
    across it is; None where there is none."""
    ys, xs = np.nonzero((panel > 240).all(-1))
    if not len(xs):
        return None
    height, width, _ = panel.shape
    return (xs.mean() + 0.5) / width, (ys.mean() + 0.5) / height, np.ptp(xs) + 1


def mixed(size=8):
    """Attention of four words: even, on few places, on one, and nearly even."""
    rng = np.random.default_rng(5)
    one = np.eye(size**2)[27]
    rows = [np.ones(size**2), rng.gamma(0.1, size=size**2), one, rng.uniform(0.8, 1.2, size**2)]
    return np.stack([row / row.sum() for row in rows])


def test_all_panels_have_one_scale(tmp_path):
    """That of the docstring, pixel by pixel, away from lines and rings."""
    alphas = mixed()
    boxes = panels(tmp_path / "even.png", len(alphas))
    pixels = draw(tmp_path / "mixed.png", alphas)
    [shape] = {box[:1:-1] for box in boxes}
    times, light = attention_in_pixels(alphas, shape)
    gray = 0.4 * (np.array(COLOUR) @ [0.299, 0.587, 0.114])
    for box, own, share in zip(boxes, times, light, strict=True):
        panel, share = crop(pixels, box), share[..., None]
        expected = gray + share * (np.array(COLOUR) - gray)
        slope = np.hypot(*np.gradient(own)) + 1e-9
        away = abs(own - own.max() / 2) / slope > 4
        if found := ring(panel):
            ys, xs = np.indices(shape)
            away &= np.hypot(xs - found[0] * shape[1], ys - found[1] * shape[0]) > 15
        assert away.mean() > 0.7
        assert abs(panel - expected)[away].max() <= 1.5


def test_a_word_that_looks_nowhere_is_dim_beside_one_that_looks_somewhere(tmp_path):
    alphas = mixed()
    boxes = panels(tmp_path / "even.png", len(alphas))
    pixels = draw(tmp_path / "mixed.png", alphas)
    even, few, one, nearly = (crop(pixels, box) for box in boxes)
    assert np.ptp(even, axis=(0, 1)).max() == 0  # no line and no ring, either
    for panel in (few, one):
        x, y, _ = ring(panel)
        centre = panel[int(y * len(panel)), int(x * panel.shape[1])]  # what the ring leaves open
        assert centre[1] > 1.4 * even[0, 0, 1]
        if panel is few:  # beside one that is much sharper it can still be read
            assert centre[1] > 1.3 * np.median(panel[..., 1])
    assert abs(nearly - even)[..., 1].mean() < 6


@given(
    st.integers(2, 6).flatmap(lambda n: st.lists(st.integers(1, 4), min_size=n**2, max_size=n**2))
)
@settings(max_examples=25)
def test_a_ring_is_where_the_largest_alpha_is(alpha):
    """In the middle of several, as in the pointing game; none where all are alike."""
    size, alpha = round(len(alpha) ** 0.5), np.array(alpha, float)
    photograph = Image.new("RGB", (240, 160), COLOUR)
    pictures = [np.asarray(draw_attention(photograph, ["a"], a)) for a in (even(1), alpha[None])]
    found = ring(crop(pictures[1], rectangles(pictures[0].astype(int))[1]))
    if alpha.min() == alpha.max():
        assert found is None
        return
    places = [divmod(i, size) for i in range(size**2) if alpha[i] == alpha.max()]
    y, x = (np.mean([place[axis] + 0.5 for place in places]) / size for axis in (0, 1))
    assert found[:2] == pytest.approx((x, y), abs=0.005)
    around = [x - 0.01, y - 0.01, x + 0.01, y + 0.01]
    known = Regions([{"a": Region.of_boxes([around])}])
    assert attention_metrics.pointing_game([(["a"], [alpha])], known).hits == 1


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (255, 184, 28)])
def test_a_ring_shows_on_any_ground(tmp_path, colour):
    boxes = panels(tmp_path / "even.png", 2)
    alphas = peaks([(2, 5), (6, 1)])
    pixels = draw(tmp_path / "a.png", alphas, colour=colour)
    for box, (row, column) in zip(boxes, [(2, 5), (6, 1)], strict=True):
        panel = crop(pixels, box)
        height, width, _ = panel.shape
        x, y = round((column + 0.5) / 8 * width), round((row + 0.5) / 8 * height)
        near = panel[y - 12 : y + 12, x - 12 : x + 12]
        assert ((near > 240).all(-1)).sum() > 20 and ((near < 15).all(-1)).sum() > 20


def test_numbers_stand_in_the_panels_when_they_are_asked_for(monkeypatch):
    """The share of the image that the attention is spread over, and that of the largest alpha."""
    alphas = np.zeros((4, 16))
    alphas[0], alphas[1, 5], alphas[2, :4], alphas[3, 12:15] = 1 / 16, 1, 1 / 4, 1 / 3
    texts, draw_text = [], ImageDraw.ImageDraw.text

    def note(self, place, text, *rest, **options):
        texts.append(text)
        return draw_text(self, place, text, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    pictures = []
    for numbers in (False, True):
        texts.clear()
        photograph = Image.new("RGB", (300, 200), COLOUR)
        picture = draw_attention(photograph, ["a", "b", "c", "d"], alphas, numbers)
        pictures.append(np.asarray(picture).astype(int))
        found = [text for text in texts if " · " in text]
        expected = ["100% · 6.2%", "6.2% · 100%", "25% · 25%", "19% · 33%"]
        assert found == (expected if numbers else [])
        assert ("In the corners" in " ".join(texts)) == numbers
    plain, numbered = pictures
    # by a line of the legend the picture is higher, and by no more
    assert 0 < len(numbered) - len(plain) < 20
    changed = (plain != numbered[: len(plain)]).any(-1)
    boxes = rectangles(np.asarray(draw_attention(photograph, ["a"] * 4, even(4))).astype(int))[1:]
    for box, alpha in zip(boxes, alphas, strict=True):
        _, _, width, height = box
        ys, xs = np.nonzero(crop(changed, box))
        assert 0 <= xs.min() <= 1 and xs.max() < 0.6 * width  # a corner
        assert np.ptp(ys) < 0.2 * height
        assert (ys.max() < height / 2) == (alpha[13] > 0.3)  # off the ring


def test_a_caption_without_words_has_no_panels():
    picture = draw_attention(Image.new("RGB", (300, 200), COLOUR), [], np.zeros((0, 9)))
    assert len(rectangles(np.asarray(picture).astype(int))) == 1


def legend(pixels):
    """The rows under the panels, and how many of their pixels have the colour of the line."""
    bottom = max(top + height for _, top, _, height in rectangles(pixels))
    under = pixels[bottom + 1 :]
    return under, (abs(under - (255, 184, 28)) < 8).all(-1).sum()


@pytest.mark.parametrize("count", [1, 12, 40])
@pytest.mark.parametrize("size", [(300, 200), (100, 400), (30, 1200)])
@pytest.mark.parametrize("numbers", [False, True])
def test_a_legend_stands_under_all_panels(tmp_path, count, size, numbers):
    pixels = draw(tmp_path / "a.png", even(count), size, numbers=numbers)
    under, coloured = legend(pixels)
    assert 20 < coloured < 150  # a dash, as long as two letters
    inked = (under.min(-1) < 200).any(1)
    lines = (inked[1:] & ~inked[:-1]).sum()  # which stay off each other, and off the edges
    assert lines <= 2 if pixels.shape[1] > 1300 else lines <= 6
    assert np.ptp(inked.nonzero()[0]) < 18 * lines and len(under) < 45 + 18 * lines
    assert (under[:, -10:] > 250).all() and (under[-5:] > 250).all()


def test_without_attention_there_is_no_legend(tmp_path):
    draw_attention(Image.new("RGB", (300, 200), COLOUR), ["a", "dog"], None).save(
        tmp_path / "a.png"
    )
    under, coloured = legend(np.asarray(Image.open(tmp_path / "a.png")).astype(int))
    assert coloured == 0 and (under > 250).all()


def test_the_line_is_where_attention_is_half_its_maximum(tmp_path):
    """Of one peak, which is blown up to a Gaussian: at a radius known from its width."""
    size, side = 9, 400
    boxes = panels(tmp_path / "even.png", 1, (side, side))
    alphas = np.zeros((1, size, size))
    alphas[0, 4, 4] = 1
    pixels = draw(tmp_path / "peak.png", alphas.reshape(1, -1), (side, side))
    left, top, width, height = boxes[0]
    panel = pixels[top : top + height, left : left + width]
    ys, xs = np.nonzero((abs(panel - (255, 184, 28)) < 40).all(-1))
    radius = np.hypot(xs - (width - 1) / 2, ys - (height - 1) / 2) / (width / size)
    # one place of a grid, weighed against its neighbours by Gaussians of 0.65 places

    def weight(x):
        return np.exp(-0.5 * ((x - np.arange(-4, 5)) / 0.65) ** 2)

    share = [weight(x)[4] / weight(x).sum() for x in np.linspace(0, 2, 2001)]
    half = np.interp(-0.5, -np.array(share) / share[0], np.linspace(0, 2, 2001))
    across = radius[abs(ys - (height - 1) / 2) < 2]
    assert len(across) and np.allclose(across, half, atol=0.08)


def test_drawing_touches_nothing_shared(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    photograph = Image.linear_gradient("L").convert("RGB")
    before = photograph.tobytes()
    draw_attention(photograph, ["a", "b"], even(2))
    assert photograph.tobytes() == before and photograph.size == (256, 256)
