"""The scripts as a user runs them: train, evaluate, caption, continue, and bad input."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import LEARN, OFFLINE, SMALL, best, failure, needs_java, run_here, run_script
from nltk.translate.bleu_score import corpus_bleu
from PIL import Image

import attention_probes
import checkpoints
import datasets
import input_files
import word_rules


@pytest.mark.slow
@needs_java
def test_training_learns_a_tiny_data_set_by_heart_and_evaluation_says_so(
    trained, tiny_data, scenes, monkeypatch
):
    folder, _ = tiny_data
    output, base, _ = trained
    # not the best checkpoint, which is the first whose greedy captions are right, by a hair maybe
    newest = checkpoints.checkpoint_path(output, base)
    process = run_here(
        "eval.py",
        "--data_folder",
        folder,
        "--model",
        newest,
        "--beam_size",
        1,
        5,
        "--attention_report",
        2,
    )
    assert process.returncode == 0, process.stderr
    path = output / f"results_test_beam5_checkpoint_{base}.json"
    results = json.loads(path.read_text())
    references = json.loads((folder / f"TEST_REFERENCES_{base}.json").read_text())
    assert [r["image_id"] for r in results] == [r["id"] for r in references]
    by_hand = corpus_bleu(
        [[word_rules.tokenize(text) for text in r["captions"]] for r in references],
        [r["caption"].split() for r in results],
    )
    assert by_hand > 0.9
    nltk_table, coco_table, pointing, attention, covered, deletion, pairs = tables(process.stdout)
    assert list(nltk_table) == list(pointing) == ["beam 1", "beam 5"]
    assert nltk_table["beam 5"]["BLEU-4"] == f"{100 * by_hand:.1f}"
    share, count = pointing["beam 5"]["peak"].split("% of ")
    assert 0 <= float(share) <= 100 and int(count.split()[0]) > 0
    nouns = attention["beam 1, nouns"]
    assert 0 < float(nouns["entropy / ln L"].rstrip("%")) <= 100 and int(nouns["words"]) >= 8
    assert 0 < float(covered["beam 5"]["least possible"]) <= float(covered["beam 5"]["(1 - Σα)²"])
    assert list(deletion)[::2] == [f"{order} first, nouns" for order in attention_probes.ORDERS]
    assert 0 < float(pairs["nouns"]["attention"].rstrip("%")) < 100
    assert {"METEOR", "ROUGE-L", "CIDEr-D"} < coco_table["beam 1"].keys()
    assert "PTB tokenizer" in process.stdout and "without brevity penalty" in process.stdout

    # the same captions, scored as those of another system; without Java, which takes seconds
    monkeypatch.setenv("PATH", "")
    process = run_here(
        "eval.py", "--results", path, "--references", scenes / "karpathy.json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    [again] = tables(process.stdout)
    assert again["results"] == nltk_table["beam 5"]


def tables(printed):
    """The Markdown tables in a text: for each, name of the row -> column -> cell."""
    found, header = [], None
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            header = None
        elif header is None:
            header = cells
            found.append({})
        elif not set(line) <= set("|-: "):
            found[-1][cells[0]] = dict(zip(header[1:], cells[1:], strict=True))
    return found


def test_the_log_has_a_line_an_epoch_of_both_stages_and_the_curves_are_drawn(trained):
    output, base, printed = trained
    lines = [json.loads(line) for line in (output / f"log_{base}.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["epoch"]) for r in lines] == [
        *(("decoder", epoch) for epoch in range(1, 26)),
        ("finetune", 1),
        ("finetune", 2),
    ]
    assert lines[24]["loss"] < lines[0]["loss"]
    assert printed.count("human: ") == 3 * len(lines)
    Image.open(output / f"curves_{base}.png").verify()


def test_fine_tuning_changes_the_late_stages_of_the_encoder_alone(trained):
    output, base, _ = trained
    from encoders import Encoder

    tuned = checkpoints.load_checkpoint(checkpoints.checkpoint_path(output, base))
    assert tuned["stage"] == "finetune"
    original = Encoder(OFFLINE).state_dict()
    changed = {name for name, t in tuned["encoder"].items() if not t.equal(original[name])}
    assert any(name.startswith("resnet.blocks.6") for name in changed)
    early = ("resnet.conv_stem", "resnet.bn1", "resnet.blocks.0", "resnet.blocks.1")
    assert not any(name.startswith(early) or "running" in name for name in changed)


def test_captioning_prints_the_learned_captions_and_draws_pictures(
    trained, scenes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    images = sorted((scenes / "images").iterdir())
    process = run_here(
        "caption.py", "--img", *images[:2], scenes / "images", "--model", best(trained), "--json",
        "--beam_size", 1, "--amp", "off",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    records = json.loads(process.stdout)
    assert [r["image"] for r in records] == [str(path) for path in images]
    truth = {
        image["filename"]: " ".join(image["sentences"][0]["tokens"])
        for image in json.loads((scenes / "karpathy.json").read_text())["images"]
    }
    right = [r["caption"] == truth[path.name] for r, path in zip(records, images, strict=True)]
    assert sum(right) >= 7
    for record in records:
        Image.open(tmp_path / record["picture"]).verify()


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_where_it_stood(tiny_data, tmp_path):
    """An epoch, then a second from the checkpoint, equal two epochs in one go."""
    folder, base = tiny_data
    weights = {}
    for name, epochs in (("whole", [2]), ("halves", [1, 2])):
        for i, last in enumerate(epochs):
            output = tmp_path / name
            checkpoint = checkpoints.checkpoint_path(output, base)
            process = run_here(
                "train.py", "--data_folder", folder, "--output_folder", output, *LEARN,
                "--stage", "decoder", "--epochs", last,
                *(["--model", checkpoint] if i else []),
            )  # fmt: skip
            assert process.returncode == 0, process.stderr
        weights[name] = checkpoints.load_checkpoint(checkpoint)["decoder"]
        assert len((output / f"log_{base}.jsonl").read_text().splitlines()) == 2
    for name, tensor in weights["whole"].items():
        assert torch.equal(tensor, weights["halves"][name]), name


def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_last_checkpoint(
    tiny_data, tmp_path
):
    folder, base = tiny_data
    run = ["train.py", "--data_folder", folder, "--output_folder", tmp_path, "--encoder", OFFLINE,
           "--stage", "decoder", *LEARN]  # fmt: skip
    assert run_here(*run, "--epochs", 1).returncode == 0
    checkpoint = checkpoints.checkpoint_path(tmp_path, base)
    before = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True)
    state["optimizer"]["param_groups"][0]["lr"] = 1e38
    torch.save(state, tmp_path / "broken.pth.tar")
    line = failure(run_here(*run, "--epochs", 3, "--model", tmp_path / "broken.pth.tar"))
    assert "5 steps in a row skipped" in line
    assert checkpoint.read_bytes() == before


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--encoder", "resnet1001"], ["resnet1001", "did you mean"]),
        (["--encoder", "timm:nonsense"], ["timm:nonsense"]),
        (["--encoder", OFFLINE, "--encoder_weights", "missing.pth"], ["missing.pth"]),
        (["--data_name", "coco"], ["coco", "demo_10"]),
        (["--stage", "finetune"], ["BEST_checkpoint", "--stage decoder"]),
        (["--model", "missing.pth.tar"], ["no checkpoint missing.pth.tar"]),
        (["--checkpoint", "missing.pth.tar"], ["no checkpoint missing.pth.tar"]),  # its older name
        (["--device", "nonsense"], ["device nonsense"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--dropout", "1.5"], ["--dropout", "1.5"]),
        (["--epochs", "9" * 400], ["--epochs", "too large"]),
        (["--save_every", "9" * 400 + "m"], ["--save_every"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", "1" + "0" * 25], ["--seed"]),
        (["--device", "meta"], ["device meta"]),
        (["--encoded_image_size", "65"], ["--encoded_image_size"]),
    ],
)
def test_training_refuses_bad_options_in_one_line(tiny_data, tmp_path, arguments, words):
    line = failure(
        run_here("train.py", "--data_folder", tiny_data[0], "--output_folder", tmp_path, *arguments)
    )
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied_data(tiny_data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(tiny_data[0], folder, ignore=shutil.ignore_patterns("*FEATURES*"))
    return folder, tiny_data[1]


def test_two_data_sets_are_listed(copied_data):
    folder, base = copied_data
    shutil.copy(folder / f"WORDMAP_{base}.json", folder / "WORDMAP_flickr8k_5.json")
    line = failure(run_here("train.py", "--data_folder", folder))
    assert base in line
    assert "flickr8k_5" in line
    assert "--data_name" in line


@pytest.mark.parametrize("kind", ["IMAGES", "CAPTIONS", "CAPLENS", "REFERENCES"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "of another data set"])
def test_damaged_data_files_are_named(copied_data, kind, damage):
    if (kind, damage) == ("REFERENCES", "missing"):
        pytest.skip("they are derived: see below")
    folder, base = copied_data
    path = input_files.input_path(folder, base, kind, "VAL")
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "IMAGES":
        with h5py.File(path, "w") as file:
            file["images"] = np.zeros((3, 3, 96, 96), np.uint8)
    else:
        path.write_text(json.dumps(json.loads(path.read_text())[:3]))
    line = failure(run_here("train.py", "--data_folder", folder, "--encoder", OFFLINE))
    assert base in line
    assert damage == "of another data set" or kind in line


def test_input_files_of_other_tooling_have_no_references(
    copied_data, scenes, tmp_path, monkeypatch
):
    """They are derived from the encoded captions, or read from the JSON."""
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    folder, base = copied_data
    expected = {}
    for split in ("TRAIN", "VAL", "TEST"):
        path = input_files.input_path(folder, base, "REFERENCES", split)
        expected[split] = json.loads(path.read_text())
        path.unlink()
    run = ["--data_folder", folder, "--device", "cpu"]
    train = ["--encoder", OFFLINE, "--stage", "decoder", "--epochs", 1, *SMALL]
    process = run_here("train.py", *run, *train, "--encoded_image_size", 3)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("VAL_REFERENCES") == 1 and "--karpathy_json" in process.stderr
    derived = datasets.CaptionDataset(folder, base, "VAL").references
    for one, other in zip(derived, expected["VAL"], strict=True):  # no word is rare here
        split = map(word_rules.tokenize, other["captions"])
        assert one["captions"] == list(map(" ".join, split))
    json_file = ["--karpathy_json", scenes / "karpathy.json"]
    read = datasets.CaptionDataset(folder, base, "VAL", karpathy_json=json_file[1]).references
    size = {"width": 96, "height": 96}  # which the images alone tell
    assert [reference | size for reference in read] == expected["VAL"]
    process = run_here("eval.py", *run, "--beam_size", 1, *json_file)
    assert process.returncode == 0, process.stderr
    assert "REFERENCES" not in process.stderr
    results = json.loads((folder / f"results_test_beam1_BEST_checkpoint_{base}.json").read_text())
    assert [r["image_id"] for r in results] == [r["id"] for r in expected["TEST"]]

    other = json.loads((scenes / "karpathy.json").read_text())
    other["images"].reverse()
    (tmp_path / "other.json").write_text(json.dumps(other))
    other_json = ["--karpathy_json", tmp_path / "other.json"]
    line = failure(run_here("train.py", *run, *train, "--overwrite", *other_json))
    assert "other.json is of other images" in line


def test_what_is_missing_is_found_before_anything_is_encoded(copied_data):
    folder, base = copied_data
    input_files.input_path(folder, base, "CAPLENS", "VAL").unlink()
    line = failure(run_here("train.py", "--data_folder", folder, "--encoder", OFFLINE))
    assert "VAL_CAPLENS" in line
    assert not list(folder.glob("*FEATURES*"))


def test_evaluation_names_a_split_that_is_not_there(checkpoint, copied_data):
    folder, _ = copied_data
    for path in folder.glob("TEST_*"):
        path.unlink()
    line = failure(run_here("eval.py", "--data_folder", folder, "--model", checkpoint))
    assert "no test split" in line and "--split" in line


def test_evaluation_refuses_a_beam_larger_than_the_vocabulary(checkpoint, tiny_data):
    line = failure(
        run_here(
            "eval.py",
            "--data_folder",
            tiny_data[0],
            "--model",
            checkpoint,
            "--beam_size",
            3,
            500,
        )
    )
    assert "beam_size 500" in line


@pytest.mark.parametrize(
    ("results", "references", "words"),
    [
        ([{"image_id": 1, "caption": "a dog"}], None, ["--references"]),
        ([{"image_id": 1, "caption": 2}], {"annotations": []}, ["references.json", "no captions"]),
        ({"a": 1}, {"annotations": [{"image_id": 1, "caption": "x"}]}, ["results.json is no list"]),
        (
            [{"image_id": 1, "caption": "half \ud800 a character"}],
            {"annotations": [{"image_id": 1, "caption": "x"}]},
            ["results.json is no list"],
        ),
        (
            [{"image_id": 1, "caption": "a dog"}],
            {"annotations": [{"image_id": 1, "caption": "..."}]},
            ["references.json", "no words for image 1"],
        ),
        ([], {"annotations": [{"image_id": 1, "caption": "x"}]}, ["results.json has no captions"]),
        (
            [{"image_id": 2, "caption": "x"}],
            {"annotations": [{"image_id": 1, "caption": "x"}]},
            ["of 1 id in the results 1 is not", "(2)", "of 1 id in the references 1 has no", "(1)"],
        ),
        (
            [{"image_id": i, "caption": "x"} for i in range(1, 9)],
            {"annotations": [{"image_id": i, "caption": "x"} for i in range(4)]},
            ["of 8 ids in the results 5 are not in the references (4, 5, 6 and 2 more)", "1 has"],
        ),
        (  # those that are there can be scored
            [{"image_id": 1, "caption": "x"}],
            {"annotations": [{"image_id": i, "caption": "x"} for i in range(3)]},
            ["2 have no caption (0, 2)", "--subset", "results.json"],
        ),
        (
            [{"image_id": 1, "caption": "x"}] * 2,
            {"annotations": [{"image_id": 1, "caption": "x"}]},
            ["several captions for image 1"],
        ),
        ([{"image_id": 1, "caption": "x"}], {"images": 3}, ["references.json is not in Karpathy"]),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(tmp_path, results, references, words):
    arguments = ["--results", tmp_path / "results.json"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    if references is not None:
        (tmp_path / "references.json").write_text(json.dumps(references))
        arguments += ["--references", tmp_path / "references.json"]
    line = failure(run_here("eval.py", *arguments))
    assert all(word in line for word in words), line


def test_evaluation_without_a_checkpoint_says_where_it_looked(tiny_data):
    assert "train.py" in failure(run_here("eval.py", "--data_folder", tiny_data[0]))


def test_the_newest_best_checkpoint_is_the_default(checkpoint, copied_data, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    folder, base = copied_data
    (folder / "run").mkdir()
    shutil.copy(checkpoint, folder / "run" / checkpoint.name)
    process = run_here("eval.py", "--data_folder", folder, "--beam_size", 1, "--split", "val")
    assert process.returncode == 0, process.stderr
    assert (folder / "run" / f"results_val_beam1_BEST_checkpoint_{base}.json").exists()
    assert "taking" not in process.stderr  # there is no other


def test_captioning_names_unreadable_files_and_captions_the_others(
    checkpoint, scenes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    good = next((scenes / "images").iterdir())
    (tmp_path / "text.jpg").write_text("no image")
    process = run_here(
        "caption.py", "--img", tmp_path / "text.jpg", good, tmp_path / "missing.jpg",
        "--model", checkpoint,
    )  # fmt: skip
    assert "2 of 3 images" in failure(process)
    assert "text.jpg" in process.stderr
    assert "missing.jpg" in process.stderr
    assert str(good) in process.stdout


@pytest.mark.slow
def test_names_of_files_may_hold_anything(checkpoint, scenes, tmp_path):
    names = ["with blank.png", "quo\"te's $HOME.png", "日本 ünï.png", "line\nbreak.png", "-img.png"]
    names.append(os.fsdecode(b"not-unicode-\xff.png"))
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(next((scenes / "images").iterdir()), tmp_path / "in" / name)
    (tmp_path / "in" / "bro\nken.png").write_text("no image")
    process = run_script(
        "caption.py", "--img", tmp_path / "in", "--model", checkpoint,
        "--output_folder", tmp_path / "out", "--device", "cpu",
    )  # fmt: skip
    assert "1 of 7 images" in failure(process)
    assert len(process.stdout.splitlines()) == len(names)
    assert "line\\nbreak.png: " in process.stdout and "日本 ünï.png: " in process.stdout
    assert "bro\\nken.png" in process.stderr
    for name in names:
        Image.open(tmp_path / "out" / f"{name}_attention.png").verify()


@pytest.mark.parametrize("contents", ["truncated", "state dict", "text"])
def test_captioning_refuses_what_is_no_checkpoint(checkpoint, scenes, tmp_path, contents):
    path = tmp_path / "model.pth.tar"
    if contents == "truncated":
        path.write_bytes(checkpoint.read_bytes()[:100_000])
    elif contents == "state dict":
        torch.save({"fc.weight": torch.zeros(3, 3)}, path)
    else:
        path.write_text("no model")
    image = next((scenes / "images").iterdir())
    line = failure(run_here("caption.py", "--img", image, "--model", path))
    assert str(path) in line


def test_a_word_map_is_needed_only_where_the_checkpoint_holds_none(
    checkpoint, tiny_data, scenes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder, base = tiny_data
    state = torch.load(checkpoint, weights_only=True)
    del state["word_map"]
    torch.save(state, tmp_path / "bare.pth.tar")
    image = next((scenes / "images").iterdir())
    run = ["caption.py", "--img", image, "--model", tmp_path / "bare.pth.tar"]
    assert "--word_map" in failure(run_here(*run))
    process = run_here(*run, "--word_map", folder / f"WORDMAP_{base}.json")
    assert process.returncode == 0, process.stderr
