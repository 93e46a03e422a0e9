"""The GPU benchmarks run from end to end, dry and tiny."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest
import torch

from ghostssm.ops import gpu

CASES = [
    ("gpu_decode_step", ["--sweep"], "share"),
    ("gpu_model_decode", [], "tokens_per_second"),
    ("gpu_prune", [], "peak_bytes"),
    ("gpu_scan", [], "milliseconds"),
]


def run(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *options])
    with torch.inference_mode():
        importlib.import_module(name).main()


@pytest.mark.parametrize(("name", "options", "column"), CASES)
@pytest.mark.usefixtures("triton_device")
def test_dry_runs(name: str, options: list[str], column: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run(name, ["--dry-run", "--json", *options], monkeypatch)
    results = json.loads(capsys.readouterr().out)
    assert results["dry_run"]
    assert results["machine"]["torch"]
    assert all(row[column] > 0 for row in results["rows"])
    if name == "gpu_decode_step":
        # Where the step is not one kernel, dt and its bias are added in bfloat16, as transformers does.
        bounds = {"bfloat16": 1e-5, "int8": 1e-2}
        assert {row["state_dtype"] for row in results["rows"]} == set(bounds)
        assert all(row["error"] < bounds[row["state_dtype"]] for row in results["rows"])
    if name == "gpu_scan":
        assert all(row["error"] < 1e-5 for row in results["rows"])
    if name != "gpu_decode_step":
        monkeypatch.setattr(gpu, "device_types", set())
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        run(name, ["--dry-run"], monkeypatch)
        assert "DRY RUN" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        run("gpu_prune", [], monkeypatch)
