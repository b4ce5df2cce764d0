"""Each fast form against the plain formula beside it: values, and its own gradients."""

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import kernels
import vocabulary

few = settings(max_examples=25, deadline=None)
# images, captions of an image, places, hidden, values of a vector
shapes = st.tuples(*(st.integers(1, n) for n in (4, 3, 6, 5, 4)))


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def rows_of(images, per_image, seed):
    """Some of the rows in a random order: their slots."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(images * per_image, generator=generator)
    return order[: max(1, len(order) - seed % 3)]


@few
@given(shapes, st.integers(1, 4), st.integers(0, 99))
def test_energies_at_all_steps(shape, steps, seed):
    """The gradients of what all steps share are summed over the steps, as autograd sums them."""
    images, per_image, places, hidden, _ = shape
    torch.manual_seed(seed)
    values = torch.randn(images, places, hidden), torch.randn(hidden)
    queries = [torch.randn(images * per_image, hidden) for _ in range(steps)]
    slots = [rows_of(images, per_image, seed + t) for t in range(steps)]
    weights = [torch.randn(len(s), places) for s in slots]
    found = []
    for fast in (True, False):
        projected, w, *own = leaves(*values, *queries)
        energies = kernels.Energies(projected, w) if fast else None
        outputs = []
        for query, rows in zip(own, slots, strict=True):
            query, of = query[: len(rows)], rows // per_image
            outputs.append(
                energies(query, of) if fast else kernels.plain_energies(projected, query, w, of)
            )
        loss = sum((o * g).sum() for o, g in zip(outputs, weights, strict=True))
        loss.backward()
        found.append([*outputs, projected.grad, w.grad, *(q.grad for q in own)])
    for fast, plain in zip(*found, strict=True):
        close(fast, plain)


def test_energies_of_more_rows_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(kernels._Energies, "CACHE", 200)  # two rows of one image
    projected, query, w = torch.randn(3, 5, 4), torch.randn(12, 4), torch.randn(4)
    images = torch.randint(3, (12,))
    found = kernels.Energies(projected, w)(query, images)
    close(found, kernels.plain_energies(projected, query, w, images))
    selected = kernels.Energies(projected, w).select(torch.tensor([2, 0]))
    expected = kernels.plain_energies(projected[[2, 0]], query[:2], w, torch.tensor([0, 1]))
    close(selected(query[:2], torch.tensor([0, 1])), expected)


@few
@given(shapes, st.integers(0, 99))
def test_context(shape, seed):
    images, per_image, places, _, dim = shape
    torch.manual_seed(seed)
    slots = rows_of(images, per_image, seed)
    values = torch.randn(images, places, dim), torch.rand(len(slots), places)
    weight, found = torch.randn(len(slots), dim), []
    for function in (kernels.context, kernels.plain_context):
        vectors, alphas = leaves(*values)
        contexts = function(vectors, alphas, slots, per_image)
        (contexts * weight).sum().backward()
        found.append((contexts, vectors.grad, alphas.grad))
    for fast, plain in zip(*found, strict=True):
        close(fast, plain)


@few
@given(st.integers(1, 9), st.integers(1, 9))
def test_pooling_is_a_product(grid, size):
    vectors = torch.randn(2, grid, grid, 3)
    pooled = kernels.pooling_matrix(grid, size) @ vectors.flatten(1, 2)
    close(pooled, kernels.plain_pool(vectors, size).flatten(1, 2))


@few
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 99))
def test_products_at_all_steps(sizes, missing, seed):
    """Also with more rows than the steps have."""
    torch.manual_seed(seed)
    value, inputs = torch.randn(3, 5), [torch.randn(n, 5) for n in sizes]
    gradients, found = [torch.randn(n, 3) for n in sizes], []
    for fast in (True, False):
        weight, *xs = leaves(value, *inputs)
        if fast:
            product = kernels.Product(weight, sum(sizes) + missing)
            zeros = product.zeros.split([*sizes, missing])[:-1]
            outputs = [product(x) + zero for x, zero in zip(xs, zeros, strict=True)]
            product.close()
        else:
            outputs = [kernels.plain_product(x, weight) for x in xs]
        sum((o * g).sum() for o, g in zip(outputs, gradients, strict=True)).backward()
        found.append([*outputs, weight.grad, *(x.grad for x in xs)])
    for fast, plain in zip(*found, strict=True):
        close(fast, plain)


@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_missed(rows, label_smoothing):
    targets, value = torch.randint(11, (rows,)), 3 * torch.randn(rows, 11)
    found = []
    for function in (kernels.missed, kernels.plain_missed):
        (scores,) = leaves(value)
        loss = function(scores, targets, label_smoothing)
        (0.5 * loss).backward()
        found.append((loss, scores.grad))
    for fast, plain in zip(*found, strict=True):
        close(fast, plain)
    by_library = F.cross_entropy(value, targets, reduction="sum", label_smoothing=label_smoothing)
    close(found[0][0], by_library)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_missed_without_the_words_that_are_barred(rows, label_smoothing, dtype):
    """As if there were neither their columns nor the rows whose target they are."""
    barred, kept = torch.tensor([0, 5, 9]), [1, 2, 3, 4, 6, 7, 8, 10]
    targets, value = torch.randint(11, (rows,)), (3 * torch.randn(rows, 11)).to(dtype)
    targets[0] = 4
    value[:, barred] = vocabulary.BARRED
    found = []
    for function in (kernels.missed, kernels.plain_missed):
        (scores,) = leaves(value)
        loss = function(scores, targets, label_smoothing, barred)
        (0.5 * loss).backward()
        found.append((loss, scores.grad.float()))
    (scores,) = leaves(value.float())
    real = ~torch.isin(targets, barred)
    places = torch.tensor([kept.index(w) for w in targets[real].tolist()])
    without = F.cross_entropy(
        scores[real][:, kept], places, reduction="sum", label_smoothing=label_smoothing
    )
    (0.5 * without).backward()
    for loss, gradient in found:
        close(loss, without, 1e-4)
        close(gradient, scores.grad, 1e-5 if dtype is torch.float32 else 0.01)
        assert not gradient[:, barred].any() and not gradient[~real].any()


def test_bfloat16_within_its_rounding():
    projected, query, w = torch.randn(2, 6, 32), torch.randn(4, 32), torch.randn(32)
    images = torch.tensor([0, 0, 1, 1])
    plain = kernels.plain_energies(projected, query, w, images)
    found = kernels.Energies(projected.bfloat16(), w.bfloat16())(query.bfloat16(), images)
    close(found.float(), plain, 0.1)
    scores, targets = torch.randn(4, 50), torch.arange(4)
    close(kernels.missed(scores.bfloat16(), targets), F.cross_entropy(scores, targets) * 4, 0.01)
