"""Where the public names live; imported when the first of them is used."""

import sys

from ghostssm._version import __version__
from ghostssm.checkpoint import (
    Checkpoint,
    Description,
    OutputFolder,
    Source,
    Verification,
    describe,
    find_source,
    load,
    save,
    verify,
)
from ghostssm.checkpoint.exporting import export_checkpoint
from ghostssm.checkpoint.gguf import ExportedGGUF, export_gguf
from ghostssm.checkpoint.hub import push_to_hub
from ghostssm.checkpoint.streamed import StreamedCheckpoint, stream
from ghostssm.engines import Advice, advise, engine_names, nearest_state_size
from ghostssm.errors import (
    GhostError,
    GhostWarning,
    HubError,
    IncompleteError,
    InputError,
    LayoutError,
    ModelError,
    NumericalError,
    OutputError,
    PlanError,
    PrecisionWarning,
    StorageError,
    TextError,
)
from ghostssm.evaluation import Evaluation, evaluate
from ghostssm.methods import Evidence, Method, method_named, method_names
from ghostssm.methods.base import register as register_method
from ghostssm.models.forward import accelerate, restore
from ghostssm.models.layout import SSDLayout
from ghostssm.plan.decision import Selection
from ghostssm.plan.measurement import Difference, Measurement
from ghostssm.plan.plan import Plan
from ghostssm.plan.surgery import apply_plan, pad_state, pruned
from ghostssm.pruning.recipe import Recipe
from ghostssm.pruning.run import Calibration
from ghostssm.pruning.smallest import smallest_plan
from ghostssm.streaming.run import StreamedRun, prune_streamed
from ghostssm.text.sources import Text, read_text
from ghostssm.text.windows import Windows, cut_windows, evaluation_windows
from ghostssm.workflows.compare import Comparison, Row, compare

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

if "IPython" in sys.modules:
    from ghostssm.report.notebook import register_with_ipython

    register_with_ipython()
