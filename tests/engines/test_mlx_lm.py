"""Pruned models in mlx-lm: the same logits, whole and token by token, and the same greedy text as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mlx[cpu]' mlx-lm")

from check_engines import compare_logits
from engine_checkpoints import MODELS, checkpoint_of


@pytest.mark.parametrize("name", ["reference", *MODELS])
def test_pruned_model_runs_if_and_only_if_it_is_said_to(name: str, tmp_path: Path) -> None:
    entry = checkpoint_of(name, tmp_path)
    _, faults = compare_logits(entry, tmp_path)
    assert bool(faults) == (entry.levels["mlx-lm"] == "no"), (faults, entry.reasons["mlx-lm"])
