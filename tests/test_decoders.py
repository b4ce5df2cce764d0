"""What holds of every decoder with every attention: each one that is registered is tested here.

Beside that, `transformer` and `merge` are checked against PyTorch's own layers.
"""

import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import OFFLINE, WORDS, close, run_here, short_captions
from test_scripts import tables
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence

import app
import checkpoints
import decoding
import engine
from attentions import ATTENTIONS
from captioner import Captioner
from config import TrainingConfig
from contract import DECODERS, build_decoder, config_fields, forward_whole, make_config
from decoding import beam_search, greedy
from encoders import Encoder
from groundwork import provenance
from objectives import CrossEntropy, caption_loss, sizes_of, top5_right
from run_state import RunFiles, RunState

V, D, GRID = 11, 6, 3  # words, values at a place, side of the alphas' grid
SIZES = {
    "vocab_size": V,
    "encoder_dim": D,
    "encoded_image_size": GRID,
    "attention_dim": 6,
    "embed_dim": 6,
    "decoder_dim": 7,
    "heads": 2,
    "dropout": 0.0,
}
STAGES = {
    "encoder_dim": 3 * 2**2 + 4,
    "stage_dims": (3, 4),
    "stage_factors": (2, 1),
    "feature_norm": "layer",
}


def variants():
    """Name and choices of every decoder, with every attention where it takes one."""
    for name in DECODERS:
        attentions = ATTENTIONS if "attention" in config_fields(name) else [None]
        for attention in attentions:
            yield (name, {"attention": attention} if attention else {})


# what changes a formula in no other test of this file
OTHERS = [
    ("lstm", {"gate": "channel", "query": "word", "deep_output": True}),
    ("lstm", {"gate": "channel", "deep_output": True, "attention": "multihead"}),
    ("gru", {"query": "word", "attention": "soft"}),
    ("topdown", {"query": "word"}),
    ("transformer", {"layers": 3, "heads": 1}),
    ("transformer", {"layers": 1, "heads": 3, "positions": 4}),
]


def name_of(variant):
    name, choices = variant
    return "-".join([name, *map(str, choices.values())])


every_variant = pytest.mark.parametrize("variant", [*variants(), *OTHERS], ids=name_of)
every_decoder = pytest.mark.parametrize("variant", [(name, {}) for name in DECODERS], ids=name_of)

each_once = pytest.mark.parametrize(  # every decoder, and every attention
    "variant",
    [(name, {}) for name in DECODERS] + [("gru", {"attention": name}) for name in ATTENTIONS],
    ids=name_of,
)


def build(variant, std=None, seed=0, **changes):
    """A decoder in evaluation mode, of the variant's choices and whichever sizes it has.

    Args:
        std: of its weights, so large that every term shows; None: as they are made.
        changes: of `SIZES` and the choices.
    """
    name, choices = variant
    own = config_fields(name)
    values = {key: value for key, value in (SIZES | choices | changes).items() if key in own}
    torch.manual_seed(seed)
    decoder = build_decoder(name, make_config(name, values))
    if std is not None:
        for parameter in decoder.parameters():
            nn.init.normal_(parameter, std=std)
    return decoder.eval()


