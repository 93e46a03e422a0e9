"""Where the public names live; imported when the first of them is used."""

from ghostssm._version import __version__
from ghostssm.acceleration import accelerate, restore
from ghostssm.checkpoint import Checkpoint, Description, OutputFolder, Source, describe, find_source, load, save
from ghostssm.checkpoint.streaming import StreamedCheckpoint, stream
from ghostssm.data.sources import Text, read_text
from ghostssm.data.windows import Windows, cut_windows
from ghostssm.errors import (
    GhostError,
    InputError,
    LayoutError,
    ModelError,
    NumericalError,
    OutputError,
    PlanError,
    TextError,
)
from ghostssm.evaluation import Difference, Evaluation, evaluate
from ghostssm.evaluation.compare import Comparison, Row, compare
from ghostssm.layout import SSDLayout
from ghostssm.methods import Evidence, Method, method_named, method_names
from ghostssm.plan import Plan, Selection
from ghostssm.pruning import Calibration, smallest_plan
from ghostssm.recipe import Recipe
from ghostssm.streaming import prune_streamed
from ghostssm.surgery import apply_plan, pruned

__all__ = [
    "Calibration",
    "Checkpoint",
    "Comparison",
    "Description",
    "Difference",
    "Evaluation",
    "Evidence",
    "GhostError",
    "InputError",
    "LayoutError",
    "Method",
    "ModelError",
    "NumericalError",
    "OutputError",
    "OutputFolder",
    "Plan",
    "PlanError",
    "Recipe",
    "Row",
    "SSDLayout",
    "Selection",
    "Source",
    "StreamedCheckpoint",
    "Text",
    "TextError",
    "Windows",
    "__version__",
    "accelerate",
    "apply_plan",
    "compare",
    "cut_windows",
    "describe",
    "evaluate",
    "find_source",
    "load",
    "method_named",
    "method_names",
    "prune_streamed",
    "pruned",
    "read_text",
    "restore",
    "save",
    "smallest_plan",
    "stream",
]
