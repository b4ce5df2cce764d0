"""Data sets, views and cached features against the files and a plain computation."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
from itertools import chain, combinations
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import OFFLINE, ROOT, failure, run_here
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import datasets
import features
import input_files
import mirroring
from config import TrainingConfig
from datasets import CaptionDataset, LengthSampler, find_data, make_view, read_references
from encoders import Encoder
from features import cache_features
from groundwork.errors import UserError
from training_data import TrainingData


class TinyEncoder(nn.Module):
    """Stands in for an encoder: the mean colour of each quarter of the image, times a weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.name, self.stages = "tiny", ("last",)
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
    path = input_files.input_path(tmp_path, base, "IMAGES", "TRAIN")
    path.write_bytes(input_files.input_path(folder, base, "IMAGES", "TRAIN").read_bytes())

    def call(encoder, **options):
        found = cache_features(encoder, tmp_path, base, "TRAIN", batch_size=3, **options)
        if found is None:
            return None
        [found] = found
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


def test_a_data_sets_files_close_with_it(tiny_data):
    folder, base = tiny_data
    path = input_files.input_path(folder, base, "IMAGES", "VAL")
    gc.disable()  # which would close them at some time or other
    try:
        data = CaptionDataset(folder, base, "VAL")
        _ = data[0], data.references
        with pytest.raises(OSError):  # HDF5 does not open for writing what is open
            h5py.File(path, "r+").close()
        del data, _
        h5py.File(path, "r+").close()
    finally:
        gc.enable()


captions = st.integers(1, 60).flatmap(
    lambda images: st.lists(
        st.lists(st.integers(2, 52), min_size=3, max_size=3), min_size=images, max_size=images
    )
)


