"""Attentions and recurrent decoders against their formulas, one caption and one place at a time,
and against PyTorch's own layers; stochastic attention against what enumeration gives."""

import copy
import math
from itertools import pairwise, product

import pytest
import torch
from conftest import close
from hypothesis import given
from hypothesis import strategies as st
from test_models import double, unpacked, words_of
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import engine
import stages
from attentions import ATTENTIONS, HardAttention
from contract import DECODERS, Drawn, build_decoder, make_config, rows_of
from groundwork import distributed
from objectives import CrossEntropy, caption_loss, loss_terms, missed_each, reinforce

V, D, A, E, H, HEADS = 11, 5, 6, 4, 7, 2  # words, annotation vectors, attention, embedding, state
MAPS = [(3, D)]  # a stage: its grid, and the values of its vectors
SEVERAL = [(2, D), (4, 3)]
RECURRENT = ("lstm", "gru", "topdown")


def make_decoder(name, attention, maps=MAPS, size=3, seed=0, **choices):
    """In evaluation mode, with weights large enough that every term of the formulas shows."""
    torch.manual_seed(seed)
    coarsest = min(grid for grid, _ in maps)
    factors = tuple(grid // coarsest for grid, _ in maps)
    dims = tuple(dim for _, dim in maps)
    sizes = {"vocab_size": V, "attention_dim": A, "embed_dim": E, "decoder_dim": H, "dropout": 0.0}
    sizes["encoder_dim"] = sum(dim * f**2 for dim, f in zip(dims, factors, strict=True))
    if len(maps) > 1:
        sizes |= {"stage_dims": dims, "stage_factors": factors}
    sizes |= {"encoded_image_size": size, "heads": HEADS, "attention": attention} | choices
    decoder = build_decoder(name, make_config(name, sizes))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.6)
    return decoder.eval()


def make_batch(lengths, per_image, maps=MAPS):
    """The stages' maps of the images, and captions of the lengths."""
    images = len(lengths) // per_image
    found = [torch.randn(images, grid, grid, dim) for grid, dim in maps]
    captions = torch.randint(1, V, (len(lengths), max(lengths)))
    return found, captions, torch.tensor(lengths)


# ------------------------------------------------------------------------------------- oracle


def annotate(p, maps, size):
    """The L annotation vectors of an image: its stages normalised, pooled, one behind the other."""
    parts = []
    for s, features in enumerate(maps):
        if f"attention.norms.{s}.weight" in p:
            gain, bias = (p[f"attention.norms.{s}.{name}"] for name in ("weight", "bias"))
            features = F.layer_norm(features, gain.shape, gain, bias)
        pooled = F.adaptive_avg_pool2d(features.permute(2, 0, 1), size)
        parts.append(pooled.flatten(1).T)
    return torch.cat(parts, dim=1)


class Linears:
    """p's linear layers by name, as functions of one vector."""

    def __init__(self, p):
        self.p = p

    def __call__(self, name, x):
        bias = self.p.get(f"{name}.bias", 0)
        return self.p[f"{name}.weight"] @ x + bias


def weigh(energies, vectors):
    alphas = torch.cat(energies).softmax(0)
    return sum(alpha * v for alpha, v in zip(alphas, vectors, strict=True)), alphas


def soft(w, a):
    def look(q, cell):
        return weigh([w("att.full_att", torch.relu(w("att.encoder_att", a_i) + q)) for a_i in a], a)

    return a, look


def none(w, a):
    return a, lambda q, cell: (a.mean(0), None)


def bahdanau(w, a):
    """The tutorial's: features = relu(fc(x)), score = V(tanh(W1(features) + W2(hidden)))."""
    features = [torch.relu(w("att.encoder_att", a_i)) for a_i in a]

    def look(q, cell):
        keys = [torch.tanh(w("att.key_att", feature) + q) for feature in features]
        return weigh([w("att.full_att", key) for key in keys], features)

    return torch.stack(features), look


