"""Each fast form against the plain formula beside it: values, and its own gradients."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from conftest import close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fused
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


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
both = pytest.mark.parametrize("built", [pytest.param(True, marks=needs_compiler), False])
relu_and_tanh = pytest.mark.parametrize("activation", [torch.relu, torch.tanh])


@contextmanager
def library(built):
    """With the library of `fused`, or as if there were none."""
    if built:
        fused.build(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if not built:
            patch.setattr(fused, "library", lambda: None)
        assert fused.runs(torch.ones(1, 1, 1)) == built
        yield


def compare_energies(shape, steps, seed, activation, dtype=torch.float32):
    """Pairs of what `Energies` gives of random values, and its gradients, and what the plain
    formula gives of the same values in float64."""
    images, per_image, places, hidden = shape
    torch.manual_seed(seed)
    values = torch.randn(images, places, hidden), torch.randn(hidden)
    queries = [torch.randn(images * per_image, hidden) for _ in range(steps)]
    values, queries = ([v.to(dtype) for v in own] for own in (values, queries))
    slots = [rows_of(images, per_image, seed + t) for t in range(steps)]
    weights = [torch.randn(len(s), places) for s in slots]
    found = []
    for fast in (True, False):
        leaf = [v if fast else v.double() for v in (*values, *queries)]
        projected, w, *own = leaves(*leaf)
        energies = kernels.Energies(projected, w, activation) if fast else None
        outputs = []
        for query, rows in zip(own, slots, strict=True):
            query, of = query[: len(rows)], rows // per_image
            plain = kernels.plain_energies
            outputs.append(
                energies(query, of) if fast else plain(projected, query, w, of, activation)
            )
        loss = sum((o * g).sum() for o, g in zip(outputs, weights, strict=True))
        loss.backward()
        found.append([*outputs, projected.grad, w.grad, *(q.grad for q in own)])
    return zip(*found, strict=True)


@both
@relu_and_tanh
@few
@given(shapes, st.integers(1, 4), st.integers(0, 99))
def test_energies_at_all_steps(built, activation, shape, steps, seed):
    """The gradients of what all steps share are summed over the steps, as autograd sums them."""
    with library(built):
        for fast, plain in compare_energies(shape[:4], steps, seed, activation):
            assert fast.dtype == torch.float32
            close(fast.double(), plain)


@both
@relu_and_tanh
@pytest.mark.parametrize("shape", [(3, 5, 49, 150), (2, 7, 9, 128), (1, 9, 33, 17)])
def test_energies_of_more_values_than_registers_and_tasks_hold(built, activation, shape):
    with library(built):
        for dtype in (torch.float32, torch.bfloat16):
            # beside rounding the results, sums over many terms in another order
            tolerance = 1e-5 if dtype == torch.float32 else 0.02
            for fast, plain in compare_energies(shape, 2, 0, activation, dtype):
                assert (fast.double() - plain).norm() <= tolerance * plain.norm()


@both
@relu_and_tanh
def test_energies_of_values_laid_out_in_any_way(built, activation):
    """Keys and queries that are parts of other tensors, one gradient for all."""
    keys, queries, w = torch.randn(10, 3, 6, 2)[..., 0], torch.randn(9, 7), torch.randn(20)[::2]
    images, found = torch.tensor([2, 0, 2, 2, 5, 2])[::2].repeat(3), []
    with library(built):
        for fast in (True, False):
            projected, query = leaves(keys, queries)
            values = projected.permute(2, 1, 0), query.repeat(1, 2)[:, 3:13]
            if fast:
                energies = kernels.Energies(values[0], w, activation)(values[1], images)
            else:
                energies = kernels.plain_energies(values[0], values[1], w, images, activation)
            energies.sum().backward()
            found.append((energies, projected.grad, query.grad))
    for fast, plain in zip(*found, strict=True):
        close(fast, plain)


@needs_compiler
@relu_and_tanh
def test_energies_do_not_depend_on_threads(activation):
    found = []
    with library(True):
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                found.append(
                    [fast for fast, _ in compare_energies((3, 5, 49, 150), 2, 0, activation)]
                )
            finally:
                torch.set_num_threads(before)
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)


@both
@relu_and_tanh
def test_what_is_no_number_stays_none(built, activation):
    """So that a step that has gone wrong is noticed."""
    projected, query, w = torch.randn(2, 3, 9), torch.randn(2, 9), torch.randn(9)
    query[1, 4] = torch.nan
    with library(built):
        energies = kernels.Energies(projected, w, activation)(query, torch.tensor([0, 1]))
    assert energies.isnan().tolist() == [[False] * 3, [True] * 3]


@needs_compiler
def test_tanh_is_that_of_pytorch_for_any_number():
    numbers = torch.cat([torch.linspace(-10, 10, 9999), torch.tensor([1e30, -torch.inf, 1e-30])])
    with library(True):
        energies = kernels.Energies(numbers[None, :, None], torch.ones(1), torch.tanh)
        found = energies(torch.zeros(1, 1), torch.tensor([0]))[0]
    torch.testing.assert_close(found, numbers.tanh(), rtol=1e-6, atol=0)


def test_energies_of_more_rows_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(kernels._Energies, "CACHE", 200)  # two rows of one image
    projected, query, w = torch.randn(3, 5, 4), torch.randn(12, 4), torch.randn(4)
    images = torch.randint(3, (12,))
    with library(False):
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
