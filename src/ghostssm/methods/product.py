"""Separately averaged product: GHOST's score without the correlation of state and readout in time."""

from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register, statistics_of


def score(evidence: Evidence) -> Tensor:
    """sqrt(mean over t of sum_(h, p) H_t[h, p, n]^2  x  mean over t of C_t[n]^2)."""
    statistics = statistics_of(evidence)
    return (statistics.state_energy * statistics.readout_energy).sqrt()


register(Method("product", "controllability times observability, averaged separately", "statistics", score))
