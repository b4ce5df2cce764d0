"""Ensembles against the plain mean of what their members say alone, one word at a time."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import OFFLINE, close, failure, run_here, tiny_checkpoint
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_packed_sequence

import app
import checkpoints
import eval as script
import robustness
import vocabulary
from captioner import Captioner
from contract import build_decoder, make_config
from datasets import open_images, read_word_map
from decoding import beam_search, finished_beams, greedy, sample
from encoders import Encoder
from ensemble import Encoders, Ensemble, Features
from evaluation_data import EvaluationData
from groundwork.errors import UserError
from groundwork.images import squeeze
from objectives import caption_loss
from word_rules import unsayable

WORDS = ["<pad>", *"abcdef", "<unk>", "<start>", "<end>"]
WORD_MAP = {word: i for i, word in enumerate(WORDS)}
V = len(WORDS)
TINY = {"<pad>": 0, "a": 1, "b": 2, "c": 3, "<unk>": 4, "<start>": 5, "<end>": 6}
LENGTH = 6
MEMBERS = [
    ("lstm", {"attention": "soft"}),
    ("lstm", {"attention": "adaptive"}),  # whose alphas sum to less than one
    ("lstm", {"attention": "none"}),
    ("gru", {"attention": "bahdanau"}),
    ("topdown", {"attention": "hard"}),
    ("transformer", {"heads": 2}),
    ("merge", {}),
]
every_pair = pytest.mark.parametrize(
    "pair", list(itertools.combinations(range(len(MEMBERS)), 2)), ids=str
)


def member(which, seed=0, grid=3, dim=5, words=V, std=0.8):
    """A decoder with weights so large that captions differ."""
    torch.manual_seed(seed)
    name, choices = MEMBERS[which]
    sizes = {"vocab_size": words, "encoder_dim": dim, "encoded_image_size": grid, "embed_dim": 6}
    if name != "transformer":
        sizes["decoder_dim"] = 7
    if "attention" in choices:
        sizes["attention_dim"] = 6
    decoder = build_decoder(name, make_config(name, sizes | choices))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=std)
    return decoder.eval()


def features_of(*shapes, images=4, seed=0):
    """Random features of grids g with D values, for a member each."""
    generator = torch.Generator().manual_seed(seed)
    return Features(tuple(torch.randn(images, g, g, dim, generator=generator) for g, dim in shapes))


def mean_of(values):
    return torch.stack(values).mean(dim=0)


# ------------------------------------------------------------------------------------- a step


@every_pair
@torch.no_grad()
def test_a_step_is_the_mean_of_the_members_probabilities(pair):
    """Of other decoders and attentions, on features of other encoders, in rows that a search
    reorders."""
    shapes = [(2, 5), (3, 4)]
    decoders = [
        member(which, seed=dim, dim=dim) for which, (_, dim) in zip(pair, shapes, strict=True)
    ]
    features, together = features_of(*shapes), Ensemble(decoders)
    memories = [own.prepare(part) for own, part in zip(decoders, features.parts, strict=True)]
    rows = torch.arange(4).repeat_interleave(3)
    states = [
        own.init_state(memory).select(rows) for own, memory in zip(decoders, memories, strict=True)
    ]
    memory = together.prepare(features)
    state = together.init_state(memory).select(rows)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        words = torch.randint(len(WORDS), (12,), generator=generator)
        alone = [
            own.step(words, *rest) for own, *rest in zip(decoders, states, memories, strict=True)
        ]
        scores, alphas, state = together.step(words, state, memory)
        close(scores, mean_of([own.double().softmax(1) for own, *_ in alone]).log())
        seen = [own for _, own, _ in alone if own is not None]
        if seen:
            close(alphas, mean_of(seen))
        else:
            assert alphas is None
        order = 3 * (rows.clone()) + torch.randint(3, (12,), generator=generator)
        states = [own.select(order) for *_, own in alone]
        state = state.select(order)


@every_pair
@torch.no_grad()
def test_teacher_forcing_equals_the_steps(pair):
    features = features_of((2, 5), (2, 5))
    together = Ensemble([member(which, i) for i, which in enumerate(pair)])
    captions, lengths = torch.randint(1, len(WORDS), (8, 6)), torch.tensor([6, 3, 4, 6, 2, 5, 6, 6])
    scores, targets, alphas, drawn = together(features, captions, lengths)
    assert drawn is None
    scores, _ = pad_packed_sequence(scores, batch_first=True)
    targets, _ = pad_packed_sequence(targets, batch_first=True)
    memory = together.prepare(features)
    state = together.init_state(memory).select(torch.arange(4).repeat_interleave(2))
    for t in range(5):
        found, alpha, state = together.step(captions[:, t], state, memory)
        for i in (lengths - 1 > t).nonzero().flatten():
            close(scores[i, t], found[i], 1e-4)
            assert targets[i, t] == captions[i, t + 1]
            if alpha is not None:
                close(alphas[i, t], alpha[i], 1e-4)


@torch.no_grad()
def test_alphas_are_the_mean_of_those_that_look_where_grids_agree():
    features, (soft, sentinel, blind) = features_of(*[(2, 5)] * 3), (0, 1, 6)

    def alphas(*decoders):
        together = Ensemble(decoders)
        memory = together.prepare(Features(features.parts[: len(decoders)]))
        words = torch.full((4,), WORD_MAP["<start>"])
        return together.step(words, together.init_state(memory), memory)[1]

    sums = alphas(member(soft), member(sentinel)).sum(dim=1)
    assert (sums > 0.5).all() and (sums < 1).all()
    close(alphas(member(soft), member(blind)), alphas(member(soft)))
    assert alphas(member(soft), member(soft, grid=2)) is None
    assert alphas(member(soft), member(sentinel, grid=2), member(blind)) is None
    close(alphas(member(soft), member(blind, grid=2)), alphas(member(soft)))  # which does not look
    assert alphas(member(blind), member(blind)) is None


@torch.no_grad()
def test_words_that_members_bar():
    features, never = features_of((2, 5), (2, 5)), [WORD_MAP[word] for word in unsayable(WORD_MAP)]
    free, barring, other = (member(0, seed) for seed in range(3))
    for own in (barring, other):
        vocabulary.bar(own, WORD_MAP)

    def step(*decoders):
        together = Ensemble(decoders)
        memory = together.prepare(Features(features.parts[: len(decoders)]))
        words = torch.full((4,), WORD_MAP["<start>"])
        return together.step(words, together.init_state(memory), memory)[0].exp()

    close(step(free, barring)[:, never], step(free)[:, never] / 2)
    assert vocabulary.barred(Ensemble([free, barring])) is None
    assert not step(barring, other)[:, never].any()
    both = Ensemble([barring, other])
    assert vocabulary.barred(both).tolist() == sorted(never)
    captions = torch.tensor([[8, 1, 7, 2, 9]] * 4)  # with <unk>, of which the loss takes no notice
    made = both(features, captions, torch.full((4,), 5))
    log_p, _ = pad_packed_sequence(made.scores, batch_first=True)
    own = log_p.gather(2, captions[:, 1:, None])[:, [0, 2, 3]]
    loss = caption_loss(*made, alpha_c=0.0, barred=vocabulary.barred(both))
    assert loss.item() == pytest.approx(-own.mean().item(), rel=1e-5) and loss.isfinite()


# ------------------------------------------------------------------------------------- searching


@pytest.mark.parametrize("which", range(len(MEMBERS)))
def test_a_model_beside_itself_is_the_model_alone(which):
    own, features = member(which), features_of((2, 5))
    twice, both = Ensemble([own, own]), Features(features.parts * 2)

    def drawn(decoder, features):
        generator = torch.Generator().manual_seed(0)
        return sample(decoder, features, WORD_MAP, LENGTH, generator=generator)

    def beams(decoder, features):
        found = finished_beams(decoder, features, WORD_MAP, 4, LENGTH, 0.7)
        return [caption for captions in found for caption in captions]

    for search in (lambda *args: greedy(*args, WORD_MAP, LENGTH), drawn, beams):
        pairs = zip(search(own, *features.parts), search(twice, both), strict=True)
        for alone, together in pairs:
            assert alone.words == together.words
            assert together.log_prob == pytest.approx(alone.log_prob, rel=1e-5, abs=1e-5)
            if alone.alphas is None:
                assert together.alphas is None
            else:
                close(together.alphas, alone.alphas)


@torch.no_grad()
def log_p_by_hand(decoders, parts, words, word_map):
    """log p of a caption of one image: of each word the mean of the members' probabilities."""
    caption = torch.tensor([[word_map["<start>"], *words, word_map["<end>"]]])
    length = torch.tensor([caption.shape[1]])
    found = [own(part, caption, length) for own, part in zip(decoders, parts, strict=True)]
    p = mean_of([made.scores.data.double().softmax(1) for made in found])
    return p.gather(1, caption[0, 1:, None]).log().sum().item()


