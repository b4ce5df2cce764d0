"""Tables and a figure on where a model looked: `eval.py --attention_report`."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import attention_metrics
import parts_of_speech
from attention_probes import ORDERS, SHARES, probe
from contract import Decoder
from evaluation import name_of
from groundwork.wording import counted, figure
from metrics import are_english
from word_rules import KARPATHY

COLOURS = dict(zip(ORDERS, ("#d62728", "0.5", "#1f77b4"), strict=True))


class Findings(NamedTuple):
    """What is known of a model's attention."""

    tables: list[tuple[str, list[dict]]]  # title, and rows as `groundwork.tables` prints them
    notes: list[str]  # lines, of what cannot be computed, too
    curves: Figure | None = None  # of deletion


def measure(
    captions, references, regions=None, whole=False, look=None, blind=Decoder.blind, rule=KARPATHY
):
    """`Findings` from the attention alone.

    Args:
        captions: beam_size -> for each image its `captioner.Caption`.
        references: of the images, with `filename` and `captions`.
        regions: `regions.Regions` of the images, or None.
        whole: whether more is asked for than the pointing game.
        look: as `evaluation.name_of` takes it.
        blind: why captions have no alphas where they have none, `contract.Decoder.blind`.
        rule: `word_rules.Rule` of the captions' words.
    """
    if not _has_attention(captions):
        asked = whole or (regions is not None and regions.names is None)
        return Findings([], [f"no attention report: {blind}"] * asked)
    tables, notes = [], []
    if regions is not None:
        tables.append(pointing_table(captions, regions, look))
        widest = name_of(max(captions), look)
        median = attention_metrics.median_image(_looks(captions, look)[widest], regions)
        if median is None:
            notes.append("no caption has a word that the regions of its image are of")
        else:
            name = references[median]["filename"]
            notes.append(f"{widest}: the pointing game's median image is {name}")
    if whole:
        english = tells_nouns(references, rule)
        tables += attention_tables(captions, english, look)
        if not english:
            pieces = "" if rule.whole else ", and where words are whole"
            notes.append(f"nouns are told from other words in English alone{pieces}")
    return Findings(tables, notes)


def probe_words(model, data, captions, count):
    """`Findings` on whether words depend on where the model looked; of several processes all call
    it.

    Args:
        model: a `captioner.Captioner` of a decoder with attention.
        data: an `evaluation_data.EvaluationData`.
        captions: as in `measure`; those of the widest beam are tried.
        count: of how many images.
    """
    widest, english = max(captions), tells_nouns(data.references, model.rule)
    probes = probe(model, data, captions[widest], count)
    if not probes:
        return Findings([], ["no deletion and no pairs: the captions have no words"])
    tables = probe_tables(probes, english, name_of(widest, model.look))
    notes = ["no pairs: they take two images"] if len(tables) == 1 else []
    return Findings(tables, notes, draw_deletion(probes, english))


def pointing_table(captions, regions, look=None):
    """How well the attention points at what a word names, beside a random point and an even one.

    Args:
        captions: beam_size -> for each image its `captioner.Caption`.
        regions: `regions.Regions` of the images, of which some are known.
        look: as `evaluation.name_of` takes it.

    Returns:
        title, and a row for each beam width, as `groundwork.tables` prints them.
    """
    rows, seen = [], ""
    for name, found in _looks(captions, look).items():
        if _away(found) is not None:
            seen = " (of the attention that is at a place)"
        words, shares = _pointing(found, regions)
        row = {"": name} | {k: figure(v, ".1%") for k, v in shares.items()}
        rows.append(row | {"peak": f"{row['peak']} of {counted(words, 'word')}"})
    images = f"{regions.known} of {counted(len(regions.of_images), 'image')}"
    title = f"pointing game: for a word that names something, how much is {regions.about}{seen}"
    return f"{title}, {images}", rows


def attention_tables(captions, english, look=None):
    """What the attention is like: how even for each word, how it moves, over each caption.

    Args:
        captions, look: as in `pointing_table`.
        english: whether nouns can be told from other words.
    """
    spread, covered = [], []
    for name, found in _looks(captions, look).items():
        places = found[0][1].shape[1]
        kinds = [_kinds(words, english) for words, _ in found]
        even = _by_kind(kinds, [attention_metrics.evenness(alphas) for _, alphas in found])
        moved = _by_kind(kinds, [attention_metrics.movement(alphas) for _, alphas in found])
        away = _away(found)
        unseen = {} if away is None else _by_kind(kinds, away)
        chance = attention_metrics.movement_by_chance(found)
        spread += [
            {
                "": f"{name}, {kind}",
                "words": str(len(even[kind])),
                "entropy / ln L": figure(_mean(even[kind]), ".1%"),
                "moves": figure(_mean(moved[kind]), ".1%"),
                "in random order": figure(chance, ".1%"),
            }
            | ({"does not look": figure(_mean(unseen[kind]), ".1%")} if unseen else {})
            for kind in even
        ]
        uneven, least = attention_metrics.coverage(found)
        row = {"": name, "(1 - Σα)²": f"{uneven:.3f}"}
        covered.append(row | {"least possible": f"{least:.3f}"})
    return [
        (
            f"attention over {places} places: its entropy, 100% where it is even and 0% at one "
            "place; how much of it is elsewhere than for the word before, 0% where it is even"
            + "; how much of it is at no place, which the other figures leave out"
            * bool(unseen),
            spread,
        )
    ] * bool(spread) + [
        ("Σα at a place, over a caption's words: what --alpha_c pulls towards 1", covered),
    ]


