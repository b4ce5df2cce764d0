"""What a decoder knows of its words before training: vectors, frequencies, and which never come."""

import dataclasses
import gzip
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import OFFLINE, close, failure, run_here
from torch import nn

import checkpoints
import contract
import datasets
import decoding
import engine
import input_files
import vocabulary
from groundwork.errors import UserError
from objectives import CrossEntropy, caption_loss, reinforce
from word_rules import unsayable

WORDS = ["<pad>", *"abcdefghij", "<unk>", "<start>", "<end>"]
WORD_MAP = {word: index for index, word in enumerate(WORDS)}
V, UNK, START, END = len(WORDS), WORD_MAP["<unk>"], WORD_MAP["<start>"], WORD_MAP["<end>"]
NEVER = torch.tensor([0, UNK, START])
MAY = [index for index in range(V) if index not in NEVER]


def build(name, words=V):
    """A small decoder of that name."""
    values = dict.fromkeys(("attention_dim", "embed_dim", "decoder_dim"), 8)
    values |= {"vocab_size": words, "encoder_dim": 6, "encoded_image_size": 3, "dropout": 0.0}
    known = contract.config_fields(name)
    config = {key: value for key, value in values.items() if key in known}
    return contract.build_decoder(name, contract.make_config(name, config))


def batch(images=3, each=2, longest=7):
    """Features, captions with <unk> in them, and lengths."""
    lengths = torch.randint(3, longest + 1, (images * each,))
    captions = torch.randint(1, UNK + 1, (images * each, longest))
    captions[:, 0], captions[0, 1] = START, UNK
    captions[torch.arange(len(lengths)), lengths - 1] = END
    captions[torch.arange(longest) >= lengths[:, None]] = 0
    return torch.rand(images, 3, 3, 6), captions, lengths


# ----------------------------------------------------------------------------------- frequencies


def test_the_biases_are_the_logarithms_of_the_words_shares(tiny_data):
    folder, base = tiny_data
    word_map = datasets.read_word_map(folder, base)
    captions = json.loads(input_files.input_path(folder, base, "CAPTIONS", "TRAIN").read_text())
    counts = Counter(
        word for caption in captions for word in caption if word not in (0, word_map["<start>"])
    )
    assert counts[word_map["<end>"]] == len(captions)
    data = datasets.CaptionDataset(folder, base, "TRAIN")
    decoder = build("lstm", len(word_map))
    vocabulary.set_frequencies(decoder, datasets.count_targets(data, len(word_map)))
    for word, index in word_map.items():
        share = (counts[index] or 0.5) / sum(counts.values())
        assert decoder.fc.bias[index].item() == pytest.approx(math.log(share)), word
    assert not counts[word_map["<pad>"]] and not counts[word_map["<unk>"]]


@pytest.mark.parametrize("name", contract.DECODERS)
def test_the_first_loss_is_near_that_of_the_words_shares(name):
    shares = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    words = torch.from_numpy(np.random.default_rng(0).choice(5, (400, 9), p=shares)) + 1
    captions = torch.cat([torch.full((400, 1), START), words], dim=1)
    counts = words.flatten().bincount(minlength=V)
    found = counts[counts > 0] / counts.sum()
    entropy = -(found * found.log()).sum().item()
    decoder, outputs = build(name), []
    for prepare in (lambda: None, lambda: vocabulary.set_frequencies(decoder, counts)):
        prepare()
        made = decoder(torch.rand(400, 3, 3, 6), captions, torch.full((400,), 10))
        outputs.append(caption_loss(*made[:2], None).item())
    assert outputs[0] > entropy + 0.8  # by all words
    assert outputs[1] == pytest.approx(entropy, abs=0.15)


# ------------------------------------------------------------------------------- barred words


def by_hand(scores, targets, label_smoothing):
    """The mean loss over the words that may come, without the others' columns and rows."""
    real = [i for i, target in enumerate(targets.tolist()) if target in MAY]
    places = torch.tensor([MAY.index(target) for target in targets[real].tolist()])
    loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    return loss(scores[real][:, MAY], places)


