"""Methods: each turns what is known of a mixer into a decision. They register themselves."""

from ghostssm.methods import balanced, baselines, ghost, joint, rrqr, sparsegpt  # noqa: F401
from ghostssm.methods.base import Evidence, Method, method_named, method_names

__all__ = ["Evidence", "Method", "method_named", "method_names"]
