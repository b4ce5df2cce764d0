"""Where to compute, and how precisely."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from groundwork import distributed
from groundwork.errors import UserError


def choose_device(name=None):
    """The device of that name, or CUDA when present, else the CPU. Raises UserError.

    Where several processes share a machine's GPUs, each has its own.
    """
    if distributed.world_size > 1 and name in (None, "cuda") and torch.cuda.is_available():
        name = f"cuda:{distributed.local_rank}"
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cpu" and device.index:  # PyTorch takes any number
            raise RuntimeError("the CPU is one device, cpu")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def shapes_only():
    """The context in which modules are built without memory, on the device "meta"."""
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Draws no random values, for which torch would import its compiler on the device "meta":
    seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__.endswith(("uniform_", "normal_")):  # of Tensor, and of nn.init
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def autocast(device, amp):
    """The context in which a model computes, in bfloat16 with `amp`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def has_fast_bfloat16(device):
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # private, so it may go
    return device.type == "cpu" and supported()


def random_state(device):
    """What is drawn from when no generator is named, on the CPU and on the device, as it stands."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return [torch.get_rng_state(), cuda]


def set_random_state(device, state):
    """Draws on from there.

    Raises:
        RuntimeError: it is no such state.
    """
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)


def loader_options(device, workers=None):
    """DataLoader's arguments for batches that go to a device.

    Args:
        workers: processes that read ahead; None: 4 for a GPU, else none.
    """
    cuda = device.type == "cuda"
    workers = workers if workers is not None else 4 if cuda else 0
    return {"num_workers": workers, "pin_memory": cuda}
