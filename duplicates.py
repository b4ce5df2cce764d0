"""Images that look the same, as copies do that were saved anew: by a hash of what is to be seen."""

import numpy as np
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

SIDE = 16  # fields along a side, of each of which the hash has the mean colour
# By how much of 255 colours may differ on average (root mean square), and that of a field at most.
# Of photographs saved anew by JPEG of quality 40 at a third of the size they do by 11 and 59, the
# nearest of two that are none of the same by 22 and 80 (of 1,500 of Flickr8k).
NEAR, FIELD = 12, 64
ROWS = 512  # compared with all others at once


def image_hash(image):
    """The hash of an RGB PIL.Image of any size: np.uint8 (3 · SIDE²,)."""
    fields = image.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3)
    return np.asarray(fields).ravel()


def groups_of(hashes):
    """Lists of the numbers of images that look the same, each in their order, of two or more.

    Args:
        hashes: np.uint8 (N, 3 · SIDE²), from `image_hash`.
    """
    if not len(hashes):
        return []
    different, own = np.unique(hashes, axis=0, return_inverse=True)
    pairs = np.concatenate([np.empty((0, 2), int), *_near(different)])
    count = len(different)
    graph = coo_matrix((np.ones(len(pairs)), pairs.T), shape=(count, count))
    _, component = connected_components(graph, directed=False)
    found = {}
    for image, group in enumerate(component[own.ravel()].tolist()):
        found.setdefault(group, []).append(image)
    return [images for images in found.values() if len(images) > 1]


def _near(hashes):
    """Yields pairs (n, 2) of the rows of hashes that are near each other, none with itself."""
    values = hashes.astype(np.float32) - 128
    squares = (values**2).sum(axis=1)
    most = values.shape[1] * NEAR**2 + 16  # and what float32 rounds
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        # first by Euclidean distance, which takes no more than a product of matrices
        apart = squares[rows, None] + squares[start:] - 2 * values[rows] @ values[start:].T
        one, other = np.nonzero(apart <= most)
        one, other = one[one < other] + start, other[one < other] + start
        colours = np.abs(values[one] - values[other]).max(axis=1, initial=0)
        yield np.stack([one, other], axis=1)[colours <= FIELD]
