"""What is computed in CUDA graphs is what each operation by itself gives: on a GPU, and, so that it
is tested everywhere, on a CPU with graphs that keep PyTorch's operations and call them again."""

from contextlib import contextmanager

import pytest
import torch
from conftest import close
from test_decoders import TINY, build, close_alphas, every_variant, make_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cuda_graphs
import decoding
import engine
import fused
from objectives import CrossEntropy
from sampling import ScheduledSampling

# ------------------------------------------------------------------------- graphs without a GPU


class Graph:
    """In the place of torch.cuda.CUDAGraph: the operations of a recording, and what they gave."""

    def __init__(self):
        self.operations = []

    def replay(self):
        with torch.no_grad():
            for operation, args, kwargs, results in self.operations:
                found = tree_leaves(operation(*args, **kwargs))
                for old, new in zip(tree_leaves(results), found, strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        assert old.shape == new.shape  # a graph's do not depend on values
                        old.copy_(new)


class Recording(TorchDispatchMode):
    """In the place of torch.cuda.graph, in which nothing is computed: what is changed in the block
    is as before after it."""

    def __init__(self, graph, pool, capture_error_mode):
        super().__init__()
        self.graph, self.before, self.drawn = graph, {}, torch.get_rng_state()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(operation._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for own in filter(lambda leaf: isinstance(leaf, Tensor), tree_leaves(value)):
                    place = own.data_ptr(), own.shape, own.stride()
                    self.before.setdefault(place, (own, own.clone()))
        results = operation(*args, **kwargs)
        if "empty" not in operation.overloadpacket.__name__:  # which has no values
            self.graph.operations.append((operation, args, kwargs, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.drawn)
        with torch.no_grad():
            for own, value in reversed(self.before.values()):
                own.copy_(value)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
        ),
    ]
)
def device(request, monkeypatch):
    """On which all is computed in graphs, but in the block of `by_itself`."""
    if request.param == "cpu":
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Recording)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
        for module in (engine, decoding):
            monkeypatch.setattr(module, "graphs_on", lambda device: cuda_graphs._ON.get())
        monkeypatch.setattr(fused, "library", lambda: None)  # which calls no PyTorch
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield torch.device(request.param)


@pytest.fixture
def replays(monkeypatch):
    """Collects which graphs have been replayed."""
    found, replay = [], cuda_graphs._Graph.replay

    def call(self):
        found.append(self)
        return replay(self)

    monkeypatch.setattr(cuda_graphs._Graph, "replay", call)
    return found


@contextmanager
def by_itself():
    """For the block each function is called that is recorded otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs.Graphed, "__call__", cuda_graphs.Graphed._call)
        yield


def needs_a_gpu(variant, device):
    """A CPU's LSTM over sentences gives more in training than when it is called again."""
    if variant[0] == "merge" and device.type == "cpu":
        pytest.skip("its operations cannot be called again on a CPU")


# ------------------------------------------------------------------------------------ training

SHAPES = [[7, 4, 2, 6], [5, 6, 8, 2], [3, 2, 4, 4], [8, 8, 8, 8], [6, 2, 2, 2]] * 2


def batches_of(device, *lengths, per_image=2):
    """(features, captions, lengths) of each, as a network reads them."""
    for seed, own in enumerate(lengths):
        features, captions, own = make_batch(own, per_image, grid=2, seed=seed)
        shape = len(features), per_image
        yield features.to(device), captions.view(*shape, -1) % len(TINY), own.view(shape)


def gradients(decoder, batches, device, amp=False, objective=None):
    """Loss, what is measured, sizes and gradients."""
    network = engine.Network(nn.Identity(), decoder, device, amp)
    trained = [*decoder.parameters()]
    found = engine.add_gradients(network, batches, objective or CrossEntropy(), trained)
    return [*found, *(p.grad.clone() for p in trained if p.grad is not None)]


