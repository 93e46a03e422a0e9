"""Methods that weigh several decisions take the one that changes the output least when it is applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

from ghostssm.calibration import LayerWalk
from ghostssm.calibration.samples import sample_outputs
from ghostssm.methods import Evidence, balanced, joint
from ghostssm.methods.base import least_change
from ghostssm.models.families import mixers_of
from ghostssm.plan.plan import Decision, Selection
from tests.calibration.reference import change_when_applied
from tests.conftest import random_windows, tiny_model


def walked(model: PreTrainedModel) -> Iterator[tuple[LayerWalk, torch.nn.Module, Evidence]]:
    """The blocks of a model, and what a method may look at in each."""
    windows = random_windows(6, 60)
    walk = LayerWalk(model, windows)
    for block, view in walk.blocks():
        assert view is not None
        samples = sample_outputs(view, walk.streams(block, view), windows.ids.numel(), seed=walk.index)
        changes = partial(walk.changes, block, view)
        yield walk, block, Evidence(view.layout, view.in_proj.weight, 0, samples=samples, changes=changes)
        walk.advance(block, view)


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
    for walk, block, evidence in walked(make()):
        for size in sizes:
            taken = change_when_applied(walk, block, module.decide(evidence, size, "equal"))
            by_share = []
            for share in shares:
                with monkeypatch.context() as patch:
                    patch.setattr(module, "SHARES", (share,))
                    by_share.append(change_when_applied(walk, block, module.decide(evidence, size, "equal")))
            assert taken == pytest.approx(min(by_share), rel=1e-3)
            others_win += by_share[0] > 1.05 * min(by_share)
    assert others_win


@pytest.mark.parametrize("best", [0, 1, 2])
def test_the_least_change_wins_and_the_first_where_nothing_is_measured(best: int) -> None:
    candidates = [Decision(Selection(((channel,),))) for channel in range(3)]
    layout = mixers_of(tiny_model())[0].layout

    def measured(decisions: object) -> list[float]:
        assert decisions == candidates
        return [1.0 if index == best else 2.0 for index in range(3)]

    nothing = torch.zeros(0)
    assert least_change(Evidence(layout, nothing, 0, changes=measured), candidates) is candidates[best]
    assert least_change(Evidence(layout, nothing, 0), candidates) is candidates[0]
