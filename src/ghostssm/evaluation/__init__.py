"""How good a model is: loss per window, and differences between models with their standard errors."""

from ghostssm.evaluation.perplexity import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
