"""A page about a model's captions of a split, that opens from disk: `eval.py --report`."""

import base64
import io
import random
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import metrics
import pictures
from attention_metrics import at_places, away
from datasets import as_photographed, read_references
from groundwork.files import atomic_write, make_folder
from groundwork.wording import counted
from input_files import input_paths
from word_rules import rule_of

WEB = Path(__file__).parent / "web"
VIEWER = WEB / "attention_view.js"  # the element <attention-view>
THUMBNAIL = 256  # pixels along a side, at most
EXAMPLES = 3  # best, worst and random ones


def page_path(folder):
    """Path of the page in the report's folder."""
    return Path(folder) / "index.html"


def write(path, word_map, data, captions, beams, about, scores, logs, trained=True,
    probed=None, changed=None,
):  # fmt: skip
    """Writes the page, which holds all that it shows, pictures too.

    Args:
        path: from `page_path`; its folder is made if it is missing.
        word_map: word -> index, of the model.
        data: `datasets.CaptionDataset` of the split, from images.
        captions: beam_size -> for each image its best `captioner.Caption`. The page shows those of
            the widest beam.
        beams: for each image all captions of the widest beam, the best first.
        about: lines on where the captions come from.
        scores: `evaluation.Scores` of these captions, with all tables that the page is to have.
        logs: model's name -> records of its training, one an epoch; may be empty.
        trained: whether the data set is the model's, whose training captions tell what is new.
        probed: `attention_report.Findings` on whether words depend on where the model looked.
        changed: `robustness.Findings`, what the model makes of changed images, if it is known.

    Raises:
        UserError: it cannot be written.
    """
    rule = rule_of(word_map)
    name = dict(zip(captions, scores.each, strict=True))[max(captions)]
    captions = captions[max(captions)]
    references = [reference["captions"] for reference in data.references]
    texts = [caption.text for caption in captions]
    smoothed = metrics.smoothed_bleu(references, texts, rule.split)
    each = scores.each[name] | {"smoothed BLEU-4": smoothed}
    rank = "CIDEr-D" if "CIDEr-D" in each else "smoothed BLEU-4"
    columns = [name for name in ("CIDEr-D", "METEOR", "ROUGE-L", "SPICE") if name in each]
    columns.append("smoothed BLEU-4")
    examples = [
        example(data, i, beams[i], {name: each[name][i] for name in columns})
        for i in range(len(data))
    ]
    order = sorted(range(len(data)), key=lambda i: each[rank][i], reverse=True)
    page = render(
        "report.html",
        viewer=VIEWER.read_text(encoding="utf-8"),
        title=f"{data.base}: {counted(len(data), 'caption')}, {name}",
        about=about,
        scores=scores,
        totals=totals(columns),
        curves={name: pictures.curves(log) for name, log in logs.items() if log},
        probed=probed,
        language=language(
            texts, references, training_captions(data) if trained else None, word_map
        ),
        lengths=draw_lengths(texts, references, rule.split),
        changed=changed,
        changed_picture=changed and _data_url("image/png", changed.picture.read_bytes()),
        rank=rank,
        groups=groups(order),
        contents={"columns": columns, "rank": rank, "examples": examples},
    )
    make_folder(path.parent)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def groups(order):
    """Heading -> numbers of the images that the page shows under it, of all, the best first."""
    return {
        "Best": order[:EXAMPLES],
        "Worst": order[: -EXAMPLES - 1 : -1],
        "Random": random.Random(0).sample(order, min(EXAMPLES, len(order))),
    }


def render(template, **values):
    """A page of a template in `web/`, text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(WEB),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["picture"] = _picture
    return environment.get_template(template).render(**values)


def totals(columns):
    """A line on which scores of the split are means of the captions' own, in `columns`."""
    counted = "BLEU-1 to BLEU-4" + (" and METEOR" if "METEOR" in columns else "")
    means = [name for name in columns if name in ("CIDEr-D", "ROUGE-L", "SPICE")]
    line = f"{counted} of a split are worked out from counts over all its captions"
    line += ": they are not the means of single captions' scores"
    return f"{line}; {' and '.join(means)} are." if means else f"{line}."


