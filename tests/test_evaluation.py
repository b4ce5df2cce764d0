"""Which images and captions a model is judged by, and what is written where."""

import json
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import failure, run_here
from PIL import Image

import attention_report
import checkpoints
import demo
import evaluation
import fused
import input_files
import regions
from captioner import Captioner
from coco_results import read_subset
from evaluation_data import EvaluationData, find_data_set
from groundwork import files
from groundwork.errors import UserError
from groundwork.images import squeeze

OTHER = "flickr30k_5_cap_per_img_5_min_word_freq"


@pytest.fixture
def other_data(tiny_data, tmp_path):
    """Images and references of a test split alone, of another name than the tiny data."""
    folder = tmp_path / "other"
    folder.mkdir()
    for kind in ("IMAGES", "REFERENCES"):
        path = input_files.input_path(*tiny_data, kind, "TEST")
        shutil.copy(path, input_files.input_path(folder, OTHER, kind, "TEST"))
    return folder


def fake_model(tiny_data, size=96, words=("<pad>", "a", "red", "<unk>", "<start>", "<end>")):
    about = {"base": tiny_data[1], "options": {"data_folder": str(tiny_data[0])}}
    word_map = {word: i for i, word in enumerate(words)}
    return SimpleNamespace(word_map=word_map, side_for=lambda _: size, fit="squeeze", about=about)


# ------------------------------------------------------------------------------------- the data


def test_any_data_set_is_taken_in_size_and_words_of_the_model(other_data, tiny_data):
    path = input_files.input_path(other_data, OTHER, "REFERENCES", "TEST")
    references = json.loads(path.read_text())
    references[1]["captions"] = ["A red dog!", "a RED", "zebra"]
    path.write_text(json.dumps(references))
    data = EvaluationData(other_data, OTHER, "TEST", fake_model(tiny_data, 48))
    assert len(data) == len(references) and data.references == references
    image, captions, lengths = data[1]
    with h5py.File(input_files.input_path(other_data, OTHER, "IMAGES", "TEST")) as file:
        stored = file["images"][1]
    expected = squeeze(Image.fromarray(stored.transpose(1, 2, 0)), 48)
    np.testing.assert_array_equal(image.numpy(), expected)
    a, red, unk, start, end = 1, 2, 3, 4, 5
    assert lengths.tolist() == [5, 4, 3]
    said = [c[:n].tolist() for c, n in zip(captions, lengths, strict=True)]
    assert said == [[start, a, red, unk, end], [start, a, red, end], [start, unk, end]]
    _, captions, _ = data[0]  # of one caption, three times, as the longest is
    assert captions.shape == data[1][1].shape and captions[0].equal(captions[2])
    assert not data.is_of_training
    assert "not what the model was trained on" in data.description
    own = EvaluationData(*tiny_data, "TEST", fake_model(tiny_data))
    np.testing.assert_array_equal(own[1][0].numpy(), stored)
    assert not own.is_of_training  # its name, but other words
    words = json.loads(input_files.input_path(*tiny_data, "WORDMAP").read_text())
    own = EvaluationData(
        *tiny_data, "TEST", fake_model(tiny_data, words=sorted(words, key=words.get))
    )
    assert own.is_of_training and own.description == f"{tiny_data[1]}, test split"


