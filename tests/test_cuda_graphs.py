"""What is computed in CUDA graphs is what each operation by itself gives: on a GPU, and, so that it
is tested everywhere, on a CPU with graphs that keep PyTorch's operations and call them again."""

import threading
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
from constraints import Constraints
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

    def __init__(self, graph, pool, stream, capture_error_mode):
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


class Stream:
    """In the place of torch.cuda.Stream, of which there are 32, in turn."""

    made = 0

    def __init__(self, device):
        self.cuda_stream = Stream.made % 32
        Stream.made += 1


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
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
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
    objective = CrossEntropy(0.5, 0.1, torch.tensor([1, 2], device=device))
    for i in range(len(batches) - at_once + 1):
        own = [
            [(f.clone().requires_grad_(), *truth) for f, *truth in batches[i : i + at_once]]
            for _ in range(2)
        ]
        with cuda_graphs.without_graphs():
            expected = gradients(decoders[0], own[0], device, objective=objective)
        found = gradients(decoders[1], own[1], device, objective=objective)
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


def test_graphs_are_recorded_anew_where_weights_lie_elsewhere(device, replays):
    decoder = build(("lstm", {}), vocab_size=len(TINY)).to(device)
    [batch] = batches_of(device, [7, 4, 2, 6])
    for _ in range(3):
        gradients(decoder, [batch], device)
    assert len(replays) == 2
    first = decoder.fc.weight.grad.data_ptr()
    decoder.fc.weight.data = decoder.fc.weight.data.clone()
    gradients(decoder, [batch], device)
    assert len(replays) == 2 and decoder.fc.weight.grad.data_ptr() == first
    decoder.fc = nn.Linear(decoder.fc.in_features, 9, device=device)
    expected = gradients(decoder, [batch], device)
    for _ in range(2):
        for own, value in zip(gradients(decoder, [batch], device), expected, strict=True):
            close(own, value)
    assert len(replays) == 4


def test_captions_of_nearly_one_length_share_a_graph(device, replays):
    decoder = build(("lstm", {}), vocab_size=len(TINY)).to(device)
    for batch in batches_of(device, *([n, 3, 2, 4] for n in (5, 6, 7, 8, 9, 10))):
        gradients(decoder, [batch], device)
    assert len(replays) == 4 and len({id(graph) for graph in replays}) == 2


def test_training_and_evaluation_have_graphs_of_their_own(device, replays):
    decoder = build(("lstm", {}), vocab_size=len(TINY), dropout=0.5).to(device)
    [batch] = batches_of(device, [7, 4, 2, 6])
    losses = {True: [], False: []}
    for _ in range(4):
        for training in losses:
            decoder.train(training)
            losses[training].append(float(gradients(decoder, [batch], device)[0]))
    assert len(set(losses[True])) == 4 and len(set(losses[False])) == 1 and len(replays) == 6


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


@pytest.mark.parametrize(
    "options",
    [
        {"length_penalty": 0.7},
        {"groups": 2},
        {"beam_size": 2},
        {"constraints": Constraints(min_words=3, must_include=(sorted(TINY)[-1],))},
        {"constraints": Constraints(no_repeat_ngram=2)},
    ],
)
def test_a_search_is_that_without_graphs(options, device, replays, monkeypatch):
    """In graphs images that are done leave by halves, and all beams are there from the first word
    on."""
    decoder = build(("lstm", {}), std=0.8, vocab_size=len(TINY)).to(device)
    rules = options.get("constraints", Constraints())
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
    assert replays or rules.no_repeat_ngram  # which remembers ever more words
    assert any(left) or "length_penalty" not in options  # with that some captions are short


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


