"""Images in shards and as JPEGs: the same data, in an order that resumes, for several processes."""

import io
import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from conftest import LEARN, OFFLINE, ROOT, run_here
from PIL import Image
from test_distributed import run_two

import checkpoints
import datasets
import features
import input_files
import storage
import utils
from config import TrainingConfig
from datasets import CaptionDataset, LengthSampler
from encoders import Encoder
from engine import Network
from groundwork import distributed
from groundwork.errors import UserError
from training_data import TrainingData


def create(scenes, folder, **options):
    summary = utils.create_input_files(
        "demo", scenes / "karpathy.json", scenes / "images", 10, 0, 20, folder, 96, 1, **options
    )
    return folder, summary["base"]


@pytest.fixture(scope="module")
def sharded(scenes, tmp_path_factory):
    """The tiny data with its eight training images in three shards."""
    return create(scenes, tmp_path_factory.mktemp("sharded"), shards=3)


def test_shards_hold_what_one_file_does(sharded, tiny_data):
    names = {path.name for path in sharded[0].iterdir()}
    shards = [f"_0000{i}-of-00003" for i in range(3)]
    base, endings = sharded[1], {"IMAGES": "hdf5"}
    for kind in ("IMAGES", "CAPTIONS", "CAPLENS", "REFERENCES"):
        ending = endings.get(kind, "json")
        own = {f"TRAIN_{kind}_{base}{shard}.{ending}" for shard in shards}
        own |= {f"{split}_{kind}_{base}.{ending}" for split in ("VAL", "TEST")}
        assert own == {name for name in names if f"_{kind}_" in name}
    data, whole = CaptionDataset(*sharded, "TRAIN"), CaptionDataset(*tiny_data, "TRAIN")
    assert data.images.starts == [0, 2, 5, 8] and data.references == whole.references
    for i in range(8):
        for view in range(4):
            assert all(map(torch.equal, data[i, view], whole[i, view]))
    assert datasets.describe_data(*sharded).startswith(base)


def test_a_file_is_opened_when_one_of_its_images_is_read(sharded):
    data = CaptionDataset(*sharded, "TRAIN")
    data[3], data[4]
    assert list(data.images.open) == [1]
    assert list(data.images.__getstate__()["open"]) == []  # another process opens its own


def test_other_shards_than_before_take_the_place_of_all(scenes, tmp_path):
    for shards, count in ((3, 3), (2, 2), (None, 1), (4, 4)):
        folder, base = create(scenes, tmp_path, shards=shards)
        assert len(list(tmp_path.glob("TRAIN_IMAGES*"))) == count
        assert len(CaptionDataset(folder, base, "TRAIN")) == 8
        assert len(list(tmp_path.iterdir())) == 4 * (count + 2) + 1


@pytest.mark.parametrize("shards", [9, 50])
def test_more_shards_than_images_are_refused(scenes, tmp_path, shards):
    with pytest.raises(UserError, match=f"--shards {shards}: there are 8 training images"):
        create(scenes, tmp_path / "data", shards=shards)
    assert not list(tmp_path.glob("data/*"))


