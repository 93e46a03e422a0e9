"""Paired magnitude: the size of a channel's weights, with its B row and its C row kept together."""

from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register
from ghostssm.ops.step import at_least_float32


def score(evidence: Evidence) -> Tensor:
    """|B row of in_proj| x |C row of in_proj|, Euclidean norms."""
    layout = evidence.layout
    norms: Tensor = at_least_float32(evidence.in_proj).norm(dim=1)
    paired = norms[layout.in_proj_B] * norms[layout.in_proj_C]
    return paired.view(layout.n_groups, layout.state_size)


register(Method("magnitude", "product of the norms of a channel's B and C rows", "weights", score))
