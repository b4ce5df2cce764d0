"""On a GPU the attention's energies, and what their gradients are made of, without the hidden
layer in memory, as `fused.cpp` has them on a CPU; and an LSTM's cell in one launch.

In Triton, a compiler for GPUs that comes with PyTorch's builds for them. It compiles a kernel when
it is first called with tensors of a precision, or, `_of_projected`, with twice as many rows; that
takes a second or so, and is kept.

There are I images of L places with A hidden values, and n rows.
"""

import sys
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

from groundwork.errors import in_a_line

PLACES, HIDDEN = 16, 64  # that a program computes at a time
SUMMED = 64  # places, where it sums over them


def _where_they_are(function):
    """A decorator: Triton starts kernels on the current GPU, which is to be that of the tensors."""

    @wraps(function)
    def started(first, *others):
        with torch.cuda.device_of(first):
            return function(first, *others)

    return started


def runs(device: torch.device) -> bool:
    """Whether it does; where not, as Triton finds no compiler, prints a line that says why."""
    try:
        one, images = torch.ones(1, 1, 1, device=device), torch.zeros(1, device=device).long()
        energies(one, one[0], one[0, 0], images, torch.relu)
    except Exception as error:  # of many classes: of Triton, its compiler, the system's
        reason = in_a_line(error)
        print(f"computed more slowly, as Triton does not run: {reason}", file=sys.stderr)
        return False
    return True


@_where_they_are
def energies(projected: Tensor, query: Tensor, w: Tensor, images: Tensor, activation) -> Tensor:
    """`fused.energies`."""
    (_, places, hidden), rows = projected.shape, len(query)
    projected, query, w = projected.contiguous(), _as_rows(query), w.contiguous()
    found = torch.empty(rows, places, device=query.device)
    kind, grid = activation is torch.tanh, (rows, triton.cdiv(places, PLACES))
    apart = query.stride(0)
    _energies[grid](projected, query, apart, w, images, found, places, hidden, kind, PLACES, HIDDEN)
    return found


@_where_they_are
def slopes(
    grad: Tensor,
    projected: Tensor,
    query: Tensor,
    w: Tensor,
    images: Tensor,
    activation,
    of_projected: Tensor,
) -> tuple[Tensor, Tensor]:
    """`fused.slopes`."""
    (count, places, hidden), rows = projected.shape, len(query)
    query, w = _as_rows(query), w.contiguous()
    of_query = query.new_empty(rows, hidden)
    of_w = torch.empty(rows, hidden, device=query.device)
    tensors = grad.contiguous(), projected.contiguous(), query, query.stride(0)
    kind, parts = activation is torch.tanh, triton.cdiv(hidden, HIDDEN)
    _of_query[(rows, parts)](
        *tensors, w, images, of_query, of_w, places, hidden, kind, SUMMED, HIDDEN
    )
    _of_projected[(count, triton.cdiv(places, PLACES), parts)](
        *tensors,
        images,
        of_projected,
        rows,
        places,
        hidden,
        kind,
        triton.next_power_of_2(rows),
        PLACES,
        HIDDEN,
    )
    return of_query, of_w


def _as_rows(query):
    """The queries with the values of each in a row, which need not lie behind each other: they are
    a part of what a product has made."""
    return query if query.stride(1) == 1 else query.contiguous()


