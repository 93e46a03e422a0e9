"""Gate gradients against finite differences of the loss."""

from __future__ import annotations

import torch

from ghostssm.calibration.gradients import gate_saliency
from ghostssm.models.families import mixers_of
from ghostssm.models.forward import replaced_forward
from ghostssm.models.mixer import mixer_forward
from tests.conftest import random_windows, tiny_model


def test_saliency_is_the_squared_slope_of_the_loss_in_each_gate() -> None:
    model, windows = tiny_model(n_groups=2, num_hidden_layers=2), random_windows(2, 30)
    saliency = gate_saliency(model, windows.ids)
    model = model.double()
    mixers = mixers_of(model)
    step = 1e-2  # transformers computes norms and logits in float32
    for name, group, channel in ((mixers[0].name, 0, 3), (mixers[1].name, 1, 11)):
        squares = []
        for window in windows.ids:
            losses = []
            for sign in (1, -1):
                gate = torch.ones(2, 16, dtype=torch.float64)
                gate[group, channel] += sign * step

                def gated(mixer, hidden_states, name=name, gate=gate, **_):  # type: ignore[no-untyped-def]
                    return mixer_forward(mixer, hidden_states, gate if mixer.name == name else None)

                with torch.no_grad(), replaced_forward(mixers, gated):
                    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
                    losses.append(torch.nn.functional.cross_entropy(logits.double(), window[1:]))
            squares.append(((losses[0] - losses[1]) / (2 * step)) ** 2)
        expected = torch.stack(squares).mean()
        torch.testing.assert_close(saliency[name][group, channel], expected, rtol=1e-2, atol=1e-9)


def test_stock_forward_is_back_in_place_afterwards() -> None:
    model = tiny_model()
    gate_saliency(model, random_windows(1, 10).ids)
    assert all("forward" not in mixer.module.__dict__ for mixer in mixers_of(model))
