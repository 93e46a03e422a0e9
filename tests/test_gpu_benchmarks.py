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
    assert results["failures"] == []
    if name != "gpu_decode_step":
        monkeypatch.setattr(gpu, "device_types", set())
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        run(name, ["--dry-run"], monkeypatch)
        assert "DRY RUN" in capsys.readouterr().out


FAULTS = [
    # script, kernels, the one that fails, failures, and what rows are left
    ("gpu_decode_step", "stored", "stored_scan_", 1, ("state_dtype", {"bfloat16"})),
    ("gpu_model_decode", "norm", "norm_step", 4, ("side", {"transformers"})),
    ("gpu_scan", "chunks", "read_states", 1, ("work", {"training"})),
]


@pytest.mark.parametrize(("name", "of", "kernel", "failures", "left"), FAULTS)
@pytest.mark.usefixtures("triton_device")
def test_a_fault_in_one_kernel_leaves_the_results_of_others(
    name: str,
    of: Any,
    kernel: str,
    failures: int,
    left: tuple[str, set[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    def fault(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a fault of the kernel")

    monkeypatch.setattr(gpu.kernels(of), kernel, fault)
    with pytest.raises(SystemExit, match="a fault of the kernel"):
        run(name, ["--dry-run", "--json"], monkeypatch)
    results = json.loads(capsys.readouterr().out)
    measured = [row for row in results["rows"] if row.get("seconds", row.get("milliseconds"))]
    column, expected = left
    assert {row[column] for row in measured} == expected
    assert len(results["failures"]) == failures


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        run("gpu_prune", [], monkeypatch)
