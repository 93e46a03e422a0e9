"""Random channels: the floor that every method must beat."""

import torch
from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register


def score(evidence: Evidence) -> Tensor:
    """Uniform numbers from the evidence's seed."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(evidence.layout.n_groups, evidence.layout.state_size, generator=generator)


register(Method("random", "seeded random choice", "weights", score))
