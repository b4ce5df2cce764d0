"""A decoder that the project does not know: it ignores the image and has no attention. It trains,
resumes, decodes and is evaluated without a change outside its class."""

import json
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from conftest import OFFLINE, close, failure, run_here, short_captions
from PIL import Image
from test_scripts import tables
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import checkpoints
import contract
from attentions import ATTENTIONS, Attention
from captioner import Captioner
from choosing import Search
from contract import DECODERS, Decoder, Forward, build_decoder, make_config
from encoders import Encoder
from groundwork.errors import UserError
from models import DecoderWithAttention, LSTMConfig
from objectives import caption_loss
from recurrent import Hidden, RecurrentDecoder


class Images(NamedTuple):
    """The memory of I images: nothing but how many they are."""

    none: Tensor  # (I, 0)

    def select(self, images):
        return Images(self.none[images])


class Before(NamedTuple):
    """The state of n rows: the word before the last."""

    word: Tensor  # (n,)

    def select(self, rows):
        return Before(self.word[rows])


@dataclass(frozen=True)
class BlindConfig:
    vocab_size: int
    encoder_dim: int
    encoded_image_size: int = 3
    embed_dim: int = 8
    dropout: float = 0.0

    def __post_init__(self):
        if self.embed_dim > 100:
            raise ValueError("its embed_dim is over 100")


class Blind(Decoder):
    """The next word from the two before it."""

    Config, name = BlindConfig, "blind"

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(2 * config.embed_dim, config.vocab_size)

    def prepare(self, encoder_out):
        return Images(encoder_out.new_zeros(len(encoder_out), 0))

    def init_state(self, memory):
        return Before(torch.zeros(len(memory.none), dtype=torch.int64, device=memory.none.device))

    def step(self, words, state, memory, rows=None):
        return self.scores(state.word, words), None, Before(words)

    def scores(self, before, words):
        pair = torch.cat([self.embedding(before), self.embedding(words)], dim=-1)
        return self.fc(self.dropout(pair))

    def forward(self, encoder_out, captions, lengths):
        before = torch.cat([torch.zeros_like(captions[:, :1]), captions[:, :-2]], dim=1)
        scores = self.scores(before, captions[:, :-1])
        packed = [
            pack_padded_sequence(x, lengths.cpu() - 1, batch_first=True, enforce_sorted=False)
            for x in (scores, captions[:, 1:])
        ]
        return Forward(*packed, None)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DECODERS, "blind", Blind)
        short_captions(patch, 8)
        yield


@pytest.fixture(scope="module")
def train(tiny_data):
    def run(output, *arguments):
        process = run_here(
            "train.py", "--data_folder", tiny_data[0], "--output_folder", output, "--decoder",
            "blind", "--encoder", OFFLINE, "--encoded_image_size", 3, "--embed_dim", 24,
            "--batch_size", 20, "--finetune_batch_size", 40, "--decoder_lr", 0.02, "--dropout",
            0.1, "--device", "cpu", *arguments,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return checkpoints.checkpoint_path(output, tiny_data[1]), process.stdout

    return run


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    output = tmp_path_factory.mktemp("blind")
    return train(output, "--stage", "decoder", "--epochs", 12)


def test_it_trains_and_is_rebuilt_from_its_configuration(trained):
    path, printed = trained
    checkpoint = checkpoints.load_checkpoint(path)
    losses = [line["loss"] for line in checkpoint["log"]]
    assert losses[-1] < 0.6 * losses[0]
    assert printed.count("human: ") == 3 * 12
    assert checkpoint["decoder_name"] == "blind"
    assert checkpoint["decoder_config"]["embed_dim"] == 24
    _, decoder = checkpoints.build_models(checkpoint, dropout=0.3, embed_dropout=0.5)
    assert type(decoder) is Blind and decoder.dropout.p == 0.3
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, checkpoint["decoder"][name])


@pytest.mark.slow
def test_resuming_it_is_exact(train, tmp_path):
    run = ["--stage", "decoder", "--views", 2]
    whole, _ = train(tmp_path / "whole", *run, "--epochs", 3)
    train(tmp_path / "halves", *run, "--epochs", 2, "--tensorboard")
    halves, printed = train(tmp_path / "halves", *run, "--epochs", 3, "--resume")
    assert "resuming from" in printed
    one, two = (checkpoints.load_checkpoint(path) for path in (whole, halves))
    for name, tensor in one["decoder"].items():
        assert torch.equal(tensor, two["decoder"][name]), name


@pytest.mark.slow
def test_an_encoder_that_its_loss_gives_no_gradient_stays(train, tmp_path):
    path, _ = train(tmp_path, "--stage", "both", "--epochs", 1)
    checkpoint = checkpoints.load_checkpoint(path)
    assert checkpoint["stage"] == "finetune"
    for name, tensor in Encoder(OFFLINE, 3).state_dict().items():
        assert torch.equal(tensor, checkpoint["encoder"][name]), name


