"""A page about a data set, before input files are made of it: `create_input_files.py --preview`."""

import base64
import io
import random
from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import duplicates
import formats
from captioned import SPLITS, Captions, has_words, said, words_of
from groundwork.errors import UserError
from groundwork.files import atomic_write, make_folder
from groundwork.images import in_threads, open_image
from groundwork.progress import progress
from groundwork.wording import Complaints, counted
from report import render
from utils import base_name, check_name
from word_maps import Wanted, choose, describe
from word_rules import hint

OPTIONS = (
    "dataset", "captions", "image_folder", "captions_per_image", "min_word_freq", "max_len",
    "output_folder", "workers", "seed", "reading", "wanted",
)  # fmt: skip
THUMBNAIL = 200  # pixels along the longer side
WORDS, IMAGES, GROUPS, ALIKE = 40, 60, 30, 6  # that are shown, at most
STYLES = dict(zip(SPLITS, ("C0.-", "C1+--", "C2x:"), strict=True))


def write(
    dataset,
    captions,
    image_folder=None,
    captions_per_image=5,
    min_word_freq=5,
    max_len=50,
    output_folder="data",
    workers=None,
    seed=0,
    reading=None,
    wanted=None,
):
    """Writes the page `preview_….html`, which holds all that it shows, and prints its path and the
    most important of it.

    The arguments are those of `utils.create_input_files`, of which no other file is written; images
    that cannot be read are on the page, too.

    Returns:
        path of the page.

    Raises:
        UserError: the captions are unusable, or the page cannot be written.
    """
    check_name(dataset)
    data = formats.read(captions, image_folder, reading, seed)
    people = Captions(data.images)
    rule, word_map, counts = choose(people, min_word_freq, wanted or Wanted(), data.source)
    groups, faults = alike(data.images, workers)
    leaks = leakage(data.images, groups)
    notes = list(filter(None, [hint(rule, counts)]))
    base = base_name(dataset, captions_per_image, min_word_freq)
    path = Path(output_folder) / f"preview_{base}.html"
    chosen = random.Random(seed).sample(range(len(data.images)), min(IMAGES, len(data.images)))
    page = render(
        "preview.html",
        title=f"{dataset}: {counted(len(data.images), 'image')}",
        about=[f"of {data.source}", *data.notes, describe(word_map), *notes],
        rows=table(data.images, rule, word_map, max_len),
        lengths=draw_lengths(data.images, rule, max_len),
        frequent=counts.most_common(WORDS),
        rarest=rarest(counts),
        shares=shares(counts, word_map),
        faults=faults,
        leaks=leaks,
        groups=[(list(map(shown, own[:ALIKE])), len(own)) for own in groups[:GROUPS]],
        more_groups=max(0, len(groups) - GROUPS),
        images=[shown(data.images[i]) for i in sorted(chosen)],
    )
    make_folder(path.parent)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print("\n".join([*data.notes, *notes, *leaks, *faults, f"preview: {path}"]))
    return path


# --------------------------------------------------------------------------------------- images


def alike(images, workers=None):
    """Lists of images that look the same, those first that stand in several splits, and lines on
    images that cannot be read.

    Args:
        images: `captioned.CaptionedImage`s.
        workers: threads that read; None: one for each core.
    """

    def read(image):
        try:
            return duplicates.image_hash(open_image(image.source))
        except UserError as error:
            return str(error)

    readable, hashes, faults = [], [], []
    bar = progress(total=len(images), desc="reading images", unit="image")
    with bar, Complaints(faults.append) as complaints:
        for image, found in zip(images, in_threads(read, images, workers), strict=True):
            if isinstance(found, str):
                complaints.add(found)
            else:
                readable.append(image)
                hashes.append(found)
            bar.update()
    groups = [[readable[i] for i in own] for own in duplicates.groups_of(np.array(hashes))]
    groups.sort(key=lambda own: -len({image.split for image in own}))
    return groups, faults


