"""LARV: factors on the task vectors by layer, from the weights alone.

Layer-wise Adaptive Rescaling Veneer (Wang et al., arXiv 2602.09413). A layer whose updates are concentrated, against
the base's spectrum, and that disturb the base little is trusted; one where they are diffuse and in conflict is not,
and the first layers less than the last:

1. `e = r_eff(theta_0) / r_eff(tau)`, the effective-rank contrast, with `r_eff(A) = exp(-sum_j p_j log p_j)` and
   `p_j = sigma_j(A)^2 / ||A||^2`.
2. `c`, the commutator conflict: the mean of `||theta_0 tau^T - tau theta_0^T||` and
   `||theta_0^T tau - tau^T theta_0||`, over `||theta_0|| ||tau||`; standardised over the layers.
3. `score = e * sqrt(depth) / (1 + softplus(c))`, with the depth from 1 / L in the first layer to 1 in the last.
4. The layers in thirds by their score get three fixed factors.

1 to 4 are the paper's as others report them (a review and a port; its own text was not at hand). Ours are: a layer is
a numbered block; its e and c are means over its matrices; tau is the sum of the experts' task vectors, which told the
layers apart as their mean over the experts did, for one spectrum instead of T; the factors are 0.8, 1 and 1.2 (0.5, 1
and 1.5 did worse on small real experts). There, on networks of three or four layers, it gains a third of a point on the
average of methods and sets, and the plain rise `--layer-scale 0.8,1.2` no less (`python -m tests.benchmarks.layers`);
deep networks were not measured. It costs two eigenvalue problems for each matrix: half a minute of a processor's time
for a ViT-B/32, an hour and more for seven billion weights.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch

from modelmerge.methods import linalg

if TYPE_CHECKING:
    from torch import Tensor

Layer = TypeVar("Layer", bound=Hashable)
FACTORS = (0.8, 1.0, 1.2)  # of the third with the lowest scores, the middle one, the highest


def effective_rank(x: Tensor) -> float:
    """`exp` of the entropy of the squared singular values of x [m, n], as shares of their sum."""
    squares = linalg.singular_values(x).square()
    shares = squares / squares.sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def conflict(base: Tensor, tau: Tensor) -> float:
    """How little a matrix [m, n] and its update commute: the mean of the left and the right commutator, from 0 to 2.

    The larger commutator is not formed: `||A B^T - B A^T||^2 = 2 tr(A^T A B^T B) - 2 tr(A^T B A^T B)`.
    """
    base, tau = base.double(), tau.double()
    if base.shape[0] < base.shape[1]:
        base, tau = base.mT, tau.mT
    cross = base.mT @ tau
    near = torch.linalg.vector_norm(cross - cross.mT)
    far = 2 * ((base.mT @ base) * (tau.mT @ tau)).sum() - 2 * (cross * cross.mT).sum()
    norms = torch.linalg.vector_norm(base) * torch.linalg.vector_norm(tau)
    return float((near + far.clamp(min=0).sqrt()) / (2 * norms))


def scores(
    contrasts: Mapping[Layer, float], conflicts: Mapping[Layer, float], depths: Mapping[Layer, float]
) -> dict[Layer, float]:
    """The score of each layer, from its effective-rank contrast, its conflict and its depth in (0, 1]."""
    values = torch.tensor(list(conflicts.values()), dtype=torch.float64)
    mean, spread = float(values.mean()), float(values.std(correction=0))
    found = {}
    for layer, contrast in contrasts.items():
        standard = (conflicts[layer] - mean) / spread if spread > 1e-8 * mean else 0.0
        found[layer] = contrast * math.sqrt(depths[layer]) / (1 + math.log1p(math.exp(standard)))
    return found


def tiers(score: Mapping[Layer, float]) -> dict[Layer, float]:
    """The factor of each layer: by thirds of the order of their scores; a layer in the middle keeps 1."""
    low, middle, high = FACTORS
    ordered = sorted(score, key=lambda layer: score[layer])
    places = {layer: (rank + 0.5) / len(ordered) for rank, layer in enumerate(ordered)}
    return {layer: low if place < 1 / 3 else high if place > 2 / 3 else middle for layer, place in places.items()}
