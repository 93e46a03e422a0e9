"""Trained models and real text: scores by brute force, and GHOST against its baselines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.mamba2 import modeling_mamba2

import ghostssm
from ghostssm.calibration.walk import LayerWalk
from ghostssm.checkpoint.description import described
from ghostssm.checkpoint.loading import Checkpoint
from ghostssm.ops.ssd import ssd_chunked
from ghostssm.text.windows import Windows
from ghostssm.workflows.compare import compare_on
from ghostssm.workflows.inputs import Inputs

SHARED = Path(os.environ.get("GHOSTSSM_TEST_DATA", Path(__file__).parents[2] / "shared"))
ENGLISH, WIKITEXT = SHARED / "models" / "english-4m", SHARED / "data" / "wikitext-2"


@dataclass(frozen=True)
class Case:
    checkpoint: Checkpoint
    calibration: Windows
    test: Windows


@pytest.fixture(
    scope="module",
    params=[
        "reference",
        pytest.param(
            "english-4m",
            marks=[
                pytest.mark.shared,
                pytest.mark.skipif(not ENGLISH.is_dir(), reason=f"needs a trained model at {ENGLISH}"),
            ],
        ),
    ],
)
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "reference":
        model, calibration, test = "reference", "stdlib", "stdlib"
    else:
        model, calibration, test = str(ENGLISH), str(WIKITEXT / "valid.txt"), str(WIKITEXT / "test.txt")
    checkpoint = ghostssm.load(model, dtype=torch.float32)
    tokenizer = checkpoint.require_tokenizer()
    return Case(
        checkpoint,
        ghostssm.cut_windows(ghostssm.read_text(calibration, "calibration"), tokenizer, 512, 8, seed=42),
        ghostssm.cut_windows(ghostssm.read_text(test, "evaluation"), tokenizer, 512, 12),
    )


def scan_arguments(model: PreTrainedModel, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """What transformers' own forward pass hands to its scan, layer by layer."""
    calls: list[tuple[torch.Tensor, ...]] = []
    stock = modeling_mamba2.mamba2_chunk_scan

    def recording(x: Any, dt: Any, A: Any, B: Any, C: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((x, torch.nn.functional.softplus(dt + kwargs["dt_bias"]), A, B, C))
        return stock(x, dt, A, B, C, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(modeling_mamba2, "mamba2_chunk_scan", recording)
        model(input_ids=ids, use_cache=False)
    return calls


def test_scores_equal_the_squared_change_of_y_from_zeroing_each_channel(case: Case) -> None:
    model = case.checkpoint.model
    ids = case.calibration.ids[:1, :160]
    windows = Windows(ids, "one window", "", 1.0, None)
    walk = LayerWalk(model, windows)
    for block, recorded in zip(walk.blocks(), scan_arguments(model, ids), strict=True):
        statistics, mixer = block.statistics(), block.present_mixer
        x, dt, A, B, C = (tensor.double() for tensor in recorded)
        y, _ = ssd_chunked(x, dt, A, B, C)
        brute = torch.zeros(mixer.layout.n_groups, mixer.layout.state_size, dtype=torch.float64)
        for group in range(mixer.layout.n_groups):
            for first in range(0, mixer.layout.state_size, 32):  # 32 channels at a time, as a batch of mutilated copies
                copies = C.repeat(32, 1, 1, 1)
                for copy in range(32):
                    copies[copy, :, group, first + copy] = 0
                changed, _ = ssd_chunked(
                    x.expand(32, -1, -1, -1), dt.expand(32, -1, -1), A, B.expand(32, -1, -1, -1), copies
                )
                brute[group, first : first + 32] = (changed - y).square().sum((1, 2, 3))
        torch.testing.assert_close(statistics.output_energy * statistics.tokens, brute, rtol=1e-4, atol=0)
        block.advance()


def excess(case: Case, methods: tuple[str, ...], sizes: tuple[int, ...]) -> dict[tuple[str, int], float]:
    inputs = Inputs(case.checkpoint, case.calibration, case.test)
    about = described(case.checkpoint.model, "here", case.checkpoint.source)
    result = compare_on(inputs, ghostssm.CompareRequest("here", sizes, methods, batches=()), about)
    return {(row.method, row.state_size): row.excess for row in result.rows}


def test_what_ghost_and_its_neighbours_lose(case: Case) -> None:
    """GHOST at most half of what magnitude and random lose; what goes past GHOST loses less than it."""
    found = excess(case, ("ghost", "magnitude", "random"), (64, 32, 16))
    for size in (64, 32, 16):
        assert found["ghost", size] <= 0.5 * found["magnitude", size]
        assert found["ghost", size] <= 0.5 * found["random", size]
    further = excess(case, ("output+repair", "balanced"), (32,))
    assert further["output+repair", 32] < found["ghost", 32]
    assert further["balanced", 32] < 0.6 * found["ghost", 32]


def test_own_forward_equals_transformers(case: Case) -> None:
    model, window = case.checkpoint.model, case.test.ids[:1]
    with torch.inference_mode():
        expected = model(input_ids=window, labels=window).loss.double()
    found = ghostssm.evaluate(model, Windows(window, "", "", 1.0, None)).losses[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
