"""Every method's score against its definition in docs/methods.md, from states that were made token by token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from ghostssm.calibration.gradients import gate_saliency
from ghostssm.calibration.samples import sample_outputs
from ghostssm.calibration.statistics import gather_statistics
from ghostssm.methods import Evidence, method_named, method_names
from ghostssm.methods.base import Known
from ghostssm.methods.selection import Cut
from ghostssm.models.families import mixers_of
from ghostssm.models.forward import replaced_forward
from ghostssm.models.mixer import Mixer, Streams, mixer_output, mixer_streams, scanned
from ghostssm.ops.ssd import ssd_reference
from tests.calibration.reference import mixer_and_streams, reference_maps, reference_states
from tests.conftest import random_windows, tiny_model

Definition = Callable[[Mixer, Streams], Tensor]


def stored(mixer: Mixer, s: Streams) -> Tensor:
    """E[sum over heads and rows of H^2], (g, n)."""
    energy = reference_states(mixer, s).square().sum(3)  # (l, b, h, n)
    return energy.unflatten(2, (mixer.layout.n_groups, -1)).sum(3).mean((0, 1))


def read(mixer: Mixer, s: Streams) -> Tensor:
    """E[C^2], (g, n)."""
    return s.C.square().mean((0, 1))


def change_of_y(mixer: Mixer, s: Streams) -> Tensor:
    """Each channel is zeroed in turn and the recurrence run again."""
    whole, _ = ssd_reference(s.x, s.dt, mixer.A, s.B, s.C, mixer.D)
    changes = torch.empty_like(s.C[0, 0])
    for group, channel in product(*map(range, changes.shape)):
        C = s.C.clone()
        C[:, :, group, channel] = 0
        y, _ = ssd_reference(s.x, s.dt, mixer.A, s.B, C, mixer.D)
        changes[group, channel] = (y - whole).square().sum((2, 3)).mean().sqrt()
    return changes


def change_of_output(mixer: Mixer, s: Streams) -> Tensor:
    """Of each channel alone, the norm at the scale of the whole output."""
    readouts = s.C.transpose(0, 1).flatten(0, 1)
    return (reference_maps(mixer, s) * readouts[:, :, None]).square().sum(2).mean(0).sqrt()


def gramians(mixer: Mixer, s: Streams) -> tuple[Tensor, Tensor]:
    """W_c and W_o, each (g, n, n)."""
    maps, readouts = reference_maps(mixer, s), s.C.flatten(0, 1)
    W_c = torch.einsum("tgdn,tgdm->gnm", maps, maps) / len(maps)
    return W_c, torch.einsum("tgn,tgm->gnm", readouts, readouts) / len(readouts)


def hankel_values(mixer: Mixer, s: Streams) -> Tensor:
    """Square roots of the eigenvalues of W_c W_o."""
    W_c, W_o = gramians(mixer, s)
    return torch.linalg.eigvals(W_c @ W_o).real.clamp_min(0).sqrt().sort(descending=True).values


def length_of_rows(mixer: Mixer, s: Streams) -> Tensor:
    norms = mixer.in_proj.weight.square().sum(1).sqrt()
    return (norms[mixer.layout.in_proj_B] * norms[mixer.layout.in_proj_C]).view(mixer.layout.n_groups, -1)


def ones(mixer: Mixer, s: Streams) -> Tensor:
    return torch.ones_like(s.C[0, 0])


DEFINITIONS: dict[str, Definition] = {
    "ghost": change_of_y,
    "product": lambda mixer, s: (read(mixer, s) * stored(mixer, s)).sqrt(),
    "controllability": lambda mixer, s: stored(mixer, s).sqrt(),
    "observability": lambda mixer, s: read(mixer, s).sqrt(),
    "output": change_of_output,
    "output-single": change_of_output,
    "rrqr": lambda mixer, s: torch.stack(
        [(W_c * W_o).diagonal() for W_c, W_o in zip(*gramians(mixer, s), strict=True)]
    ).sqrt(),
    "balanced": hankel_values,
    "magnitude": length_of_rows,
    "sparsegpt": ones,
    "sparsegpt-all": ones,
}
"""The others are random, which has none, and the gradients below."""


@pytest.fixture(scope="module")
def case() -> tuple[Mixer, Streams, Evidence]:
    """Two groups of four heads, and all that a method may look at but gradients."""
    mixer, s = mixer_and_streams()
    statistics = gather_statistics(mixer, [s], 1)
    samples = sample_outputs(mixer, [(s, scanned(mixer, s))], tokens=48, directions=32)
    return mixer, s, Evidence(mixer.layout, mixer.in_proj.weight, 0, Known(statistics, samples))


def test_every_method_has_its_definition() -> None:
    assert {*DEFINITIONS, "random", "taylor", "taylor-layer"} == set(method_names())


@pytest.mark.parametrize("method", DEFINITIONS)
def test_scores_are_those_of_the_definition(method: str, case: tuple[Mixer, Streams, Evidence]) -> None:
    mixer, s, evidence = case
    expected = DEFINITIONS[method](mixer, s)
    found = method_named(method).score(evidence)
    # Balanced adds a ridge of 1e-8, which the smallest singular values feel.
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-3 * expected.min().item())


def test_rrqr_keeps_a_large_volume_of_both_gramians(case: tuple[Mixer, Streams, Evidence]) -> None:
    mixer, s, evidence = case
    decide = method_named("rrqr").decide
    assert decide is not None
    W_c, W_o = gramians(mixer, s)
    for gram, kept in zip(W_c * W_o, decide(evidence, Cut(6)).selection.kept, strict=True):
        assert len(kept) == 6
        volume = gram[kept, :][:, kept].logdet()
        for out, new in product(kept, set(range(16)) - set(kept)):
            swapped = sorted({*kept, new} - {out})
            assert gram[swapped, :][:, swapped].logdet() <= volume + 0.02


@pytest.mark.parametrize("method", ["taylor", "taylor-layer"])
def test_taylor_is_the_mean_squared_gradient_of_a_gate(method: str) -> None:
    """Of the loss of each window, by autograd through the recurrence token by token."""
    model, windows = tiny_model(n_groups=2, num_hidden_layers=2), random_windows(3, 20)
    saliency = gate_saliency(model, windows.ids)
    mixers = mixers_of(model)
    gates = {mixer.name: torch.ones(2, 16, requires_grad=True) for mixer in mixers}

    def gated(mixer: Mixer, hidden_states: Tensor, **_: object) -> Tensor:
        s = mixer_streams(mixer, hidden_states)
        y, _ = ssd_reference(s.x, s.dt, mixer.A, s.B, s.C * gates[mixer.name], mixer.D)
        return mixer_output(mixer, y, s.z)

    squares = {mixer.name: torch.zeros(2, 16) for mixer in mixers}
    with replaced_forward(mixers, gated):
        for window in windows.ids:
            loss = model(window[None], labels=window[None], use_cache=False).loss
            for name, slope in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                squares[name] += slope.square() / 3
    for index, mixer in enumerate(mixers):
        evidence = Evidence(mixer.layout, mixer.in_proj.weight, index, Known(known_saliency=saliency[mixer.name]))
        expected = squares[mixer.name].sqrt()
        found = method_named(method).score(evidence).float()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.max().item())
