"""How good a model is: loss per window, and differences between models with their standard errors."""

from ghostssm.evaluation.perplexity import Evaluation, evaluate
from ghostssm.plan.measurement import Difference

__all__ = ["Evaluation", "evaluate"]
