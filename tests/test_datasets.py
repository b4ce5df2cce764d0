"""Data sets, views and cached features against the files and a plain computation."""

import json

import h5py
import numpy as np
import pytest
import torch
from conftest import OFFLINE
from torch import nn
from torch.utils.data import DataLoader

import datasets
import utils
from datasets import CaptionDataset, cache_features, find_data, make_view
from models import Encoder
from utils import UserError


class TinyEncoder(nn.Module):
    """Stands in for an encoder: the mean colour of each quarter of the image, times a weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.name = "tiny"
        self.weight = nn.Parameter(torch.tensor(weight))
        self.register_buffer("mean", torch.zeros(1))

    def features(self, images):
        pooled = nn.functional.adaptive_avg_pool2d(images.float(), 2)
        return self.weight * pooled.permute(0, 2, 3, 1)


@pytest.fixture
def images(tiny_data):
    folder, base = tiny_data
    with h5py.File(folder / f"TRAIN_IMAGES_{base}.hdf5") as file:
        return torch.from_numpy(file["images"][:])


@pytest.fixture
def cache(tiny_data, tmp_path):
    """Calls cache_features on a copy of the tiny data set's training images."""
    folder, base = tiny_data
    path = utils.input_path(tmp_path, base, "IMAGES", "TRAIN")
    path.write_bytes(utils.input_path(folder, base, "IMAGES", "TRAIN").read_bytes())

    def call(encoder, **options):
        found = cache_features(encoder, tmp_path, base, "TRAIN", batch_size=3, **options)
        if found is None:
            return None
        with h5py.File(found) as file:
            return found, torch.from_numpy(file["features"][:])

    return call


def test_items_are_the_images_with_all_their_captions(tiny_data, images):
    folder, base = tiny_data
    data = CaptionDataset(folder, base, "TRAIN")
    captions = json.loads((folder / f"TRAIN_CAPTIONS_{base}.json").read_text())
    lengths = json.loads((folder / f"TRAIN_CAPLENS_{base}.json").read_text())
    assert (len(data), data.image_size) == (8, 96)
    for i in range(len(data)):
        source, words, length = data[i]
        assert source.dtype == torch.uint8
        assert torch.equal(source, images[i])
        assert words.tolist() == captions[10 * i : 10 * i + 10]
        assert length.tolist() == lengths[10 * i : 10 * i + 10]


def test_an_epoch_visits_every_image_once_in_an_order_of_the_seed(tiny_data, images):
    data = CaptionDataset(*tiny_data, "TRAIN")

    def epoch(seed):
        torch.manual_seed(seed)
        batches = DataLoader(data, batch_size=3, shuffle=True)
        return torch.cat([source for source, *_ in batches])

    first = epoch(1)
    assert sorted(i.sum() for i in first) == sorted(i.sum() for i in images)
    assert torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_features_of_random_views_come_with_their_images_captions(tiny_data, workers, tmp_path):
    folder, base = tiny_data
    features = tmp_path / "features.hdf5"
    with h5py.File(features, "w") as file:  # 10 × image + view, everywhere
        values = 10 * np.arange(8)[:, None] + np.arange(3)
        file["features"] = np.broadcast_to(values[:, :, None, None, None], (8, 3, 2, 2, 5))
    data = CaptionDataset(folder, base, "TRAIN", features, views=3)
    seen = set()
    for _ in range(8):
        for source, words, _ in DataLoader(data, batch_size=8, num_workers=workers):
            image, view = source[:, 0, 0, 0] // 10, source[:, 0, 0, 0] % 10
            assert image.tolist() == list(range(8))
            assert torch.equal(words, data.captions)
            seen |= set(view.tolist())
    assert seen == {0, 1, 2}


