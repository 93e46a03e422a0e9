"""Drawing text from a model: generation_config.json, which no number computed here depends on, and a guard for NaN."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.utils import GENERATION_CONFIG_NAME

from ghostssm.checkpoint.config_checks import without_acting_entries
from ghostssm.errors import CONVERT, GhostWarning, ModelError, NumericalError
from ghostssm.files.reading import read_json_object
from ghostssm.models.transformers_private import quiet_transformers
from ghostssm.units import dtype_name

if TYPE_CHECKING:
    from ghostssm.checkpoint.loading import Checkpoint


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config in a folder; None if there is none. If transformers refuses it: None, with a warning."""
    file = folder / GENERATION_CONFIG_NAME
    try:
        values = without_acting_entries(read_json_object(file, ModelError))
        with quiet_transformers():
            return GenerationConfig.from_dict(values)
    except FileNotFoundError:
        return None
    except Exception as error:  # transformers' validation raises many classes
        reason = str(error) if isinstance(error, ModelError) else f"{file}: {error}"
        warnings.warn(
            f"The generation config can't be used and is carried over as it is; transformers' defaults serve here, and "
            f"its own loader may refuse the folder until the file is corrected or removed ({reason})",
            GhostWarning,
            stacklevel=2,
        )
        return None


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """For transformers' ``generate``: raises NumericalError in place of tokens that come of NaN."""

    def __init__(self, checkpoint: Checkpoint):
        self._where = f"{checkpoint.source.name} in {dtype_name(checkpoint.model.dtype)}"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # Minus infinity rules a token out.
        if torch.isnan(scores).any() or torch.isposinf(scores).any():
            raise NumericalError(
                f"NaN or Inf in the logits of {self._where}: its activations overflow, or it is broken. "
                f"Convert it, `{CONVERT}` (or f32), and generate with that."
            )
        return scores
