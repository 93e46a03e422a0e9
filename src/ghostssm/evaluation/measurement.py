"""Measure what a pruned model loses."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.ops.state_format import StateStorage
from ghostssm.plan.measurement import Measurement
from ghostssm.progress import Progress, silent
from ghostssm.text.windows import Windows
from ghostssm.units import text_name


def measurement_of(windows: Windows, dense: Evaluation, pruned: Evaluation) -> Measurement:
    """The losses of a dense and a pruned model on the same windows, as one value."""
    excess = pruned.excess_over(dense)
    text = text_name(windows.text_name)
    return Measurement(text, len(windows), windows.length, dense.loss, pruned.loss, excess)


def evaluate_in_float32(
    model: PreTrainedModel, windows: Windows, progress: Progress = silent, state_dtype: str = "float32"
) -> Evaluation:
    """The model's loss in float32; a model in half precision is copied for it, and stays as it is.

    Args:
        state_dtype: of the recurrent state alone, rounded after every token.

    Raises:
        NumericalError: a loss that is not finite.
    """
    whole = model if model.dtype.itemsize >= 4 else copy.deepcopy(model).float()
    return evaluate(whole, windows, progress, storage=StateStorage.of(state_dtype))
