"""The data of a stage: images or their cached features, and the order of the batches."""

import torch
from torch.utils.data import DataLoader

from datasets import FRESH, VIEWS, CaptionDataset, LengthSampler
from features import cache_features, other_features
from groundwork import distributed
from groundwork.devices import loader_options
from groundwork.options import as_flags
from groundwork.wording import counted, size_of

VAL_BATCH = 50  # images


class TrainingData:
    """Training and validation split of a stage.

    A frozen encoder's features are cached, and it leaves the device, which then is free for the
    decoder.

    Args:
        folder, base: which input files.
        network: `engine.Network`, whose encoder the features are of.
        config: `TrainingConfig`.
        stage: of `checkpoints.STAGES`; fine-tuning trains the encoder, too.
        cache: whether to cache features, if there is room.
        workers: processes that read batches ahead, None for the device's usual.
        karpathy_json: as `CaptionDataset` takes it.
        prune: whether to remove cached features of other encoders and views, where it caches.
    """

    shards = None  # how many files the training images are in, where these are several

    def __init__(
        self,
        folder,
        base,
        network,
        config,
        stage,
        cache=True,
        workers=None,
        karpathy_json=None,
        prune=False,
    ):
        network.encoder.to(network.device)
        frozen = stage != "finetune"
        fresh = None if frozen and cache else config.augment  # where images are read
        changes = fresh.split() if fresh else VIEWS
        # both before either is encoded, which may take hours
        train, val = (
            CaptionDataset(folder, base, split, None, config.seed, karpathy_json, changes)
            for split in ("TRAIN", "VAL")
        )
        owners = train.owners(distributed.world_size)
        if cache and frozen:
            used = _cache(network, folder, base, config, {"TRAIN": train, "VAL": val})
            if distributed.is_main:
                _prune(other_features(folder, base, used), folder, prune)
        self.sized_by, per_image = _sizes(stage, config, train.captions.shape[1])
        self.captions_per_image = per_image
        self.views, self.changes = config.views, " ".join(changes) if fresh else None
        images = max(1, getattr(config, self.sized_by[0]) // per_image)
        self.sampler = LengthSampler(
            train.lengths,
            images,
            FRESH if fresh else config.views,
            config.seed,
            distributed.rank,
            distributed.world_size,
            owners,
        )
        if train.has_shards:
            self.shards = len(train.images.paths)
        # a generator of their own: making an iterator draws a number
        common = loader_options(network.device, workers) | {"generator": torch.Generator()}
        # spawned workers take seconds to start: once a stage, not once an epoch
        common["persistent_workers"] = common["num_workers"] > 0
        share = distributed.share(len(val))
        self.train = DataLoader(train, batch_sampler=self.sampler, **common)
        self.val = DataLoader(val, batch_size=VAL_BATCH, sampler=share, **common)
        self.references = val.references
        self.image_count, self.caption_count = len(train), train.lengths.numel()
        self.epoch_captions = len(train) * per_image  # that an epoch's steps are of
        self.image_size, self.fit = val.image_size, val.fit  # pixels
        # batches of a step; of captions that are drawn their words are not known before
        self.accumulate = 1 if stage == "scst" else config.accumulate
        self.steps = -(-self.sampler.total // self.accumulate)  # of an epoch

    def set_epoch(self, epoch, step):
        """The epoch whose order comes next, from a step on."""
        self.sampler.set_epoch(epoch, step * self.accumulate)

    def order(self):
        """What the order of the batches follows from, beside the epoch."""
        return {
            "images": self.sampler.batch_size,
            "views": self.views,
            "augment": self.changes,
            "accumulate": self.accumulate,
            "seed": self.sampler.seed,
            "processes": distributed.world_size,
            # which of them has which images
            "shards": self.shards if distributed.world_size > 1 else None,
        }

    def differences(self, order, options):
        """What has to be typed for an earlier run's order of the batches, "" where it is this one.

        Args:
            order: of the earlier run, from `order`.
            options: name -> number or text, of the earlier run.
        """
        own, wanted = self.order(), {}
        older = {"accumulate": 1}  # what there was before it was told
        differ = {name for name in own if order.get(name, older.get(name)) != own[name]}
        if "images" in differ:
            size, images = self.sized_by[0], order.get("images")
            wanted[size] = images and images * self.captions_per_image
            wanted |= {name: options[name] for name in self.sized_by if name in options}
        names = [name for name in ("views", "augment", "accumulate", "seed") if name in differ]
        wanted |= {name: order.get(name, older.get(name)) for name in names}
        without = "augment" in differ and not order.get("augment")
        parts = [as_flags(wanted), "no --augment" if without else ""]
        if (count := order.get("processes")) and "processes" in differ:
            parts.append(f"{counted(count, 'process')} (torchrun --nproc_per_node {count})")
        if "shards" in differ:
            parts.append(f"the images in {counted(order.get('shards') or 1, 'file')}")
        return " and ".join(filter(None, parts)) or ("the options of its run" if differ else "")

    def captions_in(self, steps):
        """Captions of so many steps of an epoch."""
        return self.caption_count * steps // self.steps


def _cache(network, folder, base, config, splits):
    """Has the splits, `CaptionDataset`s by their names, take cached features where there is room,
    and returns the files' paths."""
    used = []
    for split, data in splits.items():
        views = config.views if split == "TRAIN" else 1
        features = cache_features(
            network.encoder, folder, base, split, views, config.seed, network.amp
        )
        if features is not None:
            data.use_features(features)
            used += features
    if all(data.features is not None for data in splits.values()):
        network.encoder.cpu()
    return used


def _sizes(stage, config, per_image):
    """Names of the options that a stage's batches have their size from, and how many captions of an
    image count in them, of `per_image` that there are."""
    if stage == "scst":  # captions drawn
        return ("scst_batch_size", "samples"), config.samples
    return ("finetune_batch_size" if stage == "finetune" else "batch_size",), per_image


def _prune(files, folder, remove):
    """Says how much room features take that are not used now, or removes them."""
    if not files:
        return
    total = sum(path.stat().st_size for path in files)
    what = f"{size_of(total)} of features of other encoders or views in {folder}"
    if remove:
        for path in files:
            path.unlink()
        print(f"removed {what}")
    else:
        print(f"there are {what}: --prune_features removes them")
