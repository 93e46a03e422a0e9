"""generation_config.json: how a model's authors want text drawn from it. No number computed here depends on it."""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from ghostssm.checkpoint.config_checks import without_acting_entries
from ghostssm.errors import GhostWarning, ModelError
from ghostssm.files.reading import read_json_object
from ghostssm.models.transformers_private import quiet_transformers


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """The generation config in a folder; None if there is none, or, with a warning, one that transformers refuses."""
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
