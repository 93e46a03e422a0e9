"""Verbs and the requests that they build: the same options with the same defaults, and a JSON that is an identity."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ghostssm
from ghostssm.cli.arguments import _default_text
from ghostssm.cli.bench import bench
from ghostssm.cli.compare import compare
from ghostssm.cli.evaluate import evaluate
from ghostssm.cli.export import export
from ghostssm.cli.prune import prune
from ghostssm.cli.reproduce import reproduce
from ghostssm.streaming.run_folder import RunFolder
from ghostssm.workflows.evaluate import EvaluateRequest

REQUESTS: dict[Any, Any] = {
    prune: ghostssm.PruneRequest,
    compare: ghostssm.CompareRequest,
    evaluate: EvaluateRequest,
    bench: ghostssm.BenchRequest,
    export: ghostssm.ExportRequest,
    reproduce: ghostssm.ReproduceRequest,
}
PARAMETERS = {
    "state_dtypes": "state_dtype",
    "state_sizes": "state_size",
    "batches": "batch",
    "engines": "engine",
    "tables": "table",
    "report": "with_report",
}
"""Fields whose parameters have other names; ``report`` is a file of ``compare``."""


@pytest.mark.parametrize("verb", REQUESTS, ids=lambda verb: verb.__name__)
def test_a_verb_has_every_option_of_its_request_with_the_same_default(verb: Callable[..., None]) -> None:
    parameters = inspect.signature(verb).parameters
    for field in fields(REQUESTS[verb]):
        if field.name == "recipe":  # it is made from --method, --repair, --refit and --per-layer
            continue
        parameter = next(parameters[name] for name in (PARAMETERS.get(field.name), field.name) if name in parameters)
        if field.default is MISSING:
            assert parameter.default is inspect.Parameter.empty
        elif (verb, field.name) not in ((compare, "report"), (prune, "output")):  # a file; in Python it may be left out
            given = parameter.default
            if field.name in ("calibration", "text"):  # which one hangs on the model
                given = _default_text(SimpleNamespace(params={"model": "org/model"}), given)
            assert (tuple(given) if isinstance(given, list) else given) == (field.default or given)
            assert bool(given) == bool(field.default)


def test_the_json_says_what_is_asked_for_and_not_where_it_lies() -> None:
    request = ghostssm.PruneRequest(
        "/home/me/model", "/home/me/out", 4, calibration="/home/me/a.txt", engines=("vllm",)
    )
    found = request.as_json()
    assert json.loads(json.dumps(found)) == found
    assert "/home" not in json.dumps(found)
    assert (found["model"], found["calibration"], found["engines"]) == ("model", "a.txt", ["vllm"])
    assert found != ghostssm.PruneRequest("/home/me/model", "x", 5, calibration="/home/me/a.txt").as_json()
    assert hash(request)


class _Died(BaseException):
    """What no handler catches."""


def test_a_run_goes_on_for_the_same_request_only(
    folder_of: Callable[..., Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first option that differs is named, with both values; where model and text lie makes no difference."""

    def asked(**options: Any) -> ghostssm.PruneRequest:
        known = {"state_size": 4, "recipe": "ghost", "windows": 3, "window_length": 64, "stream": True}
        texts = {"calibration": str(text_file), "model": str(folder), "output": str(tmp_path / "out")}
        return ghostssm.PruneRequest(**{**known, **texts, **options})

    def died(*_: Any) -> None:
        raise _Died

    folder = folder_of()
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "assemble", died)
        with pytest.raises(_Died):
            ghostssm.prune(asked())
    for options, message in (
        ({"seed": 7}, "differs in seed: it was 42, now it is 7"),
        ({"groups": "pooled"}, "differs in groups: it was 'equal', now it is 'pooled'"),
        ({"recipe": "ghost+repair"}, r"differs in method: it was 'ghost', now it is 'ghost\+repair'"),
        ({"state_size": None, "budget": 0.25}, "differs in state_size: it was 4, now it is None"),
        ({"windows": 2}, "differs in windows: it was 3, now it is 2"),
    ):
        with pytest.raises(ghostssm.OutputError, match=message):
            ghostssm.prune(asked(resume=True, **options))
    moved = tmp_path / "moved.txt"
    text_file.rename(moved)
    folder = folder.rename(tmp_path / "elsewhere")
    outcome = ghostssm.prune(asked(resume=True, calibration=str(moved)))
    assert outcome.plan.kept_state_size == 4
    again = ghostssm.prune(asked(resume=True, calibration=str(moved)))  # is finished
    assert again.plan.selections == outcome.plan.selections
