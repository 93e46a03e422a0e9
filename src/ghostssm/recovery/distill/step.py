"""Distillation as a recovery step, ``+distill300``: on the calibration windows."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ghostssm.choices import DISTILL_STEPS
from ghostssm.plan.distillation import Distillation
from ghostssm.plan.surgery import change_parameters
from ghostssm.progress import Progress
from ghostssm.recovery.base import ModelStep, register_step, training_dtype
from ghostssm.recovery.distill.batches import Batches, HeldWindows, held_out_of
from ghostssm.recovery.distill.training import Listener, Settings, distill
from ghostssm.text.windows import Windows

TOKENS_PER_STEP = 4096


def _distill(
    pruned: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Windows,
    amount: int,
    seed: int,
    state_dtype: str | None,
    progress: Progress,
) -> Distillation:
    batch = max(1, min(TOKENS_PER_STEP // windows.length, len(windows) - held_out_of(len(windows))))
    batches = Batches(HeldWindows(windows), batch, seed)
    student, teacher = (
        copy.deepcopy(pruned).float(),
        dense if dense.dtype.itemsize >= 4 else copy.deepcopy(dense).float(),
    )
    settings = Settings(amount, batch, seed=seed, state_dtype=training_dtype(state_dtype))
    distilled = distill(student, teacher, batches, settings, listener=Listener(progress))
    change_parameters(pruned, distilled.changes)
    return distilled.record


register_step(
    ModelStep("distill", "gradient descent on the whole model towards the dense one, N steps", _distill, DISTILL_STEPS)
)