def example(data, i, beam, scores):
    """What the page shows of image i, whose best caption is the beam's first, for JSON."""
    image, *_ = data[i]
    reference = data.references[i]
    image = as_photographed(image.numpy(), reference)
    return {
        "file": reference["filename"],
        "view": attention_view(image, beam[:1], THUMBNAIL),
        "caption": beam[0].text,
        "human": reference["captions"],
        "beams": [[caption.text, round(caption.log_prob, 2)] for caption in beam],
        "scores": {name: round(100 * score, 1) for name, score in scores.items()},
    }


def attention_view(image, captions, size):
    """The attribute `data` of the element <attention-view>, as a dict for JSON.

    Args:
        image: RGB PIL.Image.
        captions: with `words`, T strings, `text`, which they make, `log_prob`, and `alphas`, a
            (T, L) array or tensor of non-negative numbers, L = places², rows that sum to one or
            less; or None.
        size: pixels along the image's longer side, at most.
    """
    image, picture = image.copy(), io.BytesIO()
    image.thumbnail((size, size))
    image.save(picture, format="JPEG", quality=85)
    return {
        "image": _data_url("image/jpeg", picture.getvalue()),
        "captions": [
            {
                "words": list(caption.words),
                "text": caption.text,
                "alphas": None if caption.alphas is None else _encode(caption.alphas),
                "away": None if caption.alphas is None else _away(caption.alphas),
                "log_prob": round(caption.log_prob, 2),
            }
            for caption in captions
        ],
    }


def _away(alphas):
    """How much each word does not look, where the attention has a sentinel, else None."""
    shares = away(alphas)
    return None if shares is None else shares.round(4).tolist()


def _encode(alphas):
    """Base64 of 16 bits each, the lower byte first, each word's 65535 at the greatest."""
    alphas = at_places(alphas)
    levels = np.rint(65535 * alphas / alphas.max(axis=1, keepdims=True)).astype("<u2")
    return base64.b64encode(levels.tobytes()).decode()


def _data_url(kind, contents):
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"


def _picture(figure):
    """A matplotlib figure as the address of an SVG, on the page's own background."""
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None}, transparent=True)
    return _data_url("image/svg+xml", picture.getvalue())


# ------------------------------------------------------------------------------------- language


def training_captions(data):
    """All human captions of the training split; None where its files are missing."""
    paths = input_paths(data.path.parent, data.base, "REFERENCES", "TRAIN")
    if not paths[0].exists():
        return None
    return [text for path in paths for r in read_references(path) for text in r["captions"]]


def language(captions, references, training, word_map):
    """Lines, (what, figure, note), on the words of captions and on how they repeat each other."""
    use, rule = metrics.vocabulary_use(captions, references, word_map), rule_of(word_map)
    repeated, most = metrics.repeated(captions, rule=rule)
    lines = [
        ("Words of the vocabulary that the captions use", _share(use.said, use.known), ""),
        ("Distinct words of the human captions that the vocabulary has",
         _share(use.human_known, use.human), f"{use.covered:.1%} of all their words"),
        ("Captions that several images have", f"{repeated:.1%}",
         "; ".join(f"{count} × “{text}”" for text, count in most)),
    ]  # fmt: skip
    if training is None:
        return [*lines, ("Captions that are new", "unknown", "no training split at hand")]
    novel = metrics.novelty(captions, training, rule.split)
    return [*lines, ("Captions that are new", f"{novel:.1%}", "not among the training captions")]


def _share(part, whole):
    return f"{part:,} of {whole:,}, {part / max(whole, 1):.1%}"


def draw_lengths(captions, references, split):
    """A matplotlib figure: the share of captions of each length, the model's and people's, in the
    words that `split` makes of a text."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    human = [text for texts in references for text in texts]
    for name, texts, options in (
        ("human captions", human, {"color": "0.8"}),
        ("the model's", captions, {"color": "#1f77b4", "width": 0.4}),
    ):
        lengths = np.bincount([len(split(text)) for text in texts])
        axes.bar(range(len(lengths)), 100 * lengths / lengths.sum(), label=name, **options)
    axes.set_xlabel("words in a caption")
    axes.set_ylabel("% of captions")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
