"""Strong rank-revealing QR: the channels whose contributions are the most independent and the largest.

With states and readouts independent, the channels' contributions to the output have the Gram matrix W_c o W_o
(elementwise). It is (L . R)(L . R)^T of the row-wise Khatri-Rao product of the factors that balanced truncation works
on, W_c = L L^T and W_o = R R^T, whose rows are the channels. A pivoted QR of that factor is a pivoted Cholesky
decomposition of the Gram matrix; exchanges that enlarge the kept volume make it strong (Gu & Eisenstat 1996). State
reduction by rank-revealing QR: arXiv 2602.04852, there for linear attention.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register_method
from ghostssm.methods.selection import Cut
from ghostssm.plan.decision import Decision, Selection

_LEAST = 1e-10
"""Added to the eigenvalues, in multiples of the mean diagonal, so that every set of channels has a volume."""
_GROWTH = 1.01
"""An exchange is made while it enlarges the volume by this factor."""


def strong_pivots(gram: NDArray[np.float64], count: int) -> list[int]:
    """The channels of a subset of a given size whose volume no single exchange enlarges much, ascending.

    Args:
        gram: (n, n), symmetric, positive semidefinite.
    """
    # From eigenvalues, since a matrix without full rank, of float32 sums, may have negative ones.
    values, vectors = np.linalg.eigh(gram)
    least = _LEAST * (float(gram.diagonal().mean()) or 1.0)
    root = np.sqrt(values.clip(min=0) + least)[:, None] * vectors.T
    gram = root.T @ root
    kept = [int(pivot) for pivot in scipy.linalg.qr(root, mode="r", pivoting=True)[1][:count]]
    rest = [channel for channel in range(len(gram)) if channel not in set(kept)]
    while rest:
        inverse = np.linalg.inv(gram[np.ix_(kept, kept)])
        onto = inverse @ gram[np.ix_(kept, rest)]
        residual = gram[rest, rest] - (gram[np.ix_(kept, rest)] * onto).sum(0)
        # The squared ratio of volumes when kept[i] and rest[j] change places.
        growth = onto**2 + inverse.diagonal()[:, None] * np.maximum(residual, 0)[None, :]
        i, j = np.unravel_index(int(growth.argmax()), growth.shape)
        if growth[i, j] <= _GROWTH**2:
            break
        kept[i], rest[j] = rest[j], kept[i]
    return sorted(kept)


def score(evidence: Evidence) -> Tensor:
    """sqrt of the diagonal of W_c o W_o, (g, n)."""
    samples = evidence.samples
    return (samples.controllability() * samples.observability()).diagonal(dim1=1, dim2=2).sqrt()


def decide(evidence: Evidence, cut: Cut) -> Decision:
    """Strong pivots of every group's W_c o W_o; groups always keep the same count."""
    samples = evidence.samples
    grams = (samples.controllability() * samples.observability()).cpu().numpy()
    return Decision(Selection(tuple(tuple(strong_pivots(gram, cut.state_size)) for gram in grams)))


register_method(Method("rrqr", "strong rank-revealing QR on the balanced factors", score, decide=decide))
