"""Samples of the recurrence, against plain loops and finite differences in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ghostssm.calibration.samples import OutputSamples, sample_outputs, states_at
from ghostssm.models.mixer import mixer_output
from ghostssm.ops.ssd import ssd_reference
from tests.calibration.reference import mixer_and_streams, reference_maps, reference_states

NORMS = ["falcon_h1", "falcon_h1-norm", "falcon_h1-norm-first"]
"""No norm, gate first, norm first; each with two groups."""


@pytest.mark.parametrize("n_groups", [1, 2])
def test_states_are_the_recurrences(n_groups: int) -> None:
    mixer, streams = mixer_and_streams(n_groups)
    states = reference_states(mixer, streams)
    for position, state in states_at(mixer, streams, [0, 5, 6, 23]):
        torch.testing.assert_close(state, states[position])


@pytest.mark.parametrize(("n_groups", "case"), [(1, None), (2, None), *((2, case) for case in NORMS)])
def test_gram_is_the_exact_change_at_the_scale_of_the_whole_output(n_groups: int, case: str | None) -> None:
    mixer, s = mixer_and_streams(n_groups, case=case)
    gram = sample_outputs(mixer, [s], tokens=48, directions=None).output_gram()
    removed = torch.rand(n_groups, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    states = reference_states(mixer, s)
    total = 0.0
    for t, state in enumerate(states):
        heads = n_groups * torch.arange(8) // 8
        y = (state * s.C[:, t, heads][:, :, None]).sum(-1) + mixer.D[:, None] * s.x[:, t]
        lost = (state * (s.C[:, t] * removed)[:, heads][:, :, None]).sum(-1)
        gate = torch.nn.functional.silu(s.z[:, t]).view_as(y)
        change = (lost * gate).view(2, n_groups, -1)
        if mixer.norm is not None:
            normalised = (y * gate if mixer.norm.gate_first else y).view(2, n_groups, -1)
            rms = (normalised.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt()
            change = change / rms * mixer.norm.weight.view(n_groups, -1)
        change = change.flatten(1)
        total += (change @ mixer.out_proj.weight.T).square().sum().item()
    mask = removed.double().flatten()
    assert (mask @ gram @ mask).item() == pytest.approx(total / 48, rel=1e-9)


@pytest.mark.parametrize("case", [None, *NORMS])
def test_a_share_of_one_is_the_derivative_of_the_whole_mixer(case: str | None) -> None:
    mixer, s = mixer_and_streams(case=case)
    samples = sample_outputs(mixer, [s], tokens=48, directions=None).with_share(1.0)
    amount, direction = 1e-6, torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def output(C: Tensor) -> Tensor:
        y, _ = ssd_reference(s.x, s.dt, mixer.A, s.B, C, mixer.D)
        return mixer_output(mixer, y, s.z)

    change = (output(s.C * (1 + amount * direction)) - output(s.C * (1 - amount * direction))) / (2 * amount)
    weights = direction.flatten()
    expected = change.square().sum(-1).mean().item()
    assert (weights @ samples.output_gram() @ weights).item() == pytest.approx(expected, rel=1e-6)


def test_random_directions_estimate_the_same_gram() -> None:
    mixer, s = mixer_and_streams(length=400)
    exact = sample_outputs(mixer, [s], tokens=800, directions=None).output_gram()
    estimate = sample_outputs(mixer, [s], tokens=800, directions=16).output_gram()
    assert (estimate - exact).norm() < 0.1 * exact.norm()
    assert len(sample_outputs(mixer, [s], tokens=800, samples=100)) == 100


def test_gramians_are_those_of_the_definition() -> None:
    mixer, s = mixer_and_streams()
    samples = sample_outputs(mixer, [s], tokens=48, directions=None)
    readouts = s.C.flatten(0, 1)
    expected = torch.einsum("tgn,tgm->gnm", readouts, readouts) / 48
    torch.testing.assert_close(samples.observability(), expected)
    maps = reference_maps(mixer, s)
    torch.testing.assert_close(samples.controllability(), torch.einsum("tgdn,tgdm->gnm", maps, maps) / 48)


def test_split_keeps_every_sample_once() -> None:
    mixer, s = mixer_and_streams()
    samples = sample_outputs(mixer, [s], tokens=48)
    first, last = samples.split(0.25)
    assert len(last) == 12
    assert torch.equal(torch.cat([first.maps, last.maps]), samples.maps)
    assert isinstance(replace(first), OutputSamples)