def scalars(captions, english, regions=None):
    """What TensorBoard is told: tag -> value, each beside what chance or an even attention has.

    Args:
        captions: (words, alphas) of each image; of a decoder without attention alphas is None.
        english, regions: as in `attention_tables` and `pointing_table`.
    """
    if any(alphas is None for _, alphas in captions):
        return {}
    kinds = [_kinds(words, english) for words, _ in captions]
    found = {"movement/in random order": attention_metrics.movement_by_chance(captions)}
    for name in ("evenness", "movement"):
        measured = [getattr(attention_metrics, name)(alphas) for _, alphas in captions]
        for kind, values in _by_kind(kinds, measured).items():
            found[f"{name}/{kind}"] = _mean(values)
    if (away := _away(captions)) is not None:
        for kind, values in _by_kind(kinds, away).items():
            found[f"sentinel/{kind}"] = _mean(values)
    if regions is not None:
        _, shares = _pointing(captions, regions)
        found |= {f"pointing/{name}": share for name, share in shares.items()}
    return {f"attention {tag}": v for tag, v in found.items() if not math.isnan(v)}


def probe_tables(probes, english, name):
    """What changed pictures tell.

    Args:
        probes: of `attention_probes.probe`, at least one.
        english: as in `attention_tables`.
        name: of the captions.
    """
    kinds = [_kinds(probe.words, english) for probe in probes]
    fallen = [
        {"": f"{order} first, {kind}"}
        | {f"{share:.0%}": figure(fall, ".2f") for share, fall in zip(SHARES, falls, strict=True)}
        for order in ORDERS
        for kind, falls in _falls(probes, kinds, order).items()
    ]
    images = counted(len(probes), "image")
    tables = [
        (
            f"deletion, {name}, {images}: by how much log p of a word falls when such a share of "
            "the places is blotted out; random is what an even attention would have",
            fallen,
        )
    ]
    half = _by_kind(kinds, [probe.own_half for probe in probes])
    peaks = _by_kind(kinds, [probe.peak_in_own_half for probe in probes])
    rows = [
        {
            "": kind,
            "attention": figure(_mean(half[kind]), ".1%"),
            "peak": figure(_mean(peaks[kind]), ".1%"),
            "even": "50.0%",
        }
        for kind in half
        if half[kind]
    ]
    title = (
        f"pairs, {name}: of two images side by side, how much is on the half of the captioned one"
    )
    return tables + [(title, rows)] * bool(rows)


def draw_deletion(probes, english):
    """A matplotlib figure of the deletion curves, a panel for each kind of words."""
    kinds = [_kinds(probe.words, english) for probe in probes]
    curves = {order: _falls(probes, kinds, order) for order in ORDERS}
    shown = curves[ORDERS[0]]
    drawing = Figure(figsize=(max(6.4, 3.6 * len(shown)), 3), layout="constrained")
    panels = drawing.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, shown, strict=True):
        for order, falls in curves.items():
            shares = [0, *(100 * share for share in SHARES)]
            axes.plot(shares, [0, *-falls[kind]], label=f"{order} first", color=COLOURS[order])
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("% of the places blotted out")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("change of log p")
    lines = panels[0].get_lines()
    drawing.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return drawing


def _pointing(captions, regions):
    """How many words name something, and by name the shares of their peaks and of their attention
    that lie on it, each beside what chance would have; nan where there are none."""
    game = attention_metrics.pointing_game(captions, regions)
    hits, chance = (game.hits / game.words, game.chance) if game.words else (math.nan,) * 2
    mass, area = attention_metrics.mass_in_regions(captions, regions)
    shares = {"peak": hits, "random point": chance, "attention": mass, "even attention": area}
    return game.words, shares


def _away(captions):
    """How much of the attention for each word is at no place, an array for each caption; None where
    there is no sentinel."""
    alphas = [np.asarray(alphas) for _, alphas in captions]
    away = attention_metrics.away(np.concatenate(alphas))
    return None if away is None else np.split(away, np.cumsum(list(map(len, alphas)))[:-1])


def _has_attention(captions):
    """Whether the model that made captions, by beam width, looks at places."""
    return all(caption.alphas is not None for found in captions.values() for caption in found)


def tells_nouns(references, rule):
    """Whether nouns are told from other words: of English captions, in whole words."""
    return rule.whole and are_english([reference["captions"] for reference in references])


def _looks(captions, look):
    """Name in tables -> (words, alphas) of each caption."""
    return {
        name_of(beam_size, look): [(caption.words, caption.alphas) for caption in found]
        for beam_size, found in captions.items()
    }


def _kinds(words, english):
    """The kind of each word."""
    return parts_of_speech.kinds(words) if english else ["all words"] * len(words)


def _by_kind(kinds, values):
    """Kind -> the values of its words, without those that are nan.

    Args:
        kinds, values: for each caption those of its words.
    """
    found = {kind: [] for kind in sorted({kind for own in kinds for kind in own})}
    for own, numbers in zip(kinds, values, strict=True):
        for kind, number in zip(own, numbers, strict=True):
            if not np.isnan(number).any():
                found[kind].append(number)
    return found


def _falls(probes, kinds, order):
    """Kind -> by how much log p falls at each of `SHARES`, a mean over words."""
    values = [probe.log_probs[order][:, :1] - probe.log_probs[order][:, 1:] for probe in probes]
    return {kind: np.mean(own, axis=0) for kind, own in _by_kind(kinds, values).items()}


def _mean(values):
    return float(np.mean(values)) if values else math.nan