@pytest.mark.parametrize("form", ["number", "names", "ids", "JSON of ids", "results"])
def test_a_subset_is_taken_in_the_order_of_the_data(form, tiny_data, tmp_path):
    data = EvaluationData(*tiny_data, "VAL", fake_model(tiny_data))
    references, images = data.references, [data[i][0] for i in range(len(data))]
    chosen, path = [4, 1], tmp_path / "subset"
    ids = [references[i]["id"] for i in chosen]
    if form == "names":
        path.write_text("".join(references[i]["filename"] + "\r\n" for i in chosen) + "\n")
    elif form == "ids":
        path.write_text("\n".join(map(str, ids)))
    elif form == "JSON of ids":
        path.write_text(json.dumps([str(ids[0]), float(ids[1])]))
    elif form == "results":
        path.write_text(json.dumps([{"image_id": i, "caption": "a"} for i in ids]))
    value = "2" if form == "number" else str(path)
    expected = [0, 1] if form == "number" else sorted(chosen)
    data.keep(read_subset(value), value)
    assert data.references == [references[i] for i in expected]
    assert len(data) == 2 and all(data[i][0].equal(images[k]) for i, k in enumerate(expected))
    assert "val split, 2 of its 8 images" in data.description


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (
            "missing.jpg\nelsewhere.jpg\n",
            "of 2 images 2 are not in VAL_IMAGES_.* (missing.jpg, els",
        ),
        ("", "lists no ids or names"),
        ("[{}]", "lists no ids or names"),
        ("[1,", "is not valid JSON"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(contents, words, tiny_data, tmp_path):
    path = tmp_path / "subset.txt"
    path.write_text(contents)
    data = EvaluationData(*tiny_data, "VAL", fake_model(tiny_data))
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as error:
        data.keep(read_subset(str(path)), str(path))
    assert str(path) in str(error.value)


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_the_data_set_is_that_of_the_model_or_the_one_asked_for(tmp_path):
    both = touch(
        tmp_path / "both",
        *("WORDMAP_a.json", "TEST_IMAGES_a.hdf5", "VAL_IMAGES_a.hdf5", "TEST_IMAGES_b.hdf5"),
    )
    one = touch(tmp_path / "one", "TEST_IMAGES_b.hdf5")
    empty = touch(tmp_path / "empty")
    about = {"base": "a", "options": {"data_folder": str(both)}}
    unknown = {"base": "", "options": {"data_folder": "data"}}

    def find(folder, name=None, split="TEST", about=about):
        return find_data_set("model.pth.tar", about, folder, name, split)

    assert find(None) == find(both) == (both, "a")
    assert find(both, "b") == (both, "b") and find(one) == (one, "b")
    assert find(None, "b") == (both, "b") and find(one, about=unknown) == (one, "b")
    moved = {"base": "a", "options": {"data_folder": str(tmp_path / "gone")}}
    for arguments, words in (
        ((None, None, "TEST", moved), "trained on a in .*gone, which is not here.*--data_folder"),
        ((empty,), "no data set in .*empty: .*--data_folder"),
        ((tmp_path / "nowhere",), "there is no folder .*nowhere: check --data_folder"),
        ((None, "a", "TEST", moved), "there is no folder .*gone: check --data_folder"),
        ((one, "a"), "no data set 'a' in .*one: known are b"),
        ((both, None, "TEST", unknown), "holds 2 data sets, a, b: .*--data_name"),
        ((one, None, "VAL"), "b in .*one has no val split: .*--split"),
    ):
        with pytest.raises(UserError, match=words):
            find(*arguments)


def test_captions_without_words_have_dashes_for_figures(tiny_data):
    data = EvaluationData(*tiny_data, "VAL", fake_model(tiny_data))
    wordless = SimpleNamespace(words=[], alphas=np.zeros((0, 9)))
    captions = {1: [wordless] * len(data)}
    boxes = regions.complete(data.references, demo.SHAPES)
    _, [row] = attention_report.pointing_table(captions, boxes)
    assert row["peak"] == "– of 0 words"
    assert row["random point"] == row["attention"] == row["even attention"] == "–"
    [(_, [row])] = attention_report.attention_tables(captions, english=True)
    assert row["(1 - Σα)²"] == "1.000"


# --------------------------------------------------------------------------------- the command


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """A copy of the run's folder, with its best checkpoint and its newest, and no Java, which takes
    its time."""
    monkeypatch.setenv("PATH", "")
    folder = tmp_path / "run"
    folder.mkdir()
    for path in (checkpoint, checkpoint.with_name(checkpoint.name.removeprefix("BEST_"))):
        shutil.copy(path, folder)
    return folder


def evaluate(*arguments):
    return run_here("eval.py", "--beam_size", 1, "--subset", 2, "--device", "cpu", *arguments)


def test_the_attention_is_built_before_a_split_is_captioned(run, tiny_data, monkeypatch):
    def build(device):
        raise UserError(f"built for {device}")

    monkeypatch.setattr(fused, "build", build)
    process = evaluate("--model", run, "--data_folder", tiny_data[0])
    assert process.stderr == "error: built for cpu"


@pytest.fixture
def hard(run, checkpoint):
    """The model with hard attention."""
    contents = torch.load(checkpoint, weights_only=True)
    contents["decoder_config"]["attention"] = "hard"
    for name, value in (("baseline", torch.zeros(2)), ("batches", torch.zeros(()))):
        contents["decoder"][f"attention.{name}"] = value
    torch.save(contents, run / checkpoint.name)
    return run


@pytest.mark.slow
def test_each_way_to_look_has_its_results(hard, tiny_data, scenes):
    base, found = tiny_data[1], {}
    for look in (None, "soft", "argmax", "sample", "sample"):
        asked = [] if look is None else ["--look", look]
        process = evaluate("--model", hard, "--data_folder", tiny_data[0], *asked)
        assert process.returncode == 0, process.stderr
        part = f"first2_{look}" if look in ("argmax", "sample") else "first2"
        path = hard / f"results_test_{part}_beam1_BEST_checkpoint_{base}.json"
        contents = path.read_text()
        assert found.setdefault(path.name, contents) == contents  # drawn as before, too
        label = f"beam 1, {look}" if look else "beam 1"
        assert process.stdout.count(f"| {label} |") == 2  # scores, and the pointing game
        assert (f"hard attention, look: {look}" in process.stdout) == (look is not None)
    assert {path.name for path in hard.glob("results_*")} == found.keys() and len(found) == 3

    images = sorted((scenes / "images").iterdir())[:3]

    def log_probs(look, **options):
        model = Captioner.load(hard, "cpu", look=look)
        return [caption.log_prob for caption in model.caption(images, 2, **options)]

    assert log_probs(None) == log_probs("soft") != log_probs("sample")
    assert log_probs("sample", seed=1) == log_probs("sample", seed=1) != log_probs("sample")
    assert log_probs("argmax") != log_probs("soft")
    with pytest.raises(UserError, match="seed is for what is drawn"):
        log_probs("argmax", seed=1)
    with pytest.raises(UserError, match="look 'twice' is none of soft, argmax, sample"):
        Captioner.load(hard, "cpu", look="twice")


@pytest.mark.slow
def test_how_to_look_is_asked_of_hard_attention_alone(run, checkpoint, scenes):
    image, named = next((scenes / "images").iterdir()), ["--model", checkpoint]
    for process in (
        evaluate("--model", run, "--look", "argmax"),
        run_here("caption.py", *named, "--img", image, "--look", "sample", "--no_pictures"),
        run_here("app.py", *named, "--look", "soft"),
    ):
        assert "its attention is not hard: leave look (--look) out" in failure(process)
    process = evaluate("--results", "a.json", "--references", "b.json", "--look", "soft")
    assert "--look is about a model" in failure(process)


def test_a_folder_is_its_best_model_and_results_tell_the_checkpoint(run, tiny_data, other_data):
    base = tiny_data[1]
    data = ["--data_folder", tiny_data[0]]
    best, newest = (checkpoints.checkpoint_path(run, base, best=best) for best in (True, False))
    process = evaluate("--model", run)
    assert process.returncode == 0 and str(best) in process.stdout, process.stderr
    process = evaluate(*data, "--output_folder", run, "--split", "train")
    assert process.returncode == 0 and str(best) in process.stdout, process.stderr
    assert "train split, 2 of its 8 images" in process.stdout
    assert evaluate(*data, "--checkpoint", newest).returncode == 0
    process = evaluate("--model", run, "--data_folder", other_data)
    assert process.returncode == 0, process.stderr
    assert f"{OTHER}, test split, 2 of its 8 images (not what the model was" in process.stdout
    assert {path.name for path in run.glob("*.json")} == {
        f"results_test_first2_beam1_BEST_checkpoint_{base}.json",
        f"results_train_first2_beam1_BEST_checkpoint_{base}.json",
        f"results_test_first2_beam1_checkpoint_{base}.json",
        f"results_test_first2_beam1_BEST_checkpoint_{base}_on_{OTHER}.json",
    }
    found = [json.loads(path.read_text()) for path in sorted(run.glob("results_test*"))]
    assert found[0] == found[1] and len(found[0]) == 2  # the other data's images are the same


def test_results_tell_data_of_the_same_name_apart(run, tiny_data, tmp_path):
    """Moved data are the same."""
    folder, base = tiny_data
    kept = shutil.ignore_patterns("*FEATURES*", "*checkpoint*")
    moved, other = (shutil.copytree(folder, tmp_path / x, ignore=kept) for x in ("moved", "other"))
    path = input_files.input_path(other, base, "REFERENCES", "TEST")
    path.write_text(path.read_text().replace("square", "circle"))
    for data in (moved, other):
        process = evaluate("--model", run, "--data_folder", data, "--output_folder", tmp_path)
        assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.glob("*.json")} == {
        f"results_test_first2_beam1_BEST_checkpoint_{base}.json",
        f"results_test_first2_beam1_BEST_checkpoint_{base}_on_other.json",
    }