@_where_they_are
def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.plain_cell`."""
    gates, c = gates.contiguous(), c.contiguous()
    h, following = torch.empty(2, *c.shape, device=c.device)
    grid = len(c), triton.cdiv(c.shape[1], HIDDEN)
    _cell[grid](gates, c, h, following, c.shape[1], HIDDEN)
    return h, following


@_where_they_are
def of_cell(
    of_h: Tensor, of_following: Tensor, gates: Tensor, c: Tensor, following: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of gates and c, from those of `cell`'s results; `following` is the second."""
    tensors = [tensor.contiguous() for tensor in (of_h, of_following, gates, c, following)]
    of_gates, of_c = torch.empty_like(tensors[2]), torch.empty_like(tensors[3])
    grid = len(c), triton.cdiv(c.shape[1], HIDDEN)
    _of_cell[grid](*tensors, of_gates, of_c, c.shape[1], HIDDEN)
    return of_gates, of_c


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _gates(gates, row, value, hidden):
    """i, f, g and o of a row, at some of its hidden values."""
    inside, at = value < hidden, gates + row * 4 * hidden + value
    i = tl.sigmoid(tl.load(at, mask=inside, other=0.0).to(tl.float32))
    f = tl.sigmoid(tl.load(at + hidden, mask=inside, other=0.0).to(tl.float32))
    g = _tanh(tl.load(at + 2 * hidden, mask=inside, other=0.0).to(tl.float32))
    o = tl.sigmoid(tl.load(at + 3 * hidden, mask=inside, other=0.0).to(tl.float32))
    return i, f, g, o


@triton.jit
def _cell(gates, c, h, following, hidden, HIDDEN: tl.constexpr):
    row, value = tl.program_id(0), tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN)
    i, f, g, o = _gates(gates, row, value, hidden)
    inside, at = value < hidden, row * hidden + value
    new = f * tl.load(c + at, mask=inside, other=0.0) + i * g
    tl.store(following + at, new, mask=inside)
    tl.store(h + at, o * _tanh(new), mask=inside)


@triton.jit
def _of_cell(of_h, of_following, gates, c, following, of_gates, of_c, hidden, HIDDEN: tl.constexpr):
    row, value = tl.program_id(0), tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN)
    i, f, g, o = _gates(gates, row, value, hidden)
    inside, at = value < hidden, row * hidden + value
    squashed = _tanh(tl.load(following + at, mask=inside, other=0.0))
    own = tl.load(of_h + at, mask=inside, other=0.0)
    new = own * o * (1 - squashed * squashed)
    new += tl.load(of_following + at, mask=inside, other=0.0)
    before = tl.load(c + at, mask=inside, other=0.0)
    at_gates = of_gates + row * 4 * hidden + value
    tl.store(at_gates, new * g * i * (1 - i), mask=inside)
    tl.store(at_gates + hidden, new * before * f * (1 - f), mask=inside)
    tl.store(at_gates + 2 * hidden, new * i * (1 - g * g), mask=inside)
    tl.store(at_gates + 3 * hidden, own * squashed * o * (1 - o), mask=inside)
    tl.store(of_c + at, new * f, mask=inside)


@triton.jit
def _of(x, tanh: tl.constexpr):
    """f and f' at x, where comparisons are such that nan stays nan."""
    if tanh:
        value = _tanh(x)
        slope = 1 - value * value
    else:
        slope = tl.where(x <= 0, 0.0, 1.0)
        value = tl.where(x <= 0, 0.0, x)
    return value, slope


@triton.jit
def _keys(projected, image, place, value, places, hidden):
    """W_a a_i of an image at some places and hidden values, zero beyond the last."""
    there = (place[:, None] < places) & (value[None, :] < hidden)
    at = (image * places + place[:, None]) * hidden + value[None, :]
    return tl.load(projected + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _energies(
    projected,
    query,
    apart,
    w,
    images,
    found,
    places,
    hidden,
    tanh: tl.constexpr,
    PLACES: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    row, place = tl.program_id(0), tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    image = tl.load(images + row)
    total = tl.zeros((PLACES,), tl.float32)
    for first in range(0, hidden, HIDDEN):
        value = first + tl.arange(0, HIDDEN)
        own = tl.load(query + row * apart + value, mask=value < hidden, other=0.0).to(tl.float32)
        weight = tl.load(w + value, mask=value < hidden, other=0.0).to(tl.float32)
        keys = _keys(projected, image, place, value, places, hidden)
        activated, _ = _of(keys + own[None, :], tanh)
        total += tl.sum(activated * weight[None, :], axis=1)
    tl.store(found + row * places + place, total, mask=place < places)


@triton.jit
def _of_query(
    grad,
    projected,
    query,
    apart,
    w,
    images,
    of_query,
    of_w,
    places,
    hidden,
    tanh: tl.constexpr,
    PLACES: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Sums over the places of a row."""
    row, value = tl.program_id(0), tl.program_id(1) * HIDDEN + tl.arange(0, HIDDEN)
    image, inside = tl.load(images + row), value < hidden
    own = tl.load(query + row * apart + value, mask=inside, other=0.0).to(tl.float32)
    slopes, values = tl.zeros((HIDDEN,), tl.float32), tl.zeros((HIDDEN,), tl.float32)
    for first in range(0, places, PLACES):
        place = first + tl.arange(0, PLACES)
        weight = tl.load(grad + row * places + place, mask=place < places, other=0.0)
        keys = _keys(projected, image, place, value, places, hidden)
        activated, slope = _of(keys + own[None, :], tanh)
        weight = weight.to(tl.float32)[:, None]
        slopes += tl.sum(weight * slope, axis=0)
        values += tl.sum(weight * activated, axis=0)
    weight = tl.load(w + value, mask=inside, other=0.0).to(tl.float32)
    tl.store(of_query + row * hidden + value, weight * slopes, mask=inside)
    tl.store(of_w + row * hidden + value, values if tanh else own * slopes, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _of_projected(
    grad,
    projected,
    query,
    apart,
    images,
    of_projected,
    rows,
    places,
    hidden,
    tanh: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Sums over the rows of an image, in their order."""
    image = tl.program_id(0)
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    value = tl.program_id(2) * HIDDEN + tl.arange(0, HIDDEN)
    keys = _keys(projected, image, place, value, places, hidden)
    total = tl.zeros((PLACES, HIDDEN), tl.float32)
    all_rows = tl.arange(0, ROWS)
    mine = tl.load(images + all_rows, mask=all_rows < rows, other=-1) == image
    row = tl.min(tl.where(mine, all_rows, ROWS), axis=0)
    while row < ROWS:
        own = tl.load(query + row * apart + value, mask=value < hidden, other=0.0).to(tl.float32)
        weight = tl.load(grad + row * places + place, mask=place < places, other=0.0)
        _, slope = _of(keys + own[None, :], tanh)
        total += weight.to(tl.float32)[:, None] * slope
        row = tl.min(tl.where(mine & (all_rows > row), all_rows, ROWS), axis=0)
    there = (place[:, None] < places) & (value[None, :] < hidden)
    at = of_projected + (image * places + place[:, None]) * hidden + value[None, :]
    tl.store(at, tl.load(at, mask=there) + total, mask=there)
