"""What makes the model fast, each beside the plain formula that it replaces.

A function `plain_NAME` is the formula as the paper has it; NAME, or the class of that name,
computes the same, with the same gradients, in less time or memory. The model works with either:
whoever writes another score function or loss writes its formula, and autograd does the rest. The
tests and the benchmark compare each pair.

Rows are captions at one step, n of them; images are I, each with K captions; an image has L places.
"""

import copy
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node

import fused

# ----------------------------------------------------------------------------------- energies


def plain_energies(
    projected: Tensor, query: Tensor, w: Tensor, images: Tensor, activation=torch.relu
) -> Tensor:
    """e_ti = w · relu(W_a a_i + W_h h_{t-1}) (§3.1.2, eq. 4).

    Args:
        projected: (I, L, A) W_a a_i of each image.
        query: (n, A) W_h h_{t-1} of each row.
        w: (A,).
        images: (n,) int64, each row's image.
        activation: torch.relu, or torch.tanh in its place.

    Returns:
        (n, L).
    """
    keys = projected.index_select(0, images)  # its gradient is added up in order
    return activation(keys + query.unsqueeze(1)) @ w


def _without_hidden_layer(projected: Tensor):
    """The module that computes energies of these keys in one pass, without the hidden layer in
    memory: `fused` or `fused_triton`, or None where neither does."""
    return fused if fused.runs(projected) else _on_gpu(projected)


def _on_gpu(values: Tensor):
    """`fused_triton`, where it computes with tensors like these, or None."""
    known = values.is_cuda and values.dtype in (torch.float32, torch.bfloat16)
    return _triton(values.device) if known else None


@cache
def _triton(device):
    if not find_spec("triton"):
        return None
    import fused_triton  # which imports a compiler

    return fused_triton if fused_triton.runs(device) else None


class Energies:
    """`plain_energies` at all steps of a batch: called with query and images.

    The gradients of `projected` and `w`, which all steps share, are made once, after the backward
    pass of the first step. With tanh it is the plain formula where no module computes in one pass.

    To PyTorch's trees it is a node, whose leaves are `projected` and `w`.
    """

    def __init__(self, projected: Tensor, w: Tensor, activation=torch.relu):
        self.activation, self.sums, self.token = activation, [], None
        self.plain = activation is not torch.relu and not _without_hidden_layer(projected)
        if not self.plain and torch.is_grad_enabled():
            self.token = _Token.apply(projected, w, activation, self.sums)
            projected, w = projected.detach(), w.detach()
        self.projected, self.w = projected, w

    def __call__(self, query: Tensor, images: Tensor) -> Tensor:
        values = self.projected, query, self.w, images, self.activation
        if self.plain:
            return plain_energies(*values)
        return _Energies.apply(*values, self.token, self.sums)

    def select(self, images: Tensor) -> "Energies":
        """Those of the given images, indices or a mask: for decoding, without gradients."""
        selected = copy.copy(self)
        selected.projected = self.projected[images]
        return selected


def _leaves(energies):
    return [energies.projected, energies.w], energies.activation


@torch.no_grad()
def _of_leaves(leaves, activation):
    return Energies(*leaves, activation)


register_pytree_node(Energies, _leaves, _of_leaves)


class _Energies(torch.autograd.Function):
    """The energies of one step.

    The hidden layer (n, L, A) is the model's largest tensor by far, and is never kept: the backward
    pass makes it anew. `fused` and `fused_triton` make it in registers; without, PyTorch does for
    some rows of one image at a time, which stay in a CPU's cache.

    What the backward pass finds for the step's own query it returns; what all steps share it leaves
    in `sums`: with f the activation, the sum over t of grad · f', (I, L, A), and of each step what
    w's gradient is the sum of. As relu(x) is x · relu'(x), the part of W_h h_{t-1} in that follows
    from its own gradient, that of W_a a_i from the first sum.
    """

    CACHE = 2**20  # bytes; second-level caches hold one to two million

    @staticmethod
    def forward(ctx, projected, query, w, images, activation, token, sums):
        ctx.save_for_backward(projected, query, w, images)
        ctx.activation, ctx.sums = activation, sums
        ctx.module = _without_hidden_layer(projected)
        if ctx.module:
            return ctx.module.energies(projected, query, w, images, activation)
        ctx.parts = _Energies.parts(projected, images)
        energies = query.new_empty(len(query), projected.shape[1])
        for image, rows in ctx.parts:
            energies[rows] = (projected[image] + query[rows, None]).relu_() @ w
        return energies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        projected, query, w, images = ctx.saved_tensors
        first = not ctx.sums
        if first:
            precision = torch.float32 if ctx.module else projected.dtype
            ctx.sums.append(projected.new_zeros(projected.shape, dtype=precision))
        if ctx.module:
            values = grad, projected, query, w, images, ctx.activation, ctx.sums[0]
            of_query, of_w = ctx.module.slopes(*values)
        else:
            of_query, of_w = _Energies.slopes(grad, projected, query, w, ctx.parts, ctx.sums[0])
        ctx.sums.append(of_w)
        of_token = grad.new_zeros(()) if first else None
        return None, of_query, None, None, None, of_token, None

    @staticmethod
    def slopes(grad, projected, query, w, parts, of_projected):
        """`fused.slopes` of relu, whose slope is one where W_a a_i > -W_h h_{t-1}."""
        of_query = torch.empty_like(query)
        for image, rows in parts:
            own = grad[rows]
            positive = query.new_empty(*own.shape, query.shape[1])
            torch.gt(projected[image], -query[rows, None], out=positive)  # as numbers, not bools
            of_query[rows] = (own[:, None] @ positive).squeeze(1)
            if isinstance(image, int):
                for weights, places in zip(own.unsqueeze(2), positive, strict=True):
                    of_projected[image].addcmul_(weights, places)
            else:
                of_projected.index_add_(0, image, positive.mul_(own.unsqueeze(2)))
        return of_query * w, query * of_query

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