@every_variant
@pytest.mark.parametrize("at_once", [1, 3], ids=["one batch", "several"])
def test_gradients_are_those_without_graphs(variant, at_once, device, replays):
    """Of packed captions, where graphs are of filled ones."""
    needs_a_gpu(variant, device)
    decoders = [build(variant, std=0.4, vocab_size=len(TINY)).to(device) for _ in range(2)]
    batches = list(batches_of(device, *SHAPES))
    for i in range(len(batches) - at_once + 1):
        own = [
            [(f.clone().requires_grad_(), *truth) for f, *truth in batches[i : i + at_once]]
            for _ in range(2)
        ]
        with cuda_graphs.without_graphs():
            expected = gradients(decoders[0], own[0], device)
        found = gradients(decoders[1], own[1], device)
        for values, of_batches in zip((expected, found), own, strict=True):
            values += [source.grad for source, *_ in of_batches]
        for value, other in zip(found, expected, strict=True):
            close(value, other, 1e-4)
    assert len(replays) > 4 or decoders[0].looks  # some places are drawn, and the number of them


@every_variant
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_each_replay_drops_out_other_values(variant, amp, device, replays):
    if variant[1].get("attention") == "hard":
        pytest.skip("it draws its places without graphs")
    needs_a_gpu(variant, device)
    decoder = build(variant, std=0.2, vocab_size=len(TINY), dropout=0.5).to(device).train()
    [batch] = batches_of(device, [7, 4, 2, 6])
    torch.manual_seed(1)
    found = [float(gradients(decoder, [batch], device, amp)[0]) for _ in range(6)]
    assert len(set(found)) == 6 and len(replays) == 5
    torch.manual_seed(1)
    with by_itself():
        expected = [float(gradients(decoder, [batch], device, amp)[0]) for _ in range(6)]
    assert found == pytest.approx(expected, rel=1e-3 if amp else 1e-5)


def test_gradients_lie_where_they_lay_until_the_weights_change(device, replays):
    decoder = build(("lstm", {}), vocab_size=len(TINY)).to(device)
    [batch] = batches_of(device, [7, 4, 2, 6])
    for _ in range(3):
        gradients(decoder, [batch], device)
    assert len(replays) == 2
    first = decoder.fc.weight.grad.data_ptr()
    decoder.fc.weight.data = decoder.fc.weight.data.clone()  # elsewhere, so no graph knows it
    gradients(decoder, [batch], device)
    assert len(replays) == 2 and decoder.fc.weight.grad.data_ptr() == first
    decoder.fc = nn.Linear(decoder.fc.in_features, 9, device=device)
    expected = gradients(decoder, [batch], device)
    for _ in range(2):
        for own, value in zip(gradients(decoder, [batch], device), expected, strict=True):
            close(own, value)


def test_words_of_its_own_and_anomaly_detection_do_without(device, replays):
    decoder = build(("lstm", {}), vocab_size=len(TINY)).to(device)
    [batch] = batches_of(device, [7, 4, 2, 6])
    share = 0.0
    objective = ScheduledSampling(share=lambda: share, never=torch.tensor([0, 4, 5], device=device))
    for _ in range(3):
        gradients(decoder, [batch], device, objective=objective)
    assert len(replays) == 2
    share = 0.5
    gradients(decoder, [batch], device, objective=objective)
    with torch.autograd.set_detect_anomaly(True):
        gradients(decoder, [batch], device)
    assert len(replays) == 2


# ------------------------------------------------------------------------------------- searching


@every_variant
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_a_search_finds_the_same_captions(variant, amp, device, replays):
    needs_a_gpu(variant, device)
    decoder = build(variant, std=0.4, vocab_size=len(TINY)).to(device)
    for seed, (count, width) in enumerate([(9, 4)] * 3 + [(3, 1)] * 2 + [(9, 4)]):
        features = make_batch([2] * count, 1, grid=2, seed=seed)[0].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            found = decoding.beam_search(decoder, features, TINY, width, 12)
            with by_itself():
                expected = decoding.beam_search(decoder, features, TINY, width, 12)
        for own, value in zip(found, expected, strict=True):
            assert own.words == value.words
            assert own.log_prob == pytest.approx(value.log_prob, abs=1e-4)
            close_alphas(own.alphas, value.alphas, 1e-4)
    assert len(replays) > 8 or variant[0] == "transformer"  # whose state grows