@pytest.mark.parametrize("pair", [(0, 1), (3, 5), (4, 6)])
def test_a_wide_beam_finds_what_trying_every_caption_finds(pair):
    decoders = [member(which, i, words=len(TINY)) for i, which in enumerate(pair)]
    features = features_of((2, 5), (3, 5), images=3)
    every = [words for n in (1, 2) for words in itertools.product((1, 2, 3), repeat=n)]
    found = finished_beams(Ensemble(decoders), features, TINY, 12, 2)
    [*best] = beam_search(Ensemble(decoders), features, TINY, 12, 2)
    for i, captions in enumerate(found):
        parts = [part[[i]] for part in features.parts]
        expected = {words: log_p_by_hand(decoders, parts, words, TINY) for words in every}
        assert {tuple(caption.words) for caption in captions} == set(every)
        for caption in captions:
            assert caption.log_prob == pytest.approx(expected[tuple(caption.words)], abs=1e-4)
        assert tuple(best[i].words) == max(expected, key=expected.get)


def test_the_ensemble_is_of_another_opinion_than_its_members():
    """Guards the tests above: the mean is that of no member."""
    decoders, features = [member(which, which) for which in (0, 5)], features_of((2, 5), (2, 5))
    alone = [
        greedy(own, part, WORD_MAP, LENGTH)
        for own, part in zip(decoders, features.parts, strict=True)
    ]
    together = greedy(Ensemble(decoders), features, WORD_MAP, LENGTH)
    for captions in alone:
        assert [c.words for c in captions] != [c.words for c in together]


