"""GHOST: controllability times observability, multiplied token by token; and its parts, for comparison.

All are means over the calibration tokens t, sums over the heads h of a group and their rows p, for a state channel n.
Source: Menezes & Kyrillidis 2026.
"""

from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register_method


def ghost(evidence: Evidence) -> Tensor:
    """sqrt(mean C_t[n]^2 sum H_t[h, p, n]^2): the root mean squared change of y from zeroing channel n alone."""
    return evidence.statistics.output_energy.sqrt()


def controllability(evidence: Evidence) -> Tensor:
    """sqrt(mean sum H_t[h, p, n]^2): how much energy a channel holds, read or not."""
    return evidence.statistics.state_energy.sqrt()


def observability(evidence: Evidence) -> Tensor:
    """sqrt(mean C_t[n]^2): how strongly a channel is read, whatever it holds."""
    return evidence.statistics.readout_energy.sqrt()


def product(evidence: Evidence) -> Tensor:
    """The product of the two above: GHOST's score without the correlation of state and readout in time."""
    return (evidence.statistics.state_energy * evidence.statistics.readout_energy).sqrt()


register_method(Method("ghost", "per-token product of state and readout energy, as published", ghost))
register_method(Method("controllability", "energy that a channel stores", controllability))
register_method(Method("observability", "energy with which a channel is read", observability))
register_method(Method("product", "controllability times observability, averaged separately", product))
