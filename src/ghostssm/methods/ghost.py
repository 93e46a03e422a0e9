"""GHOST: controllability times observability, multiplied token by token."""

from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register, statistics_of


def score(evidence: Evidence) -> Tensor:
    """S_n = sqrt(mean over t of C_t[n]^2 sum_(h, p) H_t[h, p, n]^2): the root mean squared change of y from zeroing
    channel n alone (Menezes & Kyrillidis 2026)."""
    return statistics_of(evidence).output_energy.sqrt()


register(Method("ghost", "per-token product of state and readout energy, as published", "statistics", score))