# ------------------------------------------------------------------------------------- encoders


def test_encoders_that_are_alike_run_once_and_each_sees_its_own_size(monkeypatch):
    torch.manual_seed(0)
    one, same, other = (Encoder("resnet18", weights=None) for _ in range(3))
    same.load_state_dict(one.state_dict())
    stages = Encoder("resnet18", weights=None, stages=["16", "32"])
    stages.load_state_dict(one.state_dict())
    runs = Counter()
    features = Encoder.features
    monkeypatch.setattr(
        Encoder,
        "features",
        lambda self, images: runs.update([images.shape[3]]) or features(self, images),
    )
    images = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    encoders = [one, same, other, stages, same]
    together = Encoders(encoders, [96, 96, 96, 96, 64])
    found = together.features(images)
    assert runs == {96: 3, 64: 1}
    assert found.parts[0] is found.parts[1] and len(found) == 2
    for part, encoder in zip(found.parts[:4], encoders, strict=False):
        assert part.equal(features(encoder, images))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    squares = torch.from_numpy(np.stack([squeeze(picture, 64) for picture in pictures]))
    expected = features(same, squares)  # of whole numbers, as the others are not
    assert found.parts[4].shape == expected.shape
    assert (found.parts[4] - expected).norm() < 0.01 * expected.norm()
    together.freeze()
    for folded, part in zip(together.features(images).parts, found.parts, strict=True):
        close(folded, part, 1e-3)


# ------------------------------------------------------------------------------- with checkpoints


@pytest.fixture(scope="module")
def save(tiny_data, tmp_path_factory):
    """Makes the checkpoint of a model that has learned nothing, of the tiny data."""
    folder, base = tiny_data
    words = read_word_map(folder, base)
    options = {"data_folder": str(folder)}

    def save(which, name, encoder, size=96, word_map=words, grid=3, seed=0):
        decoder = member(which, seed, grid, encoder.dim, len(word_map), std=0.15)
        config = vars(decoder.config)
        path = tmp_path_factory.mktemp(name) / f"BEST_checkpoint_{base}.pth.tar"
        models = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
        models |= {"decoder_name": decoder.name, "decoder_config": config}
        models |= {"encoder_name": encoder.name, "encoder_stages": encoder.stages}
        sizes = {"encoded_image_size": grid, "image_size": size}
        checkpoints.save_checkpoint(
            path,
            tiny_checkpoint(**models, **sizes, base=base, word_map=word_map, options=options),
        )
        return path

    return save


