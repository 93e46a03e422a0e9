"""From a plan with projections or a state size per layer to a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ghostssm
from ghostssm.evaluation import evaluate
from ghostssm.models.families import mixers_of
from ghostssm.models.mixer import Projection
from ghostssm.models.own_class.modeling_ghost import GhostMamba2ForCausalLM
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan, pruned
from ghostssm.pruning.run import Calibration
from tests.conftest import random_windows, tiny_model

RECIPES = ["balanced", "balanced+per-layer", "output+per-layer", "balanced+refit5+repair+per-layer"]


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_plan_to_checkpoint_and_back(
    recipe: str, folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ghostssm.load(str(folder_of(n_groups=2)))
    windows = random_windows(9, 40)
    dense = logits(checkpoint.model, windows.ids)
    plan = Calibration(checkpoint.model, windows).plan(recipe, 6, multiple=2)
    assert sum(plan.state_sizes) <= 18
    assert torch.equal(logits(checkpoint.model, windows.ids), dense)

    smaller = apply_plan(checkpoint.model, plan)
    assert torch.equal(logits(checkpoint.model, windows.ids), dense)
    if plan.needs_own_class:
        assert isinstance(smaller, GhostMamba2ForCausalLM)
        with pytest.raises(ghostssm.InputError, match="apply_plan returns"):
            ghostssm.save(checkpoint, plan, tmp_path / "out")
    changed = ghostssm.Checkpoint(smaller, checkpoint.tokenizer, checkpoint.source)
    written = ghostssm.save(changed, plan, tmp_path / "out")
    assert not torch.equal(logits(smaller, windows.ids), dense)

    loaded = ghostssm.load(str(written)).model
    assert torch.equal(logits(loaded, windows.ids), logits(smaller, windows.ids))
    by_transformers = AutoModelForCausalLM.from_pretrained(written)
    torch.testing.assert_close(logits(by_transformers, windows.ids), logits(smaller, windows.ids))
    assert ghostssm.describe(str(written)).state_sizes == plan.state_sizes

    plan.save(tmp_path)
    again = apply_plan(checkpoint.model, Plan.read(tmp_path))
    assert torch.equal(logits(again, windows.ids), logits(smaller, windows.ids))


def test_accelerated_decoding_is_the_same() -> None:
    model, windows = tiny_model(n_groups=2), random_windows(4, 30)
    smaller = apply_plan(model, Calibration(model, windows).plan("balanced+per-layer", 6, multiple=2))
    ids = windows.ids[:2, :9]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    stock = smaller.generate(ids, **options)
    ghostssm.accelerate(smaller)
    fast = smaller.generate(ids, **options)
    ghostssm.restore(smaller)
    assert torch.equal(fast.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(fast.logits), torch.stack(stock.logits), rtol=1e-4, atol=1e-4)


def test_all_directions_kept_is_the_dense_model() -> None:
    model, windows = tiny_model(n_groups=2), random_windows(4, 60)
    with pruned(model, Calibration(model, windows).plan("balanced", 16)) as same:
        torch.testing.assert_close(evaluate(same, windows).losses, evaluate(model, windows).losses, rtol=0, atol=1e-4)


def test_selection_is_the_special_case_of_one_hot_maps() -> None:
    model, windows = tiny_model(n_groups=2), random_windows(2, 40)
    kept = ((0, 3, 7), (1, 2, 15))
    names = [mixer.name for mixer in mixers_of(model)]
    everything = Selection((tuple(range(16)),) * 2)
    maps = torch.stack([torch.eye(16)[:, list(channels)] for channels in kept])
    sizes = {"method": "test", "model_type": "mamba2", "n_groups": 2, "state_size": 16}
    sliced = Plan(**sizes, decisions=dict.fromkeys(names, Decision(Selection(kept))))  # type: ignore[arg-type]
    projected = Plan(
        **sizes,  # type: ignore[arg-type]
        decisions=dict.fromkeys(names, Decision(everything, Projection(maps, maps))),
    )
    found = []
    for plan in (sliced, projected):
        with pruned(model, plan) as smaller:
            found.append(logits(smaller, windows.ids))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_balanced_loses_less_than_selection_of_the_same_size() -> None:
    model, windows = tiny_model(), random_windows(8, 100)
    calibration, whole = Calibration(model, windows), logits(model, windows.ids)
    distance = {}
    for recipe in ("ghost", "output", "balanced"):
        with pruned(model, calibration.plan(recipe, 8)) as smaller:
            distance[recipe] = (logits(smaller, windows.ids) - whole).square().mean().item()
    assert distance["balanced"] < distance["output"] < 1.1 * distance["ghost"]
    assert torch.equal(logits(model, windows.ids), whole)


def test_a_refit_and_repaired_model_is_closer_and_comes_back() -> None:
    model, windows = tiny_model(), random_windows(9, 100)
    calibration, whole = Calibration(model, windows), logits(model, windows.ids)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    distance = []
    for recipe in ("output", "output+refit60+repair"):
        plan = calibration.plan(recipe, 6)
        with pruned(model, plan) as smaller:
            assert smaller is model
            assert model.config.state_size == 6
            distance.append((logits(model, windows.ids) - whole).square().mean().item())
    assert distance[1] < 0.9 * distance[0]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_what_was_projected_is_not_pruned_again() -> None:
    model, windows = tiny_model(), random_windows(2, 40)
    smaller = apply_plan(model, Calibration(model, windows).plan("balanced", 6))
    with pytest.raises(ghostssm.ModelError, match="prune the original"):
        Calibration(smaller, windows)


def test_the_mamba_ssm_dialect_has_no_such_class(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    plan = Calibration(checkpoint.model, random_windows(2, 40)).plan("balanced", 6)
    changed = ghostssm.Checkpoint(apply_plan(checkpoint.model, plan), None, checkpoint.source)
    with pytest.raises(ghostssm.InputError, match="mamba_ssm dialect"):
        ghostssm.save(changed, plan, tmp_path / "out", dialect="mamba_ssm")
    assert not (tmp_path / "out").exists()


def test_a_plan_beside_a_checkpoint_says_that_it_only_describes(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = ghostssm.load(str(folder_of()))
    plan = Calibration(checkpoint.model, random_windows(9, 40)).plan("output+repair", 6)
    ghostssm.apply_plan(checkpoint.model, plan)
    written = ghostssm.save(checkpoint, plan, tmp_path / "out")
    with pytest.raises(ghostssm.PlanError, match="only describes it"):
        Plan.read(written)


def test_refitted_layers_of_uneven_groups_are_padded_exactly() -> None:
    model, windows = tiny_model(n_groups=2), random_windows(9, 60)
    for mixer, factor in zip(mixers_of(model), (1.0, 30.0, 3.0), strict=True):  # one group speaks up
        rows = mixer.layout.in_proj_C
        mixer.in_proj.weight.data[rows.start : rows.start + 16] *= factor
    plan = Calibration(model, windows).plan("output+refit5+repair", 6, groups="pooled")
    assert len(set(plan.widths)) > 1
    with pruned(model, plan):
        assert model.config.state_size == max(plan.state_sizes)
        padded = logits(model, windows.ids)
    with pruned(model, replace(plan, per_layer=True)) as uneven:
        torch.testing.assert_close(padded, logits(uneven, windows.ids), rtol=1e-4, atol=1e-4)


def test_tensors_that_do_not_fit_are_refused_before_anything_changes() -> None:
    model, windows = tiny_model(), random_windows(9, 40)
    plan = Calibration(model, windows).plan("output+repair", 6)
    whole = logits(model, windows.ids)
    name = next(name for name in plan.changes if name.endswith("out_proj.weight"))
    for wrong, message in (
        ({name: torch.zeros(3, 3)}, r"has shape \(3, 3\), expected \(32, 64\)"),
        ({"nonsense": torch.zeros(1)}, "no parameter 'nonsense'"),
    ):
        with pytest.raises(ghostssm.PlanError, match=message):
            apply_plan(model, replace(plan, changes={**plan.changes, **wrong}))
        assert torch.equal(logits(model, windows.ids), whole)


def test_sizes_per_layer_do_not_depend_on_what_was_planned_before() -> None:
    model, windows = tiny_model(n_groups=2), random_windows(6, 60)
    shared = Calibration(model, windows)
    for recipe, options in (
        ("ghost+per-layer", {"groups": "equal"}),
        ("ghost+per-layer", {"groups": "pooled"}),
        ("random+per-layer", {"seed": 1}),
        ("random+per-layer", {"seed": 2}),
    ):
        alone = Calibration(model, windows).plan(recipe, 4, multiple=1, **options)
        assert shared.plan(recipe, 4, multiple=1, **options).state_sizes == alone.state_sizes
