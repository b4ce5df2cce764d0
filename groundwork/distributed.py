"""Several processes that train or evaluate as one, as torchrun starts them; alone, a group of one.

All processes hold the same model. A batch is shared out among them, and what they find is put
together so that everything comes out as from one process with the whole batch.
"""

import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, zip_longest

import torch
from torch import distributed

rank = int(os.environ.get("RANK", 0))  # torchrun sets these
local_rank = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
world_size = int(os.environ.get("WORLD_SIZE", 1))
is_main = rank == 0  # the process that prints and writes


@contextmanager
def group(device):
    """Joins the processes for the block; all but the main one are silent in it.

    Args:
        device: the torch.device that this process computes on.
    """
    if world_size == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the others wait while the main process prepares data: for hours, where there is much
    distributed.init_process_group(backend, timeout=timedelta(days=1))
    if not is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- until the process ends
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def main_first():
    """The block, in the main process before the others: what it writes, they find."""
    if not is_main:
        wait()
    yield
    if is_main:
        wait()


def wait():
    """Returns when all processes have come here."""
    if world_size > 1:
        distributed.barrier()


def share(count):
    """The part of `count` items that this process takes: every `world_size`-th."""
    return range(rank, count, world_size)


def add_up(tensor):
    """The sum of the processes' tensors, in place and returned."""
    if world_size > 1:
        distributed.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters):
    """Makes each gradient the sum of the processes' gradients."""
    if world_size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = add_up(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def collect(items):
    """All processes' items, in the order of what `share` dealt out."""
    if world_size == 1:
        return items
    shares = [None] * world_size
    distributed.all_gather_object(shares, items)
    missing = object()
    return [x for x in chain(*zip_longest(*shares, fillvalue=missing)) if x is not missing]