def test_a_shard_without_an_image_that_can_be_read_is_refused(scenes, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    names = sorted(path.name for path in (scenes / "images").iterdir())
    for name in names:
        contents = (scenes / "images" / name).read_bytes()
        (images / name).write_bytes(b"" if name in names[:2] else contents)
    karpathy = json.loads((scenes / "karpathy.json").read_text())
    for image in karpathy["images"]:  # the first two are for training alone
        if image["split"] != "train" and image["filename"] in names[:2]:
            image["filename"] = names[2]
    (tmp_path / "karpathy.json").write_text(json.dumps(karpathy))
    made = tmp_path / "karpathy.json", images, 10, 0, 20, tmp_path / "data", 96, 1
    with pytest.raises(UserError, match="none of the 2 images of shard 0 can be read .*--shards"):
        utils.create_input_files("demo", *made, skip_bad_images=True, shards=4)
    assert not list(tmp_path.glob("data/*"))
    summary = utils.create_input_files("demo", *made, skip_bad_images=True, shards=2)
    data = CaptionDataset(tmp_path / "data", summary["base"], "TRAIN")
    assert data.images.starts == [0, 2, 6] and len(data) == 6


def test_shards_that_do_not_belong_together_are_refused(sharded, tmp_path):
    folder, base = shutil.copytree(sharded[0], tmp_path, dirs_exist_ok=True), sharded[1]
    missing = tmp_path / f"TRAIN_IMAGES_{base}_00001-of-00003.hdf5"
    contents = missing.read_bytes()
    missing.unlink()
    with pytest.raises(UserError, match="00001-of-00003.hdf5 is missing: 2 of 3 shards are there"):
        CaptionDataset(folder, base, "TRAIN")
    missing.write_bytes(contents[:700])
    with pytest.raises(UserError, match="00001-of-00003.hdf5 is damaged"):
        CaptionDataset(folder, base, "TRAIN")
    missing.write_bytes(contents)
    other = tmp_path / f"TRAIN_IMAGES_{base}_00000-of-00002.hdf5"
    other.write_bytes(contents)
    with pytest.raises(UserError, match="whole and in shards, or in shards twice"):
        CaptionDataset(folder, base, "TRAIN")


# ----------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_each_process_takes_its_own_shards_and_all_take_every_image_once(world_size):
    numbers = np.repeat(np.arange(5), [31, 29, 30, 30, 30])
    lengths = torch.from_numpy(np.random.default_rng(0).integers(3, 20, (150, 2)))
    samplers = [
        LengthSampler(lengths, 20, 4, 7, rank, world_size, numbers % world_size)
        for rank in range(world_size)
    ]
    for epoch in (1, 2):
        batches = []
        for rank, sampler in enumerate(samplers):
            sampler.set_epoch(epoch)
            own = list(sampler)
            assert {numbers[i] % world_size for batch in own for i, _ in batch} == {rank}
            sampler.set_epoch(epoch, 3)  # resumed in the middle
            assert list(sampler) == own[3:]
            batches.append(own)
        assert {len(own) for own in batches} == {8}
        assert sorted(i for own in batches for batch in own for i, _ in batch) == list(range(150))
        for together in zip(*batches, strict=True):  # as long as without shards
            assert 15 <= sum(map(len, together)) <= 20 + world_size
    if world_size == 1:
        whole = LengthSampler(lengths, 20, 4, 7)
        whole.set_epoch(2)
        assert list(whole) == batches[0]


def test_more_processes_than_shards_are_refused(sharded):
    data = CaptionDataset(*sharded, "TRAIN")
    assert data.owners(3)[-3:].tolist() == [2, 2, 2] and 2 not in data.owners(3)[:-3]
    with pytest.raises(UserError, match="3 shards of .* cannot be shared by 4 processes"):
        data.owners(4)


def test_each_process_says_that_one_has_fewer_images_than_there_are_batches():
    """So that none waits for the one that has ended."""
    lengths, owners = torch.full((8, 1), 5), np.array([0, 0, 0, 0, 0, 1, 1, 1])
    for rank in range(2):
        with pytest.raises(UserError, match="8 images in batches of 2 .* larger --batch_size"):
            LengthSampler(lengths, 2, 1, 0, rank, 2, owners)
        assert len(LengthSampler(lengths, 3, 1, 0, rank, 2, owners)) == 3


TRAIN = [*LEARN, "--stage", "decoder", "--epochs", 2, "--views", 2]


def tensors(path):
    checkpoint = checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)
    return {key: value for key, value in checkpoint["decoder"].items()}


