"""The textbook formulation of the model, written out plainly: what the benchmark compares with.

It is that of the public PyTorch code for this model: a row of annotation vectors for every caption,
all projected again at every step, the encoder run once per caption and epoch, one image captioned
at a time. Encoder and decoder are modules of `encoders` and `models`, of which it uses the layers.
"""

import h5py
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

SIZE = 14  # side of the attention's grid


def encode(encoder, images):
    """Annotation vectors (n, L, D) of uint8 images (n, 3, S, S)."""
    features = encoder.resnet((images / 255 - encoder.mean) / encoder.std)
    return pool(features)


def pool(features):
    """Annotation vectors (n, L, D) from (n, D, g, g)."""
    return F.adaptive_avg_pool2d(features, SIZE).permute(0, 2, 3, 1).flatten(1, 2)


def attention(attention, encoder_out, h):
    """ẑ (n, D) and alphas (n, L) for encoder_out (n, L, D)."""
    projected = attention.encoder_att(encoder_out)
    query = attention.decoder_att(h)
    energies = attention.full_att(torch.relu(projected + query.unsqueeze(1))).squeeze(2)
    alphas = energies.softmax(dim=1)
    return (encoder_out * alphas.unsqueeze(2)).sum(dim=1), alphas


def step(decoder, encoder_out, embedded, h, c):
    """The LSTM's next state (n, decoder_dim) twice, and alphas (n, L)."""
    context, alphas = attention(decoder.attention, encoder_out, h)
    context = torch.sigmoid(decoder.f_beta(h)) * context
    h, c = decoder.decode_step(torch.cat([embedded, context], dim=1), (h, c))
    return h, c, alphas


def loss(decoder, encoder_out, captions, lengths):
    """The loss of n captions; encoder_out (n, L, D) has a row for each."""
    lengths, order = lengths.sort(descending=True)
    encoder_out, captions = encoder_out[order], captions[order]
    steps = (lengths - 1).tolist()
    embedded = decoder.embedding(captions)
    mean = encoder_out.mean(dim=1)
    h, c = decoder.init_h(mean), decoder.init_c(mean)
    scores = encoder_out.new_zeros(len(captions), max(steps), decoder.fc.out_features)
    alphas = encoder_out.new_zeros(len(captions), max(steps), encoder_out.shape[1])
    for t in range(max(steps)):
        n = sum(length > t for length in steps)
        h, c, alpha = step(decoder, encoder_out[:n], embedded[:n, t], h[:n], c[:n])
        scores[:n, t] = decoder.fc(decoder.dropout(h))
        alphas[:n, t] = alpha
    scores = pack_padded_sequence(scores, steps, batch_first=True).data
    targets = pack_padded_sequence(captions[:, 1:], steps, batch_first=True).data
    return F.cross_entropy(scores, targets) + ((1 - alphas.sum(dim=1)) ** 2).mean()


@torch.no_grad()
def beam_search(decoder, encoder_out, word_map, k, max_length):
    """The words of one image's caption, encoder_out (1, L, D)."""
    encoder_out = encoder_out.expand(k, -1, -1)
    mean = encoder_out.mean(dim=1)
    h, c = decoder.init_h(mean), decoder.init_c(mean)
    words = torch.full((k, 1), word_map["<start>"], device=encoder_out.device)
    totals = torch.zeros(k, 1, device=encoder_out.device)
    finished = []
    never = [word_map[word] for word in ("<pad>", "<start>", "<unk>")]
    for length in range(max_length + 1):
        embedded = decoder.embedding(words[:, -1])
        h, c, _ = step(decoder, encoder_out[: len(words)], embedded, h, c)
        scores = F.log_softmax(decoder.fc(h), dim=1)
        scores[:, never] = -torch.inf
        if length == 0:
            scores[:, word_map["<end>"]] = -torch.inf
        scores = totals + scores
        if length == max_length:
            totals = scores[:, word_map["<end>"]]
            finished += list(zip(totals.tolist(), words[:, 1:].tolist(), strict=True))
            break
        if length == 0:
            scores = scores[:1]
        totals, places = scores.flatten().topk(k - len(finished))
        rows, chosen = places // scores.shape[1], places % scores.shape[1]
        words = torch.cat([words[rows], chosen.unsqueeze(1)], dim=1)
        for i in (chosen == word_map["<end>"]).nonzero().flatten().tolist():
            finished.append((totals[i].item(), words[i, 1:-1].tolist()))
        open_ = chosen != word_map["<end>"]
        words, totals, rows = words[open_], totals[open_].unsqueeze(1), rows[open_]
        h, c = h[rows], c[rows]
        if not len(words):
            break
    return max(finished)[1]


def input_files(paths, output, size):
    """One image after the other, as the tutorials write them."""
    with h5py.File(output, "w") as file:
        images = file.create_dataset("images", (len(paths), 3, size, size), dtype="uint8")
        for i, path in enumerate(paths):
            image = np.array(Image.open(path).resize((size, size)))
            images[i] = image.transpose(2, 0, 1)
