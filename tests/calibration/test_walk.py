"""The walk over the layers, against the model's own forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba2 import modeling_mamba2

from ghostssm.calibration import open_block
from ghostssm.calibration.walk import LayerWalk
from ghostssm.errors import NumericalError
from ghostssm.models.mixer import Projection, mixer_streams
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.surgery import pruned
from ghostssm.pruning.run import Calibration
from ghostssm.text.windows import Windows
from tests.calibration.reference import change_when_applied
from tests.conftest import random_windows, tiny_model


def walked(model: Any, windows: Windows) -> Tensor:
    """Hidden states after the last block, before the final norm."""
    walk = LayerWalk(model, windows)
    for block in walk.blocks():
        block.advance()
    return walk.hidden


@pytest.mark.parametrize("overrides", [{}, {"n_groups": 4, "use_bias": True}, {"time_step_limit": (0.05, 0.3)}])
def test_an_unpruned_walk_ends_where_the_model_ends(overrides: dict[str, Any]) -> None:
    """Both in float32, measured by their distance from a walk in float64."""
    model = tiny_model(**overrides)
    windows = random_windows(3, 700)  # two windows in a batch, one left over
    with torch.inference_mode():
        stock = model(windows.ids, output_hidden_states=True).hidden_states[-2]
    own = walked(model, windows)
    exact = walked(copy.deepcopy(model).double(), windows)
    scale = exact.square().mean().sqrt()
    stock_error, own_error = ((hidden - exact).square().mean().sqrt() / scale for hidden in (stock, own))
    assert stock_error < 1e-5
    assert own_error < 1.2 * stock_error


def test_statistics_are_on_what_transformers_gives_its_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan's arguments are recorded inside transformers; scores by brute force from them, in float64."""
    model, windows = tiny_model(n_groups=2), random_windows(2, 50)
    calls: list[tuple[Any, ...]] = []
    stock = modeling_mamba2.mamba2_chunk_scan

    def recording(x: Any, dt: Any, A: Any, B: Any, C: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((x, dt, A, B, C, kwargs["dt_bias"]))
        return stock(x, dt, A, B, C, *args, **kwargs)

    monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", recording)
    with torch.inference_mode():
        model(windows.ids)
    monkeypatch.undo()

    walk = LayerWalk(model, windows)
    for block, (x, dt, A, B, C, dt_bias) in zip(walk.blocks(), calls, strict=True):
        statistics = block.statistics()
        step = torch.nn.functional.softplus(dt.double() + dt_bias.double())
        state = torch.zeros(2, 8, 8, 16, dtype=torch.float64)
        expected = torch.zeros(2, 16, dtype=torch.float64)
        for t in range(50):
            heads_B = B[:, t].double().repeat_interleave(4, dim=1)
            heads_C = C[:, t].double().repeat_interleave(4, dim=1)
            decay = torch.exp(step[:, t] * A.double())[..., None, None]
            state = state * decay + (step[:, t, :, None] * x[:, t].double())[..., None] * heads_B[:, :, None]
            contribution = (state * heads_C[:, :, None]).square().sum((0, 2))
            expected += contribution.unflatten(0, (2, 4)).sum(1)
        torch.testing.assert_close(statistics.output_energy * statistics.tokens, expected, rtol=1e-4, atol=0)
        assert statistics.tokens == 100
        block.advance()


def test_the_model_is_left_alone_and_half_precision_is_calibrated_in_float32() -> None:
    model = tiny_model().to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    walk = LayerWalk(model, random_windows(1, 40))
    for block in walk.blocks():
        assert {parameter.dtype for parameter in block.present_mixer.module.parameters()} == {torch.float32}
        block.advance()
    assert walk.hidden.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_activations_that_overflow_name_their_layer() -> None:
    model = tiny_model()
    model.backbone.layers[1].mixer.out_proj.weight.data.fill_(3e38)
    walk = LayerWalk(model, random_windows(1, 20))
    blocks = walk.blocks()
    next(blocks).advance()
    second = next(blocks)
    with pytest.raises(NumericalError, match=r"layers\.1\.mixer"):
        second.advance()


@pytest.mark.parametrize("kept_bytes", [0, 10**6, 10**9])
def test_kept_streams_change_nothing(monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    model, windows = tiny_model(n_groups=2), random_windows(5, 600)
    decision = Decision(Selection(((0, 3, 5), (2,))))
    hidden = []
    for limit in (kept_bytes, 0):
        monkeypatch.setattr(open_block, "KEPT_STREAM_BYTES", limit)
        walk = LayerWalk(model, windows)
        for block in walk.blocks():
            block.statistics()
            block.prune(decision).advance()
        hidden.append(walk.hidden)
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-5, atol=1e-5)


def test_a_pruned_walk_ends_where_the_pruned_model_ends() -> None:
    model, windows = tiny_model(n_groups=2, use_bias=True), random_windows(3, 100)
    plan = Calibration(model, windows).plan("ghost", 3, groups="pooled")
    walk = LayerWalk(model, windows)
    for block in walk.blocks():
        block.prune(plan.decisions[block.present_mixer.name]).advance()
    with pruned(model, plan), torch.inference_mode():
        expected = model.backbone(windows.ids, use_cache=False).last_hidden_state
        error = (model.backbone.norm_f(walk.hidden) - expected).square().mean().sqrt()
    assert error < 1e-5 * expected.square().mean().sqrt()


@pytest.mark.parametrize("kept", [True, False])
def test_measured_changes_are_those_of_the_decisions_when_applied(kept: bool) -> None:
    """Each its own, also from streams that scoring left behind."""
    maps = torch.randn(2, 2, 16, 5, generator=torch.Generator().manual_seed(0)) / 4
    everything = Selection((tuple(range(16)),) * 2)
    decisions = [
        Decision(Selection(((), ()))),
        Decision(Selection(((0, 3, 5), (2,)))),
        Decision(everything, Projection(*maps)),
        Decision(everything),
    ]
    walk = LayerWalk(tiny_model(n_groups=2), random_windows(3, 700))  # in two batches
    for block in walk.blocks():
        expected = [change_when_applied(block, decision) for decision in decisions]
        if kept:
            assert len(list(block.streams())) == 2
        assert block.changes(decisions) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert len(set(expected)) == len(decisions)
        block.advance()


@pytest.mark.parametrize("part", ["in_proj.weight", "conv1d.weight", "dt_bias", "projection"])
def test_kept_streams_are_forgotten_when_a_recovery_step_writes_behind_them(part: str) -> None:
    maps = Projection(*torch.randn(2, 2, 16, 5, generator=torch.Generator().manual_seed(0)) / 4)
    walk = LayerWalk(tiny_model(n_groups=2), random_windows(3, 40))
    block = next(walk.blocks())
    dense = next(block.streams())
    pruned = block.prune(Decision(Selection((tuple(range(16)),) * 2), maps), keep_outputs=True)
    mixer = pruned.present_mixer
    assert pruned._kept
    torch.testing.assert_close(next(pruned.streams()).B, dense.project(maps).B)
    with torch.no_grad():
        written = maps.B if part == "projection" else mixer.module.get_parameter(part)
        written += 1
    with torch.inference_mode():
        fresh = mixer_streams(mixer, next(pruned.inputs()))
    found = next(pruned.streams())
    torch.testing.assert_close((found.B, found.dt), (fresh.B, fresh.dt), rtol=0, atol=0)