@pytest.mark.slow
def test_training_on_shards_is_that_on_one_file_to_the_bit(sharded, tiny_data, tmp_path):
    """By one process, whose order is the same; and features are cached shard by shard."""
    found = []
    for name, (folder, base) in {"sharded": sharded, "whole": tiny_data}.items():
        run = ["train.py", "--data_folder", folder, "--output_folder", tmp_path / name]
        process = run_here(*run, *TRAIN)
        assert process.returncode == 0, process.stderr
        found.append(tensors(checkpoints.checkpoint_path(tmp_path / name, base)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    paths = sorted(sharded[0].glob("TRAIN_FEATURES_*"))
    assert [storage.shard_of(path) for path in paths] == [(0, 3), (1, 3), (2, 3)]
    for path in (*paths, *sharded[0].glob("VAL_FEATURES_*")):
        path.unlink()


@pytest.fixture
def network():
    return Network(Encoder(OFFLINE, 3, weights=None), None, torch.device("cpu"), False)


def open_data(sharded, network, stage, monkeypatch, rank, world_size):
    monkeypatch.setattr(distributed, "rank", rank)
    monkeypatch.setattr(distributed, "world_size", world_size)
    monkeypatch.setattr(distributed, "add_up", lambda tensor: tensor)
    config = TrainingConfig(batch_size=30, finetune_batch_size=30, views=3, seed=4)
    return TrainingData(*sharded, network, config, stage, cache=stage == "decoder", workers=0)


def test_processes_read_and_cache_their_own_shards(sharded, network, monkeypatch, tmp_path):
    """Two processes, one after the other; the features are those of images without shards."""
    shutil.copytree(sharded[0], tmp_path, dirs_exist_ok=True)
    here, caching = (tmp_path, sharded[1]), {"views": 3, "seed": 4}
    for rank, own in ((0, {(0, 3), (2, 3)}), (1, {(1, 3)})):
        monkeypatch.setattr(distributed, "rank", rank)
        monkeypatch.setattr(distributed, "world_size", 2)
        monkeypatch.setattr(distributed, "add_up", lambda tensor: tensor)
        before = set(tmp_path.glob("TRAIN_FEATURES*"))
        paths = features.cache_features(network.encoder, *here, "TRAIN", **caching)
        made = set(tmp_path.glob("TRAIN_FEATURES*")) - before
        assert {storage.shard_of(path) for path in made} == own
    found = storage.StoredFeatures(paths)
    assert found.starts == [0, 2, 5, 8]
    data = CaptionDataset(*here, "TRAIN", seed=4)
    for i in range(8):
        for view in range(3):
            image = datasets.make_view(torch.from_numpy(data.images[i]), view, (4, i))
            expected = network.encoder.features(image[None])[0].half()
            actual = torch.from_numpy(found[i, view])
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    for rank in (0, 1):
        opened = open_data(here, network, "finetune", monkeypatch, rank, 2)
        opened.set_epoch(1, 0)
        list(opened.train)
        files = opened.train.dataset.images.open
        assert set(files) == ({0, 2} if rank == 0 else {1})


def test_an_order_of_other_shards_is_not_gone_on_with(sharded, tiny_data, network, monkeypatch):
    two = open_data(sharded, network, "finetune", monkeypatch, 0, 2)
    whole = open_data(tiny_data, network, "finetune", monkeypatch, 0, 2)
    assert whole.differences(two.order(), {}) == "the images in 3 files"
    assert two.differences(whole.order(), {}) == "the images in 1 file"
    monkeypatch.setattr(distributed, "world_size", 1)
    assert whole.differences(two.order() | {"processes": 1, "shards": None}, {}) == ""


STOPPED = """
import os, signal
import train, training
from groundwork import errors
count = training.Training._count
def counted(self, step):
    count(self, step)
    if (self.state.epoch, self.state.step) == (0, 1):  # it is seen in the next one
        os.kill(os.getpid(), signal.SIGTERM)
training.Training._count = counted
errors.run(train.main)
"""


@pytest.mark.slow
def test_two_processes_train_on_shards_and_resume_inside_an_epoch(
    sharded, tmp_path, monkeypatch
):  # fmt: skip
    """Stopped after two steps and gone on with, the weights are those of the run that was not."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder, base = sharded
    run = ["--data_folder", folder, *TRAIN, "--batch_size", 30]  # one has 3 images
    process = run_two("train.py", *run, "--output_folder", tmp_path / "whole")
    assert process.returncode == 0, process.stderr
    assert len(list(folder.glob("TRAIN_FEATURES_*.hdf5"))) == 3
    cut = ["--output_folder", tmp_path / "cut"]
    (tmp_path / "stopped.py").write_text(STOPPED)
    assert run_two(tmp_path / "stopped.py", *run, *cut).returncode != 0
    [path] = (tmp_path / "cut").glob("checkpoint_*")
    assert checkpoints.load_checkpoint(path, checkpoints.RUN_KEYS)["step"] == 2
    process = run_two("train.py", *run, *cut, "--resume")
    assert process.returncode == 0, process.stderr
    one, two = (tensors(checkpoints.checkpoint_path(tmp_path / n, base)) for n in ("whole", "cut"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


# --------------------------------------------------------------------------------------- JPEGs


@pytest.fixture(scope="module")
def jpegs(scenes, tmp_path_factory):
    return create(scenes, tmp_path_factory.mktemp("jpegs"), store="jpeg", shards=2)


def test_jpegs_are_decoded_on_the_way(jpegs, tiny_data):
    """What is read is what Pillow makes of the squares; less than a fifth of the room."""
    folder, base = jpegs
    data, raw = CaptionDataset(folder, base, "TRAIN"), CaptionDataset(*tiny_data, "TRAIN")
    for i in range(8):
        buffer = io.BytesIO()
        square = Image.fromarray(raw.images[i].transpose(1, 2, 0))
        square.save(buffer, "JPEG", quality=90)
        expected = np.asarray(Image.open(buffer)).transpose(2, 0, 1)
        assert np.array_equal(data[i][0], expected)
        assert torch.equal(data[i][1], raw[i][1])
    with h5py.File(folder / f"VAL_IMAGES_{base}.hdf5") as file:
        ends = file["ends"][:]
        assert len(file["jpeg"]) == ends[-1] < 8 * 3 * 96 * 96 / 5


DAMAGE = {
    "an end before its beginning": lambda file: file["ends"].__setitem__(3, 0),
    "an end after the file's": lambda file: file["ends"].__setitem__(7, 10**9),
    "a huge one": lambda file: file["ends"].__setitem__(0, 2**60),
    "another size": lambda file: file.attrs.__setitem__("image_size", 64),
    "no size": lambda file: file.attrs.__delitem__("image_size"),
    "an odd size": lambda file: file.attrs.__setitem__("image_size", 10**6),
    "an odd fit": lambda file: file.attrs.__setitem__("fit", "round"),
    "no ends": lambda file: file.__delitem__("ends"),
    "zeros": lambda file: file["jpeg"].__setitem__(slice(None), 0),
    "half of one": lambda file: file["jpeg"].__setitem__(slice(200, None), 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_jpegs_are_one_line(jpegs, tmp_path, damage):
    folder, base = shutil.copytree(jpegs[0], tmp_path / "data"), jpegs[1]
    path = input_files.input_path(folder, base, "IMAGES", "VAL")
    with h5py.File(path, "r+") as file:
        DAMAGE[damage](file)
    with pytest.raises(UserError, match=path.name) as error:
        data = CaptionDataset(folder, base, "VAL")
        for i in range(8):
            data[i]
    assert "\n" not in str(error.value)
