"""Many operations, one launch: functions of tensors that a GPU runs as CUDA graphs.

A decoder's operations are small, and on a GPU take longer to be started by Python, one by one, than
to be computed. A CUDA graph keeps them as they were recorded, with the addresses that they read
from and write to, and starts them all at once. Nothing else changes: the values are the same, what
is drawn at random, too. On a CPU nothing here is used.
"""

import operator
import sys
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import RLock
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from groundwork.errors import in_a_line
from groundwork.timing import synchronize

_GRAPHED = WeakKeyDictionary()  # module -> function -> its `Graphed`
_GRADIENTS = WeakKeyDictionary()  # module -> kinds of its parameters, their gradients
_FINDING = RLock()  # of who looks into the first
_RECORDING = RLock()  # CUDA records one graph at a time
_STREAMS = set()  # numbers of those that graphs are recorded on
_ON = ContextVar("on", default=True)


@contextmanager
def graphed(function, module: nn.Module):
    """For the block the function as a `Graphed` of the module, the same each time; no other thread
    has it meanwhile."""
    with _FINDING:
        own = _GRAPHED.setdefault(module, {})
        found = own.setdefault(function, Graphed(function, module))
    with found.lock:
        yield found


def graphs_on(device: torch.device) -> bool:
    """Whether what is computed there is recorded, and replayed."""
    return device.type == "cuda" and _ON.get()


@contextmanager
def without_graphs():
    """For the block nothing is: Python starts each operation."""
    before = _ON.set(False)
    try:
        yield
    finally:
        _ON.reset(before)


def give_gradients(module: nn.Module):
    """Gives the parameters gradients of zero, which lie where they lay whenever it was called, so
    that graphs add to them."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kinds = [(parameter.shape, parameter.dtype, parameter.device) for parameter in trained]
    known, lying = _GRADIENTS.get(module, (None, None))
    if known != kinds:
        lying = [torch.empty_like(parameter) for parameter in trained]
        _GRADIENTS[module] = kinds, lying
    torch._foreach_zero_(lying)
    for parameter, own in zip(trained, lying, strict=True):
        parameter.grad = own.detach()  # a tensor of its own, with the same memory


class Graphed:
    """A function that is recorded when it is called a second time with arguments alike, and from
    then on replayed: what occurs once is not worth it.

    Arguments are alike that have tensors of the same shapes and kinds in the same places, and whose
    other values are equal. The function must have a GPU do the same for all that are alike: it
    waits for no value on the GPU, and moves nothing to it. Where it cannot be recorded it is called
    as ever, and a line says why.

    Graphs are given up all together, when the weights lie elsewhere: PyTorch keeps scratch memory
    for the stream that they are recorded on, which goes with the first.

    Args:
        function: called with the module, what is carried from call to call and what is given anew,
            trees of tensors and other values; returns what is carried on, and what it has found.
            Where the one is not alike the other it is never recorded.
        module: whose parameters, and their gradients, it reads or changes.
    """

    MOST = 64  # graphs that are recorded; each has the memory of its arguments
    KNOWN = 1000  # arguments that are remembered

    def __init__(self, function, module: nn.Module):
        self.function, self.module, self.lock = function, ref(module), RLock()
        self.stream = self.pool = self.latest = self.lying = None
        self.graphs, self.seen = {}, {}  # of arguments: the graph, or whether one may be recorded

    def __call__(self, carried, given):
        """What the function returns. What is carried on lies where the next call changes it."""
        if self.latest and self.latest.goes_on(carried, given):
            return self.latest.replay()
        self._forget_those_of_other_weights()
        leaves, spec = tree_flatten((carried, given))
        key = spec, *map(_kind, leaves), *self._surroundings()
        if self.seen.get(key) and key not in self.graphs and len(self.graphs) < self.MOST:
            self._record(key, leaves, spec)
        if graph := self.graphs.get(key):
            self.latest = graph
            graph.load(leaves, carried, given)
            return graph.replay()
        following, found = self._call(carried, given)
        if key not in self.seen:
            if len(self.seen) == self.KNOWN:
                self.seen.clear()
            kinds = (list(map(_kind, tree_leaves(tree))) for tree in (carried, following))
            self.seen[key] = operator.eq(*kinds)
        return following, found

    def _call(self, carried, given):
        return self.function(self.module(), carried, given)

    def _forget_those_of_other_weights(self):
        """A graph knows weights, and their gradients, by where they lie."""
        module = self.module()
        tensors = [*module.parameters(), *module.buffers()]
        if torch.is_grad_enabled():
            tensors += [own.grad for own in tensors if own.grad is not None]
        lying = torch.is_grad_enabled(), *(own.data_ptr() for own in tensors)
        if lying != self.lying:
            if self.graphs and tensors:
                synchronize(tensors[0].device)
            self.graphs, self.seen, self.latest, self.pool = {}, {}, None, None
            self.lying = lying

    def _surroundings(self):
        """What else the function's operations depend on."""
        yield self.module().training
        yield torch.is_inference_mode_enabled()
        yield torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def _record(self, key, leaves, spec):
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        try:
            with _RECORDING:
                self.stream = self.stream or _own_stream(self, device)
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self.graphs[key] = _Graph(self._call, leaves, spec, self.pool, self.stream)
        except RuntimeError as error:
            self.seen[key] = False
            print(
                f"computed more slowly, as it cannot be recorded: {in_a_line(error)}",
                file=sys.stderr,
            )


