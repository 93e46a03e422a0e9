"""In whatever order the packages come, transformers' auto classes know our model class."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("ghost_mamba2")
assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == "GhostMamba2ForCausalLM"
"""


def test_public_names_are_there_for_completion_before_their_first_use() -> None:
    code = "import ghostssm, sys; assert 'load' in dir(ghostssm); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "order",
    [
        "import ghostssm; from transformers import Mamba2ForCausalLM",
        "import ghostssm; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.register",
    ],
)
def test_orders_of_import(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", order + CHECK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
