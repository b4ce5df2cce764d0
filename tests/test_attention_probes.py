"""Changed pictures, with a decoder whose log p is known in closed form."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

import attention_probes
import attention_report
from captioner import Caption, Captioner
from contract import Forward

GRID, SIDE = 4, 32
CAPTION = ["a", "dog"]


class Encoder:
    """Annotation vectors are the mean brightness of the 4×4 places."""

    @staticmethod
    def features(images):
        bright = images.float().mean(dim=1).unflatten(1, (GRID, -1)).unflatten(3, (GRID, -1))
        return bright.mean(dim=(2, 4))[..., None]


class Decoder(torch.nn.Module):
    """Word t's score is the brightness of place t, and its attention looks where it is bright."""

    looked = 1  # how much of the attention is at a place

    def forward(self, encoder_out, captions, lengths):
        places = encoder_out.flatten(1)
        steps = int(lengths.max()) - 1
        scores = places.new_zeros(len(places), steps, len(WORDS))
        for t in range(steps):
            rows = torch.arange(len(places))
            scores[rows, t, captions[:, t + 1]] = places[:, t] / 10
        alphas = self.looked * places / places.sum(dim=1, keepdim=True)
        alphas = alphas[:, None].expand(-1, steps, -1)
        return Forward(pack_padded_sequence(scores, lengths - 1, batch_first=True), None, alphas)


@pytest.fixture
def model():
    return Captioner(Encoder(), Decoder(), WORDS, SIDE, torch.device("cpu"), False, {})


def picture(values):
    """uint8 (3, SIDE, SIDE) of the brightness of 4×4 places."""
    image = np.kron(np.reshape(values, (GRID, GRID)), np.ones((SIDE // GRID,) * 2))
    return torch.from_numpy(np.repeat(image[None].astype(np.uint8), 3, axis=0))


def log_p(score):
    """Of a word with that score among others of 0."""
    return score - np.log(np.exp(score) + len(WORDS) - 1)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_log_p_falls_when_the_place_of_the_word_is_blotted_out(seed):
    rng = np.random.default_rng(seed)
    model = Captioner(Encoder(), Decoder(), WORDS, SIDE, torch.device("cpu"), False, {})
    image = picture(rng.integers(0, 256, 16))
    alphas = torch.from_numpy(rng.dirichlet(np.ones(16), 2)).float()
    found = attention_probes.deletion(
        model, image, Caption(CAPTION, 0.0, alphas), torch.Generator().manual_seed(0)
    )
    values = image[0, :: SIDE // GRID, :: SIDE // GRID].flatten().double().numpy()
    mean = round(float(image[0].float().mean()))
    for name, sign in (("most attended", -1), ("least attended", 1)):
        ranks = (sign * alphas.numpy()).argsort(axis=1).argsort(axis=1)
        for t in range(2):
            for k, share in enumerate((0, *attention_probes.SHARES)):
                left = mean if ranks[t, t] < round(16 * share) else values[t]
                assert found[name][t, k] == pytest.approx(log_p(left / 10), abs=1e-4)


def test_places_that_are_attended_alike_are_blotted_out_in_a_random_order(model):
    even = Caption(CAPTION, 0.0, torch.full((2, 16), 1 / 16))
    image = picture(np.eye(1, 16) * 255)  # the first word's place is the first
    fallen = []
    for seed in range(40):
        orders = attention_probes.deletion(model, image, even, torch.Generator().manual_seed(seed))
        assert all(np.array_equal(values, orders["random"]) for values in orders.values())
        fallen.append(orders["random"][0, 3] < orders["random"][0, 0])
    assert 10 < sum(fallen) < 30  # half of the places are blotted out


def test_the_random_order_is_not_the_attentions(model):
    image = picture(np.eye(1, 16) * 255)
    first = Caption(CAPTION, 0.0, torch.eye(2, 16))  # the first word looks at its own place
    fallen = {name: 0 for name in attention_probes.ORDERS}
    for seed in range(40):
        found = attention_probes.deletion(model, image, first, torch.Generator().manual_seed(seed))
        for name, log_probs in found.items():
            fallen[name] += log_probs[0, 3] < log_probs[0, 0]  # half of the places blotted out
    assert fallen["most attended"] == 40 and fallen["least attended"] == 0
    assert 10 < fallen["random"] < 30


def test_a_blot_has_the_mean_colour(model):
    image = picture(np.arange(16))
    blotted = attention_probes.blot_out(image, torch.arange(16) == 5)
    assert torch.equal(blotted, picture([8 if i == 5 else i for i in range(16)]))


def test_attention_stays_on_its_half_where_the_own_image_alone_is_bright(model):
    bright, dark = picture(np.full(16, 200)), picture(np.zeros(16))
    half, peak = attention_probes.own_half(model, bright, dark, CAPTION)
    assert half == pytest.approx([1, 1]) and peak == pytest.approx([1, 1])
    half, peak = attention_probes.own_half(model, dark, bright, CAPTION)
    assert half == pytest.approx([0, 0]) and peak == pytest.approx([0, 0])
    half, peak = attention_probes.own_half(model, bright, bright, CAPTION)
    assert half == pytest.approx([0.5, 0.5]) and peak == pytest.approx([0.5, 0.5])
    model.decoder.looked = 0.25  # a sentinel has the rest
    half, peak = attention_probes.own_half(model, bright, bright, CAPTION)
    assert half == pytest.approx([0.5, 0.5]) and peak == pytest.approx([0.5, 0.5])
    third = picture(np.full(16, 100))
    half, _ = attention_probes.own_half(model, bright, third, CAPTION)
    assert half == pytest.approx([2 / 3] * 2, abs=1e-3)


def test_probes_are_of_the_first_images_and_their_tables_of_their_words(model):
    data = [(picture(np.full(16, value)),) for value in (200, 100, 50)]
    captions = [
        Caption(words, 0.0, torch.full((len(words), 16), 1 / 16)) for words in (CAPTION, [], ["a"])
    ]
    probes = attention_probes.probe(model, data, captions, 9)
    assert [probe.words for probe in probes] == [CAPTION, ["a"]]
    deleted, (_, pairs) = attention_report.probe_tables(probes, True, "beam 3")
    assert [row[""] for row in pairs] == ["nouns", "other words"]
    # bright beside half as bright; dim beside four times as bright
    assert pairs[0]["attention"] == "66.7%"
    assert pairs[1]["attention"] == f"{(2 / 3 + 1 / 5) / 2:.1%}"
    assert all(row[share] == "0.00" for row in deleted[1] for share in ("10%", "90%"))
    [alone] = attention_probes.probe(model, data, captions, 1)
    assert np.isnan(alone.own_half).all()
    [_] = attention_report.probe_tables([alone], False, "beam 3")  # no pairs of one image
    drawn = attention_report.draw_deletion(probes, english=True)
    assert [axes.get_title() for axes in drawn.axes] == ["nouns", "other words"]


def test_a_decoder_without_attention_has_no_report():
    caption = SimpleNamespace(words=["a"], alphas=None)
    for whole, lines in ((False, 0), (True, 1)):
        found = attention_report.measure({1: [caption]}, [{}], None, whole)
        assert found.tables == [] and len(found.notes) == lines
