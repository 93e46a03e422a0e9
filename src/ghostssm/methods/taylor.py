"""Taylor: first-order effect of each channel on the loss, by gradients on the unpruned model, in one shot."""

from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register


def score(evidence: Evidence) -> Tensor:
    """Root mean squared gate gradient of the channel (`ghostssm.calibration.gate_saliency`)."""
    assert evidence.saliency is not None
    return evidence.saliency.sqrt()


register(
    Method("taylor", "gate gradients, one threshold for the whole model, as published", "gradients", score, "model")
)
register(Method("taylor-layer", "gate gradients, the same state size in every layer", "gradients", score))
