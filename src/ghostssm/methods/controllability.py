"""Controllability only: how much energy a channel holds, read or not."""

from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register, statistics_of


def score(evidence: Evidence) -> Tensor:
    """sqrt(mean over t of sum_(h, p) H_t[h, p, n]^2)."""
    return statistics_of(evidence).state_energy.sqrt()


register(Method("controllability", "energy that a channel stores", "statistics", score))
