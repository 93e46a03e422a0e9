"""Model families: where a model keeps its Mamba-2 mixers, and how its config names their sizes."""

from ghostssm.models.families import own, stock  # noqa: F401  (they register themselves)
from ghostssm.models.families.family import Family
from ghostssm.models.families.registry import (
    check_model,
    check_plain,
    family_named,
    family_of,
    layout_of,
    mixers_of,
    supported_model_types,
)

__all__ = [
    "Family",
    "check_model",
    "check_plain",
    "family_named",
    "family_of",
    "layout_of",
    "mixers_of",
    "supported_model_types",
]
