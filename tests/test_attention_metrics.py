"""Measures of attention against points on a fine grid, scipy, and counting by hand."""

import math
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attention_metrics
import attention_report
import parts_of_speech
from regions import Region, Regions


def boxes(found, *names):
    """`Regions` of {word: box} of each image, complete where names are given."""
    own = [{word: Region.of_boxes([box]) for word, box in image.items()} for image in found]
    return Regions(own, frozenset(names) or None)


def test_the_pointing_game_counts_peaks_inside_the_named_objects_box():
    corner = np.zeros(16)
    corner[3] = 1.0  # of the 4×4 grid the top right place, centre (0.875, 0.125)
    even = np.full(16, 1 / 16)  # peaks nowhere: the centre of the picture
    caption = (["a", "star", "heart", "cross"], np.stack([corner, corner, even, corner]))
    found = [{"star": [0.8, 0.0, 1.0, 0.2], "heart": [0.0, 0.0, 0.4, 0.4]}]
    game = attention_metrics.pointing_game([caption], boxes(found, "star", "heart", "cross"))
    assert (game.hits, game.words) == (1, 3)  # the heart is missed, there is no cross
    assert game.chance == pytest.approx((0.2 * 0.2 + 0.4 * 0.4) / 3)
    # where it is not known that all is told, what is not told does not count
    assert attention_metrics.pointing_game([caption], boxes(found))[:2] == (1, 2)


def test_the_peak_of_places_blown_up_from_a_coarser_grid_is_their_middle():
    alphas = np.kron([[0, 1], [0, 0]], np.ones((2, 2))).reshape(1, 16) / 4
    found = boxes([{"star": [0.74, 0.24, 0.76, 0.26]}])
    assert attention_metrics.pointing_game([(["star"], alphas)], found).hits == 1


def test_no_named_object_is_no_game():
    captions = [(["a"], np.ones((1, 4)))]
    for known in (boxes([{}], "star"), boxes([{}]), Regions([None])):
        assert attention_metrics.pointing_game(captions, known) == (0, 0, 0.0)
        assert all(map(math.isnan, attention_metrics.mass_in_regions(captions, known)))


