"""Annotation vectors (§3.1.1): what a decoder can look at, of one stage of the encoder or several,
brought to one grid of L places, and what is computed of them once an image."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import kernels
import stages
from contract import Rows


@dataclass(frozen=True)
class MapConfig:
    """What every decoder's `Config` here has: the vocabulary, and the encoder's maps.

    Args:
        vocab_size: V.
        encoder_dim: values of `encoder_out` at a place of its grid.
        encoded_image_size: side of the grid of L places that the alphas cover.
        stage_dims, stage_factors: D_s and f_s of the encoder's stages that `encoder_out` holds, as
            `stages.unpack` takes them; empty: one map.
        feature_norm: "layer" for a LayerNorm of each stage's vectors (Ba et al., 2016), whose gain
            and bias are learned, or "none".
    """

    vocab_size: int
    encoder_dim: int = 2048
    _: KW_ONLY
    encoded_image_size: int = 14
    stage_dims: tuple = ()
    stage_factors: tuple = ()
    feature_norm: str = "none"

    @property
    def annotation_dim(self):
        """D, values of an annotation vector."""
        return sum(self.stage_dims) or self.encoder_dim

    def __post_init__(self):
        self.check("feature_norm", ("layer", "none"))
        if len(self.stage_dims) != len(self.stage_factors):
            raise ValueError(f"its stages are {self.stage_dims} and {self.stage_factors}")
        pairs = zip(self.stage_dims, self.stage_factors, strict=True)
        packed = sum(dim * factor**2 for dim, factor in pairs)
        if self.stage_dims and packed != self.encoder_dim:
            raise ValueError(f"its stages make {packed} values, not {self.encoder_dim}")
        for name in ("dropout", "embed_dropout"):  # where a decoder has them
            if not 0 <= getattr(self, name, 0.0) < 1:
                raise ValueError(f"its {name} is {getattr(self, name)}: 0 or more, below 1")

    def check(self, name, known):
        """Raises ValueError unless a field's value is one of those known."""
        if (value := getattr(self, name)) not in known:
            raise ValueError(f"its {name} is {value!r}: known are {', '.join(known)}")


class Annotations(NamedTuple):
    """What an attention looks at, prepared once per image, in the compute precision."""

    vectors: tuple[Tensor, ...]  # (I, l_s, D_s) the vectors that are weighed, at their own grids
    poolings: tuple[Tensor | None, ...]  # (L, l_s) adaptive pooling P_s, None where L = l_s
    projected: Tensor | None = None  # (I, L, A) keys: what a query is compared with
    energies: kernels.Energies | None = None  # fast e of a query, where there is one
    look: str = "soft"  # of `attentions.HardAttention`: how it looks in this batch

    def select(self, images: Tensor) -> "Annotations":
        """Those of the given images: indices or a mask."""
        return self._replace(
            vectors=tuple(vectors[images] for vectors in self.vectors),
            projected=None if self.projected is None else self.projected[images],
            energies=None if self.energies is None else self.energies.select(images),
        )

    @property
    def images(self) -> int:
        """I."""
        return self.vectors[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the compute precision."""
        return self.vectors[0].dtype

    def mean(self) -> Tensor:
        """Mean vector of each image, (I, D)."""
        means = (
            vectors.mean(dim=1) if pooling is None else pooling.mean(dim=0) @ vectors
            for vectors, pooling in zip(self.vectors, self.poolings, strict=True)
        )
        return torch.cat(list(means), dim=1)

    def weighted(self, weights: Tensor, rows: Rows) -> Tensor:
        """Σ_i α_ti a_i (eq. 13), (n, D), of weights α (n, L) in the compute precision.

        Args:
            rows: which captions they are.
        """
        slots = None if rows.whole else rows.slots
        contexts = []
        for vectors, pooling in zip(self.vectors, self.poolings, strict=True):
            # Σ_i α_i (P a)_i = Σ_j (Pᵀα)_j a_j
            own = weights if pooling is None else weights @ pooling
            contexts.append(kernels.context(vectors, own, slots, rows.per_image))
        return torch.cat(contexts, dim=1) if len(contexts) > 1 else contexts[0]


class AnnotationVectors(nn.Module):
    """Takes `encoder_out` apart into annotation vectors, normalised, and projects them.

    Args:
        config: a `MapConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.stage_dims = config.stage_dims or (config.encoder_dim,)
        self.stage_factors = config.stage_factors or (1,)
        self.encoded_image_size = config.encoded_image_size
        if config.feature_norm == "layer":
            self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.stage_dims)
        else:
            self.norms = [nn.Identity()] * len(self.stage_dims)

    def annotate(self, encoder_out: Tensor) -> Annotations:
        """The vectors of each stage, from (I, g, g, M) of any grid g."""
        maps = stages.unpack(encoder_out, self.stage_dims, self.stage_factors)
        vectors = tuple(norm(own).to(own) for norm, own in zip(self.norms, maps, strict=True))
        return Annotations(vectors, tuple(self._pooling(own) for own in vectors))

    def _pooling(self, vectors):
        """P_s from the grid of these vectors to that of the alphas, None where they are one."""
        grid = math.isqrt(vectors.shape[1])
        if grid == self.encoded_image_size:
            return None
        return kernels.pooling_matrix(grid, self.encoded_image_size, vectors.device).to(vectors)


def project(layer: nn.Linear, annotations: Annotations) -> Tensor:
    """W a_i + b at the L places, (I, L, A), without the vectors at the L places:
    W (P a) = P (W a)."""
    dtype = annotations.dtype
    widths = [vectors.shape[2] for vectors in annotations.vectors]
    parts = layer.weight.to(dtype).split(widths, dim=1)
    projected = layer.bias.to(dtype)
    for weight, vectors, pooling in zip(parts, *annotations[:2], strict=True):
        own = vectors @ weight.T
        projected = projected + (own if pooling is None else pooling @ own)
    return projected


def of_rows(values: Tensor, images: Tensor) -> Tensor:
    """(n, …) of values (I, …): those of each row's image (n,), or of a mask (I,).

    index_select's gradient is added up in order, that of indexing by several threads at once.
    """
    if images.dtype == torch.bool:
        images = images.nonzero().squeeze(1)
    return values.index_select(0, images)


def first(values: Tensor, n: int) -> Tensor:
    """The first n rows; all of them as they are, as a slice has a gradient of its own."""
    return values if n == len(values) else values[:n]


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Autocast's, where it is on, else the weight's own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