def test_it_is_evaluated_and_reported_without_attention(
    trained, tiny_data, tmp_path, page, monkeypatch
):
    monkeypatch.setenv("PATH", "")  # no Java, which takes seconds
    process = run_here(
        "eval.py", "--checkpoint", trained[0], "--data_folder", tiny_data[0], "--beam_size", 1, 3,
        "--attention_report", "--results_folder", tmp_path, "--report", tmp_path / "page",
        "--device", "cpu",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "no attention report: this decoder has no attention" in process.stdout
    (nltk_table,) = tables(process.stdout)
    assert float(nltk_table["beam 3"]["BLEU-1"]) > 0
    path = tmp_path / f"results_test_beam3_checkpoint_{tiny_data[1]}.json"
    results = json.loads(path.read_text())
    assert len({result["caption"] for result in results}) == 1  # it does not see the image

    page.goto((tmp_path / "page" / "index.html").as_uri())
    page.locator("#captions tr.row").first.click()
    view = page.locator("#captions tr.open attention-view")
    view.locator(".word").first.wait_for()
    words = view.locator(".word").all_inner_texts()
    assert " ".join(words) == results[0]["caption"]
    assert view.locator("figure").count() == 0
    assert not view.locator(".steps").is_visible()
    view.locator(".word").first.hover()
    page.keyboard.press("ArrowRight")


def test_it_captions_and_draws(trained, scenes, tmp_path):
    images = sorted((scenes / "images").iterdir())[:2]
    process = run_here(
        "caption.py", "--img", *images, "--model", trained[0], "--json", "--device", "cpu",
        "--output_folder", tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for record in json.loads(process.stdout):
        with Image.open(record["picture"]) as picture:
            assert picture.width > picture.height / 2
    model = Captioner.load(trained[0], "cpu")
    [beam] = model.caption(images[0], beam_size=4, n=4)
    assert [caption.alphas for caption in beam] == [None] * 4
    [[drawn]] = model.caption(images[0], temperature=1.0, n=1, seed=0)
    assert drawn.alphas is None and drawn.words


def test_searches_agree_with_its_forward_pass(trained):
    model = Captioner.load(trained[0], "cpu", amp="off")
    features = torch.zeros(2, 3, 3, model.decoder.config.encoder_dim)
    for [caption] in model.search(features, Search(beam_size=3)):
        words = [model.word_map[word] for word in caption.words]
        captions = torch.tensor([[model.word_map["<start>"], *words, model.word_map["<end>"]]])
        lengths = torch.tensor([captions.shape[1]])
        scores, targets, alphas, _ = model.decoder(features[:1], captions, lengths)
        log_probs = scores.data.log_softmax(1).gather(1, targets.data[:, None])
        assert caption.log_prob == pytest.approx(log_probs.sum().item(), rel=1e-4)
        assert alphas is None


# ------------------------------------------------------------------------------ configurations

SIZES = {"vocab_size": 9, "encoder_dim": 6}


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("sighted", SIZES, "no decoder 'sighted': known are .*lstm.*, blind"),
        ("blind", SIZES | {"gate": "scalar"}, "has no gate"),
        ("blind", {"vocab_size": 9}, "has no encoder_dim"),
        ("blind", SIZES | {"embed_dim": "8"}, "embed_dim is '8'"),
        ("blind", SIZES | {"embed_dim": True}, "embed_dim is True"),
        ("blind", SIZES | {"embed_dim": 101}, "over 100"),
        ("lstm", SIZES | {"gate": "none"}, "gate is 'none'"),
        ("lstm", SIZES | {"query": "none"}, "query is 'none'"),
        ("lstm", SIZES | {"attention_dim": 0}, "attention_dim is 0"),
    ],
)
def test_a_configuration_that_cannot_be(name, values, words):
    with pytest.raises(ValueError, match=words):
        make_config(name, values)


def test_an_unknown_decoder_is_one_line(tiny_data, tmp_path):
    run = ["--data_folder", tiny_data[0], "--output_folder", tmp_path, "--encoder", OFFLINE]
    line = failure(run_here("train.py", *run, "--decoder", "sighted"))
    assert "--decoder sighted" in line and "lstm" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_name": "sighted"},
        {"decoder_config": {"vocab_size": 10**9, "encoder_dim": 1280}},
        {"decoder_config": {"vocab_size": 9}},
        {"encoded_image_size": 4},
    ],
)
def test_a_checkpoint_whose_configuration_is_not_its_weights(trained, changes):
    checkpoint = checkpoints.load_checkpoint(trained[0]) | changes
    with pytest.raises(UserError, match="do not fit its models") as error:
        checkpoints.build_models(checkpoint)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------- another score function


