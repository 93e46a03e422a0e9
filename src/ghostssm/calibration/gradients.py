"""First-order saliency of the state channels: what a small gate on each of them would do to the loss."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ghostssm.models.families import mixers_of
from ghostssm.models.forward import replaced_forward
from ghostssm.models.mixer import Mixer, mixer_forward
from ghostssm.progress import Progress, silent


def gate_saliency(model: PreTrainedModel, ids: Tensor, progress: Progress = silent) -> dict[str, Tensor]:
    """The squared first-order Taylor term of every channel, averaged over the windows.

    With a gate m = 1 on channel n (C[n] becomes m C[n]), removing the channel changes a window's loss by about
    -dL/dm; the saliency is the mean of (dL/dm)^2 (Molchanov et al. 2019, eq. 8, for a gate). Every mixer is recomputed
    in the backward pass, so memory holds one mixer's activations and every mixer's input.

    Args:
        ids: (count, length), int64; one window is one sample.

    Returns:
        mixer name to (g, n), float64.
    """
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
    mixers = mixers_of(model)
    gates = {
        mixer.name: torch.ones(mixer.layout.n_groups, mixer.layout.state_size, device=model.device, requires_grad=True)
        for mixer in mixers
    }

    def gated(mixer: Mixer, hidden_states: Tensor, **_: Any) -> Tensor:
        run = partial(mixer_forward, mixer, gate=gates[mixer.name])
        output: Tensor = checkpoint(run, hidden_states, use_reentrant=False)
        return output

    saliency = {name: torch.zeros_like(gate, dtype=torch.float64) for name, gate in gates.items()}
    with replaced_forward(mixers, gated):
        for index in range(len(ids)):
            progress("gradients", index, len(ids))
            window = ids[index : index + 1].to(model.device)
            # Not the model's own loss, which may have terms for routers and the like.
            logits = model(input_ids=window, return_dict=True, use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits, window[0, 1:])
            for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                saliency[name] += gradient.double().square() / len(ids)
    progress("gradients", len(ids), len(ids))
    return saliency
