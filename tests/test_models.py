"""The decoder is checked against the paper's formulas, one caption and one place at a time."""

import math
from itertools import product

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence

import stages
from kernels import pooling_matrix
from models import DecoderWithAttention, LSTMConfig
from objectives import caption_loss

V, D, A, E, H = 11, 6, 5, 4, 7  # words, annotation vectors, attention, embedding, LSTM

few = settings(max_examples=20, deadline=None)
gates = pytest.mark.parametrize("gate", ["scalar", "channel"])
VARIANTS = [
    {"gate": gate, "deep_output": deep_output, "query": query}
    for gate, deep_output, query in product(["scalar", "channel"], [False, True], ["state", "word"])
]
variants = pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values()))
)


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
        y = p["embedding.weight"][word]
        query = p["attention.decoder_att.weight"] @ h + p["attention.decoder_att.bias"]
        if "word_att.weight" in p:
            query = query + p["word_att.weight"] @ y
        energies = []
        for a_i in a:
            key = p["attention.encoder_att.weight"] @ a_i + p["attention.encoder_att.bias"]
            hidden = torch.relu(key + query)
            energies.append(p["attention.full_att.weight"][0] @ hidden)
        alpha = (torch.stack(energies) + p["attention.full_att.bias"]).softmax(0)
        beta = torch.sigmoid(p["f_beta.weight"] @ h + p["f_beta.bias"])
        z = beta * sum(alpha_i * a_i for alpha_i, a_i in zip(alpha, a, strict=True))
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
    decoder = DecoderWithAttention(
        LSTMConfig(V, D, A, E, H, dropout, encoded_image_size=size, **options)
    )
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


# ------------------------------------------------------------------------------------ decoder