def test_several_models_in_a_folder_are_named(run, tmp_path):
    [best] = run.glob("BEST*")
    shutil.copy(best, run / "BEST_checkpoint_other.pth.tar")
    line = failure(evaluate("--model", run))
    assert "holds 2 models" in line and best.name in line and "BEST_checkpoint_other" in line
    line = failure(evaluate("--output_folder", run))
    assert "holds 2 models" in line
    process = evaluate("--data_folder", run)  # the newest, and then no data
    assert "taking" in process.stderr and "1 older one" in process.stderr
    assert "no data set in" in failure(process)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no BEST checkpoint in the folder" in failure(evaluate("--model", empty))


@pytest.mark.parametrize("place", ["default", "asked for", "report"])
def test_a_place_that_cannot_be_written_is_found_first_and_the_scores_come(
    place, run, tmp_path, monkeypatch
):
    order, caption_split = [], evaluation.caption_split

    def full(path, size):
        order.append(path.name)
        if (place == "report") == path.name.startswith("index"):
            raise OSError(28, "No space left on device")

    def captioned(*arguments):
        order.append("captioned")
        return caption_split(*arguments)

    monkeypatch.setattr(files, "reserve", full)
    monkeypatch.setattr(evaluation, "caption_split", captioned)
    arguments = {
        "default": [],
        "asked for": ["--output_folder", tmp_path / "out"],
        "report": ["--report", tmp_path / "page"],
    }[place]
    process = evaluate("--model", run, *arguments)
    assert process.returncode == (0 if place == "default" else 1)
    assert "| beam 1 |" in process.stdout and "report: " not in process.stdout
    [line] = process.stderr.splitlines()
    assert line.startswith("not written: " if place == "default" else "error: ")
    assert "No space left on device; the scores are printed all the same" in line
    assert order[-1] == "captioned" and len(order) == (3 if place == "report" else 2)
    assert ("captions: " in process.stdout) == (place == "report")
    assert not list(tmp_path.glob("**/*.tmp")) and not list(tmp_path.glob("page/*"))


