"""What others add from outside, each by one registration: a method, a recovery step, a model family, an engine.

A dialect of its own is in tests/checkpoint/test_dialects.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel

import ghostssm
from ghostssm.engines import advice, rules
from ghostssm.methods import base as methods
from ghostssm.models.families import Family
from ghostssm.models.families import registry as families
from ghostssm.models.families.stock import MAMBA2
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.surgery import apply_plan, pruned
from ghostssm.recovery import base as recovery
from tests.conftest import random_windows, tiny_model


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, registry in ((methods, "_METHODS"), (recovery, "_STEPS"), (families, "_FAMILIES")):
        monkeypatch.setattr(module, registry, dict(getattr(module, registry)))


def test_a_method() -> None:
    """Its score is asked with evidence that is worked out for it, and it has repairs and sizes per layer."""

    def last_channels(evidence: ghostssm.Evidence) -> Tensor:
        assert evidence.statistics.tokens == 120
        return torch.arange(16.0).expand(evidence.layout.n_groups, 16)

    ghostssm.register_method(ghostssm.Method("last", "the last channels", last_channels))
    plan = ghostssm.Calibration(tiny_model(), random_windows(2, 60)).plan("last+repair", 4)
    assert {selection.kept for selection in plan.selections.values()} == {((12, 13, 14, 15),)}
    assert plan.changes


def test_a_method_that_decides_on_the_unpruned_model() -> None:
    """Its decisions count, not its scores."""

    def decide(evidence: ghostssm.Evidence, cut: Any) -> Decision:
        return Decision(Selection((tuple(range(cut.state_size)),) * evidence.layout.n_groups))

    def score(evidence: ghostssm.Evidence) -> Tensor:
        return torch.arange(16.0).expand(evidence.layout.n_groups, 16)

    ghostssm.register_method(ghostssm.Method("first", "the first channels", score, decide=decide, one_shot=True))
    plan = ghostssm.Calibration(tiny_model(), random_windows(2, 60)).plan("first", 4)
    assert {selection.kept for selection in plan.selections.values()} == {((0, 1, 2, 3),)}


def test_a_step_of_mixer_scope() -> None:
    seen: list[tuple[int, int]] = []

    def halve(block: Any, amount: int, seed: int) -> None:
        seen.append((amount, len(block.dense_outputs)))
        with torch.no_grad():
            block.mixer.D.div_(2)

    ghostssm.register_step(ghostssm.MixerStep("halve", "half of D", halve, default_amount=3))
    model = tiny_model()
    plan = ghostssm.Calibration(model, random_windows(2, 60)).plan("random+halve", 4)
    assert (plan.method, seen) == ("random+halve3", [(3, 1)] * 3)
    with pruned(model, plan) as smaller:
        halved = {name: value.clone() for name, value in smaller.named_parameters() if name.endswith(".D")}
    assert len(halved) == 3
    for name, value in halved.items():
        assert torch.equal(value, model.get_parameter(name) / 2)


def test_a_step_of_model_scope() -> None:
    """It gets the pruned and the dense model, and what it changes is in the plan by full names."""
    windows, model = random_windows(2, 60), tiny_model()

    def louder(student: PreTrainedModel, teacher: PreTrainedModel, text: ghostssm.Windows, *rest: Any) -> None:
        assert text is windows
        assert (student.config.state_size, teacher.config.state_size) == (4, 16)
        with torch.no_grad():
            student.get_parameter("backbone.norm_f.weight").mul_(2)

    ghostssm.register_step(ghostssm.ModelStep("louder", "twice the last norm", louder))
    before = model.backbone.norm_f.weight.detach().clone()
    plan = ghostssm.Calibration(model, windows).plan("ghost+louder", 4)
    assert list(plan.changes) == ["backbone.norm_f.weight"]
    assert torch.equal(model.backbone.norm_f.weight, before)
    apply_plan(model, plan)
    assert torch.equal(model.backbone.norm_f.weight, 2 * before)
    recipe = ghostssm.Recipe.parse("ghost+louder")
    with pytest.raises(ghostssm.InputError, match="louder changes the whole model at once, so it can't be streamed"):
        recipe.check_streamable()


def test_a_family() -> None:
    class OtherConfig(Mamba2Config):  # type: ignore[misc]
        model_type = "mamba2_by_others"

    class OtherModel(Mamba2ForCausalLM):  # type: ignore[misc]
        config_class = OtherConfig

    families.register(Family(**vars(MAMBA2) | {"model_type": "mamba2_by_others"}))
    torch.manual_seed(0)
    sizes = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "head_dim": 8}
    model = OtherModel(OtherConfig(**sizes, num_heads=8, n_groups=1))
    plan = ghostssm.Calibration(model, random_windows(2, 40)).plan("ghost+repair", 4)
    assert plan.model_type == "mamba2_by_others"
    assert apply_plan(model, plan).config.state_size == 4


@pytest.fixture
def _an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rules.Rule(lambda layout, _: layout.state_size % 5 == 0, "no", "fives", "takes multiples of 5 only")
    engine = rules.Engine("fives", "1", (whole,), None, source="this test")
    known = (*rules.ENGINES, engine)
    for module in (rules, advice):
        monkeypatch.setattr(module, "ENGINES", known)


@pytest.mark.usefixtures("_an_engine")
def test_an_engine() -> None:
    layout = ghostssm.SSDLayout(hidden_size=32, num_heads=8, head_dim=8, n_groups=1, state_size=16, conv_kernel=4)
    assert "fives" in ghostssm.engine_names()
    assert ghostssm.nearest_state_size(8, layout, "mamba2", ["fives"]) == 10