def test_views_are_the_image_its_mirror_image_and_crops(images):
    image = images[0]
    assert torch.equal(make_view(image, 0), image)
    assert torch.equal(make_view(image, 1), torch.from_numpy(image.numpy()[:, :, ::-1].copy()))
    for view in (2, 3):
        crop = make_view(image, view)
        assert crop.shape == image.shape
        assert crop.dtype == torch.uint8
        assert not torch.equal(crop, make_view(image, view)), "crops are by chance"


def test_cached_features_are_the_encoders(cache, images):
    _, features = cache(TinyEncoder(2.0), views=2)
    assert features.dtype == torch.float16
    for view, seen in enumerate([images, images.flip(-1)]):
        quarters = seen.double().view(8, 3, 2, 48, 2, 48).mean(dim=(3, 5))
        expected = 2 * quarters.permute(0, 2, 3, 1)
        torch.testing.assert_close(features[:, view].double(), expected, rtol=1e-3, atol=1e-3)


def test_a_real_encoder_is_cached_at_its_own_grid(cache, images):
    encoder = Encoder(OFFLINE)
    _, features = cache(encoder)
    assert features.shape == (8, 1, 3, 3, 1280)
    with torch.no_grad():
        expected = encoder.features(images)
    torch.testing.assert_close(features[:, 0].float(), expected, rtol=1e-2, atol=1e-2)


def test_features_are_computed_once(cache, monkeypatch):
    encoder = TinyEncoder()
    path, _features = cache(encoder)
    monkeypatch.setattr(datasets, "_fill", None)
    assert cache(encoder)[0] == path


def test_whatever_changes_the_features_changes_their_file(cache, tmp_path):
    def renamed():
        encoder = TinyEncoder()
        encoder.name = "other"
        return encoder

    paths = [
        cache(TinyEncoder())[0],
        cache(TinyEncoder(1.5))[0],
        cache(renamed())[0],
        cache(TinyEncoder(), views=2)[0],
        cache(TinyEncoder(), views=3)[0],
        cache(TinyEncoder(), views=3, seed=1)[0],
        cache(TinyEncoder(), amp=True)[0],
    ]
    assert len(set(paths)) == len(paths)
    images = next(tmp_path.glob("TRAIN_IMAGES*"))
    with h5py.File(images, "r+") as file:
        file["images"][0] = 0
    assert cache(TinyEncoder())[0] not in paths


def test_an_interrupted_cache_leaves_no_file(cache, tmp_path):
    class Failing(TinyEncoder):
        def features(self, images):
            if len(images) == 2:  # the last batch of eight images by threes
                raise KeyboardInterrupt
            return super().features(images)

    with pytest.raises(KeyboardInterrupt):
        cache(Failing())
    assert not list(tmp_path.glob("*FEATURES*"))


def test_without_room_nothing_is_cached(cache, tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda folder: usage)
    assert cache(TinyEncoder()) is None
    assert "the encoder runs in every epoch" in capsys.readouterr().out
    assert not list(tmp_path.glob("*FEATURES*"))


def test_the_only_data_set_is_found(tiny_data, tmp_path):
    folder, base = tiny_data
    assert find_data(folder) == base == find_data(folder, base)
    assert find_data(tmp_path) is None
    with pytest.raises(UserError, match=f"'coco'.*{base}"):
        find_data(folder, "coco")


def test_captions_of_another_vocabulary_are_refused(tiny_data, tmp_path):
    folder, base = tiny_data
    for path in folder.glob(f"*{base}*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    words = {word: i for i, word in enumerate(("<pad>", "a", "<unk>", "<start>", "<end>"))}
    (tmp_path / f"WORDMAP_{base}.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="do not belong together"):
        CaptionDataset(tmp_path, base, "TRAIN")


def test_an_hdf5_file_of_something_else_is_refused(tiny_data, tmp_path):
    folder, base = tiny_data
    for path in folder.glob(f"*{base}*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = utils.input_path(tmp_path, base, "IMAGES", "VAL")
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(UserError, match=path.name):
        CaptionDataset(tmp_path, base, "VAL")
