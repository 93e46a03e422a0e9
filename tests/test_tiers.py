"""Models whose state is kept in tiers of bits: how these are chosen, written down, and heeded."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
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
from ghostssm.ops.state_format import FORMATS, TIERS, StateFormat, StateStorage, tier_bytes
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan, pruned
from ghostssm.pruning import search
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration
from ghostssm.pruning.search import Fitting, smallest_plan
from ghostssm.pruning.tiers import Costs, divide, in_tiers
from tests.conftest import Run, random_windows, tiny_model
from tests.test_fitting import choice_of
from tests.test_smallest import MadeUp, search_of

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


def test_its_speed_is_measured_as_it_is(run: Run, tiered: Plan, tmp_path: Path) -> None:
    folder = ghostssm.save(apply_plan(tiny_model(), tiered), tiered.kept_in("tiers"), tmp_path / "out")
    asked = ["bench", folder, "--batch", 2, "--prompt-length", 3]
    code, out, _ = run(*asked, "--state-dtype", "tiers", "int8", "--json")
    assert code == 0
    described, rows = ghostssm.describe(str(folder)), json.loads(out)["rows"]
    assert [row["state_dtype"] for row in rows] == ["float32", "tiers", "int8"]
    assert rows[1]["state_bytes"] == 2 * described.state_bytes(form=TIERS) < rows[2]["state_bytes"]
    assert rows[0]["speedup_range"] == [1, 1]
    code, out, _ = run(*asked)
    assert code == 0
    assert "The model is measured as it is" in " ".join(out.split())
    code, _, err = run(*asked, "--state-size", 4)
    assert code == 2
    assert "can't be cut. Leave --state-size out" in " ".join(err.split())


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


def test_tiers_alone_may_be_chosen_from() -> None:
    """Also where they alone fit, with three bits a channel."""
    fitting = Fitting.of(tiny_model(), WINDOWS)
    within = partial(fitting.plan, Recipe.parse("balanced"), multiple=16, progress=None)
    assert within(DENSE // 4, dtypes=["tiers"]).state_dtype == "tiers"
    assert within(DENSE * 11 // 64).state_dtype == "tiers"
    with pytest.raises(InputError, match=r"the least, 16 channels in tiers, takes 1,920"):
        within(DENSE // 8, dtypes=["tiers"])
    for plan in (partial(fitting.plan, state_bytes=DENSE // 4), partial(smallest_plan, tiny_model(), WINDOWS)):
        bound = {"max_excess_loss": 1.0} if plan.func is smallest_plan else {}
        with pytest.raises(InputError, match="magnitude gives no state in tiers; expected one or more of float32"):
            plan(recipe=Recipe.parse("magnitude"), dtypes=["tiers"], **bound)
        with pytest.raises(InputError, match="No state dtype is called 'int9'"):
            plan(recipe=Recipe.parse("magnitude"), dtypes=["int8", "int9"], **bound)


@pytest.mark.parametrize("dtypes", [None, ["int8"], ["int8", "tiers"]])
def test_the_fewest_bytes_within_a_loss_may_be_those_of_tiers(
    monkeypatch: pytest.MonkeyPatch, dtypes: list[str] | None
) -> None:
    """As trying all bytes does, where the loss is made up: it falls with the bytes, in tiers as much as elsewhere."""
    rows = 64

    def taken(model: Any, dtype: str) -> int:
        (mixer,) = mixers_of(model)
        if dtype == "tiers":
            return sum(tier_bytes(*each) for each in mixer.tiers) * mixer.layout.head_dim
        return StateFormat.of(dtype).state_bytes(rows, mixer.state_size)

    def made_up(model: Any, windows: Any, progress: Any = None, state_dtype: str = "float32") -> Any:
        return MadeUp(-taken(model, state_dtype) / rows)

    monkeypatch.setattr(search, "evaluate_in_float32", made_up)
    model, windows = tiny_model(num_hidden_layers=1), random_windows(4, 10)
    calibration = Calibration(model, windows.part(torch.arange(4) != 1))
    wholes = {size: calibration.plan("balanced", size, progress=None) for size in (4, 8, 12, 16)}
    of_tiers = {}
    for row_bytes in range(4 + 2, 20, 2):  # three bits a channel of four channels, and so on
        whole = wholes[min(16, (row_bytes - 4) * 8 // 3 // 4 * 4)]
        plan = in_tiers(model, whole, calibration.windows, row_bytes * rows)
        of_tiers[row_bytes * rows] = plan.state_bytes(layout_of(model.config), "tiers")
    forms = [StateFormat.of(each) for each in dtypes or FORMATS if each != "tiers"]
    of_dtypes = [form.state_bytes(rows, size) for form in forms for size in (4, 8, 12, 16)]
    for row_bytes in (5, 11.5, 14):
        plan = smallest_plan(model, windows, "balanced", 64 - row_bytes, dtypes=dtypes, multiple=4)
        least = min(each for each in of_dtypes if each >= row_bytes * rows)
        fewer = [each for bound, each in of_tiers.items() if bound < least and each >= row_bytes * rows]
        expected = least if dtypes == ["int8"] else min([*fewer, least])
        assert plan.state_dtype is not None
        assert plan.state_bytes(layout_of(model.config), plan.state_dtype) == expected
        assert search_of(plan).excess.mean == 64 - expected / rows
        assert bool(plan.tiers) == (plan.state_dtype == "tiers") == (expected < least)
    assert smallest_plan(model, windows, "magnitude", 64, multiple=4).state_dtype == "int4"


def test_the_command_searches_tiers(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    """Three bits a channel are the fewest of all, which is what a bound that all keep asks for."""
    output, text = tmp_path / "out", ["--calibration", text_file, "--windows", 4, "--window-length", 64]
    asked = ["prune", small, "--method", "balanced", "--max-excess-loss", 100, *text, "--output", output]
    code, out, _ = run(*asked, "--evaluate", text_file, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["searched"]["state_dtype"] == "tiers"
    assert ghostssm.describe(str(output)).state_bytes(form=TIERS) <= DENSE // 64 * 7
    assert "kept in tiers" in (output / "README.md").read_text()
    code, out, _ = run("evaluate", output, "--text", text_file, "--window-length", 64, "--json")
    assert json.loads(out)["loss"] == pytest.approx(found["measured"]["pruned_loss"], abs=1e-5)
    bytes_of_tiers = ["prune", small, "--state-bytes", "11/64", "--multiple", 16, *text, "--output", output]
    code, out, _ = run(*bytes_of_tiers, "--method", "balanced", "--overwrite", "--json")  # too few for 4 bits a channel
    assert [each["state_dtype"] for each in json.loads(out)["choice"]["candidates"]] == ["tiers"]
    code, _, err = run(*bytes_of_tiers, "--method", "magnitude", "--overwrite")
    assert (code, "16 channels in int4" in err) == (2, True)
    code, out, _ = run(*asked, "--state-dtype", "int4", "--overwrite", "--json")
    assert json.loads(out)["searched"]["state_dtype"] == "int4"
    code, _, err = run(*asked, "--state-dtype", "tiers", "--overwrite")
    assert code == 2
    assert "--max-excess-loss 0.02" in " ".join(err.split())


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
