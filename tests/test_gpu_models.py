"""Whole models whose mixers run in the Triton kernels, against the stock models: from the prompt to decoded tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ghostssm import accelerate, restore
from ghostssm.calibration.scratch import Scratch
from ghostssm.calibration.statistics import gather_statistics
from ghostssm.models import forward as acceleration
from ghostssm.models.families import mixers_of
from ghostssm.models.mixer import mixer_streams
from ghostssm.ops import decode, energy, gpu, ssd
from ghostssm.plan.surgery import apply_plan
from ghostssm.pruning.run import Calibration
from tests.conftest import random_windows, tiny_model
from tests.families.tiny import stepwise, tiny_hybrid
from tests.modeling.test_ghost import tiny_ghost


@pytest.fixture
def device(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels' device; the test fails if anything but the kernels would run the recurrence."""
    for module, name in ((decode, "ssd_step_"), (ssd, "ssd_chunked"), (energy, "channel_energies_chunked")):
        monkeypatch.setattr(module, name, None)
    monkeypatch.setattr("ghostssm.ops.compiled.kernels", None)
    return triton_device


def check(model: Any, device: str, tolerance: float = 1e-4, **options: Any) -> None:
    ids = torch.randint(1, 288, (1, 5), generator=torch.Generator().manual_seed(1)).to(device)
    pieces = [3, 1, 1]
    with torch.inference_mode():
        expected = stepwise(model.to(device), ids, pieces)
        accelerate(model, **options)
        found = stepwise(model, ids, pieces)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("case", ["codestral-mamba", "falcon_h1", "falcon_h1-norm", "falcon_h1-norm-first", "granite"])
def test_families(case: str, device: str) -> None:
    """A norm or none, before the gate or after it, multipliers, no bias of the convolution, up to 8 groups."""
    check(tiny_hybrid(case, **({"num_hidden_layers": 1} if case == "codestral-mamba" else {})), device)


def test_the_norms_between_blocks_are_one_kernel_each(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_hidden_layers=1).to(device)
    ids = torch.randint(1, 288, (1, 4)).to(device)
    with torch.inference_mode():
        expected = stepwise(model, ids, [3, 1])
        accelerate(model)
        monkeypatch.setattr(type(model.backbone.norm_f), "forward", None)  # the stock one fails
        found = stepwise(model, ids, [3, 1])
        monkeypatch.undo()
        restore(model)
        again = stepwise(model, ids, [3, 1])
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(again, expected)


def test_uneven_state_sizes(device: str) -> None:
    check(tiny_model(state_size=7, n_groups=2, use_bias=True, num_hidden_layers=1), device)


def test_projected_states_and_sizes_per_layer(device: str) -> None:
    check(tiny_ghost(state_sizes=[16, 12, 16], projected_state_sizes=[5, 0, 9]), device)


def test_a_bfloat16_model_and_state(device: str) -> None:
    check(tiny_model(num_hidden_layers=1).to(torch.bfloat16), device, 0.05, state_dtype=torch.bfloat16)


@pytest.mark.parametrize(("state_dtype", "rounding"), [("int8", "nearest"), ("int4", "stochastic")])
def test_a_stored_state_is_that_of_a_cpu(
    state_dtype: str, rounding: str, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(1, 288, (1, 5), generator=torch.Generator().manual_seed(1))
    model = tiny_model(num_hidden_layers=1)
    accelerate(model, state_dtype=state_dtype, state_rounding=rounding, seed=3)
    with torch.inference_mode():
        monkeypatch.setattr("ghostssm.ops.stored.compiled", None)
        found = stepwise(model.to(triton_device), ids.to(triton_device), [3, 1, 1]).cpu()
        monkeypatch.undo()
        expected = stepwise(model.cpu(), ids, [3, 1, 1])
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_the_kernels_are_what_a_cuda_device_gets() -> None:
    assert gpu.device_types == {"cuda"}
    assert acceleration.decode_step_ is decode.decode_step_


def test_ghost_decides_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = random_windows(2, 9)
    plan = Calibration(tiny_model(num_hidden_layers=2).to(device), windows).plan("ghost", 6)
    monkeypatch.undo()
    expected = Calibration(tiny_model(num_hidden_layers=2), windows).plan("ghost", 6)
    assert plan.selections == expected.selections
    for name, score in expected.scores.items():
        torch.testing.assert_close(plan.scores[name], score, rtol=1e-4, atol=0)
    smaller = apply_plan(tiny_model(num_hidden_layers=2).to(device), plan)
    mixer = mixers_of(smaller)[0]
    streams = mixer_streams(mixer, torch.randn(1, 4, 32, device=device))
    assert gather_statistics(mixer, [streams], 1).output_energy.shape == (1, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["mamba2", "granite"])
def test_what_is_in_files_is_brought_to_the_gpu(case: str, tmp_path: Path) -> None:
    model = (tiny_model() if case == "mamba2" else tiny_hybrid(case)).cuda()
    windows = random_windows(6, 40)
    expected = Calibration(model, windows).plan("output+refit5+repair", 4)
    found = Calibration(model, windows, Scratch(tmp_path)).plan("output+refit5+repair", 4)
    assert found.selections == expected.selections
