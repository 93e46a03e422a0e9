"""What is done to a pruned mixer so that it gives the dense one's output: refit, then repair in closed form."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ghostssm.calibration.processes import Processes
from ghostssm.calibration.walk import LayerWalk
from ghostssm.models.mixer import Mixer
from ghostssm.plan.plan import Decision
from ghostssm.pruning.recipe import Recipe
from ghostssm.recovery.refit import MOST_TOKENS, RefitData, joined, refit
from ghostssm.recovery.repair import repair_output, repair_skip


def mended(
    walk: LayerWalk,
    block: nn.Module,
    mixer: Mixer,
    decision: Decision,
    targets: list[Tensor],
    recipe: Recipe,
    seed: int,
    processes: Processes,
) -> Decision:
    """A decision with the parameters that refit and repair arrive at.

    Args:
        block, mixer: the walk's, with the decision applied; they hold the parameters afterwards.
        targets: the dense mixer's outputs, as `LayerWalk.outputs` gives them.
        seed: for the order in which refit takes the tokens.
        processes: that share the windows.
    """
    before = {name: value.detach().clone() for name, value in mixer.module.named_parameters()}
    if recipe.refit:
        _refit(walk, block, mixer, targets, recipe.refit, seed, processes)
        walk.forget_streams()
    if recipe.repair:
        repair_skip(mixer, walk.pruned_streams(block, mixer, decision), targets, processes)
        streams = walk.pruned_streams(block, mixer, decision)
        repair_output(mixer, streams, targets, processes, walk.first_window)
    changed = {
        name: value.detach().clone()
        for name, value in mixer.module.named_parameters()
        if not torch.equal(value, before[name])
    }
    return dataclasses.replace(decision, projection=mixer.projection, changes={**decision.changes, **changed})


def _refit(
    walk: LayerWalk,
    block: nn.Module,
    mixer: Mixer,
    targets: list[Tensor],
    steps: int,
    seed: int,
    processes: Processes,
) -> None:
    """Refit a mixer to the first windows of all processes; process 0 does, and tells what came out."""
    data, tokens = [], walk.first_window * walk.hidden.shape[1]
    for hidden, target in zip(walk.inputs(block, mixer), targets, strict=True):
        if tokens >= MOST_TOKENS:
            break
        data.append(RefitData.of(mixer, hidden, target))
        tokens += hidden.shape[0] * hidden.shape[1]
    data = processes.gather(data)

    def refitted() -> dict[str, Tensor]:
        refit(mixer, joined(data), steps, seed)
        return {name: value.detach() for name, value in mixer.module.named_parameters()}

    found = processes.from_first(refitted)
    if processes.rank:
        with torch.no_grad():
            for name, value in mixer.module.named_parameters():
                value.copy_(found[name])
