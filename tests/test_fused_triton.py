"""The Triton kernels, computed by Triton's interpreter, which needs no GPU, against the formulas.
`test_cuda` has them compiled."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="needs Triton")

CHECK = """
import torch
from itertools import product
import fused_triton, kernels
from conftest import close

def leaves(*tensors):
    return [tensor.float().detach().clone().requires_grad_() for tensor in tensors]

def check_energies(images, places, hidden, own, activation, dtype):
    own, rows = torch.tensor(own), len(own)
    keys, w = torch.randn(images, places, hidden).to(dtype), torch.randn(hidden).to(dtype)
    query = torch.randn(rows, hidden + 9).to(dtype)[:, 4 : 4 + hidden]  # a part of a product
    grad, of_keys = torch.randn(rows, places), torch.randn(images, places, hidden)
    exact = leaves(keys, query, w)
    energies = kernels.plain_energies(*exact, own, activation)
    energies.backward(grad)
    close(fused_triton.energies(keys, query, w, own, activation), energies, 1e-5)
    before = of_keys.clone()
    of_query, of_w = fused_triton.slopes(grad, keys, query, w, own, activation, of_keys)
    of_w, of_keys = of_w.sum(0), of_keys - before  # it is added to what there is
    if activation is torch.relu:
        of_w += (keys * of_keys).sum((0, 1))
    rounding = 1e-4 if dtype is torch.float32 else 1e-2
    for found, leaf in zip((of_keys * w, of_query, of_w), exact, strict=True):
        close(found.float(), leaf.grad, rounding)

def check_cell(rows, hidden, dtype):
    gates, c = torch.randn(rows, 4 * hidden).to(dtype), torch.randn(rows, hidden)
    exact, grads = leaves(gates, c), torch.randn(2, rows, hidden)
    expected = kernels.plain_cell(*exact)
    torch.autograd.backward(expected, grads.unbind())
    found = fused_triton.cell(gates, c)
    for own, value in zip(found, expected, strict=True):
        close(own, value, 1e-5)
    gradients = fused_triton.of_cell(*grads, gates, c, found[1])
    for own, leaf in zip(gradients, exact, strict=True):
        close(own.float(), leaf.grad, 1e-5 if dtype is torch.float32 else 1e-2)

torch.manual_seed(0)
problems = (3, 5, 12, [2, 0, 2, 2, 0, 2]), (2, 70, 130, [1, 0, 0, 1, 1]), (1, 16, 64, [0])
kinds = product((torch.relu, torch.tanh), (torch.float32, torch.bfloat16))
for problem, kind in product(problems, kinds):
    check_energies(*problem, *kind)
for size, dtype in product(((3, 5), (2, 64), (4, 130)), (torch.float32, torch.bfloat16)):
    check_cell(*size, dtype)
print("all equal")
"""


def test_the_kernels_compute_the_formulas_and_their_gradients():
    process = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout == "all equal\n", process.stderr