@pytest.fixture(scope="module")
def lite2():
    return Encoder(OFFLINE)


@pytest.fixture(scope="module")
def paths(save, lite2):
    """Two models of one encoder, and one of another that sees smaller images."""
    lite0 = Encoder("timm:tf_efficientnet_lite0")
    return [
        save(0, "first", lite2),
        save(5, "second", lite2, seed=1),
        save(1, "third", lite0, size=64, seed=2),
    ]


@pytest.fixture(scope="module")
def pictures(scenes):
    return sorted((scenes / "images").iterdir())[:2]


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")  # whose scores take seconds


def captions_of(model, images, beam_size=3, n=None, temperature=0, **options):
    """Captions of eight words at most: models that have learned nothing find no end."""
    return list(model.caption(images, beam_size, n, temperature, 8, **options))


@torch.no_grad()
def test_models_of_several_encoders_and_image_sizes_caption_together(paths, pictures):
    models = [Captioner.load(path, "cpu", amp="off") for path in paths]
    together = Captioner.load(paths, "cpu", amp="off")
    assert [model.image_size for model in models] == [96, 96, 64] and together.image_size == 96
    assert len(together.encoder.encoders) == 2
    assert [about["image_size"] for about in together.abouts] == [96, 96, 64]
    captions = captions_of(together, pictures)
    for picture, found in zip(pictures, captions, strict=True):
        square = squeeze(Image.open(picture), 96)
        small = squeeze(Image.fromarray(square.transpose(1, 2, 0)), 64)
        squares = [torch.from_numpy(own)[None] for own in (square, square, small)]
        features = [
            next(model.encode_ahead([own])) for model, own in zip(models, squares, strict=True)
        ]
        words = [together.word_map[word] for word in found.words]
        decoders = [model.decoder for model in models]
        log_p = log_p_by_hand(decoders, features, words, together.word_map)
        assert found.log_prob == pytest.approx(log_p, abs=2e-2)
        alone = [
            log_p_by_hand([own], [part], words, together.word_map)
            for own, part in zip(decoders, features, strict=True)
        ]
        assert max(alone) - min(alone) > 0.2
        assert found.alphas.shape == (len(words), 9) and (found.alphas.sum(1) < 1).all()
        assert found.draw(picture).width > 0


def test_the_gradients_sign_is_that_of_the_mean(paths, tiny_data):
    models = [Captioner.load(path, "cpu", amp="off") for path in paths[:2]]
    together = Captioner.load(paths[:2], "cpu", amp="off")
    images, captions, lengths = EvaluationData(*tiny_data, "TEST", together)[0]
    found = robustness.ascent(together, images[None] / 255, captions[None, :1], lengths[None, :1])
    pixels = (images[None] / 255).requires_grad_()
    caption, length = captions[:1, : lengths[0]], lengths[:1]
    scores = [
        model.decoder(model.encoder.features(pixels), caption, length).scores.data
        for model in models
    ]
    p = mean_of([own.softmax(1) for own in scores])
    (-p.gather(1, caption[0, 1:, None]).log().sum()).backward()
    same = found == pixels.grad.sign()
    assert same.float().mean() > 0.999  # but for rounding, where the gradient is nearly 0
    assert (found != 0).float().mean() > 0.9