@given(captions, st.integers(1, 9), st.integers(1, 4), st.integers(-3, 3), st.integers(1, 3))
def test_an_epoch_visits_every_image_once_in_batches_of_nearly_equal_size(
    lengths, size, views, seed, world
):
    lengths = torch.tensor(lengths)
    if len(lengths) // -(-len(lengths) // size) < world:  # too small to share out
        with pytest.raises(UserError, match="--batch_size"):
            LengthSampler(lengths, size, views, seed, 0, world)
        return
    shares = [list(LengthSampler(lengths, size, views, seed, rank, world)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-len(lengths) // size)}
    batches = [list(chain(*batch)) for batch in zip(*shares, strict=True)]
    assert sorted(i for batch in batches for i, _ in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    assert max(map(len, batches)) <= size
    assert {view for batch in batches for _, view in batch} <= set(range(views))
    whole = LengthSampler(lengths, size, views, seed)
    assert [sorted(batch) for batch in whole] == [sorted(batch) for batch in batches]


def test_the_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = LengthSampler(torch.full((100, 5), 9), 8, views=3, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(1, 1), order(1, 2), order(2, 1), order(2, 2)]
    assert all(a != b for a, b in combinations(orders, 2))
    assert order(1, 1) == orders[0]


def test_captions_of_similar_length_come_together():
    lengths = torch.randint(5, 30, (4096, 5), generator=torch.Generator().manual_seed(0))

    def steps(batches):
        return sum(int(lengths[[i for i, _ in batch]].max()) for batch in batches)

    shuffled = torch.randperm(4096, generator=torch.Generator().manual_seed(1)).tolist()
    by_chance = steps([[(i, 0) for i in shuffled[n : n + 16]] for n in range(0, 4096, 16)])
    sorted_ = lengths.amax(dim=1).sort(descending=True).values[::16].sum()
    assert steps(LengthSampler(lengths, 16)) < sorted_ + 0.15 * (by_chance - sorted_)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_of_views_come_with_their_images_captions(tiny_data, workers, tmp_path):
    folder, base = tiny_data
    features = tmp_path / "features.hdf5"
    with h5py.File(features, "w") as file:  # 10 × image + view, everywhere
        values = (10 * np.arange(8)[:, None] + np.arange(3)).astype(np.float16)
        file["features"] = np.broadcast_to(values[:, :, None, None, None], (8, 3, 2, 2, 5))
    data = CaptionDataset(folder, base, "TRAIN", [features])
    sampler = LengthSampler(data.lengths, 3, views=3)
    seen = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
        for items, (source, words, lengths) in zip(sampler, loader, strict=True):
            assert source[:, 0, 0, 0].tolist() == [10 * i + view for i, view in items]
            images = [i for i, _ in items]
            own = [data[item][1] for item in items]  # of mirror images, the other side's
            assert torch.equal(words, torch.stack(own))
            assert torch.equal(lengths, data.lengths[images])
            seen += [view for _, view in items]
    assert set(seen) == {0, 1, 2}


def test_views_are_the_image_its_mirror_image_and_crops(tiny_data, images):
    data = CaptionDataset(*tiny_data, "TRAIN")
    image = images[5]
    assert torch.equal(data[5][0], image)
    assert torch.equal(data[5, 0][0], image)
    mirrored = torch.from_numpy(image.numpy()[:, :, ::-1].copy())
    assert torch.equal(data[5, 1][0], mirrored)
    crops = [data[5, 2][0], data[5, 3][0], data[5, 4][0], make_view(image, 2, (0, 6))]
    crops.append(CaptionDataset(*tiny_data, "TRAIN", seed=1)[5, 2][0])
    for crop in crops:
        assert crop.shape == image.shape
        assert crop.dtype == torch.uint8
    assert all(not torch.equal(a, b) for a, b in combinations(crops, 2)), "each its own"
    state = torch.get_rng_state()
    assert torch.equal(data[5, 2][0], crops[0]), "always the same"
    assert torch.equal(torch.get_rng_state(), state), "and leaves other random numbers alone"


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
    monkeypatch.setattr(features, "_fill", None)
    assert cache(encoder)[0] == path


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((8, 1, 2, 2, 5), np.float32),
        np.zeros((7, 1, 2, 2, 5), np.float16),
        np.zeros((8, 2, 2, 5), np.float16),
        np.zeros((8, 1, 2, 3, 5), np.float16),
        None,
    ],
)
def test_damaged_features_are_refused_by_name(tiny_data, tmp_path, values):
    path = tmp_path / "features.hdf5"
    with h5py.File(path, "w") as file:
        if values is not None:
            file["features"] = values
    with pytest.raises(UserError, match=r"features.hdf5 is damaged: delete it"):
        CaptionDataset(*tiny_data, "TRAIN", [path])


def test_in_a_read_only_folder_nothing_is_cached(cache, capsys, monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(features, "_allocate", refuse)
    assert cache(TinyEncoder()) is None
    line = capsys.readouterr().out.splitlines()[-1]
    assert "Permission denied" in line and "the encoder runs in every epoch" in line
    assert not list(tmp_path.glob("*FEATURES*"))


@pytest.mark.parametrize("damage", ["cut", "no done", "text", "beyond", "shape"])
def test_a_damaged_unfinished_cache_is_begun_anew(cache, capsys, damage):
    path, expected = cache(TinyEncoder())
    partial = path.with_suffix(".part")
    path.rename(partial)
    if damage == "cut":
        partial.write_bytes(partial.read_bytes()[:1000])
    else:
        with h5py.File(partial, "r+") as file:
            if damage == "shape":
                del file["features"]
                file["features"] = np.zeros((3, 1), np.float16)
            else:
                del file["done"]
                if damage != "no done":
                    file["done"] = {"text": "x", "beyond": 10**6}[damage]
    again, features = cache(TinyEncoder())
    assert again == path and torch.equal(features, expected)
    assert "damaged or of another encoder: starting anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    "size",
    [{"width": 5}, {"height": 5}, {"width": 0, "height": 5}, {"width": 2.5, "height": 5},
     {"width": "5", "height": 5}, {"width": True, "height": 5}, {"width": 501, "height": 5},
     {"width": None, "height": None}],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(tmp_path, size):
    reference = {"filename": "a.jpg", "id": 0, "captions": ["a dog"]}
    path = tmp_path / "REFERENCES.json"
    for good in ({}, {"width": 5, "height": 500}):
        path.write_text(json.dumps([reference | good]))
        assert read_references(path) == [reference | good]
    path.write_text(json.dumps([reference, reference | size]))
    with pytest.raises(UserError, match="REFERENCES.json is no list of file names.* sizes"):
        read_references(path)


@pytest.mark.parametrize("kind", ["IMAGES", "CAPTIONS", "WORDMAP"])
def test_a_pipe_in_the_place_of_an_input_file_is_refused(tiny_data, tmp_path, kind):
    folder, base = tiny_data
    for path in folder.glob(f"*_{base}*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = input_files.input_path(tmp_path, base, kind, None if kind == "WORDMAP" else "TRAIN")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=rf"{path.name}.* no file"):
        CaptionDataset(tmp_path, base, "TRAIN")


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


class Squared(TinyEncoder):
    """The weights of the other, used otherwise."""

    def features(self, images):
        return super().features(images).square()


@pytest.mark.parametrize("finished", [True, False])
def test_an_encoder_of_changed_code_does_not_meet_old_features(cache, capsys, finished):
    path, features = cache(TinyEncoder(0.1))
    if not finished:
        path.rename(path.with_suffix(".part"))
    again, changed = cache(Squared(0.1))
    assert again == path
    torch.testing.assert_close(changed, features.square(), rtol=1e-2, atol=1e-2)
    said = "made anew" if finished else "starting anew"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_features_of_other_encoders_are_found_but_not_those_being_made(cache, tmp_path):
    (current, _), (old, _) = cache(TinyEncoder()), cache(TinyEncoder(2.0))
    base = next(tmp_path.glob("TRAIN_IMAGES*")).stem.removeprefix("TRAIN_IMAGES_")
    other_set = old.with_name(old.name.replace(base, f"{base}_more"))
    abandoned, busy = (old.with_name(f"{old.stem[:-12]}{i:012x}.part") for i in range(2))
    for path in (other_set, abandoned, busy):
        path.write_bytes(old.read_bytes())
    program = f"""
import pathlib, features
folder = pathlib.Path({str(tmp_path)!r})
print(*features.other_features(folder, {base!r}, [folder / {current.name!r}]), sep="\\n")
"""
    with h5py.File(busy, "r+"):
        process = python(program)
    assert process.stdout.split("\n")[:-1] == sorted(map(str, [old, abandoned])), process.stderr


def test_features_not_in_use_are_counted_or_removed(tiny_data, tmp_path, capsys):
    folder, base = tiny_data
    for path in folder.glob(f"*_{base}*"):
        if "FEATURES" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())

    def kept(weight, **options):
        network = SimpleNamespace(
            encoder=TinyEncoder(weight), device=torch.device("cpu"), amp=False
        )
        options = {"stage": "decoder"} | options
        TrainingData(tmp_path, base, network, TrainingConfig(), **options)
        return sorted(tmp_path.glob("*FEATURES*"))

    first = kept(1.0)
    assert "--prune_features" not in capsys.readouterr().out
    assert len(kept(2.0)) == 4
    assert "other encoders or views" in (said := capsys.readouterr().out)
    assert "--prune_features removes them" in said
    assert kept(1.0, prune=True) == first
    assert "removed" in capsys.readouterr().out
    assert kept(1.0, stage="finetune", prune=True) == first  # stage 2 uses none, and leaves them
    assert kept(1.0, cache=False, prune=True) == first
    assert "features" not in capsys.readouterr().out


class Counting(TinyEncoder):
    """Counts its images after the first one, which is a probe, and may fail at some."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.seen, self.fail_at = -1, fail_at

    def features(self, images):
        self.seen += len(images)
        if self.seen == self.fail_at:
            raise KeyboardInterrupt
        return super().features(images)


def test_an_interrupted_cache_goes_on_where_it_was(cache, tmp_path):
    _, whole = cache(Counting(), views=3)
    next(tmp_path.glob("*FEATURES*.hdf5")).unlink()
    with pytest.raises(KeyboardInterrupt):
        cache(Counting(fail_at=18 + 4), views=3)  # in the last batch of eight images by threes
    assert not list(tmp_path.glob("*FEATURES*.hdf5"))
    second = Counting()
    path, features = cache(second, views=3)
    assert second.seen == 3 * 2
    assert torch.equal(features, whole)
    assert [p for p in tmp_path.glob("*FEATURES*") if p != path] == []


def cache_elsewhere(tmp_path, encoder):
    """Calls cache_features on the data in tmp_path in a process of its own, which it returns."""
    base = next(tmp_path.glob("TRAIN_IMAGES*")).stem.removeprefix("TRAIN_IMAGES_")
    program = f"""
import os, signal
import features, test_datasets
{encoder}
features.cache_features(Other(), {str(tmp_path)!r}, {base!r}, "TRAIN", batch_size=3)
"""
    return python(program)


def python(program):
    """Runs a program that imports ours in a process of its own, which it returns."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_has_cached(cache, tmp_path):
    path, whole = cache(TinyEncoder())
    path.unlink()
    process = cache_elsewhere(
        tmp_path,
        """
class Other(test_datasets.Counting):
    def features(self, images):
        if self.seen == 3:  # in the second batch
            os.kill(os.getpid(), signal.SIGKILL)
        return super().features(images)
""",
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not path.exists()
    last = Counting()
    again, features = cache(last)
    assert (again, last.seen) == (path, 8 - 3)
    assert torch.equal(features, whole)


@pytest.mark.slow
def test_two_processes_do_not_cache_into_one_file(cache, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cache(Counting(fail_at=3))
    (partial,) = tmp_path.glob("*FEATURES*.part")
    with h5py.File(partial, "r+"):
        process = cache_elsewhere(tmp_path, "Other = test_datasets.Counting")
    assert "another run is writing it" in process.stderr


def test_without_room_nothing_is_cached(cache, tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: usage)
    assert cache(TinyEncoder()) is None
    assert "the encoder runs in every epoch" in capsys.readouterr().out
    assert not list(tmp_path.glob("*FEATURES*"))


def test_the_only_data_set_is_found(tiny_data, tmp_path):
    folder, base = tiny_data
    assert find_data(folder) == base == find_data(folder, base)
    assert find_data(tmp_path) is None
    with pytest.raises(UserError, match=f"'coco'.*{base}"):
        find_data(folder, "coco")
    nowhere = tmp_path / "nowhere"
    assert find_data(nowhere) is None
    with pytest.raises(UserError, match="there is no folder .*nowhere: check --data_folder"):
        find_data(nowhere, base)


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_a_folder_that_is_not_there_is_called_so(script, tmp_path):
    line = failure(run_here(script, "--data_folder", tmp_path / "nowhere"))
    assert f"there is no folder {tmp_path / 'nowhere'}: check --data_folder" in line
    assert not (tmp_path / "nowhere").exists()


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
    path = input_files.input_path(tmp_path, base, "IMAGES", "VAL")
    with h5py.File(path, "w") as file:
        file["weights"] = np.zeros(3)
    with pytest.raises(UserError, match=path.name):
        CaptionDataset(tmp_path, base, "VAL")


# ---------------------------------------------------------------------------- mirrors and changes


def test_left_and_right_change_places_and_nothing_else_does():
    pairs = [("left", "right"), ("leftmost", "rightmost"), ("top-left", "top-right")]
    pairs += [("left-handed", "right-handed"), ("bottomright", "bottomleft")]
    same = ["bright", "upright", "leftover", "righteous", "cleft", "brightly", "a", "copyright"]
    alone = ["lefthand"]  # whose other is not in the vocabulary
    special = ["<unk>", "<start>", "<end>", "<pad>"]
    words = [word for pair in pairs for word in pair] + same + alone + special
    word_map = {word: i for i, word in enumerate(words[:-1], start=1)} | {"<pad>": 0}
    mirrored = mirroring.mirrored_words(word_map)
    names = {index: word for word, index in word_map.items()}
    found = {word: names[int(mirrored[index])] for word, index in word_map.items()}
    expected = dict(pairs) | {right: left for left, right in pairs}
    expected |= {word: word for word in [*same, *special]} | {"lefthand": "<unk>"}
    assert found == expected


@pytest.mark.parametrize("from_features", [False, True])
def test_captions_of_mirror_images_say_the_other_side(tiny_data, tmp_path, from_features):
    """Of images and of cached features, and of every other view, cropped or not."""
    folder, base = tiny_data
    path = None
    if from_features:
        path = tmp_path / "features.hdf5"
        with h5py.File(path, "w") as file:
            file["features"] = np.zeros((8, 4, 1, 1, 2), "float16")
    data = CaptionDataset(folder, base, "TRAIN", path and [path])
    word_map = json.loads((folder / f"WORDMAP_{base}.json").read_text())
    names = {index: word for word, index in word_map.items()}
    other = {"left": "right", "right": "left"}
    sided = 0
    for i in range(8):
        own = [[names[int(word)] for word in caption] for caption in data[i, 0][1]]
        mirrored = [[other.get(word, word) for word in caption] for caption in own]
        mirrored = [[w if w in word_map else "<unk>" for w in caption] for caption in mirrored]
        for view in range(4):
            found = [[names[int(word)] for word in caption] for caption in data[i, view][1]]
            if view % 2:
                assert found == mirrored
                sided += found != own
            else:
                assert found == own
            assert torch.equal(data[i, view][2], data[i, 0][2])
    assert sided


def test_changes_of_a_view_are_those_asked_for(images):
    image = images[5]
    crop, mirrored = (
        make_view(image, 6, (0, 5), ("crop",)),
        make_view(image, 7, (0, 5), ("mirror",)),
    )
    assert torch.equal(mirrored, image.flip(-1))
    assert torch.equal(make_view(image, 7, (0, 5), ("none",)), image)
    assert crop.shape == image.shape and not torch.equal(crop, image)
    # crops alone are not mirrored: odd views are those of no mirror, too
    both = make_view(image, 6, (0, 5), ("crop", "mirror"))
    assert torch.equal(both, crop)
    colour = make_view(image, 6, (0, 5), ("colour",))
    assert not torch.equal(colour, image)
    assert torch.equal(colour, make_view(image, 6, (0, 5), ("colour",)))
    assert not torch.equal(colour, make_view(image, 8, (0, 5), ("colour",)))
    # nothing moves: brightness goes with brightness, and grey stays grey
    grey = image.float().mean(0).round().byte().expand(3, -1, -1)
    changed = make_view(grey, 6, (0, 5), ("colour",)).float()
    assert (changed.amax(0) - changed.amin(0)).max() <= 2
    light = torch.stack([grey[0].float().flatten(), changed.mean(0).flatten()])
    assert torch.corrcoef(light)[0, 1] > 0.95
    assert (changed - grey).abs().mean() < 64


def test_every_epoch_has_views_of_its_own(tiny_data):
    folder, base = tiny_data
    data = CaptionDataset(folder, base, "TRAIN", changes=("crop", "mirror", "colour"))
    sampler = LengthSampler(data.lengths, 3, views=datasets.FRESH, seed=2)
    seen = []
    for epoch in (1, 2, 1):
        sampler.set_epoch(epoch)
        seen.append(dict(item for batch in sampler for item in batch))
    assert seen[0] == seen[2] and all(seen[0][i] != seen[1][i] for i in range(8))
    assert len(set(seen[0].values()) | set(seen[1].values())) == 16
    shares = []
    for rank in range(2):
        share = LengthSampler(data.lengths, 3, datasets.FRESH, 2, rank, 2)
        share.set_epoch(1)
        shares += [item for batch in share for item in batch]
    assert dict(shares) == seen[0]
    first, second = (data[3, views[3]][0] for views in seen[:2])
    assert not torch.equal(first, second) and torch.equal(first, data[3, seen[2][3]][0])