class PlainAttention(Attention):
    """The same energies as a formula."""

    def energies(self, annotations, query, images):
        hidden = torch.relu(annotations.projected[images] + query.unsqueeze(1))
        return hidden @ self.full_att.weight[0]


class DotAttention(Attention):
    """e_ti = (W_a a_i) · (W_h h_{t-1})."""

    def energies(self, annotations, query, images):
        return (annotations.projected[images] * query.unsqueeze(1)).sum(dim=2)


def decoder_with(attention, grid):
    torch.manual_seed(0)
    config = LSTMConfig(9, 6, 5, 4, 7, 0.0, encoded_image_size=grid)
    decoder = DecoderWithAttention(config)
    decoder.attention.__class__ = attention
    return decoder


@pytest.mark.parametrize("grid", [2, 3])
def test_a_score_function_is_a_formula_and_autograd_does_the_rest(grid):
    torch.manual_seed(1)
    features, captions = torch.randn(2, 2, 2, 6), torch.randint(9, (6, 5))
    lengths = torch.tensor([5, 3, 2, 4, 5, 5])
    found = []
    for attention in (Attention, PlainAttention, DotAttention):
        decoder = decoder_with(attention, grid)
        own = features.clone().requires_grad_()
        loss = caption_loss(*decoder(own, captions, lengths))
        loss.backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters()}
        found.append({"loss": loss.detach(), "features": own.grad, **gradients})
    ours, plain, other = found
    for name, value in plain.items():
        close(ours[name], value)
    assert not torch.allclose(ours["loss"], other["loss"])
    decoder, step = decoder_with(DotAttention, grid).double(), 2e-2  # all is rounded to float32
    weight = decoder.attention.encoder_att.weight
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
            losses.append(caption_loss(*decoder(features.double(), captions, lengths)).item())
            weight[0, 0] -= sign * step
    expected = other["attention.encoder_att.weight"][0, 0].item()
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(expected, rel=1e-2, abs=1e-4)


class Guess(Attention):
    """Draws a place, and keeps the baseline of its returns where it likes."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("usual", torch.zeros(2))

    def forward(self, annotations, query, rows, cell=None):
        look = super().forward(annotations, query, rows)
        places = look.alphas.detach().argmax(dim=1, keepdim=True)
        log_p = look.alphas.log().gather(1, places).squeeze(1)
        entropy = -(look.alphas * look.alphas.log()).sum(dim=1)
        return look._replace(log_p=log_p, entropy=entropy, baseline=self.usual)


class Echo(RecurrentDecoder):
    """What a recurrent decoder needs at least: `layers`, `fc`, `advance`."""

    layers = 1

    def __init__(self, config):
        super().__init__(config)
        self.mix = nn.Linear(self.attention.context_dim + config.embed_dim, config.decoder_dim)
        self.fc = nn.Linear(config.decoder_dim, config.vocab_size)

    def advance(self, words, state, memory, rows):
        (h,) = state.layers
        look = self.look(words, h, h, memory, rows)
        h = torch.tanh(h + self.mix(torch.cat([look.context, words], dim=1)))
        return h, look, Hidden((h,))


def test_a_recurrent_decoder_is_a_formula_of_a_step(monkeypatch):
    """And an attention that draws hands over whatever the objective needs."""
    monkeypatch.setitem(ATTENTIONS, "guess", Guess)
    monkeypatch.setitem(DECODERS, "echo", Echo)
    sizes = {"attention_dim": 5, "embed_dim": 4, "decoder_dim": 7, "dropout": 0.0}
    config = make_config("echo", {"vocab_size": 9, "encoder_dim": 6, "attention": "guess"} | sizes)
    decoder = build_decoder("echo", config)
    features, captions = torch.randn(2, 3, 3, 6), torch.randint(9, (4, 5))
    found = decoder(features, captions, torch.tensor([5, 3, 4, 2]))
    memory = decoder.prepare(features)
    state = decoder.init_state(memory).select(torch.tensor([0, 0, 1, 1]))
    for t in range(4):
        scores, alphas, state = decoder.step(captions[:, t], state, memory)
        close(found.alphas[0, t], alphas[0])  # of the longest caption
        close(found.scores.data[int(found.scores.batch_sizes[:t].sum())], scores[0])
    assert found.drawn.baseline is decoder.attention.usual
    assert found.drawn.log_p.shape == found.drawn.entropy.shape == (10,)
    caption_loss(*found).backward()
    assert decoder.attention.usual[0] > 0 and decoder.attention.usual[1] == 1  # it has begun
    assert decoder.attention.encoder_att.weight.grad.abs().sum() > 0


def test_registering_gives_a_decoder_its_name():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "DECODERS", {})
        patch.setattr(Blind, "name", "blind")  # and back
        assert contract.register("other")(Blind) is Blind
        assert {"other": Blind} == contract.DECODERS and Blind.name == "other"
    Blind.name = "blind"