def test_graphs_are_of_shapes_kinds_and_values_and_not_too_many(device, replays, monkeypatch):
    monkeypatch.setattr(cuda_graphs.Graphed, "MOST", 2)
    module = Doubling(3, 3).to(device)
    total = torch.zeros(2, 3, device=device)
    with cuda_graphs.graphed(Doubling.add, module) as add, torch.no_grad():
        expected = total.clone()
        for i in range(6):
            value = torch.full((2, 3), float(i), device=device)
            total, found = add(total, (value, 2))
            expected += value
            close(total, expected)
            close(found, module(value) * 2)
        assert len(replays) == 5
        for i, (rows, factor, dtype) in enumerate(
            [(2, 3, torch.float32), (1, 2, torch.float32), (2, 2, torch.float64)]
        ):
            module.to(dtype)
            value, none = torch.ones(2, rows, 3, device=device, dtype=dtype)
            for _ in range(3):
                total, found = add(none, (value, factor))
                close(found, module(value) * factor)
                close(total, none + value)
            # the second value is recorded, the shape is one too many, and float64 begins anew
            assert len(replays) == 5 + (2, 2, 4)[i]
    with cuda_graphs.graphed(Doubling.add, module) as again:
        assert again is add


class Unfit(nn.Linear):
    """A module that cannot be recorded, as it waits for a value, say."""

    recorded = 0

    def add(self, total, given):
        if isinstance(given, tuple):
            Unfit.recorded += 1
            if Unfit.recorded == 2:
                raise RuntimeError("operation not permitted when stream is capturing")
        total.add_(given[0])
        return total, total.clone()


def test_what_cannot_be_recorded_is_called_as_ever_and_a_line_says_so(device, replays, capsys):
    module, total = Unfit(3, 3).to(device), torch.zeros(2, 3, device=device)
    value = torch.ones(2, 3, device=device)
    with cuda_graphs.graphed(Unfit.add, module) as add, torch.no_grad():
        for i in range(4):
            total, found = add(total, (value,))
            close(found, torch.full((2, 3), i + 1.0))
    assert not replays
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "computed more slowly, as it cannot be recorded: operation not permitted"
    )


def test_models_are_recorded_on_streams_of_their_own(device, replays):
    modules = [Doubling(3, 3).to(device) for _ in range(40)]
    value = torch.ones(2, 3, device=device)
    for round_ in range(2):
        for module in modules[:20] if round_ else modules:
            with cuda_graphs.graphed(Doubling.add, module) as add, torch.no_grad():
                for _ in range(3):
                    _, found = add(value, (value, 1))
                    close(found, module(value))
        if not round_:
            streams = [own["add"].stream for own in map(by_name, modules)]
            numbers = [stream.cuda_stream for stream in streams if stream is not None]
            assert len(set(numbers)) == len(numbers) < 40
            module = add = None
            del modules[:20]


def by_name(module):
    return {function.__name__: own for function, own in cuda_graphs._GRAPHED[module].items()}


def test_threads_that_search_with_one_decoder_find_their_own_captions(device, monkeypatch):
    decoder = build(("lstm", {}), std=0.8, vocab_size=len(TINY)).to(device)
    batches = [3 * make_batch([2] * 9, 1, grid=2, seed=seed)[0].to(device) for seed in range(2)]

    def search(batch):
        return decoding.beam_search(decoder, batch, TINY, 4, 12)

    with by_itself():
        expected = search(batches[0])
    for _ in range(3):
        search(batches[0])
    trace = decoding.History.trace
    other = threading.Thread(target=search, args=(batches[1],))

    def traced(*arguments):
        monkeypatch.setattr(decoding.History, "trace", trace)
        other.start()
        other.join(timeout=0.3)  # it waits, as long as these captions are not read
        return trace(*arguments)

    monkeypatch.setattr(decoding.History, "trace", traced)
    found = search(batches[0])
    other.join()
    for own, value in zip(found, expected, strict=True):
        assert own.words == value.words and own.log_prob == pytest.approx(value.log_prob, abs=1e-4)


def test_numbers_of_another_precision_are_not_rounded(device):
    module, value = Doubling(3, 3).to(device), torch.ones(2, 3, device=device)
    with cuda_graphs.graphed(Doubling.add, module) as add, torch.no_grad():
        for factor in (2, 2.5):
            for _ in range(3):
                _, found = add(value, (value, torch.tensor(factor, device=device)))
                close(found, module(value) * factor)


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