def test_what_fills_up_meanwhile_costs_the_files_alone(run, tmp_path, monkeypatch):
    import coco_results

    def full(path, contents):
        raise UserError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(coco_results, "write_json", full)
    for arguments, code in ([], 0), (["--output_folder", tmp_path / "out"], 1):
        process = evaluate("--model", run, *arguments)
        assert process.returncode == code and "| beam 1 |" in process.stdout
        assert "No space left" in process.stderr and "captions: " not in process.stdout


# ------------------------------------------------------------------- captions of other systems


@pytest.fixture
def score(tmp_path, monkeypatch):
    """eval.py on results and references, as JSON, without Java."""
    monkeypatch.setenv("PATH", "")

    def run(results, references, *arguments):
        for name, contents in (("results", results), ("references", references)):
            (tmp_path / f"{name}.json").write_text(json.dumps(contents))
        paths = [tmp_path / "results.json", "--references", tmp_path / "references.json"]
        return run_here("eval.py", "--results", *paths, *arguments)

    return run


def results(*ids):
    return [{"image_id": id_, "caption": f"a dog {int(id_) % 7}"} for id_ in ids]


COCO = {
    "annotations": [{"image_id": i, "caption": f"a dog {i}"} for i in range(6)],
    "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)],
}
KARPATHY = {
    "images": [
        {
            "filename": f"{i}.jpg",
            "split": split,
            "imgid": i,
            "sentences": [{"tokens": ["a", f"{i}"]}],
        }
        for i, split in enumerate(["train", "val", "val", "test", "test"])
    ]
}