@pytest.mark.parametrize("name", contract.DECODERS)
def test_barred_words_have_no_probability_and_training_leaves_them(name):
    decoder, (features, captions, lengths) = build(name), batch()
    assert vocabulary.barred(decoder) is None
    vocabulary.set_frequencies(decoder, captions.flatten().bincount(minlength=V))
    vocabulary.bar(decoder, WORD_MAP)
    barred = vocabulary.barred(decoder)
    assert set(barred.tolist()) == set(NEVER.tolist())
    objective = CrossEntropy(alpha_c=0.0, label_smoothing=0.1, barred=barred)
    before = {key: tensor.clone() for key, tensor in decoder.fc.state_dict().items()}
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.1, fused=True)
    for _ in range(4):
        made = decoder(features, captions, lengths)
        assert UNK in made.targets.data
        loss = objective(*made[:3])
        close(loss, by_hand(made.scores.data, made.targets.data, 0.1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key, tensor in decoder.fc.state_dict().items():
        assert torch.equal(tensor[NEVER], before[key][NEVER]) and not torch.equal(
            tensor, before[key]
        )
    made = decoder(features, captions, lengths)
    assert (made.scores.data.softmax(dim=1)[:, NEVER] == 0).all()
    memory = decoder.prepare(features)
    scores, *_ = decoder.step(torch.full((3,), START), decoder.init_state(memory), memory)
    assert (scores.softmax(dim=1)[:, NEVER] == 0).all()


@pytest.mark.parametrize("name", contract.DECODERS)
def test_decoding_is_by_the_probabilities_of_the_words_that_may_come(name):
    decoder = build(name).eval()
    nn.init.normal_(decoder.fc.weight)
    vocabulary.bar(decoder, WORD_MAP)
    features = torch.rand(3, 3, 3, 6)
    for search in (decoding.greedy, decoding.beam_search):
        for i, caption in enumerate(search(decoder, features, WORD_MAP, max_length=6)):
            words = [START, *caption.words, END]
            made = decoder(features[[i]], torch.tensor([words]), torch.tensor([len(words)]))
            log_p = made.scores.data[:, MAY].double().log_softmax(dim=1)
            own = log_p[range(len(words) - 1), [MAY.index(word) for word in words[1:]]]
            assert caption.log_prob == pytest.approx(own.sum().item(), rel=1e-4)


@pytest.mark.parametrize("bars", [False, True])
def test_the_losses_of_a_batchs_parts_add_up(bars):
    """However many <unk> each of the processes that share it has."""
    decoder, (features, captions, lengths) = build("lstm"), batch(5, 2)
    captions[:4, 1:3] = UNK
    if bars:
        vocabulary.bar(decoder, WORD_MAP)
    objective = CrossEntropy(0.7, 0.1, vocabulary.barred(decoder))

    def read(images):
        rows = [2 * i + k for i in images for k in range(2)]
        return decoder(features[images], captions[rows], lengths[rows])

    gradients, losses = [], []
    for shares in ([[0, 1, 2, 3, 4]], [[0, 2], [1, 3, 4]]):
        made = [read(images) for images in shares]
        sizes = torch.stack([objective.sizes(own.targets) for own in made])
        loss = sum(objective(*own, sizes=sizes.sum(0)) for own in made)
        gradients.append(torch.autograd.grad(loss, [decoder.fc.weight, decoder.fc.bias]))
        losses.append(loss)
    close(losses[1], losses[0])
    for one, two in zip(*gradients, strict=True):
        close(two, one)
    words = int((lengths - 1).sum())
    unknown = int(((captions == UNK) & (torch.arange(7) < lengths[:, None])).sum())
    assert sizes.sum(0).tolist() == [words - unknown * bars, 10]
    sums = sum(objective.sums(*own[:3]) for own in made)
    assert objective.of(sums) == pytest.approx(losses[0].item(), rel=1e-5)


def test_places_are_not_judged_by_barred_words():
    """One caption: the returns by a loop."""
    scores, targets = torch.randn(5, V), torch.tensor([3, UNK, 4, UNK, END])
    scores[:, NEVER] = vocabulary.BARRED
    log_p = scores.log_softmax(dim=1)
    excess = [
        0.0 if word == UNK else -log_p[t, word].item() - 0.3
        for t, word in enumerate(targets.tolist())
    ]
    drawn = contract.Drawn(torch.randn(5), torch.rand(5), torch.tensor([0.3, 1.0]))
    expected = sum(
        0.1 / 2.5 * sum(excess[t:]) * drawn.log_p[t].item() - 0.002 * drawn.entropy[t].item()
        for t in range(5)
    )
    packed = [nn.utils.rnn.pack_sequence([x], enforce_sorted=False) for x in (scores, targets)]
    close(reinforce(*packed, drawn, 2.5, barred=NEVER), expected)


# ------------------------------------------------------------------------ decoders without layers


class Bare(contract.Decoder):
    """Neither `embedding` nor `fc` is what the words need."""

    name = "bare"

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Linear(3, 4)
        self.fc = nn.Linear(3, V, bias=False)


@dataclasses.dataclass
class BareConfig:
    vocab_size: int = V


@pytest.mark.parametrize(
    ("option", "prepare"),
    [
        ("--embeddings", lambda d: vocabulary.set_vectors(d, torch.zeros(V, 4))),
        ("--freeze_embeddings", vocabulary.freeze_embeddings),
        ("--bias_init", lambda d: vocabulary.set_frequencies(d, torch.ones(V))),
        ("--bar_special", lambda d: vocabulary.bar(d, WORD_MAP)),
    ],
)
def test_a_decoder_without_such_a_layer_is_refused(option, prepare):
    decoder = Bare(BareConfig())
    with pytest.raises(UserError, match=f"{option}: the decoder 'bare' has no "):
        prepare(decoder)
    assert vocabulary.barred(decoder) is None
    del decoder.fc, decoder.embedding
    with pytest.raises(UserError, match=f"{option}: the decoder 'bare' has no "):
        prepare(decoder)
    assert vocabulary.barred(decoder) is None


def test_vectors_of_another_size_are_refused():
    with pytest.raises(UserError, match="'lstm' 8"):
        vocabulary.set_vectors(build("lstm"), torch.zeros(V, 5))


@pytest.mark.parametrize("name", contract.DECODERS)
def test_frozen_embeddings_are_not_trained(name):
    decoder = build(name)
    vectors = torch.randn(V, 8)
    vocabulary.set_vectors(decoder, vectors)
    vocabulary.freeze_embeddings(decoder)
    encoder = nn.Linear(2, 2).requires_grad_(False)
    encoder.fine_tune = lambda fine_tune, stride: encoder.requires_grad_(fine_tune)
    network = engine.Network(encoder, decoder, torch.device("cpu"), False)
    for finetune in (False, True):
        trained = network.trained(finetune)
        assert len(trained) == 1 + finetune
        assert len(trained[0]) == len(list(decoder.parameters())) - 1
        assert not any(parameter is decoder.embedding.weight for parameter in trained[0])
    caption_loss(*decoder(*batch())).backward()
    assert decoder.embedding.weight.grad is None
    assert torch.equal(decoder.embedding.weight, vectors)


# -------------------------------------------------------------------------------- command line


OPTIONS = ["--freeze_embeddings", "--bias_init", "frequencies", "--bar_special"]


@pytest.fixture(scope="module")
def start(tiny_data, tmp_path_factory):
    """How to train with vectors for some words, in a file."""
    folder, base = tiny_data
    file = tmp_path_factory.mktemp("vectors") / "vectors.txt.gz"
    words = [word for word in datasets.read_word_map(folder, base) if "<" not in word]
    vectors = {word: np.random.default_rng(i).normal(3, 1, 5) for i, word in enumerate(words[::2])}
    lines = [f"{word} {' '.join(map(repr, row.tolist()))}\n" for word, row in vectors.items()]
    file.write_bytes(gzip.compress("".join(lines).encode()))

    def run(output, *arguments):
        return run_here(
            "train.py", "--data_folder", folder, "--output_folder", output, "--encoder", OFFLINE,
            "--encoded_image_size", 3, "--attention_dim", 8, "--decoder_dim", 8, "--batch_size",
            30, "--stage", "decoder", "--device", "cpu", "--amp", "off", *arguments,
        )  # fmt: skip

    return run, file, vectors


def load(output, tiny_data):
    return checkpoints.load_checkpoint(checkpoints.checkpoint_path(output, tiny_data[1]))


@pytest.mark.slow
def test_words_begin_as_asked_and_stay_so_when_a_run_goes_on(start, tiny_data, tmp_path):
    run, file, vectors = start
    word_map = datasets.read_word_map(*tiny_data)
    own = shutil.copy(file, tmp_path / "vectors.txt.gz")
    output = tmp_path / "run"
    process = run(output, "--embeddings", own, "--embed_dim", 7)
    assert "--embed_dim 7" in failure(process) and "have 5 values" in failure(process)
    process = run(output, "--embeddings", own, *OPTIONS, "--epochs", 1)
    assert process.returncode == 0, process.stderr
    assert f"{own}: vectors for {len(vectors)} of {len(word_map)} words" in process.stdout
    first = load(output, tiny_data)
    table = first["decoder"]["embedding.weight"]
    for word, vector in vectors.items():
        close(table[word_map[word]], vector)
    others = table[[index for word, index in word_map.items() if word not in vectors]]
    assert 2 < others.mean() < 4 and 0.5 < others.std() < 1.5
    assert first["decoder_config"]["embed_dim"] == first["options"]["embed_dim"] == 5
    never = [word_map[word] for word in unsayable(word_map)]
    assert (first["decoder"]["fc.bias"][never] == vocabulary.BARRED).all()
    assert len(first["optimizer"]["state"]) == len(first["decoder"]) - 1

    own.unlink()  # the checkpoint has all of it
    for other in (["--embeddings", "other.txt"], ["--no-freeze_embeddings"], ["--no-bar_special"]):
        line = failure(run(output, "--resume", "--epochs", 2, *other))
        assert other[0] in line and "the model is the checkpoint's" in line
    process = run(output, "--resume", "--epochs", 2)
    assert process.returncode == 0, process.stderr
    second = load(output, tiny_data)
    assert second["epoch"] == 2
    assert torch.equal(second["decoder"]["embedding.weight"], table)
    assert not torch.equal(second["decoder"]["fc.weight"], first["decoder"]["fc.weight"])
    assert (second["decoder"]["fc.bias"][never] == vocabulary.BARRED).all()
    names = ("embeddings", "freeze_embeddings", "bias_init", "bar_special")
    assert [second["options"][name] for name in names] == [str(own), True, "frequencies", True]


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(start, tiny_data, tmp_path):
    run, file, _ = start
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    arguments = ["--embeddings", file, *OPTIONS, "--label_smoothing", 0.1, "--seed", 3]
    assert run(whole, *arguments, "--epochs", 2).returncode == 0
    assert run(halves, *arguments, "--epochs", 1).returncode == 0
    assert run(halves, "--resume", "--epochs", 2).returncode == 0
    one, two = (load(output, tiny_data)["decoder"] for output in (whole, halves))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    process = run_here("train.py", "--stage", "finetune", "--output_folder", whole, "--epochs", 1)
    assert process.returncode == 0, process.stderr
    tuned = load(whole, tiny_data)
    assert tuned["stage"] == "finetune"
    assert torch.equal(tuned["decoder"]["embedding.weight"], one["embedding.weight"])


def test_an_unfit_file_is_refused_before_anything_is_written(start, tiny_data, tmp_path):
    run, *_ = start
    line = failure(run(tmp_path / "run", "--embeddings", tmp_path / "none.txt"))
    assert "none.txt" in line and "--embeddings takes" in line
    assert not list((tmp_path / "run").glob("*.pth.tar"))
