"""Feature maps of several stages of an encoder in one tensor, each at its own grid.

A finer map is folded to the coarsest grid: the vectors of the f×f places that share one of its
places stand behind each other. So features are stored, moved and selected as one tensor, and none
is blown up.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(maps: list[Tensor], factors=None) -> Tensor:
    """(N, g, g, Σ_s f_s² D_s) of maps (N, f_s g, f_s g, D_s), g the coarsest grid.

    A map of another grid, as with 299 pixels, is first brought to f_s g by adaptive pooling.

    Args:
        factors: f_s of each; None: the greatest for which no map is made larger.
    """
    grid = min(features.shape[1] for features in maps)
    factors = factors or [features.shape[1] // grid for features in maps]
    folded = [_fold(*pair, grid) for pair in zip(maps, factors, strict=True)]
    return folded[0] if len(folded) == 1 else torch.cat(folded, dim=3)  # one is not copied


def unpack(encoder_out: Tensor, dims, factors) -> list[Tensor]:
    """The maps (N, (f_s g)², D_s) that `pack` has put together, places row by row.

    Args:
        encoder_out: (N, g, g, Σ_s f_s² D_s).
        dims: D_s of each stage.
        factors: f_s of each.
    """
    sizes = [factor**2 * dim for dim, factor in zip(dims, factors, strict=True)]
    folded = encoder_out.split(sizes, dim=3)
    return [
        _unfold(part, factor).flatten(1, 2) for part, factor in zip(folded, factors, strict=True)
    ]


def _fold(features, factor, grid):
    count, side, _, dim = features.shape
    if side != factor * grid:
        pooled = F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), factor * grid)
        features = pooled.permute(0, 2, 3, 1)
    blocks = features.reshape(count, grid, factor, grid, factor, dim)
    return blocks.transpose(2, 3).reshape(count, grid, grid, factor**2 * dim)


def _unfold(folded, factor):
    count, grid, _, width = folded.shape
    blocks = folded.reshape(count, grid, grid, factor, factor, width // factor**2)
    return blocks.transpose(2, 3).reshape(count, factor * grid, factor * grid, -1)
