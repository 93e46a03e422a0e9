"""What ``inspect --predict`` says that a prune takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import ghostssm
from ghostssm.models.families import mixers_of
from ghostssm.pruning import forecast as forecasting
from ghostssm.pruning.forecast import forecast, product_rate
from tests.conftest import Run, tiny_model


def test_every_matrix_of_a_block_is_multiplied_once_a_token(folder_of: Callable[..., Path]) -> None:
    """On many tokens or at a larger state it takes longer; the units are those of the model's own matrices and more."""
    described = ghostssm.describe(str(folder_of(hidden_size=64, num_heads=16)))
    matrices = sum(
        part.weight.numel()
        for mixer in mixers_of(tiny_model(hidden_size=64, num_heads=16))
        for part in mixer.module.modules()
        if isinstance(part, nn.Linear)
    )
    few, many, larger = (
        forecast(described, size, tokens, rate=1e9).seconds for size, tokens in ((4, 10**6), (4, 2 * 10**6), (8, 10**6))
    )
    per_token = (many - few) / 1e6 * 1e9
    assert per_token > matrices + 3 * 64 * 16  # and every number of the state
    assert few < larger < many


def test_memory_is_the_weights_the_windows_and_less_where_it_is_streamed(folder_of: Callable[..., Path]) -> None:
    described = ghostssm.describe(str(folder_of(hidden_size=256, num_heads=64, num_hidden_layers=48)))
    small, large = (forecast(described, 4, tokens, rate=1e9) for tokens in (10**3, 10**7))
    weights = 4 * described.parameters
    assert small.memory > 2 * weights > 50e6
    assert small.streamed_memory < small.memory - weights
    assert large.streamed_memory - small.streamed_memory > 4 * 256 * (10**7 - 10**3)


def test_inspect_predicts_when_it_is_asked(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("inspect", small, "--predict", "--state-size", 4)
    assert code == 0, err
    assert "A prune with GHOST on 262,144 tokens takes about " in out
    found = json.loads(run("inspect", small, "--predict", "--json")[1])["predicted_prune"]
    assert found["tokens"] == 262144
    assert 0 < found["seconds"] < 3600
    assert 0 < found["streamed_memory"] < found["memory"] + 2**20

    def measured() -> float:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(forecasting, "product_rate", measured)
    code, out, _ = run("inspect", small)
    assert code == 0
    assert "A prune with GHOST" not in out


def test_a_model_that_was_projected_has_no_prediction(run: Run, small: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run("prune", small, "--state-size", 4, "--method", "balanced", "--calibration", text_file, "--windows", 2,
        "--window-length", 64, "--output", output)  # fmt: skip
    code, _, err = run("inspect", output, "--predict")
    assert code == 2
    assert "prune the original instead" in " ".join(err.split())


def test_a_rate_is_that_of_the_median_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of products of (256, 1024) and (1024, 2048), the first of which is not counted; one of them is interrupted."""
    seconds = [9.0, 0.5, 0.5, 0.5, 7.0, 0.5, 0.5, 0.5]
    clock = itertools.accumulate(itertools.chain.from_iterable((0.0, each) for each in seconds))
    monkeypatch.setattr(forecasting.time, "perf_counter", lambda: next(clock))
    assert product_rate() == 256 * 1024 * 2048 / 0.5
