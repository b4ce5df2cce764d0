"""Views of an image to train on."""

import numpy as np
import torch
from torchvision.transforms import v2

VIEWS = ("crop", "mirror")  # what the numbered views of an image differ by


def is_mirrored(view, changes=VIEWS):
    """Whether a view of `make_view` is a mirror image: every second is."""
    return bool(view % 2) and "mirror" in changes


def make_view(image, view, seed=(), changes=VIEWS):
    """View 0 is the image (3, S, S) itself, every second a mirror image, from 2 on they are changed
    otherwise, too.

    A crop keeps half of the area or more and is squeezed back to S × S. Colours are changed mildly,
    in brightness, contrast and saturation, but not in hue, which captions name. How, follows from
    the view and the seed, a tuple of ints.

    Args:
        changes: of "crop", "mirror" and "colour", those that there are.
    """
    if view > 1:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng((*seed, view)).integers(2**32)))
            if "crop" in changes:
                size = image.shape[-2:]
                image = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)(image)
            if "colour" in changes:
                image = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)(image)
    return image.flip(-1) if is_mirrored(view, changes) else image
