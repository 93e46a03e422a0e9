"""vLLM and SGLang read what ghostssm writes; only where they are installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "check_engines.py"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engine(engine: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    for step in ("write", engine):
        subprocess.run([sys.executable, "-W", "ignore", str(TOOL), step, str(tmp_path)], check=True)