def adaptive(w, a):
    """Lu et al., eq. 9 to 13, their z by `full_att`, the sentinel as a further place."""

    def look(q, cell):
        q, gate = q[:A], q[A:]
        sentinel = torch.sigmoid(gate) * torch.tanh(cell)
        keys = [w("att.encoder_att", a_i) for a_i in a] + [w("att.sentinel_att", sentinel)]
        seen = [*a, w("att.sentinel", sentinel)]
        context, weights = weigh([w("att.full_att", torch.tanh(key + q)) for key in keys], seen)
        return context, weights[:-1]

    return a, look


def multihead(w, a):
    """nn.MultiheadAttention with the same weights, of the query that the decoder has made."""
    own = {"q_proj_weight": torch.eye(A).double(), "k_proj_weight": w.p["att.encoder_att.weight"]}
    own["v_proj_weight"] = w.p["att.value_att.weight"]
    biases = [w.p[f"att.{name}_att.bias"] for name in ("encoder", "value")]
    own["in_proj_bias"] = torch.cat([torch.zeros(A).double(), *biases])
    own |= {f"out_proj.{name}": w.p[f"att.out_att.{name}"] for name in ("weight", "bias")}
    layer = nn.MultiheadAttention(A, HEADS, kdim=a.shape[1], vdim=a.shape[1]).double()

    def look(q, cell):
        context, alphas = functional_call(layer, own, (q[None], a, a))
        return context[0], alphas[0]

    return torch.stack([w("att.value_att", a_i) for a_i in a]), look


LOOKS = {"soft": soft, "hard": soft, "none": none, "bahdanau": bahdanau, "adaptive": adaptive}
LOOKS["multihead"] = multihead


def run_cell(kind, name, p, x, state):
    """One step of nn.LSTMCell or nn.GRUCell with the weights of that name."""
    own = {key.removeprefix(f"{name}."): p[key] for key in p if key.startswith(f"{name}.")}
    return functional_call(kind(*own["weight_ih"].shape[::-1]).double(), own, (x, state))


def by_hand(name, attention, p, a, caption):
    """Scores (T - 1, V) and alphas (T - 1, L) or None of one caption, a step at a time."""
    w = Linears({key.replace("attention.", "att."): value for key, value in p.items()})
    vectors, look = LOOKS[attention](w, a)
    mean, zeros = vectors.mean(0), a.new_zeros(H)
    if name == "lstm":
        state = w("init_h", mean), w("init_c", mean)
    else:
        state = (zeros,) * {"gru": 1, "topdown": 4}[name]

    def ask(h, y):
        """W_h h + b, of the previous word where the query knows it."""
        if attention == "none":
            return None
        return w("att.decoder_att", h) + (w("word_att", y) if "word_att.weight" in p else 0)

    scores, alphas = [], []
    for word in caption[:-1]:
        y = p["embedding.weight"][word]
        if name == "lstm":  # Xu et al., eq. 1 to 3
            h, c = state
            seen, alpha = look(ask(h, y), c)
            seen = torch.sigmoid(w("f_beta", h)) * seen
            state = run_cell(nn.LSTMCell, "decode_step", p, torch.cat([y, seen]), (h, c))
            scores.append(w("fc", state[0]))
        elif name == "gru":  # the tutorial's RNN_Decoder
            (h,) = state
            seen, alpha = look(ask(h, y), h)
            state = (run_cell(nn.GRUCell, "gru", p, torch.cat([seen, y]), h),)
            scores.append(w("fc", w("fc1", state[0])))
        else:  # Anderson et al., eq. 2 to 6
            h1, c1, h2, c2 = state
            h1, c1 = run_cell(nn.LSTMCell, "attention_lstm", p, torch.cat([h2, mean, y]), (h1, c1))
            seen, alpha = look(ask(h1, y), c1)
            h2, c2 = run_cell(nn.LSTMCell, "language_lstm", p, torch.cat([seen, h1]), (h2, c2))
            state = h1, c1, h2, c2
            scores.append(w("fc", h2))
        alphas.append(alpha)
    return torch.stack(scores), None if attention == "none" else torch.stack(alphas)


