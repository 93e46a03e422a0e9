"""Local refit: what it touches, and that it never ends worse than it began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ghostssm.models.families import mixers_of
from ghostssm.models.forward import fast_forward
from ghostssm.models.mixer import Mixer, Projection, mixer_forward
from ghostssm.ops.state_format import StateStorage
from ghostssm.recovery.refit import RefitData, joined, refit
from tests.conftest import tiny_model


def prepared(windows: int = 9, n_groups: int = 2, projected: bool = False) -> tuple[Mixer, torch.Tensor, torch.Tensor]:
    """A mixer whose B and C rows were disturbed, its inputs, and what it gave before."""
    mixer = mixers_of(tiny_model(n_groups=n_groups, use_bias=True))[0]
    hidden = torch.randn(windows, 48, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = mixer_forward(mixer, hidden)
        rows = slice(mixer.layout.in_proj_B.start, mixer.layout.in_proj_C.stop)
        mixer.in_proj.weight[rows] += 0.1 * torch.randn(mixer.in_proj.weight[rows].shape)
        if projected:
            maps = (torch.randn(n_groups, 16, 6) for _ in range(2))
            mixer = replace(mixer, projection=Projection(*maps))
    return mixer, hidden, target


def error(mixer: Mixer, hidden: torch.Tensor, target: torch.Tensor) -> float:
    with torch.no_grad():
        return (mixer_forward(mixer, hidden) - target).square().mean().item()


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("projected", [False, True])
def test_the_error_falls_by_as_much_as_is_said(n_groups: int, projected: bool) -> None:
    torch.manual_seed(0)
    mixer, hidden, target = prepared(n_groups=n_groups, projected=projected)
    held_out = torch.arange(len(hidden)) % 8 == 1
    before = error(mixer, hidden[held_out], target[held_out])
    ratio = refit(mixer, RefitData.of(mixer, hidden, target), steps=60)
    assert ratio < 0.75
    assert error(mixer, hidden[held_out], target[held_out]) == pytest.approx(ratio * before, rel=1e-3)


@pytest.mark.parametrize("projected", [False, True])
def test_a_state_for_int4_is_rounded_while_it_is_refitted(projected: bool) -> None:
    """The error that falls is that of the mixer as it decodes, token by token in int4; other dtypes change nothing."""

    def refitted(state_dtype: str | None) -> tuple[Mixer, float, float]:
        torch.manual_seed(0)
        mixer, hidden, target = prepared(projected=projected)
        held_out = torch.arange(len(hidden)) % 8 == 1

        def rounded_error() -> float:
            with torch.no_grad():
                storage = StateStorage.of("int4")
                outputs = fast_forward(mixer, hidden[held_out], storage=storage, every_token=True)
            return (outputs - target[held_out]).square().mean().item()

        before = rounded_error()
        ratio = refit(mixer, RefitData.of(mixer, hidden, target), steps=40, state_dtype=state_dtype)
        return mixer, ratio, rounded_error() / before

    plain = refitted(None)[0]
    _, ratio, found = refitted("int4")
    assert found == pytest.approx(ratio, rel=1e-2)
    assert found < 0.95
    for name, value in refitted("fp8")[0].module.named_parameters():
        assert torch.equal(value, plain.module.get_parameter(name))


def test_only_the_small_tensors_change() -> None:
    torch.manual_seed(0)
    mixer, hidden, target = prepared()
    layout = mixer.layout
    before = {name: value.detach().clone() for name, value in mixer.module.named_parameters()}
    refit(mixer, RefitData.of(mixer, hidden, target), steps=20)
    after = dict(mixer.module.named_parameters())
    rows = slice(layout.in_proj_B.start, layout.in_proj_C.stop)
    channels = slice(layout.conv_B.start, layout.conv_C.stop)
    for name, part in {"in_proj.weight": rows, "in_proj.bias": rows, "conv1d.weight": channels}.items():
        changed = (
            (after[name] != before[name]).flatten(1).any(1) if after[name].ndim > 1 else after[name] != before[name]
        )
        assert changed[part].all(), name
        assert changed.sum() == len(changed[part]), name
    for name in ("out_proj.weight", "out_proj.bias"):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["D"], before["D"])


@pytest.mark.parametrize("windows", [1, 9])
def test_a_mixer_that_is_right_stays_as_it_is(windows: int) -> None:
    mixer, hidden, _ = prepared(windows)
    with torch.no_grad():
        target = mixer_forward(mixer, hidden)
    before = {name: value.detach().clone() for name, value in mixer.module.named_parameters()}
    assert refit(mixer, RefitData.of(mixer, hidden, target), steps=25) == 1
    assert all(torch.equal(value, before[name]) for name, value in mixer.module.named_parameters())


def test_data_arrives_in_batches() -> None:
    mixer, hidden, target = prepared()
    whole = RefitData.of(mixer, hidden, target)
    parts = joined([RefitData.of(mixer, hidden[:4], target[:4]), RefitData.of(mixer, hidden[4:], target[4:])])
    torch.testing.assert_close(parts.x, whole.x)
    torch.testing.assert_close(parts.dt, whole.dt)
    assert len(parts) == 9
