"""What a training does to a student: it gets better, is never worse, and ends where it should."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ghostssm
from ghostssm.calibration.processes import Processes
from ghostssm.errors import InputError
from ghostssm.evaluation.perplexity import evaluate
from ghostssm.ops.state_format import StateStorage
from ghostssm.plan.distillation import Distillation, Point
from ghostssm.plan.measurement import Difference
from ghostssm.plan.surgery import apply_plan, pruned
from ghostssm.recovery.distill import training as training_module
from ghostssm.recovery.distill.batches import Batches, HeldWindows
from ghostssm.recovery.distill.pair import Student, Teacher, choose_trained
from ghostssm.recovery.distill.training import Distilled, Listener, Settings, Training, distill
from tests.conftest import random_windows, tiny_model

WINDOWS = random_windows(240, 20)
QUICK = Settings(steps=12, batch=4, learning_rate=1e-2)


def student_of(model: Any, size: int = 4) -> Any:
    plan = ghostssm.Calibration(model, random_windows(2, 20, seed=5)).plan("random", size)
    return apply_plan(copy.deepcopy(model), plan)


def distilled(settings: Settings = QUICK, **more: Any) -> Distilled:
    teacher = tiny_model()
    return distill(student_of(teacher), teacher, Batches(HeldWindows(WINDOWS), 4, settings.seed), settings, **more)


def _divergence(student: Any, teacher: Any, ids: Tensor) -> float:
    """In float64, by PyTorch, through transformers' own forward pass."""
    with torch.no_grad():
        logits = [model(input_ids=ids).logits[:, :-1].double().flatten(0, 1) for model in (student, teacher)]
    student_log, teacher_log = (F.log_softmax(each, -1) for each in logits)
    return F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True).item()


def test_it_learns() -> None:
    """And what it says of the held-out windows is so."""
    teacher = tiny_model()
    before = copy.deepcopy(teacher.state_dict())
    batches = Batches(HeldWindows(WINDOWS), 4, 1)
    student = student_of(teacher)
    first = _divergence(student, teacher, batches.held_out)
    fresh = student_of(teacher)
    found = distill(student, teacher, batches, Settings(steps=60, batch=4, learning_rate=1e-2))
    fresh.load_state_dict(dict(found.changes), strict=False)
    last = _divergence(fresh, teacher, batches.held_out)
    assert last < 0.96 * first
    record = found.record
    assert record.curve[0].divergence == pytest.approx(first, rel=1e-4)
    assert record.best.divergence == pytest.approx(last, rel=1e-4)
    assert (record.steps, record.tokens, record.ended) == (60, 60 * 4 * 20, "all steps were taken")
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_first_gradient_is_autograds() -> None:
    """Through our forward pass and loss, against transformers' forward pass and PyTorch's loss on full logits."""
    teacher = tiny_model()
    student, reference = student_of(teacher), student_of(teacher)
    moved = {name: value.detach().clone() for name, value in student.named_parameters() if ".mixer." in name}
    batches = Batches(HeldWindows(WINDOWS), 4, 42)
    ids = Batches(HeldWindows(WINDOWS), 4, 42).take()
    seen: dict[str, Tensor] = {}

    def keep(model: torch.optim.Adam, *_: Any) -> None:
        names = [name for name, _ in student.named_parameters() if name in moved]
        seen.update(
            {name: value.grad.clone() for name, value in zip(names, model.param_groups[0]["params"], strict=True)}
        )

    handle = register_optimizer_step_pre_hook(keep)
    try:
        distill(student, teacher, batches, Settings(steps=1, batch=4))
    finally:
        handle.remove()
    log_student, log_teacher = (
        F.log_softmax(model(input_ids=ids).logits.flatten(0, 1), -1) for model in (reference, teacher)
    )
    F.kl_div(log_student, log_teacher.detach(), reduction="batchmean", log_target=True).backward()
    own = {name: value.grad for name, value in reference.named_parameters() if name in moved}
    norm = torch.stack([grad.norm() for grad in own.values()]).norm()
    scale = min(1.0, 1.0 / norm.item())
    assert seen.keys() == own.keys()
    for name, grad in seen.items():
        torch.testing.assert_close(grad, scale * own[name], rtol=1e-3, atol=1e-5 * norm.item())


@pytest.mark.parametrize(
    "other",
    [{"accumulate": 4}, {"checkpointing": True}],
)
@pytest.mark.parametrize("more", [{}, {"hidden_weight": 30.0}, {"state_dtype": "int8"}])
def test_the_same_in_less_memory(other: dict[str, Any], more: dict[str, Any]) -> None:
    settings = dataclasses.replace(QUICK, **more)
    expected, found = distilled(settings), distilled(dataclasses.replace(settings, **other))
    for before, after in zip(expected.record.curve, found.record.curve, strict=True):
        assert after.divergence == pytest.approx(before.divergence, rel=1e-4)


