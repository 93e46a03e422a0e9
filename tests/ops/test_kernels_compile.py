"""The kernels compile for a Hopper GPU, here and without one: no register is spilled, the state moves 16 bytes at a
time, all of it under way before anything waits, and what is to be rounded as on a CPU has no fused operations. The
interpreter, in which the other tests run them, takes much that the compiler does not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile() -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in found} == {
        "prepare_streams", "step_state", "group_norm", "energy_scan", "ssd_scan", "stored_scan", "tiered_scan",
        "chunk_states", "chunk_products",
    }  # fmt: skip
    for line in found:
        assert line["spilled"] == 0, line
        if "early_wide_loads" in line and "p 64" in line["shape"] and "N 60" not in line["shape"]:
            assert 0 < line["wide_stores"] <= line["early_wide_loads"], line
        if line["kernel"] == "stored_scan" and "float16" in line["shape"]:  # a scale's quotient has some of its own
            assert line["fused"] == 0, line