def _own_stream(owner, device):
    """A CUDA stream that no other graphs are recorded on, for as long as the owner is there.

    Raises:
        RuntimeError: there is none left, of the few that PyTorch has.
    """
    for _ in range(64):  # they come in turn
        stream = torch.cuda.Stream(device)
        number = device, stream.cuda_stream
        if number not in _STREAMS:
            _STREAMS.add(number)
            finalize(owner, _STREAMS.discard, number)
            return stream
    raise RuntimeError("too many models have been recorded")


@contextmanager
def _autocast_uncached():
    """For the block autocast does not take weights from its cache, which is freed before a replay
    would read it."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _kind(leaf):
    """What must be equal of arguments that are alike."""
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class _Graph:
    """One recorded graph, and the tensors that it reads its arguments from.

    Args:
        leaves, spec: of carried and given, as tree_flatten gives them.
        pool: the memory that graphs share which are not replayed at the same time.
        stream: that it is recorded on.
    """

    def __init__(self, function, leaves, spec, pool, stream):
        self.own = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        carried, given = tree_unflatten(self.own, spec)
        self.carried, self.given, self.graph = carried, None, torch.cuda.CUDAGraph()
        with ExitStack() as stack:
            stack.enter_context(_autocast_uncached())
            # of this thread alone: others, as of a DataLoader, may allocate memory meanwhile
            options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
            stack.enter_context(torch.cuda.graph(self.graph, **options))
            following, self.found = function(carried, given)
            for own, value in zip(*map(tree_leaves, (carried, following)), strict=True):
                if own is not value:
                    own.copy_(value)

    def load(self, leaves, carried, given):
        """Takes the arguments."""
        self.given = None if carried is None else given
        for own, value in zip(self.own, leaves, strict=True):
            if own is not value and isinstance(own, Tensor):
                own.copy_(value.detach())

    def goes_on(self, carried, given):
        """Whether the arguments are what the latest replay carried on, and the very same that it
        was given: then nothing need be compared or copied."""
        if carried is None or carried is not self.carried:
            return False
        return all(map(operator.is_, given, self.given))

    def replay(self):
        """What the function returns."""
        self.graph.replay()
        # copied, as the next replay writes to the same place
        return self.carried, tree_map_only(Tensor, Tensor.clone, self.found)
