"""In whatever order the packages come, transformers' auto classes know our model class."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ghostssm
from ghostssm.plan.surgery import apply_plan
from ghostssm.pruning.run import Calibration
from tests.conftest import random_windows, tiny_model
from tests.programs import in_process

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
    done = in_process(order + CHECK)
    assert done.returncode == 0, done.stderr


def test_a_process_that_begins_with_loading_knows_our_model_class(tmp_path: Path) -> None:
    """transformers' configs ask for its auto classes while they are being imported, too early for ours."""
    model = tiny_model()
    plan = Calibration(model, random_windows(2, 16)).plan("balanced", 4)
    folder = ghostssm.save(apply_plan(model, plan), plan, tmp_path / "smaller")
    code = "import sys, ghostssm; ghostssm.load(sys.argv[1])"
    done = in_process(code, folder)
    assert done.returncode == 0, done.stderr
