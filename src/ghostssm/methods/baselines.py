"""Baselines that look at the unpruned model once: random choice, weight magnitude, and gate gradients."""

import torch
from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register_method
from ghostssm.ops.step import at_least_float32


def random(evidence: Evidence) -> Tensor:
    """Uniform numbers from the evidence's seed: the floor that every method must beat."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(evidence.layout.n_groups, evidence.layout.state_size, generator=generator)


def magnitude(evidence: Evidence) -> Tensor:
    """|B row of in_proj| x |C row of in_proj|, Euclidean norms: a channel's two rows are kept together."""
    layout = evidence.layout
    norms: Tensor = at_least_float32(evidence.in_proj).norm(dim=1)
    paired = norms[layout.in_proj_B] * norms[layout.in_proj_C]
    return paired.view(layout.n_groups, layout.state_size)


def taylor(evidence: Evidence) -> Tensor:
    """Root mean squared gate gradient of the channel (`ghostssm.calibration.gradients.gate_saliency`)."""
    return evidence.saliency.sqrt()


_PUBLISHED = "gate gradients, one threshold for the whole model, as published"
register_method(Method("random", "seeded random choice", random, one_shot=True))
register_method(Method("magnitude", "product of the norms of a channel's B and C rows", magnitude, one_shot=True))
register_method(Method("taylor", _PUBLISHED, taylor, one_shot=True, scope="model", streamable=False))
register_method(
    Method(
        "taylor-layer", "gate gradients, the same state size in every layer", taylor, one_shot=True, streamable=False
    )
)
