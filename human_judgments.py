"""How well the metrics agree with people: Kendall's τ with the judgments of Flickr8k captions.

The files are those of `Flickr8k_text.zip` (Hodosh et al., 2013): `Flickr8k.token.txt`, all
captions; `ExpertAnnotations.txt`, captions that three experts judged for an image, from 1 to 4;
`CrowdFlowerAnnotations.txt`, the share of people who say that a caption describes an image.

The protocol is that of the published values (Anderson et al., 2016; Hessel et al., 2021, appendix
A): a caption is scored against the image's own. Experts: every judgment counts for itself, pairs
whose caption is among the image's own are left out, τ-c. Crowd: such captions are taken out of
the image's own instead, for all of that image's judgments, τ-b.
"""

import math
from pathlib import Path

from groundwork.errors import UserError, run
from groundwork.options import Parser
from groundwork.tables import print_table
from groundwork.wording import counted, figure

# In per cent, by Hessel et al. (2021), tables 1 and 2
PUBLISHED = {
    "expert": {
        "BLEU-1": 32.3, "BLEU-4": 30.8, "ROUGE-L": 32.3, "METEOR": 41.8, "CIDEr-D": 43.9,
        "SPICE": 44.9,
    },
    "crowdflower": {
        "BLEU-1": 17.9, "BLEU-4": 16.9, "ROUGE-L": 19.9, "METEOR": 22.2, "CIDEr-D": 24.6,
        "SPICE": 24.4,
    },
}  # fmt: skip


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--folder", required=True, help="with the three files of Flickr8k_text.zip, or two of them")
    return parser.parse_args()


def main():
    options = parse_arguments()
    folder = Path(options.folder)
    captions = read_captions(folder / "Flickr8k.token.txt")
    files = {
        "expert": (folder / "ExpertAnnotations.txt", read_expert, "c"),
        "crowdflower": (folder / "CrowdFlowerAnnotations.txt", read_crowdflower, "b"),
    }
    there = {name: file for name, file in files.items() if file[0].exists()}
    if not there:
        raise UserError(
            f"{folder} has no {' and no '.join(str(f.name) for f, *_ in files.values())}"
        )
    for name, (path, read, variant) in there.items():
        found, count, left_out = correlate(read(path), captions, variant, path)
        print(f"\n{path.name}: {counted(count, 'judgment')}; Kendall's τ-{variant} × 100")
        rows = [
            {
                "": metric,
                "here": figure(100 * tau, ".1f"),
                "published": f"{PUBLISHED[name][metric]}",
            }
            for metric, tau in found.items()
            if metric in PUBLISHED[name]
        ]
        if not rows:
            raise UserError("; ".join(left_out))
        print_table(rows)
        for line in left_out:
            print(line)


def read_captions(path):
    """Image -> its captions by id, of lines `name.jpg#number<tab>caption`."""
    captions = {}
    for _, (id_, text) in _lines(path, 2):
        captions.setdefault(_image(id_), {})[id_] = " ".join(text.split())
    return captions


def _image(name):
    """An image's name without ending and number: some files have `.jpg.1`."""
    return name.partition(".")[0]


def read_expert(path):
    """Yields (image, caption's id, judgment 1 to 4), of lines `image<tab>id<tab>1<tab>2<tab>3`."""
    for line, (image, id_, *judgments) in _lines(path, 5):
        for judgment in judgments:
            yield image, id_, _number(judgment, path, line)


def read_crowdflower(path):
    """Yields (image, caption's id, share), of lines `image<tab>id<tab>share<tab>yes<tab>no`."""
    for line, (image, id_, share, *_) in _lines(path, 5):
        yield image, id_, _number(share, path, line)


def _lines(path, columns):
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        values = line.split("\t")
        if len(values) != columns:
            raise UserError(f"{path}, line {number}: not {columns} columns with tabs between")
        yield number, values


def _number(text, path, line):
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise UserError(f"{path}, line {line}: {text!r} is no number")


def correlate(judgments, captions, variant, path):
    """Metric -> Kendall's τ, NaN where it is undefined; how many judgments counted; and lines on
    what is undefined or left out.

    Args:
        judgments: (image, caption's id, judgment).
        captions: from `read_captions`.
        variant: of τ: "c", where captions among the image's own are left out, or "b".
        path: of the judgments, for errors.
    """
    # here, as they take seconds that --help does without
    from scipy.stats import kendalltau

    import metrics

    found, judged = [], {}
    for image, id_, judgment in judgments:
        try:
            text, own = captions[_image(id_)][id_], captions[_image(image)].values()
        except KeyError as error:
            raise UserError(f"{path} names {error}, which is not in the captions") from error
        if text not in own:
            found.append((image, id_, text, judgment))
        elif variant == "b":
            found.append((image, id_, text, judgment))
            judged.setdefault(image, set()).add(text)
    pairs, places, people = {}, [], []
    for image, id_, text, judgment in found:
        own = captions[_image(image)].values()
        references = [caption for caption in own if caption not in judged.get(image, ())]
        if references:  # else there is nothing to compare it with
            places.append(pairs.setdefault((image, id_), (len(pairs), text, references))[0])
            people.append(judgment)
    if not pairs:
        raise UserError(f"{path} holds no judgment that counts")
    _, texts, references = zip(*pairs.values(), strict=True)
    found = metrics.coco_scores(references, {"judged": texts})
    taus, lines = {}, []
    for metric, each in found.each["judged"].items():
        values = [each[i] for i in places]
        taus[metric] = kendalltau(values, people, variant=variant).statistic
        if math.isnan(taus[metric]):
            reason = "judgments are equal" if len(set(people)) == 1 else "captions score the same"
            lines.append(f"no τ of {metric}: all {reason}")
    return taus, len(people), [*lines, *found.left_out]


if __name__ == "__main__":
    run(main)