def test_bfloat16_keeps_wide_weights() -> None:
    found = distilled(Settings(**vars(QUICK) | {"bfloat16": True}))
    assert {value.dtype for value in found.changes.values()} == {torch.float32}
    assert found.record.best.divergence < found.record.curve[0].divergence


def test_hidden_states() -> None:
    """Learning them alone brings the distributions together too."""
    found = distilled(Settings(**vars(QUICK) | {"hidden_weight": 100.0}))
    assert found.record.best.divergence < found.record.curve[0].divergence


def test_lessons_that_are_kept_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the held-out windows stay for the whole training, and need no hidden states of blocks."""
    forward, seen = training_module.Student.forward, set[tuple[bool, int]]()

    def watched(self: Any, ids: Tensor, lesson: Any, by_window: bool = False) -> Tensor:
        seen.add((by_window, len(lesson.blocks)))
        return forward(self, ids, lesson, by_window)

    monkeypatch.setattr(training_module.Student, "forward", watched)
    distilled(dataclasses.replace(QUICK, hidden_weight=1.0))
    assert seen == {(False, 3), (True, 0)}


def test_a_rounded_state() -> None:
    """The losses are those of a state that is rounded after every token, and the student learns with it."""
    teacher = tiny_model()
    batches = Batches(HeldWindows(WINDOWS), 4, 1)
    windows = dataclasses.replace(WINDOWS, ids=batches.held_out)

    def excess(student: Any) -> float:
        rounded = evaluate(student, windows, storage=StateStorage.of("int4"))
        return rounded.excess_over(evaluate(teacher, windows)).mean

    student, fresh = student_of(teacher), student_of(teacher)
    first = excess(fresh)
    found = distill(student, teacher, batches, dataclasses.replace(QUICK, state_dtype="int4"))
    fresh.load_state_dict(dict(found.changes), strict=False)
    record = found.record
    assert record.state_dtype == "int4"
    assert record.curve[0].excess.mean == pytest.approx(first, abs=1e-4)
    assert record.best.excess.mean == pytest.approx(excess(fresh), abs=1e-4)
    assert record.best.divergence < 0.98 * record.curve[0].divergence
    assert distilled().record.state_dtype == "float32"


@pytest.mark.parametrize(
    ("state_dtype", "rounded"), [("int4", "int4"), ("int8", "float32"), ("tiers", "float32"), (None, "float32")]
)
def test_a_recipe_trains_for_the_dtype(state_dtype: str | None, rounded: str) -> None:
    calibration = ghostssm.Calibration(tiny_model(), random_windows(4, 20))
    plan = calibration.plan("random+distill1", 4, state_dtype=state_dtype)
    assert [each.state_dtype for each in plan.distillations] == [rounded]


def test_a_record_of_earlier_releases_is_read() -> None:
    """They did not round, and never went back, and so had no entry for these."""
    record = distilled().record
    document = record.as_json()
    del document["state_dtype"], document["setbacks"]
    assert Distillation.from_json(document) == record


@pytest.mark.parametrize("trained", ["mixers", "small", "all"])
def test_which_parameters_move(trained: Any) -> None:
    model = tiny_model()
    names = set(distilled(Settings(**vars(QUICK) | {"trained": trained})).changes)
    matrices = {name for name, _ in model.named_parameters() if "proj.weight" in name or "embeddings" in name}
    mixers = {name for name, _ in model.named_parameters() if ".mixer." in name}
    everything = {name for name, _ in model.named_parameters()}
    assert names == {"mixers": mixers, "small": everything - matrices, "all": everything}[trained]
    choose_trained(model, trained)


def test_never_worse_and_stopped() -> None:
    """At a rate that ruins the model the first parameters are given back, and it is said why."""
    told: list[str] = []
    student = student_of(tiny_model())
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    found = distill(
        student,
        tiny_model(),
        Batches(HeldWindows(WINDOWS), 4, 1),
        Settings(steps=40, batch=4, learning_rate=3000.0),
        listener=Listener(notify=told.append),
    )
    assert found.record.kept_step == 0
    assert found.record.steps < 40
    assert "diverged" in told[-1] or "not finite" in told[-1]
    assert all(torch.equal(value, before[name]) for name, value in found.changes.items())


def test_the_rate_suits_the_student() -> None:
    """It goes with the root of how far the student is from its teacher."""
    teacher, window, told = tiny_model(), Batches(HeldWindows(WINDOWS), 4, 1), list[str]()
    listener = Listener(notify=told.append)
    records = {
        size: distill(student_of(teacher, size), teacher, window, Settings(steps=1, batch=4), listener=listener).record
        for size in (4, 14)
    }
    for record in records.values():
        assert record.learning_rate == pytest.approx(2e-3 * math.sqrt(record.curve[0].divergence))
        assert any(f"learning rate {record.learning_rate:.2g}" in each for each in told)
    assert records[14].learning_rate < 0.9 * records[4].learning_rate
    same = distill(copy.deepcopy(teacher), teacher, window, Settings(steps=1, batch=4)).record
    assert 0 < same.learning_rate < 1e-5


class _Keeper:
    """Holds the first state after a setback, and gives it to a later training."""

    state: Any = None

    def read(self) -> Any:
        return copy.deepcopy(self.state)

    def is_due(self) -> bool:
        return self.state is None

    def write(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if facts["setbacks"]:
            self.state = copy.deepcopy((facts, tensors))


def test_too_high_a_rate_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on from the best parameters; one that is resumed from there takes the same steps."""
    monkeypatch.setattr(training_module, "_DIVERGED", 1.05)  # this model can't be much worse than it is
    told: list[str] = []
    rates: dict[int, dict[str, float]] = {}
    settings, keeper = Settings(steps=40, batch=4, learning_rate=0.1), _Keeper()
    listener = Listener(notify=told.append, log=lambda numbers, step: rates.update({step: numbers}))
    whole = distilled(settings, listener=listener, keeper=cast(Any, keeper))
    facts, tensors = keeper.state
    kept = min(facts["curve"], key=lambda point: point["divergence"])["step"]
    assert len(facts["setbacks"]) == 1
    assert f"goes on from step {kept} at a rate of" in next(each for each in told if facts["setbacks"][0] in each)
    best = {name: value for name, value in tensors.items() if name.startswith("best:")}
    assert all(torch.equal(value, tensors[name.replace("best:", "now:")]) for name, value in best.items())
    record = whole.record
    assert record.best.divergence < 0.95 * record.curve[0].divergence
    assert rates[40]["learning_rate"] == pytest.approx(0.1 * 0.3 ** len(record.setbacks) * settings.share_at(40))
    resumed = distilled(settings, keeper=cast(Any, keeper))
    assert resumed.record == record
    assert all(torch.equal(value, resumed.changes[name]) for name, value in whole.changes.items())


