"""ghostssm: trained Mamba-2 models that decode with a much smaller recurrent state.

checkpoint = ghostssm.load("state-spaces/mamba2-130m")
text = ghostssm.read_text("wikitext2", "calibration")
windows = ghostssm.cut_windows(text, checkpoint.require_tokenizer(), length=2048, count=128, seed=42)
plan = ghostssm.Calibration(checkpoint.model, windows).plan("ghost", state_size=64)
ghostssm.apply_plan(checkpoint.model, plan)
ghostssm.save(checkpoint, plan, "mamba2-130m-n64")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghostssm.models.registration import check_transformers, register_with_transformers

if TYPE_CHECKING:
    from ghostssm._api import *

__all__ = [
    "Advice",
    "Calibration",
    "Checkpoint",
    "Comparison",
    "Description",
    "Difference",
    "Evaluation",
    "Evidence",
    "ExportedGGUF",
    "GhostError",
    "GhostWarning",
    "HubError",
    "IncompleteError",
    "InputError",
    "LayoutError",
    "Measurement",
    "Method",
    "ModelError",
    "NumericalError",
    "OutputError",
    "OutputFolder",
    "Plan",
    "PlanError",
    "PrecisionWarning",
    "Recipe",
    "Row",
    "SSDLayout",
    "Selection",
    "Source",
    "StorageError",
    "StreamedCheckpoint",
    "StreamedRun",
    "Text",
    "TextError",
    "Verification",
    "Windows",
    "__version__",
    "accelerate",
    "advise",
    "apply_plan",
    "compare",
    "cut_windows",
    "describe",
    "engine_names",
    "evaluate",
    "evaluation_windows",
    "export_checkpoint",
    "export_gguf",
    "find_source",
    "load",
    "method_named",
    "method_names",
    "nearest_state_size",
    "pad_state",
    "prune_streamed",
    "pruned",
    "push_to_hub",
    "read_text",
    "register_method",
    "restore",
    "save",
    "smallest_plan",
    "stream",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the library at first use: PyTorch takes seconds, and ``ghostssm --help`` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'ghostssm' has no attribute {name!r}")
    check_transformers()
    from ghostssm import _api

    return getattr(_api, name)


def __dir__() -> list[str]:
    """The public names, also before their first use: for completion."""
    return __all__


register_with_transformers()