@pytest.mark.parametrize("ids", [range(6), map(str, range(6)), map(float, range(6))])
def test_ids_are_compared_by_value(ids, score):
    process = score(results(*ids), COCO)
    assert process.returncode == 0, process.stderr
    assert "6 images, 6 human captions" in process.stdout and "100.0" in process.stdout


@pytest.mark.parametrize("references", [COCO, KARPATHY])
def test_results_may_name_images_by_their_files(references, score):
    ids = range(6) if references is COCO else (3, 4)
    named = [r | {"image_id": f"{r['image_id']}.jpg"} for r in results(*ids)]
    process = score(named, references)
    assert process.returncode == 0, process.stderr
    assert f"{len(ids)} images" in process.stdout


def test_a_caption_of_the_same_id_in_two_ways_is_several(score):
    assert "several captions for image 1" in failure(score(results(1, "1"), COCO))


def test_a_mismatch_says_what_differs(score):
    line = failure(score(results(1, 2), KARPATHY))
    assert "of 2 ids in the results 2 are not in the references (1, 2)" in line
    assert "of 2 ids in the references 2 have no caption (3, 4)" in line
    assert "in the splits val, see --split" in line
    assert score(results(1, 2), KARPATHY, "--split", "val").returncode == 0
    line = failure(score(results(7, 8), KARPATHY))
    assert "(7, 8)" in line and "split" not in line
    line = failure(score(results(7, 8), COCO, "--split", "val"))
    assert "(7, 8)" in line and "split" not in line
    only_train = {"images": KARPATHY["images"][:1]}
    line = failure(score(results(0), only_train))
    assert "no captions of the test split" in line and "there are train" in line


def test_some_images_are_scored_by_a_subset(score, tmp_path):
    some = results(1, 4)
    assert "--subset" in failure(score(some, COCO))
    (tmp_path / "list.txt").write_text("4.jpg\n1\n")
    for subset in (tmp_path / "results.json", tmp_path / "list.txt"):
        process = score(some, COCO, "--subset", subset)
        assert process.returncode == 0, process.stderr
        assert "2 images, 2 human captions" in process.stdout
    process = score(results(*range(6)), COCO, "--subset", 1)  # of results of all
    assert "1 image, 1 human caption," in process.stdout
    (tmp_path / "list.txt").write_text("9.jpg")
    assert "(9.jpg)" in failure(score(some, COCO, "--subset", tmp_path / "list.txt"))
