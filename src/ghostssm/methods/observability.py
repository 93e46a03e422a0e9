"""Observability only: how strongly a channel is read, whatever it holds."""

from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register, statistics_of


def score(evidence: Evidence) -> Tensor:
    """sqrt(mean over t of C_t[n]^2)."""
    return statistics_of(evidence).readout_energy.sqrt()


register(Method("observability", "energy with which a channel is read", "statistics", score))
