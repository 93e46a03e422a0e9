"""Plans on disk."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghostssm.errors import PlanError
from ghostssm.plan.decision import Decision, Selection
from ghostssm.plan.plan import Plan
from ghostssm.plan.provenance import CalibrationText, Provenance

PLAN = Plan(
    method="ghost",
    model_type="mamba2",
    n_groups=2,
    state_size=8,
    decisions={"a": Decision(Selection(((0, 3), (1, 2)))), "b": Decision(Selection(((5,), (0, 1, 7))))},
    scores={"a": torch.rand(2, 8, dtype=torch.float64), "b": torch.rand(2, 8, dtype=torch.float64)},
    provenance=Provenance(3, "pooled", 1, 8, CalibrationText("book.txt", "ab", "cd", 4, 512, 42)),
)


def document(tmp_path: Path) -> dict[str, Any]:
    PLAN.save(tmp_path)
    return json.loads((tmp_path / "plan.json").read_text())


def test_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path)
    for path in (tmp_path, tmp_path / "plan.json"):
        read = Plan.read(path)
        assert read.selections == PLAN.selections
        assert (read.method, read.n_groups, read.state_size, read.provenance) == ("ghost", 2, 8, PLAN.provenance)
        assert all(torch.equal(read.scores[name], PLAN.scores[name]) for name in PLAN.scores)


def test_places_may_be_strings_and_folders_are_made(tmp_path: Path) -> None:
    place = str(tmp_path / "plans" / "first")
    PLAN.save(place)
    assert Plan.read(place).selections == Plan.read(place + "/plan.json").selections == PLAN.selections


def test_sizes() -> None:
    assert PLAN.kept_state_size == 3
    assert PLAN.kept_channels == 8
    assert PLAN.selections["b"].padded(4) == ((5, -1, -1, -1), (0, 1, 7, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "format is 'x'"),
        ({"version": 1}, "version is 1"),
        ({"n_groups": "2"}, "n_groups is '2'"),
        ({"selections": {}}, "selections is missing or empty"),
        ({"selections": {"a": [[0, 3]]}}, "1 groups, expected 2"),
        ({"selections": {"a": [[0, 8], [1]]}}, "channel 8, expected integers from 0 to 7"),
        ({"selections": {"a": [[3, 0], [1]]}}, "not strictly ascending"),
        ({"selections": {"a": [[0.5], [True]]}}, "channel 0.5"),
        ({"selections": {"a": [[], []]}}, "keep no channel"),
        ({"projected": {"a": 2}}, "projected names some mixers"),
        ({"changed": {"a": ["D"]}}, "changed is not a list"),
        ({"tiers": None}, "tiers is not an object"),
        ({"state_size": 2**31}, "state_size is 2147483648, expected an integer from 1 to 1048576"),
        ({"projected": {"a": 2**31, "b": 2}}, "no integer from 1 to 1048576"),
    ],
)
def test_faults_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(document(tmp_path) | change))
    with pytest.raises(PlanError, match=message.replace("[", r"\[")):
        Plan.read(tmp_path)


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    broken = document(tmp_path) | {"version": 9, "state_size": 0, "method": None}
    (tmp_path / "plan.json").write_text(json.dumps(broken))
    with pytest.raises(PlanError) as caught:
        Plan.read(tmp_path)
    assert all(word in str(caught.value) for word in ("version", "state_size", "method"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    st.sampled_from(
        [
            *("format", "version", "method", "n_groups", "state_size", "selections", "provenance"),
            *("per_layer", "projected", "tiers", "changed", "distillations"),
        ]
    ),
    json_values,
)
def test_any_value_anywhere_is_accepted_or_refused_in_words(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(document(tmp_path) | {key: value}))
    with contextlib.suppress(PlanError):
        Plan.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"format": '])
def test_no_plan_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError):
        Plan.read(tmp_path)
