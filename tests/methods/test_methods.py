"""Every method through the one door, and what sets each apart."""

from __future__ import annotations

import pytest
import torch

from ghostssm.errors import InputError
from ghostssm.evaluation import evaluate
from ghostssm.methods import method_named, method_names
from ghostssm.models.families import mixers_of
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan, pruned
from ghostssm.pruning.run import Calibration
from tests.conftest import random_windows, tiny_model


@pytest.mark.parametrize("method", method_names())
def test_every_method_makes_a_plan_that_applies(method: str) -> None:
    model, windows = tiny_model(n_groups=2), random_windows(2, 40)
    plan = Calibration(model, windows).plan(method, 6)
    if method_named(method).decide is None or method in ("output", "rrqr"):
        assert plan.kept_channels == 6 * 2 * 3
    assert set(plan.scores) == set(plan.selections) == {mixer.name for mixer in mixers_of(model)}
    assert all(score.shape == (2, 16) for score in plan.scores.values())
    with pruned(model, plan) as smaller:
        assert torch.isfinite(evaluate(smaller, windows).losses).all()


@pytest.mark.parametrize(
    "recipe",
    ["taylor-layer+per-layer", "magnitude+per-layer+repair", "taylor+repair", "random+refit2", "sparsegpt+repair"],
)
def test_any_method_takes_any_repair(recipe: str) -> None:
    model, windows = tiny_model(), random_windows(9, 40)
    with pruned(model, Calibration(model, windows).plan(recipe, 6, multiple=2)) as smaller:
        assert torch.isfinite(evaluate(smaller, windows).losses).all()


def test_a_layer_that_keeps_nothing_gets_a_channel_of_zeros() -> None:
    model, windows = tiny_model(), random_windows(2, 40)
    names = [mixer.name for mixer in mixers_of(model)]
    kept = (((),), ((1, 4),), ((0,),))
    decisions = {name: Decision(Selection(channels)) for name, channels in zip(names, kept, strict=True)}
    plan = Plan(method="test", model_type="mamba2", n_groups=1, state_size=16, decisions=decisions)
    assert plan.widths == (1, 2, 1)
    assert plan.state_sizes == (2, 2, 2)
    with pruned(model, plan) as smaller:
        assert torch.isfinite(evaluate(smaller, windows).losses).all()
        assert mixers_of(smaller)[0].in_proj.weight[mixers_of(smaller)[0].layout.in_proj_B].abs().max() == 0


@pytest.mark.parametrize("method", ["ghost", "output", "rrqr", "taylor", "random"])
def test_keeping_all_channels_changes_nothing(method: str) -> None:
    model, windows = tiny_model(), random_windows(2, 40)
    dense = evaluate(model, windows)
    apply_plan(model, Calibration(model, windows).plan(method, 16))
    assert torch.equal(evaluate(model, windows).losses, dense.losses)


def test_ghost_is_sequential() -> None:
    """A deeper mixer is scored on what the pruned mixers before it leave, so its scores depend on the size."""
    calibration = Calibration(tiny_model(), random_windows(2, 60))
    small, large = calibration.plan("ghost", 2), calibration.plan("ghost", 14)
    names = list(small.scores)
    assert torch.equal(small.scores[names[0]], large.scores[names[0]])
    assert not torch.allclose(small.scores[names[1]], large.scores[names[1]])


def test_first_statistics_are_shared_and_exact() -> None:
    model, windows = tiny_model(), random_windows(2, 60)
    shared = Calibration(model, windows)
    shared.plan("controllability", 4)
    fresh = Calibration(model, windows).plan("ghost", 4)
    assert shared.plan("ghost", 4).selections == fresh.selections


def test_pooled_groups_may_differ_in_size() -> None:
    model = tiny_model(n_groups=4)
    for mixer in mixers_of(model):  # group 0 reads loudly
        rows = mixer.layout.in_proj_C
        mixer.in_proj.weight.data[rows.start : rows.start + 16] *= 10
    plan = Calibration(model, random_windows(2, 60)).plan("ghost", 4, groups="pooled")
    counts = [[len(channels) for channels in s.kept] for s in plan.selections.values()]
    assert all(sum(layer) == 16 for layer in counts)
    assert counts[0][0] > 4
    assert plan.kept_state_size == max(max(layer) for layer in counts)


def test_random_depends_on_the_seed_only() -> None:
    calibration = Calibration(tiny_model(), random_windows(1, 20))
    assert calibration.plan("random", 4, seed=1).selections == calibration.plan("random", 4, seed=1).selections
    assert calibration.plan("random", 4, seed=1).selections != calibration.plan("random", 4, seed=2).selections
    first, second, *_ = calibration.plan("random", 4, seed=1).selections.values()
    assert first != second


def test_magnitude_pairs_b_with_c() -> None:
    model = tiny_model()
    mixer = mixers_of(model)[0]
    weight, layout = mixer.in_proj.weight.data, mixer.layout
    weight[layout.in_proj_B], weight[layout.in_proj_C] = 1.0, 1.0
    weight[layout.in_proj_B.start + 3] = 100.0  # large B, but its C is tiny
    weight[layout.in_proj_C.start + 3] = 1e-4
    weight[layout.in_proj_B.start + 5] = 2.0
    plan = Calibration(model, random_windows(1, 20)).plan("magnitude", 1)
    assert plan.selections[mixer.name].kept == ((5,),)


@pytest.mark.parametrize("state_size", [0, -1, 17, 2.5, True, "8"])
def test_impossible_state_sizes_are_refused(state_size: object) -> None:
    with pytest.raises(InputError, match="from 1 to the model's N = 16"):
        Calibration(tiny_model(), random_windows(1, 20)).plan("ghost", state_size)  # type: ignore[arg-type]


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="ghost"):
        Calibration(tiny_model(), random_windows(1, 20)).plan("gost", 4)


@pytest.mark.parametrize("recipe", [*method_names(), "output+refit3+repair", "balanced+refit3+repair+per-layer"])
def test_a_mixer_that_does_nothing_can_be_pruned(recipe: str) -> None:
    """All that is solved for it is singular. It goes on doing nothing, whatever is decided and fitted for it."""
    model, windows = tiny_model(n_groups=2), random_windows(4, 40)
    idle = mixers_of(model)[1]
    with torch.no_grad():
        idle.in_proj.weight.zero_()
    plan = Calibration(model, windows).plan(recipe, 4)
    assert len(plan.selections) == 3
    outputs: list[torch.Tensor] = []
    with pruned(model, plan) as smaller:
        mixers_of(smaller)[1].module.register_forward_hook(lambda _, args, output: outputs.append(output))
        assert torch.isfinite(evaluate(smaller, windows).losses).all()
    assert outputs
    assert not any(output.any() for output in outputs)