def test_a_broken_student_is_not_trained() -> None:
    teacher = tiny_model()
    student = student_of(teacher)
    with torch.no_grad():
        next(student.parameters()).fill_(math.nan)
    record = distill(student, teacher, Batches(HeldWindows(WINDOWS), 4, 1), Settings(steps=4, batch=4)).record
    assert (record.steps, record.ended) == (0, "the divergence before the first step is nan")


@pytest.mark.parametrize("step", [1, 4, 8])
def test_nan_stops_with_the_last_good_state(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Whichever step it comes in, nothing that it made is kept."""
    divergence, calls = training_module.Student.forward, []

    def poisoned(self: Any, ids: Tensor, lesson: Any, by_window: bool = False) -> Tensor:
        calls.append(by_window)
        found = divergence(self, ids, lesson, by_window)
        return found if by_window or calls.count(False) < step else found * math.nan

    monkeypatch.setattr(training_module.Student, "forward", poisoned)
    found = distilled()
    assert found.record.ended == f"the loss of step {step} was not finite"
    assert found.record.steps == step - 1
    assert [point.step for point in found.record.curve] == list(range(step))
    assert found.record.best.divergence == min(point.divergence for point in found.record.curve)
    assert all(value.isfinite().all() for value in found.changes.values())


@pytest.mark.parametrize(
    ("divergences", "ended"),
    [
        ([1.0, *([2.0] * 15)], True),
        ([1.0, *(2.0 - 0.05 * look for look in range(15))], False),  # on the way back from a high rate
        ([1.0, 0.9, *([2.0] * 14)], False),
        ([1.0, *([2.0] * 13), 1.5, 1.9], False),  # from 2.0, three looks before
        ([1.0, *([2.0] * 12), 1.5, 1.6, 1.7], False),
        ([1.0, *([2.0] * 11), 1.5, 1.6, 1.7, 1.6], True),
    ],
)
def test_no_gain_ends_it_but_not_on_the_way_down(
    monkeypatch: pytest.MonkeyPatch, divergences: list[float], ended: bool
) -> None:
    given = iter(divergences)
    monkeypatch.setattr(
        training_module.Training,
        "_held_out_losses",
        lambda self: torch.full((3, 4), next(given), dtype=torch.float64),
    )
    teacher = tiny_model()
    own, dense = Student(student_of(teacher), 0.0), Teacher(teacher, torch.device("cpu"), False)
    batches = Batches(HeldWindows(WINDOWS), 4, 1)
    parameters = dict(own.model.named_parameters())
    training = Training(own, dense, batches, Settings(steps=40, batch=4), parameters, Processes())
    for _ in divergences:
        training.look()
        training.step += 1
    assert bool(training.ended) == ended


def test_record_as_json() -> None:
    record = distilled().record
    assert Distillation.from_json(record.as_json()) == record
    for broken in (None, [], {}, record.as_json() | {"curve": 3}, record.as_json() | {"kept_step": 99}):
        assert Distillation.from_json(broken) is None
    lost = record.as_json()["curve"][0] | {"step": math.inf}
    assert Distillation.from_json(record.as_json() | {"curve": [lost, *record.as_json()["curve"]]}) is None


def test_a_point_where_the_student_overflowed_is_valid_json() -> None:
    point = Point(3, 60, math.nan, Difference(math.inf, math.nan))
    found = Point.from_json(json.loads(json.dumps(point.as_json(), allow_nan=False)))
    assert (found.step, found.tokens, found.divergence, found.excess.mean) == (3, 60, math.inf, math.inf)


def test_recipes() -> None:
    """The step's changes and its record are in the plan, on disk too; the dense model stays as it is."""
    model, windows = tiny_model(), random_windows(6, 40)
    before = copy.deepcopy(model.state_dict())
    plan = ghostssm.Calibration(model, windows).plan("ghost+repair+distill6", 4)
    assert plan.method == "ghost+repair+distill6"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (record,) = plan.distillations
    assert (record.steps, record.text_sha256) == (6, windows.text_fingerprint)
    with pruned(model, plan) as smaller:
        assert smaller.get_parameter("backbone.layers.0.mixer.in_proj.weight").shape[0] == 64 * 2 + 8 + 8
    assert ghostssm.Recipe.parse("ghost+distill").steps[0].amount == 300


def test_plans_on_disk(tmp_path: Any) -> None:
    model = tiny_model()
    plan = ghostssm.Calibration(model, random_windows(6, 40)).plan("ghost+distill2", 4)
    plan.save(tmp_path)
    again = ghostssm.Plan.read(tmp_path)
    assert again.distillations == plan.distillations
    assert again.changes.keys() == plan.changes.keys()


@pytest.mark.parametrize("recipe", ["balanced+distill4", "balanced+per-layer+distill4", "output+per-layer+distill4"])
def test_own_class(recipe: str) -> None:
    """Projections learn too, and the plan applied to the dense model gives what was trained."""
    model, windows = tiny_model(), random_windows(8, 40)
    calibration = ghostssm.Calibration(model, windows)
    plain, plan = (calibration.plan(name, 4, multiple=1) for name in (recipe.replace("+distill4", ""), recipe))
    with pruned(model, plain) as before, pruned(model, plan) as after:
        held_out = Batches(HeldWindows(windows), 1, 0).held_out
        first, last = (_divergence(each, model, held_out) for each in (before, after))
    assert plan.distillations[0].best.divergence == pytest.approx(last, rel=1e-3)
    assert plan.distillations[0].curve[0].divergence == pytest.approx(first, rel=1e-3)


def test_padded_groups_stay_padded() -> None:
    """Channels of zeros have no gradient; a plan holds none of them."""
    model, windows = tiny_model(n_groups=2), random_windows(8, 40)
    plan = ghostssm.Calibration(model, windows).plan("taylor+distill4", 4, groups="pooled")
    assert len(set(plan.widths)) > 1 or any(len(set(map(len, s.kept))) > 1 for s in plan.selections.values())
    smaller = apply_plan(copy.deepcopy(model), plan)
    held_out = Batches(HeldWindows(windows), 1, 0).held_out
    assert plan.distillations[0].best.divergence == pytest.approx(_divergence(smaller, model, held_out), rel=1e-3)


def test_faults() -> None:
    for wrong, message in (
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": -1.0}, "learning rate is -1.0"),
        ({"hidden_weight": math.nan}, "hidden weight is nan"),
    ):
        with pytest.raises(InputError, match=message):
            Settings(**wrong)
    with pytest.raises(InputError, match="A batch of 4 windows can't be divided into 3 parts"):
        distilled(Settings(batch=4, accumulate=3))