@pytest.mark.parametrize("options", [{"length_penalty": 0.7}, {"groups": 2}, {"beam_size": 2}])
def test_a_search_is_that_without_graphs(options, device, replays, monkeypatch):
    """In graphs images that are done leave by halves, and all beams are there from the first word
    on."""
    decoder = build(("lstm", {}), std=0.8, vocab_size=len(TINY)).to(device)
    options, left, staying = {"beam_size": 4} | options, [], decoding._staying

    def look(going, still, replays):
        found = staying(going, still, replays)
        left.append(replays and found is not None)
        return found

    monkeypatch.setattr(decoding, "_staying", look)
    for seed in range(3):
        features = 3 * make_batch([2] * 13, 1, grid=2, seed=seed)[0].to(device)
        found = decoding.beam_search(decoder, features, TINY, max_length=12, **options)
        with cuda_graphs.without_graphs():
            expected = decoding.beam_search(decoder, features, TINY, max_length=12, **options)
        for own, value in zip(found, expected, strict=True):
            assert own.words == value.words
            assert own.log_prob == pytest.approx(value.log_prob, abs=1e-4)
    assert replays and (any(left) or "length_penalty" not in options)  # with that some are short


def test_a_drawn_look_does_without(device, replays):
    decoder = build(("lstm", {"attention": "hard"}), std=0.4, vocab_size=len(TINY)).to(device)
    features = make_batch([2] * 5, 1, grid=2)[0].to(device)
    decoder.set_look("sample")
    for _ in range(3):
        decoding.beam_search(decoder, features, TINY, 3, 8)
    assert not replays
    decoder.set_look("argmax")
    decoding.beam_search(decoder, features, TINY, 3, 8)
    assert replays


# ---------------------------------------------------------------------------------- what is kept


class Doubling(nn.Linear):
    """A module with a function to record: it adds up, and doubles."""

    def add(self, total, given):
        value, factor = given
        return total + value, self(value) * factor


def test_graphs_are_of_shapes_and_values_and_few_are_kept(device, replays, monkeypatch):
    monkeypatch.setattr(cuda_graphs.Graphed, "MOST", 2)
    module = Doubling(3, 3).to(device)
    total = torch.zeros(2, 3, device=device)
    expected = total.clone()
    with cuda_graphs.graphed(Doubling.add, module) as add, torch.no_grad():
        for i in range(6):
            value = torch.full((2, 3), float(i), device=device)
            total, found = add(total, (value, 2))
            expected += value
            close(total, expected)
            close(found, module(value) * 2)
        assert len(replays) == 5
        add(total, (value, 3))  # another value
        add(torch.zeros(1, 3, device=device), (value[:1], 2))  # and shape, in the first one's place
        assert len(add.graphs) == 2 and len(replays) == 5
        add(total, (value, 2))
        assert len(replays) == 5
    with cuda_graphs.graphed(Doubling.add, module) as again:
        assert again is add


def test_what_a_replay_found_stays(device):
    module = Doubling(3, 3).to(device)
    values = torch.randn(4, 2, 3, device=device)
    with cuda_graphs.graphed(Doubling.add, module) as add, torch.no_grad():
        found = [add(values[0], (value, 1))[1] for value in values]
    close(torch.stack(found), module(values))


def test_a_module_that_goes_takes_its_graphs_along(device):
    module = Doubling(3, 3).to(device)
    value = torch.ones(2, 3, device=device)
    with cuda_graphs.graphed(Doubling.add, module) as add, torch.no_grad():
        for _ in range(3):
            add(value, (value, 1))
    assert module in cuda_graphs._GRAPHED
    count = len(cuda_graphs._GRAPHED)
    del module, add
    assert len(cuda_graphs._GRAPHED) == count - 1
