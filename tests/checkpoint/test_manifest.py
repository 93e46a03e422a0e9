"""ghostssm.json is one value: written, read, and read where others wrote it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ghostssm
from ghostssm.checkpoint.left_out import LeftOut
from ghostssm.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest
from ghostssm.checkpoint.probe import Overflow, Probe
from ghostssm.errors import ModelError
from ghostssm.plan.distillation import Distillation, Point
from ghostssm.plan.measurement import Difference, Measurement
from ghostssm.plan.provenance import CalibrationText, Provenance
from tests.checkpoint.test_round_trip import pruned_checkpoint

WHOLE = Manifest(
    ghostssm="1.0",
    base_model="org/base",
    base_model_sha256="00",
    dialect="transformers",
    untied_head=True,
    method="ghost",
    state_size_before=16,
    state_size_after=(4, 5),
    options=Provenance(4, "each", 0, 1, CalibrationText("text.txt", "01", "02", 3, 64, None)),
    request={"method": "ghost", "state_size": 4, "engines": ["vllm"]},
    dtype="bfloat16",
    device="cpu",
    distillations=(
        Distillation(
            *("org/base", "text.txt", None, "03", 2, 128, 2, 0, 1e-3, "mixers", 4),
            curve=(Point(0, 0, 0.5, Difference(0.25, 0.125)), Point(2, 128, 0.25, Difference(0.125, 0.0625))),
            ended="all steps were taken",
            before=(Measurement("text.txt", 1, 64, 2.5, 2.75, Difference(0.25, 0.125)),),
            state_dtype="int8",
        ),
    ),
    measured=Measurement("text.txt", 1, 64, 2.5, 2.75, Difference(0.25, 0.125)),
    stored_state_size=5,
    left_out=LeftOut(config_keys=("mtp",)),
    missing=("the tokenizer",),
    overflow=Overflow("float16", "the head"),
    versions={"python": "3.11", "numba": None},
    probe=Probe((1, 2), (0.5, 0.25), (1.0, 2.0), (3.0, 4.0), 1e-3, "float32"),
    files={"config.json": FileRecord("ab", 3)},
    others={"licence": {"of": ["another version"]}},
)


def test_every_field_is_written_and_read() -> None:
    assert Manifest.from_json(json.loads(json.dumps(WHOLE.as_json()))) == WHOLE
    defaults = Manifest()
    assert all(getattr(WHOLE, field.name) != getattr(defaults, field.name) for field in dataclasses.fields(Manifest))
    assert Manifest.from_json(defaults.as_json()) == defaults


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [{}], {"before": 0, "after": []}, True, math.nan])
def test_what_is_not_understood_is_as_if_it_were_not_there(value: Any) -> None:
    whole = WHOLE.as_json()
    for name in whole:
        found = Manifest.from_json(whole | {name: value})
        json.dumps(found.as_json())
        assert found.others == (WHOLE.others if name != "licence" else {"licence": value})
    odd = dict.fromkeys(whole, value)
    assert Manifest.from_json(odd).probe is None


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5]},
        {"mean": [0.5, math.nan]},
        {"largest": [3.0, 10**400]},
        {"token_ids": [True, 1]},
        {"dtype": "complex64"},
        {"tolerance": "wide"},
    ],
)
def test_broken_probes_are_none(change: dict[str, Any]) -> None:
    assert WHOLE.probe is not None
    assert Probe.from_json(dataclasses.asdict(WHOLE.probe) | change) is None


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    assert not Manifest.is_in(tmp_path)
    with pytest.raises(ModelError, match=r"holds no ghostssm\.json"):
        Manifest.read(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("[]")
    with pytest.raises(ModelError):
        Manifest.read(tmp_path)


def test_what_was_asked_for_is_kept_by_exports(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, plan = pruned_checkpoint(folder_of())
    request = {"method": "ghost", "state_size": 5}
    written = ghostssm.save(checkpoint, plan, tmp_path / "out", request=request)
    (written / MANIFEST_FILE).write_text(json.dumps(Manifest.read(written).as_json() | {"later": 1}))
    exported = ghostssm.export_checkpoint(ghostssm.load(str(written)), tmp_path / "theirs", dialect="mamba_ssm")
    before, after = Manifest.read(written), Manifest.read(exported)
    assert (after.request, after.others, after.stored_state_size) == (request, {"later": 1}, 5)
    assert (after.options, after.measured, after.ghostssm) == (before.options, before.measured, before.ghostssm)
    assert ghostssm.verify(exported).passed
