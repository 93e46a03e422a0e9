"""Methods: each turns what is known of a mixer into one score per state channel. One file per method."""

from ghostssm.methods import controllability, ghost, magnitude, observability, product, random, taylor  # noqa: F401
from ghostssm.methods.base import Evidence, Method, method_named, method_names

__all__ = ["Evidence", "Method", "method_named", "method_names"]