@settings(max_examples=50)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_mass_in_boxes_is_the_integral_over_their_union(size, count, seed):
    """Against a grid of points, each in one place."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(-0.2, 1.2, (count, 2, 2)), axis=1).reshape(count, 4)
    alpha = rng.dirichlet(np.ones(size**2))
    fine = (np.arange(400) + 0.5) / 400
    inside = np.zeros((400, 400), bool)
    for x0, y0, x1, y1 in corners:
        inside |= np.outer((y0 <= fine) & (fine <= y1), (x0 <= fine) & (fine <= x1))
    place = (fine * size).astype(int)
    density = alpha.reshape(size, size)[np.ix_(place, place)] * size**2
    region = Region.of_boxes(corners)
    mass, area = attention_metrics.mass_in_regions(
        [(["a", "star"], np.stack([alpha, alpha]))], Regions([{"star": region}])
    )
    assert mass == pytest.approx((density * inside).mean(), abs=0.02)
    assert area == pytest.approx(region.area)
    assert area == pytest.approx(inside.mean(), abs=0.01)
    for x, y in rng.uniform(0, 1, (5, 2)):
        assert region.contains(x, y) == any(
            x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in corners
        )


@settings(max_examples=50)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_a_mask_is_the_boxes_of_its_ones(rows, columns, size, seed):
    mask = np.random.default_rng(seed).random((rows, columns)) < 0.5
    ones = [
        [c / columns, r / rows, (c + 1) / columns, (r + 1) / rows] for r, c in np.argwhere(mask)
    ]
    own = Region.of_mask(mask)
    assert own.area == pytest.approx(mask.mean())
    if ones:
        assert own.shares(size) == pytest.approx(Region.of_boxes(ones).shares(size))


def test_the_median_image_is_by_peaks_then_by_attention():
    there = [{"star": [0, 0, 0.5, 0.5]}] * 4 + [{}]
    alphas = [[0.7, 0.3, 0, 0], [0.2, 0.8, 0, 0], [0.6, 0.4, 0, 0], [0.4, 0.6, 0, 0]]
    captions = [(["star"], np.array([alpha])) for alpha in [*alphas, [1, 0, 0, 0]]]
    # from the least: the second, the fourth, both misses, then the third and the first
    assert attention_metrics.median_image(captions, boxes(there)) == 3
    assert attention_metrics.median_image(captions[:3], boxes(there[:3])) == 2
    # a star that is not there is a miss, which the third was not
    assert attention_metrics.median_image(captions, boxes(there, "star")) == 3
    assert attention_metrics.median_image(captions[4:], boxes(there[4:])) is None


def test_mass_counts_words_whose_object_is_there():
    captions = [(["star", "heart"], np.eye(2, 4)), (["star"], np.eye(1, 4))]
    found = [{"star": [0, 0, 0.5, 0.5]}, {"heart": [0, 0, 1, 1]}]
    known = boxes(found, "star", "heart")
    assert attention_metrics.mass_in_regions(captions, known) == (1.0, 0.25)


def test_evenness_is_scipys_entropy():
    alphas = np.random.default_rng(0).dirichlet(np.ones(9), size=3)
    alphas[2] = np.eye(9)[4]  # one place
    expected = scipy.stats.entropy(alphas, axis=1) / math.log(9)
    assert attention_metrics.evenness(alphas) == pytest.approx(expected)
    assert attention_metrics.evenness(np.full((1, 9), 1 / 9)) == pytest.approx(1)
    assert attention_metrics.evenness(np.ones((2, 1))).tolist() == [1, 1]


def test_movement_is_scipys_distance_of_neighbours():
    alphas = np.random.default_rng(0).dirichlet(np.ones(9), size=4)
    moved = attention_metrics.movement(alphas)
    assert np.isnan(moved[0])
    for t in (1, 2, 3):
        distance = scipy.spatial.distance.cityblock(alphas[t], alphas[t - 1])
        assert moved[t] == pytest.approx(distance / 2)
    assert attention_metrics.movement(np.eye(2, 9))[1] == 1
    assert attention_metrics.movement(np.zeros((0, 9))).shape == (0,)


def test_movement_by_chance_is_the_mean_over_all_orders_of_each_captions_words():
    rng = np.random.default_rng(0)
    captions = [(["a"] * n, rng.dirichlet(np.ones(9), n)) for n in (4, 1, 3)]
    orders = [
        [attention_metrics.movement(alphas[list(order)])[1:] for order in permutations(range(n))]
        for n, (_, alphas) in zip((4, 1, 3), captions, strict=True)
    ]
    by_hand = np.concatenate([np.mean(moved, axis=0) for moved in orders]).mean()
    assert attention_metrics.movement_by_chance(captions) == pytest.approx(by_hand)
    assert math.isnan(attention_metrics.movement_by_chance(captions[1:2]))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_what_a_sentinel_takes_changes_no_measure_of_the_places(words, size, seed):
    rng = np.random.default_rng(seed)
    alphas, looked = rng.dirichlet(np.ones(size**2), words), rng.uniform(0.01, 0.99, words)
    one, other = ([(["star"] * words, own)] for own in (alphas, alphas * looked[:, None]))
    known = boxes([{"star": [0.1, 0.3, 0.7, 0.8]}])
    for measure in (attention_metrics.pointing_game, attention_metrics.mass_in_regions):
        assert measure(other, known) == pytest.approx(measure(one, known))
    for measure in (attention_metrics.evenness, attention_metrics.movement):
        assert measure(other[0][1]) == pytest.approx(measure(alphas), nan_ok=True)
    chance = attention_metrics.movement_by_chance
    assert chance(other) == pytest.approx(chance(one), nan_ok=True)
    assert attention_metrics.away(other[0][1]) == pytest.approx(1 - looked)
    assert attention_metrics.away(alphas) is None
    assert attention_metrics.away(alphas.astype(np.float32)) is None
    # but for what the regulariser sees
    uneven = ((1 - other[0][1].sum(0)) ** 2).mean()
    assert attention_metrics.coverage(other)[0] == pytest.approx(uneven)


def test_a_word_that_looks_at_no_place_is_as_one_that_looks_at_all_alike():
    alphas = np.stack([np.zeros(4), np.eye(4)[0]])
    assert attention_metrics.evenness(alphas).tolist() == [1, 0]
    assert attention_metrics.away(alphas).tolist() == [1, 0]
    captions, known = [(["star", "a"], alphas)], boxes([{"star": [0, 0, 0.5, 1]}])
    assert attention_metrics.mass_in_regions(captions, known) == (0.5, 0.5)


def test_the_attention_report_says_how_much_nouns_and_other_words_do_not_look():
    looked = np.array([0.25, 0.75, 0.35, 0.85])
    rng, words = np.random.default_rng(0), ["a", "dog", "and", "cat"]
    whole = rng.dirichlet(np.ones(16), 4).astype(np.float32)
    captions = [(words, whole * looked[:, None]), ([], np.zeros((0, 16))), (["snow"], whole[:1])]
    made = {2: [SimpleNamespace(words=w, alphas=torch.from_numpy(a)) for w, a in captions]}
    (title, rows), _ = attention_report.attention_tables(made, english=True)
    assert "at no place, which the other figures leave out" in title
    found = {row[""]: row["does not look"] for row in rows}
    assert found == {"beam 2, nouns": "13.3%", "beam 2, other words": "70.0%"}
    tags = attention_report.scalars(captions, english=True)
    assert tags["attention sentinel/nouns"] == pytest.approx((0.25 + 0.15 + 0) / 3)
    assert tags["attention sentinel/other words"] == pytest.approx(0.7)
    known = boxes([{"dog": [0, 0, 1, 1]}, {}, {}])
    assert "of the attention that is at a place" in attention_report.pointing_table(made, known)[0]

    plain = {2: [SimpleNamespace(words=words, alphas=whole)]}
    (title, rows), _ = attention_report.attention_tables(plain, english=True)
    assert "no place" not in title and all("does not look" not in row for row in rows)
    assert (
        "at a place"
        not in attention_report.pointing_table(
            plain, known._replace(of_images=known.of_images[:1])
        )[0]
    )
    assert not any("sentinel" in tag for tag in attention_report.scalars([(words, whole)], True))


def test_the_edges_of_places_are_inside_a_region_on_both_sides():
    whole, half = Region.of_mask(np.ones((4, 4))), Region.of_boxes([[0, 0, 0.5, 1]])
    assert whole.contains(0.25, 0.5) and whole.contains(0, 1)
    assert half.contains(0.5, 0.5) and not half.contains(0.51, 0.5)


def test_coverage_is_the_regularisers_and_its_least():
    rng = np.random.default_rng(0)
    captions = [(["a"] * n, rng.dirichlet(np.ones(16), size=n)) for n in (3, 30)]
    uneven, least = attention_metrics.coverage(captions)
    by_hand = [((1 - alphas.sum(0)) ** 2).mean() for _, alphas in captions]
    assert uneven == pytest.approx(np.mean(by_hand))
    assert least == pytest.approx(((1 - 3 / 16) ** 2 + (1 - 30 / 16) ** 2) / 2)
    even = [(words, np.full_like(alphas, 1 / 16)) for words, alphas in captions]
    assert attention_metrics.coverage(even) == (pytest.approx(least), pytest.approx(least))


def test_nouns_are_told_from_other_words_where_they_stand():
    for caption, nouns in (
        ("a small red heart to the left of a blue cross", "heart left cross"),
        ("two dogs play in the snow", "dogs snow"),
        ("the play of a child", "play child"),
        ("a man in a <unk> shirt", "man <unk> shirt"),
    ):
        words = caption.split()
        kinds = parts_of_speech.kinds(words)
        found = [word for word, kind in zip(words, kinds, strict=True) if kind == "nouns"]
        assert set(found) - {"<unk>"} == set(nouns.split()) - {"<unk>"}
    assert parts_of_speech.kinds([]) == []