def make_batch(lengths, per_image, grid=GRID, dim=D, seed=0):
    """encoder_out of the images, captions of random words, also past their ends, and lengths."""
    own = torch.Generator().manual_seed(seed)
    encoder_out = torch.randn(len(lengths) // per_image, grid, grid, dim, generator=own)
    captions = torch.randint(V, (len(lengths), max(lengths)), generator=own)
    return encoder_out, captions, torch.tensor(lengths)


def real_words(lengths):
    """(n, T - 1): whether a word is to be predicted there."""
    return torch.arange(int(lengths.max()) - 1) < lengths.unsqueeze(1) - 1


def unpacked(packed):
    return pad_packed_sequence(packed, batch_first=True)[0]


def close_alphas(actual, expected, tolerance=1e-5):
    if expected is None:
        assert actual is None
    else:
        close(actual, expected, tolerance)


# ------------------------------------------------------------------- teacher forcing and steps


def assert_steps_equal_forward(decoder, batch, tolerance):
    """Each word's scores and alphas, by steps and by the forward pass."""
    encoder_out, captions, lengths = batch
    scores, targets, alphas, _ = decoder(encoder_out, captions, lengths)
    assert torch.equal(
        unpacked(targets), captions[:, 1:].where(real_words(lengths), torch.tensor(0))
    )
    memory = decoder.prepare(encoder_out)
    images = torch.arange(len(captions)) // (len(captions) // len(encoder_out))
    state = decoder.init_state(memory).select(images)
    for t, real in enumerate(real_words(lengths).unbind(1)):
        step_scores, step_alphas, state = decoder.step(captions[:, t], state, memory)
        close(step_scores[real], unpacked(scores)[real, t].to(step_scores.dtype), tolerance)
        if alphas is None:
            assert step_alphas is None
        else:
            close(step_alphas[real], alphas[real, t], tolerance)


@every_variant
@pytest.mark.parametrize(
    "maps, per_image, grid",
    [({}, 1, GRID), ({}, 2, 2), (STAGES, 2, 2), (STAGES, 1, GRID)],
    ids=["one map", "pooled", "stages pooled", "stages"],
)
def test_steps_equal_the_forward_pass(variant, maps, per_image, grid):
    decoder = build(variant, std=0.6, **maps)
    batch = make_batch([7, 4, 2, 6, 7, 5], per_image, grid, decoder.config.encoder_dim)
    assert_steps_equal_forward(decoder, batch, 1e-5)


@every_variant
def test_computing_on_past_the_ends_changes_nothing(variant):
    """`forward_whole`, which a GPU's graphs are of: the same loss, accuracy and gradients."""
    decoder = build(variant, std=0.4)
    found = []
    for whole in (False, True):
        encoder_out, captions, lengths = make_batch([7, 4, 2, 6, 7, 5], 2, grid=2)
        encoder_out.requires_grad_()
        if whole:
            captions = F.pad(captions, (0, 3))
        read = (forward_whole if whole else type(decoder).__call__)(
            decoder, encoder_out, captions, lengths
        )
        sizes = sizes_of(read.targets) if not whole else found[0][2]
        loss = caption_loss(*read, label_smoothing=0.1, sizes=sizes)
        decoder.zero_grad()
        loss.backward()
        gradients = [p.grad for p in decoder.parameters() if p.grad is not None]
        right = top5_right(read.scores.data, read.targets.data)
        found.append([loss.detach(), right, sizes, encoder_out.grad, *gradients])
        if whole and read.alphas is not None:
            assert not read.alphas[:, 6:].any() and not read.alphas[2, 1:].any()
    assert sizes.tolist() == [25, 6]
    for expected, own in zip(*found, strict=True):
        close(own, expected, 1e-5)


@every_variant
def test_steps_equal_the_forward_pass_in_bfloat16(variant):
    decoder = build(variant, std=0.4)
    batch = make_batch([7, 4, 2, 6, 7, 5], 2)
    expected = decoder(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder(*batch)
        assert_steps_equal_forward(decoder, batch, 0.05)
        assert caption_loss(*found).dtype == torch.float32
    close(found.scores.data.float(), expected.scores.data, 0.1)
    close_alphas(found.alphas, expected.alphas, 0.05)
    if found.alphas is not None:
        assert found.alphas.dtype == torch.float32


@every_variant
def test_alphas_are_shares_of_the_places_and_zero_past_the_end(variant):
    batch = make_batch([7, 4, 2, 6], 2, grid=2)
    alphas = build(variant, std=0.6)(*batch).alphas
    if variant[0] == "merge" or variant[1].get("attention") == "none":
        assert alphas is None
        return
    assert alphas.shape == (4, 6, GRID**2) and alphas.dtype == torch.float32
    real, sums = real_words(batch[2]), alphas.sum(2)
    assert not alphas[~real].any()
    assert (alphas >= 0).all() and (sums < 1 + 1e-5).all() and (sums[real] > 0).all()
    if variant[1].get("attention") != "adaptive":  # which may look at what it remembers
        close(sums[real], torch.ones(int(real.sum())))


@every_variant
def test_captions_of_an_image_are_computed_as_if_each_had_its_own(variant):
    """Nor do the other captions of a batch, or what stands past an end, change anything."""
    decoder = build(variant, std=0.6)
    encoder_out, captions, lengths = make_batch([4, 7, 2, 6, 3, 5], 3, grid=2)
    scores, targets, alphas, _ = decoder(encoder_out, captions, lengths)
    repeated = encoder_out.repeat_interleave(3, dim=0)
    other = captions.where(torch.arange(7) < lengths.unsqueeze(1), 1)
    found = decoder(repeated, other, lengths)
    close(found.scores.data, scores.data)
    assert torch.equal(found.targets.data, targets.data)
    close_alphas(found.alphas, alphas)
    for i, n in enumerate(lengths.tolist()):
        alone = decoder(repeated[[i]], captions[[i], :n], lengths[[i]])
        close(alone.scores.data, unpacked(scores)[i, : n - 1])
        close_alphas(alone.alphas, None if alphas is None else alphas[[i], : n - 1])


# ------------------------------------------------------------------------------------- search


def uncached(decoder, encoder_out, histories):
    """Scores and alphas after the words of each row, all read anew; a row has its own image."""
    captions = torch.cat([histories, histories[:, :1]], dim=1)  # what comes is not read
    lengths = torch.full((len(captions),), captions.shape[1])
    scores, _, alphas, _ = decoder(encoder_out, captions, lengths)
    return unpacked(scores)[:, -1], None if alphas is None else alphas[:, -1]


@every_variant
def test_rows_that_are_reordered_go_on_as_if_read_anew(variant):
    """As a beam does: rows are dropped and doubled within an image, and images leave."""
    decoder, width = build(variant, std=0.6), 3
    encoder_out, captions, _ = make_batch([8] * 4 * width, width, grid=2)
    memory = decoder.prepare(encoder_out)
    state = decoder.init_state(memory).select(torch.arange(4).repeat_interleave(width))
    images, histories = torch.arange(4), captions[:, :0]
    for t in range(6):
        words = captions[: len(images) * width, t]
        histories = torch.cat([histories, words.unsqueeze(1)], dim=1)
        scores, alphas, state = decoder.step(words, state, memory)
        own = encoder_out[images].repeat_interleave(width, dim=0)
        expected = uncached(decoder, own, histories)
        close(scores, expected[0])
        close_alphas(alphas, expected[1])
        parents = torch.randint(width, (len(images), width))
        rows = torch.arange(len(images))[:, None] * width + parents
        if t in (1, 3):
            stay = torch.arange(len(images)) != 1
            memory, images, rows = memory.select(stay), images[stay], rows[stay]
        state, histories = state.select(rows.flatten()), histories[rows.flatten()]
    assert len(images) == 2


TINY = {"<pad>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4, "<start>": 5, "<end>": 6}


@every_variant
def test_a_wide_beam_finds_the_best_of_all_captions(variant):
    """Every caption of a language of three words is judged by teacher forcing."""
    all_captions = [list(words) for n in (1, 2, 3) for words in product((1, 2, 3), repeat=n)]
    rows = [[5, *words, 6] for words in all_captions]
    lengths = torch.tensor([len(row) for row in rows])
    captions = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    found = set()
    for seed in range(3):
        decoder = build(variant, 1.0, seed, vocab_size=7)
        with torch.no_grad():
            decoder.fc.bias[6] += seed - 1.0
        images = make_batch([2] * 3, 1, grid=2, seed=seed)[0]
        many = captions.repeat(3, 1), lengths.repeat(3)
        with torch.no_grad():
            scores, targets, *_ = decoder(images, *many)
        of_words = scores.data.log_softmax(1).gather(1, targets.data[:, None]).squeeze(1)
        log_probs = unpacked(targets._replace(data=of_words)).sum(1).view(3, -1)
        for penalty in (0.0, 0.7, 1.0):
            best = (log_probs / (lengths - 1) ** penalty).argmax(1).tolist()
            searched = beam_search(decoder, images, TINY, len(rows), 3, penalty)
            for caption, i, own in zip(searched, best, log_probs, strict=True):
                assert caption.words == all_captions[i]
                assert caption.log_prob == pytest.approx(own[i].item(), rel=1e-4)
                found.add(len(caption.words))
    assert len(found) > 1  # captions of several lengths are the best


# ----------------------------------------------------------------------------------- training


@every_variant
def test_gradients_reach_every_parameter_and_the_features(variant):
    for training in (True, False):
        decoder = build(variant, std=0.6, **STAGES).train(training)
        encoder_out, captions, lengths = make_batch([7, 4, 6, 6], 2, 2, STAGES["encoder_dim"])
        caption_loss(*decoder(encoder_out.requires_grad_(), captions, lengths)).backward()
        assert encoder_out.grad.abs().sum() > 0
        for name, parameter in decoder.named_parameters():
            assert parameter.grad is not None, name
            if name != "attention.full_att.bias":  # which a softmax passes over
                assert parameter.grad.abs().sum() > 0, name


@every_decoder
def test_dropout_falls_in_training_alone(variant):
    batch = make_batch([7, 4, 6, 6], 2)
    whole, dropped = (build(variant, std=0.6, dropout=p) for p in (0.0, 0.5))
    close(dropped(*batch).scores.data, whole(*batch).scores.data)
    assert not torch.allclose(dropped.train()(*batch).scores.data, whole(*batch).scores.data)


@every_variant
def test_rolling_out_true_words_equals_the_forward_pass_and_its_gradients(variant):
    """Whether captions leave together or, as soon as they are half of the batch, before others."""
    decoder = build(variant, std=0.6)
    for lengths in ([6] * 6, [3, 7, 2, 3, 2, 6]):
        encoder_out, captions, lengths = make_batch(lengths, 3, grid=2)
        scores, _, alphas, _ = decoder(encoder_out, captions, lengths)
        scores, ends = unpacked(scores), lengths - 1
        weights = torch.randn_like(scores)
        expected = gradients_of(decoder, (scores * weights).sum())

        def choose(_, step, rows, captions=captions, ends=ends):
            return captions[rows, step + 1], ends[rows] > step + 1

        loss, sizes = 0.0, []
        for t, step in enumerate(decoding.roll_out(decoder, encoder_out, captions[:, 0], choose)):
            rows, found, alpha, words = step
            assert torch.equal(words, captions[rows, t + 1])
            real = (t < ends[rows]).nonzero().squeeze(1)
            rows, found = rows[real], found[real]
            assert torch.equal(rows, (t < ends).nonzero().squeeze(1))
            close(found, scores[rows, t])
            if alphas is not None:
                close(alpha[real], alphas[rows, t])
            loss = loss + (found * weights[rows, t]).sum()
            sizes.append(len(words))
        assert len(sizes) == max(ends) and (min(sizes) < 6) == (min(ends) < max(ends))
        for name, gradient in gradients_of(decoder, loss).items():
            if expected[name] is None:
                assert gradient is None, name
            else:
                close(gradient, expected[name], 1e-4)


def gradients_of(decoder, loss):
    """Parameter -> its gradient, or None."""
    decoder.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in decoder.named_parameters()}


@every_variant
def test_words_drawn_have_the_log_p_of_teacher_forcing(variant):
    """Over the words that may come: what draws them gives the others no probability."""
    decoder, per_image = build(variant, std=0.4, vocab_size=len(TINY)), 4
    with torch.no_grad():
        decoder.fc.bias.zero_()
    encoder_out = make_batch([2] * 3, 1, grid=2)[0]
    drawn = decoding.draw(decoder, encoder_out, TINY, per_image, max_length=5)
    assert drawn.words.shape == drawn.log_probs.shape and len(drawn.words) == 12
    ended = drawn.words == TINY["<end>"]
    assert ended.any(dim=1).all()
    lengths = ended.int().argmax(dim=1) + 2  # with <start> and <end>
    assert len(set(lengths.tolist())) > 1
    start = torch.full((12, 1), TINY["<start>"])
    captions = torch.cat([start, drawn.words], dim=1)
    scores = unpacked(decoder(encoder_out, captions, lengths).scores)
    for own, words, log_probs, n in zip(scores, drawn.words, drawn.log_probs, lengths, strict=True):
        for t, word in enumerate(words.tolist()):
            allowed = [1, 2, 3] if t == 0 else [6] if t == 5 else [1, 2, 3, 6]
            if t < n - 1:
                close(log_probs[t], own[t, allowed].log_softmax(0)[allowed.index(word)])
            else:
                assert word == TINY["<end>"] and log_probs[t] == 0


@pytest.mark.parametrize(
    "variant", [(name, {}) for name in ("lstm", "gru", "topdown")], ids=name_of
)
def test_a_step_drops_words_out_in_training_as_the_forward_pass_does(variant):
    decoder = build(variant, std=0.6, embed_dropout=0.5)
    encoder_out, captions, _ = make_batch([2] * 200, 2)
    embedded = []
    decoder.embed_dropout.register_forward_hook(lambda *hooked: embedded.append(hooked[1:]))
    for training in (False, True):
        decoder.train(training)
        memory = decoder.prepare(encoder_out)
        state = decoder.init_state(memory).select(torch.arange(100).repeat_interleave(2))
        decoder.step(captions[:, 0], state, memory)
    ((words,), whole), (_, dropped) = embedded
    assert torch.equal(whole, words)
    kept = dropped != 0
    close(dropped[kept], 2 * words[kept])
    assert 0.4 < kept.float().mean() < 0.6


@each_once
def test_a_few_captions_are_learned_by_heart(variant):
    wide = dict.fromkeys(("attention_dim", "embed_dim", "decoder_dim"), 24)
    decoder = build(variant, **wide, vocab_size=len(WORDS) + 4, heads=2, layers=1)
    word_map = WORDS | {word: len(WORDS) + i for i, word in enumerate("wxyz")}
    features, captions, lengths = make_batch([6, 5, 4, 6], 1)
    captions = torch.tensor(
        [[4, 1, 2, 6, 7, 5], [4, 1, 7, 8, 5, 0], [4, 9, 6, 5, 0, 0], [4, 1, 2, 9, 9, 5]]
    )
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    decoder.train()
    for _ in range(80):
        optimizer.zero_grad()
        caption_loss(*decoder(features, captions, lengths), alpha_c=0.0).backward()
        optimizer.step()
    found = greedy(decoder.eval(), features, word_map)
    for caption, words, n in zip(found, captions.tolist(), lengths.tolist(), strict=True):
        assert caption.words == words[1 : n - 1]


@each_once
def test_equal_passes_give_equal_gradients_on_several_threads(variant):
    """Sizes at which PyTorch shares sums out to threads."""
    wide = {"attention_dim": 128, "embed_dim": 128, "decoder_dim": 512}
    decoder = build(variant, **wide, vocab_size=500, encoder_dim=256, encoded_image_size=6)
    features, captions = torch.randn(16, 6, 6, 256), torch.randint(500, (80, 8))
    lengths = torch.randint(2, 9, (80,))
    threads, first = torch.get_num_threads(), None
    torch.set_num_threads(4)
    try:
        for _ in range(4):
            decoder.zero_grad()
            caption_loss(*decoder(features, captions, lengths)).backward()
            found = {name: p.grad.clone() for name, p in decoder.named_parameters()}
            first = first or found
            for name, gradient in found.items():
                assert torch.equal(gradient, first[name]), name
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------- checkpoints


@every_decoder
def test_the_layers_of_the_vocabulary_are_called_the_same(variant):
    decoder = build(variant)
    assert type(decoder.embedding) is nn.Embedding and type(decoder.fc) is nn.Linear
    assert decoder.embedding.num_embeddings == decoder.fc.out_features == V
    assert decoder.embedding.embedding_dim == decoder.config.embed_dim


@pytest.fixture(scope="module")
def encoder():
    return Encoder(OFFLINE, GRID, weights=None).eval()


def train_on(encoder, decoder, checkpoint, epochs, files):
    """Epochs of a run on random features, gone on with where there is a checkpoint; saved."""
    network = engine.Network(encoder, decoder, torch.device("cpu"), amp=False)
    config = TrainingConfig(decoder_lr=1e-2)
    record = dict.fromkeys(provenance.KEYS, "x") | {"seconds": 0.0}
    options = {"data_folder": "", "decoder_lr": config.decoder_lr}
    log = checkpoint["log"] if checkpoint else []
    state = RunState(network, config, "tiny", WORDS, options, [record], log, None, 96, "squeeze")
    state.begin("decoder")
    if checkpoint:
        state.restore(checkpoint, data=None)
    while state.epoch < epochs:
        features, captions, lengths = make_batch([7, 4, 6, 6], 2, 2, encoder.dim)
        batch = features, captions.view(2, 2, -1) % len(WORDS), lengths.view(2, 2)
        engine.train_epoch(
            network, [batch] * 3, CrossEntropy(), state.optimizer, 5.0, state.means,
            lambda: [], lambda step: None,
        )  # fmt: skip
        scores = {f"bleu{n}": 0.0 for n in range(1, 5)} | {"lr": 0.0, "val_loss": 0.0}
        record = {"stage": "decoder", "epoch": state.epoch + 1, "loss": state.means["loss"]}
        state.end_epoch(record | scores)
    state.save(files, {}, 0.0)
    return checkpoints.load_checkpoint(files.newest, checkpoints.RUN_KEYS)


@each_once
def test_a_run_that_was_stopped_goes_on_from_its_checkpoint_exactly(variant, encoder, tmp_path):
    """With dropout, and whatever an attention draws or counts."""
    sizes = {"vocab_size": len(WORDS), "encoder_dim": encoder.dim, "dropout": 0.3}
    files, found = RunFiles(tmp_path, "tiny"), []
    for stops in ([4], [2, 4]):
        torch.manual_seed(5)
        checkpoint, decoder = None, build(variant, **sizes)
        for epochs in stops:
            if checkpoint:
                torch.manual_seed(6)
                _, decoder = checkpoints.build_models(checkpoint)
            checkpoint = train_on(encoder, decoder, checkpoint, epochs, files)
        found.append(checkpoint)
    whole, halves = found
    assert [line["loss"] for line in whole["log"]] == [line["loss"] for line in halves["log"]]
    for name, tensor in whole["decoder"].items():
        assert torch.equal(tensor, halves["decoder"][name]), name
    _, rebuilt = checkpoints.build_models(halves, dropout=0.1)
    assert type(rebuilt) is type(decoder) and rebuilt.config.dropout == 0.1
    features, captions, lengths = make_batch([5, 4], 1, 2, encoder.dim)
    captions = captions % len(WORDS)
    expected = decoder.eval()(features, captions, lengths).scores.data
    assert torch.equal(rebuilt(features, captions, lengths).scores.data, expected)


# ------------------------------------------------------------------------------- command line


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_goes_through_all_scripts(name, tiny_data, scenes, tmp_path, monkeypatch):
    """Both stages, in one run and stopped between them; evaluation, report, captions, viewer."""
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    short_captions(monkeypatch, 8)
    whole, halves = tmp_path / "whole", tmp_path / "halves"

    def train(output, *arguments):
        process = run_here(
            "train.py", "--data_folder", tiny_data[0], "--output_folder", output, "--decoder", name,
            "--encoder", OFFLINE, "--encoded_image_size", GRID, "--batch_size", 20,
            "--finetune_batch_size", 40, "--device", "cpu", *arguments,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return checkpoints.load_checkpoint(checkpoints.checkpoint_path(output, tiny_data[1]))

    one = train(whole, "--stage", "both", "--epochs", 1)
    train(halves, "--stage", "decoder", "--epochs", 1)
    two = train(halves, "--stage", "both", "--epochs", 1, "--resume")
    assert one["stage"] == two["stage"] == "finetune"
    for part in ("encoder", "decoder"):
        for key, tensor in one[part].items():
            assert torch.equal(tensor, two[part][key]), key

    process = run_here(
        "eval.py", "--checkpoint", whole, "--data_folder", tiny_data[0], "--beam_size", 1, 3,
        "--attention_report", "--results_folder", tmp_path, "--report", tmp_path / "page",
        "--device", "cpu", "--max_len", 8,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "page" / "index.html").exists()
    attends = name != "merge"
    assert ("no attention report: this decoder has no attention" in process.stdout) != attends
    assert tables(process.stdout)[0].keys() >= {"beam 1", "beam 3"}

    image = min((scenes / "images").iterdir())
    process = run_here("caption.py", "--img", image, "--model", whole, "--json", "--device", "cpu",
                       "--output_folder", tmp_path, "--max_len", 8)  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)[0]["caption"]
    model = Captioner.load(whole, "cpu")
    [beam] = model.caption(image, beam_size=3, n=2)
    assert [caption.alphas is not None for caption in beam] == [attends] * 2
    assert "attention-view" in app.render(image, {"model": model}, 2, 0.0, 10, 0.0)


# ----------------------------------------------------------------------- hostile configurations


def refused(name, values):
    """The message with which a decoder of these values is refused, of one line."""
    with pytest.raises(ValueError) as error:
        build_decoder(name, make_config(name, values))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", DECODERS)
def test_a_configuration_that_cannot_be_is_refused(name):
    fields = config_fields(name)
    sizes = {"vocab_size": V, "encoder_dim": D}
    for key, field in fields.items():
        wrong = {int: [0, -1, True, "8", 8.0, None], float: [-0.1, 1.0, float("nan"), "x", None]}
        wrong |= {str: ["other", 1, None], bool: ["yes", 1], tuple: [(0,), [1], (1,), ("a",)]}
        for value in wrong[field.type]:
            assert key in refused(name, sizes | {key: value}) or field.type is tuple
    stages = {"stage_dims": (3, 4), "stage_factors": (2, 1)}
    assert "16" in refused(name, sizes | stages)
    assert "nothing" in refused(name, sizes | {"nothing": 1})


@pytest.mark.parametrize(
    "name, values, words",
    [
        ("transformer", {"heads": 3}, "3 heads cannot share 256 units out"),
        ("transformer", {"embed_dim": 255}, "2 heads cannot share 255 units out"),
        ("transformer", {"layers": 10**12}, "layers are 1000000000000: 100 at most"),
        ("merge", {"attention": "soft"}, "has no attention"),
        *(
            (name, {"attention": "multihead", "heads": 5}, "heads")
            for name in DECODERS
            if "attention" in config_fields(name)
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(name, values, words):
    assert words in refused(name, {"vocab_size": V, "encoder_dim": D} | values)


@every_variant
def test_weights_of_other_sizes_are_refused_before_they_take_memory(variant):
    name, _ = variant
    decoder = build(variant)
    state = decoder.state_dict()
    config = vars(decoder.config)
    for key in {"vocab_size", "encoder_dim", "embed_dim", "decoder_dim", "positions"} & {*config}:
        large = make_config(name, config | {key: 6 * 10**9})
        with pytest.raises(ValueError, match="not a decoder of this model"):
            build_decoder(name, large, state)
    with pytest.raises(ValueError, match="not a decoder of this model"):
        build_decoder(name, decoder.config, {key: state[key] for key in list(state)[1:]})


# ------------------------------------------------------------ transformer, by PyTorch's own layers


def as_pytorch(decoder):
    """nn.TransformerDecoder with the weights of a `transformer`."""
    config = decoder.config
    layer = nn.TransformerDecoderLayer(
        config.embed_dim, config.heads, 2 * config.embed_dim, dropout=0.0, batch_first=True
    )
    stack = nn.TransformerDecoder(layer, config.layers).eval()
    for theirs, ours in zip(stack.layers, decoder.layers, strict=True):
        looks, first, last = theirs.multihead_attn, ours.feed_forward[0], ours.feed_forward[2]
        pairs = [
            (theirs.self_attn.out_proj, ours.self_out), (looks.out_proj, ours.cross_out),
            (theirs.linear1, first), (theirs.linear2, last), (theirs.norm1, ours.self_norm),
            (theirs.norm2, ours.cross_norm), (theirs.norm3, ours.feed_forward_norm),
        ]  # fmt: skip
        for their, our in pairs:
            their.load_state_dict(our.state_dict())
        for attention, own in (
            (theirs.self_attn, [ours.self_in]),
            (looks, [ours.cross_query, ours.cross_places]),
        ):
            with torch.no_grad():
                attention.in_proj_weight.copy_(torch.cat([part.weight for part in own]))
                attention.in_proj_bias.copy_(torch.cat([part.bias for part in own]))
    return stack


@pytest.mark.parametrize("choices", [{}, {"layers": 3, "heads": 3}, {"heads": 1, "positions": 4}])
@pytest.mark.parametrize("stages", [False, True])
def test_the_transformer_equals_that_of_pytorch(choices, stages):
    decoder = build(("transformer", choices), std=0.5, **(STAGES if stages else {}))
    batch = make_batch([7, 4, 2, 6], 2, 2 if stages else GRID, decoder.config.encoder_dim)
    encoder_out, captions, lengths = batch
    if stages:
        annotations = by_stages(decoder.annotations, encoder_out)
    else:
        annotations = encoder_out.flatten(1, 2)
    places = decoder.places(annotations).repeat_interleave(2, dim=0)
    positions = torch.arange(6).clamp(max=decoder.config.positions - 1)
    words = decoder.embedding(captions[:, :-1]) + decoder.positions(positions)

    stack, weights = as_pytorch(decoder), []

    def ask_for_weights(module, args, kwargs):
        return args, kwargs | {"need_weights": True}  # of each head averaged, as by default

    for layer in stack.layers:
        layer.multihead_attn.register_forward_pre_hook(ask_for_weights, with_kwargs=True)
        layer.multihead_attn.register_forward_hook(lambda *hooked: weights.append(hooked[2][1]))
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    expected = decoder.fc(stack(words, places, tgt_mask=mask, tgt_is_causal=True))

    scores, _, alphas, _ = decoder(*batch)
    real = real_words(lengths)
    close(unpacked(scores)[real], expected[real])
    close(alphas[real], torch.stack(weights).mean(0)[real])


def by_stages(module, encoder_out):
    """Annotation vectors (I, L, D) of maps packed as `STAGES` has them, 4 × 4 and 2 × 2 places,
    place by place."""
    fine, coarse = [], []
    for image in encoder_out:
        for row in range(4):
            for column in range(4):
                folded = image[row // 2, column // 2, :12].view(2, 2, 3)
                fine.append(module.norms[0](folded[row % 2, column % 2]))
        coarse += [module.norms[1](place[12:]) for place in image.flatten(0, 1)]
    maps = []
    for places, side in ((fine, 4), (coarse, 2)):
        grid = torch.stack(places).view(len(encoder_out), side, side, -1).permute(0, 3, 1, 2)
        maps.append(nn.functional.adaptive_avg_pool2d(grid, GRID))
    return torch.cat(maps, dim=1).flatten(2).transpose(1, 2)


def test_words_past_the_learned_positions_count_as_at_the_last():
    """So a caption of any length is read and written."""
    decoder = build(("transformer", {"positions": 4}), std=0.6)
    features, captions, lengths = make_batch([30], 1)
    scores = decoder(features, captions, lengths).scores.data
    wide = build(("transformer", {"positions": 40}))
    state = decoder.state_dict()
    learned = state["positions.weight"]
    state["positions.weight"] = torch.cat([learned, learned[-1:].expand(36, -1)])
    wide.load_state_dict(state)
    close(wide(features, captions, lengths).scores.data, scores)
    with torch.no_grad():
        decoder.fc.bias[WORDS["<end>"]] -= 1e4
    (caption,) = greedy(decoder, features, WORDS, max_length=20)
    assert len(caption.words) == 20


def test_the_transformer_keeps_keys_and_values_once_an_image():
    """The captions of an image do not copy them."""
    decoder = build(("transformer", {}))
    memory = decoder.prepare(torch.randn(2, GRID, GRID, D))
    assert [places.shape for places in memory.places] == [(2, 2, 2, GRID**2, 3)] * 2
    state = decoder.init_state(memory).select(torch.arange(2).repeat_interleave(5))
    for t in range(3):
        assert [words.shape for words in state.words] == [(10, 2, 2, t, 3)] * 2
        _, _, state = decoder.step(torch.arange(10), state, memory)


# ---------------------------------------------------------------------- merge, by nn.LSTMCell


@pytest.mark.parametrize("grid, size", [(GRID, GRID), (2, 5), (1, 14)])
def test_merge_adds_the_mean_of_the_map_to_the_sentence(grid, size):
    decoder = build(("merge", {}), std=0.6, encoded_image_size=size)
    encoder_out, captions, lengths = make_batch([7, 4, 2, 6], 2, grid)
    scores, _, alphas, _ = decoder(encoder_out, captions, lengths)
    assert alphas is None
    p = SimpleNamespace(**dict(decoder.named_children()))
    cell = nn.LSTMCell(decoder.config.embed_dim, decoder.config.decoder_dim)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in p.lstm.state_dict().items()})
    for i, caption in enumerate(captions):
        image = torch.relu(p.image(encoder_out[i // 2].flatten(0, 1).mean(0)))
        state = torch.zeros(2, 1, decoder.config.decoder_dim).unbind()
        for t in range(lengths[i] - 1):
            state = cell(p.embedding(caption[[t]]), state)
            expected = p.fc(torch.relu(p.merged(state[0][0] + image)))
            close(unpacked(scores)[i, t], expected)


def test_merge_takes_a_vector_in_place_of_a_map():
    decoder = build(("merge", {}), std=0.6, encoder_dim=40)
    vector, captions, lengths = make_batch([5, 3], 1, grid=1, dim=40)
    as_map = vector.expand(-1, GRID, GRID, -1)
    close(
        decoder(vector, captions, lengths).scores.data,
        decoder(as_map, captions, lengths).scores.data,
    )