@variants
@pytest.mark.parametrize(
    "lengths, per_image",
    [([6], 1), ([3, 7, 2, 5], 1), ([4, 4, 2, 7, 3, 6], 3), ([2, 8, 5, 5, 3, 9, 2, 6], 2)],
)
def test_forward_equals_the_paper_formulas(variant, lengths, per_image):
    decoder = make_decoder(**variant)
    encoder_out, captions, lengths = make_batch(lengths, per_image)
    scores, targets, alphas, _ = decoder(encoder_out, captions, lengths)
    assert scores.data.shape == (sum(lengths) - len(lengths), V)
    assert alphas.shape == (len(lengths), max(lengths) - 1, 9)
    for i, caption in enumerate(words_of(captions, lengths)):
        steps = len(caption) - 1
        expected = textbook(double(decoder), encoder_out[i // per_image].double(), caption)
        close(unpacked(scores)[i, :steps], expected[0])
        close(alphas[i, :steps], expected[1])
        assert unpacked(targets)[i, :steps].tolist() == caption[1:]


@variants
@pytest.mark.parametrize("grid, size", [(3, 3), (2, 3), (3, 5), (5, 3)])
def test_loss_and_all_gradients_equal_the_paper_formulas(variant, grid, size):
    decoder = make_decoder(1, size, **variant)
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
    scores, _, alphas, _ = decoder(encoder_out, captions, lengths)
    expected_scores, _, expected_alphas, _ = decoder(pooled, captions, lengths)
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
    scores, targets, alphas, _ = decoder(encoder_out, captions, lengths)
    other_scores, other_targets, other_alphas, _ = decoder(encoder_out, other, lengths)
    assert torch.equal(scores.data, other_scores.data)
    assert torch.equal(targets.data, other_targets.data)
    assert torch.equal(alphas, other_alphas)


@few
@given(batches, st.integers(0, 99))
def test_alphas_sum_to_one_at_every_word_and_are_zero_after_the_end(batch, seed):
    encoder_out, captions, lengths = make_batch(*batch, seed=seed)
    _, _, alphas, _ = make_decoder(seed)(encoder_out, captions, lengths)
    assert alphas.shape[1] == max(lengths) - 1
    real = torch.arange(alphas.shape[1]) < lengths[:, None] - 1
    close(alphas.sum(2), real.float())
    assert not alphas[~real].any()


@few
@given(batches, st.integers(0, 99))
def test_a_caption_alone_gives_the_same_as_in_its_batch(batch, seed):
    decoder, per_image = make_decoder(seed, gate="channel"), batch[1]
    encoder_out, captions, lengths = make_batch(*batch, grid=2, seed=seed)
    scores, _, alphas, _ = decoder(encoder_out, captions, lengths)
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
    scores, targets, alphas, _ = decoder(encoder_out, captions, lengths)
    other = decoder(encoder_out[images], captions[rows], lengths[rows])
    close(unpacked(other[0]), unpacked(scores)[rows])
    assert torch.equal(unpacked(other[1]), unpacked(targets)[rows])
    close(other[2], alphas[rows])


@variants
@pytest.mark.parametrize("per_image, grid", [(1, 3), (2, 2)])
def test_steps_over_a_caption_equal_teacher_forcing(variant, per_image, grid):
    decoder = make_decoder(3, **variant)
    encoder_out, captions, lengths = make_batch([6] * 3 * per_image, per_image, grid)
    scores, _, alphas, _ = decoder(encoder_out, captions, lengths)
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
    expected_scores, _, expected_alphas, _ = decoder(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        scores, targets, alphas, _ = decoder(*batch)
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
    smoothed = caption_loss(
        packed([scores]), packed([targets]), torch.ones(1, 1, 4), None, 1.0, 0.2
    )
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
    state = DecoderWithAttention(LSTMConfig(9490, gate=gate)).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == published_shapes(9490, 2048, gate)


@gates
def test_published_weights_load_and_give_the_paper_formulas(gate):
    state = published_state(gate)
    decoder = DecoderWithAttention.from_state_dict(state, encoded_image_size=3).eval()
    encoder_out, captions, lengths = make_batch([4, 6, 5, 3], 2)
    scores, _, alphas, _ = decoder(encoder_out, captions, lengths)
    weights = {name: value.double() for name, value in state.items()}
    for i, caption in enumerate(words_of(captions, lengths)):
        expected = textbook(weights, encoder_out[i // 2].double(), caption)
        close(unpacked(scores)[i, : len(caption) - 1], expected[0])
        close(alphas[i, : len(caption) - 1], expected[1])


@variants
def test_from_state_dict_takes_back_any_decoder(variant):
    decoder = make_decoder(7, **variant)
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


# ------------------------------------------------------------------------------------ stages


@st.composite
def stage_maps(draw):
    """Maps (2, f_s g, f_s g, D_s) of one to three stages, and the side of the attention's grid."""
    grid = draw(st.integers(1, 3))
    factors = draw(st.permutations([1, *draw(st.lists(st.integers(1, 3), max_size=2))]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dims = [draw(st.integers(1, 4)) for _ in factors]
    maps = [
        torch.randn(2, f * grid, f * grid, d, generator=generator, dtype=torch.float64)
        for f, d in zip(factors, dims, strict=True)
    ]
    return maps, draw(st.integers(1, 7))


@few
@given(stage_maps())
def test_packed_maps_are_unpacked(pair):
    maps, _ = pair
    encoder_out = stages.pack(maps)
    grid = min(m.shape[1] for m in maps)
    assert encoder_out.shape[:3] == (2, grid, grid)
    factors = [m.shape[1] // grid for m in maps]
    unpacked = stages.unpack(encoder_out, [m.shape[3] for m in maps], factors)
    for one, other in zip(unpacked, maps, strict=True):
        assert torch.equal(one, other.flatten(1, 2))


@few
@given(stage_maps(), st.booleans(), st.integers(0, 99))
def test_several_stages_are_one_map_of_all_their_values(pair, normalize, seed):
    """The oracle's annotation vectors: each stage's, normalised, brought to the attention's grid,
    one behind the other."""
    maps, size = pair
    grid = min(m.shape[1] for m in maps)
    encoder_out = stages.pack(maps)
    torch.manual_seed(seed)
    decoder = DecoderWithAttention(
        LSTMConfig(
            V,
            encoder_out.shape[3],
            A,
            E,
            H,
            encoded_image_size=size,
            stage_dims=tuple(m.shape[3] for m in maps),
            stage_factors=tuple(m.shape[1] // grid for m in maps),
            feature_norm="layer" if normalize else "none",
        )
    )
    decoder = decoder.double().eval()
    for name, p in decoder.named_parameters():
        if "norms" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    p = dict(decoder.state_dict())
    joined = []
    for i, m in enumerate(maps):
        if normalize:
            mean, var = m.mean(3, keepdim=True), m.var(3, unbiased=False, keepdim=True)
            m = (m - mean) / (var + 1e-5).sqrt()
            m = m * p[f"attention.norms.{i}.weight"] + p[f"attention.norms.{i}.bias"]
        pooled = F.adaptive_avg_pool2d(m.permute(0, 3, 1, 2), size)
        joined.append(pooled.permute(0, 2, 3, 1))
    captions = torch.tensor([[1, 4, 2, 0], [3, 5, 6, 7]])
    scores, _, alphas, _ = decoder(encoder_out, captions, torch.tensor([3, 4]))
    scores, _ = pad_packed_sequence(scores, batch_first=True)
    for i, caption in enumerate(([1, 4, 2], [3, 5, 6, 7])):
        expected = textbook(p, torch.cat(joined, dim=3)[i], caption)
        close(scores[i, : len(caption) - 1], expected[0])
        close(alphas[i, : len(caption) - 1], expected[1])


def test_a_stage_whose_grid_is_no_multiple_is_pooled_to_the_nearest():
    maps = [torch.rand(1, 17, 17, 2), torch.rand(1, 8, 8, 3)]
    fine, coarse = stages.unpack(stages.pack(maps), (2, 3), (2, 1))
    pooled = F.adaptive_avg_pool2d(maps[0].permute(0, 3, 1, 2), 16)
    close(fine, pooled.flatten(2).permute(0, 2, 1))
    assert torch.equal(coarse, maps[1].flatten(1, 2))
