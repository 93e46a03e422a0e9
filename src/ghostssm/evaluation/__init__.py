"""How good and how fast a model is: losses and their differences with standard errors, recall, copying, speed."""

from ghostssm.evaluation.perplexity import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