class _Token(torch.autograd.Function):
    """A zero that every step takes, so that its gradient, zero itself, comes when all have been:
    then the shared gradients are made from what the steps left in `sums`."""

    @staticmethod
    def forward(ctx, projected, w, activation, sums):
        ctx.save_for_backward(projected, w)
        ctx.activation, ctx.sums = activation, sums
        return projected.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        projected, w = ctx.saved_tensors
        of_projected, *of_w = ctx.sums
        ctx.sums.clear()
        of_w = torch.cat(of_w).sum(dim=0, dtype=torch.float32)
        if ctx.activation is torch.relu:
            of_w += (projected * of_projected).sum((0, 1), dtype=torch.float32)
        return of_projected.mul_(w).to(projected), of_w.to(w), None, None


# ------------------------------------------------------------------------------------ context


def plain_context(vectors: Tensor, alphas: Tensor, slots: Tensor | None, per_image: int) -> Tensor:
    """ẑ_t = Σ_i α_ti a_i (§4.2, eq. 13).

    Args:
        vectors: (I, L, D) annotation vectors.
        alphas: (n, L).
        slots: (n,) int64, each row's place among I images × K captions, image by image; all
            different. None: the rows are all of them, in this order.
        per_image: K.

    Returns:
        (n, D).
    """
    if slots is None:
        slots = torch.arange(len(alphas), device=alphas.device)
    return (alphas.unsqueeze(2) * vectors[slots // per_image]).sum(dim=1)


def context(vectors: Tensor, alphas: Tensor, slots: Tensor | None, per_image: int) -> Tensor:
    """`plain_context` by one product an image over its K captions, which reads the vectors once and
    copies none."""
    images, places, dim = vectors.shape
    if slots is None:
        return (alphas.view(images, per_image, places) @ vectors).view(-1, dim)
    grouped = alphas.new_zeros(images * per_image, places).index_copy(0, slots, alphas)
    contexts = grouped.view(images, per_image, places) @ vectors
    return contexts.view(-1, dim).index_select(0, slots)


def plain_pool(vectors: Tensor, size: int) -> Tensor:
    """(I, g, g, D) pooled adaptively to (I, size, size, D): the places that the attention has."""
    return F.adaptive_avg_pool2d(vectors.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def pooling_matrix(size_in: int, size_out: int, device=None) -> Tensor:
    """P (size_out², size_in²), with which `plain_pool` is P a; its rows sum to 1.

    So a coarse grid is never blown up: W_a (P a) = P (W_a a), and Σ_i α_i (P a)_i is
    Σ_j (Pᵀα)_j a_j.
    """
    basis = torch.eye(size_in**2, device=device).view(-1, 1, size_in, size_in)
    return F.adaptive_avg_pool2d(basis, size_out).flatten(1).T


# --------------------------------------------------------------------------------- recurrence


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """x_t Wᵀ, (n, in) to (n, out), at each step by itself."""
    return F.linear(x, weight)


class Product:
    """`plain_product` at all steps of a batch, called with x_t.

    The weight's gradient Σ_t g_tᵀ x_t is one product after the loop, where autograd would make and
    add up one a step. It comes through `zeros`, (rows, out), which must be added to the outputs of
    the steps, all below each other; `close` when all steps have been taken.
    """

    def __init__(self, weight: Tensor, rows: int):
        self.inputs = []
        self.zeros = _Zeros.apply(weight, rows, self.inputs)
        self.weight = weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach())
        return F.linear(x, self.weight)

    def close(self):
        """Takes zeros as the inputs of the rows that no step had."""
        missing = len(self.zeros) - sum(map(len, self.inputs))
        self.inputs.append(self.inputs[0].new_zeros(missing, self.inputs[0].shape[1]))


class _Zeros(torch.autograd.Function):
    """Zeros whose gradient, that of the steps' outputs together, makes the weight's."""

    @staticmethod
    def forward(ctx, weight, rows, inputs):
        ctx.inputs = inputs
        return weight.new_zeros(rows, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # laid out anew, as oneDNN takes up to four times as long on a transposed view
        return grad.T.contiguous() @ torch.cat(ctx.inputs).to(grad.dtype), None, None


# Products over all words of a batch are filled up with zeros to a multiple of so many rows: oneDNN
# compiles a bfloat16 kernel for every new number of rows, which takes longer than the product, and
# keeps it with megabytes of scratch memory.
ROWS = 256


def filled(rows: int) -> int:
    """`rows`, rounded up to whole `ROWS`."""
    return rows + -rows % ROWS


def plain_cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h_t and c_t of an LSTM (eq. 1 to 3), (n, H) float32 each.

    Args:
        gates: (n, 4·H), before their sigmoids and tanh: i, f, g and o, as PyTorch has them.
        c: (n, H) float32 c_{t-1}.
    """
    i, f, g, o = gates.float().chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """`plain_cell`, on a GPU in one launch where Triton runs."""
    if _on_gpu(gates):
        return _Cell.apply(gates, c)
    return plain_cell(gates, c)


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, c):
        h, following = _on_gpu(gates).cell(gates, c)
        ctx.save_for_backward(gates, c, following)
        return h, following

    @staticmethod
    @once_differentiable
    def backward(ctx, of_h, of_following):
        gates, *_ = ctx.saved_tensors
        return _on_gpu(gates).of_cell(of_h, of_following, *ctx.saved_tensors)


# --------------------------------------------------------------------------------------- loss

IGNORED = -100  # a target that is none, as in PyTorch's cross_entropy


def plain_missed(
    scores: Tensor, targets: Tensor, label_smoothing: float = 0.0, barred: Tensor | None = None
) -> Tensor:
    """Σ -log p of the targets (§4.2.1, eq. 14, its first term), float32.

    Args:
        scores: (n, V), before the softmax.
        targets: (n,) int64; those that are `IGNORED` are left out.
        label_smoothing: share of each target that is spread evenly over the vocabulary.
        barred: (b,) int64, words to which the scores give no probability: as targets they are left
            out, and nothing is spread to them.
    """
    log_p = scores.log_softmax(dim=1, dtype=torch.float32)
    real, targets = (targets != IGNORED).to(log_p), targets.clamp(min=0)
    meant = F.one_hot(targets, scores.shape[1]).to(log_p)
    possible = torch.ones_like(log_p[0])
    if barred is not None:
        possible[barred] = 0
    shares = (1 - label_smoothing) * meant + label_smoothing * possible / possible.sum()
    return -(shares * log_p).sum(dim=1) @ (possible[targets] * real)


def missed(
    scores: Tensor, targets: Tensor, label_smoothing: float = 0.0, barred: Tensor | None = None
) -> Tensor:
    """`plain_missed` some rows at a time, its gradient made on the way: all rows in float32 would
    be the largest tensor that a step keeps. The backward pass can be gone through once."""
    return _Missed.apply(scores, targets, label_smoothing, barred)


class _Missed(torch.autograd.Function):
    ROWS, ROWS_OF_GPU = 256, 1024  # at a time: as a cache holds, and as keep a GPU busy

    @staticmethod
    def forward(ctx, scores, targets, label_smoothing, barred):
        missed = scores.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(scores)
        possible = torch.ones_like(scores[0], dtype=torch.float32)
        if barred is not None:
            possible[barred] = 0
        even = label_smoothing * possible / possible.sum()  # the target of words that are not meant
        real, targets = targets != IGNORED, targets.clamp(min=0)
        columns = targets.unsqueeze(1), (possible[targets] * real).unsqueeze(1)
        rows = _Missed.ROWS_OF_GPU if scores.is_cuda else _Missed.ROWS
        parts = (tensor.split(rows) for tensor in (scores, gradient, *columns))
        for score, grad, target, counts in zip(*parts, strict=True):
            log_p = score.log_softmax(dim=1, dtype=torch.float32)
            own = (1 - label_smoothing) * log_p.gather(1, target)
            if label_smoothing:
                own += (log_p @ even).unsqueeze(1)
            p = log_p.exp_().sub_(even) if label_smoothing else log_p.exp_()
            p.scatter_add_(1, target, torch.full_like(own, label_smoothing - 1))
            missed -= (own * counts).sum()
            torch.mul(p, counts, out=grad)
        ctx.save_for_backward(gradient)
        return missed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        # in place: a second pass through would raise an error
        return gradient.mul_(grad), None, None, None
