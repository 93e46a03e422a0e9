"""Models whose state is kept in tiers of bits: how these are chosen, written down, and heeded."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import ghostssm
from ghostssm.errors import InputError, PlanError
from ghostssm.evaluation import evaluate
from ghostssm.models.families import layout_of, mixers_of
from ghostssm.models.forward import replaced_forward, rounded_forward
from ghostssm.ops.state_format import TIERS, StateStorage, tier_bytes
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan, pruned
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration
from ghostssm.pruning.search import Fitting
from ghostssm.pruning.tiers import Costs, divide, in_tiers
from tests.conftest import Run, random_windows, tiny_model
from tests.test_fitting import choice_of

DENSE = 3 * 64 * 16 * 4
"""Bytes of the tiny model's state: layers, heads x head_dim, N, float32."""
WINDOWS = random_windows(8, 40)


@pytest.fixture(scope="module")
def whole() -> Plan:
    """Of the whole state, in a balanced basis."""
    return Calibration(tiny_model(), WINDOWS).plan("balanced", 16, progress=None)


@pytest.fixture(scope="module")
def tiered(whole: Plan) -> Plan:
    return in_tiers(tiny_model(), whole, WINDOWS, DENSE // 8)


@pytest.mark.parametrize("state_bytes", [30, 47, 64, 100])
def test_no_other_tiers_of_the_same_bytes_cost_less(state_bytes: int, fresh_seed: int) -> None:
    """Of two mixers of one head each with two rows, all divisions are tried; bytes left over are worth a step at most.

    Channels are in order, as those of a balanced basis are.
    """
    n, rows = 5, 2
    costs = []
    for _ in range(2):
        left_out = torch.rand(1, n).double().sort(descending=True).values
        costs.append(Costs(left_out, left_out * 10 ** (2 * torch.rand(1, 1).double()), rows))

    def cost(tiers: list[Any]) -> float:
        total = 0.0
        for each, ((wide, narrow),) in zip(costs, tiers, strict=True):
            left, noise = each.left_out[0], each.rounded[0]
            eights, fours = slice(0, wide), slice(wide, wide + narrow)
            total += (noise[eights].sum() / 127**2 + noise[fours].sum() / 7**2 + left[wide + narrow :].sum()).item()
        return total

    found = divide(costs, state_bytes)
    taken = sum(rows * tier_bytes(*tiers[0]) for tiers in found)
    assert taken <= state_bytes
    heads = [(wide, narrow) for wide, narrow in product(range(n + 1), repeat=2) if wide + narrow <= n]
    fitting = [
        [(first,), (second,)]
        for first, second in product(heads, repeat=2)
        if rows * (tier_bytes(*first) + tier_bytes(*second)) <= state_bytes
    ]
    best = min(map(cost, fitting))
    largest_step = max(each.left_out.max().item() for each in costs)
    assert cost(found) <= best + largest_step


def test_tiers_fit_and_the_basis_changes_nothing(whole: Plan, tiered: Plan) -> None:
    model = tiny_model()
    layout = layout_of(model.config)
    assert tiered.state_bytes(layout, "tiers") <= DENSE // 8
    assert tiered.state_bytes(layout, "tiers") > DENSE // 8 * 0.9
    everything = in_tiers(model, whole, WINDOWS, DENSE)
    assert all(heads == ((16, 0),) * layout.num_heads for heads in everything.tiers.values())
    with pruned(model, whole) as first, pruned(model, everything) as second:
        before, after = evaluate(first, WINDOWS), evaluate(second, WINDOWS)
        torch.testing.assert_close(before.losses, after.losses, rtol=0, atol=1e-4)
        rounded = evaluate(second, WINDOWS, storage=StateStorage.of("tiers"))
    assert abs(rounded.excess_over(before).mean) < 0.01


def test_heads_that_forget_slowly_get_more_bits() -> None:
    slow, fast = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.01, 0.005]])
    left_out = torch.tensor([[0.1, 0.05]])
    first, second = divide([Costs(left_out, slow, 1), Costs(left_out, fast, 1)], 4 + 2 + 4 + 1)
    assert (first, second) == (((2, 0),), ((0, 2),))


def test_a_plan_and_a_checkpoint_keep_their_tiers(tiered: Plan, tmp_path: Path) -> None:
    tiered.save(tmp_path / "plan")
    again = Plan.read(tmp_path / "plan")
    assert again.tiers == tiered.tiers
    model = apply_plan(tiny_model(), again)
    assert [mixer.tiers for mixer in mixers_of(model)] == list(tiered.tiers.values())
    folder = ghostssm.save(model, tiered.kept_in("tiers"), tmp_path / "out")
    loaded = ghostssm.load(str(folder)).model
    assert [mixer.tiers for mixer in mixers_of(loaded)] == list(tiered.tiers.values())
    described = ghostssm.describe(str(folder))
    assert described.state_bytes(form=TIERS) == tiered.state_bytes(layout_of(tiny_model().config), "tiers")
    assert described.footprint(form=TIERS).state == described.state_bytes(form=TIERS)


