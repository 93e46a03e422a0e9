"""``ghostssm bench``: speeds, their spread, and what is made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ghostssm.cli.bench import _verdict
from ghostssm.evaluation.speed import Rate, Speedup, Timings
from tests.conftest import Run


def test_bench(run: Run, small: Path) -> None:
    sizes = ["--batch", 1, 3, "--state-size", 8, 4, "--prompt-length", 5]
    code, out, _ = run("bench", small, *sizes, "--json")
    found = json.loads(out)
    assert code == 0
    assert [(row["batch"], row["state_size"]) for row in found["rows"]] == [(b, r) for b in (1, 3) for r in (16, 8, 4)]
    assert all(row["decode_tokens_per_second"] > 0 for row in found["rows"])
    assert found["rows"][0]["predicted_speedup"] == 1 < found["rows"][1]["predicted_speedup"]
    assert found["rows"][0]["speedup_range"] == [1, 1]
    for row in found["rows"]:
        low, high = row["speedup_range"]
        assert low <= row["speedup"] <= high
        for kind in ("prefill", "decode"):
            low, high = row[f"{kind}_range"]
            assert low <= row[f"{kind}_tokens_per_second"] <= high
    code, out, _ = run("bench", small, *sizes)
    assert code == 0
    assert out.count("±") == 2 * 6 + 1
    assert max(map(len, out.splitlines())) <= 100
    assert "N' = 4" in out
    assert len(re.findall(r"\d\.\d\d \(\d+\.\d\d to \d+\.\d\d\)", out)) == 4
    assert run("bench", small, "--batch", 0)[0] == 2


def test_without_sizes_a_half_and_a_quarter_are_measured(run: Run, small: Path) -> None:
    code, out, _ = run("bench", small, "--batch", 1, "--prompt-length", 2, "--json")
    assert code == 0
    assert [row["state_size"] for row in json.loads(out)["rows"]] == [16, 8, 4]


def test_a_rate_is_the_median_of_all_steps_with_the_range_of_the_rounds() -> None:
    rate = Timings(rounds=[[1.0, 1.0, 1.0, 9.0], [2.0, 2.0], [4.0]]).decode(8)
    assert rate == Rate(4.0, 2.0, 8.0)
    assert rate.text == "4 ±75%"
    assert Timings(prefills=[0.5, 1.0, 2.0]).prefill(1000) == Rate(1000.0, 500.0, 2000.0)


def test_rounds_are_compared_in_pairs() -> None:
    drifting = Timings(rounds=[[1.0, 9.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 0.1]])
    other = Timings(rounds=[[0.5], [1.25], [1.0]])
    assert Speedup.of(drifting, other) == Speedup(2.0, 1.6, 4.0)
    assert Speedup.of(drifting, other).decided()
    assert Speedup.of(other, drifting).decided()
    assert not Speedup.of(drifting, drifting).decided()


@pytest.mark.parametrize(
    ("speedups", "verdict"),
    [
        ({1: (1.0, 0.9, 1.1), 8: (1.4, 1.3, 1.5), 32: (2.0, 1.9, 2.1)}, "at least 1.1 times as fast at batch 8, 32;"),
        ({1: (1.4, 1.3, 1.5), 8: (1.2, 0.95, 1.5)}, "undecided at batch 8,"),
        ({1: (1.0, 0.9, 1.1), 8: (1.3, 1.0, 1.5)}, "undecided at batch 1, 8,"),
        ({1: (1.07, 1.05, 1.34)}, "undecided at batch 1,"),
        ({1: (1.05, 1.01, 1.08), 8: (0.9, 0.8, 0.99)}, "less than 1.1 times as fast at batch 1, 8"),
    ],
)
def test_verdicts(speedups: dict[int, tuple[float, float, float]], verdict: str) -> None:
    assert verdict in _verdict({batch: Speedup(*values) for batch, values in speedups.items()})