def check(decoder, maps, captions, lengths, alpha_c=0.7):
    """Outputs, loss and all gradients of the decoder equal those of the formulas."""
    config, per_image = decoder.config, len(captions) // len(maps[0])
    encoder_out = stages.pack(maps).requires_grad_()
    found = decoder(encoder_out, captions, lengths)
    caption_loss(*found, alpha_c=alpha_c).backward()

    p = double(decoder, grad=True)
    places = [own.double().requires_grad_() for own in maps]
    expected, missed, uneven = 0.0, [], []
    for i, caption in enumerate(words_of(captions, lengths)):
        own = [features[i // per_image] for features in places]
        a = annotate(p, own, config.encoded_image_size)
        scores, alphas = by_hand(decoder.name, config.attention, p, a, caption)
        close(unpacked(found.scores)[i, : len(caption) - 1], scores)
        if alphas is None:
            assert found.alphas is None
        else:
            close(found.alphas[i, : len(caption) - 1], alphas)
            uneven.append(((1 - alphas.sum(0)) ** 2).mean())
        missed += [-row.log_softmax(0)[w] for row, w in zip(scores, caption[1:], strict=True)]
    expected = torch.stack(missed).mean() + (alpha_c * torch.stack(uneven).mean() if uneven else 0)
    expected.backward()
    for name, parameter in decoder.named_parameters():
        close(parameter.grad, p[name].grad)
    close(encoder_out.grad, stages.pack([own.grad for own in places]))


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("query", ["state", "word"])
def test_every_attention_in_every_recurrent_decoder_equals_the_formulas(name, attention, query):
    check(make_decoder(name, attention, query=query), *make_batch([4, 2, 5, 3], 2))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name, feature_norm", [("lstm", "layer"), ("topdown", "none")])
def test_several_stages_are_brought_to_one_grid(attention, size, name, feature_norm):
    decoder = make_decoder(name, attention, SEVERAL, size, feature_norm=feature_norm)
    check(decoder, *make_batch([3, 5, 4, 2, 3, 3], 3, SEVERAL))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_deep_output_layer_and_the_channel_gate_take_any_attention(attention):
    """Against a step of the decoder's own layers, whose context is that of the attention."""
    decoder = make_decoder("lstm", attention, gate="channel", deep_output=True)
    (features,), captions, lengths = make_batch([3, 3], 1)
    scores = unpacked(decoder(features, captions, lengths).scores)
    memory = decoder.prepare(features)
    h, c = state = decoder.init_state(memory)
    words = decoder.embedding(captions[:, 0])
    query = None
    if decoder.query_dim:
        query = decoder.attention.decoder_att(h)
        query = query + decoder.word_att(words) if decoder.word_att is not None else query
    look = decoder.attention(memory.annotations, query, rows_of(torch.arange(2), 1), c)
    seen = torch.sigmoid(decoder.f_beta(h)) * look.context
    h, _ = decoder.decode_step(torch.cat([words, seen], dim=1), tuple(state))
    shown = torch.tanh(words + decoder.output_h(h) + decoder.output_z(seen))
    close(scores[:, 0], decoder.fc(shown))


@given(st.sampled_from(sorted(ATTENTIONS)), st.integers(1, 5), st.integers(0, 999))
def test_alphas_are_shares_of_what_is_looked_at(attention, size, seed):
    decoder = make_decoder("gru", attention, size=size, seed=seed)
    (features,), captions, lengths = make_batch([4, 4], 2)
    alphas = decoder(features, captions, lengths).alphas
    if attention == "none":
        assert alphas is None
        return
    assert alphas.dtype == torch.float32 and (alphas >= 0).all()
    total = alphas.sum(2)
    if attention == "adaptive":  # the sentinel has the rest
        assert (total < 1 - 1e-6).all()
    else:
        close(total, torch.ones_like(total))


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bfloat16_autocast_is_near_float32(name, attention):
    decoder = make_decoder(name, attention)
    (features,), captions, lengths = make_batch([5, 3, 4, 4], 2)
    expected = decoder(features, captions, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder(features, captions, lengths)
        loss = caption_loss(*found)
    close(found.scores.data, expected.scores.data, 0.15)
    assert loss.dtype == torch.float32
    if attention != "none":
        assert found.alphas.dtype == torch.float32
        close(found.alphas, expected.alphas, 0.05)


def test_heads_that_do_not_divide_the_attention_are_refused():
    with pytest.raises(ValueError, match="attention_dim 6 is no multiple of its heads, 4"):
        make_decoder("lstm", "multihead", heads=4)


# ----------------------------------------------------------------------- stochastic attention


WORDS, SIZE = 3, 2  # of the caption, and the side of the grid: 4³ sequences of places


@pytest.fixture
def always_drawn(monkeypatch):
    monkeypatch.setattr(HardAttention, "SOFT_SHARE", 0.0)


def hard_model():
    """A decoder, and a batch of one caption, for which it matters what is looked at."""
    decoder = make_decoder("lstm", "hard", [(SIZE, D)], SIZE)
    (features,), captions, lengths = make_batch([WORDS + 1], 1, [(SIZE, D)])
    for parameter in decoder.attention.parameters():
        parameter.data *= 0.3  # all places are likely
    return decoder.train(), 3 * features, captions, lengths


def expected_loss(p, image, caption):
    """Σ over all sequences of places of their probability times -log p a word, by enumeration."""
    w = Linears({key.replace("attention.", "att."): value for key, value in p.items()})
    a = image.flatten(0, 1)
    start = w("init_h", a.mean(0)), w("init_c", a.mean(0))
    total = 0.0
    for places in product(range(len(a)), repeat=WORDS):
        (h, c), log_p, missed = start, 0.0, 0.0
        for word, target, place in zip(caption, caption[1:], places, strict=False):
            y, query = p["embedding.weight"][word], w("att.decoder_att", h)
            keys = [torch.relu(w("att.encoder_att", a_i) + query) for a_i in a]
            energies = torch.cat([w("att.full_att", key) for key in keys])
            log_p = log_p + energies.log_softmax(0)[place]
            seen = torch.sigmoid(w("f_beta", h)) * a[place]
            h, c = run_cell(nn.LSTMCell, "decode_step", p, torch.cat([y, seen]), (h, c))
            missed = missed - w("fc", h).log_softmax(0)[target]
        total = total + log_p.exp() * missed / WORDS
    return total


def estimates(decoder, features, captions, lengths, batches, count, baseline="softly"):
    """Gradients of what training minimises, of all parameters in one vector, (batches, 2, P): of
    -log p, and of what `reinforce` adds to it; each of a batch of `count` times the caption.

    Args:
        baseline: what -log p of a word is compared with: "softly" as in training, "average" for
            the moving average alone, or "nothing".
    """
    found = []
    parameters = list(decoder.parameters())
    captions, lengths = captions.expand(count, -1), lengths.expand(count)
    for _ in range(batches):
        read = CrossEntropy().read(as_network(decoder), features, captions[None], lengths[None])
        scores, targets, alphas, drawn = read
        if baseline != "softly":
            drawn = drawn._replace(softly=None)
        if baseline == "nothing":
            drawn.baseline.copy_(torch.tensor([0.0, 1.0]))
        missed = loss_terms(scores, targets, alphas)[0] / (count * WORDS)
        added = reinforce(scores, targets, drawn, WORDS, scale=1.0, entropy=0.0) / count
        own = []
        for loss in (missed, added):
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(grads, parameters, strict=True)
            own.append(torch.cat([(p * 0 if g is None else g).flatten() for g, p in pairs]))
        found.append(torch.stack(own).detach().double())
    return torch.stack(found)


def test_the_estimator_is_the_exact_gradient_of_the_expected_loss(always_drawn):
    """Within its Monte Carlo error, for every parameter; with the other sign it is not."""
    decoder, *batch = hard_model()
    p = double(decoder, grad=True)
    expected_loss(p, batch[0][0].double(), batch[1][0].tolist()).backward()
    named = list(decoder.named_parameters())
    exact = torch.cat([p[name].grad.flatten() for name, _ in named])
    of_places = torch.cat([torch.full_like(p, "attention." in name).flatten() for name, p in named])
    of_places = of_places.bool()  # which the estimator alone reaches

    found = estimates(decoder, *batch, batches=60, count=300)
    assert not found[:, 0, of_places].any()

    def errors(samples):
        """In standard errors."""
        mean, error = samples.mean(0), samples.std(0) / len(samples) ** 0.5
        for part in (of_places, ~of_places):
            assert error[part].norm() < 0.06 * exact[part].norm()  # it can tell
        return abs(mean - exact) / (error + 1e-7)

    assert errors(found[:, 0] + found[:, 1]).max() < 4
    assert errors(found[:, 0] - found[:, 1])[of_places].max() > 20


def test_the_baselines_lower_the_variance(always_drawn):
    decoder, *batch = hard_model()
    spread = []
    for baseline in ("softly", "average", "nothing"):
        decoder.attention.batches.zero_()  # from which its draws are
        found = estimates(decoder, *batch, batches=60, count=20, baseline=baseline)
        spread.append(found.sum(1).var(0).sum())
    assert spread[0] < 0.3 * spread[1] and spread[1] < 0.7 * spread[2]


@pytest.mark.parametrize("name", RECURRENT)
def test_what_words_cost_softly_is_of_the_same_values_dropped_out(always_drawn, name):
    """Where one place has all the weight, drawing it is looking softly."""
    decoder = make_decoder(name, "hard", [(SIZE, D)], SIZE).train()
    for part in decoder.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    (features,), captions, lengths = make_batch([6, 4, 5, 3], 2, [(SIZE, D)])
    batch = features, captions.view(2, 2, -1), lengths.view(2, 2)
    decoder.attention.full_att.weight.data *= 1e4
    decoder.attention.encoder_att.weight.data *= 1e4  # so that no two places are equally likely
    torch.manual_seed(0)
    read = CrossEntropy().read(as_network(decoder), *batch)
    after = torch.rand(3)
    assert read.alphas.max(dim=2).values[0].min() > 1 - 1e-6
    close(read.drawn.softly, missed_each(read.scores, read.targets))
    assert not read.drawn.softly.requires_grad and read.drawn.log_p.requires_grad

    torch.manual_seed(0)  # and what is drawn later is as without it
    decoder.attention.batches.zero_()
    plain = decoder(features, captions, lengths)
    assert torch.equal(plain.scores.data, read.scores.data) and torch.equal(torch.rand(3), after)


def test_what_words_cost_softly_is_taken_off_a_word_at_a_time():
    lengths = [4, 2, 5]
    scores, targets, log_p = made_up(lengths)
    softly = torch.rand(sum(lengths))
    baseline = torch.tensor([0.3, 1.0])
    drawn = Drawn(log_p, torch.zeros(sum(lengths)), baseline, softly)
    (found,) = torch.autograd.grad(reinforce(scores, targets, drawn, 2.0), log_p)
    found, own = (unpacked(targets._replace(data=values)) for values in (found, softly))
    missed = naive_missed(scores, targets, lengths)
    excess = [
        [m - s.item() for m, s in zip(of_words, row[: len(of_words)], strict=True)]
        for of_words, row in zip(missed, own, strict=True)
    ]
    for row, caption in zip(found, excess, strict=True):
        close(row[: len(caption)], naive_returns(caption, 2.0, 0.3))
    close(baseline, [0.27 + 0.1 * sum(map(sum, excess)) / sum(lengths), 1.0])


@pytest.mark.parametrize("count", [2, 3])
def test_of_the_first_batchs_estimate_one_captions_share_is_missing_and_of_later_ones_nothing(
    count,
):
    """Captions of a word, all sequences of places of a batch: Σ p(places) · estimate."""
    torch.manual_seed(0)
    logits, scores = torch.randn(3, requires_grad=True), torch.randn(3, V)  # by the place
    missed = -scores.log_softmax(1)[:, 1]
    (exact,) = torch.autograd.grad(logits.softmax(0) @ missed, logits)
    for baseline, share in ([0.0, 0.0], 1 - 1 / count), ([0.7, 1.0], 1.0):
        total = 0.0
        for places in product(range(3), repeat=count):
            log_p = logits.log_softmax(0)[list(places)]
            packed = pack_sequence([scores[[place]] for place in places])
            targets = pack_sequence([torch.tensor([1])] * count)
            drawn = Drawn(log_p, torch.zeros(count), torch.tensor(baseline))
            loss = reinforce(packed, targets, drawn, 1.0, scale=1.0, entropy=0.0) / count
            (grad,) = torch.autograd.grad(loss, logits)
            total = total + log_p.sum().exp().detach() * grad
        close(total, share * exact)


def made_up(lengths, seed=0):
    """Scores and targets of captions of these lengths, and log α of their places, to differentiate
    by."""
    torch.manual_seed(seed)
    scores = pack_sequence([torch.randn(n, V) for n in lengths], enforce_sorted=False)
    targets = [torch.randint(V, (n,)) for n in lengths]
    targets = pack_sequence(targets, enforce_sorted=False)
    log_p = torch.randn(sum(lengths), requires_grad=True)
    return scores, targets, log_p


def naive_missed(scores, targets, lengths):
    """-log p of each word of each caption."""
    return [
        [-row.log_softmax(0)[w].item() for row, w in zip(own[:n], words[:n], strict=True)]
        for own, words, n in zip(unpacked(scores), unpacked(targets), lengths, strict=True)
    ]


def naive_returns(missed, words_each, baseline, scale=0.1):
    """R_t of a caption, by the definition, of -log p of its words."""
    return [
        sum(scale / words_each * (missed[u] - baseline) for u in range(t, len(missed)))
        for t in range(len(missed))
    ]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_a_return_is_what_follows_and_the_baseline_a_words_moving_average(lengths, seed):
    scores, targets, log_p = made_up(lengths, seed)
    missed = naive_missed(scores, targets, lengths)
    mean, words_each = sum(map(sum, missed)) / sum(lengths), sum(lengths) / len(lengths)
    baseline, entropy = torch.zeros(2), torch.zeros(sum(lengths))

    def check(before):
        loss = reinforce(scores, targets, Drawn(log_p, entropy, baseline), words_each)
        (found,) = torch.autograd.grad(loss, log_p)
        found = unpacked(targets._replace(data=found))
        for own, expected in zip(found, missed, strict=True):
            close(own[: len(expected)], naive_returns(expected, words_each, before))
        own = unpacked(targets._replace(data=log_p.detach()))
        close(loss, (found * own).sum())  # both are 0 after a caption's end

    check(mean)  # a first batch's own
    close(baseline, [mean, 1.0])
    baseline[0] = 2.0
    check(2.0)
    close(baseline, [0.9 * 2.0 + 0.1 * mean, 1.0])


def test_how_long_a_caption_goes_on_is_no_fault_of_its_places():
    """Where every word is as likely as the others, no place is judged, early or late."""
    lengths = [5, 2, 1]
    _, targets, log_p = made_up(lengths)
    even = targets._replace(data=torch.zeros(sum(lengths), V))
    drawn = Drawn(log_p, torch.zeros(sum(lengths)), torch.zeros(2))
    loss = reinforce(even, targets, drawn, sum(lengths) / 3)
    close(torch.autograd.grad(loss, log_p)[0], torch.zeros(sum(lengths)))
    close(drawn.baseline, [math.log(V), 1.0])


def test_the_whole_loss_has_the_authors_weights(always_drawn):
    """-log p a word, the return a tenth of it, entropy 0.002, doubly stochastic attention."""
    decoder, features, captions, lengths = hard_model()
    scores, targets, alphas, drawn = decoder(features, captions, lengths)
    loss = caption_loss(scores, targets, alphas, drawn._replace(baseline=torch.tensor([0.3, 1.0])))
    missed, uneven = loss_terms(scores, targets, alphas)
    returns = naive_returns(*naive_missed(scores, targets, [WORDS]), WORDS, 0.3)
    estimate = sum(own * log_p for own, log_p in zip(returns, drawn.log_p, strict=True))
    entropy = -(alphas * alphas.log()).sum(2)[0]
    close(drawn.entropy, entropy)
    close(loss, missed / WORDS + uneven + estimate - 0.002 * entropy.sum())


def test_the_entropy_term_pulls_the_alphas_towards_even(always_drawn):
    decoder, features, captions, lengths = hard_model()
    entropies = []
    for _ in range(2):
        torch.manual_seed(0)
        decoder.zero_grad()
        scores, targets, _, drawn = decoder(features, captions, lengths)
        entropies.append(drawn.entropy.sum().item())
        reinforce(scores, targets, drawn, WORDS, scale=0.0, entropy=1.0).backward()
        with torch.no_grad():
            for parameter in decoder.attention.parameters():
                parameter -= 0.01 * parameter.grad
    assert entropies[0] < entropies[1] <= WORDS * math.log(SIZE**2)


def test_a_place_is_drawn_by_its_alpha(always_drawn):
    """The vectors tell the place: each is one where the others are zero."""
    torch.manual_seed(0)
    decoder = make_decoder("gru", "hard", [(2, 4)], 2).train()
    look = decoder.attention
    annotations = look.prepare(torch.eye(4).view(1, 2, 2, 4))
    query = torch.randn(1, A).expand(4000, -1)
    context, alphas, log_p, *_ = look(annotations, query, rows_of(torch.arange(4000), 4000))
    assert (context.max(dim=1).values == 1).all() and (context.sum(dim=1) == 1).all()
    share, p = context.mean(0), alphas[0]
    assert (abs(share - p) < 4 * (p * (1 - p) / 4000) ** 0.5).all() and p.max() < 0.9
    close(log_p, alphas.log().gather(1, context.argmax(1, keepdim=True)).squeeze(1))


def soft_batches(decoder, count):
    """Whether each of so many batches is soft."""
    features = torch.zeros(1, SIZE, SIZE, D)
    return [decoder.attention.prepare(features).look == "soft" for _ in range(count)]


def test_half_of_the_batches_are_soft_the_same_in_every_process_and_after_resuming():
    decoder, *_ = hard_model()
    other = copy.deepcopy(decoder)
    torch.manual_seed(1)
    first = soft_batches(decoder, 300)
    resumed = build_decoder("lstm", decoder.config, decoder.state_dict()).train()
    assert resumed.attention.batches == 300
    rest = soft_batches(decoder, 300)
    assert abs(sum(first + rest) - 300) < 4 * (600 / 4) ** 0.5
    changes = sum(a != b for a, b in pairwise(first))
    assert abs(changes - 150) < 4 * (300 / 4) ** 0.5  # in no order
    torch.manual_seed(2)
    assert soft_batches(other, 300) == first
    assert soft_batches(resumed, 300) == rest


def as_network(decoder):
    return engine.Network(None, decoder, torch.device("cpu"), False)


WORD_MAP = {"<pad>": 0, **{f"w{i}": i for i in range(1, V - 3)}}
WORD_MAP |= {"<unk>": V - 3, "<start>": V - 2, "<end>": V - 1}


def test_training_moves_the_baseline_and_validation_leaves_it_alone(always_drawn):
    decoder, features, captions, lengths = hard_model()
    batch = features, captions[None], lengths[None]
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    means, faults = engine.Means(), []

    def train(count):
        engine.train_epoch(
            as_network(decoder), [batch] * count, CrossEntropy(), optimizer, 5.0, means,
            lambda: [], lambda step: faults.append(step.fault),
        )  # fmt: skip

    train(2)
    kept = decoder.attention.baseline.clone()
    assert kept[0] and kept[1] == 1 and decoder.attention.batches == 2 and faults == [None, None]
    engine.validate(as_network(decoder), [batch], CrossEntropy(), WORD_MAP)
    assert torch.equal(decoder.attention.baseline, kept) and decoder.attention.batches == 2
    assert decoder.eval()(features, captions, lengths).drawn is None
    built = build_decoder("lstm", decoder.config, decoder.state_dict())
    assert torch.equal(built.attention.baseline, kept)

    # a step that is skipped for its numbers leaves the average as it was
    weights = decoder.fc.weight.detach().clone()
    decoder.fc.weight.data[:] = math.inf
    train(1)
    assert "nan" in faults[-1]
    assert torch.equal(decoder.attention.baseline, kept)
    decoder.fc.weight.data[:] = weights
    train(1)
    assert faults[-1] is None and decoder.attention.baseline[0].isfinite()


def test_parts_of_a_batch_add_up_to_the_whole(monkeypatch):
    """As of two processes: one baseline, and the losses' sum is the batch's."""
    lengths = [4, 2, 5, 3]
    scores, targets, log_p = made_up(lengths)
    entropy, words_each = torch.rand(sum(lengths)), sum(lengths) / 4

    def part(rows):
        def of(values):
            own = [unpacked(targets._replace(data=values))[i, : lengths[i]] for i in rows]
            return pack_sequence(own, enforce_sorted=False)

        return of(scores.data), of(targets.data), of(log_p).data, of(entropy).data

    def run(rows):
        *packed, own_log_p, own_entropy = part(rows)
        baseline = torch.zeros(2)
        loss = reinforce(*packed, Drawn(own_log_p, own_entropy, baseline), words_each)
        return loss, baseline

    whole, baseline = run([0, 1, 2, 3])
    sums = []
    monkeypatch.setattr(distributed, "add_up", lambda own: sums.append(own.clone()) or own)
    halves = [0, 2], [1, 3]
    for half in halves:
        run(half)
    monkeypatch.setattr(distributed, "add_up", lambda own: sum(sums))
    parts = [run(half) for half in halves]
    close(sum(loss for loss, _ in parts), whole)
    for _, own in parts:
        assert torch.equal(own, parts[0][1])
        close(own, baseline)


# ------------------------------------------------------------------------------- ways to look


def first_scores(decoder, features):
    memory = decoder.prepare(features)
    words = torch.full((len(features),), WORD_MAP["<start>"])
    return decoder.step(words, decoder.init_state(memory), memory)[0]


@pytest.mark.parametrize("name", RECURRENT)
def test_a_trained_one_looks_at_the_expectation_the_likeliest_or_a_drawn_place(name):
    decoder = make_decoder(name, "hard")
    assert decoder.looks == ("soft", "argmax", "sample")
    assert make_decoder(name, "soft").looks == ()
    features = torch.randn(5, 3, 3, D)
    usual = first_scores(decoder, features)
    close(usual, first_scores(by_soft_attention(decoder), features))

    decoder.set_look("argmax")
    sharp = by_soft_attention(decoder)  # whose alphas are one and zeros
    sharp.attention.full_att.weight.data *= 1e4
    close(first_scores(decoder, features), first_scores(sharp, features))

    decoder.set_look("sample", seed=3)
    drawn = first_scores(decoder, features)
    torch.rand(7)  # of another's
    assert torch.equal(first_scores(decoder, features), drawn)
    decoder.set_look("sample", seed=4)
    assert not torch.equal(first_scores(decoder, features), drawn)
    decoder.set_look("soft")
    assert torch.equal(first_scores(decoder, features), usual)


def by_soft_attention(decoder):
    """A decoder of the same weights with soft attention."""
    config = vars(decoder.config) | {"attention": "soft"}
    buffers = dict(decoder.named_buffers())
    weights = {key: value for key, value in decoder.state_dict().items() if key not in buffers}
    return build_decoder(decoder.name, make_config(decoder.name, config), weights).eval()


def test_every_decoder_of_hard_attention_can_be_told_how_to_look():
    for name, decoder in DECODERS.items():
        if "attention" in getattr(decoder.Config, "__dataclass_fields__", {}):
            assert make_decoder(name, "hard").looks == HardAttention.LOOKS
