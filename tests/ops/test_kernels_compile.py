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
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What the script says of every kernel."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile() -> None:
    found = compiled()
    assert {line["kernel"] for line in found} == {
        "prepare_streams", "step_state", "group_norm", "energy_scan", "ssd_scan", "stored_scan", "tiered_scan",
        "chunk_states", "chunk_products",
    }  # fmt: skip
    for line in found:
        assert line["spilled"] == 0, line
        in_codes = line["kernel"] in ("stored_scan", "tiered_scan") and "float16" not in line["shape"]
        if in_codes:
            assert line["byte_accesses"] == 0, line
            loads = 4 if "int4" in line["shape"] else 8  # of 4 bytes, for 32 numbers of a thread
            assert line.get("early_loads", loads) >= loads, line
        elif "early_wide_loads" in line and "p 64" in line["shape"] and "N 60" not in line["shape"]:
            assert 0 < line["wide_stores"] <= line["early_wide_loads"], line
        if line["kernel"] == "stored_scan" and "float16" in line["shape"]:  # a scale's quotient has some of its own
            assert line["fused"] == 0, line


@pytest.mark.parametrize("target", ["ampere", "mi300"])
def test_products_compile_for_other_tensor_cores(target: str) -> None:
    """Without spills too, and in the 64 KiB of shared memory that an AMD GPU has."""
    found = compiled(target, "reading")
    assert {line["kernel"] for line in found} == {"chunk_states", "chunk_products"}
    for line in found:
        assert line["spilled"] == 0, line
        assert line["shared"] <= 65536, line
