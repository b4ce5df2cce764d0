"""What training reads: workers live as long as a stage, and change nothing of the batches."""

import multiprocessing

import pytest
import torch
from conftest import OFFLINE

from config import TrainingConfig
from encoders import Encoder
from engine import Network
from training_data import TrainingData


@pytest.fixture(scope="module")
def network():
    return Network(Encoder(OFFLINE, 3, weights=None), None, torch.device("cpu"), False)


def open_data(tiny_data, network, workers):
    """Images, not features, in batches of two, of five views."""
    config = TrainingConfig(finetune_batch_size=20, views=5, seed=4)
    return TrainingData(*tiny_data, network, config, "finetune", workers=workers)


def epochs(data, start=0):
    """The batches of two epochs, the first from batch `start` on, and of a validation after each;
    and the workers' process ids after each pass."""
    batches, ids = [], []
    for epoch in (1, 2):
        data.sampler.set_epoch(epoch, start if epoch == 1 else 0)
        for loader in (data.train, data.val):
            batches += list(loader)
            ids.append({child.pid for child in multiprocessing.active_children()})
    return batches, ids


def assert_equal(found, expected):
    for batch, other in zip(found, expected, strict=True):
        assert all(map(torch.equal, batch, other))


def test_workers_stay_and_change_nothing(tiny_data, network):
    expected, _ = epochs(open_data(tiny_data, network, 0))
    assert len(expected) == 2 * (4 + 1)
    random = torch.get_rng_state()
    found, (first, *others) = epochs(open_data(tiny_data, network, 2))
    assert len(first) == 2  # those of training; then those of validation, too
    assert all(len(ids) == 4 and ids == others[0] > first for ids in others)
    assert_equal(found, expected)
    assert torch.equal(torch.get_rng_state(), random)


def test_workers_go_on_inside_an_epoch(tiny_data, network):
    expected, _ = epochs(open_data(tiny_data, network, 0))
    resumed, _ = epochs(open_data(tiny_data, network, 1), start=3)
    assert_equal(resumed, expected[3:])


def test_a_step_has_so_many_batches_and_an_epoch_views_of_its_own(tiny_data, network):
    def opened(**options):
        config = TrainingConfig(finetune_batch_size=20, **options)
        return TrainingData(*tiny_data, network, config, "finetune", workers=0)

    data, plain = opened(augment="crop mirror", accumulate=3), opened(views=2)
    assert (data.steps, plain.steps) == (2, 4)  # of four batches, three and one
    views = []
    for epoch in (1, 2):
        data.set_epoch(epoch, 0)
        whole = list(data.sampler)
        data.set_epoch(epoch, 1)
        assert list(data.sampler) == whole[3:]
        views.append(dict(item for batch in whole for item in batch))
    assert not set(views[0].values()) & set(views[1].values())
    for own, other, said in (
        (plain, data, "--views 1 --augment 'crop mirror' --accumulate 3"),
        (data, plain, "--views 2 --accumulate 1 and no --augment"),
        (data, data, ""),
    ):
        assert own.differences(other.order(), {}) == said
    older = {name: value for name, value in plain.order().items() if name != "accumulate"}
    assert plain.differences(older, {}) == ""
