"""A model's words taken over with new ones: by its layers, and by a run."""

import json
import re

import pytest
import torch
from conftest import LEARN, WORDS, best, failure, run_here

import checkpoints
import decoding
import transfer
import utils
from contract import DECODERS
from groundwork.errors import UserError
from word_maps import Wanted

MORE = WORDS | {word: i for i, word in enumerate(["cat", "runs"], start=len(WORDS))}
OLD = [WORDS[word] for word in ("a", "dog", "<end>")]


def decoder_of(name):
    values = {"vocab_size": len(WORDS), "encoder_dim": 6, "embed_dim": 8, "attention_dim": 8}
    values |= {"decoder_dim": 8, "encoded_image_size": 3, "stage_dims": (6,), "stage_factors": (1,)}
    decoder = checkpoints.new_decoder(name, values).eval()
    torch.nn.init.normal_(decoder.fc.bias)
    return decoder


@pytest.mark.parametrize("name", DECODERS)
def test_known_words_are_as_they_were_and_new_ones_like_them(name, capsys):
    decoder = decoder_of(name)
    larger = transfer.extend(decoder, WORDS, MORE)
    assert "of 6 words is extended by 2 new words" in capsys.readouterr().out
    before, after = decoder.state_dict(), larger.state_dict()
    assert before.keys() == after.keys() and larger.config.vocab_size == 8
    grown = {key for key in before if before[key].shape != after[key].shape}
    assert grown >= {"embedding.weight", "fc.weight", "fc.bias"}
    for key, tensor in before.items():
        assert torch.equal(after[key][: len(WORDS)] if key in grown else after[key], tensor), key
    for key in grown:
        new, known = after[key][len(WORDS) :], before[key][OLD]
        apart = (new - known.mean(dim=0)) / known.std(dim=0, correction=0)
        assert apart.abs().max() < 5 and new.unique().numel() == new.numel()


@torch.no_grad()
def test_a_known_words_score_does_not_change():
    decoder, features = decoder_of("lstm"), torch.randn(2, 3, 3, 6)
    captions = torch.tensor([[4, 1, 2, 5]]).repeat(2, 1)
    lengths = torch.tensor([4, 4])
    larger = transfer.extend(decoder, WORDS, MORE)
    scores, more = (own(features, captions, lengths).scores.data for own in (decoder, larger))
    torch.testing.assert_close(more[:, : len(WORDS)], scores)
    assert decoding.greedy(larger, features, MORE)


@pytest.fixture(scope="module")
def cats(scenes, checkpoint, tmp_path_factory):
    """The scenes again, with a word that the model does not know, in its words and that one."""
    drawn = json.loads((scenes / "karpathy.json").read_text())
    folder = tmp_path_factory.mktemp("cats")
    for image in drawn["images"]:
        for sentence in image["sentences"]:
            sentence["tokens"] = [*sentence["tokens"], "meow"]
            sentence["raw"] += " meow"
    (folder / "cats.json").write_text(json.dumps(drawn))
    summary = utils.create_input_files(
        "cats", folder / "cats.json", scenes / "images", min_word_freq=0, output_folder=folder,
        image_size=96, wanted=Wanted(word_map=transfer.read_word_map(checkpoint), extend=True),
    )  # fmt: skip
    return folder, summary["base"]


@pytest.mark.slow
def test_a_run_begins_from_a_models_weights_with_new_words(cats, trained, tmp_path):
    """And learns to say the new word; a resumed run goes on with it."""
    folder, base = cats
    run = ["train.py", "--data_folder", folder, "--output_folder", tmp_path]
    run += ["--model", best(trained), "--device", "cpu", "--amp", "off", "--stage", "decoder"]
    refused = failure(run_here(*run[:-2]))
    assert "is of another vocabulary than cats_" in refused
    assert "--extend_vocabulary adds the new words" in refused
    learn = ["--decoder_lr", 0.004, "--batch_size", 10]
    done = run_here(*run, *learn, "--extend_vocabulary", "--epochs", 5)
    assert done.returncode == 0, done.stderr
    assert "a new run starts from epoch" in done.stdout
    assert "is extended by 1 new word" in done.stdout
    found = checkpoints.load_checkpoint(checkpoints.checkpoint_path(tmp_path, base))
    old = checkpoints.load_checkpoint(best(trained))
    assert found["word_map"] == old["word_map"] | {"meow": len(old["word_map"])}
    assert found["epoch"] == 5 and len(found["log"]) == 5 and found["scores"]["bleu4"] > 0.9
    said = [line for line in done.stdout.splitlines() if re.match("  [^ ]+: ", line)]
    assert len(said) == 5 * 3 and all(line.endswith(" meow") for line in said[-3:])
    more = run_here(
        "train.py", "--data_folder", folder, "--output_folder", tmp_path, "--resume", "--epochs", 6
    )
    assert more.returncode == 0, more.stderr
    assert "resuming from" in more.stdout and "extended by" not in more.stdout


@pytest.mark.slow
def test_what_cannot_be_extended_is_one_line(tiny_data, trained, checkpoint, cats, tmp_path):
    run = ["train.py", "--output_folder", tmp_path, "--device", "cpu", "--extend_vocabulary"]
    assert "goes with --model" in failure(run_here(*run, "--data_folder", cats[0], *LEARN))
    same = run_here(*run, "--data_folder", tiny_data[0], "--model", checkpoint, "--epochs", 1)
    assert same.returncode == 0, same.stderr  # nothing is new, and it begins anew
    larger = transfer.extend(decoder_of("lstm"), WORDS, MORE)
    with pytest.raises(UserError, match="another vocabulary than x's word map.*--extend_vocabul"):
        transfer.check_words(MORE, WORDS, "x", extend=True)
    assert larger.config.vocab_size == len(MORE)


def test_models_of_different_rules_do_not_caption_together(checkpoint, tmp_path):
    other = torch.load(checkpoint, weights_only=True)
    words = list(other["word_map"])
    words[words.index("<unk>") - 1] = "<rule:whitespace>"
    other["word_map"] = {word: i for word, i in zip(words, other["word_map"].values(), strict=True)}
    torch.save(other, tmp_path / "other.pth.tar")
    line = failure(
        run_here("caption.py", "--img", "x.jpg", "--model", checkpoint, tmp_path / "other.pth.tar")
    )
    assert "words of the rule whitespace, not of karpathy" in line