def test_decoding_token_by_token_is_the_scan(tiered: Plan) -> None:
    """Both round after every token; what a cache holds are the bytes of the tiers."""
    model, ids, logits = apply_plan(tiny_model(), tiered), WINDOWS.ids[:2, :9], []
    with torch.inference_mode():
        with replaced_forward(mixers_of(model), rounded_forward(StateStorage.of("tiers"))):
            expected = model(ids, use_cache=False).logits
            cache = model(ids[:, :4], use_cache=True).cache_params
        ghostssm.accelerate(model, state_dtype="tiers")
        for t in range(4, ids.shape[1]):
            logits.append(model(ids[:, t : t + 1], cache_params=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, 4:], rtol=1e-3, atol=1e-3)
    state, tiers = cache.get_recurrent_state(0, state_idx=0), mixers_of(model)[0].tiers
    assert tiers is not None
    assert state.dtype == torch.uint8
    assert state.shape[1] >= 8 * sum(tier_bytes(*each) for each in tiers)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0)
    assert out.shape == (2, 12)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([[[17, 0]] * 8], "two numbers of channels"),
        ([[[1]] * 8], "two numbers of channels"),
        ([[[-1, 2]] * 8], "two numbers of channels"),
        ("x", "tiers"),
    ],
)
def test_broken_tiers_in_a_plan_are_refused(tiered: Plan, tmp_path: Path, wrong: Any, told: str) -> None:
    tiered.save(tmp_path)
    file = tmp_path / "plan.json"
    document = json.loads(file.read_text())
    document["tiers"] = dict.fromkeys(document["tiers"], wrong[0]) if isinstance(wrong, list) else wrong
    file.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=told):
        Plan.read(tmp_path)


def test_tiers_are_among_what_bytes_choose_from() -> None:
    model = tiny_model()
    fitting = Fitting.of(model, WINDOWS)
    plan = fitting.plan(Recipe.parse("balanced"), DENSE // 8, dtypes=["int4", "tiers"], multiple=2, progress=None)
    found = {each.state_dtype: each for each in choice_of(plan).candidates}
    assert set(found) == {"int4", "tiers"}
    whole = fitting.calibration.plan("balanced", 10, progress=None)  # what 3 bits a channel leave room for
    tiered = in_tiers(model, whole, fitting.calibration.windows, DENSE // 8)
    with pruned(model, tiered) as smaller:
        loss = evaluate(smaller, fitting.held_out, storage=StateStorage.of("tiers"))
    assert found["tiers"].excess.mean == pytest.approx(loss.excess_over(fitting.dense).mean, abs=1e-6)
    assert found["tiers"].state_bytes == tiered.state_bytes(layout_of(model.config), "tiers") <= DENSE // 8
    stock = fitting.plan(Recipe.parse("magnitude"), DENSE // 8, multiple=2, progress=None)
    assert "tiers" not in {each.state_dtype for each in choice_of(stock).candidates}


def test_commands_keep_the_state_in_the_tiers_of_a_checkpoint(
    run: Run, small: Path, text_file: Path, tmp_path: Path
) -> None:
    checkpoint, text = ghostssm.load(str(small)), ghostssm.read_text(str(text_file), "evaluation")
    windows = ghostssm.cut_windows(text, checkpoint.require_tokenizer(), 64, 8)
    whole = Calibration(checkpoint.model, windows).plan("balanced", 16, progress=None)
    plan = in_tiers(checkpoint.model, whole, windows, DENSE // 8).kept_in("tiers")
    output = ghostssm.save(replace(checkpoint, model=apply_plan(checkpoint.model, plan)), plan, tmp_path / "out")
    assert "in 8 bits, the next in 4" in (output / "README.md").read_text()
    code, out, err = run("evaluate", output, "--text", text_file, "--window-length", 64, "--json")
    assert code == 0
    assert "kept in tiers" in err
    model = ghostssm.load(str(output)).model
    windows = ghostssm.evaluation_windows(text, checkpoint.require_tokenizer(), 64)
    expected = evaluate(model, windows, storage=StateStorage.of("tiers")).loss
    assert json.loads(out)["loss"] == pytest.approx(expected, abs=1e-6)
    assert evaluate(model, windows).loss != pytest.approx(expected, abs=1e-4)
    code, out, _ = run("inspect", output, "--json")
    kept = {each["state_dtype"]: each["state"] for each in json.loads(out)["cuts"][0]["kept"]}
    layout = layout_of(checkpoint.model.config)
    assert kept["tiers"] == plan.state_bytes(layout, "tiers") <= DENSE // 8 < kept["float32"]
    assert run("generate", output, "--prompt", "a b", "--max-new-tokens", 2)[0] == 0
    assert run("report", output, "--output", tmp_path / "page.html")[0] == 0


def test_only_models_with_tiers_are_kept_so() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="does not say how many channels"):
        ghostssm.accelerate(model, state_dtype="tiers")
    with pytest.raises(InputError, match="pruned to them"):
        ghostssm.compare(model, WINDOWS, state_sizes=[8], methods="magnitude", evaluate=WINDOWS, state_dtypes=["tiers"])
    plan = Fitting.of(model, WINDOWS).plan(
        Recipe.parse("balanced"), DENSE // 8, dtypes=["int8"], multiple=4, progress=None
    )
    assert not plan.tiers
    with pytest.raises(InputError, match="does not say how many channels"):
        replace(plan).state_bytes(layout_of(model.config), "tiers")
