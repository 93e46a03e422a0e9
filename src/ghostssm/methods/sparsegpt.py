"""SparseGPT (Frantar & Alistarh 2023): unstructured zeros in in_proj. It shrinks no state; it is the paper's optimistic
reference for what removing this share of the weights costs."""

from __future__ import annotations

import torch
from torch import Tensor

from ghostssm.methods.base import Evidence, Method, register_method
from ghostssm.methods.selection import Cut
from ghostssm.ops.step import at_least_float32
from ghostssm.plan.decision import Decision, Selection

_BLOCK = 128
_DAMPING = 0.01


def sparse_weight(weight: Tensor, hessian: Tensor, sparsity: float) -> Tensor:
    """A weight with a share of zeros in every block of columns; the other weights make up for them.

    Args:
        weight: (rows, d). hessian: (d, d), the sum of x x^T over the layer's inputs.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    unseen = hessian.diagonal() == 0
    hessian.diagonal()[unseen] = 1
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    for start in range(0, weight.shape[1], _BLOCK):
        span = slice(start, min(start + _BLOCK, weight.shape[1]))
        block, corner = weight[:, span], inverse[span, span]
        saliency = (block / corner.diagonal()).square()
        removed = torch.zeros_like(saliency, dtype=torch.bool)
        cut = round(sparsity * saliency.numel())
        removed.view(-1)[saliency.flatten().argsort()[:cut]] = True
        errors = torch.empty_like(block)
        for column in range(block.shape[1]):
            error = torch.where(removed[:, column], block[:, column], 0) / corner[column, column]
            block[:, column:] -= error[:, None] * corner[column, column:]
            errors[:, column] = error
        block[removed] = 0
        weight[:, span.stop :] -= errors @ inverse[span, span.stop :]
    return weight


def _decide(evidence: Evidence, state_size: int, rows: slice) -> Decision:
    layout = evidence.layout
    weight = at_least_float32(evidence.in_proj).clone()
    weight[rows] = sparse_weight(weight[rows], evidence.input_gram, 1 - state_size / layout.state_size).to(weight)
    return Decision(Selection.whole(layout), changes={"in_proj.weight": weight})


def decide_B_and_C(evidence: Evidence, cut: Cut) -> Decision:
    """Zeros among the B and C rows, as large a share as the state size would lose."""
    return _decide(evidence, cut.state_size, slice(evidence.layout.in_proj_B.start, evidence.layout.in_proj_C.stop))


def decide_all(evidence: Evidence, cut: Cut) -> Decision:
    """The same share of zeros in all of in_proj."""
    return _decide(evidence, cut.state_size, slice(None))


def score(evidence: Evidence) -> Tensor:
    """All ones: no channel goes."""
    return torch.ones(evidence.layout.n_groups, evidence.layout.state_size)


for _name, _summary, _decider in (
    ("sparsegpt", "reference: zeros among the B and C weights; the state stays whole", decide_B_and_C),
    ("sparsegpt-all", "reference: zeros in all of in_proj; the state stays whole", decide_all),
):
    register_method(Method(_name, _summary, score, decide=_decider, shrinks=False))
