"""Samples of the recurrence, against plain loops and finite differences in float64."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostssm.calibration.samples import OutputSamples, _mixed, sample_outputs
from ghostssm.models.mixer import Mixer, Streams, mixer_output, scanned
from ghostssm.ops.ssd import ssd_reference
from tests.calibration.reference import mixer_and_streams, reference_maps, reference_samples, reference_states

NORMS = ["falcon_h1", "falcon_h1-norm", "falcon_h1-norm-first"]
"""No norm, gate first, norm first; each with two groups."""


def taken(mixer: Mixer, s: Streams, **options: Any) -> OutputSamples:
    return sample_outputs(mixer, [(s, scanned(mixer, s))], s.dt.shape[0] * s.dt.shape[1], **options)


def rotation(seed: int) -> Tensor:
    """Random signs, then the cosine transform, of an output of 32, entry by entry."""
    signs = torch.randint(0, 2, (32,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    rows = [[math.cos(math.pi * j * (2 * k + 1) / 64) / 4 for k in range(32)] for j in range(32)]
    return (
        torch.tensor(rows, dtype=torch.float64)
        * signs
        * torch.tensor([0.5**0.5] + 31 * [1.0], dtype=torch.float64)[:, None]
    )


def test_a_rotation_keeps_lengths() -> None:
    torch.testing.assert_close(rotation(5) @ rotation(5).T, torch.eye(32, dtype=torch.float64))


@pytest.mark.parametrize("length", [24, 150])
@pytest.mark.parametrize(("n_groups", "case"), [(1, None), (2, None), *((2, case) for case in NORMS)])
def test_samples_are_those_of_a_loop_that_stops_at_every_token(n_groups: int, case: str | None, length: int) -> None:
    mixer, s = mixer_and_streams(n_groups, length, case)
    found = taken(mixer, s, samples=length, directions=3, seed=5)
    assert len(found) == length
    generator = torch.Generator().manual_seed(_mixed(5, 0))
    shift = int(torch.randint(2, (), generator=generator))
    order = torch.randperm(32, generator=generator).repeat(length)[: length // 2 * 3].view(-1, 3)
    expected = reference_samples(mixer, s, range(shift, length, 2), math.sqrt(32) * rotation(5)[order])
    for field in fields(OutputSamples):
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), msg=field.name)


@pytest.mark.parametrize(("n_groups", "case"), [(1, None), (2, None), *((2, case) for case in NORMS)])
def test_gram_is_the_exact_change_at_the_scale_of_the_whole_output(n_groups: int, case: str | None) -> None:
    mixer, s = mixer_and_streams(n_groups, case=case)
    gram = taken(mixer, s, directions=32).output_gram()
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
    samples = taken(mixer, s, directions=32)
    amount, direction = 1e-6, torch.rand(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def output(C: Tensor) -> Tensor:
        y, _ = ssd_reference(s.x, s.dt, mixer.A, s.B, C, mixer.D)
        return mixer_output(mixer, y, s.z)

    change = (output(s.C * (1 + amount * direction)) - output(s.C * (1 - amount * direction))) / (2 * amount)
    weights = direction.flatten()
    expected = change.square().sum(-1).mean().item()
    assert (weights @ samples.output_gram(1.0) @ weights).item() == pytest.approx(expected, rel=1e-6)


def test_random_directions_estimate_the_same_gram() -> None:
    mixer, s = mixer_and_streams(length=400)
    exact = taken(mixer, s, directions=32).output_gram()
    estimate = taken(mixer, s, directions=8).output_gram()
    assert (estimate - exact).norm() < 0.1 * exact.norm()
    assert len(taken(mixer, s, samples=100)) == 100


def test_gramians_are_those_of_the_definition() -> None:
    mixer, s = mixer_and_streams()
    samples = taken(mixer, s, directions=32)
    readouts = s.C.flatten(0, 1)
    expected = torch.einsum("tgn,tgm->gnm", readouts, readouts) / 48
    torch.testing.assert_close(samples.observability(), expected)
    maps = reference_maps(mixer, s)
    torch.testing.assert_close(samples.controllability(), torch.einsum("tgdn,tgdm->gnm", maps, maps) / 48)


def test_split_keeps_every_sample_once() -> None:
    mixer, s = mixer_and_streams()
    samples = taken(mixer, s)
    first, last = samples.split(0.25)
    assert len(last) == 12
    assert torch.equal(torch.cat([first.maps, last.maps]), samples.maps)
    assert isinstance(replace(first), OutputSamples)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_a_share_is_what_takes_that_much_off_every_map(n_groups: int) -> None:
    mixer, s = mixer_and_streams(n_groups)
    samples, share = taken(mixer, s, directions=5), 0.7
    maps = samples.maps - share * samples.directions[..., None] * samples.along[:, :, None]
    plain = replace(samples, maps=maps, along=torch.zeros_like(samples.along))
    torch.testing.assert_close(samples.output_gram(share), plain.output_gram())
    torch.testing.assert_close(samples.controllability(share), plain.controllability())
    readouts = torch.randn(samples.readouts.shape, dtype=torch.float64, requires_grad=True)
    output = torch.einsum("sgdn,sgn->sd", maps, readouts)
    (0.5 * output.square().sum()).backward()
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        parts = {field.name: getattr(samples, field.name).to(dtype) for field in fields(OutputSamples)}
        found, pull = OutputSamples(**parts).read(readouts.detach().to(dtype), share)
        torch.testing.assert_close(found.double(), output.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(pull.double(), readouts.grad, rtol=tolerance, atol=tolerance)