def leakage(images, groups):
    """Lines on images that look the same, within splits and across them.

    Args:
        groups: lists of images that look the same.
    """
    lines = []
    for split in SPLITS:
        within = sum(max(0, sum(image.split == split for image in group) - 1) for group in groups)
        if within:
            are = counted(within, "image looks", "images look")
            lines.append(f"within {said(split)} {are} like another")
    for split, others in (("TEST", ["TRAIN"]), ("TEST", ["VAL"]), ("VAL", ["TRAIN"])):
        total = sum(image.split == split for image in images)
        again = sum(
            image.split == split
            for group in groups
            if any(image.split in others for image in group)
            for image in group
        )
        if total:
            lines.append(
                f"{again} of {counted(total, f'{said(split)} image')} "
                f"{'looks' if again == 1 else 'look'} like one in {said(others[0])}"
                + (f", {again / total:.1%}" if again else "")
            )
    return lines


def shown(image):
    """What the page shows of an image, a dict."""
    about = {"file": image.name, "split": said(image.split), "picture": None, "size": ""}
    about["captions"] = [caption.text for caption in image.captions]
    try:
        picture = open_image(image.source)
    except UserError:
        return about | {"size": "cannot be read"}
    about["size"] = f"{picture.width} × {picture.height}"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    contents = io.BytesIO()
    picture.save(contents, format="JPEG", quality=85)
    encoded = base64.b64encode(contents.getvalue()).decode()
    return about | {"picture": f"data:image/jpeg;base64,{encoded}"}


# ------------------------------------------------------------------------------------- captions


def table(images, rule, word_map, max_len):
    """A row of figures for each split: column -> text."""
    rows = []
    for split in SPLITS:
        own = [image for image in images if image.split == split]
        captions = [caption for image in own for caption in image.captions]
        words = [words_of(caption, rule) for caption in captions]
        every = [word for caption in words for word in caption]
        unknown = sum(word not in word_map for word in every)
        per_image = [len(image.captions) for image in own]
        rows.append(
            {
                "": said(split),
                "images": f"{len(own):,}",
                "captions": f"{len(captions):,}",
                "captions an image": _range(per_image),
                "words a caption": _range(list(map(len, words))),
                f"of more than {max_len}": f"{sum(len(own) > max_len for own in words):,}",
                "wordless": f"{sum(not has_words(caption, rule) for caption in captions):,}",
                "words": f"{len(every):,}",
                "distinct words": f"{len(set(every)):,}",
                "<unk>": f"{unknown / len(every):.2%}" if every else "–",
            }
        )
    return rows


def _range(numbers):
    """The mean of numbers, and from which to which they are."""
    return f"{mean(numbers):.1f} ({min(numbers)} to {max(numbers)})" if numbers else "–"


def rarest(counts):
    """(how often, how many words come so often, some of them) of the rarest words."""
    by_count = {}
    for word, count in counts.items():
        by_count.setdefault(count, []).append(word)
    return [(n, len(by_count[n]), by_count[n][:WORDS]) for n in sorted(by_count)[:5]]


def shares(counts, word_map):
    """Lines, (what, figure), on the words that the vocabulary has."""
    known = sum(word in word_map for word in counts)
    covered = sum(count for word, count in counts.items() if word in word_map)
    total, seen = counts.total(), Counter(counts.values())
    return [
        ("Distinct words of the captions", f"{len(counts):,}"),
        ("of which the vocabulary has", f"{known:,}, {known / len(counts):.1%}"),
        ("of which come once", f"{seen[1]:,}, {seen[1] / len(counts):.1%}"),
        ("All words of the captions", f"{total:,}"),
        ("of which are <unk>", f"{total - covered:,}, {1 - covered / total:.2%}"),
    ]


def draw_lengths(images, rule, max_len):
    """A matplotlib figure: the share of captions of each length, by split."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    for split in SPLITS:
        captions = [c for image in images if image.split == split for c in image.captions]
        if captions:
            lengths = np.bincount([len(words_of(caption, rule)) for caption in captions])
            share = 100 * lengths / len(captions)
            axes.plot(share, STYLES[split], label=said(split))
    if axes.get_xlim()[1] > max_len:
        axes.axvline(max_len, color="0.5", linestyle=":", label="--max_len")
    axes.set_xlabel("words in a caption")
    axes.set_ylabel("% of captions")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