def test_a_list_of_one_is_the_model_and_the_same_twice_is_allowed(paths, pictures):
    alone = Captioner.load(paths[0], "cpu", amp="off")
    for named in (paths[:1], (str(paths[0]), paths[0].parent)):
        again = Captioner.load(named, "cpu", amp="off")
        for options in ({"n": 3}, {"n": 2, "temperature": 1.0, "seed": 3}):
            found = [
                itertools.chain(*captions_of(model, pictures, **options))
                for model in (alone, again)
            ]
            for one, other in zip(*found, strict=True):
                assert one.text == other.text
                assert one.log_prob == pytest.approx(other.log_prob, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def images_of_two_sizes(tiny_data, paths):
    together = Captioner.load(paths, "cpu", amp="off")
    return EvaluationData(*tiny_data, "TEST", together), together


def test_of_a_data_set_each_sees_the_stored_images_at_its_own_size(
    tiny_data, paths, save, lite2, images_of_two_sizes
):
    data, _ = images_of_two_sizes
    stored = open_images(*tiny_data, "TEST")[0]
    assert np.array_equal(data[0][0], stored)
    large, small = (save(0, name, lite2, size=size) for name, size in (("l", 128), ("s", 64)))
    for named, side in (([large, small], 96), ([small, small], 64), ([large], 128)):
        model = Captioner.load(named, "cpu", amp="off")
        found = EvaluationData(*tiny_data, "TEST", model)
        assert found[0][0].shape == (3, side, side) and found.image_size == side
        [features] = model.encode_ahead([found[0][0][None]])
        assert len(features) == 1


def evaluate(paths, data, *arguments, code=0):
    process = run_here(
        "eval.py", *paths, "--data_folder", data[0], "--device", "cpu", "--amp", "off",
        "--max_len", 8, *arguments,
    )  # fmt: skip
    assert process.returncode == code, process.stderr
    return process


@pytest.mark.slow
def test_eval_tells_the_ensemble_in_what_it_prints_and_writes(
    paths, tiny_data, tmp_path, images_of_two_sizes, page
):
    data, together = images_of_two_sizes
    first, second, third = paths
    process = evaluate(
        ["--model", first, second, "--checkpoint", third.parent], tiny_data, "--beam_size", 2,
        "--report", tmp_path / "page", "--attention_report", 0,
        "--output_folder", tmp_path,
    )  # fmt: skip
    for path in paths:
        assert f"{path}, stage decoder, epoch 2" in process.stdout
    assert process.stdout.count("trained from x") == 3
    assert "3 models together: the mean of their probabilities" in process.stdout
    assert "pointing game" in process.stdout
    assert "does not look" in process.stdout  # the third's sentinel
    folders = "+".join(path.parent.name for path in paths)
    name = f"{folders}_BEST_checkpoint_{tiny_data[1]}"
    results = json.loads((tmp_path / f"results_test_beam2_{name}.json").read_text())
    images = [data[i][0] for i in range(len(data))]
    expected = [found.text for found in captions_of(together, images, 2)]
    assert [result["caption"] for result in results] == expected and len({*expected}) > 1

    page.goto((tmp_path / "page" / "index.html").as_uri())
    about = " ".join(page.locator(".about").all_inner_texts())
    assert all(str(path) in about for path in paths) and "3 models together" in about
    headings = page.locator("h3").all_inner_texts()
    for path in paths:
        assert f"{path.parent.name}/{path.name.removesuffix('.pth.tar')}" in headings
    widths = page.locator("[id^=curves]").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert len(widths) == 3 and min(widths) > 300
    page.locator("#captions tr.row").first.click()
    assert page.locator("#captions tr.open figure").count() > 0


def test_where_grids_differ_there_are_captions_and_no_attention(
    paths, save, lite2, tiny_data, tmp_path, pictures
):
    named = ["--model", paths[0], save(0, "fine", lite2, grid=4, seed=3)]
    process = evaluate(named, tiny_data, "--attention_report", "--output_folder", tmp_path)
    assert "no attention report: these decoders have no attention, or grids of" in process.stdout
    assert "pointing game" not in process.stdout
    process = run_here(
        "caption.py", "--img", pictures[0], *named, "--output_folder", tmp_path, "--device", "cpu",
        "--max_len", 8,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert ", picture in " in process.stdout
    with Image.open(tmp_path / f"{pictures[0].name}_attention.png") as picture:
        assert picture.width > 0


@pytest.mark.slow
def test_caption_takes_several_models(paths, pictures, tmp_path):
    named = [argument for path in paths for argument in ("--model", path)]
    process = run_here(
        "caption.py", "--img", *pictures, *named, "--json", "--device", "cpu", "--amp", "off",
        "--output_folder", tmp_path, "--beam_size", 3, "--max_len", 8,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    captions = captions_of(Captioner.load(paths, "cpu", amp="off"), pictures)
    for record, found in zip(json.loads(process.stdout), captions, strict=True):
        assert record["caption"] == found.text
        assert record["log_prob"] == pytest.approx(found.log_prob, abs=1e-3)
        drawn = np.asarray(Image.open(record["picture"]))
        assert np.array_equal(drawn, np.asarray(found.draw(record["image"])))


def test_the_web_demo_compares_the_models_of_either_form(monkeypatch):
    for arguments in (["--model", "a", "b"], ["--model", "a", "--model", "b"]):
        monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
        assert app.parse_arguments().model == ["a", "b"]


@pytest.mark.slow
def test_hard_attention_among_others_looks_as_it_is_told(save, lite2, paths, pictures):
    hard = save(4, "hard", lite2)

    def log_probs(look, *named):
        model = Captioner.load([hard, *named], "cpu", amp="off", look=look)
        return [found.log_prob for found in captions_of(model, pictures, 2)]

    assert log_probs("soft", paths[0]) == log_probs(None, paths[0]) != log_probs("argmax", paths[0])
    assert log_probs("sample", hard) == pytest.approx(log_probs("sample"), rel=1e-5)
    with pytest.raises(UserError, match="look 'away' is none of soft"):
        log_probs("away", paths[0])
    with pytest.raises(UserError, match="is not hard: leave look .--look. out") as error:
        Captioner.load(paths[:2], look="argmax")
    assert all(str(path) in str(error.value) for path in paths[:2])


def test_models_that_cannot_go_together_are_one_line(paths, save, lite2, pictures, tmp_path):
    words = read_words(paths[0])
    [one, two, *_] = [word for word in words if word.isalpha()]
    fewer = {word: i for i, word in enumerate(word for word in words if word != one)}
    turned = words | {one: words[two], two: words[one]}
    for word_map in (fewer, turned):
        other = save(0, "other", lite2, word_map=word_map)
        for command in (["caption.py", "--img", pictures[0]], ["eval.py"]):
            process = run_here(*command, "--model", paths[0], other, "--device", "cpu")
            line = failure(process)
            assert str(other) in line and str(paths[0]) in line and "another vocabulary" in line
            assert len(process.stderr.splitlines()) == 1
    missing = tmp_path / "missing.pth.tar"
    line = failure(run_here("eval.py", "--model", paths[0], missing))
    assert f"there is no checkpoint {missing}" in line
    for named, message in (([], "no checkpoint is named"), ([paths[0], 5], "not by 5")):
        with pytest.raises(UserError, match=message):
            Captioner.load(named)


def read_words(path):
    words = checkpoints.load_checkpoint(path)["word_map"]
    return dict(sorted(words.items(), key=lambda item: item[1]))


def test_a_word_map_is_named_for_those_that_hold_none(save, lite2, paths, tmp_path):
    words = read_words(paths[0])
    named = tmp_path / "WORDMAP.json"
    named.write_text(json.dumps(words))
    bare = save(0, "bare", lite2)
    contents = checkpoints.load_checkpoint(bare)
    del contents["word_map"]
    checkpoints.save_checkpoint(bare, contents)
    with pytest.raises(UserError, match=f"{bare} holds no word map"):
        Captioner.load([paths[0], bare])
    assert Captioner.load([paths[0], bare], "cpu", word_map=named).word_map == words


def test_names_of_files_tell_the_models_and_are_no_longer_than_systems_allow():
    def name(*paths):
        return script.name_together(list(map(Path, paths)))

    assert name("/runs/a/BEST_x.pth.tar") == "BEST_x"
    assert name("/runs/a/BEST_x.pth.tar", "/runs/b/BEST_x.pth.tar") == "a+b_BEST_x"
    assert name("/runs/a/BEST_x.pth.tar", "/runs/b/BEST_y.pth.tar") == "BEST_x+BEST_y"
    assert name("/runs/a/BEST_x.pth.tar", "/runs/a/BEST_x.pth.tar") == "BEST_x+BEST_x"
    assert name("/r/a/c/B.pth.tar", "/r/b/c/B.pth.tar") == "a_c+b_c_B"
    many = [f"/runs/{i}/BEST_{'x' * 50}_{i}.pth.tar" for i in range(9)]
    assert len(name(*many)) < 40 and name(*many).startswith("9_models_")
    assert name(*many) != name(*many[::-1]) and name(*many) == name(*many)
