"""Kendall's τ with people, on judgments made up in the published layout."""

import random

import pytest
from conftest import failure, needs_java, run_here
from scipy.stats import kendalltau

import human_judgments
import metrics

WORDS = ["a", "dog", "man", "girl", "red", "ball", "runs", "on", "the", "green", "grass"]


@pytest.fixture
def folder(tmp_path):
    """Twelve images, one named as an oddity of the real data set is."""
    rng = random.Random(0)
    images = [f"{i}_x.jpg" for i in range(12)]
    tokens, ids = [], []
    for i, image in enumerate(images):
        for number in range(5):
            id_ = f"{image}{'.1' if i == 3 else ''}#{number}"
            ids.append(id_)
            tokens.append(f"{id_}\t{' '.join(rng.choices(WORDS, k=rng.randint(4, 9)))} .")
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(tokens) + "\n")
    expert, crowd = [], []
    for image in images:
        first = 5 * images.index(image)  # two of the image's own among them
        for id_ in sorted({*rng.sample(ids, 6), ids[first], ids[first + 1]}):
            expert.append("\t".join([image, id_, *(str(rng.randint(1, 4)) for _ in range(3))]))
            yes = rng.randint(0, 3)
            crowd.append(f"{image}\t{id_}\t{yes / 3}\t{yes}\t{3 - yes}")
    (tmp_path / "ExpertAnnotations.txt").write_text("\n".join(expert) + "\n")
    (tmp_path / "CrowdFlowerAnnotations.txt").write_text("\n".join(crowd) + "\n")
    return tmp_path


def by_hand(folder, name, variant):
    """τ of BLEU-1 and CIDEr-D, an entry a line, with the references that the protocol names."""
    captions = {}
    for line in (folder / "Flickr8k.token.txt").read_text().splitlines():
        id_, text = line.split("\t")
        captions[id_] = text
    judged = [line.split("\t")[:2] for line in (folder / name).read_text().splitlines()]
    texts, references, judgments = [], [], []
    for line in (folder / name).read_text().splitlines():
        image, id_, *values = line.split("\t")
        stem = image.removesuffix(".jpg")
        own = [text for other, text in captions.items() if other.startswith(f"{stem}.")]
        if captions[id_] in own and variant == "c":
            continue
        texts.append(captions[id_])
        taken = {captions[other] for where, other in judged if where == image and variant == "b"}
        references.append([text for text in own if text not in taken])
        judgments.append([float(v) for v in (values if variant == "c" else values[:1])])
    each = metrics.coco_scores(references, {"": texts}).each[""]
    return {
        metric: kendalltau(
            [score for score, j in zip(each[metric], judgments, strict=True) for _ in j],
            [value for j in judgments for value in j],
            variant=variant,
        ).statistic
        for metric in ("BLEU-1", "CIDEr-D")
    }, sum(map(len, judgments))


@pytest.mark.slow
@needs_java
def test_tau_is_that_of_scores_and_judgments_line_by_line(folder):
    process = run_here("human_judgments.py", "--folder", folder)
    assert process.returncode == 0, process.stderr
    expert, crowd = process.stdout.strip().split("\n\n")
    for printed, name, variant in (
        (expert, "ExpertAnnotations.txt", "c"),
        (crowd, "CrowdFlowerAnnotations.txt", "b"),
    ):
        taus, count = by_hand(folder, name, variant)
        assert f"{name}: {count} judgments; Kendall's τ-{variant}" in printed
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
        found = {row[0]: row[1:] for row in rows if row}
        for metric, tau in taus.items():
            published = human_judgments.PUBLISHED["expert" if variant == "c" else "crowdflower"]
            assert found[metric] == [f"{100 * tau:.1f}", str(published[metric])]


@pytest.mark.parametrize("equal", ["scores", "judgments"])
def test_an_undefined_tau_is_a_dash_and_a_line(equal, folder, monkeypatch):
    (folder / "CrowdFlowerAnnotations.txt").unlink()
    if equal == "judgments":
        path = folder / "ExpertAnnotations.txt"
        lines = [line.split("\t")[:2] for line in path.read_text().splitlines()]
        path.write_text("".join("\t".join([*line, "2", "2", "2"]) + "\n" for line in lines))

    def scores(references, captions):
        count = len(captions["judged"])
        each = {"BLEU-1": [0.5] * count, "CIDEr-D": list(range(count))}
        return metrics.CocoScores({"judged": {}}, {"judged": each}, [])

    monkeypatch.setattr(metrics, "coco_scores", scores)
    process = run_here("human_judgments.py", "--folder", folder)
    assert process.returncode == 0, process.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in process.stdout.splitlines()
    ]
    found = {row[0]: row[1] for row in rows if len(row) == 3}
    assert found["BLEU-1"] == "–" and "nan" not in process.stdout
    assert (found["CIDEr-D"] == "–") == (equal == "judgments")
    reason = "all captions score the same" if equal == "scores" else "all judgments are equal"
    assert f"no τ of BLEU-1: {reason}" in process.stdout.splitlines()


def test_without_java_there_is_one_line(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    process = run_here("human_judgments.py", "--folder", folder)
    assert "their tokenizer needs Java" in failure(process)
    assert len(process.stderr.splitlines()) == 1 and "nan" not in process.stdout


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("Flickr8k.token.txt", "one column", "Flickr8k.token.txt, line 61: not 2 columns"),
        ("ExpertAnnotations.txt", "a.jpg\tb.jpg#0\t1\t2\t3", "ExpertAnnotations.txt names"),
        ("ExpertAnnotations.txt", "0_x.jpg\t1_x.jpg#0\t1\ttwo\t3", "'two' is no number"),
        ("CrowdFlowerAnnotations.txt", "0_x.jpg\t1_x.jpg#0", ": not 5 columns"),
    ],
)
def test_damaged_files_are_named(folder, file, line, words):
    if file.startswith("Crowd"):
        (folder / "ExpertAnnotations.txt").unlink()
    with open(folder / file, "a") as opened:
        opened.write(line + "\n")
    assert words in failure(run_here("human_judgments.py", "--folder", folder))


def test_a_folder_without_the_files_is_refused(folder, tmp_path):
    (folder / "ExpertAnnotations.txt").unlink()
    (folder / "CrowdFlowerAnnotations.txt").unlink()
    line = failure(run_here("human_judgments.py", "--folder", folder))
    assert "ExpertAnnotations.txt" in line and "CrowdFlowerAnnotations.txt" in line
    (folder / "Flickr8k.token.txt").unlink()
    assert "cannot read" in failure(run_here("human_judgments.py", "--folder", folder))
