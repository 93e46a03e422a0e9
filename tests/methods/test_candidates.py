"""Methods that weigh several decisions take the one that changes the output least when it is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

from ghostssm.calibration.open_block import OpenBlock
from ghostssm.calibration.walk import LayerWalk
from ghostssm.methods import Evidence, balanced, joint
from ghostssm.methods.base import Known
from ghostssm.methods.selection import Cut
from ghostssm.models.families import mixers_of
from ghostssm.plan.decision import Decision, Selection
from tests.calibration.reference import change_when_applied
from tests.conftest import random_windows, tiny_model


@dataclass(frozen=True)
class Measured(Known):
    """Known samples, and a measure of changes."""

    measure: Callable[[Sequence[Decision]], list[float]] | None = None

    def changes(self, decisions: Sequence[Decision]) -> list[float]:
        assert self.measure is not None
        return self.measure(decisions)


def walked(model: PreTrainedModel) -> Iterator[tuple[OpenBlock, Evidence]]:
    """The blocks of a model, and what a method may look at in each."""
    for block in LayerWalk(model, random_windows(6, 60)).blocks():
        view, samples = block.present_mixer, block.samples(block.index)
        source = Measured(known_samples=samples, measure=block.changes)
        yield block, Evidence(view.layout, view.in_proj.weight, 0, source)
        block.advance()


@torch.no_grad()
def half_alike() -> PreTrainedModel:
    """Half of each mixer's channels are alike, and loud: to lose one of them mostly scales y, which the norm undoes."""
    model = tiny_model(num_hidden_layers=2)
    for mixer in mixers_of(model):
        layout = mixer.layout
        mixer.D.zero_()
        for rows, channels in ((layout.in_proj_B, layout.conv_B), (layout.in_proj_C, layout.conv_C)):
            assert mixer.conv1d.bias is not None
            for tensor, first in (
                (mixer.in_proj.weight, rows.start),
                (mixer.conv1d.weight, channels.start),
                (mixer.conv1d.bias, channels.start),
            ):
                tensor[first + 1 : first + 8] = tensor[first].clone()
            mixer.in_proj.weight[rows.start + 8 : rows.stop] *= 0.3
    return model


@pytest.mark.parametrize(
    ("module", "shares", "make", "sizes"),
    [
        (joint, (0.0, 0.7, 1.0), half_alike, (4, 8, 13)),
        (balanced, (0.0, 1.0), partial(tiny_model, num_hidden_layers=2), (6, 10, 12)),
    ],
    ids=["output", "balanced"],
)
def test_the_share_of_the_norms_derivative_that_does_best_is_taken(
    module: ModuleType,
    shares: tuple[float, ...],
    make: Callable[[], PreTrainedModel],
    sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others_win = 0
    for block, evidence in walked(make()):
        for size in sizes:
            taken = change_when_applied(block, module.decide(evidence, Cut(size)))
            by_share = []
            for share in shares:
                with monkeypatch.context() as patch:
                    patch.setattr(module, "SHARES", (share,))
                    by_share.append(change_when_applied(block, module.decide(evidence, Cut(size))))
            assert taken == pytest.approx(min(by_share), rel=1e-3)
            others_win += by_share[0] > 1.05 * min(by_share)
    assert others_win


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_least_change_wins(best: int) -> None:
    candidates = [Decision(Selection(((channel,),))) for channel in range(3)]
    layout = mixers_of(tiny_model())[0].layout

    def measured(decisions: object) -> list[float]:
        assert decisions == candidates
        return [1.0 if index == best else 2.0 for index in range(3)]

    evidence = Evidence(layout, torch.zeros(0), 0, Measured(measure=measured))
    assert evidence.least_change(candidates) is candidates[best]
