"""Balanced projection: a smaller state in the basis that input and output can best agree on.

The decay of a Mamba-2 head is a scalar, so a change of basis of the state commutes with the recurrence. With maps T_B
and T_C of shape (n, r), B' = T_B^T B and C' = T_C^T C drive the same recurrence on r channels, whose output is
C^T T_C T_B^T h in place of C^T h. With Gramians W_c = L L^T of the states and W_o = R R^T of the readouts, and
R^T L = U S V^T, the square-root method (Moore 1981; Laub et al. 1987; Antoulas 2005, ch. 7) gives

    T_B = R U_r S_r^-1/2        T_C = L V_r S_r^-1/2,

which is exact for r = n. If the products C C^T and h h^T are uncorrelated, as for independent states and readouts,

    E (C^T (1 - T_C T_B^T) h)^2 = |R^T (1 - T_C T_B^T) L|_F^2 = sum of S_i^2 over i > r,

and no maps of rank r do better. h is a row of the state, weighted by how it reaches the block's output.

These are time averages in place of Gramians (empirical Gramians: Lall, Marsden & Glavaski 2002; balanced proper
orthogonal decomposition: Rowley 2005). The observability Gramian proper sums C_s C_s^T over all later tokens s, each
times the squared decay up to it; where decay is independent of the readout, its mean is a multiple of W_o = E[C C^T].
So S are called empirical Hankel singular values here; the bound 2 sum of S_i on the error of a time-invariant system
does not apply. States and readouts are correlated, so both maps are then refined together on samples of the output
itself; T_C T_B^T is a map of rank r afterwards, no projection any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ghostssm.calibration.samples import OutputSamples
from ghostssm.methods.base import Evidence, Method, register_method
from ghostssm.methods.selection import Cut
from ghostssm.models.mixer import Projection
from ghostssm.plan.decision import Decision, Selection

_HELD_OUT = 0.2
SHARES = (0.0, 1.0)
"""Of the norm's derivative (`ghostssm.calibration.samples`)."""
_RIDGES = (1e-8, 1e-6, 1e-4, 1e-3)
"""Candidates for what is added to both Gramians' diagonals, in multiples of their means."""
_ROUNDS = 12
_ITERATIONS_PER_ROUND = 5


def balanced_maps(
    controllability: Tensor, observability: Tensor, r: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """T_B and T_C, (..., n, r), and all Hankel singular values, (..., n), descending.

    The ridge keeps both well conditioned where a Gramian is rank-deficient: directions that are never reached or never
    read get a small singular value instead of none.

    Args:
        controllability, observability: (..., n, n), float64, symmetric, positive semidefinite.
        ridge: added to both diagonals, in multiples of their means.
    """
    return _balanced(_Roots.of(controllability), _Roots.of(observability), r, ridge)


def _balanced(controllability: _Roots, observability: _Roots, r: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """`balanced_maps`, from eigenvalues that serve for several ridges."""
    L, R = controllability.factor(ridge), observability.factor(ridge)
    U, S, Vh = torch.linalg.svd(R.mT @ L)
    scale = S[..., None, :r].rsqrt()
    return R @ U[..., :r] * scale, L @ Vh.mT[..., :r] * scale, S


@dataclass(frozen=True)
class _Roots:
    """Eigenvalues and vectors of a Gramian, or of one per group, from which a factor for any ridge is made.

    Attributes:
        values: (..., n), ascending. vectors: (..., n, n). mean: (..., 1), of the diagonal, or 1 for zeros.
    """

    values: Tensor
    vectors: Tensor
    mean: Tensor

    @classmethod
    def of(cls, gramian: Tensor) -> _Roots:
        mean = gramian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
        values, vectors = torch.linalg.eigh(gramian)
        return cls(values, vectors, torch.where(mean == 0, 1.0, mean))

    def factor(self, ridge: float) -> Tensor:
        """L with L L^T = gramian + ridge * mean diagonal; from eigenvalues, which rank-deficient Gramians have too."""
        return self.vectors * (self.values.clamp_min(0) + ridge * self.mean).sqrt()[..., None, :]


def hankel_values(evidence: Evidence) -> Tensor:
    """(g, n), descending; the smallest feel the ridge."""
    samples = evidence.samples
    return balanced_maps(samples.controllability(), samples.observability(), 1, _RIDGES[0])[2]


def projection_error(samples: OutputSamples, maps: Projection, share: float = 0.0) -> Tensor:
    """Mean squared change of the output, all groups together, from projecting the state."""
    return _error_and_gradient(samples, maps, share)[0]


def decide(evidence: Evidence, cut: Cut) -> Decision:
    """Balanced maps with the ridge that does best on held-out samples, refined jointly; all channels stay.

    Every group projects to the same size.
    """
    everything = Selection.whole(evidence.layout)
    fit, held_out = evidence.once("halves", lambda: evidence.samples.split(_HELD_OUT))
    candidates = []
    for share in SHARES:
        bases = evidence.once(("balanced", share), partial(_bases, fit, share))
        starts = (Projection(basis.B[..., : cut.state_size], basis.C[..., : cut.state_size]) for basis in bases)
        start = min(starts, key=lambda maps: projection_error(held_out, maps, share).item())
        maps = start if evidence.rough else refined(start, fit, held_out, share)
        candidates.append(Decision(everything, maps))
    return evidence.least_change(candidates)


def refined(start: Projection, fit: OutputSamples, held_out: OutputSamples, share: float = 0.0) -> Projection:
    """Both maps by L-BFGS on the output error of samples; until they no longer help the held-out ones."""
    with torch.inference_mode(False), torch.no_grad():
        B, C = start.B.clone().requires_grad_(), start.C.clone().requires_grad_()
        scale = max(projection_error(fit, start, share).item(), 1e-30)
        optimizer = torch.optim.LBFGS(
            [B, C], max_iter=_ITERATIONS_PER_ROUND, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            error, gradient = _error_and_gradient(fit, Projection(B.detach(), C.detach()), share)
            B.grad, C.grad = gradient.B / scale, gradient.C / scale
            return error / scale

        best, kept = projection_error(held_out, start, share).item(), start
        for _ in range(_ROUNDS):
            optimizer.step(loss)
            now = Projection(B.detach().clone(), C.detach().clone())
            error = projection_error(held_out, now, share).item()
            if not error < best:  # what follows fits the samples, and no others
                break
            best, kept = error, now
    return kept


def _error_and_gradient(samples: OutputSamples, maps: Projection, share: float) -> tuple[Tensor, Projection]:
    """`projection_error` and its derivatives with respect to both maps."""
    readouts = samples.readouts.transpose(0, 1)  # (g, s, n)
    inner = readouts @ maps.C
    lost = readouts - inner @ maps.B.mT
    output, pull = samples.read(lost.transpose(0, 1), share)
    pull = pull.transpose(0, 1) * (-2 / len(samples))
    return output.square().sum() / len(samples), Projection(pull.mT @ inner, readouts.mT @ (pull @ maps.B))


def _bases(samples: OutputSamples, share: float) -> list[Projection]:
    """Balanced maps for each of the ridges, with all channels: the first r of them are those of size r."""
    roots = _Roots.of(samples.controllability(share)), _Roots.of(samples.observability())
    bases = (_balanced(*roots, samples.maps.shape[-1], ridge) for ridge in _RIDGES)
    return [Projection(B.to(samples.maps), C.to(samples.maps)) for B, C, _ in bases]


register_method(
    Method(
        "balanced",
        "balanced projection of the state (own model class)",
        hankel_values,
        decide=decide,
        stock=False,
    )
)
